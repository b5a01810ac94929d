"""Promises of training on one corpus: what a recipe may say, what is prepared, what is fitted."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stream_hbaf.bundle import Bundle
from stream_hbaf.corpora.dataset import NO_LABEL, Dataset, class_weights
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import ConfigError, CorpusError, ModelError
from stream_hbaf.features.prosody import PROSODY, PROSODY_WIDTH
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.training.fitting import (
    FittingConfig,
    LossConfig,
    draw_batches,
    fit_network,
    fit_temperature,
)
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe import MixtureRecipe, Recipe, SelectionConfig, read_recipe
from stream_hbaf.training.selection import fit_scaling
from stream_hbaf.training.train import fit_seed, train

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPE = {
    "id": "tiny",
    "corpus": "meld",
    "commonsense": "none",
    "network": {"hidden": 16, "heads": 2, "layers": 1, "filters": 4, "window": 3},
    "fitting": {"epochs": 3, "seeds": [0, 1], "batch": 2, "workers": 1},
}
QUIET = {"progress": lambda line: None}


def write_rows(file: Path, header: list[str], rows: list[list[object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([header, *rows])


def make_meld(root: Path) -> Path:
    """Three dialogues a split; one utterance isn't in the prosody tables, one pitch is missing."""
    draw = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        said = [
            [f"I feel {label} now", "Ann" if n % 2 else "Bob", label, n % 3, n // 3]
            for n, label in enumerate(LABELS)
        ]
        write_rows(
            root / "meld" / f"{split}_sent_emo.csv",
            ["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"],
            said,
        )
        measured = [
            [f"dia{row[3]}_utt{row[4]}.wav", *(draw.random(len(PROSODY)) + 1).round(3).tolist()]
            for row in said[1:]
        ]
        measured[0][1 + PROSODY.index("avg_pitch")] = ""
        write_rows(root / "meld" / f"prosody_{split}.csv", ["filename", *PROSODY], measured)
    return root


def write_recipe(place: Path, **changes: object) -> Path:
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_meld(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def prepared(place) -> Prepared:
    return prepare(Recipe(**RECIPE), place, cache=place / "cache", **QUIET)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network": {"hiden": 3}}, "'network': there is no setting 'hiden'"),
        ({"network": {"audio_width": 3}}, "'network': 'audio_width' follows from the features"),
        ({"network": {"hidden": 15}}, "'network': network: hidden 15 must divide"),
        ({"network": {"window": "wide"}}, "'network': 'window'"),
        ({"corpus": "mosei"}, "'corpus': no reader for 'mosei'; choose"),
        ({"losses": {"my": 1}}, r"'losses\.my'"),
        ({"fitting": {"seeds": []}}, r"'fitting\.seeds'"),
        ({"commonsense": "atomic"}, "'commonsense': not 'atomic'"),
        ({"sound": "mfcc"}, "'sound'"),
    ],
)
def test_a_wrong_setting_of_a_recipe_is_named(tmp_path, changes, told):
    """One line with the file, the setting and what is wrong with it."""
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: {told}") as raised:
        read_recipe(write_recipe(tmp_path, **changes))
    assert "\n" not in str(raised.value)


def test_a_recipe_without_a_corpus_is_a_mixture(tmp_path):
    """The two kinds are told apart by the corpus alone."""
    (tmp_path / "mixed.yaml").write_text("id: x\n", encoding="utf-8")
    assert isinstance(read_recipe(tmp_path / "mixed.yaml"), MixtureRecipe)
    assert isinstance(read_recipe(write_recipe(tmp_path)), Recipe)


def test_every_recipe_that_ships_can_be_read():
    """All of configs/ that are recipes are of this version."""
    read = [read_recipe(file) for file in sorted(CONFIGS.glob("*.yaml"))]
    assert "live-en" in [recipe.id for recipe in read]


