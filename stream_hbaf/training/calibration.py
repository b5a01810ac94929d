"""Fits the calibration of a network on dev: temperatures, label sets and abstention.

Each (logits [N, C], labels [N]) of the evidence is one corpus, or one condition that it is scored
under, and weighs the same whatever its N. What is promised holds for new utterances drawn like
these; utterances without a label (below 0) don't count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.calibration import ALWAYS_ABSTAIN, PATTERNS, Calibration, Pattern, softmax

Float64 = NDArray[np.float64]
Evidence = tuple[NDArray[np.float32], NDArray[np.int64]]  # logits [N, C], labels [N]

TEMPERATURES = np.geomspace(0.4, 5.0, 60)  # those that are tried
CONFIDENCE = 0.9  # with which the error rate among the answered stays under the stated risk
SHARES = tuple(n / 20 for n in range(20, 0, -1))  # of the utterances, that may be answered


@dataclass(frozen=True)
class _Dev:
    """N dev utterances of one modality pattern."""

    sure: Float64  # [N], probability of the predicted label
    gold: Float64  # [N], probability of the gold label
    wrong: NDArray[np.bool_]  # [N]
    weights: Float64  # [N], which sum to 1 in each corpus or condition


def fit_calibration(
    evidence: Mapping[Pattern, Sequence[Evidence]], *, coverage: float = 0.9, risk: float
) -> Calibration:
    """Fit temperature, label sets and abstention of each modality pattern on its evidence.

    A pattern without evidence has the temperature of all evidence together and no promise to
    keep: every label is in its set, and it always abstains. Raises ConfigError for a coverage or
    a risk that isn't between 0 and 1, and where there is no evidence at all.
    """
    for name, share in (("coverage", coverage), ("risk", risk)):
        if not 0.0 < share < 1.0:
            raise ConfigError(f"calibration: {name} {share} must be between 0 and 1")
    known = {pattern: _labelled(evidence.get(pattern, ())) for pattern in PATTERNS}
    everything = [one for found in known.values() for one in found]
    if not everything:
        raise ConfigError("calibration: no dev utterance has a label; give a corpus that has them")
    temperatures = {p: fit_temperature(found or everything) for p, found in known.items()}
    plain = Calibration.of_temperature(1.0).model_copy(update={"temperatures": temperatures})
    dev = {p: _gather(plain, p, found) for p, found in known.items() if found}
    return Calibration(
        temperatures=temperatures,
        thresholds={p: _set_threshold(dev[p], coverage) if p in dev else 0.0 for p in PATTERNS},
        coverage=coverage,
        answers_above={
            p: _answers_above(dev[p], risk) if p in dev else ALWAYS_ABSTAIN for p in PATTERNS
        },
        risk=risk,
    )


def fit_temperature(evidence: Sequence[Evidence]) -> float:
    """The temperature under which the labels are likeliest (Guo et al. 2017)."""
    return float(
        min(TEMPERATURES, key=lambda t: sum(_surprise(x / t, gold) for x, gold in evidence))
    )


def _surprise(logits: NDArray[np.floating], gold: NDArray[np.int64]) -> float:
    probabilities = softmax(logits)[np.arange(len(gold)), gold]
    return float(-np.log(np.maximum(probabilities, 1e-12)).mean())


def _set_threshold(dev: _Dev, coverage: float) -> float:
    """The probability from which on a label is in the set, so that ``coverage`` of sets are right.

    The score's (conservative) quantile: of N utterances of one corpus the ceil((N+1) coverage)-th
    smallest of 1 - p. Of several, with weights as in Tibshirani et al. 2019, the utterance to come
    counting as the heaviest of them. 0, so every label, where there are too few to tell.
    """
    order = np.argsort(-dev.gold, kind="stable")
    needed = coverage * (dev.weights.sum() + dev.weights.max())
    # What adds up to exactly ``needed`` on paper may miss it by a rounding error.
    last = int(np.searchsorted(np.cumsum(dev.weights[order]), needed * (1 - 1e-12)))
    return float(dev.gold[order[last]]) if last < len(order) else 0.0


def _answers_above(dev: _Dev, risk: float) -> float:
    """The least probability to answer with, so that ``risk`` of the answers are wrong at most.

    As many as possible are answered, the surest first: of 20 shares the largest whose bound on
    the error rate is ``risk`` (Geifman & El-Yaniv 2017, with their binomial bound; every share
    tested, at a 20th of the doubt, as bisection would trust the error rate to rise evenly).
    """
    surest = -np.sort(-dev.sure)
    for share in SHARES:
        least = surest[int(np.ceil(share * len(surest))) - 1]
        doubt = _doubt(dev, dev.sure >= least, risk=risk)
        if doubt <= (1.0 - CONFIDENCE) / len(SHARES):
            return 0.0 if share == 1.0 else float(least)
    return ALWAYS_ABSTAIN


def _doubt(dev: _Dev, answered: NDArray[np.bool_], *, risk: float) -> float:
    """The probability that a true error rate of ``risk`` gives no more errors than were seen.

    A binomial's tail. Unequal weights count as fewer utterances of equal weight (Kish 1965).
    """
    weights = dev.weights[answered]
    rate = float(weights @ dev.wrong[answered] / weights.sum())
    # A rounding error must not cost an utterance, nor add an error.
    count = int(weights.sum() ** 2 / (weights @ weights) + 1e-6)
    errors = np.arange(1, int(np.ceil(rate * count - 1e-6)) + 1)
    steps = np.log((count - errors + 1) / errors * risk / (1 - risk))
    logs = count * np.log(1 - risk) + np.concatenate([[0.0], np.cumsum(steps)])
    return float(np.exp(logs).sum())


def _labelled(evidence: Sequence[Evidence]) -> list[Evidence]:
    """What is labelled of each; without those of which nothing is."""
    kept = [(logits[labels >= 0], labels[labels >= 0]) for logits, labels in evidence]
    return [(logits, labels) for logits, labels in kept if len(labels)]


def _gather(plain: Calibration, pattern: Pattern, evidence: Sequence[Evidence]) -> _Dev:
    found = [plain.probabilities(logits, pattern=pattern) for logits, _ in evidence]
    labels = np.concatenate([labels for _, labels in evidence])
    probabilities = np.concatenate(found)
    return _Dev(
        sure=probabilities.max(1),
        gold=probabilities[np.arange(len(labels)), labels],
        wrong=probabilities.argmax(1) != labels,
        weights=np.concatenate([np.full(len(one), 1 / len(one)) for one in found]),
    )
