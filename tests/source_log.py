"""Collects the chunks and statuses of a source, for tests of sources that are sent sound."""

import asyncio
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.push_source import PushSource
from stream_hbaf.audio.source import Chunk


class SourceLog:
    """The chunks that a source gave, and the statuses that it reported."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.statuses: list[tuple[str, str]] = []
        self.changed = asyncio.Event()

    def on_status(self, state: str, line: str) -> None:
        self.statuses.append((state, line))
        self.changed.set()

    async def follow(self, source: PushSource) -> None:
        async for chunk in source.chunks():
            self.chunks.append(chunk)
            self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` is true after some chunk or status."""
        async with asyncio.timeout(15):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    @property
    def samples(self) -> NDArray[np.int16]:
        return np.concatenate([chunk.samples for chunk in self.chunks])

    @property
    def states(self) -> list[str]:
        return [state for state, _ in self.statuses]
