"""Read an experiment's file: rows of overrides, times recipes, times seeds, become runs.

Where the file asks for it, some settings of each row are selected first, by runs of their own on a
grid that is the same for all rows.
"""

import hashlib
import itertools
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from stream_hbaf.bundle import PACKAGE
from stream_hbaf.config import Section, flatten, read_yaml
from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.networks.registry import read_network
from stream_hbaf.training.recipe import Recipe, merge_settings, read_settings, validate
from stream_hbaf.training.results import RunFacts, RunRecord

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # also a file's name
ROOT = PACKAGE.resolve().parent  # of the checkout, if this is one
# A recipe's settings that don't change the features, and those that don't change the result.
FITTED = {"id", "network", "losses", "batches", "fit", "calibration", "workers"}
MOST_COMBINATIONS = 10_000  # of a grid or of folds: each is a training
IRRELEVANT: dict[str, bool | set[str]] = {"id": True, "workers": True, "fit": {"seeds", "ship"}}


class Selection(Section):
    """Settings that are chosen for each row, by dev weighted F1, before test is measured."""

    # Dotted keys: the values that are tried, each with each.
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(min_length=1)
    # Dotted keys: values, of which each makes a fold, such as dev_fold: [1, 2, 3, 4]; the score is
    # the mean over folds. Those of one recipe alone, under its name. None: the recipe's own dev.
    folds: dict[str, Any] = Field({})
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)


class ExperimentFile(Section):
    """The settings of an experiment's YAML file."""

    id: Name
    recipe: Path | None = None  # relative to the file
    recipes: dict[Name, Path] = Field({}, validate_default=True)  # several, instead of ``recipe``
    # Dotted keys of the recipe: values; those of one recipe alone, under its name.
    rows: dict[Name, dict[str, Any]] = Field(min_length=1)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    select: Selection | None = None
    compare: tuple[tuple[Name, Name], ...] = ()  # pairs of rows, with each recipe
    test: bool = False  # measure test, too; without it no run computes anything on test
    costs: bool = False  # measure what each row's network costs, when all runs are done

    @field_validator("recipes")
    @classmethod
    def _is_one_of_two(cls, recipes: dict[str, Path], known: ValidationInfo) -> dict[str, Path]:
        if bool(recipes) == (known.data.get("recipe") is not None):
            raise ValueError("give this, several files by name, or 'recipe', one file")
        for name in recipes:
            if name in Recipe.model_fields:
                raise ValueError(f"'{name}' is a setting's name too; choose another")
        return recipes


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    recipe: Recipe
    facts: RunFacts

    @property
    def title(self) -> str:
        return f"{self.facts.experiment}: {self.facts.row}, seed {self.facts.seed}"


@dataclass(frozen=True)
class Row:
    """One row of an experiment: a recipe with overrides, and the values of its selection."""

    name: str  # also of a folder; with several recipes it begins with the recipe's
    recipe: Mapping[str, Any]
    overrides: Mapping[str, Any]
    folds: Mapping[str, tuple[Any, ...]]
    where: str  # in an experiment's file, for messages

    def run(self, changes: Mapping[str, Any], *, seed: int, about: Mapping[str, Any]) -> Run:
        """The row with further changes and a seed. Raises ConfigError."""
        own = {**self.overrides, **changes}
        recipe = _override(self.recipe, own, where=self.where)
        facts = RunFacts(row=self.name, overrides=own, seed=seed, **about, **_described(recipe))
        return Run(recipe, facts)


