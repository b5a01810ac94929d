"""A recorded corpus: labelled dialogues, the one shape that every reader gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stream_hbaf.errors import CorpusError

# Alphabetical; the order of every probability vector in this project.
LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class LabelledUtterance:
    """What one speaker said, and the emotion that annotators heard; audio where it is to be had."""

    id: str
    speaker: str
    text: str
    label: str  # one of LABELS
    audio: Path | None = None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Utterances in the order in which they were spoken."""

    id: str
    utterances: tuple[LabelledUtterance, ...]


def require_file(path: Path, *, corpus: str) -> Path:
    """Return ``path``, or raise CorpusError that says which corpus expected it."""
    if not path.is_file():
        raise CorpusError(f"{corpus}: {path} is missing; put the corpus there or correct --corpora")
    return path


def require_folder(path: Path, *, corpus: str, holds: str) -> Path:
    """Return ``path``, or raise CorpusError that says what ought to be in it."""
    if not path.is_dir():
        raise CorpusError(
            f"{corpus}: folder {path} is missing; it should hold {holds}; correct --corpora"
        )
    return path
