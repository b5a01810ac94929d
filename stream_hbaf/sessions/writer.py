"""Writes recorded sessions: appends audio and events, adds corrections, erases dialogues.

Erasing a dialogue removes its lines and replaces its audio with silence. All calls are plain and
from one thread.
"""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import Feedback, Trigger, Utterance
from stream_hbaf.files import atomic_write, remove_unfinished
from stream_hbaf.sessions.format import (
    EVENTS_FILE,
    HEADER_FILE,
    STRETCHES_FILE,
    FlacWriter,
    Header,
    SessionEvent,
    Stretch,
    Why,
    append,
    audio_file_name,
    encode_line,
)
from stream_hbaf.sessions.session import Session, decode_audio

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
Part = tuple[int, int]  # samples [start, stop) of a file


@dataclass(slots=True)
class _Track:
    """A source's file, and the number of its next sample if no gap comes first."""

    flac: FlacWriter
    following: int


class SessionWriter:
    """Writes one session into a new folder, readable by its owner only.

    Every method raises OSError where the disk refuses; what was written before stays valid.
    """

    def __init__(self, parent: Path, *, header: Header) -> None:
        parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        self.folder = parent / header.id
        self.folder.mkdir(mode=PRIVATE_FOLDER)
        self.ids: set[str] = set()  # of the finished utterances that are recorded
        self._erased: set[str] = set()  # dialogues, of which events may still come
        self._tracks: dict[str, _Track] = {}
        self._header = header
        self._stretches = _open_private(self.folder / STRETCHES_FILE)
        self._events = _open_private(self.folder / EVENTS_FILE)
        # The header comes last: where there is one, there is a session. It stays locked.
        self._locked = _open_private(self.folder / HEADER_FILE)
        fcntl.flock(self._locked, fcntl.LOCK_EX)
        append(self._locked, header.model_dump_json(indent=1).encode() + b"\n")

    def write_audio(self, source: str, chunk: Chunk, *, after_loss: bool = False) -> None:
        """Write a chunk; a new stretch begins where samples before it are missing.

        ``after_loss`` says that they were lost since the disk was too slow.
        """
        track = self._tracks.get(source)
        why: Why | None = None
        if track is None:
            track = _Track(FlacWriter(self.folder / audio_file_name(source)), chunk.start)
            self._tracks[source] = track
            why = "begin"
        elif chunk.after_gap:
            why = "gap"
        elif chunk.start != track.following:
            why = "lost" if after_loss else "pause"
        if why is not None:
            began_at = chunk.captured_at - len(chunk.samples) / SAMPLE_RATE_HZ
            self._begin_stretch(source, chunk.start, why=why, monotonic=began_at)
        track.flac.write(chunk.samples)
        track.following = chunk.start + len(chunk.samples)

    def write_cut(self, source: str, *, resume_at: int, trigger: Trigger) -> None:
        """Record that the open utterance was ended on request; a new stretch begins here."""
        track = self._tracks.get(source)
        if track is not None:
            why: Why = "cut" if resume_at == track.following else "pause"
            now = time.monotonic()
            self._begin_stretch(source, resume_at, why=why, monotonic=now, trigger=trigger)
            track.following = resume_at

    def write_event(self, event: SessionEvent) -> None:
        """Write an event; of an erased dialogue only its audio is erased, once that is known."""
        if getattr(event, "dialogue_id", None) in self._erased:
            if isinstance(event, Utterance) and event.type == "end":
                self._silence([event])
            return
        append(self._events, encode_line(event))
        if isinstance(event, Utterance) and event.type == "end":
            self.ids.add(event.id)

    def erase_dialogue(self, dialogue_id: str) -> int:
        """Erase a dialogue's events and audio, also those to come; returns how many utterances it
        had."""
        self._erased.add(dialogue_id)
        session = Session(self.folder, self._header)
        utterances = _utterances_of(session, dialogue_id)
        ids = {one.id for one in utterances}
        if utterances:
            os.close(self._events)
            try:
                _erase_lines(session, dialogue_id, ids)
            finally:
                self._events = _open_private(self.folder / EVENTS_FILE)
            self._silence(utterances)
        self.ids -= ids
        return len(ids)

    def close(self) -> None:
        """Finish all files; once."""
        try:
            for track in self._tracks.values():
                track.flac.close()
        finally:
            for file in (self._stretches, self._events, self._locked):
                os.close(file)
            self._tracks = {}

    def _begin_stretch(
        self,
        source: str,
        start: int,
        *,
        why: Why,
        monotonic: float,
        trigger: Trigger = "end_of_input",
    ) -> None:
        began = datetime.fromtimestamp(time.time() - time.monotonic() + monotonic, UTC)
        stretch = Stretch(
            source=source,
            at=self._tracks[source].flac.length,
            start=start,
            time=began.isoformat(timespec="milliseconds"),
            why=why,
            trigger=trigger,
        )
        append(self._stretches, encode_line(stretch))

    def _silence(self, utterances: Iterable[Utterance]) -> None:
        """Rewrite the files that hold the utterances, with silence in their place, and continue in
        the new files."""
        session = Session(self.folder, self._header)
        for source, parts in _parts(session, utterances).items():
            track = self._tracks[source]
            track.flac.close()
            track.flac = _silenced(session.audio_file(source), parts)


