"""Audio sources that speak the Wyoming protocol, the one of Home Assistant's voice satellites.

A satellite is a server: a client connects to it and sends ``run-satellite``, as Home Assistant
does; so does ``SatelliteSource``. A satellite serves one client at a time. One that Home Assistant
uses needs a microphone service of its own (which serves many) for ``SatelliteSource`` to connect
to. ``WyomingSource`` is for programs that connect by themselves: it listens for them.

A client of ``WyomingSource`` that sends the event ``emotions`` gets an event ``emotion`` for each
utterance from then on, whose data are the fields of the ``end`` that is published.

An event is a line of JSON (``type``, and ``data`` or ``data_length`` or both), then ``data_length``
bytes of JSON, then ``payload_length`` bytes of sound. It is parsed here, because the protocol's own
package takes a broken line for the end of the stream, and reads as many bytes as a line announces.
The protocol has neither passwords nor encryption: use it in a trusted network only.
"""

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass, field
from typing import Any, Self, Unpack

from stream_hbaf import __version__
from stream_hbaf.audio.port import Port, enable_keepalive, open_port
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
    plain_reason,
)
from stream_hbaf.audio.source import RATE_HZ, SampleFormat, SourceOptions, retries
from stream_hbaf.errors import AudioError, DeviceError

LOG = logging.getLogger(__name__)

LONGEST_LINE, LARGEST_PAYLOAD = 1 << 16, 1 << 17  # bytes; of sound that is four seconds
FORMATS: dict[int, SampleFormat] = {2: "s16le", 4: "s32le"}  # by bytes a sample
MOST_CONNECTIONS = 16
MOST_UNREAD = 1 << 18  # bytes of emotions that a client leaves unread: a hundred utterances
SILENT_S = 60.0  # between two events of a connection that sends no sound
CONNECT_S = 5.0
PING_S, GONE_S = 4.0, 12.0  # between two pings to a satellite; without an event until it is lost
LAST_RETRY_S = 5.0

# Of Wyoming's kinds of service only "snd" takes sound without having to answer; an "asr" would be
# asked for transcripts by Home Assistant.
SELF_DESCRIPTION: dict[str, Any] = {
    "snd": [
        {
            "name": "stream-hbaf",
            "description": "Recognises emotions in sound, and plays none of it",
            "attribution": {"name": "stream-hbaf", "url": ""},
            "installed": True,
            "version": __version__,
            "snd_format": {"rate": RATE_HZ, "width": 2, "channels": 1},
        }
    ]
}


@dataclass(frozen=True, slots=True)
class WyomingEvent:
    """One message of the protocol."""

    type: str
    fields: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""


async def read_event(reader: asyncio.StreamReader) -> WyomingEvent | None:
    """The next event; None at the end. Raises AudioError for a malformed or too large one."""
    try:
        if not (line := await reader.readline()):
            return None
        header = json_object(line, what="a line")
        data = await _read(reader, header, "data_length", most=LONGEST_LINE)
        fields = json_object(data, what="a line") if data else {}
        payload = await _read(reader, header, "payload_length", most=LARGEST_PAYLOAD)
    except ValueError:  # which readline raises for a line that is too long
        raise AudioError(f"a line longer than {LONGEST_LINE} bytes") from None
    except asyncio.IncompleteReadError:
        raise AudioError("an event broken off in the middle") from None
    inline = header.get("data") or {}
    if not isinstance(header.get("type"), str) or not isinstance(inline, dict):
        raise AudioError('an event without a "type", or whose "data" is no object')
    return WyomingEvent(header["type"], inline | fields, payload)


async def _read(
    reader: asyncio.StreamReader, header: dict[str, Any], key: str, *, most: int
) -> bytes:
    length = header.get(key) or 0
    if type(length) is not int or not 0 <= length <= most:
        raise AudioError(f'a "{key}" that is no number from 0 to {most}')
    return await reader.readexactly(length)


def apply_event(event: WyomingEvent, *, sender: Sender) -> None:
    """Apply an event about sound, ignore others. Raises AudioError for a malformed one."""
    match event.type:
        case "audio-start":
            sender.begin(_audio_format(event))
        case "audio-chunk":
            if sender.audio_format != (audio_format := _audio_format(event)):
                sender.begin(audio_format)
            sender.feed(event.payload)
        case "audio-stop":
            sender.pause()


def _audio_format(event: WyomingEvent) -> AudioFormat:
    rate_hz, width, channels = (event.fields.get(key) for key in ("rate", "width", "channels"))
    if (
        type(rate_hz) is not int
        or type(channels) is not int
        or type(width) is not int  # nothing that can't be looked up
        or width not in FORMATS
    ):
        raise AudioError(
            f'an {event.type} without "rate", "channels" and a "width" of 2 or 4 bytes'
        )
    return AudioFormat(rate_hz, channels, FORMATS[width])


