"""Prosody features: measured from audio; absolute, relative to dialogue and speaker, causal."""

import sys

import numpy as np
import pytest
from conftest import RECORDINGS
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.errors import ModelError
from stream_hbaf.features.prosody import (
    ABSOLUTE,
    PROSODY,
    PROSODY_WIDTH,
    Prosody,
    ProsodyPast,
    describe_next,
    describe_prosody,
)
from stream_hbaf.features.representations import open_representation

RATE = PROSODY.index("articulation_rate")
INTENSITY = PROSODY.index("avg_intensity")
PITCH = PROSODY.index("avg_pitch")
DIALOGUE, SPEAKER = len(ABSOLUTE), len(ABSOLUTE) + len(PROSODY)


def measured(count: int, *, seed: int = 0) -> NDArray[np.float64]:
    draw = np.random.default_rng(seed)
    return draw.uniform(0.5, 200.0, (count, len(PROSODY)))


def test_prosody_has_absolute_and_two_relative_parts() -> None:
    """7 values as measured, 8 against the dialogue's past, 8 against the speaker's."""
    described = describe_prosody(measured(5), ["a", "b", "a", "b", "a"])
    assert described.shape == (5, PROSODY_WIDTH) == (5, 23)


def test_prosody_is_relative_to_the_mean_of_the_past() -> None:
    """Written again by hand: earlier utterances of the dialogue, and of the same speaker."""
    values = np.ones((4, len(PROSODY)))
    values[:, RATE] = [2.0, 4.0, 9.0, 5.0]
    described = describe_prosody(values, ["a", "b", "a", "a"])
    assert described[:, DIALOGUE + RATE] == pytest.approx([0.0, 2.0, 9 - 3, 5 - 5])
    assert described[:, SPEAKER + RATE] == pytest.approx([0.0, 0.0, 7.0, 5 - 5.5])


def test_prosody_takes_pitch_as_a_ratio() -> None:
    """An octave is the same difference at any pitch."""
    values = np.ones((2, len(PROSODY)))
    values[:, PITCH] = [99.0, 199.0]
    described = describe_prosody(values, ["a", "a"])
    assert described[1, DIALOGUE + PITCH] == pytest.approx(np.log(2.0), abs=1e-6)


def test_prosody_never_depends_on_a_later_utterance() -> None:
    """Changing utterance t + 1 changes nothing at or before t."""
    speakers = list("abababab")
    values, changed = measured(8), measured(8)
    changed[5:] += 50.0
    before, after = describe_prosody(values, speakers), describe_prosody(changed, speakers)
    assert np.array_equal(before[:5], after[:5])
    assert not np.array_equal(before[5:], after[5:])


def test_prosody_does_not_depend_on_the_recordings_gain() -> None:
    """A constant gain of the whole dialogue changes nothing."""
    values = measured(6)
    louder = values.copy()
    louder[:, INTENSITY] += 12.0
    speakers = list("ababab")
    assert describe_prosody(louder, speakers) == pytest.approx(
        describe_prosody(values, speakers), abs=1e-4
    )


def test_missing_prosody_changes_nothing_else() -> None:
    """A missing value is NaN in its own columns and left out of later means."""
    values = np.ones((3, len(PROSODY)))
    values[:, RATE] = [2.0, np.nan, 6.0]
    described = describe_prosody(values, ["a", "a", "a"])
    assert np.isnan(described[1, DIALOGUE + RATE])
    assert described[2, DIALOGUE + RATE] == pytest.approx(4.0)
    assert np.isfinite(np.delete(described, [RATE - 1, DIALOGUE + RATE, SPEAKER + RATE], 1)).all()


def test_prosody_of_no_utterances_is_empty() -> None:
    """An empty dialogue gives no rows."""
    assert describe_prosody(np.zeros((0, len(PROSODY))), []).shape == (0, PROSODY_WIDTH)


