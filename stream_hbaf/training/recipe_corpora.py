"""Opens the corpora that a recipe names, decides what each is used for, and prepares the texts that
the text encoder is tuned on.

Live input is what a speech recogniser understood. So in each epoch a part of the texts gets word
errors or loses its punctuation, drawn anew; and as no corpus has all words and all emotions,
several may be tuned on at once.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from stream_hbaf.corpora.asr_errors import (
    Lexicon,
    lexicon_of,
    simulate_asr_errors,
    without_punctuation,
    words_of,
)
from stream_hbaf.corpora.dataset import NO_LABEL, label_indices
from stream_hbaf.corpora.dialogue import (
    SPLITS,
    Corpus,
    Dialogue,
    LabelledUtterance,
    Split,
    utterances_of,
)
from stream_hbaf.corpora.open_corpus import open_corpus, select
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.evaluation.metrics import (
    FigureName,
    Labels,
    accuracy,
    macro_f1,
    unweighted_recall,
    weighted_f1,
)
from stream_hbaf.features.text import Ids, Turn
from stream_hbaf.training.recipe import AsrErrorConfig, CorpusConfig, Recipe, TuningConfig

DISTINCTIVE = 5  # words; two corpora that share so long a text hold the same scene of one series
DRAW_SEED = 0  # of the dialogues that ``max_dialogues`` keeps

T = TypeVar("T")
Draw = np.random.Generator
Figure = Callable[[Labels, Labels], float]  # gold [N], predicted [N]

FIGURES: Mapping[FigureName, Figure] = {
    "weighted_f1": weighted_f1,
    "macro_f1": macro_f1,
    "accuracy": accuracy,
    "uar": unweighted_recall,
}


@dataclass(frozen=True)
class RecipeCorpora:
    """The corpora of a recipe, by the names that it gives them."""

    dialogues: Mapping[str, Corpus]  # the main one first
    clips: Mapping[str, Corpus]
    texts: Mapping[str, Corpus]  # all that may tune the text encoder
    labels: tuple[str, ...]
    held_out: Mapping[str, Corpus]  # not trained on; all of each is its test split

    @property
    def used(self) -> Mapping[str, Corpus]:
        """All that networks are trained on."""
        return {**self.dialogues, **self.clips}

    def corpus(self, name: str) -> Corpus:
        """One that is trained on, or held out."""
        return self.used[name] if name in self.used else self.held_out[name]

    @property
    def alone(self) -> bool:
        """Whether there is but one corpus: it has its own audio, and is tested as well."""
        return len(self.dialogues) + len(self.clips) == 1

    def splits_of(self, name: str) -> tuple[Split, ...]:
        """Those of a corpus that are prepared.

        Of several, test is that of corpora held out, and of dialogues with audio of their own: all
        other tests are measured through the live path alone.
        """
        if name in self.held_out:
            return ("test",)
        return SPLITS if self.alone or name in list(self.dialogues)[1:] else SPLITS[:2]

    def describe(self, *, with_audio: Container[str]) -> dict[str, Any]:
        """Of each corpus its kind, and how many labelled utterances and dialogues it has."""
        return {
            name: {
                "kind": "clips" if name in self.clips else "dialogues",
                "audio": name in with_audio,
                "utterances": {
                    split: sum(u.label is not None for u in utterances_of(corpus.splits[split]))
                    for split in self.splits_of(name)
                },
                "dialogues": {s: len(corpus.splits[s]) for s in self.splits_of(name)},
            }
            for name, corpus in self.used.items()
        }


def open_corpora(recipe: Recipe, corpora: Path) -> RecipeCorpora:
    """Read all corpora that a recipe names; train dialogues that another one tests are held out.

    Of several corpora, those whose every train dialogue is one utterance with its audio are clips.
    Raises CorpusError for a corpus that can't be read or lacks a split that it needs, ConfigError
    for labels that differ.
    """
    plans = [p for p in (recipe.text_encoder, *recipe.text_encoder.soup) if p.changes]
    tuned_on = {name for plan in plans for name in plan.corpora or ()}
    read = _read(recipe, corpora, others=sorted(tuned_on - set(recipe.corpora)))
    alone = len(recipe.corpora) == 1
    trained = [name for name in recipe.corpora if name not in recipe.held_out]
    clips = () if alone else tuple(name for name in trained if _are_clips(read[name]))
    dialogues = tuple(name for name in trained if name not in clips)
    for names in (clips, dialogues[:1]):
        if names and not any(read[name].splits["dev"] for name in names):
            raise CorpusError(f"{corpora}: no dev split in {', '.join(names)}; add a corpus")
    tested = {name for plan in plans for name in plan.dev_figures or plan.corpora or dialogues}
    tested.update(dialogues[:1])
    whole = {
        name: hold_out(corpus, [read[other] for other in sorted(tested - {name})])
        for name, corpus in read.items()
    }
    merged = {name: select(whole[name], classes=c.classes) for name, c in recipe.corpora.items()}
    labels = common_labels(merged)
    used = {
        name: replace(_at_most(merged[name], c.max_dialogues), labels=labels)
        for name, c in recipe.corpora.items()
    }
    # The encoder is tuned with all labels that there are, unless its corpora have others.
    differ = len({read[name].labels for name in tuned_on}) > 1
    return RecipeCorpora(
        dialogues={name: used[name] for name in dialogues},
        clips={name: used[name] for name in clips},
        texts={**whole, **merged} if differ else whole,
        labels=labels,
        held_out={name: _as_test(used[name]) for name in recipe.held_out},
    )


def _as_test(corpus: Corpus) -> Corpus:
    """A corpus all of which is its test split."""
    every = tuple(dialogue for split in SPLITS for dialogue in corpus.splits[split])
    return replace(corpus, splits={"train": (), "dev": (), "test": every})


def hold_out(corpus: Corpus, tested: Sequence[Corpus]) -> Corpus:
    """``corpus`` without the train dialogues of which a text is in the dev or test of ``tested``.

    MELD and EmoryNLP annotate one series: a scene that one tests must not train with the other's
    labels. Texts of fewer than five words occur anywhere and don't count.
    """
    others = [d for other in tested for split in SPLITS[1:] for d in other.splits[split]]
    held = _distinctive_texts(others)
    train = tuple(d for d in corpus.splits["train"] if held.isdisjoint(_distinctive_texts([d])))
    return replace(corpus, splits={**corpus.splits, "train": train})


def common_labels(corpora: Mapping[str, Corpus]) -> tuple[str, ...]:
    """The labels of the corpus that has most; ConfigError if another has one that isn't among
    them.
    """
    widest = max(corpora, key=lambda name: len(corpora[name].labels))
    labels = corpora[widest].labels
    for other in corpora:
        if not set(corpora[other].labels) <= set(labels):
            raise ConfigError(
                f"corpora: {widest} and {other} have different labels ("
                f"{', '.join(labels)}; {', '.join(corpora[other].labels)}); "
                "give them the same 'classes', or leave one out"
            )
    return labels


def _read(recipe: Recipe, corpora: Path, *, others: Sequence[str]) -> dict[str, Corpus]:
    """The recipe's corpora, in its folds, and other ones; of several, dev or test may be empty."""
    alone = len(recipe.corpora) == 1
    settings = dict.fromkeys(others, CorpusConfig()) | recipe.corpora
    return {
        name: select(
            open_corpus(name, corpora, all_splits=alone), fold=used.fold, dev_fold=used.dev_fold
        )
        for name, used in settings.items()
    }


