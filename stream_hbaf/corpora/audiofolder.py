"""Exports sessions as Hugging Face's AudioFolder, and imports AudioFolders of others.

    train/metadata.jsonl      {"file_name", "id", "dialogue", "speaker", "text", "label", "by"}
    train/<id>.flac           the audio of each utterance
    validation/…  test/…      likewise

``datasets.load_dataset("audiofolder", data_dir=…)`` reads it. It is plain files: the library isn't
needed here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from stream_hbaf.corpora.dialogue import SPLITS, Split, TableRow, read_rows, read_utf8
from stream_hbaf.corpora.manifest import ImportedClip, first_cell, import_clips
from stream_hbaf.corpora.session_corpus import ExportedUtterance, export_clips
from stream_hbaf.errors import CorpusError
from stream_hbaf.files import atomic_write_text

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
    for split in SPLITS:
        lines = [_line(one) for one in exported if one.split == split and one.clip is not None]
        if lines:
            atomic_write_text(out / FOLDERS[split] / TABLES[1], "".join(lines))
    return sum(one.clip is not None for one in exported)


def import_audiofolder(folder: Path, table: Path) -> int:
    """Write a manifest of an AudioFolder's clips, which stay where they are; returns their number.

    Without a table of its own, a clip's label is its folder's name. Raises CorpusError for a folder
    without clips, and with file and line for a table that can't be read; WriteError if the manifest
    can't be written.
    """
    tables = sorted(path for name in TABLES for path in folder.rglob(name))
    clips = [clip for path in tables for clip in _read_table(path, folder)]
    if not tables:
        files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        clips = [_clip_of_folder(path, folder) for path in sorted(files)]
    if not clips:
        raise CorpusError(
            f"{folder}: no clips; an AudioFolder holds metadata.csv, or audio in folders named "
            "after their labels"
        )
    return import_clips(table, clips)


def _line(one: ExportedUtterance) -> str:
    """A line of metadata.jsonl. Every cell is text: an empty column would have another type."""
    row = {
        "file_name": one.clip.name if one.clip is not None else "",
        "id": one.utterance.id,
        "dialogue": one.dialogue,
        "speaker": one.utterance.speaker,
        "text": one.utterance.text,
        "label": one.utterance.label or "",
        "by": one.by,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_table(table: Path, folder: Path) -> Iterator[ImportedClip]:
    rows = _json_rows(table) if table.suffix == ".jsonl" else None
    for where, row in rows or read_rows(read_utf8(table), path=table, columns=("file_name",)):
        clip = table.parent / row.get("file_name", "")
        if not clip.is_file():
            raise CorpusError(f"{where}: {clip} is missing; correct file_name")
        yield ImportedClip(
            audio=clip,
            split=_split(clip, folder),
            id=first_cell(row, "id", "utterance") or clip.stem,
            dialogue=first_cell(row, "dialogue", "dialogue_id"),
            speaker=first_cell(row, "speaker", "speaker_id"),
            text=first_cell(row, "text", "transcription", "transcript", "sentence"),
            label=first_cell(row, "label", "emotion"),
        )


def _json_rows(table: Path) -> list[tuple[str, TableRow]]:
    found = []
    for number, line in enumerate(read_utf8(table).splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise CorpusError(f"{table}:{number}: isn't a JSON object; mend that line")
        cells = {name: "" if value is None else str(value) for name, value in row.items()}
        found.append((f"{table}:{number}", cells))
    return found


def _clip_of_folder(clip: Path, folder: Path) -> ImportedClip:
    place = clip.parent
    label = "" if place == folder or place.name.lower() in NAMES else place.name
    name = clip.relative_to(folder).with_suffix("").as_posix()
    return ImportedClip(audio=clip, split=_split(clip, folder), id=name, label=label)


def _split(clip: Path, folder: Path) -> Split:
    inside = clip.relative_to(folder).parts[:-1]
    return next((NAMES[part.lower()] for part in inside if part.lower() in NAMES), "train")
