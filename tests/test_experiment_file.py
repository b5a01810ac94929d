"""Promises of an experiment's file: wrong keys are named, equal features shared, digests stable."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from damages import as_text, change, complaint
from experiment_kit import RECIPE, write_experiment

from stream_hbaf.errors import ConfigError
from stream_hbaf.training.experiment_file import (
    by_preparation,
    read_experiment,
    revision,
)
from stream_hbaf.training.recipe import read_recipe
from stream_hbaf.training.results import Figures, RunFacts, RunRecord, read_results

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


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
def test_a_wrong_experiment_is_named_with_its_key(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    """File and key in one line, before anything is computed."""
    with pytest.raises(ConfigError, match=message) as raised:
        read_experiment(write_experiment(tmp_path, **changed))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_experiment_is_one_line(tmp_path: Path, seed: int) -> None:
    """Wrong values at every place: read, or a printable line that isn't long."""
    file = write_experiment(tmp_path, select=SELECT, rows={"a": {"losses.mu": 0.1}, "b": {}})
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_bytes(as_text(change(settings, seed)))
    said = complaint(lambda: read_experiment(file))
    assert said.isprintable()
    assert len(said) < 1000


def test_a_grid_without_end_is_refused(tmp_path: Path) -> None:
    """Each combination is a training, and a value in memory."""
    many = {f"losses.{name}": list(range(100)) for name in ("mu", "temperature", "votes")}
    with pytest.raises(ConfigError, match="1e\\+06 combinations; leave values out"):
        read_experiment(
            write_experiment(tmp_path, select={"grid": many}, rows={"a": {}}, compare=[])
        )


def test_rows_of_the_same_features_share_a_preparation(tmp_path: Path) -> None:
    """Network, losses and fitting don't change features; another sound or encoder does."""
    rows = {
        "both": {},
        "text": {"network.use_audio": False},
        "offline": {"network.mode": "offline", "losses.mu": 0.0, "fit.rate": 0.1},
        "silent": {"audio.representation": "none"},
    }
    runs = read_experiment(write_experiment(tmp_path, rows=rows, seeds=[0])).runs()
    shared = [[run.facts.row for run in group] for group in by_preparation(runs)]
    assert shared == [["both", "text", "offline"], ["silent"]]


SELECT: dict[str, Any] = {
    "grid": {"fit.rate": [0.1, 0.2]},
    "folds": {"corpora.meld.max_dialogues": [1, 2, 3]},
}


def record_of(run: RunFacts, *, dev: float) -> RunRecord:
    """A run's record, done with this dev weighted F1."""
    figures = dict.fromkeys(Figures.model_fields, dev)
    facts = run.model_dump(include=set(RunFacts.model_fields))
    return RunRecord(**facts, dev=Figures(**figures), dev_by_loss={}, epoch=1, seconds=1.0)


def test_candidates_are_the_grid_times_the_folds(tmp_path: Path) -> None:
    """The same for every row, each with its own overrides; seeds of the selection alone."""
    rows = {"both": {}, "slow": {"fit.rate": 0.5, "losses.mu": 0.0}}
    experiment = read_experiment(write_experiment(tmp_path, rows=rows, select=SELECT, compare=[]))
    candidates = experiment.candidates()
    points = [(rate, fold) for rate in (0.1, 0.2) for fold in (1, 2, 3)]
    for row in rows:
        own = [run for run in candidates if run.facts.row == row]
        assert [run.facts.seed for run in own] == [0] * 6
        recipes = [run.recipe for run in own]
        assert [(r.fit.rate, r.corpora["meld"].max_dialogues) for r in recipes] == points
        assert {r.losses.mu for r in recipes} == {0.0 if row == "slow" else 0.2}
    assert read_experiment(write_experiment(tmp_path, rows=rows, compare=[])).candidates() == ()


def test_the_best_settings_over_all_folds_are_chosen(tmp_path: Path) -> None:
    """By the mean: one good fold isn't enough; of equal ones the first. Runs have them."""
    file = write_experiment(
        tmp_path, rows={"a": {}, "b": {"losses.mu": 0.1}}, select=SELECT, compare=[]
    )
    experiment = read_experiment(file.rename(tmp_path / "selecting.yaml"))
    scores = iter([0.5, 0.5, 0.5, 0.9, 0.2, 0.2] + [0.3] * 6)
    records = [record_of(run.facts, dev=next(scores)) for run in experiment.candidates()]
    assert experiment.choose(records) == {"a": {"fit.rate": 0.1}, "b": {"fit.rate": 0.1}}
    records[9] = record_of(records[9], dev=0.4)
    chosen = experiment.choose(records)
    assert chosen["b"] == {"fit.rate": 0.2}
    rates = {(run.facts.row, run.recipe.fit.rate) for run in experiment.runs(chosen)}
    assert rates == {("a", 0.1), ("b", 0.2)}


