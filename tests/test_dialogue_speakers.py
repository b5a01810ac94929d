"""Who spoke the turns of a live dialogue, and what is published when that changes."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from live_kit import EventLog
from numpy.typing import NDArray
from recognizer_kit import SENTENCES, SIZES, random_acoustic, save_bundle, transcript

from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import DialogueSummary, Emotion, Privacy, Utterance
from stream_hbaf.live.runtime import Runtime
from stream_hbaf.live.speakers import ENDS_KEPT, DialogueSpeakers, Revision
from stream_hbaf.live.tracker import DialogueTracker
from stream_hbaf.live.utterance import LiveUtterance
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.format import SpeakerChange
from stream_hbaf.speech.segmenter import Finish

Float32 = NDArray[np.float32]

ANN, BEN = np.eye(2, 192, dtype=np.float32)  # two voices that are like nothing of each other
SECONDS = 2 * SAMPLE_RATE_HZ


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recognizer]:
    """What it says depends on who spoke, and on who spoke before."""
    network = HbafConfig(
        **SIZES, use_audio=True, audio_width=12, audio_skip=True, by_speaker=True,
        audio_baseline=True,
    )  # fmt: skip
    changes: dict[str, Any] = {"acoustic": "compare", "network": network}
    with Recognizer(save_bundle(tmp_path_factory.mktemp("speakers"), **changes)) as loaded:
        yield loaded


class Talk:
    """A dialogue without a clock or a loop: each turn is attributed, classified and published."""

    def __init__(self, recognizer: Recognizer) -> None:
        self.tracker = DialogueTracker()
        self.tracker.begin(recognizer, recognizer.new_dialogue())
        self.published: list[Utterance] = []
        self._recognizer = recognizer

    @property
    def speakers(self) -> DialogueSpeakers:
        assert self.tracker.speakers is not None
        return self.tracker.speakers

    @property
    def id(self) -> str:
        assert self.tracker.dialogue is not None
        return self.tracker.dialogue.id

    def say(self, voice: Float32 | None, *, by: str = "", seconds: float = 2.0) -> Utterance:
        """The next turn: of a voice, or of a source whose settings name its speaker."""
        dialogue, turn = self.tracker.next_turn(self._recognizer, at_s=0.0)
        end = int(seconds * SAMPLE_RATE_HZ)
        utterance = LiveUtterance(
            recognizer=self._recognizer,
            dialogue=dialogue,
            source=SourceConfig(name="table", speaker=by),
            turn=turn,
            speakers=self.speakers,
            start=0,
            started_at=0.0,
        )
        utterance.finish = Finish(0, end, "silence", end, 1.0, end)
        revisions = [] if by else utterance.attribute(voice)
        text = utterance.encode_text(transcript(SENTENCES[turn % len(SENTENCES)]))
        prediction = utterance.classify_final(random_acoustic(turn), text)
        event = utterance.event("end", text=text, prediction=prediction)
        self.published.append(event)
        self.speakers.add(event)
        self._publish(revisions)
        return event

    def change(self, change: Any, into: str, *, turn: int = 0, speaker: str = "") -> list[Revision]:
        revisions = self.speakers.apply(
            SpeakerChange(dialogue_id=self.id, change=change, turn=turn, speaker=speaker, into=into)
        )
        self._publish(revisions)
        return revisions

    def _publish(self, revisions: Sequence[Revision]) -> None:
        for revision in revisions:
            self.published.append(revision.after)
            self.speakers.summarise(revision)

    def latest(self) -> dict[int, Utterance]:
        return {end.turn: end for end in self.published}


def names(talk: Talk) -> list[str]:
    return [end.speaker for _, end in sorted(talk.latest().items())]


def assert_as_if_known(talk: Talk, recognizer: Recognizer) -> None:
    """What was published last of each turn is what a dialogue gives in which it was known."""
    fresh = recognizer.new_dialogue()
    for turn, end in sorted(talk.latest().items()):
        text = recognizer.encode_text(
            transcript(SENTENCES[turn % len(SENTENCES)]), speaker=end.speaker, window=fresh.window
        )
        expected = recognizer.classify_final(
            acoustic=random_acoustic(turn), text=text, dialogue=fresh, speaker=end.speaker,
            explain=True,
        )  # fmt: skip
        assert end.emotion is not None
        assert end.emotion.probabilities == pytest.approx(expected.probabilities, abs=1e-5), turn
    dialogue = talk.tracker.dialogue
    assert dialogue is not None
    assert dialogue.speakers == fresh.speakers
    assert dialogue.window == fresh.window


def test_voices_get_names_in_the_order_in_which_they_are_heard(recognizer: Recognizer) -> None:
    talk = Talk(recognizer)
    for voice in (ANN, BEN, ANN):
        talk.say(voice)
    assert names(talk) == ["speaker 1", "speaker 2", "speaker 1"]
    assert {end.speaker_source for end in talk.published} == {"voice"}
    assert all(0.5 < (end.speaker_score or 0) <= 1 for end in talk.published)
    assert [end.revision for end in talk.published] == [None] * 3


def test_a_speaker_that_settings_name_is_not_guessed(recognizer: Recognizer) -> None:
    talk = Talk(recognizer)
    talk.say(ANN)
    end = talk.say(None, by="Cleo")
    assert (end.speaker, end.speaker_source, end.speaker_score) == ("Cleo", "source", None)


@pytest.mark.parametrize("voice", [None, ANN])
def test_what_is_too_short_has_no_speaker_yet(
    recognizer: Recognizer, voice: Float32 | None
) -> None:
    talk = Talk(recognizer)
    end = talk.say(voice, seconds=0.4)
    assert (end.speaker, end.speaker_source, end.speaker_score) == ("", "", 0.0)


def test_a_correction_revises_that_turn_and_what_followed(recognizer: Recognizer) -> None:
    """Same ids, rising revisions; the emotions are those of a dialogue with the final speakers."""
    talk = Talk(recognizer)
    for voice in (ANN, BEN, None, ANN, BEN):
        talk.say(voice)
    revisions = talk.change("correct", "speaker 2", turn=3)
    assert names(talk) == ["speaker 1", "speaker 2", "speaker 2", "speaker 1", "speaker 2"]
    corrected = revisions[0].after
    assert (corrected.turn, corrected.speaker_source, corrected.speaker_score) == (
        3,
        "corrected",
        1.0,
    )
    assert [after.turn for _, after in revisions] == [3, 4, 5]
    for before, after in revisions:
        assert (after.id, after.type) == (before.id, "end")
        assert (after.rev, after.revision) == (before.rev + 1, 1)
    assert_as_if_known(talk, recognizer)


def test_what_people_say_holds_for_what_comes(recognizer: Recognizer) -> None:
    """Renamed and merged speakers, twice revised turns, and a voice that was learned."""
    talk = Talk(recognizer)
    for voice in (ANN, BEN, ANN, BEN):
        talk.say(voice)
    assert len(talk.change("rename", "Ann", speaker="speaker 1")) >= 2
    talk.say(ANN)
    assert names(talk) == ["Ann", "speaker 2", "Ann", "speaker 2", "Ann"]
    assert_as_if_known(talk, recognizer)
    talk.change("merge", "Ann", speaker="speaker 2")
    talk.say(BEN)
    assert names(talk) == ["Ann"] * 6
    assert max(end.revision or 0 for end in talk.published) == 2
    assert_as_if_known(talk, recognizer)


def test_several_sources_share_the_speakers_of_a_dialogue(recognizer: Recognizer) -> None:
    """One source has a name in its settings: its turns can be corrected, and are no voice's."""
    talk = Talk(recognizer)
    talk.say(ANN)
    talk.say(None, by="Cleo")
    talk.say(BEN)
    talk.change("correct", "speaker 1", turn=2)
    talk.change("correct", "Cleo", turn=2)
    assert names(talk) == ["speaker 1", "Cleo", "speaker 2"]
    assert talk.latest()[2].speaker_source == "corrected"
    talk.change("merge", "Cleo", speaker="speaker 2")
    talk.say(BEN)
    assert names(talk) == ["speaker 1", "Cleo", "Cleo", "Cleo"]
    assert_as_if_known(talk, recognizer)


