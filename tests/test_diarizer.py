"""Promises of the attribution of utterances to speakers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.config import SpeakersConfig
from stream_hbaf.speech.diarizer import Attributed, Diarizer

WIDTH = 192


def voice(seed: int) -> NDArray[np.float32]:
    """A made-up voice: a random direction."""
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


def utterance(speaker: int, seed: int, *, spread: float = 0.6) -> NDArray[np.float32]:
    """An utterance of a made-up voice, a little off it."""
    noise = np.random.default_rng(1000 + seed).normal(size=WIDTH).astype(np.float32)
    return voice(speaker) + np.float32(spread) * noise


def names(attributions: tuple[Attributed, ...]) -> list[tuple[int, str]]:
    return [(one.turn, one.speaker) for one in attributions]


def test_speakers_are_numbered_in_the_order_of_their_first_turns() -> None:
    diarizer = Diarizer(SpeakersConfig())
    found = [
        diarizer.add(turn, utterance(speaker, turn), duration_s=3.0)
        for turn, speaker in enumerate([7, 7, 9, 7, 9, 8])
    ]
    assert [one.speaker for (one,) in found] == [
        *("speaker 1", "speaker 1", "speaker 2", "speaker 1", "speaker 2", "speaker 3")
    ]
    assert {one.source for (one,) in found} == {"voice"}
    assert min(one.score for (one,) in found) > 0.6


def test_an_enrolled_voice_has_its_name() -> None:
    diarizer = Diarizer(SpeakersConfig(), voices={"Ada": voice(3)})
    (stranger,) = diarizer.add(0, utterance(4, 0), duration_s=3.0)
    (ada,) = diarizer.add(1, utterance(3, 1), duration_s=3.0)
    assert (stranger.speaker, stranger.source) == ("speaker 1", "voice")
    assert (ada.speaker, ada.source) == ("Ada", "enrolled")


@pytest.mark.parametrize(("duration_s", "has_embedding"), [(1.4, True), (3.0, False)])
def test_a_short_utterance_is_not_sure(duration_s: float, has_embedding: bool) -> None:
    diarizer = Diarizer(SpeakersConfig())
    embedding = utterance(1, 1) if has_embedding else None
    assert diarizer.add(0, embedding, duration_s=duration_s) == (Attributed(0, "", 0.0, ""),)


def test_a_correction_is_kept_and_learned_from() -> None:
    """The turn is the person's whom it was given to, and so is what sounds like it later."""
    diarizer = Diarizer(SpeakersConfig())
    diarizer.add(0, utterance(1, 0), duration_s=3.0)
    assert diarizer.correct(0, "Ada") == (Attributed(0, "Ada", 1.0, "corrected"),)
    (later,) = diarizer.add(1, utterance(1, 1), duration_s=3.0)
    assert (later.speaker, later.source) == ("Ada", "voice")


def test_renamed_and_merged_speakers_change_their_turns() -> None:
    diarizer = Diarizer(SpeakersConfig())
    for turn, speaker in enumerate([1, 2, 1]):
        diarizer.add(turn, utterance(speaker, turn), duration_s=3.0)
    assert names(diarizer.rename("speaker 1", "Ada")) == [(0, "Ada"), (2, "Ada")]
    assert names(diarizer.merge("speaker 2", "Ada")) == [(1, "Ada")]
    assert diarizer.add(3, utterance(2, 3), duration_s=3.0)[-1].speaker == "Ada"


def test_a_dialogue_has_at_most_so_many_speakers() -> None:
    """A voice beyond them is not sure, rather than somebody else's."""
    diarizer = Diarizer(SpeakersConfig(max_speakers=2))
    found = [diarizer.add(n, utterance(n, n), duration_s=3.0)[-1].speaker for n in range(4)]
    assert found == ["speaker 1", "speaker 2", "", ""]
