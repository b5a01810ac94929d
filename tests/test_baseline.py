"""A speaker's baseline: relative to the past, the same step by step as all at once."""

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError
from stream_hbaf.features.baseline import Baseline, BaselineConfig, VoicePast

WIDTH = 6
BLOCKS = {"compare": slice(0, 2), "ge2e": slice(2, WIDTH)}
ALL = Baseline(np.ones(WIDTH, bool), prior=4.0)


def voices(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(*shape, WIDTH)).astype(np.float32)


def stepped(
    audio: NDArray[np.float32], given: NDArray[np.bool_], speakers: NDArray[np.int64]
) -> NDArray[np.float32]:
    """One dialogue [U, A], utterance by utterance."""
    past, rows = VoicePast(), []
    for row, there, speaker in zip(audio, given, speakers.tolist(), strict=True):
        rows.append(ALL.relative(row, speaker=speaker, past=past) if there else np.zeros(WIDTH))
        past = past.add(row, speaker=speaker) if there else past
    return np.stack(rows)


def test_steps_and_whole_dialogues_are_the_same() -> None:
    """With speakers that take turns, utterances without audio, and features that are missing."""
    draw = np.random.default_rng(1)
    audio, speakers = voices(3, 40), draw.integers(3, size=(3, 40))
    given = draw.random((3, 40)) < 0.8
    audio[draw.random(audio.shape) < 0.2] = 0.0
    whole = ALL.relative_dialogues(audio, given, speakers)
    for dialogue in range(3):
        one = stepped(audio[dialogue], given[dialogue], speakers[dialogue])
        np.testing.assert_allclose(whole[dialogue], one, atol=1e-5)


def test_nothing_of_the_future_is_used() -> None:
    audio, given = voices(1, 20), np.ones((1, 20), bool)
    before = ALL.relative_dialogues(audio, given, None)
    audio[:, 10:] += 3.0
    np.testing.assert_array_equal(
        ALL.relative_dialogues(audio, given, None)[:, :10], before[:, :10]
    )


def test_a_voice_becomes_its_own_measure() -> None:
    """First the training set's mean and deviation, after many utterances the speaker's."""
    shifted = (2.0 + 0.5 * voices(1, 200)).astype(np.float32)
    relative = ALL.relative_dialogues(shifted, np.ones((1, 200), bool), None)[0]
    np.testing.assert_allclose(relative[0], shifted[0, 0], atol=1e-6)
    late = relative[100:]
    np.testing.assert_allclose(late.mean(0), 0.0, atol=0.3)
    np.testing.assert_allclose(late.std(0), 1.0, atol=0.35)


def test_another_speaker_changes_nothing() -> None:
    audio, given = voices(1, 12), np.ones((1, 12), bool)
    speakers = np.arange(12)[None] % 2
    alone = ALL.relative_dialogues(audio[:, ::2], given[:, ::2], None)
    np.testing.assert_array_equal(ALL.relative_dialogues(audio, given, speakers)[:, ::2], alone)


def test_what_is_missing_stays_missing_and_is_not_remembered() -> None:
    """A feature of 0 was not measured."""
    audio, given = voices(1, 9), np.ones((1, 9), bool)
    without = audio.copy()
    without[0, 4] = 0.0
    relative = ALL.relative_dialogues(without, given, None)
    assert not relative[0, 4].any()
    kept = [n for n in range(9) if n != 4]
    alone = ALL.relative_dialogues(audio[:, kept], given[:, kept], None)
    np.testing.assert_allclose(relative[:, kept], alone, atol=1e-6)


def test_only_the_parts_named_are_relative() -> None:
    baseline = Baseline.of(BaselineConfig(parts=("compare",)), BLOCKS, width=WIDTH)
    audio = (3.0 + voices(1, 30)).astype(np.float32)
    relative = baseline.relative_dialogues(audio, np.ones((1, 30), bool), None)
    np.testing.assert_array_equal(relative[..., 2:], audio[..., 2:])
    assert np.abs(relative[0, 20:, :2].mean()) < 1.0


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="'prosody' is no part of the features; choose compare"):
        Baseline.of(BaselineConfig(parts=("prosody",)), BLOCKS, width=WIDTH)
