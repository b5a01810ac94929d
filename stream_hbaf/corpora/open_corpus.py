"""Opens a corpus by name, selects the fold and the classes of it that a recipe asks for, and
holds names, contents and terms of the published corpora.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stream_hbaf.corpora.acted import (
    read_ased,
    read_emospeech_india,
    read_librispeech,
    read_nemo,
    read_ravdess,
    read_savee,
    read_shemo,
    read_tess,
)
from stream_hbaf.corpora.dialogue import LABELS, SPLITS, Corpus, Dialogue, Split
from stream_hbaf.corpora.iemocap import IEMOCAP_LABELS, TEST_SESSION, read_iemocap
from stream_hbaf.corpora.iemocap import SESSIONS as IEMOCAP_SESSIONS
from stream_hbaf.corpora.manifest import read_manifest
from stream_hbaf.corpora.published import read_emorynlp, read_goemotions, read_meld
from stream_hbaf.corpora.session_corpus import holds_sessions, read_sessions
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.files import is_file, is_folder

Classes = Mapping[str, Sequence[str]]  # a class: the corpus's labels that are merged into it


@dataclass(frozen=True, slots=True)
class Publication:
    """What a model card says of a corpus, and how it is read."""

    title: str
    content: str
    terms: str  # what may be done with it
    language: str | None = "en"  # of its texts; None: not known
    labels: tuple[str, ...] = LABELS
    read: Callable[[Path, Split], list[Dialogue]] | None = None  # None: it holds no dialogues
    folder: str = ""  # among the corpora, if it isn't its name


NON_COMMERCIAL = "CC BY-NC-SA 4.0, non-commercial"
TELEVISION = "dialogues of a television comedy"
PUBLICATIONS: Mapping[str, Publication] = {
    "ased": Publication(
        "ASED",
        "Amharic sentences, five emotions",
        "research use, with a citation (Retta et al. 2022)",
        language="am",
        read=read_ased,
    ),
    "atomic": Publication("ATOMIC", "annotated events", "CC BY 4.0"),
    "emorynlp": Publication("EmoryNLP", TELEVISION, "research use", read=read_emorynlp),
    "emospeech-india": Publication(
        "EmoSpeech-India",
        "single words called into telephones",
        NON_COMMERCIAL,
        read=read_emospeech_india,
    ),
    "event2mind": Publication("Event2Mind", "annotated events", "MIT"),
    "goemotions": Publication(
        "GoEmotions", "comments on the web", "Apache-2.0", read=read_goemotions
    ),
    "iemocap": Publication(
        "IEMOCAP",
        "dyadic dialogues of actors in a studio",
        "its release form, research use, no redistribution without its owners' leave",
        labels=IEMOCAP_LABELS,
        read=read_iemocap,
    ),
    "librispeech": Publication(
        "LibriSpeech",
        "one read sentence of each of 251 readers, as speech without acted emotion",
        "CC BY 4.0",
        read=read_librispeech,
        folder="speech/libri",
    ),
    "meld": Publication("MELD", TELEVISION, "research use", read=read_meld),
    "nemo": Publication(
        "nEMO", "Polish sentences by actors", NON_COMMERCIAL, language="pl", read=read_nemo
    ),
    "ravdess": Publication(
        "RAVDESS", "two sentences by actors in a studio", NON_COMMERCIAL, read=read_ravdess
    ),
    "savee": Publication("SAVEE", "sentences by four Englishmen", "research use", read=read_savee),
    "shemo": Publication(
        "ShEMO",
        "Persian radio plays, as embeddings of their sound",
        "no licence stated, research use",
        language="fa",
        read=read_shemo,
    ),
    "tess": Publication(
        "TESS", "one sentence by two actresses", "CC BY-NC-ND 4.0, non-commercial", read=read_tess
    ),
}
CORPORA = tuple(name for name, published in PUBLICATIONS.items() if published.read is not None)
MANIFEST = ".csv"  # how the name of a manifest ends
SESSIONS = "/"  # how the name of a recorded session ends, or of a folder of them
WITH_SESSIONS = "iemocap"  # the corpus whose dialogues are named after their session
DEV_EVERY = 10  # of the dialogues that aren't held out, one in so many is dev


def publication_of(name: str) -> Publication:
    """What is known of a corpus by the name that recipes give it; of one's own, next to nothing."""
    own = Publication(name, "a corpus of one's own", "the corpus's own terms", language=None)
    return PUBLICATIONS.get(name, own)


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
    given = Path(name)
    place = given if is_file(given) or is_folder(given) else corpora / name
    read = publication_of(name).read
    if name.endswith(MANIFEST):
        corpus = read_manifest(place, labels=labels)
    elif read is not None:
        place = corpora / (publication_of(name).folder or name)
        splits = {split: tuple(read(place, split)) for split in SPLITS}
        corpus = Corpus(name, publication_of(name).labels, splits)
    elif name.endswith(SESSIONS) or holds_sessions(place):
        corpus = read_sessions(place)
    else:
        raise ConfigError(
            f"unknown corpus '{name}'; choose {', '.join(CORPORA)}, a manifest's .csv, or a folder "
            "of sessions"
        )
    for split, dialogues in corpus.splits.items():
        if not dialogues and not all_splits and (split != "train" or labels):
            continue
        _require_turns(dialogues, where=f"{place}: {corpus.name}'s {split} split")
    return corpus


