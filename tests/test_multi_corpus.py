"""Promises of the readers of the corpora that the live bundle learns from beside MELD."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_hbaf.corpora.acted import (
    NEMO_ACTORS,
    read_clip_table,
    read_librispeech,
    read_nemo,
    read_shemo,
    read_tess,
)
from stream_hbaf.corpora.dialogue import SPLITS, Dialogue, Split
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.corpora.published import read_emorynlp, read_goemotions
from stream_hbaf.errors import CorpusError

NAMES = "anger\ndisgust\nfear\njoy\nneutral\nsadness\nsurprise\n"
SCENES = "Utterance,Speaker,Emotion,Scene_ID,Utterance_ID,Season,Episode,Start_Time,End_Time\n"
CLIPS = "file_id\temotion\tspeaker_id\tgender\ttext\n"


def write_comments(folder: Path, *lines: str, names: str = NAMES) -> Path:
    (folder / "labels.txt").write_text(names, encoding="utf-8")
    (folder / "train.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def write_scenes(folder: Path, *lines: str) -> Path:
    table = SCENES + "".join(f"{line},0,1\n" for line in lines)
    (folder / "emorynlp_train_final.csv").write_text(table, encoding="utf-8")
    return folder


def write_clips(folder: Path, *lines: str, header: str = CLIPS) -> Path:
    for line in lines:
        (folder / line.split("\t")[0]).touch()
    table = header + "".join(f"{line}\n" for line in lines)
    (folder / "data.tsv").write_text(table, encoding="utf-8")
    return folder


def write_tess(folder: Path, *names: str) -> Path:
    (folder / "oaf_any").mkdir(parents=True)
    for name in names:
        (folder / "oaf_any" / name).touch()
    return folder


def test_goemotions_names_the_one_emotion_there_is(tmp_path: Path) -> None:
    """Neutral beside an emotion counts for nothing; two emotions are none that is certain."""
    folder = write_comments(
        tmp_path, "Great\t3\ta", "Well\t4\tb", "Nice\t4,3\tc", "Oh\t3,6\td", "Ow\t5,5\te"
    )
    found = [dialogue.utterances for dialogue in read_goemotions(folder, "train")]
    assert [len(turns) for turns in found] == [1] * 5
    assert [turns[0].label for turns in found] == ["joy", "neutral", "joy", None, "sadness"]
    assert found[0][0].id == "a"


def test_goemotions_text_is_as_people_speak(tmp_path: Path) -> None:
    """Quotes are kept, carriage returns are spaces, and a mask is a name again."""
    folder = write_comments(tmp_path, '"I know [NAME],\rhe’s "fine\t4\ta')
    (dialogue,) = read_goemotions(folder, "train")
    assert dialogue.utterances[0].text == '"I know Alex, he\'s "fine'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("Oh\t7\tb", "'7' isn't a list of indices below 7"),
        ("Oh\t-1\tb", "'-1' isn't a list"),
        ("Oh\tjoy\tb", "'joy' isn't a list"),
        ("Oh\t\tb", "'' isn't a list"),
        ("Oh\tb", "2 cells instead of 3"),
        ("Oh\t4\ta", "comment a stands here twice"),
    ],
)
def test_goemotions_names_the_line_it_cannot_read(
    tmp_path: Path, line: str, complaint: str
) -> None:
    """A broken line ends in one error with its file and line."""
    folder = write_comments(tmp_path, "Great\t3\ta", line)
    with pytest.raises(CorpusError, match=rf"train\.tsv:2: .*{complaint}") as raised:
        read_goemotions(folder, "train")
    assert "\n" not in str(raised.value)


def test_goemotions_with_another_emotion_is_refused(tmp_path: Path) -> None:
    """The unmapped corpus of 28 emotions isn't taken for the mapped one."""
    folder = write_comments(tmp_path, "Great\t0\ta", names="anger\namusement\n")
    with pytest.raises(CorpusError, match=r"labels\.txt:2: unknown emotion 'amusement'"):
        read_goemotions(folder, "train")


