"""Promises of the recorder: a run is recorded, can be erased in part, and is never held up."""

import asyncio
import json
import os
import re
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import full_disk
from session_samples import RECORDING, Samples, all_of, chunk, header, summary, utterance

from stream_hbaf.audio.file import read_audio
from stream_hbaf.audio.source import Cut
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, SourceConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Feedback, Model, Utterance
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions import recorder as recorder_module
from stream_hbaf.sessions import writer as writer_module
from stream_hbaf.sessions.erasing import erase_dialogue
from stream_hbaf.sessions.format import EVENTS_FILE, SpeakerChange, new_header
from stream_hbaf.sessions.recorder import SessionRecorder
from stream_hbaf.sessions.session import list_sessions, open_sessions
from stream_hbaf.sessions.writer import SessionWriter

ANN, BEN = SourceConfig(name="a", speaker="Ann"), SourceConfig(name="b", speaker="Ben")


@pytest.fixture(scope="module")
def speech() -> Samples:
    """Eleven seconds of a speech."""
    return read_audio(RECORDING)


def record(
    folder: Path,
    recognizer: Recognizer,
    story: Callable[[SessionRecorder], Coroutine[Any, Any, Any]],
) -> None:
    """Tell a recorder a story, as the pipeline would."""

    async def run() -> None:
        recorder = SessionRecorder(folder, config=recognizer.config, recognizer=recognizer)
        lasting = asyncio.create_task(recorder.run())
        telling = asyncio.create_task(story(recorder))
        await asyncio.wait([lasting, telling], return_when=asyncio.FIRST_COMPLETED)
        await (telling if telling.done() else lasting)
        await recorder.close(5.0)
        lasting.cancel()

    asyncio.run(run())


def test_recorder_writes_what_a_run_says(
    recognizer: Recognizer, speech: Samples, tmp_path: Path
) -> None:
    """Audio of each source, events to the full precision, settings, versions, no secrets."""
    config = recognizer.config.model_copy(
        update={"mqtt": recognizer.config.mqtt.model_copy(update={"password": "hush"})}
    )

    async def story(recorder: SessionRecorder) -> None:
        for start in range(0, len(speech), 1000):
            recorder.on_audio(ANN, chunk(speech, start, start + 1000))
            recorder.on_audio(BEN, chunk(speech[::-1], start, start + 1000))
        recorder.on_audio(ANN, Cut(resume_at=len(speech), trigger="request"))
        for event in (utterance("new"), utterance("update"), utterance("end"), summary()):
            await recorder.send(event)
        await recorder.correct(Feedback(id="d1-1", label="neutral", by="Cas"))

    original, recognizer.config = recognizer.config, config
    try:
        record(tmp_path / "sessions", recognizer, story)
    finally:
        recognizer.config = original
    (session,) = open_sessions(tmp_path / "sessions")
    assert np.array_equal(read_audio(session.audio_file("a")), speech)
    assert np.array_equal(read_audio(session.audio_file("b")), speech[::-1])
    assert [s.why for s in session.stretches["a"]] == ["begin", "cut"]
    assert session.events[:4] == (
        utterance("new"),
        utterance("update"),
        utterance("end"),
        summary(),
    )
    assert session.corrections == {"d1-1": Feedback(id="d1-1", label="neutral", by="Cas")}
    bundle = recognizer.bundle
    assert session.header.model == recognizer.model
    assert session.header.labels == bundle.labels
    assert session.header.versions["opensmile"] == "2.6.0"
    assert session.header.settings["transcript"]["model"] == recognizer.config.transcript.model
    assert "hush" not in (session.folder / "session.json").read_text()
    modes = {path.name: path.stat().st_mode & 0o777 for path in session.folder.iterdir()}
    assert set(modes.values()) == {0o600}
    assert session.folder.stat().st_mode & 0o777 == 0o700
    (listed,) = list_sessions(tmp_path / "sessions")
    assert (listed.utterances, listed.speakers, listed.corrections) == (1, ("Ann",), 1)
    assert listed.length_s == pytest.approx(len(speech) / SAMPLE_RATE_HZ)


