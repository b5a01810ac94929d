"""The frame processor in a real Pipecat pipeline, with a real service."""

import asyncio

import pytest
from serve_kit import CHUNK, Sound, ends_of, serving

from stream_hbaf.audio import pace
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.recognizer import Recognizer

pytest.importorskip(
    "pipecat.tests.utils", reason="needs stream-hbaf[pipecat]", exc_type=ImportError
)

from pipecat.frames.frames import ErrorFrame, InputAudioRawFrame, TextFrame
from pipecat.tests.utils import run_test

from stream_hbaf.pipecat import EmotionFrame, EmotionProcessor


def frames_of(sound: Sound) -> list[InputAudioRawFrame]:
    return [
        InputAudioRawFrame(sound[start : start + CHUNK].tobytes(), SAMPLE_RATE_HZ, 1)
        for start in range(0, len(sound), CHUNK)
    ]


def test_pipeline_gets_the_emotion_of_each_utterance(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All frames pass, and the last utterance's frame comes before the pipeline ends."""
    monkeypatch.setattr(pace, "FASTEST", 8.0)

    async def scene() -> None:
        async with serving(recognizer) as service:
            (expected,) = await ends_of(service, sentences[1])
            processor = EmotionProcessor(service.server.url, source="ann", speaker="Ann")
            audio = frames_of(sentences[1])
            down, up = await run_test(
                processor, frames_to_send=[*audio, TextFrame("passes")], start_timeout=30
            )
            (found,) = [frame for frame in down if isinstance(frame, EmotionFrame)]
            assert (found.utterance.text, found.utterance.speaker) == (expected.text, "Ann")
            assert sum(isinstance(frame, InputAudioRawFrame) for frame in down) == len(audio)
            assert any(isinstance(frame, TextFrame) for frame in down)
            assert not [frame for frame in up if isinstance(frame, ErrorFrame)]

    asyncio.run(scene())


def test_pipeline_goes_on_without_a_service(sentences: list[Sound]) -> None:
    """One error says what is wrong; the audio passes."""

    async def scene() -> None:
        audio = frames_of(sentences[1])[:20]
        down, up = await run_test(
            EmotionProcessor("ws://127.0.0.1:1"), frames_to_send=audio, start_timeout=30
        )
        assert len(down) == len(audio)
        (error,) = [frame for frame in up if isinstance(frame, ErrorFrame)]
        assert "can't be reached" in error.error

    asyncio.run(scene())
