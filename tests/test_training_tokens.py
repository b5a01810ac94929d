"""Promises of training networks that take tokens: from corpora to a bundle that runs live."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recognizer_kit import transcript
from training_kit import ONE, SEVERAL, make_corpora, silent, write_recipe

from stream_hbaf.audio.file import read_audio
from stream_hbaf.bundle import Bundle
from stream_hbaf.config import Config
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.evaluation.metrics import score
from stream_hbaf.evaluation.offline import predict_corpus
from stream_hbaf.features.pretrained import DEFAULT_ENCODER
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.networks.mgcma import MGCMA
from stream_hbaf.networks.registry import Ensemble
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.training.text_encoder import as_adapters
from stream_hbaf.training.train import train

RECORDINGS = Path(__file__).parent / "recordings"
TOKENS = {
    "network": {"kind": "mgcma", "hidden": 16, "heads": 2},
    "commonsense": {"source": "none"},
}
MIXED = {
    **SEVERAL,
    **TOKENS,
    "id": "mixed",
    "audio": {"representation": "lld", "cut": "segmenter", "copies": 1},
    "text_encoder": {"layers": 1, "epochs": 1, "compress_to_rank": 4},
}
CLIPS = {
    **ONE,
    **TOKENS,
    "id": "clips",
    "corpora": {"ravdess": {"classes": {"angry": ["anger"], "happy": ["joy"]}}},
    "audio": {"representation": "lld"},
    "fit": {"epochs": 2, "seeds": [0], "batch": 8},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokens")
    make_corpora(place / "corpora")
    return place


def trained(place: Path, recipe: dict[str, Any]) -> Bundle:
    name = recipe["id"]
    train(
        write_recipe(place, recipe),
        place / "corpora",
        place / name,
        cache=place / "cache",
        progress=silent,
    )
    return Bundle.load(str(place / name))


def test_several_corpora_give_a_bundle_of_mgcma_that_runs_live(place: Path) -> None:
    """Texts and audio as tokens, tuned layers as adapters; and the recogniser takes the bundle."""
    bundle = trained(place, MIXED)
    assert bundle.config.acoustic_input == "lld"
    assert (bundle.config.commonsense, bundle.inferences) == ("none", None)
    assert bundle.config.network.kind == "mgcma"
    assert isinstance(bundle.network, Ensemble)
    assert all(isinstance(member, MGCMA) for member in bundle.network.members)
    matrices = [name for name, tensor in bundle.tuned.items() if tensor.dim() == 2]
    assert matrices
    assert all(name.endswith((".lora_a", ".lora_b")) for name in matrices)
    card = (place / "mixed" / "README.md").read_text(encoding="utf-8")
    for words in ("each utterance by itself", "changes of rank 4", "MGCMA (Wang et al., ICASSP"):
        assert words in card
    assert "HBAF" not in card
    samples = read_audio(RECORDINGS / "jfk.flac")[:48_000]
    with Recognizer(Config(model=str(place / "mixed"))) as recognizer:
        assert recognizer.acoustic is not None
        dialogue = recognizer.new_dialogue()
        text = recognizer.encode_text(transcript("And so my fellow Americans"))
        final = recognizer.classify_final(
            acoustic=recognizer.acoustic.extract(samples),
            text=text,
            dialogue=dialogue,
            explain=True,
        )
    assert final.modalities == ("audio", "text")
    assert final.contributions is not None
    assert final.contributions.context == 0.0  # each utterance by itself


def test_one_corpus_gives_a_bundle_of_merged_classes(place: Path) -> None:
    """A recipe's own labels are the bundle's, and its figures have accuracy and recall."""
    bundle = trained(place, CLIPS)
    assert bundle.labels == ("angry", "happy")
    metrics = json.loads((place / "clips" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["corpora"]["ravdess"]["utterances"] == {"train": 36, "dev": 4, "test": 4}
    assert 0.0 <= metrics["test"]["ravdess/audio+text/clean"]["seeds"]["uar"]["mean"] <= 1.0


def test_a_bundle_of_tokens_is_evaluated_as_it_was_trained(place: Path) -> None:
    """``evaluate`` gives what training measured on its test split."""
    bundle = trained(place, {**CLIPS, "id": "seven", "corpora": "ravdess"})
    metrics = json.loads((place / "seven" / "metrics.json").read_text(encoding="utf-8"))
    corpus = open_corpus("ravdess", place / "corpora")
    predicted = predict_corpus(bundle, corpus, "test", cache=place / "cache")
    assert predicted.with_audio == 4
    found = score(predicted.gold, predicted.probabilities)
    assert found.accuracy == pytest.approx(metrics["seeds"]["0"]["test"]["accuracy"])
    assert found.ece == pytest.approx(metrics["seeds"]["0"]["test"]["ece"], abs=1e-4)


def test_adapters_are_the_largest_part_of_a_tuning() -> None:
    """Of full rank they are the tuning; of less, what is lost is its smallest directions."""
    name = "encoder.layer.5.attention.output.dense.weight"
    untuned = dict(TextEncoder(DEFAULT_ENCODER).model.named_parameters())[name].detach()
    torch.manual_seed(0)
    change = torch.randn(384, 2) @ torch.randn(2, 384) / 100 + torch.randn(384, 384) / 1e4
    bias = torch.ones(384)
    tuning = {name: untuned + change, "encoder.layer.5.attention.output.dense.bias": bias}
    kept = as_adapters(DEFAULT_ENCODER, tuning, rank=2)
    lower, upper = (kept[f"{name}.lora_{half}"].float() for half in "ab")
    sizes = torch.linalg.svdvals(change)
    lost = torch.linalg.matrix_norm(change - upper @ lower)
    assert lost == pytest.approx(float(sizes[2:].square().sum().sqrt()), rel=0.05)
    assert torch.equal(kept["encoder.layer.5.attention.output.dense.bias"], bias)
    encoder = TextEncoder(DEFAULT_ENCODER, tuned=kept)
    found = dict(encoder.model.named_parameters())[name].detach()
    np.testing.assert_allclose(found, untuned + upper @ lower, atol=1e-6)
