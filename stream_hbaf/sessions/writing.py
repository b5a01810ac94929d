"""A session is written: plain calls, all from one thread, each a line or some sound more."""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import Feedback, Trigger, Utterance
from stream_hbaf.files import atomic_write, remove_unfinished
from stream_hbaf.sessions.flac import FlacWriter
from stream_hbaf.sessions.header import Header
from stream_hbaf.sessions.session import (
    EVENTS,
    HEADER,
    SOUND,
    Session,
    Stretch,
    Told,
    append_line,
    encode_line,
    open_session,
    read_sound,
    sound_name,
)

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
Part = tuple[int, int]  # samples [start, end) of a file


@dataclass(slots=True)
class _Track:
    """A source's file, and what its next sample would be called if nothing came between."""

    flac: FlacWriter
    following: int


class SessionWriter:
    """Writes one session into a new folder, readable by its owner only.

    Everything raises OSError where the disk refuses; what was written before stays whole.
    """

    def __init__(self, parent: Path, *, header: Header) -> None:
        parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        self.folder = parent / header.id
        self.folder.mkdir(mode=PRIVATE_FOLDER)
        self.ids: set[str] = set()  # of the finished utterances it tells of
        self._forgotten: set[str] = set()  # dialogues, of which an utterance may still be spoken
        self._tracks: dict[str, _Track] = {}
        self._session = Session(self.folder, header)
        self._sound = _open_private(self.folder / SOUND)
        self._events = _open_private(self.folder / EVENTS)
        # The header comes last: where there is one, there is a session. It stays locked.
        self._header = _open_private(self.folder / HEADER)
        fcntl.flock(self._header, fcntl.LOCK_EX)
        append_line(self._header, header.model_dump_json(indent=1).encode() + b"\n")

    def hear(self, source: str, chunk: Chunk, *, after_loss: bool = False) -> None:
        """Write sound; where some is missing before it, that is written down as well."""
        track = self._tracks.get(source)
        why = self._why(track, chunk, after_loss=after_loss)
        if track is None:
            track = _Track(FlacWriter(self.folder / sound_name(source)), chunk.start)
            self._tracks[source] = track
        if why is not None:
            began_at = chunk.captured_at - len(chunk.samples) / SAMPLE_RATE_HZ
            self._begin(source, track, chunk.start, why=why, monotonic=began_at)
        track.flac.write(chunk.samples)
        track.following = chunk.start + len(chunk.samples)

    def cut(self, source: str, *, resume_at: int, trigger: Trigger) -> None:
        """What was being said ended here by a wish; utterances are found anew from here on."""
        track = self._tracks.get(source)
        if track is not None:
            why: Literal["cut", "pause"] = "cut" if resume_at == track.following else "pause"
            now = time.monotonic()
            self._begin(source, track, resume_at, why=why, monotonic=now, trigger=trigger)
            track.following = resume_at

    def tell(self, told: Told) -> None:
        """Write an event, unless it tells of a forgotten dialogue."""
        if getattr(told, "dialogue_id", None) in self._forgotten:
            if isinstance(told, Utterance) and told.type == "end":
                self._silence([told])
            return
        append_line(self._events, encode_line(told))
        if isinstance(told, Utterance) and told.type == "end":
            self.ids.add(told.id)

    def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue's events and sound, and what is still to come of it; returns how many
        utterances it had."""
        self._forgotten.add(dialogue_id)
        said = _said_in(self._fresh(), dialogue_id)
        if said:
            os.close(self._events)
            try:
                _erase_lines(self._session.folder, dialogue_id)
            finally:
                self._events = _open_private(self.folder / EVENTS)
            self._silence(said)
        erased = {one.id for one in said}
        self.ids -= erased
        return len(erased)

    def close(self) -> None:
        """Finish all files; once."""
        try:
            for track in self._tracks.values():
                track.flac.close()
        finally:
            for file in (self._sound, self._events, self._header):
                os.close(file)
            self._tracks = {}

    def _fresh(self) -> Session:
        """The session as it stands on disk now."""
        return Session(self.folder, self._session.header)

    @staticmethod
    def _why(
        track: _Track | None, chunk: Chunk, *, after_loss: bool
    ) -> Literal["begin", "gap", "pause", "lost"] | None:
        """Why a new stretch begins with this chunk; None if none does."""
        if track is None:
            return "begin"
        if chunk.after_gap:
            return "gap"
        if chunk.start == track.following:
            return None
        return "lost" if after_loss else "pause"

    def _begin(
        self,
        source: str,
        track: _Track,
        start: int,
        *,
        why: Literal["begin", "gap", "pause", "cut", "lost"],
        monotonic: float,
        trigger: Trigger = "end_of_input",
    ) -> None:
        stretch = Stretch(
            source=source,
            at=track.flac.length,
            start=start,
            time=_iso(time.time() - time.monotonic() + monotonic),
            why=why,
            trigger=trigger,
        )
        append_line(self._sound, encode_line(stretch))

    def _silence(self, said: Iterable[Utterance]) -> None:
        """Write the files of what was said anew, with silence in its place, and go on in them."""
        session = self._fresh()
        for source, parts in _parts(session, said).items():
            track = self._tracks[source]
            track.flac.close()
            track.flac = _silenced(session.sound(source), parts)


def erase_dialogue(session: Session, dialogue_id: str) -> int:
    """Erase a dialogue from a session that nobody is recording; returns how many utterances it had.

    Raises OSError where the disk refuses.
    """
    said = _said_in(session, dialogue_id)
    if said:
        parts_of = _parts(session, said)
        _erase_lines(session.folder, dialogue_id)
        for source, parts in parts_of.items():
            if session.sound(source).is_file():
                _silenced(session.sound(source), parts).close()
    return len({one.id for one in said})


def add_feedback(session: Session, told: Sequence[Feedback]) -> None:
    """Append corrections to a session, whether or not it is being recorded. Raises OSError."""
    file = _open_private(session.folder / EVENTS)
    try:
        for one in told:
            append_line(file, encode_line(one))
    finally:
        os.close(file)


def _said_in(session: Session, dialogue_id: str) -> list[Utterance]:
    """All that is told of a dialogue's utterances, finished or not."""
    return [
        told
        for told in session.events
        if isinstance(told, Utterance) and told.dialogue_id == dialogue_id
    ]


