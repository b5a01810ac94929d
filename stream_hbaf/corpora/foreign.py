"""Corpora in others' forms come in: their clips become the lines of a manifest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stream_hbaf.corpora.dialogue import Row, Split
from stream_hbaf.corpora.exchange import write_table
from stream_hbaf.corpora.manifest import OPTIONAL, REQUIRED


@dataclass(frozen=True, slots=True)
class Foreign:
    """A labelled clip of somebody's; what isn't known of it is empty."""

    audio: Path
    split: Split
    id: str
    dialogue: str = ""  # without one it is a dialogue of its own
    speaker: str = ""
    text: str = ""
    label: str = ""
    start_s: float | None = None
    end_s: float | None = None


def pick(row: Row, *names: str) -> str:
    """The first of these cells that holds something."""
    return next((row[name] for name in names if row.get(name)), "")


def write_manifest(table: Path, clips: Sequence[Foreign]) -> int:
    """Write clips as a manifest, a dialogue's together; returns how many. Raises CorpusError."""
    dialogues: dict[tuple[str, str], list[Foreign]] = {}
    for clip in clips:
        dialogues.setdefault((clip.split, clip.dialogue or clip.id), []).append(clip)
    splits = Counter(name for _, name in dialogues)
    rows = [
        {
            "dialogue": name if splits[name] == 1 else f"{name}/{split}",
            "id": clip.id,
            "speaker": clip.speaker or "unknown",
            "text": clip.text,
            "label": clip.label,
            "split": split,
            "audio": clip.audio.resolve(),
            "start": clip.start_s,
            "end": clip.end_s,
        }
        for (split, name), turns in dialogues.items()
        for clip in turns
    ]
    write_table(table, columns=(*REQUIRED, *OPTIONAL), rows=rows)
    return len(rows)
