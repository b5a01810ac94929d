"""Training, evaluation: how right the predictions are, and how much their probabilities mean.

Plain numpy on label indices int [N] and probabilities float [N, C]; figures are fractions of 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]
Counts = NDArray[np.float64]  # [.., C], of each class
FigureName = Literal["weighted_f1", "macro_f1", "accuracy", "uar"]

CALIBRATION_BINS = 15
DRAWS_AT_ONCE = 1000  # of a bootstrap: 10 MB for MELD's test split


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
    distances = [b.count * abs(b.accuracy - b.confidence) for b in reliability(gold, probabilities)]
    return float(sum(distances) / len(gold)) if len(gold) else 0.0


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions about equally sure, those with a confidence in (low, high]."""

    low: float
    high: float
    confidence: float  # mean probability of what was said
    accuracy: float  # share of them that were right
    count: int


def reliability(gold: Labels, probabilities: Probabilities) -> tuple[Bin, ...]:
    """The bins of a reliability diagram in rising order; a bin without predictions is left out.

    Fifteen bins of equal width (Guo et al. 2017, section 2).
    """
    sure, right = probabilities.max(1), probabilities.argmax(1) == gold
    bins = np.clip(np.ceil(sure * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    found = []
    for index in np.unique(bins):
        inside = bins == index
        found.append(
            Bin(
                low=index / CALIBRATION_BINS,
                high=(index + 1) / CALIBRATION_BINS,
                confidence=float(sure[inside].mean()),
                accuracy=float(right[inside].mean()),
                count=int(inside.sum()),
            )
        )
    return tuple(found)


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


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How well one class is told from the others."""

    precision: float  # of what was said to be it; 0 if nothing was
    recall: float  # of what is it; 0 if nothing is
    f1: float
    support: int


def by_class(table: NDArray[np.int64]) -> tuple[ClassScore, ...]:
    """Every class's figures from a confusion table [C, C]."""
    hits, said, there = np.diag(table), table.sum(0), table.sum(1)
    return tuple(
        ClassScore(
            precision=float(hits[c] / max(said[c], 1)),
            recall=float(hits[c] / max(there[c], 1)),
            f1=float(f1),
            support=int(there[c]),
        )
        for c, f1 in enumerate(class_f1(table))
    )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Utterances whose turn number or length lies in [first, last]; last None has no end."""

    first: int
    last: int | None
    count: int
    weighted_f1: float


def f1_by(
    gold: Labels,
    said: Labels,
    *,
    keys: NDArray[np.integer],
    starts: Sequence[int],
    classes: int,
) -> tuple[Stretch, ...]:
    """Weighted F1 of the utterances between one of the rising ``starts`` and the next.

    ``keys`` [N] are turn numbers or word counts; smaller ones than the first start aren't
    counted. A stretch without utterances is left out. The classes are mixed differently in each
    stretch, so the stretches' mean is not the F1 of all.
    """
    found = []
    for first, after in zip(starts, [*starts[1:], None], strict=True):
        inside = (keys >= first) if after is None else (keys >= first) & (keys < after)
        if inside.any():
            figure = weighted_f1(gold[inside], said[inside], classes=classes)
            last = None if after is None else after - 1
            found.append(Stretch(first, last, int(inside.sum()), figure))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several seeds."""

    mean: float
    sd: float  # of the sample, n - 1; 0 of one seed


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of a figure over seeds; at least one is needed."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(float(np.mean(values)), deviation)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much better a is than b, and how surely."""

    gain: float  # a - b on the utterances as they are
    low: float  # 95 % percentile interval of the gain
    high: float
    p: float  # two-sided


def paired_bootstrap(
    gold: Labels,
    probabilities_a: Probabilities,
    probabilities_b: Probabilities,
    *,
    draws: int = 10_000,
    seed: int = 0,
    figure: FigureName = "weighted_f1",
    groups: Labels | None = None,
) -> Comparison:
    """Whether system a is better than b on other utterances of the same kind.

    Test sets are drawn from this one with replacement, the same utterances for both systems
    (Koehn 2004), or the same dialogues where ``groups`` [N] says which each utterance is of:
    utterances of one dialogue are alike, so that is the stricter test. The interval lies between
    the 2.5th and 97.5th percentile of the drawn gains; p inverts it (Efron and Tibshirani 1993,
    chapter 13): p = 2 min(P(gain <= 0), P(gain >= 0)), at most 1, each share (k + 1) / (draws + 1)
    since no number of draws shows a probability of nothing. Systems that say the same have p = 1.

    Probabilities [N, C], or [S, N, C] of S seeds: then a system's figure is the mean of its
    seeds', and p says nothing about seeds that weren't trained.
    """
    units = np.arange(len(gold)) if groups is None else np.unique(groups, return_inverse=True)[1]
    a, b = (_Tally.of(gold, p, units=units) for p in (probabilities_a, probabilities_b))
    measure = _FIGURES[figure]
    gain = a.figure(measure, times=None)[0] - b.figure(measure, times=None)[0]
    draw = np.random.default_rng(seed)
    gains = np.zeros(draws)
    for start in range(0, draws, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, draws - start)
        times = _draw_times(draw, draws=count, units=int(units.max()) + 1)
        gains[start : start + count] = a.figure(measure, times=times) - b.figure(
            measure, times=times
        )
    low, high = np.quantile(gains, (0.025, 0.975))
    shares = [(np.sum(side) + 1) / (draws + 1) for side in (gains <= 0, gains >= 0)]
    return Comparison(float(gain), float(low), float(high), min(1.0, 2 * float(min(shares))))


@dataclass(frozen=True)
class _Tally:
    """One system's counts in each unit that is drawn: G units, S seeds."""

    hits: NDArray[np.float32]  # [G, S, C]
    said: NDArray[np.float32]  # [G, S, C]
    there: NDArray[np.float32]  # [G, 1, C]

    @classmethod
    def of(cls, gold: Labels, probabilities: Probabilities, *, units: Labels) -> "_Tally":
        seeds = probabilities if probabilities.ndim == 3 else probabilities[None]
        classes = seeds.shape[2]
        ones = np.eye(classes, dtype=np.float32)
        said, there = ones[seeds.argmax(2).T], ones[gold][:, None]  # [N, S, C], [N, 1, C]

        def gather(counts: NDArray[np.float32]) -> NDArray[np.float32]:
            gathered = np.zeros((int(units.max()) + 1, *counts.shape[1:]), np.float32)
            np.add.at(gathered, units, counts)
            return gathered

        return cls(gather(said * there), gather(said), gather(there))

    def figure(
        self, measure: "_Measure", *, times: NDArray[np.float32] | None
    ) -> NDArray[np.float64]:
        """The mean over seeds, for each of R draws [R]; ``times`` [R, G] says what was drawn."""
        if times is None:
            times = np.ones((1, len(self.there)), np.float32)

        def add(counts: NDArray[np.float32]) -> Counts:
            # Whole numbers below 2^24: float32 adds them exactly.
            drawn = times @ counts.reshape(len(counts), -1)
            added: Counts = drawn.reshape(len(times), *counts.shape[1:]).astype(np.float64)
            return added

        found: NDArray[np.float64] = measure(add(self.hits), add(self.said), add(self.there))
        over_seeds: NDArray[np.float64] = found.mean(1)
        return over_seeds


def _draw_times(draw: np.random.Generator, *, draws: int, units: int) -> NDArray[np.float32]:
    """How often each of G units is in each of R draws of G with replacement: [R, G]."""
    drawn = draw.integers(units, size=(draws, units)) + units * np.arange(draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=draws * units)
    return times.reshape(draws, units).astype(np.float32)


# Figures of many draws at once, from hits, what was said and what is there, each [.., C].
_Measure = Callable[[Counts, Counts, Counts], NDArray[np.float64]]


def _f1(hits: Counts, said: Counts, there: Counts) -> Counts:
    return 2 * hits / np.maximum(said + there, 1)


def _weighted_f1(hits: Counts, said: Counts, there: Counts) -> Counts:
    total = np.maximum(there.sum(-1), 1)
    return np.asarray((_f1(hits, said, there) * there).sum(-1) / total)


def _macro_f1(hits: Counts, said: Counts, there: Counts) -> Counts:
    present = (said + there > 0).sum(-1)
    return np.asarray(_f1(hits, said, there).sum(-1) / np.maximum(present, 1))


def _accuracy(hits: Counts, said: Counts, there: Counts) -> Counts:
    return np.asarray(hits.sum(-1) / np.maximum(said.sum(-1), 1))


def _uar(hits: Counts, said: Counts, there: Counts) -> Counts:
    recall = np.where(there > 0, hits / np.maximum(there, 1), 0.0)
    return np.asarray(recall.sum(-1) / np.maximum((there > 0).sum(-1), 1))


_FIGURES: dict[FigureName, _Measure] = {
    "weighted_f1": _weighted_f1,
    "macro_f1": _macro_f1,
    "accuracy": _accuracy,
    "uar": _uar,
}


def majority_score(train: Labels, gold: Labels, *, classes: int) -> Score:
    """The baseline that always says train's most frequent label, as surely as it is frequent."""
    shares = np.bincount(train, minlength=classes) / len(train)
    return score(gold, np.tile(shares, (len(gold), 1)))
