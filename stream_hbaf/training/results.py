"""Keep what experiments measured: records of runs, comparisons and costs, one JSON file each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stream_hbaf.config import Section
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import Spread, paired_bootstrap, spread
from stream_hbaf.files import atomic_write_text

DRAWS = 10_000  # of a bootstrap
DECIMALS = 6


class Figures(Section):
    """Figures of one split, as fractions of 1."""

    weighted_f1: float
    macro_f1: float
    accuracy: float
    uar: float
    ece: float


class RunFacts(Section):
    """What is known of a run before it is done: one row of an experiment with one seed."""

    experiment: str
    row: str
    corpus: str
    network: str  # its kind
    mode: str
    modalities: str  # joined by +
    overrides: dict[str, Any]  # settings by which the row differs from its recipe
    recipe: str  # digest of all settings that decide the result
    audio: str
    encoder: str
    transcripts: str
    command: str
    seed: int
    commit: str | None = None  # None: the code was in no checkout

    @property
    def identity(self) -> tuple[str, int, str, str]:
        """A record and a run that agree in this are of the same training."""
        return self.row, self.seed, *self.settings

    @property
    def settings(self) -> tuple[str, str]:
        return self.recipe, json.dumps(self.overrides, sort_keys=True)


class RunRecord(RunFacts):
    """One run's figures, of the epoch with the best dev weighted F1."""

    dev: Figures
    test: Figures | None = None  # measured only where the experiment asks for it
    test_parts: dict[str, Figures] | None = None  # of a corpus with parts, such as "scripted"
    dev_by_loss: dict[str, float]  # weighted F1 of the epoch of the lowest dev loss
    epoch: int
    seconds: float


class ComparisonRecord(Section):
    """By how much the first row of a pair is better than the second, in weighted F1.

    ``gain`` is between the rows' means over seeds, as the tables show them. ``low`` to ``high`` is
    its 95 % interval and ``p`` its two-sided p-value, where utterances are drawn with replacement
    for the mean of all seeds at once: averaged probabilities would be those of an ensemble, which
    is another system. ``p_dialogues`` draws whole dialogues, the stricter test, since utterances
    of one dialogue are alike. Neither covers the variation over seeds; ``sd`` and ``better`` do.
    """

    experiment: str
    corpus: str
    compare: tuple[str, str]  # names of the rows
    recipes: tuple[str, str]  # their digests
    split: Split = "test"
    gain: float
    sd: float  # of the gain, over seeds
    better: int  # seeds in which the first row is better
    seeds: int
    low: float
    high: float
    p: float
    p_dialogues: float


class CostRecord(Section):
    """What one row's network costs on the processor."""

    experiment: str
    row: str
    corpus: str
    recipe: str
    commit: str | None = None
    parameters: int  # that ship
    train_step_s: float  # one batch of the recipe's size: forward, loss, backward, optimiser
    live_step_ms: float | None = None  # one utterance whose features are there; None: offline
    threads: int


class Results(Section):
    """All records of one experiment."""

    runs: tuple[RunRecord, ...] = ()
    candidates: tuple[RunRecord, ...] = ()  # by which settings of the rows were selected
    comparisons: tuple[ComparisonRecord, ...] = ()
    costs: tuple[CostRecord, ...] = ()


@dataclass(frozen=True)
class RowSummary:
    """One row of an experiment, over its seeds."""

    first: RunRecord  # for what doesn't depend on the seed
    seeds: tuple[int, ...]
    commits: tuple[str, ...]  # short; "unknown" where the code was in no checkout
    figures: Mapping[tuple[Split, str], Spread]
    parts: Mapping[str, Spread]  # weighted F1 of test's parts, where it has any

    @property
    def experiment(self) -> str:
        return self.first.experiment

    @property
    def row(self) -> str:
        return self.first.row

    def percent(self, split: Split, figure: str = "weighted_f1") -> str:
        """A figure as ``format_percent`` has it; empty where it was not measured."""
        found = self.figures.get((split, figure))
        return "" if found is None else format_percent(found, seeds=len(self.seeds))

    def percent_of_part(self, part: str) -> str:
        """A part's test weighted F1, likewise."""
        found = self.parts.get(part)
        return "" if found is None else format_percent(found, seeds=len(self.seeds))

    def test_gain(self, reference: float) -> str:
        """Test weighted F1 less a reference, x 100; empty where it was not measured."""
        found = self.figures.get(("test", "weighted_f1"))
        return "" if found is None else f"{100 * (found.mean - reference):+.1f}"

    def gain_over(self, other: "RowSummary") -> str:
        """Test weighted F1 less that of another row; empty for the row itself."""
        reference = other.figures.get(("test", "weighted_f1"))
        return "" if other is self or reference is None else self.test_gain(reference.mean)


