"""Finds what a bundle's voice is worth on strangers, and gives the bundle the calibration for it.

The bundle's recipe is trained again, with its first seed, without each of its corpora of clips in
turn, and without the speakers of a session of its dialogues with sound. What these networks say of
corpora and speakers that they have never heard is what ``reliability`` is fitted on. U utterances,
C classes, A acoustic columns.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.bundle import METRICS, Bundle
from stream_hbaf.corpora.dataset import NO_LABEL, Dataset, predict
from stream_hbaf.corpora.open_corpus import WITH_SESSIONS, training_sessions
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import calibration_error, unweighted_recall, weighted_f1
from stream_hbaf.networks.calibration import Calibration, Pattern
from stream_hbaf.networks.familiarity import Familiarity, fit_familiarity
from stream_hbaf.networks.network import Network
from stream_hbaf.training.audio_features import PLAIN
from stream_hbaf.training.calibration_fit import Sample, answers_above, set_threshold
from stream_hbaf.training.card import model_card
from stream_hbaf.training.fitting import fit_network
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe import Recipe, read_recipe
from stream_hbaf.training.reliability import fit_reliability

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Progress = Callable[[str], None]

# Utterances heard of a speaker before: up to, but without, the next.
HEARD = (0, 1, 5, 20)
FEWEST = 16  # utterances of which a figure is given
# How much each corpus counts of the main one's words with a stranger's voice of another label,
# beside 1 of a real corpus. Where a voice may move neutral words, it may also be wrong: more would
# take from real conversation what it saves in such pairs (docs/results.md).
MADE_UP = 0.5


@dataclass(frozen=True)
class Rows:
    """What a network says of U utterances of a corpus that it wasn't trained on."""

    corpus: str
    labels: NDArray[np.int64]  # [U]
    speakers: NDArray[np.int64]  # [U], or dialogues
    text: Float64  # [U, C] logits with text alone; NaN where there is none
    audio: Float64  # [U, C]
    both: Float64  # [U, C]
    familiarity: Float64  # [U]; NaN without audio
    heard: NDArray[np.int64]  # [U], utterances before it in its dialogue, or the speaker's sitting
    made_up: bool = False


def weigh_voice(
    bundle: Bundle,
    recipe: Recipe,
    corpora: Path,
    *,
    cache: Path,
    progress: Progress = print,
) -> tuple[Bundle, dict[str, Any]]:
    """``bundle``, trained by ``recipe``, with familiarity, reliability, and the shares of labels;
    and what was measured on each corpus that was left out, and by the bundle itself on the test
    split of dialogues with audio, see ``measure``.

    Raises ConfigError for a recipe without two corpora of clips, and errors of ``prepare``.
    """
    prepared = prepare(recipe, corpora, cache=cache, progress=progress)
    clips = [one.name for one in prepared.scored["dev"] if one.are_clips]
    if prepared.training.clips is None or len(clips) < 2:
        raise ConfigError(
            "weighing: the recipe needs two corpora of clips or more, to leave one out"
        )
    rows: list[Rows] = []
    for name in _left_out(prepared):
        run = without(recipe, name)
        strange = prepare(run, corpora, cache=cache, progress=progress)
        network = fit_network(run, strange, seed=recipe.fit.seeds[0]).network
        found = list(rows_of_strangers(network, run, strange, with_dialogues=not rows))
        progress(f"without {name}: {sum(len(one.labels) for one in found)} predictions")
        rows += found
    calibration = calibrate(rows)
    shares = _shares(rows, classes=len(bundle.labels))
    config = bundle.config.model_copy(
        update={
            "calibration": calibration,
            "shares": dict(zip(bundle.labels, shares, strict=True)),
        }
    )
    familiarity = familiarity_of(recipe, prepared)
    tested = [
        _rows(f"{one.name}, test", bundle.network, one.gold, familiarity)
        for one in prepared.scored.get("test", ())
    ]
    weighed = replace(bundle, config=config, familiarity=familiarity)
    return weighed, measure([*rows, *tested], calibration)


def weigh_trained(
    recipe_file: Path, corpora: Path, out: Path, *, cache: Path, progress: Progress = print
) -> Bundle:
    """Weigh the voice of the bundle in ``out``, trained by ``recipe_file``, and save it there."""
    bundle, strangers = weigh_voice(
        Bundle.load(str(out)), read_recipe(recipe_file), corpora, cache=cache, progress=progress
    )
    metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    metrics["strangers"] = strangers
    metrics["calibration"] = bundle.calibration.model_dump(mode="json")
    bundle.save(out, metrics=metrics, card=model_card(metrics))
    return bundle


