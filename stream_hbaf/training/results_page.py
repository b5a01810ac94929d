"""Lay out all results as a page: models/README.md, made from models/results/*.json by the template
beside this file.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import Spread
from stream_hbaf.evaluation.plots import window_curve
from stream_hbaf.files import atomic_write_text
from stream_hbaf.training.card import render
from stream_hbaf.training.recipe import HBAF
from stream_hbaf.training.results import (
    DRAWS,
    ComparisonRecord,
    Results,
    RowSummary,
    correct,
    format_percent,
    read_all,
    selection_score,
    summarise,
)

TEMPLATE = "results.md.jinja"
MARK = "<!-- made from models/results/*.json by `stream-hbaf experiment`; edits are lost -->"
# Luo et al., "Heterogeneous bimodal attention fusion for speech emotion recognition": table 2
# (audio alone, with and without its audio context network) and the differences of sections 5.1
# to 5.3, made absolute. Weighted F1 x 100 on test, all offline, by row: of MELD, of IEMOCAP.
PAPER_ROWS = {
    "both": (67.1, 69.6),
    "text": (64.8, 64.5),
    "audio": (41.2, 58.3),
    "audio_without_context": (39.8, 56.7),
    "audio_mfcc": (34.6, 52.8),
    "audio_mfcc_without_context": (33.5, 51.5),
    "audio_wav2vec": (47.3, 61.9),
    "audio_wav2vec_without_context": (47.6, 62.1),
    "audio_data2vec": (37.9, 53.0),
    "audio_data2vec_without_context": (37.8, 52.7),
    "without_fusion": (63.5, 63.0),
    "without_contrastive": (64.2, 64.2),
}
PAPER: Mapping[str, Mapping[str, float]] = {
    corpus: {row: figures[column] for row, figures in PAPER_ROWS.items()}
    for column, corpus in enumerate(("meld", "iemocap"))
}
# The same paper's figures of networks, by corpus and kind. Its figure 6 has no numbers; its text
# says that HBAF gains 2.2 over TelME on MELD and 6.9 over Mamba on IEMOCAP.
PAPER_NETWORKS: Mapping[str, Mapping[str, float]] = {
    "meld": {"hbaf": PAPER["meld"]["both"], "telme": 64.9},
    "iemocap": {"hbaf": PAPER["iemocap"]["both"], "mamba": 62.7},
}
# What the authors of a network report for it, by corpus and kind, with its input.
ORIGINAL: Mapping[str, Mapping[str, tuple[float, str]]] = {
    "meld": {
        "m2fnet": (66.7, "Chudasama et al. 2022, audio, text, vision"),
        "telme": (67.4, "Yun et al. 2024, audio, text, vision"),
    },
    "iemocap": {
        "dialogue-rnn": (62.8, "Majumder et al. 2019, BiDialogueRNN+Att, text alone"),
        "m2fnet": (69.9, "Chudasama et al. 2022, audio, text, vision"),
        "telme": (70.5, "Yun et al. 2024, audio, text, vision"),
    },
}


def check_page(results: Path) -> Path:
    """The page beside ``results``; ConfigError if it is a file that this module didn't write."""
    page = results.resolve().parent / "README.md"
    if page.exists() and MARK not in page.read_text(encoding="utf-8"):
        raise ConfigError(f"{page}: is not a page of results; give --results another folder")
    return page


