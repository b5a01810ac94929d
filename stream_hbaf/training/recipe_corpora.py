"""Opens the corpora that a recipe names, and decides what each is used for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stream_hbaf.corpora.asr_errors import words_of
from stream_hbaf.corpora.dialogue import SPLITS, Corpus, Dialogue, Split, utterances_of
from stream_hbaf.corpora.open_corpus import open_corpus, select
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.training.recipe import Recipe

DISTINCTIVE = 5  # words; two corpora that share so long a text hold the same scene of one series
DRAW_SEED = 0  # of the dialogues that ``max_dialogues`` keeps


@dataclass(frozen=True)
class RecipeCorpora:
    """The corpora of a recipe, by the names that it gives them."""

    dialogues: Mapping[str, Corpus]  # the main one first
    clips: Mapping[str, Corpus]
    texts: Mapping[str, Corpus]  # all that may tune the text encoder
    labels: tuple[str, ...]

    @property
    def used(self) -> Mapping[str, Corpus]:
        """All that networks are trained on."""
        return {**self.dialogues, **self.clips}

    @property
    def alone(self) -> bool:
        """Whether there is but one corpus: it has its own audio, and is tested as well."""
        return len(self.dialogues) + len(self.clips) == 1

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that are prepared. Test of several is measured through the live path alone."""
        return SPLITS if self.alone else SPLITS[:2]

    def describe(self) -> dict[str, Any]:
        """Of each corpus its kind, and how many labelled utterances and dialogues it has."""
        return {
            name: {
                "kind": "clips" if name in self.clips else "dialogues",
                "utterances": {
                    split: sum(u.label is not None for u in utterances_of(corpus.splits[split]))
                    for split in self.splits
                },
                "dialogues": {split: len(corpus.splits[split]) for split in self.splits},
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
    clips = () if alone else tuple(name for name in recipe.corpora if _are_clips(read[name]))
    dialogues = tuple(name for name in recipe.corpora if name not in clips)
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
    used = {name: _at_most(merged[name], c.max_dialogues) for name, c in recipe.corpora.items()}
    # The encoder is tuned with all labels that there are, unless its corpora have others.
    differ = len({read[name].labels for name in tuned_on}) > 1
    return RecipeCorpora(
        dialogues={name: used[name] for name in dialogues},
        clips={name: used[name] for name in clips},
        texts={**whole, **merged} if differ else whole,
        labels=common_labels(used),
    )


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
    """The labels of all corpora; ConfigError if they aren't the same."""
    first, *others = corpora
    for other in others:
        if corpora[other].labels != corpora[first].labels:
            raise ConfigError(
                f"corpora: {first} and {other} have different labels ("
                f"{', '.join(corpora[first].labels)}; {', '.join(corpora[other].labels)}); "
                "give them the same 'classes', or leave one out"
            )
    return corpora[first].labels


def _read(recipe: Recipe, corpora: Path, *, others: Sequence[str]) -> dict[str, Corpus]:
    """The recipe's corpora, in its folds, and other ones; of several, dev or test may be empty."""
    alone = len(recipe.corpora) == 1
    folds = {name: settings.fold for name, settings in recipe.corpora.items()}
    return {
        name: select(open_corpus(name, corpora, all_splits=alone), fold=folds.get(name))
        for name in [*recipe.corpora, *others]
    }


def _are_clips(corpus: Corpus) -> bool:
    return all(
        len(dialogue.utterances) == 1 and dialogue.utterances[0].audio is not None
        for dialogue in corpus.splits["train"]
    )


def _at_most(corpus: Corpus, most: int | None) -> Corpus:
    """The corpus with so many train dialogues, drawn once."""
    train = corpus.splits["train"]
    if most is None or most >= len(train):
        return corpus
    chosen = np.sort(np.random.default_rng(DRAW_SEED).permutation(len(train))[:most])
    return replace(corpus, splits={**corpus.splits, "train": tuple(train[n] for n in chosen)})


def _distinctive_texts(dialogues: Iterable[Dialogue]) -> set[str]:
    texts = (words_of(u.text) for dialogue in dialogues for u in dialogue.utterances)
    return {" ".join(words) for words in texts if len(words) >= DISTINCTIVE}
