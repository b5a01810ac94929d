"""A session: what was heard and what was said of it, in a folder of plain files.

    session.json    when it began, and by which bundle, settings and versions it was recognised
    <source>.flac   the sound of a source, 16 kHz mono 16 bit: what came, and nothing else
    sound.jsonl     a line for each stretch of sound without a gap: which samples these are
    events.jsonl    a line for each event, as published, and for each correction

The last three grow by whole lines and frames only; what a kill leaves is read as far as it goes.
Forgetting a dialogue takes its lines out and puts silence in place of its sound.
"""

import fcntl
import json
import os
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from stream_hbaf.audio.file import Decoder
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import CorpusError
from stream_hbaf.events import DialogueSummary, Feedback, Switch, Trigger, Utterance
from stream_hbaf.sessions.flac import HEADER_BYTES, flac_length
from stream_hbaf.sessions.header import FORMAT, Frozen, Header

Samples = NDArray[np.int16]
T = TypeVar("T", bound=BaseModel)
Told = Utterance | DialogueSummary | Feedback | Switch  # the events that a session keeps

HEADER, SOUND, EVENTS = "session.json", "sound.jsonl", "events.jsonl"
SOUNDS = ".flac"
KINDS: tuple[tuple[str, type[Told]], ...] = (
    ("stream_hbaf/utterance/1", Utterance),
    ("stream_hbaf/dialogue/1", DialogueSummary),
    ("stream_hbaf/feedback/1", Feedback),
)


class Stretch(Frozen):
    """From sample ``at`` of a source's FLAC on, samples are counted from ``start``.

    Each stretch is cut into utterances anew.
    """

    source: str
    at: int
    start: int  # since the source was opened
    time: str  # when its first sample was captured, ISO 8601, UTC
    why: Literal["begin", "gap", "pause", "cut", "lost"]
    """The source began; lost sound; nobody listened or recorded; somebody wished what was being
    said to end; the disk was too slow."""
    trigger: Trigger = "end_of_input"  # what ended the utterance before it


@dataclass(frozen=True)
class Session:
    """A recorded session, read. What it lists is in the order in which it happened."""

    folder: Path
    header: Header

    @cached_property
    def events(self) -> tuple[Told, ...]:
        """All that it tells. Raises CorpusError with file and line for what can't be read."""
        return tuple(_event(row, where) for where, row in _rows(self.folder / EVENTS))

    @property
    def ends(self) -> list[Utterance]:
        """The finished utterances."""
        return [told for told in self.events if isinstance(told, Utterance) and told.type == "end"]

    @cached_property
    def corrections(self) -> dict[str, Feedback]:
        """The latest correction of each utterance, by id."""
        return {told.id: told for told in self.events if isinstance(told, Feedback)}

    @cached_property
    def stretches(self) -> dict[str, tuple[Stretch, ...]]:
        """By source. Raises CorpusError with file and line for what can't be read."""
        found: dict[str, list[Stretch]] = {}
        for where, row in _rows(self.folder / SOUND):
            stretch = _valid(Stretch, row, where)
            found.setdefault(stretch.source, []).append(stretch)
        return {source: tuple(stretches) for source, stretches in found.items()}

    @property
    def length_s(self) -> float:
        """Of the longest source's sound."""
        lengths = [flac_length(self.sound(source)) for source in self.stretches]
        return max(lengths, default=0) / SAMPLE_RATE_HZ

    def sound(self, source: str) -> Path:
        """The file of a source's sound; it may be missing if nothing was heard."""
        return self.folder / sound_name(source)

    def clip(self, end: Utterance) -> tuple[int, int] | None:
        """Where an utterance is in its source's file: samples [start, end).

        None where it isn't whole, because its sound was lost before it could be written.
        """
        rest = self.rest(end)
        if rest is None or end.audio_end_ms is None:
            return None
        length = sample_at(end.audio_end_ms) - sample_at(end.audio_start_ms)
        stop = rest[0] + length
        return (rest[0], stop) if stop <= rest[1] else None

    def rest(self, said: Utterance) -> tuple[int, int] | None:
        """The stretch that an utterance is in, in its source's file, from its beginning on."""
        stretches = self.stretches.get(said.source, ())
        first = sample_at(said.audio_start_ms)
        number = bisect_right(stretches, first, key=lambda stretch: stretch.start) - 1
        if number < 0:
            return None
        start = stretches[number].at + first - stretches[number].start
        if number + 1 < len(stretches):
            return start, max(start, stretches[number + 1].at)
        return start, sys.maxsize

    def heard(self, source: str) -> Iterator[Stretch | Samples]:
        """The sound of a source in pieces, each stretch before its samples."""
        due = deque(self.stretches.get(source, ()))
        position = 0
        for batch in read_sound(self.sound(source)):
            while len(batch):
                while due and due[0].at <= position:
                    yield due.popleft()
                piece = batch[: due[0].at - position] if due else batch
                yield piece
                position += len(piece)
                batch = batch[len(piece) :]
        while due and due[0].at <= position:
            yield due.popleft()


