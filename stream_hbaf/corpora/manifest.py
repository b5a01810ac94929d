"""Reads and writes manifests: people's own recordings, listed in a comma-separated table in UTF-8.

    dialogue,id,speaker,text,label,split,audio,start,end
    visit1,v1-001,Anna,"Well, hello.",joy,train,visit1.wav,0.40,1.85

A row is an utterance, in the order in which they were spoken. ``label`` may be empty: the utterance
is then context only. ``split`` is train, dev or test, one for a whole dialogue. The columns
``audio`` (a path, relative to the table), ``start`` and ``end`` (seconds in that recording) may be
left out or empty.

A table that a trained bundle is evaluated on needs ``label``, ``audio`` or ``text``, and no more:
without the column ``id`` an utterance is named by its line, without ``dialogue`` each is a dialogue
of its own, and without ``split`` all are test.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stream_hbaf.corpora.dialogue import (
    SPLITS,
    Corpus,
    Dialogue,
    LabelledUtterance,
    Split,
    TableRow,
    read_rows,
    read_utf8,
    require_file,
)
from stream_hbaf.errors import CorpusError, shorten
from stream_hbaf.files import PRIVATE, atomic_write_text, is_file
from stream_hbaf.untrusted import as_unicode

REQUIRED = ("dialogue", "id", "speaker", "text", "label", "split")
COLUMNS = (*REQUIRED, "audio", "start", "end")


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """An utterance's row of a manifest, read or to be written."""

    dialogue: str
    split: Split
    utterance: LabelledUtterance
    where: str = ""  # file:line that it was read from


def read_manifest(path: Path, *, labels: Sequence[str] = ()) -> Corpus:
    """Read all splits; the labels are those of the train rows, in alphabetical order.

    With ``labels``, those of a trained bundle, they are the corpus's labels: no train rows are
    needed, and of the columns only ``label`` with ``audio`` or ``text``.

    Raises CorpusError with file and line for bytes that aren't UTF-8, a missing or unknown column,
    an id that stands there twice, a recording that is missing, times out of order, a dialogue in
    two splits, and a label that isn't among the corpus's.
    """
    content = read_utf8(require_file(path, corpus="manifest"))
    rows = read_rows(content, path=path, columns=("label",) if labels else REQUIRED)
    if not rows:
        raise CorpusError(f"{path}: no rows; list one utterance a line below the columns' names")
    for column in rows[0][1]:  # a misspelt ``Audio`` must not mean that there is no audio
        if column not in COLUMNS:
            raise CorpusError(
                f"{path}:1: unknown column '{shorten(column)}'; "
                f"rename or remove it: {', '.join(COLUMNS)}"
            )
    entries = [_entry(row, where=where, folder=path.parent) for where, row in rows]
    whose = "the bundle has" if labels else "the train rows have"
    known = sorted(labels) or _trained_labels(entries, path=path)
    for entry in entries:
        label = entry.utterance.label
        if label is not None and label not in known:
            names = shorten(", ".join(known), limit=300)
            raise CorpusError(f"{entry.where}: unknown label '{shorten(label)}'; {whose} {names}")
    splits: dict[Split, list[Dialogue]] = {split: [] for split in SPLITS}
    for name, turns in _gather(entries).items():
        _check_times(turns)
        dialogue = Dialogue(name, tuple(turn.utterance for turn in turns))
        splits[turns[0].split].append(dialogue)
    return Corpus("manifest", tuple(known), {name: tuple(part) for name, part in splits.items()})


def _trained_labels(entries: Sequence[ManifestRow], *, path: Path) -> list[str]:
    trained = {entry.utterance.label for entry in entries if entry.split == "train"}
    labels = sorted(label for label in trained if label is not None)
    if len(labels) < 2:
        raise CorpusError(f"{path}: the train rows hold {len(labels)} labels; at least two needed")
    return labels


def _entry(row: TableRow, *, where: str, folder: Path) -> ManifestRow:
    name = row.get("id", f"line {where.rpartition(':')[2]}")
    defaults = {"dialogue": name, "id": name, "speaker": "speaker", "text": "", "split": "test"}
    cells = {column: " ".join(cell.split()) for column, cell in (defaults | row).items()}
    for column in ("dialogue", "id", "speaker"):
        if not cells[column]:
            raise CorpusError(f"{where}: {column} is empty; fill it in")
    split = next((split for split in SPLITS if split == cells["split"]), None)
    if split is None:
        other = shorten(cells["split"])
        raise CorpusError(f"{where}: split '{other}' isn't one of {', '.join(SPLITS)}")
    audio = folder / row["audio"].strip() if cells.get("audio") else None
    if audio is not None and not is_file(audio):
        shown = shorten(str(audio), limit=200)
        raise CorpusError(f"{where}: {shown} is missing; correct the path or leave it empty")
    if audio is None and not cells["text"]:
        raise CorpusError(f"{where}: neither text nor audio; fill in one or remove the line")
    utterance = LabelledUtterance(
        id=cells["id"],
        speaker=cells["speaker"],
        text=cells["text"],
        label=cells["label"] or None,
        audio=audio,
        start_s=_seconds("start", cells, where=where),
        end_s=_seconds("end", cells, where=where),
    )
    return ManifestRow(cells["dialogue"], split, utterance, where)


