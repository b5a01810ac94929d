"""The audio input in a real session of LiveKit Agents, with a real service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from serve_kit import CHUNK, Sound, ends_of, serving

from stream_hbaf.audio import pace
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.events import Utterance
from stream_hbaf.recognizer import Recognizer

pytest.importorskip("livekit.agents", reason="needs stream-hbaf[livekit]", exc_type=ImportError)

from livekit.agents import Agent, AgentSession, ModelSettings, stt
from livekit.agents.voice.io import AudioInput
from livekit.rtc import AudioFrame

from stream_hbaf.livekit import EmotionInput


class Microphone(AudioInput):
    """Gives what it was told to, then waits as a room does."""

    def __init__(self) -> None:
        super().__init__(label="microphone")
        self.frames: asyncio.Queue[AudioFrame | None] = asyncio.Queue()

    async def __anext__(self) -> AudioFrame:
        frame = await self.frames.get()
        if frame is None:
            raise StopAsyncIteration
        return frame

    def say(self, sound: Sound) -> list[AudioFrame]:
        frames = [
            AudioFrame(piece.tobytes(), SAMPLE_RATE_HZ, 1, len(piece))
            for piece in (sound[start : start + CHUNK] for start in range(0, len(sound), CHUNK))
        ]
        for frame in frames:
            self.frames.put_nowait(frame)
        return frames

    def hang_up(self) -> None:
        self.frames.put_nowait(None)


class NoWords(stt.STT[None]):
    """Without one an agent takes in no audio; the agent below doesn't ask it."""

    def __init__(self) -> None:
        can = stt.STTCapabilities(streaming=True, interim_results=False)
        super().__init__(capabilities=can)

    async def _recognize_impl(self, *_: Any, **__: Any) -> stt.SpeechEvent:
        raise NotImplementedError


class Listener(Agent):
    """An agent that takes in audio, and does nothing with it."""

    def __init__(self) -> None:
        super().__init__(instructions="", stt=NoWords())
        self.received: list[AudioFrame] = []

    async def stt_node(  # type: ignore[override]
        self, audio: AsyncIterator[AudioFrame], model_settings: ModelSettings
    ) -> AsyncIterator[str]:
        async for frame in audio:
            self.received.append(frame)
        return
        yield


class Scene:
    """A session whose user speaks into a microphone, and what came of it."""

    def __init__(self, url: str, **named: str) -> None:
        self.microphone, self.agent = Microphone(), Listener()
        self.emotions: asyncio.Queue[Utterance] = asyncio.Queue()
        self.errors: asyncio.Queue[str] = asyncio.Queue()
        self.session: AgentSession[None] = AgentSession()
        self.input = EmotionInput(self.microphone, url, **named)
        self.input.on("emotion", self.emotions.put_nowait)
        self.input.on("error", self.errors.put_nowait)


@asynccontextmanager
async def session_with(url: str, **named: str) -> AsyncIterator[Scene]:
    scene = Scene(url, **named)
    async with asyncio.timeout(60):
        await scene.session.start(scene.agent)
        scene.session.input.audio = scene.input
        try:
            yield scene
        finally:
            await scene.session.aclose()
            await scene.input.aclose()


def test_session_gets_the_emotion_of_each_utterance(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All audio reaches the agent unchanged; the last utterance comes when the user has left."""
    monkeypatch.setattr(pace, "FASTEST", 8.0)

    async def scene() -> None:
        async with serving(recognizer) as service:
            (expected,) = await ends_of(service, sentences[1])
            async with session_with(service.server.url, source="ann", speaker="Ann") as ann:
                sent = ann.microphone.say(sentences[1])
                ann.microphone.hang_up()
                found = await ann.emotions.get()
            assert (found.text, found.speaker, found.source) == (expected.text, "Ann", "ann")
            assert found.emotion is not None
            assert expected.emotion is not None
            assert found.emotion.label == expected.emotion.label
            assert ann.agent.received[: len(sent)] == sent  # then LiveKit adds silence
            assert ann.errors.empty()

    asyncio.run(scene())


def test_switched_off_input_ends_the_utterance_and_goes_on_in_its_dialogue(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with push to talk: what was said is recognised while the user is muted."""
    monkeypatch.setattr(pace, "FASTEST", 8.0)

    async def scene() -> None:
        async with serving(recognizer) as service, session_with(service.server.url) as ann:
            found = []
            for _ in range(2):
                ann.session.input.set_audio_enabled(True)
                ann.microphone.say(sentences[1][: -SAMPLE_RATE_HZ // 2])
                await service.until(ann.microphone.frames.empty)
                ann.session.input.set_audio_enabled(False)
                found.append(await ann.emotions.get())
            assert [one.turn for one in found] == [1, 2]
            assert found[0].dialogue_id == found[1].dialogue_id

    asyncio.run(scene())


def test_session_goes_on_without_a_service(sentences: list[Sound]) -> None:
    """One error says what is wrong; the audio passes. Another one after the next switching on."""

    async def scene() -> None:
        async with session_with("ws://127.0.0.1:1") as ann:
            sent = ann.microphone.say(sentences[1][: 20 * CHUNK])
            assert "can't be reached" in await ann.errors.get()
            sent += ann.microphone.say(sentences[1][: 5 * CHUNK])
            while len(ann.agent.received) < len(sent):  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0.01)
            assert ann.errors.empty()
            ann.session.input.set_audio_enabled(False)
            ann.session.input.set_audio_enabled(True)
            ann.microphone.say(sentences[1][: 2 * CHUNK])
            assert "can't be reached" in await ann.errors.get()

    asyncio.run(scene())