def erase_dialogue(session: Session, dialogue_id: str) -> int:
    """Erase a dialogue of a session that isn't being recorded, as ``SessionWriter`` does."""
    utterances = _utterances_of(session, dialogue_id)
    ids = {one.id for one in utterances}
    if utterances:
        parts_of = _parts(session, utterances)
        _erase_lines(session, dialogue_id, ids)
        for source, parts in parts_of.items():
            if session.audio_file(source).is_file():
                _silenced(session.audio_file(source), parts).close()
    return len(ids)


def add_feedback(session: Session, corrections: Sequence[Feedback]) -> None:
    """Append corrections to a session, whether or not it is being recorded. Raises OSError."""
    file = _open_private(session.folder / EVENTS_FILE)
    try:
        for one in corrections:
            append(file, encode_line(one))
    finally:
        os.close(file)


def _utterances_of(session: Session, dialogue_id: str) -> list[Utterance]:
    """All events of a dialogue's utterances, finished or not."""
    return [
        event
        for event in session.events
        if isinstance(event, Utterance) and event.dialogue_id == dialogue_id
    ]


def _parts(session: Session, utterances: Iterable[Utterance]) -> dict[str, list[Part]]:
    """Where utterances are in their sources' files; one that never ended, to its stretch's end."""
    latest = {one.id: one for one in utterances}  # an utterance's ``end`` is its last event
    found: dict[str, list[Part]] = {}
    for one in latest.values():
        part = session.clip(one) if one.type == "end" else session.stretch_from(one)
        if part is not None:
            found.setdefault(one.source, []).append(part)
    return found


def _erase_lines(session: Session, dialogue_id: str, ids: set[str]) -> None:
    kept = (
        event
        for event in session.events
        if getattr(event, "dialogue_id", None) != dialogue_id
        and not (isinstance(event, Feedback) and event.id in ids)
    )
    with _replacing(session.folder / EVENTS_FILE) as part:
        part.write_bytes(b"".join(map(encode_line, kept)))


def _silenced(path: Path, parts: Sequence[Part]) -> FlacWriter:
    """Replace a file by one with silence in the parts; returns its writer, to continue."""
    with _replacing(path) as unfinished:
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
def _replacing(path: Path) -> Iterator[Path]:
    """A private temporary file that replaces ``path``."""
    remove_unfinished(path)  # a killed process may have left what is to be erased now
    with atomic_write(path, mode=PRIVATE_FILE) as part:
        yield part


def _open_private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