class WyomingSource(PushSource):
    """A Wyoming server as a source: one sender at a time, a second is refused with a reason.

    It answers ``describe``, ``ping`` and ``emotions``, and nothing else. ``address`` has the actual
    port once it is open. Opening raises DeviceError if the address can't be listened on.
    """

    def __init__(self, address: Address, **options: Unpack[SourceOptions]) -> None:
        super().__init__(f"wyoming://{address}", **options)
        self.address = address
        self._connections: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.StreamWriter] = set()  # of those who asked for emotions
        self._port: Port | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        if not is_loopback(self.address.host):
            LOG.warning(
                "%s: anybody on the network can send sound here, for the protocol has no password; "
                "listen on 127.0.0.1 unless all of the network is trusted",
                self.name,
            )
        try:
            self._port = await open_port(self.name, self.address.host, self.address.port)
            self._server = await asyncio.start_server(
                self._accept, sock=self._port, limit=LONGEST_LINE
            )
        except OSError as error:
            raise cannot_listen(self.name, error) from None
        port = self._server.sockets[0].getsockname()[1]
        self.address = Address(self.address.host, port)
        return await super().__aenter__()

    async def __aexit__(self, *exception: object) -> None:
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await super().__aexit__(*exception)

    def answer(self, fields: dict[str, Any]) -> None:
        """Send an utterance's fields to whoever asked for them; never waits.

        A client that doesn't read them is disconnected.
        """
        for writer in [*self._asking]:
            if writer.transport.get_write_buffer_size() > MOST_UNREAD:
                LOG.warning("%s: a client doesn't read its emotions: disconnected", self.name)
                writer.transport.abort()
                self._asking.discard(writer)
            else:
                writer.write(_line(WyomingEvent("emotion", fields)))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._receive(reader, writer), name="wyoming connection")
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername") or ("a client",)  # None if it has hung up already
        who = str(peer[0])
        with contextlib.suppress(OSError), contextlib.closing(writer):
            enable_keepalive(writer.get_extra_info("socket"))
            try:
                if len(self._connections) > MOST_CONNECTIONS:
                    raise AlreadySendingError(f"{self.name}: too many connections")
                await self._converse(reader, writer, who=who)
            except AudioError as error:
                await _send(writer, WyomingEvent("error", {"text": str(error)}))
            finally:
                self._asking.discard(writer)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, who: str
    ) -> None:
        """Answer events and take sound; the source is claimed by the first event about sound."""
        with contextlib.ExitStack() as claimed:
            sender: Sender | None = None
            while True:
                try:
                    async with asyncio.timeout(SILENT_S if sender is None else IDLE_S):
                        event = await read_event(reader)
                except TimeoutError:
                    return
                except AudioError as error:
                    if sender is None:  # else it is reported when the sender is released
                        self.report(self.state, f"{self.name}: {who}: {error}")
                    raise
                if event is None:
                    return
                if self._port is not None:
                    self._port.establish(writer.get_extra_info("peername"))
                if event.type == "describe":
                    await _send(writer, WyomingEvent("info", SELF_DESCRIPTION))
                elif event.type == "ping":
                    await _send(writer, WyomingEvent("pong", event.fields))
                elif event.type == "emotions":
                    self._asking.add(writer)
                elif sender is None and event.type in ("audio-start", "audio-chunk"):
                    sender = claimed.enter_context(self.sender(who))
                if sender is not None:
                    apply_event(event, sender=sender)


class SatelliteSource(PushSource):
    """A Wyoming satellite, or a microphone service, as a source; reconnects when it is lost.

    Opening raises DeviceError if it can't be reached.
    """

    outlook = "trying again"

    def __init__(self, address: Address, **options: Unpack[SourceOptions]) -> None:
        super().__init__(f"satellite://{address}", **options)
        self.address = address
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        reader, writer = await self._connect()
        self._following = asyncio.create_task(self._follow(reader, writer), name=self.name)
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await super().__aexit__(*exception)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(
                    self.address.host, self.address.port, limit=LONGEST_LINE
                )
                await _send(writer, WyomingEvent("run-satellite"))
        except (OSError, TimeoutError) as error:
            reason = plain_reason(error) if not isinstance(error, TimeoutError) else "no answer"
            raise DeviceError(
                f"{self.name}: can't be reached ({reason}); does the satellite run there?"
            ) from None
        self.report("online", f"{self.name}: connected")
        return reader, writer

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not self._closed.is_set():
                with contextlib.suppress(AudioError), contextlib.closing(writer):
                    await self._receive(reader, writer)
                async for _ in retries(self._closed, longest_s=LAST_RETRY_S):
                    with contextlib.suppress(DeviceError):  # reported already: it is still away
                        reader, writer = await self._connect()
                        break
        finally:  # after an unexpected error, too, the source ends instead of falling silent
            await super().__aexit__()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self.sender("the satellite") as sender:
            try:
                while (event := await _next_event_within(reader, writer)) is not None:
                    if event.type == "ping":
                        await _send(writer, WyomingEvent("pong", event.fields))
                    apply_event(event, sender=sender)
            except OSError as error:
                raise AudioError(f"connection lost ({plain_reason(error)})") from None
            raise AudioError("it hung up; does another program use it?")


async def _next_event_within(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> WyomingEvent | None:
    """The next event. Raises AudioError if a satellite doesn't answer pings for ``GONE_S``."""
    reading = asyncio.ensure_future(read_event(reader))
    try:
        for _ in range(round(GONE_S / PING_S)):
            done, _pending = await asyncio.wait({reading}, timeout=PING_S)
            if done:
                return await reading
            await _send(writer, WyomingEvent("ping", {"text": "stream-hbaf"}))
        raise AudioError("no answer to pings")
    finally:
        reading.cancel()


async def _send(writer: asyncio.StreamWriter, event: WyomingEvent) -> None:
    writer.write(_line(event))
    await writer.drain()


def _line(event: WyomingEvent) -> bytes:
    """An event without sound."""
    return json.dumps({"type": event.type, "data": event.fields}).encode() + b"\n"
