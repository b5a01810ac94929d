"""Sound comes from a URL: a recording there is played like a file, a live stream is listened to
without end."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar

from stream_hbaf.audio.file import Decoder, FileSource, Samples, public_name
from stream_hbaf.audio.push_source import Cutter
from stream_hbaf.audio.source import Chunk, OnStatus
from stream_hbaf.errors import AudioError

T = TypeVar("T")

FIRST_RETRY_S, LAST_RETRY_S = 0.5, 10.0
PIECE_S = 0.02  # decoded at a time, so that live sound isn't held up


class StreamSource:
    """Anything that FFmpeg can read behind a URL, as a source.

    What declares a length is a recording: it is given at ``speed`` times real time, or as fast as
    it is taken (None), and ends. What doesn't is live: it is given as it comes, and when it breaks
    off, ``on_status`` hears so, it is opened again and again, and the first chunk after that has
    ``after_gap``. Opening raises AudioError if nothing can be decoded.
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
        self._next.result()  # errors belong to the opening, not to the first chunk
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
        else:  # it waits for sound, and can't be closed before that comes
            decoder = self._decoder
            self._next.add_done_callback(lambda _: decoder.close())

    def chunks(self) -> AsyncIterator[Chunk]:
        return self._live() if self._endless else self._recording.chunks()

    async def _live(self) -> AsyncIterator[Chunk]:
        cutter = Cutter(chunk_ms=self._chunk_ms)
        complained = False
        while await self._fetched():
            piece, reason = self._outcome()
            if piece is None:
                for chunk in cutter.break_off():
                    yield chunk
                await self._reopen(reason)
                complained = False
                continue
            if self._decoder.complaint and not (complained or self._decoder.ending):
                complained = True  # once, and not of what the end itself cut off
                self._on_status("degraded", self._decoder.complaint)
            self._next = in_thread(self._decode)
            for chunk in cutter.feed(piece, captured_at=time.monotonic()):
                yield chunk

    def _open(self) -> None:
        self._decoder = Decoder(self._url, channel=self._channel, batch_s=PIECE_S)
        self._next = in_thread(self._decode)

    def _decode(self) -> Samples | None:
        return next(self._decoder, None)

    async def _fetched(self) -> bool:
        """Wait for the next piece; False if the source is closed before it comes."""
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            either: set[asyncio.Future[Any]] = {self._next, closing}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
        return not self._closed.is_set()

    def _outcome(self) -> tuple[Samples | None, str]:
        """The piece that came, or None and why there is none."""
        try:
            return self._next.result(), self._decoder.ending
        except AudioError as error:
            return None, str(error).removeprefix(f"{self.name}: ")

    async def _reopen(self, reason: str) -> None:
        """Try until there is sound again, or until we are closed."""
        self._on_status("offline", f"{self.name}: {reason} (trying again)")
        wait_s = FIRST_RETRY_S
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), wait_s)
            wait_s = min(2 * wait_s, LAST_RETRY_S)
            self._open()
            if await self._fetched() and self._outcome()[0] is not None:
                self._on_status("online", f"{self.name} is back")
                return


def in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run what may block for long in a thread that the end of the program doesn't wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # may be unwanted

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
        except BaseException as raised:  # noqa: BLE001  it is raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="decode stream", daemon=True).start()
    return future
