"""Training: the network itself, on dialogues with words and on clips with voices at once.

No corpus at hand holds both in conversation, so the two are mixed: MELD's dialogues have text
and, in part, the voice of a RAVDESS clip (``pair``, ``mismatch``, in training only);
RAVDESS's clips have audio and, in part, their statement's text.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stream_hbaf.config import Positive, Probability, Section
from stream_hbaf.evaluation import unweighted_recall, weighted_f1
from stream_hbaf.networks.contrastive import InterModalLoss
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.state import Features

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]
Draw = np.random.Generator
NO_LABEL = -1  # of padding
ACTED_TURNS = (1, 1, 1, 2, 3, 4)  # lengths of a pseudo-dialogue, drawn evenly


class FittingConfig(Section):
    """How the network is trained."""

    epochs: Positive = 8
    patience: Positive = 4  # epochs without a better dev score
    batch: Positive = 16  # dialogues of MELD in a step
    rate: float = 6e-4  # falls linearly to nothing over the epochs
    spoken_share: Probability = 0.5  # of MELD's dialogues, drawn anew for each epoch
    decay: float = 1e-2
    mu: float = 0.2  # share of the inter-modal loss, eq 23
    acted: float = 1.0  # weight of the RAVDESS loss beside MELD's
    acted_rounds: Positive = 4  # times that an epoch hears every clip, each time in some version
    pair: Probability = 0.4  # of MELD's dialogues get voices of the same labels
    heard: Probability = 0.8  # of the utterances of such a dialogue
    mismatch: Probability = 0.5  # of those voices are anybody's: words must be able to win
    text_dropout: Probability = 0.2  # of the words where there is a voice
    statement: Probability = 0.5  # of RAVDESS's pseudo-dialogues keep their text
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    workers: Positive = 2  # processes of one thread each, a seed at a time


@dataclass(frozen=True)
class Material:
    """Utterances of one split as features, one a row, and the dialogues that they stand in."""

    labels: NDArray[np.int64]  # [N]
    text: Float32  # [N, L]
    commonsense: Float32  # [N, 3, K]
    audio: Mapping[str, Float32]  # by version of the sound: [N, A]; empty without sound
    dialogues: tuple[Rows, ...]


@dataclass(frozen=True)
class Fitted:
    """The network of the best epoch and how it got there."""

    network: HBAF
    dev_score: float
    epoch: int
    history: tuple[float, ...]  # dev score after each epoch


def fit_network(
    config: HbafConfig,
    plan: FittingConfig,
    *,
    spoken: Material,
    acted: Material,
    dev_score: Callable[[HBAF], float],
    seed: int,
) -> Fitted:
    """Train one network; stops and picks on ``dev_score``. The same seed gives the same network."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    network = HBAF(config)
    between = InterModalLoss(config.hidden)
    parameters = [*network.parameters(), *between.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=plan.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.05, 1.0 - step / (plan.epochs * _step_count(spoken, plan)))
    )
    weights = _balance(acted.labels, classes=config.classes)
    best, best_score, best_epoch = copy.deepcopy(network.state_dict()), -1.0, 0
    history: list[float] = []
    for epoch in range(1, plan.epochs + 1):
        network.train()
        for talk, clips in _steps(spoken, acted, plan=plan, draw=draw):
            words = _with_voices(spoken, talk, voices=acted, plan=plan, draw=draw)
            voices = _with_statements(acted, clips, plan=plan, draw=draw)
            loss = _loss(network, between, words, mu=plan.mu)
            loss = loss + plan.acted * _loss(network, between, voices, mu=plan.mu, weights=weights)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        network.eval()
        history.append(dev_score(network))
        if history[-1] > best_score:
            best, best_score, best_epoch = (
                copy.deepcopy(network.state_dict()),
                history[-1],
                epoch,
            )
        elif epoch - best_epoch >= plan.patience:
            break
    network.load_state_dict(best)
    return Fitted(network.eval(), best_score, best_epoch, tuple(history))


def predict(
    network: HBAF, material: Material, *, version: str | None, reads: bool, batch: int = 64
) -> Float32:
    """Logits [N, C] of all utterances, given their sound in ``version`` (None: not) and text."""
    logits = np.zeros((len(material.labels), network.config.classes), np.float32)
    for start in range(0, len(material.dialogues), batch):
        index = lay_out(material.dialogues[start : start + batch])
        there = index >= 0
        audio = None if version is None else material.audio[version][index]
        features = _features(
            material,
            index,
            audio=audio,
            hears=there if audio is not None else np.zeros_like(there),
            reads=there if reads else np.zeros_like(there),
        )
        with torch.inference_mode():
            said = network(features.map(lambda t: t.to(_device(network)))).logits.cpu().numpy()
        logits[index[there]] = said[there]
    return logits


def lay_out(dialogues: Sequence[Rows]) -> Rows:
    """Rows of dialogues of any length as one table [B, U]; -1 is padding."""
    table = np.full((len(dialogues), max(map(len, dialogues))), -1, dtype=np.intp)
    for row, dialogue in enumerate(dialogues):
        table[row, : len(dialogue)] = dialogue
    return table


def text_score(network: HBAF, material: Material) -> float:
    """Weighted F1 from words alone."""
    said = predict(network, material, version=None, reads=True).argmax(1)
    return weighted_f1(material.labels, said, classes=network.config.classes)


def audio_score(network: HBAF, material: Material, *, version: str, reads: bool) -> float:
    """Unweighted average recall from voices, with or without the words."""
    said = predict(network, material, version=version, reads=reads).argmax(1)
    return unweighted_recall(material.labels, said, classes=network.config.classes)


