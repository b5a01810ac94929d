"""Sends the audio that passes through a voice agent to ``stream-hbaf serve``.

What the plugins for Pipecat and LiveKit Agents share: the agent never waits for the service, and
goes on without emotions when there is none.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from stream_hbaf.errors import ServiceError
from stream_hbaf.events import Utterance
from stream_hbaf.stream_client import stream

MAX_WAITING = 256  # frames of audio, of 20 ms: while the service is away the oldest are dropped
LAST_S = 10.0  # that the end of an agent waits for the last utterance

Audio = asyncio.Queue[bytes | None]


class AgentStream:
    """A stream that begins with the first audio, and again whenever its format changes.

    ``on_end`` gets each finished utterance, and corrections of earlier ones; ``on_error`` one line
    if the service refuses, can't be reached, or isn't back in time. Audio is dropped from then on.
    """

    def __init__(
        self,
        url: str,
        *,
        on_end: Callable[[Utterance], Awaitable[None]],
        on_error: Callable[[str], Awaitable[None]],
        token: str,
        source: str,
        dialogue: str,
        speaker: str,
    ) -> None:
        self._open = partial(
            stream, url, token=token, source=source, dialogue=dialogue, speaker=speaker
        )
        self._on_end = on_end
        self._on_error = on_error
        self._audio: Audio = asyncio.Queue()
        self._format = (0, 0)  # rate in Hz and channels of the audio that is sent
        self._streaming: asyncio.Task[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the stream is over, though its audio isn't."""
        return self._streaming is not None and self._streaming.done()

    def send(self, samples: bytes, *, rate_hz: int, channels: int) -> None:
        """Send int16 samples, without waiting."""
        if (rate_hz, channels) != self._format:
            self.end()
            self._format, self._audio = (rate_hz, channels), asyncio.Queue()
            streaming = self._stream(self._audio, rate_hz=rate_hz, channels=channels)
            self._streaming = asyncio.create_task(streaming, name="emotions")
        if self._audio.qsize() >= MAX_WAITING:
            self._audio.get_nowait()
        self._audio.put_nowait(samples)

    def send_silence(self, duration_s: float) -> None:
        """Send silence in the format of the audio before it, if there was any."""
        rate_hz, channels = self._format
        frame = bytes(2 * channels * (rate_hz // 10))
        for _ in range(round(duration_s * 10) if frame else 0):
            self.send(frame, rate_hz=rate_hz, channels=channels)

    def end(self) -> None:
        """End the audio; what is sent after that is another stream."""
        self._audio.put_nowait(None)
        self._format = (0, 0)

    async def finish(self) -> None:
        """End the audio and wait for the last utterance, at most ``LAST_S``."""
        if self._streaming is not None:
            self.end()
            await asyncio.wait({self._streaming}, timeout=LAST_S)
            await self.cancel()

    async def cancel(self) -> None:
        """End the stream at once."""
        if self._streaming is not None:
            self._streaming.cancel()
            await asyncio.wait({self._streaming})
            self._streaming = None

    async def _stream(self, audio: Audio, *, rate_hz: int, channels: int) -> None:
        try:
            async for event in self._open(_chunks(audio), rate_hz=rate_hz, channels=channels):
                if isinstance(event, Utterance) and event.type == "end":
                    await self._on_end(event)
        except ServiceError as error:
            await self._on_error(str(error))


async def _chunks(audio: Audio) -> AsyncIterator[bytes]:
    while (chunk := await audio.get()) is not None:
        yield chunk
