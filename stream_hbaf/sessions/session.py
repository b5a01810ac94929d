"""Reads recorded sessions: their events, their corrections, and where each utterance's audio is.

A session's files may be half written, or somebody else's: what can't be read is an error that names
it, every line has a limit, and a symbolic link is never followed.
"""

import logging
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from stream_hbaf.audio.decode import Decoder, fill_gaps
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import CorpusError, shorten
from stream_hbaf.events import Feedback, Utterance
from stream_hbaf.files import is_folder, is_locked, is_own_file, open_own_file
from stream_hbaf.sessions.format import (
    EVENTS_FILE,
    FORMAT,
    HEADER_BYTES,
    HEADER_FILE,
    STRETCHES_FILE,
    Header,
    Samples,
    SessionEvent,
    Stretch,
    audio_file_name,
    flac_length,
    parse,
    parse_event,
    read_json_lines,
    sample_at,
)
from stream_hbaf.untrusted import UntrustedError, parse_json

LOG = logging.getLogger(__name__)

LONGEST_CLIP = 600 * SAMPLE_RATE_HZ  # samples; segmenter.max_utterance_s has this limit
ENDLESS = 1 << 60  # samples: more than any file holds
HEADER_LIMIT, LINE_LIMIT = 1 << 20, 1 << 20  # bytes; a line of ours has about 1 kB
EVENTS_LIMIT = 1 << 27  # bytes of a session: two days of talk without a pause
STRETCHES_LIMIT = 1 << 24  # bytes: a hundred thousand pauses and gaps


@dataclass(frozen=True)
class Session:
    """A recorded session; its files are read when they are first needed."""

    folder: Path

    @cached_property
    def header(self) -> Header:
        """Raises CorpusError if there is none of this format."""
        path = self.folder / HEADER_FILE
        try:
            with open_own_file(path) as file:
                content = parse_json(file.read(HEADER_LIMIT))
        except OSError as error:
            raise CorpusError(
                f"{path}: can't be read ({error.strerror}); give the folder of a recorded session"
            ) from None
        except UntrustedError:
            raise CorpusError(f"{path}: isn't JSON; get the session again from a copy") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise CorpusError(
                f"{path}: format {shorten(str(found))}, but this version reads format {FORMAT}; "
                "install the version of stream-hbaf that the session was recorded with"
            )
        return parse(Header, content, where=str(path))

    def read_events(self) -> Iterator[SessionEvent]:
        """All events in their order, one at a time. Raises CorpusError with file and line, and for
        a file that is too large."""
        for where, row in _read_table(self.folder / EVENTS_FILE, limit=EVENTS_LIMIT):
            yield parse_event(row, where=where)

    @cached_property
    def events(self) -> tuple[SessionEvent, ...]:
        """All events in their order. Raises CorpusError as ``read_events`` does."""
        return tuple(self.read_events())

    @property
    def ends(self) -> list[Utterance]:
        """The latest ``end`` of each finished utterance, in the order in which they ended."""
        ends = (one for one in self.events if isinstance(one, Utterance) and one.type == "end")
        return [*{one.id: one for one in ends}.values()]

    @cached_property
    def corrections(self) -> dict[str, Feedback]:
        """The latest correction of each utterance's label, by id."""
        return {one.id: one for one in self.events if isinstance(one, Feedback) and one.label}

    @cached_property
    def speakers(self) -> dict[str, str]:
        """The speaker of each utterance whose speaker was corrected, by id."""
        return {
            one.id: one.speaker for one in self.events if isinstance(one, Feedback) and one.speaker
        }

    @cached_property
    def stretches(self) -> dict[str, list[Stretch]]:
        """By source, in their order. Raises CorpusError with file and line."""
        found: dict[str, list[Stretch]] = {}
        for where, row in _read_table(self.folder / STRETCHES_FILE, limit=STRETCHES_LIMIT):
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

        None where it isn't whole, because audio was lost before it could be written, and where it
        is longer than any utterance.
        """
        stretch = self.stretch_from(end)
        if stretch is None or end.audio_end_ms is None:
            return None
        start, stretch_stop = stretch
        stop = start + sample_at(end.audio_end_ms) - sample_at(end.audio_start_ms)
        return (start, stop) if stop <= min(stretch_stop, start + LONGEST_CLIP) else None

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

    def positions(self, source: str, first: int, last: int | None) -> list[tuple[int, int]]:
        """Where a source's samples [first, last) are in its file, all but those that are missing.

        Without ``last`` all that follow ``first``.
        """
        stretches = self.stretches.get(source, [])
        last = ENDLESS if last is None else last
        found = []
        for stretch, following in zip_longest(stretches, stretches[1:]):
            length = ENDLESS if following is None else following.at - stretch.at
            start, stop = max(first, stretch.start), min(last, stretch.start + length)
            if start < stop:
                moved = stretch.at - stretch.start
                found.append((start + moved, stop + moved))
        return found

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
    """A session whose header can be read. Raises CorpusError if there is none of this format."""
    session = Session(folder)
    _ = session.header
    return session


def open_sessions(folder: Path) -> list[Session]:
    """The sessions in a folder of sessions, or the one that it is itself, oldest first.

    One that can't be read is logged and left out. Raises CorpusError if there is no such folder, or
    none of its sessions can be read.
    """
    found: list[Session] = []
    errors: list[CorpusError] = []
    for one in session_folders(folder):
        session = Session(one)
        try:
            _ = session.header, session.events, session.stretches
        except CorpusError as error:
            errors.append(error)
        else:
            found.append(session)
    if errors and not found:
        raise errors[0]
    for problem in errors:
        LOG.warning("session left out: %s", problem)
    return sorted(found, key=lambda session: session.header.began)


def list_sessions(folder: Path) -> list[SessionSummary]:
    """Summaries of the sessions in a folder, oldest first; of one that can't be read the error.

    Raises CorpusError if there is no such folder.
    """
    found = []
    for one in session_folders(folder):
        try:
            found.append(summarise(Session(one)))
        except CorpusError as error:
            found.append(SessionSummary(one, error=str(error)))
    return found


def summarise(session: Session) -> SessionSummary:
    """A session in figures. Raises CorpusError if it can't be read."""
    began, length_s = session.header.began, session.length_s
    speakers: dict[str, str] = {}  # by utterance
    corrected = set()
    for event in session.read_events():  # not held: a list may be of many sessions
        if isinstance(event, Feedback):
            corrected.add(event.id)
        elif isinstance(event, Utterance) and event.type == "end":
            speakers[event.id] = event.speaker
    return SessionSummary(
        folder=session.folder,
        began=began,
        length_s=length_s,
        utterances=len(speakers),
        speakers=tuple(sorted({*speakers.values()} - {""})),
        corrections=len(corrected),
    )


