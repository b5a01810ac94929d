"""Exports sessions as Hugging Face's AudioFolder or as an audformat database, and imports both.

An AudioFolder is plain files, which ``datasets.load_dataset("audiofolder", data_dir=…)`` reads::

    train/metadata.jsonl      {"file_name", "id", "dialogue", "speaker", "text", "label", "by"}
    train/<id>.flac           the audio of each utterance
    validation/…  test/…      likewise

An audformat database has a table for each split, ``emotion.train``, ``emotion.dev``,
``emotion.test``. Their columns are the emotion by people (rater ``people``), the one by a bundle
(rater ``model``), speaker, transcription, dialogue and id. Import doesn't use the library: to open
a database with it runs code that the database may hold, in its YAML header and in tables that were
pickled. Here the header is read as plain data, and tables from CSV alone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stream_hbaf.corpora.dialogue import (
    SPLITS,
    LabelledUtterance,
    Split,
    TableRow,
    read_rows,
    read_utf8,
)
from stream_hbaf.corpora.manifest import ManifestRow, import_clips
from stream_hbaf.corpora.session_corpus import BY_MODEL, CLIPS, ExportedUtterance, export_clips
from stream_hbaf.errors import CorpusError, StreamHbafError, shorten
from stream_hbaf.files import PRIVATE, atomic_write_text, is_file, private_files, write_error
from stream_hbaf.sessions.format import read_json_lines
from stream_hbaf.untrusted import UntrustedError, parse_yaml

# ---- AudioFolder

TABLES = ("metadata.csv", "metadata.jsonl")
FOLDERS: dict[Split, str] = {"train": "train", "dev": "validation", "test": "test"}
# Names of folders that the library reads as a split, and the split.
NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "dev"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def export_audiofolder(folder: Path, out: Path, *, own_labels: bool = False) -> int:
    """Write sessions as an AudioFolder; returns the number of utterances.

    Only those whose audio is whole. Labels, ``own_labels`` and errors are those of
    ``export_manifest``.
    """
    exported = export_clips(folder, out, clips=FOLDERS.__getitem__, own_labels=own_labels)
    lines: dict[Split, list[str]] = {}
    for one in exported:
        if one.utterance.audio is not None:
            row = {  # every cell is text: an empty column would have another type
                "file_name": one.utterance.audio.name,
                "id": one.utterance.id,
                "dialogue": one.dialogue,
                "speaker": one.utterance.speaker,
                "text": one.utterance.text,
                "label": one.utterance.label or "",
                "by": one.by,
            }
            lines.setdefault(one.split, []).append(json.dumps(row, ensure_ascii=False) + "\n")
    for split, of_split in lines.items():
        table = out / FOLDERS[split] / TABLES[1]
        atomic_write_text(table, "".join(of_split), mode=PRIVATE)
    return sum(map(len, lines.values()))


def import_audiofolder(folder: Path, table: Path) -> int:
    """Write a manifest of an AudioFolder's clips, which stay where they are; returns their number.

    Without a table of its own, a clip's label is its folder's name. Raises CorpusError for a folder
    without clips, and with file and line for a table that can't be read; WriteError if the manifest
    can't be written.
    """
    tables = sorted(path for name in TABLES for path in folder.rglob(name))
    clips = [clip for path in tables for clip in _listed_clips(path, folder)]
    if not tables:
        files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        clips = [_clip_of_folder(path, folder) for path in sorted(files)]
    if not clips:
        raise CorpusError(
            f"{folder}: no clips; an AudioFolder holds metadata.csv, or audio in folders named "
            "after their labels"
        )
    return import_clips(table, clips)


def _listed_clips(table: Path, folder: Path) -> Iterator[ManifestRow]:
    content = read_utf8(table)
    if table.suffix == ".jsonl":
        rows = [
            (where, {name: "" if value is None else str(value) for name, value in row.items()})
            for where, row in read_json_lines(content.splitlines(), path=table)
        ]
    else:
        rows = read_rows(content, path=table, columns=("file_name",))
    for where, row in rows:
        clip = table.parent / row.get("file_name", "")
        if not is_file(clip):
            raise CorpusError(
                f"{where}: {shorten(str(clip), limit=200)} is missing; correct file_name"
            )
        utterance = LabelledUtterance(
            id=_first_cell(row, "id", "utterance") or clip.stem,
            speaker=_first_cell(row, "speaker", "speaker_id"),
            text=_first_cell(row, "text", "transcription", "transcript", "sentence"),
            label=_first_cell(row, "label", "emotion"),
            audio=clip.resolve(),
        )
        dialogue = _first_cell(row, "dialogue", "dialogue_id")
        yield ManifestRow(dialogue, _split_of_folder(clip, folder), utterance)


def _clip_of_folder(clip: Path, folder: Path) -> ManifestRow:
    place = clip.parent
    label = "" if place == folder or place.name.lower() in NAMES else place.name
    name = clip.relative_to(folder).with_suffix("").as_posix()
    utterance = LabelledUtterance(name, "", "", label, clip.resolve())
    return ManifestRow("", _split_of_folder(clip, folder), utterance)


def _split_of_folder(clip: Path, folder: Path) -> Split:
    inside = clip.relative_to(folder).parts[:-1]
    return next((NAMES[part.lower()] for part in inside if part.lower() in NAMES), "train")


def _first_cell(row: TableRow, *columns: str) -> str:
    """The first of these cells that isn't empty; "" if there is none."""
    return next((row[column] for column in columns if row.get(column)), "")


