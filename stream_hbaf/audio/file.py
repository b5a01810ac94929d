"""Sound comes from a recording: any format FFmpeg reads, decoded lazily in a thread."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import av
import av.error
import av.logging
import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.pcm import RATE_HZ, Resampler
from stream_hbaf.audio.source import Chunk, OnStatus, pace
from stream_hbaf.errors import AudioError

Samples = NDArray[np.int16]

BATCH_S = 4  # sound decoded in one visit to the thread
MISSING_S = 0.5  # a recording may fall this far short of the length it declares
# Containers whose header declares a length. Ogg has none: a cut one is like a shorter one.
DECLARING = {"wav", "flac", "mov", "matroska", "aiff", "caf", "w64"}
FULL_SCALE = {"s8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


def read_audio(path: str | os.PathLike[str], *, on_status: OnStatus | None = None) -> Samples:
    """The whole recording as int16, mono, 16 kHz; a damaged one as far as it can be decoded.

    ``on_status`` hears "degraded" if some of it can't. Raises AudioError if nothing can.
    """
    decoder = _Decoder(Path(path))
    samples = np.concatenate(list(decoder))
    if decoder.complaint and on_status is not None:
        on_status("degraded", decoder.complaint)
    return samples


class FileSource:
    """A recording as a source: at ``speed`` times real time, or as fast as it is taken (None).

    The last chunk may be shorter. Opening raises AudioError if nothing can be decoded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        speed: float | None,
        chunk_ms: int,
        on_status: OnStatus,
    ) -> None:
        if speed is not None and not speed > 0:
            raise ValueError(f"speed must be positive, not {speed}")
        self.path = Path(path)
        self.name = self.path.name
        self._speed = speed
        self._chunk_samples = chunk_ms * RATE_HZ // 1000
        self._on_status = on_status

    async def __aenter__(self) -> Self:
        self._decoder = _Decoder(self.path)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._next = self._decode()
        try:
            # Errors belong to the opening, not to the first chunk.
            await asyncio.wrap_future(self._next)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        # In the thread that decodes: a container may not be closed under a running decode.
        self._executor.submit(self._decoder.close)
        self._executor.shutdown(wait=False)

    async def chunks(self) -> AsyncIterator[Chunk]:
        async for chunk in pace(self._cut(), speed=self._speed):
            yield chunk
        if self._decoder.complaint:
            self._on_status("degraded", self._decoder.complaint)

    async def _cut(self) -> AsyncIterator[Samples]:
        """Decoded batches, cut to the chunk's size; the next batch is decoded meanwhile."""
        held = np.zeros(0, np.int16)
        while True:
            batch = await asyncio.wrap_future(self._next)
            if batch is None:
                break
            self._next = self._decode()
            held = np.concatenate([held, batch])
            whole = len(held) - len(held) % self._chunk_samples
            for start in range(0, whole, self._chunk_samples):
                yield held[start : start + self._chunk_samples]
            held = held[whole:]
        if len(held):
            yield held

    def _decode(self) -> "Future[Samples | None]":
        return self._executor.submit(next, self._decoder, None)


class _Decoder:
    """Iterates over a recording's samples in batches; remembers what could not be decoded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batches = self._join()
        self._heard = 0.0  # seconds decoded, after which the complaint says where it broke
        self.complaint = ""

    def __iter__(self) -> Iterator[Samples]:
        return self

    def __next__(self) -> Samples:
        return next(self._batches)

    def close(self) -> None:
        self._batches.close()

    def _join(self) -> Any:
        """Frames are a few hundred samples; thread visits want more. Never an empty batch."""
        pieces: list[Samples] = []
        any_sound = False
        for piece in self._resample():
            pieces.append(piece)
            if sum(map(len, pieces)) >= BATCH_S * RATE_HZ:
                any_sound = True
                yield np.concatenate(pieces)
                pieces = []
        if sum(map(len, pieces)):
            any_sound = True
            yield np.concatenate(pieces)
        if not any_sound:
            reason = "nothing in it can be decoded" if self.complaint else "it holds no sound"
            raise AudioError(f"{self._path}: {reason}; give a recording with sound")

    def _resample(self) -> Iterator[Samples]:
        resampler: Resampler | None = None
        for frame in self._frames():
            form = (frame.sample_rate, len(frame.layout.channels))
            if resampler is None or (resampler.rate_hz, resampler.channels) != form:
                if resampler is not None:  # chained streams may change their form on the way
                    yield resampler.finish()
                resampler = Resampler(*form)
            self._heard += frame.samples / frame.sample_rate
            yield resampler.feed(_to_float(frame))
        if resampler is not None:
            yield resampler.finish()

    def _frames(self) -> Iterator[Any]:
        with _open(self._path) as container:
            if not container.streams.audio:
                raise AudioError(f"{self._path}: no audio in it; give a recording with sound")
            stream = container.streams.audio[0]
            stream.thread_type = "NONE"  # one thread is faster than real time a thousandfold
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                    if packet is None:
                        break
                    if packet.is_corrupt:
                        self._complain("damaged")
                    yield from packet.decode()
                except av.error.EOFError:
                    break
                except av.error.InvalidDataError:
                    self._complain("damaged")  # the next packet may be whole again
                except av.error.FFmpegError as error:
                    self._complain(str(error.strerror))
                    break
            self._compare(_declared_s(container, stream))

    def _compare(self, declared_s: float) -> None:
        if self._heard < declared_s - MISSING_S:
            self._complain(f"{declared_s:.1f} s declared")

    def _complain(self, reason: str) -> None:
        if not self.complaint:
            self.complaint = (
                f"{self._path}: damaged or cut short at {self._heard:.1f} s ({reason}); "
                "going on with what can be decoded"
            )


def _open(path: Path) -> Any:
    if path.is_dir():
        raise AudioError(f"{path}: is a folder; give a sound file")
    try:
        if path.stat().st_size == 0:
            raise AudioError(f"{path}: is empty; give a recording with sound")
        av.logging.set_level(None)  # FFmpeg's own complaints would spoil the screen
        return av.open(str(path.absolute()), metadata_errors="replace")
    except av.error.InvalidDataError:
        raise AudioError(
            f"{path}: not a sound file, or damaged; give wav, flac, mp3, ogg, m4a or mp4"
        ) from None
    except OSError as error:
        raise AudioError(f"{path}: can't be read ({error.strerror}); check the path") from None


def _declared_s(container: Any, stream: Any) -> float:
    """The length a header declares; 0.0 where FFmpeg only estimates one."""
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
