"""People who talk: sentences of actors and passages of readers, in real time, from memory."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Int16 = NDArray[np.int16]

RATE_HZ = 16_000
CHUNK = RATE_HZ * 64 // 1000  # samples; the default of source.chunk_ms
CHUNKS_LATE = 5 * RATE_HZ // CHUNK  # what a device or a socket holds; older sound is lost
PAUSE_S = 1.0  # mean; at least 0.3 s
FLOOR = 3  # standard deviation of a quiet room's noise
SPEECH_DBFS = -26.0  # of every clip


def talk(corpora: Path, *, stream: int, seconds: float) -> Int16:
    """One person's sentences and passages, with pauses between them: int16 [n]."""
    from stream_hbaf.audio.file import read_audio

    draw = random.Random(stream)
    actors = sorted(corpora.glob("ravdess/Actor_*"))
    readers = sorted(corpora.glob("speech/libri/*.ogg"))
    sentences = sorted(actors[stream % len(actors)].glob("*.flac"))
    parts, length = [], 0
    while length < seconds * RATE_HZ:
        reads = draw.random() < 0.25
        clip = read_audio(draw.choice(readers if reads else sentences)).astype(np.float64)
        level = np.sqrt(np.mean((clip / 32768) ** 2))
        pause = np.zeros(int((0.3 + draw.expovariate(1 / (PAUSE_S - 0.3))) * RATE_HZ))
        parts += [clip * 10 ** (SPEECH_DBFS / 20) / level, pause]
        length += len(clip) + len(pause)
    sound = np.concatenate(parts)[: int(seconds * RATE_HZ)]
    sound += np.random.default_rng(stream).normal(0, FLOOR, len(sound))
    clipped: Int16 = np.clip(sound, -32768, 32767).astype(np.int16)
    return clipped


class Talk:
    """A source of sound in memory, captured in real time; loses what is older than 5 s."""

    name = "talk"

    def __init__(self, sound: Int16, *, delay_s: float) -> None:
        self._sound = sound
        self._delay_s = delay_s
        self.lost = 0  # chunks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def chunks(self) -> AsyncIterator[Any]:
        from stream_hbaf.audio.source import Chunk

        began = time.monotonic() + self._delay_s
        waiting: deque[tuple[int, float]] = deque(
            (at, began + (at + CHUNK) / RATE_HZ) for at in range(0, len(self._sound), CHUNK)
        )
        gap = False
        while waiting:
            while (
                len(waiting) > 1
                and time.monotonic() - waiting[0][1] > CHUNKS_LATE * CHUNK / RATE_HZ
            ):
                waiting.popleft()
                self.lost, gap = self.lost + 1, True
            start, due = waiting.popleft()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield Chunk(start, self._sound[start : start + CHUNK], captured_at=due, after_gap=gap)
            gap = False
