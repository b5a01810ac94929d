"""Decodes sound with FFmpeg: a recording's samples at its own times, or a stream's as they come."""

import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.container import (
    STALL_S,
    STALLED,
    Where,
    declared_end_of,
    is_pcm,
    is_pipe,
    is_streamed,
    name_of,
    not_from_a_pipe,
    open_container,
    origin_of,
    reason_of,
)
from stream_hbaf.audio.source import (
    CANCELS,
    RATE_HZ,
    SHORTEST_TELLING_S,
    Resampler,
    Samples,
    is_url,
)
from stream_hbaf.errors import AudioError

BATCH_S = 4  # sound of a recording that is decoded in one call to the thread
LOWEST_HZ, HIGHEST_HZ = 2_000, 768_000  # resampling from less multiplies what a damaged header says
MOST_PLANES = 8  # of planar samples: PyAV would read further ones from elsewhere, and crash
MISSING_S = 0.5  # a recording may be this much shorter than it declares

# Timestamps: their rounding and a clock's drift stay below GAP_S. Less than BREAK_S is filled with
# silence: lost packets don't end an utterance, which 0.6 s of silence would do.
GAP_S, BREAK_S = 0.1, 0.5
LONGEST_GAP_S = 4 * 3600.0  # longer ones are timestamps that began anew, or are broken

FULL_SCALE = {"s8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


class Piece(NamedTuple):
    """Consecutive samples: int16, mono, 16 kHz."""

    start: int  # number of the first since the recording's beginning; never goes back
    samples: Samples

    @property
    def end(self) -> int:
        """The number of the first sample behind it."""
        return self.start + len(self.samples)


class Decoder:
    """Iterates over a recording's pieces, of ``batch_s`` unless a gap ends them before.

    Where the container's timestamps leave out half a second or more, the next piece begins later;
    shorter gaps are filled with silence. ``complaint`` says what wasn't decoded, and why a person
    should look at the recording. Raises AudioError if nothing can be decoded.
    """

    def __init__(
        self, where: Where, *, channel: int | None = None, batch_s: float = BATCH_S
    ) -> None:
        self._where = where
        self._name = name_of(where)
        self._channel = channel
        self.batch_s = batch_s
        self._batches = self._join()
        self._origin_s: float | None = None  # the timestamp of the recording's beginning
        self._at_s = 0.0  # since then: the end of what is decoded, or left out
        self._position = 0  # the same in samples at 16 kHz
        self._has_sound = False
        self.endless = False  # a URL that declares no length: a live stream
        self.ending = ""  # why the sound ended
        self.complaint = ""

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._batches)

    def close(self) -> None:
        """Close the recording."""
        self._batches.close()

    def _join(self) -> Generator[Piece]:
        """Join frames of a few hundred samples to batches, one for each call to the thread."""
        held: list[Piece] = []
        for piece in self._resample():
            if held and piece.start != held[-1].end:
                yield _joined(held)
                held = []
            if len(piece.samples):
                held.append(piece)
            if held and held[-1].end - held[0].start >= self.batch_s * RATE_HZ:
                yield _joined(held)
                held = []
        if held:
            yield _joined(held)
        if not self._has_sound:
            if self.complaint and is_pipe(self._where):
                raise not_from_a_pipe(self._name)
            reason = "nothing in it can be decoded" if self.complaint else "it holds no sound"
            raise AudioError(f"{self._name}: {reason}; give a recording with sound")

    def _resample(self) -> Iterator[Piece]:
        resampler: Resampler | None = None
        for frame in self._frames():
            layout = (frame.sample_rate, len(frame.layout.channels))
            gap_s = self._gap_before(frame)
            changed = resampler and (resampler.rate_hz, resampler.channels) != layout
            if resampler is None or changed or gap_s >= BREAK_S:  # chained streams may change it
                if resampler is not None:
                    yield self._place(resampler.finish())
                try:
                    resampler = Resampler(*layout, channel=self._channel, where=self._name)
                except AudioError:
                    if not self._has_sound:
                        raise
                    self._complain(f"no channel {self._channel} from there on")
                    return
                self._position = max(self._position, round((self._at_s + gap_s) * RATE_HZ))
            elif gap_s:
                silence = np.zeros((round(gap_s * frame.sample_rate), layout[1]), np.float32)
                yield self._place(resampler.feed(silence))
            self._at_s += gap_s + frame.samples / frame.sample_rate
            yield self._place(resampler.feed(_to_float(frame)))
            if resampler.cancels() and not self.complaint:
                self.complaint = f"{self._name}: {CANCELS}"
        if resampler is not None:
            yield self._place(resampler.finish())
            if resampler.cancels(after_s=SHORTEST_TELLING_S) and not self.complaint:
                self.complaint = f"{self._name}: {CANCELS}"

    def _place(self, samples: Samples) -> Piece:
        piece = Piece(self._position, samples)
        self._position = piece.end
        self._has_sound = self._has_sound or len(samples) > 0
        return piece

    def _gap_before(self, frame: Any) -> float:
        """The seconds that timestamps leave out before a frame; 0.0 where they began anew."""
        if frame.pts is None:
            return 0.0
        time_s = float(frame.pts * frame.time_base)
        if self._origin_s is None:
            self._origin_s = time_s
        gap_s = time_s - self._origin_s - self._at_s
        if not -GAP_S <= gap_s <= LONGEST_GAP_S:
            self._origin_s = time_s - self._at_s
        return gap_s if GAP_S < gap_s <= LONGEST_GAP_S else 0.0

    def _frames(self) -> Iterator[Any]:
        with open_container(self._where) as container:
            if not container.streams.audio:
                raise AudioError(f"{self._name}: no audio in it; give a recording with sound")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise AudioError(
                    f"{self._name}: audio of an unknown kind; convert it to wav or flac"
                )
            stream.thread_type = "NONE"  # one thread decodes a thousand times faster than real time
            declares_length = container.duration is not None or stream.duration is not None
            self.endless = is_url(self._where) and not declares_length
            if not self.endless:
                self._origin_s = origin_of(container)
            declared_s = declared_end_of(container, stream)
            damaged = False  # reported when more follows: live streams end in a truncated packet
            for packet in self._packets(container.demux(stream), declared_s=declared_s):
                is_last = packet is not None and not packet.size  # asks for what is decoded
                if damaged and not is_last:
                    self._complain("damaged")
                damaged = (is_last and damaged) or packet is None or packet.is_corrupt
                if packet is not None:
                    try:
                        yield from _usable(packet.decode())
                    except av.error.EOFError:
                        break
                    except (av.error.FFmpegError, _UnusableError):
                        damaged = True  # the next packet may be valid again
            if damaged and not (is_pcm(stream) and is_streamed(self._where)):
                self._complain("damaged")
            self.ending = self.ending or "it ended"
            if self._at_s < declared_s - MISSING_S:
                self._complain(f"{declared_s:.1f} s declared")

    def _packets(self, packets: Iterator[Any], *, declared_s: float) -> Iterator[Any]:
        """The container's packets until its end; None stands for one that can't be read."""
        while True:
            asked_at = time.monotonic()
            try:
                yield next(packets)
            except (StopIteration, av.error.EOFError):
                return
            except av.error.InvalidDataError:
                yield None
            except av.error.FFmpegError as error:
                stalled = time.monotonic() - asked_at >= STALL_S
                self.ending = STALLED if stalled else reason_of(error)
                # A server that declares no length may close the connection after all of it.
                if not declared_s or self._at_s < declared_s - MISSING_S:
                    self._complain(self.ending)
                return

    def _complain(self, reason: str) -> None:
        if not self.complaint:
            self.complaint = (
                f"{self._name}: damaged or cut short at {self._at_s:.1f} s ({reason}); "
                "going on with what can be decoded"
            )


