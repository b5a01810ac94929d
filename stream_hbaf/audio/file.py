"""A recording as an audio source: any format that FFmpeg reads, decoded lazily in a thread.

A recording may be a URL; its user name, password and query don't appear in messages.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

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
    pace,
)
from stream_hbaf.errors import AudioError

BATCH_S = 4  # sound decoded in one call to the thread
MISSING_S = 0.5  # a recording may be this much shorter than it declares
OPEN_S, STALL_S = 10.0, 15.0  # timeouts of a URL: HLS pauses for the length of a segment
STALLED = "it stopped sending"
# Containers whose header declares a length. Ogg has none: a truncated one looks like a shorter one.
DECLARING = {"wav", "flac", "mov", "matroska", "aiff", "caf", "w64"}
FULL_SCALE = {"s8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


def read_audio(path: str | os.PathLike[str], *, on_status: OnStatus | None = None) -> Samples:
    """The whole recording as int16, mono, 16 kHz; a damaged one as far as it can be decoded.

    "degraded" is reported to ``on_status`` if some of it can't. Raises AudioError if nothing can.
    """
    decoder = Decoder(path)
    samples = np.concatenate(list(decoder))
    if decoder.complaint and on_status is not None:
        on_status("degraded", decoder.complaint)
    return samples


class FileSource:
    """A recording as a source: at ``speed`` times real time, or as fast as it is consumed (None).

    ``path`` may be a URL; ``channel`` counts from 0, None is the mean of all. The last chunk may be
    shorter. Opening raises AudioError if nothing can be decoded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        speed: float | None,
        channel: int | None = None,
        chunk_ms: int,
        on_status: OnStatus,
    ) -> None:
        if speed is not None and not speed > 0:
            raise ValueError(f"speed must be positive, not {speed}")
        self.name = Path(public_name(path)).name
        self._path = path
        self._channel = channel
        self._speed = speed
        self._chunker = Chunker(chunk_ms=chunk_ms)
        self._on_status = on_status

    async def __aenter__(self) -> Self:
        self._decoder = Decoder(self._path, channel=self._channel)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._next = self._decode()
        try:
            # An error is raised on opening, not with the first chunk.
            await asyncio.wrap_future(self._next)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        # In the decoding thread: a container must not be closed while it decodes.
        self._executor.submit(self._decoder.close)
        self._executor.shutdown(wait=False)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The recording's sound; what couldn't be decoded is reported at the end."""
        async for chunk in pace(self._cut(), speed=self._speed):
            yield chunk
        if self._decoder.complaint:
            self._on_status("degraded", self._decoder.complaint)

    async def _cut(self) -> AsyncIterator[Samples]:
        """Decoded batches, cut to the chunk's size; the next batch is decoded meanwhile."""
        while (batch := await asyncio.wrap_future(self._next)) is not None:
            self._next = self._decode()
            for chunk in self._chunker.feed(batch):
                yield chunk.samples
        for chunk in self._chunker.flush():
            yield chunk.samples

    def _decode(self) -> "Future[Samples | None]":
        return self._executor.submit(next, self._decoder, None)


def public_name(where: str | os.PathLike[str]) -> str:
    """A path as it is; a URL without user name, password and query."""
    if not is_url(where):
        return str(where)
    try:
        address = urlsplit(str(where))
    except ValueError:
        return str(where).partition("://")[0] + "://"
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether a source is a URL and not a path."""
    return isinstance(where, str) and "://" in where


class Decoder:
    """Iterates over a recording's samples in batches; ``complaint`` says what wasn't decoded."""

    def __init__(
        self,
        where: str | os.PathLike[str],
        *,
        channel: int | None = None,
        batch_s: float = BATCH_S,
    ) -> None:
        self._where = where if is_url(where) else Path(where)
        self._name = public_name(where)
        self._channel = channel
        self._batch_samples = batch_s * RATE_HZ
        self._batches = self._join()
        self._decoded_s = 0.0
        self.endless = False  # no length is declared: a live stream
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
            if sum(map(len, pieces)) >= self._batch_samples:
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
            self.endless = container.duration is None and stream.duration is None
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
