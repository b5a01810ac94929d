"""Sound of any rate and channels becomes int16, mono, 16 kHz, whatever the chunks."""

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream_hbaf.audio import source as pcm
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import AudioError

RATES = [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000]


def noise(*, frames: int, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((frames, channels)) * 0.3).astype("f4")


def resample(
    samples: NDArray[np.float32], *, rate_hz: int, cuts: list[int] | None = None
) -> NDArray[np.int16]:
    resampler = pcm.Resampler(rate_hz, samples.shape[1])
    pieces = [resampler.feed(piece) for piece in np.split(samples, sorted(cuts or []))]
    return np.concatenate([*pieces, resampler.finish()])


def test_rate_of_the_child() -> None:
    """The capture child's own rate is the project's."""
    assert pcm.RATE_HZ == SAMPLE_RATE_HZ


def test_to_int16_full_scale() -> None:
    """Sound at and beyond full scale is clipped and never wraps."""
    samples = np.array([1.0, -1.0, 1.5, -7.0, 0.0, 0.5, np.nan], np.float32)
    assert pcm.to_int16(samples).tolist() == [32767, -32768, 32767, -32768, 0, 16384, 0]


def test_to_int16_every_value() -> None:
    """Every int16 survives the way to float32 and back."""
    every = np.arange(-32768, 32768, dtype=np.int16)
    assert np.array_equal(pcm.to_int16(every.astype(np.float32) / np.float32(32768)), every)


def test_resampler_16_khz_mono() -> None:
    """16 kHz mono passes bit for bit, without delay."""
    sound = np.random.default_rng(1).integers(-32768, 32768, 5_000, dtype=np.int16)
    resampler = pcm.Resampler(16_000, 1)
    assert np.array_equal(
        resampler.feed(sound[:, None].astype(np.float32) / np.float32(32768)), sound
    )
    assert len(resampler.finish()) == 0


@settings(deadline=None, max_examples=60)
@given(
    rate_hz=st.sampled_from(RATES),
    channels=st.integers(1, 6),
    frames=st.integers(0, 12_000),
    draw=st.data(),
)
def test_resampler_any_split(rate_hz: int, channels: int, frames: int, draw: st.DataObject) -> None:
    """Any split of the input, empty pieces included, gives the same samples bit for bit."""
    samples = noise(frames=frames, channels=channels)
    cuts = draw.draw(st.lists(st.integers(0, frames), max_size=40))
    whole = resample(samples, rate_hz=rate_hz)
    assert np.array_equal(resample(samples, rate_hz=rate_hz, cuts=cuts), whole)
    assert len(whole) == int(frames * 16_000 / rate_hz + 0.5)


@pytest.mark.parametrize("rate_hz", RATES)
def test_resampler_one_shot(rate_hz: int) -> None:
    """The stream equals soxr's own one-shot HQ answer."""
    samples = noise(frames=rate_hz // 2 + 37)
    expected = pcm.to_int16(soxr.resample(samples[:, 0], rate_hz, 16_000, quality="HQ"))
    assert np.array_equal(resample(samples, rate_hz=rate_hz, cuts=[1, 100, 2_000]), expected)


def test_resampler_above_8_khz() -> None:
    """A tone that 16 kHz can't hold vanishes instead of folding back into the speech band."""
    time_s = np.arange(48_000) / 48_000
    tone = np.sin(2 * np.pi * 11_000 * time_s).astype("f4")[:, None]
    assert np.abs(resample(tone, rate_hz=48_000)[1_000:-1_000]).max() <= 1


def test_resampler_channels() -> None:
    """Channels are averaged."""
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1).astype("f4")
    assert set(resample(stereo, rate_hz=16_000).tolist()) == {4096}


def test_resampler_one_channel() -> None:
    """A channel that is picked arrives alone, bit for bit; one that isn't there is an error."""
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1).astype("f4")
    assert set(pcm.Resampler(16_000, 2, channel=0).feed(stereo).tolist()) == {16384}
    assert set(pcm.Resampler(16_000, 2, channel=1).feed(stereo).tolist()) == {-8192}
    with pytest.raises(AudioError, match="sound: no channel 2; it has channels 0 to 1"):
        pcm.Resampler(16_000, 2, channel=2)


@pytest.mark.parametrize(
    ("sample_format", "kind", "full_scale"),
    [("s16le", "<i2", 2**15), ("s32le", "<i4", 2**31), ("f32le", "<f4", 1)],
)
def test_from_bytes_formats(sample_format: pcm.SampleFormat, kind: str, full_scale: float) -> None:
    """Each format's full scale is 1, its channels are interleaved."""
    written = np.array([[0.5, -1.0], [0.0, 0.25]]) * full_scale
    read = pcm.from_bytes(written.astype(kind).tobytes(), sample_format=sample_format, channels=2)
    assert read.tolist() == [[0.5, -1.0], [0.0, 0.25]]
    assert read.dtype == np.float32


def test_from_bytes_incomplete() -> None:
    """A frame that is cut is an error that says how long frames are."""
    with pytest.raises(AudioError, match="6 bytes are no whole number of frames of 4 bytes"):
        pcm.from_bytes(bytes(6), sample_format="s16le", channels=2)


def test_resampler_wrong_channels() -> None:
    """Sound of another shape raises at once."""
    with pytest.raises(ValueError, match=r"expected \[n, 2\]"):
        pcm.Resampler(16_000, 2).feed(np.zeros((10, 1), np.float32))
