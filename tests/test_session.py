"""Promises of a session on disk: whole after a kill, and every sample has its place."""

import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
from damages import JSON, as_text
from session_damages import TABLES, assert_rest_goes_on, damage_table, damaged, record_two
from session_samples import RECORDING, Samples, all_of, chunk, header, utterance

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.dashboard.feed import Recordings
from stream_hbaf.errors import CorpusError
from stream_hbaf.events import Feedback, Utterance
from stream_hbaf.sessions import session as session_module
from stream_hbaf.sessions.erasing import erase_dialogue
from stream_hbaf.sessions.format import EVENTS_FILE, FlacWriter, flac_length
from stream_hbaf.sessions.session import (
    Session,
    is_being_recorded,
    list_sessions,
    open_session,
    open_sessions,
)
from stream_hbaf.sessions.writer import SessionWriter, add_feedback


@pytest.fixture(scope="module")
def speech() -> Samples:
    """Eleven seconds of a speech."""
    return read_audio(RECORDING)


def test_flac_is_what_every_player_reads(speech: Samples, tmp_path: Path) -> None:
    """Closed, the file is right in length and sum for libsndfile and FFmpeg, to the sample."""
    path = tmp_path / "sound.flac"
    draw = random.Random(1)
    with FlacWriter(path) as writer:
        position = 0
        while position < len(speech):
            end = position + draw.randint(1, 3000)
            writer.write(speech[position:end])
            position = end
    samples, rate_hz = soundfile.read(path, dtype="int16")
    assert rate_hz == SAMPLE_RATE_HZ
    assert np.array_equal(samples, speech)
    assert np.array_equal(read_audio(path), speech)
    assert flac_length(path) == len(speech)
    assert path.read_bytes()[26:42] == hashlib.md5(speech.tobytes()).digest()
    assert path.stat().st_mode & 0o777 == 0o600


WRITES_UNTIL_KILLED = """
    import sys, time
    from pathlib import Path
    from stream_hbaf.audio.file import read_audio
    from stream_hbaf.audio.source import Chunk
    from stream_hbaf.events import Feedback, Model
    from stream_hbaf.sessions.format import Header
    from stream_hbaf.sessions.writer import SessionWriter

    speech = read_audio(sys.argv[2])
    writer = SessionWriter(Path(sys.argv[1]), header=Header(
        id="killed", began="", model=Model(id="", sha256=""), labels=(), settings={}, versions={}))
    position = 0
    while True:
        samples = speech[position % len(speech):][:777]
        writer.write_audio("a", Chunk(position, samples, time.monotonic()))
        position += len(samples)
        writer.write_event(Feedback(id=f"x-{position}", label="joy"))
        print(position, flush=True)
        time.sleep(0.0005)
"""


@pytest.mark.parametrize("seed", range(4))
def test_session_is_whole_after_sigkill(speech: Samples, tmp_path: Path, seed: int) -> None:
    """Killed at random, a session lacks less than a second of audio and no written event."""
    script = textwrap.dedent(WRITES_UNTIL_KILLED)
    command = [sys.executable, "-c", script, str(tmp_path), str(RECORDING)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(random.Random(seed).randint(3, 400)):
        line = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    written = int((line + process.communicate()[0]).splitlines()[-1])

    session = open_session(tmp_path / "killed")
    assert not is_being_recorded(session.folder)
    complaints: list[str] = []
    path = session.audio_file("a")
    audio = read_audio(path, on_status=lambda _, complaint: complaints.append(complaint))
    assert complaints == []
    expected = np.resize(speech, len(audio))
    assert np.array_equal(audio, expected)
    assert len(audio) > written - SAMPLE_RATE_HZ
    assert np.array_equal(np.concatenate(all_of(np.ndarray, [*session.audio("a")][1:])), expected)
    found = [event.id for event in all_of(Feedback, session.events)]
    promised = [f"x-{n}" for n in events_until(len(speech), written)]
    assert found[: len(promised)] == promised
    if len(audio) > SAMPLE_RATE_HZ:  # then the header has a length, and libsndfile can read
        assert len(soundfile.read(path, dtype="int16")[0]) > len(audio) - 2 * SAMPLE_RATE_HZ
    seconds = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-f", "s16le", "-"], capture_output=True, check=True
    )
    assert seconds.stderr == b""
    assert np.array_equal(np.frombuffer(seconds.stdout, np.int16), audio)


