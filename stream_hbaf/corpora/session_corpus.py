"""Recorded sessions as a corpus: read, exported, and labelled by corrections from a table.

Labels are the corrections that people gave. The newest dialogues are for testing: in the order of
time the last 15 % are test, those before them dev, all others train. Where fewer than three
dialogues hold a label, they are cut into three parts instead.

An export holds::

    manifest.csv   one line an utterance, as manifest.py reads them
    labels.csv     id,label,by: who gave the label; a bundle's own labels are by "model:…"
    clips/         the audio of each utterance
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import numpy as np

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.dialogue import (
    Corpus,
    Dialogue,
    LabelledUtterance,
    Split,
    read_rows,
    read_utf8,
)
from stream_hbaf.corpora.manifest import ManifestRow, write_manifest, write_table
from stream_hbaf.errors import AudioError, CorpusError
from stream_hbaf.events import Feedback, Utterance
from stream_hbaf.files import is_folder, is_own_file, write_error
from stream_hbaf.sessions.format import EVENTS_FILE, FlacWriter, Samples
from stream_hbaf.sessions.session import Session, decode_audio, open_sessions, session_folders
from stream_hbaf.sessions.writer import add_feedback

LOG = logging.getLogger(__name__)

LONGEST = 200  # characters of a clip's name; ids of ours have 20
HELD_OUT = 0.15  # the share of dialogues in dev, and in test
MANIFEST_TABLE, LABELS_TABLE, CLIPS = "manifest.csv", "labels.csv", "clips"
BY_MODEL = "model:"  # prefix of ``by`` where a bundle gave the label


def holds_sessions(folder: Path) -> bool:
    """Whether the folder is a session, or a folder of them."""
    return is_folder(folder) and bool(session_folders(folder))


def read_sessions(folder: Path) -> Corpus:
    """Read the corrected dialogues of a session, or of all sessions in a folder.

    The labels are those of the bundles that were used live. Raises CorpusError if nothing was
    corrected, or a session can't be read.
    """
    sessions = open_sessions(folder)
    dialogues = [dialogue for dialogue in dialogues_of(sessions) if _is_labelled(dialogue)]
    if not dialogues:
        raise CorpusError(
            f"{folder}: no recorded utterance has been corrected; say what some of them really "
            "were, on the page or with 'stream-hbaf sessions import'"
        )
    labels = {label for session in sessions for label in session.header.labels}
    # A bundle that was swapped in later may have others.
    labels |= {one.label for session in sessions for one in session.corrections.values()}
    return Corpus("sessions", tuple(sorted(labels)), split_by_time(dialogues))


def dialogues_of(sessions: Sequence[Session], *, own_labels: bool = False) -> list[Dialogue]:
    """All finished utterances of sessions, by dialogue and turn, labelled by corrections.

    With ``own_labels`` an utterance without a correction has the recogniser's label.
    """
    found: dict[str, dict[str, tuple[int, LabelledUtterance]]] = {}
    for session in sessions:
        for end in session.ends:
            turns = found.setdefault(end.dialogue_id, {})
            turns[end.id] = (end.turn, _labelled(session, end, own_labels=own_labels))
    return [
        Dialogue(name, tuple(one for _, one in sorted(turns.values(), key=lambda turn: turn[0])))
        for name, turns in found.items()
    ]


def split_by_time(dialogues: Sequence[Dialogue]) -> dict[Split, tuple[Dialogue, ...]]:
    """Dialogues in the order of time as train, dev and test; those without a label are train."""
    labelled = [dialogue for dialogue in dialogues if _is_labelled(dialogue)] or list(dialogues)
    units = labelled
    if len(units) < 3:
        units = [part for dialogue in labelled for part in _cut_after_labels(dialogue)]
    held_out = max(1, int(len(units) * HELD_OUT)) if len(units) >= 3 else 0
    dev, test = len(units) - 2 * held_out, len(units) - held_out
    parts: dict[Split, list[Dialogue]] = {
        "train": [one for one in dialogues if one not in labelled] + units[:dev],
        "dev": units[dev:test],
        "test": units[test:],
    }
    lengths = {dialogue.id: len(dialogue.utterances) for dialogue in dialogues}
    return {split: _rejoin(part, split=split, lengths=lengths) for split, part in parts.items()}


@dataclass(frozen=True, slots=True)
class ExportedUtterance(ManifestRow):
    """An utterance of a session in an exported corpus.

    Its audio is a clip of its own, relative to the corpus's folder; None if that isn't whole.
    """

    by: str = ""  # who labelled it; empty without a label


def export_manifest(folder: Path, out: Path, *, own_labels: bool = False) -> int:
    """Write sessions as a folder with a manifest; returns the number of utterances.

    Labels are corrections; with ``own_labels`` the recogniser's own labels fill in for the rest,
    and ``labels.csv`` tells them apart. Raises CorpusError for sessions that can't be read or hold
    nothing, and for a folder that can't be written.
    """
    exported = export_clips(folder, out, clips=lambda split: CLIPS, own_labels=own_labels)
    kept = [one for one in exported if one.utterance.audio is not None or one.utterance.text]
    write_manifest(out / MANIFEST_TABLE, kept)
    labels = [
        {"id": one.utterance.id, "label": one.utterance.label, "by": one.by} for one in exported
    ]
    write_table(out / LABELS_TABLE, columns=("id", "label", "by"), rows=labels)
    return len(exported)


def export_clips(
    folder: Path, out: Path, *, clips: Callable[[Split], str], own_labels: bool
) -> list[ExportedUtterance]:
    """Write each utterance's audio into ``out``/``clips(split)``; returns them in order.

    Errors are those of ``export_manifest``.
    """
    sessions = open_sessions(folder)
    dialogues = split_by_time(dialogues_of(sessions, own_labels=own_labels))
    by = _who_labelled(sessions, own_labels=own_labels)
    found = [
        ExportedUtterance(dialogue.id, split, one, by=by.get(one.id, ""))
        for split, part in dialogues.items()
        for dialogue in part
        for one in dialogue.utterances
    ]
    if not found:
        raise CorpusError(f"{folder}: no utterance was recorded; there is nothing to export")
    try:
        return _write_clips(found, out, clips=clips)
    except OSError as error:
        raise CorpusError(
            f"{out}: can't be written ({error.strerror}); give a folder that is empty or new"
        ) from None


def import_corrections(folder: Path, table: Path) -> int:
    """Add the corrections of a table of id,label,by to their sessions; returns how many are new.

    Lines without a label, or with a model's, are skipped. Raises CorpusError with file and line for
    an unknown id or label: then nothing is added; WriteError where the disk refuses.
    """
    sessions = open_sessions(folder)
    session_of = {end.id: session for session in sessions for end in session.ends}
    new: dict[Path, list[Feedback]] = {}
    try:
        content = read_utf8(table)
    except OSError as error:
        raise CorpusError(f"{table}: can't be read ({error.strerror}); check its name") from None
    for where, row in read_rows(content, path=table, columns=("id", "label")):
        name, label, by = (row.get(column, "").strip() for column in ("id", "label", "by"))
        if not label or by.startswith(BY_MODEL):
            continue
        session = session_of.get(name)
        if session is None:
            raise CorpusError(f"{where}: no recorded utterance has the id '{name}'; mend it")
        if label not in session.header.labels:
            labels = ", ".join(session.header.labels)
            raise CorpusError(f"{where}: no label '{label}'; there is {labels}")
        known = session.corrections.get(name)
        if known is None or known.label != label:
            new.setdefault(session.folder, []).append(Feedback(id=name, label=label, by=by))
    for session in sessions:
        try:
            add_feedback(session, new.get(session.folder, ()))
        except OSError as error:
            raise write_error(session.folder / EVENTS_FILE, error) from None
    return sum(map(len, new.values()))


# ---- reading


def _labelled(session: Session, end: Utterance, *, own_labels: bool) -> LabelledUtterance:
    given = session.corrections.get(end.id) or (end.emotion if own_labels else None)
    label = None if given is None else given.label
    part, audio = session.clip(end), session.audio_file(end.source)
    speaker = session.speakers.get(end.id) or end.speaker or end.source
    utterance = LabelledUtterance(end.id, speaker, end.text, label)
    if part is None or not is_own_file(audio):
        return utterance
    start_s, end_s = (sample / SAMPLE_RATE_HZ for sample in part)
    return replace(utterance, audio=audio, start_s=start_s, end_s=end_s)


def _is_labelled(dialogue: Dialogue) -> bool:
    return any(one.label is not None for one in dialogue.utterances)


def _cut_after_labels(dialogue: Dialogue) -> list[Dialogue]:
    """The dialogue cut after each labelled utterance, or after every one if none is labelled."""
    parts: list[list[LabelledUtterance]] = [[]]
    for one in dialogue.utterances:
        parts[-1].append(one)
        if one.label is not None or not _is_labelled(dialogue):
            parts.append([])
    *whole, rest = parts
    if whole:
        whole[-1] += rest
    return [Dialogue(dialogue.id, tuple(part)) for part in whole]


def _rejoin(
    part: Sequence[Dialogue], *, split: Split, lengths: dict[str, int]
) -> tuple[Dialogue, ...]:
    """A split's parts of one dialogue as one, named after the split where others have parts too."""
    found = []
    for name, pieces in groupby(part, key=lambda piece: piece.id):
        utterances = tuple(one for piece in pieces for one in piece.utterances)
        is_whole = len(utterances) == lengths[name]
        found.append(Dialogue(name if is_whole else f"{name}/{split}", utterances))
    return tuple(found)


