"""Promises of the corpus readers: what was annotated, in order, or an error with its place."""

import csv
from pathlib import Path

import pytest

from stream_hbaf.corpora.acted import RAVDESS_ACTORS, read_ravdess
from stream_hbaf.corpora.commonsense import (
    CommonsenseEvent,
    in_first_person,
    read_atomic,
    read_event2mind,
)
from stream_hbaf.corpora.dialogue import Split, normalise_text
from stream_hbaf.corpora.published import read_meld
from stream_hbaf.errors import CorpusError

HEADER = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"]


def write_meld(folder: Path, *rows: list[str], encoding: str = "utf-8") -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "train_sent_emo.csv").open("w", encoding=encoding, newline="") as out:
        csv.writer(out).writerows([HEADER, *rows])
    return folder


def test_meld_reads_dialogues_in_spoken_order(tmp_path: Path) -> None:
    """Utterances come in the order in which they were spoken, whatever the file's order."""
    folder = write_meld(
        tmp_path / "meld",
        ["2", "Second.", "Joey", "joy", "positive", "0", "1"],
        ["1", "First, she said.", "Monica", "neutral", "neutral", "0", "0"],
        ["3", "Alone.", "Ross", "Sadness", "negative", "7", "0"],
    )
    first, second = read_meld(folder, "train")
    assert [(u.speaker, u.text, u.label) for u in first.utterances] == [
        ("Monica", "First, she said.", "neutral"),
        ("Joey", "Second.", "joy"),
    ]
    assert (second.id, second.utterances[0].label) == ("train/dia7", "sadness")


@pytest.mark.parametrize("written", ["You\x92re here\x85", "You’re here…", "You're here..."])
def test_meld_repairs_punctuation(written: str) -> None:
    """However an apostrophe was encoded it becomes the one that Whisper writes."""
    assert normalise_text(written) == "You're here..."


def test_meld_reads_a_file_in_windows_encoding(tmp_path: Path) -> None:
    """A file that isn't UTF-8 is read all the same."""
    row = ["1", "You’re here", "Joey", "joy", "positive", "0", "0"]
    folder = write_meld(tmp_path / "meld", row, encoding="cp1252")
    assert read_meld(folder, "train")[0].utterances[0].text == "You're here"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (["2", "Oh.", "Joey", "bored", "neutral", "0", "1"], "unknown emotion 'bored'"),
        (["2", "Oh.", "Joey", "joy", "neutral", "zero", "1"], "must be numbers"),
        (["2", "Oh.", "Joey", "joy", "neutral", "0", "0"], "stands here twice"),
        (["2", "Oh.", "Joey"], "3 cells instead of 7"),
    ],
)
def test_meld_names_the_line_it_cannot_read(tmp_path: Path, row: list[str], complaint: str) -> None:
    """A broken line ends in one error with its file and line."""
    good = ["1", "Hi.", "Joey", "joy", "positive", "0", "0"]
    folder = write_meld(tmp_path / "meld", good, row)
    with pytest.raises(CorpusError, match=rf"train_sent_emo\.csv:3: .*{complaint}"):
        read_meld(folder, "train")


def test_meld_missing_says_what_was_expected_where(tmp_path: Path) -> None:
    """The message holds the path that was looked for."""
    with pytest.raises(CorpusError, match=rf"{tmp_path}/dev_sent_emo\.csv is missing"):
        read_meld(tmp_path, "dev")


def make_actors(folder: Path, split: Split, *names: str) -> Path:
    for actor in RAVDESS_ACTORS[split]:
        place = folder / f"Actor_{actor:02d}"
        place.mkdir(parents=True)
        for name in names:
            (place / f"{name}-{actor:02d}.flac").touch()
    return folder


def test_ravdess_reads_the_file_name(tmp_path: Path) -> None:
    """Emotion, statement and actor come from the name; calm counts as neutral."""
    folder = make_actors(tmp_path, "dev", "03-01-02-01-01-01", "03-01-05-02-02-01")
    calm, angry, *others = [d.utterances[0] for d in read_ravdess(folder, "dev")]
    assert (calm.label, calm.text) == ("neutral", "Kids are talking by the door.")
    assert (angry.label, angry.text) == ("anger", "Dogs are sitting by the door.")
    assert (angry.speaker, others[0].speaker) == ("Actor_19", "Actor_20")
    assert angry.audio == folder / "Actor_19" / "03-01-05-02-02-01-19.flac"
    assert (angry.strong, calm.strong) == (True, None)


