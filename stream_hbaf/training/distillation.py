"""Training: the commonsense heads, from Event2Mind's annotations, and how well they retrieve."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from stream_hbaf.config import Positive, Section
from stream_hbaf.corpora.event2mind import CommonsenseEvent
from stream_hbaf.features.commonsense import RELATIONS, Event2MindHeads

Float32 = NDArray[np.float32]
Encode = Callable[[Sequence[str]], Float32]  # texts → [N, D]
Ranking = Callable[[Float32, int], Float32]  # events [N, D], relation → directions [N, K]


class HeadsConfig(Section):
    """How the commonsense heads are trained."""

    hidden: Positive = 256
    dropout: float = 0.2
    epochs: Positive = 12
    batch: Positive = 512
    rate: float = 1e-3
    temperature: float = 0.07
    seed: int = 0


@dataclass(frozen=True)
class Relation:
    """One relation's retrieval task: which phrases belong to which event."""

    phrases: tuple[str, ...]  # distinct
    embeddings: Float32  # [P, K], length 1
    frequency: Float32  # [P] how often annotators wrote it
    true: Mapping[int, tuple[int, ...]]  # row of an event: rows of its phrases


@dataclass(frozen=True)
class Inferences:
    """One split, each event once with all its annotators' phrases."""

    events: Float32  # [N, D]
    relations: tuple[Relation, ...]  # external, internal, purpose


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Where the best-ranked true phrase stands among all the split's phrases, over events."""

    candidates: int
    median_rank: float
    mrr: float
    recall_at_10: float


def gather(
    events: Sequence[CommonsenseEvent], *, encode: Encode, encode_phrases: Encode
) -> Inferences:
    """Encode a split: events by the tuned encoder, phrases by the untuned one."""
    texts = sorted({event.text for event in events})
    row_of = {text: row for row, text in enumerate(texts)}
    relations = []
    for name in RELATIONS:
        phrases = sorted({phrase for event in events for phrase in event.phrases(name)})
        column_of = {phrase: column for column, phrase in enumerate(phrases)}
        frequency = np.zeros(len(phrases), np.float32)
        true: dict[int, set[int]] = {}
        for event in events:
            for phrase in event.phrases(name):
                frequency[column_of[phrase]] += 1
                true.setdefault(row_of[event.text], set()).add(column_of[phrase])
        relations.append(
            Relation(
                phrases=tuple(phrases),
                embeddings=_unit(encode_phrases(phrases)),
                frequency=frequency,
                true={row: tuple(sorted(columns)) for row, columns in sorted(true.items())},
            )
        )
    return Inferences(encode(texts), tuple(relations))


def train_heads(
    train: Inferences, dev: Inferences, *, plan: HeadsConfig, progress: Callable[[str], None]
) -> Event2MindHeads:
    """Fit the three heads by InfoNCE against the batch's other phrases; dev MRR picks the epoch."""
    torch.manual_seed(plan.seed)
    draw = np.random.default_rng(plan.seed)
    heads = Event2MindHeads(
        text_width=train.events.shape[1],
        width=train.relations[0].embeddings.shape[1],
        hidden=plan.hidden,
        dropout=plan.dropout,
    )
    optimizer = torch.optim.AdamW(heads.parameters(), lr=plan.rate, weight_decay=0.01)
    events = torch.from_numpy(train.events)
    best, best_mrr = copy.deepcopy(heads.state_dict()), -1.0
    for epoch in range(1, plan.epochs + 1):
        heads.train()
        for relation, name in zip(train.relations, RELATIONS, strict=True):
            embeddings = torch.from_numpy(relation.embeddings)
            for rows, columns in _pairs(relation, size=plan.batch, draw=draw):
                said = heads.heads[name](events[rows])
                loss = _contrast(said, embeddings[columns], columns, plan.temperature)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        heads.eval()
        mrr = float(np.mean([found.mrr for found in retrieve(dev, by_heads(heads))]))
        progress(f"commonsense: epoch {epoch} of {plan.epochs}, dev MRR {mrr:.4f}")
        if mrr > best_mrr:
            best, best_mrr = copy.deepcopy(heads.state_dict()), mrr
    heads.load_state_dict(best)
    return heads.eval()


def retrieve(inferences: Inferences, ranking: Ranking) -> list[Retrieval]:
    """Rank all phrases for each event by cosine with ``ranking``'s directions; by relation."""
    found = []
    for index, relation in enumerate(inferences.relations):
        rows = list(relation.true)
        scores = ranking(inferences.events[rows], index) @ relation.embeddings.T
        ranks = _best_ranks(scores, [relation.true[row] for row in rows])
        found.append(_summary(ranks, candidates=len(relation.phrases)))
    return found


