"""Training: dialogues of words as features, in the versions in which live use may hear them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.corpora.asr_errors import (
    Lexicon,
    lexicon_of,
    simulate_asr_errors,
    without_punctuation,
)
from stream_hbaf.corpora.cache import EncodeTexts
from stream_hbaf.corpora.dataset import Dataset, label_indices, rows_of, utterances_of
from stream_hbaf.corpora.dialogue import LABELS, Corpus, Dialogue
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import ConfigError
from stream_hbaf.features.commonsense import Event2MindHeads, NoCommonsense
from stream_hbaf.training.batches import Spoken
from stream_hbaf.training.recipe import MixtureRecipe
from stream_hbaf.training.text_augment import WordsConfig, open_words

Draw = np.random.Generator

TALK = "meld"  # the corpus of dialogues; words of others are learnt beside it
MISHEARD_RATE = 0.15  # of dev's misheard words


def read_words(recipe: MixtureRecipe, corpora: Path) -> list[Corpus]:
    """All corpora of words, MELD first or where the recipe names it."""
    if recipe.words is None:
        return [open_corpus(TALK, corpora)]
    if TALK not in recipe.words.corpora:
        raise ConfigError(f"recipe {recipe.id}: 'words.corpora' must name {TALK}, the dialogues")
    return open_words(recipe.words, corpora)


def prepare_words(
    recipe: MixtureRecipe,
    words: Sequence[Corpus],
    *,
    encode: EncodeTexts,
    heads: Event2MindHeads | NoCommonsense,
) -> tuple[Spoken, dict[str, Dataset]]:
    """Train's words, MELD's in all versions; and MELD's dev, as it is and misheard."""
    lexicon = lexicon_of(
        said.text for corpus in words for said in utterances_of(corpus.splits["train"])
    )
    (talk,) = (corpus for corpus in words if corpus.name == TALK)
    others = [corpus for corpus in words if corpus is not talk]
    plan = recipe.words or WordsConfig()
    train = talk.splits["train"]
    parts = [spoken_material(train, encode=encode, heads=heads)]
    for copy in range(recipe.fitting.misheard):
        draw = np.random.default_rng([plan.seed, copy])
        hear = partial(_hear_train, plan=plan, lexicon=lexicon, draw=draw)
        parts.append(spoken_material(train, encode=encode, heads=heads, hear=hear))
    for other in others:
        some = _some(other.splits["train"], recipe.fitting.beside, seed=plan.seed)
        parts.append(spoken_material(some, encode=encode, heads=heads))
    together, rows = _join(parts)
    versions = 1 + recipe.fitting.misheard
    beside = tuple(dialogue for part in rows[versions:] for dialogue in part)
    dev = partial(spoken_material, talk.splits["dev"], encode=encode, heads=heads)
    draw = np.random.default_rng(plan.seed)
    misheard = partial(simulate_asr_errors, rate=MISHEARD_RATE, draw=draw, lexicon=lexicon)
    return (
        Spoken(together, tuple(zip(*rows[:versions], strict=True)), beside),
        {"gold": dev(), "misheard": dev(hear=misheard)},
    )


def _some(dialogues: Sequence[Dialogue], most: int, *, seed: int) -> list[Dialogue]:
    order = np.random.default_rng(seed).permutation(len(dialogues))[:most]
    return [dialogues[n] for n in np.sort(order)]


def _hear_train(text: str, *, plan: WordsConfig, lexicon: Lexicon, draw: Draw) -> str:
    rate = float(draw.uniform(0, plan.largest_rate))
    heard = simulate_asr_errors(text, rate=rate, draw=draw, lexicon=lexicon)
    return without_punctuation(heard) or heard if draw.random() < plan.unpunctuated else heard


def spoken_material(
    dialogues: Sequence[Dialogue],
    *,
    encode: EncodeTexts,
    heads: Event2MindHeads | NoCommonsense,
    hear: Callable[[str], str] = str,
) -> Dataset:
    """Dialogues with words, as ``hear`` understands them, and without sound."""
    utterances = utterances_of(dialogues)
    text = encode([hear(utterance.text) for utterance in utterances])
    return Dataset(
        labels=label_indices(utterances, LABELS),
        text=text,
        commonsense=heads.infer(text),
        audio={},
        dialogues=rows_of(dialogues),
    )


def _join(parts: Sequence[Dataset]) -> tuple[Dataset, list[tuple[NDArray[np.intp], ...]]]:
    """All rows in one material, and each part's dialogues there."""
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])
    rows = [
        tuple(dialogue + start for dialogue in part.dialogues)
        for part, start in zip(parts, starts, strict=False)
    ]
    together = Dataset(
        labels=np.concatenate([part.labels for part in parts]),
        text=np.concatenate([part.text for part in parts]),
        commonsense=np.concatenate([part.commonsense for part in parts]),
        audio={},
        dialogues=tuple(dialogue for of_part in rows for dialogue in of_part),
    )
    return together, rows
