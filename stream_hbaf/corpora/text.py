"""Reads corpora of text: MELD (with its clips, where there are any), EmoryNLP, GoEmotions."""

import math
import re
from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    LABELS,
    Dialogue,
    LabelledUtterance,
    Split,
    TableRow,
    normalise_text,
    read_measurements,
    read_rows,
    read_tabbed,
    read_text,
    read_utf8,
    require_file,
)
from stream_hbaf.errors import CorpusError
from stream_hbaf.features.prosody import PROSODY

COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
CLIPS: dict[Split, str] = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
UNMEASURED = (math.nan,) * len(PROSODY)


def read_meld(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split; utterances stand in the order in which they were spoken.

    Where the split's clip folder exists every utterance names its clip, also one that is missing
    there: feature extraction then says so. Where its prosody table exists every utterance has eight
    measurements. Raises CorpusError with file and line for a missing column, an unknown emotion, a
    number that is none, or an utterance that stands there twice.
    """
    path = _find(folder, f"{split}_sent_emo.csv", split=split)
    path = require_file(path or folder / f"{split}_sent_emo.csv", corpus="MELD")
    clips = _find(folder, CLIPS[split], split=split)
    prosody = _read_prosody(_find(folder, f"prosody_{split}.csv", split=split))
    utterances: dict[int, dict[int, LabelledUtterance]] = {}
    for where, row in read_rows(read_text(path), path=path, columns=COLUMNS):
        dialogue, turn = _place(row, where=where)
        turns = utterances.setdefault(dialogue, {})
        if turn in turns:
            raise CorpusError(f"{where}: utterance {turn} of dialogue {dialogue} stands here twice")
        name = f"dia{dialogue}_utt{turn}"
        turns[turn] = LabelledUtterance(
            id=name,
            speaker=normalise_text(row["Speaker"]),
            text=normalise_text(row["Utterance"]),
            label=_label(row, where=where),
            audio=clips / f"{name}.mp4" if clips else None,
            prosody=None if prosody is None else prosody.get(name, UNMEASURED),
        )
    return [
        Dialogue(f"{split}/dia{dialogue}", tuple(turns[turn] for turn in sorted(turns)))
        for dialogue, turns in sorted(utterances.items())
    ]


def _find(folder: Path, name: str, *, split: Split) -> Path | None:
    places = (folder, folder / split, folder / "MELD.Raw", folder / "MELD.Raw" / split)
    return next((place / name for place in places if (place / name).exists()), None)


def _label(row: TableRow, *, where: str) -> str:
    label = row["Emotion"].strip().lower()
    if label not in LABELS:
        raise CorpusError(f"{where}: unknown emotion '{label}'; MELD has {', '.join(LABELS)}")
    return label


def _place(row: TableRow, *, where: str) -> tuple[int, int]:
    try:
        return int(row["Dialogue_ID"]), int(row["Utterance_ID"])
    except ValueError:
        raise CorpusError(f"{where}: Dialogue_ID and Utterance_ID must be numbers") from None


def _read_prosody(path: Path | None) -> dict[str, tuple[float, ...]] | None:
    """Measurements by utterance; the table names them by clip, such as ``dia12_utt3.wav``."""
    if path is None:
        return None
    rows = read_rows(read_text(path), path=path, columns=("filename", *PROSODY))
    return {Path(row["filename"]).stem: read_measurements(row, where=where) for where, row in rows}


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
