"""What every audio source gives: chunks of int16, mono, 16 kHz sound, once, in order.

A source is opened with ``async with`` and then iterated over with ``chunks()``. What several
sources need is here too: conversion from any rate and number of channels, pacing, cutting into
chunks, reopening, and a source whose sound is in memory. Imports none of the settings, because the
capture process imports it and must start quickly.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, NotRequired, Protocol, Self, TypedDict
from urllib.parse import urlsplit

import numpy as np
import soxr
from numpy.typing import NDArray

from stream_hbaf.errors import AudioError

if TYPE_CHECKING:
    from stream_hbaf.events import State, Trigger

    OnStatus = Callable[[State, str], None]  # the second is one line for people
else:
    OnStatus = Callable  # events.py costs pydantic, which no source needs at run time

Samples = NDArray[np.int16]

RATE_HZ: Final = 16_000  # config.SAMPLE_RATE_HZ again, without pydantic; a test compares them
SampleFormat = Literal["s16le", "s32le", "f32le"]
WIDTHS: Final[dict[SampleFormat, int]] = {"s16le": 2, "s32le": 4, "f32le": 4}  # bytes
FIRST_RETRY_S = 0.5
# Channels cancel each other if their mean has less than a hundredth of their power, in so many
# seconds of frames above -60 dB relative to full scale. Less is enough where no more comes.
CANCELLED_SHARE, AUDIBLE = 0.01, 1e-6
TELLING_S, SHORTEST_TELLING_S = 2.0, 0.2
CANCELS = "its channels cancel each other out; choose one, such as channel=0"
SETTLED_S = 10.0  # without loss, after which a degraded source counts as online again


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive sound: int16, mono, 16 kHz."""

    start: int  # number of the first sample since the source was opened; never goes back
    samples: Samples
    captured_at: float  # time.monotonic() when its last sample was captured
    after_gap: bool = False  # sound before it was lost: open utterances end here

    def time_of(self, sample: int) -> float:
        """When a sample in or near this chunk was captured, on the monotonic clock."""
        return self.captured_at - (self.start + len(self.samples) - sample) / RATE_HZ


@dataclass(frozen=True, slots=True)
class Cut:
    """The open utterance ends here; the next sample has the number ``resume_at``."""

    resume_at: int
    trigger: Trigger


class SourceOptions(TypedDict):
    """The keyword arguments that every source takes."""

    channel: NotRequired[int | None]  # counts from 0; left out or None: the mean of all
    chunk_ms: int  # length of the chunks; the last one may be shorter
    on_status: OnStatus  # called when sound is lost or incomplete, and when it is back


class AudioSource(Protocol):
    """Anything that gives chunks: a microphone, a recording, a stream, a server."""

    name: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...

    def chunks(self) -> AsyncIterator[Chunk]:
        """The source's sound, once, until it ends or is closed."""


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


def to_int16(samples: NDArray[np.float32]) -> Samples:
    """Scale [-1, 1] by 32768, round and clip: the exact inverse of int16 / 32768.

    Clipping guards the utterance's loudest sample: +1.0 is 32768, which wraps to -32768.
    """
    scaled = np.nan_to_num(np.rint(samples * np.float32(32768)))
    clipped: NDArray[np.float32] = np.clip(scaled, -32768, 32767)
    return clipped.astype(np.int16)


def from_bytes(
    content: bytes, *, sample_format: SampleFormat, channels: int
) -> NDArray[np.float32]:
    """Interleaved PCM -> [n, channels] in [-1, 1]. Raises AudioError if a frame is incomplete.

    A float that isn't a number is silence: within a resampler it would spread.
    """
    size = WIDTHS[sample_format] * channels
    if len(content) % size:
        raise AudioError(f"{len(content)} bytes are no whole number of frames of {size} bytes")
    if sample_format == "f32le":
        floats = np.nan_to_num(np.frombuffer(content, "<f4"), nan=0.0, posinf=1.0, neginf=-1.0)
        samples: NDArray[np.float64] = np.clip(floats, -1, 1)
    else:
        whole = np.frombuffer(content, f"<i{WIDTHS[sample_format]}")
        samples = whole / 2.0 ** (8 * WIDTHS[sample_format] - 1)
    return samples.reshape(-1, channels).astype(np.float32)


