"""Sources to which sound is sent: one sender at a time, whose sound becomes chunks.

No sockets here. A server claims the source for a connection (``PushSource.sender``) and feeds it
the samples that come in: the WebSocket and Wyoming servers of this folder, and the dashboard for
its page.
"""

import asyncio
import ipaddress
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.opus import OpusDecoder
from stream_hbaf.audio.source import (
    CANCELS,
    RATE_HZ,
    Chunk,
    Chunker,
    LossReport,
    Resampler,
    SampleFormat,
    Samples,
    SourceOptions,
    from_bytes,
)
from stream_hbaf.errors import AudioError, DeviceError

if TYPE_CHECKING:
    from stream_hbaf.events import State

QUEUE_S = 5  # sound that is held while nothing consumes it; then the oldest is dropped
IDLE_S = 600.0  # after which a sender that sends nothing makes room for another
SILENCE_S = 2.0  # a sender that sends nothing for this long has paused: the utterance ends
ROOM_S = 0.8  # sound that is held while a sender is let go on; a message more fits in the queue
LOWEST_HZ, HIGHEST_HZ, MOST_CHANNELS = 8_000, 192_000, 8  # of a sender


@dataclass(frozen=True, slots=True)
class Address:
    """``HOST:PORT``, to listen on or to connect to."""

    host: str
    port: int  # 0: any free one, to listen on

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cannot_listen(name: str, error: OSError) -> DeviceError:
    """The error of a server whose address can't be listened on."""
    return DeviceError(
        f"{name}: can't listen there ({plain_reason(error)}); "
        "choose another port, or end the program that uses it"
    )


def plain_reason(error: OSError) -> str:
    """The system's own words: asyncio wraps the address around them."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or type(error).__name__  # a name that can't be looked up


def json_object(content: str | bytes, *, what: str) -> dict[str, Any]:
    """The fields that a sender sent as ``what``. Raises AudioError if it is no JSON object."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise AudioError(f"{what} that is no JSON object")
    return fields


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """A sender's interleaved PCM, or Opus packets, whose rate is what they decode to.

    Raises AudioError for a rate or channels out of range.
    """

    rate_hz: int
    channels: int
    sample_format: SampleFormat | Literal["opus"]

    def __post_init__(self) -> None:
        if not LOWEST_HZ <= self.rate_hz <= HIGHEST_HZ:
            raise AudioError(f"a rate that isn't between {LOWEST_HZ} and {HIGHEST_HZ} Hz")
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise AudioError(f"a number of channels that isn't between 1 and {MOST_CHANNELS}")


class AlreadySendingError(AudioError):
    """Another connection has claimed the source."""


class PushSource:
    """A source whose chunks come from one sender at a time; it waits while there is none.

    Senders that come and go, and dropped sound, are reported to ``on_status``, in their order
    among the chunks. A sender's pause is an empty chunk after a gap. ``speaker`` is the name that
    the sender gives, if any.
    """

    outlook = "waiting for the next"  # what follows after a sender has left, for the status line

    def __init__(self, name: str, **options: Unpack[SourceOptions]) -> None:
        self.name = name
        self.speaker = ""
        self.state: State = "offline"
        self.channel = options.get("channel")
        self._chunk_ms, self._on_status = options["chunk_ms"], options["on_status"]
        self._chunker = Chunker(chunk_ms=self._chunk_ms)
        self._queue: deque[Chunk | tuple[State, str]] = deque()
        self._taken = asyncio.Event()  # the queue has become shorter, or the source is closed
        self._changed = asyncio.Event()  # the queue has grown, or the source is closed
        self._sender = ""  # who has claimed the source
        self._sounding = False  # the sender has sent sound, and not paused since
        self._gap = False  # chunks before the next one were dropped
        self._lost_s = 0.0
        self._losses = LossReport(name, self._on_status)
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.report("offline", f"{self.name}: waiting for sound")
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End ``chunks`` once it has given all that was sent."""
        self._closed.set()
        self._changed.set()
        self._taken.set()

    async def room(self) -> None:
        """Wait until there is room for another message, of which nothing is dropped then."""
        while len(self._queue) * self._chunk_ms > ROOM_S * 1000 and not self.is_closed:
            self._taken.clear()
            await self._taken.wait()

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._closed.is_set()

    @contextmanager
    def sender(self, who: str) -> Iterator["Sender"]:
        """Claim the source for a connection. Raises AlreadySendingError.

        An AudioError that ends the connection is reported in a line and raised again.
        """
        if self._sender:
            # Who it is isn't told: one sender need not know another's address.
            raise AlreadySendingError(
                f"{self.name}: somebody else is sending already; one can at a time"
            )
        self._sender = who
        sender, fault = Sender(self, who=who), ""
        try:
            yield sender
        except AudioError as error:
            fault = f": {error}"
            raise
        finally:
            sender.pause()
            self._sender = self.speaker = ""
            if self.state != "offline" or fault:
                reason = f"{who}{fault or ' has left'} ({self.outlook})"
                self.report("offline", f"{self.name}: {reason}")

    def report(self, state: "State", line: str) -> None:
        """Report a state to ``on_status`` once the chunks before it have been consumed."""
        self.state = state
        self._put((state, line))

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The senders' sound until the source is closed."""
        position = 0
        while (item := await self._next()) is not None:
            if isinstance(item, tuple):
                self._on_status(*item)
                continue
            lost = f"{self._lost_s:.1f} s dropped, sent faster than it is processed"
            self._losses.update(lost if self._gap else "", now=item.captured_at)
            gap, self._gap = item.after_gap or self._gap, False
            yield replace(item, start=position, after_gap=gap and position > 0)
            position += len(item.samples)

    async def _next(self) -> "Chunk | tuple[State, str] | None":
        """The next item of the queue; None once the source is closed."""
        while not self._queue:
            if self._closed.is_set():
                return None
            self._changed.clear()
            try:
                # Not wait_for: before 3.12 it loses a cancellation that comes with a new item.
                async with asyncio.timeout(SILENCE_S if self._sounding else None):
                    await self._changed.wait()
            except TimeoutError:
                self.pause()
        self._taken.set()
        return self._queue.popleft()

    def feed(self, samples: Samples, *, captured_at: float) -> None:
        """Take samples at 16 kHz, mono; ``captured_at`` is the last one's, monotonic."""
        self._sounding = self._sounding or len(samples) > 0
        for chunk in self._chunker.feed(samples, captured_at=captured_at):
            self._put(chunk)

    def pause(self) -> None:
        """End the open utterance: the sender has paused."""
        if not self._sounding:
            return
        self._sounding = False
        for chunk in self._chunker.flush():
            self._put(chunk)
        empty = np.zeros(0, np.int16)
        self._put(Chunk(start=0, samples=empty, captured_at=time.monotonic(), after_gap=True))

    def _put(self, item: "Chunk | tuple[State, str]") -> None:
        self._queue.append(item)
        if len(self._queue) > QUEUE_S * 1000 // self._chunk_ms + 1:
            oldest = self._queue.popleft()  # a status, too, is superseded by those behind it
            if isinstance(oldest, Chunk):
                self._lost_s += len(oldest.samples) / RATE_HZ
                self._gap = True
        self._changed.set()


