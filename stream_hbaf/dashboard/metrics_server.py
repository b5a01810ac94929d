"""Serves the metrics of a run to Prometheus, and whether it is alive.

/metrics    all metrics, in Prometheus' text format or OpenMetrics
/healthz    "ok" once the models are loaded and sound is taken in; needs no token

They have a port of their own: who reads metrics must not be able to read transcripts.
"""

import asyncio
from collections.abc import Awaitable, Callable

# First: its library names the extra where both are missing; aiohttp is the dashboard's, too.
from stream_hbaf.publish.metrics import Metrics

# isort: split
from aiohttp import web

from stream_hbaf.config import MetricsConfig
from stream_hbaf.dashboard.access import AccessControl
from stream_hbaf.dashboard.http_server import HttpServer
from stream_hbaf.events import AnyEvent

TOKEN_ADVICE = "send the header 'Authorization: Bearer TOKEN' with the token of this port"
MAX_REQUEST = 1 << 10  # bytes; nobody has to send any

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class MetricsServer:
    """A publisher that counts events, and serves what it has counted.

    ``metrics`` is set before ``start``: it is made when the models are loaded.
    """

    def __init__(self, config: MetricsConfig) -> None:
        self.metrics: Metrics | None = None
        self._access = AccessControl(config, advice=TOKEN_ADVICE)
        self._token_is_drawn = config.token is None and bool(self._access.token)
        application = web.Application(middlewares=[self._check_access], client_max_size=MAX_REQUEST)
        application.add_routes(
            [web.get("/metrics", self._send_metrics), web.get("/healthz", self._send_health)]
        )
        self._server = HttpServer(application, section="metrics", config=config)

    @property
    def address(self) -> str:
        """The metrics' URL, and the token if nobody has chosen it."""
        token = f" (bearer token: {self._access.token})" if self._token_is_drawn else ""
        return f"http://{self._server.address}/metrics{token}"

    async def start(self) -> None:
        """Open the port. Raises ConfigError if it can't be opened."""
        await self._server.start()

    async def send(self, event: AnyEvent) -> None:
        """Count an event; never waits."""
        assert self.metrics is not None  # since ``start``
        self.metrics.count(event)

    async def run(self) -> None:
        """Wait until cancelled: the server has its own tasks."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        """Close the port."""
        await self._server.close()

    @web.middleware
    async def _check_access(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        if request.path == "/healthz":  # probes of containers can't keep a secret
            token = self._access.token
        refusal = self._access.refuse(
            host=request.host, origin=request.headers.get("Origin"), token=token
        )
        if refusal is not None:
            return refusal
        self._server.establish(request)
        return await handler(request)

    async def _send_metrics(self, request: web.Request) -> web.StreamResponse:
        assert self.metrics is not None  # since ``start``
        content, content_type = self.metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=content, headers={"Content-Type": content_type})

    async def _send_health(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="ok\n")
