"""Training: all results laid out as a page: models/README.md, made from models/results/*.json."""

from collections.abc import Sequence
from pathlib import Path

from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import Spread
from stream_hbaf.evaluation.plots import window_curve
from stream_hbaf.training.grid import HBAF
from stream_hbaf.training.papers import PAPER
from stream_hbaf.training.results import (
    DRAWS,
    Row,
    Summary,
    percent,
    read_rows,
    summarise,
    table,
    write_whole,
)
from stream_hbaf.training.side_by_side import kind_of, side_by_side

MARK = "<!-- made from models/results/*.json by `stream-hbaf experiment`; edits are lost -->"

CAVEATS = {
    "iemocap": "IEMOCAP was read from its published table, which has lost how the two speakers' "
    "turns interleave. They are merged evenly, so a turn's context is an estimate, and some of it "
    "may truly have been spoken a little later; with the corpus itself the order is the true one.",
}

# What is said of an ablation, by the kind of its network.
ABLATED = {
    "mgcma": "Dev and test are weighted F1; WA is accuracy on test, UA the mean of its classes' "
    "recalls. MGCMA's paper reports WA 78.9 and UA 80.2 for IEMOCAP in four classes, by five folds "
    "over all sessions, with the corpus's sound, wav2vec 2.0 and BERT.\n\n",
}


def check_page(results: Path) -> Path:
    """The page beside ``results``, or ConfigError if somebody wrote another page there."""
    page = results.resolve().parent / "README.md"
    if page.exists() and MARK not in page.read_text(encoding="utf-8"):
        raise ConfigError(f"{page}: is not a page of results; give --results another folder")
    return page


