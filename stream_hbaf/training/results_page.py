"""Lay out all results as a page: models/README.md, made from models/results/*.json."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import Spread
from stream_hbaf.evaluation.plots import window_curve
from stream_hbaf.evaluation.summary import markdown_table
from stream_hbaf.files import atomic_write_text
from stream_hbaf.training.recipe import HBAF
from stream_hbaf.training.results import (
    DRAWS,
    ComparisonRecord,
    CostRecord,
    Results,
    RowSummary,
    format_percent,
    read_all,
    summarise,
)

MARK = "<!-- made from models/results/*.json by `stream-hbaf experiment`; edits are lost -->"
INTRODUCTION = (
    "F1, accuracy and recall are x 100: mean ± standard deviation over seeds. Each network was "
    "selected on dev. Test was measured once, at the end, and selected nothing; its cells are "
    "empty where an experiment is of dev alone. *live* uses nothing after an utterance; *offline* "
    "uses the whole dialogue, as the paper does. The seeds are the network's: the text encoder "
    "below it was tuned once, is causal in both modes, and is shared by all rows that name it."
)
CAVEATS = {  # by corpus
    "iemocap": "IEMOCAP was read from its published table, in which the order of the two speakers' "
    "turns is lost. They are merged evenly, so a turn's context is an estimate, and some of it may "
    "in fact have followed the turn; with the corpus itself the order is the true one.",
}
ABLATIONS = {  # by the network's kind
    "mgcma": "Dev and test are weighted F1; WA is accuracy on test, UA the mean recall of its "
    "classes. MGCMA's paper reports WA 78.9 and UA 80.2 for IEMOCAP in four classes, by five folds "
    "over all sessions, with the corpus's audio, wav2vec 2.0 and BERT.",
}
BESIDE_THE_PAPER = (
    "Test weighted F1. The paper had the corpora's audio, RoBERTa-large and COMET, and used whole "
    "dialogues; the first table says what each row had."
)
SIDE_BY_SIDE = (
    "Weighted F1 except in one column. All were trained by one program on the same features of "
    "audio and text, none has vision. *past* uses nothing after an utterance and can run live; "
    "*past and future* needs the whole dialogue. Gain, interval and p are of the paired bootstrap "
    "over test utterances, for the mean of all seeds."
)
COSTS = (
    "Parameters are those that ship. A training step is one batch of the recipe's size, a live "
    "step one utterance whose features are there; both are medians of rounds in which each "
    "network had one turn, on {threads} threads of one processor."
)
PAPERS = (
    "The HBAF paper shows its baselines' figures in a picture without numbers (its figure 6); "
    "those here follow from its text, which gives no others. Each network's own paper had other "
    "features, as named, and its own form of the network, which may use the future where a row "
    "here doesn't. An empty cell is a figure that we haven't found."
)
COMPARISONS = (
    "How much row a gains over row b in weighted F1. The paired bootstrap draws the utterances of "
    'the split {draws:,} times for the mean of all seeds; "p (dialogues)" draws whole dialogues, '
    "which is stricter."
)

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
    parts = [
        "# Results",
        MARK,
        INTRODUCTION,
        *(CAVEATS[c] for c in sorted({row.first.corpus for row in rows} & CAVEATS.keys())),
        _every_row(rows),
        _beside_the_paper(rows),
        *_side_by_side(rows, known),
        *_ablations(rows),
        _comparisons(known.comparisons),
        *_windows(rows, results=results),
    ]
    atomic_write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def paper_figure(row: RowSummary) -> float | None:
    """HBAF's paper's figure for a row of that name, whatever the mode."""
    if row.first.network != HBAF:
        return None
    return PAPER.get(row.first.corpus, {}).get(row.row.removesuffix("_offline"))


def _section(
    title: str, header: Sequence[str], lines: Sequence[Sequence[str]], *, about: str = ""
) -> str:
    """A table under its title and what is said of it; "" without lines."""
    parts = [f"## {title}", about, markdown_table([header, *lines])]
    return "\n\n".join(part for part in parts if part) if lines else ""


def _every_row(rows: Sequence[RowSummary]) -> str:
    facts = ("corpus", "experiment", "row", "mode", "modalities", "audio", "encoder", "transcripts")
    figures = ("dev weighted F1", "test weighted F1", "test macro F1", "test UAR")
    lines = [
        [
            *(str(getattr(row.first, name)) for name in facts),
            str(len(row.seeds)),
            row.percent("dev"),
            row.percent("test"),
            row.percent("test", "macro_f1"),
            row.percent("test", "uar"),
            " ".join(row.commits),
        ]
        for row in rows
    ]
    return _section("Every row", [*facts, "seeds", *figures, "commit"], lines)


def _beside_the_paper(rows: Sequence[RowSummary]) -> str:
    lines = []
    for row in rows:
        paper = paper_figure(row)
        if paper is None or not row.percent("test") or row.experiment.endswith("-ablation"):
            continue
        own = [row.first.corpus, row.experiment, row.row, row.first.mode, row.percent("test")]
        lines.append([*own, f"{paper:.1f}", row.test_gain(paper / 100)])
    header = ["corpus", "experiment", "row", "mode", "ours", "paper", "difference"]
    return _section("Beside the paper", header, lines, about=BESIDE_THE_PAPER)


def _side_by_side(rows: Sequence[RowSummary], known: Results) -> list[str]:
    """A table for each experiment and corpus that has more than one kind of network."""
    groups: dict[tuple[str, str], list[RowSummary]] = {}
    for row in rows:
        groups.setdefault((row.experiment, row.first.corpus), []).append(row)
    return [
        _networks(f"{experiment}, {corpus}", own, known)
        for (experiment, corpus), own in groups.items()
        if len({row.first.network for row in own}) > 1
    ]


def _networks(title: str, rows: Sequence[RowSummary], known: Results) -> str:
    """The rows of one experiment and corpus, with gains over HBAF, costs and papers' figures."""
    experiment = rows[0].experiment
    hbaf = {row.row for row in rows if row.first.network == HBAF}
    gains: dict[str, ComparisonRecord] = {}
    for one in known.comparisons:
        if (one.experiment, one.split) == (experiment, "test") and one.compare[1] in hbaf:
            gains.setdefault(one.compare[0], one)
    costs = {(c.row, c.recipe): c for c in known.costs if c.experiment == experiment}
    lines = [
        [
            row.row.removeprefix(f"{row.first.corpus}-").replace("_", " "),
            "past" if row.first.mode == "live" else "past and future",
            row.percent("dev"),
            row.percent("test"),
            row.percent("test", "macro_f1"),
            *_gain_cells(gains.get(row.row)),
            *_cost_cells(costs.get((row.row, row.first.recipe))),
            *_paper_cells(row),
        ]
        for row in rows
    ]
    about = [SIDE_BY_SIDE]
    if costs:
        threads = sorted({str(cost.threads) for cost in costs.values()})
        about.append(COSTS.format(threads=" or ".join(threads)))
    header = [
        *("network", "context", "dev", "test", "test macro F1", "against HBAF", "95 % interval"),
        *("p", "parameters", "s a training step", "ms a live step", "HBAF's paper"),
        "its own paper",
    ]
    about.append(PAPERS)
    return _section(f"Networks side by side: {title}", header, lines, about=" ".join(about))


