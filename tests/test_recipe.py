"""Promises of recipes: what they may say, how they extend each other, and how they are found."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from damages import as_text, change, complaint
from training_kit import ONE, make_recipe, write_recipe

from stream_hbaf.errors import ConfigError
from stream_hbaf.training.recipe import (
    PLACES,
    CorpusConfig,
    LossConfig,
    Recipe,
    find_recipe,
    read_recipe,
)

# Every section with a list or a mapping of its own.
WHOLE = Recipe(
    id="x",
    corpora={"meld": {}, "ravdess": {"classes": {"a": ["b"]}}},
    network={"hidden": 128, "heads": 4},
    text_encoder={"soup": [{"layers": 2}]},
).model_dump(mode="json")
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"hiden": 3}}, "'network': there is no setting 'hiden'"),
        ({"network": {"audio_width": 3}}, "'network': 'audio_width' follows from the features"),
        ({"network": {"hidden": 15}}, "'network': network: hidden 15 must divide"),
        ({"network": {"window": "wide"}}, "'network': 'window'"),
        ({"corpora": "mosei"}, "'corpora': no reader for 'mosei'; choose"),
        ({"corpora": []}, "'corpora'"),
        ({"corpora": {"meld": {"folds": 1}}}, r"'corpora\.meld\.folds'"),
        ({"losses": {"my": 1}}, r"'losses\.my'"),
        ({"fit": {"seeds": []}}, r"'fit\.seeds'"),
        ({"fit": {"ship": "all"}}, r"'fit\.ship'"),
        ({"commonsense": {"source": "atomic"}}, r"'commonsense\.source': not 'atomic'"),
        ({"calibration": {"risk": 0}}, r"'calibration\.risk'"),
        ({"sound": "mfcc"}, "'sound'"),
        ({"text_encoder": {"dev_figures": {"meld": "f1"}}}, r"'text_encoder\.dev_figures\.meld'"),
        (
            {"text_encoder": {"adapter_rank": 4, "seeds": [0, 1]}},
            "'text_encoder': adapters can't be averaged",
        ),
        ({"text_encoder": {"soup": [{"adapter_rank": 4}]}}, "'text_encoder': adapters can't be"),
        (
            {"audio": {"representation": "lld"}, "network": {"kind": "mmgcn"}},
            "'audio': 'lld' is tokens, which only mgcma takes",
        ),
    ],
)
def test_a_wrong_setting_of_a_recipe_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """One line with the file, the setting and what is wrong with it, before hours of work."""
    with pytest.raises(ConfigError, match=rf"one\.yaml: {message}") as raised:
        make_recipe(tmp_path, ONE, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("corpora", ["meld", ["meld"], {"meld": None}, {"meld": {}}])
def test_corpora_are_one_name_or_a_list_or_settings(
    tmp_path: Path, corpora: str | list[str] | dict[str, Any]
) -> None:
    """Four ways to name one corpus are one recipe."""
    assert make_recipe(tmp_path, ONE, corpora=corpora) == Recipe(**ONE)
    assert Recipe(**ONE).corpora == {"meld": CorpusConfig()}


def test_every_recipe_that_ships_can_be_read() -> None:
    """Each is named as its file and found by that name."""
    files = sorted(CONFIGS.glob("*.yaml"))
    assert [read_recipe(file).id for file in files] == [file.stem for file in files]
    assert [find_recipe(file.stem) for file in files] == files


@pytest.mark.parametrize("left_out", ["ravdess", "nemo", "tess"])
def test_leaving_a_corpus_out_changes_nothing_else(left_out: str) -> None:
    """configs/live-en-without-*.yaml are live-en's recipe but for a corpus, name and seeds."""
    recipe = read_recipe(CONFIGS / f"live-en-without-{left_out}.yaml").model_dump()
    whole = read_recipe(CONFIGS / "live-en.yaml").model_dump()
    assert [*recipe["corpora"], left_out] == sorted(
        whole["corpora"], key=lambda name: name == left_out
    )
    for name in ("id", "corpora"):
        del recipe[name], whole[name]
    assert recipe.pop("fit") == whole.pop("fit") | {"seeds": (0, 1, 2)}
    assert recipe == whole


def extend(folder: Path, **changes: Any) -> Recipe:
    """A recipe that extends ``one.yaml``."""
    file = folder / "more.yaml"
    file.write_text(yaml.safe_dump({"extends": "one.yaml", "id": "more", **changes}))
    return read_recipe(file)


