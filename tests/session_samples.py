"""Sample events and chunks, for the tests of recorded sessions."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.source import Chunk
from stream_hbaf.events import DialogueSummary, Emotion, Model, Utterance
from stream_hbaf.sessions.format import Header

Samples = NDArray[np.int16]
T = TypeVar("T")

RECORDING = Path(__file__).parent / "recordings" / "jfk.flac"


def all_of(kind: type[T], found: Iterable[object]) -> list[T]:
    """What was found, all of which must be of one kind."""
    checked: list[T] = []
    for one in found:
        assert isinstance(one, kind)
        checked.append(one)
    return checked


def header(name: str = "20260101T120000Z-abcdef") -> Header:
    return Header(
        id=name,
        began="2026-01-01T12:00:00.000+00:00",
        model=Model(id="live-en", sha256="ab" * 32),
        labels=("anger", "joy", "neutral"),
        settings={},
        versions={},
    )


def chunk(samples: Samples, start: int, end: int, *, after_gap: bool = False) -> Chunk:
    return Chunk(start, samples[start:end], time.monotonic(), after_gap=after_gap)


def utterance(
    kind: str, *, turn: int = 1, dialogue: str = "d1", source: str = "a", start_ms: float = 1000.0
) -> Utterance:
    is_end = kind == "end"
    return Utterance(
        id=f"{dialogue}-{turn}",
        rev=2 if is_end else 1,
        type=kind,
        source=source,
        dialogue_id=dialogue,
        turn=turn,
        speaker={"a": "Ann", "b": "Ben"}[source],
        start_time="2026-01-01T12:00:01.000+00:00",
        end_time="2026-01-01T12:00:02.000+00:00" if is_end else None,
        audio_start_ms=start_ms,
        audio_end_ms=start_ms + 1000 if is_end else None,
        trigger="silence" if is_end else None,
        text="And so, my fellow Americans" if is_end else "",
        emotion=Emotion(label="joy", score=0.123456789, probabilities={"joy": 0.123456789})
        if is_end
        else None,
    )


def summary(source: str = "a") -> DialogueSummary:
    return DialogueSummary(
        source=source,
        dialogue_id="d1",
        start_time="2026-01-01T12:00:01.000+00:00",
        end_time="2026-01-01T12:00:02.000+00:00",
        turns=1,
        speakers={"Ann": "joy"},
        emotions={"joy": 1},
        probabilities={"joy": 1.0},
    )
