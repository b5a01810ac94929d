"""Sound is placed at the recording's own times, pipes are read, and damage never escapes."""

import asyncio
import contextlib
import io
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from damages import CODECS, damage_sound, one_second
from numpy.typing import NDArray

from stream_hbaf.audio.container import is_pipe
from stream_hbaf.audio.decode import Decoder
from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.audio.source import CANCELS, Chunk, Resampler
from stream_hbaf.errors import AudioError

RECORDINGS = Path(__file__).parent / "recordings"
SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"  # 2.99 s, 16 kHz, mono
Samples = NDArray[np.int16]
RATE_HZ = 16_000


def tone(seconds: float) -> Samples:
    at = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    wave: NDArray[np.float64] = 8_000 * np.sin(2 * np.pi * 440 * at)
    return wave.astype(np.int16)


def write(
    path: Path,
    codec: str,
    *,
    rate_hz: int = RATE_HZ,
    channels: int = 1,
    kept: Callable[[float], bool] = lambda at: True,
    late_s: float = 0.0,
    with_video: bool = False,
) -> Path:
    """Four seconds of a tone, without the packets that aren't ``kept``, and ``late_s`` late."""
    with av.open(str(path), "w") as container:
        layout = "mono" if channels == 1 else "stereo"
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        assert isinstance(stream, av.AudioStream)
        picture = None
        if with_video:
            picture = container.add_stream("mpeg4", rate=5)
            picture.width = picture.height = 32
        at = np.repeat(tone(4.0), rate_hz // RATE_HZ * channels)
        frame = av.AudioFrame.from_ndarray(at[None], format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        packets = [*stream.encode(frame), *stream.encode(None)]
        if picture is not None:
            for number in range(30):
                black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
                black.pts, black.time_base = number, Fraction(1, 5)
                container.mux(picture.encode(black))
        for packet in packets:
            assert packet.pts is not None
            if kept(float(packet.pts * packet.time_base)):
                packet.pts += round(late_s / packet.time_base)
                packet.dts = packet.pts
                container.mux(packet)
    return path


def stretches(path: Path) -> tuple[list[tuple[float, float]], str]:
    """The contiguous parts of a recording in seconds, and the decoder's complaint."""
    decoder = Decoder(path, batch_s=0.1)
    found: list[list[int]] = []
    for piece in decoder:
        if found and found[-1][1] == piece.start:
            found[-1][1] = piece.end
        else:
            found.append([piece.start, piece.end])
    return [(start / RATE_HZ, end / RATE_HZ) for start, end in found], decoder.complaint


CONTAINERS = [
    ("x.mkv", "libopus", 48_000),
    ("x.webm", "libopus", 48_000),
    ("x.mp4", "aac", 48_000),
    ("x.ts", "aac", 48_000),
    ("x.ogg", "libopus", 48_000),
    ("x.mka", "flac", 16_000),
]


@pytest.mark.parametrize(("name", "codec", "rate_hz"), CONTAINERS)
def test_decode_gap(name: str, codec: str, rate_hz: int, tmp_path: Path) -> None:
    """What the timestamps leave out is a gap of that length, and no damage."""
    path = write(tmp_path / name, codec, rate_hz=rate_hz, kept=lambda at: not 1 <= at < 3)
    (before, after), complaint = stretches(path)
    assert complaint == ""
    assert before == pytest.approx((0.0, 1.0), abs=0.11)
    assert after == pytest.approx((3.0, 4.0), abs=0.11)
    assert len(read_audio(path)) == pytest.approx(4 * RATE_HZ, abs=1_800)
    assert not read_audio(path)[round(1.2 * RATE_HZ) : round(2.8 * RATE_HZ)].any()


@pytest.mark.parametrize(("name", "codec", "rate_hz"), CONTAINERS)
def test_decode_no_gap(name: str, codec: str, rate_hz: int, tmp_path: Path) -> None:
    """Rounded timestamps and codecs' delays are no gaps."""
    [(start, end)], complaint = stretches(write(tmp_path / name, codec, rate_hz=rate_hz))
    assert (start, complaint) == (0.0, "")
    assert end == pytest.approx(4.0, abs=0.06)


def test_decode_short_gap(tmp_path: Path) -> None:
    """Lost packets don't end an utterance: up to half a second is silence within the sound."""
    path = write(tmp_path / "x.mkv", "flac", kept=lambda at: not 1 <= at < 1.3)
    assert stretches(path) == ([(0.0, 4.0)], "")
    assert not read_audio(path)[round(1.2 * RATE_HZ) : round(1.25 * RATE_HZ)].any()


@pytest.mark.parametrize("name", ["x.mkv", "x.mp4"])
def test_decode_late_start(name: str, tmp_path: Path) -> None:
    """Sound that begins late in the recording keeps its time."""
    path = write(tmp_path / name, "aac", rate_hz=48_000, late_s=3.0)
    [(start, end)], complaint = stretches(path)
    assert (start, end) == pytest.approx((3.0, 7.0), abs=0.06)
    assert complaint == ""


@pytest.mark.parametrize("name", ["x.mkv", "x.mp4", "x.ts"])
def test_decode_late_start_beside_video(name: str, tmp_path: Path) -> None:
    """The recording begins with its first picture, and sound may end before the last one."""
    path = write(tmp_path / name, "aac", rate_hz=48_000, late_s=1.5, with_video=True)
    [(start, end)], complaint = stretches(path)
    assert (start, end) == pytest.approx((1.5, 5.5), abs=0.06)
    assert complaint == ""


def test_decode_broken_timestamps(tmp_path: Path) -> None:
    """Timestamps that jump by days, or back, leave nothing out."""
    path = write(tmp_path / "x.mkv", "flac")
    later = write(tmp_path / "later.mkv", "flac", late_s=400_000)
    assert stretches(path)[0] == stretches(later)[0] == [(0.0, 4.0)]


def test_file_gap_in_chunks(tmp_path: Path) -> None:
    """The chunk after a gap has ``after_gap`` and the recording's own number, for any size."""
    path = write(tmp_path / "x.mkv", "flac", kept=lambda at: not 1 <= at < 3)
    expected = read_audio(path)

    async def play(chunk_ms: int) -> list[Chunk]:
        source = FileSource(path, speed=None, chunk_ms=chunk_ms, on_status=lambda *_: None)
        async with source:
            return [chunk async for chunk in source.chunks()]

    for chunk_ms in (10, 64, 320):
        chunks = asyncio.run(play(chunk_ms))
        end, start = [chunk for chunk in chunks if chunk.after_gap]
        assert len(end.samples) == 0
        assert end.start == pytest.approx(RATE_HZ, abs=4_608)
        assert start.start == pytest.approx(3 * RATE_HZ, abs=4_608)
        for chunk in chunks:
            assert np.array_equal(
                expected[chunk.start : chunk.start + len(chunk.samples)], chunk.samples
            )


def test_file_gap_in_real_time(tmp_path: Path) -> None:
    """A gap lasts as long as it does in the recording; what is open ends when it begins."""
    path = write(tmp_path / "x.mkv", "flac", kept=lambda at: not 1 <= at < 3)

    async def play() -> list[Chunk]:
        source = FileSource(path, speed=20.0, chunk_ms=320, on_status=lambda *_: None)
        async with source:
            return [chunk async for chunk in source.chunks()]

    chunks = asyncio.run(play())
    [number, _] = [number for number, chunk in enumerate(chunks) if chunk.after_gap]
    before, end, start = chunks[number - 1 : number + 2]
    assert end.captured_at == before.captured_at
    assert (start.captured_at - end.captured_at) * 20 == pytest.approx(2.3, abs=0.5)


# ---- placeholder sizes


def wav(declared: int, samples: Samples, *, riff: bytes = b"RIFF") -> bytes:
    size = struct.pack("<I", declared)
    format_ = struct.pack("<IHHIIHH", 16, 1, 1, RATE_HZ, 2 * RATE_HZ, 2, 16)
    return riff + size + b"WAVEfmt " + format_ + b"data" + size + samples.tobytes()


@pytest.mark.parametrize("declared", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000])
def test_decode_streamed_wav(declared: int, tmp_path: Path) -> None:
    """A program that streams can't know the size that it declares: no damage."""
    path, sound = tmp_path / "x.wav", tone(1.3)
    path.write_bytes(wav(declared, sound))
    assert stretches(path) == ([(0.0, 1.3)], "")
    assert np.array_equal(read_audio(path), sound)


def test_decode_streamed_wav_as_standard_input(tmp_path: Path) -> None:
    """Its placeholder is seen in a file that is standard input, too."""
    path = tmp_path / "x.wav"
    path.write_bytes(wav(0xFFFFFFFF, tone(1.3)))
    code = "from stream_hbaf.audio.file import read_audio; read_audio('-', on_status=print)"
    with path.open("rb") as content:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=content, capture_output=True, check=True
        )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_decode_truncated_wav(tmp_path: Path) -> None:
    """A size that was known, and isn't there, is damage."""
    path = tmp_path / "x.wav"
    path.write_bytes(wav(100_000, tone(1.3)))
    assert stretches(path) == (
        [(0.0, 1.3)],
        f"{path}: damaged or cut short at 1.3 s (damaged); going on with what can be decoded",
    )


