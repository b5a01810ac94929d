"""Scores networks on dev and test, and calibrates them: one score for any number of corpora.

N utterances of a dataset, C classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stream_hbaf.corpora.dataset import Dataset, predict
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.errors import ModelError
from stream_hbaf.evaluation.metrics import Score, score, unweighted_recall, weighted_f1
from stream_hbaf.networks.calibration import Calibration, Pattern, patterns_of
from stream_hbaf.networks.network import Network, NetworkConfig
from stream_hbaf.training.audio_features import PLAIN
from stream_hbaf.training.calibration_fit import Evidence, fit_calibration
from stream_hbaf.training.recipe import CalibrationConfig

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
FigureName = Literal["weighted_f1", "uar"]

GOLD, ASR_ERRORS = "gold", "asr_errors"  # versions of texts
CLEAN = "clean"  # how the plain version of audio is named beside others


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