@dataclass(frozen=True)
class Experiment:
    """An experiment whose every row makes a valid recipe."""

    settings: ExperimentFile
    rows: tuple[Row, ...]
    about: Mapping[str, Any]  # of all runs
    compare: tuple[tuple[str, str], ...]  # pairs of rows

    def candidates(self) -> tuple[Run, ...]:
        """The runs by which settings are selected: grid times folds times seeds of each row."""
        select = self.settings.select
        return (
            ()
            if select is None
            else tuple(
                row.run({**point, **fold}, seed=seed, about=self.about)
                for row in self.rows
                for point in _product(select.grid)
                for fold in _product(row.folds)
                for seed in select.seeds
            )
        )

    def choose(self, candidates: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
        """The grid's best settings for each row, by the mean dev weighted F1 of its candidates.

        Of equally good ones the first; nothing without a selection.
        """
        if self.settings.select is None:
            return {}
        points = _product(self.settings.select.grid)
        chosen = {}
        for row in self.rows:
            own = [one for one in candidates if one.row == row.name]
            scores = [
                mean(one.dev.weighted_f1 for one in own if point.items() <= one.overrides.items())
                for point in points
            ]
            chosen[row.name] = points[scores.index(max(scores))]
        return chosen

    def runs(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Run, ...]:
        """All runs, by default without selected settings; in the order of the file, seeds of a row
        together."""
        return tuple(
            row.run((chosen or {}).get(row.name, {}), seed=seed, about=self.about)
            for row in self.rows
            for seed in self.settings.seeds
        )


def read_experiment(file: Path) -> Experiment:
    """The experiment in a YAML file; ConfigError names the file and the key that is wrong."""
    settings = validate(ExperimentFile, read_yaml(file, example="id: iemocap"), where=f"{file}")
    prefixed = {f"{name}-": path for name, path in settings.recipes.items()}
    if settings.recipe is not None:
        prefixed = {"": settings.recipe}
    rows: dict[str, Row] = {}
    folds = settings.select.folds if settings.select else {}
    for prefix, path in prefixed.items():
        recipe_file = file.parent / path
        unchanged = read_settings(recipe_file)
        if len(validate(Recipe, unchanged, where=f"{recipe_file}").corpora) > 1:
            raise ConfigError(f"{file}: {recipe_file} is of several corpora; take one of a single")
        for row, of_row in settings.rows.items():
            title = f"{prefix}{row}"
            if title in rows:
                raise ConfigError(f"{file}: '{title}' is two rows; give one another name")
            where = f"{file}: row '{title}'"
            of_recipe = partial(_overrides, recipe=prefix[:-1], every=settings.recipes, where=where)
            own, of_folds = of_recipe(of_row), of_recipe(folds)
            _override(unchanged, own, where=where)  # a wrong key is named before hours of work
            for key, values in of_folds.items():
                if not isinstance(values, list) or not values:
                    raise ConfigError(
                        f"{file}: select.folds.{key}: must list a value for each fold"
                    )
            rows[title] = Row(title, unchanged, own, of_folds, where)
    for row in (row for pair in settings.compare for row in pair):
        if row not in settings.rows:
            raise ConfigError(f"{file}: compare: there is no row '{row}'; correct its name")
    about = {
        "experiment": settings.id,
        "command": f"stream-hbaf experiment {_relative(file)} --corpora CORPORA",
        "commit": revision(),
    }
    pairs = tuple((f"{p}{a}", f"{p}{b}") for p in prefixed for a, b in settings.compare)
    experiment = Experiment(settings, tuple(rows.values()), about, pairs)
    experiment.candidates()  # those of the grid and the folds, too
    return experiment


def revision() -> str | None:
    """The commit that this code is of, "+changes" if files differ from it; None if in no checkout.

    Results are written into the checkout as well, so only code and configurations count.
    """

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None  # installed inside somebody else's checkout
        changed = git("status", "--porcelain", "--", "stream_hbaf", "configs")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _described(recipe: Recipe) -> dict[str, Any]:
    """What a run's facts say of its recipe."""
    network = read_network(recipe.network)
    audio = recipe.audio.representation if network.use_audio else "none"
    return {
        "corpus": next(iter(recipe.corpora)),
        "network": network.kind,
        "mode": network.mode,
        "modalities": "+".join(["audio"] * (audio != "none") + ["text"] * network.use_text),
        "recipe": _digest(recipe),
        "audio": audio,
        "encoder": _public(recipe.text_encoder.name) if network.use_text else "none",
        "transcripts": "gold",
    }


def _digest(recipe: Recipe) -> str:
    """Digest of all settings that decide a result, except defaults: a new setting changes none."""
    settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude=IRRELEVANT)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def by_preparation(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs grouped by equal features, which are then prepared once, one group at a time."""
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        shared = run.recipe.model_dump_json(exclude=FITTED)
        groups.setdefault((shared, run.recipe.takes_tokens), []).append(run)
    return list(groups.values())


def _product(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One value for each key, in all combinations. Raises ConfigError for far too many."""
    if (count := math.prod(map(len, values.values()))) > MOST_COMBINATIONS:
        keys = shorten(", ".join(values))
        raise ConfigError(f"{keys}: {count:.3g} combinations; leave values out")
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _overrides(
    settings: Mapping[str, Any], *, recipe: str, every: Mapping[str, Path], where: str
) -> dict[str, Any]:
    """A row's overrides of one of the recipes, by dotted keys."""
    own = settings.get(recipe, {}) if recipe else {}
    if not isinstance(own, Mapping):
        raise ConfigError(
            f"{where}: '{recipe}': must hold settings, not {shorten(repr(own))}; correct it"
        )
    return flatten({key: v for key, v in settings.items() if key not in every}) | flatten(own)


def _override(settings: Mapping[str, Any], changes: Mapping[str, Any], *, where: str) -> Recipe:
    """The recipe of these settings with ``changes``, by dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: '{key}': '{section}' has no settings of its own")
        node[leaf] = value
    return validate(Recipe, merge_settings(settings, nested), where=where)


def _public(name: str) -> str:
    """A model's name; of a folder its last part, so that no local path is published."""
    return Path(name).expanduser().name if name.startswith((".", "/", "~")) else name


def _relative(file: Path) -> str:
    """The file as seen from the checkout, or its name alone."""
    path = file.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
