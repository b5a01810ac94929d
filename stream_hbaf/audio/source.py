"""Sound comes in here: what every source gives, wherever its sound comes from.

A source is opened with ``async with``, then gives its sound once, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stream_hbaf.events import State

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


class AudioSource(Protocol):
    name: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...

    def chunks(self) -> AsyncIterator[Chunk]: ...