def write_page(results: Path) -> Path:
    """Write README.md beside the folder ``results``, and its pictures, from all records there."""
    page = check_page(results)
    known = read_all(results)
    rows = summarise(known.runs)
    parts = sorted({part for row in rows for part in row.parts})
    experiments = [list(own) for _, own in groupby(rows, key=attrgetter("experiment"))]
    context = {
        "rows": rows,
        "parts": parts,
        "in_parts": [row for row in rows if row.parts],
        "percents_of_parts": lambda row: [row.percent_of_part(part) for part in parts],
        "selected": [
            {"row": row, "score": found[0], "runs": found[1]}
            for row in rows
            if (found := selection_score(row, known.candidates))
        ],
        "beside_the_paper": [
            row
            for row in rows
            if paper_figure(row) and row.percent("test") and not _is_ablation(row)
        ],
        "side_by_side": list(_side_by_side(rows, known)),
        "ablations": [
            {"rows": own, "papers": any(paper_figure(row) for row in own)}
            for own in experiments
            if _is_ablation(own[0])
        ],
        "comparisons": list(zip(known.comparisons, correct(known.comparisons), strict=True)),
        "windows": list(_draw_windows(experiments, results=results)),
        "draws": DRAWS,
        "paper_figure": paper_figure,
        "settings": _settings,
        "interval": _interval,
        "spread": _spread,
    }
    atomic_write_text(page, render(TEMPLATE, context))
    return page


def paper_figure(row: RowSummary) -> float | None:
    """HBAF's paper's figure for a row of that name, whatever the mode."""
    if row.first.network != HBAF:
        return None
    return PAPER.get(row.first.corpus, {}).get(row.row.removesuffix("_offline"))


def _is_ablation(row: RowSummary) -> bool:
    """An ablation's first row is the whole network, of which the others lack a part."""
    return row.experiment.endswith("-ablation")


def _side_by_side(rows: Sequence[RowSummary], known: Results) -> Iterator[dict[str, Any]]:
    """A table for each experiment and corpus that has more than one kind of network.

    A row has its gain over HBAF on test, its network's costs, and the papers' figures.
    """
    groups: dict[tuple[str, str], list[RowSummary]] = {}
    for row in rows:
        groups.setdefault((row.experiment, row.first.corpus), []).append(row)
    for (experiment, corpus), own in groups.items():
        kinds = {row.row: row.first.network for row in own}
        if len(set(kinds.values())) < 2:
            continue
        gains: dict[str, ComparisonRecord] = {}
        for one in known.comparisons:
            of_these = (one.experiment, one.split) == (experiment, "test")
            if of_these and kinds.get(one.compare[1]) == HBAF:
                gains.setdefault(one.compare[0], one)
        costs = {(c.row, c.recipe): c for c in known.costs if c.experiment == experiment}
        yield {
            "title": f"{experiment}, {corpus}",
            "threads": sorted({cost.threads for cost in costs.values()}),
            "lines": [
                {
                    "row": row,
                    "gain": gains.get(row.row),
                    "cost": costs.get((row.row, row.first.recipe)),
                    "reported": PAPER_NETWORKS.get(corpus, {}).get(kinds[row.row]),
                    "original": ORIGINAL.get(corpus, {}).get(kinds[row.row]),
                }
                for row in own
            ],
        }


def _settings(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in overrides.items())


def _interval(comparison: ComparisonRecord) -> str:
    return f"{100 * comparison.low:+.1f} to {100 * comparison.high:+.1f}"


def _spread(comparison: ComparisonRecord) -> str:
    return format_percent(Spread(comparison.gain, comparison.sd), seeds=comparison.seeds)


def _draw_windows(
    experiments: Sequence[Sequence[RowSummary]], *, results: Path
) -> Iterator[dict[str, str]]:
    """A picture for each experiment whose rows differ in the window's length alone."""
    for own in experiments:
        overrides = [dict(row.first.overrides) for row in own]
        windows = [of_row.pop("network.window", None) for of_row in overrides]
        if len(own) < 2 or None in windows or any(one != overrides[0] for one in overrides):
            continue
        split: Split = "test" if all(row.percent("test") for row in own) else "dev"
        reached = [row.figures[split, "weighted_f1"] for row in own]
        points = sorted(
            (n, 100 * one.mean, 100 * one.sd) for n, one in zip(windows, reached, strict=True)
        )
        title = f"{own[0].first.corpus}: {split} weighted F1 by window"
        picture = results / f"{own[0].experiment}.svg"
        atomic_write_text(picture, window_curve(points, title=title))
        yield {
            "experiment": own[0].experiment,
            "title": title,
            "picture": f"{results.name}/{picture.name}",
        }
