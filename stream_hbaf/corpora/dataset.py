"""A split as a network's input: features, one row an utterance, and the dialogues of the rows.

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
from stream_hbaf.features.baseline import Baseline
from stream_hbaf.networks.network import Features, Network

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]

NO_LABEL = -1  # of an utterance that is context only, and of padding


@dataclass(frozen=True)
class Dataset:
    """The utterances of one split as features, one a row, and the dialogues of the rows."""

    labels: NDArray[np.int64]  # [N]; NO_LABEL: context for others, not part of the loss
    text: Float32  # [N, L]
    commonsense: Float32  # [N, 3, K]
    audio: Mapping[str, Float32]  # by augmentation ("" without any): [N, A]; empty: no audio
    dialogues: tuple[Rows, ...]
    audio_mask: Flags | None = None  # [N], True = has audio; None: all have
    text_mask: Flags | None = None  # [N], True = has text; None: all have
    speakers: NDArray[np.int64] | None = None  # [N], by first turn; None: one speaker a dialogue
    votes: Float32 | None = None  # [N, C], annotators' shares where there is no label; zero: none
    baseline: Baseline | None = None  # makes audio relative to its speaker's past; None: it isn't
    parts: tuple[str, ...] = ()  # of a corpus with parts, each dialogue's, such as "scripted"

    @property
    def labelled(self) -> Flags:
        """[N], True for utterances that have a label."""
        counted: Flags = self.labels != NO_LABEL
        return counted

    @property
    def known_labels(self) -> NDArray[np.int64]:
        """[n], the labels of the utterances that have one."""
        return self.labels[self.labelled]

    @property
    def text_features(self) -> Float32:
        """[n, L], the text features of the utterances that have text; of tokens, all tokens."""
        rows = self.text if self.text_mask is None else self.text[self.text_mask]
        if rows.ndim == 2:
            return rows
        return rows[np.isfinite(rows[..., 0])].astype(np.float32)

    def relative(self, audio: Float32, index: Rows, *, given: Flags) -> Float32:
        """Audio [B, U, A] of a table of rows as the network takes it: relative to the past.

        Utterances that aren't ``given`` [B, U] have none.
        """
        if self.baseline is None:
            return audio
        speakers = None if self.speakers is None else self.speakers[index]
        return self.baseline.relative_dialogues(audio, given, speakers)

    def audio_given(self, version: str) -> Float32:
        """[N, A], a version of the audio as the network is given it in whole dialogues."""
        audio = self.audio[version]
        if self.baseline is None:
            return audio
        changed = np.zeros_like(audio)
        for rows in self.dialogues:
            index = rows[None]
            there = (
                np.ones(index.shape, bool) if self.audio_mask is None else self.audio_mask[index]
            )
            changed[rows] = self.relative(audio[index], index, given=there)[0]
        return changed


def pad_dialogues(dialogues: Sequence[Rows]) -> Rows:
    """Rows of dialogues of any length as one table [B, U]; -1 is padding."""
    table = np.full((len(dialogues), max(map(len, dialogues))), -1, dtype=np.intp)
    for row, dialogue in enumerate(dialogues):
        table[row, : len(dialogue)] = dialogue
    return table


def features_of(
    dataset: Dataset, index: Rows, *, audio: Float32 | None, audio_mask: Flags, text_mask: Flags
) -> Features:
    """The network's input for a table [B, U] of rows: ``audio`` [B, U, A] and masks [B, U]."""
    return Features(
        audio=None if audio is None else torch.from_numpy(audio).float(),
        text=torch.from_numpy(dataset.text[index]).float(),  # tokens are kept in float16
        commonsense=torch.from_numpy(dataset.commonsense[index]),
        audio_mask=torch.from_numpy(audio_mask),
        text_mask=torch.from_numpy(text_mask),
        utterance_mask=torch.from_numpy(index >= 0),
        speaker=None if dataset.speakers is None else torch.from_numpy(dataset.speakers[index]),
    )


