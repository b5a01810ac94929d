"""A recorded corpus, as a recipe wants it: labels merged into fewer classes, a session held out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from stream_hbaf.corpora.dialogue import SPLITS, Corpus, Dialogue
from stream_hbaf.corpora.iemocap import SESSIONS
from stream_hbaf.errors import ConfigError, CorpusError

Classes = Mapping[str, Sequence[str]]  # a class: the corpus's labels that it is made of

SESSIONED = "iemocap"  # the corpus whose dialogues tell their session
DEV_EVERY = 10  # of the dialogues that aren't held out, one in so many is dev


def choose(corpus: Corpus, *, classes: Classes | None = None, fold: int | None = None) -> Corpus:
    """The corpus with session ``fold`` as its test split and ``classes`` as its labels; None
    leaves either as it is.

    Raises ConfigError for what the corpus doesn't have, CorpusError where a split is left without
    a label.
    """
    chosen = corpus if fold is None else fold_by_session(corpus, test_session=fold)
    chosen = chosen if classes is None else merge_classes(chosen, classes=classes)
    for split, dialogues in chosen.splits.items():
        labels = {said.label for dialogue in dialogues for said in dialogue.utterances}
        if corpus.splits[split] and not labels - {None}:
            raise CorpusError(
                f"{corpus.name}: no labelled utterance is left in {split}; "
                "choose other classes, or another fold"
            )
    return chosen


def merge_classes(corpus: Corpus, *, classes: Classes) -> Corpus:
    """The corpus labelled by ``classes``, in alphabetical order.

    Utterances of a label that no class is made of become context only; as the only one of its
    dialogue, such an utterance is nobody's context and left out. Raises ConfigError for a class
    of nothing, and for a label that is unknown or named twice.
    """
    _require_labels(corpus, classes)
    class_of = {label: name for name, labels in classes.items() for label in labels}
    merged = {
        split: tuple(_relabel(dialogue, class_of) for dialogue in dialogues)
        for split, dialogues in corpus.splits.items()
    }
    kept = {
        split: tuple(d for d in dialogues if len(d.utterances) > 1 or d.utterances[0].label)
        for split, dialogues in merged.items()
    }
    return replace(corpus, labels=tuple(sorted(classes)), splits=kept)


def fold_by_session(corpus: Corpus, *, test_session: int) -> Corpus:
    """IEMOCAP tested on one session: two speakers that no other session has.

    The field's convention says what tests, not what picks: here dev is every tenth dialogue of the
    other four sessions, in the order of their names, and the rest trains. Raises ConfigError for
    another corpus or a session that isn't one of 1 to 5.
    """
    if corpus.name != SESSIONED:
        raise ConfigError(
            f"fold: {corpus.name} has no sessions, only {SESSIONED} has; leave it out"
        )
    if test_session not in SESSIONS:
        raise ConfigError(
            f"fold: {test_session} is no session of {SESSIONED}; "
            f"choose {SESSIONS.start} to {SESSIONS.stop - 1}"
        )
    every = (dialogue for split in SPLITS for dialogue in corpus.splits[split])
    in_order = sorted(every, key=lambda dialogue: dialogue.id)
    held_out = f"Ses0{test_session}"
    others = [dialogue for dialogue in in_order if not dialogue.id.startswith(held_out)]
    return replace(
        corpus,
        splits={
            "train": tuple(d for n, d in enumerate(others) if n % DEV_EVERY),
            "dev": tuple(others[::DEV_EVERY]),
            "test": tuple(d for d in in_order if d.id.startswith(held_out)),
        },
    )


def _require_labels(corpus: Corpus, classes: Classes) -> None:
    for name, labels in classes.items():
        if not labels:
            raise ConfigError(f"classes: '{name}' is made of nothing; give it labels, or leave it")
        for label in labels:
            if label not in corpus.labels:
                raise ConfigError(
                    f"classes: {corpus.name} has no label '{label}'; "
                    f"choose from {', '.join(corpus.labels)}"
                )
    named = Counter(label for labels in classes.values() for label in labels)
    for label, times in named.items():
        if times > 1:
            raise ConfigError(f"classes: '{label}' is named {times} times; leave it in one class")


def _relabel(dialogue: Dialogue, class_of: Mapping[str, str]) -> Dialogue:
    said = (replace(u, label=class_of.get(u.label or "")) for u in dialogue.utterances)
    return replace(dialogue, utterances=tuple(said))
