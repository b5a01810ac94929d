"""Training: acted voices of several corpora, measured as live use would hear them.

All corpora and all their classes weigh the same, whatever their size. Everything is fitted on
train; test clips are never measured here: they are judged through the live path.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.corpora.augment import (
    CONDITIONS,
    NoisesAndRooms,
    evaluation_condition,
    read_noises_and_rooms,
    training_conditions,
)
from stream_hbaf.corpora.cache import EncodeTexts
from stream_hbaf.corpora.clips import ClipJob
from stream_hbaf.corpora.dataset import Dataset, label_indices
from stream_hbaf.corpora.dialogue import LABELS, LabelledUtterance, Split
from stream_hbaf.corpora.extraction import extract_features
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import CorpusError
from stream_hbaf.features.acoustic import COMPARE
from stream_hbaf.features.commonsense import Event2MindHeads, NoCommonsense
from stream_hbaf.features.representations import shape_for
from stream_hbaf.features.scaling import Scaling
from stream_hbaf.training.batches import Acted
from stream_hbaf.training.preparation import Progress
from stream_hbaf.training.recipe import MixtureRecipe
from stream_hbaf.training.selection import fit_components, scale

Float32 = NDArray[np.float32]

READ = ("ravdess", "tess")  # their words are English, which is what the text encoder reads
JOINED = "compare"  # these columns become components, if they come first; all others are kept
PARTS: tuple[Split, ...] = ("train", "dev")


@dataclass(frozen=True)
class Clips:
    """One corpus's clips of one split, measured and scaled."""

    corpus: str
    utterances: tuple[LabelledUtterance, ...]
    audio: Mapping[str, Float32]  # by condition or number of the version, [N, A] each


@dataclass(frozen=True)
class Voices:
    """What is heard, and how to scale it."""

    scaling: Scaling
    train: tuple[Clips, ...]
    dev: tuple[Clips, ...]  # of the corpora that have a dev split


def prepare_voices(
    recipe: MixtureRecipe, corpora: Path, *, cache: Path, progress: Progress
) -> Voices:
    """Measure train's and dev's clips, find components on train, scale everything by train.

    Raises CorpusError for a corpus that can't be read, and if none has a dev split.
    """
    parts = {
        (name, split): tuple(d.utterances[0] for d in corpus.splits[split])
        for name, corpus in ((v, open_corpus(v, corpora, all_splits=False)) for v in recipe.voices)
        for split in PARTS
    }
    if not any(parts[name, "dev"] for name in recipe.voices):
        raise CorpusError(
            f"{corpora}: none of {', '.join(recipe.voices)} has a dev split; add a corpus to voices"
        )
    sounds = read_noises_and_rooms(corpora / "speech")
    measured = {
        (name, split): _measure(
            name, split, clips, recipe=recipe, sounds=sounds, cache=cache, progress=progress
        )
        for (name, split), clips in parts.items()
        if clips
    }
    scaling = _fit_scaling(recipe, [measured[name, "train"] for name in recipe.voices])
    scaled: dict[Split, list[Clips]] = {split: [] for split in PARTS}
    for (_, split), clips in measured.items():
        audio = {version: scale(scaling, rows) for version, rows in clips.audio.items()}
        scaled[split].append(replace(clips, audio=audio))
    return Voices(scaling, tuple(scaled["train"]), tuple(scaled["dev"]))


def acted_material(
    clips: Clips, *, encode: EncodeTexts, heads: Event2MindHeads | NoCommonsense
) -> Dataset:
    """Clips with their sound and, where they are English, their words; each is a dialogue."""
    read = clips.corpus in READ
    text = encode([utterance.text if read else "" for utterance in clips.utterances])
    return Dataset(
        labels=label_indices(clips.utterances, LABELS),
        text=text,
        commonsense=heads.infer(text),
        audio=clips.audio,
        dialogues=tuple(np.arange(len(text))[:, None]),
        text_mask=np.full(len(text), read),
    )