# ---- exporting


def _who_labelled(sessions: Sequence[Session], *, own_labels: bool) -> dict[str, str]:
    """By id: the person who corrected it, else the bundle that read it if its labels count."""
    found = {}
    for session in sessions:
        for end in session.ends if own_labels else ():
            if end.emotion is not None and end.model is not None:
                found[end.id] = f"{BY_MODEL}{end.model.id}"
        for name, correction in session.corrections.items():
            found[name] = correction.by or "somebody"
    return found


def _write_clips(
    found: Sequence[ExportedUtterance], out: Path, *, clips: Callable[[Split], str]
) -> list[ExportedUtterance]:
    """Each session's audio is read once, whatever its length."""
    of_audio: dict[Path, list[ExportedUtterance]] = {}
    for one in found:
        if one.utterance.audio is not None:
            of_audio.setdefault(one.utterance.audio, []).append(one)
    written: dict[str, Path] = {}
    for audio, held in of_audio.items():
        try:
            for one, samples in _cut(audio, held):
                clip = Path(clips(one.split), f"{quote(one.utterance.id, safe='')[:LONGEST]}.flac")
                (out / clip).parent.mkdir(parents=True, exist_ok=True)
                with FlacWriter(out / clip) as writer:
                    writer.write(samples)
                written[one.utterance.id] = clip
        except AudioError as error:  # the others' clips are whole
            LOG.warning("clips left out: %s", error)
    # A session that was killed may hold an utterance whose last audio is missing.
    clipped = (
        replace(one.utterance, audio=written.get(one.utterance.id), start_s=None, end_s=None)
        for one in found
    )
    return [replace(one, utterance=own) for one, own in zip(found, clipped, strict=True)]


def _cut(
    audio: Path, utterances: Iterable[ExportedUtterance]
) -> Iterator[tuple[ExportedUtterance, Samples]]:
    """The samples of each in the order of their ends; only what is needed of the file is held."""
    due = deque(sorted(utterances, key=lambda one: one.utterance.end_s or 0.0))
    held, position = np.zeros(0, np.int16), 0  # position: of the first sample held
    for batch in decode_audio(audio):
        held = np.concatenate([held, batch])
        while due and _samples_of(due[0])[1] <= position + len(held):
            start, end = _samples_of(due[0])
            yield due.popleft(), held[start - position : end - position]
        needed = min((_samples_of(one)[0] for one in due), default=position + len(held))
        kept = max(0, min(needed - position, len(held)))
        held, position = held[kept:], position + kept


def _samples_of(one: ExportedUtterance) -> tuple[int, int]:
    """Where its recording holds it: samples [start, stop)."""
    times = (one.utterance.start_s, one.utterance.end_s)
    start, stop = (round((time or 0.0) * SAMPLE_RATE_HZ) for time in times)
    return start, stop