def all_features(
    dataset: Dataset, index: Rows, *, version: str | None, with_text: bool = True
) -> Features:
    """All features that ``dataset`` has for a table [B, U] of rows.

    ``version`` is a key of ``dataset.audio``, None masks all audio; ``with_text=False`` masks all
    text.
    """

    def mask(own: Flags | None, *, given: bool) -> Flags:
        present: Flags = (index >= 0) & given
        return present if own is None else present & own[index]

    audio = None if version is None else dataset.audio[version][index]
    audio_mask = mask(dataset.audio_mask, given=audio is not None)
    if audio is not None:
        audio = dataset.relative(audio, index, given=audio_mask)
    text_mask = mask(dataset.text_mask, given=with_text)
    return features_of(dataset, index, audio=audio, audio_mask=audio_mask, text_mask=text_mask)


def predict(
    network: Network,
    dataset: Dataset,
    *,
    version: str | None,
    with_text: bool = True,
    batch: int = 64,
) -> Float32:
    """Logits [N, C] of all utterances; ``version`` and ``with_text`` as in ``all_features``.

    ``batch`` counts dialogues. Call ``network.eval()`` before: the mode isn't changed here.
    """
    logits = np.zeros((len(dataset.labels), network.config.classes), np.float32)
    by_length = sorted(dataset.dialogues, key=len)  # little padding
    for start in range(0, len(by_length), batch):
        index = pad_dialogues(by_length[start : start + batch])
        features = all_features(dataset, index, version=version, with_text=with_text)
        with torch.inference_mode():
            output = network(on_device_of(network, features)).logits.float().cpu().numpy()
        present = index >= 0
        logits[index[present]] = output[present]
    return logits


def on_device_of(network: Network, features: Features) -> Features:
    """The same features on the device of the network's weights."""
    device = next(network.parameters()).device
    return features if device.type == "cpu" else features.map(lambda part: part.to(device))


def class_weights(labels: NDArray[np.int64], *, classes: int) -> Tensor:
    """Weights [C], 1 on average, with which every class that occurs weighs the same in a loss."""
    known = labels[labels != NO_LABEL]
    counts = np.bincount(known, minlength=classes)
    occurring = max(1, int((counts > 0).sum()))
    weights = np.where(counts > 0, len(known) / np.maximum(counts, 1) / occurring, 0.0)
    return torch.from_numpy(weights.astype(np.float32))


def digest_of_dataset(dataset: Dataset) -> str:
    """SHA-256 of all arrays: the key under which a training's checkpoints are kept."""
    digest = hashlib.sha256(repr([rows.tolist() for rows in dataset.dialogues]).encode())
    optional = (dataset.audio_mask, dataset.text_mask, dataset.speakers, dataset.votes)
    arrays = [dataset.labels, dataset.text, dataset.commonsense, *dataset.audio.values()]
    for array in [*arrays, *(one for one in optional if one is not None)]:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def rows_of(dialogues: Sequence[Dialogue]) -> tuple[Rows, ...]:
    """Each dialogue's rows among all utterances."""
    ends = np.cumsum([len(dialogue.utterances) for dialogue in dialogues])
    return tuple(np.split(np.arange(ends[-1]), ends[:-1]))


def number_speakers(dialogues: Sequence[Dialogue]) -> NDArray[np.int64]:
    """Each utterance's speaker, numbered from 0 by first turn within its dialogue."""
    numbers: list[int] = []
    for dialogue in dialogues:
        known = list(dict.fromkeys(utterance.speaker for utterance in dialogue.utterances))
        numbers += [known.index(utterance.speaker) for utterance in dialogue.utterances]
    return np.array(numbers, dtype=np.int64)


def label_indices(
    utterances: Sequence[LabelledUtterance], labels: tuple[str, ...]
) -> NDArray[np.int64]:
    """Each utterance's index among ``labels``, NO_LABEL where it has none."""
    indices = [NO_LABEL if u.label is None else labels.index(u.label) for u in utterances]
    return np.array(indices, dtype=np.int64)


def vote_shares(utterances: Sequence[LabelledUtterance], labels: tuple[str, ...]) -> Float32 | None:
    """[N, C], each label's share of annotators' votes where an utterance has no label.

    An annotator of several labels gives each a part of the vote; votes for what isn't among
    ``labels`` don't count. Zero where no vote is left; None where there are none at all.
    """
    shares = np.zeros((len(utterances), len(labels)), np.float32)
    for row, utterance in zip(shares, utterances, strict=True):
        for vote in () if utterance.label else utterance.votes:
            for label in set(vote) & set(labels):
                row[labels.index(label)] += 1 / len(vote)
    sums = shares.sum(1, keepdims=True)
    return shares / np.maximum(sums, 1e-9) if shares.any() else None
