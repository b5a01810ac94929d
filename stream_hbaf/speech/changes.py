"""Finds where the speaker changes inside an utterance, from embeddings of its windows.

Pure: of all ways to cut the windows into stretches, the one whose stretches are each of one voice
with the greatest evidence, found by dynamic programming.
"""

import numpy as np

from stream_hbaf.speech.clustering import CAMPPLUS, Float64

# Chosen on readers of the dev set: 93 % of the changes are found where one of 1.3 to 3 s is inside
# the other, 97 % of those of longer turns, and 7 % of single readers' 11 s are cut.
CHANGE = 3.0  # log odds that a change must gain
LEAST_WINDOWS = 2  # of a stretch


def split(windows: Float64) -> list[tuple[int, int]]:
    """Embeddings of overlapping windows [W, D], unit length → stretches of one voice each.

    A stretch is its first window, and the one after its last.
    """
    count = len(windows)
    if count < 2 * LEAST_WINDOWS:
        return [(0, count)]
    sums = np.vstack([np.zeros(windows.shape[1]), windows.cumsum(axis=0)])
    best = np.full(count + 1, -np.inf)  # evidence of the windows before each
    best[0] = 0.0
    began = np.zeros(count + 1, int)  # where the last of their stretches begins
    for end in range(LEAST_WINDOWS, count + 1):
        starts = np.arange(end - LEAST_WINDOWS + 1)
        length2 = ((sums[end] - sums[starts]) ** 2).sum(axis=1)
        gain = best[starts] + CAMPPLUS.evidence(length2, (end - starts).astype(float)) - CHANGE
        began[end] = int(np.argmax(gain))
        best[end] = gain[began[end]]
    stretches: list[tuple[int, int]] = []
    end = count
    while end:
        stretches.insert(0, (int(began[end]), end))
        end = int(began[end])
    return stretches