# ---- audformat

HEADER = "db.yaml"
LABELS = ("emotion", "emotion.categories", "label")  # columns with the emotion, the best first
PEOPLE, MODEL = "people", "model"
ABSENT = {"", "nan", "NaT", "None", "<NA>"}
HEADER_BYTES = 1 << 20
TABLE_BYTES = 64 << 20
# A table's times, as pandas writes them: "0 days 00:00:01.500000".
TIME = re.compile(r"(?:(\d+) days?)?\s*\+?(?:(\d+):(\d\d):(\d\d(?:\.\d+)?))?")


def export_audformat(folder: Path, out: Path, *, own_labels: bool = False) -> int:
    """Write sessions as an audformat database; returns the number of utterances.

    Only those whose audio is whole. With ``own_labels`` the bundle's labels of utterances without a
    correction are in a column of their own. Raises StreamHbafError if the library isn't installed;
    other errors are those of ``export_manifest``.
    """
    try:
        import audformat  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise StreamHbafError(
            "export as audformat: audformat is not installed; "
            "pip install 'stream-hbaf[audformat]', or choose another --format"
        ) from None
    every = export_clips(folder, out, clips=lambda split: CLIPS, own_labels=own_labels)
    exported = [one for one in every if one.utterance.audio is not None]
    database = audformat.Database(
        "sessions",
        source="stream-hbaf",
        usage=audformat.define.Usage.RESTRICTED,
        description="Conversations recorded and corrected with stream-hbaf",
    )
    database.raters[PEOPLE] = audformat.Rater(audformat.define.RaterType.HUMAN)
    database.raters[MODEL] = audformat.Rater(audformat.define.RaterType.MACHINE)
    labels = sorted({one.utterance.label for one in exported if one.utterance.label is not None})
    database.schemes["emotion"] = audformat.Scheme("str", labels=labels)
    for name in ("speaker", "transcription", "dialogue", "id"):
        database.schemes[name] = audformat.Scheme("str")
    for split in SPLITS:
        part = [one for one in exported if one.split == split]
        if part:
            database.splits[split] = audformat.Split(split)
            files = audformat.filewise_index([str(one.utterance.audio) for one in part])
            table = database[f"emotion.{split}"] = audformat.Table(files, split_id=split)
            for column, (rater, values) in _columns(part, own_labels=own_labels).items():
                scheme = column.partition(".")[0]
                table[column] = audformat.Column(scheme_id=scheme, rater_id=rater)
                table[column].set(values)
    with private_files():
        for earlier in (out / HEADER, *out.glob("db.*.csv")):
            if is_file(earlier):
                earlier.chmod(PRIVATE)  # it is written over, and keeps its mode
        try:
            database.save(str(out), storage_format="csv")
        except OSError as error:
            raise write_error(out / HEADER, error) from None
    return len(exported)


def _columns(
    part: Sequence[ExportedUtterance], *, own_labels: bool
) -> dict[str, tuple[str | None, list[str | None]]]:
    """By name, the rater and the values of each column."""
    utterances = [one.utterance for one in part]
    raters = [MODEL if one.by.startswith(BY_MODEL) else PEOPLE for one in part]

    def labels_by(rater: str) -> list[str | None]:
        found = zip(utterances, raters, strict=True)
        return [one.label if its == rater else None for one, its in found]

    return {
        "emotion": (PEOPLE, labels_by(PEOPLE)),
        **({"emotion.model": (MODEL, labels_by(MODEL))} if own_labels else {}),
        "speaker": (None, [one.speaker for one in utterances]),
        "transcription": (None, [one.text for one in utterances]),
        "dialogue": (None, [one.dialogue for one in part]),
        "id": (None, [one.id for one in utterances]),
    }