@dataclass(frozen=True, slots=True)
class Summary:
    """A line of the list of sessions."""

    folder: Path
    began: str = ""
    length_s: float = 0.0
    utterances: int = 0
    speakers: tuple[str, ...] = ()
    corrections: int = 0
    complaint: str = ""  # why nothing is known of it


def open_session(folder: Path) -> Session:
    """Read a session's header. Raises CorpusError if there is none of this format."""
    path = folder / HEADER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorpusError(
            f"{path}: can't be read ({error.strerror}); give the folder of a recorded session"
        ) from None
    except ValueError:
        raise CorpusError(f"{path}: isn't JSON; get the session again from a copy") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CorpusError(
            f"{path}: format {found}, but this version reads format {FORMAT}; "
            "install the version of stream-hbaf that the session was recorded with"
        )
    return Session(folder, _valid(Header, content, str(path)))


def is_session(folder: Path) -> bool:
    return (folder / HEADER).is_file()


def sessions_in(folder: Path) -> list[Session]:
    """All sessions in a folder of sessions, or the one that it is itself, oldest first.

    Raises CorpusError if there is no such folder, or one of them can't be read.
    """
    return sorted(map(open_session, _folders(folder)), key=lambda session: session.header.began)


def list_sessions(folder: Path) -> list[Summary]:
    """What there is in a folder of sessions, oldest first; one that can't be read says why.

    Raises CorpusError if there is no such folder.
    """
    found = []
    for one in _folders(folder):
        try:
            found.append(summarise(open_session(one)))
        except CorpusError as error:
            found.append(Summary(one, complaint=str(error)))
    return found


def summarise(session: Session) -> Summary:
    """A session in figures. Raises CorpusError if it can't be read."""
    ends = session.ends
    return Summary(
        folder=session.folder,
        began=session.header.began,
        length_s=session.length_s,
        utterances=len(ends),
        speakers=tuple(sorted({end.speaker for end in ends if end.speaker})),
        corrections=len(session.corrections),
    )


def _folders(folder: Path) -> list[Path]:
    """Sessions are named after their time."""
    if is_session(folder):
        return [folder]
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder; give the one that --record wrote to")
    return sorted(filter(is_session, folder.iterdir()))


def is_being_recorded(folder: Path) -> bool:
    """Whether some process holds the session open for writing."""
    with (folder / HEADER).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def sound_name(source: str) -> str:
    """The name of a source's file; what a file's name can't hold is written as %XX."""
    return quote(source, safe="") + SOUNDS


def sample_at(ms: float) -> int:
    return round(ms * SAMPLE_RATE_HZ / 1000)


def read_sound(path: Path) -> Iterator[Samples]:
    """A source's sound in batches; nothing if none was written."""
    if path.is_file() and path.stat().st_size > HEADER_BYTES:
        yield from Decoder(path)


def append_line(file: int, line: bytes) -> None:
    """Write a whole line to an open file, or none of it. Raises OSError."""
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        while line:
            line = line[os.write(file, line) :]
    except OSError:
        os.ftruncate(file, end)
        raise


def encode_line(told: Told | Stretch) -> bytes:
    """One line of a table, to the full precision."""
    return told.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a table with its ``file:line``; half a line at the end is nobody's."""
    if not path.is_file():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: isn't a JSON object; remove that line")
        yield where, row


def _event(row: dict[str, Any], where: str) -> Told:
    kind = dict(KINDS).get(row.get("schema", ""), Switch)
    return _valid(kind, row, where)


def _valid(kind: type[T], row: dict[str, Any], where: str) -> T:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CorpusError(f"{where}: '{key}': {first['msg'].lower()}; mend that line") from None
