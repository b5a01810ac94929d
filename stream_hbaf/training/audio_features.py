"""Training: a corpus's sound as its network hears it, one row an utterance or one a token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.corpora.dataset import NO_LABEL, Flags
from stream_hbaf.corpora.dialogue import Corpus, Split
from stream_hbaf.corpora.extraction import extract_corpus
from stream_hbaf.errors import CorpusError
from stream_hbaf.features.representations import shape_for
from stream_hbaf.features.scaling import Scaling
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.selection import fit_scaling, scale

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]

SELECTED = ("compare",)  # representations of thousands of columns, most of which tell nothing


@dataclass(frozen=True)
class Sound:
    """What is heard of each split, and where anything is; nothing for a recipe without sound."""

    scaling: Scaling | None = None
    features: Mapping[Split, Float32] = field(default_factory=dict)  # [N, A], or tokens [N, F, A]
    there: Mapping[Split, Flags] = field(default_factory=dict)  # [N]
    skipped: tuple[str, ...] = ()  # utterances without sound, and why


def prepare_sound(
    corpus: Corpus, recipe: Recipe, *, device: str, cache: Path, progress: Progress
) -> Sound:
    """Measure the corpus's sound and scale it by train's. Raises CorpusError if train has none."""
    if recipe.audio == "none":
        return Sound()

    def tell(done: int, every: int, clip: Path) -> None:
        if done % 500 == 0 or done == every:
            progress(f"{recipe.audio}: {done} of {every} clips")

    extracted = extract_corpus(
        corpus,
        representation=recipe.audio,
        cache=cache,
        workers=recipe.fitting.workers,
        device=device,
        progress=tell,
    )
    if extracted.leftovers:
        progress(extracted.leftovers)
    if extracted.skipped:
        progress(f"{recipe.audio}: {len(extracted.skipped)} without; {extracted.skipped[0]}")
    if not np.isfinite(extracted.features["train"]).any():
        raise CorpusError(f"{corpus.name}: no utterance of train has any sound to measure")
    measured = {
        split: shape_for(rows, representation=recipe.audio, tokens=recipe.takes_tokens)
        for split, rows in extracted.features.items()
    }
    plan = recipe.selection if recipe.audio in SELECTED else None
    scaling = fit_scaling(measured["train"], _labels(corpus), plan)
    return Sound(
        scaling,
        {split: scale(scaling, rows) for split, rows in measured.items()},
        {
            split: np.asarray(np.isfinite(rows).any(axis=1))
            for split, rows in extracted.features.items()
        },
        tuple(str(skipped) for skipped in extracted.skipped),
    )


def _labels(corpus: Corpus) -> NDArray[np.int64]:
    every = [said for dialogue in corpus.splits["train"] for said in dialogue.utterances]
    labels = [NO_LABEL if u.label is None else corpus.labels.index(u.label) for u in every]
    return np.array(labels, dtype=np.int64)
