"""Promises of choosing from a corpus: merged classes, and IEMOCAP's sessions held out in turn."""

from pathlib import Path

import pytest

from stream_hbaf.corpora.dialogue import (
    LABELS,
    SPLITS,
    Corpus,
    Dialogue,
    LabelledUtterance,
)
from stream_hbaf.corpora.iemocap import IEMOCAP_LABELS, split_of
from stream_hbaf.corpora.open_corpus import select
from stream_hbaf.errors import ConfigError, CorpusError

FOUR = {
    "sad": ["sadness"],
    "angry": ["anger"],
    "happy": ["happiness", "excitement"],
    "neutral": ["neutral"],
}


def make_dialogue(name: str, *labels: str | None) -> Dialogue:
    utterances = (
        LabelledUtterance(f"{name}_{n}", "Mary", f"words {n}", label, Path(f"{name}_{n}.wav"))
        for n, label in enumerate(labels)
    )
    return Dialogue(name, tuple(utterances))


def make_iemocap() -> Corpus:
    """Twelve dialogues of each of the five sessions, in the published splits."""
    names = [
        f"Ses0{session}{speaker}_impro{n:02d}"
        for session in range(1, 6)
        for speaker in "MF"
        for n in range(1, 7)
    ]
    dialogues = [make_dialogue(name, *IEMOCAP_LABELS, None) for name in names]
    splits = {s: tuple(d for d in dialogues if split_of(d.id) == s) for s in SPLITS}
    return Corpus("iemocap", IEMOCAP_LABELS, splits)


def make_clips() -> Corpus:
    """Acted clips, each a dialogue of its own: one of every label in every split."""
    clips = tuple(make_dialogue(label, label) for label in LABELS)
    return Corpus("ravdess", LABELS, dict.fromkeys(SPLITS, clips))


def labels_in(dialogue: Dialogue) -> list[str | None]:
    return [one.label for one in dialogue.utterances]


def test_nothing_chosen_is_the_corpus_itself() -> None:
    """Without classes and fold nothing changes."""
    corpus = make_iemocap()
    assert select(corpus) is corpus


def test_classes_are_merged_in_alphabetical_order() -> None:
    """Happy is both happiness and excitement; frustration is context; nothing else changes."""
    corpus = make_iemocap()
    chosen = select(corpus, classes=FOUR)
    assert chosen.labels == ("angry", "happy", "neutral", "sad")
    assert [len(chosen.splits[split]) for split in SPLITS] == [
        len(corpus.splits[split]) for split in SPLITS
    ]
    before, after = corpus.splits["test"][3], chosen.splits["test"][3]
    assert labels_in(before) == [*IEMOCAP_LABELS, None]
    assert labels_in(after) == ["angry", "happy", None, "happy", "neutral", "sad", None]
    assert [(u.id, u.text, u.audio) for u in after.utterances] == [
        (u.id, u.text, u.audio) for u in before.utterances
    ]


def test_clips_of_no_class_are_left_out() -> None:
    """A dialogue of one utterance without a class has nothing to teach and no context to give."""
    classes = {"angry": ["anger"], "happy": ["joy"], "neutral": ["neutral"], "sad": ["sadness"]}
    chosen = select(make_clips(), classes=classes)
    for split in SPLITS:
        assert [labels_in(d) for d in chosen.splits[split]] == [
            ["angry"],
            ["happy"],
            ["neutral"],
            ["sad"],
        ]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"angry": ["rage"]}, r"^classes: iemocap has no label 'rage'; choose from anger, exc"),
        (
            {"angry": ["anger"], "bad": ["anger", "sadness"]},
            r"^classes: 'anger' is named 2 times; leave it in one class$",
        ),
        ({"angry": ["anger", "anger"]}, r"^classes: 'anger' is named 2 times"),
        ({"angry": ["anger"], "sad": []}, r"^classes: 'sad' has no labels"),
    ],
)
def test_classes_that_cannot_be(classes: dict[str, list[str]], message: str) -> None:
    """A label that isn't the corpus's, one in two classes, a class of nothing: each in words."""
    with pytest.raises(ConfigError, match=message):
        select(make_iemocap(), classes=classes)


