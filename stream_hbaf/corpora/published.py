"""Reads published corpora of dialogues and of texts: MELD, EmoryNLP and GoEmotions.

Readers take a corpus's folder as its authors give it, and a split. They raise CorpusError for a
file that is missing, and with file and line for what can't be read: a missing column, an unknown
emotion, a number that is none, an utterance that occurs twice.
"""

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    LABELS,
    UNMEASURED,
    Dialogue,
    LabelledUtterance,
    Split,
    TableRow,
    normalise_text,
    read_label,
    read_measurements,
    read_rows,
    read_tabbed,
    read_text,
    read_utf8,
    require_file,
)
from stream_hbaf.errors import CorpusError
from stream_hbaf.features.prosody import PROSODY

# ---- MELD and EmoryNLP, dialogues of a television series

MELD_EMOTIONS = dict(zip(LABELS, LABELS, strict=True))
MELD_NUMBERS = ("Dialogue_ID", "Utterance_ID")
MELD_CLIPS: dict[Split, str] = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
TIME = re.compile(r"(\d+):(\d+):(\d+)[,.](\d{3})")
EMORYNLP_NUMBERS = ("Season", "Episode", "Scene_ID", "Utterance_ID")
# Peaceful and powerful are moods of either valence: none of the seven labels.
EMORYNLP_EMOTIONS: dict[str, str | None] = {
    "joyful": "joy",
    "mad": "anger",
    "neutral": "neutral",
    "peaceful": None,
    "powerful": None,
    "sad": "sadness",
    "scared": "fear",
}


