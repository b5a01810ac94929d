"""Promises of what the text encoder is tuned on: several corpora, heard anew in each epoch."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_encoder import save_tiny_bert

from stream_hbaf.corpora.asr_errors import words_of
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, LabelledUtterance
from stream_hbaf.training.preparation import prepare_layers
from stream_hbaf.training.text_augment import WordsConfig, hold_out, mixed_lessons
from stream_hbaf.training.text_encoder import UNLABELLED, TuningConfig

LABELS = ("anger", "joy")
WORDS = WordsConfig(corpora=("a", "b"), judged={"a": "weighted_f1", "b": "macro_f1"})
PLAIN = WORDS.model_copy(update={"changed": 0.0})


def a_dialogue(name: str, *said: tuple[str, str | None]) -> Dialogue:
    turns = (LabelledUtterance(f"{name}{n}", "ross", *one) for n, one in enumerate(said))
    return Dialogue(name, tuple(turns))


def a_corpus(name: str, *, train: int, happy: str = "You are so happy!") -> Corpus:
    """Every other dialogue is happy, and each third utterance has no label."""
    angry, happier = ("What! No, never came home.", "anger"), (happy, "joy")
    every = [
        a_dialogue(f"{name}/{n}", (angry, happier)[n % 2], ("Oh.", None)) for n in range(train)
    ]
    return Corpus(name, LABELS, {"train": tuple(every), "dev": tuple(every[:4]), "test": ()})


def test_an_epoch_holds_all_corpora_and_at_most_so_many_of_each():
    """Each epoch draws other dialogues of a corpus that is to be cut down; the same when asked."""
    corpora = [a_corpus("a", train=40), a_corpus("b", train=30)]
    lessons = mixed_lessons(corpora, PLAIN.model_copy(update={"most": {"a": 10}}))
    first, second = lessons.train(1), lessons.train(2)
    assert len(first) == len(second) == 10 + 30
    assert first != second
    assert first == lessons.train(1)
    assert first[-1].labels == (1, UNLABELLED)
    assert first[-1].turns[0].text == "You are so happy!"


def test_about_the_asked_share_of_texts_is_heard_otherwise():
    """Half of the train texts in each epoch, not the same ones; dev texts never."""
    corpora = [a_corpus("a", train=200), a_corpus("b", train=200)]
    words = WORDS.model_copy(update={"misheard": 0.0, "unpunctuated": 1.0})
    lessons = mixed_lessons(corpora, words)
    heard = [[known.turns[0].text for known in lessons.train(epoch)] for epoch in (1, 2)]
    bare = [[not set(text) & set("!.,") for text in texts] for texts in heard]
    assert np.mean(bare, axis=1) == pytest.approx([0.5, 0.5], abs=0.08)
    assert np.mean(np.array(bare[0]) == np.array(bare[1])) == pytest.approx(0.5, abs=0.1)
    assert {"!" in known.turns[0].text for known in lessons.dev["a"].dialogues} == {True}


def test_misheard_texts_keep_their_labels():
    """Words change, who said them and what was meant doesn't."""
    corpora = [a_corpus("a", train=50), a_corpus("b", train=50)]
    words = WORDS.model_copy(update={"changed": 1.0, "misheard": 1.0, "largest_rate": 1.0})
    plain, heard = (mixed_lessons(corpora, w).train(1) for w in (PLAIN, words))
    assert [known.labels for known in plain] == [known.labels for known in heard]
    assert {turn.speaker for known in heard for turn in known.turns} == {"ross"}
    changed = [
        words_of(a.turns[0].text) != words_of(b.turns[0].text)
        for a, b in zip(plain, heard, strict=True)
    ]
    assert 0.5 < np.mean(changed) <= 1.0


def test_rare_classes_weigh_moderately_more():
    """Weights are shares to a power, one on average over what is learnt from."""
    rare = a_dialogue("x", ("Great!", "joy"))
    frequent = a_dialogue("y", ("Bad!", "anger"))
    corpus = Corpus("a", LABELS, {"train": (rare, *[frequent] * 4), "dev": (rare,), "test": ()})
    words = WordsConfig(corpora=("a",), judged={"a": "macro_f1"}, balance=0.5)
    anger, joy = mixed_lessons([corpus], words).weights or (0.0, 0.0)
    assert joy / anger == pytest.approx(2.0)
    assert (4 * anger + joy) / 5 == pytest.approx(1.0)


def test_scenes_that_another_corpus_tests_are_held_out():
    """One text of five words in common, however written, and the whole dialogue is left out."""
    shared = a_dialogue("s", ("Hi!", None), ("You came home, and left again.", "joy"))
    short = a_dialogue("t", ("Hi!", "joy"), ("No, I never left.", "joy"))
    tested = a_dialogue(
        "u", ("you came home and left again!", "anger"), ("No, I never left.", None)
    )
    corpus = Corpus("a", LABELS, {"train": (shared, short), "dev": (shared,), "test": ()})
    for split in ("dev", "test"):
        judged = Corpus("b", LABELS, {"train": (), "dev": (), "test": (), split: (tested,)})
        kept = hold_out(corpus, [judged])
        assert kept.splits["train"] == (short,)
        assert kept.splits["dev"] == (shared,)
    trained = Corpus("b", LABELS, {"train": (tested,), "dev": (), "test": ()})
    assert hold_out(corpus, [trained]) == corpus


def test_layers_are_tuned_on_several_corpora_and_kept(tmp_path):
    """Both corpora's dev figures are told; asked again, the same tensors come without training."""
    (tmp_path / "bert").mkdir()
    bert = str(save_tiny_bert(tmp_path / "bert"))
    corpora = [a_corpus("a", train=24), a_corpus("b", train=24, happy="I can believe it!")]
    plan = TuningConfig(layers=2, epochs=4, rate=3e-2, head_rate=0.1, bfloat16=False)
    lines: list[str] = []

    def prepare(words: WordsConfig) -> dict[str, torch.Tensor]:
        return prepare_layers(
            bert, corpora, plan, words=words, cache=tmp_path, progress=lines.append
        )

    first = prepare(WORDS)
    assert {name.split(".")[2] for name in first} == {"3", "4"}
    told = [line for line in lines if line.startswith("text encoder: dev a ")]
    assert len(told) == 4
    assert max(float(line.split()[-1]) for line in told) > 0.9  # b: 0.33 for who says one thing
    count = len(lines)
    again = prepare(WORDS)
    assert len(lines) == count
    assert all(torch.equal(first[name], again[name]) for name in first)
    prepare(PLAIN)
    assert len(lines) > count  # other settings, other tensors


def test_a_figure_that_is_none_is_refused():
    """A misspelt figure is told before anything is trained."""
    with pytest.raises(ValidationError, match="weighted_f1"):
        WordsConfig(judged={"meld": "f1"})
