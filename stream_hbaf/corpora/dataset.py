"""Training: utterances as features, one a row, and how dialogues of them become a network's input.

Shape letters: N utterances of a split, B dialogues, U utterances of the longest of them. For a
network that takes tokens each [.., L] here is [.., T, L], and each [.., A] is [.., F, A].
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stream_hbaf.corpora.dialogue import Dialogue, LabelledUtterance
from stream_hbaf.networks.network import Network
from stream_hbaf.networks.state import Features

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]

NO_LABEL = -1  # of an utterance that is context only, and of padding


@dataclass(frozen=True)
class Material:
    """Utterances of one split as features, one a row, and the dialogues that they stand in."""

    labels: NDArray[np.int64]  # [N], NO_LABEL: heard by the network, not by the loss
    text: Float32  # [N, L]
    commonsense: Float32  # [N, 3, K]
    audio: Mapping[str, Float32]  # by version of the sound, "" if it has one: [N, A]; or empty
    dialogues: tuple[Rows, ...]
    audio_mask: Flags | None = None  # [N], where there is sound; None: everywhere
    text_mask: Flags | None = None  # [N], where there are words; None: everywhere
    speakers: NDArray[np.int64] | None = None  # [N], in order of appearance; None: one a dialogue

    @property
    def labelled(self) -> Flags:
        """[N], the utterances that count."""
        counted: Flags = self.labels != NO_LABEL
        return counted

    @property
    def known_labels(self) -> NDArray[np.int64]:
        """[n], the labels of the utterances that count."""
        return self.labels[self.labelled]

    @property
    def words(self) -> Float32:
        """[n, L], the text features of the utterances that have words, or all their tokens."""
        said = self.text if self.text_mask is None else self.text[self.text_mask]
        if said.ndim == 2:
            return said
        return said[np.isfinite(said[..., 0])].astype(np.float32)


def lay_out(dialogues: Sequence[Rows]) -> Rows:
    """Rows of dialogues of any length as one table [B, U]; -1 is padding."""
    table = np.full((len(dialogues), max(map(len, dialogues))), -1, dtype=np.intp)
    for row, dialogue in enumerate(dialogues):
        table[row, : len(dialogue)] = dialogue
    return table


def features_of(
    material: Material, index: Rows, *, audio: Float32 | None, hears: Flags, reads: Flags
) -> Features:
    """The network's input for a table [B, U] of rows, with ``audio`` [B, U, A] where it hears."""
    return Features(
        audio=None if audio is None else torch.from_numpy(audio).float(),
        text=torch.from_numpy(material.text[index]).float(),  # tokens are kept in half the width
        commonsense=torch.from_numpy(material.commonsense[index]),
        audio_mask=torch.from_numpy(hears),
        text_mask=torch.from_numpy(reads),
        utterance_mask=torch.from_numpy(index >= 0),
        speaker=None if material.speakers is None else torch.from_numpy(material.speakers[index]),
    )


def whole_features(
    material: Material, index: Rows, *, version: str | None, reads: bool = True
) -> Features:
    """All that ``material`` holds of a table [B, U] of rows; a version of None is without sound."""
    there = index >= 0
    audio = None if version is None else material.audio[version][index]
    hears = there if audio is not None else np.zeros_like(there)
    if material.audio_mask is not None:
        hears = hears & material.audio_mask[index]
    said = there if material.text_mask is None else there & material.text_mask[index]
    return features_of(
        material, index, audio=audio, hears=hears, reads=said if reads else np.zeros_like(there)
    )


def labels_of(material: Material, index: Rows) -> Tensor:
    """Labels [B, U] of a table of rows, NO_LABEL in padding."""
    return torch.from_numpy(np.where(index >= 0, material.labels[index], NO_LABEL))


def predict(
    network: Network,
    material: Material,
    *,
    version: str | None,
    reads: bool = True,
    batch: int = 64,
) -> Float32:
    """Logits [N, C] of all utterances, given their sound in ``version`` (None: not) and text.

    The network is used as it is: call ``eval()`` before.
    """
    logits = np.zeros((len(material.labels), network.config.classes), np.float32)
    by_length = sorted(material.dialogues, key=len)  # little padding
    for start in range(0, len(by_length), batch):
        index = lay_out(by_length[start : start + batch])
        features = whole_features(material, index, version=version, reads=reads)
        with torch.inference_mode():
            said = network(on_device_of(network, features)).logits.float().cpu().numpy()
        there = index >= 0
        logits[index[there]] = said[there]
    return logits


def on_device_of(network: Network, features: Features) -> Features:
    """The same features where the network's weights are."""
    device = next(network.parameters()).device
    return features if device.type == "cpu" else features.map(lambda part: part.to(device))


def balance(labels: NDArray[np.int64], *, classes: int) -> Tensor:
    """Weights [C] under which all classes that are there count the same, 1 on average."""
    known = labels[labels != NO_LABEL]
    counts = np.bincount(known, minlength=classes)
    there = max(1, int((counts > 0).sum()))
    weights = np.where(counts > 0, len(known) / np.maximum(counts, 1) / there, 0.0)
    return torch.from_numpy(weights.astype(np.float32))


def digest_of_material(material: Material) -> str:
    """Names all that a network is given, so that another training's checkpoint isn't taken up."""
    digest = hashlib.sha256(repr([rows.tolist() for rows in material.dialogues]).encode())
    optional = (material.audio_mask, material.text_mask, material.speakers)
    arrays = [material.labels, material.text, material.commonsense, *material.audio.values()]
    for array in [*arrays, *(some for some in optional if some is not None)]:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def utterances_of(dialogues: Sequence[Dialogue]) -> list[LabelledUtterance]:
    return [utterance for dialogue in dialogues for utterance in dialogue.utterances]


def rows_of(dialogues: Sequence[Dialogue]) -> tuple[NDArray[np.intp], ...]:
    """Each dialogue's rows among all utterances."""
    ends = np.cumsum([len(dialogue.utterances) for dialogue in dialogues])
    return tuple(np.split(np.arange(ends[-1]), ends[:-1]))


def number_speakers(dialogues: Sequence[Dialogue]) -> NDArray[np.int64]:
    """Each utterance's speaker, in the order in which they appear in its dialogue."""
    numbers: list[int] = []
    for dialogue in dialogues:
        known = list(dict.fromkeys(utterance.speaker for utterance in dialogue.utterances))
        numbers += [known.index(utterance.speaker) for utterance in dialogue.utterances]
    return np.array(numbers, dtype=np.int64)


def label_indices(
    utterances: Sequence[LabelledUtterance], labels: tuple[str, ...]
) -> NDArray[np.int64]:
    indices = [NO_LABEL if u.label is None else labels.index(u.label) for u in utterances]
    return np.array(indices, dtype=np.int64)
