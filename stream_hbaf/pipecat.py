"""A frame processor for Pipecat: the emotion of each utterance of the user, as a frame.

    Pipeline([transport.input(), EmotionProcessor("ws://localhost:8772"), stt])

It sends the audio that passes to ``stream-hbaf serve``, and pushes an ``EmotionFrame`` for each
``end``. All frames pass unchanged and without delay, but for the end of the pipeline, which waits
for the last utterance.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial

from pipecat.frames.frames import (
    CancelFrame,
    DataFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor

from stream_hbaf.errors import ServiceError
from stream_hbaf.events import Utterance
from stream_hbaf.stream_client import stream

MAX_WAITING = 256  # frames of audio, of 20 ms: while the service is away the oldest are dropped
LAST_S = 10.0  # that the end of the pipeline waits for the last utterance


@dataclass
class EmotionFrame(DataFrame):
    """The emotion of an utterance of the user, or a correction of one: ``utterance.id`` tells."""

    interruptible: bool = field(default=False, init=False)  # it is about what the user has said
    utterance: Utterance


class EmotionProcessor(FrameProcessor):
    """Sends audio to a service, and pushes an ``EmotionFrame`` for each utterance.

    A service that refuses, or can't be reached, is reported as an ``ErrorFrame``; the pipeline goes
    on without emotions.
    """

    def __init__(
        self, url: str, *, token: str = "", source: str = "", dialogue: str = "", speaker: str = ""
    ) -> None:
        super().__init__()
        self._open = partial(
            stream, url, token=token, source=source, dialogue=dialogue, speaker=speaker
        )
        self._audio: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._format = (0, 0)  # rate in Hz and channels of the audio that is sent
        self._streaming: asyncio.Task[None] | None = None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Send audio, and pass every frame on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            self._send(frame)
        elif isinstance(frame, EndFrame):
            await self._finish()
        elif isinstance(frame, CancelFrame):
            await self._cancel()
        await self.push_frame(frame, direction)

    async def cleanup(self) -> None:
        """End the stream."""
        await super().cleanup()  # type: ignore[no-untyped-call]
        await self._cancel()

    def _send(self, frame: InputAudioRawFrame) -> None:
        wanted = (frame.sample_rate, frame.num_channels)
        if wanted != self._format:
            self._end_audio()
            self._format, self._audio = wanted, asyncio.Queue()
            self._streaming = self.create_task(self._stream(self._audio, *wanted), "emotions")
        if self._audio.qsize() >= MAX_WAITING:
            self._audio.get_nowait()
        self._audio.put_nowait(frame.audio)

    async def _stream(
        self, audio: "asyncio.Queue[bytes | None]", rate_hz: int, channels: int
    ) -> None:
        try:
            chunks = _chunks(audio)
            async for event in self._open(chunks, rate_hz=rate_hz, channels=channels):
                if isinstance(event, Utterance) and event.type == "end":
                    await self.push_frame(EmotionFrame(event))
        except ServiceError as error:
            await self.push_error(str(error))

    def _end_audio(self) -> None:
        self._audio.put_nowait(None)

    async def _finish(self) -> None:
        if self._streaming is not None:
            self._end_audio()
            await asyncio.wait({self._streaming}, timeout=LAST_S)
            await self._cancel()

    async def _cancel(self) -> None:
        if self._streaming is not None:
            await self.cancel_task(self._streaming)
            self._streaming = None


async def _chunks(audio: "asyncio.Queue[bytes | None]") -> AsyncIterator[bytes]:
    while (chunk := await audio.get()) is not None:
        yield chunk
