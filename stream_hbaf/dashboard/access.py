"""Who may see the page: its words and sound are private, and every web page of the world can make
a browser on this machine connect to it.

Listening on this machine only, the page needs no token, but answers to this machine's own names
only: a foreign name may be made to lead here. Elsewhere, or where a token is set, it comes once in
the address and is a cookie from then on. In both cases no page of another site gets an answer.
"""

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from stream_hbaf.audio.push_source import is_loopback
from stream_hbaf.config import DashboardConfig

TOKEN_BYTES = 24

# Nothing is loaded from elsewhere, nothing runs that isn't a file of the page, nobody frames it.
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
    """Why somebody is turned away: an HTTP status and a line for whoever reads it."""

    status: int
    line: str


class Gate:
    """Lets in whoever asks under our own name, from our own page, with the token if there is one.

    ``token`` is empty where none is needed.
    """

    def __init__(self, config: DashboardConfig) -> None:
        self._only_here = is_loopback(config.host)
        self._host = config.host
        if config.token is not None:
            self.token = config.token.get_secret_value()
        else:
            self.token = "" if self._only_here else secrets.token_urlsafe(TOKEN_BYTES)

    def refusal(self, *, host: str, origin: str | None, token: str) -> Refusal | None:
        """None lets a request in. ``host`` and ``origin`` are its headers, ``token`` is what came
        with it; programs other than browsers send no origin."""
        name = _hostname(f"//{host}")
        if self._only_here and not is_loopback(name) and name != self._host:
            return Refusal(421, "this page answers to localhost only")
        if origin is not None and origin.partition("://")[2] != host:
            return Refusal(403, "pages of other sites get nothing here")
        if not self._knows(token):
            return Refusal(401, "open the address that stream-hbaf printed: it holds the token")
        return None

    def _knows(self, token: str) -> bool:
        # In a time that doesn't depend on how much of it is right.
        return not self.token or hmac.compare_digest(
            token.encode(errors="replace"), self.token.encode()
        )


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
