"""Decodes sound with FFmpeg: any format, from a file, a pipe or a URL, at a recording's own times.

User name, password and query of a URL don't appear in messages. A pipe is read once, from its
beginning to its end.
"""

import os
import stat
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import av.logging
import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.source import (
    CANCELS,
    RATE_HZ,
    SHORTEST_TELLING_S,
    Resampler,
    Samples,
    is_url,
    public_name,
)
from stream_hbaf.errors import AudioError

Where = str | os.PathLike[str]

BATCH_S = 4  # sound of a recording that is decoded in one call to the thread
OPEN_S, STALL_S = 10.0, 15.0  # timeouts of a URL: HLS pauses for the length of a segment
STALLED = "it stopped sending"
STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
LOWEST_HZ, HIGHEST_HZ = 2_000, 768_000  # resampling from less multiplies what a damaged header says

MOST_PLANES = 8  # of planar samples: PyAV would read further ones from elsewhere, and crash

MISSING_S = 0.5  # a recording may be this much shorter than it declares
# Containers whose header declares a length. Ogg has none: a truncated one looks like a shorter one.
DECLARING = {"wav", "flac", "mov", "matroska", "aiff", "caf", "w64"}
# A program that streams a wave file can't know its size. It writes none, the largest that the field
# holds, or the largest signed one, less headers and whole blocks.
PLACEHOLDER_BYTES = (1 << 31) - (1 << 16)
WAV_HEADER_BYTES = 1 << 14

# Timestamps: their rounding and a clock's drift stay below GAP_S. Less than BREAK_S is filled with
# silence: lost packets don't end an utterance, which 0.6 s of silence would do.
GAP_S, BREAK_S = 0.1, 0.5
LONGEST_GAP_S = 4 * 3600.0  # longer ones are timestamps that began anew, or are broken
FROM_ZERO = {"mov", "matroska"}  # containers whose timestamps count from the recording's beginning

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
        self._name = _name_of(where)
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
                raise _not_from_a_pipe(self._name)
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
                self._origin_s = _origin_s(container)
            declared_s = _declared_s(container, stream)
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
            if damaged and not (_is_pcm(stream) and _is_streamed(self._where)):
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
                self.ending = STALLED if stalled else _reason(error)
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


def is_pipe(where: Where) -> bool:
    """Whether sound comes from standard input or a named pipe, and can be read only once."""
    if is_url(where):
        return False
    try:
        mode = os.fstat(0).st_mode if str(where) in STDIN else Path(where).stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def open_container(where: Where) -> Any:
    """Open a file, a pipe or a URL. Raises AudioError if FFmpeg can't read it."""
    av.logging.set_level(None)  # FFmpeg would write its own messages to the terminal
    name = _name_of(where)
    try:
        if isinstance(where, str) and is_url(where):
            return av.open(where, metadata_errors="replace", timeout=(OPEN_S, STALL_S))
        return av.open(_readable(where), metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.EOFError):
        pass
    except (av.error.FFmpegError, OSError, ValueError) as error:
        check = "the URL and its server" if is_url(where) else "the path"
        raise AudioError(f"{name}: can't be read ({_reason(error)}); check {check}") from None
    if is_url(where):
        raise AudioError(f"{name}: no sound that FFmpeg can read; check what the URL gives")
    if is_pipe(where):
        raise _not_from_a_pipe(name)
    raise AudioError(f"{name}: not a sound file, or damaged; give wav, flac, mp3, ogg, m4a or mp4")


def _not_from_a_pipe(name: str) -> AudioError:
    """The error of a pipe, in which FFmpeg can't seek as it must in most mp4 and m4a files."""
    return AudioError(
        f"{name}: no sound that can be read from a pipe; send wav, flac, mp3 or ogg, "
        "or give the file by its path"
    )


def _readable(where: Where) -> str:
    """What FFmpeg opens for a path. Raises AudioError where there is nothing to open."""
    name, path = _name_of(where), Path(where)
    if str(where) in STDIN:
        if sys.stdin is None or os.isatty(0):
            raise AudioError(f"{name}: is a terminal; pipe sound into it, or give a file")
        if is_pipe(where):
            return "pipe:0"
        path = Path("/dev/stdin")  # a file: FFmpeg can seek in it
    if path.is_dir():
        raise AudioError(f"{name}: is a folder; give a sound file")
    status = path.stat()
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise AudioError(f"{name}: is empty; give a recording with sound")
    return str(path.absolute())


def _name_of(where: Where) -> str:
    return "standard input" if str(where) == "-" else public_name(where)


def _reason(error: Any) -> str:
    if isinstance(error, av.error.ExitError):  # our timeouts raise it
        return STALLED
    return str(getattr(error, "strerror", None) or error)


def _origin_s(container: Any) -> float:
    """The timestamp at which a recording begins: often 0, in others that of its first stream."""
    if FROM_ZERO & set(container.format.name.split(",")) or container.start_time is None:
        return 0.0
    return float(container.start_time / av.time_base)


def _declared_s(container: Any, stream: Any) -> float:
    """The end in seconds that a header declares; 0.0 where FFmpeg only estimates one."""
    names = set(container.format.name.split(","))
    # An mp3 with a LAME header declares its length, and starts late by the encoder's delay.
    if not (names & DECLARING or ("mp3" in names and stream.start_time)):
        return 0.0
    if stream.duration:
        end_s = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        return end_s - _origin_s(container)
    if len(container.streams) > 1:  # the container declares that of the longest
        return 0.0
    return float((container.duration or 0) / av.time_base)


def _is_pcm(stream: Any) -> bool:
    return bool(stream.codec_context.name.startswith("pcm_"))


def _is_streamed(where: Where) -> bool:
    """Whether its size wasn't known when it was written, so that its end looks cut off."""
    if is_url(where) or is_pipe(where):
        return True
    with Path(where).open("rb") as content:
        header = content.read(WAV_HEADER_BYTES)
    at = header.find(b"data")
    size = int.from_bytes(header[at + 4 : at + 8], "little")
    return header[:2] == b"RI" and at > 0 and (size == 0 or size >= PLACEHOLDER_BYTES)


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
