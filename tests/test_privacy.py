"""What leaves the process under each privacy mode, to the field and to the byte."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_kit import EventLog
from mosquitto import Mosquitto, Subscriber, mosquitto, require_mosquitto

from stream_hbaf.audio.push_source import AudioFormat, PushSource
from stream_hbaf.events import (
    AnyEvent,
    Asr,
    Contributions,
    DialogueSummary,
    Emotion,
    Inferred,
    Level,
    Partial,
    Privacy,
    Speech,
    State,
    Status,
    Utterance,
)
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.runtime import redact
from stream_hbaf.recognizer import Recognizer

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
    assert redact(event, "full") is event


@pytest.mark.parametrize("event", [END, END.model_copy(update={"type": "update"}), PARTIAL])
def test_no_text_takes_the_words_and_nothing_else(event: AnyEvent) -> None:
    """The words and the phrases inferred from them are gone; the rest is as it was."""
    seen = redact(event, "no_text")
    assert seen is not None
    assert SECRET not in seen.model_dump_json()
    before, after = event.model_dump(), seen.model_dump()
    assert {key for key in before if before[key] != after[key]} <= {"text", "inferences"}


def test_label_only_leaves_label_and_time() -> None:
    """Of a finished utterance: which, when, and the label; not who, what, nor how sure."""
    seen = redact(END, "label_only")
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


def test_label_only_hides_who_and_that_somebody_was_told_apart() -> None:
    """A revision of the speaker alone says the same as before."""
    named = {"speaker": "Ann", "speaker_score": 0.9, "speaker_source": "enrolled"}
    seen = redact(END.model_copy(update=named), "label_only")
    assert seen == redact(
        END.model_copy(update={"speaker": "", "speaker_source": ""}), "label_only"
    )


@pytest.mark.parametrize("event", [PARTIAL, END.model_copy(update={"type": "new"})])
def test_label_only_says_nothing_before_the_end(event: AnyEvent) -> None:
    """What is provisional doesn't leave."""
    assert redact(event, "label_only") is None


def test_label_only_summarises_by_labels() -> None:
    """How many utterances had which label, and no more."""
    seen = redact(SUMMARY, "label_only")
    assert isinstance(seen, DialogueSummary)
    assert (seen.emotions, seen.speakers, seen.probabilities) == ({"joy": 1}, {}, {})


@pytest.mark.parametrize("state", ["online", "offline", "degraded"])
def test_label_only_names_no_sender(state: State) -> None:
    """A source's state is known; who sends, and from which address, isn't."""
    detail = "hall: 192.168.1.7 (Ann) is sending"
    seen = redact(Status(source="hall", stage="capture", state=state, detail=detail), "label_only")
    assert isinstance(seen, Status)
    assert (seen.state, seen.source) == (state, "hall")
    assert seen.detail in ("sound comes in", "no sound comes in", "sound is lost or incomplete")


def test_label_only_names_no_sender_of_a_source(recognizer: Recognizer) -> None:
    """From a sender that says its name, through a real source, to all that is published."""
    log = EventLog()

    def said(state: State) -> list[str]:
        found = [event for event in log.events if isinstance(event, Status)]
        return [one.detail for one in found if one.stage == "capture" and one.state == state]

    config = recognizer.config.model_copy(update={"privacy": "label_only"})

    async def main() -> None:
        pipeline = LivePipeline(recognizer, [log])
        source = PushSource("hall", chunk_ms=64, on_status=pipeline.report_capture)
        stop = asyncio.Event()
        async with source:
            running = asyncio.create_task(pipeline.run(source, stop=stop))
            await asyncio.sleep(0.2)
            with source.sender("192.168.1.7") as sender:
                sender.begin(AudioFormat(16_000, 1, "s16le"), speaker="Ann")
                await log.until(lambda: said("online") != [])
            await log.until(lambda: "no sound comes in" in said("offline"))
            stop.set()
            await running

    original, recognizer.config = recognizer.config, config
    try:
        asyncio.run(main())
    finally:
        recognizer.config = original
    assert "sound comes in" in said("online")
    everything = "".join(event.model_dump_json() for event in log.events)
    assert "Ann" not in everything
    assert "192.168" not in everything


@pytest.mark.parametrize("event", WORDLESS)
@pytest.mark.parametrize("privacy", ["no_text", "label_only"])
def test_what_has_no_words_leaves_as_it_is(event: AnyEvent, privacy: Privacy) -> None:
    """State is no secret."""
    assert redact(event, privacy) == event


@pytest.mark.parametrize(("privacy", "has_words"), [("full", True), ("no_text", False)])
def test_no_word_leaves_the_command(tmp_path: Path, privacy: str, has_words: bool) -> None:
    """Not to the broker, nor stdout, stderr or the disk, though the words were used."""
    require_mosquitto()
    recording = Path(__file__).parent / "recordings" / "jfk.flac"
    state = tmp_path / "state"

    def recognise(url: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [
                *(sys.executable, "-m", "stream_hbaf.cli", "--file", str(recording)),
                *("--speed", "max", "--mqtt", url, "--json", "--privacy", privacy),
                "--inferences",
            ],
            capture_output=True,
            env={**os.environ, "XDG_STATE_HOME": str(state)},
            check=True,
        )

    async def main(broker: Mosquitto) -> tuple[Any, list[str]]:
        async with Subscriber(broker.port, topic="stream_hbaf/#") as subscriber:
            running = asyncio.create_task(asyncio.to_thread(recognise, broker.url))
            published = await subscriber.until("stopped", timeout_s=60)
            return await running, published

    with mosquitto(tmp_path) as broker:
        done, published = asyncio.run(main(broker))
    kept = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    output = done.stdout + done.stderr + "\n".join(published).encode() + kept
    for word in (b"americans", b"country", b"ask not"):
        assert (word in output.lower()) is has_words
    ends = [e for e in map(json.loads, done.stdout.splitlines()) if e.get("type") == "end"]
    assert any("text" in end["modalities"] for end in ends)
