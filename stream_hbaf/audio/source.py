"""What every audio source gives: chunks of int16, mono, 16 kHz sound, once, in order.

A source is opened with ``async with`` and then iterated over with ``chunks()``. Helpers of several
sources are here too: pacing, cutting into chunks, and a source whose sound is in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.pcm import RATE_HZ

if TYPE_CHECKING:
    from stream_hbaf.events import State, Trigger

    OnStatus = Callable[[State, str], None]  # the second is one line for people
else:
    OnStatus = Callable  # events.py costs pydantic, which no source needs at run time

Samples = NDArray[np.int16]


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


class AudioSource(Protocol):
    """Anything that gives chunks: a microphone, a recording, a stream, a server."""

    name: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...

    def chunks(self) -> AsyncIterator[Chunk]:
        """The source's sound, once, until it ends or is closed."""


async def pace(pieces: AsyncIterator[Samples], *, speed: float | None) -> AsyncIterator[Chunk]:
    """Recorded sound as chunks: at ``speed`` times real time, or at once (None).

    With a speed, a chunk is given once its last sample would have been captured, by the monotonic
    clock and without drift, and ``captured_at`` is that moment even if the consumer comes late.
    """
    started = time.monotonic()
    position = 0
    async for samples in pieces:
        end = position + len(samples)
        captured_at = time.monotonic()
        if speed is not None:
            due = started + end / RATE_HZ / speed
            await asyncio.sleep(max(0.0, due - captured_at))
            captured_at = due
        yield Chunk(start=position, samples=samples, captured_at=captured_at)
        position = end


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

    def feed(self, samples: Samples, *, captured_at: float) -> Iterator[Chunk]:
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

    def _cut(self, count: int) -> Chunk:
        samples, self._held = self._held[:count], self._held[count:]
        chunk = Chunk(
            start=self._position,
            samples=samples,
            captured_at=self._captured_at - len(self._held) / RATE_HZ,
            after_gap=self._after_gap,
        )
        self._position += count
        self._after_gap = False
        return chunk


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

    async def _cut(self) -> AsyncIterator[Samples]:
        pieces = iter(self._pieces)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            for start in range(0, len(piece), self._chunk_samples):
                yield piece[start : start + self._chunk_samples]
