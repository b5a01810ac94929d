"""Labelled dialogues, the form in which readers return a corpus, and reading of its tables."""

import csv
import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import CorpusError, shorten
from stream_hbaf.features.prosody import PROSODY, PROSODY_WIDTH, describe_prosody

# MELD's and RAVDESS's seven, alphabetical as every corpus's labels are: the order of every
# probability vector in this project.
LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")

Float32 = NDArray[np.float32]
Label = TypeVar("Label")
EMBEDDING_WIDTH = 256  # of GE2E
UNMEASURED = (math.nan,) * len(PROSODY)

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
TableRow = dict[str, str]  # column: cell

# Some copies of MELD went through Windows-1252 and back: punctuation stands there as C1 controls.
C1_PUNCTUATION = {
    code: bytes([code]).decode("cp1252")
    for code in range(0x80, 0xA0)
    if code not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # undefined in Windows-1252
}
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "..."})


@dataclass(frozen=True, slots=True)
class LabelledUtterance:
    """One speaker's utterance with its text, the annotators' emotion label, and audio if any."""

    id: str
    speaker: str
    text: str
    label: str | None  # None: context only, annotators agreed on none of the corpus's labels
    audio: Path | None = None  # its own clip, or a recording that holds it at start_s to end_s
    prosody: tuple[float, ...] | None = None  # 8 published measurements, nan: not measurable
    start_s: float | None = None  # in `audio`; None: from its beginning
    end_s: float | None = None  # in `audio`; None: to its end
    length_s: float | None = None  # of its own clip, as the corpus's table has it
    votes: tuple[tuple[str, ...], ...] = ()  # without a label: the labels that each annotator gave
    arousal: float | None = None  # annotators' mean rating, from -1, calm, to 1, excited
    strong: bool | None = None  # acted with strong or with normal intensity
    # Published embedding [256] of its audio, for a corpus whose audio isn't.
    ge2e: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Utterances in their order in time."""

    id: str
    utterances: tuple[LabelledUtterance, ...]
    part: str = ""  # of a corpus with parts, such as "improvised"


@dataclass(frozen=True)
class Corpus:
    """A whole corpus: its labels in alphabetical order, and every split's dialogues."""

    name: str
    labels: tuple[str, ...]
    splits: Mapping[Split, tuple[Dialogue, ...]]


def require_file(path: Path, *, corpus: str) -> Path:
    """Return ``path``, or raise CorpusError that says which corpus expected it."""
    if not path.is_file():
        raise CorpusError(f"{corpus}: {path} is missing; put the corpus there or correct --corpora")
    return path


def require_folder(path: Path, *, corpus: str, holds: str) -> Path:
    """Return ``path``, or raise CorpusError that says what ought to be in it."""
    if not path.is_dir():
        raise CorpusError(
            f"{corpus}: folder {path} is missing; it should hold {holds}; correct --corpora"
        )
    return path


def read_utf8(path: Path) -> str:
    """The file's text; CorpusError names line and byte where it isn't UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise CorpusError(
            f"{path}:{line}: byte {column} of the line, 0x{raw[error.start]:02x}, isn't UTF-8; "
            "save the table in UTF-8"
        ) from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or else in Windows-1252."""
    try:
        return read_utf8(path)
    except CorpusError:
        return path.read_bytes().decode("cp1252", errors="replace")


def normalise_text(text: str) -> str:
    """Repair broken encodings and make typographic quotes plain, as Whisper writes them."""
    return " ".join(text.translate(C1_PUNCTUATION).translate(PLAIN).split())


def read_rows(content: str, *, path: Path, columns: Sequence[str]) -> list[tuple[str, TableRow]]:
    """All rows of a comma-separated table, each with its ``file:line``.

    Raises CorpusError for a missing column, a row of another length than the header, or quotes
    that don't close.
    """
    # Lines end at \n and \r alone: splitlines() would also split at \x85, a broken ellipsis.
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    rows = []
    where = f"{path}:1"
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for column in columns:
            if column not in header:
                raise CorpusError(
                    f"{where}: column '{column}' is missing; the first line must name the columns,"
                    f" with commas between: {', '.join(columns)}"
                )
        where = f"{path}:{reader.line_num + 1}"
        for cells in reader:
            if cells and len(cells) != len(header):
                raise CorpusError(
                    f"{where}: {len(cells)} cells instead of {len(header)}; mend that line's quotes"
                )
            if cells:
                rows.append((where, dict(zip(header, cells, strict=True))))
            where = f"{path}:{reader.line_num + 1}"  # where the next row begins
    except csv.Error as error:
        raise CorpusError(
            f"{where}: not a comma-separated line ({error}); mend its quotes"
        ) from None
    return rows


def read_tabbed(path: Path, *, columns: int) -> list[tuple[str, list[str]]]:
    """All lines of a table whose cells stand between tabs, each with its ``file:line``.

    Quotes mean nothing. Raises CorpusError for a line of another number of cells, or other than
    UTF-8.
    """
    rows = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):  # \r may stand in a text
        cells = line.rstrip("\r").split("\t")
        if len(cells) == columns:
            rows.append((f"{path}:{number}", cells))
        elif line.strip():
            raise CorpusError(
                f"{path}:{number}: {len(cells)} cells instead of {columns}; mend that line's tabs"
            )
    return rows


