"""A recorded corpus, made various: the same clip faster, farther, in noise, a room, a telephone.

A corpus is one room and one microphone; a model that hears nothing else learns them by heart.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.dialogue import require_folder

Samples = NDArray[np.int16]
Sound = NDArray[np.float64]

SPEEDS = tuple(Fraction(n, 20) for n in (17, 18, 19, 21, 22, 23))
# Hz that a channel lets through: a cheap microphone, a voice call, a telephone.
BANDS = ((80.0, 7000.0), (150.0, 5500.0), (300.0, 3400.0))
COMPANDING = 255.0  # mu of G.711, the telephone's codec


@dataclass(frozen=True)
class Surroundings:
    """Noises and room responses to draw from, int16 at 16 kHz."""

    noises: tuple[Samples, ...]
    rooms: tuple[Samples, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """How a clip is changed; the seed fixes which noise, which part of it, and which room."""

    gain_db: float = 0.0
    level_dbfs: float | None = None  # RMS that the clip is brought to before the gain, if any
    snr_db: float | None = None  # None: no noise added
    room: bool = False
    speed: Fraction = Fraction(1)  # as a tape: pitch and formants go along
    band_hz: tuple[float, float] | None = None  # what the channel lets through, None for all
    companded: bool = False  # to eight bits and back, as G.711 does
    seed: int = 0


CLEAN = Condition()


def read_surroundings(folder: Path) -> Surroundings:
    """Read ``noise/`` and ``rir/`` under ``folder``; CorpusError if they are missing."""
    read = {}
    for kind, what in (("noise", "noises"), ("rir", "room impulse responses")):
        place = require_folder(
            folder / kind, corpus="surroundings", holds=f"{what} as .flac or .wav"
        )
        read[kind] = tuple(
            read_audio(path) for path in sorted(place.iterdir()) if path.suffix in (".flac", ".wav")
        )
    return Surroundings(read["noise"], read["rir"])


def draw_condition(
    draw: np.random.Generator, *, quietest_dbfs: float, loudest_dbfs: float
) -> Condition:
    """A condition as training meets it: any level; mostly noise at 0 to 30 dB or another speed;
    at times a room, a narrow channel, a telephone's codec.

    The level is drawn for itself, not relative to the recording's: how far away a microphone
    stands must tell nothing about an emotion, and in RAVDESS anger is simply louder.
    """
    return Condition(
        level_dbfs=float(draw.uniform(quietest_dbfs, loudest_dbfs)),
        snr_db=float(draw.uniform(0.0, 30.0)) if draw.random() < 0.6 else None,
        room=bool(draw.random() < 0.3),
        speed=SPEEDS[draw.integers(len(SPEEDS))] if draw.random() < 0.5 else Fraction(1),
        band_hz=BANDS[draw.integers(len(BANDS))] if draw.random() < 0.3 else None,
        companded=bool(draw.random() < 0.15),
        seed=int(draw.integers(2**31)),
    )


def change(samples: Samples, condition: Condition, surroundings: Surroundings) -> Samples:
    """The clip under ``condition``: speed, room, noise, channel, gain, codec, clipped to int16."""
    if condition == CLEAN:
        return samples
    draw = np.random.default_rng(condition.seed)
    sound = samples.astype(np.float64)
    if condition.speed != 1:
        sound = hasten(sound, condition.speed)
    if condition.room and surroundings.rooms:
        sound = reverberate(sound, surroundings.rooms[draw.integers(len(surroundings.rooms))])
    if condition.snr_db is not None:
        noise = _draw_noise(len(sound), draw=draw, noises=surroundings.noises)
        sound = add_noise(sound, noise, snr_db=condition.snr_db)
    if condition.band_hz is not None:
        sound = narrow(sound, condition.band_hz)
    if condition.level_dbfs is not None:
        sound = sound * (32768 * 10 ** (condition.level_dbfs / 20) / max(_rms(sound), 1e-9))
    sound = sound * 10 ** (condition.gain_db / 20)
    if condition.companded:
        sound = compand(sound)
    changed: Samples = np.clip(np.rint(sound), -32768, 32767).astype(np.int16)
    return changed


def hasten(sound: Sound, speed: Fraction) -> Sound:
    """Played ``speed`` times as fast, higher by as much; another speaker, nearly."""
    faster: Sound = signal.resample_poly(sound, speed.denominator, speed.numerator)
    return faster


def narrow(sound: Sound, band_hz: tuple[float, float]) -> Sound:
    """Through a channel that lets a band pass (Butterworth, fourth order), causally."""
    passes = signal.butter(4, band_hz, btype="bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    heard: Sound = signal.sosfilt(passes, sound)
    return heard


def compand(sound: Sound) -> Sound:
    """To eight bits by the mu-law and back (ITU-T G.711), of samples in +-32768."""
    level = np.clip(sound / 32768, -1.0, 1.0)
    small = np.sign(level) * np.log1p(COMPANDING * np.abs(level)) / np.log1p(COMPANDING)
    bits = np.rint(small * 127) / 127
    back: Sound = np.sign(bits) * np.expm1(np.abs(bits) * np.log1p(COMPANDING)) / COMPANDING * 32768
    return back


def reverberate(sound: Sound, room: Samples) -> Sound:
    """As heard in the room, as loud and as long as before, the direct sound in its old place."""
    direct = int(np.abs(room.astype(np.int32)).argmax())
    length = len(sound) + len(room) - 1
    spectrum = np.fft.rfft(sound, length) * np.fft.rfft(room.astype(np.float64), length)
    wet = np.fft.irfft(spectrum, length)[direct : direct + len(sound)]
    heard: Sound = wet * (_rms(sound) / max(_rms(wet), 1e-9))
    return heard


def add_noise(sound: Sound, noise: Sound, *, snr_db: float) -> Sound:
    """Sound and noise whose RMS differ by ``snr_db``; a silent clip stays as it is."""
    loudness = _rms(noise)
    if loudness == 0.0:
        return sound
    return sound + noise * (_rms(sound) / loudness * 10 ** (-snr_db / 20))


def _draw_noise(length: int, *, draw: np.random.Generator, noises: tuple[Samples, ...]) -> Sound:
    """One of the recorded noises from a random place, or white noise as one kind more."""
    choice = int(draw.integers(len(noises) + 1))
    if choice == len(noises):
        return draw.standard_normal(length)
    noise = noises[choice]
    start = int(draw.integers(len(noise)))
    return np.resize(np.roll(noise, -start), length).astype(np.float64)


def _rms(sound: Sound) -> float:
    return float(np.sqrt(np.mean(np.square(sound)))) if len(sound) else 0.0
