"""Prepares the texts that the text encoder is tuned on, and simulates ASR errors in texts.

Live input is what a speech recogniser understood. So in each epoch a part of the texts gets word
errors or loses its punctuation, drawn anew; and as no corpus has all words and all emotions,
several may be tuned on at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stream_hbaf.corpora.asr_errors import (
    Lexicon,
    lexicon_of,
    simulate_asr_errors,
    without_punctuation,
)
from stream_hbaf.corpora.dialogue import SPLITS, Corpus, Dialogue, LabelledUtterance
from stream_hbaf.evaluation.metrics import (
    FigureName,
    Labels,
    accuracy,
    macro_f1,
    unweighted_recall,
    weighted_f1,
)
from stream_hbaf.features.context import Ids, Turn
from stream_hbaf.training.recipe import AsrErrorConfig, TuningConfig
from stream_hbaf.training.recipe_corpora import common_labels

Draw = np.random.Generator
Figure = Callable[[Labels, Labels], float]  # gold [N], predicted [N]

UNLABELLED = -1  # index of the label of an utterance that is context only
FIGURES: Mapping[FigureName, Figure] = {
    "weighted_f1": weighted_f1,
    "macro_f1": macro_f1,
    "accuracy": accuracy,
    "uar": unweighted_recall,
}


@dataclass(frozen=True, slots=True)
class LabelledTurns:
    """A dialogue's turns, and the index of each one's label or -1."""

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

    def index(utterance: LabelledUtterance) -> int:
        return UNLABELLED if utterance.label is None else labels.index(utterance.label)

    return [
        LabelledTurns(
            tuple(Turn(one.speaker, one.text) for one in dialogue.utterances),
            tuple(index(one) for one in dialogue.utterances),
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
    return [piece for piece in pieces if any(label != UNLABELLED for label in piece.labels)]


def _some(
    every: Sequence[LabelledTurns], most: int | None, *, draw: Draw
) -> Sequence[LabelledTurns]:
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
            rate = float(draw.uniform(0, errors.max_error_rate))
            text = simulate_asr_errors(text, rate=rate, draw=draw, lexicon=lexicon)
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
    counts = Counter(label for known in every for label in known.labels if label != UNLABELLED)
    shares = np.array([counts[n] for n in range(classes)]) / max(1, counts.total())
    weights = np.maximum(shares, 1e-4) ** -balance
    return tuple(float(weight) for weight in weights / (shares @ weights))
