"""Promises of training: from corpora to a bundle that loads, the same each time, even if killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import save_tiny_bert
from training_kit import ONE, SEVERAL, make_corpora, make_recipe, silent, write_recipe

from stream_hbaf.bundle import Bundle
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import CorpusError
from stream_hbaf.networks.calibration import PATTERNS
from stream_hbaf.networks.registry import Ensemble
from stream_hbaf.training.fitting import fit_network
from stream_hbaf.training.preparation import prepare
from stream_hbaf.training.train import train

Trained = tuple[Path, list[str]]  # the folder of the bundle, the lines of progress

# Trains, and is killed at the so-manieth step of the network or of the text encoder.
CHILD = """
import os, signal, sys
from pathlib import Path
from stream_hbaf.training import fitting, text_encoder
from stream_hbaf.training.train import train
recipe, corpora, cache, steps = sys.argv[1:5]
places = {"fitting": (fitting, "step_loss"), "tuning": (text_encoder.HeadedEncoder, "loss")}
module, name = places[sys.argv[5]]
original, left = getattr(module, name), [int(steps)]
def die(*args, **options):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
setattr(module, name, die)
train(Path(recipe), Path(corpora), Path(cache) / "out", cache=Path(cache), progress=print)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, and a tiny text encoder."""
    place: Path = tmp_path_factory.mktemp("train")
    make_corpora(place / "corpora")
    (place / "bert").mkdir()
    save_tiny_bert(place / "bert")
    return place


def train_tiny(
    place: Path, settings: dict[str, Any], out: str, *, cache: str = "cache", **changes: Any
) -> list[str]:
    """Train into ``out``; the lines of progress."""
    lines: list[str] = []
    encoder = {"name": str(place / "bert")} | changes.pop("text_encoder", {})
    train(
        write_recipe(place, settings, text_encoder=encoder, **changes),
        place / "corpora",
        place / out,
        cache=place / cache,
        progress=lines.append,
    )
    return lines


def read_metrics(bundle: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((bundle / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def one(place: Path) -> Trained:
    return place / "one", train_tiny(place, ONE, "one")


@pytest.fixture(scope="module")
def several(place: Path) -> Trained:
    return place / "several", train_tiny(place, SEVERAL, "several")


def test_every_seed_leaves_a_bundle_and_the_best_is_shipped(one: Trained) -> None:
    """<out>/seed-N for each, and in <out> the one that is best on dev."""
    out, lines = one
    metrics = read_metrics(out)
    (shipped,) = metrics["shipped_seeds"]
    reached = {seed: figures["dev"]["weighted_f1"] for seed, figures in metrics["seeds"].items()}
    assert set(reached) == {"0", "1"}
    assert reached[str(shipped)] == max(reached.values())
    bundle, own = Bundle.load(str(out)), Bundle.load(str(out / f"seed-{shipped}"))
    theirs = own.network.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in bundle.network.state_dict().items())
    assert (bundle.config.acoustic, bundle.config.commonsense) == ("prosody", "none")
    assert lines[-1] == f"{out}: bundle one, seeds {shipped}, is ready"


def test_a_bundle_of_one_corpus_says_what_was_measured(one: Trained, place: Path) -> None:
    """The bundle's own network, trained again, gives the test figures of its metrics."""
    out, _ = one
    metrics = read_metrics(out / "seed-1")
    recipe = make_recipe(place, ONE, text_encoder={"name": str(place / "bert")})
    prepared = prepare(recipe, place / "corpora", cache=place / "cache", progress=silent)
    fitted = fit_network(recipe, prepared, seed=1)
    key = "meld/audio+text/clean"
    assert next(iter(metrics["test"])) == key
    assert (
        metrics["seeds"]["1"]["test"]["weighted_f1"] == fitted.evaluation.main("test").weighted_f1
    )
    assert metrics["test"][key]["shipped"] == metrics["seeds"]["1"]["test"]
    assert metrics["test"][key]["seeds"]["weighted_f1"]["mean"] == pytest.approx(
        np.mean([figures["test"]["weighted_f1"] for figures in metrics["seeds"].values()])
    )
    assert metrics["majority"]["test"]["count"] == 7
    other = fit_network(recipe, prepared, seed=0)
    first, second = (one.evaluation.probabilities["test"] for one in (fitted, other))
    assert not np.array_equal(first, second)


def test_several_corpora_give_an_ensemble(several: Trained) -> None:
    """All seeds' networks are one; components, inferences and calibration are with it."""
    out, lines = several
    bundle = Bundle.load(str(out))
    metrics = read_metrics(out)
    assert bundle.labels == LABELS
    assert (bundle.config.network.hidden, bundle.config.network.audio_width) == (16, 8)
    assert bundle.scale(np.zeros((1, 6373), np.float32)).shape == (1, 8)
    assert isinstance(bundle.network, Ensemble)
    assert (bundle.config.members, len(bundle.network.members)) == (2, 2)
    assert bundle.calibration.model_dump(mode="json") == metrics["calibration"]
    assert bundle.calibration.risk == 0.3
    assert bundle.inferences is not None
    assert not (out / "seed-0").exists()
    assert lines[-1] == f"{out}: bundle several, seeds 0, 1, is ready"


