"""A recorded corpus: our own sessions, labelled by the corrections that people gave.

The newest is for testing: of dialogues in the order of time, the last 15 % are test, those before
them dev, all others train. Where fewer than three hold a label, they are cut into three instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, LabelledUtterance, Split
from stream_hbaf.errors import CorpusError
from stream_hbaf.events import Utterance
from stream_hbaf.sessions.session import Session, is_session, sessions_in

HELD_OUT = 0.15  # the share of dialogues that dev has, and test


def holds_sessions(folder: Path) -> bool:
    """Whether it is a session, or a folder of them."""
    return is_session(folder) or (folder.is_dir() and any(map(is_session, folder.iterdir())))


def read_sessions(folder: Path) -> Corpus:
    """Read a session, or all in a folder of them, as far as somebody corrected them.

    The labels are all that the bundles which were used live can say. Raises CorpusError if nobody
    corrected anything, or a session can't be read.
    """
    sessions = sessions_in(folder)
    dialogues = [
        dialogue
        for dialogue in dialogues_of(sessions)
        if any(said.label is not None for said in dialogue.utterances)
    ]
    if not dialogues:
        raise CorpusError(
            f"{folder}: no recorded utterance has been corrected; say what some of them really "
            "were, on the page or with 'stream-hbaf sessions import'"
        )
    labels = {label for session in sessions for label in session.header.labels}
    # The bundle that was taken up on the way may say others.
    labels |= {told.label for session in sessions for told in session.corrections.values()}
    return Corpus("sessions", tuple(sorted(labels)), divide(dialogues))


def dialogues_of(sessions: Sequence[Session], *, own_labels: bool = False) -> list[Dialogue]:
    """All that was said, in its order; labelled by corrections alone, unless ``own_labels``: then
    the recogniser's label stands where nobody gave another."""
    found: dict[str, dict[str, tuple[int, LabelledUtterance]]] = {}
    for session in sessions:
        for end in session.ends:
            turns = found.setdefault(end.dialogue_id, {})
            turns[end.id] = (end.turn, _labelled(session, end, own_labels=own_labels))
    return [
        Dialogue(name, tuple(said for _, said in sorted(turns.values(), key=lambda one: one[0])))
        for name, turns in found.items()
    ]


def divide(dialogues: Sequence[Dialogue]) -> dict[Split, tuple[Dialogue, ...]]:
    """Dialogues in the order of time as train, dev and test; what holds no label is train's."""
    labelled = [dialogue for dialogue in dialogues if _labels(dialogue)] or list(dialogues)
    units = labelled
    if len(units) < 3:
        units = [piece for dialogue in labelled for piece in _pieces(dialogue)]
    held_out = max(1, int(len(units) * HELD_OUT)) if len(units) >= 3 else 0
    dev, test = len(units) - 2 * held_out, len(units) - held_out
    parts: dict[Split, list[Dialogue]] = {
        "train": [one for one in dialogues if one not in labelled] + units[:dev],
        "dev": units[dev:test],
        "test": units[test:],
    }
    whole = {dialogue.id: len(dialogue.utterances) for dialogue in dialogues}
    return {split: _rejoin(part, split=split, whole=whole) for split, part in parts.items()}


def _labelled(session: Session, end: Utterance, *, own_labels: bool) -> LabelledUtterance:
    correction = session.corrections.get(end.id)
    label = correction.label if correction is not None else None
    if label is None and own_labels and end.emotion is not None:
        label = end.emotion.label
    clip, sound = session.clip(end), session.sound(end.source)
    said = LabelledUtterance(end.id, end.speaker or end.source, end.text, label)
    if clip is None or not sound.is_file():
        return said
    start, stop = (sample / SAMPLE_RATE_HZ for sample in clip)
    return replace(said, audio=sound, start_s=start, end_s=stop)


def _labels(dialogue: Dialogue) -> int:
    return sum(said.label is not None for said in dialogue.utterances)


def _pieces(dialogue: Dialogue) -> list[Dialogue]:
    """The dialogue cut after each labelled utterance, or after each if none is."""
    pieces: list[list[LabelledUtterance]] = [[]]
    for said in dialogue.utterances:
        pieces[-1].append(said)
        if said.label is not None or not _labels(dialogue):
            pieces.append([])
    *whole, rest = pieces
    if whole:
        whole[-1] += rest
    return [Dialogue(dialogue.id, tuple(piece)) for piece in whole]


def _rejoin(
    part: Sequence[Dialogue], *, split: Split, whole: dict[str, int]
) -> tuple[Dialogue, ...]:
    """A split's pieces of one dialogue as one; named after the split if others have some, too."""
    found = []
    for name, pieces in groupby(part, key=lambda piece: piece.id):
        utterances = tuple(said for piece in pieces for said in piece.utterances)
        is_whole = len(utterances) == whole[name]
        found.append(Dialogue(name if is_whole else f"{name}/{split}", utterances))
    return tuple(found)
