"""Reads MELD, dialogues of a television series (Poria et al. 2019).

Its files are expected as people download them: the authors' ``{train,dev,test}_sent_emo.csv``;
beside them, if they are there, the release's folders of clips and the published tables of prosody.
All may also stand in ``MELD.Raw/``, and there in a folder of their split, as the release's archives
unpack.
"""

import math
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
    read_text,
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