def test_revisions_are_recorded_where_the_utterance_was(
    recognizer: Recognizer, speech: Samples, tmp_path: Path
) -> None:
    """The latest `end` counts, in its old place; what people said stands between."""

    def revised(turn: int, speaker: str, number: int) -> Utterance:
        changes = {"rev": 2 + number, "revision": number, "speaker": speaker}
        return utterance("end", turn=turn).model_copy(update=changes)

    change = SpeakerChange(dialogue_id="d1", change="correct", turn=1, into="Cas")

    async def story(recorder: SessionRecorder) -> None:
        recorder.on_audio(ANN, chunk(speech, 0, 16000))
        for turn in (1, 2):
            await recorder.send(utterance("new", turn=turn))
            await recorder.send(utterance("end", turn=turn))
        recorder.on_speaker_change(change)
        await recorder.send(revised(1, "Cas", 1))
        await recorder.send(revised(1, "Dora", 2))
        await recorder.send(revised(7, "Cas", 1))  # was never recorded
        await recorder.correct(Feedback(id="d1-1", speaker="Dora"))
        await recorder.correct(Feedback(id="d1-1", label="joy"))

    record(tmp_path, recognizer, story)
    (session,) = open_sessions(tmp_path)
    assert [(end.turn, end.speaker) for end in session.ends] == [(1, "Dora"), (2, "Ann")]
    assert [*session.events].index(change) == 4
    assert {name: one.label for name, one in session.corrections.items()} == {"d1-1": "joy"}
    assert session.speakers == {"d1-1": "Dora"}
    (listed,) = list_sessions(tmp_path)
    assert (listed.utterances, listed.speakers, listed.corrections) == (2, ("Ann", "Dora"), 1)
    assert erase_dialogue(session, "d1") == 2
    assert (session.folder / EVENTS_FILE).read_bytes() == b""


def test_source_that_is_not_recorded_leaves_no_word(
    recognizer: Recognizer, speech: Samples, tmp_path: Path
) -> None:
    """With its switch off nothing of a source is kept, nor of what began or ended meanwhile."""

    async def story(recorder: SessionRecorder) -> None:
        recorder.on_audio(ANN, chunk(speech, 0, 16000))
        await recorder.send(utterance("new", turn=1))
        recorder.record("a", on=False)
        recorder.on_audio(ANN, chunk(speech, 16000, 32000))
        await recorder.send(utterance("end", turn=1))
        await recorder.send(utterance("new", turn=2))
        await recorder.send(summary("b"))
        recorder.record("a", on=True)
        await recorder.send(utterance("end", turn=2))
        recorder.on_audio(ANN, chunk(speech, 32000, 48000))
        await recorder.send(utterance("new", turn=3, start_ms=1999))  # began before, reported late
        await recorder.send(utterance("end", turn=3, start_ms=1999))
        await recorder.send(utterance("new", turn=4, start_ms=2000))
        await recorder.send(utterance("end", turn=4, start_ms=2000))

    record(tmp_path, recognizer, story)
    (session,) = open_sessions(tmp_path)
    kept = [(one.type, one.turn) for one in all_of(Utterance, session.events)]
    assert kept == [("new", 1), ("new", 4), ("end", 4)]
    assert np.array_equal(
        read_audio(session.audio_file("a")), np.concatenate([speech[:16000], speech[32000:48000]])
    )
    assert [(s.why, s.start) for s in session.stretches["a"]] == [("begin", 0), ("pause", 32000)]


