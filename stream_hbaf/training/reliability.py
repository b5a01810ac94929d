"""Fits what a voice is worth, on predictions for corpora and speakers that weren't trained on.

N predictions, C classes. Every corpus weighs the same, and an utterance under several conditions
as much as one. Plain arrays in, a calibration out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.calibration import (
    ALWAYS_ABSTAIN,
    LARGEST,
    PATTERNS,
    Calibration,
    Pattern,
    Reliability,
    log_softmax,
    softmax,
)
from stream_hbaf.training.calibration_fit import (
    TEMPERATURES,
    Sample,
    answers_above,
    require_shares,
    set_threshold,
)

Float64 = NDArray[np.float64]
Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Settings that are tried. The first base is a voice that doesn't count.
BASES = (-LARGEST, *np.linspace(-10.0, 4.0, 15))
FAMILIAR = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
TELLING = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0)
SOFTNESS = tuple(np.linspace(0.0, 2.0, 21))
OF_BOTH = tuple(np.geomspace(0.5, 4.0, 8))  # temperatures of what sound and words say together
MOST = 400  # clips a corpus by which settings are ranked; what does no harm is decided on all
INFORMED = 0.01  # nats by which words that tell something beat their corpus's mean answer
FOLDS = 10  # of the clips of a corpus with fewer speakers than FEWEST
FEWEST = 4  # speakers between whom a difference is compared
NOISE = 1.0  # standard errors by which answers may be worse than those by the words alone
NEGLIGIBLE = 0.005  # so much worse is no harm, in nats and in weighted F1


@dataclass(frozen=True)
class _Rows:
    """N labelled predictions; logits [N, C] are NaN where an input was missing."""

    labels: Labels
    text: Float64
    audio: Float64
    both: Float64
    familiarity: Float64  # [N]
    corpora: Labels
    speakers: Labels
    clips: Labels
    weights: Float64  # [N], which sum to 1 in each corpus

    def where(self, chosen: Flags) -> "_Rows":
        """Some of the rows, each corpus of them with the same weight again."""
        picked = {name: getattr(self, name)[chosen] for name in self.__dataclass_fields__}
        weights, corpora = picked["weights"], picked["corpora"]
        picked["weights"] = weights / np.maximum(np.bincount(corpora, weights), 1e-300)[corpora]
        return _Rows(**picked)

    def loss(self, log_probabilities: Float64) -> float:
        """Mean over corpora of what the labels' log probabilities lack."""
        gold = log_probabilities[np.arange(len(self.labels)), self.labels]
        return float(-(self.weights @ gold))

    def sample(self, probabilities: Float64) -> Sample:
        """The rows as label sets and abstention are fitted on."""
        groups = {"clips": self.clips, "speakers": self.speakers, "corpora": self.corpora}
        return Sample.of(probabilities, self.labels, self.weights, **groups)


def fit_reliability(
    *,
    corpora: Sequence[str],
    speakers: Sequence[str],
    labels: Sequence[int] | Labels,
    text: Float64,
    audio: Float64,
    both: Float64,
    familiarity: Float64,
    clips: Sequence[str] | None = None,
    made_up: Mapping[str, float] | None = None,
    coverage: float = 0.9,
    risk: float = 0.3,
) -> Calibration:
    """Fit a whole calibration with its ``reliability`` on N predictions, rows of the arrays.

    Of each: corpus, speaker, label (below 0: none), the logits [C] that a network gives with text
    alone, with audio alone and with both in the whole dialogue (NaN where an input is missing), and
    the voice's familiarity. ``clips`` names rows that are one utterance under several conditions.
    The network, and the statistics of familiarity, must be trained without the row's speaker; let
    some rows be of corpora that they were trained without.

    Where the words of a corpus tell nothing of its labels, such as one sentence that actors say in
    every emotion, they don't count in what holds of words alone. The weight of voices is the
    likeliest under which the answer is no worse than by the words alone on any corpus, by more than
    noise, in likelihood and weighted F1. Corpora that are ``made_up``, of words with a stranger's
    voice of another label, count in that likelihood, as much as is said of each beside 1 of a real
    one, and in nothing else. Raises ConfigError for arrays of other lengths, and where a modality
    pattern has no labelled row.
    """
    require_shares(coverage=coverage, risk=risk)
    every = _rows(corpora, speakers, labels, text, audio, both, familiarity, clips)
    shares = made_up or {}
    kept = [name for name, label in zip(corpora, labels, strict=True) if label >= 0]
    counted = np.array([shares.get(name, np.nan) for name in kept])
    rows = every.where(np.isnan(counted))
    given: dict[Pattern, Float64] = {
        "text": rows.text,
        "audio": rows.audio,
        "audio+text": rows.both,
    }
    of = {pattern: _having(rows, logits, pattern) for pattern, logits in given.items()}
    read = of["text"]
    of["text"] = telling = _informed(read)
    by_words = min(TEMPERATURES, key=lambda t: telling.loss(log_softmax(telling.text / t)))
    by_voice, softness = _fit_voice(of["audio"])
    alone = Reliability(
        base=-LARGEST,
        familiar=0.0,
        telling=0.0,
        softness=softness,
        typical=tuple(read.weights @ softmax(read.text / by_words) / read.weights.sum()),
    )
    temperatures = {"": by_words, "text": by_words, "audio": by_voice, "audio+text": 1.0}
    settings = Calibration(
        temperatures=temperatures,
        thresholds=dict.fromkeys(PATTERNS, 0.0),
        coverage=coverage,
        answers_above=dict.fromkeys(PATTERNS, ALWAYS_ABSTAIN),
        risk=risk,
        reliability=alone,
    )
    complete: Flags = np.asarray(np.isfinite(every.both + every.text).all(1))
    settings = _fit_weight(every.where(complete), settings, made_up=counted[complete])
    return _with_promises(settings, of)


