"""Offline evaluation: a bundle's predictions for a recorded corpus, from its texts and clips.

Features and calibration are the bundle's own: its text encoder and context, its commonsense, its
scaling. Both modes go through the network's ``forward``, which in live mode gives each utterance
the window of past utterances that it has live.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import NONE, BundleConfig
from stream_hbaf.corpora.cache import cached_dialogue_encoder, infer_commonsense
from stream_hbaf.corpora.dataset import (
    Dataset,
    Flags,
    label_indices,
    number_speakers,
    predict,
    rows_of,
)
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, Split, has_sound, utterances_of
from stream_hbaf.corpora.extraction import extract_corpus
from stream_hbaf.errors import BundleError, CorpusError
from stream_hbaf.evaluation.metrics import Labels, Probabilities
from stream_hbaf.features.commonsense import RELATIONS
from stream_hbaf.features.representations import shape_for, without_incomplete
from stream_hbaf.features.text import Turn
from stream_hbaf.networks.calibration import patterns_of

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class OfflinePredictions:
    """A bundle's predictions of a split's N labelled utterances, dialogue by dialogue."""

    ids: tuple[str, ...]
    gold: Labels  # [N]
    probabilities: Probabilities  # [N, C], calibrated, in the order of the corpus's labels
    turns: Labels  # [N], the place in the dialogue, from 1
    words: Labels  # [N], number of words, which blanks separate
    dialogues: Labels  # [N], the number of the dialogue
    with_audio: int  # labelled utterances with audio features


@dataclass(frozen=True)
class System:
    """One system's bundles, one a seed, and the predictions of each for the same utterances."""

    name: str
    labels: tuple[str, ...]  # of the corpus: the order of all probabilities
    configs: tuple[BundleConfig, ...]
    sums: tuple[str, ...]  # SHA-256 of each bundle
    predictions: tuple[OfflinePredictions, ...]

    @property
    def probabilities(self) -> Probabilities:
        """[S, N, C]."""
        return np.stack([one.probabilities for one in self.predictions])


def predict_system(
    bundles: Sequence[str],
    corpus: Corpus,
    split: Split,
    *,
    cache: Path,
    device: str = "cpu",
    workers: int = 2,
    progress: Progress = print,
) -> System:
    """Predict a split with each of a system's bundles, folders or names, one a seed.

    Raises BundleError for a bundle that can't be loaded, or that belongs to another system than
    the first one; otherwise as ``predict_corpus``.
    """
    seeds: list[tuple[BundleConfig, str, OfflinePredictions]] = []
    for name in bundles:
        bundle = Bundle.load(name, device=device)  # one at a time: encoders are large
        progress(f"{name}: bundle {bundle.id}, {bundle.config.network.mode}")
        require_same_system([*(config for config, *_ in seeds), bundle.config])
        found = predict_corpus(
            bundle, corpus, split, cache=cache, device=device, workers=workers, progress=progress
        )
        seeds.append((bundle.config, bundle.sha256, found))
    name = ", ".join(dict.fromkeys(config.id for config, *_ in seeds))
    return System(name, corpus.labels, *zip(*seeds, strict=True))


def require_same_system(configs: Sequence[BundleConfig]) -> None:
    """Raise BundleError unless the bundles differ only in what training determined."""
    first, last = configs[0], configs[-1]
    trained = {"id", "temperature", "calibration", "licence"}  # what may differ from seed to seed
    if first.model_dump(exclude=trained) != last.model_dump(exclude=trained):
        raise BundleError(
            f"bundles {first.id} and {last.id}: not seeds of one system, their config.yaml differ; "
            "give the other system's bundles with --against"
        )


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
) -> OfflinePredictions:
    """Predict every labelled utterance of a split; the unlabelled ones are context.

    ``batch`` is dialogues at once. Text and audio features are kept in ``cache``. Raises
    BundleError if the bundle's labels aren't the corpus's, CorpusError if nothing is labelled.
    """
    if set(bundle.labels) != set(corpus.labels):
        raise BundleError(
            f"bundle {bundle.id}: predicts {', '.join(bundle.labels)}, but {corpus.name} has "
            f"{', '.join(corpus.labels)}; choose the corpus that it was trained on"
        )
    if not corpus.splits[split]:
        raise CorpusError(f"{corpus.name}: its {split} split is empty; choose another with --split")
    one = replace(corpus, splits={split: corpus.splits[split]})
    audio = measure_audio(
        bundle, one, split, cache=cache, device=device, workers=workers, progress=progress
    )
    dataset = _dataset(bundle, one, split, audio=audio, cache=cache)
    if not dataset.labelled.any():
        raise CorpusError(f"{corpus.name}: its {split} split has no labelled utterance; label some")
    probabilities = probabilities_of(bundle, dataset, batch=batch)
    return _labelled_predictions(bundle, one, split, dataset=dataset, probabilities=probabilities)


