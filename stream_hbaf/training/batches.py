"""Draws the batches of an epoch, and lays out the features and labels of a batch.

Of one corpus, batches are whole dialogues of about one length. Beside clips there are dialogues
with audio of their own, from which the network learns what a voice adds to words, and dialogues of
texts alone: some of these are paired with the audio of clips, in training only. Such made-up pairs
regularise; no figure rests on them.

Shape letters: B dialogues, U utterances of the longest of them, A columns of the audio.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stream_hbaf.corpora.dataset import NO_LABEL, Dataset, Flags, Rows, features_of, pad_dialogues
from stream_hbaf.networks.network import Features
from stream_hbaf.training.recipe import BatchConfig

Float32 = NDArray[np.float32]
Draw = np.random.Generator

POOLED = 4  # batches whose dialogues are sorted by length together: little padding, still random


@dataclass(frozen=True)
class Clips:
    """Single utterances of several corpora with their audio; a dialogue is one speaker's clips."""

    dataset: Dataset
    weights: Float32  # [N], of each clip in the loss, 1 on average
    # Audio by version as ``dataset``'s, but relative to other clips of its speaker.
    relative: Mapping[str, Float32]


@dataclass(frozen=True)
class TrainingSet:
    """What networks are trained on."""

    dialogues: Dataset  # of all corpora of dialogues, each version of a text a row of its own
    versions: tuple[tuple[Rows, ...], ...]  # the main corpus's dialogues: gold text, ASR errors
    further: tuple[Rows, ...] = ()  # the other corpora's dialogues, of texts alone
    with_audio: tuple[Rows, ...] = ()  # those that have audio of their own, beside clips
    clips: Clips | None = None
    neutral: int | None = None  # the label of texts that contradict no emotion; None: there is none
    blocks: tuple[slice, ...] = ()  # columns of each part of the acoustic features, of several


@dataclass(frozen=True)
class Step:
    """Rows that a step of training uses, and the seed of all else that is drawn for it."""

    dialogues: list[Rows]
    clips: list[Rows]  # pseudo-dialogues
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """A batch as the loss takes it."""

    features: Features
    labels: Tensor  # [B, U], NO_LABEL: not part of the loss
    paired: Tensor  # [B, U], True where audio and text are one utterance's, or of one label
    weights: Tensor | None = None  # [B, U] of the utterances in the loss; None: all the same
    votes: Tensor | None = None  # [B, U, C] of utterances without a label; zero: none


