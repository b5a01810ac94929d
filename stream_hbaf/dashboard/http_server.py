"""Serves a web application on a port with limits, for those who are allowed to read it."""

import logging
import socket

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from stream_hbaf.audio.port import Port, open_port
from stream_hbaf.audio.push_source import Address, plain_reason
from stream_hbaf.config import DashboardConfig, MetricsConfig
from stream_hbaf.dashboard.access import add_headers
from stream_hbaf.errors import ConfigError

ANY_ADDRESS = ("0.0.0.0", "::")  # to listen on all interfaces; not an address to connect to
IDLE_S = 15.0  # of a connection after a request
GOODBYE_S = 1.0  # for requests that are being answered when the server is closed

LOG = logging.getLogger(__name__)


class HttpServer:
    """An application on the port that a section of the settings names."""

    def __init__(
        self, application: web.Application, *, section: str, config: DashboardConfig | MetricsConfig
    ) -> None:
        application.on_response_prepare.append(add_headers)
        self._section = section
        self._config = config
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=_server_log(),
            shutdown_timeout=GOODBYE_S,
            keepalive_timeout=IDLE_S,
        )
        self._listening: Port | None = None
        self.port = config.port  # the one that was found, once it is started

    @property
    def address(self) -> Address:
        """Where to connect to."""
        host = self._config.host
        return Address(socket.gethostname() if host in ANY_ADDRESS else host, self.port)

    async def start(self) -> None:
        """Open the port. Raises ConfigError if it can't be opened."""
        where = Address(self._config.host, self._config.port)
        try:
            self._listening = await open_port(self._section, where.host, where.port)
        except OSError as error:
            raise ConfigError(
                f"{self._section}: can't listen on {where} ({plain_reason(error)}); choose another "
                f"{self._section}.port, or end the program that uses it"
            ) from None
        await self._runner.setup()
        await web.SockSite(self._runner, self._listening).start()
        self.port = self._listening.getsockname()[1]

    def establish(self, request: web.Request) -> None:
        """A request is allowed: its connection may stay."""
        if self._listening is not None and request.transport is not None:
            self._listening.establish(request.transport.get_extra_info("peername"))

    async def close(self) -> None:
        """Close the connections and the port."""
        await self._runner.cleanup()


def _server_log() -> logging.Logger:
    """A log for aiohttp, which logs each bad request with a traceback, without those of peers."""
    log = LOG.getChild("http")
    log.addFilter(_is_not_of_a_peer)
    return log


def _is_not_of_a_peer(record: logging.LogRecord) -> bool:
    """Whether a record is of another error than no HTTP, and a peer that has hung up."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | ConnectionError)
