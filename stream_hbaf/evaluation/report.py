"""Evaluation reports: offline evaluation of a system, and any report as JSON and as an HTML page.

A system is one bundle, or those of several seeds; its figures are means over the seeds. The only
file that imports jinja2.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import compress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stream_hbaf import __version__
from stream_hbaf.bundle import read_bundle_config
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import StreamHbafError
from stream_hbaf.evaluation.metrics import (
    Bin,
    FigureName,
    Spread,
    by_class,
    f1_by,
    paired_bootstrap,
    reliability,
    score,
    spread,
)
from stream_hbaf.evaluation.offline import OfflinePredictions, Progress, System, predict_system
from stream_hbaf.files import WriteError, atomic_write_text
from stream_hbaf.networks.calibration import MODALITIES, Modality

FIGURES = {
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "uar": "UAR",
    "ece": "ECE",
}
COMPARED: tuple[FigureName, ...] = ("weighted_f1", "macro_f1", "accuracy", "uar")
DRAWS = 10_000
TURNS = (1, 2, 3, 5, 9, 17, 33, 65)  # where the intervals of turn numbers start
WORDS = (0, 1, 2, 4, 7, 11, 16, 26)  # and those of utterance lengths
FEWEST = 20  # utterances of an interval that is drawn: F1 over fewer is mostly chance
STREAMING_FIGURES = {
    "uar": "UAR",
    "uar_shared": "UAR, shared",
    "weighted_f1": "weighted F1",
    "accuracy": "accuracy",
    "ece": "ECE",
    "ece_by_chance": "ECE by chance",
    "confident_half_gain": "confident half",
    "set_coverage": "coverage",
    "abstention": "abstained",
    "risk": "risk",
    "wer": "WER",
}
REPORT, METRICS = "report.html", "metrics.json"


def evaluate_offline(
    bundles: Sequence[str],
    *,
    corpus: str,
    corpora: Path,
    split: Split = "test",
    against: Sequence[str] = (),
    out: Path,
    cache: Path = Path("cache"),
    device: str = "cpu",
    workers: int = 2,
    progress: Progress = print,
) -> dict[str, Any]:
    """Evaluate a system's bundles on a corpus in ``corpora`` and write the report into ``out``.

    ``bundles`` are folders or names, one a seed; ``against`` those of another system to compare
    with. Writes report.html, which stands alone, and metrics.json, and returns the latter's
    content. Raises BundleError for a bundle that can't be loaded, has other labels than the corpus
    or belongs to another system than the rest, CorpusError for the corpus.
    """
    labels = read_bundle_config(bundles[0]).labels
    opened = open_corpus(corpus, corpora, all_splits=False, labels=labels)
    predict = partial(
        predict_system,
        corpus=opened,
        split=split,
        cache=cache,
        device=device,
        workers=workers,
        progress=progress,
    )
    system = predict(bundles)
    other = predict(against) if against else None
    metrics = measure(system, other, corpus=opened.name, split=split)
    write_report(metrics, out, progress=progress)
    progress(f"{out / REPORT}: {_summary(metrics)}")
    return metrics


def measure(system: System, other: System | None, *, corpus: str, split: str) -> dict[str, Any]:
    """Everything that the report shows, as plain values; figures are fractions of 1."""
    first = system.predictions[0]
    comparison = None
    if other is not None:
        compared: dict[str, Any] = {figure: _compare(system, other, figure) for figure in COMPARED}
        comparison = {"draws": DRAWS, **compared}
    return {
        "corpus": corpus,
        "split": split,
        "transcripts": "gold",
        "utterances": len(first.gold),
        "dialogues": len(np.unique(first.dialogues)),
        "labels": list(system.labels),
        "version": __version__,
        "system": _measure_system(system),
        "against": None if other is None else _measure_system(other),
        "comparison": comparison,
    }


def write_report(metrics: dict[str, Any], out: Path, *, progress: Progress = print) -> None:
    """Write metrics.json and report.html; what stood there under these names is replaced.

    Without matplotlib the page has no plots, and ``progress`` gets a line that says so. Raises
    StreamHbafError if the folder can't be written.
    """
    page = render_streaming(metrics) if "conditions" in metrics else render_offline(metrics)
    if "<svg" not in page:
        progress(f"{out / REPORT}: has no plots, since matplotlib is not installed")
    content = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        atomic_write_text(out / METRICS, content + "\n")
        atomic_write_text(out / REPORT, page)
    except WriteError as error:
        raise StreamHbafError(
            f"report: {out} can't be written ({error.strerror}); give another folder with --out"
        ) from None


def render_offline(metrics: dict[str, Any]) -> str:
    """The HTML of what ``measure`` gives."""
    shown: dict[str, Any] = {"figures": FIGURES, "compared": COMPARED, "fewest": FEWEST}
    return _fill("offline_report.html.jinja", metrics, _draw(metrics), shown)


def render_streaming(metrics: dict[str, Any]) -> str:
    """The HTML of a corpus's report by ``conditions.evaluate_streaming``."""
    pictures = _draw_conditions(metrics)
    return _fill("streaming_report.html.jinja", metrics, pictures, {"figures": STREAMING_FIGURES})


def modalities_of(config: BundleConfig) -> list[Modality]:
    """The modalities that a bundle's network takes."""
    taken = (config.network.use_audio, config.network.use_text)
    return list(compress(MODALITIES, taken))


