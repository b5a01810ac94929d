"""A recorded corpus: MELD, dialogues of a television series (Poria et al. 2019), text only.

Read from the authors' own ``{train,dev,test}_sent_emo.csv``.
"""

import csv
from pathlib import Path

from stream_hbaf.corpora.dialogue import LABELS, Dialogue, LabelledUtterance, Split, require_file
from stream_hbaf.errors import CorpusError

COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")

# Some copies of MELD went through Windows-1252 and back: punctuation stands there as C1 controls.
C1_PUNCTUATION = {
    code: bytes([code]).decode("cp1252")
    for code in range(0x80, 0xA0)
    if code not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # undefined in Windows-1252
}
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "..."})


def read_meld(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split; utterances stand in the order in which they were spoken.

    Raises CorpusError with file and line for a missing column, an unknown emotion, a number that
    is none, or an utterance that stands there twice.
    """
    path = require_file(folder / f"{split}_sent_emo.csv", corpus="MELD")
    utterances: dict[int, dict[int, LabelledUtterance]] = {}
    for where, row in _rows(path):
        label = row["Emotion"].strip().lower()
        if label not in LABELS:
            raise CorpusError(f"{where}: unknown emotion '{label}'; MELD has {', '.join(LABELS)}")
        try:
            dialogue, turn = int(row["Dialogue_ID"]), int(row["Utterance_ID"])
        except ValueError:
            raise CorpusError(f"{where}: Dialogue_ID and Utterance_ID must be numbers") from None
        turns = utterances.setdefault(dialogue, {})
        if turn in turns:
            raise CorpusError(f"{where}: utterance {turn} of dialogue {dialogue} stands here twice")
        turns[turn] = LabelledUtterance(
            id=f"dia{dialogue}_utt{turn}",
            speaker=repair(row["Speaker"]),
            text=repair(row["Utterance"]),
            label=label,
        )
    return [
        Dialogue(f"{split}/dia{dialogue}", tuple(turns[turn] for turn in sorted(turns)))
        for dialogue, turns in sorted(utterances.items())
    ]


def repair(text: str) -> str:
    """Undo broken encodings and typographic quotes: Whisper writes plain ones, and so must we."""
    return " ".join(text.translate(C1_PUNCTUATION).translate(PLAIN).split())


def _rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """All rows with ``file:line``; bytes that aren't UTF-8 are read as Windows-1252."""
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        content = raw.decode("cp1252", errors="replace")
    # Not splitlines(): it would also split at \x85, a mis-encoded ellipsis.
    reader = csv.reader(content.replace("\r\n", "\n").split("\n"))
    header = next(reader, [])
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise CorpusError(f"{path}:1: column '{missing[0]}' is missing; is this MELD's own file?")
    rows = []
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise CorpusError(
                f"{where}: {len(cells)} cells instead of {len(header)}; mend that line's quotes"
            )
        rows.append((where, dict(zip(header, cells, strict=True))))
    return rows