def no_channel(channel: int, *, where: str, channels: int) -> str:
    """The error message for a channel that isn't there."""
    last = f"channels 0 to {channels - 1}" if channels > 1 else "one channel, 0"
    return f"{where}: no channel {channel}; it has {last}"


class Resampler:
    """Takes one channel, or the mean of all (None), and resamples it with soxr HQ.

    Any split of the input gives the same samples. 16 kHz mono that came from int16 passes
    unchanged. ``feed`` holds back the filter's delay, ``behind_s`` (48 kHz: up to 40 ms);
    ``finish`` gives the rest, so that ``n`` frames become ``n * 16000 / rate_hz`` samples, halves
    rounded up. Raises AudioError, naming ``where``, if there is no such channel.
    """

    def __init__(
        self, rate_hz: int, channels: int, *, channel: int | None = None, where: str = "sound"
    ) -> None:
        if channel is not None and not 0 <= channel < channels:
            raise AudioError(no_channel(channel, where=where, channels=channels))
        self.rate_hz = rate_hz
        self.channels = channels
        self.behind_s = 0.0
        self._picked = slice(None) if channel is None else slice(channel, channel + 1)
        self._power = self._mean_power = 0.0  # of the channels and of their mean, summed
        self._audible = 0  # frames
        self._stream = (
            None
            if rate_hz == RATE_HZ
            else soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32", quality="HQ")
        )

    def feed(self, samples: NDArray[np.float32]) -> Samples:
        """The next resampled samples; ``samples`` is [n, channels]."""
        if samples.ndim != 2 or samples.shape[1] != self.channels:
            raise ValueError(f"expected [n, {self.channels}] samples, not {samples.shape}")
        mono = _mean(samples[:, self._picked])
        if self.channels > 1:
            power = np.square(samples).mean(axis=1)
            self._power += float(power.sum())
            self._mean_power += float(np.square(mono).sum())
            self._audible += int((power > AUDIBLE).sum())
        resampled = self._resample(mono, last=False)
        self.behind_s += len(samples) / self.rate_hz - len(resampled) / RATE_HZ
        return resampled

    def cancels(self, *, after_s: float = TELLING_S) -> bool:
        """Whether the channels cancel each other in their mean, as with one wired in reverse.

        ``after_s`` seconds of audible sound are needed to tell.
        """
        is_telling = self._audible >= after_s * self.rate_hz > 0
        return is_telling and self._mean_power < CANCELLED_SHARE * self._power

    def finish(self) -> Samples:
        """The samples held back; nothing may be fed afterwards."""
        return self._resample(np.zeros(0, np.float32), last=True)

    def _resample(self, mono: NDArray[np.float32], *, last: bool) -> Samples:
        if self._stream is not None:
            mono = self._stream.resample_chunk(mono, last=last)
        return to_int16(mono)


def _mean(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, channels] -> [n], summed channel by channel so that n can't change the rounding."""
    total = samples[:, 0].astype(np.float32)
    for channel in samples.T[1:]:
        total += channel
    total /= np.float32(samples.shape[1])
    return total