def test_an_extending_recipe_changes_single_settings(tmp_path: Path) -> None:
    """Sections are merged, lists replaced; corpora are added and left out by name."""
    write_recipe(tmp_path, ONE, corpora={"meld": {"max_dialogues": 3}, "tess": {}})
    recipe = extend(
        tmp_path,
        corpora={"meld": {"fold": 2}, "ravdess": None},
        without=["tess"],
        fit={"seeds": [7]},
    )
    assert recipe.corpora == {
        "meld": CorpusConfig(max_dialogues=3, fold=2),
        "ravdess": CorpusConfig(),
    }
    assert recipe.fit.model_dump() == Recipe(**ONE).fit.model_dump() | {"seeds": (7,)}


def test_another_kind_of_network_keeps_what_all_kinds_have(tmp_path: Path) -> None:
    """Hidden width stays, HBAF's own filters go."""
    write_recipe(tmp_path, ONE)
    assert extend(tmp_path, network={"kind": "mgcma"}).network == {"kind": "mgcma", "hidden": 16}
    assert extend(tmp_path, network={"heads": 4}).network == ONE["network"] | {"heads": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extends": "more.yaml"}, r"more\.yaml: extends itself"),
        ({"extends": "nothing"}, "nothing: no such file or recipe; there is .*live-en"),
        ({"without": ["tess"]}, r"more\.yaml: 'without': there is no corpus 'tess'"),
        ({"fit": {"rat": 1}}, r"more\.yaml: 'fit\.rat'"),
    ],
)
def test_a_recipe_that_cannot_extend_says_why(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """One line, whichever of the two files is wrong."""
    write_recipe(tmp_path, ONE)
    with pytest.raises(ConfigError, match=message):
        extend(tmp_path, **changes)


def test_recipes_are_found_by_path_before_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of that name in the working folder comes first; then the clone's, or the wheel's."""
    assert find_recipe("meld") == CONFIGS / "meld.yaml"
    installed = tmp_path / "configs"
    installed.mkdir()
    monkeypatch.setattr("stream_hbaf.training.recipe.PLACES", (tmp_path / "none", installed))
    (installed / "meld.yaml").touch()
    assert find_recipe("meld") == installed / "meld.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meld").touch()
    assert find_recipe("meld") == Path("meld")
    assert PLACES[0] == CONFIGS


@pytest.mark.parametrize(
    ("losses", "weights"),
    [
        (LossConfig(), (1 / 3, 1 / 3, 1 / 3)),
        (LossConfig(relative=False), (1 / 2, 1 / 2, 0)),
        (LossConfig(absolute=False), (0, 0, 1)),
        (LossConfig(absolute=False, relative=False), None),
        (LossConfig(mu=0.0), None),
    ],
)
def test_switches_of_the_loss_are_its_weights(
    losses: LossConfig, weights: tuple[float, float, float] | None
) -> None:
    """Absolute only, relative only, both, neither: equation 21's weights."""
    assert losses.weights == weights


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_recipe_is_one_line(tmp_path: Path, seed: int) -> None:
    """Wrong values at every place: read, or a printable line that isn't long."""
    file = tmp_path / "recipe.yaml"
    whole = WHOLE | {"extends": "meld", "without": ["meld"]} if seed % 2 else WHOLE
    file.write_bytes(as_text(change(whole, seed)))
    said = complaint(lambda: read_recipe(file))
    assert said.isprintable()
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpora: [[meld]]", "'corpora'"),
        ("corpora: meld\nwithout: 5", "'without': there is no corpus '5'"),
        ("corpora: meld\nwithout: [[a]]", r"'without': there is no corpus '\['a'\]'"),
        (f"extends: {'x' * 5000}", "x…: no such file or recipe"),
        ("network: {heads: 0}", "'network': network: heads must be from 1"),
        ("network: {hidden: 1000000000}", "'network': network: hidden must be from 1 to 65536"),
        ("network: {layers: 100000}", "'network': network: layers must be from 0 to 64"),
        ("network: {dropout: 2}", "'network': network: dropout must be from 0 to 1"),
        ("text_encoder: {dropout: 2}", r"'text_encoder\.dropout'"),
        ("fit: {seeds: [-1]}", r"'fit\.seeds\.0'"),
        ("fit: {epochs: 100000000}", r"'fit\.epochs'"),
    ],
)
def test_what_no_recipe_holds_is_named(tmp_path: Path, text: str, message: str) -> None:
    """In one line, whatever stands there."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"id: x\n{text}\n" + ("" if "corpora" in text else "corpora: meld\n"))
    with pytest.raises(ConfigError, match=message):
        read_recipe(file)


def test_recipes_that_extend_each_other_by_any_path_are_refused(tmp_path: Path) -> None:
    """Two names of one file are one file."""
    (tmp_path / "a.yaml").write_text(f"extends: ../{tmp_path.name}/a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself; name another recipe"):
        read_recipe(tmp_path / "a.yaml")
