"""Reads corpora of clips, each a dialogue of one utterance: RAVDESS, TESS, nEMO, corpora that come
as a table of clips (SAVEE, ASED, EmoSpeech-India; LibriSpeech's readers, who act no emotion), and
ShEMO, of which embeddings are published.

Readers take a corpus's folder as its authors give it, and a split. They raise CorpusError for a
file that is missing, and with file and line for what can't be read.
"""

from functools import partial
from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    LABELS,
    SPLITS,
    Dialogue,
    LabelledUtterance,
    Split,
    normalise_text,
    read_embeddings,
    read_label,
    read_rows,
    read_tabbed,
    read_utf8,
    require_file,
    require_folder,
)
from stream_hbaf.errors import CorpusError, shorten

SUFFIXES = (".flac", ".wav")
# By code, from "01" on. RAVDESS's calm, "02", counts as neutral: there is no eighth label, and
# listeners confuse the two.
RAVDESS_ORDER = ("neutral", "neutral", "joy", "sadness", "anger", "fear", "disgust", "surprise")
RAVDESS_EMOTIONS = {f"{code:02}": name for code, name in enumerate(RAVDESS_ORDER, start=1)}
RAVDESS_STATEMENTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
RAVDESS_INTENSITIES = {"01": False, "02": True}  # normal, strong
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

    A clip's name is modality-channel-emotion-intensity-statement-repetition-actor.
    """
    require_folder(folder, corpus="RAVDESS", holds="Actor_01 … Actor_24")
    dialogues = []
    for actor in RAVDESS_ACTORS[split]:
        place = require_folder(
            folder / f"Actor_{actor:02d}", corpus="RAVDESS", holds="03-01-….flac clips"
        )
        for clip in _clips(place, "*", corpus="RAVDESS"):
            match clip.stem.split("-"):
                case [_, _, emotion, intensity, statement, _, actor_code] if (
                    emotion in RAVDESS_EMOTIONS and statement in RAVDESS_STATEMENTS
                ):
                    label, text = RAVDESS_EMOTIONS[emotion], RAVDESS_STATEMENTS[statement]
                    excited = label != "neutral"  # who is strongly calm isn't more aroused
                    strong = RAVDESS_INTENSITIES.get(intensity) if excited else None
                    speaker = f"Actor_{actor_code}"
                    dialogues.append(_one_clip(clip, speaker, text, label, strong=strong))
                case _:
                    raise CorpusError(
                        f"RAVDESS: {clip}: the name isn't seven two-digit fields such as "
                        "03-01-05-01-02-01-12; remove or rename the file"
                    )
    return dialogues


def read_tess(folder: Path, split: Split) -> list[Dialogue]:
    """Read TESS: two women saying "Say the word …" (Pichora-Fuller and Dupuis 2020).

    A clip's name is speaker_word_emotion. All are train: two speakers can't be divided into splits.
    """
    if split != "train":
        return []
    require_folder(folder, corpus="TESS", holds="folders such as oaf_angry")
    dialogues = []
    for clip in _clips(folder, "*/*", corpus="TESS"):
        match clip.stem.split("_"):
            case [speaker, word, emotion] if speaker in TESS_SPEAKERS and emotion in TESS_EMOTIONS:
                text = f"Say the word {word}."
                dialogues.append(_one_clip(clip, speaker, text, TESS_EMOTIONS[emotion]))
            case _:
                raise CorpusError(
                    f"TESS: {clip}: the name isn't one such as OAF_back_angry with one of the "
                    f"emotions {', '.join(TESS_EMOTIONS)}; remove or rename the file"
                )
    return dialogues


def read_nemo(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split of nEMO: nine Polish actors, everyday sentences (Christop 2024).

    ``data.tsv`` names each clip, its emotion, actor, gender and text; the speaker is
    "<actor> <gender>".
    """
    path = require_file(folder / "data.tsv", corpus="nEMO")
    rows = read_tabbed(path, columns=len(NEMO_COLUMNS))
    if rows and rows[0][1] != NEMO_COLUMNS:
        raise CorpusError(
            f"{rows[0][0]}: the first line must be {', '.join(NEMO_COLUMNS)}, with tabs between"
        )
    actors = [actor for actors in NEMO_ACTORS.values() for actor in actors]
    dialogues = []
    for where, (name, emotion, actor, gender, text) in rows[1:]:
        label = read_label(emotion, NEMO_EMOTIONS, corpus="nEMO", where=where)
        if actor not in actors:
            raise CorpusError(f"{where}: unknown actor '{actor}'; choose {', '.join(actors)}")
        clip = folder / name
        if not clip.is_file():
            raise CorpusError(f"{where}: {clip} is missing; unpack the corpus again")
        if actor in NEMO_ACTORS[split]:
            dialogues.append(_one_clip(clip, f"{actor} {gender}", normalise_text(text), label))
    return dialogues


