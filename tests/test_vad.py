"""Speech scores: the same for any split, those of the published network, and of use."""

from pathlib import Path

import numpy as np
import pytest
from faster_whisper.vad import get_vad_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.errors import ModelError
from stream_hbaf.speech import vad
from stream_hbaf.speech.vad import SileroDetector, SpeechDetector, WebRtcDetector, open_detector

RECORDINGS = Path(__file__).parent / "recordings"
ENGINES: tuple[vad.Engine, ...] = ("silero", "webrtc")


@pytest.fixture(scope="module")
def meeting() -> NDArray[np.int16]:
    return read_audio(RECORDINGS / "meeting.flac")


@pytest.fixture(scope="module")
def detectors() -> dict[str, SpeechDetector]:
    return {engine: open_detector(engine) for engine in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, deadline=None)
@given(splits=st.lists(st.integers(0, 24_000), max_size=40))
def test_scores_any_split(
    detectors: dict[str, SpeechDetector],
    meeting: NDArray[np.int16],
    engine: str,
    splits: list[int],
) -> None:
    """Chunks of any size, empty ones included, give the same scores bit for bit."""
    sound = meeting[7 * 16_000 : 7 * 16_000 + 24_000]
    detector = detectors[engine]
    detector.reset()
    whole = detector.feed(sound)
    detector.reset()
    parts = [detector.feed(part) for part in np.split(sound, sorted(splits))]
    assert len(whole) == 24_000 // detector.frame_samples
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_silero_streamed_equals_batch(meeting: NDArray[np.int16]) -> None:
    """Frame by frame gives the scores of faster-whisper's own pass over the whole recording."""
    sound = meeting[: len(meeting) // 512 * 512]
    # Its batch function overwrites the end of the last frame, so one frame more is given.
    batch = get_vad_model()(np.pad(sound.astype(np.float32) / 32768, (0, 512)))[:-1]
    streamed = SileroDetector().feed(sound)
    assert batch.max() > 0.9
    assert batch.min() < 0.1
    np.testing.assert_allclose(streamed, batch, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_future_sound(
    detectors: dict[str, SpeechDetector], meeting: NDArray[np.int16], engine: str
) -> None:
    """A score depends on no sound after its frame."""
    detector = detectors[engine]
    cut = 500 * detector.frame_samples
    other = meeting.copy()
    other[cut:] = 0
    detector.reset()
    scores = detector.feed(meeting)
    detector.reset()
    assert detector.feed(other)[:500].tobytes() == scores[:500].tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_reset_after_speech(
    detectors: dict[str, SpeechDetector], meeting: NDArray[np.int16], engine: str
) -> None:
    """After a reset the scores are those of a new detector."""
    detector = detectors[engine]
    detector.feed(meeting[:100_123])
    detector.reset()
    fresh = open_detector("silero" if engine == "silero" else "webrtc")
    assert detector.feed(meeting).tobytes() == fresh.feed(meeting).tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_read_speech(detectors: dict[str, SpeechDetector], engine: str) -> None:
    """Most of a read sentence is speech, and none of digital silence is."""
    detector = detectors[engine]
    detector.reset()
    sentence = detector.feed(
        read_audio(RECORDINGS / "sense_and_sensibility_01_austen_64kb-0870.flac")
    )
    detector.reset()
    silence = detector.feed(np.zeros(32_000, np.int16))
    assert (sentence >= 0.5).mean() > 0.7
    assert (silence >= 0.5).sum() == 0


def test_silero_white_noise() -> None:
    """Loud white noise, which WebRTC's detector calls speech, is none to the default engine."""
    noise = np.random.default_rng(0).normal(0, 3277, 48_000).astype(np.int16)
    assert (open_detector("silero").feed(noise) >= 0.5).sum() == 0
    assert (open_detector("webrtc").feed(noise) >= 0.5).mean() > 0.9


def test_silero_attenuates_clipping_sound() -> None:
    """Sound at full scale is scored as the same sound at a quarter, which Silero knows better."""
    speech = read_audio(RECORDINGS / "jfk.flac")[6_000:40_000].astype(np.int32)
    loud = (50 * speech).clip(-32768, 32767).astype(np.int16)
    frames = np.abs(loud[: len(loud) // 512 * 512].astype(np.int32)).reshape(-1, 512).max(1)
    assert frames[0] == 32768  # so that both begin alike
    detector = SileroDetector()
    scores = detector.feed(loud)
    detector.reset()
    np.testing.assert_allclose(scores, detector.feed(loud // 4), atol=0.02)


@pytest.mark.parametrize(("frame_ms", "share"), [(10, 1 / 8), (20, 1 / 4), (30, 1 / 2)])
def test_webrtc_smoothing(meeting: NDArray[np.int16], frame_ms: int, share: float) -> None:
    """A score is the share of the last frames that were called speech."""
    sharp = WebRtcDetector(frame_ms=frame_ms, smoothing_ms=1).feed(meeting)
    smooth = WebRtcDetector(frame_ms=frame_ms, smoothing_ms=80).feed(meeting)
    window = round(1 / share)
    padded = np.concatenate((np.zeros(window - 1, np.float32), sharp))
    expected = np.lib.stride_tricks.sliding_window_view(padded, window).mean(1)
    assert set(np.unique(sharp).tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(smooth, expected, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_feed_floats(detectors: dict[str, SpeechDetector], engine: str) -> None:
    """Sound that is not int16 mono is refused: as floats it would score as near silence."""
    with pytest.raises(TypeError, match="int16"):
        detectors[engine].feed(np.zeros(512, np.float32))
    with pytest.raises(TypeError, match="int16"):
        detectors[engine].feed(np.zeros((512, 2), np.int16))


def test_silero_missing(tmp_path: Path) -> None:
    """Without the network's file one line says which file, and what else will do."""
    with pytest.raises(ModelError, match=r"gone\.onnx is missing; .*vad\.engine=webrtc") as error:
        SileroDetector(tmp_path / "gone.onnx")
    assert "\n" not in str(error.value)


def test_silero_damaged(tmp_path: Path) -> None:
    """A file that is no network, or a cut one, is a ModelError of one line."""
    whole = vad.find_silero().read_bytes()
    for name, content in {"text": b"not a network", "cut": whole[: len(whole) // 2]}.items():
        network = tmp_path / f"{name}.onnx"
        network.write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name}\.onnx can't be loaded") as error:
            SileroDetector(network)
        assert "\n" not in str(error.value)


def test_silero_other_inputs(tmp_path: Path) -> None:
    """Another release's network, which would have to be called otherwise, is refused."""
    network = tmp_path / "other.onnx"
    network.write_bytes(vad.find_silero().read_bytes().replace(b"input", b"sound"))
    with pytest.raises(ModelError, match=r"other\.onnx takes sound, h, c, not input, h, c"):
        SileroDetector(network)


def test_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without faster-whisper the error says what to install."""
    monkeypatch.setattr(vad, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install faster-whisper"):
        open_detector("silero")
