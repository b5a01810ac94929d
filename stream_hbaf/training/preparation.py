"""Training, first half: corpora become features, by the very code that live use has.

What takes minutes is cached under names made of all it depends on: encodings, tuned layers.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.svm import LinearSVC
from torch import Tensor

from stream_hbaf.bundle import Scaling
from stream_hbaf.config import Positive, Section
from stream_hbaf.corpora.acoustics import (
    CONDITIONS,
    AcousticsConfig,
    Take,
    measure,
    reported_takes,
    training_takes,
)
from stream_hbaf.corpora.augment import read_surroundings
from stream_hbaf.corpora.dialogue import LABELS, SPLITS, Dialogue, LabelledUtterance, Split
from stream_hbaf.corpora.event2mind import read_event2mind
from stream_hbaf.corpora.ravdess import read_ravdess
from stream_hbaf.errors import CorpusError
from stream_hbaf.features.commonsense import Event2MindHeads
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.training.distillation import (
    Encode,
    HeadsConfig,
    gather,
    measure_heads,
    train_heads,
)
from stream_hbaf.training.fitting import Material
from stream_hbaf.training.tuning import Labelled, TuningConfig, tune_encoder

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


class SelectionConfig(Section):
    """Which functionals are kept, by a linear SVM's weights (decision 9)."""

    width: Positive = 512
    penalty: float = 1e-4  # the SVM's C
    iterations: Positive = 200


@dataclass(frozen=True)
class Acted:
    """RAVDESS, measured: how to scale it, and each split's clips by condition or version."""

    scaling: Scaling
    utterances: Mapping[Split, tuple[LabelledUtterance, ...]]
    audio: Mapping[Split, Mapping[str, Float32]]  # scaled, [N, A] each


def remember(encoder: TextEncoder, cache: Path) -> Encode:
    """The encoder's ``encode``, its results kept on disk."""
    digest = hashlib.sha256()
    for tensor in encoder.model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    weights = digest.hexdigest()

    def encode(texts: Sequence[str]) -> Float32:
        file = cache / f"{_key(weights, *texts)}.npy"
        if not file.exists():
            _write_whole(file, lambda part: _save_array(part, encoder.encode(texts)))
        features: Float32 = np.load(file)
        return features

    return encode


