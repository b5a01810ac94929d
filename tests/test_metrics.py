"""Promises of evaluation: the figures are the ones that papers mean."""

from typing import Any

import numpy as np
import pytest

from stream_hbaf.evaluation.metrics import (
    Bin,
    ClassScore,
    Interval,
    Spread,
    accuracy,
    by_class,
    calibration_error,
    confusion,
    f1_by,
    macro_f1,
    reliability,
    score,
    spread,
    unweighted_recall,
    weighted_f1,
    word_error_rate,
)


def close(value: float) -> Any:
    """pytest.approx, which equals a float without being one."""
    return pytest.approx(value)


GOLD = np.array([0, 0, 0, 0, 1, 1, 2])
SAID = np.array([0, 0, 1, 0, 1, 0, 1])


def test_confusion_counts_gold_in_rows() -> None:
    """Rows are what was meant, columns what was said."""
    assert confusion(GOLD, SAID, classes=3).tolist() == [[3, 1, 0], [1, 1, 0], [0, 1, 0]]


def test_f1_by_hand() -> None:
    """F1 is 3/4, 2/5 and 0 here; weighted by 4, 2 and 1 utterances, or evenly."""
    assert weighted_f1(GOLD, SAID) == pytest.approx((4 * 0.75 + 2 * 0.4) / 7)
    assert macro_f1(GOLD, SAID) == pytest.approx((0.75 + 0.4) / 3)


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    """A class that was neither there nor said doesn't pull the mean down."""
    assert macro_f1(GOLD, SAID) == macro_f1(GOLD, SAID)


def test_recall_and_accuracy_by_hand() -> None:
    """UAR counts each class once, accuracy each utterance once."""
    assert unweighted_recall(GOLD, SAID) == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    assert accuracy(GOLD, SAID) == pytest.approx(4 / 7)


def test_calibration_error_of_honest_and_boastful_predictions() -> None:
    """Right three times in four: 0 when 0.75 sure, 0.25 when wholly sure."""
    gold = np.array([0, 0, 0, 1])
    honest = np.tile([0.75, 0.25], (4, 1))
    boastful = np.tile([1.0, 0.0], (4, 1))
    assert calibration_error(gold, honest) == pytest.approx(0.0)
    assert calibration_error(gold, boastful) == pytest.approx(0.25)


def test_calibration_error_averages_over_bins() -> None:
    """Each bin weighs as many predictions as it holds."""
    gold = np.array([0, 1, 0, 0])
    sure = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    assert calibration_error(gold, sure) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)


def test_score_holds_every_figure() -> None:
    """One call gives the figures that the functions give one by one."""
    probabilities = np.eye(3)[SAID] * 0.7 + 0.1
    found = score(GOLD, probabilities)
    assert found.count == 7
    assert found.weighted_f1 == weighted_f1(GOLD, SAID)
    assert found.uar == unweighted_recall(GOLD, SAID)
    assert found.class_f1 == pytest.approx((0.75, 0.4, 0.0))
    assert found.confusion == ((3, 1, 0), (1, 1, 0), (0, 1, 0))


def test_classes_by_hand() -> None:
    """Precision by what was said, recall by what was there, nothing is divided by nothing."""
    assert by_class(GOLD, SAID, classes=4) == (
        ClassScore(precision=3 / 4, recall=3 / 4, f1=0.75, support=4),
        ClassScore(precision=1 / 3, recall=1 / 2, f1=0.4, support=2),
        ClassScore(precision=0.0, recall=0.0, f1=0.0, support=1),
        ClassScore(precision=0.0, recall=0.0, f1=0.0, support=0),
    )


def test_reliability_by_hand() -> None:
    """0.6 lies in (8/15, 9/15] and 0.9 in (13/15, 14/15]; bins without predictions aren't there."""
    gold = np.array([0, 1, 0, 0])
    sure = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    assert reliability(gold, sure) == (
        Bin(8 / 15, 9 / 15, close(0.6), 0.5, 2),
        Bin(13 / 15, 14 / 15, close(0.9), 1.0, 2),
    )


def test_reliability_counts_every_prediction_once() -> None:
    """Certainty itself, and chance, have their bin too."""
    sure = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    bins = reliability(np.array([0, 0, 0]), sure)
    assert [(b.confidence, b.accuracy, b.count) for b in bins] == [(0.5, 1.0, 1), (1.0, 0.5, 2)]
    assert calibration_error(np.array([0, 0, 0]), sure) == pytest.approx((0.5 + 2 * 0.5) / 3)


def test_calibration_error_of_nothing_is_nothing() -> None:
    """No predictions, no error."""
    assert calibration_error(np.zeros(0, np.int64), np.zeros((0, 3))) == 0.0


def test_f1_by_turn_by_hand() -> None:
    """Each stretch's F1 is that of its utterances alone; a stretch without any is left out."""
    turns = np.array([1, 2, 3, 4, 1, 2, 3])
    found = f1_by(GOLD, SAID, keys=turns, starts=(1, 2, 3, 10))
    assert found == (
        Interval(1, 1, 2, 1.0),
        Interval(2, 2, 2, close((1 * 2 / 3 + 1 * 0) / 2)),  # meant 0 1, said 0 0
        Interval(3, 9, 3, close((2 * 2 / 3 + 1 * 0) / 3)),  # meant 0 0 2, said 1 0 1
    )


def test_f1_by_turn_has_an_open_end() -> None:
    """The last stretch holds all that comes after its start."""
    found = f1_by(GOLD, SAID, keys=np.arange(1, 8), starts=(1, 3))
    assert [(s.first, s.last, s.count) for s in found] == [(1, 2, 2), (3, None, 5)]


def test_spread_over_seeds() -> None:
    """The deviation is the sample's; one seed has none."""
    assert spread([0.60, 0.62, 0.64]) == Spread(close(0.62), close(0.02))
    assert spread([0.6]) == Spread(0.6, 0.0)


def test_word_error_rate_counts_all_texts_words_together() -> None:
    """One of two words wrong and none of three: a fifth; an inserted word counts as well."""
    assert word_error_rate(["Oh no!", "So it is."], ["oh know", "so it is"]) == 0.2
    assert word_error_rate(["Yes"], ["yes it is"]) == 2.0
    assert word_error_rate(["Yes, it is"], [""]) == 1.0
    assert word_error_rate([""], [""]) == 0.0
    assert word_error_rate(["..."], ["Well, yes"]) == 2.0  # of no words: the inserted ones
