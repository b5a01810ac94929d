"""A real child process listens to a real, if virtual, microphone."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

# The fixture is used by its name.
from virtual_microphone import VirtualMicrophone, virtual_microphone  # noqa: F401

from stream_hbaf.audio.capture import (
    GONE,
    HEADER,
    REFUSED,
    Device,
    find_device,
    last_detail,
    list_devices,
)
from stream_hbaf.audio.file import read_audio
from stream_hbaf.audio.microphone import Microphone
from stream_hbaf.audio.source import Chunk
from stream_hbaf.errors import DeviceError

SPEECH = Path(__file__).parent / "recordings" / "sense_and_sensibility_01_austen_64kb-0920.flac"
CAPTURE = [sys.executable, "-m", "stream_hbaf.audio.capture"]
CHUNK_SAMPLES = 512
Samples = NDArray[np.int16]


class Statuses(list[tuple[str, str]]):
    def __call__(self, state: str, line: str) -> None:
        self.append((state, line))


def children() -> list[int]:
    """This process's children, zombies included."""
    return [int(n) for n in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def aligned_likeness(heard: Samples, said: Samples) -> float:
    """Correlation of the whole recording where it fits best."""
    size = 1 << (len(heard) + len(said)).bit_length()
    a, b = np.fft.rfft(heard, size), np.fft.rfft(said, size)
    lag = int(np.argmax(np.fft.irfft(a * b.conj(), size)[: len(heard) - len(said) + 1]))
    return float(np.corrcoef(heard[lag : lag + len(said)], said)[0, 1])


async def hear(microphone: Microphone, *, seconds: float) -> list[Chunk]:
    chunks: list[Chunk] = []
    async for chunk in microphone.chunks():
        chunks.append(chunk)
        if len(chunks) * CHUNK_SAMPLES >= seconds * 16_000:
            break
    return chunks


def test_microphone_speech(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """What is said arrives, as 16 kHz mono, in even chunks that are stamped with their time."""
    said = read_audio(SPEECH)
    statuses = Statuses()

    async def run() -> tuple[list[Chunk], list[float]]:
        chunks, late_s = [], []
        async with Microphone("pulse", chunk_ms=32, on_status=statuses) as microphone:
            player = virtual_microphone.play(SPEECH)
            async for chunk in microphone.chunks():
                chunks.append(chunk)
                late_s.append(time.monotonic() - chunk.captured_at)
                if len(chunks) * CHUNK_SAMPLES >= len(said) + 2.5 * 16_000:
                    break
            player.wait()
        return chunks, late_s

    chunks, late_s = asyncio.run(run())
    assert [chunk.start for chunk in chunks] == [512 * i for i in range(len(chunks))]
    assert {len(chunk.samples) for chunk in chunks} == {512}
    heard = np.concatenate([chunk.samples for chunk in chunks])
    assert aligned_likeness(heard, said) > 0.9
    captured = np.array([chunk.captured_at for chunk in chunks])
    assert captured[-1] - captured[0] == pytest.approx(0.032 * (len(chunks) - 1), abs=0.15)
    assert 0 <= np.median(late_s) < 0.2
    assert statuses == []
    assert children() == []


def test_microphone_unplugged(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """When the device goes and comes back, both are told, and sound goes on after a gap."""
    statuses = Statuses()

    async def run() -> tuple[list[Chunk], Samples]:
        async with Microphone("pulse", chunk_ms=32, on_status=statuses) as microphone:
            chunks = await hear(microphone, seconds=0.5)
            virtual_microphone.unload()
            stream = microphone.chunks()
            async with asyncio.timeout(20):
                waiting = asyncio.ensure_future(skip_to_gap(stream))  # type: ignore[arg-type]
                while not statuses:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(1.5)  # at least one new child fails meanwhile
                virtual_microphone.load()
                chunks.append(await waiting)
            player = virtual_microphone.play(SPEECH)
            said = []
            async for chunk in stream:
                said.append(chunk.samples)
                assert not chunk.after_gap
                if len(said) * 512 > 9 * 16_000:
                    break
            player.wait()
            return chunks, np.concatenate(said)

    async def skip_to_gap(stream: "asyncio.Queue[Chunk]") -> Chunk:
        async for chunk in stream:  # type: ignore[attr-defined]
            if chunk.after_gap:
                return chunk
        raise AssertionError("the source ended")

    chunks, heard = asyncio.run(run())
    assert [state for state, _ in statuses] == ["offline", "online"]
    assert "stopped giving sound" in statuses[0][1]
    assert chunks[-1].after_gap
    assert aligned_likeness(heard, read_audio(SPEECH)) > 0.9
    assert children() == []