def select(
    corpus: Corpus,
    *,
    classes: Classes | None = None,
    fold: int | None = None,
    dev_fold: int | None = None,
) -> Corpus:
    """The corpus with session ``fold`` as its test split, session ``dev_fold`` as its dev split,
    and ``classes`` as its labels; None leaves each as it is.

    Raises ConfigError for what the corpus doesn't have, CorpusError where a split is left without
    a label, or a fold's split without one of the labels.
    """
    folds = {"fold": fold, "dev_fold": dev_fold}
    selected = corpus if not any(folds.values()) else _fold_by_session(corpus, folds)
    selected = selected if classes is None else _merge_classes(selected, classes)
    for split, dialogues in selected.splits.items():
        labels = {one.label for dialogue in dialogues for one in dialogue.utterances} - {None}
        if corpus.splits[split] and not labels:
            raise CorpusError(
                f"{corpus.name}: no labelled utterance is left in {split}; "
                "choose other classes, or another fold"
            )
        missing = [label for label in selected.labels if label not in labels]
        if any(folds.values()) and missing:
            raise CorpusError(
                f"{corpus.name}: no utterance of '{missing[0]}' is left in {split}; "
                "choose other classes, or another fold"
            )
    return selected


def training_sessions(fold: int | None = None) -> list[int]:
    """IEMOCAP's sessions but the one that is the test split: ``fold``, or the published one."""
    return [session for session in IEMOCAP_SESSIONS if session != (fold or TEST_SESSION)]


def _merge_classes(corpus: Corpus, classes: Classes) -> Corpus:
    """Utterances of a label that belongs to no class become context only; where such an utterance
    is its dialogue's only one, the dialogue is left out."""
    _require_labels(corpus, classes)
    class_of = {label: name for name, labels in classes.items() for label in labels}
    splits = {}
    for split, dialogues in corpus.splits.items():
        merged = [_relabel(dialogue, class_of) for dialogue in dialogues]
        splits[split] = tuple(d for d in merged if len(d.utterances) > 1 or d.utterances[0].label)
    return replace(corpus, labels=tuple(sorted(classes)), splits=splits)


def _fold_by_session(corpus: Corpus, folds: Mapping[str, int | None]) -> Corpus:
    """IEMOCAP with one session as its test split: two speakers that no other session has.

    The field's convention fixes test, not dev: without a ``dev_fold``, dev is every tenth dialogue
    of the other four sessions, in the order of their names. With one, dev has speakers of its own,
    too. The rest is train. Without a ``fold``, test is the published one.
    """
    for setting, session in folds.items():
        if session is not None and corpus.name != WITH_SESSIONS:
            raise ConfigError(
                f"{setting}: {corpus.name} has no sessions, only {WITH_SESSIONS} has; leave it out"
            )
        if session is not None and session not in IEMOCAP_SESSIONS:
            raise ConfigError(
                f"{setting}: {session} is no session of {WITH_SESSIONS}; "
                f"choose {IEMOCAP_SESSIONS.start} to {IEMOCAP_SESSIONS.stop - 1}"
            )
    test_session, dev_session = folds["fold"] or TEST_SESSION, folds["dev_fold"]
    if test_session == dev_session:
        raise ConfigError(
            f"dev_fold: session {dev_session} is the test split; choose another session"
        )
    every = [dialogue for split in SPLITS for dialogue in corpus.splits[split]]
    every.sort(key=lambda dialogue: dialogue.id)
    test = tuple(d for d in every if d.id.startswith(f"Ses0{test_session}"))
    others = [dialogue for dialogue in every if dialogue not in test]
    if dev_session is None:
        dev = tuple(others[::DEV_EVERY])
    else:
        dev = tuple(d for d in others if d.id.startswith(f"Ses0{dev_session}"))
    train = tuple(dialogue for dialogue in others if dialogue not in dev)
    return replace(corpus, splits={"train": train, "dev": dev, "test": test})


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
    named = [label for labels in classes.values() for label in labels]
    for label in named:
        if label not in corpus.labels:
            raise ConfigError(
                f"classes: {corpus.name} has no label '{label}'; "
                f"choose from {', '.join(corpus.labels)}"
            )
        if (times := named.count(label)) > 1:
            raise ConfigError(f"classes: '{label}' is named {times} times; leave it in one class")


def _relabel(dialogue: Dialogue, class_of: Mapping[str, str]) -> Dialogue:
    relabelled = (
        replace(
            one,
            label=class_of.get(one.label or ""),
            votes=tuple(tuple(class_of.get(name, name) for name in vote) for vote in one.votes),
        )
        for one in dialogue.utterances
    )
    return replace(dialogue, utterances=tuple(relabelled))