def test_a_corpus_becomes_material(prepared):
    """A row an utterance, in the order of the dialogues, with the corpus's own labels."""
    train = prepared.material["train"]
    assert prepared.labels == LABELS
    assert prepared.ids["train"][:4] == ("dia0_utt0", "dia0_utt1", "dia0_utt2", "dia1_utt0")
    assert train.labels.tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert [rows.tolist() for rows in train.dialogues] == [[0, 1, 2], [3, 4], [5, 6]]
    assert train.text.shape == (7, 384)
    assert train.audio[""].shape[0] == 7
    assert train.audio[""].shape[1] <= PROSODY_WIDTH


def test_what_was_not_measured_is_masked(prepared):
    """No row in the tables: no sound. An empty cell: the training mean, which is 0."""
    train = prepared.material["train"]
    assert train.audio_mask.tolist() == [False, True, True, True, True, True, True]
    assert np.isfinite(train.audio[""]).all()
    assert prepared.skipped[0].startswith("dia0_utt0: ")


def test_text_features_that_are_no_numbers_name_the_utterance(place, tmp_path):
    """One utterance of NaN ends preparation with its id, before a network is spoilt."""
    recipe = Recipe(**{**RECIPE, "audio": "none"})
    prepare(recipe, place, cache=tmp_path, **QUIET)
    for file in (tmp_path / "text").glob("*.npy"):
        features = np.load(file)
        features[5, 3] = np.nan
        np.save(file, features)
    with pytest.raises(ModelError, match=r"text features of utterance dia2_utt0 in train"):
        prepare(recipe, place, cache=tmp_path, **QUIET)


def test_what_is_prepared_travels_without_its_models(prepared):
    """A training process gets the features, not an encoder of a hundred million weights."""
    there = pickle.loads(pickle.dumps(prepared))
    assert there.encoder is None
    assert there.commonsense is None
    np.testing.assert_array_equal(there.material["dev"].text, prepared.material["dev"].text)


def test_narrow_features_are_all_kept():
    """Without a selection every column that isn't constant stays, whatever is missing in it."""
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    rows[:, 2] = 3.0
    rows[:10, 0] = np.nan
    scaling = fit_scaling(rows, np.arange(50) % 2, None)
    assert scaling.selected.tolist() == [0, 1, 3]
    np.testing.assert_allclose(scaling(rows)[10:].std(0), 1.0, atol=0.1)
    assert scaling(rows)[:10, 0].tolist() == [0.0] * 10


def test_unlabelled_rows_select_nothing():
    """Which functionals tell is learnt from labelled utterances only."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    rows = draw.standard_normal((200, 20)).astype(np.float32)
    rows[:, 4] += 3 * labels
    labels[::2] = NO_LABEL
    assert fit_scaling(rows, labels, SelectionConfig(width=1)).selected.tolist() == [4]


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
def test_switches_of_the_loss_are_its_weights(losses, weights):
    """Absolute only, relative only, both, neither: equation 21's weights."""
    assert losses.weights == weights


def test_an_epochs_batches_are_drawn_from_seed_and_epoch():
    """Every dialogue once; the same for the same epoch, others for others; alike in length."""
    dialogues = [np.arange(1 + n % 9) for n in range(70)]
    one, again = (draw_batches(dialogues, 1, size=4, seed=0) for _ in range(2))
    two = draw_batches(dialogues, 2, size=4, seed=0)
    flat = [[len(rows) for rows in batch] for batch in one]
    assert flat == [[len(rows) for rows in batch] for batch in again]
    assert flat != [[len(rows) for rows in batch] for batch in two]
    assert sorted(n for batch in flat for n in batch) == sorted(map(len, dialogues))
    assert float(np.mean([max(batch) - min(batch) for batch in flat])) < 4


def test_balanced_classes_weigh_the_same():
    """A class three times as rare weighs three times as much; context only doesn't count."""
    weights = class_weights(np.array([0, 0, 0, 1, NO_LABEL, NO_LABEL]), classes=3)
    np.testing.assert_allclose(weights.numpy(), [2 / 3, 2.0, 0.0], rtol=1e-6)


