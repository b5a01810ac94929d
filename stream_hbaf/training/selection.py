"""Training: which columns of what is measured of sound are kept, and how they are scaled."""

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from stream_hbaf.bundle import Scaling
from stream_hbaf.training.material import NO_LABEL
from stream_hbaf.training.recipe import SelectionConfig

Float32 = NDArray[np.float32]


def fit_scaling(
    functionals: Float32,
    labels: NDArray[np.int64],
    plan: SelectionConfig | None,
    *,
    weights: Float32 | None = None,
    versions: int = 1,
    among: int | None = None,
) -> Scaling:
    """Standardise, then keep the functionals of the largest mean absolute SVM weight.

    Columns that are constant are left out; ``plan`` None keeps all others. Rows of a ``labels``
    of NO_LABEL count for the scale alone. The SVM heeds the rows' ``weights``, or else balances
    the classes. It chooses among the first ``among`` columns only, and all after them are kept.
    Each ``versions`` rows are of one clip, for the plan's stability.
    """
    heard = functionals[np.isfinite(functionals).any(axis=1)]
    mean: NDArray[np.float64] = np.asarray(np.nanmean(heard, axis=0, dtype=np.float64))
    deviation: NDArray[np.float64] = np.asarray(np.nanstd(heard, axis=0, dtype=np.float64))
    usable = np.flatnonzero(deviation > 1e-9 * np.maximum(np.abs(mean), 1.0))

    def scale_of(columns: NDArray[np.intp]) -> Scaling:
        chosen = mean[columns].astype(np.float32), deviation[columns].astype(np.float32)
        return Scaling(columns, *chosen)

    if plan is None:
        return scale_of(usable)
    after = functionals.shape[1] if among is None else among
    offered, kept = usable[usable < after], usable[usable >= after]
    if plan.stability:
        offered = offered[stability(functionals[:, offered], versions=versions) > plan.stability]
    if len(offered) > plan.width:
        known = labels != NO_LABEL
        machine = LinearSVC(
            C=plan.penalty,
            class_weight="balanced" if weights is None else None,
            max_iter=plan.iterations,
            random_state=0,
        )
        machine.fit(
            scale_of(offered)(functionals[known]),
            labels[known],
            sample_weight=None if weights is None else weights[known],
        )
        importance = np.abs(machine.coef_).mean(0)
        offered = np.sort(offered[np.argsort(-importance, kind="stable")[: plan.width]])
    return scale_of(np.concatenate([offered, kept]))


def stability(functionals: Float32, *, versions: int) -> NDArray[np.float64]:
    """[F], the share of each column's variance that lies between clips, 0 to 1.

    Each ``versions`` rows are one clip in another version: what noise, a room or another level
    moves more than another clip does tells little.
    """
    rows = np.where(np.isfinite(functionals), functionals, 0.0).astype(np.float64)
    clips = rows.reshape(-1, versions, rows.shape[1]).mean(axis=1)
    shares: NDArray[np.float64] = clips.var(axis=0) / np.maximum(rows.var(axis=0), 1e-30)
    return shares