def _rows(
    corpora: Sequence[str],
    speakers: Sequence[str],
    labels: Sequence[int] | Labels,
    text: Float64,
    audio: Float64,
    both: Float64,
    familiarity: Float64,
    clips: Sequence[str] | None,
) -> _Rows:
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
    rows = _Rows(
        labels=np.asarray(labels, dtype=np.int64)[known],
        **{name: np.asarray(table, np.float64)[known] for name, table in tables.items()},
        familiarity=np.asarray(familiarity, np.float64)[known],
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


def _having(rows: _Rows, logits: Float64, pattern: Pattern) -> _Rows:
    """The rows that have these logits; of both, those that have all three."""
    given: Flags = np.asarray(np.isfinite(logits).all(1))
    if pattern == "audio+text":
        given &= np.isfinite(rows.text).all(1)
    if not given.any():
        raise ConfigError(f"reliability: no labelled prediction by {pattern}; give some")
    return rows.where(given)


def _informed(rows: _Rows) -> _Rows:
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


def _fit_voice(rows: _Rows) -> tuple[float, float]:
    """The temperature of a familiar voice alone, and how much it grows, that are likeliest."""
    strange = 1.0 - np.nan_to_num(rows.familiarity)

    def loss(setting: tuple[float, float]) -> float:
        temperature, softness = setting
        scale = temperature * np.exp(softness * strange)
        return rows.loss(log_softmax(rows.audio / scale[:, None]))

    temperature, softness = min(product(TEMPERATURES, SOFTNESS), key=loss)
    return float(temperature), float(softness)


def _fit_weight(rows: _Rows, settings: Calibration, *, made_up: Float64) -> Calibration:
    """The settings with the likeliest weight of voices that does no harm on any real corpus.

    ``made_up`` [N] is how much a row's corpus counts, if it is made up; NaN: it is real.
    """
    reliability, by_words = settings.reliability, settings.temperatures["text"]
    assert reliability is not None
    sample, found = _sample(rows), []
    some = rows.where(sample)
    some = replace(some, weights=some.weights * np.nan_to_num(made_up[sample], nan=1.0))
    real = rows.where(np.isnan(made_up))
    for base, familiar, telling in product(BASES, FAMILIAR, TELLING):
        weights = {"base": float(base), "familiar": familiar, "telling": telling}
        one = reliability.model_copy(update=weights)
        for temperature, answer in _pooled(some, one, by_words, OF_BOTH):
            found.append((some.loss(answer), temperature, one))
    # Among settings that are as likely, the one that depends on the least.
    for _, temperature, one in sorted(
        found, key=lambda each: (round(each[0], 4), each[2].familiar + each[2].telling)
    ):
        [(_, fused)] = _pooled(real, one, by_words, (temperature,))
        if _does_no_harm(real, fused, log_softmax(real.text / by_words)):
            break
    temperatures = {**settings.temperatures, "audio+text": temperature}
    return settings.model_copy(update={"temperatures": temperatures, "reliability": one})


def _sample(rows: _Rows) -> Flags:
    """The rows of at most ``MOST`` clips of each corpus, evenly drawn."""
    chosen = []
    for corpus in np.unique(rows.corpora):
        clips = np.unique(rows.clips[rows.corpora == corpus])
        chosen.append(clips[np.linspace(0, len(clips) - 1, min(MOST, len(clips))).astype(int)])
    return np.asarray(np.isin(rows.clips, np.concatenate(chosen)))


def _pooled(
    rows: _Rows, reliability: Reliability, by_words: float, of_both: Sequence[float]
) -> Iterator[tuple[float, Float64]]:
    """Each temperature of both, and the log probabilities [N, C] under it."""
    words = log_softmax(rows.text / by_words)
    weight = reliability.weight(np.exp(words), np.nan_to_num(rows.familiarity))[:, None]
    for temperature in of_both:
        pooled = words + weight * (rows.both / temperature - words)
        yield float(temperature), log_softmax(pooled)


def _does_no_harm(rows: _Rows, fused: Float64, by_words: Float64) -> bool:
    """Whether log probabilities [N, C] are no worse than others on any corpus, beyond noise."""
    gold = np.arange(len(rows.labels)), rows.labels
    worse = by_words[gold] - fused[gold]
    for corpus in range(rows.corpora.max() + 1):
        own = rows.corpora == corpus
        if not own.any():
            continue
        groups = _folds(rows, own)
        totals = np.bincount(groups, worse[own])
        counts = np.bincount(groups)
        loss = (totals.sum() - totals) / (counts.sum() - counts)  # without each group
        if _exceeds_noise(loss, float(worse[own].mean())):
            return False
        found, ours = (
            _weighted_f1(rows.labels[own], answer[own].argmax(1), groups, classes=fused.shape[1])
            for answer in (by_words, fused)
        )
        if _exceeds_noise(found[1:] - ours[1:], float(found[0] - ours[0])):
            return False
    return True


def _folds(rows: _Rows, own: Flags) -> Labels:
    """A corpus's speakers, or where they are few, folds of its clips, numbered from 0."""
    speakers = np.unique(rows.speakers[own], return_inverse=True)[1]
    if speakers.max() + 1 >= FEWEST:
        return np.asarray(speakers)
    clips = np.unique(rows.clips[own], return_inverse=True)[1]
    return np.asarray(np.unique(clips % FOLDS, return_inverse=True)[1])


def _exceeds_noise(without_each: Float64, whole: float) -> bool:
    """Whether a figure is above 0 by more than ``NOISE`` standard errors (jackknife)."""
    count = len(without_each)
    if count < 2:
        return whole > NEGLIGIBLE
    spread = without_each - without_each.mean()
    error = np.sqrt((count - 1) / count * float(spread @ spread))
    return bool(whole > NOISE * error + NEGLIGIBLE)


def _weighted_f1(labels: Labels, predicted: Labels, groups: Labels, *, classes: int) -> Float64:
    """Weighted F1 of all, then without each of the groups [1 + G]."""
    confusion = np.zeros((groups.max() + 1, classes, classes))
    np.add.at(confusion, (groups, labels, predicted), 1.0)
    whole = confusion.sum(0)
    kept = np.concatenate([whole[None], whole - confusion])
    right = np.einsum("gcc->gc", kept)
    gold, answered = kept.sum(2), kept.sum(1)
    f1 = 2 * right / np.maximum(gold + answered, 1.0)
    return np.asarray((f1 * gold).sum(1) / np.maximum(gold.sum(1), 1.0))


def _with_promises(settings: Calibration, of: dict[Pattern, _Rows]) -> Calibration:
    """The settings with label sets and abstention, fitted on the weighed probabilities."""
    logits = {"text": "text", "audio": "audio", "audio+text": "both"}
    thresholds, answers = {**settings.thresholds}, {**settings.answers_above}
    for pattern, rows in of.items():
        probabilities = settings.probabilities(
            getattr(rows, logits[pattern]),
            pattern=[pattern] * len(rows.labels),
            words=rows.text if pattern == "audio+text" else None,
            familiarity=rows.familiarity,
        )
        sample = rows.sample(probabilities)
        thresholds[pattern] = set_threshold(sample, settings.coverage)
        answers[pattern] = answers_above(sample, settings.risk)
    return settings.model_copy(update={"thresholds": thresholds, "answers_above": answers})