# ---- pipes


def test_file_named_pipe(tmp_path: Path) -> None:
    """A named pipe is heard to its end, bit for bit."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert is_pipe(pipe)
    copying = threading.Thread(target=lambda: pipe.write_bytes(SPEECH.read_bytes()))
    copying.start()

    async def play() -> list[Chunk]:
        async with FileSource(pipe, speed=None, chunk_ms=64, on_status=lambda *_: None) as source:
            return [chunk async for chunk in source.chunks()]

    played = np.concatenate([chunk.samples for chunk in asyncio.run(play())])
    copying.join()
    assert np.array_equal(played, read_audio(SPEECH))


@pytest.mark.parametrize("where", ["-", "/dev/stdin"])
@pytest.mark.parametrize("piped", [True, False])
def test_file_standard_input(where: str, piped: bool) -> None:
    """Standard input is heard to its end, from a pipe and from a file."""
    code = f"""
import sys
from stream_hbaf.audio.file import read_audio
complaints = []
found = read_audio({where!r}, on_status=lambda *complaint: complaints.append(complaint))
print(len(found), found.astype(int).sum(), complaints)
"""
    sound = read_audio(SPEECH)
    command = [sys.executable, "-c", code]
    if piped:
        done = subprocess.run(command, capture_output=True, input=SPEECH.read_bytes(), check=True)
    else:
        with SPEECH.open("rb") as content:
            done = subprocess.run(command, capture_output=True, stdin=content, check=True)
    assert done.stdout.decode().split() == [str(len(sound)), str(sound.astype(int).sum()), "[]"]


def test_file_pipe_that_needs_seeking(tmp_path: Path) -> None:
    """A format that can't be read from a pipe is one line that says so."""
    pipe, recording = tmp_path / "pipe", write(tmp_path / "x.mov", "pcm_s16le")
    os.mkfifo(pipe)

    def copy() -> None:
        with contextlib.suppress(BrokenPipeError):
            pipe.write_bytes(recording.read_bytes())

    copying = threading.Thread(target=copy)
    copying.start()
    with pytest.raises(AudioError) as error:
        read_audio(pipe)
    copying.join()
    assert str(error.value) == (
        f"{pipe}: no sound that can be read from a pipe; send wav, flac, mp3 or ogg, "
        "or give the file by its path"
    )


