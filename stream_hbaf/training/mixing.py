"""Training: batches that mix dialogues with words and clips with voices, and what they teach.

No corpus at hand holds both in conversation, so the two are mixed: MELD's dialogues have text
and, in part, the voice of a RAVDESS clip (``pair``, ``mismatch``, in training only);
RAVDESS's clips have audio and, in part, their statement's text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from stream_hbaf.config import Positive, Probability, Section
from stream_hbaf.evaluation import unweighted_recall, weighted_f1
from stream_hbaf.networks.contrastive import InterModalLoss
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.state import Features
from stream_hbaf.training.fitting import make_optimizer
from stream_hbaf.training.material import (
    NO_LABEL,
    Material,
    Rows,
    balance,
    features_of,
    labels_of,
    lay_out,
    predict,
)
from stream_hbaf.training.trainer import History, TrainerConfig, fit

Float32 = NDArray[np.float32]
Draw = np.random.Generator
ACTED_TURNS = (1, 1, 1, 2, 3, 4)  # lengths of a pseudo-dialogue, drawn evenly


class MixtureConfig(Section):
    """How the network is trained on words and voices that don't belong together."""

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
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    workers: Positive = 2  # processes of one thread each, a seed at a time


@dataclass(frozen=True)
class MixtureFitted:
    """The network of the best epoch, in the precision that ships, and how it got there."""

    network: HBAF
    history: History


@dataclass(frozen=True)
class Step:
    """What one step of training sees, and the seed of all that is drawn for it."""

    talk: list[Rows]  # dialogues of MELD
    clips: list[Rows]  # pseudo-dialogues of RAVDESS
    seed: tuple[int, ...]


def fit_mixture(
    config: HbafConfig,
    plan: MixtureConfig,
    *,
    spoken: Material,
    acted: Material,
    dev_score: Callable[[HBAF], float],
    seed: int,
    folder: Path | None = None,
) -> MixtureFitted:
    """Train one network; stops and picks on ``dev_score``. The same seed gives the same network."""
    torch.manual_seed(seed)
    network = HBAF(config)
    network.standardise(torch.from_numpy(spoken.words))
    between = InterModalLoss(config.hidden)
    both = nn.ModuleDict({"network": network, "between": between})
    weights = balance(acted.labels, classes=config.classes)

    def loss(step: Step) -> Tensor:
        draw = np.random.default_rng(step.seed)
        words = _with_voices(spoken, step.talk, voices=acted, plan=plan, draw=draw)
        voices = _with_statements(acted, step.clips, plan=plan, draw=draw)
        heard = _loss(network, between, voices, mu=plan.mu, weights=weights)
        return _loss(network, between, words, mu=plan.mu) + plan.acted * heard

    history = fit(
        both,
        loss=loss,
        batches=partial(_steps, spoken, acted, plan=plan, seed=seed),
        optimizer=partial(make_optimizer, both, rate=plan.rate, decay=plan.decay),
        score=lambda: dev_score(network),
        plan=TrainerConfig(
            epochs=plan.epochs, patience=plan.patience, accelerator="cpu", devices=1
        ),
        seed=seed,
        folder=folder,
        progress=lambda line: None,
    )
    return MixtureFitted(network.half().float().eval(), history)


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
    spoken: Material, acted: Material, epoch: int, *, plan: MixtureConfig, seed: int
) -> list[Step]:
    """One epoch: batches of dialogues, each beside its share of pseudo-dialogues."""
    draw = np.random.default_rng([seed, epoch])
    count = max(1, round(plan.spoken_share * len(spoken.dialogues)))
    order = draw.permutation(len(spoken.dialogues))[:count]
    talks = [
        [spoken.dialogues[n] for n in order[start : start + plan.batch]]
        for start in range(0, len(order), plan.batch)
    ]
    rounds = [_pseudo_dialogues(acted, draw=draw) for _ in range(plan.acted_rounds)]
    clips = [dialogue for heard in rounds for dialogue in heard]
    shares = np.array_split(np.arange(len(clips)), len(talks))
    return [
        Step(talk, [clips[n] for n in share], (seed, epoch, number))
        for number, (talk, share) in enumerate(zip(talks, shares, strict=True))
        if len(share)
    ]


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
    spoken: Material, dialogues: list[Rows], *, voices: Material, plan: MixtureConfig, draw: Draw
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
    features = features_of(spoken, index, audio=audio, hears=hears, reads=reads)
    return _batch(spoken, index, features, both=hears & reads & ~strange)


def _with_statements(
    acted: Material, dialogues: list[Rows], *, plan: MixtureConfig, draw: Draw
) -> _Batch:
    """Clips with their voices; some dialogues also with the words, which tell nothing."""
    index = lay_out(dialogues)
    there = index >= 0
    reads = there & (draw.random((len(index), 1)) < plan.statement)
    audio = _any_version(acted, np.maximum(index, 0), draw=draw)
    features = features_of(acted, index, audio=audio, hears=there, reads=reads)
    return _batch(acted, index, features, both=there & reads)


def _any_version(voices: Material, rows: Rows, *, draw: Draw) -> Float32:
    """[B, U, A], each utterance in a version of its own."""
    versions = np.stack([features[rows] for features in voices.audio.values()])
    chosen = draw.integers(len(versions), size=rows.shape)
    picked: Float32 = np.take_along_axis(versions, chosen[None, ..., None], axis=0)[0]
    return picked


def _batch(
    material: Material, index: Rows, features: Features, *, both: NDArray[np.bool_]
) -> _Batch:
    return _Batch(features, labels_of(material, index), torch.from_numpy(both))
