"""Promises of the manifest: people's own recordings, or an error with its file and line."""

from pathlib import Path

import pytest

from stream_hbaf.corpora.dialogue import Dialogue, LabelledUtterance
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import CorpusError

HEADER = "dialogue,id,speaker,text,label,split,audio,start,end"
GOOD = (
    'visit1,a,Anna,"Well, hello.",joy,train,one.wav,0.4,1.85',
    "visit1,b,Ben,Oh no.,sadness,train,one.wav,1.5,3",
    "visit2,c,Anna,Hm.,,dev,,,",
    "visit2,d,Ben,Fine.,joy,dev,,,",
    "visit3,e,Anna,Bye.,sadness,test,,,",
)


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    (folder / "one.wav").touch()
    (folder / "own.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return folder / "own.csv"


def test_manifest_reads_all_splits(tmp_path: Path) -> None:
    """Rows become dialogues in their order, with audio, times, and the train rows' labels."""
    corpus = open_corpus(str(write(tmp_path, *GOOD)), tmp_path)
    audio = tmp_path / "one.wav"
    assert corpus.labels == ("joy", "sadness")
    assert corpus.splits["train"] == (
        Dialogue(
            "visit1",
            (
                LabelledUtterance(
                    "a", "Anna", "Well, hello.", "joy", audio, start_s=0.4, end_s=1.85
                ),
                LabelledUtterance("b", "Ben", "Oh no.", "sadness", audio, start_s=1.5, end_s=3.0),
            ),
        ),
    )
    assert [one.label for one in corpus.splits["dev"][0].utterances] == [None, "joy"]
    assert corpus.splits["test"][0].utterances[0].audio is None


def test_manifest_needs_no_optional_column(tmp_path: Path) -> None:
    """Words alone are a corpus too."""
    rows = [row.rsplit(",", 3)[0] for row in GOOD]
    path = write(tmp_path, *rows, header="dialogue,id,speaker,text,label,split")
    first = open_corpus("own.csv", path.parent).splits["train"][0].utterances[0]
    assert first == LabelledUtterance("a", "Anna", "Well, hello.", "joy")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("visit1,z,Ben,Hm.,joy,train,two.wav,,", r"two\.wav is missing; correct the path"),
        ("visit1,z,Ben,Hm.,joy,dev,,,", "dialogue 'visit1' is in dev here but in train at"),
        ("visit4,z,Ben,Hm.,bored,dev,,,", "unknown label 'bored'; the train rows have joy, sad"),
        ("visit4,a,Ben,Hm.,joy,dev,,,", r"id 'a' stands already at .*own\.csv:2"),
        ("visit1,z,Ben,Hm.,joy,train,one.wav,0.9,2", r"starts at 0\.9 s, before 1\.5 s at .*csv:3"),
        ("visit4,z,Ben,Hm.,joy,train,one.wav,2,1.5", r"end 1\.5 s isn't after start 2 s"),
        ("visit4,z,Ben,Hm.,joy,train,one.wav,soon,", "start is 'soon', not a time in seconds"),
        ("visit4,z,Ben,Hm.,joy,train,one.wav,-1,", "start is '-1', not a time in seconds"),
        ("visit4,z,Ben,Hm.,joy,train,one.wav,nan,", "start is 'nan', not a time in seconds"),
        ("visit4,z,Ben,Hm.,joy,valid,,,", "split 'valid' isn't one of train, dev, test"),
        (",z,Ben,Hm.,joy,train,,,", "dialogue is empty; fill it in"),
        ("visit4,z,Ben,,joy,train,,,", "neither text nor audio"),
        ("visit4,z,Ben,Hm,joy,train,", "7 cells instead of 9"),
        ('visit4,z,Ben,"Hm,joy,train,,,', "not a comma-separated line"),
    ],
)
def test_manifest_names_the_line_it_cannot_read(tmp_path: Path, row: str, complaint: str) -> None:
    """A broken line ends in one error with its file and line."""
    path = write(tmp_path, *GOOD, row)
    with pytest.raises(CorpusError, match=rf"own\.csv:7: .*{complaint}"):
        open_corpus("own.csv", path.parent)


def test_manifest_names_the_line_where_a_quote_opens(tmp_path: Path) -> None:
    """A quote that never closes is sought where it opens, not at the table's end."""
    path = write(tmp_path, GOOD[0], 'visit1,z,Ben,"Hm,joy,train,,,', *GOOD[2:])
    with pytest.raises(CorpusError, match=r"own\.csv:3: not a comma-separated line"):
        open_corpus("own.csv", path.parent)


