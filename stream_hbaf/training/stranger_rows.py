"""Labelled predictions for strangers, as what a voice is worth is fitted on.

N predictions, C classes. Every corpus weighs the same, and an utterance under several conditions
as much as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.calibration import Pattern, softmax
from stream_hbaf.training.calibration_fit import Sample

Float64 = NDArray[np.float64]
Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]

MOST = 400  # clips a corpus by which settings are ranked; what does no harm is decided on all
INFORMED = 0.01  # nats by which words that tell something beat their corpus's mean answer


@dataclass(frozen=True)
class StrangerRows:
    """N labelled predictions; logits [N, C] are NaN where an input was missing."""

    labels: Labels
    text: Float64
    audio: Float64
    both: Float64
    familiarity: Float64  # [N], the running mean where there is one
    mean_telling: Float64  # [N]
    corpora: Labels
    speakers: Labels
    clips: Labels
    weights: Float64  # [N], which sum to 1 in each corpus

    def where(self, chosen: Flags) -> "StrangerRows":
        """Some of the rows, each corpus of them with the same weight again."""
        picked = {name: getattr(self, name)[chosen] for name in self.__dataclass_fields__}
        weights, corpora = picked["weights"], picked["corpora"]
        picked["weights"] = weights / np.maximum(np.bincount(corpora, weights), 1e-300)[corpora]
        return StrangerRows(**picked)

    def loss(self, log_probabilities: Float64) -> float:
        """Mean over corpora of what the labels' log probabilities lack."""
        gold = log_probabilities[np.arange(len(self.labels)), self.labels]
        return float(-(self.weights @ gold))

    def sample(self, probabilities: Float64) -> Sample:
        """The rows as label sets and abstention are fitted on."""
        groups = {"clips": self.clips, "speakers": self.speakers, "corpora": self.corpora}
        return Sample.of(probabilities, self.labels, self.weights, **groups)


def labelled_rows(
    corpora: Sequence[str],
    speakers: Sequence[str],
    labels: Sequence[int] | Labels,
    text: Float64,
    audio: Float64,
    both: Float64,
    familiarity: Float64,
    clips: Sequence[str] | None,
) -> StrangerRows:
    """The labelled rows with numbers for names; raises ConfigError for arrays that don't fit."""
    count = len(labels)
    clips = [str(n) for n in range(count)] if clips is None else clips
    tables = {"text": text, "audio": audio, "both": both}
    named = {"corpora": corpora, "speakers": speakers, "clips": clips}
    for name, column in [*named.items(), *tables.items(), ("familiarity", familiarity)]:
        if len(column) != count:
            raise ConfigError(f"reliability: {count} labels but {len(column)} of {name}")
    if len({np.shape(table)[1:] for table in tables.values()}) > 1:
        raise ConfigError("reliability: text, audio and both have logits of other label numbers")
    known = np.asarray(labels) >= 0
    if not known.any():
        raise ConfigError("reliability: no prediction has a label; give a corpus that has them")
    # The same name in two corpora is two speakers, and two clips.
    clip = _numbers(list(zip(corpora, clips, strict=True)), known)
    rows = StrangerRows(
        labels=np.asarray(labels, dtype=np.int64)[known],
        **{name: np.asarray(table, np.float64)[known] for name, table in tables.items()},
        familiarity=np.asarray(familiarity, np.float64)[known],
        mean_telling=np.full(int(known.sum()), np.nan),
        corpora=_numbers(list(corpora), known),
        speakers=_numbers(list(zip(corpora, speakers, strict=True)), known),
        clips=clip,
        weights=1.0 / np.bincount(clip)[clip],
    )
    return rows.where(np.ones(len(clip), bool))


def _numbers(names: Sequence[object], known: Flags) -> Labels:
    """Each labelled row's name as a number from 0."""
    kept = [name for name, labelled in zip(names, known, strict=True) if labelled]
    number = {name: n for n, name in enumerate(dict.fromkeys(kept))}
    return np.array([number[name] for name in kept], dtype=np.int64)


def dialogues_of(
    corpora: Sequence[str], speakers: Sequence[str], heard: Sequence[int] | None
) -> list[Labels]:
    """The rows of each dialogue in order; each by itself, where the order isn't known."""
    if heard is None:
        return [np.array([n]) for n in range(len(corpora))]
    found: dict[tuple[str, str], list[int]] = {}
    for n in np.argsort(heard, kind="stable").tolist():
        found.setdefault((corpora[n], speakers[n]), []).append(n)
    return [np.array(rows) for rows in found.values()]


def having(rows: StrangerRows, pattern: Pattern) -> StrangerRows:
    """The rows that have these logits; of both, those that have all three."""
    given: dict[Pattern, Float64] = {
        "text": rows.text,
        "audio": rows.audio,
        "audio+text": rows.both + rows.text,
    }
    found: Flags = np.asarray(np.isfinite(given[pattern]).all(1))
    if not found.any():
        raise ConfigError(f"reliability: no labelled prediction by {pattern}; give some")
    return rows.where(found)


def informed(rows: StrangerRows) -> StrangerRows:
    """The rows of corpora whose words tell something of the labels; all if none do."""
    gold = np.arange(len(rows.labels)), rows.labels
    answers = softmax(rows.text)
    telling = np.zeros(len(rows.labels), bool)
    for corpus in np.unique(rows.corpora):
        own = rows.corpora == corpus
        mean = answers[own].mean(0)
        gain = np.log(answers[gold][own]).mean() - np.log(mean[rows.labels[own]]).mean()
        telling |= own & (gain > INFORMED)
    return rows.where(telling) if telling.any() else rows


def evenly_drawn(rows: StrangerRows) -> Flags:
    """The rows of at most ``MOST`` clips of each corpus, evenly drawn."""
    chosen = []
    for corpus in np.unique(rows.corpora):
        clips = np.unique(rows.clips[rows.corpora == corpus])
        chosen.append(clips[np.linspace(0, len(clips) - 1, min(MOST, len(clips))).astype(int)])
    return np.asarray(np.isin(rows.clips, np.concatenate(chosen)))