def _seconds(column: str, cells: TableRow, *, where: str) -> float | None:
    cell = cells.get(column, "")
    if not cell:
        return None
    try:
        seconds = float(cell)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise CorpusError(f"{where}: {column} is '{shorten(cell)}', not a time in seconds; mend it")
    return seconds


def _gather(entries: Sequence[ManifestRow]) -> dict[str, list[ManifestRow]]:
    """The turns of each dialogue; raises CorpusError for an id or dialogue in two places."""
    first: dict[str, ManifestRow] = {}
    dialogues: dict[str, list[ManifestRow]] = {}
    for entry in entries:
        before = first.setdefault(entry.utterance.id, entry)
        if before is not entry:
            raise CorpusError(
                f"{entry.where}: id '{shorten(entry.utterance.id)}' stands already at "
                f"{before.where}; rename one of them"
            )
        turns = dialogues.setdefault(entry.dialogue, [])
        turns.append(entry)
        if entry.split != turns[0].split:
            raise CorpusError(
                f"{entry.where}: dialogue '{shorten(entry.dialogue)}' is in {entry.split} here but "
                f"in {turns[0].split} at {turns[0].where}; a dialogue has one split"
            )
    return dialogues


def _check_times(turns: list[ManifestRow]) -> None:
    """Within one recording turns may overlap, but none may start before the one above it."""
    latest: dict[Path | None, tuple[float, str]] = {}
    for turn in turns:
        start, end = turn.utterance.start_s, turn.utterance.end_s
        if end is not None and end <= (start or 0.0):
            raise CorpusError(
                f"{turn.where}: end {end:g} s isn't after start {start or 0:g} s; mend the times"
            )
        if start is None:
            continue
        before, where = latest.get(turn.utterance.audio, (0.0, ""))
        if start < before:
            raise CorpusError(
                f"{turn.where}: starts at {start:g} s, before {before:g} s at {where}; "
                "list a dialogue's utterances in the order in which they were spoken"
            )
        latest[turn.utterance.audio] = (start, turn.where)


# ---- writing


def import_clips(table: Path, clips: Sequence[ManifestRow]) -> int:
    """Write the clips of a corpus in another form as a manifest, each dialogue's together.

    Without a dialogue a clip is one of its own. A dialogue that is in several splits becomes one
    for each, as a dialogue has one split. Returns the number of clips. Raises WriteError.
    """
    dialogues: dict[tuple[Split, str], list[ManifestRow]] = {}
    for clip in clips:
        dialogues.setdefault((clip.split, clip.dialogue or clip.utterance.id), []).append(clip)
    splits = Counter(name for _, name in dialogues)
    rows = [
        replace(clip, dialogue=name if splits[name] == 1 else f"{name}/{split}")
        for (split, name), turns in dialogues.items()
        for clip in turns
    ]
    write_manifest(table, rows)
    return len(rows)


def write_manifest(path: Path, rows: Iterable[ManifestRow]) -> None:
    """Write a manifest; paths of audio are relative to it, or absolute. Raises WriteError.

    Only its owner may read it, since it may hold what people said.
    """
    cells = (
        {
            "dialogue": row.dialogue,
            "id": row.utterance.id,
            "speaker": row.utterance.speaker or "unknown",
            "text": row.utterance.text,
            "label": row.utterance.label,
            "split": row.split,
            "audio": row.utterance.audio,
            "start": row.utterance.start_s,
            "end": row.utterance.end_s,
        }
        for row in rows
    )
    write_table(path, columns=COLUMNS, rows=cells)


def write_table(path: Path, *, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a comma-separated table, which only its owner may read; None is an empty cell.

    Raises WriteError, and CorpusError for a file's name that isn't UTF-8.
    """
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for cell in map(str, row.values()):
            if cell != as_unicode(cell):
                shown = as_unicode(shorten(cell, limit=200))
                raise CorpusError(f"{path}: '{shown}' isn't UTF-8; rename that file")
        writer.writerow(row)
    atomic_write_text(path, content.getvalue(), mode=PRIVATE)