class Sender:
    """One connection that has claimed a source, and its sound."""

    def __init__(self, source: PushSource, *, who: str) -> None:
        self._source = source
        self._who = who
        self._resampler: Resampler | None = None
        self._opus: OpusDecoder | None = None
        self.audio_format: AudioFormat | None = None
        self.received_s = 0.0  # of sound

    def begin(self, audio_format: AudioFormat, *, speaker: str = "") -> None:
        """Sound of this format follows. Raises AudioError if the source's channel isn't in it."""
        resampler = self._new_resampler(audio_format)
        is_opus = audio_format.sample_format == "opus"
        opus = OpusDecoder(audio_format.channels) if is_opus else None
        self.pause()
        self.audio_format, self._resampler, self._opus = audio_format, resampler, opus
        self._source.speaker = speaker
        if self._source.state != "online":
            named = f" ({speaker})" if speaker else ""
            self._source.report("online", f"{self._source.name}: {self._who}{named} is sending")

    def _new_resampler(self, audio_format: AudioFormat) -> Resampler:
        channel = self._source.channel
        return Resampler(audio_format.rate_hz, audio_format.channels, channel=channel)

    def feed(self, content: bytes) -> None:
        """Send sound that was captured until now. Raises AudioError if it isn't of the format."""
        if self.audio_format is None or self._resampler is None:
            raise AudioError("sound came before its format")
        samples = self._decode(content, self.audio_format)
        self.received_s += len(samples) / self.audio_format.rate_hz
        resampled = self._resampler.feed(samples)
        if self._resampler.cancels() and self._source.state == "online":
            self._source.report("degraded", f"{self._source.name}: {CANCELS}")
        self._source.feed(resampled, captured_at=time.monotonic() - self._resampler.behind_s)

    def _decode(self, content: bytes, audio_format: AudioFormat) -> NDArray[np.float32]:
        """The samples [n, channels]; an Opus message is one packet."""
        if audio_format.sample_format == "opus":
            assert self._opus is not None  # since ``begin``
            return self._opus.decode(content)
        return from_bytes(
            content, sample_format=audio_format.sample_format, channels=audio_format.channels
        )

    async def room(self) -> None:
        """Wait until the source has room for another message."""
        await self._source.room()

    def report(self, state: "State", line: str) -> None:
        """Report how this connection's sound comes in."""
        self._source.report(state, f"{self._source.name}: {self._who}: {line}")

    def pause(self) -> None:
        """Send what the resampler holds back, and end the open utterance."""
        if self.audio_format is not None and self._resampler is not None:
            self._source.feed(self._resampler.finish(), captured_at=time.monotonic())
            self._source.pause()
            self._resampler = self._new_resampler(self.audio_format)
