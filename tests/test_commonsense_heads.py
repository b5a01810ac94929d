"""Promises of distillation's material: events of several corpora, and no tested one in training."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_encoder import save_tiny_bert

from stream_hbaf.corpora.commonsense import CommonsenseEvent, read_annotations, same_event
from stream_hbaf.errors import CorpusError
from stream_hbaf.features.commonsense import Event2MindHeads
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.training.commonsense_heads import (
    PreparedCommonsense,
    distil,
    frequencies,
    gather,
    prepare_commonsense,
    retrieve,
)
from stream_hbaf.training.recipe import CommonsenseConfig

EVENT2MIND = {  # by split: event → what others feel, what the speaker feels, what was meant
    "train": [
        ("PersonX wins ___", ["envious"], ["happy"], ["to be rich"]),
        ("PersonX wins ___", ["envious"], ["proud"], []),
        ("PersonX walks home", ["none"], ["tired"], ["to sleep"]),
        ("PersonX drops PersonY's cup", ["angry"], ["sorry"], []),
        ("PersonX eats", [], ["full"], ["to live"]),
    ],
    "dev": [
        ("PersonX Eats", [], ["full"], []),
        ("PersonX runs", [], ["tired"], ["to win"]),
        ("PersonX sings", ["glad"], ["free"], ["to please"]),
    ],
    "test": [
        ("PersonX drops PersonY's cup", ["angry"], ["sorry"], []),
        ("PersonX calls ___", ["pleased"], ["close"], ["to talk"]),
    ],
}
ATOMIC = {
    "dev": [
        ("PersonX wins ___", ["envious"], ["happy"], ["to be rich"]),
        ("PersonX calls ___", ["pleased"], ["close"], ["to talk"]),
        ("PersonX paints", ["amazed"], ["calm"], ["to make art"]),
    ],
    "tst": [
        ("PersonX sings", ["glad"], ["free"], ["to please"]),
        ("PersonX walks home", ["none"], ["tired"], ["to sleep"]),
    ],
}


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    for folder, name, columns, parts in (
        ("event2mind", "{}.csv", ("Event", "Otheremotion", "Xemotion", "Xintent"), EVENT2MIND),
        ("atomic", "v4_atomic_{}.csv", ("event", "oReact", "xReact", "xIntent"), ATOMIC),
    ):
        (tmp_path / folder).mkdir()
        for part, rows in parts.items():
            path = tmp_path / folder / name.format(part)
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows([event, *map(json.dumps, found)] for event, *found in rows)
    return tmp_path


def texts(events: Iterable[CommonsenseEvent]) -> list[str]:
    return sorted({event.text for event in events})


def encode(phrases: Sequence[str]) -> NDArray[np.float32]:
    """One axis a text: what is the same text is the same vector, and nothing else is."""
    rows = np.zeros((len(phrases), 64), np.float32)
    for row, phrase in enumerate(phrases):
        rows[row, sum(phrase.encode()) % 64] = 1.0
    return rows


def event(text: str, *internal: str) -> CommonsenseEvent:
    return CommonsenseEvent(text, (), tuple(internal), ())


def test_what_is_tested_is_left_out_of_training(corpora: Path) -> None:
    """No event of either test part is in train or dev, none of dev is in train, and all counted."""
    parts = read_annotations(corpora, atomic=True)
    assert texts(parts.train["event2mind"]) == ["I wins something"]
    assert texts(parts.train["atomic"]) == ["I paints", "I wins something"]
    assert texts(parts.dev) == ["I Eats", "I runs"]
    assert texts(parts.tests["event2mind"]) == ["I calls something", "I drops their cup"]
    assert texts(parts.tests["atomic"]) == ["I sings", "I walks home"]
    assert parts.left_out == {"event2mind train": 3, "atomic train": 1, "event2mind dev": 1}


def test_event2mind_alone_needs_no_atomic(corpora: Path) -> None:
    """Only its own dev and test are held out, and no folder of ATOMIC is looked for."""
    for file in (corpora / "atomic").iterdir():
        file.unlink()
    parts = read_annotations(corpora, atomic=False)
    assert texts(parts.train["event2mind"]) == ["I walks home", "I wins something"]
    assert list(parts.train) == list(parts.tests) == ["event2mind"]
    assert parts.left_out == {"event2mind train": 2, "event2mind dev": 0}


def test_atomic_asked_for_and_missing_is_an_error(corpora: Path) -> None:
    """Heads that should know ATOMIC are not trained without it."""
    (corpora / "atomic" / "v4_atomic_tst.csv").unlink()
    with pytest.raises(CorpusError, match=r"ATOMIC.*v4_atomic_tst\.csv is missing"):
        read_annotations(corpora, atomic=True)


def test_the_same_event_in_other_words_is_another() -> None:
    """Case and punctuation don't tell events apart; words do."""
    assert same_event("I Drop my cup!") == same_event("i drop my cup")
    assert same_event("I drop a cup") != same_event("I drop my cup")


def test_an_event_of_two_corpora_is_one_with_the_phrases_of_both() -> None:
    """Merged by event: one row, every phrase true for it."""
    merged = gather(
        [event("I win", "happy", "proud"), event("I eat", "full")],
        [event("I win!", "happy", "lucky")],
        encode=encode,
        encode_phrases=encode,
    )
    internal = merged.relations[1]
    assert merged.events.shape == (2, 64)
    assert internal.phrases == ("full", "happy", "lucky", "proud")
    assert internal.true == {0: (0,), 1: (1, 2, 3)}