def prepare_layers(
    name: str,
    spoken: Mapping[Split, Sequence[Dialogue]],
    plan: TuningConfig,
    *,
    cache: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """The encoder's top layers, fine-tuned on the dialogues' words; float16, by name."""
    if not plan.layers:
        return {}
    train, dev = _labelled(spoken["train"]), _labelled(spoken["dev"])
    file = cache / f"{_key(name, repr(plan), repr(train), repr(dev))}.safetensors"
    if not file.exists():
        tuned = tune_encoder(TextEncoder(name), train=train, dev=dev, plan=plan, progress=progress)
        _write_whole(file, lambda part: save_file(tuned.tensors, part))
    return load_file(file)


def prepare_heads(
    folder: Path, plan: HeadsConfig, *, encode: Encode, encode_phrases: Encode, progress: Progress
) -> tuple[Event2MindHeads, dict[str, Any]]:
    """Commonsense heads in the precision of a bundle, and their figures on dev and test."""
    splits = {
        split: gather(read_event2mind(folder, split), encode=encode, encode_phrases=encode_phrases)
        for split in SPLITS
    }
    heads = train_heads(splits["train"], splits["dev"], plan=plan, progress=progress)
    heads = heads.half().float()
    figures: dict[str, Any] = {
        split: {
            way: {relation: asdict(found) for relation, found in relations.items()}
            for way, relations in measure_heads(
                splits[split], splits["train"], heads, temperature=plan.temperature
            ).items()
        }
        for split in SPLITS[1:]
    }
    return heads, figures


def prepare_acted(
    corpora: Path,
    acoustics: AcousticsConfig,
    selection: SelectionConfig,
    *,
    cache: Path,
    progress: Progress,
) -> Acted:
    """Measure all clips, choose functionals on train, scale everything by train."""
    surroundings = read_surroundings(corpora / "speech")
    utterances = {
        split: tuple(d.utterances[0] for d in read_ravdess(corpora / "ravdess", split))
        for split in SPLITS
    }
    takes: dict[tuple[Split, str], list[Take]] = {}
    for split in SPLITS:
        clips = [u.audio for u in utterances[split] if u.audio is not None]
        if split == "train":
            takes[split, ""] = training_takes(clips, acoustics)
            continue
        for condition in CONDITIONS:
            takes[split, condition] = reported_takes(clips, condition=condition)
    every = measure(
        [take for listed in takes.values() for take in listed],
        surroundings=surroundings,
        cache=cache,
        workers=acoustics.workers,
        progress=progress,
    )
    ends = np.cumsum([len(listed) for listed in takes.values()])[:-1]
    measured = dict(zip(takes, np.split(every, ends), strict=True))
    versions = 1 + acoustics.copies
    labels = np.repeat(label_indices(utterances["train"]), versions)
    scaling = fit_scaling(measured["train", ""], labels, plan=selection)
    audio: dict[Split, dict[str, Float32]] = {split: {} for split in SPLITS}
    for (split, condition), rows in measured.items():
        if split == "train":
            scaled = scaling(rows)
            audio[split] = {str(n): scaled[n::versions] for n in range(versions)}
        else:
            audio[split][condition] = scaling(rows)
    return Acted(scaling, utterances, audio)


def fit_scaling(functionals: Float32, labels: NDArray[np.int64], plan: SelectionConfig) -> Scaling:
    """Standardise, then keep the functionals of the largest mean absolute SVM weight."""
    known = functionals[np.isfinite(functionals).all(axis=1)].astype(np.float64)
    mean, deviation = known.mean(0), known.std(0)
    usable = np.flatnonzero(deviation > 1e-9 * np.maximum(np.abs(mean), 1.0))
    everything = Scaling(
        selected=usable,
        mean=mean[usable].astype(np.float32),
        deviation=deviation[usable].astype(np.float32),
    )
    machine = LinearSVC(
        C=plan.penalty, class_weight="balanced", max_iter=plan.iterations, random_state=0
    )
    machine.fit(everything(functionals), labels)
    weights = np.abs(machine.coef_).mean(0)
    best = np.sort(np.argsort(-weights, kind="stable")[: plan.width])
    return Scaling(usable[best], everything.mean[best], everything.deviation[best])


def spoken_material(
    dialogues: Sequence[Dialogue], *, encode: Encode, heads: Event2MindHeads
) -> Material:
    """Dialogues with words and without sound."""
    utterances = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
    ends = np.cumsum([len(dialogue.utterances) for dialogue in dialogues])[:-1]
    text = encode([utterance.text for utterance in utterances])
    return Material(
        labels=label_indices(utterances),
        text=text,
        commonsense=heads.infer(text),
        audio={},
        dialogues=tuple(np.split(np.arange(len(utterances)), ends)),
    )


def acted_material(
    acted: Acted, split: Split, *, encode: Encode, heads: Event2MindHeads
) -> Material:
    """Clips with sound and their statements; train's dialogues are speakers, others' are clips."""
    utterances = acted.utterances[split]
    text = encode([utterance.text for utterance in utterances])
    speakers = np.array([utterance.speaker for utterance in utterances])
    rows = np.arange(len(utterances))
    by_speaker = tuple(np.flatnonzero(speakers == speaker) for speaker in np.unique(speakers))
    return Material(
        labels=label_indices(utterances),
        text=text,
        commonsense=heads.infer(text),
        audio=acted.audio[split],
        dialogues=by_speaker if split == "train" else tuple(rows[:, None]),
    )


def label_indices(utterances: Sequence[LabelledUtterance]) -> NDArray[np.int64]:
    return np.array([LABELS.index(utterance.label) for utterance in utterances], dtype=np.int64)


def _labelled(dialogues: Sequence[Dialogue]) -> Labelled:
    pairs = [(u.text, LABELS.index(u.label)) for d in dialogues for u in d.utterances]
    if not pairs:
        raise CorpusError("MELD: a split has no utterances; its file holds only a header")
    return pairs


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _save_array(file: Path, array: Float32) -> None:
    with file.open("wb") as out:
        np.save(out, array)


def _write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """All or nothing: a file that was cut short would look like a finished one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    write(unfinished)
    unfinished.replace(file)
