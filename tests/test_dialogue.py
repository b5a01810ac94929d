"""A dialogue that is revised is what it would be, had the speakers been known from the start."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from recognizer_kit import SENTENCES, SIZES, random_acoustic, save_bundle, transcript

from stream_hbaf.dialogue import TURNS_KEPT, LiveDialogue
from stream_hbaf.errors import ModelError
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.prediction import Prediction
from stream_hbaf.recognizer import Recognizer

FINAL = ["ross", "rachel", "ross", "joey", "rachel", "ross", "joey"]


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recognizer]:
    """It reads names, and remembers what each speaker felt and how each sounds."""
    network = HbafConfig(
        **SIZES,
        use_audio=True,
        audio_width=12,
        audio_skip=True,
        by_speaker=True,
        audio_baseline=True,
    )
    changes: dict[str, Any] = {"acoustic": "compare", "network": network}
    with Recognizer(save_bundle(tmp_path_factory.mktemp("speakers"), **changes)) as loaded:
        yield loaded


def classify(
    recognizer: Recognizer, dialogue: LiveDialogue, speakers: Sequence[str], *, first: int = 1
) -> dict[int, Prediction]:
    """Classify further turns; each text is encoded before anybody knows who speaks."""
    return {
        turn: recognizer.classify_final(
            acoustic=random_acoustic(turn),
            text=recognizer.encode_text(
                transcript(SENTENCES[turn % len(SENTENCES)]), window=dialogue.window
            ),
            dialogue=dialogue,
            speaker=speaker,
            turn=turn,
            explain=True,
        )
        for turn, speaker in enumerate(speakers, start=first)
    }


def assert_same(some: dict[int, Prediction], others: dict[int, Prediction]) -> None:
    assert some.keys() == others.keys()
    for turn, one in some.items():
        assert one.probabilities == pytest.approx(others[turn].probabilities, abs=1e-5), turn
        assert one.contributions is not None
        expected = others[turn].contributions
        assert expected is not None
        assert one.contributions.model_dump() == pytest.approx(expected.model_dump(), abs=1e-5)


def test_revised_turns_are_those_of_the_final_speakers(recognizer: Recognizer) -> None:
    """Several revisions, one before the end: predictions, state, window and numbers of speakers."""
    known = recognizer.new_dialogue()
    expected = classify(recognizer, known, FINAL)

    dialogue = recognizer.new_dialogue()
    found = classify(recognizer, dialogue, ["", "rachel", "ross", "rachel"])
    found |= recognizer.revise(dialogue, {1: "ross", 4: "joey"})
    found |= classify(recognizer, dialogue, ["", "joey", "joey"], first=5)
    wrong = dict(found)
    found |= recognizer.revise(dialogue, {5: "rachel", 6: "ross"})

    assert_same(found, expected)
    assert wrong[7].probabilities != pytest.approx(expected[7].probabilities, abs=1e-4)
    assert dialogue.speakers == known.speakers == ["ross", "rachel", "joey"]
    assert dialogue.window == known.window
    for name, tensor in dialogue.state.tensors().items():
        torch.testing.assert_close(tensor, known.state.tensors()[name], atol=1e-5, rtol=1e-5)


def test_only_turns_from_the_first_change_on_are_classified_again(recognizer: Recognizer) -> None:
    dialogue = recognizer.new_dialogue()
    classify(recognizer, dialogue, FINAL)
    assert recognizer.revise(dialogue, dict(enumerate(FINAL, 1))) == {}
    assert [*recognizer.revise(dialogue, {5: "joey"})] == [5, 6, 7]


def test_a_dialogue_keeps_its_latest_turns_only(recognizer: Recognizer) -> None:
    """A long dialogue takes no more memory; an old turn can't be revised, a later one can."""
    dialogue = recognizer.new_dialogue()
    classify(recognizer, dialogue, ["ross"] * (TURNS_KEPT + 6))
    assert [one.turn for one in dialogue.past] == [*range(7, TURNS_KEPT + 7)]
    assert recognizer.revise(dialogue, {6: "joey"}) == {}
    assert [*recognizer.revise(dialogue, {6: "joey", TURNS_KEPT + 6: "joey"})] == [TURNS_KEPT + 6]
    assert all(one.turn + 1 == other.turn for one, other in pairwise(dialogue.past))


def test_a_revision_that_fails_leaves_the_dialogue_as_it_was(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third turn can't be encoded again: nothing of the first two is lost."""
    dialogue = recognizer.new_dialogue()
    classify(recognizer, dialogue, FINAL)
    before = (dialogue.state, dialogue.window, [*dialogue.speakers], [*dialogue.past])
    encode, calls = recognizer.encode_text, []

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise ModelError("the encoder is gone")
        return encode(*arguments, **named)

    monkeypatch.setattr(recognizer, "encode_text", fail)
    with pytest.raises(ModelError, match="gone"):
        recognizer.revise(dialogue, {1: "joey"})
    assert (dialogue.state, dialogue.window, dialogue.speakers, [*dialogue.past]) == before


def test_a_turn_that_fails_is_not_kept(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moved nothing on, so there is nothing to revise."""
    dialogue = recognizer.new_dialogue()
    classify(recognizer, dialogue, FINAL[:2])

    def fail(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recognizer, "classify", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        classify(recognizer, dialogue, ["joey"], first=3)
    assert [one.turn for one in dialogue.past] == [1, 2]
    assert dialogue.speakers == FINAL[:2]


def test_descriptors_that_no_network_takes_are_not_kept(recognizer: Recognizer) -> None:
    dialogue = recognizer.new_dialogue()
    classify(recognizer, dialogue, ["ross"])
    (kept,) = dialogue.past
    assert kept.acoustic is not None
    assert kept.acoustic.lld.shape == (0, 65)
    np.testing.assert_array_equal(kept.acoustic.functionals, random_acoustic(1).functionals)
