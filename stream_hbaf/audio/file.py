"""A recording or a stream as an audio source: any format that FFmpeg reads, decoded in a thread.

Either may be behind a URL, whose user name, password and query don't appear in messages.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import av
import av.error
import av.logging
import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.source import (
    RATE_HZ,
    Chunk,
    Chunker,
    OnStatus,
    Resampler,
    Samples,
    SourceOptions,
    is_url,
    pace,
    public_name,
    retries,
)
from stream_hbaf.errors import AudioError

T = TypeVar("T")
Where = str | os.PathLike[str]

BATCH_S = 4  # sound of a recording that is decoded in one call to the thread
PIECE_S = 0.02  # the same of a stream, so that live sound isn't delayed
LAST_RETRY_S = 10.0
MISSING_S = 0.5  # a recording may be this much shorter than it declares
OPEN_S, STALL_S = 10.0, 15.0  # timeouts of a URL: HLS pauses for the length of a segment
STALLED = "it stopped sending"
# Containers whose header declares a length. Ogg has none: a truncated one looks like a shorter one.
DECLARING = {"wav", "flac", "mov", "matroska", "aiff", "caf", "w64"}
FULL_SCALE = {"s8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


def read_audio(path: Where, *, on_status: OnStatus | None = None) -> Samples:
    """The whole recording as int16, mono, 16 kHz; a damaged one as far as it can be decoded.

    "degraded" is reported to ``on_status`` if some of it can't. Raises AudioError if nothing can.
    """
    decoder = Decoder(path)
    samples = np.concatenate(list(decoder))
    if decoder.complaint and on_status is not None:
        on_status("degraded", decoder.complaint)
    return samples


class FileSource:
    """Anything that FFmpeg can read, a file or behind a URL, as a source.

    A recording is given at ``speed`` times real time, or as fast as it is consumed (None); its last
    chunk may be shorter. A URL that declares no length is a live stream: it is given as it comes;
    when it breaks off, that is reported to ``on_status``, it is reopened, and the first chunk after
    that has ``after_gap``. Opening raises AudioError if nothing can be decoded.
    """

    def __init__(
        self, where: Where, *, speed: float | None, **options: Unpack[SourceOptions]
    ) -> None:
        if speed is not None and not speed > 0:
            raise ValueError(f"speed must be positive, not {speed}")
        self.name = public_name(where) if is_url(where) else Path(where).name
        self._where = where
        self._speed = speed
        self._channel = options.get("channel")
        self._chunker = Chunker(chunk_ms=options["chunk_ms"])
        self._on_status = options["on_status"]
        self._closed = asyncio.Event()
        self._next: asyncio.Future[Samples | None]

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
        self._decoder.batch_s = BATCH_S
        async for chunk in pace(self._cut(), speed=self._speed):
            yield chunk
        if self._decoder.complaint:
            self._on_status("degraded", self._decoder.complaint)

    async def _cut(self) -> AsyncIterator[Samples]:
        """Decoded batches, cut to the chunk's size; the next batch is decoded meanwhile."""
        while await self._fetched() and (batch := self._next.result()) is not None:
            self._fetch()
            for chunk in self._chunker.feed(batch):
                yield chunk.samples
        for chunk in self._chunker.flush():
            yield chunk.samples

    async def _live(self) -> AsyncIterator[Chunk]:
        complained = False
        while await self._fetched():
            piece, reason = self._outcome()
            if piece is None:
                for chunk in self._chunker.flush():
                    yield chunk
                await self._reopen(reason)
                complained = False
                continue
            if self._decoder.complaint and not (complained or self._decoder.ending):
                complained = True  # once, and not about a packet that the end cut off
                self._on_status("degraded", self._decoder.complaint)
            self._fetch()
            for chunk in self._chunker.feed(piece, captured_at=time.monotonic()):
                yield chunk

    def _open(self) -> None:
        batch_s = PIECE_S if is_url(self._where) else BATCH_S
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

    def _outcome(self) -> tuple[Samples | None, str]:
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


