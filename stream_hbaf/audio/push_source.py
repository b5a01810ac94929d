"""Sound arrives from elsewhere: what one sender after another sends becomes the chunks of a source.

Nothing here knows a socket. Whoever serves one claims the source for a connection (``sender``) and
feeds it what comes: the WebSocket and Wyoming servers of this room, the dashboard for its page.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.pcm import RATE_HZ, Resampler, SampleFormat, from_bytes, no_channel
from stream_hbaf.audio.source import Chunk, OnStatus
from stream_hbaf.errors import AudioError

if TYPE_CHECKING:
    from stream_hbaf.events import State

QUEUE_S = 5  # sound held while nobody takes it; then the oldest is let go
SILENCE_S = 2.0  # a sender that is this late has paused: what was said until then ends
SETTLED_S = 10.0  # without loss, after which a degraded source counts as online again
LOWEST_HZ, HIGHEST_HZ, MOST_CHANNELS = 8_000, 192_000, 8  # of a sender
NOTHING = np.zeros(0, np.int16)


@dataclass(frozen=True, slots=True)
class Form:
    """How a sender's samples are written: interleaved PCM. Raises AudioError if unheard of."""

    rate_hz: int
    channels: int
    sample_format: SampleFormat

    def __post_init__(self) -> None:
        if not LOWEST_HZ <= self.rate_hz <= HIGHEST_HZ:
            raise AudioError(f"a rate that isn't between {LOWEST_HZ} and {HIGHEST_HZ} Hz")
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise AudioError(f"a number of channels that isn't between 1 and {MOST_CHANNELS}")


class AlreadySending(AudioError):  # noqa: N818  it is the state of things
    """Another connection has claimed the source."""


class Cutter:
    """Pieces of any length become chunks of one length, each stamped to its last sample.

    Starts count the samples that were cut, as if nothing had been between them.
    """

    def __init__(self, *, chunk_ms: int) -> None:
        self._chunk_samples = chunk_ms * RATE_HZ // 1000
        self._held = NOTHING
        self._captured_at = 0.0  # of the last sample held
        self._position = 0
        self._after_gap = False

    def feed(self, samples: NDArray[np.int16], *, captured_at: float) -> Iterator[Chunk]:
        """The chunks that are now full; ``captured_at`` is the last sample's, monotonic."""
        self._held = np.concatenate([self._held, samples])
        self._captured_at = captured_at
        while len(self._held) >= self._chunk_samples:
            yield self._cut(self._chunk_samples)

    def break_off(self) -> Iterator[Chunk]:
        """What is left, shorter than a chunk; the next one comes after a gap."""
        if len(self._held):
            yield self._cut(len(self._held))
        self._after_gap = self._position > 0

    def _cut(self, count: int) -> Chunk:
        samples, self._held = self._held[:count], self._held[count:]
        chunk = Chunk(
            start=self._position,
            samples=samples,
            captured_at=self._captured_at - len(self._held) / RATE_HZ,
            after_gap=self._after_gap,
        )
        self._position += count
        self._after_gap = False
        return chunk


@dataclass(frozen=True, slots=True)
class _Told:
    """A status that is due once the sound before it has been taken."""

    state: "State"
    line: str