def draw_steps(
    training: TrainingSet, plan: BatchConfig, epoch: int, *, size: int, seed: int
) -> list[Step]:
    """One epoch's steps of about ``size`` dialogues of the main corpus, and of the others their
    share; the same for the same epoch and seed.
    """
    draw = np.random.default_rng([seed, epoch])
    main = _draw_main(training.versions, plan.dialogue_share, draw=draw)
    further = _draw_further(training.further, main, plan.further_text_share, draw=draw)
    with_audio = _draw_with_audio(training.with_audio, plan.spoken_turns, draw=draw)
    if training.clips is None:
        batches = _of_like_length([*main, *further, *with_audio], size=size, draw=draw)
        return [Step(rows, [], (seed, epoch, n)) for n, rows in enumerate(batches)]
    speakers = training.clips.dataset.dialogues
    rounds = [
        _pseudo_dialogues(speakers, lengths=plan.clip_turns, draw=draw)
        for _ in range(plan.clip_rounds)
    ]
    clips = [dialogue for one in rounds for dialogue in one]
    number = -(-len(main or clips) // size)
    shares = zip(*(_deal(rows, number) for rows in (main, further, with_audio, clips)), strict=True)
    return [
        Step([*own, *others, *with_audio], clips, (seed, epoch, step))
        for step, (own, others, with_audio, clips) in enumerate(shares)
        if clips
    ]


def _draw_main(versions: Sequence[tuple[Rows, ...]], share: float, *, draw: Draw) -> list[Rows]:
    """A share of the main corpus's dialogues, each in one version of its texts."""
    if not versions:
        return []
    count = max(1, round(share * len(versions)))
    chosen = [versions[n] for n in draw.permutation(len(versions))[:count]]
    return [every[int(draw.integers(len(every)))] for every in chosen]


def _draw_further(
    further: Sequence[Rows], main: Sequence[Rows], share: float, *, draw: Draw
) -> list[Rows]:
    """Further dialogues, of whose and the main ones' utterances they hold at most ``share``."""
    utterances = sum(map(len, main)) * share / (1.0 - min(share, 0.99))
    order = draw.permutation(len(further))
    ends = np.cumsum([len(further[n]) for n in order])
    return [further[n] for n in order[: int(np.searchsorted(ends, utterances, side="right"))]]


def _draw_with_audio(with_audio: Sequence[Rows], longest: int, *, draw: Draw) -> list[Rows]:
    """Every dialogue with audio of its own, from a random turn on in pieces of at most so many."""
    pieces = []
    for rows in with_audio:
        first = 1 + int(draw.integers(min(longest, len(rows))))
        starts = [0, *range(first, len(rows), longest)]
        pieces += [rows[a:b] for a, b in pairwise([*starts, len(rows)])]
    return [pieces[n] for n in draw.permutation(len(pieces))]


def _of_like_length(dialogues: Sequence[Rows], *, size: int, draw: Draw) -> list[list[Rows]]:
    """Shuffled dialogues in batches of about one length, which are shuffled too."""
    batches: list[list[Rows]] = []
    for start in range(0, len(dialogues), POOLED * size):
        pool = sorted(dialogues[start : start + POOLED * size], key=len)
        batches += [pool[first : first + size] for first in range(0, len(pool), size)]
    return [batches[n] for n in draw.permutation(len(batches))]


def _pseudo_dialogues(
    speakers: Sequence[Rows], *, lengths: Sequence[int], draw: Draw
) -> list[Rows]:
    """Each speaker's clips, shuffled, as dialogues of so many turns; all of them, shuffled."""
    dialogues: list[Rows] = []
    for clips in speakers:
        left = draw.permutation(clips)
        while len(left):
            turns = int(draw.choice(lengths))
            dialogues.append(left[:turns])
            left = left[turns:]
    return [dialogues[n] for n in draw.permutation(len(dialogues))]


def _deal(dialogues: Sequence[Rows], number: int) -> list[list[Rows]]:
    """Into so many parts of about one size."""
    shares = np.array_split(np.arange(len(dialogues)), number)
    return [[dialogues[n] for n in share] for share in shares]


def dialogue_batch(
    training: TrainingSet, dialogues: Sequence[Rows], *, plan: BatchConfig, draw: Draw
) -> Batch:
    """Dialogues with their own audio where they have it; else some are paired with clips'."""
    dataset = training.dialogues
    if training.clips is not None:
        return _paired_batch(training, training.clips, dialogues, plan=plan, draw=draw)
    index = pad_dialogues(dialogues)
    present = index >= 0
    audio_mask = present & bool(dataset.audio) & _mask(dataset.audio_mask, index)
    audio = None
    if dataset.audio:
        audio = _any_version(dataset.audio, index, draw=draw)
        audio = dataset.relative(audio, index, given=audio_mask)
    text_mask = present & _mask(dataset.text_mask, index)
    features = features_of(dataset, index, audio=audio, audio_mask=audio_mask, text_mask=text_mask)
    labels = torch.from_numpy(np.where(present, dataset.labels[index], NO_LABEL))
    votes = None
    if dataset.votes is not None:
        votes = torch.from_numpy(dataset.votes[index] * present[..., None])
    return Batch(features, labels, torch.from_numpy(audio_mask & text_mask), votes=votes)


def _paired_batch(
    training: TrainingSet, clips: Clips, dialogues: Sequence[Rows], *, plan: BatchConfig, draw: Draw
) -> Batch:
    """Dialogues with their own audio, or of texts: in some of these, most utterances are paired
    with a clip's.

    Audio of another label teaches that the text may be right where the audio is not. A neutral
    text contradicts no emotion: then the label is the clip's. The inter-modal loss, which draws
    audio and text together, leaves such pairs out.
    """
    texts = training.dialogues
    index = pad_dialogues(dialogues)
    present = index >= 0
    labels = np.where(present, texts.labels[index], NO_LABEL)
    own = present & bool(texts.audio) & _mask(texts.audio_mask, index)
    made_up = present & (draw.random((len(index), 1)) < plan.paired_dialogue_share)
    made_up &= ~own.any(axis=1, keepdims=True)
    made_up &= draw.random(index.shape) < plan.paired_audio_share
    made_up &= np.isin(labels, clips.dataset.known_labels)
    partners = np.zeros(index.shape, dtype=np.intp)
    for label in np.unique(labels[made_up]):
        same = made_up & (labels == label)
        of_label = clips.dataset.labels == label
        partners[same] = _draw_clips(clips, of_label, int(same.sum()), draw=draw)
    neutral = labels == training.neutral
    mismatched = made_up & (neutral | (draw.random(index.shape) < plan.label_mismatch_share))
    of_any = clips.dataset.labelled
    partners[mismatched] = _draw_clips(clips, of_any, int(mismatched.sum()), draw=draw)
    relabelled = mismatched & neutral
    labels[relabelled] = clips.dataset.labels[partners[relabelled]]
    audio = _any_version(clips.relative, partners, draw=draw)
    audio = _drop_blocks(audio, training.blocks, share=plan.block_dropout, draw=draw)
    of_dialogues = np.flatnonzero(own.any(axis=1))
    if len(of_dialogues):
        rows, there = index[of_dialogues], own[of_dialogues]
        original = _any_version(texts.audio, rows, draw=draw)
        original = _drop_blocks(original, training.blocks, share=plan.block_dropout, draw=draw)
        audio[of_dialogues] = texts.relative(original, rows, given=there)
    audio = _drop_columns(audio, share=plan.audio_dropout, draw=draw)
    audio_mask = own | made_up
    dropped = audio_mask & (draw.random(index.shape) < plan.paired_text_dropout)
    text_mask = present & _mask(texts.text_mask, index) & ~dropped
    features = features_of(texts, index, audio=audio, audio_mask=audio_mask, text_mask=text_mask)
    paired = torch.from_numpy(audio_mask & text_mask & ~mismatched)
    votes = None
    if texts.votes is not None:
        votes = torch.from_numpy(texts.votes[index] * present[..., None])
    return Batch(features, torch.from_numpy(labels), paired, votes=votes)


def clip_batch(
    training: TrainingSet, clips: Clips, dialogues: Sequence[Rows], *, plan: BatchConfig, draw: Draw
) -> Batch:
    """Clips with their audio; some pseudo-dialogues also with texts that contradict no emotion.

    These are the clip's own text, or a neutral one of the dialogues: a corpus of clips has few
    texts, and the network would learn these by heart rather than that neutral texts decide nothing.
    """
    dataset, texts = clips.dataset, training.dialogues
    index = pad_dialogues(dialogues)
    present = index >= 0
    text_mask = present & (draw.random((len(index), 1)) < plan.clip_text_share)
    neutral = np.flatnonzero(texts.labels == training.neutral)
    foreign = text_mask & (draw.random(index.shape) < plan.foreign_text_share) & bool(len(neutral))
    text_mask &= _mask(dataset.text_mask, index) | foreign
    audio = _any_version(dataset.audio, np.maximum(index, 0), draw=draw)
    audio = _drop_blocks(audio, training.blocks, share=plan.block_dropout, draw=draw)
    audio_mask = present & _mask(dataset.audio_mask, index)
    audio = dataset.relative(audio, index, given=audio_mask)
    audio = _drop_columns(audio, share=plan.audio_dropout, draw=draw)
    features = features_of(dataset, index, audio=audio, audio_mask=audio_mask, text_mask=text_mask)
    if foreign.any():
        rows = torch.from_numpy(draw.choice(neutral, foreign.sum()))
        assert features.text is not None
        assert features.commonsense is not None
        features.text[foreign] = torch.from_numpy(texts.text)[rows].float()
        features.commonsense[foreign] = torch.from_numpy(texts.commonsense)[rows]
    paired = torch.from_numpy(audio_mask & text_mask & ~foreign)
    weights = torch.from_numpy(clips.weights[index])
    labels = torch.from_numpy(np.where(present, dataset.labels[index], NO_LABEL))
    return Batch(features, labels, paired, weights)


def _draw_clips(clips: Clips, among: Flags, count: int, *, draw: Draw) -> Rows:
    """Rows of clips, as often as they weigh: small corpora are used as much as large ones."""
    rows = np.flatnonzero(among)
    chances = clips.weights[rows].astype(np.float64)
    return draw.choice(rows, size=count, p=chances / chances.sum())


def _any_version(audio: Mapping[str, Float32], index: Rows, *, draw: Draw) -> Float32:
    """[B, U, A], or tokens [B, U, F, A]: each utterance in a version of its own."""
    versions = list(audio.values())
    if len(versions) == 1:
        return versions[0][index]
    chosen = draw.integers(len(versions), size=index.shape)
    drawn: Float32 = np.empty((*index.shape, *versions[0].shape[1:]), np.float32)
    for number, features in enumerate(versions):
        drawn[chosen == number] = features[index[chosen == number]]
    return drawn


def _drop_blocks(audio: Float32, blocks: Sequence[slice], *, share: float, draw: Draw) -> Float32:
    """Audio [B, U, A] without some of its blocks, as where a corpus doesn't have them.

    A block that is left out is zero, the training set's mean; of what an utterance has, one block
    is always kept. So which blocks there are tells nothing of the label.
    """
    if len(blocks) < 2 or not share:
        return audio
    there = np.stack([audio[..., block].any(axis=-1) for block in blocks], axis=-1)
    order = draw.random(there.shape)
    kept = order >= share
    surest = np.where(there, order, -1.0).argmax(axis=-1)
    np.put_along_axis(kept, surest[..., None], values=True, axis=-1)
    dropped = audio.copy()
    for number, block in enumerate(blocks):
        dropped[..., block] *= kept[..., number, None]
    return dropped


def _drop_columns(audio: Float32, *, share: float, draw: Draw) -> Float32:
    """Dropout of an utterance's columns; of tokens, a column is left out of all."""
    if not share:
        return audio
    columns = (*audio.shape[:2], *(1 for _ in audio.shape[3:]), audio.shape[-1])
    kept = draw.random(columns, dtype=np.float32) >= share
    dropped: Float32 = audio * kept / np.float32(1.0 - share)
    return dropped


def _mask(mask: Flags | None, index: Rows) -> Flags:
    """The mask [N] of a table's rows [B, U]; None: True everywhere."""
    return np.ones(index.shape, bool) if mask is None else mask[index]
