"""Promises of experiments with several networks and recipes: trained, compared, costs measured."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from experiment_kit import RECIPE, Workspace, write_yaml
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.network import Features, Mode, Network, NetworkConfig, Output, Stateless
from stream_hbaf.networks.registry import NETWORKS
from stream_hbaf.training.experiment_file import by_preparation, read_experiment
from stream_hbaf.training.results import Results, write_results

EXPERIMENT = {
    "id": "several",
    "recipes": {"sound": "sound.yaml", "silent": "silent.yaml"},
    "rows": {
        "hbaf": {},
        "plain": {"network.kind": "plain", "silent": {"fit.rate": 0.01}},
        "plain_offline": {"network": {"kind": "plain", "mode": "offline"}},
    },
    "seeds": [0],
    "compare": [["plain", "hbaf"]],
    "test": True,
    "costs": True,
}


@dataclass(frozen=True, slots=True)
class PlainConfig(NetworkConfig):
    """Settings of the smallest network there is."""

    kind: Literal["plain"] = "plain"
    mode: Mode = "live"
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class TokensConfig(NetworkConfig):
    """Settings of a network that takes tokens."""

    takes_tokens: ClassVar[bool] = True

    kind: Literal["tokens"] = "tokens"


class Plain(Network):
    """One linear map of the text; offline of the mean over the dialogue, too."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.text_width, config.classes)

    def forward(self, features: Features) -> Output:
        assert features.text is not None
        logits = self.linear(features.text) * features.present()[..., None]
        if self.config.mode == "offline":
            logits = logits + logits.mean(dim=1, keepdim=True)
        return Output(logits)

    def step_streams(self, turn: Features, state: Any) -> tuple[Tensor, Any]:
        return self(turn).logits[:, 0], state

    def blank(self, streams: int) -> Stateless:
        return Stateless(torch.zeros(streams, 0))


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    """Register the smallest network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "plain", (PlainConfig, Plain))
        yield


def write_experiment(folder: Path, **changed: Any) -> Path:
    """The experiment and its two recipes; a value of None leaves a key out."""
    dropout = {"network": RECIPE["network"] | {"dropout": 0.2, "mode": "live"}}
    for name, own in (("sound", {}), ("silent", {"audio": {"representation": "none"}})):
        write_yaml(folder / f"{name}.yaml", RECIPE | dropout | own)
    return write_yaml(folder / "several.yaml", EXPERIMENT | changed)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three rows with two recipes."""
    place = Workspace(tmp_path_factory.mktemp("several"), "several", write_experiment)
    place.run()
    return place


def test_each_row_is_trained_with_each_recipe(done: Workspace) -> None:
    """Six runs, named by recipe and row, with the kind of network, its mode and modalities."""
    facts = [(r.row, r.network, r.mode, r.modalities) for r in done.results.runs]
    assert facts == [
        ("sound-hbaf", "hbaf", "live", "audio+text"),
        ("sound-plain", "plain", "live", "audio+text"),
        ("sound-plain_offline", "plain", "offline", "audio+text"),
        ("silent-hbaf", "hbaf", "live", "text"),
        ("silent-plain", "plain", "live", "text"),
        ("silent-plain_offline", "plain", "offline", "text"),
    ]


def test_rows_are_compared_within_a_recipe(done: Workspace) -> None:
    """One pair in the file is a pair with each recipe."""
    pairs = [one.compare for one in done.results.comparisons]
    assert pairs == [("sound-plain", "sound-hbaf"), ("silent-plain", "silent-hbaf")]


def test_settings_of_one_recipe_are_its_own(done: Workspace) -> None:
    """What stands under a recipe's name changes its row and no other."""
    overrides = {run.row: run.overrides for run in done.results.runs}
    assert overrides["sound-plain"] == {"network.kind": "plain"}
    assert overrides["silent-plain"] == {"network.kind": "plain", "fit.rate": 0.01}


def test_what_each_network_costs_is_recorded(done: Workspace) -> None:
    """A record each, with its parameters exactly; a live step only where the network is live."""
    costs = done.results.costs
    runs = done.results.runs
    assert [(one.row, one.recipe) for one in costs] == [(run.row, run.recipe) for run in runs]
    plain, offline = costs[1:3]
    assert plain.parameters == offline.parameters == 384 * 7 + 7
    assert costs[0].parameters > plain.parameters
    assert all(0 < one.train_step_s < 5 for one in costs)
    assert plain.live_step_ms is not None
    assert costs[0].live_step_ms is not None
    assert 0 < plain.live_step_ms < costs[0].live_step_ms
    assert offline.live_step_ms is None
    assert {(one.threads, one.corpus, one.experiment) for one in costs} == {(2, "meld", "several")}


def test_the_page_has_the_networks_side_by_side(done: Workspace) -> None:
    """Several kinds in one experiment are a section, in which nothing is counted twice."""
    section = done.page.split("## Networks side by side: several, meld\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| s")]
    assert len(lines) == 6
    assert lines[1].startswith("| sound-plain | past | ")
    assert lines[2].startswith("| sound-plain offline | past and future | ")
    assert "| 2,695 | " in lines[1]


def test_an_experiment_that_is_done_measures_nothing_again(done: Workspace) -> None:
    """Started again, it trains nothing, times nothing, and leaves the same file."""
    before = done.file.read_bytes()
    done.run()
    assert done.lines[0] == "several: 6 of 6 runs are done"
    assert not any("cost" in line for line in done.lines)
    assert done.file.read_bytes() == before