class ArrivingSource:
    """Sound that one sender at a time brings, as a source; without a sender it waits for one.

    The coming and going of senders, and what had to be let go because nobody took it in time, is
    told to ``on_status``, in its order among the chunks. A pause of the sender is an empty chunk
    after a gap. ``speaker`` is who the sender says is speaking, if it does.
    """

    hope = "waiting for the next"  # after a sender is gone

    def __init__(
        self, name: str, *, channel: int | None = None, chunk_ms: int, on_status: OnStatus
    ) -> None:
        self.name = name
        self.speaker = ""
        self._channel = channel
        self._chunk_ms = chunk_ms
        self._on_status = on_status
        self._cutter = Cutter(chunk_ms=chunk_ms)
        self._waiting: deque[Chunk | _Told] = deque()
        self._arrived = asyncio.Event()
        self._sender = ""  # who has claimed the source
        self._sounding = False  # the sender has sent, and not paused since
        self.state: State = "offline"
        self._gap = False  # chunks before the next one to be taken were let go
        self._lost_s = 0.0
        self._lost_at: float | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self.tell("offline", f"{self.name}: waiting for sound")
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._closed = True
        self._arrived.set()

    @contextmanager
    def sender(self, who: str) -> Iterator["Sender"]:
        """Claim the source for a connection. Raises AlreadySending.

        An AudioError that ends the connection is told in a line, and comes out.
        """
        if self._sender:
            raise AlreadySending(
                f"{self.name}: {self._sender} is sending already; one can at a time"
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
            if self.state == "online" or fault:
                reason = f"{who}{fault or ' has left'} ({self.hope})"
                self.tell("offline", f"{self.name}: {reason}")

    def tell(self, state: "State", line: str) -> None:
        """Have it said how the source is, once the sound before it has been taken."""
        self.state = state
        self._put(_Told(state, line))

    def remark(self, line: str) -> None:
        """Have something said that changes nothing."""
        self.tell(self.state, line)

    async def chunks(self) -> AsyncIterator[Chunk]:
        position = 0
        while (arrival := await self._take()) is not None:
            if isinstance(arrival, _Told):
                self._on_status(arrival.state, arrival.line)
                continue
            self._tell_losses(arrival.captured_at)
            gap, self._gap = arrival.after_gap or self._gap, False
            yield replace(arrival, start=position, after_gap=gap and position > 0)
            position += len(arrival.samples)

    async def _take(self) -> "Chunk | _Told | None":
        """What came next; None once the source is closed."""
        while not self._waiting:
            if self._closed:
                return None
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), SILENCE_S if self._sounding else None)
            except TimeoutError:
                self.break_off()
        return self._waiting.popleft()

    def take_in(self, samples: NDArray[np.int16], *, captured_at: float) -> None:
        self._sounding = self._sounding or len(samples) > 0
        for chunk in self._cutter.feed(samples, captured_at=captured_at):
            self._put(chunk)

    def break_off(self) -> None:
        """The sender pauses: what was said until now ends here."""
        if not self._sounding:
            return
        self._sounding = False
        for chunk in self._cutter.break_off():
            self._put(chunk)
        now = time.monotonic()
        self._put(Chunk(start=0, samples=NOTHING, captured_at=now, after_gap=True))

    def resampler(self, form: Form) -> Resampler:
        if self._channel is not None and self._channel >= form.channels:
            raise AudioError(no_channel(self._channel, where="sound", channels=form.channels))
        return Resampler(form.rate_hz, form.channels, channel=self._channel)

    def _put(self, arrival: Chunk | _Told) -> None:
        self._waiting.append(arrival)
        if len(self._waiting) > QUEUE_S * 1000 // self._chunk_ms + 1:
            oldest = self._waiting.popleft()  # a status, too, is superseded by those behind it
            if isinstance(oldest, Chunk):
                self._lost_s += len(oldest.samples) / RATE_HZ
                self._gap = True
        self._arrived.set()

    def _tell_losses(self, now: float) -> None:
        if self._gap:
            if self._lost_at is None:
                line = f"{self.name}: {self._lost_s:.1f} s let go, sent faster than it is heard"
                self._on_status("degraded", line)
            self._lost_at = now
        elif self._lost_at is not None and now - self._lost_at > SETTLED_S:
            self._lost_at = None
            self._on_status("online", f"{self.name}: sound complete again")


class Sender:
    """One connection's sound on its way into the source that it has claimed."""

    def __init__(self, source: ArrivingSource, *, who: str) -> None:
        self._source = source
        self._who = who
        self._resampler: Resampler | None = None
        self._behind_s = 0.0  # sound that the resampler holds back
        self.form: Form | None = None

    def begin(self, form: Form, *, speaker: str = "") -> None:
        """Sound of this form follows. Raises AudioError if the source's channel isn't in it."""
        resampler = self._source.resampler(form)
        self.pause()
        self.form, self._resampler, self._behind_s = form, resampler, 0.0
        self._source.speaker = speaker
        if self._source.state != "online":
            named = f" ({speaker})" if speaker else ""
            self._source.tell("online", f"{self._source.name}: {self._who}{named} is sending")

    def feed(self, content: bytes) -> None:
        """Sound that was captured until now. Raises AudioError if it isn't of the form."""
        if self.form is None or self._resampler is None:
            raise AudioError("sound came before it was said what form it has")
        try:
            samples = from_bytes(
                content, sample_format=self.form.sample_format, channels=self.form.channels
            )
        except ValueError as error:
            raise AudioError(str(error)) from None
        resampled = self._resampler.feed(samples)
        self._behind_s += len(samples) / self.form.rate_hz - len(resampled) / RATE_HZ
        self._source.take_in(resampled, captured_at=time.monotonic() - self._behind_s)

    def pause(self) -> None:
        """The sound stops for a while, or for good; nothing of it is held back."""
        if self.form is not None and self._resampler is not None:
            self._source.take_in(self._resampler.finish(), captured_at=time.monotonic())
            self._source.break_off()
            self._resampler, self._behind_s = self._source.resampler(self.form), 0.0
