"""Writes recorded sessions: appends audio and events, adds corrections, erases dialogues.

All calls are plain and from one thread.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import Feedback, Trigger, Utterance
from stream_hbaf.files import PRIVATE
from stream_hbaf.sessions.erasing import (
    Found,
    Part,
    erase_lines,
    find_dialogue,
    parts_of,
    silence,
)
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
from stream_hbaf.sessions.session import LINE_LIMIT, Session, is_being_recorded

PRIVATE_FOLDER = 0o700
# Left free on the disk by audio, or a tenth of a small disk: room for the lines of a thousand
# utterances.
LEFT_FREE_BYTES = 1 << 20
MOST_IDS = 10_000  # in memory, for corrections; older utterances are looked for on disk
CHECKED_EVERY = SAMPLE_RATE_HZ  # samples between two looks at the disk


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
        self.ids: dict[str, None] = {}  # of the newest finished utterances that are recorded
        self._erased: set[str] = set()  # dialogues, of which events may still come
        self._tracks: dict[str, _Track] = {}
        self._unchecked = CHECKED_EVERY  # samples since the last look at the disk
        with contextlib.ExitStack() as undo:  # half a session would be none
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._stretches = _open_private(self.folder / STRETCHES_FILE)
            self._events = _open_private(self.folder / EVENTS_FILE)
            # The header comes last: where there is one, there is a session. It stays locked.
            self._locked = _open_private(self.folder / HEADER_FILE)
            fcntl.flock(self._locked, fcntl.LOCK_EX)
            append(self._locked, header.model_dump_json(indent=1).encode() + b"\n")
            undo.pop_all()

    def write_audio(self, source: str, chunk: Chunk, *, after_loss: bool = False) -> None:
        """Write a chunk; a new stretch begins where samples before it are missing.

        ``after_loss`` says that they were lost since the disk was too slow. A disk that is nearly
        full is refused for audio, so that events still find room.
        """
        self._require_room(len(chunk.samples))
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
                try:
                    self._silence(parts_of(Session(self.folder), Found([event])))
                except OSError:
                    append(self._events, encode_line(event))  # with it, it can be tried again
                    raise
            return
        append(self._events, encode_line(event))
        if isinstance(event, Utterance) and event.type == "end":
            self.ids[event.id] = None
            if len(self.ids) > MOST_IDS:
                del self.ids[next(iter(self.ids))]

    def erase_dialogue(self, dialogue_id: str) -> int:
        """Erase a dialogue's events and audio, also those to come; returns how many utterances it
        had."""
        self._erased.add(dialogue_id)
        session = Session(self.folder)
        found = find_dialogue(session, dialogue_id)
        self._silence(parts_of(session, found))
        if found.lines:  # only now: with them it can be tried again
            os.close(self._events)
            try:
                erase_lines(session, dialogue_id, found.ids)
            finally:
                self._events = _open_private(self.folder / EVENTS_FILE)
        for gone in found.ids:
            self.ids.pop(gone, None)
        return len(found.ids)

    def close_audio(self) -> None:
        """Finish the audio files; events may still be written."""
        tracks, self._tracks = self._tracks, {}
        with contextlib.ExitStack() as closing:  # all of them, whatever one raises
            for track in tracks.values():
                closing.callback(track.flac.close)

    def close(self) -> None:
        """Finish all files; once."""
        try:
            self.close_audio()
        finally:
            for file in (self._stretches, self._events, self._locked):
                os.close(file)

    def _require_room(self, samples: int) -> None:
        self._unchecked += samples
        if self._unchecked < CHECKED_EVERY:
            return
        disk = os.statvfs(self.folder)
        left_free = min(LEFT_FREE_BYTES, disk.f_blocks * disk.f_frsize // 10)
        if disk.f_bavail * disk.f_frsize < left_free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unchecked = 0

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

    def _silence(self, parts_of_source: Mapping[str, Sequence[Part]]) -> None:
        """Rewrite the files that hold the parts, with silence in their place, and continue in the
        new files."""
        for source, parts in parts_of_source.items():
            path = Session(self.folder).audio_file(source)
            track = self._tracks.get(source)
            if track is None:  # nothing more is recorded of it
                silence(path, parts).close()
            else:
                track.flac.close()  # writes its last samples
                track.flac = silence(path, parts)


def add_feedback(session: Session, corrections: Sequence[Feedback]) -> None:
    """Append corrections to a session, whether or not it is being recorded. Raises OSError."""
    file = _open_private(session.folder / EVENTS_FILE)
    try:
        if corrections and not is_being_recorded(session.folder):
            _remove_half_line(file)
        for one in corrections:
            append(file, encode_line(one))
    finally:
        os.close(file)


def _remove_half_line(file: int) -> None:
    """Cut off what a loss of power left behind the last whole line: a line behind it would be
    damaged."""
    size = os.fstat(file).st_size
    begin = max(0, size - LINE_LIMIT)
    whole = os.pread(file, size - begin, begin).rfind(b"\n") + 1
    if whole > 0 or begin == 0:
        os.ftruncate(file, begin + whole)


def _open_private(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.open(path, flags, PRIVATE)
