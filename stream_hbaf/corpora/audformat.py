"""Exports sessions as an audformat database, and imports databases of others, read safely.

An export has a table for each split, ``emotion.train``, ``emotion.dev``, ``emotion.test``. Their
columns are the emotion by people (rater ``people``), the one by a bundle (rater ``model``),
speaker, transcription, dialogue and id.

Import doesn't use the library: to open a database with it runs code that the database may hold, in
its YAML header and in tables that were pickled. Here the header is read as plain data, and tables
from CSV alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from stream_hbaf.corpora.dialogue import SPLITS, Split, TableRow, read_rows, read_utf8
from stream_hbaf.corpora.manifest import ImportedClip, first_cell, import_clips
from stream_hbaf.corpora.session_corpus import BY_MODEL, CLIPS, ExportedUtterance, export_clips
from stream_hbaf.errors import CorpusError, StreamHbafError

HEADER = "db.yaml"
LABELS = ("emotion", "emotion.categories", "label")  # columns with the emotion, the best first
PEOPLE, MODEL = "people", "model"
ABSENT = {"", "nan", "NaT", "None", "<NA>"}
HEADER_BYTES = 1 << 20
TABLE_BYTES = 64 << 20
# A table's times, as pandas writes them: "0 days 00:00:01.500000".
TIME = re.compile(r"(?:(\d+) days?)?\s*\+?(?:(\d+):(\d\d):(\d\d(?:\.\d+)?))?")


# ---- export


def export_audformat(folder: Path, out: Path, *, own_labels: bool = False) -> int:
    """Write sessions as an audformat database; returns the number of utterances.

    Only those whose audio is whole. With ``own_labels`` the bundle's labels of utterances without a
    correction are in a column of their own. Raises StreamHbafError if the library isn't installed;
    other errors are those of ``export_manifest``.
    """
    audformat = _library()
    every = export_clips(folder, out, clips=lambda split: CLIPS, own_labels=own_labels)
    exported = [one for one in every if one.clip is not None]
    labels = {one.utterance.label for one in exported if one.utterance.label is not None}
    database = audformat.Database(
        "sessions",
        source="stream-hbaf",
        usage=audformat.define.Usage.RESTRICTED,
        description="Conversations recorded and corrected with stream-hbaf",
    )
    database.raters[PEOPLE] = audformat.Rater(audformat.define.RaterType.HUMAN)
    database.raters[MODEL] = audformat.Rater(audformat.define.RaterType.MACHINE)
    database.schemes["emotion"] = audformat.Scheme("str", labels=sorted(labels))
    for name in ("speaker", "transcription", "dialogue", "id"):
        database.schemes[name] = audformat.Scheme("str")
    for split in SPLITS:
        part = [one for one in exported if one.split == split]
        if part:
            database.splits[split] = audformat.Split(split)
            _add_table(database, split, part, out=out, own_labels=own_labels)
    database.save(str(out), storage_format="csv")
    return len(exported)


def _library() -> Any:
    try:
        import audformat  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise StreamHbafError(
            "export as audformat: audformat is not installed; "
            "pip install 'stream-hbaf[audformat]', or choose another --format"
        ) from None
    return audformat


def _add_table(
    database: Any, split: Split, part: Sequence[ExportedUtterance], *, out: Path, own_labels: bool
) -> None:
    audformat = _library()
    files = [str(one.clip.relative_to(out)) for one in part if one.clip is not None]
    table = audformat.Table(audformat.filewise_index(files), split_id=split)
    database[f"emotion.{split}"] = table

    def add(column: str, values: Sequence[str | None], *, scheme: str, rater: str | None) -> None:
        table[column] = audformat.Column(scheme_id=scheme, rater_id=rater)
        table[column].set(list(values))

    by_model = [one.by.startswith(BY_MODEL) for one in part]
    labels = [one.utterance.label for one in part]
    by_people = [None if own else label for label, own in zip(labels, by_model, strict=True)]
    add("emotion", by_people, scheme="emotion", rater=PEOPLE)
    if own_labels:
        own = [label if own else None for label, own in zip(labels, by_model, strict=True)]
        add("emotion.model", own, scheme="emotion", rater=MODEL)
    add("speaker", [one.utterance.speaker for one in part], scheme="speaker", rater=None)
    texts = [one.utterance.text for one in part]
    add("transcription", texts, scheme="transcription", rater=None)
    add("dialogue", [one.dialogue for one in part], scheme="dialogue", rater=None)
    add("id", [one.utterance.id for one in part], scheme="id", rater=None)


# ---- import


def import_audformat(folder: Path, table: Path) -> int:
    """Write a manifest of a database's labelled files or segments, which stay where they are;
    returns their number.

    A table without a split counts as train. Raises CorpusError for a folder without a database, a
    header or table that can't be read safely, and a database that names no emotions or files that
    are missing; WriteError if the manifest can't be written.
    """
    header = _read_header(folder / HEADER)
    tables = _section(header, "tables", where=folder / HEADER)
    clips: list[ImportedClip] = []
    for name, described in tables.items():
        columns = _section(described, "columns", where=folder / HEADER)
        column = next((one for one in LABELS if one in columns), None)
        if column is not None:
            split = _split(header, described, where=folder / HEADER)
            clips += _read_table(folder, name, column=column, split=split)
    if not clips:
        raise CorpusError(
            f"{folder}: none of the tables {', '.join(tables) or '(there are none)'} has "
            f"a column {' or '.join(LABELS)}; rename the one that holds the emotions"
        )
    return import_clips(table, clips)


class _PlainLoader(yaml.SafeLoader):
    """Plain data only; no merged mappings, of which a short header could make a very long one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("mappings are merged with <<")


