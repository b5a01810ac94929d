"""Training: the commonsense heads, from people's annotations, and how well they retrieve.

ATOMIC took over Event2Mind's events with their annotations and split them anew: four fifths of
its test part stand in Event2Mind's train part. So what is tested is left out by event.
"""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from stream_hbaf.config import Positive, Section
from stream_hbaf.corpora.commonsense import CommonsenseEvent, read_atomic, read_event2mind
from stream_hbaf.features.commonsense import RELATIONS, Event2MindHeads
from stream_hbaf.features.inferences import Inferences, prior_of, score_phrases

Float32 = NDArray[np.float32]
Encode = Callable[[Sequence[str]], Float32]  # texts → [N, D]
Ranking = Callable[[Float32, int], Float32]  # events [N, D], relation → directions [N, K]
Events = Sequence[CommonsenseEvent]
Written = Mapping[tuple[str, str, str], int]  # (relation, event, phrase): how often


class HeadsConfig(Section):
    """How the commonsense heads are trained."""

    atomic: bool = False  # ATOMIC beside Event2Mind, in training and in the test
    hidden: Positive = 256
    dropout: float = 0.2
    epochs: Positive = 12
    batch: Positive = 512
    rate: float = 1e-3
    temperature: float = 0.07
    seed: int = 0


@dataclass(frozen=True)
class Annotations:
    """What people inferred, parted so that no event is in two parts."""

    train: Mapping[str, Events]  # by corpus
    dev: Events
    tests: Mapping[str, Events]  # by corpus
    left_out: Mapping[str, int]  # part: how many of its events stand in dev or a test part


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


def read_annotations(corpora: Path, *, atomic: bool) -> Annotations:
    """Read ``corpora``/event2mind and, if asked, ``corpora``/atomic; dev is Event2Mind's.

    An event of a test part is left out of dev, one of dev or a test part is left out of train,
    whichever corpus it comes from. Raises CorpusError.
    """
    folder = corpora / "event2mind"
    train: dict[str, Events] = {"event2mind": read_event2mind(folder, "train")}
    tests: dict[str, Events] = {"event2mind": read_event2mind(folder, "test")}
    if atomic:
        train["atomic"] = read_atomic(corpora / "atomic", "train")
        tests["atomic"] = read_atomic(corpora / "atomic", "test")
    read_dev = read_event2mind(folder, "dev")
    tested = {same_event(event.text) for events in tests.values() for event in events}
    dev = _without(read_dev, tested)
    known = tested | {same_event(event.text) for event in dev}
    kept = {corpus: _without(events, known) for corpus, events in train.items()}
    left_out = {f"{corpus} train": _fewer(train[corpus], kept[corpus]) for corpus in train}
    left_out["event2mind dev"] = _fewer(read_dev, dev)
    return Annotations(kept, dev, tests, left_out)


def same_event(text: str) -> str:
    """What two wordings of an event have in common: its words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def gather(*sources: Events, encode: Encode, encode_phrases: Encode) -> Annotated:
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
    annotations: Annotations, *, plan: HeadsConfig, encode_phrases: Encode
) -> Inferences:
    """The phrases that say in words what heads of this plan infer; of the train part alone."""
    written: dict[str, Counter[str]] = {relation: Counter() for relation in RELATIONS}
    for (relation, _, phrase), count in _written(annotations.train.values()).items():
        written[relation][phrase] += count
    return Inferences.choose(written, encode_phrases=encode_phrases, temperature=plan.temperature)


def distil(
    annotations: Annotations,
    *,
    plan: HeadsConfig,
    encode: Encode,
    encode_phrases: Encode,
    progress: Callable[[str], None],
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
        name: {
            way: {relation: asdict(found) for relation, found in relations.items()}
            for way, relations in measure_heads(
                annotated, train, heads, temperature=plan.temperature
            ).items()
        }
        for name, annotated in measured.items()
    }
    return heads, figures | {"left_out": dict(annotations.left_out)}


def train_heads(
    train: Annotated, dev: Annotated, *, plan: HeadsConfig, progress: Callable[[str], None]
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


def retrieve(annotated: Annotated, ranking: Ranking) -> list[Retrieval]:
    """Rank all phrases for each event by cosine with ``ranking``'s directions; by relation."""
    return _retrieve(
        annotated,
        lambda events, index: ranking(events, index) @ annotated.relations[index].embeddings.T,
    )


