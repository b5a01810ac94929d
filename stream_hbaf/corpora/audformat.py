"""Sessions go out, and corpora come in, as an audformat database.

A table for each split: ``emotion.train``, ``emotion.dev``, ``emotion.test``, whose columns are the
emotion that people gave (rater ``people``), the one that a bundle gave (rater ``model``), speaker,
transcription, dialogue and id.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stream_hbaf.corpora.dialogue import SPLITS, Split
from stream_hbaf.corpora.exchange import BY_MODEL, CLIPS, Exported, export_clips
from stream_hbaf.corpora.foreign import Foreign, pick, write_manifest
from stream_hbaf.errors import CorpusError

HEADER = "db.yaml"
LABELS = ("emotion", "emotion.categories", "label")  # columns that say it, most telling first
PEOPLE, MODEL = "people", "model"
ABSENT = {"", "nan", "NaT", "None", "<NA>"}


def export_audformat(folder: Path, out: Path, *, own_labels: bool = False) -> int:
    """Write sessions as an audformat database; returns how many utterances it has.

    Only those whose sound is whole. With ``own_labels`` the bundle's label of each that nobody
    corrected stands in a column of its own. Errors are as for a manifest.
    """
    import audformat  # type: ignore[import-untyped]  # seconds, which no listing needs

    every = export_clips(folder, out, clips=lambda split: CLIPS, own_labels=own_labels)
    exported = [one for one in every if one.clip is not None]
    labels = sorted({one.said.label for one in exported if one.said.label is not None})
    database = audformat.Database(
        "sessions",
        source="stream-hbaf",
        usage=audformat.define.Usage.RESTRICTED,
        description="Conversations recorded and corrected with stream-hbaf",
    )
    database.raters[PEOPLE] = audformat.Rater(audformat.define.RaterType.HUMAN)
    database.raters[MODEL] = audformat.Rater(audformat.define.RaterType.MACHINE)
    database.schemes["emotion"] = audformat.Scheme("str", labels=labels)
    for name in ("speaker", "transcription", "dialogue", "id"):
        database.schemes[name] = audformat.Scheme("str")
    for split in SPLITS:
        part = [one for one in exported if one.split == split]
        if part:
            database.splits[split] = audformat.Split(split)
            _fill(database, split, part, out=out, own_labels=own_labels)
    database.save(str(out), storage_format="csv")
    return len(exported)


def _fill(
    database: Any, split: Split, part: Sequence[Exported], *, out: Path, own_labels: bool
) -> None:
    import audformat

    files = [str(one.clip.relative_to(out)) for one in part if one.clip is not None]
    table = audformat.Table(audformat.filewise_index(files), split_id=split)
    database[f"emotion.{split}"] = table

    def put(column: str, values: Sequence[str | None], *, scheme: str, rater: str | None) -> None:
        table[column] = audformat.Column(scheme_id=scheme, rater_id=rater)
        table[column].set(list(values))

    by_model = [one.by.startswith(BY_MODEL) for one in part]
    labels = [one.said.label for one in part]
    given = [None if model else label for label, model in zip(labels, by_model, strict=True)]
    put("emotion", given, scheme="emotion", rater=PEOPLE)
    if own_labels:
        own = [label if model else None for label, model in zip(labels, by_model, strict=True)]
        put("emotion.model", own, scheme="emotion", rater=MODEL)
    put("speaker", [one.said.speaker for one in part], scheme="speaker", rater=None)
    put("transcription", [one.said.text for one in part], scheme="transcription", rater=None)
    put("dialogue", [one.dialogue for one in part], scheme="dialogue", rater=None)
    put("id", [one.said.id for one in part], scheme="id", rater=None)


def import_audformat(folder: Path, table: Path) -> int:
    """Write a manifest of a database's labelled files or segments, which stay where they are;
    returns their number.

    A table of no split counts as train. Raises CorpusError for a folder without a database, and for
    one that names no emotions or files that aren't there.
    """
    import audformat

    if not (folder / HEADER).is_file():
        raise CorpusError(f"{folder}: holds no {HEADER}; give the folder of an audformat database")
    database = audformat.Database.load(str(folder))
    found: list[Foreign] = []
    for name in database.tables:
        column = next((one for one in LABELS if one in database[name].columns), None)
        if column is not None:
            found += _rows_of(database, name, column, folder=folder)
    if not found:
        raise CorpusError(
            f"{folder}: none of the tables {', '.join(database.tables) or '(there are none)'} has "
            f"a column {' or '.join(LABELS)}; rename the one that holds the emotions"
        )
    return write_manifest(table, found)


def _rows_of(database: Any, name: str, column: str, *, folder: Path) -> Iterator[Foreign]:
    import audformat

    table = database[name]
    split = _split(database, table.split_id)
    segments = audformat.utils.to_segmented_index(table.get())
    for row in segments.reset_index().to_dict("records"):
        cells = {key: _cell(value) for key, value in row.items()}
        audio = folder / cells["file"]
        if not audio.is_file():
            raise CorpusError(f"{folder}: table '{name}': {audio} is missing; get its media, too")
        start, end = (_seconds(row[edge]) for edge in ("start", "end"))
        yield Foreign(
            audio=audio,
            split=split,
            id=pick(cells, "id", "utterance") or _segment_id(cells["file"], start),
            dialogue=pick(cells, "dialogue"),
            speaker=pick(cells, "speaker"),
            text=pick(cells, "transcription", "text", "transcript"),
            label=cells[column],
            start_s=start or None,
            end_s=end,
        )


def _split(database: Any, name: str | None) -> Split:
    kind = database.splits[name].type if name is not None else "train"
    return next((split for split in SPLITS if split == kind), "train")


def _segment_id(file: str, start: float | None) -> str:
    return file if not start else f"{file}@{start:g}"


def _cell(value: object) -> str:
    text = str(value).strip()
    return "" if text in ABSENT else text


def _seconds(time: Any) -> float | None:
    return None if _cell(time) == "" else float(time.total_seconds())