def test_the_summary_follows_revisions(recognizer: Recognizer) -> None:
    """It is that of the utterances as they are now."""
    talk = Talk(recognizer)
    for voice in (ANN, BEN, ANN, BEN):
        talk.say(voice)
    before = talk.latest()[4]
    revisions = talk.change("merge", "speaker 1", speaker="speaker 2")
    assert revisions[-1].before == before
    ends = [end for _, end in sorted(talk.latest().items())]
    summary = talk.speakers.summary.latest
    assert summary is not None
    labels = [end.emotion.label for end in ends if end.emotion is not None]
    assert summary.turns == len(labels) == 4
    assert summary.speakers == {"speaker 1": labels[-1]}
    assert summary.emotions == {label: labels.count(label) for label in set(labels)}
    for label, mean in summary.probabilities.items():
        each = [end.emotion.probabilities[label] for end in ends if end.emotion is not None]
        assert mean == pytest.approx(sum(each) / len(each), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "fields", "complaint"),
    [
        ("correct", {"turn": 7}, "no finished utterance .*-7, or too long ago"),
        ("rename", {"speaker": "speaker 9"}, "no speaker 'speaker 9' in this dialogue: there is s"),
        ("merge", {"speaker": "speaker 1"}, "no speaker 'Ann' in this dialogue"),
    ],
)
def test_what_is_not_there_cannot_be_changed(
    recognizer: Recognizer, change: str, fields: dict[str, Any], complaint: str
) -> None:
    talk = Talk(recognizer)
    talk.say(ANN)
    with pytest.raises(ConfigError, match=complaint):
        talk.change(change, "Ann", **fields)
    assert len(talk.published) == 1