def test_manifest_in_another_encoding_names_line_and_byte(tmp_path: Path) -> None:
    """A table that a spreadsheet saved as Windows-1252 is refused where that shows."""
    path = write(tmp_path, *GOOD)
    path.write_bytes(path.read_bytes() + "visit1,z,Zoé,Hm.,joy,train,,,".encode("cp1252"))
    complaint = r"own\.csv:7: byte 12 of the line, 0xe9, isn't UTF-8; save the table in UTF-8"
    with pytest.raises(CorpusError, match=complaint):
        open_corpus("own.csv", path.parent)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (HEADER.replace("speaker", "who"), "column 'speaker' is missing"),
        (HEADER.replace(",", ";"), "column 'dialogue' is missing; .*with commas between"),
        (HEADER.replace("audio", "Audio"), "unknown column 'Audio'; rename or remove it"),
    ],
)
def test_manifest_names_the_column_it_does_not_know(
    tmp_path: Path, header: str, complaint: str
) -> None:
    """A column that is missing or misspelt is named with the table's first line."""
    with pytest.raises(CorpusError, match=rf"own\.csv:1: {complaint}"):
        open_corpus(str(write(tmp_path, *GOOD, header=header)), tmp_path)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ((), "no rows"),
        (GOOD[:2], "dev split is empty"),
        (GOOD[:1] + GOOD[2:], "the train rows hold 1 labels; at least two needed"),
        ((*GOOD[:3], GOOD[4]), "dev split has no labelled utterance"),
    ],
)
def test_manifest_without_enough_rows_is_refused(
    tmp_path: Path, rows: list[str], complaint: str
) -> None:
    """What can't be trained and measured on is refused before anything starts."""
    with pytest.raises(CorpusError, match=rf"own\.csv: .*{complaint}"):
        open_corpus(str(write(tmp_path, *rows)), tmp_path)


def test_manifest_lets_speakers_talk_at_once(tmp_path: Path) -> None:
    """Turns may overlap, and every recording has a clock of its own."""
    (tmp_path / "two.wav").touch()
    rows = (*GOOD, "visit1,z,Anna,And?,joy,train,two.wav,0.1,0.9")
    turns = open_corpus(str(write(tmp_path, *rows)), tmp_path).splits["train"][0].utterances
    assert [(turn.start_s, turn.end_s) for turn in turns] == [(0.4, 1.85), (1.5, 3.0), (0.1, 0.9)]


def test_manifest_missing_says_what_was_expected_where(tmp_path: Path) -> None:
    """The message holds the path that was looked for."""
    with pytest.raises(CorpusError, match=rf"{tmp_path}/none\.csv is missing"):
        open_corpus("none.csv", tmp_path)


def test_manifest_for_evaluation_needs_a_label_and_a_clip(tmp_path: Path) -> None:
    """With a bundle's labels: no train rows, no other column, and its labels are the corpus's."""
    path = write(tmp_path, "one.wav,joy", "one.wav,", header="audio,label")
    corpus = open_corpus(str(path), tmp_path, all_splits=False, labels=("joy", "anger", "fear"))
    audio = tmp_path / "one.wav"
    assert corpus.labels == ("anger", "fear", "joy")
    assert corpus.splits == {
        "train": (),
        "dev": (),
        "test": (
            Dialogue("line 2", (LabelledUtterance("line 2", "speaker", "", "joy", audio),)),
            Dialogue("line 3", (LabelledUtterance("line 3", "speaker", "", None, audio),)),
        ),
    }


def test_manifest_for_evaluation_keeps_the_columns_that_are_there(tmp_path: Path) -> None:
    """Dialogues, ids, speakers, words and splits count where the table has them."""
    labels = ("joy", "sadness", "anger")
    corpus = open_corpus(str(write(tmp_path, *GOOD)), tmp_path, all_splits=False, labels=labels)
    assert corpus.splits == open_corpus("own.csv", tmp_path).splits


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("one.wav,bored", r"own\.csv:3: unknown label 'bored'; the bundle has fear, joy"),
        (f"one.wav,{'x' * 999}", "unknown label 'x{79}…'; the bundle has fear, joy"),
        ("one.wav,\x1b[31m", "unknown label '\N{REPLACEMENT CHARACTER}"),
        (",joy", r"own\.csv:3: neither text nor audio; fill in one or remove the line"),
        ("two.wav,joy", r"own\.csv:3: .*two\.wav is missing; correct the path"),
    ],
)
def test_manifest_for_evaluation_names_the_line_it_cannot_use(
    tmp_path: Path, row: str, complaint: str
) -> None:
    """An unknown label and a clip that isn't there end in one line with file and line number."""
    path = write(tmp_path, "one.wav,joy", row, header="audio,label")
    with pytest.raises(CorpusError, match=complaint):
        open_corpus(str(path), tmp_path, all_splits=False, labels=("joy", "fear"))
    with pytest.raises(CorpusError, match=r"own\.csv:1: column 'label' is missing"):
        open_corpus(
            str(write(tmp_path, "one.wav", header="audio")),
            tmp_path,
            all_splits=False,
            labels=("joy",),
        )