def acted_lessons(
    every: tuple[Clips, ...], *, encode: EncodeTexts, heads: Event2MindHeads | NoCommonsense
) -> Acted:
    """All corpora's train clips together; dialogues are speakers."""
    parts = [acted_material(clips, encode=encode, heads=heads) for clips in every]
    speakers = np.array([f"{c.corpus} {u.speaker}" for c in every for u in c.utterances])
    material = Dataset(
        labels=np.concatenate([part.labels for part in parts]),
        text=np.concatenate([part.text for part in parts]),
        commonsense=np.concatenate([part.commonsense for part in parts]),
        audio={
            version: np.concatenate([part.audio[version] for part in parts])
            for version in parts[0].audio
        },
        dialogues=tuple(np.flatnonzero(speakers == name) for name in np.unique(speakers)),
        text_mask=np.concatenate([part.text_mask for part in parts if part.text_mask is not None]),
    )
    return Acted(material, weigh([part.labels for part in parts]))


def weigh(labels: list[NDArray[np.int64]]) -> Float32:
    """Weights of all clips, 1 on average: every class of every corpus weighs the same."""
    weights = []
    for of_corpus in labels:
        counts = np.bincount(of_corpus)
        weights.append(1.0 / counts[of_corpus])
    together = np.concatenate(weights)
    every: Float32 = (together / together.mean()).astype(np.float32)
    return every


def _measure(
    corpus: str,
    split: Split,
    utterances: tuple[LabelledUtterance, ...],
    *,
    recipe: MixtureRecipe,
    sounds: NoisesAndRooms,
    cache: Path,
    progress: Progress,
) -> Clips:
    """Each version's features, [N, W]: train's as recorded and augmented, dev's by condition.

    Clips that can't be measured are named by ``progress`` and left out. Raises CorpusError if none
    can be measured.
    """
    config = recipe.acoustics
    if split == "train":
        names = [str(n) for n in range(1 + config.copies)]
        conditions = [training_conditions(n, config) for n in range(len(utterances))]
    else:
        names = list(CONDITIONS)
        conditions = [
            [evaluation_condition(name, n) for name in names] for n in range(len(utterances))
        ]

    def show(done: int, total: int, clip: Path) -> None:
        if done % 100 == 0 or done == total:
            progress(f"{recipe.audio}: {done} of {total} clips, {clip.name}")

    extracted = extract_features(
        [
            ClipJob(utterance.id, utterance.audio, segmented=True, condition=condition)
            for utterance, versions in zip(utterances, conditions, strict=True)
            for condition in versions
        ],
        representation=recipe.audio,
        cache=cache,
        workers=config.workers,
        sounds=sounds,
        progress=show,
    )
    for skipped in extracted.skipped:
        progress(f"skipped: {skipped}")
    rows = shape_for(extracted.features, representation=recipe.audio, tokens=recipe.takes_tokens)
    whole = np.isfinite(extracted.features).any(axis=1).reshape(-1, len(names)).all(axis=1)
    measured = np.flatnonzero(whole)
    if not len(measured):
        raise CorpusError(
            f"{corpus}: no clip of {split} can be measured; the first: {extracted.skipped[0]}"
        )
    return Clips(
        corpus,
        tuple(utterances[row] for row in measured),
        {name: rows[n :: len(names)][measured] for n, name in enumerate(names)},
    )


def _fit_scaling(recipe: MixtureRecipe, train: Sequence[Clips]) -> Scaling:
    labels = [label_indices(clips.utterances, LABELS) for clips in train]
    rows = [np.stack(list(clips.audio.values()), axis=1) for clips in train]  # [N, versions, ..]
    versions, *shape = rows[0].shape[1:]
    return fit_components(
        np.concatenate(rows).reshape(-1, *shape),
        weights=np.repeat(weigh(labels), versions),
        among=COMPARE.functionals_width if recipe.audio.split("+")[0] == JOINED else 0,
        components=recipe.components,
    )
