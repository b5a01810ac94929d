"""Figures from predictions: classification scores, calibration error, word error rate, bootstrap.

Classification scores are scikit-learn's, the word error rate is jiwer's (the only file that imports
it). Inputs are label indices int [N] and probabilities float [N, C]. Figures are fractions of 1,
not per cent, and 0 without utterances.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jiwer
import numpy as np
from numpy.typing import NDArray
from sklearn import metrics

from stream_hbaf.corpora.asr_errors import without_punctuation

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]
Counts = NDArray[np.float64]  # [.., C], of each class
FigureName = Literal["weighted_f1", "macro_f1", "accuracy", "uar"]

CALIBRATION_BINS = 15
DRAWS_AT_ONCE = 1000  # of a bootstrap: 10 MB for MELD's test split


def confusion(gold: Labels, predicted: Labels, *, classes: int) -> NDArray[np.int64]:
    """Counts [C, C]: row = gold label, column = predicted label."""
    if not len(gold):
        return np.zeros((classes, classes), np.int64)
    return np.asarray(metrics.confusion_matrix(gold, predicted, labels=range(classes)))


def weighted_f1(gold: Labels, predicted: Labels) -> float:
    """F1 averaged by how often each class occurs: the figure that papers report on MELD."""
    return _average(metrics.f1_score, gold, predicted, average="weighted")


def macro_f1(gold: Labels, predicted: Labels) -> float:
    """F1 averaged over the classes that occur or are predicted, each counting the same."""
    return _average(metrics.f1_score, gold, predicted, average="macro")


def accuracy(gold: Labels, predicted: Labels) -> float:
    """Share of the utterances whose predicted label is the gold one."""
    return float(metrics.accuracy_score(gold, predicted)) if len(gold) else 0.0


def unweighted_recall(gold: Labels, predicted: Labels) -> float:
    """UAR: recall averaged over the classes that occur; chance is one over their number."""
    labels = np.unique(gold)
    return _average(metrics.recall_score, gold, predicted, average="macro", labels=labels)


def _average(
    figure: Callable[..., float], gold: Labels, predicted: Labels, **options: Any
) -> float:
    """A figure of scikit-learn's; a class with a denominator of 0 counts as 0."""
    return float(figure(gold, predicted, zero_division=0.0, **options)) if len(gold) else 0.0


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Substituted, deleted and inserted words of all texts, over the number of reference words.

    Case and punctuation don't count. Above 1 where more words were inserted than there were;
    without any reference word, the number of inserted ones.
    """
    plain = [[without_punctuation(text) for text in texts] for texts in (references, hypotheses)]
    return float(jiwer.wer(plain[0], plain[1]))


def calibration_error(gold: Labels, probabilities: Probabilities) -> float:
    """ECE: mean distance between confidence and accuracy, over 15 bins of equal width.

    Guo et al. 2017, section 2; each bin (low, high] is weighted by its number of predictions.
    """
    distances = [b.count * abs(b.accuracy - b.confidence) for b in reliability(gold, probabilities)]
    return float(sum(distances) / len(gold)) if len(gold) else 0.0


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions whose confidence, the probability of their label, lies in (low, high]."""

    low: float
    high: float
    confidence: float  # mean
    accuracy: float
    count: int  # of predictions


