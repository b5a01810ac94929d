"""Training: what experiments measured, kept as rows of JSON, compared, and summed up over seeds.

A result file holds one list: a row for each run of one seed, then one for each comparison that
its experiment asked for (those have the key ``compare``), then one for what each of its rows'
networks costs (key ``cost``), if it asked for that.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import Spread, paired_bootstrap, spread

Row = Mapping[str, Any]
FIGURES = ("weighted_f1", "macro_f1", "accuracy", "uar", "ece")
SPLITS = ("dev", "test")
DRAWS = 10_000


@dataclass(frozen=True)
class Summary:
    """One row of an experiment, over its seeds."""

    experiment: str
    row: str
    first: Row  # what doesn't depend on the seed: corpus, mode, modalities, encoder ...
    seeds: tuple[int, ...]
    commits: tuple[str, ...]  # short; "unknown" where the code was in no checkout
    figures: Mapping[tuple[str, str], Spread]  # by split and figure

    def percent(self, split: str, figure: str = "weighted_f1") -> str:
        return percent(self.figures[split, figure], seeds=len(self.seeds))


@dataclass(frozen=True, slots=True)
class SeedComparison:
    """By how much row a is better than row b on test, weighted F1 as a fraction of 1.

    ``gain`` is between the rows' means over seeds, as the tables show them. ``low`` to ``high`` is
    its 95 % interval and ``p`` its chance, when test utterances are drawn anew for the mean of
    all seeds at once: the average of their probabilities would judge an ensemble that nobody
    runs. ``p_dialogues`` draws whole dialogues, the stricter test, since utterances of one
    dialogue are alike. Neither knows of other seeds: ``sd`` and ``better`` tell of those.
    """

    gain: float
    sd: float  # of the gain, over seeds
    better: int  # seeds in which a is better
    seeds: int
    low: float
    high: float
    p: float
    p_dialogues: float


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a result file; none if there is no file. ConfigError if it isn't a list."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: can't be read ({error}); correct or move it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file}: is not a list of rows; correct or move it")
    return rows


def known_runs(results: Path) -> dict[tuple[str, int, str | None], Row]:
    """All experiments' runs by what decides their figures: recipe's digest, seed and commit."""
    rows = (row for file in sorted(results.glob("*.json")) for row in read_rows(file))
    return {(row["recipe"], row["seed"], row["commit"]): row for row in rows if "seed" in row}


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """All or nothing, one row a line: a run that is killed meanwhile loses no earlier result."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_whole(file, f"[\n{lines}\n]\n")


def write_whole(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def predictions_file(predictions: Path, row: Row) -> Path:
    """Where a run's probabilities are kept: equal recipes share them, whatever the experiment."""
    return predictions / "predictions" / f"{row['recipe']}-seed-{row['seed']}.npz"


def run_folder(folder: Path, row: Row) -> Path:
    """A run's checkpoints and logs; other settings have another folder."""
    return folder / str(row["experiment"]) / f"{row['row']}-{row['recipe']}" / f"seed-{row['seed']}"


def compare_rows(
    rows: Sequence[Row], row_a: str, row_b: str, *, predictions: Path
) -> SeedComparison:
    """Row a against row b of one experiment, on test, over the seeds that both have.

    ``predictions`` is the folder that the experiment kept probabilities in. Raises ConfigError
    if a row has no seed in common with the other, or if predictions are gone.
    """
    runs = {name: {r["seed"]: r for r in rows if r.get("row") == name} for name in (row_a, row_b)}
    seeds = sorted(runs[row_a].keys() & runs[row_b].keys())
    if not seeds:
        raise ConfigError(f"compare [{row_a}, {row_b}]: no seed of both has been run")
    kept = {name: [_read_predictions(predictions, runs[name][s]) for s in seeds] for name in runs}
    gold, dialogues = kept[row_a][0]["test_gold"], kept[row_a][0]["test_dialogues"]
    if any(not np.array_equal(k["test_gold"], gold) for k in kept[row_b]):
        raise ConfigError(f"compare [{row_a}, {row_b}]: they were tested on different utterances")
    a, b = (np.stack([k["test"] for k in kept[name]]).astype(np.float64) for name in runs)
    drawn = paired_bootstrap(gold, a, b, draws=DRAWS, seed=0)
    strict = paired_bootstrap(gold, a, b, draws=DRAWS, seed=0, groups=dialogues)
    # The gain is of the figures that were stored; float16 may have made a tie of a near one.
    gains = [
        runs[row_a][seed]["test"]["weighted_f1"] - runs[row_b][seed]["test"]["weighted_f1"]
        for seed in seeds
    ]
    over_seeds = spread(gains)
    return SeedComparison(
        gain=over_seeds.mean,
        sd=over_seeds.sd,
        better=sum(gain > 0 for gain in gains),
        seeds=len(seeds),
        low=drawn.low,
        high=drawn.high,
        p=drawn.p,
        p_dialogues=strict.p,
    )


def percent(figure: Spread, *, seeds: int) -> str:
    """A fraction x 100, such as "62.1 ± 0.4"; no spread is claimed for a single seed."""
    return f"{100 * figure.mean:.1f}" + (f" ± {100 * figure.sd:.1f}" if seeds > 1 else "")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    ruled = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


def comparison_row(
    rows: Sequence[Row], pair: tuple[str, str], found: SeedComparison
) -> dict[str, Any]:
    """A comparison as it is kept, with the settings of the two rows that it is of."""
    first = next(row for row in rows if row.get("row") == pair[0])
    recipes = pair_recipes(rows, pair)
    figures = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in asdict(found).items()
    }
    return {
        "experiment": first["experiment"],
        "corpus": first["corpus"],
        "compare": list(pair),
        "recipes": recipes,
        **figures,
    }


def pair_recipes(rows: Sequence[Row], pair: tuple[str, str]) -> list[str]:
    """The settings of two rows, by their digests; "" for a row that was never run."""
    recipes = {row["row"]: row["recipe"] for row in rows if "row" in row}
    return [recipes.get(name, "") for name in pair]


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary for each row of each experiment, in the order of their first seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "seed" in row:
            groups.setdefault((row["experiment"], row["row"]), []).append(row)
    return [_summarise(runs) for runs in groups.values()]


def _summarise(runs: Sequence[Row]) -> Summary:
    commits = {_short(run.get("commit")) for run in runs}
    figures = {
        (split, figure): spread([run[split][figure] for run in runs])
        for split in SPLITS
        for figure in FIGURES
    }
    first = runs[0]
    return Summary(
        experiment=first["experiment"],
        row=first["row"],
        first=first,
        seeds=tuple(sorted(run["seed"] for run in runs)),
        commits=tuple(sorted(commits)),
        figures=figures,
    )


def _short(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    revision, plus, changes = commit.partition("+")
    return revision[:7] + plus + changes


def _read_predictions(folder: Path, row: Row) -> dict[str, NDArray[Any]]:
    file = predictions_file(folder, row)
    try:
        with np.load(file) as kept:
            return {name: kept[name] for name in kept.files}
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{file}: can't be read ({reason}); delete that row's results to run it again"
        ) from None