def import_audformat(folder: Path, table: Path) -> int:
    """Write a manifest of a database's labelled files or segments, which stay where they are;
    returns their number.

    A table without a split counts as train. Raises CorpusError for a folder without a database, a
    header or table that can't be read safely, and a database that names no emotions or files that
    are missing; WriteError if the manifest can't be written.
    """
    path = folder / HEADER
    header = _read_header(path)
    tables, splits = (_section(header, name, where=path) for name in ("tables", "splits"))
    clips: list[ManifestRow] = []
    for name, described in tables.items():
        columns = _section(described, "columns", where=path)
        column = next((one for one in LABELS if one in columns), None)
        if column is not None:
            kind = _section(splits, str(described.get("split_id")), where=path).get("type")
            split: Split = next((split for split in SPLITS if split == kind), "train")
            clips += _read_table(folder, name, column=column, split=split)
    if not clips:
        raise CorpusError(
            f"{folder}: none of the tables {', '.join(tables) or '(there are none)'} has "
            f"a column {' or '.join(LABELS)}; rename the one that holds the emotions"
        )
    return import_clips(table, clips)


def _read_header(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CorpusError(
            f"{path.parent}: holds no {HEADER}; give the folder of an audformat database"
        )
    _require_size(path, limit=HEADER_BYTES)
    try:
        header = parse_yaml(path.read_bytes())
    except UntrustedError as error:
        _refuse(path, f"line {error.line}: {error}" if error.line else error)
    if not isinstance(header, dict):
        _refuse(path, "it isn't a mapping")
    return header


def _refuse(path: Path, reason: object) -> NoReturn:
    shown = " ".join(str(reason).split())
    raise CorpusError(
        f"{path}: can't be read as plain data ({shown}); get a database whose header holds no more"
    ) from None


def _require_size(path: Path, *, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise CorpusError(
            f"{path}: {size / 2**20:.1f} MB, and at most {limit >> 20} MB are read; "
            "divide the database"
        )


def _section(entry: object, name: str, *, where: Path) -> Mapping[str, Any]:
    """A mapping of the header from names, by its own name; empty if there is none."""
    found = (entry.get(name) if isinstance(entry, dict) else None) or {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        _refuse(where, f"'{name}' isn't a mapping from names")
    return found


def _read_table(folder: Path, name: str, *, column: str, split: Split) -> Iterator[ManifestRow]:
    path = folder / f"db.{name}.csv"
    if not is_file(path) or path.parent != folder:
        others = (kind for kind in ("parquet", "pkl") if is_file(path.with_suffix(f".{kind}")))
        other = next(others, None)
        reason = f"only as .{other}, which isn't read" if other else "missing"
        raise CorpusError(
            f"{path}: the table is {reason}; save the database with storage_format='csv'"
        )
    _require_size(path, limit=TABLE_BYTES)
    for where, row in read_rows(read_utf8(path), path=path, columns=("file", column)):
        cells = {name: "" if cell.strip() in ABSENT else cell.strip() for name, cell in row.items()}
        audio = folder / cells["file"]
        if not is_file(audio):
            shown = shorten(str(audio), limit=200)
            raise CorpusError(f"{where}: {shown} is missing; get the database's media, too")
        start_s = _seconds(cells.get("start", ""), where=where) or None
        place = f"@{start_s:g}" if start_s else ""
        utterance = LabelledUtterance(
            id=_first_cell(cells, "id", "utterance") or cells["file"] + place,
            speaker=_first_cell(cells, "speaker"),
            text=_first_cell(cells, "transcription", "text", "transcript"),
            label=cells[column],
            audio=audio.resolve(),
            start_s=start_s,
            end_s=_seconds(cells.get("end", ""), where=where),
        )
        yield ManifestRow(_first_cell(cells, "dialogue"), split, utterance)


def _seconds(cell: str, *, where: str) -> float | None:
    if not cell:
        return None
    found = TIME.fullmatch(cell)
    if found is None:
        raise CorpusError(f"{where}: '{cell}' isn't a time such as 0 days 00:00:01.5; mend it")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
