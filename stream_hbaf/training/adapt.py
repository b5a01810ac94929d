"""Adapts a bundle to where it runs: a small head, fitted on the corrections of recorded sessions.

The network stays as it is. N corrected utterances, C labels.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from stream_hbaf.bundle import CARD, METRICS, Bundle, resolve_bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.corpora.dialogue import Corpus, Dialogue
from stream_hbaf.corpora.session_corpus import dialogues_of
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.evaluation.offline import predict_corpus
from stream_hbaf.networks.calibration import LARGEST, PATTERNS, Calibration, Head, log_softmax
from stream_hbaf.sessions.session import open_sessions
from stream_hbaf.training.calibration_fit import Sample, set_threshold

Float64 = NDArray[np.float64]
Labels = NDArray[np.int64]

FEWEST = 30  # corrected utterances: with fewer, what is fitted is chance
COVERAGE = 0.9  # of the new label sets
FOLDS = 5
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, np.inf)  # of the head's distance from none; inf: none
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Adapted:
    """What a bundle's adaptation gave, by cross-validation."""

    corrected: dict[str, int]  # utterances by label
    loss: tuple[float, float]  # mean log loss before and after
    accuracy: tuple[float, float]
    coverage: float  # share of the new sets that hold the label
    calibration: Calibration
    shares: dict[str, float]


