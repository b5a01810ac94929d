"""What a voice may move, live: its familiarity, its weight beside the words, explanations."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from recognizer_kit import SENTENCES, SIZES, random_acoustic, save_bundle, transcript

from stream_hbaf.corpora.dataset import Dataset
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.evaluation.offline import probabilities_of
from stream_hbaf.networks.calibration import LARGEST, Calibration, Reliability
from stream_hbaf.networks.familiarity import fit_familiarity
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.prediction import Prediction, emotion_of
from stream_hbaf.recognizer import Recognizer

WIDTH = 12
# Whether each utterance of SENTENCES has audio and text.
GIVEN = ((True, True), (True, False), (False, True), (True, True), (False, False), (True, True))


def calibration(**changes: float) -> Calibration:
    weights = {"base": -1.0, "familiar": 3.0, "telling": 2.0, "softness": 0.5} | changes
    return Calibration(
        temperatures={"": 0.3, "audio": 0.1, "text": 0.08, "audio+text": 0.2},
        thresholds={"": 0.0, "audio": 0.1, "text": 0.2, "audio+text": 0.3},
        answers_above={"": 1.0, "audio": 0.6, "text": 0.7, "audio+text": 0.5},
        risk=0.3,
        reliability=Reliability(**weights, typical=(0.2, 0.5, 0.3)),
    )


RUNNING = {"prior": 2.0, "past": 9.0, "enough": 0.8, "softness": 2.0}  # means of the dialogue


@pytest.fixture(scope="module", params=[{}, RUNNING], ids=["each", "running"])
def recognizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recognizer]:
    """A recogniser that weighs voices, with statistics of made-up training audio."""
    network = HbafConfig(**SIZES, use_audio=True, audio_width=WIDTH, audio_skip=True)
    place = tmp_path_factory.mktemp("weighs")
    audio = np.random.default_rng(1).normal(size=(400, WIDTH)).astype(np.float32)
    familiarity = fit_familiarity(1.5 * audio[:200], 2 * audio[200:], blocks={"x": range(WIDTH)})
    config = save_bundle(
        place,
        acoustic="compare",
        network=network,
        calibration=calibration(**request.param),
        familiarity=familiarity,
    )
    with Recognizer(config) as loaded:
        yield loaded


def classify(
    recognizer: Recognizer, dialogue: LiveDialogue, turn: int, *, explain: bool = True, **what: bool
) -> Prediction:
    """Classify the next utterance of SENTENCES, with its text and random audio where given."""
    audio, text = what.get("audio", GIVEN[turn][0]), what.get("text", GIVEN[turn][1])
    spoken = transcript(SENTENCES[turn] if text else "")
    return recognizer.classify_final(
        acoustic=random_acoustic(turn) if audio else None,
        text=recognizer.encode_text(spoken, window=dialogue.window),
        dialogue=dialogue,
        explain=explain,
    )


def dataset(recognizer: Recognizer) -> Dataset:
    """The dialogue that ``classify`` goes through, as evaluation has it."""
    bundle, window = recognizer.bundle, recognizer.new_dialogue().window
    text = np.zeros((len(GIVEN), 16), np.float32)
    commonsense = np.zeros((len(GIVEN), 3, 6), np.float32)
    audio = np.full((len(GIVEN), WIDTH), np.nan, np.float32)
    for n, (sound, words) in enumerate(GIVEN):
        if words:
            features = recognizer.encode_text(transcript(SENTENCES[n]), window=window)
            window = features.window_after
            assert features.embedding is not None
            assert features.commonsense is not None
            text[n], commonsense[n] = features.embedding, features.commonsense
        if sound:
            audio[n] = bundle.scale(random_acoustic(n).functionals[None])[0]
    given = np.array(GIVEN)
    return Dataset(
        labels=np.zeros(len(GIVEN), np.int64),
        text=text,
        commonsense=commonsense,
        audio={"": audio},
        dialogues=(np.arange(len(GIVEN)),),
        audio_mask=given[:, 0],
        text_mask=given[:, 1],
    )


def values(prediction: Prediction) -> NDArray[np.float64]:
    return np.array(list(prediction.probabilities.values()))


@pytest.mark.parametrize("explain", [True, False])
def test_utterance_by_utterance_equals_the_whole_dialogue(
    recognizer: Recognizer, explain: bool
) -> None:
    """Weighed answers, explained or not, are those of evaluation, whatever each utterance has."""
    dialogue = recognizer.new_dialogue()
    expected = probabilities_of(recognizer.bundle, dataset(recognizer))
    for turn, row in enumerate(expected):
        found = classify(recognizer, dialogue, turn, explain=explain)
        np.testing.assert_allclose(values(found), row, atol=1e-5)


def test_familiarity_is_in_the_event_where_there_is_sound(recognizer: Recognizer) -> None:
    """The bundle's own, as a number; absent without sound."""
    dialogue = recognizer.new_dialogue()
    assert recognizer.bundle.familiarity is not None
    heard = set()
    for turn, (audio, _) in enumerate(GIVEN):
        emotion = emotion_of(classify(recognizer, dialogue, turn))
        scaled = recognizer.bundle.scale(random_acoustic(turn).functionals[None])
        expected = float(recognizer.bundle.familiarity(scaled)[0])
        assert emotion.familiarity == (expected if audio else None)
        heard.add(emotion.familiarity)
    assert len(heard) > 2