def _read_header(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CorpusError(
            f"{path.parent}: holds no {HEADER}; give the folder of an audformat database"
        )
    _require_size(path, limit=HEADER_BYTES)
    try:
        header = yaml.load(read_utf8(path), Loader=_PlainLoader)
    except RecursionError:
        _refuse(path, "it is nested too deeply")
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        _refuse(path, f"{line}{getattr(error, 'problem', None) or error}")
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
    found = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(found or {}, dict) or not all(isinstance(key, str) for key in found or {}):
        _refuse(where, f"'{name}' isn't a mapping from names")
    return found or {}


def _split(header: Mapping[str, Any], table: object, *, where: Path) -> Split:
    splits = _section(header, "splits", where=where)
    name = table.get("split_id") if isinstance(table, dict) else None
    kind = splits.get(name) if isinstance(name, str) else None
    kind = kind.get("type") if isinstance(kind, dict) else None
    return next((split for split in SPLITS if split == kind), "train")


def _read_table(folder: Path, name: str, *, column: str, split: Split) -> Iterator[ImportedClip]:
    path = folder / f"db.{name}.csv"
    if not path.is_file() or path.parent != folder:
        other = next(
            (kind for kind in ("parquet", "pkl") if path.with_suffix(f".{kind}").is_file()), ""
        )
        reason = f"only as .{other}, which isn't read" if other else "missing"
        raise CorpusError(
            f"{path}: the table is {reason}; save the database with storage_format='csv'"
        )
    _require_size(path, limit=TABLE_BYTES)
    for where, row in read_rows(read_utf8(path), path=path, columns=("file", column)):
        yield _clip(folder, row, column=column, split=split, where=where)


def _clip(folder: Path, row: TableRow, *, column: str, split: Split, where: str) -> ImportedClip:
    cells = {name: "" if cell.strip() in ABSENT else cell.strip() for name, cell in row.items()}
    audio = folder / cells["file"]
    if not audio.is_file():
        raise CorpusError(f"{where}: {audio} is missing; get the database's media, too")
    start_s = _seconds(cells.get("start", ""), where=where)
    name = cells["file"] if not start_s else f"{cells['file']}@{start_s:g}"
    return ImportedClip(
        audio=audio,
        split=split,
        id=first_cell(cells, "id", "utterance") or name,
        dialogue=first_cell(cells, "dialogue"),
        speaker=first_cell(cells, "speaker"),
        text=first_cell(cells, "transcription", "text", "transcript"),
        label=cells[column],
        start_s=start_s or None,
        end_s=_seconds(cells.get("end", ""), where=where),
    )


def _seconds(cell: str, *, where: str) -> float | None:
    if not cell:
        return None
    found = TIME.fullmatch(cell)
    if found is None:
        raise CorpusError(f"{where}: '{cell}' isn't a time such as 0 days 00:00:01.5; mend it")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
