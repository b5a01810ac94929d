"""Inferences as phrases: the nearest ones, their frequency, and what a bundle keeps."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from stream_hbaf.corpora.commonsense import Annotations, CommonsenseEvent
from stream_hbaf.errors import ModelError
from stream_hbaf.features.commonsense import (
    RELATIONS,
    Inferences,
    make_plain,
    prior_of,
    score_phrases,
)
from stream_hbaf.training.commonsense_heads import build_inferences
from stream_hbaf.training.recipe import CommonsenseConfig

TEMPERATURE = 0.07
WRITTEN = {
    "external": {"happy": 400, "envious": 3, "fâché": 2},
    "internal": {"glad": 5, "très déçu": 4, "悲しい": 3},
    "purpose": {"to win": 9, "to rest": 2},
}


def encode(phrases: Sequence[str]) -> NDArray[np.float32]:
    """Directions that differ for phrases that differ, [N, 32], of any length."""
    rows = [np.random.default_rng(list(phrase.encode())).normal(size=32) for phrase in phrases]
    return np.array(rows, np.float32).reshape(-1, 32)


def direction(phrase: str) -> NDArray[np.float32]:
    (row,) = encode([phrase])
    unit: NDArray[np.float32] = row / np.linalg.norm(row)
    return unit


@pytest.fixture
def inferences() -> Inferences:
    return Inferences.choose(WRITTEN, encode_phrases=encode, temperature=TEMPERATURE)


def test_nearest_of_a_phrases_own_embedding(inferences: Inferences) -> None:
    """A direction that is a phrase's own embedding finds that phrase, in every relation."""
    asked = np.stack([direction(phrase) for phrase in ("fâché", "悲しい", "to rest")])
    found = inferences.nearest(asked, count=1)
    assert found == {"external": ["fâché"], "internal": ["悲しい"], "purpose": ["to rest"]}


def test_nearest_gives_the_best_first_and_at_most_count(inferences: Inferences) -> None:
    """Phrases are ordered by score; with a larger count all are given."""
    asked = np.stack([direction("envious")] * 3)
    known = inferences.relations["internal"]
    order = np.argsort(-known.scores(asked[1]))
    assert inferences.nearest(asked, count=9)["internal"] == [known.texts[n] for n in order]
    assert [len(found) for found in inferences.nearest(asked, count=2).values()] == [2, 2, 2]


def test_frequency_decides_between_phrases_that_fit_alike(inferences: Inferences) -> None:
    """Halfway between two phrases the more frequent one comes first."""
    between = direction("happy") + direction("envious")
    asked = np.stack([between / np.linalg.norm(between)] * 3)
    assert inferences.nearest(asked)["external"][:2] == ["happy", "envious"]


def test_scores_are_cosine_over_temperature_plus_log_frequency(inferences: Inferences) -> None:
    """τ times (cos/τ + log(count + ½)), to a bundle's precision."""
    asked = direction("envious")
    known = inferences.relations["external"]
    assert known.texts == ("happy", "envious", "fâché")
    expected = [
        TEMPERATURE
        * (direction(text) @ asked / TEMPERATURE + np.log(WRITTEN["external"][text] + 0.5))
        for text in known.texts
    ]
    np.testing.assert_allclose(known.scores(asked), expected, atol=2e-3)


def test_a_phrase_never_written_has_a_prior() -> None:
    """That of half an occurrence, since log 0 would exclude it."""
    np.testing.assert_allclose(
        prior_of([0, 1, 3], temperature=0.5), 0.5 * np.log([0.5, 1.5, 3.5]), rtol=1e-6
    )


def test_scores_of_many_directions_are_those_of_each(inferences: Inferences) -> None:
    """[N, K] → [N, P], row by row what one direction gives."""
    known = inferences.relations["internal"]
    asked = np.stack([direction("glad"), direction("else")])
    scores = score_phrases(asked, known.embeddings, prior=known.prior)
    for row, one in zip(scores, asked, strict=True):
        np.testing.assert_allclose(row, known.scores(one), atol=1e-6)


def test_inferences_survive_a_bundle_exactly(inferences: Inferences) -> None:
    """Through a safetensors file: the same phrases, Unicode among them, and the same numbers."""
    again = Inferences.from_tensors(load(save(inferences.tensors())))
    assert again.relations["internal"].texts == ("glad", "très déçu", "悲しい")
    for relation in RELATIONS:
        before, after = inferences.relations[relation], again.relations[relation]
        assert before.texts == after.texts
        assert np.array_equal(before.embeddings, after.embeddings)
        assert np.array_equal(before.prior, after.prior)