def test_ravdess_splits_share_no_actor() -> None:
    """24 actors, each in one split: a voice that was trained on is never tested."""
    actors = [actor for split in RAVDESS_ACTORS.values() for actor in split]
    assert sorted(actors) == list(range(1, 25))


def test_ravdess_refuses_a_foreign_file(tmp_path: Path) -> None:
    """A file whose name isn't RAVDESS's is named."""
    folder = make_actors(tmp_path, "dev", "03-01-09-01-01-01")
    with pytest.raises(CorpusError, match=r"03-01-09-01-01-01-19\.flac"):
        read_ravdess(folder, "dev")


def test_ravdess_missing_says_what_was_expected_where(tmp_path: Path) -> None:
    """The message holds the folder that was looked for, and what belongs there."""
    with pytest.raises(CorpusError, match=r"Actor_21 is missing; it should hold"):
        read_ravdess(tmp_path, "test")


def write_events(folder: Path, *rows: list[str]) -> Path:
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as out:
        header = ["Source", "Event", "Xintent", "Xemotion", "Otheremotion", "Xsent", "Osent"]
        csv.writer(out).writerows([header, *rows])
    return folder


def test_event2mind_reads_phrases_by_relation(tmp_path: Path) -> None:
    """Each column's phrases stand under our relation; 'none' is no phrase."""
    row = ["x", "PersonX hugs PersonY", '["to be nice."]', '["Happy", "loved"]', '["none"]', "", ""]
    (event,) = read_event2mind(write_events(tmp_path, row), "train")
    assert event.text == "I hugs them"
    assert (event.purpose, event.internal, event.external) == (
        ("to be nice",),
        ("happy", "loved"),
        (),
    )


def test_event2mind_speaks_in_the_first_person() -> None:
    """The event reads as its person would say it, as utterances do."""
    assert in_first_person("PersonX finds PersonX's ___ in PersonY's car") == (
        "I finds my something in their car"
    )


def test_event2mind_names_the_line_it_cannot_read(tmp_path: Path) -> None:
    """A cell that isn't a list ends in one error with its file and line."""
    folder = write_events(tmp_path, ["x", "It rains", "happy", "[]", "[]", "", ""])
    with pytest.raises(CorpusError, match=r"train\.csv:2: 'happy' isn't a list"):
        read_event2mind(folder, "train")


def test_event2mind_in_another_encoding_names_line_and_byte(tmp_path: Path) -> None:
    """A file that isn't UTF-8 is refused where that shows."""
    folder = write_events(tmp_path, ["x", "It rains", "[]", "[]", "[]", "", ""])
    with (folder / "train.csv").open("ab") as out:
        out.write(b"x,caf\xe9,[],[],[],,\r\n")
    with pytest.raises(CorpusError, match=r"train\.csv:3: byte 6 of the line, 0xe9, isn't UTF-8"):
        read_event2mind(folder, "train")


def write_atomic(folder: Path, name: str, *rows: list[str]) -> Path:
    with (folder / name).open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["event", "oReact", "xIntent", "xReact", "split"], *rows])
    return folder


def test_atomic_gathers_an_events_rows(tmp_path: Path) -> None:
    """An event comes once, in the first person, with all that annotators inferred, in order."""
    folder = write_atomic(
        tmp_path,
        "v4_atomic_tst.csv",
        ["PersonX hugs PersonY", '["Loved."]', "[]", '["happy"]', "tst"],
        ["PersonX waits", "[]", "[]", '["none"]', "tst"],
        ["PersonX hugs PersonY", '["none"]', '["to comfort"]', '["happy", "warm"]', "tst"],
    )
    assert read_atomic(folder, "test") == [
        CommonsenseEvent(
            "I hugs them",
            external=("loved",),
            internal=("happy", "happy", "warm"),
            purpose=("to comfort",),
        )
    ]


def test_atomic_without_its_train_file_trains_on_dev(tmp_path: Path) -> None:
    """What can be had is used: dev trains, unless the train file is there too."""
    write_atomic(tmp_path, "v4_atomic_dev.csv", ["PersonX runs", "[]", "[]", '["free"]', "dev"])
    assert [event.text for event in read_atomic(tmp_path, "train")] == ["I runs"]
    assert read_atomic(tmp_path, "dev") == []
    write_atomic(tmp_path, "v4_atomic_trn.csv", ["PersonX eats", "[]", "[]", '["full"]', "trn"])
    assert [event.text for event in read_atomic(tmp_path, "train")] == ["I eats"]
    assert [event.text for event in read_atomic(tmp_path, "dev")] == ["I runs"]
