"""Training: an experiment, one recipe's rows of overrides times seeds, each run once and kept.

What is done is in ``<results>/<id>.json`` at once; started again, only what is missing is run.
Then rows are compared, and what their networks cost is measured, where the experiment asks for it.
"""

import fcntl
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stream_hbaf.corpora.dataset import Dataset
from stream_hbaf.corpora.extraction import end_with_parent
from stream_hbaf.errors import ConfigError, ModelError, StreamHbafError
from stream_hbaf.evaluation.metrics import Score
from stream_hbaf.training.costs import Cost, measure_costs
from stream_hbaf.training.fitting import one_thread
from stream_hbaf.training.grid import (
    Experiment,
    Run,
    by_preparation,
    experiment_runs,
    identity,
    read_experiment,
)
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.results import (
    FIGURES,
    Row,
    compare_rows,
    comparison_row,
    known_runs,
    pair_recipes,
    predictions_file,
    read_rows,
    run_folder,
    write_rows,
)
from stream_hbaf.training.tables import check_page, write_page
from stream_hbaf.training.train import fit_seed

Progress = Callable[[str], None]
Rows = list[dict[str, Any]]
Prepare = Callable[[Recipe], Prepared]
Outcome = tuple[Run, dict[str, Any] | StreamHbafError]  # its row, or why it has none


def run_experiment(
    file: Path,
    corpora: Path,
    *,
    results: Path = Path("models/results"),
    cache: Path = Path("cache"),
    workers: int = 2,
    device: str = "cpu",
    progress: Progress = print,
) -> Rows:
    """Run what is missing of an experiment, compare its rows, lay out all results; its rows.

    Each run has one torch thread, ``workers`` of them a process each, and goes on from its last
    checkpoint under ``cache``. ``device`` is for features; networks are fitted where their recipe
    says; their costs are the processor's. Raises ConfigError for a file that isn't an experiment,
    or one that is running already; CorpusError and ModelError from preparation; ModelError after
    all else is done if runs have failed, with the first reason.
    """
    experiment = read_experiment(file)
    check_page(results)  # before hours of work, not after
    kept, out = cache / "experiments", results / f"{experiment.id}.json"
    make = partial(prepare, corpora=corpora, cache=cache, device=device, progress=progress)
    with _alone(kept / f"{experiment.id}.lock", experiment.id):
        runs = experiment_runs(experiment)
        rows = _still_true(read_rows(out), runs)
        rows = _with_known(rows, runs, known=known_runs(results))
        done = {identity(row) for row in rows}
        missing = [run for run in runs if identity(run.facts) not in done]
        progress(f"{experiment.id}: {len(runs) - len(missing)} of {len(runs)} runs are done")
        failed: list[str] = []
        for run, outcome in _run_groups(missing, make, kept=kept, workers=workers):
            if isinstance(outcome, StreamHbafError):
                failed.append(f"{run.title}: {outcome}")
                progress(failed[-1])
            else:
                rows = _with_row(rows, outcome, order=runs)
                write_rows(out, rows)
                progress(f"{run.title}: {_told(outcome)}")
            _forget(run_folder(kept, run.facts))
        rows = _with_comparisons(rows, experiment, kept=kept, progress=progress)
        write_rows(out, rows)
        if experiment.costs:
            rows = _with_costs(rows, runs, prepare=make, progress=progress)
            write_rows(out, rows)
        progress(f"{write_page(results)}: written from all results")
    if failed:
        raise ModelError(f"{len(failed)} of {len(runs)} runs failed; the first, {failed[0]}")
    return rows


def _run_groups(
    runs: Sequence[Run], prepare: Prepare, *, kept: Path, workers: int
) -> Iterator[Outcome]:
    """All runs as they end; what some of them share is prepared once."""
    for group in by_preparation(runs):
        yield from _run_all(group, prepare(group[0].recipe), kept=kept, workers=workers)


