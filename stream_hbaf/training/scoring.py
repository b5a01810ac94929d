"""Scores networks on dev and test, and calibrates them: one score for any number of corpora.

N utterances of a dataset, C classes. What a calibration promises holds for new utterances drawn
like those that it was fitted on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from stream_hbaf.corpora.dataset import Dataset, predict
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.evaluation.metrics import Score, score, unweighted_recall, weighted_f1
from stream_hbaf.networks.calibration import (
    ALWAYS_ABSTAIN,
    PATTERNS,
    Calibration,
    Pattern,
    patterns_of,
    softmax,
)
from stream_hbaf.networks.network import Network, NetworkConfig
from stream_hbaf.training.audio_features import PLAIN
from stream_hbaf.training.recipe import CalibrationConfig

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Labels = NDArray[np.int64]
# Logits [N, C] and labels [N], below 0 where there is none, of one corpus, or of one condition that
# it is scored under; each weighs the same in a calibration, whatever its N.
Evidence = tuple[Float32, Labels]
FigureName = Literal["weighted_f1", "uar"]

GOLD, ASR_ERRORS = "gold", "asr_errors"  # versions of texts
CLEAN = "clean"  # how the plain version of audio is named beside others
TEMPERATURES = np.geomspace(0.4, 5.0, 60)  # those that are tried
CONFIDENCE = 0.9  # with which the error rate among the answered stays under the stated risk
SHARES = tuple(n / 20 for n in range(20, 0, -1))  # of the utterances, that may be answered


@dataclass(frozen=True)
class ScoredCorpus:
    """One corpus's dev or test split, in every version of its texts."""

    name: str
    texts: Mapping[str, Dataset]  # GOLD first; all have the same audio
    are_clips: bool = False  # single utterances, scored by UAR rather than weighted F1

    @property
    def gold(self) -> Dataset:
        return self.texts[GOLD]


@dataclass(frozen=True)
class Condition:
    """A corpus under one condition: what a network is given of it, and by what it is scored."""

    corpus: str
    pattern: Pattern  # the modalities given
    name: str  # the version of the audio, else that of the texts
    dataset: Dataset
    version: str | None  # of the audio; None: without
    figure: FigureName
    selects: bool  # whether it counts in the score that picks the epoch

    @property
    def group(self) -> str:
        """Conditions of a group together weigh as much as those of any other."""
        return f"{self.corpus}/{self.pattern}"

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def patterns(self) -> list[Pattern]:
        """Of each utterance: some have no audio, or no text."""
        everywhere = np.ones(len(self.dataset.labels), bool)
        given = self.pattern.split("+")
        masks = {"audio": self.dataset.audio_mask, "text": self.dataset.text_mask}
        audio, text = (
            (everywhere if mask is None else mask) & (modality in given)
            for modality, mask in masks.items()
        )
        return patterns_of(audio=audio, text=text)


@dataclass(frozen=True)
class Evaluation:
    """A network's calibration, and its figures under every condition."""

    calibration: Calibration
    scores: Mapping[Split, Mapping[str, Score]]  # by condition; of dialogues the main one first
    probabilities: Mapping[Split, Float64]  # [N, C] of all utterances, in the main condition

    def main(self, split: Split) -> Score:
        """The figures of the main corpus with all modalities."""
        return next(iter(self.scores[split].values()))


def conditions_of(corpora: Iterable[ScoredCorpus], config: NetworkConfig) -> list[Condition]:
    """All conditions under which a network of that configuration can be scored, the main one first.

    Of dialogues, those with all modalities that there are select the epoch; the others serve the
    calibration. Of clips all do: what is wanted of them is what the audio says by itself.
    """
    return [one for corpus in corpora for one in _conditions(corpus, config)]


def _conditions(corpus: ScoredCorpus, config: NetworkConfig) -> list[Condition]:
    gold, clips = corpus.gold, corpus.are_clips
    figure: FigureName = "uar" if clips else "weighted_f1"
    uses_audio = config.use_audio and bool(gold.audio)
    uses_text = config.use_text and (gold.text_mask is None or bool(gold.text_mask.any()))

    def condition(pattern: Pattern, name: str, version: str | None, *, selects: bool) -> Condition:
        dataset = corpus.texts.get(name, gold)
        return Condition(corpus.name, pattern, name, dataset, version, figure, selects)

    found = []
    if uses_audio and uses_text:
        found += [condition("audio+text", v or CLEAN, v, selects=True) for v in gold.audio]
        others = [name for name in corpus.texts if name != GOLD]
        found += [condition("audio+text", name, PLAIN, selects=True) for name in others]
    if uses_audio:
        selects = clips or not uses_text
        found += [condition("audio", v or CLEAN, v, selects=selects) for v in gold.audio]
    if uses_text and not (clips and uses_audio):
        found += [condition("text", name, None, selects=not uses_audio) for name in corpus.texts]
    return found


