"""Promises of the IEMOCAP reader: the release as people download it, and the published tables."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from stream_hbaf.corpora.dataset import vote_shares
from stream_hbaf.corpora.dialogue import SPLITS, LabelledUtterance
from stream_hbaf.corpora.iemocap import DEV_DIALOGUES, IEMOCAP_LABELS, read_iemocap, split_of
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import CorpusError

# (turn, start, end, emotion, text); the files aren't in order of time. F001 is said into M000.
SPOKEN = (
    ("F000", 6.2901, 8.2357, "neu", "Excuse me."),
    ("M000", 7.5712, 10.4750, "fru", "Do you have   your forms?"),
    ("M001", 12.1, 14.0, "exc", "Let me see them."),
    ("F001", 9.0100, 10.3925, "xxx", "Yeah. [LAUGHTER]"),
)
TABLE_HEADER = (
    "video_id,segment_id,emotion,gender,mode,text,duration,avg_intensity,intensity_variation,"
    "avg_pitch,pitch_std,pitch_range,articulation_rate,mean_hnr"
)
ORDER_HEADER = "name,video_id,speaker,start_s,end_s,emotion,votes_if_undecided"
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


def write_order(folder: Path, *turns: tuple[str, float | str, float | str]) -> Path:
    """The table of times: (turn, start, end)."""
    rows = [f"{turn},,{turn[:5]},{start},{end},neu," for turn, start, end in turns]
    path = folder / "order.csv"
    path.write_text("\n".join([ORDER_HEADER, *rows, ""]))
    return path


def write_embeddings(folder: Path, *turns: str, width: int = 256) -> Path:
    """An archive with an embedding for each turn: its number in all columns."""
    rows = np.repeat(np.arange(len(turns), dtype=np.float16)[:, None], width, axis=1)
    path = folder / "ge2e.npz"
    np.savez(path, name=np.array(turns), embedding=rows)
    return path


def test_release_reads_turns_as_they_end(release: Path) -> None:
    """A turn follows all that had ended before it did, with names, words and labels in full."""
    dialogue = read_iemocap(release, "train")[0]
    assert dialogue.id == "Ses01F_impro01"
    assert [(u.id[-4:], u.speaker, u.text, u.label) for u in dialogue.utterances] == [
        ("F000", "Mary", "Excuse me.", "neutral"),
        ("F001", "Mary", "Yeah. [LAUGHTER]", None),
        ("M000", "James", "Do you have your forms?", "frustration"),
        ("M001", "James", "Let me see them.", "excitement"),
    ]


def test_release_reads_the_rated_arousal(release: Path) -> None:
    """The second rating of a turn, from 1 to 5, as from -1 to 1; none where it isn't one."""
    assert read_iemocap(release, "train")[0].utterances[0].arousal == -0.25
    evaluation = next(release.rglob("EmoEvaluation/Ses01F_impro01.txt"))
    text = evaluation.read_text()
    for rated, arousal in (("2.0000, 5.0000, 1.0000", 1.0), ("0, 0.0000, 0", None)):
        evaluation.write_text(text.replace("2.5000, 2.5000, 2.5000", rated))
        assert read_iemocap(release, "train")[0].utterances[0].arousal == arousal


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


NAME = "Ses05M_impro02"


def table_of(*turns: tuple[str, int, str]) -> tuple[str, ...]:
    return tuple(
        f"{NAME},{number},{emotion},{gender},test,{gender}{number},{MEASURED}"
        for gender, number, emotion in turns
    )


def test_table_gives_what_the_release_gives(tmp_path: Path) -> None:
    """Ids, speakers, words and labels are those of the release; an empty cell is nan."""
    write_table(tmp_path, f"Ses02F_impro02,0,hap,M,valid,Well  now.,{MEASURED}")
    write_order(tmp_path, ("Ses02F_impro02_M000", 0.5, 3.0))
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


def test_table_has_turns_as_they_end(tmp_path: Path) -> None:
    """The order is that of the ends in order.csv, whatever the rows' order in either file."""
    write_table(tmp_path, *table_of(("F", 0, "neu"), ("F", 1, "neu"), ("M", 0, "sad")))
    write_order(
        tmp_path,
        (f"{NAME}_F001", 4.0, 5.5),
        (f"{NAME}_M000", 1.0, 6.0),
        (f"{NAME}_F000", 0.0, 2.0),
    )
    (dialogue,) = read_iemocap(tmp_path, "test")
    assert [one.text for one in dialogue.utterances] == ["F0", "F1", "M0"]


@pytest.mark.parametrize(
    ("times", "complaint"),
    [
        ([("F000", 0.0, 1.0)], r"utterances\.csv:3: turn \w+_M000 isn't in order\.csv"),
        ([("F000", 0, 1), ("M000", 1, 2), ("F000", 0, 1)], r"order\.csv:4: turn \w+_F000 stands"),
        ([("F000", "soon", 1)], r"order\.csv:2: turn \w+_F000 is from 'soon' to '1'; start_s"),
        ([("F000", 2.0, 1.0)], r"order\.csv:2: turn \w+_F000 is from '2.0' to '1.0'; start_s"),
        ([("F000", 0.0, "nan")], r"order\.csv:2: turn \w+_F000 is from '0.0' to 'nan'; start_s"),
    ],
)
def test_order_names_the_line_it_cannot_use(
    tmp_path: Path, times: Sequence[tuple[str, float | str, float | str]], complaint: str
) -> None:
    """A turn without times or with two, and times that aren't: one error with file and line."""
    write_table(tmp_path, *table_of(("F", 0, "neu"), ("M", 0, "sad")))
    write_order(tmp_path, *((f"{NAME}_{turn}", start, end) for turn, start, end in times))
    with pytest.raises(CorpusError, match=complaint):
        read_iemocap(tmp_path, "test")


