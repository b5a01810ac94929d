"""A session's sound: FLAC that grows while it is written, and is whole whenever writing stops.

Every frame is written at once, and about every second the header is told how many samples there
are: after a SIGKILL the newest 72 ms are missing, and players know the length to the second.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ

Samples = NDArray[np.int16]

MAGIC = b"fLaC"
LAST_BLOCK_STREAMINFO = bytes([0x80, 0, 0, 34])  # one metadata block, of 34 bytes
STREAMINFO_AT = len(MAGIC) + len(LAST_BLOCK_STREAMINFO)
HEADER_BYTES = STREAMINFO_AT + 34
LENGTH_AT = STREAMINFO_AT + 13  # 36 bits: the low half of this byte and the four after it
SUM_AT = STREAMINFO_AT + 18  # to the block's end
TOLD_EVERY = SAMPLE_RATE_HZ


class FlacWriter:
    """Writes int16 mono 16 kHz sound to a new file that only its owner may read.

    Raises OSError if it can't; what is in the file by then is whole.
    """

    def __init__(self, path: Path) -> None:
        self.length = 0  # samples taken
        self._written = 0  # samples in whole frames in the file
        self._told = 0
        self._sum = hashlib.md5(usedforsecurity=False)  # FLAC's own
        self._encoder: Any = av.CodecContext.create("flac", "w")
        self._encoder.sample_rate = SAMPLE_RATE_HZ
        self._encoder.layout = "mono"
        self._encoder.format = "s16"
        self._encoder.open()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._append(MAGIC + LAST_BLOCK_STREAMINFO + bytes(self._encoder.extradata or b""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, samples: Samples) -> None:
        """Take the next samples, any number of them."""
        if not len(samples):
            return
        samples = np.ascontiguousarray(samples)
        self._sum.update(samples.astype("<i2", copy=False).tobytes())
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        frame.pts = self.length
        self._put(self._encoder.encode(frame))
        self.length += len(samples)
        if self._written - self._told >= TOLD_EVERY:
            self._tell_length()

    def close(self) -> None:
        """Write what is held back, the length, and the sum that players check; once."""
        if self._file < 0:
            return
        try:
            self._put(self._encoder.encode(None))
            sizes = bytes(self._encoder.extradata)[: SUM_AT - STREAMINFO_AT]
            os.pwrite(self._file, sizes + self._sum.digest(), STREAMINFO_AT)
        finally:
            os.close(self._file)
            self._file = -1

    def _put(self, packets: Any) -> None:
        for packet in packets:
            self._append(bytes(packet))
            self._written += packet.duration or 0

    def _append(self, content: bytes) -> None:
        """All of it, or nothing: half a frame would be taken for damage."""
        end = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError:
            os.ftruncate(self._file, end)
            raise

    def _tell_length(self) -> None:
        kept = os.pread(self._file, 1, LENGTH_AT)[0] & 0xF0  # belongs to the sample's width
        length = (kept << 32) | self._written
        os.pwrite(self._file, length.to_bytes(5, "big"), LENGTH_AT)
        self._told = self._written


def flac_length(path: Path) -> int:
    """Samples in a file of ours, to the second if its writer was killed; 0 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(LENGTH_AT)
            told = file.read(5)
    except FileNotFoundError:
        return 0
    return int.from_bytes(told, "big") & 0xF_FFFF_FFFF
