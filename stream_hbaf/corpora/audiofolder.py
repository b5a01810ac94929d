"""Sessions go out, and corpora come in, as Hugging Face's AudioFolder.

    train/metadata.jsonl      {"file_name", "id", "dialogue", "speaker", "text", "label", "by"}
    train/<id>.flac           the sound of each utterance
    validation/…  test/…      likewise

``datasets.load_dataset("audiofolder", data_dir=…)`` reads it. It is plain files: the library isn't
needed here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from stream_hbaf.corpora.dialogue import SPLITS, Row, Split, read_rows, read_utf8
from stream_hbaf.corpora.exchange import Exported, export_clips, write_text
from stream_hbaf.corpora.foreign import Foreign, pick, write_manifest
from stream_hbaf.errors import CorpusError

TABLES = ("metadata.csv", "metadata.jsonl")
FOLDERS: dict[Split, str] = {"train": "train", "dev": "validation", "test": "test"}
# What the library takes for a split's folder, and what it is called here.
NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "dev"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def export_audiofolder(folder: Path, out: Path, *, own_labels: bool = False) -> int:
    """Write sessions as an AudioFolder; returns how many utterances it has.

    Only those whose sound is whole. Labels, ``own_labels`` and errors are as for a manifest.
    """
    exported = export_clips(folder, out, clips=FOLDERS.__getitem__, own_labels=own_labels)
    for split in SPLITS:
        lines = [_line(one) for one in exported if one.split == split and one.clip is not None]
        if lines:
            write_text(out / FOLDERS[split] / TABLES[1], "".join(lines))
    return sum(one.clip is not None for one in exported)


def import_audiofolder(folder: Path, table: Path) -> int:
    """Write a manifest of an AudioFolder's clips, which stay where they are; returns their number.

    Without a table of its own, a clip's label is its folder's name. Raises CorpusError for a folder
    without clips, and with file and line for a table that can't be read.
    """
    tables = sorted(path for name in TABLES for path in folder.rglob(name))
    clips = [one for path in tables for one in _listed(path, folder)]
    if not tables:
        sounds = (path for path in folder.rglob("*") if path.suffix.lower() in SOUNDS)
        clips = [_unlisted(path, folder) for path in sorted(sounds)]
    if not clips:
        raise CorpusError(
            f"{folder}: no clips; an AudioFolder holds metadata.csv, or sound in folders named "
            "after their labels"
        )
    return write_manifest(table, clips)


def _line(one: Exported) -> str:
    """One of the table's. Every cell is text: an empty column would have another type."""
    row = {
        "file_name": one.clip.name if one.clip is not None else "",
        "id": one.said.id,
        "dialogue": one.dialogue,
        "speaker": one.said.speaker,
        "text": one.said.text,
        "label": one.said.label or "",
        "by": one.by,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _listed(table: Path, folder: Path) -> Iterator[Foreign]:
    rows = _json_rows(table) if table.suffix == ".jsonl" else None
    for where, row in rows or read_rows(read_utf8(table), path=table, columns=("file_name",)):
        clip = table.parent / row.get("file_name", "")
        if not clip.is_file():
            raise CorpusError(f"{where}: {clip} is missing; correct file_name")
        yield Foreign(
            audio=clip,
            split=_split(clip, folder),
            id=pick(row, "id", "utterance") or clip.stem,
            dialogue=pick(row, "dialogue", "dialogue_id"),
            speaker=pick(row, "speaker", "speaker_id"),
            text=pick(row, "text", "transcription", "transcript", "sentence"),
            label=pick(row, "label", "emotion"),
        )


def _json_rows(table: Path) -> list[tuple[str, Row]]:
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


def _unlisted(clip: Path, folder: Path) -> Foreign:
    place = clip.parent
    label = "" if place == folder or place.name.lower() in NAMES else place.name
    name = clip.relative_to(folder).with_suffix("").as_posix()
    return Foreign(audio=clip, split=_split(clip, folder), id=name, label=label)


def _split(clip: Path, folder: Path) -> Split:
    inside = clip.relative_to(folder).parts[:-1]
    return next((NAMES[part.lower()] for part in inside if part.lower() in NAMES), "train")
