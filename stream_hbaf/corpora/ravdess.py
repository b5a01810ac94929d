"""A recorded corpus: RAVDESS, 24 actors speaking two sentences (Livingstone and Russo 2018)."""

from pathlib import Path

from stream_hbaf.corpora.dialogue import Dialogue, LabelledUtterance, Split, require_folder
from stream_hbaf.errors import CorpusError

# Calm is counted as neutral: there is no eighth label, and listeners confuse the two.
EMOTIONS = {
    "01": "neutral",
    "02": "neutral",
    "03": "joy",
    "04": "sadness",
    "05": "anger",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}
STATEMENTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
ACTORS: dict[Split, range] = {
    "train": range(1, 19),
    "dev": range(19, 21),
    "test": range(21, 25),
}
SUFFIXES = (".flac", ".wav")


def read_ravdess(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split's clips, each a dialogue of its own: RAVDESS has no conversations.

    Actors 01-18 train, 19-20 dev, 21-24 test. Raises CorpusError if an actor of the split is
    missing or a file's name isn't one of RAVDESS's speech clips.
    """
    require_folder(folder, corpus="RAVDESS", holds="Actor_01 … Actor_24")
    dialogues = []
    for actor in ACTORS[split]:
        clips = require_folder(
            folder / f"Actor_{actor:02d}", corpus="RAVDESS", holds="03-01-….flac clips"
        )
        found = sorted(clip for clip in clips.iterdir() if clip.suffix.lower() in SUFFIXES)
        if not found:
            raise CorpusError(f"RAVDESS: {clips} holds no .flac or .wav clips; unpack it again")
        dialogues += [Dialogue(clip.stem, (_utterance(clip),)) for clip in found]
    return dialogues


def _utterance(clip: Path) -> LabelledUtterance:
    """Read modality-channel-emotion-intensity-statement-repetition-actor from the file's name."""
    fields = clip.stem.split("-")
    if len(fields) != 7 or fields[2] not in EMOTIONS or fields[4] not in STATEMENTS:
        raise CorpusError(
            f"RAVDESS: {clip}: the name isn't seven two-digit fields such as "
            "03-01-05-01-02-01-12; remove or rename the file"
        )
    return LabelledUtterance(
        id=clip.stem,
        speaker=f"Actor_{fields[6]}",
        text=STATEMENTS[fields[4]],
        label=EMOTIONS[fields[2]],
        audio=clip,
    )
