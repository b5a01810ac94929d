"""A recorded corpus: nEMO, nine Polish actors speaking everyday sentences (Christop 2024).

Read as it is published: ``data.tsv``, which names each clip, its emotion, actor, gender and text.
"""

from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    Dialogue,
    LabelledUtterance,
    Split,
    read_tabbed,
    require_file,
)
from stream_hbaf.corpora.meld import repair
from stream_hbaf.errors import CorpusError

COLUMNS = ["file_id", "emotion", "speaker_id", "gender", "text"]
EMOTIONS = {
    "anger": "anger",
    "fear": "fear",
    "happiness": "joy",
    "neutral": "neutral",
    "sadness": "sadness",
    "surprised": "surprise",
}
ACTORS: dict[Split, tuple[str, ...]] = {
    "train": ("IC0", "KD0", "KS0", "SM0"),
    "dev": ("MP0",),
    "test": ("TP0",),
}
EVERY = tuple(actor for actors in ACTORS.values() for actor in actors)


def read_nemo(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split's clips, each a dialogue of its own; the speaker is "<actor> <gender>".

    Actors IC0, KD0, KS0 and SM0 train, MP0 dev, TP0 test. Raises CorpusError with file and line
    for another header, a broken line, an unknown emotion or actor, or a clip that is missing.
    """
    path = require_file(folder / "data.tsv", corpus="nEMO")
    dialogues = []
    for number, (where, cells) in enumerate(read_tabbed(path, columns=len(COLUMNS))):
        if number == 0:
            if cells != COLUMNS:
                raise CorpusError(f"{where}: the first line must be {', '.join(COLUMNS)}, by tabs")
            continue
        said = _utterance(folder, cells, where=where)
        if said.speaker.split()[0] in ACTORS[split]:
            dialogues.append(Dialogue(said.id, (said,)))
    return dialogues


def _utterance(folder: Path, cells: list[str], *, where: str) -> LabelledUtterance:
    name, emotion, actor, gender, text = cells
    if emotion not in EMOTIONS:
        raise CorpusError(f"{where}: unknown emotion '{emotion}'; nEMO has {', '.join(EMOTIONS)}")
    if actor not in EVERY:
        raise CorpusError(f"{where}: unknown actor '{actor}'; choose {', '.join(EVERY)}")
    clip = folder / name
    if not clip.is_file():
        raise CorpusError(f"{where}: {clip} is missing; unpack the corpus again")
    return LabelledUtterance(
        id=clip.stem,
        speaker=f"{actor} {gender}",
        text=repair(text),
        label=EMOTIONS[emotion],
        audio=clip,
    )