CLIP_TABLE = "clips.csv"
CLIP_COLUMNS = ("file", "speaker", "split")


def read_clip_table(
    folder: Path, split: Split, *, corpus: str, label: str | None = None
) -> list[Dialogue]:
    """Read one split of a folder of clips and ``clips.csv``, which lists them in UTF-8.

    A row is a clip: its ``file``, a path in the folder, ``speaker``, ``split``, and ``label`` (one
    of LABELS) unless all clips have the same ``label``; ``sex`` (male, female) may be there and
    stands behind the speaker's name. Texts are empty, since what was said isn't known.
    A speaker who is in two splits is an error: dev and test would be of voices known from train.
    """
    require_folder(folder, corpus=corpus, holds=CLIP_TABLE)
    path = require_file(folder / CLIP_TABLE, corpus=corpus)
    labels = {label: label for label in LABELS}
    found: dict[str, Dialogue] = {}
    splits: dict[str, str] = {}  # of each speaker
    columns = CLIP_COLUMNS if label else (*CLIP_COLUMNS, "label")
    for where, row in read_rows(read_utf8(path), path=path, columns=columns):
        name, speaker = row["file"], " ".join((row["speaker"], row.get("sex", ""))).strip()
        own = label or read_label(row["label"], labels, corpus=corpus, where=where)
        if row["split"] not in SPLITS:
            raise CorpusError(
                f"{where}: unknown split '{shorten(row['split'])}'; choose {', '.join(SPLITS)}"
            )
        if splits.setdefault(speaker, row["split"]) != row["split"]:
            raise CorpusError(
                f"{where}: speaker {shorten(speaker)} is in {splits[speaker]} already; "
                "put all clips of a speaker into one split"
            )
        clip = folder / name
        if clip.stem in found:  # the name of its dialogue
            raise CorpusError(f"{where}: clip {shorten(clip.stem)} stands here twice; remove one")
        if not clip.is_file():
            raise CorpusError(f"{where}: {shorten(str(clip))} is missing; unpack the corpus again")
        found[clip.stem] = _one_clip(clip, speaker, "", own)
    return [d for d in found.values() if splits[d.utterances[0].speaker] == split]


read_savee = partial(read_clip_table, corpus="SAVEE")
read_ased = partial(read_clip_table, corpus="ASED")
read_emospeech_india = partial(read_clip_table, corpus="EmoSpeech-India")
read_librispeech = partial(read_clip_table, corpus="LibriSpeech", label="neutral")


def read_shemo(folder: Path, split: Split) -> list[Dialogue]:
    """Read ShEMO (Mohamad Nezami et al. 2019) as ``ge2e.npz``: the arrays ``name``, ``speaker``,
    ``label`` and ``embedding`` [N, 256] of its utterances. All are train: no audio, no texts.
    """
    if split != "train":
        return []
    path = require_file(folder / "ge2e.npz", corpus="ShEMO")
    arrays = read_embeddings(path, beside=("speaker", "label"))
    labels = {label: label for label in LABELS}
    found: dict[str, Dialogue] = {}
    for name, speaker, label, embedding in zip(*arrays, strict=True):
        own = read_label(label, labels, corpus="ShEMO", where=f"{path}: {shorten(name)}")
        utterance = LabelledUtterance(name, speaker, "", own, ge2e=embedding)
        found[name] = Dialogue(name, (utterance,))
    return list(found.values())


def _clips(folder: Path, pattern: str, *, corpus: str) -> list[Path]:
    clips = sorted(clip for clip in folder.glob(pattern) if clip.suffix.lower() in SUFFIXES)
    if not clips:
        raise CorpusError(
            f"{corpus}: {folder} holds no {pattern}.flac or {pattern}.wav clips; unpack it again"
        )
    return clips


def _one_clip(
    clip: Path, speaker: str, text: str, label: str, *, strong: bool | None = None
) -> Dialogue:
    own = LabelledUtterance(clip.stem, speaker, text, label, clip, strong=strong)
    return Dialogue(clip.stem, (own,))
