"""Promises of sessions as corpora: corrections are labels, and what goes out comes in again."""

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from damages import as_text, change, damage
from full_disk import full_disk
from numpy.typing import NDArray
from tiny_encoder import save_tiny_bert

from stream_hbaf.audio.file import read_audio
from stream_hbaf.audio.source import Chunk
from stream_hbaf.bundle import Bundle
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, LabelledUtterance
from stream_hbaf.corpora.exchange import (
    export_audformat,
    export_audiofolder,
    import_audformat,
    import_audiofolder,
)
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.corpora.session_corpus import (
    dialogues_of,
    export_manifest,
    import_corrections,
    split_by_time,
)
from stream_hbaf.errors import ConfigError, CorpusError, StreamHbafError
from stream_hbaf.evaluation.offline import predict_corpus
from stream_hbaf.events import Emotion, Feedback, Model, Utterance
from stream_hbaf.sessions.format import FlacWriter, Header
from stream_hbaf.sessions.session import open_sessions
from stream_hbaf.sessions.writer import SessionWriter
from stream_hbaf.training.train import train

Samples = NDArray[np.int16]

RECORDING = Path(__file__).parent / "recordings" / "jfk.flac"
LABELS = ("anger", "joy", "neutral")
SECOND = 16_000
FIRST = 1000  # the number of the first sample that was heard


@pytest.fixture(scope="module")
def speech() -> Samples:
    """Eleven seconds of a speech."""
    return read_audio(RECORDING)


def end(dialogue: str, turn: int, *, start_s: float, text: str) -> Utterance:
    return Utterance(
        id=f"{dialogue}-{turn}",
        rev=2,
        type="end",
        source="kitchen",
        dialogue_id=dialogue,
        turn=turn,
        speaker="Ann" if turn % 2 else "",
        start_time="2026-01-01T12:00:01.000+00:00",
        audio_start_ms=start_s * 1000,
        audio_end_ms=start_s * 1000 + 1000,
        text=text,
        emotion=Emotion(label="neutral", probabilities={"neutral": 1.0}),
        model=Model(id="live-en", sha256="ab"),
    )


def record(folder: Path, speech: Samples, *, dialogues: int, corrected: dict[str, str]) -> Path:
    """A session of two utterances, each of a second, in each of so many dialogues."""
    header = Header(
        id="20260101T120000Z-abcdef",
        began="2026-01-01T12:00:00.000+00:00",
        model=Model(id="live-en", sha256="ab"),
        labels=LABELS,
        settings={},
        versions={},
    )
    writer = SessionWriter(folder, header=header)
    writer.write_audio("kitchen", Chunk(FIRST, speech, time.monotonic()))
    for number in range(dialogues):
        for turn in (1, 2):
            start_s = FIRST / SECOND + 2 * number + turn - 1
            text = f"I am so happy {number}, {turn}"
            writer.write_event(end(f"d{number}", turn, start_s=start_s, text=text))
    for name, label in corrected.items():
        writer.write_event(Feedback(id=name, label="anger", by="Ben"))
        writer.write_event(Feedback(id=name, label=label, by="Cas"))
    writer.close()
    return folder


CORRECTED = {"d0-1": "joy", "d1-1": "anger", "d1-2": "joy", "d3-2": "joy", "d4-1": "neutral"}


@pytest.fixture
def sessions(tmp_path: Path, speech: Samples) -> Path:
    """Five dialogues, in four of which an utterance was corrected."""
    return record(tmp_path / "sessions", speech, dialogues=5, corrected=CORRECTED)


def audio_of(utterance: LabelledUtterance) -> Samples:
    assert utterance.audio is not None
    audio = read_audio(utterance.audio)
    end_s = len(audio) / SECOND if utterance.end_s is None else utterance.end_s
    return audio[round((utterance.start_s or 0.0) * SECOND) : round(end_s * SECOND)]


def expected_audio(speech: Samples, name: str) -> Samples:
    """The audio of an utterance, by its id."""
    number = 2 * int(name[1]) + int(name[3]) - 1
    return speech[number * SECOND : (number + 1) * SECOND]


