"""A real child process listens to a real, if virtual, microphone."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

# The fixture is used by its name.
from virtual_microphone import VirtualMicrophone, require, virtual_microphone  # noqa: F401

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
    def __init__(self) -> None:
        self.events = {state: asyncio.Event() for state in ("online", "offline", "degraded")}

    def __call__(self, state: str, line: str) -> None:
        self.append((state, line))
        self.events[state].set()


others: set[int] = set()  # children that were there before the test


def all_children() -> set[int]:
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in pids}


@pytest.fixture(autouse=True)
def know_other_children(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """The sound server, and what earlier tests left to be collected."""
    others.clear()
    others.update(all_children())


def children() -> list[int]:
    """Capture processes of ours, and zombies; not the players of sound."""
    new = all_children() - others
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in new}
    return [pid for pid, command in commands.items() if not command.startswith("paplay")]


def aligned_likeness(captured: Samples, speech: Samples) -> float:
    """Correlation of the whole recording where it fits best."""
    size = 1 << (len(captured) + len(speech)).bit_length()
    a, b = np.fft.rfft(captured, size), np.fft.rfft(speech, size)
    lag = int(np.argmax(np.fft.irfft(a * b.conj(), size)[: len(captured) - len(speech) + 1]))
    return float(np.corrcoef(captured[lag : lag + len(speech)], speech)[0, 1])


async def hear(microphone: Microphone, chunks: list[Chunk], *, seconds: float) -> None:
    taken = 0
    async for chunk in microphone.chunks():
        chunks.append(chunk)
        taken += len(chunk.samples)
        if taken >= seconds * 16_000:
            return


def test_microphone_speech(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """Played speech arrives, as 16 kHz mono, in even chunks that are stamped with their time."""
    speech = read_audio(SPEECH)
    statuses = Statuses()

    async def run() -> tuple[list[Chunk], list[float]]:
        chunks, late_s = [], []
        async with Microphone("pulse", chunk_ms=32, on_status=statuses) as microphone:
            player = virtual_microphone.play(SPEECH)
            async for chunk in microphone.chunks():
                chunks.append(chunk)
                late_s.append(time.monotonic() - chunk.captured_at)
                if len(chunks) * CHUNK_SAMPLES >= len(speech) + 2.5 * 16_000:
                    break
            player.wait()
        return chunks, late_s

    chunks, late_s = asyncio.run(run())
    assert [chunk.start for chunk in chunks] == [512 * i for i in range(len(chunks))]
    assert {len(chunk.samples) for chunk in chunks} == {512}
    captured = np.concatenate([chunk.samples for chunk in chunks])
    assert aligned_likeness(captured, speech) > 0.9
    # An idle sound server gives its first second or two in a burst.
    captured = np.array([chunk.captured_at for chunk in chunks[70:]])
    assert captured[-1] - captured[0] == pytest.approx(0.032 * (len(captured) - 1), abs=0.15)
    assert 0 <= np.median(late_s) < 0.2
    assert statuses == []
    assert children() == []


def test_microphone_channels(
    virtual_microphone: VirtualMicrophone,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Two sources of one device take a channel each: left speech isn't in the right."""
    speech = read_audio(SPEECH)
    path = tmp_path / "left.wav"
    with wave.open(str(path), "wb") as recording:
        recording.setparams((2, 2, 16_000, len(speech), "NONE", ""))
        recording.writeframes(np.stack([speech, np.zeros_like(speech)], axis=1).tobytes())
    left: list[Chunk] = []
    right: list[Chunk] = []

    async def run() -> None:
        async with (
            Microphone("pulse", channel=0, chunk_ms=32, on_status=Statuses()) as first,
            Microphone("pulse", channel=1, chunk_ms=32, on_status=Statuses()) as second,
        ):
            player = virtual_microphone.play_wav(path)
            seconds = len(speech) / 16_000 + 2.5
            await asyncio.gather(
                hear(first, left, seconds=seconds), hear(second, right, seconds=seconds)
            )
            await asyncio.to_thread(player.wait)

    asyncio.run(run())
    loudest = [
        np.abs(np.concatenate([c.samples for c in chunks])).max() for chunks in (left, right)
    ]
    # The mean of both channels would be half of it.
    assert loudest[0] == pytest.approx(np.abs(speech).max(), rel=0.3)
    assert loudest[1] <= 2
    assert children() == []


