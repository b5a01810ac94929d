"""Reads IEMOCAP: ten actors in pairs, scripted and improvised dialogues (Busso et al. 2008).

Its files are expected as people download them: the release (``IEMOCAP_full_release/Session1`` …
``Session5``), or the published table of its 10,039 turns (``utterances.csv``) with their times in
``order.csv``. Where both are there, texts and times come from the release, and the eight prosody
measurements from the table. ``ge2e.npz`` adds an embedding of each turn's audio to either.

A dialogue's turns are in the order in which they end. Speakers overlap, and a live recogniser has a
turn when it ends: so what precedes a turn here is what has ended before. Session 5 is the test
split.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.corpora.dialogue import (
    Dialogue,
    LabelledUtterance,
    Split,
    TableRow,
    read_embeddings,
    read_measurements,
    read_rows,
    read_text,
    read_utf8,
    require_file,
    require_folder,
)
from stream_hbaf.errors import CorpusError
from stream_hbaf.features.prosody import PROSODY

# The field's six classes; turns of any other label ('xxx': no agreement) are context only.
EMOTIONS = {
    "ang": "anger",
    "exc": "excitement",
    "fru": "frustration",
    "hap": "happiness",
    "neu": "neutral",
    "sad": "sadness",
}
IEMOCAP_LABELS = tuple(EMOTIONS.values())
OTHERS = ("xxx", "sur", "fea", "dis", "oth")
# What an annotator's vote is called in the evaluation files; others are outside the six classes.
VOTES = {
    "Anger": "anger",
    "Excited": "excitement",
    "Frustration": "frustration",
    "Happiness": "happiness",
    "Neutral": "neutral",
    "Neutral state": "neutral",
    "Sadness": "sadness",
}
# Names that a text encoder knows, the same in every session: the corpus has only F and M.
SPEAKERS = {"F": "Mary", "M": "James"}
SESSIONS = range(1, 6)
TEST_SESSION = 5
# The published split's 12 of the 120 dialogues of sessions 1-4; of the rest 108 train.
DEV_DIALOGUES = frozenset(
    {
        "Ses01M_impro01",
        "Ses01M_script03_1",
        "Ses02F_impro02",
        "Ses02F_impro07",
        "Ses02M_script01_2",
        "Ses03F_impro01",
        "Ses03M_impro02",
        "Ses03M_impro08a",
        "Ses03M_script02_2",
        "Ses03M_script03_2",
        "Ses04F_impro07",
        "Ses04F_script02_1",
    }
)
MODES: dict[Split, str] = {"train": "train", "dev": "valid", "test": "test"}
TABLE = "utterances.csv"
ORDER = "order.csv"
EMBEDDINGS = "ge2e.npz"  # arrays `name` [N] and `embedding` [N, 256]
COLUMNS = ("video_id", "segment_id", "emotion", "gender", "mode", "text", *PROSODY)
ORDER_COLUMNS = ("name", "start_s", "end_s")
VOTES_COLUMN = "votes_if_undecided"  # annotators between |, several labels of one between /

EVALUATED = re.compile(
    r"\[\s*(?P<start>\d+\.?\d*)\s*-\s*(?P<end>\d+\.?\d*)\s*\]"
    r"\s+(?P<id>\S+_[FM]\d+)\s+(?P<emotion>[a-z]{3})\b"
    r"(?:\s+\[\s*[\d.]+\s*,\s*(?P<arousal>[\d.]+)\s*,\s*[\d.]+\s*\])?"  # valence, dominance
)
VOTED = re.compile(r"C-E\d+:\s*(?P<labels>[^(]*)")
TRANSCRIBED = re.compile(r"(?P<id>\S+_[FM]\d+)\s+\[[^\]]*\]:(?P<text>.*)")
Times = Mapping[str, tuple[float, float]]  # by turn: start and end in its dialogue, s
Measurements = Mapping[str, tuple[float, ...]]  # by turn: the eight of prosody
Votes = tuple[tuple[str, ...], ...]  # each annotator's labels
Embeddings = Mapping[str, NDArray[np.float32]]


class Placed(NamedTuple):
    """What ``order.csv`` says of a turn."""

    times: tuple[float, float]
    votes: Votes


def read_iemocap(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split's dialogues, turns as they end; speakers are Mary (F) and James (M).

    Raises CorpusError with file and line for a label that IEMOCAP doesn't know, a turn without
    transcription, time or embedding, or a broken table; and for a folder that holds neither of the
    two layouts.
    """
    table = folder / TABLE
    embeddings = _read_embeddings(folder / EMBEDDINGS)
    for place in (folder / "IEMOCAP_full_release", folder):
        if (place / "Session1").is_dir():
            prosody = _read_prosody(table) if table.is_file() else {}
            return _read_release(place, split=split, prosody=prosody, embeddings=embeddings)
    if not table.is_file():
        raise CorpusError(
            f"IEMOCAP: {folder} holds neither IEMOCAP_full_release/Session1 nor {TABLE}; "
            "put the corpus there or correct --corpora"
        )
    order = _read_order(require_file(folder / ORDER, corpus="IEMOCAP"))
    return _read_table(table, split=split, order=order, embeddings=embeddings)


