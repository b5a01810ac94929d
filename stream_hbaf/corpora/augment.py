"""A recorded corpus, made various: the same clip nearer, farther, in noise and in a room.

RAVDESS is one room and one microphone; a model that hears nothing else learns them by heart.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.corpora.dialogue import require_folder

Samples = NDArray[np.int16]


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
    """A condition as training meets it: any level; noise at 0 to 30 dB mostly; at times a room.

    The level is drawn for itself, not relative to the recording's: how far away a microphone
    stands must tell nothing about an emotion, and in RAVDESS anger is simply louder.
    """
    return Condition(
        level_dbfs=float(draw.uniform(quietest_dbfs, loudest_dbfs)),
        snr_db=float(draw.uniform(0.0, 30.0)) if draw.random() < 0.75 else None,
        room=bool(draw.random() < 0.3),
        seed=int(draw.integers(2**31)),
    )


def change(samples: Samples, condition: Condition, surroundings: Surroundings) -> Samples:
    """The clip under ``condition``: room first, then noise, then gain, clipped to int16."""
    if condition == CLEAN:
        return samples
    draw = np.random.default_rng(condition.seed)
    sound = samples.astype(np.float64)
    if condition.room and surroundings.rooms:
        sound = reverberate(sound, surroundings.rooms[draw.integers(len(surroundings.rooms))])
    if condition.snr_db is not None:
        noise = _draw_noise(len(sound), draw=draw, noises=surroundings.noises)
        sound = add_noise(sound, noise, snr_db=condition.snr_db)
    if condition.level_dbfs is not None:
        sound = sound * (32768 * 10 ** (condition.level_dbfs / 20) / max(_rms(sound), 1e-9))
    louder = np.rint(sound * 10 ** (condition.gain_db / 20))
    changed: Samples = np.clip(louder, -32768, 32767).astype(np.int16)
    return changed


def reverberate(sound: NDArray[np.float64], room: Samples) -> NDArray[np.float64]:
    """As heard in the room, as loud and as long as before, the direct sound in its old place."""
    direct = int(np.abs(room.astype(np.int32)).argmax())
    length = len(sound) + len(room) - 1
    spectrum = np.fft.rfft(sound, length) * np.fft.rfft(room.astype(np.float64), length)
    wet = np.fft.irfft(spectrum, length)[direct : direct + len(sound)]
    heard: NDArray[np.float64] = wet * (_rms(sound) / max(_rms(wet), 1e-9))
    return heard


def add_noise(
    sound: NDArray[np.float64], noise: NDArray[np.float64], *, snr_db: float
) -> NDArray[np.float64]:
    """Sound and noise whose RMS differ by ``snr_db``; a silent clip stays as it is."""
    loudness = _rms(noise)
    if loudness == 0.0:
        return sound
    return sound + noise * (_rms(sound) / loudness * 10 ** (-snr_db / 20))


def _draw_noise(
    length: int, *, draw: np.random.Generator, noises: tuple[Samples, ...]
) -> NDArray[np.float64]:
    """One of the recorded noises from a random place, or white noise as one kind more."""
    choice = int(draw.integers(len(noises) + 1))
    if choice == len(noises):
        return draw.standard_normal(length)
    noise = noises[choice]
    start = int(draw.integers(len(noise)))
    return np.resize(np.roll(noise, -start), length).astype(np.float64)


def _rms(sound: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(sound)))) if len(sound) else 0.0
