"""Fits temperature, label sets and abstention by modality pattern, on predictions of a dev set.

N utterances, C classes. What a calibration promises holds for new utterances drawn like those that
it was fitted on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.calibration import (
    ALWAYS_ABSTAIN,
    PATTERNS,
    Calibration,
    Pattern,
    softmax,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Labels = NDArray[np.int64]
# Logits [N, C] and labels [N], below 0 where there is none, of one corpus, or of one condition that
# it is scored under; each weighs the same in a calibration, whatever its N.
Evidence = tuple[Float32, Labels]

TEMPERATURES = np.geomspace(0.4, 5.0, 60)  # those that are tried
CONFIDENCE = 0.9  # with which the error rate among the answered stays under the stated risk
FEWEST_ANSWERS = 10  # of a corpus, of which an error rate says something
SHARES = tuple(n / 20 for n in range(20, 0, -1))  # of the utterances, that may be answered
SHORTFALL = 0.03  # by which a corpus's own sets may miss the coverage that all have together


@dataclass(frozen=True)
class Sample:
    """N labelled utterances of one modality pattern."""

    sure: Float64  # [N], probability of the predicted label
    gold: Float64  # [N], probability of the gold label
    wrong: NDArray[np.bool_]  # [N]
    weights: Float64  # [N], which sum to 1 in each corpus or condition
    clips: Labels  # [N], the same for one utterance under several conditions
    speakers: Labels | None = None  # [N]; None: as if nobody spoke twice
    corpora: Labels | None = None  # [N]; None: the risk holds of all corpora together

    @classmethod
    def of(
        cls, probabilities: Float64, labels: Labels, weights: Float64, **groups: Any
    ) -> "Sample":
        """Predictions [N, C] of utterances with these labels [N]; ``groups`` as the fields."""
        return cls(
            sure=probabilities.max(1),
            gold=probabilities[np.arange(len(labels)), labels],
            wrong=probabilities.argmax(1) != labels,
            weights=weights,
            **{"clips": np.arange(len(labels))} | groups,
        )


def _sample(evidence: Sequence[Evidence], *, temperature: float) -> Sample:
    labels = np.concatenate([labels for _, labels in evidence])
    logits = np.concatenate([logits for logits, _ in evidence], dtype=np.float64)
    weights = np.concatenate([np.full(len(one), 1 / len(one)) for _, one in evidence])
    return Sample.of(softmax(logits / temperature), labels, weights)


def fit_calibration(
    evidence: Mapping[Pattern, Sequence[Evidence]], *, coverage: float = 0.9, risk: float
) -> Calibration:
    """Fit temperature, label sets and abstention of each modality pattern on its evidence.

    A pattern without evidence has the temperature of all evidence together and no promise to
    keep: every label is in its set, and it always abstains. Raises ConfigError for a coverage or
    a risk that isn't between 0 and 1, and where there is no evidence at all.
    """
    require_shares(coverage=coverage, risk=risk)
    known = {pattern: _labelled(evidence.get(pattern, ())) for pattern in PATTERNS}
    everything = [one for found in known.values() for one in found]
    if not everything:
        raise ConfigError("calibration: no dev utterance has a label; give a corpus that has them")
    temperatures = {p: _fit_temperature(found or everything) for p, found in known.items()}
    dev = {p: _sample(found, temperature=temperatures[p]) for p, found in known.items() if found}
    return Calibration(
        temperatures=temperatures,
        thresholds={p: set_threshold(dev[p], coverage) if p in dev else 0.0 for p in PATTERNS},
        coverage=coverage,
        answers_above={
            p: answers_above(dev[p], risk) if p in dev else ALWAYS_ABSTAIN for p in PATTERNS
        },
        risk=risk,
    )


def require_shares(**shares: float) -> None:
    """Raise ConfigError for a share that isn't between 0 and 1."""
    for name, share in shares.items():
        if not 0.0 < share < 1.0:
            raise ConfigError(f"calibration: {name} {share} must be between 0 and 1")


def _labelled(evidence: Sequence[Evidence]) -> list[Evidence]:
    """What is labelled of each; without those of which nothing is."""
    kept = [(logits[labels >= 0], labels[labels >= 0]) for logits, labels in evidence]
    return [(logits, labels) for logits, labels in kept if len(labels)]


