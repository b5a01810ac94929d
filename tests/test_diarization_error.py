"""The measures of speakers, against cases worked by hand."""

import pytest

from stream_hbaf.evaluation.diarization import (
    DiarizationError,
    Turn,
    count_right,
    diarization_error,
    map_speakers,
)

REFERENCE = [Turn(0, 10, "A"), Turn(10, 20, "B")]


def test_names_are_mapped_one_to_one() -> None:
    """Two found speakers cannot both be one person; nobody stands for "not sure"."""
    true = ["A", "A", "A", "A", "B", "B"]
    found = ["x", "x", "x", "y", "", "y"]
    assert map_speakers(true, found) == {"x": "A", "y": "B"}
    assert count_right(true, found).tolist() == [True, True, True, False, False, True]


def test_the_mapping_is_the_best_of_all() -> None:
    """Not greedy: "x" agrees most with A, but giving it to B explains more."""
    true = ["A"] * 5 + ["B"] * 4
    found = ["x", "x", "x", "y", "y"] + ["x"] * 4
    assert map_speakers(true, found) == {"x": "B", "y": "A"}
    assert count_right(true, found).sum() == 6


def test_nothing_found_is_wrong() -> None:
    assert count_right(["A", "B"], ["", ""]).tolist() == [False, False]


@pytest.mark.parametrize(
    ("found", "error"),
    [
        pytest.param([], DiarizationError(19.0, 19.0, 0.0, 0.0), id="nothing"),
        pytest.param(
            [Turn(0, 10, "x"), Turn(10, 20, "y")], DiarizationError(19.0, 0, 0, 0), id="right"
        ),
        # Mapped to A; from 10.25 to 19.75 B is confused.
        pytest.param([Turn(0, 20, "x")], DiarizationError(19.0, 0, 0, 9.5), id="one for two"),
        # The change is 2 s late, of which the collar forgives 0.25.
        pytest.param(
            [Turn(0, 12, "x"), Turn(12, 20, "y")], DiarizationError(19.0, 0, 0, 1.75), id="late"
        ),
        # Within the collar nothing counts; past the end 2 s less the collar is false alarm.
        pytest.param(
            [Turn(0.2, 10, "x"), Turn(10, 22, "y")], DiarizationError(19.0, 0, 1.75, 0), id="long"
        ),
        pytest.param(
            [Turn(0, 10, "x"), Turn(10, 20, "")], DiarizationError(19.0, 9.5, 0, 0), id="not sure"
        ),
    ],
)
def test_errors_of_two_turns(found: list[Turn], error: DiarizationError) -> None:
    """0.25 to 9.75 and 10.25 to 19.75 are scored."""
    assert diarization_error(REFERENCE, found) == error


def test_speech_at_once_counts_for_each_speaker() -> None:
    """From 4 to 6 both speak; one name found there misses the other: 1.5 s outside of collars."""
    reference = [Turn(0, 6, "A"), Turn(4, 10, "B")]
    found = [Turn(0, 5, "x"), Turn(5, 10, "y")]
    error = diarization_error(reference, found)
    assert error == DiarizationError(speech_s=10.0, missed_s=1.5, false_alarm_s=0, confused_s=0)
    assert error.rate == pytest.approx(0.15)


def test_recordings_add_up() -> None:
    one, other = DiarizationError(10, 1, 2, 3), DiarizationError(30, 0, 0, 2)
    assert (one + other).rate == pytest.approx(8 / 40)