def retrieve_by_frequency(inferences: Inferences, train: Inferences) -> list[Retrieval]:
    """The baseline that ignores the event: what annotators wrote most often in training first."""
    found = []
    for relation, known in zip(inferences.relations, train.relations, strict=True):
        often = dict(zip(known.phrases, known.frequency.tolist(), strict=True))
        scores = np.array([often.get(phrase, 0.0) for phrase in relation.phrases], np.float32)
        every = np.broadcast_to(scores, (len(relation.true), len(scores)))
        ranks = _best_ranks(every, list(relation.true.values()))
        found.append(_summary(ranks, candidates=len(relation.phrases)))
    return found


def retrieve_with_frequency(
    inferences: Inferences, train: Inferences, ranking: Ranking, *, temperature: float
) -> list[Retrieval]:
    """Directions and frequency together, as InfoNCE means them.

    Negatives were drawn as often as annotators wrote them, so cos/τ is log p(phrase | event) minus
    log p(phrase): the prior has to be added again.
    """
    found = []
    for index, (relation, known) in enumerate(
        zip(inferences.relations, train.relations, strict=True)
    ):
        rows = list(relation.true)
        often = dict(zip(known.phrases, known.frequency.tolist(), strict=True))
        prior = np.log([often.get(phrase, 0.0) + 0.5 for phrase in relation.phrases])
        scores = ranking(inferences.events[rows], index) @ relation.embeddings.T / temperature
        ranks = _best_ranks(scores + prior, [relation.true[row] for row in rows])
        found.append(_summary(ranks, candidates=len(relation.phrases)))
    return found


def measure_heads(
    inferences: Inferences, train: Inferences, heads: Event2MindHeads, *, temperature: float
) -> dict[str, dict[str, Retrieval]]:
    """The heads beside their baselines: way of ranking → relation → figures."""
    ways = {
        "heads": retrieve(inferences, by_heads(heads)),
        "heads_and_frequency": retrieve_with_frequency(
            inferences, train, by_heads(heads), temperature=temperature
        ),
        "frequency": retrieve_by_frequency(inferences, train),
        "event_feature": retrieve(inferences, by_itself),
        "chance": retrieve(inferences, by_chance),
    }
    return {way: dict(zip(RELATIONS, found, strict=True)) for way, found in ways.items()}


def by_heads(heads: Event2MindHeads) -> Ranking:
    return lambda events, relation: heads.infer(events)[:, relation]


def by_itself(events: Float32, relation: int) -> Float32:
    """The baseline without a head: the event's own feature."""
    return _unit(events)


def by_chance(events: Float32, relation: int) -> Float32:
    """The baseline that knows nothing; the same directions each time."""
    drawn = np.random.default_rng(relation).standard_normal(events.shape)
    return _unit(drawn.astype(np.float32))


def _contrast(said: Tensor, meant: Tensor, columns: NDArray[np.intp], temperature: float) -> Tensor:
    """InfoNCE [N, K], [N, K]; the same phrase elsewhere in the batch is no negative."""
    similarity = said @ meant.T / temperature
    same = torch.from_numpy(columns[:, None] == columns[None, :])
    same.fill_diagonal_(False)
    target = torch.arange(len(said))
    return F.cross_entropy(similarity.masked_fill(same, -1e9), target)


def _pairs(
    relation: Relation, *, size: int, draw: np.random.Generator
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Batches of (event row, one of its phrases drawn for this epoch)."""
    rows = np.array(list(relation.true), dtype=np.intp)
    columns = np.array([draw.choice(known) for known in relation.true.values()], dtype=np.intp)
    order = draw.permutation(len(rows))
    cuts = [order[start : start + size] for start in range(0, len(order), size)]
    return [(rows[cut], columns[cut]) for cut in cuts]


def _best_ranks(scores: Float32, true: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """Rank, from 1, of the best-placed true phrase; ties count half, so constants gain nothing."""
    ranks = np.empty(len(true))
    for row, columns in enumerate(true):
        best = scores[row, list(columns)].max()
        above, level = (scores[row] > best).sum(), (scores[row] == best).sum()
        ranks[row] = above + (level + 1) / 2
    return ranks


def _summary(ranks: NDArray[np.float64], *, candidates: int) -> Retrieval:
    if not len(ranks):
        return Retrieval(candidates, 0.0, 0.0, 0.0)
    return Retrieval(
        candidates=candidates,
        median_rank=float(np.median(ranks)),
        mrr=float((1 / ranks).mean()),
        recall_at_10=float((ranks <= 10).mean()),
    )


def _unit(vectors: Float32) -> Float32:
    scaled: Float32 = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return scaled
