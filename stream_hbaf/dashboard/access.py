"""Decides which requests are answered, and what the answers allow a browser to do."""

import hmac
import secrets

from aiohttp import web

from stream_hbaf.audio.push_source import is_loopback
from stream_hbaf.audio.websocket import hostname
from stream_hbaf.config import DashboardConfig, MetricsConfig

TOKEN_BYTES = 24

# The page loads only its own files, runs no inline scripts, and can't be framed.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class AccessControl:
    """Checks each request: transcripts and audio are private.

    Any web page in a browser on this machine could connect to the server. So requests from pages
    of other origins are refused. A server on the loopback address needs no token, but answers
    requests for a loopback host name only, because a foreign name may resolve to this machine (DNS
    rebinding). On other addresses, or where a token is configured, the token is required.
    ``token`` is empty where none is needed. ``advice`` says how to send it.
    """

    def __init__(self, config: DashboardConfig | MetricsConfig, *, advice: str) -> None:
        self._advice = advice
        self._loopback_only = is_loopback(config.host)
        self._host = config.host
        drawn = "" if self._loopback_only else secrets.token_urlsafe(TOKEN_BYTES)
        self.token = config.token.get_secret_value() if config.token else drawn

    def refuse(self, *, host: str, origin: str | None, token: str) -> web.Response | None:
        """None if the request is allowed. ``host`` and ``origin`` are its headers (programs other
        than browsers send no origin); ``token`` is what it brings."""
        name = hostname(f"//{host}")
        if self._loopback_only and not is_loopback(name) and name != self._host:
            return _refusal(421, "this port answers to localhost only")
        if origin is not None and origin.partition("://")[2] != host:
            return _refusal(403, "pages of other sites are refused")
        # The time of the comparison must not depend on how much of the token is right.
        given, needed = token.encode(errors="replace"), self.token.encode()
        if self.token and not hmac.compare_digest(given, needed):
            return _refusal(401, self._advice)
        return None


def _refusal(status: int, line: str) -> web.Response:
    return web.Response(status=status, text=f"stream-hbaf: {line}\n")


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the headers of every response."""
    response.headers.update(HEADERS)
    # The page and its modules must be of one version.
    response.headers.setdefault("Cache-Control", "no-cache")