def test_a_split_without_any_class_is_refused() -> None:
    """What can't be trained or evaluated on is refused before hours of work."""
    clips = make_clips()
    happy = tuple(d for d in clips.splits["dev"] if d.id == "joy")
    corpus = Corpus("mine", LABELS, {**clips.splits, "dev": happy})
    with pytest.raises(CorpusError, match=r"^mine: no labelled utterance is left in dev; choose"):
        select(corpus, classes={"angry": ["anger"], "sad": ["sadness"]})
    empty = Corpus("tess", LABELS, {**clips.splits, "dev": (), "test": ()})
    assert select(empty, classes={"sad": ["sadness"]}).splits["test"] == ()


@pytest.mark.parametrize("session", range(1, 6))
def test_each_fold_tests_on_its_own_session(session: int) -> None:
    """Test is the session whole; no dialogue is lost, doubled, or in two splits."""
    corpus = make_iemocap()
    chosen = select(corpus, fold=session)
    names = {split: [d.id for d in chosen.splits[split]] for split in SPLITS}
    assert {name[:5] for name in names["test"]} == {f"Ses0{session}"}
    assert [len(names[split]) for split in SPLITS] == [43, 5, 12]
    everything = sorted(name for split in SPLITS for name in names[split])
    assert everything == sorted(d.id for split in SPLITS for d in corpus.splits[split])


def test_dev_of_a_fold_is_every_tenth_dialogue() -> None:
    """By name, whatever the published splits were: all four other sessions are in dev."""
    dev = select(make_iemocap(), fold=2).splits["dev"]
    assert [d.id for d in dev] == [
        "Ses01F_impro01",
        "Ses01M_impro05",
        "Ses03M_impro03",
        "Ses04M_impro01",
        "Ses05F_impro05",
    ]


@pytest.mark.parametrize("session", range(1, 5))
def test_a_session_may_be_dev(session: int) -> None:
    """Leaving one session out to select by: its speakers are in no other split, test stays."""
    corpus = make_iemocap()
    chosen = select(corpus, dev_fold=session)
    sessions = {split: {d.id[:5] for d in chosen.splits[split]} for split in SPLITS}
    assert sessions["dev"] == {f"Ses0{session}"}
    assert sessions["train"] == {f"Ses0{n}" for n in range(1, 5) if n != session}
    assert set(chosen.splits["test"]) == set(corpus.splits["test"])
    both = select(corpus, fold=1, dev_fold=5).splits
    assert {d.id[:5] for d in both["train"]} == {"Ses02", "Ses03", "Ses04"}
    assert [d.id[:5] for split in SPLITS[1:] for d in both[split]] == ["Ses05"] * 12 + [
        "Ses01"
    ] * 12


def test_a_fold_without_a_class_is_refused() -> None:
    """What a network can't learn, or can't be scored on, is refused before hours of work."""
    corpus = make_iemocap()
    no_anger = {
        split: tuple(
            make_dialogue(d.id, *(IEMOCAP_LABELS[1:] if d.id < "Ses02" else IEMOCAP_LABELS))
            for d in dialogues
        )
        for split, dialogues in corpus.splits.items()
    }
    with pytest.raises(CorpusError, match=r"^iemocap: no utterance of 'anger' is left in dev; cho"):
        select(Corpus("iemocap", IEMOCAP_LABELS, no_anger), dev_fold=1)


def test_classes_and_fold_together() -> None:
    """The paper's way of testing: one session, four classes."""
    chosen = select(make_iemocap(), classes=FOUR, fold=1)
    assert chosen.labels == ("angry", "happy", "neutral", "sad")
    assert chosen.splits["test"][0].id == "Ses01F_impro01"
    assert set(labels_in(chosen.splits["test"][0])) == {*FOUR, None}


def test_folds_that_cannot_be() -> None:
    """A session that IEMOCAP doesn't have, and a corpus without sessions."""
    with pytest.raises(ConfigError, match=r"^fold: 6 is no session of iemocap; choose 1 to 5$"):
        select(make_iemocap(), fold=6)
    with pytest.raises(ConfigError, match=r"^dev_fold: session 5 is the test split; choose anothe"):
        select(make_iemocap(), dev_fold=5)
    with pytest.raises(ConfigError, match=r"^dev_fold: 6 is no session of iemocap; choose 1 to 5$"):
        select(make_iemocap(), dev_fold=6)
    with pytest.raises(ConfigError, match=r"^fold: ravdess has no sessions, only iemocap has"):
        select(make_clips(), fold=1)
