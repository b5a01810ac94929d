"""Trains the commonsense heads on people's annotations of events.

ATOMIC took over Event2Mind's events with their annotations and split them anew: four fifths of
its test part stand in Event2Mind's train part. So what is tested is left out by event.
"""

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from stream_hbaf.bundle import EVENT2MIND, NONE, tensors_under
from stream_hbaf.corpora.cache import EncodeTexts, cached_dialogue_encoder, digest_of, key_of
from stream_hbaf.corpora.commonsense import CommonsenseEvent, read_atomic, read_event2mind
from stream_hbaf.features.comet import open_comet
from stream_hbaf.features.commonsense import (
    RELATIONS,
    Commonsense,
    Event2MindHeads,
    Inferences,
    NoCommonsense,
)
from stream_hbaf.features.text import TextEncoder, Turn
from stream_hbaf.files import atomic_write_bytes, atomic_write_text
from stream_hbaf.training.commonsense_retrieval import (
    Annotated,
    Relation,
    measure_heads,
    retrieve,
    unit,
)
from stream_hbaf.training.recipe import CommonsenseConfig

Events = Sequence[CommonsenseEvent]
Written = Mapping[tuple[str, str, str], int]  # (relation, event, phrase): how often
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Annotations:
    """What people inferred, split so that no event is in two parts."""

    train: Mapping[str, Events]  # by corpus
    dev: Events
    tests: Mapping[str, Events]  # by corpus
    left_out: Mapping[str, int]  # part: how many of its events stand in dev or a test part


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
    tested = _distinct(*tests.values())
    read_dev = read_event2mind(folder, "dev")
    dev = _without(read_dev, tested)
    kept = {corpus: _without(events, tested | _distinct(dev)) for corpus, events in train.items()}
    left_out = {
        f"{corpus} train": len(_distinct(train[corpus])) - len(_distinct(events))
        for corpus, events in kept.items()
    }
    left_out["event2mind dev"] = len(_distinct(read_dev)) - len(_distinct(dev))
    return Annotations(kept, dev, tests, left_out)


def same_event(text: str) -> str:
    """What two wordings of an event have in common: its words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


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


def _distinct(*sources: Events) -> set[str]:
    return {same_event(event.text) for event in itertools.chain(*sources)}


def _without(events: Events, known: Collection[str]) -> list[CommonsenseEvent]:
    return [event for event in events if same_event(event.text) not in known]


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
