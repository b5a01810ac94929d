"""A listener for the tests of sources at which sound arrives."""

import asyncio
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.push_source import ArrivingSource
from stream_hbaf.audio.source import Chunk


class SourceListener:
    """What a source gave, and what it said."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.statuses: list[tuple[str, str]] = []
        self.changed = asyncio.Event()

    def on_status(self, state: str, line: str) -> None:
        self.statuses.append((state, line))
        self.changed.set()

    async def follow(self, source: ArrivingSource) -> None:
        async for chunk in source.chunks():
            self.chunks.append(chunk)
            self.changed.set()

    async def until(self, come_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(15):
            while not come_true():
                self.changed.clear()
                await self.changed.wait()

    @property
    def samples(self) -> NDArray[np.int16]:
        return np.concatenate([chunk.samples for chunk in self.chunks])

    @property
    def states(self) -> list[str]:
        return [state for state, _ in self.statuses]