def fill_gaps(pieces: Iterable[Piece]) -> Iterator[Samples]:
    """The pieces' samples, with silence for what timestamps leave out."""
    end = 0
    for piece in pieces:
        if piece.start > end:
            yield np.zeros(piece.start - end, np.int16)
        yield piece.samples
        end = piece.end


class _UnusableError(Exception):
    """A frame that hardly any recording has: its packet is damaged."""


def _usable(frames: list[Any]) -> Iterator[Any]:
    for frame in frames:
        channels = len(frame.layout.channels)
        known = frame.format.name.removesuffix("p") in {"u8", *FULL_SCALE}
        can_be_read = channels > 0 and (channels <= MOST_PLANES or not frame.format.is_planar)
        if not (can_be_read and known and LOWEST_HZ <= frame.sample_rate <= HIGHEST_HZ):
            raise _UnusableError
        yield frame


def _to_float(frame: Any) -> NDArray[np.float32]:
    """Any of FFmpeg's sample formats, planar or packed -> [n, channels] in [-1, 1]."""
    samples: NDArray[Any] = frame.to_ndarray()
    channels = len(frame.layout.channels)
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    name = frame.format.name.removesuffix("p")
    if name == "u8":
        samples, name = samples.astype(np.int16) - 128, "s8"
    return (samples / FULL_SCALE[name]).astype(np.float32)


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(pieces[0].start, np.concatenate([piece.samples for piece in pieces]))