def reliability(gold: Labels, probabilities: Probabilities) -> tuple[Bin, ...]:
    """The bins of a reliability diagram in rising order; a bin without predictions is left out."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == gold
    ends = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64), 1, CALIBRATION_BINS)
    return tuple(
        Bin(
            low=(end - 1) / CALIBRATION_BINS,
            high=end / CALIBRATION_BINS,
            confidence=float(confidence[ends == end].mean()),
            accuracy=float(correct[ends == end].mean()),
            count=int((ends == end).sum()),
        )
        for end in np.unique(ends)
    )


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
    classes, predicted = probabilities.shape[1], probabilities.argmax(1)
    return Score(
        count=len(gold),
        weighted_f1=weighted_f1(gold, predicted),
        macro_f1=macro_f1(gold, predicted),
        accuracy=accuracy(gold, predicted),
        uar=unweighted_recall(gold, predicted),
        ece=calibration_error(gold, probabilities),
        class_f1=tuple(one.f1 for one in by_class(gold, predicted, classes=classes)),
        confusion=tuple(map(tuple, confusion(gold, predicted, classes=classes).tolist())),
    )


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class's figures; 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float
    support: int  # utterances with this gold label


def by_class(gold: Labels, predicted: Labels, *, classes: int) -> tuple[ClassScore, ...]:
    """Every class's figures, also of classes that neither occur nor are predicted."""
    if not len(gold):
        return (ClassScore(0.0, 0.0, 0.0, 0),) * classes
    columns = metrics.precision_recall_fscore_support(
        gold, predicted, labels=range(classes), zero_division=0.0
    )
    return tuple(
        ClassScore(float(precision), float(recall), float(f1), int(support))
        for precision, recall, f1, support in zip(*columns, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """Utterances whose turn number or length lies in [first, last]; last None has no end."""

    first: int
    last: int | None
    count: int  # of utterances
    weighted_f1: float


def f1_by(
    gold: Labels, predicted: Labels, *, keys: NDArray[np.integer], starts: Sequence[int]
) -> tuple[Interval, ...]:
    """Weighted F1 of the utterances between one of the rising ``starts`` and the next.

    ``keys`` [N] are turn numbers or word counts; utterances below the first start aren't counted.
    An interval without utterances is left out. Each interval has its own distribution of classes,
    so the intervals' mean is not the F1 of all.
    """
    found, lasts = [], [*(start - 1 for start in starts[1:]), None]
    number = np.searchsorted(starts, keys, side="right") - 1
    for n in np.unique(number[number >= 0]):
        inside = number == n
        figure = weighted_f1(gold[inside], predicted[inside])
        found.append(Interval(starts[n], lasts[n], int(inside.sum()), figure))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several seeds."""

    mean: float
    sd: float  # of the sample, n - 1; 0 of one seed


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of a figure over seeds; at least one is needed."""
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if values[1:] else 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The gain of system a over system b with its 95 % interval."""

    gain: float  # figure of a minus figure of b, on the test set itself
    low: float  # 2.5th percentile of the drawn gains
    high: float  # 97.5th
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
    """Test whether system a is better than system b beyond the choice of test utterances.

    Test sets are drawn from this one with replacement, the same utterances for both systems
    (Koehn 2004), or the same dialogues where ``groups`` [N] gives each utterance's dialogue:
    utterances of one dialogue depend on each other, so that is the stricter test. The interval lies
    between the 2.5th and 97.5th percentile of the drawn gains; p inverts it (Efron and Tibshirani
    1993, chapter 13): p = 2 min(P(gain <= 0), P(gain >= 0)), at most 1, each share estimated as
    (k + 1) / (draws + 1) so that it is never 0. Systems with equal predictions have p = 1.

    Probabilities are [N, C], or [S, N, C] for S seeds: then a system's figure is the mean over its
    seeds, and p doesn't cover the variation between seeds.
    """
    units = np.arange(len(gold)) if groups is None else np.unique(groups, return_inverse=True)[1]
    a, b = (_Tally.of(gold, p, units=units) for p in (probabilities_a, probabilities_b))
    measure = _FIGURES[figure]

    def gains_of(times: NDArray[np.float32]) -> Counts:
        return a.figure(measure, times=times) - b.figure(measure, times=times)

    count = int(units.max()) + 1
    draw = np.random.default_rng(seed)
    sizes = (min(DRAWS_AT_ONCE, draws - done) for done in range(0, draws, DRAWS_AT_ONCE))
    drawn = [gains_of(_draw_times(draw, draws=size, units=count)) for size in sizes]
    gain, gains = gains_of(np.ones((1, count), np.float32))[0], np.concatenate(drawn)
    low, high = np.quantile(gains, (0.025, 0.975))
    shares = [(np.sum(side) + 1) / (draws + 1) for side in (gains <= 0, gains >= 0)]
    return Comparison(float(gain), float(low), float(high), min(1.0, 2 * float(min(shares))))


@dataclass(frozen=True)
class _Tally:
    """One system's counts in each unit that is drawn (utterance or dialogue): G units, S seeds."""

    hits: NDArray[np.float32]  # [G, S, C], true positives
    predicted: NDArray[np.float32]  # [G, S, C]
    support: NDArray[np.float32]  # [G, 1, C]

    @classmethod
    def of(cls, gold: Labels, probabilities: Probabilities, *, units: Labels) -> "_Tally":
        seeds = probabilities if probabilities.ndim == 3 else probabilities[None]
        classes = seeds.shape[2]
        ones = np.eye(classes, dtype=np.float32)
        predicted, support = ones[seeds.argmax(2).T], ones[gold][:, None]  # [N, S, C], [N, 1, C]

        def gather(counts: NDArray[np.float32]) -> NDArray[np.float32]:
            gathered = np.zeros((int(units.max()) + 1, *counts.shape[1:]), np.float32)
            np.add.at(gathered, units, counts)
            return gathered

        return cls(gather(predicted * support), gather(predicted), gather(support))

    def figure(self, measure: "_Measure", *, times: NDArray[np.float32]) -> Counts:
        """The mean over seeds for each of R draws [R]; ``times`` [R, G] counts a unit's draws."""

        def add(counts: NDArray[np.float32]) -> Counts:
            # Whole numbers below 2^24: float32 adds them exactly.
            drawn = times @ counts.reshape(len(counts), -1)
            added: Counts = drawn.reshape(len(times), *counts.shape[1:]).astype(np.float64)
            return added

        counts = (add(part) for part in (self.hits, self.predicted, self.support))
        return np.asarray(measure(*counts).mean(1))


def _draw_times(draw: np.random.Generator, *, draws: int, units: int) -> NDArray[np.float32]:
    """How often each of G units is in each of R draws of G with replacement: [R, G]."""
    drawn = draw.integers(units, size=(draws, units)) + units * np.arange(draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=draws * units)
    return times.reshape(draws, units).astype(np.float32)


# Figures of many draws at once, from hits, predicted counts and support, each [.., C].
_Measure = Callable[[Counts, Counts, Counts], Counts]


def _f1(hits: Counts, predicted: Counts, support: Counts) -> Counts:
    return 2 * hits / np.maximum(predicted + support, 1)


def _weighted_f1(hits: Counts, predicted: Counts, support: Counts) -> Counts:
    total = np.maximum(support.sum(-1), 1)
    return np.asarray((_f1(hits, predicted, support) * support).sum(-1) / total)


def _macro_f1(hits: Counts, predicted: Counts, support: Counts) -> Counts:
    present = (predicted + support > 0).sum(-1)
    return np.asarray(_f1(hits, predicted, support).sum(-1) / np.maximum(present, 1))


def _accuracy(hits: Counts, predicted: Counts, support: Counts) -> Counts:
    return np.asarray(hits.sum(-1) / np.maximum(predicted.sum(-1), 1))


def _uar(hits: Counts, predicted: Counts, support: Counts) -> Counts:
    recall = np.where(support > 0, hits / np.maximum(support, 1), 0.0)
    return np.asarray(recall.sum(-1) / np.maximum((support > 0).sum(-1), 1))


_FIGURES: dict[FigureName, _Measure] = {
    "weighted_f1": _weighted_f1,
    "macro_f1": _macro_f1,
    "accuracy": _accuracy,
    "uar": _uar,
}


def majority_score(train: Labels, gold: Labels, *, classes: int) -> Score:
    """The baseline that gives every utterance the label frequencies of ``train`` [M]."""
    shares = np.bincount(train, minlength=classes) / len(train)
    return score(gold, np.tile(shares, (len(gold), 1)))