def read_results(file: Path) -> Results:
    """The records of a file; none if there is no file. ConfigError for one that is damaged."""
    if not file.exists():
        return Results()
    try:
        return Results.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
    except OSError as error:
        reason = str(error.strerror)
    raise ConfigError(f"{file}: can't be read ({reason}); correct or move it")


def read_all(folder: Path) -> Results:
    """The records of all experiments."""
    found = [read_results(file) for file in sorted(folder.glob("*.json"))]
    return Results(
        runs=tuple(run for one in found for run in one.runs),
        candidates=tuple(run for one in found for run in one.candidates),
        comparisons=tuple(comparison for one in found for comparison in one.comparisons),
        costs=tuple(cost for one in found for cost in one.costs),
    )


def write_results(file: Path, results: Results) -> None:
    """Write all records, one a line; a run that is killed meanwhile loses no earlier record."""
    parts = []
    for name, records in results:
        lines = ",\n".join(
            json.dumps(record.model_dump(exclude_none=True), ensure_ascii=False)
            for record in records
        )
        parts.append(f'"{name}": [\n{lines}\n]' if lines else f'"{name}": []')
    atomic_write_text(file, "{" + ",\n".join(parts) + "}\n", durable=True)


def predictions_file(folder: Path, run: RunFacts) -> Path:
    """Where a run's probabilities are kept: equal recipes share them, whatever the experiment."""
    return folder / "predictions" / f"{run.recipe}-seed-{run.seed}.npz"


def run_folder(folder: Path, run: RunFacts) -> Path:
    """A run's checkpoints and logs; other settings have another folder."""
    return folder / run.experiment / f"{run.row}-{run.recipe}" / f"seed-{run.seed}"


def compare_rows(
    runs: Sequence[RunRecord], pair: tuple[str, str], *, predictions: Path
) -> ComparisonRecord:
    """The first row of a pair against the second, over the seeds that both have.

    On test if all of these runs were measured on it, else on dev. ``predictions`` is the folder
    that the experiment kept probabilities in. Raises ConfigError if the rows have no seed in
    common, or if predictions are gone.
    """
    where = f"compare [{', '.join(pair)}]"
    by_seed = [{run.seed: run for run in runs if run.row == row} for row in pair]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        raise ConfigError(f"{where}: no seed of both has been run")
    a, b = ([of_row[seed] for seed in seeds] for of_row in by_seed)
    split: Split = "test" if all(run.test for run in [*a, *b]) else "dev"
    kept_a, kept_b = ([_read_predictions(predictions, run, split) for run in of] for of in (a, b))
    gold, dialogues = kept_a[0]["gold"], kept_a[0]["dialogues"]
    if any(not np.array_equal(kept["gold"], gold) for kept in kept_b):
        raise ConfigError(f"{where}: they were measured on different utterances")
    systems = [np.stack([k["probabilities"] for k in kept]) for kept in (kept_a, kept_b)]
    drawn = paired_bootstrap(gold, *systems, draws=DRAWS, seed=0)
    strict = paired_bootstrap(gold, *systems, draws=DRAWS, seed=0, groups=dialogues)
    # The gain is of the recorded figures: probabilities are kept in float16, which can make ties.
    gains = [_weighted_f1(x, split) - _weighted_f1(y, split) for x, y in zip(a, b, strict=True)]
    over_seeds = spread(gains)
    return ComparisonRecord(
        experiment=a[0].experiment,
        corpus=a[0].corpus,
        compare=pair,
        recipes=(a[0].recipe, b[0].recipe),
        split=split,
        gain=round(over_seeds.mean, DECIMALS),
        sd=round(over_seeds.sd, DECIMALS),
        better=sum(gain > 0 for gain in gains),
        seeds=len(seeds),
        low=round(drawn.low, DECIMALS),
        high=round(drawn.high, DECIMALS),
        p=round(drawn.p, DECIMALS),
        p_dialogues=round(strict.p, DECIMALS),
    )


