"""Any recording becomes chunks; a bad one becomes one clear line."""

import asyncio
import shutil
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.audio.source import Chunk
from stream_hbaf.errors import AudioError

RECORDINGS = Path(__file__).parent / "recordings"
SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"  # 2.99 s, 16 kHz, mono
Samples = NDArray[np.int16]


class Statuses(list[tuple[str, str]]):
    def __call__(self, state: str, line: str) -> None:
        self.append((state, line))


def convert(target: Path, *options: str, source: Path = SPEECH) -> Path:
    command = ["ffmpeg", "-loglevel", "error", "-y", "-i", str(source), *options, str(target)]
    subprocess.run(command, check=True)
    return target


def take(
    path: Path, *, speed: float | None = None, chunk_ms: int = 32, statuses: Statuses | None = None
) -> list[Chunk]:
    async def run() -> list[Chunk]:
        on_status = Statuses() if statuses is None else statuses
        async with FileSource(path, speed=speed, chunk_ms=chunk_ms, on_status=on_status) as source:
            return [chunk async for chunk in source.chunks()]

    return asyncio.run(run())


def likeness(decoded: Samples, speech: Samples) -> float:
    """Correlation at the best alignment within 0.1 s (codecs may delay)."""
    scores = []
    for shift in range(-1600, 1600):
        a, b = decoded[max(0, shift) :], speech[max(0, -shift) :]
        n = min(len(a), len(b), 16_000)
        a, b = a[:n].astype("f4"), b[:n].astype("f4")
        scores.append(float(a @ b / np.sqrt((a @ a) * (b @ b) + 1)))
    return max(scores)


needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="apt-get install ffmpeg")

FORMATS = {
    "8khz.wav": ("-ar", "8000"),
    "u8.wav": ("-c:a", "pcm_u8"),
    "s24.wav": ("-c:a", "pcm_s24le"),
    "f32.wav": ("-c:a", "pcm_f32le"),
    "stereo.flac": ("-ar", "44100", "-ac", "2"),
    "speech.mp3": ("-b:a", "128k"),
    "speech.ogg": ("-c:a", "libvorbis", "-ar", "48000"),
    "opus.ogg": ("-c:a", "libopus"),
    "speech.m4a": ("-c:a", "aac"),
    "surround.wav": ("-ar", "48000", "-filter_complex", "pan=5.1|" + "|".join(
        f"c{channel}=c0" for channel in range(6)
    )),
}  # fmt: skip


@needs_ffmpeg
@pytest.mark.parametrize("name", FORMATS)
def test_file_format(name: str, tmp_path: Path) -> None:
    """Every format, rate and number of channels gives the same speech, in the same length."""
    speech = read_audio(SPEECH)
    decoded = read_audio(convert(tmp_path / name, *FORMATS[name]))
    assert abs(len(decoded) - len(speech)) <= 0.05 * 16_000
    assert likeness(decoded, speech) > 0.97


@needs_ffmpeg
def test_file_video(tmp_path: Path) -> None:
    """The sound of a video is decoded."""
    video = ("-f", "lavfi", "-i", "color=c=black:s=32x32:r=5:d=2", "-shortest", "-c:a", "aac")
    decoded = read_audio(convert(tmp_path / "talk.mp4", *video))
    assert likeness(decoded, read_audio(SPEECH)) > 0.97


def test_file_16_khz() -> None:
    """16 kHz mono arrives bit for bit, whatever the chunk's size; starts count the samples."""
    whole = read_audio(SPEECH)
    assert len(whole) == round(2.99 * 16_000)
    for chunk_ms in (1, 32, 5_000):
        chunks = take(SPEECH, chunk_ms=chunk_ms)
        assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), whole)
        sizes = [len(chunk.samples) for chunk in chunks]
        assert set(sizes[:-1]) <= {16 * chunk_ms}
        assert [chunk.start for chunk in chunks] == [0, *np.cumsum(sizes)[:-1].tolist()]


