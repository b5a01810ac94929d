"""Sound of any rate and any number of channels becomes int16, mono, 16 kHz: the only form inside.

Kept free of the project's settings, because the capture child imports it and must start quickly.
"""

from typing import Final

import numpy as np
import soxr
from numpy.typing import NDArray

RATE_HZ: Final = 16_000  # config.SAMPLE_RATE_HZ again, without pydantic; a test compares them


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Scale [-1, 1] by 32768, round and clip: the exact inverse of int16 / 32768.

    Clipping guards the utterance's loudest sample: +1.0 is 32768, which wraps to -32768.
    """
    scaled = np.nan_to_num(np.rint(samples * np.float32(32768)))
    clipped: NDArray[np.float32] = np.clip(scaled, -32768, 32767)
    return clipped.astype(np.int16)


class Resampler:
    """Mean of the channels, then soxr HQ; any split of the input gives the same samples.

    16 kHz mono that came from int16 passes unchanged. ``feed`` holds back what the filter can't
    know yet (48 kHz: up to 40 ms); ``finish`` gives the rest, so that ``n`` frames become
    ``n * 16000 / rate_hz`` samples, halves rounded up.
    """

    def __init__(self, rate_hz: int, channels: int) -> None:
        self.rate_hz = rate_hz
        self.channels = channels
        self._stream = (
            None
            if rate_hz == RATE_HZ
            else soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32", quality="HQ")
        )

    def feed(self, samples: NDArray[np.float32]) -> NDArray[np.int16]:
        """The samples that are now sure; ``samples`` is [n, channels]."""
        if samples.ndim != 2 or samples.shape[1] != self.channels:
            raise ValueError(f"expected [n, {self.channels}] samples, not {samples.shape}")
        return self._resample(_mean(samples), last=False)

    def finish(self) -> NDArray[np.int16]:
        """What was held back; nothing may be fed after it."""
        return self._resample(np.zeros(0, np.float32), last=True)

    def _resample(self, mono: NDArray[np.float32], *, last: bool) -> NDArray[np.int16]:
        if self._stream is not None:
            mono = self._stream.resample_chunk(mono, last=last)
        return to_int16(mono)


def _mean(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, channels] -> [n], summed channel by channel so that n can't change the rounding."""
    total = np.ascontiguousarray(samples[:, 0], dtype=np.float32).copy()
    for channel in range(1, samples.shape[1]):
        total += samples[:, channel]
    if samples.shape[1] > 1:
        total /= np.float32(samples.shape[1])
    return total