def test_forgotten_dialogue_is_nowhere(
    recognizer: Recognizer, speech: Samples, tmp_path: Path
) -> None:
    """Its events and corrections go, its audio becomes silence, and the recording goes on; an
    earlier session's part goes too, and what it was about to say never comes."""
    second = SAMPLE_RATE_HZ
    earlier = SessionWriter(tmp_path, header=header())
    earlier.write_audio("a", chunk(speech, 0, 3 * second))
    earlier.write_event(utterance("end", turn=1, start_ms=500))
    earlier.write_event(Feedback(id="d1-1", label="joy"))
    earlier.write_event(utterance("end", turn=1, dialogue="d2", start_ms=1500))
    earlier.write_event(utterance("new", turn=2, start_ms=2750))  # killed before its end
    earlier.close()
    erased: list[int] = []

    async def story(recorder: SessionRecorder) -> None:
        recorder.on_audio(ANN, chunk(speech, 0, 4 * second))
        await recorder.send(utterance("new", turn=3))
        await recorder.send(utterance("end", turn=3))
        await recorder.send(summary())
        await recorder.correct(Feedback(id="d1-3", label="joy"))
        await recorder.send(utterance("new", turn=4, start_ms=3500))
        erased.append(await recorder.forget("d1"))
        with pytest.raises(ConfigError, match="no recorded utterance 'd1-3'"):
            await recorder.correct(Feedback(id="d1-3", label="joy"))
        recorder.on_audio(ANN, chunk(speech, 4 * second, 6 * second))
        await recorder.send(utterance("end", turn=4, start_ms=3500))
        await recorder.send(utterance("new", turn=1, dialogue="d2", start_ms=5000))
        await recorder.send(utterance("end", turn=1, dialogue="d2", start_ms=5000))

    record(tmp_path, recognizer, story)
    assert erased == [4]
    before, now = open_sessions(tmp_path)
    assert [one.id for one in all_of(Utterance, before.events)] == ["d2-1"]
    events = all_of(Utterance, now.events)
    assert [(one.id, one.type) for one in events] == [("d2-1", "new"), ("d2-1", "end")]
    expected = speech[: 3 * second].copy()
    expected[second // 2 : 3 * second // 2] = 0
    expected[second * 11 // 4 :] = 0
    assert np.array_equal(read_audio(before.audio_file("a")), expected)
    expected = speech[: 6 * second].copy()
    expected[second : 2 * second] = 0
    expected[second * 7 // 2 : second * 9 // 2] = 0
    assert np.array_equal(read_audio(now.audio_file("a")), expected)
    words = b"".join(path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
    assert b"d1" not in words
    assert not list(tmp_path.rglob("*.part"))
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*") if path.is_file()}
    assert modes == {0o600}


def test_correction_reaches_an_earlier_session(
    recognizer: Recognizer, speech: Samples, tmp_path: Path
) -> None:
    """Utterances of last week can still be corrected; those that weren't recorded can't."""
    earlier = SessionWriter(tmp_path, header=header())
    earlier.write_event(utterance("end"))
    earlier.close()

    async def story(recorder: SessionRecorder) -> None:
        await recorder.correct(Feedback(id="d1-1", label="anger"))
        with pytest.raises(ConfigError, match="no recorded utterance 'd9-1'"):
            await recorder.correct(Feedback(id="d9-1", label="anger"))

    record(tmp_path, recognizer, story)
    (session,) = open_sessions(tmp_path)
    assert session.corrections["d1-1"].label == "anger"


def test_correction_reaches_the_beginning_of_a_long_session(
    recognizer: Recognizer, speech: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the newest utterances are kept in memory; the others are found on disk."""
    monkeypatch.setattr(writer_module, "MOST_IDS", 2)

    async def story(recorder: SessionRecorder) -> None:
        recorder.on_audio(ANN, chunk(speech, 0, 1000))
        for turn in (1, 2, 3):
            for kind in ("new", "end"):
                await recorder.send(utterance(kind, turn=turn))
        for turn in (1, 3):
            await recorder.correct(Feedback(id=f"d1-{turn}", label="anger"))
        with pytest.raises(ConfigError, match="no recorded utterance 'd1-4'"):
            await recorder.correct(Feedback(id="d1-4", label="anger"))

    record(tmp_path, recognizer, story)
    (session,) = open_sessions(tmp_path)
    assert list(session.corrections) == ["d1-1", "d1-3"]


def test_audio_that_finds_no_room_is_a_recorded_gap(
    recognizer: Recognizer,
    speech: Samples,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that stands still costs audio, never the run: the gap's place and length are kept."""
    monkeypatch.setattr(recorder_module, "MAX_AUDIO_CALLS", 3)
    disk = threading.Event()

    def wait() -> None:
        disk.wait()

    async def story(recorder: SessionRecorder) -> None:
        recorder.on_audio(ANN, chunk(speech, 0, 1000))
        await recorder.forget("nothing")  # so that the first chunk is written
        recorder._calls.put(wait)
        for start in range(1000, 10_000, 1000):
            recorder.on_audio(ANN, chunk(speech, start, start + 1000))
        await recorder.send(utterance("new"))
        disk.set()
        await recorder.forget("nothing")
        recorder.on_audio(ANN, chunk(speech, 10_000, 11_000))

    record(tmp_path, recognizer, story)
    (session,) = open_sessions(tmp_path)
    lost = session.stretches["a"][1]
    assert (lost.why, lost.start) == ("lost", 10_000)
    assert 3000 <= lost.at <= 4000
    assert f"{(10_000 - lost.at) / SAMPLE_RATE_HZ:.1f} s of a lost, the disk is" in caplog.text
    assert [one.id for one in all_of(Utterance, session.events)] == ["d1-1"]


def test_full_disk_ends_the_recording_and_not_the_run(
    recognizer: Recognizer, speech: Samples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once; what was written is valid; turned on again, another session begins."""

    async def story(recorder: SessionRecorder) -> None:
        with full_disk(room=60_000):
            for start in range(0, len(speech), 1000):
                recorder.on_audio(ANN, chunk(speech, start, start + 1000))
            assert await recorder.forget("nothing") == 0
        recorder.on_audio(ANN, chunk(speech, 0, 1000))
        recorder.record("a", on=True)
        recorder.on_audio(ANN, chunk(speech, 0, 5000))

    record(tmp_path, recognizer, story)
    assert caplog.text.count("can't be written (File too large); nothing more is recorded") == 1
    before, after = sorted(open_sessions(tmp_path), key=lambda session: -session.length_s)
    complaints: list[str] = []
    kept = read_audio(before.audio_file("a"), on_status=lambda _, line: complaints.append(line))
    assert complaints == []
    assert np.array_equal(kept, speech[: len(kept)])
    assert len(kept) > 2 * SAMPLE_RATE_HZ
    assert np.array_equal(read_audio(after.audio_file("a")), speech[:5000])


def test_a_full_disk_keeps_the_lines_of_utterances(
    recognizer: Recognizer, speech: Samples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Audio is refused, what people said still finds room; in the end it is said what is lost."""

    async def story(recorder: SessionRecorder) -> None:
        with full_disk(room=60_000):
            for start in range(0, len(speech), 1000):
                recorder.on_audio(ANN, chunk(speech, start, start + 1000))
            for turn in (1, 2):
                for kind in ("new", "end"):
                    await recorder.send(utterance(kind, turn=turn, start_ms=5000.0 * turn))
        with full_disk(room=100):
            await recorder.send(utterance("new", turn=3))
            await recorder.send(utterance("end", turn=3))
        assert await recorder.forget("nothing") == 0

    record(tmp_path, recognizer, story)
    (session,) = open_sessions(tmp_path)
    assert [end.id for end in session.ends] == ["d1-1", "d1-2"]
    kept = read_audio(session.audio_file("a"))
    assert np.array_equal(kept, speech[: len(kept)])
    lost_s = (len(speech) - len(kept)) / SAMPLE_RATE_HZ
    assert caplog.text.count("nothing more is recorded until 'record' is turned on again") == 1
    found = re.search(r"the disk refused: (\S+) s of a, 1 finished utterances", caplog.text)
    assert found is not None
    assert float(found[1]) == pytest.approx(lost_s, abs=0.3)  # half a frame, and the last chunk


def test_audio_leaves_room_on_the_disk(
    speech: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last megabyte, of a small disk a tenth, is for events; a look every second is enough."""
    disk = os.statvfs(tmp_path)
    left = [1 << 40, (1 << 20) - 1]

    def nearly_full(path: Path) -> os.statvfs_result:
        free = left.pop(0) // disk.f_frsize
        return os.statvfs_result((*disk[:4], free, *disk[5:]))

    writer = SessionWriter(tmp_path, header=header())
    monkeypatch.setattr(os, "statvfs", nearly_full)
    for start in range(0, SAMPLE_RATE_HZ, 1000):
        writer.write_audio("a", chunk(speech, start, start + 1000))
    with pytest.raises(OSError, match="No space left on device"):
        writer.write_audio("a", chunk(speech, SAMPLE_RATE_HZ, 2 * SAMPLE_RATE_HZ))
    writer.write_event(utterance("end"))
    writer.close()
    (session,) = open_sessions(tmp_path)
    assert [end.id for end in session.ends] == ["d1-1"]
    assert np.array_equal(read_audio(session.audio_file("a")), speech[:SAMPLE_RATE_HZ])


def test_settings_with_a_path_that_is_not_utf_8_are_recorded() -> None:
    """A bundle's folder may be called anything."""
    model = Model(id="x", sha256="")
    found = new_header(Config(model="/caf\udce9"), model=model, labels=("joy",))
    assert json.loads(found.model_dump_json())["settings"]["model"] == "/caf\ufffd"


def test_a_session_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    """Half a header would be a damaged session."""
    with full_disk(room=100), pytest.raises(OSError, match="File too large"):
        SessionWriter(tmp_path, header=header())
    assert list(tmp_path.iterdir()) == []


def test_unknown_privacy_and_folders_are_refused(recognizer: Recognizer, tmp_path: Path) -> None:
    """A recording holds words: no other privacy than full; and it needs a folder."""
    private = Config.model_validate({"privacy": "no_text"})
    with pytest.raises(ConfigError, match="which privacy 'no_text' forbids"):
        SessionRecorder(tmp_path / "x", config=private, recognizer=recognizer)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: can't be made \(File exists\); give another"):
        SessionRecorder(tmp_path / "file", config=recognizer.config, recognizer=recognizer)
