"""A source that gives sound and never speech is named, with what to check."""

import logging

import numpy as np
import pytest
from live_kit import EventLog, RandomChunks, recognise
from numpy.typing import NDArray

from stream_hbaf.audio.source import CANCELS
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import Health
from stream_hbaf.live import sound_monitor
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.recognizer import Recognizer

Sound = NDArray[np.int16]


def hints(log: EventLog) -> list[list[str]]:
    return [event.hints for event in log.events if isinstance(event, Health)]


def quiet_noise(seconds: int) -> Sound:
    noise = np.random.default_rng(0).normal(0, 300, seconds * SAMPLE_RATE_HZ)
    return noise.astype(np.int16)


SILENCE = (
    "test: nothing but silence in 3 s; check that it isn't muted, or choose another device or "
    "channel"
)


def test_silence_to_the_end_is_hinted_at(
    recognizer: Recognizer, caplog: pytest.LogCaptureFixture
) -> None:
    """In health and in the log, once, when the source ends."""
    log = EventLog()
    with caplog.at_level(logging.WARNING):
        recognise(recognizer, RandomChunks(np.zeros(48_000, np.int16), seed=1), [log])
    assert hints(log) == [[SILENCE]]
    assert caplog.messages == [SILENCE]


def test_sound_without_speech_is_hinted_at(recognizer: Recognizer) -> None:
    """The line has the highest speech score and the threshold."""
    log = EventLog()
    recognise(recognizer, RandomChunks(quiet_noise(3), seed=1), [log])
    [[line]] = hints(log)
    assert line.startswith("test: sound, but no speech found in 3 s (speech score at most 0.")
    assert line.endswith(
        ", vad.threshold 0.5); lower vad.threshold, or choose another device or channel"
    )


def test_speech_needs_no_hint(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """Nor does silence after it."""
    log = EventLog()
    sound = np.concatenate([sentences[1], np.zeros(48_000, np.int16)])
    recognise(recognizer, RandomChunks(sound, seed=1), [log])
    assert hints(log) == []


def test_hint_goes_when_somebody_speaks(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of silence are hinted at while they last."""
    monkeypatch.setattr(sound_monitor, "AFTER_S", 2)
    log = EventLog()
    sound = np.concatenate([np.zeros(48_000, np.int16), sentences[1]])
    recognise(recognizer, RandomChunks(sound, seed=1), [log])
    first, then = hints(log)
    assert first[0].startswith("test: nothing but silence in 2 s")
    assert then == []


def test_channels_that_cancel_are_in_health(recognizer: Recognizer) -> None:
    """The cause is named, and not the silence that follows from it."""
    log = EventLog()

    async def complain(pipeline: LivePipeline) -> None:
        await log.until(lambda: len(log.events) > 5)
        pipeline.report_capture("degraded", f"x.wav: {CANCELS}", source="test")

    sound = np.zeros(48_000, np.int16)
    recognise(recognizer, RandomChunks(sound, seed=1, pace=10), [log], meanwhile=complain)
    assert hints(log) == [[f"test: {CANCELS}"]]