def test_metrics_of_several_hold_every_condition_and_seed(several: Trained) -> None:
    """Dev alone: texts as written and with ASR errors, audio under all conditions, over seeds."""
    metrics = read_metrics(several[0])
    assert set(metrics["seeds"]) == {"0", "1"}
    assert len(metrics["dev"]) == 2 + 2 * 5 + 5
    assert set(metrics["dev"]["meld/text/gold"]["seeds"]["weighted_f1"]) == {"mean", "sd"}
    assert {"meld/text/asr_errors", "ravdess/audio+text/noise_10db_room"} <= metrics["dev"].keys()
    assert "nemo/audio+text/clean" not in metrics["dev"]
    assert metrics["majority"]["dev"]["accuracy"] == pytest.approx(1 / 7)
    assert "test" not in metrics
    assert metrics["seeds"]["0"]["figures"].keys() == {
        "meld/text",
        "ravdess/audio",
        "ravdess/audio+text",
        "nemo/audio",
    }


def test_one_corpus_has_the_full_calibration(one: Trained) -> None:
    """Temperatures of every combination of modalities, from dev with one of them withheld."""
    metrics = read_metrics(one[0])
    assert metrics["calibration"]["temperatures"].keys() == set(PATTERNS)
    assert (metrics["calibration"]["coverage"], metrics["calibration"]["risk"]) == (0.9, 0.3)
    assert [key.split("/")[1] for key in metrics["dev"]] == ["audio+text", "audio", "text"]


def test_training_again_gives_the_same_bytes(place: Path, one: Trained, several: Trained) -> None:
    """Started again it takes up what there is, and the bundles are the same."""
    train_tiny(place, ONE, "one-again")
    train_tiny(place, SEVERAL, "several-again")
    for name in ("one", "one/seed-0", "one/seed-1", "several"):
        again = name.replace("one", "one-again").replace("several", "several-again")
        first, second = ((place / out / "SHA256SUMS").read_text() for out in (name, again))
        assert first == second


def test_seeds_in_several_processes_are_the_same_networks(place: Path, several: Trained) -> None:
    """Two workers, nothing taken up: the bytes of one worker."""
    shutil.rmtree(place / "cache" / "runs")
    train_tiny(place, SEVERAL, "several-parallel", workers=2)
    first, second = (
        (place / o / "SHA256SUMS").read_text() for o in ("several", "several-parallel")
    )
    assert first == second


@pytest.mark.parametrize("settings", [ONE, SEVERAL], ids=lambda settings: settings["id"])
def test_a_killed_training_resumes_to_the_same_result(
    place: Path, tmp_path: Path, settings: dict[str, Any], one_thread: None
) -> None:
    """Killed while the encoder is tuned, killed again in a network's second epoch: the same bytes
    as without. On one thread: several add in an order that depends on the machine's load.
    """
    tuning = {"epochs": 2, "bfloat16": False, "tokens_per_batch": 32}
    whole = f"{settings['id']}-whole"
    train_tiny(place, settings, whole, text_encoder=tuning)
    recipe = place / f"{settings['id']}.yaml"
    command = [sys.executable, "-c", CHILD, str(recipe), str(place / "corpora"), str(tmp_path)]
    for steps, part in (("2", "tuning"), ("3", "fitting")):
        ended = subprocess.run(
            [*command, steps, part],
            capture_output=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert [*tmp_path.glob("tuned/*.safetensors")]
    assert [*tmp_path.glob("runs/*/seed-0/last.ckpt")]
    train(recipe, place / "corpora", tmp_path / "out", cache=tmp_path, progress=silent)
    first, second = ((o / "SHA256SUMS").read_text() for o in (place / whole, tmp_path / "out"))
    assert first == second


def test_one_corpus_may_ship_an_ensemble_and_several_the_best_seed(
    place: Path, one: Trained, several: Trained
) -> None:
    """Which networks make the bundle is a setting, whatever the corpora."""
    train_tiny(place, ONE, "one-ensemble", fit=ONE["fit"] | {"ship": "ensemble"})
    assert Bundle.load(str(place / "one-ensemble")).config.members == 2
    train_tiny(place, SEVERAL, "several-best", fit=SEVERAL["fit"] | {"ship": "best_seed"})
    assert Bundle.load(str(place / "several-best")).config.members == 1
    assert Bundle.load(str(place / "several-best" / "seed-1")).config.members == 1


@pytest.mark.parametrize("name", ["one", "several"])
def test_the_card_says_what_was_measured(one: Trained, several: Trained, name: str) -> None:
    """The card's figures are the metrics', and its warnings are there."""
    out = {"one": one, "several": several}[name][0]
    card, metrics = (out / "README.md").read_text(), read_metrics(out)
    rows = {
        "one": {"MELD, audio and text, as recorded": "meld/audio+text/clean"},
        "several": {
            "MELD, text, reference text": "meld/text/gold",
            "RAVDESS, audio, noise at 10 dB SNR": "ravdess/audio/noise_10db",
        },
    }
    for title, key in rows[name].items():
        assert f"| {title} | {100 * metrics['dev'][key]['shipped']['weighted_f1']:.1f} (" in card
    both = ("MELD", "Causal", "gold transcripts", "research use", "Art. 5(1)(f)", "read as English")
    own = {"one": ("of seed", "one of 2"), "several": ("CC BY-NC-SA 4.0", "openSMILE")}
    for words in (*both, *own[name]):
        assert words.lower() in card.lower(), words


def test_a_missing_corpus_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    """One line with the file that was looked for."""
    for settings in (ONE, SEVERAL):
        with pytest.raises(CorpusError, match=r"MELD: .*train_sent_emo\.csv is missing"):
            train(write_recipe(tmp_path, settings), tmp_path, tmp_path / "out", cache=tmp_path)
