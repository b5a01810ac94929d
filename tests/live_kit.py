"""Sources, a publisher and comparisons for tests that run the live pipeline."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.audio.source import AudioSource, Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import AnyEvent, Partial, Utterance
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.runtime import Publisher, Recognition
from stream_hbaf.recognizer import Recognizer

Sound = NDArray[np.int16]

PATIENCE_S = 60  # for what takes 0.1 s on a machine that isn't busy


class RandomChunks:
    """A source of given sound in chunks of random size; counts the chunks that were taken.

    The sound comes ``pace`` times as fast as in real time; all at once without a pace.
    """

    name = "random chunks"

    def __init__(self, sound: Sound, *, seed: int, pace: float | None = None) -> None:
        self._sound = sound
        self._draw = random.Random(seed)
        self._pace = pace
        self.taken = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def chunks(self) -> AsyncIterator[Chunk]:
        position = 0
        while position < len(self._sound):
            samples = self._sound[position : position + self._draw.randint(1, 4000)]
            end = position + len(samples)
            if self._pace:
                await asyncio.sleep(len(samples) / SAMPLE_RATE_HZ / self._pace)
            self.taken += 1
            yield Chunk(start=position, samples=samples, captured_at=time.monotonic())
            position = end


class EventLog:
    """A publisher that keeps what it is sent, and wakes those who wait for an event."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self._added = asyncio.Condition()

    async def send(self, event: AnyEvent) -> None:
        async with self._added:
            self.events.append(event)
            self._added.notify_all()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        pass

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` is true after some event."""
        async with asyncio.timeout(PATIENCE_S), self._added:
            await self._added.wait_for(condition)

    def ends(self) -> list[Utterance]:
        return [e for e in self.events if isinstance(e, Utterance) and e.type == "end"]

    def partials(self) -> list[Partial]:
        return [e for e in self.events if isinstance(e, Partial)]

    def has_begun(self) -> bool:
        return any(isinstance(e, Utterance) and e.type == "new" for e in self.events)


def recognise(
    recognizer: Recognizer,
    source: AudioSource,
    publishers: Sequence[Publisher] = (),
    *,
    meanwhile: Callable[[LivePipeline], Any] | None = None,
) -> list[Recognition]:
    """Run a source to its end and return what was recognised."""
    found: list[Recognition] = []

    async def run() -> None:
        pipeline = LivePipeline(recognizer, publishers, on_recognition=found.append)
        async with source:
            running = asyncio.create_task(pipeline.run(source, stop=asyncio.Event()))
            if meanwhile is not None:
                await meanwhile(pipeline)
            await running

    asyncio.run(run())
    return found


def assert_same(live: list[Recognition], replayed: list[Recognition], *, shift: int = 0) -> None:
    """Equal boundaries, features and transcripts; probabilities within 1e-5."""
    assert [(r.finish.start - shift, r.finish.end - shift) for r in live] == [
        (r.finish.start, r.finish.end) for r in replayed
    ]
    for one, other in zip(live, replayed, strict=True):
        assert one.acoustic is not None
        assert other.acoustic is not None
        assert np.array_equal(one.acoustic.functionals, other.acoustic.functionals)
        assert np.array_equal(one.acoustic.lld, other.acoustic.lld)
        assert one.text is not None
        assert other.text is not None
        assert one.text.transcript == other.text.transcript
        for label, probability in one.prediction.probabilities.items():
            assert probability == pytest.approx(other.prediction.probabilities[label], abs=1e-5)
