"""Erases a dialogue from a recorded session: its audio becomes silence, its lines go.

The audio comes first: as long as the lines are there, a failed attempt can be repeated. Lines that
can't be read, but name the dialogue, stay and are reported: without them nobody would know that
there is more to erase.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stream_hbaf.errors import CorpusError
from stream_hbaf.events import Feedback, Utterance
from stream_hbaf.files import (
    PRIVATE,
    atomic_write,
    is_own_file,
    open_own_file,
    remove_unfinished,
)
from stream_hbaf.sessions.format import (
    EVENTS_FILE,
    FlacWriter,
    SessionEvent,
    parse_event,
    parse_row,
    sample_at,
)
from stream_hbaf.sessions.session import LINE_LIMIT, Session, decode_audio

LOG = logging.getLogger(__name__)

Part = tuple[int, int]  # samples [start, stop) of a file


@dataclass(slots=True)
class Found:
    """What a session's events hold of a dialogue."""

    utterances: list[Utterance] = field(default_factory=list)  # all their events, in order
    unreadable: list[str] = field(default_factory=list)  # file:line of those that name it
    lines: int = 0  # all that are to go
    # Of all utterances, also of other dialogues: their first samples, by source.
    starts: dict[str, set[int]] = field(default_factory=dict)

    @property
    def ids(self) -> set[str]:
        return {one.id for one in self.utterances}

    def last_sample(self, utterance: Utterance) -> int | None:
        """The one after an utterance's last. One that never ended lasts to its source's next."""
        if utterance.audio_end_ms is not None:
            return sample_at(utterance.audio_end_ms)
        first = sample_at(utterance.audio_start_ms)
        later = (start for start in self.starts.get(utterance.source, ()) if start > first)
        return min(later, default=None)


def erase_dialogue(session: Session, dialogue_id: str) -> int:
    """Erase a dialogue of a session that isn't being recorded; returns how many utterances it had.

    All of it, or an error after which it can be tried again. Raises OSError where the disk refuses,
    and CorpusError or AudioError for what can't be read.
    """
    found = find_dialogue(session, dialogue_id)
    if found.lines:
        for path in [*session.folder.iterdir()]:
            remove_unfinished(path)  # a killed process may have left what is to go now
        for source, parts in parts_of(session, found).items():
            path = session.audio_file(source)
            if is_own_file(path):
                silence(path, parts).close()
            elif os.path.lexists(path):
                raise CorpusError(f"{path}: is no file of its own; put the audio itself there")
        erase_lines(session, dialogue_id, found.ids)
    if found.unreadable:
        raise CorpusError(
            f"{found.unreadable[0]}: can't be read, and names the dialogue, whose sound may be "
            "there; remove that session's folder, or mend the line and ask again"
        )
    return len(found.ids)


def find_dialogue(session: Session, dialogue_id: str) -> Found:
    """Everything of a dialogue in a session's events. Raises CorpusError if it can't be read."""
    found = Found()
    for where, line, event in _lines(session):
        if event is None and dialogue_id.encode() in line:
            found.unreadable.append(where)
        if isinstance(event, Utterance):
            found.starts.setdefault(event.source, set()).add(sample_at(event.audio_start_ms))
        if getattr(event, "dialogue_id", None) == dialogue_id:
            found.lines += 1
            found.utterances += [event] if isinstance(event, Utterance) else []
    return found


def parts_of(session: Session, found: Found) -> dict[str, list[Part]]:
    """Where the utterances are in their sources' files, also where audio in one's midst is missing.

    Raises CorpusError if the stretches of audio can't be read.
    """
    latest = {one.id: one for one in found.utterances}  # an utterance's ``end`` is its last event
    parts: dict[str, list[Part]] = {}
    for one in latest.values():
        first, last = sample_at(one.audio_start_ms), found.last_sample(one)
        parts.setdefault(one.source, []).extend(session.positions(one.source, first, last))
    return {source: of_source for source, of_source in parts.items() if of_source}


def erase_lines(session: Session, dialogue_id: str, ids: set[str]) -> None:
    """Rewrite the events without a dialogue's, and without corrections of its utterances."""
    with replacing(session.folder / EVENTS_FILE) as part, part.open("wb") as kept:
        for _, line, event in _lines(session):
            its = getattr(event, "dialogue_id", None) == dialogue_id
            if not its and not (isinstance(event, Feedback) and event.id in ids):
                kept.write(line)


def _lines(session: Session) -> Iterator[tuple[str, bytes, SessionEvent | None]]:
    """Each line of the events, as it stands there, with its ``file:line`` and its event.

    The event is None if it can't be read; a line of extreme length comes in pieces. Half a line at
    the end is left out. Raises CorpusError if the file can't be read.
    """
    path = session.folder / EVENTS_FILE
    number, whole = 0, True
    for piece in _pieces(path):
        number += whole
        where, starts = f"{path}:{number}", whole
        whole = piece.endswith(b"\n")
        event = None
        if starts and whole:
            with suppress(CorpusError):
                event = parse_event(parse_row(piece, where=where), where=where)
        if not starts or whole or len(piece) == LINE_LIMIT:
            yield where, piece, event


def _pieces(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends, at most LINE_LIMIT bytes at once; none without a file of
    ours."""
    if os.path.lexists(path) and not is_own_file(path):
        LOG.warning("forget: not looked for in %s, which is no file of its own", path)
        return
    try:
        with open_own_file(path) as file:
            while piece := file.readline(LINE_LIMIT):
                yield piece
    except FileNotFoundError:
        return
    except OSError as error:
        raise CorpusError(f"{path}: can't be read ({error.strerror}); mend that file") from None


def silence(path: Path, parts: Sequence[Part]) -> FlacWriter:
    """Replace a file by one with silence in the parts; returns its writer, to continue."""
    with replacing(path) as unfinished:
        unfinished.unlink()  # the writer makes its own
        writer = FlacWriter(unfinished)
        try:
            for batch in decode_audio(path):
                samples = batch.copy()
                for part in parts:
                    first, last = np.clip(np.array(part) - writer.length, 0, len(samples))
                    samples[first:last] = 0
                writer.write(samples)
        except BaseException:
            writer.close()
            raise
    return writer


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A private temporary file that replaces ``path``."""
    with atomic_write(path, mode=PRIVATE) as part:
        yield part
