"""Training: a finished system judged on a corpus, as a page for people and as JSON.

A system is one bundle, or those of several seeds; its figures are means over them. The only file
that imports jinja2.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stream_hbaf import __version__
from stream_hbaf.bundle import Bundle, BundleConfig
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.corpora.reading import open_corpus
from stream_hbaf.errors import BundleError, StreamHbafError
from stream_hbaf.evaluation.metrics import (
    Bin,
    Comparison,
    FigureName,
    Interval,
    Spread,
    by_class,
    f1_by,
    paired_bootstrap,
    reliability,
    score,
    spread,
)
from stream_hbaf.evaluation.offline import Judged, Progress, predict_corpus
from stream_hbaf.evaluation.plots import draw_confusion, draw_reliability, draw_stretches

FIGURES = {
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "uar": "UAR",
    "ece": "ECE",
}
COMPARED: tuple[FigureName, ...] = ("weighted_f1", "macro_f1", "accuracy", "uar")
DRAWS = 10_000
TURNS = (1, 2, 3, 5, 9, 17, 33, 65)  # where the stretches of turn numbers start
FEWEST = 20  # utterances of a stretch that is drawn: the F1 of less is chance
WORDS = (0, 1, 2, 4, 7, 11, 16, 26)  # and those of utterance lengths
LIVE_FIGURES = {
    "uar": "UAR",
    "uar_shared": "UAR, shared",
    "weighted_f1": "weighted F1",
    "accuracy": "accuracy",
    "ece": "ECE",
    "surest_half_gain": "surest half",
    "set_coverage": "coverage",
    "abstention": "abstained",
    "risk": "risk",
    "wer": "WER",
}
REPORT, METRICS = "report.html", "metrics.json"
TEMPLATE, LIVE_TEMPLATE = "report.html.jinja", "live_report.html.jinja"


@dataclass(frozen=True)
class System:
    """One system's bundles, one a seed, and what each says of the same utterances."""

    name: str
    labels: tuple[str, ...]  # of the corpus: the order of all probabilities
    configs: tuple[BundleConfig, ...]
    sums: tuple[str, ...]  # SHA-256 of each bundle
    judged: tuple[Judged, ...]

    @property
    def probabilities(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[S, N, C]."""
        return np.stack([one.probabilities for one in self.judged])


def evaluate(
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
    """Judge a system's bundles on a corpus in ``corpora`` and write the report into ``out``.

    ``bundles`` are folders or names, one a seed; ``against`` those of another system to compare
    with. Writes report.html, which needs nothing else, and metrics.json, and returns the latter.
    Raises BundleError for a bundle that can't be loaded, has other labels than the corpus or
    isn't of one system with the rest, CorpusError for the corpus.
    """
    read = open_corpus(corpus, corpora)

    def judge(names: Sequence[str]) -> System:
        configs: list[BundleConfig] = []
        sums: list[str] = []
        judged: list[Judged] = []
        for name in names:
            bundle = Bundle.load(name, device=device)  # one at a time: encoders are large
            progress(f"{name}: bundle {bundle.id}, {bundle.config.network.mode}")
            require_same_kind([*configs, bundle.config])
            found = predict_corpus(
                bundle,
                read,
                split,
                cache=cache,
                device=device,
                workers=workers,
                progress=progress,
            )
            configs.append(bundle.config)
            sums.append(bundle.sha256)
            judged.append(found)
        return System(_name(configs), read.labels, tuple(configs), tuple(sums), tuple(judged))

    system = judge(bundles)
    other = judge(against) if against else None
    metrics = measure(system, other, corpus=read.name, split=split)
    write_report(metrics, out)
    progress(f"{out / REPORT}: {_summary(metrics)}")
    return metrics


def require_same_kind(configs: Sequence[BundleConfig]) -> None:
    """Raise BundleError unless the bundles differ by nothing but their training."""
    first, last = configs[0], configs[-1]
    trained = {"id", "calibration", "licence", "replaces"}  # what may differ from seed to seed
    if first.model_dump(exclude=trained) != last.model_dump(exclude=trained):
        raise BundleError(
            f"bundles {first.id} and {last.id}: not seeds of one system, their config.yaml differ; "
            "give the other system's bundles with --against"
        )


def measure(system: System, other: System | None, *, corpus: str, split: str) -> dict[str, Any]:
    """Everything that the report shows, as plain values; figures are fractions of 1."""
    first = system.judged[0]
    metrics: dict[str, Any] = {
        "corpus": corpus,
        "split": split,
        "transcripts": "gold",
        "utterances": len(first.gold),
        "dialogues": len(np.unique(first.dialogues)),
        "labels": list(system.labels),
        "version": __version__,
        "system": _measure_system(system),
        "against": None,
        "comparison": None,
    }
    if other is not None:
        metrics["against"] = _measure_system(other)
        metrics["comparison"] = {
            "draws": DRAWS,
            **{figure: _compare(system, other, figure) for figure in COMPARED},
        }
    return metrics


def write_report(metrics: dict[str, Any], out: Path) -> None:
    """Write metrics.json and report.html; what stood there under these names is replaced."""
    page = render_live(metrics) if "rows" in metrics else render(metrics)
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
        _write(out / METRICS, content + "\n")
        _write(out / REPORT, page)
    except OSError as error:
        raise StreamHbafError(
            f"report: {out} can't be written ({error.strerror}); give another folder with --out"
        ) from None


def render(metrics: dict[str, Any]) -> str:
    """The report's HTML."""
    return _fill(
        TEMPLATE,
        m=metrics,
        pictures=_draw(metrics),
        figures=FIGURES,
        compared=COMPARED,
        fewest=FEWEST,
    )


def render_live(metrics: dict[str, Any]) -> str:
    """The HTML of what a bundle showed live; see ``live_evaluation.measure_live``."""
    return _fill(LIVE_TEMPLATE, m=metrics, pictures=_draw_rows(metrics), figures=LIVE_FIGURES)


def _fill(template: str, *, pictures: dict[str, str], **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda value: f"{100 * value:.2f}", signed=_signed, chance=_chance, stretch=_stretch
    )
    marked = {name: Markup(svg) for name, svg in pictures.items()}
    return environment.get_template(template).render(pictures=marked, **values)


def _measure_system(system: System) -> dict[str, Any]:
    first = system.judged[0]
    scores = [score(one.gold, one.probabilities) for one in system.judged]
    tables = [np.array(s.confusion) for s in scores]
    network = system.configs[0].network
    return {
        "name": system.name,
        "mode": network.mode,
        "causal": network.mode == "live",
        "modalities": [{"a": "audio", "l": "text"}[letter] for letter in network.modalities],
        "heard": first.heard,
        "bundles": [
            {"id": c.id, "sha256": sha256, **_figures(s)}
            for c, sha256, s in zip(system.configs, system.sums, scores, strict=True)
        ],
        "config": system.configs[0].model_dump(mode="json"),
        "figures": _spreads([_figures(s) for s in scores]),
        "classes": _class_spreads(system),
        "confusion": np.mean(tables, axis=0).tolist(),
        "reliability": [asdict(b) for b in _pooled(system)],
        "by_turn": _stretches(system, keys=lambda one: one.turns, starts=TURNS),
        "by_words": _stretches(system, keys=lambda one: one.words, starts=WORDS),
    }


def _figures(found: Any) -> dict[str, float]:
    return {figure: getattr(found, figure) for figure in FIGURES}


def _spreads(values: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {key: asdict(spread([one[key] for one in values])) for key in values[0]}


def _class_spreads(system: System) -> dict[str, Any]:
    found: dict[str, Any] = {}
    by_seed = [
        by_class(one.gold, one.probabilities.argmax(1), classes=len(system.labels))
        for one in system.judged
    ]
    for number, label in enumerate(system.labels):
        seeds = [asdict(classes[number]) for classes in by_seed]
        supports = {one.pop("support") for one in seeds}
        found[label] = {**_spreads(seeds), "support": supports.pop()}
    return found


def _pooled(system: System) -> tuple[Bin, ...]:
    """All seeds' predictions in one diagram."""
    gold = np.concatenate([one.gold for one in system.judged])
    return reliability(gold, np.concatenate([one.probabilities for one in system.judged]))


def _stretches(
    system: System, *, keys: Callable[[Judged], Any], starts: Sequence[int]
) -> list[dict[str, Any]]:
    """Each stretch with its weighted F1's mean and spread; each seed judged the same utterances."""
    seeds: list[tuple[Interval, ...]] = []
    for one in system.judged:
        predicted = one.probabilities.argmax(1)
        seeds.append(f1_by(one.gold, predicted, keys=keys(one), starts=starts))
    return [
        {**asdict(same[0]), "weighted_f1": asdict(spread([s.weighted_f1 for s in same]))}
        for same in zip(*seeds, strict=True)
    ]


def _compare(a: System, b: System, figure: FigureName) -> dict[str, dict[str, float]]:
    first = a.judged[0]

    def draw(groups: Any) -> Comparison:
        return paired_bootstrap(
            first.gold, a.probabilities, b.probabilities, draws=DRAWS, figure=figure, groups=groups
        )

    return {"utterances": asdict(draw(None)), "dialogues": asdict(draw(first.dialogues))}


def _draw(metrics: dict[str, Any]) -> dict[str, str]:
    systems = [s for s in (metrics["system"], metrics["against"]) if s is not None]
    system = systems[0]
    found = {
        "confusion": draw_confusion(np.array(system["confusion"]), labels=metrics["labels"]),
        "reliability": draw_reliability([Bin(**b) for b in system["reliability"]]),
    }
    for key, about in (("by_turn", "turn of the dialogue"), ("by_words", "words")):
        enough = [n for n, s in enumerate(system[key]) if s["count"] >= FEWEST]
        drawn = enough or range(len(system[key]))
        names = [f"{_stretch(s)}\nn = {s['count']}" for s in (system[key][n] for n in drawn)]
        series = [(s["name"], [Spread(**s[key][n]["weighted_f1"]) for n in drawn]) for s in systems]
        found[key] = draw_stretches(names, series, name=key, about=about)
    return found


def _draw_rows(metrics: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, row in metrics["rows"].items():
        table, bins = np.array(row["confusion"]), [Bin(**b) for b in row["reliability"]]
        confusion, diagram = f"{name}-confusion", f"{name}-reliability"
        found[confusion] = draw_confusion(table, labels=metrics["labels"], name=confusion)
        found[diagram] = draw_reliability(bins, name=diagram)
    return found


def _name(configs: Sequence[BundleConfig]) -> str:
    return ", ".join(dict.fromkeys(config.id for config in configs))


def _stretch(stretch: dict[str, Any]) -> str:
    first, last = stretch["first"], stretch["last"]
    if last is None:
        return f"{first}+"
    return str(first) if first == last else f"{first}–{last}"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "\u2212")


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _summary(metrics: dict[str, Any]) -> str:
    figure = metrics["system"]["figures"]["weighted_f1"]
    seeds = len(metrics["system"]["bundles"])
    spread_over = f" ± {100 * figure['sd']:.2f} over {seeds} seeds" if seeds > 1 else ""
    return f"weighted F1 {100 * figure['mean']:.2f}{spread_over}"


def _write(file: Path, content: str) -> None:
    """All or nothing: half a report would look like a whole one."""
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(file)