@pytest.mark.parametrize(
    ("select", "complaint"),
    [
        ({"grid": {}}, r"'select\.grid'"),
        ({"grid": {"fit.rate": []}}, r"'select\.grid\.fit\.rate'"),
        ({"grid": {"fit.rat": [1]}}, r"row 'both': 'fit\.rat'"),
        (SELECT | {"folds": {"fit.epochs": 3}}, r"select\.folds\.fit\.epochs: must list a value"),
        (SELECT | {"folds": {"fit.epochs": [0]}}, r"row 'both': 'fit\.epochs'"),
    ],
)
def test_selections_that_cannot_be(tmp_path: Path, select: Any, complaint: str) -> None:
    """Each in one line that names the key, before anything is trained."""
    with pytest.raises(ConfigError, match=complaint) as raised:
        read_experiment(write_experiment(tmp_path, select=select))
    assert "\n" not in str(raised.value)


def test_a_row_is_the_same_for_any_seeds_and_workers(tmp_path: Path) -> None:
    """What doesn't change a result, a newer version neither, doesn't make it be run again."""

    def digest(workers: int = 1, **fit: Any) -> str:
        file = write_experiment(tmp_path)
        recipe = RECIPE | {"workers": workers, "fit": {**RECIPE["fit"], **fit}}
        (tmp_path / "tiny-recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return read_experiment(file).runs()[0].facts.recipe

    assert digest() == "f439a8d5cc0e", "all results that are kept would be run again"
    assert digest(seeds=[7], workers=9) == digest()
    assert digest(batch=3) != digest()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_of_the_project_can_be_read(file: Path) -> None:
    """No committed configuration is of another version."""
    assert read_recipe(file).id == file.stem


@pytest.mark.parametrize(
    "file", sorted((CONFIGS / "experiments").glob("*.yaml")), ids=lambda file: file.name
)
def test_every_experiment_of_the_project_can_be_read(file: Path) -> None:
    """Each row is a recipe, on three or five seeds, and no two rows are the same but by name.

    One seed is enough where folds select and test is never computed.
    """
    experiment = read_experiment(file)
    assert experiment.settings.id == file.stem
    tries = experiment.settings.select is not None and not experiment.settings.test
    assert experiment.settings.seeds in {(0, 1, 2), (0, 1, 2, 3, 4)} or tries
    rows = {run.facts.row: run.facts.recipe for run in experiment.runs()}
    assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "models" / "results").glob("*.json")), ids=lambda file: file.name
)
def test_recorded_results_are_of_the_experiments_settings(file: Path) -> None:
    """No record would be dropped and trained again if its experiment were started."""
    results = read_results(file)
    whole = read_experiment(CONFIGS / "experiments" / f"{file.stem}.yaml")
    done = {run.row for run in results.runs}  # rows may wait to be run
    experiment = replace(whole, rows=tuple(row for row in whole.rows if row.name in done))
    runs = experiment.runs(experiment.choose(results.candidates))
    settings = {run.facts.row: run.facts.settings for run in runs}
    candidates = {run.facts.identity for run in experiment.candidates()}
    assert {run.identity for run in results.candidates} == candidates
    assert {run.row: run.settings for run in results.runs} == settings
    recipes = {row: recipe for row, (recipe, _) in settings.items()}
    for one in results.comparisons:
        assert one.recipes == tuple(recipes[row] for row in one.compare)
    assert {cost.row: cost.recipe for cost in results.costs}.items() <= recipes.items()


def test_the_papers_configuration_is_the_papers() -> None:
    """The paper's section 4.3, for both corpora."""
    for corpus in ("meld", "iemocap"):
        recipe = read_recipe(CONFIGS / f"{corpus}-paper.yaml")
        assert [*recipe.corpora] == [corpus]
        assert recipe.audio.selection is not None
        assert (recipe.audio.representation, recipe.audio.selection.width) == ("compare", 512)
        assert recipe.text_encoder.name == "roberta-large"
        assert recipe.commonsense.source.split(":")[0] == "comet"
        fit = recipe.fit
        assert (fit.rate, fit.decay, fit.batch, fit.patience) == (
            1e-4,
            3e-4,
            32,
            15,
        )
        assert (recipe.losses.mu, recipe.losses.weights) == (0.2, (1 / 3, 1 / 3, 1 / 3))
        sizes = [recipe.network[name] for name in ("hidden", "filters", "heads", "layers", "mode")]
        assert sizes == [512, 64, 8, 3, "offline"]


def test_a_result_names_the_commit_of_its_code() -> None:
    """The checkout's commit, and whether code or configurations differ from it."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the tests run outside a checkout")
    assert revision() in (head, f"{head}+changes")
    assert json.dumps(revision())
