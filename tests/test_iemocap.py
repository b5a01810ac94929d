"""Promises of the IEMOCAP reader: the release as people download it, and the published table."""

import math
from pathlib import Path

import pytest

from stream_hbaf.corpora.dialogue import SPLITS, LabelledUtterance
from stream_hbaf.corpora.iemocap import DEV_DIALOGUES, IEMOCAP_LABELS, read_iemocap, split_of
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import CorpusError

# (turn, start, end, emotion, text); the files aren't in order of time
SPOKEN = (
    ("F000", 6.2901, 8.2357, "neu", "Excuse me."),
    ("M000", 7.5712, 10.4750, "fru", "Do you have   your forms?"),
    ("M001", 12.1, 14.0, "exc", "Let me see them."),
    ("F001", 10.0100, 11.3925, "xxx", "Yeah. [LAUGHTER]"),
)
TABLE_HEADER = (
    "video_id,segment_id,emotion,gender,mode,text,duration,avg_intensity,intensity_variation,"
    "avg_pitch,pitch_std,pitch_range,articulation_rate,mean_hnr"
)
MEASURED = "2.5,55.0,6.5,179.4,17.9,56.7,,7.0"


def write_dialogue(
    folder: Path, name: str, turns: tuple[tuple[str, float, float, str, str], ...] = SPOKEN
) -> Path:
    """One dialogue of the release's tree; returns its EmoEvaluation file."""
    session = folder / "IEMOCAP_full_release" / f"Session{name[4]}"
    evaluations = session / "dialog" / "EmoEvaluation"
    transcriptions = session / "dialog" / "transcriptions"
    wav = session / "sentences" / "wav" / name
    for place in (evaluations / "Categorical", transcriptions, wav):
        place.mkdir(parents=True, exist_ok=True)
    summary = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
    lines = []
    for turn, start, end, emotion, text in turns:
        summary += [
            f"[{start:.4f} - {end:.4f}]\t{name}_{turn}\t{emotion}\t[2.5000, 2.5000, 2.5000]"
        ]
        summary += ["C-E2:\tNeutral;\t()", "A-F1:\tval 3; act 2; dom  1;\t()", ""]
        lines.append(f"{name}_{turn} [{start:08.4f}-{end:08.4f}]: {text}")
        (wav / f"{name}_{turn}.wav").touch()
    (transcriptions / f"{name}.txt").write_text("\n".join([*lines, "M: [LAUGHTER]"]))
    (evaluations / f"._{name}.txt").write_bytes(b"\x00\x05\x16\x07")
    evaluation = evaluations / f"{name}.txt"
    evaluation.write_text("\n".join(summary))
    return evaluation


@pytest.fixture
def release(tmp_path: Path) -> Path:
    for name in ("Ses01F_impro01", "Ses02F_impro02", "Ses03F_impro04", "Ses04M_script01_1"):
        write_dialogue(tmp_path / "iemocap", name)
    write_dialogue(tmp_path / "iemocap", "Ses05F_impro01")
    return tmp_path / "iemocap"


def write_table(folder: Path, *rows: str) -> Path:
    (folder / "utterances.csv").write_text("\n".join([TABLE_HEADER, *rows, ""]))
    return folder


def test_release_reads_turns_in_order_of_time(release: Path) -> None:
    """Turns stand in the order of their start, with names, words and labels in full."""
    dialogue = read_iemocap(release, "train")[0]
    assert dialogue.id == "Ses01F_impro01"
    assert [(u.id[-4:], u.speaker, u.text, u.label) for u in dialogue.utterances] == [
        ("F000", "Mary", "Excuse me.", "neutral"),
        ("M000", "James", "Do you have your forms?", "frustration"),
        ("F001", "Mary", "Yeah. [LAUGHTER]", None),
        ("M001", "James", "Let me see them.", "excitement"),
    ]


def test_release_names_every_turns_recording(release: Path) -> None:
    """A turn's audio is sentences/wav/<dialogue>/<turn>.wav of its session."""
    (dialogue,) = read_iemocap(release, "test")
    assert dialogue.utterances[0].audio == (
        release / "IEMOCAP_full_release/Session5/sentences/wav/Ses05F_impro01"
        "/Ses05F_impro01_F000.wav"
    )
    assert all(one.audio is not None and one.audio.is_file() for one in dialogue.utterances)


def test_release_is_found_without_its_outer_folder(release: Path) -> None:
    """Session1 … Session5 may stand in the corpus's folder itself."""
    assert read_iemocap(release / "IEMOCAP_full_release", "test")[0].id == "Ses05F_impro01"


def test_release_splits_are_fixed(release: Path) -> None:
    """Session 5 is test, twelve named dialogues are dev, the rest train."""
    corpus = open_corpus("iemocap", release.parent)
    assert {split: [d.id for d in corpus.splits[split]] for split in SPLITS} == {
        "train": ["Ses01F_impro01", "Ses03F_impro04", "Ses04M_script01_1"],
        "dev": ["Ses02F_impro02"],
        "test": ["Ses05F_impro01"],
    }
    assert len(DEV_DIALOGUES) == 12
    assert {split_of(name) for name in DEV_DIALOGUES} == {"dev"}
    assert corpus.labels == IEMOCAP_LABELS == tuple(sorted(IEMOCAP_LABELS))


