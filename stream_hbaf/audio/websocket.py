"""Sound comes over a WebSocket: a server that browsers and programs send to, in ``wire``'s form.

Any web page may make a browser connect to any address, this machine's own included. So a browser
is let in only from a page of the same host, and where other machines can connect, a token is
asked for as well: ``ws://HOST:PORT/?token=TOKEN``, or the header ``Authorization: Bearer TOKEN``.
"""

import asyncio
import logging
import secrets
from http import HTTPStatus
from typing import Self
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from stream_hbaf.audio.address import Address, cannot_listen, is_loopback
from stream_hbaf.audio.protocol import (
    BROKEN_RULE,
    LARGEST_MESSAGE,
    TRY_LATER,
    close_reason,
    take_message,
    too_large,
)
from stream_hbaf.audio.push_source import AlreadySending, ArrivingSource
from stream_hbaf.audio.source import OnStatus
from stream_hbaf.errors import AudioError, DeviceError

FORM_S = 10.0  # for a connection to say its form, before it makes room for another
ALIVE_S = 5.0  # between two pings, and for the answer to each


class WebSocketSource(ArrivingSource):
    """A WebSocket server as a source: one sender at a time, a second is refused with a reason.

    ``address`` has the true port once it is open. Opening raises DeviceError if the address can't
    be listened on, or lies open to others without a ``token``.
    """

    def __init__(
        self,
        address: Address,
        *,
        token: str | None = None,
        channel: int | None = None,
        chunk_ms: int,
        on_status: OnStatus,
    ) -> None:
        super().__init__(f"ws://{address}", channel=channel, chunk_ms=chunk_ms, on_status=on_status)
        self.address = address
        self._token = token
        self._server: Server | None = None

    async def __aenter__(self) -> Self:
        if not self._token and not is_loopback(self.address.host):
            raise DeviceError(
                f"{self.name}: anybody on the network could send sound here; "
                "set a token (source.token), or listen on 127.0.0.1"
            )
        try:
            self._server = await serve(
                self._receive,
                self.address.host,
                self.address.port,
                process_request=self._admit,
                compression=None,  # sound doesn't shrink
                max_size=LARGEST_MESSAGE,
                ping_interval=ALIVE_S,
                ping_timeout=ALIVE_S,
                close_timeout=1,
                logger=_silent(),
            )
        except OSError as error:
            raise cannot_listen(self.name, error) from None
        port = next(iter(self._server.sockets)).getsockname()[1]
        self.address = Address(self.address.host, port)
        return await super().__aenter__()

    async def __aexit__(self, *exception: object) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        await super().__aexit__(*exception)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """None lets a connection in."""
        address = urlsplit(request.path)
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        token = parse_qs(address.query).get("token", [bearer])[0]
        if self._token and not secrets.compare_digest(token.encode(), self._token.encode()):
            return connection.respond(HTTPStatus.FORBIDDEN, "wrong or missing token\n")
        if not is_same_site(
            origin=request.headers.get("Origin"),
            host=request.headers.get("Host", ""),
            local=is_loopback(self.address.host),
        ):
            return connection.respond(HTTPStatus.FORBIDDEN, "a page of another host\n")
        return None

    async def _receive(self, connection: ServerConnection) -> None:
        peer = connection.remote_address or ("somebody",)  # None if it has hung up already
        try:
            with self.sender(str(peer[0])) as sender:
                while True:
                    async with asyncio.timeout(None if sender.form else FORM_S):
                        message = await _next_message(connection)
                    take_message(message, sender=sender)
        except ConnectionClosed:
            pass
        except TimeoutError:
            await connection.close(BROKEN_RULE, "no form came")
        except AlreadySending as error:
            await connection.close(TRY_LATER, close_reason(error))
        except AudioError as error:
            await connection.close(BROKEN_RULE, close_reason(error))


async def _next_message(connection: ServerConnection) -> str | bytes:
    try:
        return await connection.recv()
    except ConnectionClosed as closed:
        if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
            raise too_large() from None
        raise


def is_same_site(*, origin: str | None, host: str, local: bool) -> bool:
    """Whether a request comes from a page of the host that it goes to, or from no page at all.

    ``local``: only this machine's own names count then, because a foreign name may be made to lead
    to it.
    """
    target = _hostname(f"//{host}")
    if local and not is_loopback(target):
        return False
    if origin is None:
        return True
    asking = _hostname(origin)
    return asking == target or (local and is_loopback(asking))


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _silent() -> logging.Logger:
    """The library logs each bad handshake with a traceback: none of it is the user's fault."""
    logger = logging.getLogger("stream_hbaf.audio.websocket")
    logger.disabled = True
    return logger
