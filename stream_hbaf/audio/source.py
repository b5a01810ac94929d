"""Sound comes in here: what every source gives, wherever its sound comes from.

A source is opened with ``async with``, then gives its sound once, chunk by chunk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive sound: int16, mono, 16 kHz."""

    start: int  # number of the first sample since the source was opened; never goes back
    samples: NDArray[np.int16]
    captured_at: float  # time.monotonic() when its last sample was captured
    after_gap: bool = False  # sound before it was lost: open utterances end here

    def time_of(self, sample: int) -> float:
        """When a sample in or near this chunk was captured, on the monotonic clock."""
        return self.captured_at - (self.start + len(self.samples) - sample) / RATE_HZ


class AudioSource(Protocol):
    name: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...

    def chunks(self) -> AsyncIterator[Chunk]: ...


async def pace(
    pieces: AsyncIterator[NDArray[np.int16]], *, speed: float | None
) -> AsyncIterator[Chunk]:
    """Sound that is there already, as chunks: at ``speed`` times real time, or at once (None).

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


@dataclass(frozen=True, slots=True)
class Cut:
    """What is being said ends here; what follows is counted from ``resume_at``."""

    resume_at: int
    trigger: Trigger