def split_of(dialogue: str) -> Split:
    """The split of a dialogue such as ``Ses01F_impro01``; session 5 is test, twelve are dev."""
    if dialogue.startswith(f"Ses0{TEST_SESSION}"):
        return "test"
    return "dev" if dialogue in DEV_DIALOGUES else "train"


def _read_release(
    folder: Path, *, split: Split, prosody: Measurements, embeddings: Embeddings
) -> list[Dialogue]:
    dialogues = []
    for session in SESSIONS:
        place = require_folder(
            folder / f"Session{session}", corpus="IEMOCAP", holds="dialog/ and sentences/"
        )
        evaluations = require_folder(
            place / "dialog" / "EmoEvaluation", corpus="IEMOCAP", holds="one .txt a dialogue"
        )
        for evaluation in sorted(evaluations.glob("[!.]*.txt")):  # ._x.txt: left over by a Mac
            if split_of(evaluation.stem) == split:
                dialogues.append(
                    _read_dialogue(
                        evaluation, session=place, prosody=prosody, embeddings=embeddings
                    )
                )
    return dialogues


def _read_dialogue(
    evaluation: Path, *, session: Path, prosody: Measurements, embeddings: Embeddings
) -> Dialogue:
    name = evaluation.stem
    transcription = require_file(
        session / "dialog" / "transcriptions" / f"{name}.txt", corpus="IEMOCAP"
    )
    texts = _read_transcription(transcription)
    clips = session / "sentences" / "wav"
    turns: dict[str, LabelledUtterance] = {}
    times = {}
    for where, found, votes in _evaluated(evaluation):
        turn = found["id"]
        if turn in turns:
            raise CorpusError(f"{where}: turn {turn} stands here twice; remove one of them")
        if turn not in texts:
            raise CorpusError(f"{where}: turn {turn} isn't in {transcription}; unpack it again")
        turns[turn] = LabelledUtterance(
            id=turn,
            speaker=_speaker(turn),
            text=texts[turn],
            label=_label(found["emotion"], where=where),
            audio=clips / name / f"{turn}.wav" if clips.is_dir() else None,
            prosody=prosody.get(turn),
            votes=votes,
            arousal=_arousal(found["arousal"]),
            ge2e=_embedding(turn, embeddings),
        )
        times[turn] = (float(found["start"]), float(found["end"]))
    return _dialogue(name, turns, times)


def _arousal(rated: str | None) -> float | None:
    """The mean rating, from 1 to 5, as from -1 to 1; None where there is none."""
    try:
        rating = float(rated or "nan")
    except ValueError:
        return None
    return (rating - 3.0) / 2.0 if 1.0 <= rating <= 5.0 else None


def _evaluated(path: Path) -> list[tuple[str, re.Match[str], Votes]]:
    """The turns' summary lines with the votes below them; the head is left out."""
    summaries: list[tuple[str, re.Match[str], list[list[str]]]] = []
    for where, line in _lines(path):
        if line.startswith("["):
            found = EVALUATED.match(line)
            if not found:
                raise CorpusError(f"{where}: not '[start - end] turn emotion'; unpack it again")
            summaries.append((where, found, []))
        elif summaries and (vote := VOTED.match(line)):
            summaries[-1][2].append(vote["labels"].split(";"))
    return [(where, found, _votes(votes)) for where, found, votes in summaries]


def _read_transcription(path: Path) -> dict[str, str]:
    """Texts by turn; lines without a numbered turn (laughter between) are left out."""
    found = (TRANSCRIBED.match(line) for _, line in _lines(path))
    return {line["id"]: " ".join(line["text"].split()) for line in found if line}


def _lines(path: Path) -> list[tuple[str, str]]:
    """All lines with ``file:line``; a few hold a stray byte of Windows-1252."""
    return [(f"{path}:{n}", line) for n, line in enumerate(read_text(path).split("\n"), start=1)]