@pytest.mark.parametrize("name", ["", " ", "a\nb", " Ann", "x" * 65, "\x1b[2J"])
def test_a_name_is_one_line_of_printable_text(recognizer: Recognizer, name: str) -> None:
    talk = Talk(recognizer)
    talk.say(ANN)
    with pytest.raises(ConfigError, match="a speaker's name"):
        talk.change("rename", name, speaker="speaker 1")


def test_without_voices_a_turn_can_still_be_corrected(recognizer: Recognizer) -> None:
    """Where settings name the speaker, nobody is told apart: there is nobody to rename."""
    talk = Talk(recognizer)
    talk.say(None, by="Cleo")
    with pytest.raises(ConfigError, match="no speakers are told apart"):
        talk.change("rename", "Ann", speaker="Cleo")
    ((_, after),) = talk.change("correct", "Ann", turn=1)
    assert (after.speaker, after.speaker_source) == ("Ann", "corrected")


def test_a_long_dialogue_keeps_its_newest_utterances_only(recognizer: Recognizer) -> None:
    talk = Talk(recognizer)
    end = talk.say(ANN)
    for turn in range(2, ENDS_KEPT + 3):
        talk.speakers.add(end.model_copy(update={"turn": turn}))
    with pytest.raises(ConfigError, match="too long ago"):
        talk.change("correct", "Ann", turn=2)
    assert talk.change("correct", "Ann", turn=3)


@pytest.mark.parametrize(
    ("privacy", "changes", "count"),
    [
        ("full", {"speaker": "Ann"}, 1),
        ("no_text", {"speaker": "Ann"}, 1),
        ("label_only", {"speaker": "Ann", "speaker_source": "voice"}, 0),
        ("label_only", {"emotion": Emotion(label="joy")}, 1),
        ("full", {}, 0),
    ],
)
def test_a_revision_is_published_if_it_says_anything_new(
    recognizer: Recognizer, privacy: Privacy, changes: dict[str, Any], count: int
) -> None:
    """Where names and numbers of speakers don't leave, nor does that they changed."""
    talk, log = Talk(recognizer), EventLog()
    before = talk.say(ANN)
    after = before.model_copy(update={"rev": before.rev + 1, "revision": 1, **changes})
    runtime = Runtime(recognizer, [log], on_recognition=lambda one: None)
    runtime.config = runtime.config.model_copy(update={"privacy": privacy})
    asyncio.run(runtime.publish_revisions(talk.speakers, [Revision(before, after)]))
    assert [end.revision for end in log.ends()] == [1] * count
    assert len([e for e in log.events if isinstance(e, DialogueSummary)]) == 1