def stereo(path: Path, *, left: Samples, right: Samples) -> Path:
    with wave.open(str(path), "wb") as recording:
        recording.setparams((2, 2, 16_000, len(left), "NONE", ""))
        recording.writeframes(np.stack([left, right], axis=1).tobytes())
    return path


def test_file_channel(tmp_path: Path) -> None:
    """Two sources of one recording take a channel each, one speaker in each, bit for bit."""
    left = read_audio(SPEECH)
    right = left[::-1].copy()
    path = stereo(tmp_path / "two.wav", left=left, right=right)

    async def play(channel: int) -> Samples:
        async with FileSource(
            path, speed=None, channel=channel, chunk_ms=32, on_status=Statuses()
        ) as source:
            return np.concatenate([chunk.samples async for chunk in source.chunks()])

    async def run() -> tuple[Samples, Samples]:
        return await asyncio.gather(play(0), play(1))

    decoded = asyncio.run(run())
    assert np.array_equal(decoded[0], left)
    assert np.array_equal(decoded[1], right)


def test_file_unknown_channel(tmp_path: Path) -> None:
    """A channel that the recording doesn't have is one line, at the opening."""
    silence = np.zeros(1_600, np.int16)
    path = stereo(tmp_path / "two.wav", left=silence, right=silence)

    async def run() -> None:
        async with FileSource(path, speed=None, channel=2, chunk_ms=32, on_status=Statuses()):
            pass

    with pytest.raises(AudioError) as error:
        asyncio.run(run())
    assert str(error.value) == f"{path}: no channel 2; it has channels 0 to 1"


@pytest.mark.parametrize("speed", [1.0, 2.0])
def test_file_speed(speed: float) -> None:
    """A chunk comes when its last sample would have been captured, without drift."""

    async def run() -> list[tuple[Chunk, float]]:
        source = FileSource(SPEECH, speed=speed, chunk_ms=32, on_status=Statuses())
        async with source:
            return [(chunk, time.monotonic()) async for chunk in source.chunks()]

    received = asyncio.run(run())
    started = received[0][0].captured_at - 512 / 16_000 / speed
    for chunk, at in received:
        end_s = (chunk.start + len(chunk.samples)) / 16_000 / speed
        assert chunk.captured_at == pytest.approx(started + end_s, abs=1e-6)
        assert at >= chunk.captured_at - 0.002
    late_s = [at - chunk.captured_at for chunk, at in received]
    assert np.median(late_s) < 0.05


def test_file_slow_consumer() -> None:
    """A consumer that comes late gets the sound with the time at which it was due."""

    async def run() -> tuple[Chunk, Chunk]:
        async with FileSource(SPEECH, speed=1, chunk_ms=32, on_status=Statuses()) as source:
            chunks = source.chunks()
            first = await anext(chunks)
            await asyncio.sleep(0.5)
            return first, await anext(chunks)

    first, second = asyncio.run(run())
    assert second.captured_at - first.captured_at == pytest.approx(0.032, abs=1e-6)


def test_file_left_early() -> None:
    """A source may be closed before its end, and no thread stays behind."""

    async def run() -> None:
        async with FileSource(SPEECH, speed=None, chunk_ms=32, on_status=Statuses()) as source:
            async for _ in source.chunks():
                break

    before = set(threading.enumerate())
    asyncio.run(run())
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=10)
    assert [thread.name for thread in left if thread.is_alive()] == []


@pytest.fixture
def bad_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "bad.wav"
    match request.param:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "words":
            path.write_text("These are words, not sound. " * 500)
        case "random":
            path.write_bytes(np.random.default_rng(0).bytes(50_000))
        case "header":
            convert(path, "-t", "0.001")
            path.write_bytes(path.read_bytes()[:78])
        case "no sound":
            path = tmp_path / "silent.mp4"
            source = ["-f", "lavfi", "-i", "color=c=black:s=32x32:r=5:d=1"]
            subprocess.run(["ffmpeg", "-loglevel", "error", *source, str(path)], check=True)
    return path