def test_a_copied_annotation_counts_once() -> None:
    """Annotators of one corpus add up; the same annotations in a second corpus don't."""
    first = [event("I win", "happy"), event("I win", "happy"), event("I eat", "happy")]
    alone = gather(first, encode=encode, encode_phrases=encode)
    copied = gather(first, first, encode=encode, encode_phrases=encode)
    assert alone.relations[1].frequency.tolist() == [3.0]
    assert copied.relations[1].frequency.tolist() == [3.0]


def test_gathering_copies_changes_nothing() -> None:
    """What one corpus repeats of another leaves the task as it was."""
    first = [event("I win", "happy", "proud"), event("I eat", "full")]
    alone = gather(first, encode=encode, encode_phrases=encode)
    copied = gather(first, first[:1], encode=encode, encode_phrases=encode)
    assert np.array_equal(alone.events, copied.events)
    for one, other in zip(alone.relations, copied.relations, strict=True):
        assert (one.phrases, one.true) == (other.phrases, other.true)
        assert np.array_equal(one.embeddings, other.embeddings)


def test_frequency_ranks_by_training_alone() -> None:
    """The baseline puts first what was written most in train, whatever the event is."""
    train = gather(
        [event("a", "sad"), event("b", "sad"), event("c", "glad")],
        encode=encode,
        encode_phrases=encode,
    )
    test = gather(
        [event("d", "glad"), event("e", "sad"), event("f", "new")],
        encode=encode,
        encode_phrases=encode,
    )
    nowhere = np.zeros((3, 3, 64), np.float32)
    internal = retrieve(test, nowhere, priors=frequencies(test, train))[1]
    assert internal.candidates == 3
    assert internal.mrr == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


def test_distilled_heads_are_measured_on_every_test(corpora: Path) -> None:
    """Heads as a bundle stores them, and figures of dev and both tests with what was left out."""
    parts = read_annotations(corpora, atomic=True)
    heads, figures = distil(
        parts,
        plan=CommonsenseConfig(epochs=2, hidden=4),
        encode=encode,
        encode_phrases=encode,
        progress=lambda line: None,
    )
    for tensor in heads.state_dict().values():
        assert np.array_equal(tensor.numpy(), tensor.half().float().numpy())
    assert set(figures) == {"dev", "test", "atomic_test", "left_out"}
    assert figures["left_out"] == parts.left_out
    assert figures["test"]["frequency"]["internal"]["candidates"] == 2
    assert figures["atomic_test"]["heads"]["purpose"]["candidates"] == 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_bert(tmp_path_factory.mktemp("bert")))


def heads_for(
    corpora: Path, encoder: TextEncoder, **settings: Any
) -> tuple[PreparedCommonsense, list[str]]:
    """Prepared heads, and the lines that were told: none if they were kept."""
    lines: list[str] = []
    plan = CommonsenseConfig(**{"epochs": 2, "hidden": 4, **settings})
    cache = corpora / "cache"
    made = prepare_commonsense(plan, corpora, encoder=encoder, cache=cache, progress=lines.append)
    return made, lines


def test_kept_heads_are_the_trained_ones(corpora: Path, tiny: str) -> None:
    """Asked again nothing is trained, and heads, phrases and figures are the same to the bit."""
    trained, told = heads_for(corpora, TextEncoder(tiny))
    kept, silent = heads_for(corpora, TextEncoder(tiny))
    assert (len(told), silent) == (2, [])
    assert isinstance(trained.model, Event2MindHeads)
    assert isinstance(kept.model, Event2MindHeads)
    assert trained.inferences is not None
    assert kept.inferences is not None
    for one, other in (
        (trained.model.state_dict(), kept.model.state_dict()),
        (trained.inferences.tensors(), kept.inferences.tensors()),
    ):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert trained.figures is not None
    assert trained.figures == kept.figures
    assert trained.figures["test"]["frequency"]["internal"]["candidates"] == 2


def test_prepared_heads_are_what_distilling_gives(corpora: Path, tiny: str) -> None:
    """Keeping them changes nothing: weights and figures are those of ``distil`` itself."""
    encode = TextEncoder(tiny).encode
    heads, figures = distil(
        read_annotations(corpora, atomic=False),
        plan=CommonsenseConfig(epochs=2, hidden=4),
        encode=encode,
        encode_phrases=encode,
        progress=lambda line: None,
    )
    made, _ = heads_for(corpora, TextEncoder(tiny))
    assert isinstance(made.model, Event2MindHeads)
    kept = made.model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in heads.state_dict().items())
    assert made.figures == figures


def test_heads_are_trained_anew_for_whatever_they_depend_on(corpora: Path, tiny: str) -> None:
    """Another plan, an encoder tuned otherwise, other annotations: none takes another's heads."""
    encoder = TextEncoder(tiny)
    heads_for(corpora, encoder)
    assert len(heads_for(corpora, encoder, seed=1)[1]) == 2
    assert len(heads_for(corpora, encoder, atomic=True)[1]) == 2
    name, parameter = next(iter(encoder.model.named_parameters()))
    tuned = TextEncoder(tiny, tuned={name: parameter.detach() + 0.5})
    assert len(heads_for(corpora, tuned)[1]) == 2
    file = corpora / "event2mind" / "train.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("proud", "sad"), encoding="utf-8")
    assert len(heads_for(corpora, encoder)[1]) == 2
