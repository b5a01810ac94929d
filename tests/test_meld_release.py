"""Promises of the MELD reader on the release as people download it: clips and prosody tables."""

import math
from pathlib import Path

import pytest

from stream_hbaf.corpora.dialogue import SPLITS, Split
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.corpora.published import MELD_CLIPS, read_meld
from stream_hbaf.errors import ConfigError, CorpusError

LINES = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID",
    '1,"Oh, hi.",Joey,joy,positive,0,0',
    "2,What?,Monica,surprise,negative,0,1",
)
PROSODY_HEADER = (
    "filename,duration,avg_intensity,intensity_variation,avg_pitch,pitch_std,pitch_range,"
    "articulation_rate,mean_hnr"
)


def write_release(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (folder / f"{split}_sent_emo.csv").write_text("\n".join(LINES))
        (folder / MELD_CLIPS[split]).mkdir()
        (folder / MELD_CLIPS[split] / "dia0_utt0.mp4").touch()
    return folder


def test_meld_reads_the_length_of_each_clip(tmp_path: Path) -> None:
    """The table's times give each clip's length; times that are none give no length."""
    write_release(tmp_path)
    times = ("StartTime,EndTime", '"00:59:59,900","01:00:01,200"', '"0:1","00:00:02,000"')
    table = "\n".join(f"{line},{time}" for line, time in zip(LINES, times, strict=True))
    (tmp_path / "dev_sent_emo.csv").write_text(table)
    first, second = read_meld(tmp_path, "dev")[0].utterances
    assert first.length_s == pytest.approx(1.3)
    assert second.length_s is None


@pytest.mark.parametrize(
    ("split", "clips"),
    [
        ("train", "train_splits"),
        ("dev", "dev_splits_complete"),
        ("test", "output_repeated_splits_test"),
    ],
)
@pytest.mark.parametrize("place", [".", "MELD.Raw"])
def test_meld_finds_the_releases_clips(
    tmp_path: Path, place: str, split: Split, clips: str
) -> None:
    """Clips are found under the release's own names, in the folder or in MELD.Raw."""
    write_release(tmp_path / place)
    first = read_meld(tmp_path, split)[0].utterances[0]
    assert first.audio == tmp_path / place / clips / "dia0_utt0.mp4"
    assert first.audio is not None
    assert first.audio.is_file()


def test_meld_finds_clips_in_a_folder_of_their_split(tmp_path: Path) -> None:
    """The release's archives unpack into train/, dev/ and test/: that is found too."""
    write_release(tmp_path / "whole")
    (tmp_path / "MELD.Raw").mkdir()
    (tmp_path / "whole").rename(tmp_path / "MELD.Raw" / "dev")
    first = read_meld(tmp_path, "dev")[0].utterances[0]
    assert first.audio == tmp_path / "MELD.Raw/dev/dev_splits_complete/dia0_utt0.mp4"


def test_meld_keeps_an_utterance_whose_clip_is_missing(tmp_path: Path) -> None:
    """The words stay, and the path says which clip extraction will miss."""
    write_release(tmp_path)
    second = read_meld(tmp_path, "train")[0].utterances[1]
    assert second.text == "What?"
    assert second.audio == tmp_path / "train_splits" / "dia0_utt1.mp4"
    assert second.audio is not None
    assert not second.audio.exists()


def test_meld_without_clips_and_tables_is_words_alone(tmp_path: Path) -> None:
    """Neither audio nor measurements are made up."""
    (tmp_path / "train_sent_emo.csv").write_text("\n".join(LINES))
    first = read_meld(tmp_path, "train")[0].utterances[0]
    assert (first.audio, first.prosody) == (None, None)


def test_meld_reads_the_prosody_table(tmp_path: Path) -> None:
    """Measurements are found by the clip's name; what the table lacks is nan."""
    write_release(tmp_path)
    table = [PROSODY_HEADER, "dia0_utt0.wav,3.69,62.3,8.19,,41.4,164.6,3.52,2.28"]
    (tmp_path / "prosody_train.csv").write_text("\n".join(table))
    first, second = read_meld(tmp_path, "train")[0].utterances
    assert first.prosody is not None
    assert second.prosody is not None
    assert first.prosody[:3] == (3.69, 62.3, 8.19)
    assert math.isnan(first.prosody[3])
    assert first.prosody[4:] == (41.4, 164.6, 3.52, 2.28)
    assert [math.isnan(value) for value in second.prosody] == [True] * 8


def test_meld_names_the_measurement_it_cannot_read(tmp_path: Path) -> None:
    """A cell that is no number ends in one error with file, line and column."""
    write_release(tmp_path)
    table = [PROSODY_HEADER, "dia0_utt0.wav,3.69,62.3,8.19,high,41.4,164.6,3.52,2.28"]
    (tmp_path / "prosody_dev.csv").write_text("\n".join(table))
    with pytest.raises(CorpusError, match=r"prosody_dev\.csv:2: avg_pitch is 'high', not a number"):
        read_meld(tmp_path, "dev")


def test_corpus_holds_all_splits(tmp_path: Path) -> None:
    """One call reads a corpus whole, with its labels."""
    write_release(tmp_path / "meld")
    corpus = open_corpus("meld", tmp_path)
    assert corpus.name == "meld"
    assert corpus.labels[0] == "anger"
    assert {split: len(corpus.splits[split]) for split in SPLITS} == dict.fromkeys(SPLITS, 1)


def test_corpus_with_an_empty_split_is_refused(tmp_path: Path) -> None:
    """A file without rows is refused, not trained on."""
    (write_release(tmp_path / "meld") / "dev_sent_emo.csv").write_text(LINES[0])
    with pytest.raises(CorpusError, match=rf"{tmp_path}/meld: meld's dev split is empty"):
        open_corpus("meld", tmp_path)


def test_corpus_of_an_unknown_name_is_refused(tmp_path: Path) -> None:
    """The message names the corpora there are."""
    with pytest.raises(
        ConfigError, match=r"unknown corpus 'mel'; choose .*iemocap, libri.*, meld, "
    ):
        open_corpus("mel", tmp_path)
