"""An utterance becomes features: its frames as a short sequence of tokens.

For networks that align speech and words token by token. A token is the mean of the frames of
80 ms, about half a syllable; an utterance of more than five seconds has longer ones.
"""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TOKEN_MS = 80
MOST_TOKENS = 64  # of speech
MOST_TEXT_TOKENS = 32  # word pieces; spoken turns seldom have more


def to_tokens(frames: NDArray[np.floating], *, frame_ms: int) -> Float32:
    """Frames [T, D] → tokens [F, D], at most 64, in their order; none of no frames.

    A value that isn't a number counts for nothing; it stays only where a whole token has no other.
    """
    stride = max(TOKEN_MS // frame_ms, -(-len(frames) // MOST_TOKENS))
    starts = np.arange(0, len(frames), stride)
    known = np.isfinite(frames)
    sums = np.add.reduceat(np.where(known, frames, 0.0), starts, axis=0, dtype=np.float64)
    counts = np.add.reduceat(known, starts, axis=0, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        tokens: Float32 = (sums / counts).astype(np.float32)
    return tokens


def to_row(tokens: Float32, *, most: int = MOST_TOKENS) -> Float32:
    """Tokens [F, D] as one vector [most * D], NaN where there are fewer; further ones are cut."""
    row = np.full((most, tokens.shape[1]), np.nan, np.float32)
    row[: len(tokens)] = tokens[:most]
    return row.ravel()


def from_rows(rows: Float32, *, most: int = MOST_TOKENS) -> Float32:
    """What ``to_row`` made of N utterances, [N, most * D] → [N, most, D]."""
    return rows.reshape(len(rows), most, -1)
