"""Promises of audformat databases: strangers' are read as data, and never run."""

import csv
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_hbaf.corpora.exchange import export_audformat, import_audformat, import_audiofolder
from stream_hbaf.errors import CorpusError, StreamHbafError
from stream_hbaf.sessions.format import FlacWriter

HEADER = """
name: strangers
source: ""
usage: unrestricted
splits:
  half: {type: dev}
tables:
  emotion:
    type: segmented
    split_id: half
    columns:
      emotion: {}
      speaker: {}
"""
TABLE = """file,start,end,emotion,speaker
media/one.flac,0 days,0 days 00:00:01.500000,joy,Ann
media/one.flac,0 days 00:01:02.250000,NaT,,Ben
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database of one recording with two segments."""
    folder = tmp_path / "database"
    (folder / "media").mkdir(parents=True)
    with FlacWriter(folder / "media" / "one.flac"):
        pass
    (folder / "db.yaml").write_text(HEADER, encoding="utf-8")
    (folder / "db.emotion.csv").write_text(TABLE, encoding="utf-8")
    return folder


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_segments_become_rows(database: Path, tmp_path: Path) -> None:
    """Files, times, labels, speakers and the split of the table."""
    assert import_audformat(database, tmp_path / "own.csv") == 2
    first, second = rows_of(tmp_path / "own.csv")
    audio = str(database / "media" / "one.flac")
    assert (first["audio"], first["start"], first["end"]) == (audio, "", "1.5")
    assert (second["audio"], second["start"], second["end"]) == (audio, "62.25", "")
    assert [first["label"], second["label"]] == ["joy", ""]
    assert [first["speaker"], second["speaker"]] == ["Ann", "Ben"]
    assert [first["id"], second["id"]] == ["media/one.flac", "media/one.flac@62.25"]
    assert {row["split"] for row in (first, second)} == {"dev"}


def test_what_the_library_writes_is_read(database: Path, tmp_path: Path) -> None:
    """The library is the reference: its header, its times, its empty cells."""
    import audformat  # type: ignore[import-untyped]
    import pandas as pd  # type: ignore[import-untyped]

    made = audformat.Database("made", languages=["eng"], description="Of the library")
    made.schemes["emotion"] = audformat.Scheme("str", labels={"joy": {"meaning": "glad"}})
    made.splits["test"] = audformat.Split("test")
    index = audformat.segmented_index(
        ["media/one.flac"] * 2, pd.to_timedelta([0, 90_061.5], unit="s"), [pd.NaT, pd.NaT]
    )
    made["labels"] = audformat.Table(index, split_id="test")
    made["labels"]["emotion"] = audformat.Column(scheme_id="emotion")
    made["labels"]["emotion"].set(["joy", None])
    made.save(str(database), storage_format="csv")
    assert import_audformat(database, tmp_path / "own.csv") == 2
    first, second = rows_of(tmp_path / "own.csv")
    assert [first["label"], first["start"], first["split"]] == ["joy", "", "test"]
    assert [second["label"], second["start"], second["end"]] == ["", "90061.5", ""]


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("tag", ["object/apply:os.system", "name:os.system", "module:os"])
def test_header_with_python_objects_is_refused(database: Path, tmp_path: Path, tag: str) -> None:
    """One line says why, and nothing runs."""
    harm = tmp_path / "harm"
    header = database / "db.yaml"
    argument = f" ['touch {harm}']" if "apply" in tag else " ''"
    header.write_text(f"{HEADER}\nattack: !!python/{tag}{argument}\n", encoding="utf-8")
    with pytest.raises(CorpusError) as raised:
        import_audformat(database, tmp_path / "own.csv")
    message = str(raised.value)
    assert message.startswith(
        f"{header}: can't be read as plain data (line 15: could not determine"
    )
    assert f"python/{tag}" in message
    assert "\n" not in message
    assert not harm.exists()
    if "apply" in tag:  # the attack is a real one
        yaml.load(header.read_text(), Loader=yaml.UnsafeLoader)
        assert harm.exists()