def measure_audio(
    bundle: Bundle,
    corpus: Corpus,
    split: Split,
    *,
    cache: Path,
    device: str,
    workers: int,
    progress: Progress,
) -> Float32 | None:
    """Scaled audio features [N, A], or tokens [N, F, A], NaN for an utterance without audio.

    None for a network that takes no audio, or where the split has none and the network takes text.
    """
    acoustic = bundle.config.acoustic_input
    if acoustic == NONE:
        return None
    dialogues = corpus.splits[split]
    enough = any if bundle.config.acoustic_widths else all  # of earlier bundles every part
    has_audio = enough(has_sound(dialogues, part) for part in acoustic.split("+"))
    if not has_audio and bundle.config.network.use_text:
        kind = "prosody" if acoustic == "prosody" else "audio"
        progress(f"{corpus.name}: has no {kind}, so bundle {bundle.id} is given text alone")
        return None

    def report(done: int, total: int, clip: Path) -> None:
        if done % 100 == 0 or done == total:
            progress(f"audio features: {done} of {total} clips, {clip.name}")

    extracted = extract_corpus(
        replace(corpus, splits={split: dialogues}),
        representation=acoustic,
        cache=cache / "audio",  # as training does, so that both share it
        workers=workers,
        device=device,
        progress=report,
    )
    if extracted.leftovers:
        progress(extracted.leftovers)
    if extracted.skipped:
        progress(f"{len(extracted.skipped)} without audio, the first is {extracted.skipped[0]}")
    takes = bundle.config.network.takes_tokens
    measured = extracted.features[split]
    if not bundle.config.acoustic_widths:
        measured = without_incomplete(measured, extracted.widths)
    rows = shape_for(measured, representation=acoustic, tokens=takes)
    audio_mask = np.isfinite(rows).any(axis=-1)
    scaled = np.full((*audio_mask.shape, bundle.config.network.audio_width), np.nan, np.float32)
    scaled[audio_mask] = bundle.scale(rows[audio_mask])
    return scaled


def _dataset(
    bundle: Bundle, corpus: Corpus, split: Split, *, audio: Float32 | None, cache: Path
) -> Dataset:
    """The split's features as the network takes them, context included."""
    dialogues = corpus.splits[split]
    utterances = utterances_of(dialogues)
    text, commonsense = _text_features(bundle, dialogues, cache=cache)
    present: Flags | None = None
    if audio is not None:
        present = np.asarray(np.isfinite(audio.reshape(len(audio), -1)).any(axis=1))
    return Dataset(
        labels=label_indices(utterances, corpus.labels),
        text=text,
        commonsense=commonsense,
        audio={} if audio is None else {"": audio},
        dialogues=rows_of(dialogues),
        audio_mask=present,
        text_mask=np.array([bool(u.text.strip()) for u in utterances]),
        speakers=number_speakers(dialogues),
        baseline=bundle.baseline,
    )


def probabilities_of(bundle: Bundle, dataset: Dataset, *, batch: int = 64) -> Probabilities:
    """Calibrated probabilities [N, C] of all utterances, in the order of the bundle's labels."""
    labelled, audio = dataset.labelled, dataset.audio.get("")
    logits = predict(bundle.network, dataset, version=None if audio is None else "", batch=batch)
    if not np.isfinite(logits[labelled]).all():
        raise BundleError(f"bundle {bundle.id}: its network gives NaN; train it again")
    text = dataset.text_mask if bundle.config.network.use_text else None
    words, familiarity, telling = None, None, None
    if bundle.weighs_voices and audio is not None:
        words = predict(bundle.network, dataset, version=None, batch=batch)
    if bundle.familiarity is not None and audio is not None and audio.ndim == 2:
        familiarity = bundle.familiarity(dataset.audio_given(""))
    if bundle.calibration.reliability is not None:
        read = None if words is None else np.where(_mask(text, dataset)[:, None], words, np.nan)
        known = np.full(len(logits), np.nan) if familiarity is None else familiarity
        familiarity, telling = bundle.calibration.running_means(
            known, read, dialogues=dataset.dialogues
        )
    return bundle.calibration.probabilities(
        logits,
        pattern=patterns_of(audio=_mask(dataset.audio_mask, dataset), text=_mask(text, dataset)),
        words=words,
        familiarity=familiarity,
        mean_telling=telling,
    )


def _mask(given: Flags | None, dataset: Dataset) -> Flags:
    """Where an input is given; nowhere if there is no mask."""
    return np.zeros(len(dataset.labels), bool) if given is None else given


def _labelled_predictions(
    bundle: Bundle, corpus: Corpus, split: Split, *, dataset: Dataset, probabilities: Probabilities
) -> OfflinePredictions:
    """The labelled utterances alone, with what the report sorts them by."""
    utterances = utterances_of(corpus.splits[split])
    lengths = [len(rows) for rows in dataset.dialogues]
    labelled = dataset.labelled
    columns = [bundle.labels.index(label) for label in corpus.labels]
    return OfflinePredictions(
        ids=tuple(u.id for u, counts in zip(utterances, labelled, strict=True) if counts),
        gold=dataset.labels[labelled],
        probabilities=probabilities[labelled][:, columns],
        turns=np.concatenate([np.arange(1, n + 1) for n in lengths])[labelled],
        words=np.array([len(u.text.split()) for u in utterances])[labelled],
        dialogues=np.repeat(np.arange(len(lengths)), lengths)[labelled],
        with_audio=int(_mask(dataset.audio_mask, dataset)[labelled].sum()),
    )


def _text_features(
    bundle: Bundle, dialogues: Sequence[Dialogue], *, cache: Path
) -> tuple[Float32, Float32]:
    """Text features [N, L] and commonsense [N, 3, K]; zeros for a network that takes no text."""
    texts = [utterance.text for utterance in utterances_of(dialogues)]
    network = bundle.config.network
    if not network.use_text:
        relations = np.zeros((len(texts), len(RELATIONS), network.commonsense_width), np.float32)
        return np.zeros((len(texts), network.text_width), np.float32), relations
    turns = [tuple(Turn(u.speaker, u.text) for u in dialogue.utterances) for dialogue in dialogues]
    text = cached_dialogue_encoder(bundle.encoder, cache / "text")(turns)
    return text, infer_commonsense(
        bundle.commonsense, texts, features=text, cache=cache / "commonsense"
    )
