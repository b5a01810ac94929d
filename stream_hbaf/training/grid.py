"""Training: what an experiment asks for: its file becomes runs, each a recipe and a seed."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import stream_hbaf
from stream_hbaf.config import Section, flatten, read_yaml
from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.training.recipe import Recipe, read_recipe, validate

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # also a file's name
# A recipe's settings that don't change what is prepared, or don't change what comes out.
FITTED = {"id", "network", "losses", "fitting"}
IRRELEVANT: dict[str, bool | set[str]] = {"id": True, "fitting": {"seeds", "workers"}}


class ExperimentFile(Section):
    """What stands in an experiment's YAML."""

    id: Name
    recipe: Path  # relative to the file
    rows: dict[Name, dict[str, Any]] = Field(min_length=1)  # dotted keys of the recipe: values
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    compare: tuple[tuple[Name, Name], ...] = ()  # pairs of rows


@dataclass(frozen=True)
class Experiment:
    """An experiment whose every row is known to be a recipe."""

    id: str
    file: Path
    recipes: Mapping[str, Recipe]  # by row
    switches: Mapping[str, Mapping[str, Any]]  # by row: what it overrides
    seeds: tuple[int, ...]
    compare: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    recipe: Recipe
    seed: int
    facts: Mapping[str, Any] = field(repr=False)  # of its row of results, known beforehand

    @property
    def title(self) -> str:
        return f"{self.facts['experiment']}: {self.facts['row']}, seed {self.seed}"


def read_experiment(file: Path) -> Experiment:
    """The experiment in a YAML file; ConfigError naming the file and the key that is wrong."""
    written = validate(ExperimentFile, read_yaml(file, example="id: iemocap"), where=f"{file}")
    recipe_file = file.parent / written.recipe
    if not isinstance(read_recipe(recipe_file), Recipe):  # its own mistakes have its own name
        raise ConfigError(f"{file}: 'recipe': {recipe_file} names no corpus; take one that does")
    switches = {row: flatten(overrides) for row, overrides in written.rows.items()}
    recipes = {
        row: _override(
            read_yaml(recipe_file, example="id: iemocap"), changes, where=f"{file}: row '{row}'"
        )
        for row, changes in switches.items()
    }
    for pair in written.compare:
        for row in pair:
            if row not in recipes:
                raise ConfigError(f"{file}: compare: there is no row '{row}'; correct its name")
    return Experiment(written.id, file, recipes, switches, written.seeds, written.compare)


def revision() -> str | None:
    """The commit that this code is of, "+changes" if files differ from it; None if in no checkout.

    Results are written into the checkout as well, so only code and configurations count.
    """
    root = Path(stream_hbaf.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(root), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside somebody else's checkout
        changed = git("status", "--porcelain", "--", "stream_hbaf", "configs")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def experiment_runs(experiment: Experiment) -> list[Run]:
    """All runs, in the order of the file, seeds of a row together."""
    commit = revision()
    return [
        Run(recipe, seed, _facts(experiment, row, recipe) | {"seed": seed, "commit": commit})
        for row, recipe in experiment.recipes.items()
        for seed in experiment.seeds
    ]


def _facts(experiment: Experiment, row: str, recipe: Recipe) -> dict[str, Any]:
    network = HbafConfig(**recipe.network)
    hears = network.use_audio and recipe.audio != "none"
    modalities = ["audio"] * hears + ["text"] * network.use_text
    return {
        "experiment": experiment.id,
        "row": row,
        "corpus": recipe.corpus,
        "mode": network.mode,
        "modalities": "+".join(modalities),
        "switches": dict(experiment.switches[row]),
        "recipe": _digest(recipe),
        "audio": recipe.audio if hears else "none",
        "encoder": _public(recipe.encoder) if network.use_text else "none",
        "transcripts": "gold",
        "command": f"stream-hbaf experiment {_relative(experiment.file)} --corpora CORPORA",
    }


def _digest(recipe: Recipe) -> str:
    """Names all settings that decide a result, but for defaults: a new one changes nothing."""
    settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude=IRRELEVANT)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a result must agree in with a run to be its result; a comparison agrees with none."""
    switches = json.dumps(row.get("switches"), sort_keys=True)
    return row.get("row"), row.get("seed"), row.get("recipe"), switches


def by_preparation(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that share their features, together: these are prepared once and held one at a time."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe.model_dump_json(exclude=FITTED), []).append(run)
    return list(groups.values())


def _override(tree: dict[str, Any], changes: Mapping[str, Any], *, where: str) -> Recipe:
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: '{key}': '{section}' has no settings of its own")
        node[leaf] = value
    return validate(Recipe, tree, where=where)


def _public(name: str) -> str:
    """A model's name; of a folder its last part, since where it lies is nobody's business."""
    return Path(name).expanduser().name if name.startswith((".", "/", "~")) else name


def _relative(file: Path) -> str:
    """The file as seen from the checkout, or its name alone."""
    path, root = file.resolve(), Path(stream_hbaf.__file__).resolve().parent.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