def test_described_one_by_one_is_described_at_once() -> None:
    """Live, each utterance is described when it ends; the past stays as it was."""
    values, speakers = measured(6), list("abaacb")
    past = first = ProsodyPast()
    rows = []
    for row, speaker in zip(values, speakers, strict=True):
        described, past = describe_next(row, speaker=speaker, past=past)
        rows.append(described)
    assert np.array_equal(np.stack(rows), describe_prosody(values, speakers))
    assert not first.speakers
    assert first.dialogue[1].tolist() == [0.0] * len(PROSODY)


def syllables(*, rate_hz: float, seconds: float, pitch_hz: float = 150.0) -> NDArray[np.int16]:
    """A voice of ten harmonics whose level swings by 20 dB, so many times a second."""
    time_s = np.arange(int(seconds * 16_000)) / 16_000
    voice = sum(np.sin(2 * np.pi * pitch_hz * n * time_s) / n for n in range(1, 11))
    level = 10 ** (-0.5 - 0.5 * np.cos(2 * np.pi * rate_hz * time_s))
    return (voice * level * 8000).astype(np.int16)


def measure(samples: NDArray[np.int16]) -> dict[str, float]:
    found = Prosody().extract(samples)
    assert found is not None
    return dict(zip(PROSODY, found.tolist(), strict=True))


def test_a_voice_is_measured_as_it_was_made() -> None:
    """Duration, pitch and its spread, syllables a second, harmonicity; 6 dB are 6 dB."""
    voice = syllables(rate_hz=4.0, seconds=3.0)
    found = measure(voice)
    assert found["duration"] == pytest.approx(3.0)
    assert found["avg_pitch"] == pytest.approx(150.0, abs=1.0)
    assert found["pitch_std"] < 2.0
    assert found["articulation_rate"] == pytest.approx(4.0, abs=0.4)
    assert found["mean_hnr"] > 15.0
    quieter = measure((voice // 2).astype(np.int16))
    assert found["avg_intensity"] - quieter["avg_intensity"] == pytest.approx(6.02, abs=0.05)
    assert quieter["intensity_variation"] == pytest.approx(found["intensity_variation"], abs=0.1)
    assert measure(syllables(rate_hz=2.0, seconds=3.0))["articulation_rate"] == pytest.approx(
        2.0, abs=0.4
    )


def test_pauses_are_no_articulation() -> None:
    """The same speech with a second of silence after it has the same rate."""
    voice = syllables(rate_hz=4.0, seconds=2.0)
    rate = measure(voice)["articulation_rate"]
    paused = measure(np.concatenate([voice, np.zeros(16_000, np.int16)]))
    assert paused["articulation_rate"] == pytest.approx(rate, rel=0.1)
    assert paused["duration"] == pytest.approx(3.0)


def test_real_speech_is_within_what_the_tables_hold() -> None:
    """Each value of LibriVox's reader lies between the 1st and the 99th percentile of IEMOCAP's."""
    low = (1.1, 40.2, 3.7, 93.0, 6.3, 24.5, 1.2, 0.4)
    high = (15.1, 79.0, 14.9, 374.0, 158.0, 525.0, 6.3, 15.1)
    for path in sorted(RECORDINGS.glob("sense_and_sensibility_*.flac")):
        found = measure(read_audio(path)).values()
        assert all(a <= v <= b for a, v, b in zip(low, found, high, strict=True)), path.name


def test_what_cannot_be_measured_is_missing() -> None:
    """Noise has neither pitch nor syllables; silence and clicks have nothing at all."""
    noise = (np.random.default_rng(0).normal(size=16_000) * 500).astype(np.int16)
    found = measure(noise)
    assert np.isnan(found["avg_pitch"])
    assert np.isnan(found["articulation_rate"])
    assert found["pitch_range"] == 0.0
    for samples in (np.zeros(16_000, np.int16), noise[:1599], noise[:0]):
        assert Prosody().extract(samples) is None


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "parselmouth", None)
    with pytest.raises(ModelError, match=r"^prosody: praat-parselmouth is missing; pip install"):
        open_representation("prosody")