def _gain_cells(gain: ComparisonRecord | None) -> list[str]:
    if gain is None:
        return ["", "", ""]
    return [f"{100 * gain.gain:+.1f}", _interval(gain), f"{gain.p:.4f}"]


def _cost_cells(cost: CostRecord | None) -> list[str]:
    if cost is None:
        return ["", "", ""]
    live = "" if cost.live_step_ms is None else f"{cost.live_step_ms:.2f}"
    return [f"{cost.parameters:,}", f"{cost.train_step_s:.3f}", live]


def _paper_cells(row: RowSummary) -> list[str]:
    corpus, kind = row.first.corpus, row.first.network
    reported = PAPER_NETWORKS.get(corpus, {}).get(kind)
    figure, source = ORIGINAL.get(corpus, {}).get(kind, (None, ""))
    return [
        "" if reported is None else f"{reported:.1f}",
        "" if figure is None else f"{figure:.1f} ({source})",
    ]


def _ablations(rows: Sequence[RowSummary]) -> list[str]:
    """One table an ablation; its first row is the whole network that the others lack a part of."""
    parts = []
    for experiment, group in groupby(rows, key=attrgetter("experiment")):
        whole, *others = group
        if not experiment.endswith("-ablation"):
            continue
        header = ["row", "dev", "test", f"against {whole.row}", "WA", "UA"]
        lines = [_ablated(row, whole) for row in (whole, *others)]
        papers = [_paper_differences(row, whole) for row in (whole, *others)]
        if any("".join(cells) for cells in papers):
            header += ["paper", "paper's difference"]
            lines = [line + cells for line, cells in zip(lines, papers, strict=True)]
        about = ABLATIONS.get(whole.first.network, "")
        parts.append(_section(f"Ablation: {experiment}", header, lines, about=about))
    return parts