# ---- channels that cancel


def test_resampler_cancels() -> None:
    """Only channels whose mean is nearly silent cancel each other, and only if there is sound."""

    def cancels(left: Samples, right: Samples, channel: int | None = None) -> bool:
        resampler = Resampler(RATE_HZ, 2, channel=channel)
        resampler.feed((np.stack([left, right], axis=1) / 32768).astype(np.float32))
        return resampler.cancels()

    sound, silence = tone(3.0), np.zeros(48_000, np.int16)
    assert cancels(sound, -sound)
    assert cancels(sound, (-0.9 * sound).astype(np.int16))
    assert not cancels(sound, -sound, channel=0)
    assert not cancels(sound, sound)
    assert not cancels(sound, silence)
    assert not cancels(silence, silence)
    assert not cancels(sound, np.roll(sound, 9))
    assert not cancels(sound[:16_000], -sound[:16_000])  # too little to tell, while more may come


@pytest.mark.parametrize("chunk_ms", [10, 320])
def test_file_channels_cancel(chunk_ms: int, tmp_path: Path) -> None:
    """A recording whose channels cancel is reported in one line."""
    sound = tone(1.0)
    content = io.BytesIO()
    with av.open(content, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE_HZ, layout="stereo")
        both = np.stack([sound, -sound], axis=1).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate = RATE_HZ
        container.mux([*stream.encode(frame), *stream.encode(None)])
    path = tmp_path / "x.wav"
    path.write_bytes(content.getvalue())
    statuses: list[tuple[str, str]] = []

    async def play() -> None:
        source = FileSource(
            path, speed=None, chunk_ms=chunk_ms, on_status=lambda *status: statuses.append(status)
        )
        async with source:
            async for _ in source.chunks():
                pass

    asyncio.run(play())
    assert statuses == [("degraded", f"{path}: {CANCELS}")]


