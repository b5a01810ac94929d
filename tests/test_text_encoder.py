"""Promises of tuning the text encoder: it learns from dialogues, and a bundle can hold it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import save_tiny_bert, save_tiny_mpnet

from stream_hbaf.errors import ModelError
from stream_hbaf.evaluation.metrics import weighted_f1
from stream_hbaf.features.text import ContextConfig, TextEncoder, Turn
from stream_hbaf.training.recipe import TuningConfig
from stream_hbaf.training.recipe_corpora import (
    LabelledTurns,
    Piece,
    TextDevSet,
    TextTrainingSet,
    cut,
)
from stream_hbaf.training.text_encoder import Tuned, tune_encoder

WINDOW = ContextConfig(tokens=32, speakers=True)
ALONE = ContextConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_mpnet(tmp_path_factory.mktemp("mpnet")))


def a_split(dialogues: int, *, seed: int) -> list[LabelledTurns]:
    """Every utterance has the label of its one telling word; each third one has none."""
    draw = np.random.default_rng(seed)
    told = []
    for _ in range(dialogues):
        meant = draw.integers(0, 3, 7)
        texts = [f"i {('happy', 'sad', 'angry')[n]} home" for n in meant]
        labels = [int(n) if place % 3 else -1 for place, n in enumerate(meant)]
        turns = tuple(Turn(("ross", "joey")[n % 2], text) for n, text in enumerate(texts))
        told.append(LabelledTurns(turns, tuple(labels)))
    return told


def texts_of(train: list[LabelledTurns], dev: list[LabelledTurns]) -> TextTrainingSet:
    return TextTrainingSet(lambda epoch: train, {"tiny": TextDevSet(dev, weighted_f1)})


def tune(
    folder: str,
    *,
    context: ContextConfig,
    place: Path | None = None,
    lines: list[str] | None = None,
    count: int = 2,
    seed: int = 0,
    **settings: Any,
) -> Tuned:
    return tune_encoder(
        TextEncoder(folder, context=context),
        texts_of(a_split(count, seed=0), a_split(5, seed=1)),
        classes=3,
        plan=TuningConfig(
            rate=3e-2,
            head_rate=0.1,
            dropout=0.0,
            smoothing=0.0,
            tokens_per_batch=128,
            bfloat16=False,
            **settings,
        ),
        seed=seed,
        folder=place,
        progress=([] if lines is None else lines).append,
    )


@pytest.mark.parametrize(("context", "rank"), [(WINDOW, 0), (WINDOW, 4), (ALONE, 0)])
def test_tuning_learns_what_the_labels_depend_on(
    folder: str, context: ContextConfig, rank: int
) -> None:
    """One word tells the label: whole layers and adapters learn it, with a window and without."""
    tuned = tune(folder, context=context, adapter_rank=rank, layers=2, epochs=5, count=12)
    assert tuned.dev_score > 0.85  # 0.35 for who always says the same
    assert {tensor.dtype for tensor in tuned.tensors.values()} == {torch.float16}


def test_adapters_are_merged_at_load(folder: str) -> None:
    """No more parameters than before, each changed by the product of the two halves."""
    tuned = tune(folder, context=WINDOW, adapter_rank=4, epochs=1)
    plain = dict(TextEncoder(folder).model.named_parameters())
    loaded = dict(TextEncoder(folder, tuned=tuned.tensors).model.named_parameters())
    assert loaded.keys() == plain.keys()
    name = "encoder.layer.2.attention.attn.q.weight"
    down, up = (tuned.tensors[f"{name}.lora_{half}"].float() for half in "ab")
    assert (down.shape, up.shape) == ((4, 16), (16, 4))
    torch.testing.assert_close(loaded[name], plain[name] + up @ down)
    assert (loaded[name] - plain[name]).abs().max() > 1e-3
    changed = {n for n in plain if not torch.equal(plain[n], loaded[n])}
    assert changed == {n.removesuffix(".lora_a") for n in tuned.tensors if n.endswith("a")}
    assert len(changed) == 5 * 6  # every linear map of five layers, and nothing else


def test_a_loaded_encoder_is_the_tuned_one(folder: str) -> None:
    """Features of the encoder as trained and as a bundle gives it back agree to float16."""
    plan = TuningConfig(adapter_rank=4, epochs=1, rate=3e-3)
    encoder = TextEncoder(folder, context=WINDOW)
    split = a_split(4, seed=0)
    tuned = tune_encoder(
        encoder, texts_of(split, split), classes=3, plan=plan, seed=0, progress=print
    )
    loaded = TextEncoder(folder, context=WINDOW, tuned=tuned.tensors)
    turns = split[0].turns
    np.testing.assert_allclose(
        loaded.encode_dialogues([turns])[0], encoder.encode_dialogues([turns])[0], atol=5e-3
    )


def test_only_the_top_layers_are_tuned_whole(folder: str) -> None:
    """Of five layers the two topmost are kept, embeddings never."""
    tuned = tune(folder, context=WINDOW, layers=2, epochs=1)
    assert {name.split(".")[2] for name in tuned.tensors} == {"3", "4"}


def test_tuning_twice_gives_the_same_bits(folder: str) -> None:
    """Everything drawn depends on the seed alone."""
    first, second, other = (
        tune(folder, context=WINDOW, adapter_rank=2, epochs=1, seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    assert not all(torch.equal(first.tensors[n], other.tensors[n]) for n in first.tensors)


def test_tuning_goes_on_after_its_checkpoint(folder: str, tmp_path: Path) -> None:
    """Asked again with the folder of a finished tuning, it gives its result without training."""
    lines: list[str] = []
    first = tune(folder, place=tmp_path, context=WINDOW, adapter_rank=2, epochs=2, lines=lines)
    assert len(lines) == 2
    assert lines[0].startswith("text encoder: epoch 1 of 2: loss ")
    again = tune(folder, place=tmp_path, context=WINDOW, adapter_rank=2, epochs=2, lines=lines)
    assert len(lines) == 2
    assert again.epoch == first.epoch
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"layers": 0}])
def test_an_untuned_encoder_has_no_tensors(folder: str, settings: dict[str, Any]) -> None:
    """No epochs, or nothing to tune: the encoder stays the packages' own."""
    assert tune(folder, context=WINDOW, **settings) == Tuned({}, 0.0, 0)