def read_measurements(row: TableRow, *, where: str) -> tuple[float, ...]:
    """The eight prosody measurements of a table's row, nan where a cell is empty."""
    values = []
    for name in PROSODY:
        cell = row[name].strip()
        try:
            value = float(cell) if cell else math.nan
        except ValueError:
            raise CorpusError(
                f"{where}: {name} is '{shorten(cell)}', not a number; mend or empty that cell"
            ) from None
        values.append(value if math.isfinite(value) else math.nan)
    return tuple(values)


def read_embeddings(path: Path, *, beside: Sequence[str] = ()) -> list[list[Any]]:
    """The arrays ``name`` [N], those named in ``beside`` [N], and ``embedding`` [N, 256] by GE2E of
    an ``.npz`` file, each as a list. Raises CorpusError if one is missing, broken or not finite, or
    a name stands there twice.
    """
    columns = ("name", *beside)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = [arrays[name].tolist() for name in columns]
            rows = np.asarray(arrays["embedding"], np.float32)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        named = ", ".join(f"'{name}'" for name in columns)
        raise CorpusError(
            f"{path}: not an archive of the arrays {named} and 'embedding' ({error}); get it again"
        ) from None
    names = found[0]
    if rows.shape != (len(names), EMBEDDING_WIDTH) or any(len(one) != len(names) for one in found):
        raise CorpusError(
            f"{path}: embedding is {list(rows.shape)}, not [{len(names)}, {EMBEDDING_WIDTH}]; "
            "it must be by the GE2E encoder, a row for each name"
        )
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist()
    if broken:
        raise CorpusError(
            f"{path}: the embedding of turn {names[broken[0]]} isn't finite; get it again"
        )
    if len(set(names)) < len(names):
        twice = next(turn for turn in names if names.count(turn) > 1)
        raise CorpusError(f"{path}: turn {twice} stands here twice; remove one of them")
    return [*found, list(rows)]


def utterances_of(dialogues: Sequence[Dialogue]) -> list[LabelledUtterance]:
    """All utterances in order: the rows of a Dataset."""
    return [utterance for dialogue in dialogues for utterance in dialogue.utterances]


def sittings(dialogues: Sequence[Dialogue], *, seed: int = 0) -> tuple[Dialogue, ...]:
    """Dialogues of one utterance each as one dialogue a speaker, their order drawn; others as they
    are.

    So a speaker's clips are heard as live: one after the other, through one microphone.
    """
    draw = np.random.default_rng(seed)
    by_speaker: dict[str, list[LabelledUtterance]] = {}
    for dialogue in dialogues:
        if len(dialogue.utterances) > 1:
            return tuple(dialogues)
        by_speaker.setdefault(dialogue.utterances[0].speaker, []).append(dialogue.utterances[0])
    return tuple(
        Dialogue(speaker, tuple(clips[n] for n in draw.permutation(len(clips))))
        for speaker, clips in by_speaker.items()
    )


def is_published(dialogues: Sequence[Dialogue], representation: str) -> bool:
    """Whether a corpus publishes these features itself: "prosody" in tables, or "ge2e"."""
    utterances = utterances_of(dialogues)
    if representation == "prosody":
        return any(one.prosody for one in utterances)
    return representation == "ge2e" and any(one.ge2e is not None for one in utterances)


def has_sound(dialogues: Sequence[Dialogue], representation: str) -> bool:
    """Whether any part of a representation, such as of "compare+ge2e", can be had of a corpus:
    measured from its clips, or published with it."""
    clips = any(one.audio is not None for one in utterances_of(dialogues))
    return clips or any(is_published(dialogues, part) for part in representation.split("+"))


def published_features(dialogues: Sequence[Dialogue], representation: str) -> Float32:
    """Features [N, W] that a corpus publishes itself, NaN for an utterance without any."""
    utterances = utterances_of(dialogues)
    if representation == "prosody":
        measured = np.array([one.prosody or UNMEASURED for one in utterances])
        return describe_dialogues(measured, dialogues)
    width = next(len(one.ge2e) for one in utterances if one.ge2e is not None)
    absent = np.full(width, np.nan)
    rows = [absent if one.ge2e is None else one.ge2e for one in utterances]
    return np.stack(rows).astype(np.float32)


def describe_dialogues(measured: NDArray[np.floating], dialogues: Sequence[Dialogue]) -> Float32:
    """Measurements [N, 8] of all utterances → prosody features [N, 23]."""
    rows = [np.empty((0, PROSODY_WIDTH), np.float32)]
    start = 0
    for dialogue in dialogues:
        speakers = [one.speaker for one in dialogue.utterances]
        rows.append(describe_prosody(measured[start : start + len(speakers)], speakers))
        start += len(speakers)
    return np.concatenate(rows)


def read_label(emotion: str, labels: Mapping[str, Label], *, corpus: str, where: str) -> Label:
    """What ``labels`` makes of a corpus's word for an emotion. Raises CorpusError, naming them."""
    name = emotion.strip().lower()
    if name not in labels:
        raise CorpusError(f"{where}: unknown emotion '{name}'; {corpus} has {', '.join(labels)}")
    return labels[name]
