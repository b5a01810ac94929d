"""Converts sound of any rate and number of channels to int16, mono, 16 kHz, the only form inside.

Imports none of the settings, because the capture process imports it and must start quickly.
"""

from typing import Final, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

RATE_HZ: Final = 16_000  # config.SAMPLE_RATE_HZ again, without pydantic; a test compares them

SampleFormat = Literal["s16le", "s32le", "f32le"]
WIDTHS: Final[dict[SampleFormat, int]] = {"s16le": 2, "s32le": 4, "f32le": 4}  # bytes


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Scale [-1, 1] by 32768, round and clip: the exact inverse of int16 / 32768.

    Clipping guards the utterance's loudest sample: +1.0 is 32768, which wraps to -32768.
    """
    scaled = np.nan_to_num(np.rint(samples * np.float32(32768)))
    clipped: NDArray[np.float32] = np.clip(scaled, -32768, 32767)
    return clipped.astype(np.int16)


def from_bytes(
    content: bytes, *, sample_format: SampleFormat, channels: int
) -> NDArray[np.float32]:
    """Interleaved PCM -> [n, channels] in [-1, 1]. Raises ValueError if a frame is incomplete.

    A float that isn't a number is silence: within a resampler it would spread.
    """
    size = WIDTHS[sample_format] * channels
    if len(content) % size:
        raise ValueError(f"{len(content)} bytes are no whole number of frames of {size} bytes")
    if sample_format == "f32le":
        floats = np.nan_to_num(np.frombuffer(content, "<f4"), nan=0.0, posinf=1.0, neginf=-1.0)
        samples: NDArray[np.float64] = np.clip(floats, -1, 1)
    else:
        whole = np.frombuffer(content, f"<i{WIDTHS[sample_format]}")
        samples = whole / 2.0 ** (8 * WIDTHS[sample_format] - 1)
    return samples.reshape(-1, channels).astype(np.float32)


def no_channel(channel: int, *, where: str, channels: int) -> str:
    """The error message for a channel that isn't there."""
    last = f"channels 0 to {channels - 1}" if channels > 1 else "one channel, 0"
    return f"{where}: no channel {channel}; it has {last}"


class Resampler:
    """Takes one channel, or the mean of all (None), and resamples it with soxr HQ.

    Any split of the input gives the same samples. 16 kHz mono that came from int16 passes
    unchanged. ``feed`` holds back the filter's delay (48 kHz: up to 40 ms); ``finish`` gives the
    rest, so that ``n`` frames become ``n * 16000 / rate_hz`` samples, halves rounded up.
    """

    def __init__(self, rate_hz: int, channels: int, *, channel: int | None = None) -> None:
        if channel is not None and not 0 <= channel < channels:
            raise ValueError(f"no channel {channel} among {channels}")
        self.rate_hz = rate_hz
        self.channels = channels
        self._picked = slice(None) if channel is None else slice(channel, channel + 1)
        self._stream = (
            None
            if rate_hz == RATE_HZ
            else soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32", quality="HQ")
        )

    def feed(self, samples: NDArray[np.float32]) -> NDArray[np.int16]:
        """The next resampled samples; ``samples`` is [n, channels]."""
        if samples.ndim != 2 or samples.shape[1] != self.channels:
            raise ValueError(f"expected [n, {self.channels}] samples, not {samples.shape}")
        return self._resample(_mean(samples[:, self._picked]), last=False)

    def finish(self) -> NDArray[np.int16]:
        """The samples held back; nothing may be fed afterwards."""
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
