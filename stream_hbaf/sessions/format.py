"""The files of a recorded session: their names, header, lines of tables, and audio.

    session.json    when it began, and by which bundle, settings and versions it was recognised
    <source>.flac   the audio of a source, 16 kHz mono 16 bit, without the gaps between stretches
    sound.jsonl     a line for each stretch of audio without a gap: which samples it holds
    events.jsonl    a line for each event, as published, and for each correction

The last three grow by whole lines and frames only: what a kill leaves is readable up to its end.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import quote

import av
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.errors import CorpusError, shorten
from stream_hbaf.events import DialogueSummary, Feedback, Model, Switch, Trigger, Utterance
from stream_hbaf.files import is_own_file, open_own_file
from stream_hbaf.untrusted import UntrustedError, as_unicode, parse_json

T = TypeVar("T", bound=BaseModel)
Why = Literal["begin", "gap", "pause", "cut", "lost"]
Samples = NDArray[np.int16]

FORMAT = 1
HEADER_FILE, STRETCHES_FILE, EVENTS_FILE = "session.json", "sound.jsonl", "events.jsonl"
AUDIO_SUFFIX = ".flac"
# Settings that aren't recorded: where audio came from and events went to, with all secrets.
NOT_RECORDED = {"source", "sources", "mqtt", "dashboard", "record", "serve"}
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
    at: Annotated[int, Field(ge=0)]
    start: Annotated[int, Field(ge=0)]  # since the source was opened
    time: str  # when its first sample was captured, ISO 8601, UTC
    why: Why
    """The source began; audio was lost before it came here; listening or recording was paused; the
    utterance was ended on request; audio was lost since the disk was too slow."""
    trigger: Trigger = "end_of_input"  # what ended the utterance before it


class SpeakerChange(_Frozen):
    """A person has said who speaks in a dialogue; a line of ``events.jsonl``, since a replay has to
    do the same."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal["stream_hbaf/speakers/1"] = Field("stream_hbaf/speakers/1", alias="schema")
    dialogue_id: str
    change: Literal["correct", "rename", "merge"]
    """An utterance is corrected, a speaker has another name, or two speakers are one."""
    turn: int = 0  # the utterance that is corrected
    speaker: str = ""  # the former name of the speaker who is renamed or merged
    into: str  # the name from now on


SessionEvent = Utterance | DialogueSummary | Feedback | Switch | SpeakerChange  # recorded ones
SCHEMAS: dict[str, type[SessionEvent]] = {  # a line without one of these is a Switch
    "stream_hbaf/utterance/1": Utterance,
    "stream_hbaf/dialogue/1": DialogueSummary,
    "stream_hbaf/feedback/1": Feedback,
    "stream_hbaf/speakers/1": SpeakerChange,
}


def new_header(config: Config, *, model: Model, labels: Sequence[str]) -> Header:
    """The header of a session that begins now."""
    now = datetime.now(UTC)
    settings = config.model_dump(mode="json", exclude=NOT_RECORDED)  # with paths in any encoding
    return Header(
        id=f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}",
        began=now.isoformat(timespec="milliseconds"),
        model=model,
        labels=tuple(labels),
        settings=json.loads(as_unicode(json.dumps(settings, ensure_ascii=False))),
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


def append(file: int, content: bytes) -> None:
    """Append all of it to an open file, or nothing: half a line or frame would be damage.

    Raises OSError.
    """
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        while content:
            content = content[os.write(file, content) :]
    except OSError:
        os.ftruncate(file, end)
        raise


