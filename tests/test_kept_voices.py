"""Known voices that are measured on in the next dialogue, and how that ends."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from mqtt_kit import utterance
from numpy.typing import NDArray
from recognizer_kit import SIZES, random_acoustic, save_bundle

from stream_hbaf.config import DialogueConfig, SourceConfig
from stream_hbaf.dialogue import FOLLOWED, LiveDialogue
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.baseline import BaselineConfig, VoicePast
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.tracker import DialogueTracker
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.prediction import Prediction
from stream_hbaf.recognizer import Recognizer


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recognizer]:
    """Its sound is relative to the speaker's past, and it keeps voices."""
    config = save_bundle(
        tmp_path_factory.mktemp("kept"),
        acoustic="ge2e",
        acoustic_widths=(256,),
        baseline=BaselineConfig(parts=("ge2e",)),
        network=HbafConfig(**SIZES, use_audio=True, audio_width=256, audio_skip=True),
    )
    keeping = DialogueConfig(gap_s=10, keep_voices=True)
    with Recognizer(config.model_copy(update={"dialogue": keeping})) as loaded:
        yield loaded


def voice(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(1.0, 1.0, 256).astype(np.float32)


def say(recognizer: Recognizer, dialogue: LiveDialogue, speaker: str, seed: int) -> Prediction:
    acoustic = Acoustic(random_acoustic(0).lld, random_acoustic(0).functionals)
    heard = Acoustic(acoustic.lld, acoustic.functionals, blocks={"ge2e": voice(seed)})
    turn = dialogue.next_turn()
    return recognizer.classify_final(
        acoustic=heard, text=None, dialogue=dialogue, speaker=speaker, turn=turn
    )


def scaled(recognizer: Recognizer, seed: int) -> NDArray[np.float32]:
    [found] = recognizer.bundle.scale(voice(seed)[None])
    return np.asarray(found)


def expected(recognizer: Recognizer, past: VoicePast, seed: int, *, speaker: int) -> Prediction:
    """The answer of a first turn, with what the speaker sounded like before given."""
    heard = Acoustic(
        random_acoustic(0).lld, random_acoustic(0).functionals, blocks={"ge2e": voice(seed)}
    )
    state = recognizer.new_dialogue().state
    return recognizer.classify(
        acoustic=heard, text=None, state=state, speaker=speaker, voices=past
    )[0]


def test_a_known_voice_is_measured_on(recognizer: Recognizer) -> None:
    """As if the utterances before had been in the same dialogue; though the second dialogue begins
    before they are classified."""
    first, second = recognizer.new_dialogue(), recognizer.new_dialogue()
    second.go_on_from(first)
    first.known.add("Ann")
    say(recognizer, first, "Ben", 1)
    say(recognizer, first, "Ann", 2)
    say(recognizer, first, "Ann", 3)
    past = VoicePast()
    for seed in (2, 3):
        past = past.add(scaled(recognizer, seed), speaker=0)
    found = say(recognizer, second, "Ann", 4)
    wanted = expected(recognizer, past, 4, speaker=0)
    assert found.probabilities == pytest.approx(wanted.probabilities, abs=1e-6)
    fresh = expected(recognizer, VoicePast(), 4, speaker=0)
    assert found.probabilities != pytest.approx(fresh.probabilities, abs=1e-4)
    past = past.add(scaled(recognizer, 4), speaker=0)
    np.testing.assert_allclose(second.voices.sums[0], past.sums[0], rtol=1e-6)


def test_a_voice_that_is_not_known_begins_anew(recognizer: Recognizer) -> None:
    """Ben's name may be somebody else's in the next dialogue, as "speaker 1" always is."""
    first, second = recognizer.new_dialogue(), recognizer.new_dialogue()
    say(recognizer, first, "Ben", 1)
    second.go_on_from(first)
    found = say(recognizer, second, "Ben", 4)
    fresh = expected(recognizer, VoicePast(), 4, speaker=0)
    assert found.probabilities == pytest.approx(fresh.probabilities, abs=1e-6)


def test_voices_are_kept_through_a_dialogue_without_them(recognizer: Recognizer) -> None:
    """And revised turns are classified with them, as at first."""
    first, second, third = (recognizer.new_dialogue() for _ in range(3))
    first.known.add("Ann")
    say(recognizer, first, "Ann", 2)
    second.go_on_from(first)
    third.go_on_from(second)
    say(recognizer, third, "Ben", 1)
    found = say(recognizer, third, "Ann", 4)
    np.testing.assert_allclose(
        third.voices.sums[1],
        VoicePast()
        .add(scaled(recognizer, 2), speaker=1)
        .add(scaled(recognizer, 4), speaker=1)
        .sums[1],
        rtol=1e-6,
    )
    again = recognizer.revise(third, {1: "Eve", 2: "Ann"})
    assert again[2].probabilities == pytest.approx(found.probabilities, abs=1e-6)


def test_a_silence_goes_on_and_a_reset_does_not(recognizer: Recognizer) -> None:
    """The summary says which dialogue it goes on from."""
    tracker = DialogueTracker()
    first, _ = tracker.next_turn(recognizer, at_s=0.0)
    tracker.last_end_s = 5.0
    second, _ = tracker.next_turn(recognizer, at_s=20.0)
    assert (first.follows, second.follows) == ((), (first.id,))
    end = utterance(1).model_copy(update={"dialogue_id": second.id})
    assert tracker.speakers is not None
    assert tracker.speakers.add(end).follows == first.id
    tracker.last_end_s = 25.0
    third, _ = tracker.next_turn(recognizer, at_s=40.0)
    assert third.follows == (second.id, first.id)
    tracker.end()
    fresh, _ = tracker.next_turn(recognizer, at_s=41.0)
    assert fresh.follows == ()


def test_there_is_an_end_to_it(recognizer: Recognizer) -> None:
    """So many dialogues in a row are known by their ids, and then it begins anew."""
    dialogue = recognizer.new_dialogue()
    for _ in range(FOLLOWED):
        after = LiveDialogue(dialogue.state)
        after.go_on_from(dialogue)
        dialogue = after
    assert len(dialogue.follows) == FOLLOWED
    last = LiveDialogue(dialogue.state)
    last.go_on_from(dialogue)
    assert last.follows == ()


def test_forgetting_a_dialogue_ends_those_that_went_on_from_it(recognizer: Recognizer) -> None:
    """What was kept of its voices is gone, also where another dialogue follows by now."""
    pipeline = LivePipeline(recognizer, [])
    pipeline.sources = {"a": pipeline._pipeline_of(SourceConfig(name="a"))}
    tracker = pipeline.sources["a"].tracker
    first, _ = tracker.next_turn(recognizer, at_s=0.0)
    tracker.last_end_s = 5.0
    second, _ = tracker.next_turn(recognizer, at_s=20.0)
    assert asyncio.run(pipeline.finish_dialogue("another")) == 0
    assert tracker.dialogue is second
    assert asyncio.run(pipeline.finish_dialogue(first.id)) == 0
    assert tracker.dialogue is None
