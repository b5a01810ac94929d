"""A WebSocket server as an audio source, and the messages in which browsers and programs send.

First one text message, JSON, with the format of the samples:

    {"rate": 48000, "channels": 1, "format": "f32le", "speaker": "Anna"}

``rate`` is in Hz, 8,000 to 192,000; ``channels`` 1 to 8, 1 if left out; ``format`` ``s16le``,
``s32le`` or ``f32le`` (in [-1, 1], as browsers capture it), ``s16le`` if left out; ``speaker`` may
be left out; other keys are ignored. Another such message changes the format. With the format
``opus`` there are 1 or 2 channels, and ``rate`` doesn't matter.

Then binary messages of at most 64 KiB: whole frames, interleaved, as they are captured, 20 to
100 ms each; or one Opus packet each, without a container. A sender that is faster than real time
may lose sound: five seconds are held. The text message ``{"pause": true}`` ends the open utterance;
sound may follow it. After ``{"end": true}`` nothing follows, and the server closes the connection.

Nothing else is answered. A message that breaks a rule, or ten minutes without any, closes the
connection with code 1008 and the reason; 1013 means that another connection is sending.

Any web page may make a browser connect to any address, this machine's own included. So a browser
is let in only from a page of the same host, and without a token only of the same port, too. Where
other machines can connect, a token must be set. It is sent in the address,
``ws://HOST:PORT/?token=TOKEN``, or in the header ``Authorization: Bearer TOKEN``.
"""

import asyncio
import logging
import secrets
import ssl
from collections.abc import Awaitable, Callable, Collection
from http import HTTPStatus
from typing import Any, Self, Unpack, cast
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from stream_hbaf.audio.opus import OPUS_HZ
from stream_hbaf.audio.pace import Pace
from stream_hbaf.audio.port import Port, open_port
from stream_hbaf.audio.push_source import (
    IDLE_S,
    Address,
    AlreadySendingError,
    AudioFormat,
    PushSource,
    Sender,
    cannot_listen,
    is_loopback,
    json_object,
)
from stream_hbaf.audio.source import WIDTHS, SourceOptions
from stream_hbaf.errors import AudioError, DeviceError

LARGEST_MESSAGE = 1 << 16  # bytes
RULE_BROKEN, TRY_LATER = 1008, 1013  # WebSocket close codes
LONGEST_REASON = 123  # bytes that a close frame has room for
LONGEST_SPEAKER = 64
FORMAT_S = 10.0  # for a connection to send its format, before it makes room for another
ALIVE_S = 5.0  # between two pings, and for the answer to each
# websockets logs each bad handshake with a traceback, which no user can do anything about.
NO_LOGGER = logging.Logger("websockets", level=logging.CRITICAL + 1)


def receive(message: str | bytes, *, sender: Sender) -> bool:
    """Apply one message; False if it says that no more follows.

    Raises AudioError if it breaks a rule of the protocol.
    """
    if len(message) > LARGEST_MESSAGE:
        raise _too_large()
    if isinstance(message, bytes):
        sender.feed(message)
        return True
    fields = json_object(message, what="a text message")
    if fields.get("end") is True:
        return False
    if fields.get("pause") is True:
        sender.pause()
    else:
        sender.begin(_audio_format(fields), speaker=_speaker(fields))
    return True


async def listen(
    handler: Callable[[ServerConnection], Awaitable[None]],
    port: Port,
    *,
    admit: Callable[[ServerConnection, Request], Response | None],
    tls: ssl.SSLContext | None = None,
    ping_timeout_s: float | None,
) -> Server:
    """Serve connections of this protocol at an open port; ``admit`` refuses some of them."""
    return await serve(
        handler,
        sock=port,
        ssl=tls,
        process_request=admit,
        compression=None,  # sound doesn't shrink
        max_size=LARGEST_MESSAGE,
        ping_interval=ALIVE_S,
        ping_timeout=ping_timeout_s,
        close_timeout=1,
        logger=NO_LOGGER,
    )


def close_reason(error: Exception) -> str:
    """An error as the reason of a close frame."""
    return str(error).encode()[:LONGEST_REASON].decode(errors="ignore")


def _too_large() -> AudioError:
    return AudioError(f"a message of more than {LARGEST_MESSAGE} bytes")


