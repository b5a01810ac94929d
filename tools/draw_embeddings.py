#!/usr/bin/env python3
"""Draw the embeddings of speech and text of an experiment's rows, side by side, as SVG.

    tools/draw_embeddings.py configs/experiments/mgcma-iemocap-ablation.yaml \\
        --corpora CORPORA --out models/results/mgcma-embeddings.svg

Each row's network is trained with the experiment's first seed. t-SNE lays out its embeddings of dev
utterances, one of the speech and one of the text of each. Printed, and above each panel: for which
share of the utterances their own text is the nearest text to the speech, and by how much its cosine
exceeds that of other texts.
"""

import argparse
import sys
from pathlib import Path

from stream_hbaf.errors import ConfigError, StreamHbafError
from stream_hbaf.evaluation.plots import Panel, embed, embedding_panels
from stream_hbaf.files import atomic_write_text
from stream_hbaf.training.experiment_file import Run, by_preparation, read_experiment
from stream_hbaf.training.fitting import fit_network
from stream_hbaf.training.preparation import Prepared, prepare

MAX_UTTERANCES = 400  # in a panel


def chosen_runs(experiment_file: Path, rows: list[str]) -> list[Run]:
    """The rows' runs with the first seed, in the given order."""
    experiment = read_experiment(experiment_file)
    first = experiment.settings.seeds[0]
    by_row = {run.facts.row: run for run in experiment.runs() if run.facts.seed == first}
    for row in rows:
        if row not in by_row:
            raise ConfigError(
                f"{experiment_file}: there is no row '{row}'; choose from {', '.join(by_row)}"
            )
    return [by_row[row] for row in rows]


def make_panel(run: Run, prepared: Prepared) -> Panel:
    row = run.facts.row
    fitted = fit_network(run.recipe, prepared, seed=run.facts.seed, splits=("dev",))
    embeddings = embed(fitted.network, prepared.scored["dev"][0].gold, most=MAX_UTTERANCES)
    share, margin = 100 * embeddings.retrieval(), embeddings.margin()
    count = len(embeddings.labels)
    print(
        f"{row}: own text nearest for {share:.1f} % of {count} utterances (chance "
        f"{100 / count:.1f} %), its cosine {margin:+.3f} over other texts'",
        flush=True,
    )
    title = f"{row.replace('_', ' ')}\nown text nearest {share:.0f} %, cosine {margin:+.2f}"
    return Panel(title, *embeddings.in_plane(), embeddings.labels)


def draw(options: argparse.Namespace) -> None:
    runs = chosen_runs(options.experiment, options.rows)
    panels: dict[str, Panel] = {}
    labels: tuple[str, ...] = ()
    for group in by_preparation(runs):
        prepared = prepare(group[0].recipe, options.corpora, cache=options.cache)
        labels = prepared.labels
        for run in group:
            panels[run.facts.row] = make_panel(run, prepared)
    title = f"Embeddings of speech and text, {options.experiment.stem}"
    picture = embedding_panels([panels[row] for row in options.rows], labels=labels, title=title)
    atomic_write_text(options.out, picture)
    print(f"{options.out}: {len(picture) / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="such as configs/experiments/….yaml")
    parser.add_argument("--rows", nargs="+", default=["whole", "without_all"], metavar="ROW")
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--out", type=Path, required=True, help="the picture, .svg")
    options = parser.parse_args()
    try:
        draw(options)
    except StreamHbafError as error:
        sys.exit(f"draw_embeddings: {error}")


if __name__ == "__main__":
    main()
