"""Recorded sessions as the page asks for them: a list, one's events, and where its sound is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.dashboard.feed import written
from stream_hbaf.errors import CorpusError
from stream_hbaf.sessions.flac import flac_length
from stream_hbaf.sessions.session import Session, Stretch, is_session, open_session, summarise


class Shelf:
    """The sessions of one folder, each known by its own folder's name; without a folder none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def titles(self) -> list[dict[str, Any]]:
        """A line for each, the newest first; one that can't be read says why."""
        return [_title(folder) for folder in self._folders()]

    def story(self, name: str) -> str:
        """A session as JSON: labels, the events in their order, and where which sound is.

        Raises CorpusError if there is none of this name, or it can't be read.
        """
        session = self._find(name)
        events = ",".join(written(told) for told in session.events)
        head = json.dumps({"labels": session.header.labels, "sounds": _sounds(session)})
        return f'{head[:-1]},"events":[{events}]}}'

    def sound(self, name: str, source: str) -> Path:
        """The file of a source's sound. Raises CorpusError if there is none."""
        path = self._find(name).sound(source)
        if not path.is_file():
            raise CorpusError(f"{name}: no sound of '{source}'")
        return path

    def _folders(self) -> list[Path]:
        """A session's name begins with its time."""
        if self._folder is None or not self._folder.is_dir():
            return []
        return sorted(filter(is_session, self._folder.iterdir()), reverse=True)

    def _find(self, name: str) -> Session:
        for folder in self._folders():
            if folder.name == name:  # a name from the list, so never a path that leads elsewhere
                return open_session(folder)
        raise CorpusError(f"no recording '{name}' here")


def _title(folder: Path) -> dict[str, Any]:
    try:
        summary = summarise(open_session(folder))
    except CorpusError as error:
        return {"name": folder.name, "error": str(error)}
    return {
        "name": folder.name,
        "start_time": summary.began,
        "length_s": summary.length_s,
        "utterances": summary.utterances,
        "speakers": summary.speakers,
    }


def _sounds(session: Session) -> list[dict[str, Any]]:
    return [
        {"source": source, "stretches": _places(stretches, flac_length(session.sound(source)))}
        for source, stretches in session.stretches.items()
    ]


def _places(stretches: Sequence[Stretch], length: int) -> list[dict[str, Any]]:
    """Where each stretch of sound is in the file and in time; ``length`` is the file's."""
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
