"""Promises of model cards: each shipped one is what the template makes of its metrics.json."""

import json
from pathlib import Path

import pytest
import yaml
from damages import as_text, change, complaint

from stream_hbaf.bundle import resolve_bundle
from stream_hbaf.commands.research import _read_metrics
from stream_hbaf.corpora.open_corpus import CORPORA, PUBLICATIONS
from stream_hbaf.training.card import licence_of, model_card
from stream_hbaf.training.recipe import Recipe, read_recipe

ROOT = Path(__file__).parent.parent
BUNDLES = sorted(path.parent for path in (ROOT / "models").glob("*/metrics.json"))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_the_shipped_card_is_made_of_its_metrics(bundle: Path) -> None:
    """Nothing in the card was written by hand, nothing is of an older template."""
    metrics = json.loads((bundle / "metrics.json").read_text(encoding="utf-8"))
    assert (bundle / "README.md").read_text(encoding="utf-8") == model_card(metrics)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_the_shipped_recipe_is_the_one_that_ships(bundle: Path) -> None:
    """A bundle's metrics hold its recipe, by which it can be trained again.

    Settings that are newer than the bundle have their defaults.
    """
    metrics = json.loads((bundle / "metrics.json").read_text(encoding="utf-8"))
    recipe = read_recipe(ROOT / "configs" / f"{bundle.name}.yaml")
    assert Recipe.model_validate(metrics["recipe"]) == recipe


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_a_card_begins_with_what_the_hub_reads(bundle: Path) -> None:
    """Licence, language, corpora, and the test figures of the live path."""
    _, matter, body = (bundle / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(matter)
    metrics = json.loads((bundle / "metrics.json").read_text(encoding="utf-8"))
    assert (found["license"], found["license_name"]) == ("other", "research-only")
    assert found["datasets"] == list(metrics["corpora"])
    [model] = found["model-index"]
    assert model["name"] == bundle.name
    ravdess = next(one for one in model["results"] if one["dataset"]["type"] == "ravdess")
    uar = next(one for one in ravdess["metrics"] if one["type"] == "uar")
    assert uar["value"] == round(100 * metrics["live"]["ravdess_uar"], 1)
    assert body.startswith(f"\n# {bundle.name}\n")


def test_there_are_shipped_bundles() -> None:
    """The tests above look at something."""
    assert [bundle.name for bundle in BUNDLES] == ["live-en", "mgcma-en"]


def test_every_published_corpus_has_terms() -> None:
    """A card names the terms of whatever can be trained on."""
    assert set(CORPORA) <= PUBLICATIONS.keys()
    assert all(one.terms and one.title and one.content for one in PUBLICATIONS.values())


def test_a_licence_names_every_corpus_and_openSMILE() -> None:
    """All corpora, annotations of the commonsense heads, and the extractor's own terms."""
    recipe = read_recipe(ROOT / "configs" / "live-en.yaml").model_dump(mode="json")
    licence = licence_of(recipe)
    for words in ("MELD: research use", "TESS: CC BY-NC-ND", "ATOMIC", "openSMILE's licence"):
        assert words in licence
    assert "\n" not in licence
    own = recipe | {
        "corpora": {"own/manifest.csv": {}},
        "audio": recipe["audio"] | {"representation": "none"},
    }
    assert licence_of(own).startswith("own/manifest.csv: the corpus's own terms")
    assert "openSMILE" not in licence_of(own)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_metrics_are_one_line(tmp_path: Path, seed: int) -> None:
    """Of a bundle whose card is to be updated: wrong values at every place."""
    metrics = json.loads((resolve_bundle("live-en") / "metrics.json").read_text(encoding="utf-8"))
    (tmp_path / "metrics.json").write_bytes(as_text(change(metrics, seed)))
    assert complaint(lambda: _read_metrics(str(tmp_path))).isprintable()