def events_until(length: int, written: int) -> list[int]:
    """The positions that the writer above printed."""
    found, position = [], 0
    while position < written:
        position += min(777, length - position % length)
        found.append(position)
    return found


def test_half_a_line_is_left_out(speech: Samples, tmp_path: Path) -> None:
    """What a loss of power cut off is ignored; a broken line within is named."""
    writer = SessionWriter(tmp_path, header=header())
    writer.write_event(utterance("new"))
    writer.write_event(utterance("end"))
    writer.close()
    events = writer.folder / EVENTS_FILE
    whole = events.read_bytes()
    events.write_bytes(whole + whole[:100])
    assert [one.rev for one in all_of(Utterance, open_session(writer.folder).events)] == [1, 2]
    events.write_bytes(whole[:100] + b"\n" + whole)
    with pytest.raises(CorpusError, match=r"events\.jsonl:1: isn't a JSON object"):
        _ = open_session(writer.folder).events


def test_a_correction_behind_half_a_line_is_whole(tmp_path: Path) -> None:
    """The half is cut off; without it the line is appended as it is."""
    writer = SessionWriter(tmp_path, header=header())
    writer.write_event(utterance("end"))
    writer.close()
    events = writer.folder / EVENTS_FILE
    whole = events.read_bytes()
    for half in (whole[:100], b"", b"\x00"):
        events.write_bytes(whole + half)
        add_feedback(Session(writer.folder), [Feedback(id="d1-1", label="joy")])
        assert open_session(writer.folder).corrections["d1-1"].label == "joy"
        assert events.read_bytes().startswith(whole)
    events.write_bytes(whole[:100])
    add_feedback(Session(writer.folder), [Feedback(id="d1-1", label="joy")])
    assert [*open_session(writer.folder).corrections] == ["d1-1"]