def is_session(folder: Path) -> bool:
    """Whether the folder is a recorded session."""
    return is_own_file(folder / HEADER_FILE)


def is_being_recorded(folder: Path) -> bool:
    """Whether a process holds the session open for writing."""
    return is_locked(folder / HEADER_FILE)


def decode_audio(path: Path) -> Iterator[Samples]:
    """A source's audio in batches; none if no audio was recorded."""
    if is_own_file(path) and path.stat().st_size > HEADER_BYTES:
        yield from fill_gaps(Decoder(path))


def session_folders(folder: Path) -> list[Path]:
    """The folders of the sessions in a folder, by name, which begins with the time; or itself.

    A symbolic link in it is none. Raises CorpusError if there is no such folder.
    """
    if is_session(folder):
        return [folder]
    if not is_folder(folder):
        raise CorpusError(f"{folder}: no such folder; give the one that --record wrote to")
    try:
        every = sorted(folder.iterdir())
    except OSError as error:
        raise CorpusError(
            f"{folder}: can't be read ({error.strerror}); correct its permissions"
        ) from None
    return [one for one in every if not one.is_symlink() and is_session(one)]


def _read_lines(path: Path, *, limit: int) -> Iterator[bytes]:
    """The whole lines of a table; half a line at the end is left out, a missing one has none.

    Raises CorpusError if it can't be read, is larger than ``limit``, or has a line that is longer
    than any of ours.
    """
    try:
        with open_own_file(path) as file:
            while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
                yield line[:-1]
                if file.tell() > limit:
                    size = f"{limit >> 20} MB"
                    raise CorpusError(f"{path}: has more than {size}; divide that session")
            if len(line) == LINE_LIMIT:
                raise CorpusError(f"{path}: a line of more than {LINE_LIMIT:,} bytes; remove it")
    except FileNotFoundError:
        return
    except OSError as error:
        raise CorpusError(f"{path}: can't be read ({error.strerror}); mend that file") from None


def _read_table(path: Path, *, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_json_lines(_read_lines(path, limit=limit), path=path)
