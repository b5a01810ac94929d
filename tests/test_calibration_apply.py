"""Calibration: probabilities, label sets, abstention, conflicts and Shapley values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.networks.calibration import (
    ALWAYS_ABSTAIN,
    PATTERNS,
    VALENCE,
    Calibration,
    coalitions,
    pattern_of,
    patterns_of,
    shapley,
    softmax,
)

CALIBRATION = Calibration(
    temperatures={"": 4.0, "audio": 2.0, "text": 1.0, "audio+text": 0.5},
    thresholds={"": 0.0, "audio": 0.2, "text": 0.9, "audio+text": 0.3},
    answers_above={"": ALWAYS_ABSTAIN, "audio": 0.6, "text": 0.4, "audio+text": 0.0},
    risk=0.3,
)


def likely(label: str, probability: float) -> NDArray[np.float64]:
    """Probabilities of the seven labels: one's, and the rest evenly."""
    rest = (1 - probability) / (len(LABELS) - 1)
    return np.array([probability if name == label else rest for name in LABELS])


def test_each_pattern_has_its_temperature() -> None:
    """Each row's logits are divided by the temperature of its pattern."""
    logits = np.array([[2.0, 0.0, -1.0]] * 4, np.float32)
    found = CALIBRATION.probabilities(logits, pattern=PATTERNS)
    for row, temperature in zip(found, (4.0, 2.0, 1.0, 0.5), strict=True):
        powers = np.exp(np.array([2.0, 0.0, -1.0]) / temperature)
        np.testing.assert_allclose(row, powers / powers.sum(), rtol=1e-12)
    alone = CALIBRATION.probabilities(logits[0], pattern="audio")
    np.testing.assert_allclose(alone, found[1], rtol=1e-12)


def test_softmax_of_large_logits_stays_finite() -> None:
    """Logits of a thousand don't overflow."""
    assert softmax(np.array([1000.0, 0.0])).tolist() == [1.0, 0.0]


def test_set_holds_the_likely_labels_and_never_none() -> None:
    """Labels from the threshold on; where none reaches it, the best."""
    probabilities = np.array([0.5, 0.2, 0.19, 0.11])
    found = {p: CALIBRATION.label_sets(probabilities, pattern=p).tolist() for p in PATTERNS}
    assert found == {
        "": [True] * 4,
        "audio": [True, True, False, False],
        "text": [True, False, False, False],
        "audio+text": [True, False, False, False],
    }


def test_an_unlikely_best_label_is_abstained() -> None:
    """Below the pattern's least probability it abstains; at 1 always."""
    rows = np.array([[0.5, 0.5], [0.6, 0.4], [1.0, 0.0]])
    abstained = {p: CALIBRATION.abstains(rows, pattern=p).tolist() for p in PATTERNS}
    assert abstained == {
        "": [True, True, True],
        "audio": [True, False, False],
        "text": [False, False, False],
        "audio+text": [False, False, False],
    }


@pytest.mark.parametrize(
    ("by_audio", "by_text", "conflict"),
    [
        (("joy", 0.6), ("anger", 0.6), True),
        (("sadness", 0.5), ("joy", 0.5), True),
        (("joy", 0.49), ("anger", 0.9), False),
        (("joy", 0.9), ("anger", 0.49), False),
        (("anger", 0.9), ("sadness", 0.9), False),
        (("joy", 0.9), ("neutral", 0.9), False),
        (("surprise", 0.9), ("anger", 0.9), False),
    ],
)
def test_audio_and_text_conflict_when_likely_and_opposite(
    by_audio: tuple[str, float], by_text: tuple[str, float], conflict: bool
) -> None:
    """Both labels must be likely, one of positive and the other of negative valence."""
    audio, text = likely(*by_audio), likely(*by_text)
    assert CALIBRATION.conflicts(LABELS, audio=audio, text=text) is conflict


def test_every_label_has_a_valence() -> None:
    """One is positive, four are negative, two are neither."""
    assert set(VALENCE) == set(LABELS)
    assert [sum(v == sign for v in VALENCE.values()) for sign in (1, -1, 0)] == [1, 4, 2]


def test_one_temperature_gives_no_guarantees() -> None:
    """Sets hold every label and nothing is abstained."""
    plain = Calibration.of_temperature(2.0)
    probabilities = plain.probabilities(np.array([9.0, 0.0, -9.0]), pattern="audio")
    np.testing.assert_allclose(probabilities, softmax(np.array([4.5, 0.0, -4.5])), rtol=1e-12)
    assert plain.label_sets(probabilities, pattern="audio").all()
    assert not plain.abstains(np.full(7, 1 / 7), pattern="")


def test_a_calibration_without_a_pattern_is_refused() -> None:
    """Every setting must have a value for each pattern."""
    settings = CALIBRATION.model_dump()
    del settings["thresholds"]["audio+text"]
    with pytest.raises(ValidationError, match=r"thresholds has nothing for 'audio\+text'"):
        Calibration.model_validate(settings)


def test_patterns_name_what_was_given() -> None:
    """One name for each combination of audio and text."""
    sound, words = np.array([False, True, False, True]), np.array([False, False, True, True])
    assert patterns_of(audio=sound, text=words) == ["", "audio", "text", "audio+text"]
    assert pattern_of(audio=True, text=False) == "audio"


def test_coalitions_begin_with_none_and_end_with_all() -> None:
    """Every subset once."""
    found = coalitions(["a", "b", "c"])
    assert (found[0], found[-1]) == (frozenset(), frozenset("abc"))
    assert len(set(found)) == len(found) == 8


def test_shapley_values_of_the_glove_game() -> None:
    """One left glove and two right ones, a pair is worth 1: 2/3, 1/6 and 1/6."""
    worth = {c: float("left" in c and len(c) > 1) for c in coalitions(["left", "right", "other"])}
    shares = shapley(worth)
    assert shares == pytest.approx({"left": 2 / 3, "right": 1 / 6, "other": 1 / 6})


@given(st.lists(st.floats(-5, 5), min_size=8, max_size=8), st.floats(-5, 5))
def test_shapley_values_are_efficient_and_fair(values: list[float], gift: float) -> None:
    """They sum to the total; a null player gets 0, one who adds a constant gets it."""
    every = coalitions(["a", "b", "c"])
    worth = dict(zip(every, values, strict=True))
    assert sum(shapley(worth).values()) == pytest.approx(worth[every[-1]] - worth[every[0]])
    bystander = {c: worth[c - {"c"}] for c in every}
    assert shapley(bystander)["c"] == 0.0
    giver = {c: worth[c - {"c"}] + gift * ("c" in c) for c in every}
    assert shapley(giver)["c"] == pytest.approx(gift, abs=1e-12)


def test_shapley_values_of_no_players_are_none() -> None:
    """Without players there is nothing to share."""
    assert shapley({frozenset(): 0.4}) == {}
