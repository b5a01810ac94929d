"""Standardises acoustic features as a bundle stores it, in training and live use alike."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

MAX_DEVIATIONS = 5.0  # an unusual microphone must not dominate the other features


@dataclass(frozen=True)
class Scaling:
    """Selects and standardises the acoustic features that the network is given.

    Of ComParE's functionals: a selection, or their principal components. Of low-dimensional
    features such as prosody: every column.
    """

    selected: NDArray[np.int64]  # [S], indices of the F input columns: 6373 for ComParE
    mean: Float32  # [S], over the training set
    deviation: Float32  # [S], over the training set, positive
    components: Float32 | None = None  # [J, K]: projects the first J of S to K, in unit variance

    @property
    def width(self) -> int:
        """A, the number of acoustic features that the network is given."""
        if self.components is None:
            return len(self.selected)
        joined = len(self.components)
        return len(self.selected) - joined + len(self.components[0])

    def __call__(self, measured: Float32) -> Float32:
        """Acoustic features [N, F] → [N, A] in standard deviations, at most 5 from the mean.

        NaN becomes the training mean: an undefined pitch must not invalidate the other features.
        """
        with np.errstate(all="ignore"):
            scaled = (measured[:, self.selected] - self.mean) / self.deviation
        clipped = _clip(np.nan_to_num(scaled, nan=0.0))
        if self.components is None:
            return clipped
        joined = len(self.components)
        projected = _clip(clipped[:, :joined] @ self.components)
        return np.concatenate([projected, clipped[:, joined:]], axis=1)


def _clip(deviations: Float32) -> Float32:
    return np.clip(deviations, -MAX_DEVIATIONS, MAX_DEVIATIONS).astype(np.float32)