def test_temperature_makes_too_sure_logits_less_sure():
    """Logits that are right half of the time end near even odds."""
    logits = np.tile(np.array([[4.0, 0.0]], np.float32), (100, 1))
    assert fit_temperature([(logits, np.arange(100) % 2)]) == pytest.approx(5.0)


def make_material(**changes: object) -> Dataset:
    """Two dialogues of four; words tell half of the labels and voices the other half."""
    draw = np.random.default_rng(0)
    text, audio = draw.standard_normal((2, 8, 6)).astype(np.float32)
    whole = {
        "labels": np.arange(8) % 4,
        "text": text,
        "commonsense": np.zeros((8, 3, 6), np.float32),
        "audio": {"": audio},
        "dialogues": (np.arange(4), np.arange(4, 8)),
    }
    return Dataset(**{**whole, **changes})


def fit_tiny(material: Dataset, *, losses: LossConfig | None = None, **plan: object):
    config = HbafConfig(
        audio_width=6,
        text_width=6,
        commonsense_width=6,
        hidden=32,
        heads=2,
        layers=1,
        classes=4,
        dropout=0.0,
    )
    return fit_network(
        config,
        losses=losses or LossConfig(),
        plan=FittingConfig(**{"epochs": 25, "patience": 25, "rate": 1e-2, "batch": 2, **plan}),
        material=dict.fromkeys(("train", "dev", "test"), material),
        seed=0,
    )


def test_the_network_overfits_eight_utterances():
    """Learnt by heart with both losses, and as sure of it as it may be."""
    fitted = fit_tiny(make_material())
    assert fitted.dev.weighted_f1 == 1.0
    assert fitted.test == fitted.dev
    assert fitted.probabilities["dev"].shape == (8, 4)
    assert fitted.dev_by_loss == 1.0


def test_utterances_without_a_label_are_context_only():
    """They are in the dialogue, but neither learnt nor counted."""
    labels = np.array([0, 1, NO_LABEL, 3, 0, NO_LABEL, 2, 3])
    fitted = fit_tiny(make_material(labels=labels))
    assert fitted.dev.count == 6
    assert fitted.dev.weighted_f1 == 1.0
    assert fitted.probabilities["dev"].shape == (8, 4)


def test_sound_that_is_masked_is_never_read():
    """NaN where there is no sound changes nothing."""
    mask = np.arange(8) % 3 > 0
    audio = make_material().audio[""].copy()
    audio[~mask] = np.nan
    broken = fit_tiny(make_material(audio={"": audio}, audio_mask=mask), epochs=3)
    whole = fit_tiny(make_material(audio_mask=mask), epochs=3)
    np.testing.assert_array_equal(broken.probabilities["dev"], whole.probabilities["dev"])


def test_the_epoch_of_the_lowest_loss_is_reported_beside_the_best():
    """Decision 15: stopped and picked on dev's weighted F1, the loss-picked figure beside it."""
    fitted = fit_tiny(make_material(), epochs=8)
    losses = [figures["loss"] for figures in fitted.history.measured]
    assert fitted.dev_by_loss == fitted.history.scores[int(np.argmin(losses))]
    assert fitted.history.best_score == max(fitted.history.scores)


def test_the_network_is_scored_in_the_precision_that_ships():
    """Its weights are float16's, so that a bundle says just what was measured."""
    network = fit_tiny(make_material(), epochs=2).network
    assert all(torch.equal(p, p.half().float()) for p in network.parameters())


def test_the_same_seed_gives_the_same_network(prepared, tmp_path):
    """With and without checkpoints: the same probabilities, to the last bit."""
    recipe = Recipe(**RECIPE)
    one = fit_seed(recipe, prepared, 0, tmp_path)
    two = fit_seed(recipe, prepared, 0, None)
    other = fit_seed(recipe, prepared, 1, None)
    np.testing.assert_array_equal(one.probabilities["test"], two.probabilities["test"])
    assert not np.array_equal(one.probabilities["test"], other.probabilities["test"])


