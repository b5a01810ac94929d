"""A recording or a stream as an audio source: any format that FFmpeg reads, decoded in a thread."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import numpy as np

from stream_hbaf.audio.container import Where, is_pipe
from stream_hbaf.audio.decode import BATCH_S, Decoder, Piece, fill_gaps
from stream_hbaf.audio.source import (
    RATE_HZ,
    Chunk,
    Chunker,
    OnStatus,
    Samples,
    SourceOptions,
    is_url,
    pace,
    public_name,
    retries,
)
from stream_hbaf.errors import AudioError

T = TypeVar("T")

PIECE_S = 0.02  # of a stream, decoded in one call to the thread: live sound isn't delayed
LAST_RETRY_S = 10.0
LONGEST_S = 4 * 3600  # of a recording that is read whole: half a gigabyte


def read_audio(path: Where, *, on_status: OnStatus | None = None) -> Samples:
    """The whole recording as int16, mono, 16 kHz; a damaged one as far as it can be decoded.

    What its timestamps leave out is silence. "degraded" is reported to ``on_status`` if some of it
    can't be decoded. Raises AudioError if nothing can, or if it is longer than LONGEST_S.
    """
    decoder = Decoder(path)
    found: list[Samples] = []
    length = 0
    for samples in fill_gaps(decoder):
        found.append(samples)
        length += len(samples)
        if length > LONGEST_S * RATE_HZ:
            raise AudioError(f"{path}: longer than {LONGEST_S // 3600} hours; cut it into parts")
    if decoder.complaint and on_status is not None:
        on_status("degraded", decoder.complaint)
    return np.concatenate(found)


class FileSource:
    """Anything that FFmpeg can read, a file or behind a URL, as a source.

    A recording is given at ``speed`` times real time, or as fast as it is consumed (None); its last
    chunk may be shorter. Samples have the numbers of the recording's own times. Where these leave
    out half a second or more, an empty chunk stands, and it and the next have ``after_gap``. A pipe
    is a recording.

    A URL that declares no length is a live stream: it is given as it comes; when it breaks off,
    that is reported to ``on_status``, it is reopened, and the first chunk after that has
    ``after_gap``. Opening raises AudioError if nothing can be decoded.
    """

    def __init__(
        self, where: Where, *, speed: float | None, **options: Unpack[SourceOptions]
    ) -> None:
        if speed is not None and not speed > 0:
            raise ValueError(f"speed must be positive, not {speed}")
        self.name = public_name(where) if is_url(where) else Path(where).name
        if self.name == "-":
            self.name = "standard input"
        self._where = where
        self._speed = speed
        self._channel = options.get("channel")
        self._chunker = Chunker(chunk_ms=options["chunk_ms"])
        self._on_status = options["on_status"]
        self._complained = False  # of this opening
        self._closed = asyncio.Event()
        self._next: asyncio.Future[Piece | None]

    async def __aenter__(self) -> Self:
        self._open()
        await asyncio.shield(self._next)  # an error is raised on opening, not with the first chunk
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._closed.set()
        close = self._decoder.close
        # Not before: it can't be closed while it decodes, or waits for sound.
        self._next.add_done_callback(lambda _: in_thread(close))

    def chunks(self) -> AsyncIterator[Chunk]:
        """The recording's or the stream's sound."""
        return self._live() if self._decoder.endless else self._recorded()

    async def _recorded(self) -> AsyncIterator[Chunk]:
        # A pipe's sound may be live.
        at_once = self._speed is None or not is_pipe(self._where)
        self._decoder.batch_s = BATCH_S if at_once else PIECE_S
        async for chunk in pace(self._cut(), speed=self._speed):
            yield chunk
        self._complain()

    async def _cut(self) -> AsyncIterator[Chunk]:
        """Decoded batches, cut to the chunk's size; the next batch is decoded meanwhile."""
        while await self._fetched() and (batch := self._next.result()) is not None:
            self._complain()
            self._fetch()
            for chunk in self._chunker.skip_to(batch.start):
                yield chunk
            for chunk in self._chunker.feed(batch.samples):
                yield chunk
        for chunk in self._chunker.flush():
            yield chunk

    def _complain(self) -> None:
        if self._decoder.complaint and not self._complained:
            self._complained = True
            self._on_status("degraded", self._decoder.complaint)

    async def _live(self) -> AsyncIterator[Chunk]:
        follows = 0  # the stream's own number of the next sample
        while await self._fetched():
            piece, reason = self._outcome()
            if piece is None:
                for chunk in self._chunker.flush():
                    yield chunk
                await self._reopen(reason)
                follows = 0
                continue
            if not self._decoder.ending:  # not about a packet that the end cut off
                self._complain()
            self._fetch()
            if piece.start > follows:
                for chunk in self._chunker.flush():
                    yield chunk
            follows = piece.end
            for chunk in self._chunker.feed(piece.samples, captured_at=time.monotonic()):
                yield chunk

    def _open(self) -> None:
        batch_s = PIECE_S if is_url(self._where) or is_pipe(self._where) else BATCH_S
        self._complained = False
        self._decoder = Decoder(self._where, channel=self._channel, batch_s=batch_s)
        self._fetch()

    def _fetch(self) -> None:
        self._next = in_thread(partial(next, self._decoder, None))

    async def _fetched(self) -> bool:
        """Wait for the next piece; False if the source is closed before."""
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            either: set[asyncio.Future[Any]] = {self._next, closing}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
        return not self._closed.is_set()

    def _outcome(self) -> tuple[Piece | None, str]:
        """The next piece, or None and the reason."""
        try:
            return self._next.result(), self._decoder.ending
        except AudioError as error:
            return None, str(error).removeprefix(f"{self.name}: ")

    async def _reopen(self, reason: str) -> None:
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

    def run() -> None:
        try:
            settle = partial(future.set_result, function())
        except BaseException as error:  # noqa: BLE001  raised again where it is awaited
            settle = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, name="decode", daemon=True).start()
    return future
