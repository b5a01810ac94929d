"""Commonsense features: three vectors for each utterance, and heads that retrieve phrases."""

import numpy as np
import pytest

from stream_hbaf.corpora.commonsense import CommonsenseEvent
from stream_hbaf.features.commonsense import Event2MindHeads, NoCommonsense
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.training.commonsense_heads import (
    Annotated,
    gather,
    measure_heads,
    retrieve,
    train_heads,
)
from stream_hbaf.training.recipe import CommonsenseConfig

EVENTS = [
    CommonsenseEvent("I win the lottery", ("envious",), ("happy",), ("to be rich",)),
    CommonsenseEvent("I lose my dog", ("sorry for them",), ("sad",), ()),
    CommonsenseEvent("I shout at my boss", ("offended",), ("angry",), ("to be heard",)),
    CommonsenseEvent("I see a huge spider", (), ("scared",), ("to get away",)),
    CommonsenseEvent("I smell rotten food", (), ("disgusted",), ("to throw it out",)),
    CommonsenseEvent("I give them a gift", ("grateful",), ("generous",), ("to be kind",)),
]


@pytest.fixture(scope="module")
def inferences() -> Annotated:
    encode = TextEncoder().encode
    return gather(EVENTS, encode=encode, encode_phrases=encode)


@pytest.fixture(scope="module")
def heads(inferences: Annotated) -> Event2MindHeads:
    plan = CommonsenseConfig(epochs=60, hidden=32, dropout=0.0)
    return train_heads(inferences, inferences, plan=plan, progress=lambda line: None)


def test_heads_learn_the_true_phrases(inferences: Annotated, heads: Event2MindHeads) -> None:
    """Trained on six events, the heads rank each event's phrase first."""
    for found in retrieve(inferences, heads.infer(inferences.events)):
        assert (found.mrr, found.median_rank, found.recall_at_10) == (1.0, 1.0, 1.0)


def test_figures_beside_their_baselines(inferences: Annotated, heads: Event2MindHeads) -> None:
    """Every way of ranking is reported for every relation, over the same phrases."""
    figures = measure_heads(inferences, inferences, heads, temperature=0.07)
    assert set(figures) == {
        "heads",
        "heads_and_frequency",
        "frequency",
        "event_feature",
        "chance",
    }
    for relations in figures.values():
        assert [found["candidates"] for found in relations.values()] == [4, 6, 5]


def test_a_constant_ranking_gains_nothing(inferences: Annotated) -> None:
    """Ties count half: equal scores of all six phrases rank the true one in the middle."""
    nowhere = np.zeros_like(inferences.events)[:, None].repeat(3, axis=1)
    constant = retrieve(inferences, nowhere)
    assert constant[1].median_rank == 3.5


def test_baselines_rank_worse_than_heads(inferences: Annotated, heads: Event2MindHeads) -> None:
    """The event's own feature and chance have a lower mean reciprocal rank."""
    figures = measure_heads(inferences, inferences, heads, temperature=0.07)
    mrr = {way: np.mean([one["mrr"] for one in found.values()]) for way, found in figures.items()}
    assert max(mrr["event_feature"], mrr["chance"]) < mrr["heads"]


def test_inferences_have_length_one_in_each_relation() -> None:
    """[N, 3, K] of unit vectors."""
    heads = Event2MindHeads(text_width=12, width=7).eval()
    inferred = heads.infer(np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32))
    assert inferred.shape == (5, 3, 7)
    np.testing.assert_allclose(np.linalg.norm(inferred, axis=-1), 1.0, atol=1e-5)


def test_heads_survive_their_tensors() -> None:
    """Rebuilt from a state_dict, sizes included, they give the same features."""
    text = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    heads = Event2MindHeads(text_width=12, width=7, hidden=5).eval()
    again = Event2MindHeads.from_tensors(heads.state_dict())
    assert np.array_equal(heads.infer(text), again.infer(text))


def test_no_commonsense_is_zero() -> None:
    """Each relation is a zero vector of the given width."""
    inferred = NoCommonsense(5).infer_texts(["yes", "no"], features=np.ones((2, 9), np.float32))
    assert inferred.shape == (2, 3, 5)
    assert not inferred.any()


@pytest.mark.parametrize("commonsense", [NoCommonsense(5), Event2MindHeads(text_width=9, width=5)])
def test_features_alone_determine_the_inferences(
    commonsense: Event2MindHeads | NoCommonsense,
) -> None:
    """Called with texts and features, as COMET is, both use the features alone."""
    features = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    if isinstance(commonsense, Event2MindHeads):
        commonsense.eval()
    inferred = commonsense.infer_texts(["yes", "no"], features=features)
    if isinstance(commonsense, Event2MindHeads):
        assert np.array_equal(inferred, commonsense.infer(features))
    assert np.array_equal(inferred, commonsense.infer_texts(["a", "b"], features=features))