def _run_all(
    runs: Sequence[Run], prepared: Prepared, *, kept: Path, workers: int
) -> Iterator[Outcome]:
    """Each run's row as it comes, or why it has none; one worker is this process itself."""
    if workers == 1:
        with one_thread():
            for run in runs:
                try:
                    yield run, _run(run, prepared, kept=kept)
                except StreamHbafError as error:
                    yield run, error
        return
    # Spawned, not forked: torch's threads don't survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(runs)), mp_context=context, initializer=_begin, initargs=(prepared,)
    )
    try:
        waiting = {pool.submit(_run_received, run, kept): run for run in runs}
        for finished in as_completed(waiting):
            try:
                yield waiting[finished], finished.result()
            except StreamHbafError as error:
                yield waiting[finished], error
    except BrokenProcessPool:
        raise ModelError(
            "a training process was killed, perhaps for want of memory; start the experiment "
            "again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_received: list[Prepared] = []  # in a training process: what its runs share


def _begin(prepared: Prepared) -> None:
    # One thread: sums of several would come in another order each time, and seeds not repeat.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback of its own
    end_with_parent()
    _received[:] = [prepared]


def _run_received(run: Run, kept: Path) -> dict[str, Any]:
    return _run(run, _received[0], kept=kept)


def _run(run: Run, prepared: Prepared, *, kept: Path) -> dict[str, Any]:
    """Train and measure; the predictions are on disk before the row is returned."""
    fitted = fit_seed(run.recipe, prepared, run.seed, run_folder(kept, run.facts))
    arrays: dict[str, NDArray[Any]] = {}
    for split, probabilities in fitted.probabilities.items():
        arrays |= _predictions(split, prepared.material[split], probabilities)
    _save(predictions_file(kept, run.facts), arrays)
    return {
        **run.facts,
        "dev": _figures(fitted.scores["dev"]),
        "test": _figures(fitted.scores["test"]),
        "dev_by_loss": {"weighted_f1": fitted.dev_by_loss},
        "epoch": fitted.history.best_epoch,
        "seconds": round(fitted.history.seconds, 1),
    }


def _predictions(
    split: str, material: Dataset, probabilities: NDArray[np.floating]
) -> dict[str, NDArray[Any]]:
    """Of the labelled utterances: probabilities, labels, and the number of each one's dialogue."""
    known = material.labels >= 0
    dialogues = np.zeros(len(known), np.int32)
    for number, rows in enumerate(material.dialogues):
        dialogues[rows] = number
    return {
        split: probabilities[known].astype(np.float16),
        f"{split}_gold": material.labels[known],
        f"{split}_dialogues": dialogues[known],
    }


def _save(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    part.replace(file)


def _figures(score: Score) -> dict[str, float]:
    return {name: round(float(getattr(score, name)), 6) for name in FIGURES}


def _forget(folder: Path) -> None:
    """Remove an ended run's checkpoints: hundreds of networks would fill a disk."""
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()


def _told(row: Mapping[str, Any]) -> str:
    """Of dev only: whoever watches is not to pick by test."""
    reached, epoch, seconds = row["dev"]["weighted_f1"], row["epoch"], row["seconds"]
    return f"dev weighted F1 {reached:.4f} in epoch {epoch}, {seconds:.0f} s"


def _still_true(rows: Rows, runs: Sequence[Run]) -> Rows:
    """Without the results of rows whose settings have changed since."""
    now = {run.facts["row"]: identity(run.facts)[2:] for run in runs}
    return [row for row in rows if now.get(row.get("row"), identity(row)[2:]) == identity(row)[2:]]


def _with_known(
    rows: Rows, runs: Sequence[Run], *, known: Mapping[tuple[str, int, str | None], Row]
) -> Rows:
    """The rows, with those that another experiment has run with the same code by another name."""
    done = {identity(row) for row in rows}
    for run in runs:
        same = known.get((run.facts["recipe"], run.seed, run.facts["commit"]))
        if same is not None and identity(run.facts) not in done:
            named = {key: run.facts[key] for key in ("experiment", "row", "switches")}
            rows = _with_row(rows, {**same, **named}, order=runs)
    return rows


def _with_row(rows: Rows, row: dict[str, Any], *, order: Sequence[Run]) -> Rows:
    """The rows with one more, in the order of the experiment, others after them."""
    place: dict[tuple[Any, Any], int] = {
        (run.facts["row"], run.seed): n for n, run in enumerate(order)
    }
    return sorted([*rows, row], key=lambda r: place.get((r.get("row"), r.get("seed")), len(place)))


def _with_comparisons(
    rows: Rows, experiment: Experiment, *, kept: Path, progress: Progress
) -> Rows:
    """All runs, then the comparisons that the experiment asks for, as far as they can be made.

    What was known of costs stays behind them.
    """
    runs = [row for row in rows if "seed" in row]
    earlier = [row for row in rows if "compare" in row]
    compared = []
    for pair in experiment.compare:
        try:
            found = compare_rows(runs, *pair, predictions=kept)
        except ConfigError as error:
            progress(f"{experiment.id}: {error}")
            # Another machine's cache may have had the predictions of these very runs.
            compared += [row for row in earlier if _same_pair(row, pair, runs)]
            continue
        compared.append(comparison_row(runs, pair, found))
    return [*runs, *compared, *(row for row in rows if "cost" in row)]


def _with_costs(rows: Rows, runs: Sequence[Run], *, prepare: Prepare, progress: Progress) -> Rows:
    """The rows, and behind them what the network of each row that has results costs.

    Those of one preparation are measured side by side: all anew if one isn't known.
    """
    done = {identity(row) for row in rows}
    rows_done = {run.facts["row"]: run for run in runs if identity(run.facts) in done}
    known = {(row["cost"], row["recipe"]): row for row in rows if "cost" in row}
    costs: Rows = []
    for group in by_preparation(list(rows_done.values())):
        keys = [(run.facts["row"], run.facts["recipe"]) for run in group]
        if all(key in known for key in keys):
            costs += [known[key] for key in keys]
            continue
        progress(f"{group[0].facts['experiment']}: what {len(group)} networks cost")
        measured = measure_costs([run.recipe for run in group], prepare(group[0].recipe))
        costs += [_cost_row(run, cost) for run, cost in zip(group, measured, strict=True)]
    return [*(row for row in rows if "cost" not in row), *costs]


def _cost_row(run: Run, cost: Cost) -> dict[str, Any]:
    facts = run.facts
    figures = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in asdict(cost).items()
    }
    told = {key: facts[key] for key in ("experiment", "corpus", "recipe", "commit")}
    return {"cost": facts["row"], **told, **figures}


def _same_pair(row: Mapping[str, Any], pair: tuple[str, str], runs: Rows) -> bool:
    return (row["compare"], row["recipes"]) == (list(pair), pair_recipes(runs, pair))


@contextmanager
def _alone(lock: Path, experiment: str) -> Iterator[None]:
    """Hold ``lock``: two that write one result file would each lose the other's rows."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"experiment {experiment} is running already; wait for it") from None
        yield
