"""Training: batches that mix dialogues with words and clips with voices, and what they teach.

No corpus at hand holds both in conversation, so the two are mixed: dialogues have text and, in
part, the voices of acted clips (``pair``, ``mismatch``, in training only); acted clips have audio
and, in part, their statement's text.
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
from stream_hbaf.corpora.dataset import (
    NO_LABEL,
    Dataset,
    Flags,
    Rows,
    features_of,
    pad_dialogues,
    predict,
)
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.evaluation.metrics import unweighted_recall, weighted_f1
from stream_hbaf.networks.network import Criterion, Network, NetworkConfig
from stream_hbaf.networks.registry import build
from stream_hbaf.networks.state import Features
from stream_hbaf.training.fitting import LossConfig, criterion_of, make_optimizer
from stream_hbaf.training.trainer import Measured, TrainerConfig, TrainingHistory, fit

Float32 = NDArray[np.float32]
Draw = np.random.Generator
NEUTRAL = LABELS.index("neutral")
ACTED_TURNS = (1, 1, 1, 2, 3, 4)  # lengths of a pseudo-dialogue, drawn evenly


class MixtureConfig(Section):
    """How the network is trained on words and voices that don't belong together."""

    epochs: Positive = 8
    patience: Positive = 4  # epochs without a better dev score
    batch: Positive = 16  # dialogues of MELD in a step
    rate: float = 6e-4  # falls linearly to nothing over the epochs
    average: float = 0.0  # epochs over which weights are averaged, exponentially; 0 for none
    spoken_share: Probability = 0.5  # of MELD's dialogues, drawn anew for each epoch
    beside_share: Probability = 0.5  # of the utterances in a step, from other corpora of words
    beside: Positive = 12_000  # dialogues of each of them at most, drawn once for all epochs
    misheard: Annotated[int, Field(ge=0)] = 2  # versions of MELD's words as they may be understood
    decay: float = 1e-2
    mu: float = 0.2  # share of HBAF's inter-modal loss, eq 23
    smoothing: Probability = 0.0  # of the voices' labels
    acted: float = 1.0  # weight of the voices' loss beside the words'
    acted_rounds: Positive = 4  # times that an epoch hears every clip, each time in some version
    audio_dropout: Probability = 0.0  # of the columns of each clip
    pair: Probability = 0.4  # of the dialogues of words get voices of the same labels
    heard: Probability = 0.8  # of the utterances of such a dialogue
    mismatch: Probability = 0.5  # of those voices are anybody's: words must be able to win
    text_dropout: Probability = 0.2  # of the words where there is a voice
    statement: Probability = 0.5  # of the voices' pseudo-dialogues have words
    others_words: Probability = 0.5  # of those words are anybody's neutral ones
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    workers: Positive = 2  # processes of one thread each, a seed at a time


@dataclass(frozen=True)
class Spoken:
    """Words to learn from. Rows of ``material``; utterances have no sound."""

    material: Dataset
    dialogues: tuple[tuple[Rows, ...], ...]  # MELD's, each in every version: as said, misheard
    beside: tuple[Rows, ...] = ()  # other corpora's


@dataclass(frozen=True)
class Acted:
    """Voices to learn from; a dialogue of ``material`` is a speaker."""

    material: Dataset
    weights: Float32  # [N], of each clip in the loss, 1 on average


@dataclass(frozen=True)
class MixtureFitted:
    """The network of the best epoch, in the precision that ships, and how it got there."""

    network: Network
    history: TrainingHistory


@dataclass(frozen=True)
class Step:
    """What one step of training sees, and the seed of all that is drawn for it."""

    talk: list[Rows]  # dialogues of words
    clips: list[Rows]  # pseudo-dialogues of voices
    seed: tuple[int, ...]