@pytest.fixture(scope="module")
def trained(place) -> tuple[Path, list[str]]:
    lines: list[str] = []
    train(
        write_recipe(place),
        place,
        place / "out",
        cache=place / "cache",
        progress=lines.append,
    )
    return place, lines


def test_every_seed_leaves_a_bundle_and_the_best_is_shipped(trained):
    """<out>/seed-N for each, and in <out> the one that is best on dev."""
    place, lines = trained
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    reached = {seed: figures["dev"]["weighted_f1"] for seed, figures in metrics["seeds"].items()}
    assert set(reached) == {"0", "1"}
    assert reached[str(metrics["shipped_seed"])] == max(reached.values())
    shipped, own = (
        Bundle.load(str(place / "out" / name)) for name in ("", f"seed-{metrics['shipped_seed']}")
    )
    theirs = own.network.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in shipped.network.state_dict().items())
    assert (shipped.config.acoustic, shipped.config.commonsense) == ("prosody", "none")
    assert lines[-1].endswith(f"seed {metrics['shipped_seed']}, is ready")


def test_a_bundle_says_what_was_measured(trained, prepared):
    """The bundle's own network, loaded from disk, gives the test figure of its metrics."""
    place, _ = trained
    metrics = json.loads((place / "out" / "seed-1" / "metrics.json").read_text())
    fitted = fit_seed(Recipe(**RECIPE), prepared, 1, None)
    assert metrics["seeds"]["1"]["test"]["weighted_f1"] == fitted.test.weighted_f1
    assert metrics["spread"]["test"]["weighted_f1"]["mean"] == pytest.approx(
        np.mean([figures["test"]["weighted_f1"] for figures in metrics["seeds"].values()])
    )
    assert metrics["majority"]["test"]["count"] == 7


def test_training_again_gives_the_same_bytes(trained):
    """Started again it takes up what there is, and the bundles are the same."""
    place, _ = trained
    train(place / "recipe.yaml", place, place / "again", cache=place / "cache", **QUIET)
    for name in ("", "seed-0", "seed-1"):
        first, second = (
            (place / out / name / "SHA256SUMS").read_text() for out in ("out", "again")
        )
        assert first == second


def test_the_card_is_true(trained):
    """Corpus, protocol, transcripts, seeds and licence; figures are the metrics'."""
    place, _ = trained
    card = (place / "out" / "README.md").read_text()
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    own = 100 * metrics["seeds"][str(metrics["shipped_seed"])]["test"]["weighted_f1"]
    assert f"| test | {own:.1f} (" in card
    for words in ("MELD", "Causal", "Gold transcripts", "of 2;", "research use", "Art. 5(1)(f)"):
        assert words in card


def test_a_recipe_without_sound_is_of_words_alone(place, tmp_path):
    """Nothing is measured, and the network has no place for it."""
    recipe = Recipe(**{**RECIPE, "audio": "none"})
    prepared = prepare(recipe, place, cache=place / "cache", **QUIET)
    fitted = fit_seed(recipe, prepared, 0, None)
    assert prepared.scaling is None
    assert fitted.network.config.modalities == ("l",)


def test_a_corpus_that_is_missing_is_named(tmp_path):
    """Before anything is computed."""
    with pytest.raises(CorpusError, match=r"train_sent_emo\.csv is missing"):
        train(write_recipe(tmp_path), tmp_path, tmp_path / "out", cache=tmp_path / "cache")


def test_a_recipe_of_tokens_for_a_network_of_vectors_is_refused(tmp_path):
    """One line that says which setting, before hours of work."""
    file = tmp_path / "mixed-up.yaml"
    tree = {"id": "x", "corpus": "ravdess", "audio": "lld", "network": {"kind": "mmgcn"}}
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match="'audio': 'lld' is tokens, which only mgcma takes"):
        read_recipe(file)
