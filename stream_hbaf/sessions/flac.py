"""Writes FLAC files that are valid at any time, also when writing is stopped by a SIGKILL.

Every frame is written at once, and the number of samples in the header is updated about every
second: after a SIGKILL the last 72 ms are missing, and the length in the header is right to the
second.
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
UPDATE_EVERY = SAMPLE_RATE_HZ  # samples between two updates of the header


class FlacWriter:
    """Writes int16 mono 16 kHz audio to a new file that only its owner may read.

    Raises OSError if it can't; what was written before stays valid.
    """

    def __init__(self, path: Path) -> None:
        self.length = 0  # samples given to write()
        self._written = 0  # samples in whole frames in the file
        self._in_header = 0
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
        """Append samples, any number of them."""
        if not len(samples):
            return
        samples = np.ascontiguousarray(samples)
        self._sum.update(samples.astype("<i2", copy=False).tobytes())
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        frame.pts = self.length
        self._put(self._encoder.encode(frame))
        self.length += len(samples)
        if self._written - self._in_header >= UPDATE_EVERY:
            self._update_length()

    def close(self) -> None:
        """Write the last frame, the length, and the MD5 sum that players check; once."""
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
        """Write all of it, or nothing: half a frame would be damage to a decoder."""
        end = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError:
            os.ftruncate(self._file, end)
            raise

    def _update_length(self) -> None:
        kept = os.pread(self._file, 1, LENGTH_AT)[0] & 0xF0  # a part of the sample width
        length = (kept << 32) | self._written
        os.pwrite(self._file, length.to_bytes(5, "big"), LENGTH_AT)
        self._in_header = self._written


def flac_length(path: Path) -> int:
    """The number of samples in a FlacWriter's file, right to the second if its writer was killed; 0
    without a file."""
    try:
        with path.open("rb") as file:
            file.seek(LENGTH_AT)
            found = file.read(5)
    except FileNotFoundError:
        return 0
    return int.from_bytes(found, "big") & 0xF_FFFF_FFFF
