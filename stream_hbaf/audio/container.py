"""Opens recordings and streams for FFmpeg, and tells what their containers declare.

User name, password and query of a URL don't appear in messages.
"""

import os
import stat
import sys
from pathlib import Path
from typing import Any

import av
import av.error
import av.logging

from stream_hbaf.audio.source import is_url, public_name
from stream_hbaf.errors import AudioError

Where = str | os.PathLike[str]

OPEN_S, STALL_S = 10.0, 15.0  # timeouts of a URL: HLS pauses for the length of a segment
STALLED = "it stopped sending"
STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")

# Containers whose header declares a length. Ogg has none: a truncated one looks like a shorter one.
DECLARING = {"wav", "flac", "mov", "matroska", "aiff", "caf", "w64"}
# A program that streams a wave file can't know its size. It writes none, the largest that the field
# holds, or the largest signed one, less headers and whole blocks.
PLACEHOLDER_BYTES = (1 << 31) - (1 << 16)
WAV_HEADER_BYTES = 1 << 14
FROM_ZERO = {"mov", "matroska"}  # containers whose timestamps count from the recording's beginning


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
    name = name_of(where)
    try:
        if isinstance(where, str) and is_url(where):
            return av.open(where, metadata_errors="replace", timeout=(OPEN_S, STALL_S))
        return av.open(_readable(where), metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.EOFError):
        pass
    except (av.error.FFmpegError, OSError, ValueError) as error:
        check = "the URL and its server" if is_url(where) else "the path"
        raise AudioError(f"{name}: can't be read ({reason_of(error)}); check {check}") from None
    if is_url(where):
        raise AudioError(f"{name}: no sound that FFmpeg can read; check what the URL gives")
    if is_pipe(where):
        raise not_from_a_pipe(name)
    raise AudioError(f"{name}: not a sound file, or damaged; give wav, flac, mp3, ogg, m4a or mp4")


def not_from_a_pipe(name: str) -> AudioError:
    """The error of a pipe, in which FFmpeg can't seek as it must in most mp4 and m4a files."""
    return AudioError(
        f"{name}: no sound that can be read from a pipe; send wav, flac, mp3 or ogg, "
        "or give the file by its path"
    )


def _readable(where: Where) -> str:
    """What FFmpeg opens for a path. Raises AudioError where there is nothing to open."""
    name, path = name_of(where), _path_of(where)
    if str(where) in STDIN:
        if sys.stdin is None or os.isatty(0):
            raise AudioError(f"{name}: is a terminal; pipe sound into it, or give a file")
        if is_pipe(where):
            return "pipe:0"
    if path.is_dir():
        raise AudioError(f"{name}: is a folder; give a sound file")
    status = path.stat()
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise AudioError(f"{name}: is empty; give a recording with sound")
    return str(path.absolute())


def _path_of(where: Where) -> Path:
    """The path; of a file that is standard input one that can be opened anew."""
    return Path("/dev/stdin") if str(where) in STDIN else Path(where)


def name_of(where: Where) -> str:
    """What messages call it."""
    return "standard input" if str(where) == "-" else public_name(where)


def reason_of(error: Any) -> str:
    """FFmpeg's or the system's error in a few words."""
    if isinstance(error, av.error.ExitError):  # our timeouts raise it
        return STALLED
    return str(getattr(error, "strerror", None) or error)


def origin_of(container: Any) -> float:
    """The timestamp at which a recording begins: often 0, in others that of its first stream."""
    if FROM_ZERO & set(container.format.name.split(",")) or container.start_time is None:
        return 0.0
    return float(container.start_time / av.time_base)


def declared_end_of(container: Any, stream: Any) -> float:
    """The end in seconds that a header declares; 0.0 where FFmpeg only estimates one."""
    names = set(container.format.name.split(","))
    # An mp3 with a LAME header declares its length, and starts late by the encoder's delay.
    if not (names & DECLARING or ("mp3" in names and stream.start_time)):
        return 0.0
    if stream.duration:
        end_s = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        return end_s - origin_of(container)
    if len(container.streams) > 1:  # the container declares that of the longest
        return 0.0
    return float((container.duration or 0) / av.time_base)


def is_pcm(stream: Any) -> bool:
    """Whether its packets are plain samples, of which any number can be read."""
    return bool(stream.codec_context.name.startswith("pcm_"))


def is_streamed(where: Where) -> bool:
    """Whether its size wasn't known when it was written, so that its end looks cut off."""
    if is_url(where) or is_pipe(where):
        return True
    with _path_of(where).open("rb") as content:
        header = content.read(WAV_HEADER_BYTES)
    at = header.find(b"data")
    size = int.from_bytes(header[at + 4 : at + 8], "little")
    return header[:2] == b"RI" and at > 0 and (size == 0 or size >= PLACEHOLDER_BYTES)
