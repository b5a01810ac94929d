"""Two sessions, of which one is damaged: the other must not suffer from it."""

import json
import shutil
from pathlib import Path

from damages import as_text, change, complaint, damage
from session_samples import RECORDING, chunk, header, utterance

from stream_hbaf.audio.file import read_audio
from stream_hbaf.commands.live import _line
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.dashboard.feed import Recordings
from stream_hbaf.events import Feedback
from stream_hbaf.sessions.erasing import erase_dialogue
from stream_hbaf.sessions.session import list_sessions, open_session, open_sessions
from stream_hbaf.sessions.writer import SessionWriter

TABLES = ("session.json", "events.jsonl", "sound.jsonl")


def record_two(folder: Path) -> Path:
    """Write the sessions "bad" and "good", each with one utterance; returns the folder."""
    speech = read_audio(RECORDING)
    for name in ("bad", "good"):
        writer = SessionWriter(folder, header=header(name))
        writer.write_audio("a", chunk(speech, 0, 3 * SAMPLE_RATE_HZ))
        for event in (utterance("new", dialogue=name), utterance("end", dialogue=name)):
            writer.write_event(event)
        writer.write_event(Feedback(id=f"{name}-1", label="joy"))
        writer.close()
    return folder


def damaged(two: Path, to: Path, name: str, content: bytes) -> Path:
    """A copy of the two, in which a file of "bad" has another content."""
    shutil.copytree(two, to)
    (to / "bad" / name).write_bytes(content)
    return to


def damage_table(content: bytes, name: str, seed: int) -> bytes:
    """The table with bytes changed, or with wrong values in its rows."""
    if seed % 2 == 0:
        return damage(content, seed)
    rows = [json.loads(line) for line in (content.splitlines() if name[-1] == "l" else [content])]
    return b"".join(as_text(change(row, seed + n)) + b"\n" for n, row in enumerate(rows))


def assert_rest_goes_on(folder: Path) -> None:
    """The list has both sessions, the good one whole; of the bad one there is a line or a page."""
    listed = {one.folder.name: one for one in list_sessions(folder)}
    assert listed.keys() == {"bad", "good"}
    assert (listed["good"].utterances, listed["good"].error) == (1, "")
    for one in listed.values():
        assert _line(one).isprintable()
    json.dumps(Recordings(folder).summaries())
    assert complaint(lambda: Recordings(folder).session("bad").encode()).isprintable()
    complaint(lambda: [*open_session(folder / "bad").audio("a")])
    assert "good-1" in [session.ends[0].id for session in open_sessions(folder) if session.ends]
    assert erase_dialogue(open_session(folder / "good"), "good") == 1