def _are_clips(corpus: Corpus) -> bool:
    def is_clip(one: LabelledUtterance) -> bool:
        return one.audio is not None or one.ge2e is not None

    train = corpus.splits["train"]
    return all(
        len(dialogue.utterances) == 1 and is_clip(dialogue.utterances[0]) for dialogue in train
    )


def _at_most(corpus: Corpus, most: int | None) -> Corpus:
    """The corpus with so many train dialogues, drawn once."""
    train = _some(corpus.splits["train"], most, draw=np.random.default_rng(DRAW_SEED))
    return replace(corpus, splits={**corpus.splits, "train": tuple(train)})


def _distinctive_texts(dialogues: Iterable[Dialogue]) -> set[str]:
    texts = (words_of(u.text) for dialogue in dialogues for u in dialogue.utterances)
    return {" ".join(words) for words in texts if len(words) >= DISTINCTIVE}


@dataclass(frozen=True, slots=True)
class LabelledTurns:
    """A dialogue's turns, and the index of each one's label or NO_LABEL."""

    turns: tuple[Turn, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextDevSet:
    """Dev dialogues of one corpus, and the figure by which they are scored."""

    dialogues: Sequence[LabelledTurns]
    figure: Figure


@dataclass(frozen=True, slots=True)
class TextTrainingSet:
    """What an encoder is tuned on; the mean of all dev figures picks the epoch."""

    train: Callable[[int], Sequence[LabelledTurns]]  # of an epoch, the first being 1; repeatable
    dev: Mapping[str, TextDevSet]  # by corpus
    weights: tuple[float, ...] | None = None  # of the classes in the loss; None: all weigh the same


@dataclass(frozen=True, slots=True)
class Piece:
    """Turns that are read at once in training, and their labels."""

    texts: tuple[str, ...]
    turns: tuple[Ids, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens, cls included."""
        return 1 + sum(map(len, self.turns))


def text_training_set(
    corpora: Mapping[str, Corpus], plan: TuningConfig, errors: AsrErrorConfig
) -> TextTrainingSet:
    """All corpora's texts; those of an epoch depend on the epoch and ``errors.seed`` alone."""
    labels = common_labels(corpora)
    train, dev = (
        {name: labelled_turns(corpus.splits[split], labels) for name, corpus in corpora.items()}
        for split in SPLITS[:2]
    )
    figures: Mapping[str, FigureName] = plan.dev_figures or dict.fromkeys(train, "weighted_f1")
    lexicon = lexicon_of(turn.text for known in train.values() for d in known for turn in d.turns)

    def of_epoch(epoch: int) -> list[LabelledTurns]:
        draw = np.random.default_rng((errors.seed, epoch))
        return [
            _with_asr_errors(known, plan.asr_error_share, errors, lexicon=lexicon, draw=draw)
            for name, every in train.items()
            for known in _some(every, plan.dialogues_per_epoch.get(name), draw=draw)
        ]

    return TextTrainingSet(
        train=of_epoch,
        dev={name: TextDevSet(dev[name], FIGURES[figure]) for name, figure in figures.items()},
        weights=_class_weights(
            (known for every in train.values() for known in every),
            classes=len(labels),
            balance=plan.class_balance,
        ),
    )


def labelled_turns(dialogues: Sequence[Dialogue], labels: tuple[str, ...]) -> list[LabelledTurns]:
    """Dialogues as the text encoder is tuned on them."""
    return [
        LabelledTurns(
            tuple(Turn(one.speaker, one.text) for one in dialogue.utterances),
            tuple(label_indices(dialogue.utterances, labels).tolist()),
        )
        for dialogue in dialogues
    ]


def draw_asr_errors(text: str, errors: AsrErrorConfig, *, lexicon: Lexicon, draw: Draw) -> str:
    """``text`` with word errors at a rate drawn from 0 to the largest, at times unpunctuated."""
    rate = float(draw.uniform(0, errors.max_error_rate))
    return _maybe_unpunctuated(
        simulate_asr_errors(text, rate=rate, draw=draw, lexicon=lexicon), errors, draw=draw
    )


def cut(dialogue: Piece, *, tokens: int, draw: Draw) -> list[Piece]:
    """A whole dialogue in pieces for one epoch: one after another, none of them overlapping.

    The first is cut at a random length, so that an utterance's past differs between epochs. With
    ``tokens`` 0 every utterance is a piece. Pieces without any label are left out.
    """
    count, ends = len(dialogue.turns), [0]
    most = tokens if dialogue.length <= tokens else int(draw.integers(tokens // 4, tokens + 1))
    length = 1
    for n, turn in enumerate(dialogue.turns):
        if n > ends[-1] and length + len(turn) > most:
            ends.append(n)
            length, most = 1, tokens
        length += len(turn)
    pieces = (
        Piece(dialogue.texts[a:b], dialogue.turns[a:b], dialogue.labels[a:b])
        for a, b in zip(ends, [*ends[1:], count], strict=True)
    )
    return [piece for piece in pieces if any(label != NO_LABEL for label in piece.labels)]


def _some(every: Sequence[T], most: int | None, *, draw: Draw) -> Sequence[T]:
    """As many of all at most, in their order."""
    if most is None or most >= len(every):
        return every
    return [every[n] for n in np.sort(draw.permutation(len(every))[:most])]


def _with_asr_errors(
    known: LabelledTurns, share: float, errors: AsrErrorConfig, *, lexicon: Lexicon, draw: Draw
) -> LabelledTurns:
    """The dialogue with a ``share`` of its texts changed."""

    def change(text: str) -> str:
        if draw.random() >= share:
            return text
        if draw.random() < errors.word_error_share:
            return draw_asr_errors(text, errors, lexicon=lexicon, draw=draw)
        return _maybe_unpunctuated(text, errors, draw=draw)

    if not share:
        return known
    return replace(known, turns=tuple(Turn(t.speaker, change(t.text)) for t in known.turns))


def _maybe_unpunctuated(text: str, errors: AsrErrorConfig, *, draw: Draw) -> str:
    return without_punctuation(text) or text if draw.random() < errors.unpunctuated_share else text


def _class_weights(
    every: Iterable[LabelledTurns], *, classes: int, balance: float
) -> tuple[float, ...] | None:
    """Of each class in the loss: its share of the labels to the power of minus ``balance``."""
    if not balance:
        return None
    labels = [label for known in every for label in known.labels if label != NO_LABEL]
    shares = np.bincount(labels, minlength=classes) / max(1, len(labels))
    weights = np.maximum(shares, 1e-4) ** -balance
    return tuple(float(weight) for weight in weights / (shares @ weights))