@pytest.mark.parametrize(
    ("written", "broken", "complaint"),
    [
        ("\tneu\t", "\tmad\t", r"Ses01F_impro01\.txt:3: unknown emotion 'mad'"),
        ("_M000\t", "_F000\t", r"Ses01F_impro01\.txt:7: turn Ses01F_impro01_F000 stands here twi"),
        ("_F001\t", "_F009\t", r"Ses01F_impro01\.txt:15: turn Ses01F_impro01_F009 isn't in"),
        ("[6.2901 - ", "[ - ", r"Ses01F_impro01\.txt:3: not '\[start - end\] turn emotion'"),
    ],
)
def test_release_names_the_line_it_cannot_read(
    release: Path, written: str, broken: str, complaint: str
) -> None:
    """A broken line ends in one error with its file and line."""
    path = write_dialogue(release, "Ses01F_impro01")
    path.write_text(path.read_text().replace(written, broken))
    with pytest.raises(CorpusError, match=complaint):
        read_iemocap(release, "train")


def test_release_without_a_session_is_refused(release: Path) -> None:
    """A session that was not unpacked is named, not passed over."""
    session = release / "IEMOCAP_full_release" / "Session3"
    session.rename(release / "elsewhere")
    with pytest.raises(CorpusError, match=r"Session3 is missing; it should hold dialog/"):
        read_iemocap(release, "train")


def test_release_takes_measurements_from_the_table(release: Path) -> None:
    """With the table beside it, order and audio are the release's, prosody is the table's."""
    write_table(release, f"Ses05F_impro01,1,exc,M,test,Let me see them.,{MEASURED}")
    by_id = {one.id: one for one in read_iemocap(release, "test")[0].utterances}
    measured = by_id["Ses05F_impro01_M001"].prosody
    assert measured is not None
    assert measured[:3] == (2.5, 55.0, 6.5)
    assert by_id["Ses05F_impro01_F000"].prosody is None


def table_of(*turns: tuple[str, int, str]) -> tuple[str, ...]:
    return tuple(
        f"Ses05M_impro02,{number},{emotion},{gender},test,{gender}{number},{MEASURED}"
        for gender, number, emotion in turns
    )


def test_table_gives_what_the_release_gives(tmp_path: Path) -> None:
    """Ids, speakers, words and labels are those of the release; an empty cell is nan."""
    write_table(tmp_path, f"Ses02F_impro02,0,hap,M,valid,Well  now.,{MEASURED}")
    (dialogue,) = read_iemocap(tmp_path, "dev")
    (turn,) = dialogue.utterances
    assert turn == LabelledUtterance(
        id="Ses02F_impro02_M000",
        speaker="James",
        text="Well now.",
        label="happiness",
        prosody=turn.prosody,
    )
    assert turn.prosody is not None
    assert turn.prosody[:6] == (2.5, 55.0, 6.5, 179.4, 17.9, 56.7)
    assert math.isnan(turn.prosody[6])
    assert turn.prosody[7] == 7.0


def test_table_merges_the_two_speakers_evenly(tmp_path: Path) -> None:
    """The table lists one speaker after the other; their turns are spread over the same time."""
    turns = [("F", n, "neu") for n in range(4)] + [("M", n, "sad") for n in range(2)]
    write_table(tmp_path, *table_of(*turns))
    (dialogue,) = read_iemocap(tmp_path, "test")
    assert [one.text for one in dialogue.utterances] == ["F0", "M0", "F1", "F2", "M1", "F3"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (f"Ses05F_impro01,0,mad,F,test,Hi.,{MEASURED}", "unknown emotion 'mad'"),
        (f"Ses05F_impro01,0,neu,X,test,Hi.,{MEASURED}", "gender must be F or M"),
        (f"Ses05F_impro01,zero,neu,F,test,Hi.,{MEASURED}", "segment_id a number"),
        (f"Ses05F_impro01,0,neu,F,later,Hi.,{MEASURED}", "mode 'later' isn't one of"),
        ("Ses05F_impro01,0,neu,F,test,Hi.,2,3,loud,5,6,7,8,9", "intensity_variation is 'loud'"),
    ],
)
def test_table_names_the_line_it_cannot_read(tmp_path: Path, row: str, complaint: str) -> None:
    """A broken line ends in one error with its file and line."""
    write_table(tmp_path, *table_of(("F", 0, "neu")), row)
    with pytest.raises(CorpusError, match=rf"utterances\.csv:3: .*{complaint}"):
        read_iemocap(tmp_path, "test")


def test_iemocap_missing_says_what_was_expected_where(tmp_path: Path) -> None:
    """The message holds the folder and both layouts that it may hold."""
    complaint = rf"{tmp_path} holds neither IEMOCAP_full_release/Session1 nor utterances\.csv"
    with pytest.raises(CorpusError, match=complaint):
        read_iemocap(tmp_path, "train")
