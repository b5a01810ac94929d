"""Follows a source's sound: publishes its level, and says in one line what a person should check.

Somebody may wait for a source that never gives speech: it is muted, it is the wrong device, or the
threshold is too high for whispers.
"""

import logging
from collections.abc import Awaitable, Callable
from math import floor

import numpy as np

from stream_hbaf.audio.source import CANCELS, Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import Level
from stream_hbaf.live.runtime import Runtime

LOG = logging.getLogger(__name__)

LEVEL_EVERY_S = 0.1
AFTER_S = 120  # of sound in which nobody speaks: a muted device should not pass for a quiet room
SHORTEST_S = 1  # of a source that ends before that
SILENT_PEAK = 33  # of int16, -60 dB: a microphone that hears a room is louder


class SoundMonitor:
    """Follows one source; its hint, if there is one, is in ``runtime.hints``.

    ``on_hint`` is called when the hint has changed.
    """

    def __init__(
        self, name: str, runtime: Runtime, *, on_hint: Callable[[], Awaitable[None]]
    ) -> None:
        self._name = name
        self._runtime = runtime
        self._on_hint = on_hint
        self._level_due = 0.0
        self._length = 0  # samples
        self._peak = 0  # until the first utterance
        self._has_spoken = False

    async def begin_utterance(self) -> None:
        """Somebody speaks: a hint is obsolete."""
        self._has_spoken = True
        if self._runtime.hints.pop(self._name, ""):
            await self._on_hint()

    async def add(self, chunk: Chunk, *, is_speech: bool, highest_score: float) -> None:
        """Follow a chunk; ``highest_score`` is the highest speech score of all frames so far."""
        if not len(chunk.samples):
            return
        await self._publish_level(chunk, is_speech=is_speech)
        self._length += len(chunk.samples)
        if not self._has_spoken:
            peak = max(int(chunk.samples.max()), -int(chunk.samples.min()))
            self._peak = max(self._peak, peak)
            if self._length >= AFTER_S * SAMPLE_RATE_HZ:
                await self._hint(highest_score)

    async def end(self, *, highest_score: float) -> None:
        """The source has ended."""
        if not self._has_spoken and self._length >= SHORTEST_S * SAMPLE_RATE_HZ:
            await self._hint(highest_score)

    async def report(self, complaint: str) -> None:
        """The source complains about its own sound, which is published already."""
        if complaint.endswith(CANCELS):
            self._runtime.hints[self._name] = f"{self._name}: {CANCELS}"
            await self._on_hint()

    async def _hint(self, highest_score: float) -> None:
        if self._name in self._runtime.hints:
            return
        length = f"{self._length / SAMPLE_RATE_HZ:.0f} s"
        found = f"nothing but silence in {length}; check that it isn't muted"
        if self._peak > SILENT_PEAK:
            threshold = self._runtime.config.vad.threshold
            found = (
                f"sound, but no speech found in {length} (speech score at most "
                f"{floor(100 * highest_score) / 100}, vad.threshold {threshold:g}); "
                "lower vad.threshold"
            )
        hint = f"{self._name}: {found}, or choose another device or channel"
        self._runtime.hints[self._name] = hint
        LOG.warning("%s", hint)
        await self._on_hint()

    async def _publish_level(self, chunk: Chunk, *, is_speech: bool) -> None:
        if chunk.captured_at < self._level_due:
            return
        self._level_due = chunk.captured_at + LEVEL_EVERY_S
        power = float(np.mean(np.square(chunk.samples.astype(np.float32) / 32768)))
        dbfs = 10 * float(np.log10(power + 1e-10))
        await self._runtime.publish(Level(source=self._name, dbfs=dbfs, speech=is_speech))
