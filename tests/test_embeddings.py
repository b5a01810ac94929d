"""Embeddings of a network: which utterances they are of, and how near pairs are."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stream_hbaf.corpora.dataset import NO_LABEL, Dataset, all_features, pad_dialogues
from stream_hbaf.errors import ModelError
from stream_hbaf.evaluation.plots import Embeddings, embed
from stream_hbaf.networks.hbaf import HBAF, HbafConfig

SIZES = {
    "audio_width": 5,
    "text_width": 6,
    "commonsense_width": 1,
    "hidden": 8,
    "heads": 2,
    "layers": 1,
    "filters": 4,
    "window": 3,
    "use_commonsense": False,
}


def make_network(**switches: bool) -> HBAF:
    torch.manual_seed(0)
    return HBAF(HbafConfig(**SIZES, **switches)).eval()  # type: ignore[arg-type]


def make_material() -> Dataset:
    """Ten utterances in three dialogues that stand in no order; one each of no label, sound,
    words."""
    draw = np.random.default_rng(0)
    audio_mask, text_mask = np.ones(10, bool), np.ones(10, bool)
    audio_mask[1], text_mask[7] = False, False
    labels = np.arange(10) % 7
    labels[4] = NO_LABEL
    return Dataset(
        labels=labels,
        text=draw.normal(size=(10, 6)).astype(np.float32),
        commonsense=np.zeros((10, 3, 1), np.float32),
        audio={"": draw.normal(size=(10, 5)).astype(np.float32)},
        dialogues=(np.arange(6, 10), np.arange(2), np.arange(2, 6)),
        audio_mask=audio_mask,
        text_mask=text_mask,
    )


def unit(rows: list[list[float]]) -> np.ndarray:
    array = np.array(rows, np.float32)
    scaled: np.ndarray = array / np.linalg.norm(array, axis=1, keepdims=True)
    return scaled


def test_embeddings_are_the_networks_of_utterances_with_both() -> None:
    """Row for row h_a and h_l of whole dialogues, scaled to 1; what lacks anything is left out."""
    network, material = make_network(), make_material()
    found = embed(network, material, most=100)
    with torch.inference_mode():
        output = network(all_features(material, pad_dialogues(material.dialogues), version=""))
    # In the table: 6 7 8 9 | 0 1 | 2 3 4 5; without 1, 4 and 7.
    places = [(1, 0), (2, 0), (2, 1), (2, 3), (0, 0), (0, 2), (0, 3)]
    for name, h in (("speech", output.h_a), ("text", output.h_l)):
        expected = F.normalize(torch.stack([h[place] for place in places]), dim=-1)
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-6)
    assert found.labels.tolist() == [0, 2, 3, 5, 6, 1, 2]


def test_embeddings_of_at_most_so_many() -> None:
    """Drawn from all of them, in their order, the same each time."""
    network, material = make_network(), make_material()
    every, some = (embed(network, material, most=most) for most in (100, 4))
    rows = [int(np.flatnonzero((every.text == text).all(1))[0]) for text in some.text]
    assert len(rows) == 4
    assert rows == sorted(set(rows))
    np.testing.assert_array_equal(some.speech, every.speech[rows])
    np.testing.assert_array_equal(embed(network, material, most=4).text, some.text)


def test_nearness_by_hand() -> None:
    """Two of three find their own text; the margin is a difference of mean cosines."""
    speech = unit([[1, 0], [0, 1], [1, 0]])
    text = unit([[1, 0], [0, 1], [0, 1]])
    found = Embeddings(speech, text, np.zeros(3, np.int64))
    # Cosines: [1 0 0], [0 1 1], [1 0 0]. The second's own text ties with the third's.
    assert found.retrieval() == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found.margin() == pytest.approx(2 / 3 - 2 / 6)


def test_pairs_that_coincide_are_all_found() -> None:
    """Perfect alignment is 1, texts that are all the same are chance."""
    speech = unit([[math.cos(t), math.sin(t)] for t in range(6)])
    labels = np.zeros(6, np.int64)
    assert Embeddings(speech, speech, labels).retrieval() == 1.0
    same = np.repeat(speech[:1], 6, axis=0)
    assert Embeddings(speech, same, labels).retrieval() == pytest.approx(1 / 6)
    assert Embeddings(speech, same, labels).margin() == pytest.approx(0, abs=1e-6)


def test_in_the_plane_pairs_stay_together() -> None:
    """Where speech is at its text, it lies beside it in the plane, and the same each time."""
    draw = np.random.default_rng(0)
    speech = unit(draw.normal(size=(40, 16)).tolist())
    text = unit((speech + 0.01 * draw.normal(size=(40, 16))).tolist())
    found = Embeddings(speech, text, np.zeros(40, np.int64))
    left, right = found.in_plane()
    distances = np.linalg.norm(left[:, None] - right[None], axis=2)
    assert (distances.argmin(1) == np.arange(40)).mean() > 0.9
    for again, first in zip(found.in_plane(), (left, right), strict=True):
        np.testing.assert_array_equal(again, first)


def test_networks_that_bring_nothing_together() -> None:
    """A network of one modality, and too few utterances, are refused in one line."""
    material = make_material()
    with pytest.raises(ModelError, match="the network has one modality; choose one with both"):
        embed(make_network(use_text=False), material, most=10)
    deaf = Dataset(
        labels=material.labels,
        text=material.text,
        commonsense=material.commonsense,
        audio=material.audio,
        dialogues=material.dialogues,
        audio_mask=np.arange(10) < 3,
    )
    assert len(embed(make_network(), deaf, most=10).labels) == 3
    mute = np.zeros(10, bool)
    with pytest.raises(ModelError, match="0 utterances have audio, text and a label"):
        embed(make_network(), Dataset(**{**deaf.__dict__, "audio_mask": mute}), most=10)
