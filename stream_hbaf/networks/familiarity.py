"""How familiar a voice sounds: the share of unseen speakers' utterances that lie as far away.

Plain numpy. An utterance's distance from the training sound is measured in each acoustic block by
itself, as the mean distance to its nearest neighbours among training utterances (Sun et al. 2022,
"Out-of-distribution detection with deep nearest neighbors"), and averaged over the blocks that the
utterance has. On five corpora, each left out of training, this foretold better when predictions are
too sure than the Mahalanobis distance and its relative form (Ren et al. 2021) did. Shape letters: N
utterances, A the width of the scaled audio vector, W a block's, K its space's, S training
utterances, M reference utterances, B blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Columns = NDArray[np.int64]

NEIGHBOURS = 10  # among which a distance is averaged: one alone may be an outlier
KEPT = 1500  # training utterances a block: a search takes 0.1 ms
WIDEST = 64  # dimensions of a block's space: further components are mostly noise
SMALLEST = 1e-6  # distance and deviation: a copy of a training clip lies at no distance


@dataclass(frozen=True)
class Block:
    """Training utterances in one acoustic block, in a space in which they have unit variance."""

    columns: Columns  # [W] of the scaled audio vector
    mean: Float32  # [W]
    projection: Float32  # [W, K]
    neighbours: Float32  # [S, K]

    def distances(self, audio: Float32) -> Float64:
        """Audio [N, A] → mean distances to the nearest neighbours [N], NaN without the block."""
        found = np.full(len(audio), np.nan)
        values = audio[:, self.columns]
        for row in np.flatnonzero(_has_block(values)):
            point = (values[row] - self.mean) @ self.projection
            squares = ((self.neighbours - point) ** 2).sum(1)
            nearest = np.partition(squares, min(NEIGHBOURS, len(squares)) - 1)[:NEIGHBOURS]
            found[row] = np.sqrt(nearest).mean(dtype=np.float64)
        return found


@dataclass(frozen=True)
class Familiarity:
    """The training sound's statistics. Called with audio, it says how familiar that is."""

    blocks: Mapping[str, Block]
    reference: Float32  # [M, B], log distances of unseen speakers' utterances, NaN without a block
    weights: Float32  # [M], with which they count

    def __call__(self, audio: Float32) -> Float64:
        """Scaled audio [N, A], NaN in blocks that are missing → familiarity [N] in [0, 1].

        The share of the reference utterances that lie at least as far from the training sound, in
        the blocks that the utterance has. NaN where it has none of them.
        """
        logs = self._log_distances(audio)
        return np.array([self._share(row) for row in logs], dtype=np.float64)

    def _log_distances(self, audio: Float32) -> Float32:
        columns = [block.distances(audio) for block in self.blocks.values()]
        logs: Float32 = np.log(np.maximum(np.stack(columns, axis=1), SMALLEST)).astype(np.float32)
        return logs

    def _share(self, logs: Float32) -> float:
        """The familiarity of an utterance with these log distances [B]."""
        own = np.isfinite(logs)
        own[own] = np.isfinite(self.reference[:, own]).any(0)
        if not own.any():
            return float("nan")
        mean, deviation = _moments(self.reference[:, own], self.weights)
        reference = (self.reference[:, own] - mean) / deviation
        comparable = np.isfinite(reference).all(1)
        if not comparable.any():  # no reference utterance has all of these blocks
            reference, comparable = np.nan_to_num(reference), np.ones(len(reference), bool)
        farther = reference[comparable].mean(1) >= ((logs[own] - mean) / deviation).mean()
        weights = self.weights[comparable].astype(np.float64)
        return float(weights @ farther / weights.sum())


def _moments(values: Float32, weights: Float32) -> tuple[Float32, Float32]:
    """Weighted mean and deviation of each column [M, B] over its finite values."""
    known = np.isfinite(values)
    counted = weights[:, None] * known
    filled = np.where(known, values, 0.0)
    total = counted.sum(0)
    mean = (counted * filled).sum(0) / total
    variance = (counted * (filled - mean) ** 2 * known).sum(0) / total
    return mean, np.maximum(np.sqrt(variance), SMALLEST)


def _has_block(values: Float32) -> NDArray[np.bool_]:
    """Whether utterances have a block [N, W]: a missing one is NaN, or 0 as a network takes it."""
    return np.asarray(np.isfinite(values).all(1) & values.any(1))


def fit_familiarity(
    audio: Float32,
    held_out: Float32,
    *,
    blocks: Mapping[str, Sequence[int] | range],
    corpora: Sequence[str] | None = None,
    held_out_corpora: Sequence[str] | None = None,
) -> Familiarity:
    """The statistics of scaled training audio [N, A], with unseen speakers' [M, A] as reference.

    ``blocks`` names columns of the audio; one is missing in an utterance where any of its columns
    is NaN, or all are 0. It is left out where fewer training utterances have it than neighbours are
    needed, or no reference utterance does. Every corpus, of those that are given, weighs the same.
    """
    draw = np.random.default_rng(0)
    names = np.array(["" for _ in audio] if corpora is None else list(corpora))
    found: dict[str, Block] = {}
    for name, chosen in blocks.items():
        columns = np.array(list(chosen), dtype=np.int64)
        given = _has_block(audio[:, columns])
        heard = _has_block(held_out[:, columns]).any()
        if given.sum() >= NEIGHBOURS and heard:
            rows = np.flatnonzero(given)
            kept = _evenly(rows, names[rows], draw)
            found[name] = _fit_block(audio[kept][:, columns], columns)
    others = ["" for _ in held_out] if held_out_corpora is None else list(held_out_corpora)
    number = np.unique(others, return_inverse=True)[1]
    weights = (1.0 / np.bincount(number)[number]).astype(np.float32)
    empty = Familiarity(found, np.zeros((0, len(found)), np.float32), weights)
    reference = empty._log_distances(held_out) if found else empty.reference
    return Familiarity(found, reference, weights)


def _evenly(rows: Columns, corpora: NDArray[np.str_], draw: np.random.Generator) -> Columns:
    """At most ``KEPT`` of the rows, as many of each corpus as that has."""
    order = draw.permutation(len(rows))
    names, number = np.unique(corpora[order], return_inverse=True)
    rank = np.zeros(len(rows), np.int64)  # among the rows of the same corpus
    for corpus in range(len(names)):
        own = number == corpus
        rank[own] = np.arange(own.sum())
    return np.sort(rows[order[np.argsort(rank, kind="stable")[:KEPT]]])


def _fit_block(values: Float32, columns: Columns) -> Block:
    """The block of training utterances [S, W], by their principal components, whitened."""
    wide = values.astype(np.float64)
    mean = wide.mean(0)
    centred = wide - mean
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    deviations = singular / np.sqrt(max(1, len(wide) - 1))
    kept = deviations[:WIDEST] > SMALLEST * max(1.0, float(deviations[0]))
    projection = axes[:WIDEST][kept].T / deviations[:WIDEST][kept]
    return Block(
        columns,
        mean.astype(np.float32),
        projection.astype(np.float32),
        (centred @ projection).astype(np.float32),
    )