def test_microphone_unknown_channel(
    virtual_microphone: VirtualMicrophone,  # noqa: F811
) -> None:
    """A channel that the device doesn't have is one line."""
    [channels] = {device.channels for device in list_devices() if device.name == "pulse"}
    assert opening_error("pulse", channel=channels) == (
        f"microphone 'pulse': no channel {channels}; it has channels 0 to {channels - 1}"
    )


def test_microphone_unplugged(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """When the device goes and comes back, both are reported, and sound goes on after a gap."""
    speech = read_audio(SPEECH)
    statuses = Statuses()
    chunks: list[Chunk] = []

    async def run() -> None:
        async with Microphone("pulse", chunk_ms=32, on_status=statuses) as microphone:
            listening = asyncio.create_task(hear(microphone, chunks, seconds=60))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(virtual_microphone.unload)
            await asyncio.wait_for(statuses.events["offline"].wait(), 30)
            await asyncio.sleep(1.5)  # at least one new child fails meanwhile
            await asyncio.to_thread(virtual_microphone.load)
            await asyncio.wait_for(statuses.events["online"].wait(), 30)
            player = await asyncio.to_thread(virtual_microphone.play, SPEECH)
            await asyncio.to_thread(player.wait)
            await asyncio.sleep(1.0)
            listening.cancel()

    asyncio.run(run())
    assert [state for state, _ in statuses] == ["offline", "online"]
    assert "stopped giving sound" in statuses[0][1]
    assert [chunk.start for chunk in chunks] == [512 * i for i in range(len(chunks))]
    gaps = [i for i, chunk in enumerate(chunks) if chunk.after_gap]
    assert len(gaps) == 1
    assert chunks[gaps[0]].captured_at - chunks[gaps[0] - 1].captured_at > 1.5
    captured = np.concatenate([chunk.samples for chunk in chunks[gaps[0] :]])
    assert aligned_likeness(captured, speech) > 0.9
    assert children() == []


def test_microphone_child_killed(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """A capture process that dies is replaced by another."""
    statuses = Statuses()
    chunks: list[Chunk] = []

    async def run() -> None:
        async with Microphone("pulse", chunk_ms=32, on_status=statuses) as microphone:
            await hear(microphone, chunks, seconds=0.3)
            [child] = children()
            os.kill(child, signal.SIGKILL)
            async with asyncio.timeout(20):
                while not chunks[-1].after_gap:
                    await hear(microphone, chunks, seconds=0.032)

    asyncio.run(run())
    assert [state for state, _ in statuses] == ["offline", "online"]
    assert [chunk.start for chunk in chunks] == [512 * i for i in range(len(chunks))]
    assert children() == []


def test_microphone_slow_consumer(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """Sound that isn't consumed is dropped oldest first, and the chunk after it has a gap."""
    statuses = Statuses()
    chunks: list[Chunk] = []

    async def run() -> None:
        async with Microphone("pulse", chunk_ms=1000, on_status=statuses) as microphone:
            await asyncio.sleep(10.5)  # more than the child, the pipe and asyncio hold together
            await hear(microphone, chunks, seconds=10)

    asyncio.run(run())
    assert [chunk.after_gap for chunk in chunks].count(True) == 1
    assert statuses[0][0] == "degraded"
    assert "too slow" in statuses[0][1]


def test_microphone_closed_while_offline(
    virtual_microphone: VirtualMicrophone,  # noqa: F811
) -> None:
    """Closing takes less than a second and leaves no process, even while the device is away."""

    async def run() -> float:
        statuses = Statuses()
        async with Microphone("pulse", chunk_ms=32, on_status=statuses) as microphone:
            listening = asyncio.create_task(hear(microphone, [], seconds=60))
            await asyncio.to_thread(virtual_microphone.unload)
            await asyncio.wait_for(statuses.events["offline"].wait(), 20)
            await asyncio.sleep(0.7)  # a new child is just being tried
            closing = time.monotonic()
        closed_s = time.monotonic() - closing
        async with asyncio.timeout(10):
            await listening  # ends by itself
        return closed_s

    try:
        assert asyncio.run(run()) < 1.0
    finally:
        virtual_microphone.load()
    assert children() == []


@pytest.mark.parametrize(
    ("device", "line"),
    [
        (
            "headset",
            "no microphone 'headset'; there are 0 'pulse', 1 'default' "
            "(run 'stream-hbaf devices' to see them)",
        ),
        (
            7,
            "no microphone '7'; there are 0 'pulse', 1 'default' "
            "(run 'stream-hbaf devices' to see them)",
        ),
    ],
)
def test_microphone_unknown(
    virtual_microphone: VirtualMicrophone,  # noqa: F811
    device: str | int,
    line: str,
) -> None:
    """A device that doesn't exist is one line that names those that do."""
    assert opening_error(device) == line


def test_microphone_away(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """A device that can't be opened is one line."""
    virtual_microphone.unload()
    try:
        line = opening_error("pulse")
    finally:
        virtual_microphone.load()
    assert line.startswith("microphone 'pulse' can't be opened (")
    assert line.endswith("or choose another ('stream-hbaf devices')")


def test_microphone_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any microphone is one line that says what to do instead."""
    require()
    (tmp_path / "asound.conf").write_text("pcm.away { type hw card 99 }")
    monkeypatch.setenv("ALSA_CONFIG_PATH", str(tmp_path / "asound.conf"))
    if list_devices():
        pytest.skip("this machine has a microphone")
    expected = "no microphone found; connect one, or listen to a recording with --file"
    assert opening_error(None) == expected


def test_list_devices_present(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """The list holds what is there now."""
    found = {device.name: device for device in list_devices()}
    assert found.keys() == {"pulse", "default"}
    assert found["default"].is_default
    assert found["pulse"].index == 0


def test_capture_interrupted(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """Ctrl-C is left to the parent; the child ends when nobody reads its sound any more."""
    child = subprocess.Popen(
        [*CAPTURE, "--device=pulse"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    chunk_bytes = HEADER.size + 2 * CHUNK_SAMPLES
    assert len(child.stdout.read(chunk_bytes)) == chunk_bytes
    child.send_signal(signal.SIGINT)
    assert len(child.stdout.read(10 * chunk_bytes)) == 10 * chunk_bytes
    child.stdout.close()
    assert child.wait(5) == GONE
    lines = child.stderr.read().decode().splitlines()  # PortAudio's own chatter isn't among them
    assert [json.loads(line)["state"] for line in lines] == ["online"]
    child.stderr.close()


def test_capture_refused(virtual_microphone: VirtualMicrophone) -> None:  # noqa: F811
    """A refusal has its own exit status and is one JSON line."""
    ended = subprocess.run([*CAPTURE, "--device=headset"], capture_output=True, check=False)
    assert ended.returncode == REFUSED
    assert ended.stdout == b""
    assert json.loads(ended.stderr)["state"] == "offline"


DEVICES = [
    Device(index=2, name="USB Microphone", channels=1, rate_hz=48_000, is_default=False),
    Device(index=3, name="USB Microphone Pro", channels=1, rate_hz=48_000, is_default=True),
    Device(index=5, name="Built-in", channels=2, rate_hz=44_100, is_default=False),
]


@pytest.mark.parametrize(
    ("name", "index"),
    [(None, 3), ("USB Microphone", 2), ("pro", 3), ("built", 5), ("5", 5)],
)
def test_find_device_by(name: str | None, index: int) -> None:
    """The default, an exact name, a part of one in any case, and a number are found."""
    assert find_device(name, DEVICES).index == index


def test_find_device_ambiguous() -> None:
    """A name that several devices bear names them."""
    with pytest.raises(DeviceError) as error:
        find_device("usb", DEVICES)
    assert str(error.value) == (
        "microphone 'usb' could be any of 2 'USB Microphone', 3 'USB Microphone Pro'; "
        "give its number"
    )


def test_last_detail_among_chatter() -> None:
    """A status is found among what libraries print."""
    lines = 'ALSA lib x\n{"state": "offline", "detail": "no microphone"}\n{broken\n'
    assert last_detail(lines) == "no microphone"


def opening_error(device: str | int | None, *, channel: int | None = None) -> str:
    """What the opening of ``device`` raises; it leaves no process."""

    async def run() -> None:
        async with Microphone(device, channel=channel, chunk_ms=32, on_status=Statuses()):
            pass

    with pytest.raises(DeviceError) as error:
        asyncio.run(run())
    assert children() == []
    return str(error.value)