def _fit_temperature(evidence: Sequence[Evidence]) -> float:
    """The temperature under which the labels are likeliest (Guo et al. 2017)."""

    def surprise(temperature: float) -> float:
        likelihoods = [
            softmax(logits / temperature)[np.arange(len(labels)), labels]
            for logits, labels in evidence
        ]
        return sum(float(-np.log(np.maximum(one, 1e-12)).mean()) for one in likelihoods)

    return float(min(TEMPERATURES, key=surprise))


def set_threshold(dev: Sample, coverage: float) -> float:
    """The probability from which on a label is in the set, so that ``coverage`` of sets are right.

    The score's (conservative) quantile: of N utterances of one corpus the ceil((N+1) coverage)-th
    smallest of 1 - p. Of several, with weights as in Tibshirani et al. 2019, the utterance to come
    counting as the heaviest of them. Where corpora are given, each by itself may have as much as
    SHORTFALL less. 0, so every label, where there are too few to tell.
    """
    found = _quantile(dev, np.ones(len(dev.gold), bool), coverage)
    for corpus in () if dev.corpora is None else np.unique(dev.corpora):
        found = min(found, _quantile(dev, dev.corpora == corpus, coverage - SHORTFALL))
    return found


def _quantile(dev: Sample, chosen: NDArray[np.bool_], coverage: float) -> float:
    gold, weights = dev.gold[chosen], dev.weights[chosen]
    order = np.argsort(-gold, kind="stable")
    needed = coverage * (weights.sum() + np.bincount(dev.clips[chosen], weights).max())
    # What adds up to exactly ``needed`` on paper may miss it by a rounding error.
    last = int(np.searchsorted(np.cumsum(weights[order]), needed * (1 - 1e-12)))
    return float(gold[order[last]]) if last < len(order) else 0.0


def answers_above(dev: Sample, risk: float) -> float:
    """The least probability to answer with, so that ``risk`` of the answers are wrong at most.

    As many as possible are answered, the surest first: of 20 shares the largest whose bound on
    the error rate is ``risk`` (Geifman & El-Yaniv 2017, with their binomial bound; every share
    tested, at a 20th of the doubt, as bisection would trust the error rate to rise evenly). Where
    several corpora are given, the first share of which no corpus has more errors than ``risk``:
    that asks for more than the bound, so it is tested as if it were the only share. If none is so
    small, they are taken together.
    """
    surest = -np.sort(-dev.sure)
    several = dev.corpora is not None and len(np.unique(dev.corpora)) > 1
    together = ALWAYS_ABSTAIN
    for share in SHARES:
        least = surest[int(np.ceil(share * len(surest))) - 1]
        answered = dev.sure >= least
        doubt = _doubt(dev, answered, risk=risk)
        found = 0.0 if share == 1.0 else float(least)
        each = not _exceeds_somewhere(dev, answered, risk=risk)
        if each and doubt <= (1.0 - CONFIDENCE) / (1 if several else len(SHARES)):
            return found
        if doubt <= (1.0 - CONFIDENCE) / len(SHARES):
            together = min(together, found)
    return together


def _doubt(dev: Sample, answered: NDArray[np.bool_], *, risk: float) -> float:
    """The probability that a true error rate of ``risk`` gives no more errors than were seen.

    A binomial's tail. Unequal weights count as fewer utterances of equal weight (Kish 1965), and so
    do utterances of few speakers, by the variance between these.
    """
    weights, wrong = dev.weights[answered], dev.wrong[answered]
    rate = float(weights @ wrong / weights.sum())
    by_clip = np.bincount(dev.clips[answered], weights)
    effective = float(weights.sum() ** 2 / (by_clip @ by_clip))
    if dev.speakers is not None:
        off = np.bincount(dev.speakers[answered], weights * (wrong - rate)) / weights.sum()
        effective = min(effective, rate * (1.0 - rate) / max(float(off @ off), 1e-12) or effective)
    # A rounding error must not cost an utterance, nor add an error.
    count = int(effective + 1e-6)
    return float(binom.cdf(np.ceil(rate * count - 1e-6), count, risk))


def _exceeds_somewhere(dev: Sample, answered: NDArray[np.bool_], *, risk: float) -> bool:
    """Whether more than ``risk`` of a corpus's answers are wrong; of a few that says nothing."""
    if dev.corpora is None:
        return False
    for corpus in np.unique(dev.corpora):
        wrong = dev.wrong[answered & (dev.corpora == corpus)]
        if len(wrong) >= FEWEST_ANSWERS and wrong.mean() > risk:
            return True
    return False