def correct(comparisons: Sequence[ComparisonRecord]) -> list[float]:
    """Each comparison's ``p_dialogues``, corrected for those of its experiment and corpus.

    By Holm's step-down method (1979): the chance of any false discovery among them is at most p.
    """
    corrected = [1.0] * len(comparisons)
    families: dict[tuple[str, str], list[int]] = {}
    for number, one in enumerate(comparisons):
        families.setdefault((one.experiment, one.corpus), []).append(number)
    for family in families.values():
        highest = 0.0
        for rank, number in enumerate(sorted(family, key=lambda n: comparisons[n].p_dialogues)):
            p = (len(family) - rank) * comparisons[number].p_dialogues
            highest = min(1.0, max(highest, p))
            corrected[number] = highest
    return corrected


def summarise(runs: Sequence[RunRecord]) -> list[RowSummary]:
    """One summary for each row of each experiment, in the order of their first seeds."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.row), []).append(run)
    return [_summarise(group) for group in groups.values()]


def selection_score(row: RowSummary, candidates: Sequence[RunRecord]) -> tuple[str, int] | None:
    """The score by which a row's settings were selected, and of how many runs: dev weighted F1 of
    its candidates of these settings, over folds and seeds. None where nothing was selected.
    """
    own = [
        one
        for one in candidates
        if (one.experiment, one.row) == (row.experiment, row.row)
        and row.first.overrides.items() <= one.overrides.items()
    ]
    if not own:
        return None
    return format_percent(spread([one.dev.weighted_f1 for one in own]), seeds=len(own)), len(own)


def format_percent(figure: Spread, *, seeds: int) -> str:
    """A fraction x 100, such as "62.1 ± 0.4"; without the spread for a single seed."""
    return f"{100 * figure.mean:.1f}" + (f" ± {100 * figure.sd:.1f}" if seeds > 1 else "")


def _summarise(runs: Sequence[RunRecord]) -> RowSummary:
    measured: dict[Split, list[Figures]] = {"dev": [run.dev for run in runs]}
    if all(run.test for run in runs):
        measured["test"] = [run.test for run in runs if run.test]
    return RowSummary(
        first=runs[0],
        seeds=tuple(sorted(run.seed for run in runs)),
        commits=tuple(sorted({_short(run.commit) for run in runs})),
        figures={
            (split, figure): spread([getattr(one, figure) for one in of_split])
            for split, of_split in measured.items()
            for figure in Figures.model_fields
        },
        parts={
            part: spread([run.test_parts[part].weighted_f1 for run in runs if run.test_parts])
            for part in (runs[0].test_parts or {})
            if all(run.test_parts for run in runs)
        },
    )


def _weighted_f1(run: RunRecord, split: Split) -> float:
    figures = run.test if split == "test" else run.dev
    assert figures is not None
    return figures.weighted_f1


def _short(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    revision, plus, changes = commit.partition("+")
    return revision[:7] + plus + changes


def _read_predictions(folder: Path, run: RunRecord, split: Split) -> dict[str, NDArray[Any]]:
    file = predictions_file(folder, run)
    try:
        with np.load(file) as kept:
            return {
                "probabilities": kept[split].astype(np.float64),
                "gold": kept[f"{split}_gold"],
                "dialogues": kept[f"{split}_dialogues"],
            }
    except (OSError, ValueError, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{file}: can't be read ({reason}); delete that row's results to run it again"
        ) from None
