"""Trains the commonsense heads on people's annotations of events, and measures how well they find
the phrases that annotators wrote about an event.
"""

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from stream_hbaf.bundle_config import EVENT2MIND, NONE
from stream_hbaf.bundle_weights import tensors_under
from stream_hbaf.corpora.cache import EncodeTexts, cached_dialogue_encoder, digest_of, key_of
from stream_hbaf.corpora.commonsense import Annotations, Events, read_annotations, same_event
from stream_hbaf.features.comet import open_comet
from stream_hbaf.features.commonsense import (
    RELATIONS,
    Commonsense,
    Event2MindHeads,
    Inferences,
    NoCommonsense,
    prior_of,
    score_phrases,
)
from stream_hbaf.features.text import TextEncoder, Turn
from stream_hbaf.files import atomic_write_bytes, atomic_write_text
from stream_hbaf.training.recipe import CommonsenseConfig

Written = Mapping[tuple[str, str, str], int]  # (relation, event, phrase): how often
Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


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


@dataclass(frozen=True)
class PreparedCommonsense:
    """What infers, the phrases that say it in words, and how well that was measured to work."""

    model: Commonsense
    inferences: Inferences | None = None  # of heads alone
    figures: Mapping[str, Any] | None = None  # of heads alone, as ``distil`` gives them


def prepare_commonsense(
    plan: CommonsenseConfig,
    corpora: Path,
    *,
    encoder: TextEncoder,
    half: bool = False,
    cache: Path,
    progress: Progress,
) -> PreparedCommonsense:
    """What the recipe names: nothing, COMET, or heads for this encoder, kept in ``cache``/heads.

    Heads read events as dialogues of one turn without a speaker; phrases are for the untuned
    encoder. Both are for training alone, and ten times as many as a corpus's utterances, so
    ``half`` reads them in bfloat16. Raises CorpusError, ModelError.
    """
    if plan.source == NONE:
        return PreparedCommonsense(NoCommonsense(1))
    if plan.source != EVENT2MIND:
        return PreparedCommonsense(open_comet(plan.source, device=encoder.device))
    annotations = read_annotations(corpora, atomic=plan.atomic)
    untuned = TextEncoder(encoder.id, device=encoder.device)
    weights = [digest_of(one.model.state_dict()) for one in (encoder, untuned)]
    key = key_of(repr(plan), repr(annotations), repr(encoder.context), repr(half), *weights)
    file = cache / "heads" / f"{key}.safetensors"
    if not file.exists():
        encode, encode_phrases = (
            _single_turn_encoder(one, cache / "text", half=half) for one in (encoder, untuned)
        )
        heads, measured = distil(
            annotations, plan=plan, encode=encode, encode_phrases=encode_phrases, progress=progress
        )
        inferences = build_inferences(annotations, plan=plan, encode_phrases=encode_phrases)
        tensors = {f"heads.{name}": tensor.half() for name, tensor in heads.state_dict().items()}
        tensors |= {f"inferences.{name}": tensor for name, tensor in inferences.tensors().items()}
        atomic_write_text(file.with_suffix(".json"), json.dumps(measured))
        atomic_write_bytes(file, save(tensors))  # last: its presence says that both are there
    return _load_heads(file)


def _load_heads(file: Path) -> PreparedCommonsense:
    kept = load_file(file)
    return PreparedCommonsense(
        Event2MindHeads.from_tensors(tensors_under(kept, "heads.")),
        Inferences.from_tensors(tensors_under(kept, "inferences.")),
        json.loads(file.with_suffix(".json").read_text(encoding="utf-8")),
    )


def gather(*sources: Events, encode: EncodeTexts, encode_phrases: EncodeTexts) -> Annotated:
    """Encode a part: events by the tuned encoder, phrases by the untuned one.

    An event that several ``sources`` hold is one event with the phrases of all of them. A phrase
    counts as often as the source that holds it most: two copies of one annotation are one.
    """
    texts: dict[str, str] = {}
    for event in itertools.chain(*sources):
        texts.setdefault(same_event(event.text), event.text)
    written = _written(sources)
    row_of = {event: row for row, event in enumerate(sorted(texts, key=texts.__getitem__))}
    relations = [
        _relation(name, written=written, row_of=row_of, encode_phrases=encode_phrases)
        for name in RELATIONS
    ]
    return Annotated(encode([texts[event] for event in row_of]), tuple(relations))


