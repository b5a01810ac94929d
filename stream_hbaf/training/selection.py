"""Training: what of the sound's measurements the network hears, and how that is scaled."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import LinearSVC
from sklearn.utils.extmath import randomized_svd

from stream_hbaf.corpora.dataset import NO_LABEL
from stream_hbaf.features.scaling import Scaling
from stream_hbaf.training.recipe import SelectionConfig

Float32 = NDArray[np.float32]


def fit_scaling(
    functionals: Float32, labels: NDArray[np.int64], plan: SelectionConfig | None
) -> Scaling:
    """Standardise, then keep the functionals of the largest mean absolute SVM weight.

    Columns that are constant are left out; ``plan`` None keeps all others, as it must for tokens
    [N, F, D]. Rows of a ``labels`` of NO_LABEL count for the scale alone.
    """
    functionals = functionals.reshape(-1, functionals.shape[-1])
    scaling = _standardise(functionals)
    if plan is None or plan.width >= scaling.width:
        return scaling
    known = labels != NO_LABEL
    machine = LinearSVC(
        C=plan.penalty, class_weight="balanced", max_iter=plan.iterations, random_state=0
    )
    machine.fit(scaling(functionals[known]), labels[known])
    importance = np.abs(machine.coef_).mean(0)
    chosen = np.sort(np.argsort(-importance, kind="stable")[: plan.width])
    return Scaling(scaling.selected[chosen], scaling.mean[chosen], scaling.deviation[chosen])


def scale(scaling: Scaling, measured: Float32) -> Float32:
    """Measured [N, D], or tokens [N, F, D], → what the network hears; no token stays none."""
    if measured.ndim == 2:
        return scaling(measured)
    there = np.isfinite(measured).any(axis=-1)
    heard = np.full((*measured.shape[:2], scaling.width), np.nan, np.float32)
    heard[there] = scaling(measured[there])
    return heard


def fit_components(
    measured: Float32, *, weights: Float32, among: int, components: int | None
) -> Scaling:
    """Standardise, then join the first ``among`` columns into so many principal components.

    Rows count by ``weights``, for the components only; None leaves the columns as they are.
    A selection by an SVM learns what tells classes apart on these corpora, and fails on the next;
    components don't know the classes. Each has a deviation of 1 in training.
    """
    scaling = _standardise(measured.reshape(-1, measured.shape[-1]))
    joined = int(np.searchsorted(scaling.selected, among))
    if components is None or joined <= components:
        return scaling
    rows = scaling(measured)[:, :joined] * np.sqrt(weights / weights.sum())[:, None]
    _, deviations, directions = randomized_svd(rows, n_components=components, random_state=0)
    return replace(scaling, components=(directions.T / deviations).astype(np.float32))


def _standardise(measured: Float32) -> Scaling:
    heard = measured[np.isfinite(measured).any(axis=1)]
    mean: NDArray[np.float64] = np.asarray(np.nanmean(heard, axis=0, dtype=np.float64))
    deviation: NDArray[np.float64] = np.asarray(np.nanstd(heard, axis=0, dtype=np.float64))
    usable = np.flatnonzero(deviation > 1e-9 * np.maximum(np.abs(mean), 1.0))
    return Scaling(usable, mean[usable].astype(np.float32), deviation[usable].astype(np.float32))
