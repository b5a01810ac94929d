"""Reads corpora of text without audio: GoEmotions and EmoryNLP."""

import re
from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    LABELS,
    Dialogue,
    LabelledUtterance,
    Split,
    TableRow,
    normalise_text,
    read_rows,
    read_tabbed,
    read_utf8,
    require_file,
)
from stream_hbaf.errors import CorpusError

# Placeholders of names in GoEmotions, and names in their place: speakers say names.
GOEMOTIONS_MASKS = {"[NAME]": "Alex", "[RELIGION]": "Christian"}
EMORYNLP_COLUMNS = (
    "Utterance",
    "Speaker",
    "Emotion",
    "Scene_ID",
    "Utterance_ID",
    "Season",
    "Episode",
)
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
Scene = tuple[int, int, int]  # season, episode, scene


def read_goemotions(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of GoEmotions, comments of an internet forum (Demszky et al. 2020), each a
    dialogue of its own.

    Read as its authors give it, mapped to Ekman's six emotions and neutral: ``{split}.tsv`` of
    text, label indices and id, and ``labels.txt``, which names the indices line by line. A comment
    with several labels has none unless all but neutral name one emotion. Raises CorpusError with
    file and line for a line that isn't text, indices and id, an index that labels.txt doesn't name,
    or an id that occurs twice.
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


def read_emorynlp(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of EmoryNLP, dialogues of a television series (Zahiri and Choi 2018).

    Read as its authors give it, ``emorynlp_{split}_final.csv``; a scene is a dialogue, its
    utterances in the order in which they were spoken. The series is MELD's: whoever trains on this
    and tests on MELD must hold out the scenes that both have (training/text_augment.py). Raises
    CorpusError with file and line for a missing column, an unknown emotion, a number that is none,
    or an utterance that occurs twice.
    """
    path = require_file(folder / f"emorynlp_{split}_final.csv", corpus="EmoryNLP")
    scenes: dict[Scene, dict[int, LabelledUtterance]] = {}
    for where, row in read_rows(read_utf8(path), path=path, columns=EMORYNLP_COLUMNS):
        scene, turn = _emorynlp_place(row, where=where)
        turns = scenes.setdefault(scene, {})
        if turn in turns:
            raise CorpusError(f"{where}: utterance {turn} of its scene stands here twice")
        turns[turn] = LabelledUtterance(
            id=f"{_scene_name(scene)}_utt{turn}",
            speaker=" and ".join(re.findall(r"""['"]([^,]+)['"]""", row["Speaker"])),
            text=normalise_text(row["Utterance"]),
            label=_emorynlp_label(row, where=where),
        )
    return [
        Dialogue(f"{split}/{_scene_name(scene)}", tuple(turns[turn] for turn in sorted(turns)))
        for scene, turns in sorted(scenes.items())
    ]


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


def _scene_name(scene: Scene) -> str:
    return "s{}e{}_scene{}".format(*scene)


def _emorynlp_label(row: TableRow, *, where: str) -> str | None:
    label = row["Emotion"].strip().lower()
    if label not in EMORYNLP_EMOTIONS:
        raise CorpusError(
            f"{where}: unknown emotion '{label}'; EmoryNLP has {', '.join(EMORYNLP_EMOTIONS)}"
        )
    return EMORYNLP_EMOTIONS[label]


def _emorynlp_place(row: TableRow, *, where: str) -> tuple[Scene, int]:
    try:
        scene = int(row["Season"]), int(row["Episode"]), int(row["Scene_ID"])
        return scene, int(row["Utterance_ID"])
    except ValueError:
        raise CorpusError(
            f"{where}: Season, Episode, Scene_ID and Utterance_ID must be numbers"
        ) from None