def _fill(
    template: str, metrics: dict[str, Any], pictures: Mapping[str, str], shown: dict[str, Any]
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda value: f"{100 * value:.2f}",
        signed=lambda value: f"{100 * value:+.2f}".replace("-", "\u2212"),
        chance=lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}",
        interval=_interval,
    )
    marked = {name: Markup(svg) for name, svg in pictures.items()}
    return environment.get_template(template).render(shown, m=metrics, pictures=marked)


def _measure_system(system: System) -> dict[str, Any]:
    scores = [score(one.gold, one.probabilities) for one in system.predictions]
    config = system.configs[0]
    gold = np.concatenate([one.gold for one in system.predictions])
    pooled = reliability(gold, np.concatenate([one.probabilities for one in system.predictions]))
    return {
        "name": system.name,
        "mode": config.network.mode,
        "causal": config.network.mode == "live",
        "modalities": modalities_of(config),
        "with_audio": system.predictions[0].with_audio,
        "bundles": [
            {"id": c.id, "sha256": sha256, **_figures(s)}
            for c, sha256, s in zip(system.configs, system.sums, scores, strict=True)
        ],
        "config": config.model_dump(mode="json"),
        "figures": _spreads([_figures(s) for s in scores]),
        "classes": _class_spreads(system),
        "confusion": np.mean([s.confusion for s in scores], axis=0).tolist(),
        "reliability": [asdict(b) for b in pooled],  # of all seeds together
        "by_turn": _intervals(system, keys=lambda one: one.turns, starts=TURNS),
        "by_words": _intervals(system, keys=lambda one: one.words, starts=WORDS),
    }


def _figures(found: Any) -> dict[str, float]:
    return {figure: getattr(found, figure) for figure in FIGURES}


def _spreads(values: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    names = [name for name in values[0] if name != "support"]
    return {name: asdict(spread([one[name] for one in values])) for name in names}


def _class_spreads(system: System) -> dict[str, Any]:
    by_seed = [
        by_class(one.gold, one.probabilities.argmax(1), classes=len(system.labels))
        for one in system.predictions
    ]
    return {
        label: {**_spreads([asdict(one) for one in seeds]), "support": seeds[0].support}
        for label, *seeds in zip(system.labels, *by_seed, strict=True)
    }


def _intervals(
    system: System, *, keys: Callable[[OfflinePredictions], Any], starts: Sequence[int]
) -> list[dict[str, Any]]:
    """Each interval with its weighted F1's mean and spread over the seeds."""
    seeds = [
        f1_by(one.gold, one.probabilities.argmax(1), keys=keys(one), starts=starts)
        for one in system.predictions
    ]
    return [
        {**asdict(same[0]), "weighted_f1": asdict(spread([s.weighted_f1 for s in same]))}
        for same in zip(*seeds, strict=True)
    ]


def _compare(a: System, b: System, figure: FigureName) -> dict[str, dict[str, float]]:
    first = a.predictions[0]
    compare = partial(paired_bootstrap, first.gold, a.probabilities, b.probabilities)
    ways = {"utterances": None, "dialogues": first.dialogues}
    return {
        way: asdict(compare(draws=DRAWS, figure=figure, groups=groups))
        for way, groups in ways.items()
    }


def _draw(metrics: dict[str, Any]) -> dict[str, str]:
    """SVG of each picture of an offline report; none without matplotlib."""
    plots = _plots()
    if plots is None:
        return {}
    systems = [s for s in (metrics["system"], metrics["against"]) if s is not None]
    system = systems[0]
    found = {
        "confusion": plots.draw_confusion(np.array(system["confusion"]), labels=metrics["labels"]),
        "reliability": plots.draw_reliability([Bin(**b) for b in system["reliability"]]),
    }
    for key, about in (("by_turn", "turn of the dialogue"), ("by_words", "words")):
        enough = [n for n, s in enumerate(system[key]) if s["count"] >= FEWEST]
        drawn = enough or range(len(system[key]))
        names = [f"{_interval(s)}\nn = {s['count']}" for s in (system[key][n] for n in drawn)]
        series = [(s["name"], [Spread(**s[key][n]["weighted_f1"]) for n in drawn]) for s in systems]
        found[key] = plots.draw_intervals(names, series, name=key, about=about)
    return found


def _draw_conditions(metrics: dict[str, Any]) -> dict[str, str]:
    """SVG of each picture of a streaming report; none without matplotlib."""
    plots = _plots()
    if plots is None:
        return {}
    found: dict[str, str] = {}
    for name, one in metrics["conditions"].items():
        table, bins = np.array(one["confusion"]), [Bin(**b) for b in one["reliability"]]
        confusion, diagram = f"{name}-confusion", f"{name}-reliability"
        found[confusion] = plots.draw_confusion(table, labels=metrics["labels"], name=confusion)
        found[diagram] = plots.draw_reliability(bins, name=diagram)
    return found


def _plots() -> ModuleType | None:
    """The module that draws; None without matplotlib, which the plain install doesn't have."""
    try:
        from stream_hbaf.evaluation import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return plots


def _interval(interval: dict[str, Any]) -> str:
    first, last = interval["first"], interval["last"]
    if last is None:
        return f"{first}+"
    return str(first) if first == last else f"{first}–{last}"


def _summary(metrics: dict[str, Any]) -> str:
    figure = metrics["system"]["figures"]["weighted_f1"]
    seeds = len(metrics["system"]["bundles"])
    spread_over = f" ± {100 * figure['sd']:.2f} over {seeds} seeds" if seeds > 1 else ""
    return f"weighted F1 {100 * figure['mean']:.2f}{spread_over}"
