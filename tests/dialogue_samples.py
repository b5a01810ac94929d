"""A sample dialogue, and a recorded session of it, for the tests of the dashboard."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stream_hbaf.audio.file import read_audio
from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import (
    Contributions,
    Emotion,
    Info,
    Latency,
    Model,
    Utterance,
)
from stream_hbaf.sessions.format import Header
from stream_hbaf.sessions.writer import SessionWriter

LABELS = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
MODEL = Model(id="live-en", sha256="0" * 64)
INFO = Info(version="0", model=MODEL, labels=LABELS, licence="MIT", sources=["ann", "ben"])
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
HEADER = Header(
    id="20261121T120000Z-abcdef",
    began=NOON.isoformat(),
    model=MODEL,
    labels=tuple(LABELS),
    settings={},
    versions={},
)


def utterance(
    turn: int,
    label: str = "joy",
    *,
    score: float = 0.7,
    dialogue: str = "d",
    source: str = "ann",
    at_s: float | None = None,
    **more: Any,
) -> Utterance:
    """An ``end`` of one second; the other labels share the rest of the probability."""
    begins = 2.0 * turn if at_s is None else at_s
    rest = (1 - score) / (len(LABELS) - 1)
    shares = {one: score if one == label else rest for one in LABELS}
    fields: dict[str, Any] = {
        "id": f"{dialogue}-{turn}",
        "rev": 3,
        "type": "end",
        "source": source,
        "dialogue_id": dialogue,
        "turn": turn,
        "speaker": source.capitalize(),
        "start_time": (NOON + timedelta(seconds=begins)).isoformat(),
        "end_time": (NOON + timedelta(seconds=begins + 1)).isoformat(),
        "audio_start_ms": 1000 * begins,
        "audio_end_ms": 1000 * (begins + 1),
        "trigger": "silence",
        "text": f"Sentence {turn}.",
        "language": "en",
        "modalities": ["audio", "text"],
        "emotion": Emotion(label=label, score=score, set=[label], probabilities=shares),
        "contributions": Contributions(audio=0.3, text=-0.1, context=0.05),
        "conflict": False,
        "latency_ms": Latency(
            vad=600, transcript=5, acoustic=4, text=3, classify=2, publish=1, total=612
        ),
        "model": MODEL,
    }
    return Utterance(**fields | more)


def record_session(folder: Path, recording: Path, *, utterances: list[Utterance]) -> Path:
    """Record a session of one source, ``ann``, with the audio of a file; returns its folder."""
    writer = SessionWriter(folder, header=HEADER)
    sound = read_audio(recording)
    length_s = len(sound) / SAMPLE_RATE_HZ
    # As if its first sample had been captured at noon.
    captured_at = time.monotonic() - time.time() + NOON.timestamp() + length_s
    writer.write_audio("ann", Chunk(start=0, samples=sound, captured_at=captured_at))
    for one in utterances:
        writer.write_event(one)
    writer.close()
    return writer.folder