def without(recipe: Recipe, name: str) -> Recipe:
    """The recipe with a corpus held out, and with a session's speakers as dev."""
    used = dict(recipe.corpora)
    if WITH_SESSIONS in used:
        session = training_sessions(used[WITH_SESSIONS].fold)[-1]
        used[WITH_SESSIONS] = used[WITH_SESSIONS].model_copy(update={"dev_fold": session})
    return recipe.model_copy(update={"corpora": used, "held_out": (name,)})


def _left_out(prepared: Prepared) -> list[str]:
    """The corpora of clips with audio and several labels: one of readers tells no emotion."""
    clips = prepared.training.clips
    assert clips is not None
    names = np.array(list(_corpora_of_clips(prepared)))
    several = {n: len(np.unique(clips.dataset.labels[names == n])) > 1 for n in names.tolist()}
    return [name for name, tells in several.items() if tells]


def familiarity_of(recipe: Recipe, prepared: Prepared) -> Familiarity:
    """The statistics of the training sound, with dev clips, of other speakers, as reference."""
    training = prepared.training
    assert training.clips is not None
    sound, names = [training.clips.relative[PLAIN]], list(_corpora_of_clips(prepared))
    if training.with_audio:
        with_audio = replace(training.dialogues, dialogues=training.with_audio)
        chosen = np.concatenate(training.with_audio)
        sound.append(with_audio.audio_given(PLAIN)[chosen])
        names += ["dialogues"] * len(chosen)
    dev = [one for one in prepared.scored["dev"] if one.are_clips]
    held_out = [one.gold.audio_given(PLAIN) for one in dev]
    parts = recipe.audio.representation.split("+")
    blocks = dict(zip(parts, training.blocks, strict=True))
    return fit_familiarity(
        np.concatenate(sound),
        np.concatenate(held_out),
        blocks={name: range(one.start, one.stop) for name, one in blocks.items()},
        corpora=names,
        held_out_corpora=[
            one.name for one, audio in zip(dev, held_out, strict=True) for _ in audio
        ],
    )


def _corpora_of_clips(prepared: Prepared) -> Iterator[str]:
    for name, one in prepared.corpora.items():
        if one["kind"] == "clips":
            yield from [name] * one["dialogues"]["train"]


def rows_of_strangers(
    network: Network, recipe: Recipe, prepared: Prepared, *, with_dialogues: bool
) -> Iterator[Rows]:
    """What the network says of the corpora held out, and of made-up pairs with their voices.

    ``with_dialogues``: also of dev dialogues, of their words and where they have it their sound.
    """
    familiarity = familiarity_of(recipe, prepared)
    main = prepared.scored["dev"][0]
    if with_dialogues:
        for one in prepared.scored["dev"]:
            if not one.are_clips:
                yield _rows(one.name, network, one.gold, familiarity)
    for one in prepared.scored["test"]:
        if one.are_clips:
            yield _rows(one.name, network, one.gold, familiarity)
            if not main.are_clips:
                pairs = _made_up(main.gold, one.gold)
                yield replace(
                    _rows(f"{main.name} with {one.name}", network, pairs, familiarity),
                    audio=np.full((len(pairs.labels), len(prepared.labels)), np.nan),
                    made_up=True,
                )


def _rows(name: str, network: Network, dataset: Dataset, familiarity: Familiarity) -> Rows:
    text_there = dataset.text_mask is None or bool(dataset.text_mask.any())
    heard = bool(dataset.audio)
    nothing = np.full((len(dataset.labels), network.config.classes), np.nan)

    def logits(version: str | None, *, with_text: bool) -> Float64:
        return predict(network, dataset, version=version, with_text=with_text).astype(np.float64)

    number, before = np.zeros((2, len(dataset.labels)), np.int64)
    for dialogue, members in enumerate(dataset.dialogues):
        number[members], before[members] = dialogue, np.arange(len(members))
    unknown = np.full(len(dataset.labels), np.nan)
    return Rows(
        name,
        dataset.labels,
        number,
        text=logits(None, with_text=True) if text_there else nothing,
        audio=logits(PLAIN, with_text=False) if heard else nothing,
        both=logits(PLAIN, with_text=True) if heard and text_there else nothing,
        familiarity=familiarity(dataset.audio_given(PLAIN)) if heard else unknown,
        heard=before,
    )


def _made_up(words: Dataset, voices: Dataset) -> Dataset:
    """The words with a voice of another label each, drawn once."""
    draw = np.random.default_rng(0)
    every = np.arange(len(voices.labels))
    chosen = [
        int(draw.choice(every[(voices.labels != label) & voices.labelled]))
        for label in words.labels
    ]
    audio = voices.audio_given(PLAIN)[chosen]
    mask = np.ones(len(chosen), bool)
    return replace(words, audio={PLAIN: audio}, audio_mask=mask, baseline=None)


