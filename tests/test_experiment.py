"""Promises of experiments: every run once, kept at once, and what changed is run again."""

import csv
import fcntl
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.evaluation.metrics import weighted_f1
from stream_hbaf.features.prosody import PROSODY
from stream_hbaf.training.experiment import run_experiment
from stream_hbaf.training.grid import by_preparation, experiment_runs, read_experiment, revision
from stream_hbaf.training.recipe import read_recipe
from stream_hbaf.training.results import predictions_file, read_rows, write_rows

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RECIPE = {
    "id": "tiny",
    "corpus": "meld",
    "commonsense": "none",
    "network": {"hidden": 8, "heads": 2, "layers": 1, "filters": 4, "window": 3},
    "fitting": {"epochs": 2, "batch": 2},
}
EXPERIMENT = {
    "id": "tiny",
    "recipe": "tiny-recipe.yaml",
    "rows": {"both": {}, "text": {"network.use_audio": False}},
    "seeds": [0, 1],
    "compare": [["both", "text"]],
}


def write_table(file: Path, header: list[str], rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([header, *rows])


def make_meld(folder: Path) -> None:
    """MELD's layout: three dialogues of seven utterances a split, with prosody tables."""
    draw = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        said, measured = [], []
        for dialogue in range(3):
            for turn, label in enumerate(LABELS):
                place = [str(dialogue), str(turn)]
                said.append([f"I feel {label} now", "Ann", label, *place])
                numbers = [f"{n:.3f}" for n in 1 + draw.random(len(PROSODY))]
                measured.append([f"dia{dialogue}_utt{turn}.wav", *numbers])
        header = ["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"]
        write_table(folder / f"{split}_sent_emo.csv", header, said)
        write_table(folder / f"prosody_{split}.csv", ["filename", *PROSODY], measured)


def write_experiment(folder: Path, **changed: Any) -> Path:
    (folder / "tiny-recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT | changed, sort_keys=False), encoding="utf-8")
    return file


@dataclass
class Place:
    """Where an experiment has been run, and what it told."""

    folder: Path
    lines: list[str]

    @property
    def results(self) -> Path:
        return self.folder / "models" / "results" / "tiny.json"

    def run(self, *, workers: int = 1, **changed: Any) -> None:
        self.lines = []
        run_experiment(
            write_experiment(self.folder, **changed),
            self.folder / "corpora",
            results=self.results.parent,
            cache=self.folder / "cache",
            workers=workers,
            progress=self.lines.append,
        )

    def runs(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {(r["row"], r["seed"]): r for r in read_rows(self.results) if "compare" not in r}

    def told(self, run: str) -> bool:
        return any(line.startswith(f"tiny: {run}: dev weighted F1") for line in self.lines)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two rows with two seeds."""
    place = Place(tmp_path_factory.mktemp("experiment"), [])
    make_meld(place.folder / "corpora" / "meld")
    place.run(workers=2)
    return place


@pytest.fixture(scope="module")
def again(done: Place) -> tuple[Place, dict[tuple[str, int], dict[str, Any]], str]:
    """Started again with one result lost, one row changed and one that can't be trained."""
    before = done.runs()
    rows = read_rows(done.results)
    write_rows(done.results, [r for r in rows if (r.get("row"), r.get("seed")) != ("both", 0)])
    changed = {
        "both": {},
        "text": {"network.use_audio": False, "losses.mu": 0.1},
        "wild": {"fitting.rate": 1e30},
    }
    with pytest.raises(ModelError) as raised:
        done.run(rows=changed)
    return done, before, str(raised.value)


def test_every_run_becomes_a_row(done):
    """Two rows with two seeds, in the file's order, with all that a table needs."""
    assert list(done.runs()) == [("both", 0), ("both", 1), ("text", 0), ("text", 1)]
    row = done.runs()["text", 1]
    told = {key: row[key] for key in ("experiment", "corpus", "mode", "modalities", "audio")}
    assert told == {
        "experiment": "tiny",
        "corpus": "meld",
        "mode": "live",
        "modalities": "text",
        "audio": "none",
    }
    assert row["switches"] == {"network.use_audio": False}
    assert (row["transcripts"], row["encoder"]) == ("gold", "all-MiniLM-L6-v2")
    assert row["command"] == "stream-hbaf experiment tiny.yaml --corpora CORPORA"
    assert row["epoch"] in (1, 2)
    assert set(row["dev"]) == {"weighted_f1", "macro_f1", "accuracy", "uar", "ece"}
    assert 0 <= row["dev_by_loss"]["weighted_f1"] <= row["dev"]["weighted_f1"] + 0.1


def test_the_kept_predictions_give_the_figures(done):
    """Test's weighted F1 can be computed again from what is kept for the bootstrap."""
    row = done.runs()["both", 1]
    with np.load(predictions_file(done.folder / "cache" / "experiments", row)) as kept:
        said, gold = kept["test"].astype(np.float64).argmax(1), kept["test_gold"]
        assert kept["test_dialogues"].tolist() == sorted([0, 1, 2] * 7)
    reached = weighted_f1(gold, said)
    assert reached == pytest.approx(row["test"]["weighted_f1"], abs=0.05)


def test_checkpoints_of_finished_runs_are_gone(done):
    """Hundreds of networks would fill a disk, and a run that is done needs none."""
    assert list((done.folder / "cache" / "experiments").rglob("*.ckpt")) == []


def test_seeds_differ_and_progress_tells_of_dev_alone(done):
    """Two seeds are two trainings; nobody who watches can pick by test."""
    runs = done.runs()
    assert runs["both", 0]["dev"] != runs["both", 1]["dev"]
    assert done.lines.count("tiny: 0 of 4 runs are done") == 1
    assert not any("test" in line for line in done.lines if "seed" in line)


def test_rows_that_the_experiment_names_are_compared(done):
    """The gain of both over text, from the rows' own figures, with its chance."""
    compared = read_rows(done.results)[-1]
    runs = done.runs()
    gains = [
        runs["both", seed]["test"]["weighted_f1"] - runs["text", seed]["test"]["weighted_f1"]
        for seed in (0, 1)
    ]
    assert compared["compare"] == ["both", "text"]
    assert compared["gain"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert 0 < compared["p"] <= 1


def test_the_page_is_written_from_the_rows(done):
    """models/README.md has a line for each row, over both seeds."""
    page = (done.folder / "models" / "README.md").read_text(encoding="utf-8")
    assert (
        "| meld | tiny | both | live | audio+text | prosody | all-MiniLM-L6-v2 | gold | 2" in page
    )


def test_a_lost_result_is_run_again_to_the_same_figures(again):
    """Only what is missing is trained, and training repeats itself."""
    place, before, _ = again
    now = place.runs()
    assert place.told("both, seed 0")
    assert not place.told("both, seed 1")
    assert {**now["both", 0], "seconds": 0} == {**before["both", 0], "seconds": 0}
    assert now["both", 1] == before["both", 1]


def test_a_changed_row_is_run_again(again):
    """Results of other settings don't stay beside new ones."""
    place, _, _ = again
    now = place.runs()
    assert place.told("text, seed 0")
    assert place.told("text, seed 1")
    assert all(now["text", seed]["switches"]["losses.mu"] == 0.1 for seed in (0, 1))
    assert [key for key in now if key[0] == "text"] == [("text", 0), ("text", 1)]


def test_a_run_that_fails_is_named_and_stops_no_other(again):
    """A rate at which nothing converges: its row has no result, the others have theirs."""
    place, _, message = again
    assert message.startswith("2 of 6 runs failed; the first, tiny: wild, seed ")
    assert "\n" not in message
    assert not any(row == "wild" for row, _ in place.runs())
    assert "compare" in read_rows(place.results)[-1]


def test_an_experiment_that_is_running_is_not_started_twice(tmp_path):
    """Two that write one file would each lose the other's rows."""
    lock = tmp_path / "cache" / "experiments" / "tiny.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="tiny is running already"):
            run_experiment(
                write_experiment(tmp_path),
                tmp_path,
                results=tmp_path / "models" / "results",
                cache=tmp_path / "cache",
            )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": {"a": {"losses.relativ": False}}}, r"row 'a': 'losses\.relativ'"),
        ({"rows": {"a": {"network.windw": 4}}}, r"row 'a': 'network': .*'windw'"),
        ({"rows": {"a": {"network.window": "wide"}}}, r"row 'a': 'network': .*window"),
        ({"rows": {"a": {"audio.kind": "mfcc"}, "b": {}}}, "row 'a': 'audio"),
        ({"rows": {}}, "'rows'"),
        ({"rows": {"a/b": {}}}, r"'rows\.a/b"),
        ({"compare": [["both", "sound"]]}, "there is no row 'sound'"),
        ({"seed": [0]}, "'seed'"),
        ({"recipe": "none.yaml"}, r"none\.yaml: can't be read"),
    ],
)
def test_a_wrong_experiment_is_named_with_its_key(tmp_path, changed, message):
    """File and key in one line, before anything is computed."""
    with pytest.raises(ConfigError, match=message) as raised:
        read_experiment(write_experiment(tmp_path, **changed))
    assert "\n" not in str(raised.value)


def test_rows_of_the_same_features_share_a_preparation(tmp_path):
    """Network, losses and fitting don't change features; another sound or encoder does."""
    rows = {
        "both": {},
        "text": {"network.use_audio": False},
        "offline": {"network.mode": "offline", "losses.mu": 0.0, "fitting.rate": 0.1},
        "silent": {"audio": "none"},
    }
    runs = experiment_runs(read_experiment(write_experiment(tmp_path, rows=rows, seeds=[0])))
    shared = [[run.facts["row"] for run in group] for group in by_preparation(runs)]
    assert shared == [["both", "text", "offline"], ["silent"]]


def test_a_row_is_the_same_for_any_seeds_and_workers(tmp_path):
    """What doesn't change a result, a newer version neither, doesn't make it be run again."""

    def digest(**fitting: Any) -> str:
        file = write_experiment(tmp_path)
        recipe = RECIPE | {"fitting": {**RECIPE["fitting"], **fitting}}
        (tmp_path / "tiny-recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return str(experiment_runs(read_experiment(file))[0].facts["recipe"])

    assert digest() == "37d019dbf685", "all results that are kept would be run again"
    assert digest(seeds=[7], workers=9) == digest()
    assert digest(batch=3) != digest()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_of_the_project_can_be_read(file):
    """No committed configuration is of another version."""
    assert read_recipe(file).id == file.stem


@pytest.mark.parametrize(
    "file", sorted((CONFIGS / "experiments").glob("*.yaml")), ids=lambda file: file.name
)
def test_every_experiment_of_the_project_can_be_read(file):
    """Each row is a recipe, on three or five seeds, and no two rows are the same but by name."""
    experiment = read_experiment(file)
    assert experiment.id == file.stem
    assert experiment.seeds in {(0, 1, 2), (0, 1, 2, 3, 4)}
    settings = [run.facts["recipe"] for run in experiment_runs(experiment)]
    assert len(set(settings)) == len(experiment.recipes)


def test_the_papers_configuration_is_the_papers():
    """Section 4.3 and the decisions, for both corpora."""
    for corpus in ("meld", "iemocap"):
        recipe = read_recipe(CONFIGS / f"{corpus}-paper.yaml")
        assert (recipe.corpus, recipe.audio, recipe.selection.width) == (corpus, "compare", 512)
        assert (recipe.encoder, recipe.commonsense.split(":")[0]) == ("roberta-large", "comet")
        fitting = recipe.fitting
        assert (fitting.rate, fitting.decay, fitting.batch, fitting.patience) == (
            1e-4,
            3e-4,
            32,
            15,
        )
        assert (recipe.losses.mu, recipe.losses.weights) == (0.2, (1 / 3, 1 / 3, 1 / 3))
        sizes = [recipe.network[name] for name in ("hidden", "filters", "heads", "layers", "mode")]
        assert sizes == [512, 64, 8, 3, "offline"]


def test_a_result_names_the_commit_of_its_code():
    """The checkout's commit, and whether code or configurations differ from it."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the tests run outside a checkout")
    assert revision() in (head, f"{head}+changes")
    assert json.dumps(revision())


def test_a_run_known_from_another_experiment_is_not_done_again(again):
    """The same recipe and seed under another name: the same figures, without another training."""
    place = again[0]
    place.run(id="other", rows={"whole": {}}, compare=[])
    rows = read_rows(place.results.parent / "other.json")
    assert [(r["experiment"], r["row"], r["seed"]) for r in rows] == [
        ("other", "whole", 0),
        ("other", "whole", 1),
    ]
    assert [r["test"] for r in rows] == [place.runs()["both", seed]["test"] for seed in (0, 1)]
    assert place.lines[0] == "other: 2 of 2 runs are done"
