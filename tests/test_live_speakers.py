"""Who speaks, by voice: from one microphone to what is published, recorded and replayed."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RECORDINGS
from live_kit import EventLog, RandomChunks, recognise
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig, load_config
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.events import Feedback, Info, Request, Status, Utterance
from stream_hbaf.features import speaker
from stream_hbaf.features.speaker import Part, SpeakerStream
from stream_hbaf.features.voice_prints import enrol, forget
from stream_hbaf.live.control import Controls
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.replay import replay_session
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.live.utterance import Voice
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.recorder import SessionRecorder
from stream_hbaf.sessions.session import Session, open_sessions

Sound = NDArray[np.int16]
Meanwhile = Callable[[Controls, EventLog], Awaitable[Any]]

pytestmark = pytest.mark.skipif(speaker.find_campplus() is None, reason=speaker.INSTALL)
TABLE = SourceConfig(name="table")
SILENCE = np.zeros(SAMPLE_RATE_HZ, np.int16)
JFK = np.concatenate([read_audio(RECORDINGS / "jfk.flac")[: 3 * SAMPLE_RATE_HZ], SILENCE])


@pytest.fixture(scope="module")
def by_voice() -> Iterator[Recognizer]:
    overrides = {"speakers.engine": "campplus", "transcript.model": "tiny.en"}
    with Recognizer(load_config(overrides=overrides)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def talk(sentences: list[Sound]) -> Sound:
    """A reader and a president, by turns."""
    return np.concatenate([sentences[1], JFK, sentences[2], JFK])


def run(
    recognizer: Recognizer,
    *sounds: Sound,
    folder: Path | None = None,
    sources: Sequence[SourceConfig] = (TABLE,),
    meanwhile: Meanwhile | None = None,
    seed: int = 7,
) -> EventLog:
    """Listen to a sound of each source; what was published."""
    log = EventLog()

    async def listen() -> None:
        recorder = folder and SessionRecorder(
            folder, config=recognizer.config, recognizer=recognizer
        )
        pipeline = LivePipeline(
            recognizer,
            [recorder, log] if recorder else [log],
            on_audio=recorder.on_audio if recorder else None,
            on_speaker_change=recorder.on_speaker_change if recorder else None,
        )
        info = Info(version="0", model=recognizer.model, labels=[], licence="", sources=[])
        controls = Controls(
            pipeline,
            info=lambda: info,
            recording=recorder or None,
            stores=lambda: [recorder] if recorder else [],
        )
        pace = 4 if meanwhile else None
        opened = {
            source: RandomChunks(sound, seed=seed, pace=pace)
            for source, sound in zip(sources, sounds, strict=True)
        }
        running = asyncio.create_task(pipeline.run(opened, stop=asyncio.Event()))
        if meanwhile is not None:
            await meanwhile(controls, log)
        await running

    asyncio.run(listen())
    return log


def final(ends: list[Utterance]) -> list[Utterance]:
    return [*{end.id: end for end in ends}.values()]


def test_two_voices_are_two_speakers(by_voice: Recognizer, talk: Sound) -> None:
    """Each end says who spoke, and how surely; before it nobody knows."""
    log = run(by_voice, talk)
    ends = final(log.ends())
    readers = {end.speaker for end in ends if "ask" not in end.text.lower()}
    assert {end.speaker for end in ends} == {"speaker 1", "speaker 2"}, ends
    assert readers == {"speaker 1"} or len(readers) == 2
    assert [end.speaker for end in ends[:2]] == ["speaker 1", "speaker 2"]
    assert {end.speaker_source for end in ends} == {"voice"}
    begun = [e for e in log.events if isinstance(e, Utterance) and e.type == "new"]
    assert {(one.speaker, one.speaker_source) for one in begun} == {("", "")}
    assert Status(source="table", stage="speaker", state="online") in log.events


@pytest.fixture(scope="module")
def interrupted(sentences: list[Sound]) -> Sound:
    """A president, and a reader who falls in with him."""
    president = read_audio(RECORDINGS / "jfk.flac")[85_000:121_000]
    return np.concatenate([president, sentences[3], SILENCE])


@pytest.fixture(scope="module")
def split(by_voice: Recognizer, interrupted: Sound, tmp_path_factory: Any) -> tuple[EventLog, Path]:
    """What was published of an utterance of two, and recorded."""
    folder = tmp_path_factory.mktemp("sessions")
    return run(by_voice, interrupted, folder=folder), folder


def test_an_utterance_of_two_speakers_is_one_of_each(
    by_voice: Recognizer, split: tuple[EventLog, Path], interrupted: Sound
) -> None:
    """Each with its own sound and words, in turn, without a gap."""
    first, second = split[0].ends()
    assert (first.speaker, second.speaker) == ("speaker 1", "speaker 2")
    assert [end.turn for end in (first, second)] == [1, 2]
    assert (first.trigger, second.trigger) == ("speaker", "silence")
    assert first.audio_end_ms == second.audio_start_ms == pytest.approx(2250, abs=250)
    assert "country" in first.text
    assert "country" not in second.text
    assert len(second.text.split()) > 5
    assert not first.degraded + second.degraded
    start, end = (round(ms * 16) for ms in (second.audio_start_ms, second.audio_end_ms or 0))
    assert by_voice.transcriber.final(interrupted[start:end], 0.9).text == second.text
    assert by_voice.acoustic is not None
    alone = by_voice.acoustic.extract(interrupted[start:end])
    (recognition,) = (r for r in recognised(by_voice, interrupted) if r.id.endswith("-2"))
    assert alone is not None
    assert recognition.acoustic is not None
    assert np.array_equal(recognition.acoustic.functionals, alone.functionals)


def test_each_part_is_told_of_from_its_beginning(split: tuple[EventLog, Path]) -> None:
    """Revisions of an id count up from its new event; the time since its own end is published."""
    log = split[0]
    first, second = log.ends()
    for end in (first, second):
        own = [e for e in log.events if isinstance(e, Utterance) and e.id == end.id]
        assert [one.rev for one in own] == [*range(1, len(own) + 1)]
        assert (own[0].type, own[-1].type) == ("new", "end")
        assert own[0].start_time == end.start_time
    assert first.latency_ms is not None
    assert second.latency_ms is not None
    assert first.latency_ms.vad > second.latency_ms.vad + 1000 * len(second.text.split()) / 10


@pytest.mark.parametrize("seed", [1, 2])
def test_chunks_do_not_change_where_speakers_change(
    by_voice: Recognizer, interrupted: Sound, split: tuple[EventLog, Path], seed: int
) -> None:
    def said(ends: list[Utterance]) -> list[tuple[object, ...]]:
        return [(e.audio_start_ms, e.audio_end_ms, e.text, e.speaker, e.trigger) for e in ends]

    assert said(run(by_voice, interrupted, seed=seed).ends()) == said(split[0].ends())


def test_a_recorded_utterance_of_two_is_cut_in_its_replay(
    by_voice: Recognizer, split: tuple[EventLog, Path]
) -> None:
    live, (session,) = split[0].ends(), open_sessions(split[1])
    again, lines = replay(session, by_voice)
    assert not [line for line in lines if "other speakers" in line or "again" in line]
    numbers = {"latency_ms", "speaker_score", "emotion", "contributions", "conflict"}
    assert [one.model_dump(exclude=numbers) for one in again] == [
        one.model_dump(exclude=numbers) for one in live
    ]
    for one, other in zip(live, again, strict=True):
        assert one.emotion is not None
        assert other.emotion is not None
        assert one.emotion.probabilities == pytest.approx(other.emotion.probabilities, abs=1e-5)


def test_a_session_of_before_keeps_its_utterances_whole(
    by_voice: Recognizer, interrupted: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(SpeakerStream, "changes", lambda self: ())
        before.setattr(SpeakerStream, "parts", lambda self: (Part(0, 0, self.finish()),))
        (live,) = run(by_voice, interrupted, folder=tmp_path).ends()
    (session,) = open_sessions(tmp_path)
    (again,), _ = replay(session, by_voice)
    assert (again.text, again.speaker, again.trigger) == (live.text, live.speaker, live.trigger)
    assert again.audio_end_ms == live.audio_end_ms


def test_a_dialogue_ends_with_the_last_part(by_voice: Recognizer, interrupted: Sound) -> None:
    """Who waits for it gets them all."""
    log, ends = EventLog(), []

    async def listen() -> None:
        pipeline = LivePipeline(by_voice, [log])
        source = RandomChunks(interrupted, seed=7, pace=4)
        running = asyncio.create_task(pipeline.run({TABLE: source}, stop=asyncio.Event()))
        await log.until(log.has_begun)
        while source.taken < 50:  # noqa: ASYNC110  # six seconds on average
            await asyncio.sleep(0.01)
        (dialogue,) = set(pipeline.dialogues().values())
        await pipeline.finish_dialogue(dialogue)
        ends.extend(log.ends())
        await running

    asyncio.run(listen())
    assert len({end.id for end in ends}) == 2
    assert ends[-1].trigger == "request"


def recognised(recognizer: Recognizer, sound: Sound) -> list[Recognition]:
    return recognise(recognizer, RandomChunks(sound, seed=3))


def test_a_source_with_a_name_asks_no_voice(by_voice: Recognizer, talk: Sound) -> None:
    log = run(by_voice, talk, sources=[SourceConfig(name="table", speaker="Ann")])
    assert {(end.speaker, end.speaker_source) for end in log.ends()} == {("Ann", "source")}
    assert all(end.speaker_score is None for end in log.ends())
    assert not [e for e in log.events if isinstance(e, Status) and e.stage == "speaker"]


def test_a_failing_encoder_costs_the_speaker_and_nothing_else(
    by_voice: Recognizer, talk: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SpeakerStream, samples: Sound) -> None:
        raise ModelError("the encoder is gone")

    monkeypatch.setattr(SpeakerStream, "feed", fail)
    log = run(by_voice, talk)
    assert all(end.emotion is not None and end.speaker == "" for end in log.ends())
    assert {end.degraded for end in log.ends()} == {"speaker: the encoder is gone"}
    states = [e.state for e in log.events if isinstance(e, Status) and e.stage == "speaker"]
    assert states == ["online", "degraded"]


def test_an_embedding_that_is_no_number_costs_the_speaker_only(
    by_voice: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = np.full(192, np.nan, np.float32)
    monkeypatch.setattr(SpeakerStream, "finish", lambda self: nothing)
    (end,) = run(by_voice, sentences[4]).ends()
    assert (end.speaker, end.speaker_score) == ("", 0.0)
    assert end.degraded == "speaker: the speaker encoder gave numbers that aren't finite"
    assert end.emotion is not None


def test_a_recorded_dialogue_is_replayed_with_its_speakers(
    by_voice: Recognizer, talk: Sound, tmp_path: Path
) -> None:
    """Corrections, names and all; then it is forgotten, with every name."""

    async def put_right(controls: Controls, log: EventLog) -> None:
        await log.until(lambda: len(log.ends()) >= 2)
        first = log.ends()[0]
        await controls.correct(Feedback(id=first.id, speaker="Elinor", by="page"))
        for arguments in ({"speaker": "speaker 2", "name": "Jack"}, {"speaker": "nobody"}):
            answer = await controls.answer(Request(command="rename_speaker", arguments=arguments))
            assert (answer.status == "ok") == ("name" in arguments)
        assert answer.error == "rename: give the speaker as 'speaker' and the name as 'name'"

    folder = tmp_path / "sessions"
    log = run(by_voice, talk, folder=folder, meanwhile=put_right)
    live = final(log.ends())
    assert {"Elinor", "Jack"} <= {end.speaker for end in live}
    assert live[0].speaker_source == "corrected"
    assert [end.revision for end in log.ends()].count(1) >= 2

    (session,) = open_sessions(folder)
    assert [(end.id, end.speaker) for end in session.ends] == [(e.id, e.speaker) for e in live]
    assert session.speakers == {live[0].id: "Elinor"}
    again, lines = replay(session, by_voice)
    assert not [line for line in lines if "other speakers" in line]
    for one, other in zip(live, again, strict=True):
        assert (one.id, one.rev, one.revision) == (other.id, other.rev, other.revision)
        assert (one.speaker, one.speaker_source) == (other.speaker, other.speaker_source)
        assert one.speaker_score == pytest.approx(other.speaker_score, abs=1e-5)
        assert one.emotion is not None
        assert other.emotion is not None
        assert one.emotion.probabilities == pytest.approx(other.emotion.probabilities, abs=1e-5)

    asyncio.run(erase(by_voice, folder, live[0].dialogue_id))
    left = b"".join(path.read_bytes() for path in session.folder.iterdir())
    assert b"Elinor" not in left
    assert b"Jack" not in left


def test_sources_that_share_a_dialogue_share_its_speakers(
    by_voice: Recognizer, sentences: list[Sound], tmp_path: Path
) -> None:
    """Two microphones of nobody in particular, and one of somebody; the replay has their order."""
    sources = [
        SourceConfig(name="left", dialogue="room"),
        SourceConfig(name="right", dialogue="room"),
        SourceConfig(name="desk", dialogue="room", speaker="Cleo"),
    ]
    sounds = [np.concatenate([sentences[1], JFK]), np.concatenate([JFK, sentences[2]]), JFK]
    live = final(run(by_voice, *sounds, sources=sources, folder=tmp_path / "s").ends())
    assert len({end.dialogue_id for end in live}) == 1
    assert sorted(end.turn for end in live) == [*range(1, len(live) + 1)]
    assert {(end.source == "desk") for end in live if end.speaker == "Cleo"} == {True}
    assert {end.speaker for end in live} == {"Cleo", "speaker 1", "speaker 2"}
    (session,) = open_sessions(tmp_path / "s")
    again, lines = replay(session, by_voice)
    assert not [line for line in lines if "other speakers" in line]
    assert [(end.id, end.speaker, end.revision) for end in again] == [
        (end.id, end.speaker, end.revision) for end in live
    ]


async def erase(recognizer: Recognizer, folder: Path, dialogue_id: str) -> None:
    recorder = SessionRecorder(folder, config=recognizer.config, recognizer=recognizer)
    await recorder.forget(dialogue_id)
    await recorder.close(1.0)


def replay(session: Session, recognizer: Recognizer) -> tuple[list[Utterance], list[str]]:
    events: list[Any] = []
    lines: list[str] = []
    replay_session(
        session,
        on_event=events.append,
        progress=lines.append,
        load=lambda config: nullcontext(recognizer),
    )
    return final([event for event in events if isinstance(event, Utterance)]), lines


def test_an_enrolled_voice_is_named_until_it_is_forgotten(
    by_voice: Recognizer, talk: Sound, sentences: list[Sound], tmp_path: Path
) -> None:
    """A replay after that says in one line that somebody has no name any more."""
    assert by_voice.speaker_encoder is not None
    print_ = by_voice.speaker_encoder.embed(np.concatenate([sentences[3], sentences[4]]))
    assert print_ is not None
    enrol("Elinor", print_, speech_s=9.0)
    log = run(by_voice, talk, folder=tmp_path / "sessions")
    named = [end for end in final(log.ends()) if end.speaker == "Elinor"]
    assert named
    assert {end.speaker_source for end in named} == {"enrolled"}
    (session,) = open_sessions(tmp_path / "sessions")
    assert [line for line in replay(session, by_voice)[1] if "other speakers" in line] == []

    forget("Elinor")
    again, lines = replay(session, by_voice)
    assert "Elinor" not in {end.speaker for end in again}
    (line,) = (line for line in lines if "other speakers" in line)
    assert "voices have been enrolled or forgotten since" in line


def test_speakers_of_a_dialogue_that_is_over_are_only_recorded(
    by_voice: Recognizer, talk: Sound
) -> None:
    async def ask(controls: Controls, log: EventLog) -> None:
        await log.until(lambda: len(log.ends()) >= 1)
        end = log.ends()[0]
        await controls.answer(Request(command="reset"))
        with pytest.raises(ConfigError, match="nothing is recorded"):
            await controls.correct(Feedback(id=end.id, speaker="Ann"))
        merge = {"dialogue_id": end.dialogue_id, "speaker": "speaker 1", "into": "speaker 2"}
        answer = await controls.answer(Request(command="merge_speakers", arguments=merge))
        assert answer.error.startswith(f"no dialogue '{end.dialogue_id}' is going on")

    run(by_voice, talk, meanwhile=ask)


def test_a_voice_is_the_same_whether_or_not_the_speaker_pauses(
    by_voice: Recognizer, sentences: list[Sound]
) -> None:
    """What is computed ahead at a pause is dropped if speech goes on, else it is the result."""
    encoder = by_voice.speaker_encoder
    assert encoder is not None
    sound, voice = sentences[1], Voice(encoder.open)
    expected = encoder.embed(sound)
    for start in range(0, len(sound), 9_000):
        voice.feed(sound[start : start + 9_000])
        voice.pause()
    assert expected is not None
    for _ in range(2):
        found = voice.embedding(0)
        assert found is not None
        np.testing.assert_array_equal(found, expected)
    assert Voice(encoder.open).embedding(0) is None