def assert_same_corpus(found: Corpus, speech: Samples) -> None:
    """What every export of the sessions above must come back as."""
    turns = {s: [d.utterances for d in part] for s, part in found.splits.items()}
    ids = {
        split: [[utterance.id for utterance in one] for one in part]
        for split, part in turns.items()
    }
    assert ids["dev"] == [["d3-1", "d3-2"]]
    assert ids["test"] == [["d4-1", "d4-2"]]
    assert sorted(ids["train"]) == [["d0-1", "d0-2"], ["d1-1", "d1-2"], ["d2-1", "d2-2"]]
    for part in turns.values():
        for utterance in (utterance for one in part for utterance in one):
            assert utterance.label == CORRECTED.get(utterance.id)
            assert utterance.text == f"I am so happy {utterance.id[1]}, {utterance.id[3]}"
            assert utterance.speaker == ("Ann" if utterance.id.endswith("1") else "kitchen")
            assert np.array_equal(audio_of(utterance), expected_audio(speech, utterance.id))


def test_corrected_sessions_are_a_corpus(sessions: Path, speech: Samples) -> None:
    """Corrections are the labels, the latest counts; the newest dialogues are held out."""
    corpus = open_corpus(f"{sessions.name}/", sessions.parent)
    assert corpus.labels == LABELS
    assert [d.id for d in corpus.splits["train"]] == ["d0", "d1"]  # d2 wasn't corrected
    assert [d.id for d in corpus.splits["dev"]] == ["d3"]
    assert [d.id for d in corpus.splits["test"]] == ["d4"]
    utterance = corpus.splits["train"][1].utterances[1]
    assert (utterance.id, utterance.label, utterance.speaker) == ("d1-2", "joy", "kitchen")
    assert np.array_equal(audio_of(utterance), expected_audio(speech, "d1-2"))
    (session,) = open_sessions(sessions)
    assert open_corpus(str(session.folder), sessions) == corpus


def test_one_dialogue_is_cut_where_the_split_changes(tmp_path: Path, speech: Samples) -> None:
    """The first utterances are train, the last ones test; no utterance is in two splits."""
    corrected = {"d0-1": "joy", "d0-2": "anger", "d1-1": "joy"}
    folder = record(tmp_path, speech, dialogues=2, corrected=corrected)
    corpus = open_corpus(str(folder), tmp_path)
    found = {
        split: [(d.id, [utterance.id for utterance in d.utterances]) for d in part]
        for split, part in corpus.splits.items()
    }
    assert found == {
        "train": [("d0/train", ["d0-1"])],
        "dev": [("d0/dev", ["d0-2"])],
        "test": [("d1", ["d1-1", "d1-2"])],
    }


def test_split_keeps_shares_and_time() -> None:
    """Of forty dialogues six each are held out, and none of them is older than one that trains."""
    dialogues = [
        Dialogue(f"d{n}", (LabelledUtterance(f"d{n}-1", "Ann", "Hm.", "joy"),)) for n in range(40)
    ]
    parts = split_by_time(dialogues)
    assert [len(parts[split]) for split in ("train", "dev", "test")] == [28, 6, 6]
    assert [*parts["train"], *parts["dev"], *parts["test"]] == dialogues


def test_sessions_without_corrections_are_no_corpus(tmp_path: Path, speech: Samples) -> None:
    """A recogniser's own labels never pass for the truth."""
    folder = record(tmp_path / "sessions", speech, dialogues=3, corrected={})
    with pytest.raises(CorpusError, match="no recorded utterance has been corrected"):
        open_corpus(str(folder), tmp_path)
    with pytest.raises(ConfigError, match="or a folder of sessions"):
        open_corpus("nothing", tmp_path)