def test_a_relation_without_phrases_survives_too() -> None:
    """A relation without annotations has no phrases."""
    written = {**WRITTEN, "purpose": {}}
    made = Inferences.choose(written, encode_phrases=encode, temperature=TEMPERATURE)
    again = Inferences.from_tensors(load(save(made.tensors())))
    assert again.nearest(np.stack([direction("happy")] * 3))["purpose"] == []


def _cut(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**tensors, name: tensors[name][:-1]}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda t: {n: x for n, x in t.items() if n != "internal.prior"},
            "internal.prior' is miss",
        ),
        (lambda t: {**t, "moral.prior": t["internal.prior"]}, "moral.prior' isn't known"),
        (lambda t: _cut(t, "purpose.embeddings"), "purpose.embeddings' doesn't fit 2 phrases"),
        (lambda t: _cut(t, "internal.phrases"), "internal.phrases' isn't UTF-8"),
        (
            lambda t: {**t, "external.phrases": t["external.phrases"].float()},
            "external.phrases' isn't a row of bytes",
        ),
        (
            lambda t: {**t, "external.prior": torch.full((3,), float("nan"))},
            "external.prior' holds what isn't a number",
        ),
        (
            lambda t: {**t, "internal.embeddings": t["internal.embeddings"][:, :9]},
            "internal.embeddings' is 9 wide, not 32",
        ),
    ],
)
def test_damaged_tensors_are_named(
    inferences: Inferences, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], complaint: str
) -> None:
    """One line that says which tensor can't be used, and why."""
    with pytest.raises(ModelError, match=complaint):
        Inferences.from_tensors(damage(inferences.tensors()))


@pytest.mark.parametrize(
    ("relation", "phrase", "plain"),
    [
        ("external", "also happy", "happy"),
        ("internal", "very happy too", "happy"),
        ("external", "closer to personx", "closer to the speaker"),
        ("purpose", "to help person y", "to help someone"),
        ("purpose", "to be with person", "to be with someone"),
        ("purpose", "to be a good person", "to be a good person"),
        ("purpose", "money", ""),
        ("external", "grateful and happy", ""),
        ("internal", "happy,satisfied", ""),
        ("internal", "nan", ""),
        ("internal", "hard-working", "hard-working"),
        ("internal", "déçu", "déçu"),
    ],
)
def test_phrases_are_made_plain(relation: str, phrase: str, plain: str) -> None:
    """Intensifiers are dropped, placeholders become words, lists are left out."""
    assert make_plain(phrase, relation=relation) == plain


def test_the_most_frequent_are_kept_and_counted_together() -> None:
    """Phrases that are the same when plain, or but for a slip of spelling, are one."""
    written = {
        **WRITTEN,
        "internal": {"satisfied": 2, "sad": 6, "very satisfied": 3, "satisified": 2, "bored": 1},
    }
    made = Inferences.choose(
        written,
        encode_phrases=encode,
        temperature=TEMPERATURE,
        most={"external": 9, "internal": 2, "purpose": 9},
    )
    known = made.relations["internal"]
    assert known.texts == ("satisfied", "sad")
    np.testing.assert_allclose(known.prior, TEMPERATURE * np.log([7.5, 6.5]), atol=1e-3)


def test_only_training_annotations_are_kept() -> None:
    """Phrases of dev and test are no part of a bundle; copies in a second corpus count once."""
    win = CommonsenseEvent("I win", ("envious",), ("happy",), ("to win",))
    lose = CommonsenseEvent("I lose", ("sorry",), ("sad",), ())
    annotations = Annotations(
        train={"event2mind": [win, win], "atomic": [win]},
        dev=[lose],
        tests={"event2mind": [lose]},
        left_out={},
    )
    made = build_inferences(annotations, plan=CommonsenseConfig(), encode_phrases=encode)
    assert {name: known.texts for name, known in made.relations.items()} == {
        "external": ("envious",),
        "internal": ("happy",),
        "purpose": ("to win",),
    }
    np.testing.assert_allclose(made.relations["internal"].prior, [0.07 * np.log(2.5)], atol=1e-4)