def _ablated(row: RowSummary, whole: RowSummary) -> list[str]:
    reference = whole.figures.get(("test", "weighted_f1"))
    return [
        row.row.replace("_", " "),
        row.percent("dev"),
        row.percent("test"),
        "" if row is whole or reference is None else row.test_gain(reference.mean),
        row.percent("test", "accuracy"),
        row.percent("test", "uar"),
    ]


def _paper_differences(row: RowSummary, whole: RowSummary) -> list[str]:
    paper, full = paper_figure(row), paper_figure(whole)
    if paper is None or full is None:
        return ["", ""]
    return [f"{paper:.1f}", f"{paper - full:+.1f}" if paper != full else ""]


def _comparisons(comparisons: Sequence[ComparisonRecord]) -> str:
    header = ["experiment", "a", "b", "split", "gain", "seeds better", "95 % interval", "p"]
    lines = [
        [
            one.experiment,
            *one.compare,
            one.split,
            format_percent(Spread(one.gain, one.sd), seeds=one.seeds),
            f"{one.better} of {one.seeds}",
            _interval(one),
            f"{one.p:.4f}",
            f"{one.p_dialogues:.4f}",
        ]
        for one in comparisons
    ]
    about = COMPARISONS.format(draws=DRAWS)
    return _section("Comparisons", [*header, "p (dialogues)"], lines, about=about)


def _interval(comparison: ComparisonRecord) -> str:
    return f"{100 * comparison.low:+.1f} to {100 * comparison.high:+.1f}"


def _windows(rows: Sequence[RowSummary], *, results: Path) -> list[str]:
    """A picture for each experiment whose rows differ in the window's length alone."""
    parts = []
    for experiment, group in groupby(rows, key=attrgetter("experiment")):
        own = list(group)
        if len(own) < 2 or not _differ_in_window(own):
            continue
        split: Split = "test" if all(row.percent("test") for row in own) else "dev"
        lengths = [row.first.overrides["network.window"] for row in own]
        reached = [row.figures[split, "weighted_f1"] for row in own]
        points = sorted(
            (n, 100 * one.mean, 100 * one.sd) for n, one in zip(lengths, reached, strict=True)
        )
        title = f"{own[0].first.corpus}: {split} weighted F1 by window"
        picture = results / f"{experiment}.svg"
        atomic_write_text(picture, window_curve(points, title=title))
        parts.append(f"## Window: {experiment}\n\n![{title}]({results.name}/{picture.name})")
    return parts


def _differ_in_window(rows: Sequence[RowSummary]) -> bool:
    overrides = [dict(row.first.overrides) for row in rows]
    windows = [own.pop("network.window", None) for own in overrides]
    return None not in windows and all(own == overrides[0] for own in overrides)