class Decoder:
    """Iterates over a recording's samples in batches; ``complaint`` says what wasn't decoded."""

    def __init__(
        self, where: Where, *, channel: int | None = None, batch_s: float = BATCH_S
    ) -> None:
        self._where = where if is_url(where) else Path(where)
        self._name = public_name(where)
        self._channel = channel
        self.batch_s = batch_s
        self._batches = self._join()
        self._decoded_s = 0.0
        self.endless = False  # a URL that declares no length: a live stream
        self.ending = ""  # why the sound ended
        self.complaint = ""

    def __iter__(self) -> Iterator[Samples]:
        return self

    def __next__(self) -> Samples:
        return next(self._batches)

    def close(self) -> None:
        """Close the recording."""
        self._batches.close()

    def _join(self) -> Any:
        """Join frames of a few hundred samples to batches, one for each call to the thread."""
        pieces: list[Samples] = []
        has_sound = False
        for piece in self._resample():
            pieces.append(piece)
            if sum(map(len, pieces)) >= self.batch_s * RATE_HZ:
                has_sound = True
                yield np.concatenate(pieces)
                pieces = []
        if sum(map(len, pieces)):
            has_sound = True
            yield np.concatenate(pieces)
        if not has_sound:
            reason = "nothing in it can be decoded" if self.complaint else "it holds no sound"
            raise AudioError(f"{self._name}: {reason}; give a recording with sound")

    def _resample(self) -> Iterator[Samples]:
        resampler: Resampler | None = None
        for frame in self._frames():
            layout = (frame.sample_rate, len(frame.layout.channels))
            if resampler is None or (resampler.rate_hz, resampler.channels) != layout:
                if resampler is not None:  # chained streams may change it
                    yield resampler.finish()
                resampler = Resampler(*layout, channel=self._channel, where=self._name)
            self._decoded_s += frame.samples / frame.sample_rate
            yield resampler.feed(_to_float(frame))
        if resampler is not None:
            yield resampler.finish()

    def _frames(self) -> Iterator[Any]:
        with _open(self._where) as container:
            if not container.streams.audio:
                raise AudioError(f"{self._name}: no audio in it; give a recording with sound")
            stream = container.streams.audio[0]
            stream.thread_type = "NONE"  # one thread decodes a thousand times faster than real time
            declares_length = container.duration is not None or stream.duration is not None
            self.endless = is_url(self._where) and not declares_length
            declared_s = _declared_s(container, stream)
            packets = container.demux(stream)
            damaged = False  # reported when more follows: live streams end in a truncated packet
            while True:
                asked_at = time.monotonic()
                try:
                    packet = next(packets, None)
                    if packet is None:
                        break
                    if damaged:
                        self._complain("damaged")
                    damaged = packet.is_corrupt
                    yield from packet.decode()
                except av.error.EOFError:
                    break
                except av.error.InvalidDataError:
                    damaged = True  # the next packet may be valid again
                except av.error.FFmpegError as error:
                    stalled = time.monotonic() - asked_at >= STALL_S
                    self.ending = STALLED if stalled else _reason(error)
                    # A server that declares no length may close the connection after all of it.
                    if not declared_s or self._decoded_s < declared_s - MISSING_S:
                        self._complain(self.ending)
                    break
            if damaged:
                self._complain("damaged")
            self.ending = self.ending or "it ended"
            if self._decoded_s < declared_s - MISSING_S:
                self._complain(f"{declared_s:.1f} s declared")

    def _complain(self, reason: str) -> None:
        if not self.complaint:
            self.complaint = (
                f"{self._name}: damaged or cut short at {self._decoded_s:.1f} s ({reason}); "
                "going on with what can be decoded"
            )


def _open(where: Any) -> Any:
    av.logging.set_level(None)  # FFmpeg would write its own messages to the terminal
    if isinstance(where, str):
        return _open_url(where)
    if where.is_dir():
        raise AudioError(f"{where}: is a folder; give a sound file")
    try:
        if where.stat().st_size == 0:
            raise AudioError(f"{where}: is empty; give a recording with sound")
        return av.open(str(where.absolute()), metadata_errors="replace")
    except av.error.InvalidDataError:
        raise AudioError(
            f"{where}: not a sound file, or damaged; give wav, flac, mp3, ogg, m4a or mp4"
        ) from None
    except OSError as error:
        raise AudioError(f"{where}: can't be read ({error.strerror}); check the path") from None


def _open_url(url: str) -> Any:
    try:
        return av.open(url, metadata_errors="replace", timeout=(OPEN_S, STALL_S))
    except av.error.InvalidDataError:
        raise AudioError(
            f"{public_name(url)}: no sound that FFmpeg can read; check what the URL gives"
        ) from None
    except (av.error.FFmpegError, ValueError) as error:
        raise AudioError(
            f"{public_name(url)}: can't be read ({_reason(error)}); check the URL and its server"
        ) from None


def _reason(error: Any) -> str:
    if isinstance(error, av.error.ExitError):  # our timeouts raise it
        return STALLED
    return str(getattr(error, "strerror", None) or error)


def _declared_s(container: Any, stream: Any) -> float:
    """The length in seconds that a header declares; 0.0 where FFmpeg only estimates one."""
    names = set(container.format.name.split(","))
    # An mp3 with a LAME header declares its length, and starts late by the encoder's delay.
    if not (names & DECLARING or ("mp3" in names and stream.start_time)):
        return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _to_float(frame: Any) -> NDArray[np.float32]:
    """Any of FFmpeg's sample formats, planar or packed -> [n, channels] in [-1, 1]."""
    samples: NDArray[Any] = frame.to_ndarray()
    channels = len(frame.layout.channels)
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    name = frame.format.name.removesuffix("p")
    if name == "u8":
        samples, name = samples.astype(np.int16) - 128, "s8"
    return (samples / FULL_SCALE[name]).astype(np.float32)
