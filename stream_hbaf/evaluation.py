"""Training, evaluation: how right the predictions are, and how much their probabilities mean.

Plain numpy on label indices int [N] and probabilities float [N, C]; figures are fractions of 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]

CALIBRATION_BINS = 15


def confusion(gold: Labels, predicted: Labels, *, classes: int) -> NDArray[np.int64]:
    """Count [C, C]: row = gold label, column = predicted label."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (gold, predicted), 1)
    return table


def class_f1(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """F1 of each class [C]; 0 where it was neither said nor there."""
    hits = np.diag(table).astype(np.float64)
    total = table.sum(0) + table.sum(1)
    scores: NDArray[np.float64] = 2 * hits / np.maximum(total, 1)
    return scores


def weighted_f1(gold: Labels, predicted: Labels, *, classes: int) -> float:
    """F1 averaged by how often each class is there: the figure that papers report on MELD."""
    table = confusion(gold, predicted, classes=classes)
    return float(class_f1(table) @ table.sum(1) / max(table.sum(), 1))


def macro_f1(gold: Labels, predicted: Labels, *, classes: int) -> float:
    """F1 averaged over the classes that are there or were said, rare ones counting as much."""
    table = confusion(gold, predicted, classes=classes)
    present = (table.sum(0) + table.sum(1)) > 0
    return float(class_f1(table)[present].mean()) if present.any() else 0.0


def accuracy(gold: Labels, predicted: Labels) -> float:
    return float((gold == predicted).mean()) if len(gold) else 0.0


def unweighted_recall(gold: Labels, predicted: Labels, *, classes: int) -> float:
    """UAR: recall averaged over the classes that are there; chance is one over their number."""
    table = confusion(gold, predicted, classes=classes)
    there = table.sum(1)
    return float((np.diag(table)[there > 0] / there[there > 0]).mean()) if there.any() else 0.0


def calibration_error(gold: Labels, probabilities: Probabilities) -> float:
    """ECE: mean distance between how sure and how right, over 15 bins of equal width.

    Guo et al. 2017, section 2; each bin (low, high] weighs as many predictions as it holds.
    """
    sure, said = probabilities.max(1), probabilities.argmax(1)
    bins = np.clip(np.ceil(sure * CALIBRATION_BINS).astype(np.int64) - 1, 0, None)
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        error += inside.mean() * abs((said == gold)[inside].mean() - sure[inside].mean())
    return float(error)


@dataclass(frozen=True, slots=True)
class Score:
    """All figures of one test set under one condition."""

    count: int
    weighted_f1: float
    macro_f1: float
    accuracy: float
    uar: float
    ece: float
    class_f1: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]


def score(gold: Labels, probabilities: Probabilities) -> Score:
    """Every figure at once, from label indices [N] and probabilities [N, C]."""
    classes, said = probabilities.shape[1], probabilities.argmax(1)
    table = confusion(gold, said, classes=classes)
    return Score(
        count=len(gold),
        weighted_f1=weighted_f1(gold, said, classes=classes),
        macro_f1=macro_f1(gold, said, classes=classes),
        accuracy=accuracy(gold, said),
        uar=unweighted_recall(gold, said, classes=classes),
        ece=calibration_error(gold, probabilities),
        class_f1=tuple(float(value) for value in class_f1(table)),
        confusion=tuple(tuple(int(n) for n in row) for row in table),
    )
