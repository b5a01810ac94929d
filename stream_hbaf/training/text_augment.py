"""Training: the words that the text encoder is tuned on, from several corpora, as they are heard.

Live use gives the encoder what a recogniser understood. So in each epoch a part of the texts is
misheard or without punctuation, each time otherwise; and as no corpus has all words and all
emotions, several teach at once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from stream_hbaf.config import Positive, Probability, Section
from stream_hbaf.corpora.asr_errors import (
    Lexicon,
    lexicon_of,
    simulate_asr_errors,
    without_punctuation,
    words_of,
)
from stream_hbaf.corpora.dialogue import SPLITS, Corpus, Dialogue, LabelledUtterance
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.evaluation.metrics import macro_f1, weighted_f1
from stream_hbaf.features.context import Turn
from stream_hbaf.training.text_encoder import UNLABELLED, Exam, Figure, LabelledTurns, Lessons

TELLING = 5  # words; a text of so many that two corpora have is the same scene of the same series
FigureName = Literal["weighted_f1", "macro_f1"]
JUDGED: Mapping[str, FigureName] = {"goemotions": "macro_f1", "meld": "weighted_f1"}
FIGURES: Mapping[FigureName, Figure] = {
    "macro_f1": lambda gold, said, classes: macro_f1(gold, said),
    "weighted_f1": lambda gold, said, classes: weighted_f1(gold, said),
}


class WordsConfig(Section):
    """Which corpora's words tune the encoder, and how they are heard."""

    corpora: Annotated[tuple[str, ...], Field(min_length=1)] = ("goemotions", "meld", "emorynlp")
    most: Mapping[str, Positive] = Field({})  # dialogues of a corpus in an epoch, drawn anew
    judged: Mapping[str, FigureName] = Field(JUDGED)  # on dev, by what
    changed: Probability = 0.5  # of the train texts, in each epoch
    unpunctuated: Probability = 0.4  # of those; some are misheard too
    misheard: Probability = 0.8  # of those
    largest_rate: Probability = 0.3  # of misheard words; a text's is drawn evenly from 0
    balance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3  # classes weigh their share to minus it
    seed: int = 0


def open_words(words: WordsConfig, corpora: Path) -> list[Corpus]:
    """The corpora under ``corpora``, their train dialogues without what a judged one holds out."""
    found = [open_corpus(name, corpora) for name in words.corpora]
    judged = [corpus for corpus in found if corpus.name in words.judged]
    return [hold_out(one, [other for other in judged if other is not one]) for one in found]


def hold_out(corpus: Corpus, judged: Sequence[Corpus]) -> Corpus:
    """``corpus`` without the train dialogues of which a text is in a judged one's dev or test.

    MELD and EmoryNLP annotate one series: a scene that one tests must not train with the other's
    labels. Texts of fewer than five words are anybody's and don't count.
    """
    tested = [d for other in judged for split in SPLITS[1:] for d in other.splits[split]]
    held = _telling(tested)
    train = tuple(d for d in corpus.splits["train"] if held.isdisjoint(_telling([d])))
    return replace(corpus, splits={**corpus.splits, "train": train})


def mixed_lessons(corpora: Sequence[Corpus], words: WordsConfig) -> Lessons:
    """All corpora's lessons. Their labels are the same; an epoch's depend on it and the seed."""
    train = {
        corpus.name: labelled_turns(corpus.splits["train"], corpus.labels) for corpus in corpora
    }
    dev = {corpus.name: labelled_turns(corpus.splits["dev"], corpus.labels) for corpus in corpora}
    lexicon = lexicon_of(turn.text for known in train.values() for d in known for turn in d.turns)

    def of_epoch(epoch: int) -> list[LabelledTurns]:
        draw = np.random.default_rng((words.seed, epoch))
        return [
            _heard(known, words, lexicon=lexicon, draw=draw)
            for name, every in train.items()
            for known in _some(every, words.most.get(name), draw=draw)
        ]

    return Lessons(
        train=of_epoch,
        dev={name: Exam(dev[name], FIGURES[figure]) for name, figure in words.judged.items()},
        weights=_weights(
            (known for name, every in train.items() for known in every),
            classes=len(corpora[0].labels),
            balance=words.balance,
        ),
    )


def labelled_turns(dialogues: Sequence[Dialogue], labels: tuple[str, ...]) -> list[LabelledTurns]:
    """Dialogues as tuning reads them."""

    def index(said: LabelledUtterance) -> np.int64:  # that type is in the names of cached files
        return np.int64(UNLABELLED if said.label is None else labels.index(said.label))

    return [
        LabelledTurns(
            tuple(Turn(said.speaker, said.text) for said in dialogue.utterances),
            tuple(index(said) for said in dialogue.utterances),  # type: ignore[misc]
        )
        for dialogue in dialogues
    ]


def _telling(dialogues: Iterable[Dialogue]) -> set[str]:
    said = (words_of(u.text) for dialogue in dialogues for u in dialogue.utterances)
    return {" ".join(words) for words in said if len(words) >= TELLING}


def _some(
    every: Sequence[LabelledTurns], most: int | None, *, draw: np.random.Generator
) -> Sequence[LabelledTurns]:
    if most is None or most >= len(every):
        return every
    return [every[n] for n in np.sort(draw.permutation(len(every))[:most])]


def _heard(
    known: LabelledTurns, words: WordsConfig, *, lexicon: Lexicon, draw: np.random.Generator
) -> LabelledTurns:
    def hear(text: str) -> str:
        if draw.random() >= words.changed:
            return text
        if draw.random() < words.misheard:
            rate = float(draw.uniform(0, words.largest_rate))
            text = simulate_asr_errors(text, rate=rate, draw=draw, lexicon=lexicon)
        return without_punctuation(text) or text if draw.random() < words.unpunctuated else text

    return replace(known, turns=tuple(Turn(t.speaker, hear(t.text)) for t in known.turns))


def _weights(every: Iterable[LabelledTurns], *, classes: int, balance: float) -> tuple[float, ...]:
    """Of each class in the loss: its share of the labels to the power of minus ``balance``."""
    counts = Counter(label for known in every for label in known.labels if label != UNLABELLED)
    shares = np.array([counts[n] for n in range(classes)]) / max(1, counts.total())
    weights = np.maximum(shares, 1e-4) ** -balance
    return tuple(float(weight) for weight in weights / (shares @ weights))
