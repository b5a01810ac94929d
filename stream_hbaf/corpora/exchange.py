"""Sessions go out as corpora, each utterance a clip, and corrections come in.

manifest.csv   one line an utterance, as every corpus of one's own is read
labels.csv     id,label,by: who says so; what a bundle said is by "model:…"
clips/         the sound of each utterance
"""

import csv
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.dialogue import LabelledUtterance, Split, read_rows, read_utf8
from stream_hbaf.corpora.manifest import OPTIONAL, REQUIRED
from stream_hbaf.corpora.session import dialogues_of, divide
from stream_hbaf.errors import CorpusError
from stream_hbaf.events import Feedback
from stream_hbaf.sessions.flac import FlacWriter
from stream_hbaf.sessions.session import Samples, Session, read_sound, sessions_in
from stream_hbaf.sessions.writing import add_feedback

MANIFEST_TABLE, LABELS_TABLE, CLIPS = "manifest.csv", "labels.csv", "clips"
BY_MODEL = "model:"  # how the name of who labelled begins if that was no person
Row = Mapping[str, object]
Part = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Exported:
    """An utterance on its way to a corpus folder."""

    split: Split
    dialogue: str
    said: LabelledUtterance
    by: str  # who labelled it; empty if nobody did
    clip: Path | None  # its own sound; None if that isn't whole


def export_manifest(folder: Path, out: Path, *, own_labels: bool = False) -> int:
    """Write sessions as a folder with a manifest; returns how many utterances they have.

    Labels are people's corrections; with ``own_labels`` those of the recogniser stand in for what
    nobody corrected, and ``labels.csv`` tells them apart. Raises CorpusError for sessions that
    can't be read or tell of nothing, and for a folder that can't be written.
    """
    exported = export_clips(folder, out, clips=lambda split: CLIPS, own_labels=own_labels)
    write_table(
        out / MANIFEST_TABLE,
        columns=(*REQUIRED, *OPTIONAL),
        rows=[
            {
                "dialogue": one.dialogue,
                "id": one.said.id,
                "speaker": one.said.speaker,
                "text": one.said.text,
                "label": one.said.label,
                "split": one.split,
                "audio": one.clip.relative_to(out) if one.clip is not None else None,
            }
            for one in exported
            if one.clip is not None or one.said.text
        ],
    )
    write_table(
        out / LABELS_TABLE,
        columns=("id", "label", "by"),
        rows=[{"id": one.said.id, "label": one.said.label, "by": one.by} for one in exported],
    )
    return len(exported)


def export_clips(
    folder: Path, out: Path, *, clips: Callable[[Split], str], own_labels: bool
) -> list[Exported]:
    """Write the sound of every utterance into ``out``/``clips(split)``, and list them in order."""
    sessions = sessions_in(folder)
    dialogues = divide(dialogues_of(sessions, own_labels=own_labels))
    by = _who_labelled(sessions, own_labels=own_labels)
    found = [
        Exported(split, dialogue.id, said, by.get(said.id, ""), _clip(out, clips(split), said))
        for split, part in dialogues.items()
        for dialogue in part
        for said in dialogue.utterances
    ]
    if not found:
        raise CorpusError(f"{folder}: no utterance was recorded; there is nothing to export")
    try:
        _write_clips(found)
    except OSError as error:
        raise CorpusError(
            f"{out}: can't be written ({error.strerror}); give a folder that is empty or new"
        ) from None
    # A session that was killed may tell of an utterance whose last sound isn't there.
    return [
        one if one.clip is None or one.clip.is_file() else replace(one, clip=None) for one in found
    ]


def import_corrections(folder: Path, table: Path) -> int:
    """Add the corrections of a table of id,label,by to their sessions; returns how many are new.

    Lines without a label, or with one that a model gave, are passed over; so is what is known.
    Raises CorpusError with file and line for an unknown id or label: then nothing is added.
    """
    sessions = sessions_in(folder)
    place = {end.id: session for session in sessions for end in session.ends}
    new: dict[Path, list[Feedback]] = {}
    for where, row in read_rows(_read(table), path=table, columns=("id", "label")):
        name, label, by = (row.get(column, "").strip() for column in ("id", "label", "by"))
        if not label or by.startswith(BY_MODEL):
            continue
        session = place.get(name)
        if session is None:
            raise CorpusError(f"{where}: no recorded utterance has the id '{name}'; mend it")
        if label not in session.header.labels:
            labels = ", ".join(session.header.labels)
            raise CorpusError(f"{where}: no label '{label}'; there is {labels}")
        known = session.corrections.get(name)
        if known is None or known.label != label:
            told = new.setdefault(session.folder, [])
            told.append(Feedback(id=name, label=label, by=by))
    for session in sessions:
        add_feedback(session, new.get(session.folder, ()))
    return sum(map(len, new.values()))


def write_table(path: Path, *, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a comma-separated table. Raises CorpusError where it can't be written."""
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, content.getvalue())


def write_text(path: Path, content: str) -> None:
    """Write a file of a corpus. Raises CorpusError where it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise CorpusError(
            f"{path}: can't be written ({error.strerror}); give another place"
        ) from None


def _read(table: Path) -> str:
    try:
        return read_utf8(table)
    except OSError as error:
        raise CorpusError(f"{table}: can't be read ({error.strerror}); check its name") from None


def _who_labelled(sessions: Sequence[Session], *, own_labels: bool) -> dict[str, str]:
    """By id: the person who corrected it, else the bundle that read it if its labels count."""
    found = {}
    for session in sessions:
        for end in session.ends if own_labels else ():
            if end.emotion is not None and end.model is not None:
                found[end.id] = f"{BY_MODEL}{end.model.id}"
        for name, told in session.corrections.items():
            found[name] = told.by or "somebody"
    return found


def _clip(out: Path, place: str, said: LabelledUtterance) -> Path | None:
    return None if said.audio is None else out / place / f"{quote(said.id, safe='')}.flac"


def _write_clips(found: Sequence[Exported]) -> None:
    """Each session's sound is read once, whatever its length."""
    wanted: dict[Path, dict[Part, Path]] = {}
    for one in found:
        if one.clip is not None and one.said.audio is not None:
            wanted.setdefault(one.said.audio, {})[_part(one.said)] = one.clip
    for sound, parts in wanted.items():
        for part, samples in _cut(sound, parts):
            parts[part].parent.mkdir(parents=True, exist_ok=True)
            with FlacWriter(parts[part]) as writer:
                writer.write(samples)


def _part(said: LabelledUtterance) -> Part:
    start, end = (round((time or 0.0) * SAMPLE_RATE_HZ) for time in (said.start_s, said.end_s))
    return start, end


def _cut(sound: Path, parts: Iterable[Part]) -> Iterator[tuple[Part, Samples]]:
    """The parts of a file in the order of their ends; of the file only what is needed is held."""
    due = deque(sorted(parts, key=lambda part: part[1]))
    held, position = np.zeros(0, np.int16), 0  # the first sample held
    for batch in read_sound(sound):
        held = np.concatenate([held, batch])
        while due and due[0][1] <= position + len(held):
            start, end = due.popleft()
            yield (start, end), held[start - position : end - position]
        needed = min((start for start, _ in due), default=position + len(held))
        kept = max(0, min(needed - position, len(held)))
        held, position = held[kept:], position + kept