def adapt(
    name: str,
    sessions: Path,
    *,
    out: Path,
    cache: Path,
    device: str = "cpu",
    workers: int = 2,
    progress: Callable[[str], None] = print,
) -> Adapted:
    """Write the bundle, adapted to the corrections in ``sessions``, as the new folder ``out``.

    Raises ConfigError if ``out`` exists, CorpusError for too few corrections, and the errors of
    ``Bundle.load`` and ``predict_corpus``.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; give a folder that doesn't")
    bundle = Bundle.load(name, device=device)
    plain = bundle.calibration.model_copy(update={"head": None})
    unadapted = replace(bundle, config=bundle.config.model_copy(update={"calibration": plain}))
    dialogues = _corrected_dialogues(sessions, bundle.labels, progress=progress)
    found = predict_corpus(
        unadapted,
        Corpus("sessions", bundle.labels, {"train": tuple(dialogues)}),
        "train",
        cache=cache,
        device=device,
        workers=workers,
        progress=progress,
    )
    adapted = fit_head(plain, found.probabilities, found.gold, labels=bundle.labels)
    _save(unadapted, adapted, out=out, source=resolve_bundle(name))
    return adapted


def _corrected_dialogues(
    sessions: Path, labels: Sequence[str], *, progress: Callable[[str], None]
) -> list[Dialogue]:
    """Dialogues up to their last correction, with the corrections to labels of the bundle."""
    found, count, strange = [], Counter[str](), 0
    for dialogue in dialogues_of(open_sessions(sessions)):
        own = dialogue.utterances
        strange += sum(one.label is not None and one.label not in labels for one in own)
        known = [one if one.label in labels else replace(one, label=None) for one in own]
        while known and known[-1].label is None:
            known.pop()
        count.update(one.label for one in known if one.label is not None)
        if known:
            found.append(Dialogue(dialogue.id, tuple(known)))
    if strange:
        progress(f"{strange} corrections to labels that the bundle doesn't have are left out")
    if count.total() < FEWEST or len(count) < 2:
        raise CorpusError(
            f"{sessions}: {count.total()} corrected utterances of {len(count)} labels, but at "
            f"least {FEWEST} of two or more are needed; correct more, and confirm right answers too"
        )
    return found


def fit_head(
    calibration: Calibration, probabilities: Float64, gold: Labels, *, labels: Sequence[str]
) -> Adapted:
    """Fit the head and the label sets on answers [N, C] and their right labels [N].

    The penalty is chosen by cross-validation, none at all among the choices: where corrections
    don't help, the answers stay. The sets' threshold is one for all modality patterns.
    """
    logs = np.log(np.maximum(probabilities, TINY))
    folds = np.random.default_rng(0).permutation(len(gold)) % FOLDS
    answers = {penalty: _cross_validated(logs, gold, folds, penalty) for penalty in PENALTIES}
    best = min(PENALTIES, key=lambda penalty: _loss(answers[penalty], gold))
    unseen = np.exp(answers[best])
    threshold = set_threshold(Sample.of(unseen, gold, np.full(len(gold), 1 / len(gold))), COVERAGE)
    thresholds = {p: threshold if p else calibration.thresholds[p] for p in PATTERNS}
    counts = np.bincount(gold, minlength=len(labels))
    shares = (counts + 1) / (len(gold) + len(labels))
    inside = unseen >= np.minimum(threshold, unseen.max(1))[:, None]
    return Adapted(
        corrected={label: int(n) for label, n in zip(labels, counts, strict=True) if n},
        loss=(_loss(logs, gold), _loss(answers[best], gold)),
        accuracy=(_accuracy(logs, gold), _accuracy(answers[best], gold)),
        coverage=float(inside[np.arange(len(gold)), gold].mean()),
        calibration=calibration.model_copy(
            update={
                "head": _fit(logs, gold, best),
                "thresholds": thresholds,
                "coverage": COVERAGE,
            }
        ),
        shares=dict(zip(labels, map(float, shares), strict=True)),
    )


def _cross_validated(logs: Float64, gold: Labels, folds: Labels, penalty: float) -> Float64:
    """Log probabilities [N, C], each by a head that was fitted without its fold."""
    found = np.empty_like(logs)
    for fold in range(FOLDS):
        own = folds == fold
        head = _fit(logs[~own], gold[~own], penalty)
        found[own] = log_softmax(head.scale * logs[own] + np.array(head.bias))
    return found


def _fit(logs: Float64, gold: Labels, penalty: float) -> Head:
    """The head that makes the labels likeliest, less a penalty on its distance from none."""
    classes = logs.shape[1]
    if not np.isfinite(penalty):
        return Head(scale=1.0, bias=(0.0,) * classes)

    def cost(setting: Float64) -> tuple[float, Float64]:
        scale, bias = np.exp(setting[0]), setting[1:]
        answers = log_softmax(scale * logs + bias)
        missed = np.exp(answers)
        missed[np.arange(len(gold)), gold] -= 1.0  # derivative by what is normalised
        gradient = np.concatenate([[scale * float((missed * logs).sum())], missed.sum(0)])
        total = -answers[np.arange(len(gold)), gold].sum() + penalty * float(setting @ setting)
        return float(total), gradient + 2.0 * penalty * setting

    limit = [(-np.log(LARGEST), np.log(LARGEST))] + [(-LARGEST, LARGEST)] * classes
    start = np.zeros(classes + 1)
    found = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=limit).x
    return Head(scale=float(np.exp(found[0])), bias=tuple(map(float, found[1:])))


def _loss(logs: Float64, gold: Labels) -> float:
    return float(-logs[np.arange(len(gold)), gold].mean())


def _accuracy(logs: Float64, gold: Labels) -> float:
    return float((logs.argmax(1) == gold).mean())


def _save(bundle: Bundle, adapted: Adapted, *, out: Path, source: Path) -> None:
    """Write the adapted bundle, with the figures and the card of the one that it came from."""
    config: BundleConfig = bundle.config.model_copy(
        update={
            "id": out.name,
            "calibration": adapted.calibration,
            "shares": adapted.shares,
            "replaces": (),
        }
    )
    figures = {
        "from": {"id": bundle.id, "sha256": bundle.sha256},
        "corrected": adapted.corrected,
        "loss": list(adapted.loss),
        "accuracy": list(adapted.accuracy),
        "coverage": adapted.coverage,
    }
    try:
        metrics: dict[str, Any] = json.loads((source / METRICS).read_text(encoding="utf-8"))
        card = (source / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise BundleError(
            f"bundle {source}: {METRICS} or {CARD} can't be read; get the bundle again"
        ) from None
    metrics |= {
        "id": out.name,
        "calibration": adapted.calibration.model_dump(mode="json"),
        "adapted": figures,
    }
    replace(bundle, config=config).save(out, metrics=metrics, card=_card(card, adapted, bundle.id))


def _card(card: str, adapted: Adapted, origin: str) -> str:
    """The card, beginning with what was adapted."""
    counts = ", ".join(f"{label} {count}" for label, count in adapted.corrected.items())
    (before, after), (right_before, right) = adapted.loss, adapted.accuracy
    return f"""# Adapted from {origin}

A scale and a bias for each label were fitted on {sum(adapted.corrected.values())} corrected
utterances ({counts}), and the threshold of the label sets. By cross-validation in {FOLDS} folds on
these: mean log loss {before:.3f} before, {after:.3f} after; right answers {right_before:.1%}
before, {right:.1%} after; {adapted.coverage:.1%} of the new sets hold the right label. If people
corrected wrong answers alone, the figures are lower than on all. What follows was measured before.

{card}"""
