"""Promises of the texts that tune the text encoder: several corpora, with ASR errors drawn anew."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import save_tiny_bert

from stream_hbaf.corpora.asr_errors import words_of
from stream_hbaf.corpora.dataset import NO_LABEL
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, LabelledUtterance
from stream_hbaf.errors import ConfigError
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.training.recipe import AsrErrorConfig, TextEncoderConfig, TuningConfig
from stream_hbaf.training.recipe_corpora import TextTrainingSet, hold_out, text_training_set
from stream_hbaf.training.text_encoder import mean_of_tunings, tuned_layers

LABELS = ("anger", "joy")
FIGURES = {"a": "weighted_f1", "b": "macro_f1"}


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


def texts_of(
    *, train: tuple[int, int] = (40, 30), errors: AsrErrorConfig | None = None, **plan: Any
) -> TextTrainingSet:
    corpora = {name: a_corpus(name, train=n) for name, n in zip("ab", train, strict=True)}
    return text_training_set(
        corpora, TuningConfig(dev_figures=FIGURES, **plan), errors or AsrErrorConfig()
    )


def test_an_epoch_holds_all_corpora_and_at_most_so_many_of_each() -> None:
    """Each epoch draws other dialogues of a corpus that is to be cut down; the same when asked."""
    texts = texts_of(dialogues_per_epoch={"a": 10})
    first, second = texts.train(1), texts.train(2)
    assert len(first) == len(second) == 10 + 30
    assert first != second
    assert first == texts.train(1)
    assert first[-1].labels == (1, NO_LABEL)
    assert first[-1].turns[0].text == "You are so happy!"


def test_about_the_asked_share_of_texts_is_changed() -> None:
    """Half of the train texts in each epoch, not the same ones; dev texts never."""
    errors = AsrErrorConfig(word_error_share=0.0, unpunctuated_share=1.0)
    texts = texts_of(train=(200, 200), errors=errors, asr_error_share=0.5)
    changed = [[known.turns[0].text for known in texts.train(epoch)] for epoch in (1, 2)]
    bare = [[not set(text) & set("!.,") for text in each] for each in changed]
    assert np.mean(bare, axis=1) == pytest.approx([0.5, 0.5], abs=0.08)
    assert np.mean(np.array(bare[0]) == np.array(bare[1])) == pytest.approx(0.5, abs=0.1)
    assert {"!" in known.turns[0].text for known in texts.dev["a"].dialogues} == {True}


def test_texts_with_word_errors_keep_their_labels() -> None:
    """Words change, who said them and what was meant doesn't."""
    errors = AsrErrorConfig(word_error_share=1.0, max_error_rate=1.0)
    plain = texts_of(train=(50, 50)).train(1)
    changed = texts_of(train=(50, 50), errors=errors, asr_error_share=1.0).train(1)
    assert [known.labels for known in plain] == [known.labels for known in changed]
    assert {turn.speaker for known in changed for turn in known.turns} == {"ross"}
    differ = [
        words_of(a.turns[0].text) != words_of(b.turns[0].text)
        for a, b in zip(plain, changed, strict=True)
    ]
    assert 0.5 < np.mean(differ) <= 1.0


def test_rare_classes_weigh_moderately_more() -> None:
    """Weights are shares to a power, one on average over the train texts; None without it."""
    rare = a_dialogue("x", ("Great!", "joy"))
    frequent = a_dialogue("y", ("Bad!", "anger"))
    corpus = Corpus("a", LABELS, {"train": (rare, *[frequent] * 4), "dev": (rare,), "test": ()})
    balanced = TuningConfig(class_balance=0.5)
    anger, joy = text_training_set({"a": corpus}, balanced, AsrErrorConfig()).weights or (0.0, 0.0)
    assert joy / anger == pytest.approx(2.0)
    assert (4 * anger + joy) / 5 == pytest.approx(1.0)
    assert text_training_set({"a": corpus}, TuningConfig(), AsrErrorConfig()).weights is None