def a_piece(lengths: list[int], labels: list[int]) -> Piece:
    turns = tuple((n,) * length for n, length in enumerate(lengths))
    return Piece(tuple(str(n) for n in range(len(turns))), turns, tuple(labels))


def test_pieces_follow_each_other_and_fit() -> None:
    """Every labelled turn is learnt once an epoch, in pieces that fit and differ by epoch."""
    whole = a_piece([5, 9, 3, 12, 7, 4, 10, 2, 6, 8] * 3, [0] * 30)
    starts = set()
    for epoch in range(20):
        pieces = cut(whole, tokens=32, draw=np.random.default_rng(epoch))
        assert sum((piece.turns for piece in pieces), ()) == whole.turns
        assert all(piece.length <= 32 for piece in pieces)
        starts.add(len(pieces[0].turns))
    assert len(starts) >= 3


def test_a_short_dialogue_is_one_piece() -> None:
    """What fits into a window is read whole in every epoch; without a window nothing is."""
    whole = a_piece([5, 9, 3], [0, -1, 2])
    draw = np.random.default_rng(0)
    assert cut(whole, tokens=32, draw=draw) == [whole]
    alone = cut(whole, tokens=0, draw=draw)
    assert [piece.texts for piece in alone] == [("0",), ("2",)]


def test_pieces_without_a_label_are_left_out() -> None:
    """Nothing is learnt from context alone."""
    whole = a_piece([20, 20, 20], [-1, -1, 2])
    pieces = cut(whole, tokens=32, draw=np.random.default_rng(0))
    assert [piece.labels for piece in pieces] == [(2,)]


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    """A bundle that lost the other half of an adapter says which; so does one of other sizes."""
    bert = str(save_tiny_bert(tmp_path))
    name = "encoder.layer.1.output.dense.weight"
    half = {f"{name}.lora_a": torch.zeros(2, 32)}
    for tuned in (
        half,
        {f"{name}.lora_b": torch.zeros(16, 2)},
        {**half, f"{name}.lora_b": torch.zeros(16, 3)},
        {**half, f"{name}.lora_b": torch.zeros(8, 2)},
        {"encoder.x.lora_a": torch.zeros(2, 32), "encoder.x.lora_b": torch.zeros(16, 2)},
    ):
        with pytest.raises(ModelError, match=r"lora_[ab]' doesn't fit it"):
            TextEncoder(bert, tuned=tuned)