class Chunker:
    """Cuts sound that comes in pieces of any length into chunks of one length.

    Samples are numbered as if no sound had been lost between pieces.
    """

    def __init__(self, *, chunk_ms: int) -> None:
        self._chunk_samples = chunk_ms * RATE_HZ // 1000
        self._held: Samples = np.zeros(0, np.int16)
        self._captured_at = 0.0  # of the last sample held
        self._position = 0
        self._after_gap = False

    def feed(self, samples: Samples, *, captured_at: float = 0.0) -> Iterator[Chunk]:
        """The chunks that are now full; ``captured_at`` is the last sample's, monotonic."""
        self._held = np.concatenate([self._held, samples])
        self._captured_at = captured_at
        while len(self._held) >= self._chunk_samples:
            yield self._cut(self._chunk_samples)

    def flush(self) -> Iterator[Chunk]:
        """The rest, shorter than a chunk; the next chunk is one after a gap."""
        if len(self._held):
            yield self._cut(len(self._held))
        self._after_gap = self._position > 0

    def skip_to(self, start: int) -> Iterator[Chunk]:
        """The rest, if sound is missing before the next sample, which has the number ``start``.

        An empty chunk follows: what is open ends now, and not when the gap is over.
        """
        if start > self._position + len(self._held):
            yield from self.flush()
            if self._after_gap:
                yield self._cut(0)
            self._after_gap = self._position > 0
            self._position = start

    def drop(self) -> None:
        """Drop what borders on a gap; the next chunk is one after it."""
        self._held = self._held[:0]
        self._after_gap = True

    def _cut(self, count: int) -> Chunk:
        samples, self._held = self._held[:count], self._held[count:]
        captured_at = self._captured_at - len(self._held) / RATE_HZ
        chunk = Chunk(self._position, samples, captured_at, self._after_gap)
        self._position += count
        self._after_gap = False
        return chunk


class LossReport:
    """Reports that a source loses sound, once, and when its sound is complete again."""

    def __init__(self, name: str, on_status: OnStatus) -> None:
        self._name = name
        self._on_status = on_status
        self._lost_at: float | None = None

    def update(self, lost: str, *, now: float) -> None:
        """``lost`` is what was lost before the newest sound, "" if nothing."""
        if lost:
            if self._lost_at is None:
                self._on_status("degraded", f"{self._name}: {lost}")
            self._lost_at = now
        elif self._lost_at is not None and now - self._lost_at > SETTLED_S:
            self._lost_at = None
            self._on_status("online", f"{self._name}: sound complete again")


async def pace(chunks: AsyncIterator[Chunk], *, speed: float | None) -> AsyncIterator[Chunk]:
    """Recorded sound at ``speed`` times real time, or at once (None).

    With a speed, a chunk is given once its last sample would have been captured, by the monotonic
    clock and without drift, and ``captured_at`` is that moment even if the consumer comes late.
    """
    started = time.monotonic()
    async for chunk in chunks:
        captured_at = time.monotonic()
        if speed is not None:
            due = started + (chunk.start + len(chunk.samples)) / RATE_HZ / speed
            await asyncio.sleep(max(0.0, due - captured_at))
            captured_at = due
        yield replace(chunk, captured_at=captured_at)


async def retries(closed: asyncio.Event, *, longest_s: float) -> AsyncIterator[None]:
    """Wait before each attempt to reopen a source, twice as long each time, until it is closed."""
    wait_s = FIRST_RETRY_S
    while True:
        try:
            async with asyncio.timeout(wait_s):
                await closed.wait()
        except TimeoutError:
            yield
            wait_s = min(2 * wait_s, longest_s)
        else:
            return


class MemorySource:
    """Pieces of int16 mono 16 kHz sound as a source: at ``speed`` times real time, or as fast as
    they are consumed (None).

    Each piece is asked for in a thread, once the one before it has been consumed. Its last chunk
    may be shorter.
    """

    name = "memory"

    def __init__(self, pieces: Iterable[Samples], *, speed: float | None, chunk_ms: int) -> None:
        self._pieces = pieces
        self._speed = speed
        self._chunk_samples = chunk_ms * RATE_HZ // 1000

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    def chunks(self) -> AsyncIterator[Chunk]:
        """The sound in chunks."""
        return pace(self._cut(), speed=self._speed)

    async def _cut(self) -> AsyncIterator[Chunk]:
        pieces, position = iter(self._pieces), 0
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            for start in range(0, len(piece), self._chunk_samples):
                samples = piece[start : start + self._chunk_samples]
                yield Chunk(position, samples, captured_at=0.0)
                position += len(samples)
