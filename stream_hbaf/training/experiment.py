"""Run an experiment: select settings where it asks for it, train what is missing of its rows times
seeds, compare rows, measure what networks cost, lay out results.

Each finished run is written to ``<results>/<id>.json`` at once; started again, an experiment goes
on from there.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stream_hbaf.corpora.dataset import Dataset, Rows, all_features, pad_dialogues
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.errors import ConfigError, ModelError, StreamHbafError
from stream_hbaf.evaluation.metrics import Score, score
from stream_hbaf.files import atomic_write, lock_file
from stream_hbaf.networks.network import Network
from stream_hbaf.processes import map_as_completed
from stream_hbaf.training.batches import draw_steps
from stream_hbaf.training.experiment_file import Experiment, Run, by_preparation, read_experiment
from stream_hbaf.training.fitting import (
    Fitted,
    Objective,
    fit_network,
    make_optimizer,
    objective_of,
    torch_threads,
)
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.results import (
    DECIMALS,
    ComparisonRecord,
    CostRecord,
    Figures,
    Results,
    RunRecord,
    compare_rows,
    predictions_file,
    read_all,
    read_results,
    run_folder,
    write_results,
)
from stream_hbaf.training.results_page import check_page, write_page

Progress = Callable[[str], None]
Splits = tuple[Split, ...]
Prepare = Callable[[Recipe, Splits], Prepared]
Records = tuple[RunRecord, ...]

DEV: Splits = ("dev",)
THREADS = 2  # on which costs are measured
ROUNDS = 11  # of that, after a warm-up round


def run_experiment(
    file: Path,
    *,
    corpora: Path,
    results: Path = Path("models/results"),
    cache: Path = Path("cache"),
    workers: int = 2,
    device: str = "cpu",
    test: bool = False,
    progress: Progress = print,
) -> Results:
    """Train what is missing of an experiment, compare its rows, write the page of all results.

    ``test`` measures the test split, as ``test: true`` in the file does; without either, nothing
    is computed on it. Each run has one torch thread, ``workers`` of them a process each, and
    resumes from its last checkpoint under ``cache``. ``device`` is for features; networks are
    trained where their recipe says, and their costs are measured on the processor.

    Raises ConfigError for a file that isn't an experiment, or one that is running already;
    CorpusError and ModelError from preparation; ModelError at the end if runs have failed, with
    the first reason.
    """
    experiment = read_experiment(file)
    name = experiment.settings.id
    splits: Splits = (*DEV, "test") if test or experiment.settings.test else DEV
    check_page(results)  # before hours of work, not after
    folder, out = cache / "experiments", results / f"{name}.json"

    def make(recipe: Recipe, splits: Splits) -> Prepared:
        return prepare(
            recipe, corpora, splits=splits, cache=cache, device=device, progress=progress
        )

    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / f"{name}.lock")  # two processes would lose each other's records
    if lock is None:
        raise ConfigError(f"experiment {name} is running already; wait for it")
    with lock:
        found, known, failed = read_results(out), read_all(results), Failures(progress)
        train = partial(_train, prepare=make, folder=folder, workers=workers, failed=failed)
        candidates = experiment.candidates()
        tried = {run.facts.identity for run in candidates}  # without those of rows that are gone
        kept = tuple(record for record in found.candidates if record.identity in tried)
        for records in train(kept, candidates, known=known.candidates, splits=DEV):
            found = found.model_copy(update={"candidates": records})
            write_results(out, found)
        failed.raise_any(among=len(candidates))
        runs = experiment.runs(experiment.choose(found.candidates))
        for records in train(found.runs, runs, known=known.runs, splits=splits):
            found = found.model_copy(update={"runs": records})
            write_results(out, found)
        found = _compare(found, experiment, folder=folder, progress=progress)
        write_results(out, found)
        if experiment.settings.costs:
            found = _measure_costs(found, runs, prepare=make, progress=progress)
            write_results(out, found)
        progress(f"{write_page(results)}: written from all results")
    failed.raise_any(among=len(runs))
    return found


class Failures:
    """Runs that failed: others go on meanwhile."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._reasons: list[str] = []

    def add(self, run: Run, error: StreamHbafError) -> None:
        """Keep a run's error, and show it."""
        self._reasons.append(f"{run.title}: {error}")
        self.progress(self._reasons[-1])

    def raise_any(self, *, among: int) -> None:
        """Raise ModelError with the first reason if any run has failed."""
        if self._reasons:
            failed, first = len(self._reasons), self._reasons[0]
            raise ModelError(f"{failed} of {among} runs failed; the first, {first}")


