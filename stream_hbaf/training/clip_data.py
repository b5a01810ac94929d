"""Training: acted voices of several corpora, measured as live use would hear them.

All corpora and all their classes weigh the same, whatever their size. Everything is fitted on
train; test clips are never measured here: they are judged through the live path.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.corpora.acoustics import (
    CONDITIONS,
    measure,
    reported_takes,
    training_takes,
)
from stream_hbaf.corpora.augment import Surroundings, read_surroundings
from stream_hbaf.corpora.cache import Encode
from stream_hbaf.corpora.dataset import Dataset, label_indices
from stream_hbaf.corpora.dialogue import LABELS, LabelledUtterance, Split
from stream_hbaf.corpora.reading import open_corpus
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
        for name, corpus in ((v, open_corpus(v, corpora, whole=False)) for v in recipe.voices)
        for split in PARTS
    }
    if not any(parts[name, "dev"] for name in recipe.voices):
        raise CorpusError(
            f"{corpora}: none of {', '.join(recipe.voices)} has a dev split; add a corpus to voices"
        )
    surroundings = read_surroundings(corpora / "speech")
    measured = {
        (name, split): _measure(
            clips,
            split,
            recipe=recipe,
            surroundings=surroundings,
            cache=cache,
            progress=progress,
        )
        for (name, split), clips in parts.items()
        if clips
    }
    scaling = _fit_scaling(recipe, parts, measured)
    scaled: dict[Split, list[Clips]] = {split: [] for split in PARTS}
    for (name, split), versions in measured.items():
        audio = {version: scale(scaling, rows) for version, rows in versions.items()}
        scaled[split].append(Clips(name, parts[name, split], audio))
    return Voices(scaling, tuple(scaled["train"]), tuple(scaled["dev"]))


def acted_material(
    clips: Clips, *, encode: Encode, heads: Event2MindHeads | NoCommonsense
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
    every: tuple[Clips, ...], *, encode: Encode, heads: Event2MindHeads | NoCommonsense
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
    utterances: tuple[LabelledUtterance, ...],
    split: Split,
    *,
    recipe: MixtureRecipe,
    surroundings: Surroundings,
    cache: Path,
    progress: Progress,
) -> dict[str, Float32]:
    """Each version's features, [N, W]: train's as recorded and changed, dev's by condition."""
    clips = [utterance.audio for utterance in utterances if utterance.audio is not None]
    if split == "train":
        names = [str(n) for n in range(1 + recipe.acoustics.copies)]
        takes = training_takes(clips, recipe.acoustics)
    else:
        names = list(CONDITIONS)
        by_name = [reported_takes(clips, condition=condition) for condition in names]
        takes = [take for together in zip(*by_name, strict=True) for take in together]
    rows = measure(
        takes,
        representation=recipe.audio,
        surroundings=surroundings,
        cache=cache,
        workers=recipe.acoustics.workers,
        progress=progress,
    )
    rows = shape_for(rows, representation=recipe.audio, tokens=recipe.takes_tokens)
    return {name: rows[n :: len(names)] for n, name in enumerate(names)}


def _fit_scaling(
    recipe: MixtureRecipe,
    parts: Mapping[tuple[str, Split], tuple[LabelledUtterance, ...]],
    measured: Mapping[tuple[str, Split], Mapping[str, Float32]],
) -> Scaling:
    labels = [label_indices(parts[name, "train"], LABELS) for name in recipe.voices]
    rows = [
        np.stack(list(measured[name, "train"].values()), axis=1)  # [N, versions, ..]
        for name in recipe.voices
    ]
    versions, *shape = rows[0].shape[1:]
    return fit_components(
        np.concatenate(rows).reshape(-1, *shape),
        weights=np.repeat(weigh(labels), versions),
        among=COMPARE.functionals_width if recipe.audio.split("+")[0] == JOINED else 0,
        components=recipe.components,
    )