def calibrate(rows: Sequence[Rows]) -> Calibration:
    """What all rows say of words, of voices and of both; of words alone, the main dialogues."""

    def joined(name: str) -> Any:
        return np.concatenate([getattr(one, name) for one in rows])

    corpora = [one.corpus for one in rows for _ in one.labels]
    found = fit_reliability(
        corpora=corpora,
        speakers=[str(n) for n in joined("speakers")],
        labels=joined("labels"),
        text=joined("text"),
        audio=joined("audio"),
        both=joined("both"),
        familiarity=joined("familiarity"),
        heard=joined("heard"),
        made_up={one.corpus: MADE_UP for one in rows if one.made_up},
    )
    words = next((one for one in rows if np.isnan(one.audio).all() and not one.made_up), None)
    return found if words is None else _with_words(found, words)


def measure(rows: Sequence[Rows], calibration: Calibration) -> dict[str, Any]:
    """By corpus, what the calibrated answers to networks that never heard it are worth.

    "uar" is of the corpus's own labels, "uar_heard" the same by HEARD, "by_words" the weighted F1
    of the words alone.
    """
    return {one.corpus: _measured(one, calibration) for one in rows}


def _measured(one: Rows, calibration: Calibration) -> dict[str, Any]:
    known = one.labels != NO_LABEL
    labels = one.labels[known]
    given: dict[Pattern, Float64] = {"audio+text": one.both, "audio": one.audio, "text": one.text}
    pattern, logits = next((p, rows[known]) for p, rows in given.items() if np.isfinite(rows).all())
    patterns = [pattern] * len(labels)
    words = one.text[known] if np.isfinite(one.text).all() else None
    familiarity, means = _running_means(one, calibration)
    probabilities = calibration.probabilities(
        logits,
        pattern=patterns,
        words=words,
        familiarity=familiarity[known],
        mean_telling=means[known],
    )
    own = np.unique(labels)
    likeliest, group = own[probabilities[:, own].argmax(1)], np.digitize(one.heard[known], HEARD)
    answers, wrong = probabilities.argmax(1), probabilities.argmax(1) != labels
    answered = ~calibration.abstains(probabilities, pattern=patterns)
    inside = calibration.label_sets(probabilities, pattern=patterns)
    return {
        "given": pattern,
        "utterances": len(labels),
        "uar": unweighted_recall(labels, likeliest),
        "uar_heard": {
            str(first): unweighted_recall(labels[there], likeliest[there])
            for n, first in enumerate(HEARD, start=1)
            if (there := group == n).sum() >= FEWEST
        },
        "weighted_f1": weighted_f1(labels, answers),
        "by_words": None if words is None else weighted_f1(labels, words.argmax(1)),
        "ece": calibration_error(labels, probabilities),
        "set_coverage": float(inside[np.arange(len(labels)), labels].mean()),
        "abstention": float(1.0 - answered.mean()),
        "risk": float(wrong[answered].mean()) if answered.any() else None,
    }


def _running_means(one: Rows, calibration: Calibration) -> tuple[Float64, Float64]:
    if calibration.reliability is None:
        return one.familiarity, np.full(len(one.labels), np.nan)
    order = np.lexsort((one.heard, one.speakers))
    starts = np.flatnonzero(np.diff(one.speakers[order])) + 1
    return calibration.running_means(one.familiarity, one.text, dialogues=np.split(order, starts))


def _with_words(found: Calibration, rows: Rows) -> Calibration:
    """Sets and abstention of words alone hold for dialogues: clips' words say next to nothing."""
    known = rows.labels != NO_LABEL
    labels, count = rows.labels[known], int(known.sum())
    patterns: list[Pattern] = ["text"] * count
    probabilities = found.probabilities(rows.text[known], pattern=patterns, words=rows.text[known])
    sample = Sample.of(
        probabilities,
        labels,
        np.full(count, 1.0 / count),
        clips=np.arange(count),
        speakers=rows.speakers[known],
        corpora=np.zeros(count, np.int64),
    )
    threshold, least = set_threshold(sample, found.coverage), answers_above(sample, found.risk)
    return found.model_copy(
        update={
            "thresholds": {**found.thresholds, "text": threshold},
            "answers_above": {**found.answers_above, "text": least},
        }
    )


def _shares(rows: Sequence[Rows], *, classes: int) -> list[float]:
    """Each label's share, every real corpus counting the same."""
    shares = [
        np.bincount(known, minlength=classes) / len(known)
        for one in rows
        if not one.made_up and len(known := one.labels[one.labels != NO_LABEL])
    ]
    mean: Float64 = np.mean(shares, axis=0)
    return [round(float(share), 4) for share in mean]