def parse(kind: type[T], row: dict[str, Any], *, where: str) -> T:
    """A row as ``kind``. Raises CorpusError that names the first field that doesn't fit."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = shorten(".".join(map(str, first["loc"])))
        raise CorpusError(f"{where}: '{key}': {first['msg'].lower()}; mend that line") from None


def parse_event(row: dict[str, Any], *, where: str) -> SessionEvent:
    """A row of ``events.jsonl``. Raises CorpusError as ``parse`` does."""
    schema = row.get("schema")
    kind = SCHEMAS.get(schema, Switch) if isinstance(schema, str) else Switch
    return parse(kind, row, where=where)


def read_json_lines(
    lines: Iterable[str | bytes], *, path: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's JSON object with its ``file:line``. Raises CorpusError for a line without one."""
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", parse_row(line, where=f"{path}:{number}")


def parse_row(line: str | bytes, *, where: str) -> dict[str, Any]:
    """A line's JSON object. Raises CorpusError for a line without one."""
    try:
        row = parse_json(line)
    except UntrustedError:
        row = None
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: isn't a JSON object; mend or remove that line")
    return row


# ---- audio

MAGIC = b"fLaC"
LAST_BLOCK_STREAMINFO = bytes([0x80, 0, 0, 34])  # one metadata block, of 34 bytes
STREAMINFO_AT = len(MAGIC) + len(LAST_BLOCK_STREAMINFO)
HEADER_BYTES = STREAMINFO_AT + 34
LENGTH_AT = STREAMINFO_AT + 13  # 36 bits: the low half of this byte and the four after it
SUM_AT = STREAMINFO_AT + 18  # to the block's end
UPDATE_EVERY = SAMPLE_RATE_HZ  # samples between two updates of the header


class FlacWriter:
    """Writes int16 mono 16 kHz audio to a new FLAC file that only its owner may read.

    Every frame is written at once, and the number of samples in the header is updated about every
    second: after a SIGKILL the last 72 ms are missing, and the length in the header is right to the
    second. Raises OSError if it can't write; what was written before stays valid.
    """

    def __init__(self, path: Path) -> None:
        self.length = 0  # samples given to write()
        self._written = 0  # samples in whole frames in the file
        self._in_header = 0
        self._sum = hashlib.md5(usedforsecurity=False)  # FLAC's own
        self._encoder: Any = av.CodecContext.create("flac", "w")
        self._encoder.sample_rate = SAMPLE_RATE_HZ
        self._encoder.layout = "mono"
        self._encoder.format = "s16"
        self._encoder.open()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            header = MAGIC + LAST_BLOCK_STREAMINFO + bytes(self._encoder.extradata or b"")
            append(self._file, header)
        except OSError:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, samples: Samples) -> None:
        """Append samples, any number of them."""
        if not len(samples):
            return
        samples = np.ascontiguousarray(samples)
        self._sum.update(samples.astype("<i2", copy=False).tobytes())
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        frame.pts = self.length
        self._put(self._encoder.encode(frame))
        self.length += len(samples)
        if self._written - self._in_header >= UPDATE_EVERY:
            kept = os.pread(self._file, 1, LENGTH_AT)[0] & 0xF0  # a part of the sample width
            length = (kept << 32) | self._written
            os.pwrite(self._file, length.to_bytes(5, "big"), LENGTH_AT)
            self._in_header = self._written

    def close(self) -> None:
        """Write the last frame, the length, and the MD5 sum that players check; once."""
        if self._file < 0:
            return
        try:
            self._put(self._encoder.encode(None))
            sizes = bytes(self._encoder.extradata)[: SUM_AT - STREAMINFO_AT]
            os.pwrite(self._file, sizes + self._sum.digest(), STREAMINFO_AT)
        finally:
            os.close(self._file)
            self._file = -1

    def _put(self, packets: Any) -> None:
        for packet in packets:
            append(self._file, bytes(packet))
            self._written += packet.duration or 0


def flac_length(path: Path) -> int:
    """The number of samples in a FlacWriter's file; 0 without a file."""
    if not is_own_file(path):
        return 0
    with open_own_file(path) as file:
        file.seek(LENGTH_AT)
        found = file.read(5)
    return int.from_bytes(found, "big") & 0xF_FFFF_FFFF
