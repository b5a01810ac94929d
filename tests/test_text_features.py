"""The text encoder: one vector for each text, whatever else is in the batch."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from stream_hbaf.errors import ModelError
from stream_hbaf.features.pretrained import resolve_encoder
from stream_hbaf.features.text import TextEncoder

TEXTS = [
    "I can't believe it!",
    "No.",
    "",
    "Well, you know, the children were in the garden, and nobody had told them to come inside.",
]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] i you can believe it no well the garden ' t ! , . a b"


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of MiniLM's class."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_features_are_the_mean_of_the_last_four_layers(tiny_folder: Path) -> None:
    """The mean over tokens of the last four layers' average, in plain loops."""
    text = "I can believe it, you!"
    model = AutoModel.from_pretrained(tiny_folder).eval()
    tokens = AutoTokenizer.from_pretrained(tiny_folder)(text, return_tensors="pt")
    with torch.no_grad():
        layers = [h[0].double().numpy() for h in model(**tokens, output_hidden_states=True)[2]]
    count, width = layers[0].shape
    expected = np.zeros(width)
    for layer in layers[-4:]:
        for token in range(count):
            expected += layer[token] / count / 4
    np.testing.assert_allclose(TextEncoder(str(tiny_folder)).encode([text])[0], expected, atol=1e-5)


def test_batch_equals_single(minilm: TextEncoder) -> None:
    """What else is in the batch, and so how much padding, never changes a text's vector."""
    together = minilm.encode(TEXTS)
    alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_encoding_twice_gives_the_same_bits(minilm: TextEncoder) -> None:
    """No dropout and no chance: the same text is the same vector."""
    assert np.array_equal(minilm.encode(TEXTS), minilm.encode(TEXTS))


def test_minilm_knows_what_is_alike(minilm: TextEncoder) -> None:
    """384 wide, and a paraphrase lies nearer than another topic."""
    happy, glad, bus = minilm.encode(
        ["I am so happy today!", "I'm really glad today.", "The bus stops at the station."]
    )

    def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert minilm.width == 384
    assert cosine(happy, glad) > cosine(happy, bus) + 0.2


def test_many_texts_keep_their_order(minilm: TextEncoder) -> None:
    """More texts than one batch holds come back in the order in which they were given."""
    texts = [f"number {n} " + "and on " * (n % 7) for n in range(70)]
    np.testing.assert_allclose(
        minilm.encode(texts)[[3, 69]], minilm.encode([texts[3], texts[69]]), atol=1e-5
    )


def test_no_texts_give_no_rows(minilm: TextEncoder) -> None:
    """Nothing in, nothing out, of the right width."""
    assert minilm.encode([]).shape == (0, 384)


def test_a_very_long_text_is_cut_not_refused(minilm: TextEncoder) -> None:
    """A text beyond the encoder's length still gives finite numbers."""
    assert np.isfinite(minilm.encode(["word " * 5000])).all()


def test_tuned_layers_replace_the_packages(tiny_folder: Path) -> None:
    """A tuned tensor changes the features, and only through the parameter that it names."""
    plain = TextEncoder(str(tiny_folder))
    name = "encoder.layer.4.output.dense.weight"
    own = dict(plain.model.named_parameters())[name].detach()
    changed = TextEncoder(str(tiny_folder), tuned={name: own * -30.0})
    same = TextEncoder(str(tiny_folder), tuned={name: own})
    assert np.array_equal(plain.encode(TEXTS), same.encode(TEXTS))
    assert np.abs(plain.encode(TEXTS) - changed.encode(TEXTS)).max() > 0.01


def test_a_tuned_layer_of_another_encoder_is_refused(tiny_folder: Path) -> None:
    """A tensor that doesn't fit ends in an error that names it."""
    with pytest.raises(ModelError, match=r"'encoder\.layer\.9\.x' doesn't fit"):
        TextEncoder(str(tiny_folder), tuned={"encoder.layer.9.x": torch.zeros(1)})


def test_the_packaged_encoder_needs_no_hub() -> None:
    """all-MiniLM-L6-v2 is found in the package that carries it."""
    folder = Path(resolve_encoder("all-MiniLM-L6-v2"))
    assert (folder / "model.safetensors").is_file()


def test_a_folder_that_is_no_encoder_says_what_it_needs(tmp_path: Path) -> None:
    """An empty folder is one line that names the files it needs."""
    with pytest.raises(ModelError, match=r"it needs config\.json") as raised:
        TextEncoder(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_weights_that_were_cut_short_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    """A download that broke off ends in one line, not in a traceback."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="no usable model in that folder"):
        TextEncoder(str(broken))


def test_an_encoder_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor downloadable: one line, no traceback and no noise."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not on this machine and can't be downloaded") as raised:
        TextEncoder("nobody/no-such-encoder")
    assert "\n" not in str(raised.value)


def test_loading_is_silent(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed while loading: standard output belongs to the results."""
    before = logging.getLogger("transformers").level
    TextEncoder(str(tiny_folder))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == before