def _parts(session: Session, said: Iterable[Utterance]) -> dict[str, list[Part]]:
    """Where utterances stand in their sources' files; one that never ended, as far as it goes."""
    latest = {one.id: one for one in said}  # an utterance's ``end`` is its last event
    found: dict[str, list[Part]] = {}
    for one in latest.values():
        part = session.clip(one) if one.type == "end" else session.rest(one)
        if part is not None:
            found.setdefault(one.source, []).append(part)
    return found


def _erase_lines(folder: Path, dialogue_id: str) -> None:
    session = Session(folder, open_session(folder).header)
    ids = {one.id for one in _said_in(session, dialogue_id)}
    kept = [
        told
        for told in session.events
        if getattr(told, "dialogue_id", None) != dialogue_id
        and not (isinstance(told, Feedback) and told.id in ids)
    ]

    with _replacing(folder / EVENTS) as part:
        file = _open_private(part)
        try:
            append_line(file, b"".join(map(encode_line, kept)))
        finally:
            os.close(file)


def _silenced(path: Path, parts: Sequence[Part]) -> FlacWriter:
    """A file's sound with silence in the parts, under the same name; still to be gone on with."""
    with _replacing(path) as part:
        part.unlink()  # the writer makes its own
        writer = FlacWriter(part)
        try:
            for batch in read_sound(path):
                whole = batch.copy()
                for start, end in parts:
                    first, last = (
                        min(max(0, sample - writer.length), len(whole)) for sample in (start, end)
                    )
                    whole[first:last] = np.int16(0)
                writer.write(whole)
        except BaseException:
            writer.close()
            raise
    return writer


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A private temporary file that replaces ``path``; what a killed process left of one goes."""
    remove_unfinished(path)  # it may hold what is to be erased now
    with atomic_write(path, mode=PRIVATE_FILE) as part:
        yield part


def _open_private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)


def _iso(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time, UTC).isoformat(timespec="milliseconds")