# ---- damage


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="apt-get install ffmpeg")
@pytest.mark.parametrize("kind", CODECS)
def test_decode_damaged(kind: str, tmp_path: Path) -> None:
    """Of a damaged container there is sound, or an error of one line."""
    whole = one_second(SPEECH, tmp_path / f"whole.{kind}")
    path = tmp_path / f"damaged.{kind}"
    for seed in range(40):
        path.write_bytes(damage_sound(whole.read_bytes(), seed))
        line = f"{path}: "
        try:
            assert len(read_audio(path)) > 0
        except AudioError as error:
            line = str(error)
        assert line.startswith(f"{path}: ")
        assert "\n" not in line


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="apt-get install ffmpeg")
def test_decode_more_planes_than_pyav_reads(tmp_path: Path) -> None:
    """PyAV 18 crashes on more than eight planar channels; packed ones are read."""
    code = "import sys; from stream_hbaf.audio.file import read_audio; read_audio(sys.argv[1])"
    path = tmp_path / "x.mka"
    source = ["-f", "lavfi", "-i", "sine=duration=1", "-ac", "16"]
    for codec, error in (("aac", "nothing in it can be decoded"), ("pcm_s16le", "")):
        made = ["ffmpeg", "-loglevel", "error", "-y", *source, "-c:a", codec]
        subprocess.run([*made, str(path)], check=True)
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
        assert done.returncode == bool(error)
        assert error in done.stderr.decode()


def test_decode_channel_that_ends(tmp_path: Path) -> None:
    """A recording that goes on without the channel ends there, with a line, and not by an error."""
    path = tmp_path / "x.aac"
    both, one = write(tmp_path / "2.aac", "aac", channels=2), write(tmp_path / "1.aac", "aac")
    path.write_bytes(both.read_bytes() + one.read_bytes())
    decoder = Decoder(path, channel=1)
    assert max(piece.end for piece in decoder) == pytest.approx(4 * RATE_HZ, abs=2_000)
    assert decoder.complaint.startswith(f"{path}: damaged or cut short at 4.")
    assert "(no channel 1 from there on)" in decoder.complaint


def test_decode_rate_out_of_range(tmp_path: Path) -> None:
    """A damaged header's rate of 1 Hz doesn't become gigabytes of samples."""
    path = tmp_path / "x.wav"
    path.write_bytes(wav(0, tone(1.0)).replace(struct.pack("<I", RATE_HZ), struct.pack("<I", 1)))
    with pytest.raises(AudioError, match="nothing in it can be decoded"):
        read_audio(path)