def _read_table(
    path: Path, *, split: Split, order: Mapping[str, Placed], embeddings: Embeddings
) -> list[Dialogue]:
    turns: dict[str, dict[str, LabelledUtterance]] = {}
    for where, row in _table_rows(path):
        if row["mode"] not in MODES.values():
            raise CorpusError(f"{where}: mode '{row['mode']}' isn't one of train, valid, test")
        if row["mode"] != MODES[split]:
            continue
        turn = _turn_id(row, where=where)
        dialogue = turns.setdefault(row["video_id"], {})
        if turn in dialogue:
            raise CorpusError(f"{where}: turn {turn} stands here twice; remove one of them")
        if turn not in order:
            raise CorpusError(f"{where}: turn {turn} isn't in {ORDER} beside it; add its times")
        dialogue[turn] = LabelledUtterance(
            id=turn,
            speaker=_speaker(turn),
            text=" ".join(row["text"].split()),
            label=_label(row["emotion"], where=where),
            prosody=read_measurements(row, where=where),
            votes=order[turn].votes,
            ge2e=_embedding(turn, embeddings),
        )
    times = {turn: placed.times for turn, placed in order.items()}
    return [_dialogue(name, own, times) for name, own in sorted(turns.items())]


def _dialogue(name: str, turns: Mapping[str, LabelledUtterance], times: Times) -> Dialogue:
    """The turns in the order in which they end, and begin where they end at once."""
    in_order = tuple(turns[turn] for turn in sorted(turns, key=lambda turn: times[turn][::-1]))
    return Dialogue(name, in_order, part="scripted" if "script" in name else "improvised")


def _read_order(path: Path) -> Mapping[str, Placed]:
    """When every turn is, and the votes of an undecided one, by its name."""
    found: dict[str, Placed] = {}
    for where, row in read_rows(read_utf8(path), path=path, columns=ORDER_COLUMNS):
        turn = row["name"]
        if turn in found:
            raise CorpusError(f"{where}: turn {turn} stands here twice; remove one of them")
        try:
            start_s, end_s = float(row["start_s"]), float(row["end_s"])
        except ValueError:
            start_s = end_s = math.nan
        if not 0 <= start_s < end_s < math.inf:
            raise CorpusError(
                f"{where}: turn {turn} is from '{row['start_s']}' to '{row['end_s']}'; start_s and "
                "end_s must be seconds, the start before the end"
            )
        votes = [vote.split("/") for vote in row.get(VOTES_COLUMN, "").split("|")]
        found[turn] = Placed((start_s, end_s), _votes(votes))
    return found


def _votes(annotators: Iterable[Iterable[str]]) -> Votes:
    """The labels that each annotator gave; one outside the six classes keeps its name."""
    named = (tuple(name.strip() for name in vote if name.strip()) for vote in annotators)
    return tuple(tuple(VOTES.get(name, name) for name in vote) for vote in named if vote)


def _read_embeddings(path: Path) -> Embeddings:
    """GE2E embeddings by turn; none if there is no such file."""
    if not path.is_file():
        return {}
    names, embeddings = read_embeddings(path)
    return dict(zip(names, embeddings, strict=True))


def _embedding(turn: str, embeddings: Embeddings) -> NDArray[np.float32] | None:
    """The turn's embedding; None if there are no embeddings at all."""
    if embeddings and turn not in embeddings:
        raise CorpusError(f"IEMOCAP: turn {turn} isn't in {EMBEDDINGS}; get a whole one")
    return embeddings.get(turn)


def _read_prosody(path: Path) -> Measurements:
    return {
        _turn_id(row, where=where): read_measurements(row, where=where)
        for where, row in _table_rows(path)
    }


def _table_rows(path: Path) -> list[tuple[str, TableRow]]:
    return read_rows(read_utf8(path), path=path, columns=COLUMNS)


def _turn_id(row: TableRow, *, where: str) -> str:
    """The release's name of a turn, such as ``Ses01F_impro01_F000``."""
    if row["gender"] not in SPEAKERS or not row["segment_id"].isdecimal():
        raise CorpusError(f"{where}: gender must be F or M and segment_id a number; mend that line")
    return f"{row['video_id']}_{row['gender']}{int(row['segment_id']):03d}"


def _speaker(turn: str) -> str:
    return SPEAKERS[turn.rsplit("_", 1)[1][0]]


def _label(code: str, *, where: str) -> str | None:
    if code not in EMOTIONS and code not in OTHERS:
        raise CorpusError(
            f"{where}: unknown emotion '{code}'; IEMOCAP has {', '.join((*EMOTIONS, *OTHERS))}"
        )
    return EMOTIONS.get(code)