def _train(
    records: Records,
    runs: Sequence[Run],
    *,
    known: Records,
    prepare: Prepare,
    folder: Path,
    workers: int,
    splits: Splits,
    failed: Failures,
) -> Iterator[Records]:
    """Train what is missing of some runs; their records at first, and after each that is done.

    Features that several runs share are prepared once.
    """
    records = _adopt(_drop_changed(records, runs), runs, known=known, splits=splits)
    missing = _missing(records, runs, splits=splits)
    if runs:
        done = len(runs) - len(missing)
        failed.progress(f"{runs[0].facts.experiment}: {done} of {len(runs)} runs are done")
    yield records
    for group in by_preparation(missing):
        shared = (prepare(group[0].recipe, splits), folder, splits)
        for index, record in map_as_completed(_train_one, group, workers=workers, shared=shared):
            run = group[index]
            if isinstance(record, StreamHbafError):
                failed.add(run, record)
            else:
                # Test's score is not shown, so that nobody selects by it.
                failed.progress(
                    f"{run.title}: dev weighted F1 {record.dev.weighted_f1:.4f} in epoch "
                    f"{record.epoch}, {record.seconds:.0f} s"
                )
                records = _add_run(records, record, order=runs)
                yield records
            # Its record is kept by now, and hundreds of networks would fill a disk.
            for checkpoint in run_folder(folder, run.facts).glob("*.ckpt"):
                checkpoint.unlink()


def _train_one(
    run: Run, prepared: Prepared, folder: Path, splits: Splits
) -> RunRecord | StreamHbafError:
    """Train and measure; the predictions are on disk before the record is returned."""
    checkpoints = run_folder(folder, run.facts)
    try:
        fitted = fit_network(
            run.recipe, prepared, seed=run.facts.seed, folder=checkpoints, splits=splits
        )
    except StreamHbafError as error:  # a value, so that other runs go on
        return error
    arrays: dict[str, NDArray[Any]] = {}
    for split, probabilities in fitted.evaluation.probabilities.items():
        arrays |= _predictions(split, prepared.scored[split][0].gold, probabilities)
    with atomic_write(predictions_file(folder, run.facts)) as part, part.open("wb") as out:
        np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    figures = {split: _figures(fitted.evaluation.main(split)) for split in splits}
    return RunRecord(
        **run.facts.model_dump(),
        dev=figures["dev"],
        test=figures.get("test"),
        test_parts=_parts(prepared.scored["test"][0].gold, fitted) if "test" in splits else None,
        dev_by_loss={"weighted_f1": fitted.dev_by_loss},
        epoch=fitted.history.best_epoch,
        seconds=round(fitted.history.seconds, 1),
    )


def _parts(dataset: Dataset, fitted: Fitted) -> dict[str, Figures] | None:
    """Test's figures by part of the corpus; None for one without parts."""
    known, part_of = dataset.labelled, np.empty(len(dataset.labels), object)
    for rows, part in zip(dataset.dialogues, dataset.parts, strict=False):
        part_of[rows] = part
    probabilities = fitted.evaluation.probabilities["test"]
    return {
        part: _figures(score(dataset.labels[chosen], probabilities[chosen]))
        for part in sorted(set(dataset.parts) - {""})
        if (chosen := known & (part_of == part)).any()
    } or None


def _predictions(
    split: str, dataset: Dataset, probabilities: NDArray[np.floating]
) -> dict[str, NDArray[Any]]:
    """Of the labelled utterances: probabilities, labels, and the number of each one's dialogue."""
    known = dataset.labelled
    dialogues = np.zeros(len(known), np.int32)
    for number, rows in enumerate(dataset.dialogues):
        dialogues[rows] = number
    return {
        split: probabilities[known].astype(np.float16),
        f"{split}_gold": dataset.known_labels,
        f"{split}_dialogues": dialogues[known],
    }


def _figures(score: Score) -> Figures:
    names = Figures.model_fields
    return Figures(**{name: round(float(getattr(score, name)), DECIMALS) for name in names})


def _missing(records: Records, runs: Sequence[Run], *, splits: Splits) -> list[Run]:
    """The runs without a record of all ``splits``."""
    done = {record.identity for record in records if _covers(record, splits)}
    return [run for run in runs if run.facts.identity not in done]


def _covers(record: RunRecord, splits: Splits) -> bool:
    return record.test is not None or "test" not in splits


def _drop_changed(records: Records, runs: Sequence[Run]) -> Records:
    """Without the records of rows whose settings have changed since."""
    rows = {run.facts.row for run in runs}
    now = {(run.facts.row, run.facts.settings) for run in runs}
    return tuple(r for r in records if r.row not in rows or (r.row, r.settings) in now)


def _adopt(records: Records, runs: Sequence[Run], *, known: Records, splits: Splits) -> Records:
    """With the records of equal runs of other experiments, trained by the same code."""
    by_training = {(r.recipe, r.seed, r.commit): r for r in known if _covers(r, splits)}
    for run in _missing(records, runs, splits=splits):
        facts = run.facts
        same = by_training.get((facts.recipe, facts.seed, facts.commit))
        if same is not None:
            names = {"experiment": facts.experiment, "row": facts.row, "overrides": facts.overrides}
            records = _add_run(records, same.model_copy(update=names), order=runs)
    return records