@dataclass(frozen=True)
class _Batch:
    features: Features
    labels: Tensor  # [B, U]
    both: Tensor  # [B, U] where there is sound as well as text


def _loss(
    network: HBAF,
    between: InterModalLoss,
    batch: _Batch,
    *,
    mu: float,
    weights: Tensor | None = None,
) -> Tensor:
    output = network(batch.features)
    loss = F.cross_entropy(
        output.logits.flatten(0, 1),
        batch.labels.flatten(),
        weight=weights,
        ignore_index=NO_LABEL,
    )
    if mu and batch.both.sum() > 1:
        loss = loss + mu * between(output, batch.both)
    return loss


def _steps(
    spoken: Material, acted: Material, *, plan: FittingConfig, draw: Draw
) -> list[tuple[list[Rows], list[Rows]]]:
    """One epoch: batches of dialogues, each beside its share of pseudo-dialogues."""
    order = draw.permutation(len(spoken.dialogues))[: _dialogue_count(spoken, plan)]
    talks = [
        [spoken.dialogues[n] for n in order[start : start + plan.batch]]
        for start in range(0, len(order), plan.batch)
    ]
    rounds = [_pseudo_dialogues(acted, draw=draw) for _ in range(plan.acted_rounds)]
    clips = [dialogue for heard in rounds for dialogue in heard]
    shares = np.array_split(np.arange(len(clips)), len(talks))
    return [
        (talk, [clips[n] for n in share])
        for talk, share in zip(talks, shares, strict=True)
        if len(share)
    ]


def _step_count(spoken: Material, plan: FittingConfig) -> int:
    return -(-_dialogue_count(spoken, plan) // plan.batch)


def _dialogue_count(spoken: Material, plan: FittingConfig) -> int:
    return max(1, round(plan.spoken_share * len(spoken.dialogues)))


def _pseudo_dialogues(acted: Material, *, draw: Draw) -> list[Rows]:
    """Each speaker's clips, shuffled, as dialogues of one to four turns; all of them, shuffled."""
    cut: list[Rows] = []
    for clips in acted.dialogues:
        left = draw.permutation(clips)
        while len(left):
            turns = int(draw.choice(ACTED_TURNS))
            cut.append(left[:turns])
            left = left[turns:]
    return [cut[n] for n in draw.permutation(len(cut))]


def _with_voices(
    spoken: Material, dialogues: list[Rows], *, voices: Material, plan: FittingConfig, draw: Draw
) -> _Batch:
    """Dialogues with their words; in some, most utterances have a voice, of their label or not.

    A voice of another label teaches that words can be right where the voice is not; the
    inter-modal loss, which draws voice and words together, leaves such pairs out.
    """
    index = lay_out(dialogues)
    there = index >= 0
    labels = np.where(there, spoken.labels[index], 0)
    hears = there & (draw.random((len(index), 1)) < plan.pair)
    hears &= draw.random(index.shape) < plan.heard
    partners = np.zeros(index.shape, dtype=np.intp)
    for label in np.unique(labels[hears]):
        same, known = hears & (labels == label), np.flatnonzero(voices.labels == label)
        if len(known):
            partners[same] = draw.choice(known, size=int(same.sum()))
        else:
            hears &= labels != label
    strange = hears & (draw.random(index.shape) < plan.mismatch)
    partners[strange] = draw.integers(len(voices.labels), size=int(strange.sum()))
    audio = _any_version(voices, partners, draw=draw)
    reads = there & ~(hears & (draw.random(index.shape) < plan.text_dropout))
    features = _features(spoken, index, audio=audio, hears=hears, reads=reads)
    return _batch(spoken, index, features, both=hears & reads & ~strange)


def _with_statements(
    acted: Material, dialogues: list[Rows], *, plan: FittingConfig, draw: Draw
) -> _Batch:
    """Clips with their voices; some dialogues also with the words, which tell nothing."""
    index = lay_out(dialogues)
    there = index >= 0
    reads = there & (draw.random((len(index), 1)) < plan.statement)
    audio = _any_version(acted, np.maximum(index, 0), draw=draw)
    features = _features(acted, index, audio=audio, hears=there, reads=reads)
    return _batch(acted, index, features, both=there & reads)


def _any_version(voices: Material, rows: Rows, *, draw: Draw) -> Float32:
    """[B, U, A], each utterance in a version of its own."""
    versions = np.stack([features[rows] for features in voices.audio.values()])
    chosen = draw.integers(len(versions), size=rows.shape)
    picked: Float32 = np.take_along_axis(versions, chosen[None, ..., None], axis=0)[0]
    return picked


def _features(
    material: Material, index: Rows, *, audio: Float32 | None, hears: Flags, reads: Flags
) -> Features:
    return Features(
        audio=None if audio is None else torch.from_numpy(audio),
        text=torch.from_numpy(material.text[index]),
        commonsense=torch.from_numpy(material.commonsense[index]),
        audio_mask=torch.from_numpy(hears),
        text_mask=torch.from_numpy(reads),
        utterance_mask=torch.from_numpy(index >= 0),
    )


def _batch(material: Material, index: Rows, features: Features, *, both: Flags) -> _Batch:
    labels = np.where(index >= 0, material.labels[index], NO_LABEL)
    return _Batch(features, torch.from_numpy(labels), torch.from_numpy(both))


def _balance(labels: NDArray[np.int64], *, classes: int) -> Tensor:
    """Weights [C] under which all classes that are there count the same, 1 on average."""
    counts = np.bincount(labels, minlength=classes)
    weights = np.where(counts > 0, len(labels) / np.maximum(counts, 1) / (counts > 0).sum(), 0.0)
    return torch.from_numpy(weights.astype(np.float32))


def _device(network: HBAF) -> torch.device:
    return network.classifier.weight.device
