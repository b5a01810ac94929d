"""Acoustic features from eight prosodic measurements by Praat: published tables, or live audio.

Loudness and pitch depend on the speaker and on the distance to the microphone, so each value is
also given relative to the mean of earlier utterances, of the dialogue and of the same speaker.
Later utterances are never used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

PROSODY = (
    "duration",  # s
    "avg_intensity",  # dB, with a gain that differs from dialogue to dialogue
    "intensity_variation",  # dB
    "avg_pitch",  # Hz
    "pitch_std",  # Hz
    "pitch_range",  # Hz
    "articulation_rate",  # syllables/s
    "mean_hnr",  # dB
)
LOGARITHMIC = ("duration", "avg_pitch", "pitch_std", "pitch_range")  # perceived as ratios
RELATIVE_ONLY = ("avg_intensity",)  # its absolute value is that of the recording's gain
ABSOLUTE = tuple(n for n, name in enumerate(PROSODY) if name not in RELATIVE_ONLY)
PROSODY_WIDTH = len(ABSOLUTE) + 2 * len(PROSODY)

SHORTEST_S = 0.1  # Praat's intensity takes windows of 85 ms
NOT_PERIODIC_DB = -200.0  # Praat's harmonicity of a frame without a period
# Syllable nuclei (de Jong and Wempe 2009): peaks of intensity in voiced speech
NUCLEUS_DB = 25.0  # below the loudest peak, at most
DIP_DB = 2.0  # between two nuclei, at least
PAUSE_S = 0.3  # silences that long aren't articulation


@dataclass(frozen=True, slots=True)
class ProsodyPast:
    """What is remembered of a dialogue's earlier utterances: sums and counts, [8] each."""

    dialogue: tuple[Float64, Float64] = field(default_factory=lambda: _nothing())
    speakers: Mapping[str, tuple[Float64, Float64]] = field(default_factory=dict)


def describe_next(
    measured: NDArray[np.floating], *, speaker: str, past: ProsodyPast
) -> tuple[Float32, ProsodyPast]:
    """Measurements [8] of a dialogue's next utterance → features [23], and the past after it.

    The columns: 7 absolute values (all but intensity), 8 relative to the mean of the dialogue's
    earlier utterances, 8 relative to the mean of the same speaker's earlier ones; times and pitches
    on a logarithmic scale. Without an earlier value the relative value is zero. A missing
    measurement is NaN in its own columns, and left out of the means.
    """
    values = np.array(measured, dtype=np.float64)
    for column in (PROSODY.index(name) for name in LOGARITHMIC):
        values[column] = np.log1p(np.maximum(values[column], 0.0))
    own = past.speakers.get(speaker) or _nothing()
    relative = [values - _mean(group, without=values) for group in (past.dialogue, own)]
    after = ProsodyPast(_add(past.dialogue, values), {**past.speakers, speaker: _add(own, values)})
    features: Float32 = np.concatenate([values[list(ABSOLUTE)], *relative]).astype(np.float32)
    return features, after


def describe_prosody(measured: NDArray[np.floating], speakers: Sequence[str]) -> Float32:
    """Measurements [U, 8] of one dialogue in order → features [U, 23], as ``describe_next``."""
    rows, past = [np.empty((0, PROSODY_WIDTH), np.float32)], ProsodyPast()
    for values, speaker in zip(measured, speakers, strict=True):
        row, past = describe_next(values, speaker=speaker, past=past)
        rows.append(row[None])
    return np.concatenate(rows)


def _nothing() -> tuple[Float64, Float64]:
    return np.zeros(len(PROSODY)), np.zeros(len(PROSODY))


def _mean(group: tuple[Float64, Float64], *, without: Float64) -> Float64:
    """The mean of a group's earlier values, or the value itself if there is none."""
    total, count = group
    mean: Float64 = np.where(count > 0, total / np.maximum(count, 1), without)
    return mean


def _add(group: tuple[Float64, Float64], values: Float64) -> tuple[Float64, Float64]:
    known = np.isfinite(values)
    return group[0] + np.where(known, values, 0.0), group[1] + known


class Prosody:
    """Measures audio as the corpora's tables were measured, with Praat's standard settings.

    The tables' own settings were never published, so that the values may differ a little from
    theirs. Raises ModelError if the package isn't installed.
    """

    name = "prosody"
    width = len(PROSODY)

    def __init__(self) -> None:
        try:
            # Praat is under the GPL: an extra, loaded only where it is asked for.
            import parselmouth
        except ImportError:
            raise ModelError(
                "prosody: praat-parselmouth is missing; pip install 'stream-hbaf[prosody]'"
            ) from None
        self._sound = parselmouth.Sound
        self.version = f"1-parselmouth{parselmouth.__version__}"

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance (int16 [n], mono, 16 kHz) → [8], NaN where one can't be measured.

        None under 100 ms or for silence.
        """
        duration_s = len(samples) / SAMPLE_RATE_HZ
        if duration_s < SHORTEST_S or not samples.any():
            return None
        sound = self._sound(samples / 32768, SAMPLE_RATE_HZ)
        intensity = sound.to_intensity()
        pitch = sound.to_pitch()
        voiced = pitch.selected_array["frequency"]
        voiced = voiced[voiced > 0]
        levels_db, times_s = intensity.values[0], intensity.xs()
        harmonicity = sound.to_harmonicity_cc().values
        periodic = harmonicity[harmonicity > NOT_PERIODIC_DB]
        nuclei = _count_nuclei(levels_db, [pitch.get_value_at_time(t) > 0 for t in times_s])
        speech_s = duration_s - _paused_s(levels_db, float(times_s[1] - times_s[0]))
        return np.array(
            [
                duration_s,
                intensity.get_average(),
                levels_db.std(),
                *((voiced.mean(), voiced.std(), np.ptp(voiced)) if len(voiced) else (np.nan, 0, 0)),
                nuclei / speech_s if nuclei else np.nan,
                periodic.mean() if len(periodic) else np.nan,
            ],
            np.float32,
        )

    def close(self) -> None:
        """Nothing to free."""


def _count_nuclei(levels_db: Float64, voiced: Sequence[bool]) -> int:
    """The number of voiced peaks of intensity with a dip before each."""
    count, dip_db = 0, -np.inf
    threshold_db = max(levels_db.max() - NUCLEUS_DB, levels_db.min())
    for n in range(1, len(levels_db) - 1):
        before, level_db, after = levels_db[n - 1 : n + 2]
        dip_db = min(dip_db, level_db) if count else level_db - DIP_DB
        peak = before < level_db >= after and level_db > threshold_db
        if peak and voiced[n] and level_db - dip_db >= DIP_DB:
            count, dip_db = count + 1, level_db
    return count


def _paused_s(levels_db: Float64, step_s: float) -> float:
    """Seconds in silences of at least 0.3 s."""
    silent = levels_db < levels_db.max() - NUCLEUS_DB
    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(int)))
    lengths_s = (edges[1::2] - edges[::2]) * step_s
    return float(lengths_s[lengths_s >= PAUSE_S].sum())
