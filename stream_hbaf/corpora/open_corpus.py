"""Opens a corpus by name, selects the fold and the classes of it that a recipe asks for, and
holds names, contents and terms of the published corpora.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stream_hbaf.corpora.acted import read_nemo, read_ravdess, read_tess
from stream_hbaf.corpora.dialogue import LABELS, SPLITS, Corpus, Dialogue, Split
from stream_hbaf.corpora.iemocap import IEMOCAP_LABELS, read_iemocap
from stream_hbaf.corpora.iemocap import SESSIONS as IEMOCAP_SESSIONS
from stream_hbaf.corpora.manifest import read_manifest
from stream_hbaf.corpora.session_corpus import holds_sessions, read_sessions
from stream_hbaf.corpora.text import read_emorynlp, read_goemotions, read_meld
from stream_hbaf.errors import ConfigError, CorpusError


@dataclass(frozen=True, slots=True)
class Publication:
    """What a model card says of a corpus."""

    title: str
    content: str
    terms: str  # what may be done with it
    language: str | None = "en"  # of its texts; None: not known


PUBLICATIONS: Mapping[str, Publication] = {
    "atomic": Publication("ATOMIC", "annotated events", "CC BY 4.0"),
    "emorynlp": Publication("EmoryNLP", "dialogues of a television comedy", "research use"),
    "event2mind": Publication("Event2Mind", "annotated events", "MIT"),
    "goemotions": Publication("GoEmotions", "comments on the web", "Apache-2.0"),
    "iemocap": Publication(
        "IEMOCAP",
        "dyadic dialogues of actors in a studio",
        "its release form, research use, no redistribution without its owners' leave",
    ),
    "meld": Publication("MELD", "dialogues of a television comedy", "research use"),
    "nemo": Publication(
        "nEMO", "Polish sentences by actors", "CC BY-NC-SA 4.0, non-commercial", language="pl"
    ),
    "ravdess": Publication(
        "RAVDESS", "two sentences by actors in a studio", "CC BY-NC-SA 4.0, non-commercial"
    ),
    "tess": Publication("TESS", "one sentence by two actresses", "CC BY-NC-ND 4.0, non-commercial"),
}


def publication_of(name: str) -> Publication:
    """What is known of a corpus by the name that recipes give it; of one's own, next to nothing."""
    own = Publication(name, "a corpus of one's own", "the corpus's own terms", language=None)
    return PUBLICATIONS.get(name, own)


Classes = Mapping[str, Sequence[str]]  # a class: the corpus's labels that are merged into it


@dataclass(frozen=True, slots=True)
class _Published:
    labels: tuple[str, ...]
    read: Callable[[Path, Split], list[Dialogue]]


_PUBLISHED: Mapping[str, _Published] = {
    "emorynlp": _Published(LABELS, read_emorynlp),
    "goemotions": _Published(LABELS, read_goemotions),
    "iemocap": _Published(IEMOCAP_LABELS, read_iemocap),
    "meld": _Published(LABELS, read_meld),
    "nemo": _Published(LABELS, read_nemo),
    "ravdess": _Published(LABELS, read_ravdess),
    "tess": _Published(LABELS, read_tess),
}
CORPORA = tuple(_PUBLISHED)
MANIFEST = ".csv"  # how the name of a manifest ends
SESSIONS = "/"  # how the name of a recorded session ends, or of a folder of them
WITH_SESSIONS = "iemocap"  # the corpus whose dialogues are named after their session
DEV_EVERY = 10  # of the dialogues that aren't held out, one in so many is dev