def test_what_is_missing_is_trained_and_measured_beside_its_own(done: Workspace) -> None:
    """A lost run and a lost cost: one training, and timings anew with that recipe alone."""
    before = done.results
    lost = Results(
        runs=[run for run in before.runs if run.row != "silent-hbaf"],
        comparisons=before.comparisons,
        costs=[one for one in before.costs if one.row != "silent-plain"],
    )
    write_results(done.file, lost)
    done.run()
    assert done.trained() == ["silent-hbaf, seed 0"]
    assert [line for line in done.lines if "cost" in line] == [
        "several: measuring the costs of 3 networks"
    ]
    after = done.results
    assert [run.row for run in after.runs] == [run.row for run in before.runs]
    assert [one.row for one in after.costs] == [one.row for one in before.costs]
    assert after.costs[:3] == before.costs[:3]  # of the other recipe


def test_an_experiment_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed between two runs, it has recorded the first and doesn't train it again."""
    place = Workspace(tmp_path, "several", write_experiment)
    many: dict[str, Any] = {
        "rows": {"hbaf": {}, "narrow": {"network.hidden": 4}, "long": {"fit.epochs": 4000}},
        "recipes": {"sound": "sound.yaml"},
        "compare": [],
    }
    file = write_experiment(tmp_path, **many)
    line = (
        "import sys; from pathlib import Path; "
        "from stream_hbaf.training.experiment import run_experiment as run; f, d = sys.argv[1:]; "
        "run(Path(f), corpora=Path(d, 'corpora'), results=Path(d, 'models/results'), "
        "cache=Path(d, 'cache'), workers=1)"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", line, str(file), str(tmp_path)], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            if len(place.results.runs) == 2:
                break
            time.sleep(0.1)
        assert running.poll() is None
    finally:
        running.kill()
        running.wait()
    kept = place.results.runs
    place.run(**many | {"rows": many["rows"] | {"long": {"fit.epochs": 3}}})
    assert place.lines[0] == "several: 2 of 3 runs are done"
    assert place.results.runs[:2] == kept
    assert [run.row for run in place.results.runs][2:] == ["sound-long"]
    assert len(place.results.costs) == 3


def test_another_kind_keeps_of_the_recipe_what_every_network_has(tmp_path: Path) -> None:
    """Sizes and dropout, but neither the other kind's own settings nor its mode."""
    runs = read_experiment(write_experiment(tmp_path)).runs()
    network = next(run.recipe.network for run in runs if run.facts.row == "sound-plain")
    assert network == {"kind": "plain", "hidden": 8, "dropout": 0.2}


def test_networks_share_a_preparation(tmp_path: Path) -> None:
    """Features are made once a recipe, whatever network is trained on them."""
    runs = read_experiment(write_experiment(tmp_path)).runs()
    assert [len(group) for group in by_preparation(runs)] == [3, 3]


def test_a_network_that_takes_tokens_is_prepared_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One vector an utterance isn't what it can use."""

    monkeypatch.setitem(NETWORKS, "tokens", (TokensConfig, Plain))
    rows = {"hbaf": {}, "tokens": {"network.kind": "tokens"}, "plain": {"network.kind": "plain"}}
    file = write_experiment(tmp_path, rows=rows, recipes={"sound": "sound.yaml"}, compare=[])
    runs = read_experiment(file).runs()
    shared = [[run.facts.row for run in group] for group in by_preparation(runs)]
    assert shared == [["sound-hbaf", "sound-plain"], ["sound-tokens"]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "sound.yaml"}, r"several\.yaml: 'recipes': give this, .* or 'recipe'"),
        ({"recipes": None}, r"several\.yaml: 'recipes': give this, .* or 'recipe'"),
        ({"recipes": {"fit": "sound.yaml"}}, "'recipes': 'fit' is a setting's name too"),
        ({"recipes": {"a/b": "sound.yaml"}}, r"'recipes\.a/b"),
        ({"recipes": {"sound": "none.yaml"}}, r"none\.yaml: can't be read"),
        ({"rows": {"a": {"network.kind": "lstm"}}}, "row 'sound-a': .* no network 'lstm'; choose"),
        (
            {"rows": {"a": {"network.kind": "plain", "network.window": 3}}},
            r"several\.yaml: row 'sound-a': 'network': there is no setting 'window'",
        ),
        (
            {"rows": {"a": {"silent": {"network.scale": 3}}}},
            "row 'silent-a': 'network': there is no setting 'scale'",
        ),
        ({"rows": {"a": {"silent": 3}}}, "row 'silent-a': 'silent': must hold settings, not 3"),
        (
            {
                "recipes": {"s": "sound.yaml", "s-a": "sound.yaml"},
                "rows": {"a-b": {}, "b": {}},
                "compare": [],
            },
            "'s-a-b' is two rows",
        ),
        ({"compare": [["hbaf", "sound-hbaf"]]}, "there is no row 'sound-hbaf'"),
    ],
)
def test_a_wrong_experiment_of_several_is_named_with_its_key(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    """File, row and setting in one line, before anything is computed."""
    with pytest.raises(ConfigError, match=message) as raised:
        read_experiment(write_experiment(tmp_path, **changed))
    assert "\n" not in str(raised.value)