def dev_score(
    network: Network, conditions: Sequence[Condition], *, class_weights: Tensor | None
) -> dict[str, float]:
    """The "score" that picks the epoch, the "loss" beside it, and each group's mean figure.

    The score is the mean over groups of the mean over their conditions: a hundred clips under one
    condition would pick by luck. The loss is the cross entropy, averaged alike.
    """
    logits = {one.key: _predict(network, one) for one in conditions if one.selects}

    def figure(one: Condition) -> float:
        measure = weighted_f1 if one.figure == "weighted_f1" else unweighted_recall
        return measure(one.dataset.known_labels, logits[one.key][one.dataset.labelled].argmax(1))

    def loss(one: Condition) -> float:
        gold = torch.from_numpy(one.dataset.known_labels)
        rows = torch.from_numpy(logits[one.key][one.dataset.labelled])
        return float(F.cross_entropy(rows, gold, weight=class_weights))

    figures = _by_group(conditions, figure)
    return {"score": _mean(figures), "loss": _mean(_by_group(conditions, loss)), **figures}


def score_of(
    scores: Mapping[str, Score], corpora: Sequence[ScoredCorpus], config: NetworkConfig
) -> float:
    """The dev score of a network whose figures are known."""
    conditions = conditions_of(corpora, config)
    return _mean(_by_group(conditions, lambda one: getattr(scores[one.key], one.figure)))


def evaluate(
    network: Network,
    scored: Mapping[Split, Sequence[ScoredCorpus]],
    plan: CalibrationConfig,
    *,
    splits: Sequence[Split] | None = None,
) -> Evaluation:
    """Calibrate a network on dev, where every condition weighs the same, and score ``splits``.

    These have dev among them; None: all of ``scored``. Raises ModelError for a network that gives
    NaN.
    """
    splits = tuple(scored) if splits is None else splits
    conditions = {split: conditions_of(scored[split], network.config) for split in splits}
    logits = {
        split: {one.key: _predict_finite(network, one) for one in conditions[split]}
        for split in splits
    }
    evidence: dict[Pattern, list[Evidence]] = {}
    for one in conditions["dev"]:
        evidence.setdefault(one.pattern, []).append((logits["dev"][one.key], one.dataset.labels))
    calibration = fit_calibration(evidence, coverage=plan.coverage, risk=plan.risk)
    scores: dict[Split, dict[str, Score]] = {}
    main: dict[Split, Float64] = {}
    for split in splits:
        probabilities = {
            one.key: calibration.probabilities(logits[split][one.key], pattern=one.patterns)
            for one in conditions[split]
        }
        scores[split] = {
            one.key: score(one.dataset.known_labels, probabilities[one.key][one.dataset.labelled])
            for one in conditions[split]
        }
        main[split] = next(iter(probabilities.values()))
    return Evaluation(calibration, scores, main)


def _by_group(
    conditions: Iterable[Condition], figure: Callable[[Condition], float]
) -> dict[str, float]:
    """Each group's mean over its conditions that select the epoch."""
    groups: dict[str, list[float]] = {}
    for one in conditions:
        if one.selects:
            groups.setdefault(one.group, []).append(figure(one))
    return {group: float(np.mean(figures)) for group, figures in groups.items()}


def _mean(groups: Mapping[str, float]) -> float:
    return float(np.mean(list(groups.values())))


def _predict(network: Network, condition: Condition) -> Float32:
    """Logits [N, C] of all the condition's utterances."""
    with_text = condition.pattern != "audio"
    return predict(network, condition.dataset, version=condition.version, with_text=with_text)


def _predict_finite(network: Network, condition: Condition) -> Float32:
    logits = _predict(network, condition)
    if not np.isfinite(logits).all():
        raise ModelError(f"training: the network gives NaN on {condition.key}; lower fit.rate")
    return logits


@dataclass(frozen=True)
class _Dev:
    """N labelled dev utterances of one modality pattern."""

    sure: Float64  # [N], probability of the predicted label
    gold: Float64  # [N], probability of the gold label
    wrong: NDArray[np.bool_]  # [N]
    weights: Float64  # [N], which sum to 1 in each corpus or condition

    @classmethod
    def of(cls, evidence: Sequence[Evidence], *, temperature: float) -> "_Dev":
        labels = np.concatenate([labels for _, labels in evidence])
        logits = np.concatenate([logits for logits, _ in evidence], dtype=np.float64)
        probabilities = softmax(logits / temperature)
        return cls(
            sure=probabilities.max(1),
            gold=probabilities[np.arange(len(labels)), labels],
            wrong=probabilities.argmax(1) != labels,
            weights=np.concatenate([np.full(len(one), 1 / len(one)) for _, one in evidence]),
        )


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
    temperatures = {p: _fit_temperature(found or everything) for p, found in known.items()}
    dev = {p: _Dev.of(found, temperature=temperatures[p]) for p, found in known.items() if found}
    return Calibration(
        temperatures=temperatures,
        thresholds={p: _set_threshold(dev[p], coverage) if p in dev else 0.0 for p in PATTERNS},
        coverage=coverage,
        answers_above={
            p: _answers_above(dev[p], risk) if p in dev else ALWAYS_ABSTAIN for p in PATTERNS
        },
        risk=risk,
    )


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
    return float(binom.cdf(np.ceil(rate * count - 1e-6), count, risk))