def retrieve_by_frequency(annotated: Annotated, train: Annotated) -> list[Retrieval]:
    """The baseline that ignores the event: what annotators wrote most often in training first."""
    often = _frequencies(annotated, train)
    return _retrieve(
        annotated,
        lambda events, index: np.broadcast_to(often[index], (len(events), len(often[index]))),
    )


def retrieve_with_frequency(
    annotated: Annotated, train: Annotated, ranking: Ranking, *, temperature: float
) -> list[Retrieval]:
    """Directions and frequency in training together, as a bundle's inferences are found."""
    priors = [prior_of(o, temperature=temperature) for o in _frequencies(annotated, train)]
    return _retrieve(
        annotated,
        lambda events, index: score_phrases(
            ranking(events, index), annotated.relations[index].embeddings, prior=priors[index]
        ),
    )


def measure_heads(
    annotated: Annotated, train: Annotated, heads: Event2MindHeads, *, temperature: float
) -> dict[str, dict[str, Retrieval]]:
    """The heads beside their baselines: way of ranking → relation → figures."""
    ways = {
        "heads": retrieve(annotated, by_heads(heads)),
        "heads_and_frequency": retrieve_with_frequency(
            annotated, train, by_heads(heads), temperature=temperature
        ),
        "frequency": retrieve_by_frequency(annotated, train),
        "event_feature": retrieve(annotated, by_itself),
        "chance": retrieve(annotated, by_chance),
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


def _without(events: Events, known: Iterable[str]) -> list[CommonsenseEvent]:
    known = frozenset(known)
    return [event for event in events if same_event(event.text) not in known]


def _fewer(before: Events, after: Events) -> int:
    """How many distinct events are gone."""
    return len({same_event(e.text) for e in before}) - len({same_event(e.text) for e in after})


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
    name: str,
    *,
    written: Written,
    row_of: Mapping[str, int],
    encode_phrases: Encode,
) -> Relation:
    counts = {key[1:]: count for key, count in written.items() if key[0] == name}
    phrases = sorted({phrase for _, phrase in counts})
    column_of = {phrase: column for column, phrase in enumerate(phrases)}
    frequency = np.zeros(len(phrases), np.float32)
    true: dict[int, list[int]] = {}
    for (event, phrase), count in counts.items():
        frequency[column_of[phrase]] += count
        true.setdefault(row_of[event], []).append(column_of[phrase])
    embeddings = _unit(encode_phrases(phrases))
    rows = {row: tuple(sorted(columns)) for row, columns in sorted(true.items())}
    return Relation(tuple(phrases), embeddings, frequency, rows)


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


def _retrieve(annotated: Annotated, score: Ranking) -> list[Retrieval]:
    """``score``: events [N, D], relation → [N, P], the higher the likelier."""
    found = []
    for index, relation in enumerate(annotated.relations):
        rows = list(relation.true)
        ranks = _best_ranks(score(annotated.events[rows], index), list(relation.true.values()))
        found.append(_summary(ranks, candidates=len(relation.phrases)))
    return found


def _frequencies(annotated: Annotated, train: Annotated) -> list[Float32]:
    """How often the train part has each relation's phrases: [P] each."""
    found = []
    for relation, known in zip(annotated.relations, train.relations, strict=True):
        often = dict(zip(known.phrases, known.frequency.tolist(), strict=True))
        counts = [often.get(phrase, 0.0) for phrase in relation.phrases]
        found.append(np.array(counts, np.float32))
    return found


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
