"""An audio input for LiveKit Agents: the emotion of each utterance of the user, as an event.

    await session.start(agent, room=ctx.room)
    emotions = EmotionInput(session.input.audio, "ws://localhost:8772")
    emotions.on("emotion", lambda utterance: print(utterance.emotion, utterance.text))
    session.input.audio = emotions
    ctx.add_shutdown_callback(emotions.aclose)

It sends the audio that passes to ``stream-hbaf serve``, and emits ``emotion`` for each ``end``.
All audio passes unchanged and without delay.
"""

from typing import Literal

from livekit.agents.voice.io import AudioInput
from livekit.rtc import AudioFrame, EventEmitter

from stream_hbaf.agent_stream import AgentStream
from stream_hbaf.events import Utterance

SILENCE_S = 2.0  # after an input is switched off: longer than any silence that ends an utterance


class EmotionInput(AudioInput, EventEmitter[Literal["emotion", "error"]]):
    """An input that wraps another one, and sends its audio to a service.

    ``emotion`` is emitted with each finished utterance, or a correction of an earlier one:
    ``utterance.id`` tells. ``error`` is emitted with one line if the service refuses, or can't be
    reached; the session goes on without emotions until its input is switched off and on.
    """

    def __init__(
        self,
        audio: AudioInput,
        url: str,
        *,
        token: str = "",
        source: str = "",
        dialogue: str = "",
        speaker: str = "",
    ) -> None:
        AudioInput.__init__(self, label="stream-hbaf", source=audio)
        EventEmitter.__init__(self)
        self._input = audio
        self._stream = AgentStream(
            url,
            on_end=self._emit_emotion,
            on_error=self._emit_error,
            token=token,
            source=source,
            dialogue=dialogue,
            speaker=speaker,
        )

    async def __anext__(self) -> AudioFrame:
        """The next frame, which is sent as well."""
        try:
            frame = await anext(self._input)
        except StopAsyncIteration:
            self._stream.end()
            raise
        self._stream.send(
            frame.data.tobytes(), rate_hz=frame.sample_rate, channels=frame.num_channels
        )
        return frame

    def on_attached(self) -> None:
        """Go on in the same dialogue, or begin anew after an error."""
        super().on_attached()
        if self._stream.has_failed:
            self._stream.end()

    def on_detached(self) -> None:
        """End the open utterance: no more audio comes, as when the user is muted."""
        super().on_detached()
        self._stream.send_silence(SILENCE_S)

    async def aclose(self) -> None:
        """End the stream; waits for the last utterance."""
        await self._stream.finish()

    async def _emit_emotion(self, utterance: Utterance) -> None:
        self.emit("emotion", utterance)

    async def _emit_error(self, error: str) -> None:
        self.emit("error", error)
