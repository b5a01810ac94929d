"""Opens the audio source that one word of the command line or the settings names.

Behind a URL is a recording, which is played like a file, or a live stream, which is followed
without end.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar, Unpack
from urllib.parse import urlsplit

from stream_hbaf.audio.file import Decoder, FileSource, is_url, public_name
from stream_hbaf.audio.microphone import Microphone
from stream_hbaf.audio.push_source import Address
from stream_hbaf.audio.source import (
    AudioSource,
    Chunk,
    Chunker,
    OnStatus,
    Samples,
    SourceOptions,
    retries,
)
from stream_hbaf.audio.wyoming import SatelliteSource, WyomingSource
from stream_hbaf.errors import AudioError, DeviceError

T = TypeVar("T")

LAST_RETRY_S = 10.0
PIECE_S = 0.02  # decoded at a time, so that live sound isn't delayed


def open_source(
    where: str,
    *,
    speed: float | None = 1.0,
    token: str | None = None,
    **options: Unpack[SourceOptions],
) -> AudioSource:
    """The source that ``where`` names, still to be entered with ``async with``.

        mic, mic:NAME, mic:INDEX    a microphone, by part of its name or by number
        PATH                        a recording (./mic is a file of that name)
        ws://HOST:PORT              a WebSocket server opened here, for browsers and programs
        wyoming://HOST:PORT         a Wyoming server opened here, for programs that send
        satellite://HOST:PORT       the Wyoming satellite there, which is connected to
        http://…, rtsp://…          whatever FFmpeg reads: a recording, or a live stream

    ``speed`` is that of recordings, None as fast as they are processed. ``token`` is required of
    WebSocket senders. ``channel`` counts from 0, None is the mean of all; two sources may take two
    channels of one device. Raises DeviceError for an invalid ``where``.
    """
    if where == "mic" or where.startswith("mic:"):
        return Microphone(where.partition(":")[2] or None, **options)
    if where == "browser":
        raise DeviceError("browser: it is the dashboard that a browser sends to; add --dashboard")
    if not is_url(where):
        return FileSource(where, speed=speed, **options)
    scheme = where.partition("://")[0].lower()
    if scheme == "wyoming":
        return WyomingSource(_address(where), **options)
    if scheme == "satellite":
        return SatelliteSource(_address(where), **options)
    if scheme == "ws":
        # 0.2 s that most runs need not spend.
        from stream_hbaf.audio.websocket import WebSocketSource

        return WebSocketSource(_address(where), token=token, **options)
    return StreamSource(where, speed=speed, **options)


def _address(where: str) -> Address:
    try:
        parts = urlsplit(where)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.path.strip("/") or parts.query:
        scheme = where.partition("://")[0].lower()
        raise DeviceError(
            f"{public_name(where)}: no address; give a host and a port: {scheme}://127.0.0.1:10700"
        )
    return Address(host, port)


class StreamSource:
    """Anything that FFmpeg can read behind a URL, as a source.

    A URL that declares a length is a recording: it is given at ``speed`` times real time, or as
    fast as it is consumed (None), and ends. One that doesn't is live: it is given as it comes; when
    it breaks off, that is reported to ``on_status``, it is reopened, and the first chunk after that
    has ``after_gap``. Opening raises AudioError if nothing can be decoded.
    """

    def __init__(
        self,
        url: str,
        *,
        speed: float | None,
        channel: int | None = None,
        chunk_ms: int,
        on_status: OnStatus,
    ) -> None:
        self.name = public_name(url)
        self._url = url
        self._channel = channel
        self._chunk_ms = chunk_ms
        self._on_status = on_status
        self._recording = FileSource(
            url, speed=speed, channel=channel, chunk_ms=chunk_ms, on_status=on_status
        )
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._open()
        await asyncio.wait({self._next})
        self._next.result()  # an error is raised on opening, not with the first chunk
        self._endless = self._decoder.endless
        if not self._endless:
            await in_thread(self._decoder.close)  # some servers take one listener at a time
            await self._recording.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._closed.set()
        if not self._endless:
            await self._recording.__aexit__(*exception)
        elif self._next.done():
            in_thread(self._decoder.close)
        else:  # it waits for sound, and can't be closed before some comes
            decoder = self._decoder
            self._next.add_done_callback(lambda _: decoder.close())

    def chunks(self) -> AsyncIterator[Chunk]:
        """The recording's or the stream's sound."""
        return self._live() if self._endless else self._recording.chunks()

    async def _live(self) -> AsyncIterator[Chunk]:
        chunker = Chunker(chunk_ms=self._chunk_ms)
        complained = False
        while await self._fetched():
            piece, reason = self._outcome()
            if piece is None:
                for chunk in chunker.flush():
                    yield chunk
                await self._reopen(reason)
                complained = False
                continue
            if self._decoder.complaint and not (complained or self._decoder.ending):
                complained = True  # once, and not about a packet that the end cut off
                self._on_status("degraded", self._decoder.complaint)
            self._next = in_thread(self._decode)
            for chunk in chunker.feed(piece, captured_at=time.monotonic()):
                yield chunk

    def _open(self) -> None:
        self._decoder = Decoder(self._url, channel=self._channel, batch_s=PIECE_S)
        self._next = in_thread(self._decode)

    def _decode(self) -> Samples | None:
        return next(self._decoder, None)

    async def _fetched(self) -> bool:
        """Wait for the next piece; False if the source is closed before."""
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            either: set[asyncio.Future[Any]] = {self._next, closing}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
        return not self._closed.is_set()

    def _outcome(self) -> tuple[Samples | None, str]:
        """The next piece, or None and the reason."""
        try:
            return self._next.result(), self._decoder.ending
        except AudioError as error:
            return None, str(error).removeprefix(f"{self.name}: ")

    async def _reopen(self, reason: str) -> None:
        """Reopen the stream until it gives sound or the source is closed."""
        self._on_status("offline", f"{self.name}: {reason} (trying again)")
        async for _ in retries(self._closed, longest_s=LAST_RETRY_S):
            self._open()
            if await self._fetched() and self._outcome()[0] is not None:
                self._on_status("online", f"{self.name} is back")
                return


def in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run a function that may block for long in a thread that doesn't delay the program's end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    # Retrieve the exception, because the future may never be awaited.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # a result, when there's no error

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:  # noqa: BLE001  raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="decode stream", daemon=True).start()
    return future