@pytest.mark.parametrize(
    ("export", "import_again"),
    [
        (export_manifest, None),
        (export_audformat, import_audformat),
        (export_audiofolder, import_audiofolder),
    ],
)
def test_export_comes_back_as_it_went(
    sessions: Path,
    speech: Samples,
    tmp_path: Path,
    export: Callable[[Path, Path], int],
    import_again: Callable[[Path, Path], int] | None,
) -> None:
    """Manifest, audformat, AudioFolder: the same clips, labels, speakers, words and splits."""
    out = tmp_path / "out"
    assert export(sessions, out) == 10
    table = out / "manifest.csv"
    if import_again is not None:
        table = tmp_path / "again.csv"
        assert import_again(out, table) == 10
    # A manifest's labels are those that are trained on.
    with table.open("a", encoding="utf-8") as rows:
        rows.write("d9,d9-1,Ann,Hm.,neutral,train,,,\n")
    found = open_corpus(str(table), tmp_path)
    assert found.labels == LABELS
    extra = found.splits["train"][-1]
    assert extra.id == "d9"
    splits = {**found.splits, "train": found.splits["train"][:-1]}
    assert_same_corpus(Corpus("manifest", found.labels, splits), speech)


@pytest.mark.parametrize("export", [export_manifest, export_audformat, export_audiofolder])
def test_exports_are_readable_by_their_owner_only(
    sessions: Path, tmp_path: Path, export: Callable[[Path, Path], int]
) -> None:
    """Tables and clips hold what people said."""
    export(sessions, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_one_damaged_session_is_left_out(
    sessions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named; the others are the corpus."""
    before = open_corpus("sessions/", sessions.parent)
    damaged = sessions / "20200101T000000Z-000000"
    damaged.mkdir()
    (damaged / "session.json").write_text('{"format":1,')
    assert open_corpus("sessions/", sessions.parent) == before
    assert f"session left out: {damaged}/session.json: isn't JSON" in caplog.text


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_session_keeps_no_other_from_being_exported(
    sessions: Path, speech: Samples, tmp_path: Path, seed: int
) -> None:
    """Wrong values and damaged bytes in any of its files."""
    more = record(tmp_path / "more", speech, dialogues=1, corrected={"d0-1": "joy"})
    (damaged,) = more.iterdir()
    shutil.move(damaged, sessions / "bad")
    path = sessions / "bad" / ("session.json", "events.jsonl", "kitchen.flac")[seed % 3]
    content = path.read_bytes()
    if seed % 3 == 1:
        rows = [json.loads(line) for line in content.splitlines()]
        path.write_bytes(b"".join(as_text(change(row, seed)) + b"\n" for row in rows))
    else:
        path.write_bytes(damage(content, seed))
    export_audiofolder(sessions, tmp_path / "out")
    clips = {clip.stem for clip in (tmp_path / "out").rglob("*.flac")}
    assert {f"d{n}-{turn}" for n in range(1, 5) for turn in (1, 2)} <= clips


def test_sound_that_cannot_be_decoded_is_left_out(
    sessions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named; its utterances keep their text."""
    (audio,) = sessions.glob("*/*.flac")
    audio.write_bytes(b"fLaC" + bytes(5000))
    assert export_manifest(sessions, tmp_path / "out") == 10
    assert not (tmp_path / "out" / "clips").exists()
    with (tmp_path / "out" / "manifest.csv").open(encoding="utf-8") as table:
        assert [row["audio"] for row in csv.DictReader(table) if row["text"]] == [""] * 10
    assert f"clips left out: {audio}" in caplog.text


def test_own_labels_are_marked(sessions: Path, tmp_path: Path) -> None:
    """On demand the recogniser's labels stand in, and say so; they never come in as corrections."""
    export_manifest(sessions, tmp_path / "out", own_labels=True)
    with (tmp_path / "out" / "labels.csv").open(encoding="utf-8") as table:
        rows = {row["id"]: (row["label"], row["by"]) for row in csv.DictReader(table)}
    assert rows["d0-1"] == ("joy", "Cas")
    assert rows["d0-2"] == ("neutral", "model:live-en")
    assert import_corrections(sessions, tmp_path / "out" / "labels.csv") == 0

    import audformat  # type: ignore[import-untyped]

    export_audformat(sessions, tmp_path / "database", own_labels=True)
    database = audformat.Database.load(str(tmp_path / "database"))
    table = database["emotion.train"]
    assert database.raters[table["emotion"].rater_id].type == "human"
    assert database.raters[table["emotion.model"].rater_id].type == "machine"
    labels = table.get()[["emotion", "emotion.model"]].astype(object)
    labels = labels.where(labels.notna(), None)
    assert labels.loc["clips/d0-1.flac"].tolist() == ["joy", None]
    assert labels.loc["clips/d0-2.flac"].tolist() == [None, "neutral"]


def test_audiofolder_is_laid_out_as_documented(sessions: Path, tmp_path: Path) -> None:
    """Splits are folders of the documented names, each with its audio and a
    metadata.jsonl beside it, which names its files and has the same columns in all of them."""
    export_audiofolder(sessions, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "validation", "test"}
    found = {}
    for split in (tmp_path / "out").iterdir():
        lines = (split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        found[split.name] = [json.loads(line) for line in lines]
        names = {row["file_name"] for row in found[split.name]}
        assert names == {clip.name for clip in split.glob("*.flac")}
    rows = [row for split in found.values() for row in split]
    columns = ["file_name", "id", "dialogue", "speaker", "text", "label", "by"]
    assert all([*row] == columns for row in rows)
    assert all(isinstance(cell, str) for row in rows for cell in row.values())
    assert found["validation"][1] == {
        "file_name": "d3-2.flac",
        "id": "d3-2",
        "dialogue": "d3",
        "speaker": "kitchen",
        "text": "I am so happy 3, 2",
        "label": "joy",
        "by": "Cas",
    }


def test_audiofolder_without_a_table_is_labelled_by_its_folders(
    speech: Samples, tmp_path: Path
) -> None:
    """The layout's simplest form, and its JSON lines, come in as well."""
    for place in ("train/joy", "train/anger", "test/joy", "listed/dev"):
        (tmp_path / "in" / place).mkdir(parents=True)
        with FlacWriter(tmp_path / "in" / place / "one.flac") as writer:
            writer.write(speech[:SECOND])
    shutil.move(tmp_path / "in" / "listed", tmp_path / "listed")
    assert import_audiofolder(tmp_path / "in", tmp_path / "in.csv") == 3
    with (tmp_path / "in.csv").open(encoding="utf-8") as table:
        rows = [(r["id"], r["label"], r["split"]) for r in csv.DictReader(table)]
    assert rows == [
        ("test/joy/one", "joy", "test"),
        ("train/anger/one", "anger", "train"),
        ("train/joy/one", "joy", "train"),
    ]
    lines = tmp_path / "listed" / "dev" / "metadata.jsonl"
    lines.write_text('{"file_name": "one.flac", "emotion": "joy", "sentence": "Hm."}\n')
    assert import_audiofolder(tmp_path / "listed", tmp_path / "listed.csv") == 1
    (row,) = csv.DictReader((tmp_path / "listed.csv").read_text().splitlines())
    assert (row["label"], row["text"], row["split"]) == ("joy", "Hm.", "dev")
    lines.write_text('{"file_name": "two.flac"}\n')
    with pytest.raises(CorpusError, match=r"metadata\.jsonl:1: .*two\.flac is missing; correct"):
        import_audiofolder(tmp_path / "listed", tmp_path / "listed.csv")


def test_a_clip_whose_name_is_not_utf_8_is_named(speech: Samples, tmp_path: Path) -> None:
    """A table can't hold the name."""
    (tmp_path / "in" / "joy").mkdir(parents=True)
    with FlacWriter(tmp_path / "in" / "joy" / "caf\udce9.flac") as writer:
        writer.write(speech[:SECOND])
    with pytest.raises(CorpusError, match=r"caf\ufffd\S*' isn't UTF-8; rename that file"):
        import_audiofolder(tmp_path / "in", tmp_path / "in.csv")


def test_corrections_come_in_from_a_table(sessions: Path, tmp_path: Path) -> None:
    """What is new is added to its session, once; a wrong line is named and nothing is added."""
    table = tmp_path / "labels.csv"
    table.write_text("id,label,by\nd2-1,anger,Dee\nd0-1,joy,Dee\nd2-2,,Dee\n", encoding="utf-8")
    assert import_corrections(sessions, table) == 1
    assert import_corrections(sessions, table) == 0
    (session,) = open_sessions(sessions)
    assert session.corrections["d2-1"] == Feedback(id="d2-1", label="anger", by="Dee")
    assert "d2-2" not in session.corrections
    table.write_text("id,label\nd2-2,joy\nd9-1,joy\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"labels\.csv:3: no recorded utterance has the id 'd9"):
        import_corrections(sessions, table)
    table.write_text("id,label\nd2-2,bored\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"csv:2: no label 'bored'; there is anger, joy, neu"):
        import_corrections(sessions, table)
    with pytest.raises(CorpusError, match=r"none\.csv: can't be read \(No such file"):
        import_corrections(sessions, tmp_path / "none.csv")
    assert "d2-2" not in open_sessions(sessions)[0].corrections


def test_a_disk_that_refuses_is_one_line(sessions: Path, tmp_path: Path) -> None:
    """Corrections, and each format."""
    table = tmp_path / "labels.csv"
    table.write_text("id,label\nd2-1,anger\n", encoding="utf-8")
    with full_disk():
        with pytest.raises(StreamHbafError, match=r"disk full \(File too large"):
            import_corrections(sessions, table)
        for export in (export_manifest, export_audformat, export_audiofolder):
            with pytest.raises(StreamHbafError, match="File too large"):
                export(sessions, tmp_path / export.__name__)
    assert import_corrections(sessions, table) == 1


def test_clip_that_is_not_whole_is_left_out(tmp_path: Path, speech: Samples) -> None:
    """An utterance whose audio was lost is exported with its text, without a clip."""
    folder = record(tmp_path, speech, dialogues=3, corrected={"d0-1": "joy"})
    (session,) = open_sessions(folder)
    session.audio_file("kitchen").unlink()
    utterance = dialogues_of(open_sessions(folder))[0].utterances[0]
    assert (utterance.label, utterance.audio, utterance.text) == ("joy", None, "I am so happy 0, 1")


def test_utterance_that_ends_after_the_sound_is_exported_without_a_clip(
    tmp_path: Path, speech: Samples
) -> None:
    """A kill may cost an utterance its last audio: its text is exported, half a clip isn't."""
    folder = record(tmp_path / "in", speech[: 5 * SECOND - 500], dialogues=3, corrected={})
    assert export_manifest(folder, tmp_path / "out") == 6
    with (tmp_path / "out" / "manifest.csv").open(encoding="utf-8") as table:
        audio = {row["id"]: row["audio"] for row in csv.DictReader(table)}
    assert [name for name, clip in audio.items() if not clip] == ["d2-1", "d2-2"]
    assert len([*(tmp_path / "out" / "clips").iterdir()]) == 4
    assert export_audiofolder(folder, tmp_path / "folder") == 4
    with pytest.raises(CorpusError, match=r"out: can't be written \(File exists\); give a"):
        export_manifest(folder, tmp_path / "out")


def test_sessions_train_a_bundle_that_is_evaluated_on_them(sessions: Path, tmp_path: Path) -> None:
    """From corrections to a bundle, and what it says of the dialogue that was held out."""
    table = tmp_path / "labels.csv"
    table.write_text("id,label\nd0-2,neutral\nd3-1,anger\nd4-2,joy\n", encoding="utf-8")
    import_corrections(sessions, table)
    export_manifest(sessions, tmp_path / "corpora" / "own")
    recipe = {
        "id": "own",
        "corpora": "own/manifest.csv",
        "audio": {"representation": "egemaps"},
        "text_encoder": {"name": str(save_tiny_bert(tmp_path))},
        "commonsense": {"source": "none"},
        "network": {"hidden": 16, "heads": 2, "layers": 1, "filters": 4, "window": 3},
        "fit": {"epochs": 1, "seeds": [0]},
        "workers": 1,
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    lines: list[str] = []
    train(
        tmp_path / "own.yaml",
        tmp_path / "corpora",
        tmp_path / "bundle",
        cache=tmp_path / "cache",
        progress=lines.append,
    )
    assert not [line for line in lines if "skipped" in line]
    bundle = Bundle.load(str(tmp_path / "bundle"))
    assert bundle.labels == LABELS
    corpus = open_corpus(str(sessions), tmp_path)
    predicted = predict_corpus(bundle, corpus, "test", cache=tmp_path / "cache")
    assert predicted.ids == ("d4-1", "d4-2")
    assert predicted.probabilities.sum(1) == pytest.approx([1.0, 1.0])
    assert [LABELS[label] for label in predicted.gold] == ["neutral", "joy"]