def _audio_format(fields: dict[str, Any]) -> AudioFormat:
    sample_format = fields.get("format", "s16le")
    rate_hz, channels = fields.get("rate"), fields.get("channels", 1)
    if sample_format == "opus":
        rate_hz = OPUS_HZ
    # JSON's true is Python's 1: a bool is no number here.
    if type(rate_hz) is not int or type(channels) is not int:
        raise AudioError('a format without "rate" (Hz) and "channels" in whole numbers')
    if not isinstance(sample_format, str) or sample_format not in (*WIDTHS, "opus"):
        raise AudioError(f'a format whose "format" is none of {", ".join(WIDTHS)}, opus')
    return AudioFormat(rate_hz, channels, cast(Any, sample_format))


def _speaker(fields: dict[str, Any]) -> str:
    speaker = fields.get("speaker", "")
    if not isinstance(speaker, str):
        raise AudioError('a format whose "speaker" is no text')
    return "".join(letter for letter in speaker if letter.isprintable())[:LONGEST_SPEAKER]


class WebSocketSource(PushSource):
    """A WebSocket server as a source: one sender at a time, a second is refused with a reason.

    ``address`` has the actual port once it is open. Opening raises DeviceError if the address
    can't be listened on, or is reachable from other machines without a ``token``.
    """

    def __init__(
        self, address: Address, *, token: str | None = None, **options: Unpack[SourceOptions]
    ) -> None:
        super().__init__(f"ws://{address}", **options)
        self.address = address
        self._token = token
        self._port: Port | None = None
        self._server: Server | None = None

    async def __aenter__(self) -> Self:
        if not self._token and not is_loopback(self.address.host):
            raise DeviceError(
                f"{self.name}: anybody on the network could send sound here; "
                "set a token (source.token), or listen on 127.0.0.1"
            )
        try:
            self._port = await open_port(self.name, self.address.host, self.address.port)
            self._server = await listen(
                self._serve, self._port, admit=self._admit, ping_timeout_s=ALIVE_S
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
        local = is_loopback(self.address.host)
        if line := forbids(request, token=self._token, local=local, setting="source.token"):
            return connection.respond(HTTPStatus.FORBIDDEN, f"{line}\n")
        if self._port is not None:
            self._port.establish(connection.remote_address)
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        if await take_sound(connection, self):
            await connection.close()


def forbids(
    request: Request,
    *,
    token: str | None,
    local: bool,
    setting: str,
    origins: Collection[str] = (),
) -> str:
    """Why a handshake is refused, in a line; "" if it isn't.

    ``local``: only this machine can reach the server. ``setting`` is that of the token. Pages of
    ``origins`` are let in with the token.
    """
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    given = parse_qs(urlsplit(request.path).query).get("token", [bearer])[0]
    if token and not secrets.compare_digest(given.encode(), token.encode()):
        return "wrong or missing token"
    origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
    if token and origin in origins:
        return ""
    if not is_same_site(origin=origin, host=host, local=local):
        return "a page of another host"
    if not token and origin is not None and origin.partition("://")[2] != host:
        return f"a page of another port; set a token ({setting}) and send it"
    return ""


async def take_sound(
    connection: ServerConnection, source: PushSource, *, pace: Pace | None = None
) -> bool:
    """Take a connection's sound as a source's; True once it says that no more follows.

    It is closed with the reason if it breaks a rule. Until another message is read it is waited
    for as long as ``pace`` says.
    """
    peer = connection.remote_address or ("a client",)  # None if it has hung up already
    try:
        with source.sender(str(peer[0])) as sender:
            while not source.is_closed:  # else what is still to be read would be waited for
                async with asyncio.timeout(IDLE_S if sender.audio_format else FORMAT_S):
                    message = await _next_message(connection)
                before_s = sender.received_s
                if not receive(message, sender=sender):
                    return True
                if pace is not None:
                    await pace.keep(sender.received_s - before_s, sender=sender)
    except ConnectionClosed:
        pass
    except TimeoutError:
        await connection.close(RULE_BROKEN, "nothing came")
    except AlreadySendingError as error:
        await connection.close(TRY_LATER, close_reason(error))
    except AudioError as error:
        await connection.close(RULE_BROKEN, close_reason(error))
    return False


async def _next_message(connection: ServerConnection) -> str | bytes:
    try:
        return await connection.recv()
    except ConnectionClosed as closed:
        if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
            raise _too_large() from None
        raise


def is_same_site(*, origin: str | None, host: str, local: bool) -> bool:
    """Whether a request comes from a page of the host that it goes to, or from no page at all.

    ``local``: only this machine's own names are accepted then, because an attacker can make a name
    of theirs resolve to this machine (DNS rebinding).
    """
    target = hostname(f"//{host}")
    if local and not is_loopback(target):
        return False
    if origin is None:
        return True
    asking = hostname(origin)
    return asking == target or (local and is_loopback(asking))


def hostname(address: str) -> str:
    """The host name in a URL; empty if there is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
