"""Promises of batches: what an epoch draws, and what a batch of dialogues or clips holds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from training_kit import make_dataset

from stream_hbaf.training.batches import (
    Clips,
    TrainingSet,
    clip_batch,
    dialogue_batch,
    draw_steps,
)
from stream_hbaf.training.recipe import BatchConfig

NEUTRAL = 3


def dialogues_of(count: int) -> TrainingSet:
    """So many dialogues of 1 to 9 utterances, in one version each."""
    ends = np.cumsum([1 + n % 9 for n in range(count)])
    rows = np.split(np.arange(ends[-1]), ends[:-1])
    dataset = replace(make_dataset(), dialogues=tuple(rows))
    return TrainingSet(dataset, tuple((one,) for one in rows))


def with_clips(**changes: Any) -> TrainingSet:
    """Two dialogues of four texts, and eight clips of two speakers."""
    texts = make_dataset(audio={}, **changes)
    clips = make_dataset(dialogues=(np.arange(5), np.arange(5, 8)))
    versions = tuple((rows,) for rows in texts.dialogues)
    return TrainingSet(
        texts, versions, clips=Clips(clips, np.ones(8, np.float32), clips.audio), neutral=NEUTRAL
    )


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_epochs_batches_are_drawn_from_seed_and_epoch() -> None:
    """Every dialogue once; the same for the same epoch, others for others; alike in length."""
    training, plan = dialogues_of(70), BatchConfig()
    one, again = (draw_steps(training, plan, 1, size=4, seed=0) for _ in range(2))
    two = draw_steps(training, plan, 2, size=4, seed=0)
    lengths = [[len(rows) for rows in step.dialogues] for step in one]
    assert lengths == [[len(rows) for rows in step.dialogues] for step in again]
    assert lengths != [[len(rows) for rows in step.dialogues] for step in two]
    drawn = sorted(rows[0] for step in one for rows in step.dialogues)
    assert drawn == [rows[0] for rows in training.dialogues.dialogues]
    assert float(np.mean([max(batch) - min(batch) for batch in lengths])) < 4


def test_steps_hold_their_share_of_every_kind() -> None:
    """Half of the dialogues, as many utterances of further ones, every clip as often as asked."""
    training = dialogues_of(40)
    further = tuple(np.arange(1000 + n, 1001 + n) for n in range(500))
    training = replace(training, further=further, clips=with_clips().clips)
    plan = BatchConfig(dialogue_share=0.5, further_text_share=0.5, clip_rounds=3)
    steps = draw_steps(training, plan, 1, size=4, seed=0)
    rows = [rows for step in steps for rows in step.dialogues]
    main, others = ([r for r in rows if (r[0] >= 1000) == far] for far in (False, True))
    assert (len(steps), len(main)) == (5, 20)
    assert sum(map(len, others)) == sum(map(len, main))
    clips = np.concatenate([rows for step in steps for rows in step.clips])
    assert np.bincount(clips).tolist() == [3] * 8
    assert len({step.seed for step in steps}) == 5


def test_each_dialogue_is_drawn_in_one_of_its_versions() -> None:
    """Gold text and text with ASR errors take turns."""
    training = dialogues_of(60)
    versions = tuple((rows, rows + 1000) for (rows,) in training.versions)
    steps = draw_steps(replace(training, versions=versions), BatchConfig(), size=4, epoch=1, seed=0)
    second = [rows[0] >= 1000 for step in steps for rows in step.dialogues]
    assert len(second) == 60
    assert 0.25 < np.mean(second) < 0.75


def test_a_batch_of_one_corpus_is_its_own_audio_and_text() -> None:
    """Padding and what is masked take no part; nothing else is drawn."""
    mask = np.arange(8) % 3 > 0
    dataset = make_dataset(audio_mask=mask, dialogues=(np.arange(3), np.arange(3, 8)))
    training = TrainingSet(dataset, tuple((rows,) for rows in dataset.dialogues))
    batch = dialogue_batch(training, dataset.dialogues, plan=BatchConfig(), draw=draw())
    assert batch.labels.tolist() == [[0, 1, 2, -1, -1], [3, 0, 1, 2, 3]]
    present = batch.labels.numpy() >= 0
    assert batch.features.audio is not None
    assert batch.features.audio_mask is not None
    assert batch.features.audio_mask.numpy()[present].tolist() == mask.tolist()
    assert (batch.paired == batch.features.audio_mask).all()
    np.testing.assert_array_equal(batch.features.audio.numpy()[present], dataset.audio[""])
    assert batch.weights is None


def test_an_utterance_is_drawn_in_any_version_of_its_audio() -> None:
    """Each utterance by itself, not the whole batch."""
    audio = {name: np.full((8, 6), n, np.float32) for n, name in enumerate(("", "1", "2"))}
    dataset = make_dataset(audio=audio)
    training = TrainingSet(dataset, tuple((rows,) for rows in dataset.dialogues))
    batch = dialogue_batch(training, dataset.dialogues, plan=BatchConfig(), draw=draw())
    assert batch.features.audio is not None
    assert set(batch.features.audio[..., 0].flatten().tolist()) == {0.0, 1.0, 2.0}


def test_paired_audio_is_of_the_same_label() -> None:
    """Without mismatches every text is paired with a clip of its label."""
    training = with_clips()
    training = replace(training, neutral=None)
    plan = BatchConfig(
        paired_dialogue_share=1.0,
        paired_audio_share=1.0,
        label_mismatch_share=0.0,
        paired_text_dropout=0.0,
    )
    batch = dialogue_batch(training, training.dialogues.dialogues, plan=plan, draw=draw())
    assert training.clips is not None
    assert batch.features.audio is not None
    clips = training.clips.dataset
    assert batch.paired.all()
    for audio, label in zip(
        batch.features.audio.flatten(0, 1).numpy(), batch.labels.flatten().tolist(), strict=True
    ):
        same = np.flatnonzero(clips.labels == label)
        assert any((clips.audio[""][row] == audio).all() for row in same)


def test_mismatched_audio_is_no_pair_and_settles_neutral_texts() -> None:
    """Audio of any label keeps the text's label; beside a neutral text the clip's label counts."""
    training = with_clips()
    plan = BatchConfig(paired_dialogue_share=1.0, paired_audio_share=1.0, label_mismatch_share=1.0)
    assert training.clips is not None
    clips = training.clips.dataset
    seen = set()
    for seed in range(20):
        batch = dialogue_batch(training, training.dialogues.dialogues, plan=plan, draw=draw(seed))
        assert not batch.paired.any()
        assert batch.features.audio is not None
        labels, gold = batch.labels.flatten().numpy(), training.dialogues.labels
        assert (labels[gold != NEUTRAL] == gold[gold != NEUTRAL]).all()
        for audio, label in zip(
            batch.features.audio.flatten(0, 1)[gold == NEUTRAL].numpy(),
            labels[gold == NEUTRAL].tolist(),
            strict=True,
        ):
            seen.add(label)
            assert any(
                (clips.audio[""][n] == audio).all() for n in np.flatnonzero(clips.labels == label)
            )
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(("foreign", "paired"), [(0.0, True), (1.0, False)])
def test_a_clip_has_its_own_text_or_a_neutral_one(foreign: float, paired: bool) -> None:
    """Only its own is a pair; a neutral one is of the dialogues."""
    training = with_clips()
    plan = BatchConfig(clip_text_share=1.0, foreign_text_share=foreign)
    clips = training.clips
    assert clips is not None
    batch = clip_batch(training, clips, [np.arange(4), np.arange(4, 8)], plan=plan, draw=draw())
    assert batch.features.text_mask is not None
    assert batch.features.text_mask.all()
    assert bool(batch.paired.all()) == bool(batch.paired.any()) == paired
    assert batch.features.text is not None
    text = batch.features.text.flatten(0, 1).numpy()
    neutral = training.dialogues.text[training.dialogues.labels == NEUTRAL]
    of_dialogues = [any((one == row).all() for one in neutral) for row in text]
    assert all(of_dialogues) == (not paired)
    assert batch.weights is not None
    assert batch.weights.shape == (2, 4)


def test_dropped_columns_keep_the_mean() -> None:
    """A fifth of the columns is zero, the others are larger by as much."""
    training = with_clips()
    audio = {"": np.ones((8, 6), np.float32)}
    assert training.clips is not None
    clips = replace(training.clips, dataset=make_dataset(audio=audio))
    plan = BatchConfig(audio_dropout=0.2)
    drawn = []
    for n in range(50):
        batch = clip_batch(training, clips, [np.arange(8)], plan=plan, draw=draw(n))
        assert batch.features.audio is not None
        drawn.append(batch.features.audio.numpy())
    values = np.concatenate(drawn)
    assert set(np.round(np.unique(values), 4)) == {0.0, 1.25}
    assert values.mean() == pytest.approx(1.0, abs=0.05)


def test_dropped_blocks_leave_one() -> None:
    """Of two blocks each is left out at times, of one never; what is left is as it was."""
    training = replace(with_clips(), blocks=(slice(0, 4), slice(4, 6)))
    audio = np.ones((8, 6), np.float32)
    audio[:4, 4:] = 0.0  # of a corpus without the second block
    assert training.clips is not None
    clips = replace(training.clips, dataset=make_dataset(audio={"": audio}))
    plan = BatchConfig(block_dropout=0.5)
    seen = set()
    for n in range(30):
        batch = clip_batch(training, clips, [np.arange(8)], plan=plan, draw=draw(n))
        assert batch.features.audio is not None
        rows = batch.features.audio[0].numpy()
        assert (rows[:4, :4] == 1.0).all()
        assert not rows[:4, 4:].any()
        blocks = [(bool(row[:4].all()), bool(row[4:].all())) for row in rows[4:]]
        seen.update(blocks)
        assert all(one.any() for one in rows)
    assert seen == {(True, True), (True, False), (False, True)}


def spoken() -> TrainingSet:
    """The second dialogue of texts has audio of its own, all sevens."""
    training = with_clips(audio_mask=np.arange(8) >= 4)
    own = replace(training.dialogues, audio={"": np.full((8, 6), 7.0, np.float32)})
    return replace(training, dialogues=own, with_audio=(np.arange(4, 8),))


def test_dialogues_with_audio_keep_it() -> None:
    """They are pairs, and nothing is made up for them."""
    training = spoken()
    plan = BatchConfig(paired_dialogue_share=1.0, paired_audio_share=1.0, paired_text_dropout=0.0)
    dialogues = [np.arange(4), np.arange(4, 8)]
    batch = dialogue_batch(training, dialogues, plan=plan, draw=draw())
    features = batch.features
    assert features.audio is not None
    assert features.audio_mask is not None
    assert (features.audio[1] == 7.0).all()
    assert not (features.audio[0] == 7.0).any()
    assert features.audio_mask.all()
    assert batch.paired[1].all()
    np.testing.assert_array_equal(batch.labels[1], training.dialogues.labels[4:])


def test_every_turn_with_audio_is_drawn_once_an_epoch() -> None:
    """In pieces of a dialogue that begin elsewhere in each epoch."""
    training = replace(spoken(), versions=((np.arange(4),),))
    plan = BatchConfig(spoken_turns=3)
    for epoch in range(5):
        steps = draw_steps(training, plan, epoch, size=1, seed=0)
        pieces = [rows for step in steps for rows in step.dialogues if rows[0] >= 4]
        assert max(map(len, pieces)) <= 3
        assert sorted(np.concatenate(pieces)) == [4, 5, 6, 7]


def test_clips_are_dialogues_of_the_lengths_asked_for() -> None:
    steps = draw_steps(with_clips(), BatchConfig(clip_turns=(5,)), 0, size=2, seed=0)
    assert {len(rows) for step in steps for rows in step.clips} <= {5, 3}
