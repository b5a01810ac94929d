"""Access control of the dashboard, whose transcripts and audio are private.

Any web page in a browser on this machine could connect to the server. So requests from pages of
other origins are refused. A server on the loopback address needs no token, but answers requests
for a loopback host name only, because a foreign name may resolve to this machine (DNS rebinding).
On other addresses, or where a token is configured, the token is required: once in the address of
the page, from then on as a cookie.
"""

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from stream_hbaf.audio.push_source import is_loopback
from stream_hbaf.config import DashboardConfig

TOKEN_BYTES = 24

# The page loads only its own files, runs no inline scripts, and can't be framed.
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a request that is refused."""

    status: int  # of HTTP
    line: str  # the reason, for people


class AccessControl:
    """Checks each request's host name, origin and token.

    ``token`` is empty where none is needed.
    """

    def __init__(self, config: DashboardConfig) -> None:
        self._loopback_only = is_loopback(config.host)
        self._host = config.host
        if config.token is not None:
            self.token = config.token.get_secret_value()
        else:
            self.token = "" if self._loopback_only else secrets.token_urlsafe(TOKEN_BYTES)

    def check(self, *, host: str, origin: str | None, token: str) -> Refusal | None:
        """None if the request is allowed. ``host`` and ``origin`` are its headers (programs other
        than browsers send no origin); ``token`` is from its address or cookie."""
        name = _hostname(f"//{host}")
        if self._loopback_only and not is_loopback(name) and name != self._host:
            return Refusal(421, "this page answers to localhost only")
        if origin is not None and origin.partition("://")[2] != host:
            return Refusal(403, "pages of other sites are refused")
        if not self._is_valid(token):
            return Refusal(401, "open the address that stream-hbaf printed: it holds the token")
        return None

    def _is_valid(self, token: str) -> bool:
        # The time of the comparison must not depend on how much of the token is right.
        return not self.token or hmac.compare_digest(
            token.encode(errors="replace"), self.token.encode()
        )


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