def test_table_without_its_order_is_refused(tmp_path: Path) -> None:
    """Turns in an order that nobody knows have no past."""
    write_table(tmp_path, *table_of(("F", 0, "neu")))
    with pytest.raises(CorpusError, match=r"^IEMOCAP: .*order\.csv is missing; put the corpus"):
        read_iemocap(tmp_path, "test")


def test_undecided_turns_have_their_annotators_votes(release: Path, tmp_path: Path) -> None:
    """Of an undecided turn each annotator's labels; those outside the six keep their names."""
    rows = [
        f"{NAME}_F000,{NAME},Ses05F,0,1,xxx,Frustration/Anger|Neutral|Other",
        f"{NAME}_M000,{NAME},Ses05M,1,2,sad,",
    ]
    (tmp_path / "order.csv").write_text("\n".join([ORDER_HEADER, *rows]))
    write_table(tmp_path, *table_of(("F", 0, "xxx"), ("M", 0, "sad")))
    first, second = read_iemocap(tmp_path, "test")[0].utterances
    assert first.votes == (("frustration", "anger"), ("neutral",), ("Other",))
    assert second.votes == ()
    shares = vote_shares((first, second), IEMOCAP_LABELS)
    assert shares is not None
    assert shares[0].tolist() == pytest.approx([0.25, 0, 0.25, 0, 0.5, 0])
    assert not shares[1].any()
    of_release = read_iemocap(release, "test")[0].utterances
    assert {one.votes for one in of_release} == {(("neutral",),)}
    labelled = [one for one in of_release if one.label]
    assert vote_shares(labelled, IEMOCAP_LABELS) is None


def test_dialogues_are_improvised_or_scripted(release: Path) -> None:
    """As their names say."""
    parts = {one.id: one.part for split in SPLITS for one in read_iemocap(release, split)}
    assert parts["Ses04M_script01_1"] == "scripted"
    assert parts["Ses05F_impro01"] == "improvised"


def test_turns_have_their_embeddings(release: Path, tmp_path: Path) -> None:
    """From ge2e.npz, by name, beside the release as beside the table."""
    write_table(tmp_path, *table_of(("F", 0, "neu"), ("M", 0, "sad")))
    write_order(tmp_path, (f"{NAME}_M000", 0, 1), (f"{NAME}_F000", 1, 2))
    write_embeddings(tmp_path, f"{NAME}_F000", f"{NAME}_M000")
    first, second = read_iemocap(tmp_path, "test")[0].utterances
    assert first.ge2e is not None
    assert second.ge2e is not None
    assert first.ge2e.tolist() == [1.0] * 256
    assert second.ge2e.tolist() == [0.0] * 256
    write_embeddings(release, *(f"Ses05F_impro01_{turn}" for turn, *_ in SPOKEN))
    found = {one.id[-4:]: one.ge2e for one in read_iemocap(release, "test")[0].utterances}
    assert found["M001"] is not None
    assert found["M001"].tolist() == [2.0] * 256


def test_embeddings_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    """A turn without one or with two, another length, NaN, and another file."""
    write_table(tmp_path, *table_of(("F", 0, "neu")))
    write_order(tmp_path, (f"{NAME}_F000", 0, 1))

    def complain(complaint: str) -> None:
        with pytest.raises(CorpusError, match=complaint) as raised:
            read_iemocap(tmp_path, "test")
        assert "\n" not in str(raised.value)

    write_embeddings(tmp_path, f"{NAME}_M000")
    complain(r"turn \w+_F000 isn't in ge2e\.npz; get a whole one")
    path = write_embeddings(tmp_path, f"{NAME}_F000", f"{NAME}_F000")
    complain(r"ge2e\.npz: turn \w+_F000 stands here twice")
    write_embeddings(tmp_path, f"{NAME}_F000", width=192)
    complain(r"ge2e\.npz: embedding is \[1, 192\], not \[1, 256\]")
    np.savez(path, name=np.array([f"{NAME}_F000"]), embedding=np.full((1, 256), np.nan))
    complain(r"ge2e\.npz: the embedding of turn \w+_F000 isn't finite")
    np.savez(path, name=np.array([f"{NAME}_F000"]))
    complain(r"ge2e\.npz: not an archive of the arrays 'name' and 'embedding'")
    path.write_bytes(b"not a zip")
    complain(r"ge2e\.npz: not an archive of the arrays 'name' and 'embedding'")


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
    write_order(tmp_path, (f"{NAME}_F000", 0, 1), ("Ses05F_impro01_F000", 0, 1))
    with pytest.raises(CorpusError, match=rf"utterances\.csv:3: .*{complaint}"):
        read_iemocap(tmp_path, "test")


def test_iemocap_missing_says_what_was_expected_where(tmp_path: Path) -> None:
    """The message holds the folder and both layouts that it may hold."""
    complaint = rf"{tmp_path} holds neither IEMOCAP_full_release/Session1 nor utterances\.csv"
    with pytest.raises(CorpusError, match=complaint):
        read_iemocap(tmp_path, "train")
