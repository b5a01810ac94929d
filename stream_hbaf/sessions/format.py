"""The files of a recorded session: their names, the header, and the lines of their tables.

    session.json    when it began, and by which bundle, settings and versions it was recognised
    <source>.flac   the audio of a source, 16 kHz mono 16 bit, without the gaps between stretches
    sound.jsonl     a line for each stretch of audio without a gap: which samples it holds
    events.jsonl    a line for each event, as published, and for each correction

The last three grow by whole lines and frames only: what a kill leaves is readable up to its end.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.errors import CorpusError
from stream_hbaf.events import DialogueSummary, Feedback, Model, Switch, Trigger, Utterance

T = TypeVar("T", bound=BaseModel)
SessionEvent = Utterance | DialogueSummary | Feedback | Switch  # the events that are recorded

FORMAT = 1
HEADER_FILE, STRETCHES_FILE, EVENTS_FILE = "session.json", "sound.jsonl", "events.jsonl"
AUDIO_SUFFIX = ".flac"
SCHEMAS: dict[str, type[SessionEvent]] = {  # a line without one of these is a Switch
    "stream_hbaf/utterance/1": Utterance,
    "stream_hbaf/dialogue/1": DialogueSummary,
    "stream_hbaf/feedback/1": Feedback,
}
# Settings that aren't recorded: where audio came from and events went to, with all secrets.
NOT_RECORDED = {"source", "sources", "mqtt", "dashboard", "record"}
# Packages with other versions of which the same audio may be recognised differently.
PACKAGES = (
    "stream-hbaf",
    "opensmile",
    "faster-whisper",
    "ctranslate2",
    "onnxruntime",
    "torch",
    "transformers",
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Header(_Frozen):
    """The content of ``session.json``."""

    format: int = FORMAT
    id: str
    began: str  # ISO 8601, UTC
    model: Model  # the first; each ``end`` event names its own
    labels: tuple[str, ...]  # of that model, and so of corrections
    settings: dict[str, Any]  # all that affect recognition, and so no secrets
    versions: dict[str, str]  # of the packages that affect recognition


class Stretch(_Frozen):
    """A line of ``sound.jsonl``: audio without a gap, which is segmented by itself.

    From sample ``at`` of the source's FLAC on, samples are numbered from ``start``.
    """

    source: str
    at: int
    start: int  # since the source was opened
    time: str  # when its first sample was captured, ISO 8601, UTC
    why: Literal["begin", "gap", "pause", "cut", "lost"]
    """The source began; audio was lost before it came here; listening or recording was paused; the
    utterance was ended on request; audio was lost since the disk was too slow."""
    trigger: Trigger = "end_of_input"  # what ended the utterance before it


def new_header(config: Config, *, model: Model, labels: Sequence[str]) -> Header:
    """The header of a session that begins now."""
    now = datetime.now(UTC)
    return Header(
        id=f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}",
        began=now.isoformat(timespec="milliseconds"),
        model=model,
        labels=tuple(labels),
        settings=config.model_dump(mode="json", exclude=NOT_RECORDED),
        versions=package_versions(),
    )


def package_versions() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # Whisper's engine has several builds
            found[package] = version(package)
    return found


def audio_file_name(source: str) -> str:
    """The name of a source's file; characters that a file name can't hold are written as %XX."""
    return quote(source, safe="") + AUDIO_SUFFIX


def sample_at(ms: float) -> int:
    """The sample number of a time in ms since the source was opened."""
    return round(ms * SAMPLE_RATE_HZ / 1000)


def encode_line(entry: SessionEvent | Stretch) -> bytes:
    """A line of a table, with all digits of its numbers."""
    return entry.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n"


def append_line(file: int, line: bytes) -> None:
    """Append a whole line to an open file, or nothing. Raises OSError."""
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        while line:
            line = line[os.write(file, line) :]
    except OSError:
        os.ftruncate(file, end)
        raise


def read_events(folder: Path) -> Iterator[SessionEvent]:
    """All recorded events. Raises CorpusError with file and line for what can't be read."""
    for where, row in _read_lines(folder / EVENTS_FILE):
        yield parse(SCHEMAS.get(row.get("schema", ""), Switch), row, where=where)


def read_stretches(folder: Path) -> Iterator[Stretch]:
    """All stretches of all sources. Raises CorpusError with file and line."""
    for where, row in _read_lines(folder / STRETCHES_FILE):
        yield parse(Stretch, row, where=where)


def parse(kind: type[T], row: dict[str, Any], *, where: str) -> T:
    """A row as ``kind``. Raises CorpusError that names the first field that doesn't fit."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CorpusError(f"{where}: '{key}': {first['msg'].lower()}; mend that line") from None


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a table with its ``file:line``; half a line at the end is left out."""
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