def open_corpus(
    name: str, corpora: Path, *, all_splits: bool = True, labels: Sequence[str] = ()
) -> Corpus:
    """Read all splits of a corpus under ``corpora``: one of CORPORA, or a manifest or a folder of
    recorded sessions by its name.

    The latter two may also be paths of their own. Raises ConfigError for an unknown name, and
    CorpusError with file and line for what can't be read, an empty split, an empty dialogue, or a
    split without any label. Without ``all_splits`` dev and test may be empty, as TESS's are. With
    ``labels``, those of a trained bundle, train may be as well, and a manifest needs fewer columns:
    see ``read_manifest``.
    """
    if name.endswith(MANIFEST):
        place = Path(name) if Path(name).is_file() else corpora / name
        corpus = read_manifest(place, labels=labels)
    elif name in _PUBLISHED:
        place, known = corpora / name, _PUBLISHED[name]
        corpus = Corpus(
            name, known.labels, {split: tuple(known.read(place, split)) for split in SPLITS}
        )
    elif name.endswith(SESSIONS) or any(map(holds_sessions, (Path(name), corpora / name))):
        place = Path(name) if Path(name).is_dir() else corpora / name
        corpus = read_sessions(place)
    else:
        published = ", ".join(CORPORA)
        raise ConfigError(
            f"unknown corpus '{name}'; choose {published}, a manifest's .csv, or a folder of "
            "sessions"
        )
    for split, dialogues in corpus.splits.items():
        if not dialogues and not all_splits and (split != "train" or labels):
            continue
        _require_turns(dialogues, where=f"{place}: {corpus.name}'s {split} split")
    return corpus


def select(corpus: Corpus, *, classes: Classes | None = None, fold: int | None = None) -> Corpus:
    """The corpus with session ``fold`` as its test split and ``classes`` as its labels; None
    leaves either as it is.

    Raises ConfigError for what the corpus doesn't have, CorpusError where a split is left without
    a label.
    """
    selected = corpus if fold is None else fold_by_session(corpus, test_session=fold)
    selected = selected if classes is None else merge_classes(selected, classes=classes)
    for split, dialogues in selected.splits.items():
        labels = {one.label for dialogue in dialogues for one in dialogue.utterances}
        if corpus.splits[split] and not labels - {None}:
            raise CorpusError(
                f"{corpus.name}: no labelled utterance is left in {split}; "
                "choose other classes, or another fold"
            )
    return selected


def merge_classes(corpus: Corpus, *, classes: Classes) -> Corpus:
    """The corpus labelled by ``classes``, in alphabetical order.

    Utterances of a label that belongs to no class become context only; where such an utterance is
    its dialogue's only one, the dialogue is left out. Raises ConfigError for a class without
    labels, and for a label that is unknown or named twice.
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
    """IEMOCAP with one session as its test split: two speakers that no other session has.

    The field's convention fixes test, not dev: here dev is every tenth dialogue of the other four
    sessions, in the order of their names, and the rest is train. Raises ConfigError for another
    corpus or a session that isn't one of 1 to 5.
    """
    if corpus.name != WITH_SESSIONS:
        raise ConfigError(
            f"fold: {corpus.name} has no sessions, only {WITH_SESSIONS} has; leave it out"
        )
    if test_session not in IEMOCAP_SESSIONS:
        raise ConfigError(
            f"fold: {test_session} is no session of {WITH_SESSIONS}; "
            f"choose {IEMOCAP_SESSIONS.start} to {IEMOCAP_SESSIONS.stop - 1}"
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


def _require_turns(dialogues: tuple[Dialogue, ...], *, where: str) -> None:
    if not dialogues:
        raise CorpusError(f"{where} is empty; add its dialogues, or choose another corpus")
    for dialogue in dialogues:
        if not dialogue.utterances:
            raise CorpusError(
                f"{where}: dialogue {dialogue.id} has no utterances; remove or mend it"
            )
    if all(one.label is None for dialogue in dialogues for one in dialogue.utterances):
        raise CorpusError(f"{where} has no labelled utterance; label some of them")


def _require_labels(corpus: Corpus, classes: Classes) -> None:
    for name, labels in classes.items():
        if not labels:
            raise ConfigError(f"classes: '{name}' has no labels; give it some, or leave it out")
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
    relabelled = (replace(u, label=class_of.get(u.label or "")) for u in dialogue.utterances)
    return replace(dialogue, utterances=tuple(relabelled))
