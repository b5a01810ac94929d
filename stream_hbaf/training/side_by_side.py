"""Training: several kinds of networks of one experiment in one table, with what each costs."""

from collections.abc import Mapping, Sequence

from stream_hbaf.training.grid import HBAF
from stream_hbaf.training.papers import ORIGINAL, PAPER_NETWORKS
from stream_hbaf.training.results import Row, Summary, table

HEADER = (
    *("network", "sees", "dev", "test", "test macro F1", "against HBAF", "95 % interval", "p"),
    *("parameters", "s a training step", "ms a live step", "HBAF's paper", "its own paper"),
)
TOLD = (
    "Weighted F1 but for one column. All were trained by one program on the same features of sound "
    "and words, none has vision. *the past* sees nothing after an utterance and can run live; *the "
    "future too* needs the whole dialogue. Gain, interval and p are of the paired bootstrap over "
    "test utterances, for the mean of all seeds."
)
TOLD_OF_COSTS = (
    "Parameters are those that ship. A training step is one batch of the recipe's size, a live "
    "step one utterance after its features are there; both are medians of turns that all networks "
    "took one after the other, on {threads} threads of one processor."
)
TOLD_OF_PAPERS = (
    "The HBAF paper shows its baselines' figures in a picture without numbers (its figure 6); "
    "those here follow from its text, and there are no others. Each network's own paper had other "
    "features than ours, as named, and its own form of the network, which may see the future where "
    "a row here doesn't. An empty cell is a figure that we haven't found."
)


def side_by_side(rows: Sequence[Row], summaries: Sequence[Summary]) -> list[str]:
    """A section for each experiment and corpus that has more than one kind of network."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        groups.setdefault((summary.experiment, summary.first["corpus"]), []).append(summary)
    return [
        _section(f"{experiment}, {corpus}", own, rows)
        for (experiment, corpus), own in groups.items()
        if len({kind_of(summary.first) for summary in own}) > 1
    ]


def kind_of(row: Row) -> str:
    """The kind of a row's network; rows from before there were several name none."""
    return str(row.get("network", HBAF))


def _section(title: str, summaries: Sequence[Summary], rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["experiment"] == summaries[0].experiment]
    costs = {(row["cost"], row["recipe"]): row for row in own if "cost" in row}
    hbaf = {summary.row for summary in summaries if kind_of(summary.first) == HBAF}
    gains: dict[str, Row] = {}
    for row in own:
        if "compare" in row and row["compare"][1] in hbaf:
            gains.setdefault(row["compare"][0], row)
    lines = [
        [
            *_figures(summary),
            *_gain(gains.get(summary.row)),
            *_costs(costs.get((summary.row, summary.first["recipe"]))),
            *_papers(summary),
        ]
        for summary in summaries
    ]
    told = [TOLD]
    if costs:
        threads = sorted({str(row["threads"]) for row in costs.values()})
        told.append(TOLD_OF_COSTS.format(threads=" or ".join(threads)))
    told.append(TOLD_OF_PAPERS)
    return f"## Networks side by side: {title}\n\n{' '.join(told)}\n\n{table(HEADER, lines)}"


def _figures(summary: Summary) -> list[str]:
    first = summary.first
    return [
        summary.row.removeprefix(f"{first['corpus']}-").replace("_", " "),
        "the past" if first["mode"] == "live" else "the future too",
        summary.percent("dev"),
        summary.percent("test"),
        summary.percent("test", "macro_f1"),
    ]


def _gain(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    between = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
    return [f"{100 * row['gain']:+.1f}", between, f"{row['p']:.4f}"]


def _costs(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    live = row["live_step_ms"]
    return [
        f"{row['parameters']:,}",
        f"{row['train_step_s']:.3f}",
        "" if live is None else f"{live:.2f}",
    ]


def _papers(summary: Summary) -> list[str]:
    corpus, kind = summary.first["corpus"], kind_of(summary.first)
    reported: Mapping[str, float] = PAPER_NETWORKS.get(corpus, {})
    figure, source = ORIGINAL.get(corpus, {}).get(kind, (None, ""))
    return [
        f"{reported[kind]:.1f}" if kind in reported else "",
        "" if figure is None else f"{figure:.1f} ({source})",
    ]
