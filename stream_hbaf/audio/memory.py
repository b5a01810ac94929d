"""Sound comes from memory: pieces of it, played one after another as one stream."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.pcm import RATE_HZ
from stream_hbaf.audio.source import Chunk, pace

Samples = NDArray[np.int16]


class MemorySource:
    """Pieces of int16 mono 16 kHz sound as a source: at ``speed`` times real time, or as fast as
    they are taken (None).

    Each piece is asked for in a thread, once the one before it has been taken. Its last chunk may
    be shorter.
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
        return pace(self._cut(), speed=self._speed)

    async def _cut(self) -> AsyncIterator[Samples]:
        pieces = iter(self._pieces)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            for start in range(0, len(piece), self._chunk_samples):
                yield piece[start : start + self._chunk_samples]