def write_page(results: Path) -> Path:
    """README.md beside the folder ``results``, and its pictures, made from all rows there."""
    page = check_page(results)
    rows = [row for file in sorted(results.glob("*.json")) for row in read_rows(file)]
    summaries = summarise(rows)
    parts = [
        "# Results",
        MARK,
        "F1, accuracy and recall are x 100: mean ± standard deviation over seeds. Each network was "
        "picked on dev; test was read once, at its end, and decided nothing. *live* sees nothing "
        "after an utterance; *offline* sees its whole dialogue, as the paper does. The seeds are "
        "the network's: the text encoder below it was tuned once, reads causally in both modes, "
        "and is shared by all rows that name it.",
        *(
            CAVEATS[corpus]
            for corpus in sorted({s.first["corpus"] for s in summaries} & CAVEATS.keys())
        ),
        _runs(summaries),
        _beside_the_paper(summaries),
        *side_by_side(rows, summaries),
        *_ablations(summaries),
        _comparisons([row for row in rows if "compare" in row]),
        *_windows(summaries, results=results),
    ]
    write_whole(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def _runs(summaries: Sequence[Summary]) -> str:
    lines = [
        [
            *(str(s.first[key]) for key in ("corpus", "experiment", "row", "mode", "modalities")),
            *(str(s.first[key]) for key in ("audio", "encoder", "transcripts")),
            str(len(s.seeds)),
            s.percent("dev"),
            s.percent("test"),
            s.percent("test", "macro_f1"),
            s.percent("test", "uar"),
            " ".join(s.commits),
        ]
        for s in summaries
    ]
    header = "corpus,experiment,row,mode,modalities,sound,encoder,transcripts,seeds"
    figures = "dev weighted F1,test weighted F1,test macro F1,test UAR,commit"
    return "## Every row\n\n" + table(f"{header},{figures}".split(","), lines)


def _beside_the_paper(summaries: Sequence[Summary]) -> str:
    lines = []
    for s in summaries:
        paper = paper_figure(s)
        if paper is not None and not s.experiment.endswith("-ablation"):
            difference = 100 * s.figures["test", "weighted_f1"].mean - paper
            own = [s.first["corpus"], s.experiment, s.row, s.first["mode"], s.percent("test")]
            lines.append([*own, f"{paper:.1f}", f"{difference:+.1f}"])
    if not lines:
        return ""
    return (
        "## Beside the paper\n\nTest weighted F1. The paper had the corpora's sound, RoBERTa-large "
        "and COMET, and saw whole dialogues; each row says what it had.\n\n"
        + table(["corpus", "experiment", "row", "mode", "ours", "paper", "difference"], lines)
    )


def _ablations(summaries: Sequence[Summary]) -> list[str]:
    """One table an ablation; its first row is the whole network that the others lack a part of."""
    parts = []
    for experiment, own in _by_experiment(summaries).items():
        if experiment.endswith("-ablation"):
            whole, full = own[0], paper_figure(own[0])
            lines = [[*_ablated(s, whole), *_paper_cells(s, full=full)] for s in own]
            header = ["row", "dev", "test", f"against {whole.row}", "WA", "UA"]
            told = ABLATED.get(kind_of(whole.first), "")
            if any("".join(line[-2:]) for line in lines):
                header += ["paper", "paper's difference"]
            else:
                lines = [line[:-2] for line in lines]
            parts.append(f"## Ablation: {experiment}\n\n{told}{table(header, lines)}")
    return parts


def _ablated(s: Summary, whole: Summary) -> list[str]:
    difference = s.figures["test", "weighted_f1"].mean - whole.figures["test", "weighted_f1"].mean
    against = "" if s is whole else f"{100 * difference:+.1f}"
    accuracies = s.percent("test", "accuracy"), s.percent("test", "uar")
    return [s.row.replace("_", " "), s.percent("dev"), s.percent("test"), against, *accuracies]


def _paper_cells(s: Summary, *, full: float | None) -> list[str]:
    paper = paper_figure(s)
    if paper is None or full is None:
        return ["", ""]
    return [f"{paper:.1f}", f"{paper - full:+.1f}" if paper != full else ""]


def _comparisons(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [
            row["experiment"],
            *row["compare"],
            percent(Spread(row["gain"], row["sd"]), seeds=row["seeds"]),
            f"{row['better']} of {row['seeds']}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            f"{row['p']:.4f}",
            f"{row['p_dialogues']:.4f}",
        ]
        for row in rows
    ]
    header = ["experiment", "a", "b", "gain", "seeds better", "95 % interval", "p", "p (dialogues)"]
    return (
        "## Comparisons\n\nHow much row a gains over row b in test weighted F1. The paired "
        f"bootstrap draws the test utterances anew {DRAWS:,} times for the mean of all seeds; "
        '"p (dialogues)" draws whole dialogues, which is stricter.\n\n' + table(header, lines)
    )


def _differ_in_window(summaries: Sequence[Summary]) -> bool:
    """Whether nothing but the window's length changes from row to row."""
    switches = [dict(s.first["switches"]) for s in summaries]
    windows = [own.pop("network.window", None) for own in switches]
    return None not in windows and all(own == switches[0] for own in switches)


def _windows(summaries: Sequence[Summary], *, results: Path) -> list[str]:
    """A picture for each experiment whose rows differ in the window's length alone."""
    parts = []
    for experiment, own in _by_experiment(summaries).items():
        if len(own) < 2 or not _differ_in_window(own):
            continue
        points = sorted(_point(summary) for summary in own)
        title = f"{own[0].first['corpus']}: test weighted F1 by window"
        picture = results / f"{experiment}.svg"
        write_whole(picture, window_curve(points, title=title))
        parts.append(f"## Window: {experiment}\n\n![{title}]({results.name}/{picture.name})")
    return parts


def _point(s: Summary) -> tuple[float, float, float]:
    reached = s.figures["test", "weighted_f1"]
    return s.first["switches"]["network.window"], 100 * reached.mean, 100 * reached.sd


def paper_figure(summary: Summary) -> float | None:
    """HBAF's paper's figure for a row of that name, whatever the mode."""
    if kind_of(summary.first) != HBAF:
        return None
    name = summary.row.removesuffix("_offline")
    return PAPER.get(summary.first["corpus"], {}).get(name)


def _by_experiment(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    found: dict[str, list[Summary]] = {}
    for summary in summaries:
        found.setdefault(summary.experiment, []).append(summary)
    return found
