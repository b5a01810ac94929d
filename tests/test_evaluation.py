"""Promises of evaluation: the figures are the ones that papers mean."""

import numpy as np
import pytest

from stream_hbaf.evaluation import (
    accuracy,
    calibration_error,
    confusion,
    macro_f1,
    score,
    unweighted_recall,
    weighted_f1,
)

GOLD = np.array([0, 0, 0, 0, 1, 1, 2])
SAID = np.array([0, 0, 1, 0, 1, 0, 1])


def test_confusion_counts_gold_in_rows():
    """Rows are what was meant, columns what was said."""
    assert confusion(GOLD, SAID, classes=3).tolist() == [[3, 1, 0], [1, 1, 0], [0, 1, 0]]


def test_f1_by_hand():
    """F1 is 3/4, 2/5 and 0 here; weighted by 4, 2 and 1 utterances, or evenly."""
    assert weighted_f1(GOLD, SAID, classes=3) == pytest.approx((4 * 0.75 + 2 * 0.4) / 7)
    assert macro_f1(GOLD, SAID, classes=3) == pytest.approx((0.75 + 0.4) / 3)


def test_macro_f1_leaves_out_classes_that_never_occur():
    """A class that was neither there nor said doesn't pull the mean down."""
    assert macro_f1(GOLD, SAID, classes=7) == macro_f1(GOLD, SAID, classes=3)


def test_recall_and_accuracy_by_hand():
    """UAR counts each class once, accuracy each utterance once."""
    assert unweighted_recall(GOLD, SAID, classes=3) == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    assert accuracy(GOLD, SAID) == pytest.approx(4 / 7)


def test_calibration_error_of_honest_and_boastful_predictions():
    """Right three times in four: 0 when 0.75 sure, 0.25 when wholly sure."""
    gold = np.array([0, 0, 0, 1])
    honest = np.tile([0.75, 0.25], (4, 1))
    boastful = np.tile([1.0, 0.0], (4, 1))
    assert calibration_error(gold, honest) == pytest.approx(0.0)
    assert calibration_error(gold, boastful) == pytest.approx(0.25)


def test_calibration_error_averages_over_bins():
    """Each bin weighs as many predictions as it holds."""
    gold = np.array([0, 1, 0, 0])
    sure = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    assert calibration_error(gold, sure) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)


def test_score_holds_every_figure():
    """One call gives the figures that the functions give one by one."""
    probabilities = np.eye(3)[SAID] * 0.7 + 0.1
    found = score(GOLD, probabilities)
    assert found.count == 7
    assert found.weighted_f1 == weighted_f1(GOLD, SAID, classes=3)
    assert found.uar == unweighted_recall(GOLD, SAID, classes=3)
    assert found.class_f1 == pytest.approx((0.75, 0.4, 0.0))
    assert found.confusion == ((3, 1, 0), (1, 1, 0), (0, 1, 0))
