"""What leaves the process under each privacy mode, to the field."""

import pytest

from stream_hbaf.events import (
    AnyEvent,
    Asr,
    Contributions,
    DialogueSummary,
    Emotion,
    Inferred,
    Level,
    Partial,
    Speech,
    Status,
    Utterance,
)
from stream_hbaf.privacy import veil

SECRET = "the cellar key"
EMOTION = Emotion(
    label="joy",
    score=0.7,
    abstained=False,
    set=["joy", "surprise"],
    probabilities={"joy": 0.7, "surprise": 0.3},
)
END = Utterance(
    id="d-1",
    rev=3,
    type="end",
    source="microphone",
    dialogue_id="d",
    turn=1,
    speaker="Ann",
    start_time="2026-01-01T00:00:00.000+00:00",
    end_time="2026-01-01T00:00:01.000+00:00",
    audio_start_ms=0.0,
    audio_end_ms=1000.0,
    trigger="silence",
    text=SECRET,
    language="en",
    asr=Asr(avg_logprob=-0.2, no_speech_prob=0.1),
    modalities=["audio", "text"],
    emotion=EMOTION,
    contributions=Contributions(audio=0.1, text=0.4, context=0.0),
    conflict=False,
    inferences=Inferred(external=[SECRET], internal=[], purpose=[]),
)
PARTIAL = Partial(
    id="d-1",
    source="microphone",
    dialogue_id="d",
    speaker="Ann",
    text=SECRET,
    modalities=["text"],
    emotion=EMOTION,
)
SUMMARY = DialogueSummary(
    source="microphone",
    dialogue_id="d",
    start_time="2026-01-01T00:00:00.000+00:00",
    end_time="2026-01-01T00:00:01.000+00:00",
    turns=1,
    speakers={"Ann": "joy"},
    emotions={"joy": 1},
    probabilities={"joy": 0.7, "surprise": 0.3},
)
WORDLESS: list[AnyEvent] = [
    Speech(source="microphone", on=True),
    Status(source="microphone", stage="capture", state="online"),
    Level(source="microphone", dbfs=-30.0, speech=True),
]


@pytest.mark.parametrize("event", [END, PARTIAL, SUMMARY, *WORDLESS])
def test_full_changes_nothing(event: AnyEvent) -> None:
    """Whoever asks for nothing keeps everything."""
    assert veil(event, "full") is event


@pytest.mark.parametrize("event", [END, END.model_copy(update={"type": "update"}), PARTIAL])
def test_no_text_takes_the_words_and_nothing_else(event: AnyEvent) -> None:
    """The words and the phrases inferred from them are gone; the rest is as it was."""
    seen = veil(event, "no_text")
    assert seen is not None
    assert SECRET not in seen.model_dump_json()
    before, after = event.model_dump(), seen.model_dump()
    assert {key for key in before if before[key] != after[key]} <= {"text", "inferences"}


def test_label_only_leaves_label_and_time() -> None:
    """Of a finished utterance: which, when, and the label; not who, what, nor how sure."""
    seen = veil(END, "label_only")
    assert seen is not None
    assert seen.model_dump(exclude_defaults=True) == {
        "id": "d-1",
        "rev": 3,
        "type": "end",
        "source": "microphone",
        "dialogue_id": "d",
        "turn": 1,
        "speaker": "",
        "start_time": "2026-01-01T00:00:00.000+00:00",
        "end_time": "2026-01-01T00:00:01.000+00:00",
        "audio_start_ms": 0.0,
        "audio_end_ms": 1000.0,
        "emotion": {"label": "joy"},
    }


@pytest.mark.parametrize("event", [PARTIAL, END.model_copy(update={"type": "new"})])
def test_label_only_says_nothing_before_the_end(event: AnyEvent) -> None:
    """What is provisional doesn't leave."""
    assert veil(event, "label_only") is None


def test_label_only_summarises_by_labels() -> None:
    """How many utterances had which label, and no more."""
    seen = veil(SUMMARY, "label_only")
    assert isinstance(seen, DialogueSummary)
    assert (seen.emotions, seen.speakers, seen.probabilities) == ({"joy": 1}, {}, {})


@pytest.mark.parametrize("event", WORDLESS)
@pytest.mark.parametrize("privacy", ["no_text", "label_only"])
def test_what_has_no_words_leaves_as_it_is(event: AnyEvent, privacy: str) -> None:
    """State is no secret."""
    assert veil(event, privacy) == event
