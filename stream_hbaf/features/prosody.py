"""Acoustic features from the corpora's published prosody tables: eight measurements by Praat.

Loudness and pitch depend on the speaker and on the distance to the microphone, so each value is
also given relative to the mean of earlier utterances, of the dialogue and of the same speaker.
Later utterances are never used.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

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


def describe_prosody(measured: NDArray[np.floating], speakers: Sequence[str]) -> Float32:
    """Measurements [U, 8] of one dialogue in order → features [U, 23], NaN where one is missing.

    The columns: 7 absolute values (all but intensity), 8 relative to the mean of the dialogue's
    earlier utterances, 8 relative to the mean of the same speaker's earlier ones; times and pitches
    on a logarithmic scale. Without an earlier value the relative value is zero.
    """
    values = np.array(measured, dtype=np.float64).reshape(-1, len(PROSODY))
    for column in (PROSODY.index(name) for name in LOGARITHMIC):
        values[:, column] = np.log1p(np.maximum(values[:, column], 0.0))
    described = [
        values[:, ABSOLUTE],
        values - _past_mean(values, ["dialogue"] * len(values)),
        values - _past_mean(values, speakers),
    ]
    return np.concatenate(described, axis=1).astype(np.float32)


def _past_mean(values: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    """The mean of the earlier values of the same group, [U, 8]; the value itself if there is none.

    A missing measurement is left out of the means.
    """
    means = np.empty_like(values)
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.float64]] = {}
    for row, (value, group) in enumerate(zip(values, groups, strict=True)):
        total = sums.setdefault(group, np.zeros(values.shape[1]))
        count = counts.setdefault(group, np.zeros(values.shape[1]))
        means[row] = np.where(count > 0, total / np.maximum(count, 1), value)
        known = np.isfinite(value)
        total += np.where(known, value, 0.0)
        count += known
    return means
