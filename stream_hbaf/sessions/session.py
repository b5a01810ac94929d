"""Reads recorded sessions: their events, their corrections, and where each utterance's audio is."""

import json
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stream_hbaf.audio.decode import Decoder, fill_gaps
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import CorpusError
from stream_hbaf.events import Feedback, Switch, Utterance
from stream_hbaf.files import is_locked
from stream_hbaf.sessions.format import (
    EVENTS_FILE,
    FORMAT,
    HEADER_BYTES,
    HEADER_FILE,
    SCHEMAS,
    STRETCHES_FILE,
    Header,
    Samples,
    SessionEvent,
    Stretch,
    audio_file_name,
    flac_length,
    parse,
    read_json_lines,
    sample_at,
)


@dataclass(frozen=True)
class Session:
    """A recorded session; its files are read when they are first needed."""

    folder: Path
    header: Header

    @cached_property
    def events(self) -> tuple[SessionEvent, ...]:
        """All events in their order. Raises CorpusError with file and line."""
        return tuple(
            parse(SCHEMAS.get(row.get("schema", ""), Switch), row, where=where)
            for where, row in _read_table(self.folder / EVENTS_FILE)
        )

    @property
    def ends(self) -> list[Utterance]:
        """The ``end`` events, one for each finished utterance."""
        return [one for one in self.events if isinstance(one, Utterance) and one.type == "end"]

    @cached_property
    def corrections(self) -> dict[str, Feedback]:
        """The latest correction of each utterance, by id."""
        return {one.id: one for one in self.events if isinstance(one, Feedback)}

    @cached_property
    def stretches(self) -> dict[str, list[Stretch]]:
        """By source, in their order. Raises CorpusError with file and line."""
        found: dict[str, list[Stretch]] = {}
        for where, row in _read_table(self.folder / STRETCHES_FILE):
            stretch = parse(Stretch, row, where=where)
            found.setdefault(stretch.source, []).append(stretch)
        return found

    @property
    def length_s(self) -> float:
        """The length of the longest source's audio."""
        lengths = [flac_length(self.audio_file(source)) for source in self.stretches]
        return max(lengths, default=0) / SAMPLE_RATE_HZ

    def audio_file(self, source: str) -> Path:
        """The file of a source's audio; missing if no audio was recorded."""
        return self.folder / audio_file_name(source)

    def clip(self, end: Utterance) -> tuple[int, int] | None:
        """Where a finished utterance is in its source's file: samples [start, stop).

        None where it isn't whole, because audio was lost before it could be written.
        """
        stretch = self.stretch_from(end)
        if stretch is None or end.audio_end_ms is None:
            return None
        start, stretch_stop = stretch
        stop = start + sample_at(end.audio_end_ms) - sample_at(end.audio_start_ms)
        return (start, stop) if stop <= stretch_stop else None

    def stretch_from(self, utterance: Utterance) -> tuple[int, int] | None:
        """An utterance's stretch from the utterance's beginning on, in samples as ``clip``."""
        stretches = self.stretches.get(utterance.source, ())
        first = sample_at(utterance.audio_start_ms)
        number = bisect_right(stretches, first, key=lambda stretch: stretch.start) - 1
        if number < 0:
            return None
        start = stretches[number].at + first - stretches[number].start
        if number + 1 < len(stretches):
            return start, max(start, stretches[number + 1].at)
        return start, sys.maxsize

    def audio(self, source: str) -> Iterator[Stretch | Samples]:
        """The audio of a source in pieces, each stretch before its samples."""
        due = deque(self.stretches.get(source, ()))
        position = 0
        for batch in decode_audio(self.audio_file(source)):
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
class SessionSummary:
    """A session in a list of sessions."""

    folder: Path
    began: str = ""
    length_s: float = 0.0
    utterances: int = 0
    speakers: tuple[str, ...] = ()
    corrections: int = 0
    error: str = ""  # why it can't be read; all else is then empty


def open_session(folder: Path) -> Session:
    """Read a session's header. Raises CorpusError if there is none of this format."""
    path = folder / HEADER_FILE
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
    return Session(folder, parse(Header, content, where=str(path)))


def open_sessions(folder: Path) -> list[Session]:
    """All sessions in a folder of sessions, or the one that it is itself, oldest first.

    Raises CorpusError if there is no such folder, or one of them can't be read.
    """
    return sorted(map(open_session, _folders(folder)), key=lambda session: session.header.began)


def list_sessions(folder: Path) -> list[SessionSummary]:
    """Summaries of the sessions in a folder, oldest first; of one that can't be read the error.

    Raises CorpusError if there is no such folder.
    """
    found = []
    for one in _folders(folder):
        try:
            found.append(summarise(open_session(one)))
        except CorpusError as error:
            found.append(SessionSummary(one, error=str(error)))
    return found


def summarise(session: Session) -> SessionSummary:
    """A session in figures. Raises CorpusError if it can't be read."""
    ends = session.ends
    return SessionSummary(
        folder=session.folder,
        began=session.header.began,
        length_s=session.length_s,
        utterances=len(ends),
        speakers=tuple(sorted({end.speaker for end in ends if end.speaker})),
        corrections=len(session.corrections),
    )


def is_session(folder: Path) -> bool:
    """Whether the folder is a recorded session."""
    return (folder / HEADER_FILE).is_file()


def is_being_recorded(folder: Path) -> bool:
    """Whether a process holds the session open for writing."""
    return is_locked(folder / HEADER_FILE)


def decode_audio(path: Path) -> Iterator[Samples]:
    """A source's audio in batches; none if no audio was recorded."""
    if path.is_file() and path.stat().st_size > HEADER_BYTES:
        yield from fill_gaps(Decoder(path))


def _folders(folder: Path) -> list[Path]:
    """Sorted by name, which begins with the session's time."""
    if is_session(folder):
        return [folder]
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder; give the one that --record wrote to")
    return sorted(filter(is_session, folder.iterdir()))


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table; half a line at the end is left out, and a missing one has none."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return read_json_lines(lines, path=path)