def test_a_voice_without_weight_changes_nothing(recognizer: Recognizer) -> None:
    """Every answer with words is that of a dialogue of words alone.

    Also in later turns: what the network remembers of earlier sound doesn't reach them.
    """
    bundle = recognizer.bundle
    settings = bundle.calibration.reliability
    assert settings is not None
    mute = settings.model_copy(update={"base": -LARGEST})
    weighed = bundle.calibration.model_copy(update={"reliability": mute})
    silent = bundle.config.model_copy(update={"calibration": weighed})
    try:
        recognizer.bundle = replace(bundle, config=silent)
        dialogue, written = recognizer.new_dialogue(), recognizer.new_dialogue()
        for turn, (_, text) in enumerate(GIVEN):
            both = classify(recognizer, dialogue, turn)
            by_words = classify(recognizer, written, turn, audio=False)
            if text:
                np.testing.assert_allclose(values(both), values(by_words), atol=1e-6)
    finally:
        recognizer.bundle = bundle


def test_a_dialogue_remembers_what_its_voices_and_words_were_worth(
    recognizer: Recognizer,
) -> None:
    """The sums of what each answer says of itself, of those that have it."""
    dialogue = recognizer.new_dialogue()
    found = [classify(recognizer, dialogue, turn) for turn in range(len(GIVEN))]
    assert [one.familiarity is not None for one in found] == [audio for audio, _ in GIVEN]
    assert [one.telling is not None for one in found] == [text for _, text in GIVEN]
    assert (dialogue.sums.voices, dialogue.sums.texts) == (4, 4)
    assert dialogue.sums.familiarity == pytest.approx(sum(one.familiarity or 0.0 for one in found))
    assert dialogue.sums.telling == pytest.approx(sum(one.telling or 0.0 for one in found))


def test_contributions_sum_to_what_the_inputs_changed(recognizer: Recognizer) -> None:
    """Of the weighed probabilities: the score less that of nothing at all."""
    dialogue, empty = recognizer.new_dialogue(), recognizer.new_dialogue()
    nothing = classify(recognizer, empty, 0, audio=False, text=False).probabilities
    for turn in range(len(GIVEN)):
        found = classify(recognizer, dialogue, turn)
        assert found.contributions is not None
        added = sum(found.contributions.model_dump().values())
        changed = found.probabilities[found.label] - nothing[found.label]
        assert added == pytest.approx(changed, abs=1e-6)


def test_revised_turns_are_weighed_as_the_first_time(recognizer: Recognizer) -> None:
    """The dialogue is rewound with both of its streams."""
    dialogue = recognizer.new_dialogue()
    first = []
    for turn, (audio, text) in enumerate(GIVEN):
        spoken = transcript(SENTENCES[turn] if text else "")
        first.append(
            recognizer.classify_final(
                acoustic=random_acoustic(turn) if audio else None,
                text=recognizer.encode_text(spoken, window=dialogue.window),
                dialogue=dialogue,
                turn=turn + 1,
                explain=True,
            )
        )
    again = recognizer.revise(dialogue, {2: "somebody else"})
    for turn, prediction in again.items():
        np.testing.assert_allclose(values(prediction), values(first[turn - 1]), atol=1e-6)
    assert list(again) == [2, 3, 4, 5, 6]
