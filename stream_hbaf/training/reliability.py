"""Fits what a voice is worth, on predictions for corpora and speakers that weren't trained on.

N predictions, C classes. Every corpus weighs the same, and an utterance under several conditions
as much as one. Plain arrays in, a calibration out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from stream_hbaf.evaluation.metrics import weighted_f1
from stream_hbaf.networks.calibration import (
    ALWAYS_ABSTAIN,
    LARGEST,
    PATTERNS,
    UNKNOWN,
    Calibration,
    Pattern,
    Reliability,
    log_softmax,
    softmax,
)
from stream_hbaf.training.calibration_fit import (
    TEMPERATURES,
    answers_above,
    require_shares,
    set_threshold,
)
from stream_hbaf.training.stranger_rows import (
    Flags,
    Float64,
    Labels,
    StrangerRows,
    dialogues_of,
    evenly_drawn,
    having,
    informed,
    labelled_rows,
)

# Settings that are tried. The first base is a voice that doesn't count.
BASES = (-LARGEST, *np.linspace(-10.0, 10.0, 21))
FAMILIAR = (0.0, 2.0, 4.0, 8.0)
TELLING = (0.0, 8.0, 16.0, 24.0, 32.0)
PAST = (0.0, 12.5, 25.0, 37.5, 50.0, 75.0, 100.0)
SOFTNESS = (0.0, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0)
ENOUGH = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 1.0)
PRIOR = 4.0  # utterances that count before a dialogue's own, as for how a speaker sounds
AS_LIKELY = 0.002  # nats a prediction, by which a softer voice may be less likely than the best
OF_BOTH = tuple(np.geomspace(0.5, 4.0, 8))  # temperatures of what sound and words say together
FOLDS = 10  # of the clips of a corpus with fewer speakers than FEWEST
FEWEST = 4  # speakers between whom a difference is compared
NOISE = 1.0  # standard errors by which answers may be worse than those by the words alone
NEGLIGIBLE = 0.005  # so much worse is no harm, in nats and in weighted F1
CONTRADICTED = 0.025  # weighted F1 that a voice which contradicts the words may cost


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
    heard: Sequence[int] | None = None,
    made_up: Mapping[str, float] | None = None,
    coverage: float = 0.9,
    risk: float = 0.3,
) -> Calibration:
    """Fit a whole calibration with its ``reliability`` on N predictions, rows of the arrays.

    Of each: corpus, speaker, label (below 0: none), the logits [C] that a network gives with text
    alone, with audio alone and with both in the whole dialogue (NaN where an input is missing), and
    the voice's familiarity. ``clips`` names rows that are one utterance under several conditions.
    With ``heard``, how many rows came before each in the dialogue, or sitting, of its corpus and
    speaker, familiarity and how much words tell count as running means; without, each utterance by
    itself. The network, and the statistics of familiarity, must be trained without the row's
    speaker; let some rows be of corpora that they were trained without.

    Where the words of a corpus tell nothing of its labels, such as one sentence that actors say in
    every emotion, they don't count in what holds of words alone. The weight of voices is the
    likeliest under which the answer is no worse than by the words alone on any corpus, by more than
    noise, in likelihood and weighted F1. Corpora that are ``made_up``, of words with a stranger's
    voice of another label, count in that likelihood, as much as is said of each beside 1 of a real
    one; on none of them may the answer lose more than CONTRADICTED. Raises ConfigError for arrays
    of other lengths, and where a modality pattern has no labelled row.
    """
    require_shares(coverage=coverage, risk=risk)
    every = labelled_rows(corpora, speakers, labels, text, audio, both, familiarity, clips)
    shares = made_up or {}
    kept = [name for name, label in zip(corpora, labels, strict=True) if label >= 0]
    counted = np.array([shares.get(name, np.nan) for name in kept])
    real = np.isnan(counted)
    read = having(every.where(real), "text")
    telling = informed(read)
    settings = _of_words(
        read, telling, prior=None if heard is None else PRIOR, coverage=coverage, risk=risk
    )
    dialogues = dialogues_of(corpora, speakers, heard)
    means = settings.running_means(np.asarray(familiarity), np.asarray(text), dialogues=dialogues)
    labelled = np.asarray(labels) >= 0
    every = replace(every, familiarity=means[0][labelled], mean_telling=means[1][labelled])
    of: dict[Pattern, StrangerRows] = {
        "text": telling,
        "audio": having(every.where(real), "audio"),
        "audio+text": having(every.where(real), "audio+text"),
    }
    settings = _fit_voice(of["audio"], settings)
    complete: Flags = np.asarray(np.isfinite(every.both + every.text).all(1))
    settings = _fit_weight(every.where(complete), settings, made_up=counted[complete])
    return _with_promises(settings, of)


def _of_words(
    read: StrangerRows,
    telling: StrangerRows,
    *,
    prior: float | None,
    coverage: float,
    risk: float,
) -> Calibration:
    """Settings under which the words alone answer, and nothing is promised yet."""
    by_words = min(TEMPERATURES, key=lambda t: telling.loss(log_softmax(telling.text / t)))
    return Calibration(
        temperatures={"": by_words, "text": by_words, "audio": 1.0, "audio+text": 1.0},
        thresholds=dict.fromkeys(PATTERNS, 0.0),
        coverage=coverage,
        answers_above=dict.fromkeys(PATTERNS, ALWAYS_ABSTAIN),
        risk=risk,
        reliability=Reliability(
            base=-LARGEST,
            familiar=0.0,
            telling=0.0,
            softness=0.0,
            prior=prior,
            typical=tuple(read.weights @ softmax(read.text / by_words) / read.weights.sum()),
        ),
    )


def _fit_voice(rows: StrangerRows, settings: Calibration) -> Calibration:
    """The settings with the temperature of a familiar voice alone and how much it grows.

    Few corpora are strange enough to tell how soft a stranger's answers must be. So of settings
    that are about as likely as the best, the one with the highest temperature of an unknown voice.
    """
    rows = rows.where(evenly_drawn(rows))
    familiarity, found = np.nan_to_num(rows.familiarity), []
    for softness, enough in product(SOFTNESS, ENOUGH):
        if softness == 0 and enough < ENOUGH[-1]:
            continue
        softer = np.exp(softness * np.maximum(0.0, enough - familiarity))[:, None]
        tried = [
            (rows.loss(log_softmax(rows.audio / (t * softer))), float(t)) for t in TEMPERATURES
        ]
        loss, temperature = min(tried)
        found.append((loss, temperature, softness, enough))
    least = min(found)[0]
    likely = [one for one in found if one[0] <= least + AS_LIKELY]
    _, temperature, softness, enough = max(
        likely, key=lambda one: (one[1] * np.exp(one[2] * (one[3] - UNKNOWN)), -one[0])
    )
    reliability = settings.reliability
    assert reliability is not None
    voice = reliability.model_copy(update={"softness": softness, "enough": enough})
    temperatures = {**settings.temperatures, "audio": temperature}
    return settings.model_copy(update={"temperatures": temperatures, "reliability": voice})


def _fit_weight(rows: StrangerRows, settings: Calibration, *, made_up: Float64) -> Calibration:
    """The settings with the likeliest weight of voices that does no harm on any real corpus, and
    little on those that are made up.

    ``made_up`` [N] is how much a row's corpus counts, if it is made up; NaN: it is real.
    """
    reliability, by_words = settings.reliability, settings.temperatures["text"]
    assert reliability is not None
    sample, found = evenly_drawn(rows), []
    some = rows.where(sample)
    some = replace(some, weights=some.weights * np.nan_to_num(made_up[sample], nan=1.0))
    real, pairs = rows.where(np.isnan(made_up)), rows.where(~np.isnan(made_up))
    past = (0.0,) if reliability.prior is None else PAST
    for base, familiar, telling, before in product(BASES, FAMILIAR, TELLING, past):
        weights = {"base": float(base), "familiar": familiar, "telling": telling, "past": before}
        one = reliability.model_copy(update=weights)
        for temperature, answer in _pooled(some, one, by_words, OF_BOTH):
            found.append((some.loss(answer), temperature, one))
    # Among settings that are as likely, the one that depends on the least.
    for _, temperature, one in sorted(
        found,
        key=lambda each: (round(each[0], 4), each[2].familiar + each[2].telling + each[2].past),
    ):
        [(_, contradicted)] = _pooled(pairs, one, by_words, (temperature,))
        if _costs(pairs, contradicted, pairs.text) > CONTRADICTED:
            continue
        [(_, fused)] = _pooled(real, one, by_words, (temperature,))
        if _does_no_harm(real, fused, log_softmax(real.text / by_words)):
            break
    temperatures = {**settings.temperatures, "audio+text": temperature}
    return settings.model_copy(update={"temperatures": temperatures, "reliability": one})


def _pooled(
    rows: StrangerRows, reliability: Reliability, by_words: float, of_both: Sequence[float]
) -> Iterator[tuple[float, Float64]]:
    """Each temperature of both, and the log probabilities [N, C] under it."""
    words = log_softmax(rows.text / by_words)
    means = np.nan_to_num(rows.mean_telling)
    weight = reliability.weight(np.exp(words), np.nan_to_num(rows.familiarity), means)[:, None]
    for temperature in of_both:
        pooled = words + weight * (rows.both / temperature - words)
        yield float(temperature), log_softmax(pooled)


def _does_no_harm(rows: StrangerRows, fused: Float64, by_words: Float64) -> bool:
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


def _costs(rows: StrangerRows, fused: Float64, by_words: Float64) -> float:
    """The most weighted F1 that answers [N, C] cost on any corpus, against those by the words."""
    lost = [0.0]
    for corpus in np.unique(rows.corpora):
        own = rows.corpora == corpus
        words, both = (
            weighted_f1(rows.labels[own], answer[own].argmax(1)) for answer in (by_words, fused)
        )
        lost.append(words - both)
    return max(lost)


def _folds(rows: StrangerRows, own: Flags) -> Labels:
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


def _with_promises(settings: Calibration, of: dict[Pattern, StrangerRows]) -> Calibration:
    """The settings with label sets and abstention, fitted on the weighed probabilities."""
    logits = {"text": "text", "audio": "audio", "audio+text": "both"}
    thresholds, answers = {**settings.thresholds}, {**settings.answers_above}
    for pattern, rows in of.items():
        probabilities = settings.probabilities(
            getattr(rows, logits[pattern]),
            pattern=[pattern] * len(rows.labels),
            words=rows.text if pattern == "audio+text" else None,
            familiarity=rows.familiarity,
            mean_telling=rows.mean_telling,
        )
        sample = rows.sample(probabilities)
        thresholds[pattern] = set_threshold(sample, settings.coverage)
        answers[pattern] = answers_above(sample, settings.risk)
    return settings.model_copy(update={"thresholds": thresholds, "answers_above": answers})
