"""Promises of training a mixture: from corpora to a bundle that loads, the same each time."""

import csv
import json
import wave
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.bundle import Bundle
from stream_hbaf.corpora.dataset import Dataset, predict
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.training.batches import Acted, MixtureConfig, Spoken, fit_mixture
from stream_hbaf.training.recipe import SelectionConfig, read_recipe
from stream_hbaf.training.selection import fit_components, fit_scaling
from stream_hbaf.training.train import train

RECORDINGS = Path(__file__).parent / "recordings"
RECIPE = {
    "id": "tiny",
    "network": {"hidden": 16, "heads": 2, "layers": 1, "filters": 4, "window": 3},
    "tuning": {"layers": 1, "epochs": 1},
    "heads": {"hidden": 8, "epochs": 2},
    "acoustics": {"copies": 1, "workers": 1},
    "components": 8,
    "fitting": {"epochs": 2, "seeds": [0, 1], "batch": 2, "workers": 1},
}
SMALL = HbafConfig(
    audio_width=6,
    text_width=6,
    commonsense_width=6,
    hidden=32,
    heads=2,
    layers=1,
    dropout=0.0,
    audio_skip=True,
)


def write_rows(file: Path, header: str, rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([header.split(","), *rows])


def write_wav(file: Path, samples: NDArray[np.int16]) -> None:
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(samples.tobytes())


def make_corpora(root: Path) -> Path:
    """The least that has the corpora's layout: real words, pieces of real speech."""
    speech = read_audio(RECORDINGS / "jfk.flac")
    for split in ("train", "dev", "test"):
        write_rows(
            root / "meld" / f"{split}_sent_emo.csv",
            "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID",
            [
                [f"I feel {label} now", "Ann", label, str(n % 3), str(n)]
                for n, label in enumerate(LABELS)
            ],
        )
        write_rows(
            root / "event2mind" / f"{split}.csv",
            "Source,Event,Xintent,Xemotion,Otheremotion,Xsent,Osent",
            [
                ["x", "PersonX wins", '["to win"]', '["happy"]', '["envious"]', "", ""],
                ["x", "PersonX loses", '["to try"]', '["sad"]', '["sorry"]', "", ""],
            ],
        )
    for actor in range(1, 25):
        folder = root / "ravdess" / f"Actor_{actor:02d}"
        folder.mkdir(parents=True)
        for emotion in (3, 5) if actor < 21 else (5,):
            start = 4000 * actor + (1000 * emotion)
            piece = speech[start : start + 12_000] // (1 if emotion == 5 else 4)
            name = f"03-01-{emotion:02d}-01-01-01-{actor:02d}.wav"
            write_wav(folder / name, piece)
    for kind in ("noise", "rir"):
        (root / "speech" / kind).mkdir(parents=True)
        write_wav(root / "speech" / kind / "a.wav", speech[::-1][:1600])
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    place = tmp_path_factory.mktemp("training")
    make_corpora(place / "corpora")
    (place / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    lines: list[str] = []
    train(
        place / "tiny.yaml",
        place / "corpora",
        place / "first",
        cache=place / "cache",
        progress=lines.append,
    )
    return place, lines


def test_training_gives_a_bundle_that_loads(trained):
    """Corpora in, a bundle out: network and components have the asked sizes."""
    place, lines = trained
    bundle = Bundle.load(str(place / "first"))
    assert bundle.labels == LABELS
    assert (bundle.config.network.hidden, bundle.config.network.audio_width) == (16, 8)
    assert bundle.scale(np.zeros((1, 6373), np.float32)).shape == (1, 8)
    assert lines[-1] == f"{place / 'first'}: bundle tiny, 2 networks, is ready"


def test_training_again_gives_the_same_bundle(trained):
    """The same recipe and corpora, features from the cache: the same bytes."""
    place, _ = trained
    train(
        place / "tiny.yaml",
        place / "corpora",
        place / "second",
        cache=place / "cache",
        progress=lambda line: None,
    )
    sums = [(place / name / "SHA256SUMS").read_text() for name in ("first", "second")]
    assert sums[0] == sums[1]


def test_metrics_hold_every_condition_and_seed(trained):
    """Dev alone: words as written and misheard, sound under all conditions, over seeds."""
    place, _ = trained
    metrics = json.loads((place / "first" / "metrics.json").read_text())
    assert set(metrics["seeds"]) == {"0", "1"}
    assert len(metrics["dev"]) == 2 + 2 * 5 + 1
    assert set(metrics["dev"]["meld/text/gold"]["seeds"]["weighted_f1"]) == {"mean", "sd"}
    assert "ravdess/audio+text/noise_10db_room" in metrics["dev"]
    assert metrics["dev"]["majority"]["accuracy"] == pytest.approx(1 / 7)
    assert "test" not in metrics


def test_a_bundle_is_calibrated_and_can_say_what_it_infers(trained):
    """Both seeds' networks are one; their calibration is of both; its inferences are with it."""
    place, _ = trained
    bundle = Bundle.load(str(place / "first"))
    metrics = json.loads((place / "first" / "metrics.json").read_text())
    assert (bundle.config.members, len(bundle.network.members)) == (2, 2)
    assert bundle.calibration.model_dump(mode="json") == metrics["calibration"]
    assert bundle.calibration.risk == 0.3
    assert bundle.inferences is not None


def test_the_card_says_what_was_measured(trained):
    """The card's figures are the metrics', and its warnings are there."""
    place, _ = trained
    card = (place / "first" / "README.md").read_text()
    metrics = json.loads((place / "first" / "metrics.json").read_text())
    own = 100 * metrics["dev"]["meld/text/gold"]["shipped"]["weighted_f1"]
    assert f"| as written | {own:.1f} (" in card
    assert "RAVDESS, sound alone, noise at 10 dB SNR" in card
    for words in ("Art. 5(1)(f)", "CC BY-NC-SA 4.0", "openSMILE", "read as English"):
        assert words in card


def test_training_without_a_corpus_says_which(tmp_path):
    """A corpus that isn't there is named before anything is computed."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"MELD: .*train_sent_emo\.csv is missing"):
        train(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out", cache=tmp_path / "cache")


def test_an_unknown_setting_of_a_recipe_is_named(tmp_path):
    """A mistyped setting ends in one line with the file and the setting."""
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("id: x\nfitting: {epoch: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: 'fitting\.epoch'") as raised:
        read_recipe(recipe)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("left_out", ["ravdess", "nemo", "tess"])
def test_leaving_a_corpus_out_changes_nothing_else(left_out):
    """configs/live-en-without-*.yaml are live-en's recipe but for their voices and name."""
    configs = Path(__file__).parent.parent / "configs"
    whole = read_recipe(configs / "live-en.yaml")
    recipe = read_recipe(configs / f"live-en-without-{left_out}.yaml")
    voices = tuple(name for name in whole.voices if name != left_out)
    changes = {"id": f"live-en-without-{left_out}", "voices": voices}
    fitting = whole.fitting.model_copy(update={"seeds": recipe.fitting.seeds})
    assert recipe == whole.model_copy(update={**changes, "fitting": fitting})


def test_an_unknown_voice_of_a_recipe_is_named(tmp_path):
    """A corpus without acted clips can't be a voice."""
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("id: x\nvoices: [meld]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: 'voices'.*ravdess, nemo, tess"):
        read_recipe(recipe)


def test_the_network_overfits_eight_utterances():
    """Words tell half of the labels and voices the other half: all eight are learnt."""
    draw = np.random.default_rng(0)
    labels = np.arange(8) % 7
    text, audio = draw.standard_normal((2, 8, 6)).astype(np.float32)
    blank = np.zeros((8, 3, 6), np.float32)
    spoken = Dataset(labels, text, blank, {}, (np.arange(4), np.arange(4, 8)))
    voices = {"0": audio}
    acted = Dataset(labels, np.zeros_like(text), blank, voices, tuple(np.arange(8)[:, None]))
    plan = MixtureConfig(epochs=50, patience=50, rate=3e-3, batch=2, spoken_share=1.0)

    def right(network) -> float:
        words = predict(network, spoken, version=None, with_text=True).argmax(1)
        heard = predict(network, acted, version="0", with_text=False).argmax(1)
        return float(((words == labels).mean() + (heard == labels).mean()) / 2)

    fitted = fit_mixture(
        SMALL,
        plan,
        spoken=Spoken(spoken, tuple((rows,) for rows in spoken.dialogues)),
        acted=Acted(acted, np.ones(8, np.float32)),
        dev_score=right,
        seed=0,
    )
    assert fitted.history.best_score == 1.0


def test_neutral_words_settle_nothing_against_a_voice():
    """Voices that never had words are believed beside neutral words; telling words win."""
    draw = np.random.default_rng(0)
    labels = np.arange(7)
    text, audio = draw.standard_normal((2, 7, 6)).astype(np.float32)
    blank = np.zeros((7, 3, 6), np.float32)
    alone = tuple(np.arange(7)[:, None])
    spoken = Dataset(labels, text, blank, {}, alone)
    silent = np.zeros(7, dtype=bool)
    acted = Dataset(labels, np.zeros_like(text), blank, {"0": audio}, alone, text_mask=silent)
    plan = MixtureConfig(
        epochs=60, patience=60, rate=3e-3, batch=2, spoken_share=1.0, pair=1.0, heard=1.0
    )
    epochs = count()
    network = fit_mixture(
        SMALL,
        plan,
        spoken=Spoken(spoken, tuple((rows,) for rows in spoken.dialogues)),
        acted=Acted(acted, np.ones(7, np.float32)),
        dev_score=lambda _: float(next(epochs)),  # the last network is the one to keep
        seed=0,
    ).network
    neutral = LABELS.index("neutral")
    beside_neutral = Dataset(labels, text[[neutral] * 7], blank, {"0": audio}, alone)
    telling = [n for n in range(7) if n != neutral]
    beside_telling = Dataset(labels, text, blank, {"0": np.roll(audio, 1, axis=0)}, alone)
    heard = predict(network, beside_neutral, version="0").argmax(1)
    read = predict(network, beside_telling, version="0").argmax(1)
    assert heard.tolist() == labels.tolist()
    assert np.mean(read[telling] == labels[telling]) >= 4 / 6


def test_selection_finds_the_functionals_that_tell(tmp_path):
    """Of 50 columns, one of them constant, the two that depend on the label are kept."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    functionals = draw.standard_normal((200, 50)).astype(np.float32)
    functionals[:, 7] += 3 * labels
    functionals[:, 31] -= 3 * labels
    functionals[:, 12] = 4.0
    scaling = fit_scaling(functionals, labels, SelectionConfig(width=2))
    assert scaling.selected.tolist() == [7, 31]
    np.testing.assert_allclose(scaling(functionals).mean(0), 0.0, atol=1e-5)


def test_components_join_what_moves_together():
    """Twenty columns that two causes move become those two, each of deviation 1; others stay."""
    draw = np.random.default_rng(0)
    causes = draw.standard_normal((400, 2))
    joined = causes @ draw.standard_normal((2, 20)) + 0.01 * draw.standard_normal((400, 20))
    rows = np.column_stack([joined, 5 * draw.standard_normal(400) + 3]).astype(np.float32)
    rows[:, 4] = 7.0  # constant: tells nothing
    weights = np.ones(400, np.float32)
    scaling = fit_components(rows, weights=weights, among=20, components=2)
    heard = scaling(rows)
    assert heard.shape == (400, scaling.width) == (400, 3)
    np.testing.assert_allclose(heard[:, :2].T @ heard[:, :2] / 400, np.eye(2), atol=0.02)
    explained = np.linalg.lstsq(heard[:, :2], causes - causes.mean(0), rcond=None)[1]
    assert explained.max() < 0.05 * 400  # the causes can be read from the components
    whole = fit_components(rows, weights=weights, among=20, components=None)
    np.testing.assert_array_equal(heard[:, 2], whole(rows)[:, -1])
    assert (whole.components, whole.width) == (None, 20)