def _add_run(records: Records, record: RunRecord, *, order: Sequence[Run]) -> Records:
    """With one record more, in the experiment's order; runs that it lacks by now are last."""
    place = {run.facts.identity: n for n, run in enumerate(order)}
    others = [one for one in records if one.identity != record.identity]
    return tuple(sorted([*others, record], key=lambda r: place.get(r.identity, len(place))))


def _compare(
    results: Results, experiment: Experiment, *, folder: Path, progress: Progress
) -> Results:
    """With the comparisons that the experiment asks for, as far as they can be made."""
    recipes = {run.row: run.recipe for run in results.runs}
    compared: list[ComparisonRecord] = []
    for pair in experiment.compare:
        try:
            compared.append(compare_rows(results.runs, pair, predictions=folder))
        except ConfigError as error:
            progress(f"{experiment.settings.id}: {error}")
            # Another machine's cache may have had the predictions of these very runs.
            own = tuple(recipes.get(row, "") for row in pair)
            compared += [c for c in results.comparisons if (c.compare, c.recipes) == (pair, own)]
    return results.model_copy(update={"comparisons": tuple(compared)})


def _measure_costs(
    results: Results, runs: Sequence[Run], *, prepare: Prepare, progress: Progress
) -> Results:
    """With what the network of each row that has results costs.

    Networks of one preparation are measured side by side: all anew if one is missing.
    """
    done = {record.identity for record in results.runs}
    rows = {run.facts.row: run for run in runs if run.facts.identity in done}
    known = {(cost.row, cost.recipe): cost for cost in results.costs}
    costs: list[CostRecord] = []
    for group in by_preparation(list(rows.values())):
        keys = [(run.facts.row, run.facts.recipe) for run in group]
        if all(key in known for key in keys):
            costs += [known[key] for key in keys]
            continue
        progress(f"{group[0].facts.experiment}: measuring the costs of {len(group)} networks")
        costs += measure_costs(group, prepare(group[0].recipe, DEV))
    return results.model_copy(update={"costs": tuple(costs)})


def measure_costs(runs: Sequence[Run], prepared: Prepared) -> list[CostRecord]:
    """The cost of each run's network, in their order, on the train split that was prepared.

    The networks take turns, one call each a round: a slower machine slows all of them down.
    """
    train = prepared.training.dialogues
    objectives = [objective_of(run.recipe, prepared) for run in runs]
    networks = [objective.network for objective in objectives]
    live = [network for network in networks if network.config.mode == "live"]
    with torch_threads(THREADS):
        trained = _median_seconds(
            [_training_step(o, run.recipe) for o, run in zip(objectives, runs, strict=True)]
        )
        dialogues = _median_seconds([_live_dialogue(one.eval(), train) for one in live])
    turns = len(_middle(train))
    streamed = iter(round(1000 * seconds / turns, DECIMALS) for seconds in dialogues)
    return [
        CostRecord(
            **run.facts.model_dump(include={"experiment", "row", "corpus", "recipe", "commit"}),
            parameters=sum(weight.numel() for weight in network.parameters()),
            train_step_s=round(seconds, DECIMALS),
            live_step_ms=next(streamed) if network in live else None,
            threads=THREADS,
        )
        for run, network, seconds in zip(runs, networks, trained, strict=True)
    ]


def _training_step(objective: Objective, recipe: Recipe) -> Callable[[], None]:
    """A function of one training step, on the same batch each time, one of median size."""
    plan = recipe.fit
    steps = draw_steps(objective.training, recipe.batches, size=plan.batch, epoch=0, seed=0)
    middle = sorted(steps, key=lambda one: sum(map(len, one.dialogues)))[len(steps) // 2]
    optimizer, _ = make_optimizer(objective.module, plan, 1)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(objective.loss(middle))
        if plan.clip:
            nn.utils.clip_grad_norm_(objective.module.parameters(), plan.clip)
        optimizer.step()

    return step


def _live_dialogue(network: Network, dataset: Dataset) -> Callable[[], None]:
    """A function that streams a dialogue of median length, utterance by utterance."""
    version = "" if network.config.use_audio else None
    dialogue = _middle(dataset)
    whole = all_features(dataset, pad_dialogues([dialogue]), version=version)
    utterances = [
        replace(whole.map(itemgetter((0, turn))), utterance_mask=None)
        for turn in range(len(dialogue))
    ]

    @torch.inference_mode()
    def stream() -> None:
        state = network.initial_state()
        for utterance in utterances:
            _, state = network.step(utterance, state)

    return stream


def _middle(dataset: Dataset) -> Rows:
    """The rows of a dialogue of median length."""
    return sorted(dataset.dialogues, key=len)[len(dataset.dialogues) // 2]


def _median_seconds(calls: Sequence[Callable[[], None]]) -> list[float]:
    """Each function's median seconds over rounds in which each is called once."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + ROUNDS):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return [median(taken[1:]) for taken in seconds]