def test_tables_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that would fill the memory is named."""
    writer = SessionWriter(tmp_path, header=header())
    for _ in range(20):
        writer.write_event(utterance("end"))
    writer.close()
    monkeypatch.setattr(session_module, "EVENTS_LIMIT", 5000)
    (listed,) = list_sessions(tmp_path)
    assert listed.error.endswith("events.jsonl: has more than 0 MB; divide that session")
    assert erase_dialogue(Session(writer.folder), "d1") == 1


def test_missing_audio_keeps_its_place(speech: Samples, tmp_path: Path) -> None:
    """Gaps, pauses and cuts are written down: every sample has the number that it had live."""
    writer = SessionWriter(tmp_path, header=header())
    second = SAMPLE_RATE_HZ
    writer.write_audio("a", chunk(speech, 100, 1 * second))
    writer.write_audio("a", chunk(speech, 1 * second, 2 * second))
    writer.write_audio("a", chunk(speech, 3 * second, 4 * second, after_gap=True))
    writer.write_cut("a", resume_at=4 * second, trigger="request")
    writer.write_audio("a", chunk(speech, 4 * second, 5 * second))
    writer.write_audio("a", chunk(speech, 7 * second, 8 * second))
    writer.write_audio("a", chunk(speech, 9 * second, 10 * second), after_loss=True)
    writer.close()
    session = open_session(writer.folder)
    found = [(s.why, s.at, s.start, s.trigger) for s in session.stretches["a"]]
    first = 2 * second - 100  # samples before the gap
    assert found == [
        ("begin", 0, 100, "end_of_input"),
        ("gap", first, 3 * second, "end_of_input"),
        ("cut", first + 1 * second, 4 * second, "request"),
        ("pause", first + 2 * second, 7 * second, "end_of_input"),
        ("lost", first + 3 * second, 9 * second, "end_of_input"),
    ]
    kept = [(100, 2), (3, 4), (4, 5), (7, 8), (9, 10)]
    pieces = [piece for piece in session.audio("a") if isinstance(piece, np.ndarray)]
    assert np.array_equal(
        np.concatenate(pieces),
        np.concatenate([speech[100 if a == 100 else a * second : b * second] for a, b in kept]),
    )
    assert session.clip(utterance("end", start_ms=3000)) == (first, first + second)
    assert session.clip(utterance("end", start_ms=3500)) is None  # not whole: cut at 4 s
    assert session.length_s == pytest.approx(6 - 100 / second)


def test_session_of_another_format_is_refused(tmp_path: Path) -> None:
    """A session that a later version wrote names its format; a folder that is none, its file."""
    writer = SessionWriter(tmp_path, header=header())
    writer.close()
    path = writer.folder / "session.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(CorpusError, match="format 2, but this version reads format 1"):
        open_sessions(tmp_path)
    with pytest.raises(CorpusError, match=r"session\.json: can't be read \(No such file"):
        open_session(tmp_path)
    with pytest.raises(CorpusError, match=r"nowhere: no such folder; give the one that --record"):
        open_sessions(tmp_path / "nowhere")


def test_names_that_no_file_can_have_are_escaped(speech: Samples, tmp_path: Path) -> None:
    """A source may be called anything that a topic can be called."""
    writer = SessionWriter(tmp_path, header=header())
    for name in ("..", "küche\x00", "a%2e"):
        writer.write_audio(name, chunk(speech, 0, 2000))
    writer.close()
    session = open_session(writer.folder)
    assert sorted(path.name for path in session.folder.glob("*.flac")) == [
        "...flac",
        "a%252e.flac",
        "k%C3%BCche%00.flac",
    ]
    samples = [*session.audio("küche\x00")][1]
    assert isinstance(samples, np.ndarray)
    assert np.array_equal(samples, speech[:2000])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sessions "bad" and "good", each with one utterance."""
    return record_two(tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("text", JSON, ids=lambda text: repr(text[:20]))
@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_harms_its_session_only(
    two: Path, tmp_path: Path, name: str, text: str
) -> None:
    """Endless nesting, half a surrogate, no object: named, and the rest goes on."""
    assert_rest_goes_on(damaged(two, tmp_path / "x", name, text.encode() + b"\n"))


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_table_harms_its_session_only(two: Path, tmp_path: Path, seed: int) -> None:
    """Bytes changed, wrong values at every place, numbers out of all bounds."""
    name = TABLES[seed % 3]
    content = damage_table((two / "bad" / name).read_bytes(), name, seed)
    assert_rest_goes_on(damaged(two, tmp_path / "x", name, content))


def test_a_line_without_an_end_is_not_read_to_it(two: Path, tmp_path: Path) -> None:
    """Nor is a header."""
    for name, reason in (("events.jsonl", "a line of more than"), ("session.json", "isn't JSON")):
        folder = damaged(two, tmp_path / name, name, b" " * 3_000_000)
        (bad, good) = list_sessions(folder)
        assert reason in bad.error
        assert good.utterances == 1


@pytest.mark.parametrize("name", [*TABLES, "a.flac"])
def test_a_symbolic_link_in_a_session_is_not_followed(two: Path, tmp_path: Path, name: str) -> None:
    """What it leads to is neither read, nor served, nor written."""
    folder = tmp_path / "x"
    shutil.copytree(two, folder)
    outside = tmp_path / "outside"
    (folder / "bad" / name).rename(outside)
    (folder / "bad" / name).symlink_to(outside)
    before = outside.read_bytes()
    recordings = Recordings(folder)
    if name == "a.flac":
        with pytest.raises(CorpusError, match="bad: no sound of 'a'"):
            recordings.audio("bad", "a")
        pieces = [*open_session(folder / "bad").audio("a")]
        assert not any(isinstance(piece, np.ndarray) for piece in pieces)
    else:
        with pytest.raises(CorpusError):
            recordings.session("bad")
    with contextlib.suppress(OSError):
        add_feedback(Session(folder / "bad"), [Feedback(id="bad-1", label="joy")])
    with contextlib.suppress(CorpusError):
        erase_dialogue(Session(folder / "bad"), "bad")
    assert outside.read_bytes() == before


def test_a_link_to_a_session_is_none(two: Path, tmp_path: Path) -> None:
    """A folder that is given may be a link itself."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "good").symlink_to(two / "good")
    assert list_sessions(folder) == []
    with pytest.raises(CorpusError, match="no recording 'good' here"):
        Recordings(folder).session("good")
    (tmp_path / "link").symlink_to(two)
    assert len(list_sessions(tmp_path / "link")) == 2


def test_a_source_whose_name_no_file_can_have_is_one_line(two: Path, tmp_path: Path) -> None:
    """The file system's limit is no reason to end the list."""
    row = {"source": "x" * 5000, "at": 0, "start": 0, "time": "", "why": "begin"}
    assert_rest_goes_on(damaged(two, tmp_path / "x", "sound.jsonl", as_text(row) + b"\n"))