def test_scenes_that_another_corpus_tests_are_held_out() -> None:
    """One text of five words in common, however written, and the whole dialogue is left out."""
    shared = a_dialogue("s", ("Hi!", None), ("You came home, and left again.", "joy"))
    short = a_dialogue("t", ("Hi!", "joy"), ("No, I never left.", "joy"))
    tested = a_dialogue(
        "u", ("you came home and left again!", "anger"), ("No, I never left.", None)
    )
    corpus = Corpus("a", LABELS, {"train": (shared, short), "dev": (shared,), "test": ()})
    for split in ("dev", "test"):
        tested_corpus = Corpus("b", LABELS, {"train": (), "dev": (), "test": (), split: (tested,)})
        kept = hold_out(corpus, [tested_corpus])
        assert kept.splits["train"] == (short,)
        assert kept.splits["dev"] == (shared,)
    trained = Corpus("b", LABELS, {"train": (tested,), "dev": (), "test": ()})
    assert hold_out(corpus, [trained]) == corpus


def tune(place: Path, lines: list[str], **changes: Any) -> dict[str, torch.Tensor]:
    corpora = {
        "a": a_corpus("a", train=24),
        "b": a_corpus("b", train=24, happy="I can believe it!"),
    }
    settings = {
        "name": str(place / "bert"),
        "layers": 2,
        "epochs": 4,
        "rate": 3e-2,
        "head_rate": 0.1,
        "bfloat16": False,
        "dev_figures": FIGURES,
    }
    return tuned_layers(
        TextEncoderConfig(**settings | changes),
        corpora,
        default=("a", "b"),
        errors=AsrErrorConfig(),
        cache=place,
        progress=lines.append,
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "bert").mkdir()
    save_tiny_bert(tmp_path / "bert")
    return tmp_path


def test_layers_are_tuned_on_several_corpora_and_kept(place: Path) -> None:
    """Both corpora's dev figures are reported; a second time the tensors come from the cache."""
    lines: list[str] = []
    first = tune(place, lines)
    assert {name.split(".")[2] for name in first} == {"3", "4"}
    reported = [line for line in lines if line.startswith("text encoder: dev a ")]
    assert len(reported) == 4
    assert max(float(line.split()[-1]) for line in reported) > 0.9  # b: 0.33 for one label always
    count = len(lines)
    again = tune(place, lines)
    assert len(lines) == count
    assert all(torch.equal(first[name], again[name]) for name in first)
    tune(place, lines, asr_error_share=0.5)
    assert len(lines) > count  # other settings, other tensors


def test_several_tunings_are_averaged(place: Path) -> None:
    """The mean of two seeds and of a tuning of one layer less on one corpus."""
    figures = {"a": "weighted_f1"}
    further = {
        "corpora": ["a"],
        "layers": 1,
        "epochs": 2,
        "bfloat16": False,
        "dev_figures": figures,
    }
    parts = [
        tune(place, [], seeds=[0]),
        tune(place, [], seeds=[1]),
        tune(place, [], **further),
    ]
    lines: list[str] = []
    soup = TuningConfig(**further, rate=3e-2, head_rate=0.1)
    together = tune(place, lines, seeds=[0, 1], soup=[soup])
    assert lines == []  # all three from the cache
    assert {name.split(".")[2] for name in together} == {"3", "4"}
    mean = mean_of_tunings(str(place / "bert"), parts)
    assert all(torch.equal(mean[name], together[name]) for name in mean)
    low = next(name for name in mean if ".3." in name and name.endswith("weight"))
    untuned = dict(TextEncoder(str(place / "bert")).model.named_parameters())[low]
    expected = (parts[0][low].float() + parts[1][low].float() + untuned) / 3
    torch.testing.assert_close(mean[low].float(), expected, atol=1e-3, rtol=0)


def test_corpora_of_other_labels_do_not_tune_together(place: Path) -> None:
    """One line that names both corpora, and what to do."""
    other = replace(a_corpus("b", train=4), labels=("joy", "pride"))
    corpora = {"a": a_corpus("a", train=4), "b": other}
    with pytest.raises(
        ConfigError, match=r"a and b have different labels .*give them the same 'cl"
    ):
        text_training_set(corpora, TuningConfig(), AsrErrorConfig())