@needs_ffmpeg
@pytest.mark.parametrize(
    ("bad_file", "line"),
    [
        ("missing", "can't be read (No such file or directory); check the path"),
        ("folder", "is a folder; give a sound file"),
        ("empty", "is empty; give a recording with sound"),
        ("words", "not a sound file, or damaged; give wav, flac, mp3, ogg, m4a or mp4"),
        ("random", "not a sound file, or damaged; give wav, flac, mp3, ogg, m4a or mp4"),
        ("header", "it holds no sound; give a recording with sound"),
        ("no sound", "no audio in it; give a recording with sound"),
    ],
    indirect=["bad_file"],
)
def test_file_bad(bad_file: Path, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that gives no sound is one line, at the opening; FFmpeg itself stays quiet."""
    with pytest.raises(AudioError) as error:
        take(bad_file)
    assert str(error.value) == f"{bad_file}: {line}"
    with pytest.raises(AudioError):
        read_audio(bad_file)
    assert capfd.readouterr() == ("", "")


@needs_ffmpeg
@pytest.mark.parametrize("name", ["cut.wav", "cut.flac", "cut.mp3", "cut.mkv"])
def test_file_truncated(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is left of a cut recording is delivered, and its status says where it ends."""
    path = convert(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 100])
    statuses = Statuses()
    chunks = take(path, statuses=statuses)
    decoded = np.concatenate([chunk.samples for chunk in chunks])
    assert 0.9 < len(decoded) / 16_000 < 2.2
    assert likeness(decoded, read_audio(SPEECH)) > 0.97
    assert capfd.readouterr() == ("", "")
    [(state, line)] = statuses
    assert state == "degraded"
    assert line.startswith(f"{path}: damaged or cut short at 1.")


@needs_ffmpeg
def test_file_damaged_in_the_middle(tmp_path: Path) -> None:
    """Damage in the middle costs no more than its surroundings."""
    path = convert(tmp_path / "scratched.mp3", "-b:a", "64k")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(content)
    statuses = Statuses()
    decoded = read_audio(path, on_status=statuses)
    assert len(decoded) > 2.5 * 16_000
    assert [state for state, _ in statuses] == ["degraded"]


def test_file_event_loop_stays_free() -> None:
    """While a recording is decoded as fast as it goes, other tasks still get their turn."""

    async def run() -> float:
        late_s = 0.0

        async def tick() -> None:
            nonlocal late_s
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.001)
                late_s = max(late_s, time.monotonic() - before - 0.001)

        ticking = asyncio.create_task(tick())
        path = RECORDINGS / "jfk.flac"
        async with FileSource(path, speed=None, chunk_ms=32, on_status=Statuses()) as source:
            async for _ in source.chunks():
                await asyncio.sleep(0)
        ticking.cancel()
        return late_s

    assert asyncio.run(run()) < 0.2


FOUR_HOURS = """
import asyncio, resource, sys
from stream_hbaf.audio.file import FileSource
async def run():
    samples, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with FileSource(sys.argv[1], speed=None, chunk_ms=1000, on_status=print) as source:
        async for chunk in source.chunks():
            samples += len(chunk.samples)
    print(samples, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
asyncio.run(run())
"""


def test_file_four_hours(tmp_path: Path) -> None:
    """Four hours, 460 MB of samples, pass through less than 40 MB of memory."""
    path, frames = tmp_path / "long.wav", 14_400 * 8_000
    with wave.open(str(path), "wb") as recording:
        recording.setparams((1, 1, 8_000, frames, "NONE", ""))
        recording.writeframes(b"\x80")
    with path.open("r+b") as content:  # sparse: takes no space on the disk
        content.truncate(44 + frames)
        for at, size in ((4, 36 + frames), (40, frames)):
            content.seek(at)
            content.write(size.to_bytes(4, "little"))
    command = [sys.executable, "-c", FOUR_HOURS, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    samples, grown_kib = map(int, printed.split())
    assert samples == 14_400 * 16_000
    assert grown_kib < 40 * 1024
