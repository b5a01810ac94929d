"""Training: what a finished bundle says of a recorded corpus, with the corpus's own words.

A bundle judges by what it holds: its encoder and how much of the dialogue that reads, its
commonsense, its scaling of sound, its calibration. Both modes go through the network's
``forward``, which in live mode builds the windows that the live recogniser would have had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.bundle import NONE, Bundle
from stream_hbaf.corpora.cache import cached_dialogue_encoder, infer_commonsense
from stream_hbaf.corpora.dataset import (
    Dataset,
    Flags,
    label_indices,
    number_speakers,
    predict,
    rows_of,
    utterances_of,
)
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, Split
from stream_hbaf.corpora.extraction import extract_corpus
from stream_hbaf.errors import BundleError, CorpusError
from stream_hbaf.evaluation.metrics import Labels, Probabilities
from stream_hbaf.features.commonsense import RELATIONS
from stream_hbaf.features.context import Turn
from stream_hbaf.features.representations import shape_for
from stream_hbaf.networks.calibration import patterns_of

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Judged:
    """A bundle's predictions of a split's N labelled utterances, dialogue by dialogue."""

    ids: tuple[str, ...]
    gold: Labels  # [N]
    probabilities: Probabilities  # [N, C], calibrated, in the order of the corpus's labels
    turns: Labels  # [N], the place in the dialogue, from 1
    words: Labels  # [N], what a blank separates
    dialogues: Labels  # [N], the number of the dialogue
    heard: int  # labelled utterances of which there was sound, or prosody


def predict_corpus(
    bundle: Bundle,
    corpus: Corpus,
    split: Split,
    *,
    cache: Path,
    device: str = "cpu",
    workers: int = 2,
    batch: int = 64,
    progress: Progress = print,
) -> Judged:
    """Predict every labelled utterance of a split; the unlabelled ones are read as context.

    ``batch`` is dialogues at once. Text and sound features are kept in ``cache``. Raises
    BundleError if the bundle's labels aren't the corpus's, CorpusError if nothing is labelled.
    """
    require_labels(bundle, corpus)
    one = replace(corpus, splits={split: corpus.splits[split]})
    sound = _hear(
        bundle, one, split, cache=cache, device=device, workers=workers, progress=progress
    )
    material = _gather(bundle, one, split, sound=sound, cache=cache)
    if not material.labelled.any():
        raise CorpusError(f"{corpus.name}: its {split} split has no labelled utterance to judge")
    version = None if sound is None else ""
    logits = predict(bundle.network, material, version=version, batch=batch)[material.labelled]
    if not np.isfinite(logits).all():
        raise BundleError(f"bundle {bundle.id}: its network gives NaN; train it again")
    return _judged(bundle, one, split, material=material, logits=logits)


def require_labels(bundle: Bundle, corpus: Corpus) -> None:
    """Raise BundleError naming both sets of labels if they aren't the same."""
    if set(bundle.labels) != set(corpus.labels):
        raise BundleError(
            f"bundle {bundle.id}: says {', '.join(bundle.labels)}, but {corpus.name} has "
            f"{', '.join(corpus.labels)}; judge it on the corpus that it was trained for"
        )


