"""A frame processor for Pipecat: the emotion of each utterance of the user, as a frame.

    Pipeline([transport.input(), EmotionProcessor("ws://localhost:8772"), stt])

It sends the audio that passes to ``stream-hbaf serve``, and pushes an ``EmotionFrame`` for each
``end``. All frames pass unchanged and without delay, but for the end of the pipeline, which waits
for the last utterance.
"""

from dataclasses import dataclass, field

from pipecat.frames.frames import (
    CancelFrame,
    DataFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor

from stream_hbaf.agent_stream import AgentStream
from stream_hbaf.events import Utterance


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
        self._stream = AgentStream(
            url,
            on_end=self._push,
            on_error=self.push_error,
            token=token,
            source=source,
            dialogue=dialogue,
            speaker=speaker,
        )

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Send audio, and pass every frame on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            self._stream.send(frame.audio, rate_hz=frame.sample_rate, channels=frame.num_channels)
        elif isinstance(frame, EndFrame):
            await self._stream.finish()
        elif isinstance(frame, CancelFrame):
            await self._stream.cancel()
        await self.push_frame(frame, direction)

    async def cleanup(self) -> None:
        """End the stream."""
        await super().cleanup()  # type: ignore[no-untyped-call]
        await self._stream.cancel()

    async def _push(self, utterance: Utterance) -> None:
        await self.push_frame(EmotionFrame(utterance))
