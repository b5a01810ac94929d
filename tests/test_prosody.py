"""Prosody features: absolute, relative to the dialogue and to the speaker, causal."""

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.features.prosody import ABSOLUTE, PROSODY, PROSODY_WIDTH, describe_prosody

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
