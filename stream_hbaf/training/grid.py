"""Training: what an experiment asks for: its file becomes runs, each a recipe and a seed."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

import stream_hbaf
from stream_hbaf.config import Section, flatten, read_yaml
from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.network import NetworkConfig
from stream_hbaf.networks.registry import NETWORKS, read_network
from stream_hbaf.training.recipe import Recipe, read_recipe, validate

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # also a file's name
# A recipe's settings that don't change what is prepared, or don't change what comes out.
FITTED = {"id", "network", "losses", "fitting"}
IRRELEVANT: dict[str, bool | set[str]] = {"id": True, "fitting": {"seeds", "workers"}}
HBAF = next(iter(NETWORKS))  # the kind of a recipe that names none
# What a row that names another kind of network keeps of its recipe's; each kind has its own mode.
COMMON = {setting.name for setting in fields(NetworkConfig)} - {"kind", "mode"}


class ExperimentFile(Section):
    """What stands in an experiment's YAML."""

    id: Name
    recipe: Path | None = None  # relative to the file
    recipes: dict[Name, Path] = Field({}, validate_default=True)  # instead of the one
    # Dotted keys of the recipe: values; those of one recipe alone, under its name.
    rows: dict[Name, dict[str, Any]] = Field(min_length=1)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    compare: tuple[tuple[Name, Name], ...] = ()  # pairs of rows, with each recipe
    costs: bool = False  # measure what each row's network costs, once all is run

    @field_validator("recipes")
    @classmethod
    def _are_meant(cls, recipes: dict[str, Path], known: ValidationInfo) -> dict[str, Path]:
        if bool(recipes) == (known.data.get("recipe") is not None):
            raise ValueError("give this, several files by name, or 'recipe', one file")
        for name in recipes:
            if name in Recipe.model_fields:
                raise ValueError(f"'{name}' is a setting's name too; choose another")
        return recipes


@dataclass(frozen=True)
class Experiment:
    """An experiment whose every row is known to be a recipe."""

    id: str
    file: Path
    recipes: Mapping[str, Recipe]  # by row; of several, the row's name begins with the recipe's
    switches: Mapping[str, Mapping[str, Any]]  # by row: what it overrides
    seeds: tuple[int, ...]
    compare: tuple[tuple[str, str], ...]
    costs: bool = False


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
    named = {"": written.recipe} if written.recipe is not None else written.recipes
    recipes: dict[str, Recipe] = {}
    switches: dict[str, dict[str, Any]] = {}
    for name, path in named.items():
        recipe_file = file.parent / path
        if not isinstance(read_recipe(recipe_file), Recipe):  # its own mistakes have its own name
            raise ConfigError(f"{file}: {recipe_file} names no corpus; take a recipe that does")
        for row, settings in written.rows.items():
            title = _title(name, row)
            if title in recipes:
                raise ConfigError(f"{file}: '{title}' is two rows; give one another name")
            where = f"{file}: row '{title}'"
            switches[title] = _switches(settings, name, every=written.recipes, where=where)
            tree = read_yaml(recipe_file, example="id: iemocap")
            recipes[title] = _override(tree, switches[title], where=where)
    for row in (row for pair in written.compare for row in pair):
        if row not in written.rows:
            raise ConfigError(f"{file}: compare: there is no row '{row}'; correct its name")
    pairs = tuple((_title(name, a), _title(name, b)) for name in named for a, b in written.compare)
    return Experiment(
        written.id, file, recipes, switches, written.seeds, pairs, costs=written.costs
    )


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
    network = read_network(recipe.network)
    hears = network.use_audio and recipe.audio != "none"
    modalities = ["audio"] * hears + ["text"] * network.use_text
    return {
        "experiment": experiment.id,
        "row": row,
        "corpus": recipe.corpus,
        "network": network.kind,
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
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        shared = run.recipe.model_dump_json(exclude=FITTED)
        groups.setdefault((shared, run.recipe.takes_tokens), []).append(run)
    return list(groups.values())


def _title(recipe: str, row: str) -> str:
    """A row's name, which is a folder's too; with several recipes it begins with the recipe's."""
    return f"{recipe}-{row}" if recipe else row


def _switches(
    settings: Mapping[str, Any], recipe: str, *, every: Mapping[str, Path], where: str
) -> dict[str, Any]:
    """What a row overrides in one of the recipes, by dotted keys."""
    own = settings.get(recipe, {}) if recipe else {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"{where}: '{recipe}': must hold settings, not {own!r}; correct it")
    return flatten({key: v for key, v in settings.items() if key not in every}) | flatten(own)


def _override(tree: dict[str, Any], changes: Mapping[str, Any], *, where: str) -> Recipe:
    network = tree.get("network", {})
    if changes.get("network.kind", network.get("kind", HBAF)) != network.get("kind", HBAF):
        tree["network"] = {key: value for key, value in network.items() if key in COMMON}
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
