"""Augments clips: speed, room, noise, channel, level, codec and telephone, as a condition says.

A corpus is one room and one microphone; a model that is trained on nothing else learns them.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import signal

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, Section
from stream_hbaf.corpora.dialogue import require_folder

Samples = NDArray[np.int16]
Waveform = NDArray[np.float64]  # samples in +-32768 on their way through several changes

SPEEDS = tuple(Fraction(n, 20) for n in (17, 18, 19, 21, 22, 23))
# Pass bands of channels in Hz: a cheap microphone, a voice call, a telephone.
BANDS = ((80.0, 7000.0), (150.0, 5500.0), (300.0, 3400.0))
COMPANDING = 255.0  # mu of G.711, the telephone's codec
TELEPHONE_HZ = 8000  # sample rate of a call
SUFFIXES = (".flac", ".wav")
TESTED = 2  # recordings of noise and rooms of each kind that are for tests
Level = Annotated[float, Field(ge=-120.0, le=0.0)]  # dBFS


@dataclass(frozen=True)
class NoisesAndRooms:
    """Recorded noises and room impulse responses to draw from, int16 at 16 kHz."""

    noises: tuple[Samples, ...] = ()
    rooms: tuple[Samples, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """How a clip is changed; ``seed`` decides which noise from which place, and which room."""

    gain_db: float = 0.0
    level_dbfs: float | None = None  # RMS that the clip is brought to before the gain, if any
    snr_db: float | None = None  # None: no noise added
    room: bool = False
    speed: Fraction = Fraction(1)  # as a tape: pitch and formants go along
    band_hz: tuple[float, float] | None = None  # pass band of the channel, None for all
    companded: bool = False  # to eight bits and back, as G.711 does
    telephone: bool = False  # its band, sample rate and codec together
    seed: int = 0


CLEAN = Condition()

# The conditions that dev and test clips are put under.
CONDITIONS = {
    "clean": CLEAN,
    "noise_10db": Condition(snr_db=10.0),
    "noise_10db_room": Condition(snr_db=10.0, room=True),
    "gain_minus_20db": Condition(gain_db=-20.0),
    "gain_plus_20db": Condition(gain_db=20.0),
}


class AugmentationConfig(Section):
    """How training clips are augmented."""

    # Augmented versions of each training clip, beside the recording itself.
    copies: Annotated[int, Field(ge=0, le=1000)] = 4
    quietest_dbfs: Level = -62.0  # RMS of an augmented version is drawn between these two
    loudest_dbfs: Level = -12.0
    # Share of augmented versions that are telephone calls besides; others may have its band or its
    # codec alone. 0 in the shipped bundle's recipe.
    telephone: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


def training_conditions(index: int, config: AugmentationConfig) -> list[Condition]:
    """The conditions of training clip ``index``: as recorded, then ``copies`` that are drawn."""
    draws = (np.random.default_rng([config.seed, index, copy]) for copy in range(config.copies))
    return [CLEAN, *(draw_condition(draw, config) for draw in draws)]


def evaluation_condition(name: str, index: int) -> Condition:
    """The condition of CONDITIONS for clip ``index``: noise and room differ from clip to clip, not
    from run to run."""
    condition = CONDITIONS[name]
    return condition if condition == CLEAN else replace(condition, seed=index)


def read_noises_and_rooms(folder: Path, *, tested: bool) -> NoisesAndRooms:
    """Read ``noise/`` and ``rir/`` under ``folder``: those for tests, or those for training.

    A figure in noise that was trained on would say little of any other noise. So of each kind the
    last two files, by name, are for tests alone; of two or fewer all are for both. Raises
    CorpusError if a folder is missing.
    """

    def read(kind: str, what: str) -> tuple[Samples, ...]:
        holds = f"{what} as .flac or .wav"
        place = require_folder(folder / kind, corpus="noises and rooms", holds=holds)
        files = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES)
        trained = files[:-TESTED] or files
        return tuple(map(read_audio, files[-TESTED:] if tested else trained))

    return NoisesAndRooms(read("noise", "noises"), read("rir", "room impulse responses"))


def draw_condition(draw: np.random.Generator, config: AugmentationConfig) -> Condition:
    """A random condition for training: any level; mostly noise at 0 to 30 dB or another speed;
    sometimes a room, a narrow channel, a telephone's codec.

    The level is drawn for itself, not relative to the recording's: the distance of a microphone
    must not predict an emotion, and in RAVDESS anger is simply louder.
    """
    return Condition(
        level_dbfs=float(draw.uniform(config.quietest_dbfs, config.loudest_dbfs)),
        snr_db=float(draw.uniform(0.0, 30.0)) if draw.random() < 0.6 else None,
        room=bool(draw.random() < 0.3),
        speed=SPEEDS[draw.integers(len(SPEEDS))] if draw.random() < 0.5 else Fraction(1),
        band_hz=BANDS[draw.integers(len(BANDS))] if draw.random() < 0.3 else None,
        companded=bool(draw.random() < 0.15),
        seed=int(draw.integers(2**31)),
        # The last draw, and none without a share: other settings draw what they always drew.
        telephone=bool(config.telephone and draw.random() < config.telephone),
    )


def augment(samples: Samples, condition: Condition, sounds: NoisesAndRooms) -> Samples:
    """The clip under ``condition``: speed, room, noise, channel, level, gain, codec, telephone, in
    this order.

    int16 [n] → int16 [m], clipped; m differs from n only where the speed does.
    """
    if condition == CLEAN:
        return samples
    draw = np.random.default_rng(condition.seed)
    wave = samples.astype(np.float64)
    if condition.speed != 1:
        # Also as high: almost another speaker.
        wave = signal.resample_poly(wave, condition.speed.denominator, condition.speed.numerator)
    if condition.room and sounds.rooms:
        wave = reverberate(wave, sounds.rooms[draw.integers(len(sounds.rooms))])
    if condition.snr_db is not None:
        noise = _draw_noise(len(wave), draw=draw, noises=sounds.noises)
        wave = add_noise(wave, noise, snr_db=condition.snr_db)
    if condition.band_hz is not None:
        wave = _pass_band(wave, condition.band_hz)
    if condition.level_dbfs is not None:
        wave = wave * (32768 * 10 ** (condition.level_dbfs / 20) / max(_rms(wave), 1e-9))
    wave = wave * 10 ** (condition.gain_db / 20)
    if condition.companded:
        wave = compand(wave)
    if condition.telephone:
        wave = call(wave)
    augmented: Samples = np.clip(np.rint(wave), -32768, 32767).astype(np.int16)
    return augmented


def call(wave: Waveform) -> Waveform:
    """As it comes out of a telephone: 300 to 3,400 Hz, at 8 kHz, in the eight bits of G.711."""
    narrow = signal.resample_poly(_pass_band(wave, BANDS[-1]), TELEPHONE_HZ, SAMPLE_RATE_HZ)
    heard: Waveform = signal.resample_poly(compand(narrow), SAMPLE_RATE_HZ, TELEPHONE_HZ)
    return heard[: len(wave)]


def _pass_band(wave: Waveform, band_hz: tuple[float, float]) -> Waveform:
    band = signal.butter(4, band_hz, "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    passed: Waveform = signal.sosfilt(band, wave)  # causal
    return passed


def compand(wave: Waveform) -> Waveform:
    """To eight bits by the mu-law and back (ITU-T G.711)."""
    level = np.clip(wave / 32768, -1.0, 1.0)
    small = np.sign(level) * np.log1p(COMPANDING * np.abs(level)) / np.log1p(COMPANDING)
    bits = np.rint(small * 127) / 127
    large: Waveform = np.sign(bits) * np.expm1(np.abs(bits) * np.log1p(COMPANDING)) / COMPANDING
    return large * 32768


def reverberate(wave: Waveform, room: Samples) -> Waveform:
    """Convolved with a room's impulse response; length, RMS and the time of the direct sound stay
    as they were."""
    direct = int(np.abs(room.astype(np.int32)).argmax())
    wet = signal.fftconvolve(wave, room.astype(np.float64))[direct : direct + len(wave)]
    scaled: Waveform = wet * (_rms(wave) / max(_rms(wet), 1e-9))
    return scaled


def add_noise(wave: Waveform, noise: Waveform, *, snr_db: float) -> Waveform:
    """The sum, with the noise's RMS ``snr_db`` below the clip's; a silent clip stays silent."""
    loudness = _rms(noise)
    if loudness == 0.0:
        return wave
    return wave + noise * (_rms(wave) / loudness * 10 ** (-snr_db / 20))


def _draw_noise(length: int, *, draw: np.random.Generator, noises: tuple[Samples, ...]) -> Waveform:
    """One of the recorded noises from a random place, or white noise as one kind more."""
    choice = int(draw.integers(len(noises) + 1))
    if choice == len(noises):
        return draw.standard_normal(length)
    noise = noises[choice]
    start = int(draw.integers(len(noise)))
    return np.resize(np.roll(noise, -start), length).astype(np.float64)


def level_db(samples: Samples) -> float:
    """RMS in dB of one step."""
    return 20 * float(np.log10(max(_rms(samples.astype(np.float64)), 1e-9)))


def _rms(wave: Waveform) -> float:
    return float(np.sqrt(np.mean(np.square(wave)))) if len(wave) else 0.0
