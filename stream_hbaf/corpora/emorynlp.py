"""A recorded corpus: EmoryNLP, dialogues of a television series (Zahiri and Choi 2018).

Read as its authors give it: ``emorynlp_{train,dev,test}_final.csv``. The series is MELD's: who
trains on this and tests on MELD must hold out the scenes that both have (training/words.py).
"""

import re
from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    Dialogue,
    LabelledUtterance,
    Row,
    Split,
    read_rows,
    read_utf8,
    require_file,
)
from stream_hbaf.corpora.meld import repair
from stream_hbaf.errors import CorpusError

COLUMNS = ("Utterance", "Speaker", "Emotion", "Scene_ID", "Utterance_ID", "Season", "Episode")
# Peaceful and powerful are moods of both valences' calm and drive: none of the seven.
EMOTIONS: dict[str, str | None] = {
    "joyful": "joy",
    "mad": "anger",
    "neutral": "neutral",
    "peaceful": None,
    "powerful": None,
    "sad": "sadness",
    "scared": "fear",
}
Scene = tuple[int, int, int]  # season, episode, scene


def read_emorynlp(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split; a scene is a dialogue, its utterances in the order in which they were spoken.

    Raises CorpusError with file and line for a missing column, an unknown emotion, a number that
    is none, or an utterance that stands there twice.
    """
    path = require_file(folder / f"emorynlp_{split}_final.csv", corpus="EmoryNLP")
    scenes: dict[Scene, dict[int, LabelledUtterance]] = {}
    for where, row in read_rows(read_utf8(path), path=path, columns=COLUMNS):
        scene, turn = _place(row, where=where)
        turns = scenes.setdefault(scene, {})
        if turn in turns:
            raise CorpusError(f"{where}: utterance {turn} of its scene stands here twice")
        turns[turn] = LabelledUtterance(
            id=f"{_name(scene)}_utt{turn}",
            speaker=" and ".join(re.findall(r"""['"]([^,]+)['"]""", row["Speaker"])),
            text=repair(row["Utterance"]),
            label=_label(row, where=where),
        )
    return [
        Dialogue(f"{split}/{_name(scene)}", tuple(turns[turn] for turn in sorted(turns)))
        for scene, turns in sorted(scenes.items())
    ]


def _name(scene: Scene) -> str:
    return "s{}e{}_scene{}".format(*scene)


def _label(row: Row, *, where: str) -> str | None:
    label = row["Emotion"].strip().lower()
    if label not in EMOTIONS:
        raise CorpusError(f"{where}: unknown emotion '{label}'; EmoryNLP has {', '.join(EMOTIONS)}")
    return EMOTIONS[label]


def _place(row: Row, *, where: str) -> tuple[Scene, int]:
    try:
        scene = int(row["Season"]), int(row["Episode"]), int(row["Scene_ID"])
        return scene, int(row["Utterance_ID"])
    except ValueError:
        raise CorpusError(
            f"{where}: Season, Episode, Scene_ID and Utterance_ID must be numbers"
        ) from None
