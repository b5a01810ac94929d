"""COMET's features, with a tiny BART of the same class."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizerFast,
    BertConfig,
    BertModel,
)

from stream_hbaf.errors import ModelError
from stream_hbaf.features.comet import Comet, is_comet, open_comet

RELATIONS = ["oReact", "xReact", "xEffect", "xIntent"]
TEXTS = [
    "I win the lottery",
    "",
    "You lost my dog! How could you? I will never forgive you.",
    "no",
    "and then they went home, " * 30,
]


def save_tokenizer(folder: Path, added: list[str]) -> int:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [*TEXTS, "[GEN]"],
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    trained.save_model(str(folder))
    tokenizer = BartTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny COMET-ATOMIC 2020: a BART whose tokenizer has the relations."""
    folder = tmp_path_factory.mktemp("comet")
    size = save_tokenizer(folder, RELATIONS)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.5,  # or every state would be nearly the same
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def comet(folder: Path) -> Comet:
    return Comet(str(folder))


def expected_state(folder: Path, tokens: list[str]) -> NDArray[np.float32]:
    """The decoder's last hidden state at <s>, by transformers' own call."""
    model = BartForConditionalGeneration.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(tokens)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([ids]),
            decoder_input_ids=torch.tensor([[0]]),
            output_hidden_states=True,
        )
    state: NDArray[np.float32] = out.decoder_hidden_states[-1][0, 0].numpy()
    return state


def test_a_relation_is_the_state_before_the_first_inferred_word(folder: Path, comet: Comet) -> None:
    """The encoder's input is event, relation and [GEN] as the tokens of COMET's training."""
    event = AutoTokenizer.from_pretrained(folder).tokenize("I win the lottery")
    generate = AutoTokenizer.from_pretrained(folder).tokenize("[GEN]")
    (inferred,) = comet.infer_texts(["I win the lottery"])
    for vector, relation in zip(inferred, ["oReact", "xReact", "xIntent"], strict=True):
        tokens = ["<s>", *event, relation, *generate, "</s>"]
        np.testing.assert_allclose(vector, expected_state(folder, tokens), atol=1e-5)


def test_inferences_are_three_vectors_a_text(comet: Comet) -> None:
    """float32 [N, 3, K], K the width of BART; relations differ, and so do texts."""
    inferred = comet.infer_texts(TEXTS)
    assert inferred.shape == (5, 3, 16)
    assert inferred.dtype == np.float32
    assert comet.width == 16
    vectors = inferred[[0, 2, 3, 4]].reshape(12, 16)
    distances = np.abs(vectors[:, None] - vectors[None]).max(-1) + np.eye(12)
    assert distances.min() > 1e-2


def test_batch_equals_single(comet: Comet) -> None:
    """The other texts of a call never change a text's vectors."""
    together = comet.infer_texts(TEXTS * 10)
    alone = np.concatenate([comet.infer_texts([text]) for text in TEXTS])
    np.testing.assert_allclose(together, np.tile(alone, (10, 1, 1)), atol=1e-5)


def test_several_sentences_are_their_mean(comet: Comet) -> None:
    """Sentence by sentence, as in COSMIC."""
    parts = comet.infer_texts(["You lost my dog!", "How could you?", "I will never forgive you."])
    np.testing.assert_allclose(comet.infer_texts([TEXTS[2]])[0], parts.mean(0), atol=1e-5)


def test_empty_texts_are_zeros(comet: Comet) -> None:
    """An empty text is zeros, and no texts are no rows."""
    assert not comet.infer_texts(["", "  "]).any()
    assert comet.infer_texts([]).shape == (0, 3, 16)


def test_a_long_sentence_keeps_its_relation(comet: Comet) -> None:
    """The event's end is cut: relations still differ, a later word changes nothing."""
    long = "and then they went home, " * 30
    first, changed = comet.infer_texts([long, long + "never"])
    np.testing.assert_allclose(first, changed, atol=1e-5)
    assert np.abs(first[0] - first[1]).max() > 1e-2


def test_cosmic_mapping_shifts_the_relations(folder: Path, comet: Comet) -> None:
    """External = xReact, internal = xEffect, purpose = xIntent."""
    ours = comet.infer_texts(TEXTS)
    cosmic = Comet(str(folder), kind="comet-cosmic").infer_texts(TEXTS)
    np.testing.assert_allclose(cosmic[:, 0], ours[:, 1], atol=1e-5)
    np.testing.assert_allclose(cosmic[:, 2], ours[:, 2], atol=1e-5)
    assert np.abs(cosmic[0, 1] - ours[0]).max(-1).min() > 1e-2


def test_text_features_are_not_used(comet: Comet) -> None:
    """COMET takes the texts; other features change nothing."""
    with_features = comet.infer_texts(["no"], features=np.ones((1, 7), np.float32))
    assert np.array_equal(with_features, comet.infer_texts(["no"]))


def test_weights_as_published_load_too(folder: Path, comet: Comet, tmp_path: Path) -> None:
    """The published COMET is a pytorch_model.bin."""
    shutil.copytree(folder, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(comet.model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    again = Comet(str(tmp_path / "bin")).infer_texts(TEXTS)
    np.testing.assert_allclose(again, comet.infer_texts(TEXTS), atol=1e-6)


def test_a_setting_names_model_and_mapping(folder: Path) -> None:
    """The kind before the name chooses the relations."""
    assert open_comet(f"comet:{folder}").relations == ("oReact", "xReact", "xIntent")
    assert open_comet(f"comet-cosmic:{folder}").relations == ("xReact", "xEffect", "xIntent")
    assert [is_comet(s) for s in ("comet:a", "event2mind", "none", "comet", "comet:")] == [
        True,
        False,
        False,
        False,
        False,
    ]


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as refused:
        Comet(name)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_missing_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that isn't there, one without a model, a name that nobody can download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not on this machine and can't be downloaded" in refusal("nobody/nothing")
    assert "there is no such folder" in refusal(str(tmp_path / "nowhere"))
    assert "no usable model in that folder" in refusal(str(tmp_path))


def test_a_broken_weights_file_is_one_line(folder: Path, tmp_path: Path) -> None:
    """Half a download is a ModelError, and so is a file that lacks a layer."""
    shutil.copytree(folder, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "no usable model" in refusal(str(tmp_path / "half"))
    weights.unlink()
    state = torch.load(_bin(folder, tmp_path), weights_only=True)
    state.pop("model.decoder.layers.1.fc1.weight")
    torch.save(state, tmp_path / "half" / "pytorch_model.bin")
    assert "no usable model" in refusal(str(tmp_path / "half"))


def _bin(folder: Path, place: Path) -> Path:
    model = BartForConditionalGeneration.from_pretrained(folder)
    torch.save(model.state_dict(), place / "whole.bin")
    return place / "whole.bin"


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """A BART that never learned the relations, and no BART at all."""
    shutil.copytree(folder, tmp_path / "plain")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / file).unlink()
    save_tokenizer(tmp_path / "plain", [])
    assert "it doesn't know oReact" in refusal(str(tmp_path / "plain"))
    tiny = BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    BertModel(tiny).save_pretrained(tmp_path / "bert")
    assert "no usable model" in refusal(str(tmp_path / "bert"))
