"""Utterances cut out of real sound: the same however it is split and whoever answers questions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import Config, VadConfig
from stream_hbaf.speech.detector import Feed, UtteranceAction, UtteranceDetector
from stream_hbaf.speech.segmenter import Consult, Finish

RECORDINGS = Path(__file__).parent / "recordings"
SENTENCES = sorted(RECORDINGS.glob("sense_and_sensibility_*.flac"))
Sound = NDArray[np.int16]
Answer = Callable[[Consult], bool]


def no_question(asked: Consult) -> bool:
    raise AssertionError(asked)


def detect(
    sound: Sound,
    *,
    forget: bool = False,
    splits: list[int] | None = None,
    answer: Answer | None = None,
) -> list[UtteranceAction]:
    """All actions for a sound that comes in pieces, which end at ``splits``."""
    config = Config(vad=VadConfig(forget=forget))
    detector = UtteranceDetector(config, asks=answer is not None)
    actions: list[UtteranceAction] = []
    for piece in np.split(sound, splits or []):
        actions += detector.feed_whole(piece, is_over=answer or no_question)
    return [*actions, *detector.flush(resume_at=len(sound))]


def utterances(actions: list[UtteranceAction]) -> list[Finish]:
    return [action for action in actions if isinstance(action, Finish)]


def test_forget_finds_quiet_speech_after_loud_speech() -> None:
    """Silero's network misses a sentence 36 dB below the one before, and finds it alone."""
    loud, sentence = (read_audio(path) for path in SENTENCES[:2])
    quiet = (sentence * 10 ** (-36 / 20)).astype(np.int16)
    silence = np.zeros(3 * 8192 - len(loud) % 512, np.int16)
    pair = np.concatenate([loud, silence, quiet, silence])
    at = len(loud) + len(silence)
    [alone] = utterances(detect(np.concatenate([quiet, silence]), forget=True))
    assert len(utterances(detect(pair))) == 1
    _, second = utterances(detect(pair, forget=True))
    assert (second.speech_end - at, second.end - at) == (alone.speech_end, alone.end)


@pytest.fixture(scope="module")
def pair() -> Sound:
    """Two read sentences, each with a second of silence after it."""
    first, second = (read_audio(path) for path in SENTENCES[:2])
    silence = np.zeros(16_000, np.int16)
    return np.concatenate([first, silence, second, silence])


def to_some(asked: Consult) -> bool:
    """Yes to half of the questions."""
    return (asked.end // 512 + len(asked.trigger)) % 2 == 0


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("answer", [None, to_some, lambda asked: True])
@given(splits=st.lists(st.integers(0, 200_000), max_size=20))
@settings(max_examples=4, deadline=None)
def test_actions_whatever_the_split(
    pair: Sound, splits: list[int], answer: Answer | None, forget: bool
) -> None:
    """Actions, questions among them, are those of the sound in one piece.

    Also where the next frame, which is scored anew, came with the one that ended the utterance.
    """
    whole = detect(pair, answer=answer, forget=forget)
    split = detect(pair, splits=sorted(splits), answer=answer, forget=forget)
    assert without_feeds(split) == without_feeds(whole)
    assert len(utterances(whole)) >= 2
    for begin, sound in fed(split).items():
        assert np.array_equal(sound, fed(whole)[begin])


def without_feeds(actions: list[UtteranceAction]) -> list[UtteranceAction]:
    return [action for action in actions if not isinstance(action, Feed)]


def fed(actions: list[UtteranceAction]) -> dict[int, Sound]:
    """The samples of each utterance, by its start."""
    found: dict[int, Sound] = {}
    pieces: list[Sound] = []
    for action in actions:
        if isinstance(action, Feed):
            pieces.append(action.samples)
        elif isinstance(action, Finish):
            found[action.start] = np.concatenate(pieces)
            pieces = []
    return found


def test_answers_of_silence_alone(pair: Sound) -> None:
    """No to the early question and yes to the later one gives what silence alone gives."""
    asked = detect(pair, answer=lambda asked: asked.trigger == "silence")
    assert [action for action in without_feeds(asked) if not isinstance(action, Consult)] == (
        without_feeds(detect(pair))
    )


def test_turn_ends_sooner_with_the_same_samples(pair: Sound) -> None:
    """A yes to the early question changes when an utterance is known to be over, not its sound."""
    late = utterances(detect(pair))
    early = utterances(detect(pair, answer=lambda asked: True))
    assert [(one.start, one.end) for one in early] == [(one.start, one.end) for one in late]
    assert [one.trigger for one in early] == ["turn"] * len(late)
    for one, other in zip(early, late, strict=True):
        assert one.confirmed_at - one.speech_end == 11 * 512  # 352 ms
        assert other.confirmed_at - other.speech_end == 19 * 512  # 608 ms
