"""A recorded corpus: TESS, two women saying "Say the word …" (Pichora-Fuller and Dupuis 2020)."""

from pathlib import Path

from stream_hbaf.corpora.dialogue import Dialogue, LabelledUtterance, Split, require_folder
from stream_hbaf.errors import CorpusError

EMOTIONS = {
    "angry": "anger",
    "disgust": "disgust",
    "fear": "fear",
    "happy": "joy",
    "neutral": "neutral",
    "ps": "surprise",  # pleasant surprise
    "sad": "sadness",
}
SPEAKERS = ("OAF", "YAF")  # an older and a younger woman
SUFFIXES = (".flac", ".wav")


def read_tess(folder: Path, split: Split) -> list[Dialogue]:
    """Read the clips, each a dialogue of its own. All are train: two voices can't be divided.

    Raises CorpusError if there are no clips or a file's name isn't one of TESS's.
    """
    if split != "train":
        return []
    require_folder(folder, corpus="TESS", holds="folders such as oaf_angry")
    clips = sorted(clip for clip in folder.glob("*/*") if clip.suffix.lower() in SUFFIXES)
    if not clips:
        raise CorpusError(f"TESS: {folder} holds no */*.flac or */*.wav clips; unpack it again")
    return [Dialogue(said.id, (said,)) for said in map(_utterance, clips)]


def _utterance(clip: Path) -> LabelledUtterance:
    """Read speaker_word_emotion from the file's name."""
    fields = clip.stem.split("_")
    if len(fields) != 3 or fields[0] not in SPEAKERS or fields[2] not in EMOTIONS:
        raise CorpusError(
            f"TESS: {clip}: the name isn't one such as OAF_back_angry with one of the emotions "
            f"{', '.join(EMOTIONS)}; remove or rename the file"
        )
    speaker, word, emotion = fields
    return LabelledUtterance(
        id=clip.stem,
        speaker=speaker,
        text=f"Say the word {word}.",
        label=EMOTIONS[emotion],
        audio=clip,
    )