def test_emorynlp_reads_scenes_in_spoken_order(tmp_path: Path) -> None:
    """Scenes of two episodes are two dialogues; order is by the utterance's number."""
    folder = write_scenes(
        tmp_path,
        "Later.,['Joey Tribbiani'],Mad,1,2,1,1",
        "\"First, she said.\",\"['Monica Geller', 'Phoebe Buffay']\",Joyful,1,1,1,1",
        "Elsewhere.,['Ross Geller'],Scared,1,1,1,2",
    )
    first, second = read_emorynlp(folder, "train")
    assert [(u.speaker, u.text, u.label) for u in first.utterances] == [
        ("Monica Geller and Phoebe Buffay", "First, she said.", "joy"),
        ("Joey Tribbiani", "Later.", "anger"),
    ]
    assert (first.id, second.id) == ("train/s1e1_scene1", "train/s1e2_scene1")
    assert [u.label for u in second.utterances] == ["fear"]


@pytest.mark.parametrize("emotion", ["Peaceful", "Powerful"])
def test_emorynlp_moods_are_no_label(tmp_path: Path, emotion: str) -> None:
    """What is none of the seven is context only."""
    folder = write_scenes(tmp_path, f"Hm.,['Ross Geller'],{emotion},1,1,1,1")
    assert read_emorynlp(folder, "train")[0].utterances[0].label is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("Oh.,['Ross'],Bored,1,2,1,1", "unknown emotion 'bored'; EmoryNLP has joyful"),
        ("Oh.,['Ross'],Mad,one,2,1,1", "must be numbers"),
        ("Oh.,['Ross'],Mad,1,1,1,1", "utterance s1e1_scene1_utt1 stands here twice"),
        ("Oh.,['Ross'],Mad,1", "6 cells instead of 9"),
    ],
)
def test_emorynlp_names_the_line_it_cannot_read(tmp_path: Path, line: str, complaint: str) -> None:
    """A broken line ends in one error with its file and line."""
    folder = write_scenes(tmp_path, "Hi.,['Ross'],Neutral,1,1,1,1", line)
    with pytest.raises(CorpusError, match=rf"emorynlp_train_final\.csv:3: .*{complaint}"):
        read_emorynlp(folder, "train")


def test_nemo_reads_its_table(tmp_path: Path) -> None:
    """Each actor is in one split; clip, emotion, gender and Polish text come from the table."""
    folder = write_clips(
        tmp_path,
        "MP0_happiness_1.flac\thappiness\tMP0\tfemale\tKupiłem nową szafę.",
        "TP0_surprised_2.flac\tsurprised\tTP0\tmale\tTak.",
        *(f"{actor}_fear_3.flac\tfear\t{actor}\tmale\tNie." for actor in NEMO_ACTORS["train"]),
    )
    (dev,) = [dialogue.utterances[0] for dialogue in read_nemo(folder, "dev")]
    assert (dev.id, dev.label, dev.speaker) == ("MP0_happiness_1", "joy", "MP0 female")
    assert (dev.text, dev.audio) == ("Kupiłem nową szafę.", folder / "MP0_happiness_1.flac")
    assert [d.utterances[0].label for d in read_nemo(folder, "test")] == ["surprise"]
    assert [d.id for d in read_nemo(folder, "train")] == [
        f"{a}_fear_3" for a in NEMO_ACTORS["train"]
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("b.flac\tboredom\tMP0\tmale\tTak.", "unknown emotion 'boredom'"),
        ("b.flac\tfear\tXX0\tmale\tTak.", "unknown actor 'XX0'"),
        ("b.flac\tfear\tMP0\tmale", "4 cells instead of 5"),
    ],
)
def test_nemo_names_the_line_it_cannot_read(tmp_path: Path, line: str, complaint: str) -> None:
    """A broken line ends in one error with its file and line."""
    folder = write_clips(tmp_path, "a.flac\tfear\tMP0\tmale\tTak.", line)
    with pytest.raises(CorpusError, match=rf"data\.tsv:3: .*{complaint}"):
        read_nemo(folder, "dev")