def test_pickled_tables_are_never_opened(database: Path, tmp_path: Path) -> None:
    """Beside a CSV one is ignored, though newer; alone it is refused in one line."""
    harm = tmp_path / "harm"
    attack = pickle.dumps(Malicious(f"touch {harm}"))
    (database / "db.emotion.pkl").write_bytes(attack)
    assert import_audformat(database, tmp_path / "own.csv") == 2
    (database / "db.emotion.csv").unlink()
    with pytest.raises(CorpusError) as raised:
        import_audformat(database, tmp_path / "own.csv")
    assert str(raised.value) == (
        f"{database}/db.emotion.csv: the table is only as .pkl, which isn't read; "
        "save the database with storage_format='csv'"
    )
    assert not harm.exists()
    pickle.loads(attack)  # the attack is a real one
    assert harm.exists()


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("a: &a {b: 1}\nc: {<<: *a}\n", r"\(mappings are merged with <<\)"),
        ("[" * 5000, r"\(it is nested too deeply\)"),
        ("- one\n", r"\(it isn't a mapping\)"),
        ("tables: [emotion]\n", r"\('tables' isn't a mapping from names\)"),
        ("tables: {1: {}}\n", r"\('tables' isn't a mapping from names\)"),
        ("tables: {a: {columns: 3}}\n", r"\('columns' isn't a mapping from names\)"),
        ("a: [\n", r"\(line 2: expected the node content"),
        ("date: 2026-99-99\n", r"\(month must be in 1\.\.12"),
        ("tables: {}\n", r"none of the tables \(there are none\) has a column emotion or"),
        ("tables: {../x: {columns: {emotion: {}}}}\n", r"x\.csv: the table is missing; save"),
        ("#" * (1 << 20) + "#\n", r"1\.0 MB, and at most 1 MB are read; divide the database"),
    ],
)
def test_headers_that_are_refused(
    database: Path, tmp_path: Path, header: str, complaint: str
) -> None:
    """In one line, whatever they hold."""
    (database / "db.yaml").write_text(header, encoding="utf-8")
    with pytest.raises(CorpusError, match=complaint) as raised:
        import_audformat(database, tmp_path / "own.csv")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("media/two.flac,0 days,,joy,Ann", r"csv:2: .*two\.flac is missing; get the database's"),
        ("media/one.flac,soon,,joy,Ann", r"csv:2: 'soon' isn't a time such as 0 days 00:00:01\.5"),
        ("media/one.flac,-1 days +23:59:59,,joy,Ann", r"csv:2: '-1 days \+23:59:59' isn't a time"),
        ("media/one.flac,,joy,Ann", r"csv:2: 4 cells instead of 5"),
    ],
)
def test_rows_that_are_refused(database: Path, tmp_path: Path, row: str, complaint: str) -> None:
    """With file and line."""
    (database / "db.emotion.csv").write_text(f"file,start,end,emotion,speaker\n{row}\n")
    with pytest.raises(CorpusError, match=complaint):
        import_audformat(database, tmp_path / "own.csv")


def test_tables_have_a_limit(database: Path, tmp_path: Path) -> None:
    """A table that would fill the memory isn't read."""
    with (database / "db.emotion.csv").open("ab") as file:
        file.truncate(65 << 20)
    with pytest.raises(CorpusError, match=r"65\.0 MB, and at most 64 MB are read"):
        import_audformat(database, tmp_path / "own.csv")


def test_without_the_library(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Import doesn't need it; export names the extra in one line, before anything is written."""
    monkeypatch.setitem(sys.modules, "audformat", None)
    assert import_audformat(database, tmp_path / "own.csv") == 2
    with pytest.raises(StreamHbafError, match=r"pip install 'stream-hbaf\[audformat\]', or choose"):
        export_audformat(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CorpusError, match=r"no clips; an AudioFolder holds metadata\.csv"):
        import_audiofolder(tmp_path / "own.csv", tmp_path / "other.csv")
