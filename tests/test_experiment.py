"""Promises of a run experiment: each run once, recorded at once; test only if asked for."""

import fcntl
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_kit import Workspace, write_experiment
from results_kit import weighted_f1_of

from stream_hbaf.corpora.dataset import Dataset
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.evaluation.metrics import weighted_f1
from stream_hbaf.networks.network import Network
from stream_hbaf.training import scoring
from stream_hbaf.training.experiment import run_experiment
from stream_hbaf.training.results import (
    Figures,
    RunRecord,
    predictions_file,
    read_results,
    write_results,
)

Again = tuple[Workspace, dict[tuple[str, int], RunRecord], str]
DevOnly = tuple[Workspace, list[int]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two rows with two seeds."""
    place = Workspace(tmp_path_factory.mktemp("experiment"))
    place.run(workers=2)
    return place


@pytest.fixture(scope="module")
def again(done: Workspace) -> Again:
    """Started again with one record lost, one row changed and one that can't be trained."""
    before = done.runs
    others = tuple(run for run in done.results.runs if (run.row, run.seed) != ("both", 0))
    write_results(done.file, done.results.model_copy(update={"runs": others}))
    changed = {
        "both": {},
        "text": {"network.use_audio": False, "losses.mu": 0.1},
        "wild": {"fit.rate": 1000.0, "fit.decay": 1000.0},
    }
    with pytest.raises(ModelError) as raised:
        done.run(rows=changed)
    return done, before, str(raised.value)


def test_every_run_is_recorded(done: Workspace) -> None:
    """Two rows with two seeds, in the file's order, with all that a table needs."""
    assert list(done.runs) == [("both", 0), ("both", 1), ("text", 0), ("text", 1)]
    record = done.runs["text", 1]
    assert record.model_dump(include={"experiment", "corpus", "mode", "modalities", "audio"}) == {
        "experiment": "tiny",
        "corpus": "meld",
        "mode": "live",
        "modalities": "text",
        "audio": "none",
    }
    assert record.overrides == {"network.use_audio": False}
    assert (record.transcripts, record.encoder) == ("gold", "all-MiniLM-L6-v2")
    assert record.command == "stream-hbaf experiment tiny.yaml --corpora CORPORA"
    assert record.epoch in (1, 2)
    assert set(Figures.model_fields) == {"weighted_f1", "macro_f1", "accuracy", "uar", "ece"}
    assert 0 <= record.dev_by_loss["weighted_f1"] <= record.dev.weighted_f1 + 0.1


def test_the_kept_predictions_give_the_figures(done: Workspace) -> None:
    """Test's weighted F1 can be computed again from what is kept for the bootstrap."""
    record = done.runs["both", 1]
    with np.load(predictions_file(done.folder / "cache" / "experiments", record)) as kept:
        predicted, gold = kept["test"].astype(np.float64).argmax(1), kept["test_gold"]
        assert kept["test_dialogues"].tolist() == sorted([0, 1, 2] * 7)
    reached = weighted_f1(gold, predicted)
    assert reached == pytest.approx(weighted_f1_of(record), abs=0.05)


def test_checkpoints_of_finished_runs_are_removed(done: Workspace) -> None:
    """Hundreds of networks would fill a disk, and a finished run needs none."""
    assert list((done.folder / "cache" / "experiments").rglob("*.ckpt")) == []


def test_seeds_differ_and_progress_shows_dev_alone(done: Workspace) -> None:
    """Two seeds are two trainings; progress shows no score of test, so that none is selected by."""
    assert done.runs["both", 0].dev != done.runs["both", 1].dev
    assert done.lines.count("tiny: 0 of 4 runs are done") == 1
    assert not any("test" in line for line in done.lines if "seed" in line)


def test_rows_that_the_experiment_names_are_compared(done: Workspace) -> None:
    """The gain of both over text, from the recorded figures, with its p-value."""
    compared = done.results.comparisons[-1]
    runs = done.runs
    gains = [
        weighted_f1_of(runs["both", seed]) - weighted_f1_of(runs["text", seed]) for seed in (0, 1)
    ]
    assert (compared.compare, compared.split) == (("both", "text"), "test")
    assert compared.gain == pytest.approx(np.mean(gains), abs=1e-5)
    assert 0 < compared.p <= 1


def test_the_page_is_written_from_the_records(done: Workspace) -> None:
    """models/README.md has a line for each row, over both seeds."""
    line = "| meld | tiny | both | live | audio+text | prosody | all-MiniLM-L6-v2 | gold | 2"
    assert line in done.page


def test_a_lost_record_is_trained_again_to_the_same_figures(again: Again) -> None:
    """Only what is missing is trained, and training repeats itself."""
    place, before, _ = again
    now = place.runs
    assert "both, seed 0" in place.trained()
    assert "both, seed 1" not in place.trained()
    unchanged = now["both", 0].model_copy(update={"seconds": before["both", 0].seconds})
    assert unchanged == before["both", 0]
    assert now["both", 1] == before["both", 1]


def test_a_changed_row_is_trained_again(again: Again) -> None:
    """Records of other settings don't stay beside new ones."""
    place, _, _ = again
    now = place.runs
    assert {"text, seed 0", "text, seed 1"} <= set(place.trained())
    assert all(now["text", seed].overrides["losses.mu"] == 0.1 for seed in (0, 1))
    assert [key for key in now if key[0] == "text"] == [("text", 0), ("text", 1)]


def test_a_run_that_fails_is_named_and_stops_no_other(again: Again) -> None:
    """A rate at which nothing converges: its row has no record, the others have theirs."""
    place, _, message = again
    assert message.startswith("2 of 6 runs failed; the first, tiny: wild, seed ")
    assert "\n" not in message
    assert not any(row == "wild" for row, _ in place.runs)
    assert len(place.results.comparisons) == 1


def test_a_run_known_from_another_experiment_is_not_trained_again(again: Again) -> None:
    """The same recipe and seed under another name: the same figures, without another training."""
    place = again[0]
    place.run(id="other", rows={"whole": {}}, compare=[])
    runs = read_results(place.file.parent / "other.json").runs
    assert [(run.experiment, run.row, run.seed) for run in runs] == [
        ("other", "whole", 0),
        ("other", "whole", 1),
    ]
    assert [run.test for run in runs] == [place.runs["both", seed].test for seed in (0, 1)]
    assert place.lines[0] == "other: 2 of 2 runs are done"


def test_an_experiment_that_is_running_is_not_started_twice(tmp_path: Path) -> None:
    """Two processes that write one file would lose each other's records."""
    lock = tmp_path / "cache" / "experiments" / "tiny.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="tiny is running already"):
            run_experiment(
                write_experiment(tmp_path),
                corpora=tmp_path,
                results=tmp_path / "models" / "results",
                cache=tmp_path / "cache",
            )


@pytest.fixture(scope="module")
def dev_only(tmp_path_factory: pytest.TempPathFactory) -> DevOnly:
    """An experiment without ``test``, and the sizes of the sets that were predicted on.

    Its test split has one dialogue less than dev.
    """
    place = Workspace(tmp_path_factory.mktemp("dev"))
    for name in ("test_sent_emo.csv", "prosody_test.csv"):
        table = place.folder / "corpora" / "meld" / name
        table.write_text("".join(table.read_text().splitlines(keepends=True)[:15]))
    sizes: list[int] = []

    original = vars(scoring)["predict"]

    def predict(network: Network, dataset: Dataset, **options: Any) -> Any:
        sizes.append(len(dataset.labels))
        return original(network, dataset, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "predict", predict)
        place.run(test=None)
    return place, sizes


def test_test_is_computed_only_if_asked_for(dev_only: DevOnly) -> None:
    """Without ``test: true`` no network predicts on test, and neither records nor files hold it."""
    place, sizes = dev_only
    assert set(sizes) == {21}
    assert all(run.test is None for run in place.results.runs)
    for run in place.results.runs:
        with np.load(predictions_file(place.folder / "cache" / "experiments", run)) as kept:
            assert set(kept.files) == {"dev", "dev_gold", "dev_dialogues"}


def test_rows_measured_on_dev_alone_are_compared_on_dev(dev_only: DevOnly) -> None:
    """The comparison says which split it is of; the page's cells of test are empty."""
    place, _ = dev_only
    (compared,) = place.results.comparisons
    gains = [
        place.runs["both", seed].dev.weighted_f1 - place.runs["text", seed].dev.weighted_f1
        for seed in (0, 1)
    ]
    assert compared.split == "dev"
    assert compared.gain == pytest.approx(np.mean(gains), abs=1e-5)
    (line,) = (line for line in place.page.splitlines() if line.startswith("| meld | tiny | both"))
    assert [cell.strip() for cell in line.split("|")][11:14] == ["", "", ""]


def test_the_command_lines_test_adds_test_to_the_same_networks(dev_only: DevOnly) -> None:
    """Asked for later, test is measured by networks with the same dev figures."""
    place, _ = dev_only
    before = place.runs
    place.run(test=None, command_line_test=True)
    assert place.lines[0] == "tiny: 0 of 4 runs are done"
    assert {key: run.dev for key, run in place.runs.items()} == {
        key: run.dev for key, run in before.items()
    }
    assert all(0 <= weighted_f1_of(run) <= 1 for run in place.results.runs)
    assert place.results.comparisons[0].split == "test"
    place.run(test=None)  # without it again: what was measured stays
    assert place.lines[0] == "tiny: 4 of 4 runs are done"
    assert all(run.test for run in place.results.runs)


def test_settings_are_selected_before_the_runs(tmp_path: Path) -> None:
    """By runs on dev alone, which are recorded, shown on the page, and not repeated."""
    place = Workspace(tmp_path)
    select = {
        "grid": {"fit.rate": [1e-9, 0.02]},
        "folds": {"corpora.meld.max_dialogues": [2, 3]},
    }
    place.run(rows={"both": {}}, select=select, seeds=[0], compare=[])
    candidates = place.results.candidates
    assert [run.overrides["fit.rate"] for run in candidates] == [1e-9, 1e-9, 0.02, 0.02]
    assert all(run.test is None for run in candidates)
    scores = [
        np.mean([run.dev.weighted_f1 for run in half]) for half in (candidates[:2], candidates[2:])
    ]
    best = [1e-9, 0.02][int(np.argmax(scores))]
    run = place.runs["both", 0]
    assert run.overrides == {"fit.rate": best}
    assert run.test is not None
    assert f"| fit.rate {best} | 2 | {100 * max(scores):.1f} ± " in place.page
    place.run(rows={"both": {}}, select=select, seeds=[0], compare=[])
    assert place.trained() == []
    assert place.results.candidates == candidates
    place.run(rows={"other": {}}, select=select, seeds=[0], compare=[])
    assert {run.row for run in place.results.candidates} == {"other"}  # none of a row that is gone