def read_meld(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of MELD; utterances stand in the order in which they were spoken.

    Where the split's clip folder exists every utterance names its clip, also one that is missing
    there: feature extraction then says so. Where its prosody table exists every utterance has eight
    measurements.
    """
    places = (folder, folder / split, folder / "MELD.Raw", folder / "MELD.Raw" / split)

    def find(name: str) -> Path | None:
        return next((place / name for place in places if (place / name).exists()), None)

    def utterance(row: TableRow, name: str, where: str) -> LabelledUtterance:
        return LabelledUtterance(
            id=name,
            speaker=normalise_text(row["Speaker"]),
            text=normalise_text(row["Utterance"]),
            label=read_label(row["Emotion"], MELD_EMOTIONS, corpus="MELD", where=where),
            audio=clips / f"{name}.mp4" if clips else None,
            prosody=None if prosody is None else prosody.get(name, UNMEASURED),
            length_s=_length_s(row.get("StartTime", ""), row.get("EndTime", "")),
        )

    table = f"{split}_sent_emo.csv"
    path = require_file(find(table) or folder / table, corpus="MELD")
    columns = ("Utterance", "Speaker", "Emotion", *MELD_NUMBERS)
    rows = read_rows(read_text(path), path=path, columns=columns)
    clips, prosody = find(MELD_CLIPS[split]), _read_prosody(find(f"prosody_{split}.csv"))
    return _read_scenes(rows, MELD_NUMBERS, split=split, name="dia{}", utterance=utterance)


def read_emorynlp(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of EmoryNLP (Zahiri and Choi 2018); a scene is a dialogue.

    The series is MELD's: whoever trains on this and tests on MELD must hold out the scenes that
    both have.
    """

    def utterance(row: TableRow, name: str, where: str) -> LabelledUtterance:
        return LabelledUtterance(
            id=name,
            speaker=" and ".join(re.findall(r"""['"]([^,]+)['"]""", row["Speaker"])),
            text=normalise_text(row["Utterance"]),
            label=read_label(row["Emotion"], EMORYNLP_EMOTIONS, corpus="EmoryNLP", where=where),
        )

    path = require_file(folder / f"emorynlp_{split}_final.csv", corpus="EmoryNLP")
    columns = ("Utterance", "Speaker", "Emotion", *EMORYNLP_NUMBERS)
    rows = read_rows(read_utf8(path), path=path, columns=columns)
    name = "s{}e{}_scene{}"
    return _read_scenes(rows, EMORYNLP_NUMBERS, split=split, name=name, utterance=utterance)


def _read_scenes(
    rows: Iterable[tuple[str, TableRow]],
    numbers: tuple[str, ...],
    *,
    split: Split,
    name: str,
    utterance: Callable[[TableRow, str, str], LabelledUtterance],
) -> list[Dialogue]:
    """Dialogues and their turns in the order of a table's columns ``numbers``.

    The last column numbers the turns, which ``utterance(row, id, where)`` reads; the others fill
    the dialogue's ``name``.
    """
    turns: dict[tuple[int, ...], LabelledUtterance] = {}
    for where, row in rows:
        try:
            place = tuple(int(row[column]) for column in numbers)
        except ValueError:
            named = f"{', '.join(numbers[:-1])} and {numbers[-1]}"
            raise CorpusError(f"{where}: {named} must be numbers") from None
        turn = f"{name.format(*place)}_utt{place[-1]}"
        if place in turns:
            raise CorpusError(f"{where}: utterance {turn} stands here twice; remove one")
        turns[place] = utterance(row, turn, where)
    return [
        Dialogue(f"{split}/{name.format(*scene)}", tuple(turns[place] for place in places))
        for scene, places in groupby(sorted(turns), key=lambda place: place[:-1])
    ]


def _length_s(start: str, end: str) -> float | None:
    """Seconds between two times such as ``00:14:38,127``; None for any that isn't one."""
    found = [TIME.fullmatch(time.strip()) for time in (start, end)]
    if not all(found):
        return None
    start_s, end_s = (
        int(time[1]) * 3600 + int(time[2]) * 60 + int(time[3]) + int(time[4]) / 1000
        for time in found
        if time
    )
    return end_s - start_s if end_s > start_s else None


def _read_prosody(path: Path | None) -> dict[str, tuple[float, ...]] | None:
    """Measurements by utterance; the table names them by clip, such as ``dia12_utt3.wav``."""
    if path is None:
        return None
    rows = read_rows(read_text(path), path=path, columns=("filename", *PROSODY))
    return {Path(row["filename"]).stem: read_measurements(row, where=where) for where, row in rows}


# ---- GoEmotions, comments of an internet forum

# Placeholders of names, and names in their place: speakers say names.
GOEMOTIONS_MASKS = {"[NAME]": "Alex", "[RELIGION]": "Christian"}


def read_goemotions(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of GoEmotions (Demszky et al. 2020), each comment a dialogue of its own.

    Read as mapped to Ekman's six emotions and neutral: ``{split}.tsv`` of text, label indices and
    id, and ``labels.txt``, which names the indices line by line. A comment with several labels has
    none unless all but neutral name one emotion.
    """
    names = _read_names(require_file(folder / "labels.txt", corpus="GoEmotions"))
    path = require_file(folder / f"{split}.tsv", corpus="GoEmotions")
    dialogues: dict[str, Dialogue] = {}
    for where, (text, indices, name) in read_tabbed(path, columns=3):
        if name in dialogues:
            raise CorpusError(f"{where}: comment {name} stands here twice; remove one")
        for mask, word in GOEMOTIONS_MASKS.items():
            text = text.replace(mask, word)
        label = _goemotions_label(indices, names=names, where=where)
        utterance = LabelledUtterance(id=name, speaker="", text=normalise_text(text), label=label)
        dialogues[name] = Dialogue(f"{split}/{name}", (utterance,))
    return list(dialogues.values())


def _read_names(path: Path) -> list[str]:
    names = read_utf8(path).split()
    for line, name in enumerate(names, start=1):
        if name not in LABELS:
            raise CorpusError(
                f"{path}:{line}: unknown emotion '{name}'; labels.txt must name those of "
                f"{', '.join(LABELS)}, one a line"
            )
    return names


def _goemotions_label(indices: str, *, names: list[str], where: str) -> str | None:
    try:
        labels = {names[int(index)] for index in indices.split(",") if int(index) >= 0}
    except (ValueError, IndexError):
        labels = set()
    if not labels:
        raise CorpusError(
            f"{where}: '{indices}' isn't a list of indices below {len(names)}, with commas "
            "between; mend that line or labels.txt"
        )
    emotions = labels - {"neutral"} or labels
    return emotions.pop() if len(emotions) == 1 else None