def test_nemo_says_which_clip_is_missing(tmp_path: Path) -> None:
    """A table without its clips is not a corpus."""
    folder = write_clips(tmp_path, "a.flac\tfear\tMP0\tmale\tTak.")
    (folder / "a.flac").unlink()
    with pytest.raises(CorpusError, match=r"data\.tsv:2: .*a\.flac is missing"):
        read_nemo(folder, "dev")


def test_nemo_with_another_header_is_refused(tmp_path: Path) -> None:
    """Columns in another order would be read as something else."""
    folder = write_clips(tmp_path, header="file_id\temotion\tspeaker_id\ttext\tgender\n")
    with pytest.raises(CorpusError, match=r"data\.tsv:1: the first line must be file_id, emotion"):
        read_nemo(folder, "dev")


def test_tess_reads_the_file_name(tmp_path: Path) -> None:
    """Speaker, word and emotion come from the name; pleasant surprise is surprise."""
    folder = write_tess(tmp_path / "tess", "OAF_back_ps.flac", "YAF_love_happy.wav", "notes.txt")
    older, younger = (dialogue.utterances[0] for dialogue in read_tess(folder, "train"))
    assert (older.speaker, older.text, older.label) == ("OAF", "Say the word back.", "surprise")
    assert (younger.speaker, younger.text, younger.label) == ("YAF", "Say the word love.", "joy")
    assert older.audio == folder / "oaf_any" / "OAF_back_ps.flac"


@pytest.mark.parametrize("name", ["OAF_back.flac", "OAF_back_bored.flac", "XAF_back_sad.flac"])
def test_tess_refuses_a_foreign_file(tmp_path: Path, name: str) -> None:
    """A file whose name isn't TESS's is named."""
    folder = write_tess(tmp_path / "tess", name)
    with pytest.raises(CorpusError, match=name):
        read_tess(folder, "train")


def test_tess_is_for_training_alone(tmp_path: Path) -> None:
    """Its speakers are in no other split; only who needs all splits gets an error."""
    folder = write_tess(tmp_path / "tess", "OAF_back_sad.flac")
    corpus = open_corpus("tess", folder.parent, all_splits=False)
    assert [len(corpus.splits[split]) for split in SPLITS] == [1, 0, 0]
    with pytest.raises(CorpusError, match="tess's dev split is empty"):
        open_corpus("tess", folder.parent)


@pytest.mark.parametrize(
    ("read", "missing"),
    [
        (read_goemotions, "labels.txt"),
        (read_emorynlp, "emorynlp_train_final.csv"),
        (read_nemo, "data.tsv"),
        (read_tess, "tess"),
    ],
)
def test_a_missing_corpus_says_what_was_expected_where(
    tmp_path: Path, read: Callable[[Path, Split], list[Dialogue]], missing: str
) -> None:
    """The message holds the path that was looked for."""
    with pytest.raises(CorpusError, match=rf"{tmp_path}.*{missing}.* is missing|no \*/"):
        read(tmp_path / missing if read is read_tess else tmp_path, "train")


@pytest.mark.parametrize(
    ("write", "read", "name"),
    [
        (write_comments, read_goemotions, "train.tsv"),
        (write_scenes, read_emorynlp, "emorynlp_train_final.csv"),
        (write_clips, read_nemo, "data.tsv"),
    ],
)
def test_another_encoding_names_line_and_byte(
    tmp_path: Path,
    write: Callable[[Path], Path],
    read: Callable[[Path, Split], list[Dialogue]],
    name: str,
) -> None:
    """A file that isn't UTF-8 is refused where that shows."""
    folder = write(tmp_path)
    with (folder / name).open("ab") as out:
        out.write(b"caf\xe9\t4\ta\n")
    line = 1 if name == "train.tsv" else 2
    with pytest.raises(CorpusError, match=rf"{name}:{line}: byte 4 of the line, 0xe9, isn't UTF-8"):
        read(folder, "train")


