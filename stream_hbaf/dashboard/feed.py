"""What pages are sent: the events of this run, and recorded sessions, as JSON.

A slow page never delays the recogniser: its messages wait in a short queue. When that is full,
levels and partials are dropped. If it is still full, all of it is, and the page gets a new
snapshot: one message with everything that a page needs to know.
"""

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import CorpusError
from stream_hbaf.events import Event, Feedback, Health, Info, Speech, Status, Switch, Utterance
from stream_hbaf.files import is_own_file
from stream_hbaf.publish.messages import event_message
from stream_hbaf.sessions.format import Stretch, flac_length
from stream_hbaf.sessions.session import (
    Session,
    SessionSummary,
    list_sessions,
    open_session,
    session_folders,
)

MAX_EVENTS = 2000  # utterances, statuses and so on of this run that are kept for snapshots
MAX_QUEUED = 256  # messages to one page
CORRECTED = ("label", "speaker")  # what of an utterance a message about a correction is about

# Of each kind of event that snapshots contain, the fields that tell which earlier one it replaces.
# Levels and partials are outdated at once, and pages summarise dialogues themselves.
KEYS: dict[type[Event], tuple[str, ...]] = {
    Utterance: ("id",),
    Feedback: ("id", "corrects"),
    Status: ("source", "stage"),
    Switch: ("source", "switch"),
    Speech: ("source",),
    Info: (),
    Health: (),
}

STATES = ("status", "switch", "speech")  # kinds that are about the present state of a source


class LatestEvents:
    """The latest message about each utterance, correction, stage and switch, for snapshots.

    Bounded: the oldest utterances and corrections are dropped.
    """

    def __init__(self) -> None:
        # By type and key: dialogue id and message.
        self._messages: dict[tuple[str, ...], tuple[str, str]] = {}

    def add(self, event: Event, message: str) -> None:
        """Keep a message in the place of the one that it replaces, if its kind is kept.

        An ``Info`` ends what is about the state of sources that aren't there any more.
        """
        if isinstance(event, Info):
            self._messages = {
                key: kept
                for key, kept in self._messages.items()
                if key[0] not in STATES or key[1] in event.sources
            }
        fields = KEYS.get(type(event))
        if fields is None:
            return
        key = (type(event).__name__.lower(), *(getattr(event, field) for field in fields))
        # A replaced message keeps its position, so that utterances stay in order.
        self._messages[key] = (getattr(event, "dialogue_id", ""), message)
        if len(self._messages) > MAX_EVENTS:
            oldest = next(key for key in self._messages if key[0] in ("utterance", "feedback"))
            del self._messages[oldest]

    def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue and its corrections; returns how many utterances were erased."""
        erased = [key for key, (of, _) in self._messages.items() if of == dialogue_id]
        for key in erased:
            del self._messages[key]
            for kind in CORRECTED:
                self._messages.pop(("feedback", key[1], kind), None)
        return len(erased)

    def messages(self) -> list[str]:
        """All messages, oldest first."""
        return [message for _, message in self._messages.values()]


class PageQueue:
    """The messages that one page has not been sent yet."""

    def __init__(self) -> None:
        self._queued: deque[tuple[bool, str]] = deque()  # droppable, message
        self._snapshot_due = True
        self._changed = asyncio.Event()
        self._changed.set()

    def put(self, message: str, *, droppable: bool = False) -> None:
        """Queue a message, or replace the whole queue by a snapshot if it is full."""
        if self._snapshot_due and not droppable:
            return  # the snapshot will contain it
        if len(self._queued) >= MAX_QUEUED:
            self._queued = deque(one for one in self._queued if not one[0])
        if len(self._queued) >= MAX_QUEUED:
            self.request_snapshot()
            return
        self._queued.append((droppable, message))
        self._changed.set()

    def request_snapshot(self) -> None:
        """Have the next message be a snapshot, which makes all queued ones superfluous."""
        self._queued.clear()
        self._snapshot_due = True
        self._changed.set()

    async def next(self) -> str | None:
        """The next message; None stands for a snapshot."""
        while True:
            await self._changed.wait()
            if self._snapshot_due:
                self._snapshot_due = False
                return None
            if self._queued:
                return self._queued.popleft()[1]
            self._changed.clear()


class Recordings:
    """The recorded sessions in a folder, by the names of their own folders; without one, none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def summaries(self) -> list[dict[str, Any]]:
        """An entry for each session, newest first; of a damaged one only the ``error``."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return [_entry(summary) for summary in reversed(list_sessions(self.folder))]

    def session(self, name: str) -> str:
        """A session as JSON: its labels, its events in order, and the stretches of its audio.

        Raises CorpusError if there is none of this name, or it is damaged.
        """
        session = self._find(name)
        events = ",".join(
            event_message(event) for event in session.events if isinstance(event, Event)
        )
        head = json.dumps({"labels": session.header.labels, "sounds": _stretches(session)})
        return f'{head[:-1]},"events":[{events}]}}'

    def audio(self, name: str, source: str) -> Path:
        """The audio file of a source. Raises CorpusError if there is none."""
        path = self._find(name).audio_file(source)
        if not is_own_file(path):
            raise CorpusError(f"{name}: no sound of '{source}'")
        return path

    def _find(self, name: str) -> Session:
        """By comparison with the list, so that no name can lead to another path."""
        for folder in session_folders(self.folder) if self.folder and self.folder.is_dir() else ():
            if folder.name == name:
                return open_session(folder)
        raise CorpusError(f"no recording '{name}' here")


def _entry(summary: SessionSummary) -> dict[str, Any]:
    if summary.error:
        return {"name": summary.folder.name, "error": summary.error}
    return {
        "name": summary.folder.name,
        "start_time": summary.began,
        "length_s": summary.length_s,
        "utterances": summary.utterances,
        "speakers": summary.speakers,
    }


def _stretches(session: Session) -> list[dict[str, Any]]:
    """Each source with its contiguous stretches of audio: pauses and losses lie between them."""
    return [
        {"source": source, "stretches": _positions(found, flac_length(session.audio_file(source)))}
        for source, found in session.stretches.items()
    ]


def _positions(stretches: Sequence[Stretch], length: int) -> list[dict[str, Any]]:
    """Where each stretch lies in the file and in time; ``length`` is the file's, in samples."""
    ends = [following.at for following in stretches[1:]] + [length]
    return [
        {
            "time": stretch.time,
            "opened_ms": _ms(stretch.start),
            "file_ms": _ms(stretch.at),
            "length_ms": _ms(end - stretch.at),
        }
        for stretch, end in zip(stretches, ends, strict=True)
    ]


def _ms(samples: int) -> float:
    return samples * 1000 / SAMPLE_RATE_HZ
