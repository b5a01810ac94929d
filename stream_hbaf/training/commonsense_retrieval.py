"""Measures how well commonsense heads find the phrases that annotators wrote about an event."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.features.commonsense import RELATIONS, Event2MindHeads, prior_of, score_phrases

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Relation:
    """One relation's retrieval task: which phrases belong to which event."""

    phrases: tuple[str, ...]  # distinct
    embeddings: Float32  # [P, K], length 1
    frequency: Float32  # [P] how often annotators wrote it
    true: Mapping[int, tuple[int, ...]]  # row of an event: rows of its phrases


@dataclass(frozen=True)
class Annotated:
    """One split as features, each event once with all its annotators' phrases."""

    events: Float32  # [N, D]
    relations: tuple[Relation, ...]  # external, internal, purpose


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Where the best-ranked true phrase stands among all the split's phrases, over events."""

    candidates: int
    median_rank: float
    mrr: float
    recall_at_10: float


def retrieve(
    annotated: Annotated, directions: Float32, *, priors: Sequence[Float32] | None = None
) -> list[Retrieval]:
    """Rank all phrases for each event by cosine with its ``directions`` [N, 3, K]; by relation.

    ``priors``, [P] of each relation, are added to the cosines.
    """
    found = []
    for index, relation in enumerate(annotated.relations):
        prior = np.zeros(1, np.float32) if priors is None else priors[index]
        own = directions[list(relation.true), index]
        scores = score_phrases(own, relation.embeddings, prior=prior)
        ranks = _best_ranks(scores, list(relation.true.values()))
        known = len(ranks) > 0
        found.append(
            Retrieval(
                candidates=len(relation.phrases),
                median_rank=float(np.median(ranks)) if known else 0.0,
                mrr=float((1 / ranks).mean()) if known else 0.0,
                recall_at_10=float((ranks <= 10).mean()) if known else 0.0,
            )
        )
    return found


def measure_heads(
    annotated: Annotated, train: Annotated, heads: Event2MindHeads, *, temperature: float
) -> dict[str, dict[str, dict[str, float]]]:
    """The heads beside their baselines: way of ranking → relation → figures.

    "heads_and_frequency" is how a bundle's inferences are found; "frequency" ignores the event and
    puts first what annotators wrote most often in training; "event_feature" has no heads.
    """
    often = frequencies(annotated, train)
    priors = [prior_of(one, temperature=temperature) for one in often]
    directions = heads.infer(annotated.events)
    itself = np.repeat(unit(annotated.events)[:, None], len(RELATIONS), axis=1)
    chance = np.random.default_rng(0).standard_normal(itself.shape).astype(np.float32)
    ways = {
        "heads": retrieve(annotated, directions),
        "heads_and_frequency": retrieve(annotated, directions, priors=priors),
        "frequency": retrieve(annotated, np.zeros_like(directions), priors=often),
        "event_feature": retrieve(annotated, itself),
        "chance": retrieve(annotated, unit(chance)),
    }
    return {
        way: dict(zip(RELATIONS, map(asdict, found), strict=True)) for way, found in ways.items()
    }


def frequencies(annotated: Annotated, train: Annotated) -> list[Float32]:
    """How often the train part has each relation's phrases: [P] each."""
    found = []
    for relation, known in zip(annotated.relations, train.relations, strict=True):
        often = dict(zip(known.phrases, known.frequency.tolist(), strict=True))
        found.append(np.array([often.get(p, 0.0) for p in relation.phrases], np.float32))
    return found


def _best_ranks(scores: Float32, true: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """Rank, from 1, of the best-placed true phrase; ties count half, so constants gain nothing."""
    ranks = np.empty(len(true))
    for row, columns in enumerate(true):
        best = scores[row, list(columns)].max()
        above, level = (scores[row] > best).sum(), (scores[row] == best).sum()
        ranks[row] = above + (level + 1) / 2
    return ranks


def unit(vectors: Float32) -> Float32:
    """Vectors [N, K] at length 1."""
    scaled: Float32 = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return scaled