def write_clip_table(folder: Path, *rows: str) -> Path:
    for row in rows:
        (folder / row.split(",")[0]).touch()
    table = "file,speaker,sex,label,split\n" + "".join(f"{row}\n" for row in rows)
    (folder / "clips.csv").write_text(table, encoding="utf-8")
    return folder


def test_a_table_of_clips_is_read_by_split(tmp_path: Path) -> None:
    """Each clip is a dialogue of one utterance, without text, in the split that its row names."""
    folder = write_clip_table(
        tmp_path, "a1.ogg,01,female,Anger,train", "b1.ogg,02,male,joy,test", "a2.ogg,01,,fear,train"
    )
    found = {split: read_clip_table(folder, split, corpus="ASED") for split in SPLITS}
    assert {split: [d.id for d in dialogues] for split, dialogues in found.items()} == {
        "train": ["a1", "a2"],
        "dev": [],
        "test": ["b1"],
    }
    (utterance,) = found["train"][0].utterances
    assert (utterance.speaker, utterance.text, utterance.label) == ("01 female", "", "anger")
    assert utterance.audio == folder / "a1.ogg"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("b.ogg,2,m,calm,train", "clips.csv:3: unknown emotion 'calm'; ASED has anger"),
        ("b.ogg,2,m,joy,tests", "clips.csv:3: unknown split 'tests'; choose train, dev, test"),
        ("b.ogg,1,f,joy,dev", "clips.csv:3: speaker 1 f is in train already"),
        ("a.ogg,1,m,joy,train", "clips.csv:3: clip a stands here twice"),
        ("c/d.ogg,1,m,joy,train", "is missing; unpack the corpus again"),
    ],
)
def test_a_table_of_clips_names_the_row_it_cannot_read(
    tmp_path: Path, row: str, complaint: str
) -> None:
    """A wrong label, split or file, or a speaker of two splits, is an error with its line."""
    folder = write_clip_table(tmp_path, "a.ogg,1,f,joy,train")
    with (folder / "clips.csv").open("a", encoding="utf-8") as table:
        table.write(f"{row}\n")
    with pytest.raises(CorpusError, match=complaint):
        read_clip_table(folder, "train", corpus="ASED")


def test_read_speech_is_neutral(tmp_path: Path) -> None:
    """LibriSpeech's table has no labels: nobody acts."""
    (tmp_path / "a.ogg").touch()
    (tmp_path / "clips.csv").write_text("file,speaker,split\na.ogg,7,test\n", encoding="utf-8")
    (dialogue,) = read_librispeech(tmp_path, "test")
    assert dialogue.utterances[0].label == "neutral"
    assert not read_librispeech(tmp_path, "train")


def test_shemo_is_embeddings(tmp_path: Path) -> None:
    """Clips without sound, all for training."""
    voices = np.eye(2, 256, dtype=np.float16)
    arrays: dict[str, Any] = {
        "name": ["F1", "F2"],
        "speaker": ["F", "F"],
        "label": ["anger", "joy"],
    }
    np.savez(tmp_path / "ge2e.npz", embedding=voices, **arrays)
    found = read_shemo(tmp_path, "train")
    assert [d.utterances[0].label for d in found] == ["anger", "joy"]
    embedding = found[1].utterances[0].ge2e
    assert embedding is not None
    np.testing.assert_array_equal(embedding, voices[1])
    assert not read_shemo(tmp_path, "dev")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"label": ["anger", "calm"]}, "unknown emotion 'calm'"),
        ({"name": ["F1", "F1"]}, "F1 stands here twice"),
        ({"speaker": ["F"]}, "must be by the GE2E encoder"),
        ({"embedding": np.full((2, 256), np.nan, np.float16)}, "F1 isn't finite"),
    ],
)
def test_broken_embeddings_of_shemo_are_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    arrays: dict[str, Any] = {
        "name": ["F1", "F2"],
        "speaker": ["F", "F"],
        "label": ["anger", "joy"],
        "embedding": np.eye(2, 256, dtype=np.float16),
    }
    np.savez(tmp_path / "ge2e.npz", **arrays | change)
    with pytest.raises(CorpusError, match=complaint):
        read_shemo(tmp_path, "train")
