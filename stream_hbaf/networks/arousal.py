"""How aroused a voice sounds: a linear head on the acoustic features of an utterance.

Plain numpy. Shape letters: N utterances, A the width of the network's acoustic input.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Of the squared weights. With 10 or 100, corpora that are left out are ordered worse: ASED at once.
PENALTY = 1.0


@dataclass(frozen=True)
class ArousalHead:
    """The fitted head."""

    weights: Float32  # [A]
    bias: float

    def __call__(self, audio: Float32) -> Float64:
        """Audio [.., A] as the network is given it → arousal [..] from -1, calm, to 1, excited."""
        found = audio.astype(np.float64) @ self.weights.astype(np.float64) + self.bias
        return np.asarray(np.clip(found, -1.0, 1.0))


def fit_head(audio: Float32, targets: Float64, counts: Float64) -> ArousalHead:
    """The ridge regression (Hoerl and Kennard 1970) of targets [N] on audio [N, A].

    ``counts`` [N] are the weights of the utterances.
    """
    shares = counts / counts.sum()
    centre, middle = shares @ audio, float(shares @ targets)
    roots = np.sqrt(shares)[:, None]
    rows = roots * (audio - centre).astype(np.float64)
    inner = rows.T @ rows + PENALTY * np.eye(audio.shape[1])
    weights = np.linalg.solve(inner, rows.T @ (roots[:, 0] * (targets - middle)))
    bias = np.float32(middle - float(centre @ weights))  # as a bundle keeps it
    return ArousalHead(weights.astype(np.float32), float(bias))
