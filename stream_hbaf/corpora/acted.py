"""Reads corpora of acted clips, each a dialogue of one utterance: RAVDESS, TESS and nEMO."""

from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    Dialogue,
    LabelledUtterance,
    Split,
    normalise_text,
    read_tabbed,
    require_file,
    require_folder,
)
from stream_hbaf.errors import CorpusError

SUFFIXES = (".flac", ".wav")

# RAVDESS's calm counts as neutral: there is no eighth label, and listeners confuse the two.
RAVDESS_EMOTIONS = {
    "01": "neutral",
    "02": "neutral",
    "03": "joy",
    "04": "sadness",
    "05": "anger",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}
RAVDESS_STATEMENTS = {
    "01": "Kids are talking by the door.",
    "02": "Dogs are sitting by the door.",
}
RAVDESS_ACTORS: dict[Split, range] = {
    "train": range(1, 19),
    "dev": range(19, 21),
    "test": range(21, 25),
}
TESS_EMOTIONS = {
    "angry": "anger",
    "disgust": "disgust",
    "fear": "fear",
    "happy": "joy",
    "neutral": "neutral",
    "ps": "surprise",  # pleasant surprise
    "sad": "sadness",
}
TESS_SPEAKERS = ("OAF", "YAF")  # an older and a younger woman
NEMO_COLUMNS = ["file_id", "emotion", "speaker_id", "gender", "text"]
NEMO_EMOTIONS = {
    "anger": "anger",
    "fear": "fear",
    "happiness": "joy",
    "neutral": "neutral",
    "sadness": "sadness",
    "surprised": "surprise",
}
NEMO_ACTORS: dict[Split, tuple[str, ...]] = {
    "train": ("IC0", "KD0", "KS0", "SM0"),
    "dev": ("MP0",),
    "test": ("TP0",),
}


def read_ravdess(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of RAVDESS: 24 actors, two sentences (Livingstone and Russo 2018).

    Actors 01-18 train, 19-20 dev, 21-24 test. Raises CorpusError if an actor of the split is
    missing or a file's name isn't one of RAVDESS's speech clips.
    """
    require_folder(folder, corpus="RAVDESS", holds="Actor_01 … Actor_24")
    dialogues = []
    for actor in RAVDESS_ACTORS[split]:
        place = require_folder(
            folder / f"Actor_{actor:02d}", corpus="RAVDESS", holds="03-01-….flac clips"
        )
        clips = sorted(clip for clip in place.iterdir() if clip.suffix.lower() in SUFFIXES)
        if not clips:
            raise CorpusError(f"RAVDESS: {place} holds no .flac or .wav clips; unpack it again")
        dialogues += [_one_clip(_ravdess_clip(clip)) for clip in clips]
    return dialogues


def read_tess(folder: Path, split: Split) -> list[Dialogue]:
    """Read TESS: two women saying "Say the word …" (Pichora-Fuller and Dupuis 2020).

    All clips are train: two speakers can't be divided into splits. Raises CorpusError if there are
    no clips or a file's name isn't one of TESS's.
    """
    if split != "train":
        return []
    require_folder(folder, corpus="TESS", holds="folders such as oaf_angry")
    clips = sorted(clip for clip in folder.glob("*/*") if clip.suffix.lower() in SUFFIXES)
    if not clips:
        raise CorpusError(f"TESS: {folder} holds no */*.flac or */*.wav clips; unpack it again")
    return [_one_clip(_tess_clip(clip)) for clip in clips]


def read_nemo(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of nEMO: nine Polish actors, everyday sentences (Christop 2024).

    ``data.tsv`` names each clip, its emotion, actor, gender and text; the speaker is
    "<actor> <gender>". Actors IC0, KD0, KS0 and SM0 train, MP0 dev, TP0 test. Raises CorpusError
    with file and line for another header, a broken line, an unknown emotion or actor, or a clip
    that is missing.
    """
    path = require_file(folder / "data.tsv", corpus="nEMO")
    rows = read_tabbed(path, columns=len(NEMO_COLUMNS))
    if rows and rows[0][1] != NEMO_COLUMNS:
        raise CorpusError(
            f"{rows[0][0]}: the first line must be {', '.join(NEMO_COLUMNS)}, with tabs between"
        )
    utterances = [_nemo_clip(folder, cells, where=where) for where, cells in rows[1:]]
    return [_one_clip(one) for one in utterances if one.speaker.split()[0] in NEMO_ACTORS[split]]


def _one_clip(utterance: LabelledUtterance) -> Dialogue:
    return Dialogue(utterance.id, (utterance,))


def _ravdess_clip(clip: Path) -> LabelledUtterance:
    """Read modality-channel-emotion-intensity-statement-repetition-actor from the file's name."""
    fields = clip.stem.split("-")
    if len(fields) != 7 or fields[2] not in RAVDESS_EMOTIONS or fields[4] not in RAVDESS_STATEMENTS:
        raise CorpusError(
            f"RAVDESS: {clip}: the name isn't seven two-digit fields such as "
            "03-01-05-01-02-01-12; remove or rename the file"
        )
    return LabelledUtterance(
        id=clip.stem,
        speaker=f"Actor_{fields[6]}",
        text=RAVDESS_STATEMENTS[fields[4]],
        label=RAVDESS_EMOTIONS[fields[2]],
        audio=clip,
    )


def _tess_clip(clip: Path) -> LabelledUtterance:
    """Read speaker_word_emotion from the file's name."""
    fields = clip.stem.split("_")
    if len(fields) != 3 or fields[0] not in TESS_SPEAKERS or fields[2] not in TESS_EMOTIONS:
        raise CorpusError(
            f"TESS: {clip}: the name isn't one such as OAF_back_angry with one of the emotions "
            f"{', '.join(TESS_EMOTIONS)}; remove or rename the file"
        )
    speaker, word, emotion = fields
    return LabelledUtterance(
        id=clip.stem,
        speaker=speaker,
        text=f"Say the word {word}.",
        label=TESS_EMOTIONS[emotion],
        audio=clip,
    )


def _nemo_clip(folder: Path, cells: list[str], *, where: str) -> LabelledUtterance:
    name, emotion, actor, gender, text = cells
    if emotion not in NEMO_EMOTIONS:
        raise CorpusError(
            f"{where}: unknown emotion '{emotion}'; nEMO has {', '.join(NEMO_EMOTIONS)}"
        )
    actors = [actor for actors in NEMO_ACTORS.values() for actor in actors]
    if actor not in actors:
        raise CorpusError(f"{where}: unknown actor '{actor}'; choose {', '.join(actors)}")
    clip = folder / name
    if not clip.is_file():
        raise CorpusError(f"{where}: {clip} is missing; unpack the corpus again")
    return LabelledUtterance(
        id=clip.stem,
        speaker=f"{actor} {gender}",
        text=normalise_text(text),
        label=NEMO_EMOTIONS[emotion],
        audio=clip,
    )