def _hear(
    bundle: Bundle,
    corpus: Corpus,
    split: Split,
    *,
    cache: Path,
    device: str,
    workers: int,
    progress: Progress,
) -> Float32 | None:
    """Scaled sound features [N, A], or tokens [N, F, A], NaN where there is none; None if none
    are heard."""
    acoustic = bundle.config.acoustic_input
    if acoustic == NONE:
        return None
    utterances = utterances_of(corpus.splits[split])
    given = [u.prosody if acoustic == "prosody" else u.audio for u in utterances]
    if all(one is None for one in given) and bundle.config.network.use_text:
        kind = "measurements of prosody" if acoustic == "prosody" else "clips"
        progress(f"{corpus.name}: no {kind} are there, so bundle {bundle.id} judges by words alone")
        return None

    def tell(done: int, total: int, clip: Path) -> None:
        if done % 100 == 0 or done == total:
            progress(f"sound: {done} of {total} clips, {clip.name}")

    extracted = extract_corpus(
        corpus,
        representation=acoustic,
        cache=cache / "audio",  # as training does, so that both share it
        workers=workers,
        device=device,
        progress=tell,
    )
    if extracted.leftovers:
        progress(extracted.leftovers)
    if extracted.skipped:
        progress(f"{len(extracted.skipped)} without sound, the first is {extracted.skipped[0]}")
    takes = bundle.config.network.takes_tokens
    rows = shape_for(extracted.features[split], representation=acoustic, tokens=takes)
    there = np.isfinite(rows).any(axis=-1)
    heard = np.full((*there.shape, bundle.config.network.audio_width), np.nan, np.float32)
    heard[there] = bundle.scale(rows[there])
    return heard


def _gather(
    bundle: Bundle, corpus: Corpus, split: Split, *, sound: Float32 | None, cache: Path
) -> Dataset:
    """The split's features as the network takes them, context included."""
    dialogues = corpus.splits[split]
    utterances = utterances_of(dialogues)
    text, commonsense = _read(bundle, dialogues, cache=cache)
    heard: Flags | None = None
    if sound is not None:
        heard = np.asarray(np.isfinite(sound.reshape(len(sound), -1)).any(axis=1))
    return Dataset(
        labels=label_indices(utterances, corpus.labels),
        text=text,
        commonsense=commonsense,
        audio={} if sound is None else {"": sound},
        dialogues=rows_of(dialogues),
        audio_mask=heard,
        text_mask=np.array([bool(u.text.strip()) for u in utterances]),
        speakers=number_speakers(dialogues),
    )


def _judged(
    bundle: Bundle, corpus: Corpus, split: Split, *, material: Dataset, logits: Float32
) -> Judged:
    """The labelled utterances alone, with what the report sorts them by."""
    said = utterances_of(corpus.splits[split])
    lengths = [len(rows) for rows in material.dialogues]
    counted = material.labelled
    heard = np.zeros(len(said), bool) if material.audio_mask is None else material.audio_mask
    columns = [bundle.labels.index(label) for label in corpus.labels]
    reads = np.full(len(said), bundle.config.network.use_text)
    if material.text_mask is not None:
        reads = reads & material.text_mask
    patterns = patterns_of(audio=heard[counted], text=reads[counted])
    return Judged(
        ids=tuple(u.id for u, counts in zip(said, counted, strict=True) if counts),
        gold=material.labels[counted],
        probabilities=bundle.probabilities(logits, pattern=patterns)[:, columns],
        turns=np.concatenate([np.arange(1, n + 1) for n in lengths])[counted],
        words=np.array([len(u.text.split()) for u in said])[counted],
        dialogues=np.repeat(np.arange(len(lengths)), lengths)[counted],
        heard=int(heard[counted].sum()),
    )


def _read(bundle: Bundle, dialogues: Sequence[Dialogue], *, cache: Path) -> tuple[Float32, Float32]:
    """Text features [N, L] and commonsense [N, 3, K]; zeros for a network that reads nothing."""
    said = [utterance.text for utterance in utterances_of(dialogues)]
    network = bundle.config.network
    if not network.use_text:
        relations = np.zeros((len(said), len(RELATIONS), network.commonsense_width), np.float32)
        return np.zeros((len(said), network.text_width), np.float32), relations
    turns = [tuple(Turn(u.speaker, u.text) for u in dialogue.utterances) for dialogue in dialogues]
    text = cached_dialogue_encoder(bundle.encoder, cache / "text")(turns)
    return text, infer_commonsense(
        bundle.commonsense, said, features=text, cache=cache / "commonsense"
    )