def build_inferences(
    annotations: Annotations, *, plan: CommonsenseConfig, encode_phrases: EncodeTexts
) -> Inferences:
    """The phrases that say in words what heads of this plan infer; of the train part alone."""
    written: dict[str, Counter[str]] = {relation: Counter() for relation in RELATIONS}
    for (relation, _, phrase), count in _written(annotations.train.values()).items():
        written[relation][phrase] += count
    return Inferences.choose(written, encode_phrases=encode_phrases, temperature=plan.temperature)


def distil(
    annotations: Annotations,
    *,
    plan: CommonsenseConfig,
    encode: EncodeTexts,
    encode_phrases: EncodeTexts,
    progress: Progress,
) -> tuple[Event2MindHeads, dict[str, Any]]:
    """Heads in the precision of a bundle, and their figures.

    The figures: "dev", "test" (Event2Mind's), "atomic_test" → way of ranking → relation, and
    "left_out", how many events were kept out of a part because they are tested.
    """

    def part(*sources: Events) -> Annotated:
        return gather(*sources, encode=encode, encode_phrases=encode_phrases)

    train, dev = part(*annotations.train.values()), part(annotations.dev)
    heads = train_heads(train, dev, plan=plan, progress=progress).half().float()
    measured = {"dev": dev}
    for corpus, events in annotations.tests.items():
        measured["test" if corpus == "event2mind" else f"{corpus}_test"] = part(events)
    figures: dict[str, Any] = {
        name: measure_heads(annotated, train, heads, temperature=plan.temperature)
        for name, annotated in measured.items()
    }
    return heads, figures | {"left_out": dict(annotations.left_out)}


def train_heads(
    train: Annotated, dev: Annotated, *, plan: CommonsenseConfig, progress: Progress
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
                inferred = heads.heads[name](events[rows])
                loss = _contrast(inferred, embeddings[columns], columns, plan.temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        heads.eval()
        mrr = float(np.mean([found.mrr for found in retrieve(dev, heads.infer(dev.events))]))
        progress(f"commonsense: epoch {epoch} of {plan.epochs}, dev MRR {mrr:.4f}")
        if mrr > best_mrr:
            best, best_mrr = copy.deepcopy(heads.state_dict()), mrr
    heads.load_state_dict(best)
    return heads.eval()


def _written(sources: Iterable[Events]) -> Written:
    """How often each phrase was written, as the source has it that has it most often."""
    written: Counter[tuple[str, str, str]] = Counter()
    for source in sources:
        written |= Counter(
            (relation, same_event(event.text), phrase)
            for event in source
            for relation in RELATIONS
            for phrase in event.phrases(relation)
        )
    return written


def _relation(
    name: str, *, written: Written, row_of: Mapping[str, int], encode_phrases: EncodeTexts
) -> Relation:
    counts = {key[1:]: count for key, count in written.items() if key[0] == name}
    phrases = sorted({phrase for _, phrase in counts})
    column_of = {phrase: column for column, phrase in enumerate(phrases)}
    frequency = np.zeros(len(phrases), np.float32)
    true: dict[int, list[int]] = {}
    for (event, phrase), count in counts.items():
        frequency[column_of[phrase]] += count
        true.setdefault(row_of[event], []).append(column_of[phrase])
    embeddings = unit(encode_phrases(phrases))
    rows = {row: tuple(sorted(columns)) for row, columns in sorted(true.items())}
    return Relation(tuple(phrases), embeddings, frequency, rows)


def _contrast(
    inferred: Tensor, meant: Tensor, columns: NDArray[np.intp], temperature: float
) -> Tensor:
    """InfoNCE [N, K], [N, K]; the same phrase elsewhere in the batch is no negative."""
    similarity = inferred @ meant.T / temperature
    same = torch.from_numpy(columns[:, None] == columns[None, :])
    same.fill_diagonal_(False)
    target = torch.arange(len(inferred))
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


def _single_turn_encoder(encoder: TextEncoder, cache: Path, *, half: bool) -> EncodeTexts:
    encode = cached_dialogue_encoder(encoder, cache, half=half)
    return lambda texts: encode([(Turn("", text),) for text in texts])


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