def fit_mixture(
    config: NetworkConfig,
    plan: MixtureConfig,
    *,
    spoken: Spoken,
    acted: Acted,
    dev_score: Callable[[Network], Measured],
    seed: int,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> MixtureFitted:
    """Train one network; stops and picks on ``dev_score``. The same seed gives the same network."""
    torch.manual_seed(seed)
    network = build(config)
    network.standardise(torch.from_numpy(spoken.material.text_features))
    between = criterion_of(network, LossConfig(mu=plan.mu))
    both = nn.ModuleDict({"network": network} | ({"between": between} if between else {}))

    def loss(step: Step) -> Tensor:
        draw = np.random.default_rng(step.seed)
        words = _with_voices(spoken.material, step.talk, voices=acted, plan=plan, draw=draw)
        voices = _with_statements(acted, step.clips, talk=spoken.material, plan=plan, draw=draw)
        heard = _loss(network, between, voices, smoothing=plan.smoothing)
        return _loss(network, between, words) + plan.acted * heard

    history = fit(
        both,
        loss=loss,
        batches=partial(_steps, spoken, acted.material, plan=plan, seed=seed),
        optimizer=partial(make_optimizer, both, rate=plan.rate, decay=plan.decay),
        score=lambda: dev_score(network),
        plan=TrainerConfig(
            epochs=plan.epochs,
            patience=plan.patience,
            average=plan.average,
            accelerator="cpu",
            devices=1,
        ),
        seed=seed,
        folder=folder,
        progress=progress,
    )
    return MixtureFitted(network.half().float().eval(), history)


def text_score(network: Network, material: Dataset) -> float:
    """Weighted F1 from words alone."""
    said = predict(network, material, version=None, with_text=True).argmax(1)
    return weighted_f1(material.labels, said)


def audio_score(network: Network, material: Dataset, *, version: str, reads: bool) -> float:
    """Unweighted average recall from voices, with or without the words."""
    said = predict(network, material, version=version, with_text=reads).argmax(1)
    return unweighted_recall(material.labels, said)


@dataclass(frozen=True)
class _Batch:
    features: Features
    labels: Tensor  # [B, U]
    weights: Tensor  # [B, U] of the utterances in the loss
    both: Tensor  # [B, U] where there is sound as well as text


def _loss(
    network: Network, between: Criterion | None, batch: _Batch, *, smoothing: float = 0.0
) -> Tensor:
    output = network(batch.features)
    labels = batch.labels.flatten()
    surprise = F.cross_entropy(
        output.logits.flatten(0, 1),
        labels,
        ignore_index=NO_LABEL,
        label_smoothing=smoothing,
        reduction="none",
    )
    weights = batch.weights.flatten() * (labels != NO_LABEL)
    loss = (surprise * weights).sum() / weights.sum().clamp_min(1e-6)
    if between is not None and batch.both.sum() > 1:
        loss = loss + between(output, batch.both, batch.labels)
    return loss


def _steps(
    spoken: Spoken, acted: Dataset, epoch: int, *, plan: MixtureConfig, seed: int
) -> list[Step]:
    """One epoch: batches of dialogues, each beside its share of pseudo-dialogues."""
    draw = np.random.default_rng([seed, epoch])
    count = max(1, round(plan.spoken_share * len(spoken.dialogues)))
    chosen = [spoken.dialogues[n] for n in draw.permutation(len(spoken.dialogues))[:count]]
    talk = [versions[int(draw.integers(len(versions)))] for versions in chosen]
    said = sum(map(len, talk))
    wanted = said * plan.beside_share / (1.0 - min(plan.beside_share, 0.99))
    beside = _some(spoken.beside, wanted, draw=draw)
    rounds = [_pseudo_dialogues(acted, draw=draw) for _ in range(plan.acted_rounds)]
    clips = [dialogue for heard in rounds for dialogue in heard]
    number = -(-len(talk) // plan.batch)
    parts = zip(*(_deal(dealt, number) for dealt in (talk, beside, clips)), strict=True)
    return [
        Step([*own, *others], heard, (seed, epoch, step))
        for step, (own, others, heard) in enumerate(parts)
        if heard
    ]


def _deal(dialogues: list[Rows], number: int) -> list[list[Rows]]:
    """Into so many parts of about one size."""
    shares = np.array_split(np.arange(len(dialogues)), number)
    return [[dialogues[n] for n in share] for share in shares]


def _some(dialogues: tuple[Rows, ...], utterances: float, *, draw: Draw) -> list[Rows]:
    """Dialogues that together have no more ``utterances`` than so many."""
    order = draw.permutation(len(dialogues))
    ends = np.cumsum([len(dialogues[n]) for n in order])
    return [dialogues[n] for n in order[: int(np.searchsorted(ends, utterances, side="right"))]]


def _pseudo_dialogues(acted: Dataset, *, draw: Draw) -> list[Rows]:
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
    spoken: Dataset, dialogues: list[Rows], *, voices: Acted, plan: MixtureConfig, draw: Draw
) -> _Batch:
    """Dialogues with their words; in some, most utterances have a voice, of their label or not.

    A voice of another label teaches that words can be right where the voice is not. Neutral words
    say nothing against a voice: then the voice is right. The inter-modal loss, which draws voice
    and words together, leaves such pairs out.
    """
    index = pad_dialogues(dialogues)
    there = index >= 0
    labels = np.where(there, spoken.labels[index], NO_LABEL)
    hears = there & (draw.random((len(index), 1)) < plan.pair)
    hears &= draw.random(index.shape) < plan.heard
    hears &= np.isin(labels, voices.material.known_labels)
    partners = np.zeros(index.shape, dtype=np.intp)
    for label in np.unique(labels[hears]):
        same, known = hears & (labels == label), voices.material.labels == label
        partners[same] = _draw_clips(voices, known, int(same.sum()), draw=draw)
    neutral = labels == NEUTRAL
    strange = hears & (neutral | (draw.random(index.shape) < plan.mismatch))
    anybody = voices.material.labelled
    partners[strange] = _draw_clips(voices, anybody, int(strange.sum()), draw=draw)
    labels[strange & neutral] = voices.material.labels[partners[strange & neutral]]
    audio = _any_version(voices.material, partners, plan=plan, draw=draw)
    reads = there & ~(hears & (draw.random(index.shape) < plan.text_dropout))
    features = features_of(spoken, index, audio=audio, audio_mask=hears, text_mask=reads)
    weights = np.ones(index.shape, np.float32)
    return _batch(labels, features, weights=weights, both=hears & reads & ~strange)


def _draw_clips(voices: Acted, among: Flags, count: int, *, draw: Draw) -> Rows:
    """Rows of clips, as often as they weigh: small corpora are heard as much as large ones."""
    rows = np.flatnonzero(among)
    chances = voices.weights[rows].astype(np.float64)
    return draw.choice(rows, size=count, p=chances / chances.sum())


def _with_statements(
    acted: Acted, dialogues: list[Rows], *, talk: Dataset, plan: MixtureConfig, draw: Draw
) -> _Batch:
    """Clips with their voices; some dialogues also with words, which tell nothing.

    These are the clip's own statement, or anybody's neutral words: a corpus has few statements,
    and the network would learn them by heart rather than that neutral words settle nothing.
    """
    material = acted.material
    index = pad_dialogues(dialogues)
    there = index >= 0
    reads = there & (draw.random((len(index), 1)) < plan.statement)
    others = reads & (draw.random(index.shape) < plan.others_words)
    if material.text_mask is not None:
        reads &= material.text_mask[index] | others
    audio = _any_version(material, np.maximum(index, 0), plan=plan, draw=draw)
    features = features_of(material, index, audio=audio, audio_mask=there, text_mask=reads)
    words = torch.from_numpy(draw.choice(np.flatnonzero(talk.labels == NEUTRAL), others.sum()))
    assert features.text is not None
    assert features.commonsense is not None
    features.text[others] = torch.from_numpy(talk.text)[words].float()
    features.commonsense[others] = torch.from_numpy(talk.commonsense)[words]
    labels = np.where(there, material.labels[index], NO_LABEL)
    both = there & reads & ~others
    return _batch(labels, features, weights=acted.weights[index], both=both)


def _any_version(voices: Dataset, rows: Rows, *, plan: MixtureConfig, draw: Draw) -> Float32:
    """[B, U, A], each utterance in a version of its own, without some of its columns.

    Of tokens, [B, U, F, A], a column is left out of all.
    """
    versions = list(voices.audio.values())
    chosen = draw.integers(len(versions), size=rows.shape)
    picked: Float32 = np.empty((*rows.shape, *versions[0].shape[1:]), np.float32)
    for number, features in enumerate(versions):
        picked[chosen == number] = features[rows[chosen == number]]
    if plan.audio_dropout:
        columns = (*rows.shape, *(1 for _ in picked.shape[3:]), picked.shape[-1])
        kept = draw.random(columns, dtype=np.float32) >= plan.audio_dropout
        picked = picked * kept / np.float32(1.0 - plan.audio_dropout)
    return picked


def _batch(
    labels: NDArray[np.int64], features: Features, *, weights: Float32, both: Flags
) -> _Batch:
    every = (torch.from_numpy(array) for array in (labels, weights, both))
    return _Batch(features, *every)
