"""Promises of extraction: every utterance has its features or a reason, whatever happens on the
way."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import RECORDINGS
from numpy.typing import NDArray
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SegmenterConfig, VadConfig
from stream_hbaf.corpora import clips, extraction
from stream_hbaf.corpora.augment import (
    AugmentationConfig,
    Condition,
    NoisesAndRooms,
    augment,
    training_conditions,
)
from stream_hbaf.corpora.cache import digest_code
from stream_hbaf.corpora.clips import ClipJob, Preparation, Segmentation
from stream_hbaf.corpora.dialogue import LABELS, Corpus, Dialogue, LabelledUtterance
from stream_hbaf.corpora.extraction import (
    ExtractedCorpus,
    Part,
    Skipped,
    extract_corpus,
    extract_features,
)
from stream_hbaf.errors import ConfigError, CorpusError, StreamHbafError
from stream_hbaf.features import representations
from stream_hbaf.features.prosody import PROSODY_WIDTH, Prosody, describe_prosody
from stream_hbaf.features.representations import open_representation

Samples = NDArray[np.int16]
RATE = 16_000
SPEECH = read_audio(RECORDINGS / "jfk.flac")
HOUSES = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}


def write_mp4(path: Path, samples: Samples, *, index_first: bool = False) -> None:
    """A clip as MELD's are: a picture, and stereo AAC."""
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", options=options) as out:
        video = out.add_stream("mpeg4", rate=24)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = out.add_stream("aac", rate=RATE, layout="stereo")
        for n in range(len(samples) * 24 // RATE):
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), n % 256, np.uint8))
            out.mux(video.encode(picture))
        both = np.repeat(samples, 2)[None]  # packed: left, right, left ...
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate = RATE
        out.mux(audio.encode(frame))
        for stream in (video, audio):
            out.mux(stream.encode(None))


def utterance(clip: Path | None, *, name: str = "", **fields: object) -> LabelledUtterance:
    name = name or (clip.stem if clip else "unnamed")
    return LabelledUtterance(name, "Ross", "Hi.", None, audio=clip, **fields)  # type: ignore[arg-type]


def one_dialogue(*utterances: LabelledUtterance) -> Corpus:
    return Corpus("meld", LABELS, {"train": (Dialogue("0", utterances),)})


def run(
    corpus: Corpus, cache: Path, *, representation: str = "mfcc", workers: int = 1
) -> ExtractedCorpus:
    return extract_corpus(
        corpus,
        representation=representation,
        cache=cache,
        workers=workers,
        progress=lambda done, total, clip: None,
    )


def finished(cache: Path) -> dict[Path, int]:
    """The cache's files, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MELD.Raw as it is unpacked, small: four whole clips, and its broken one in two ways."""
    folder = tmp_path_factory.mktemp("corpora") / "MELD.Raw"
    for house in HOUSES.values():
        (folder / house).mkdir(parents=True)
    train = folder / "train_splits"
    for n in range(2):
        write_mp4(train / f"dia0_utt{n}.mp4", SPEECH[n * RATE : (n + 2) * RATE + 777])
    write_mp4(folder / "dev_splits_complete" / "dia0_utt0.mp4", SPEECH[4 * RATE : 5 * RATE])
    write_mp4(folder / "output_repeated_splits_test" / "dia0_utt0.mp4", SPEECH[5 * RATE : 6 * RATE])
    whole = (train / "dia0_utt0.mp4").read_bytes()
    (train / "dia125_utt3.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the end, lost
    write_mp4(train / "dia126_utt0.mp4", SPEECH[: 4 * RATE], index_first=True)
    cut = (train / "dia126_utt0.mp4").read_bytes()
    (train / "dia126_utt0.mp4").write_bytes(cut[: len(cut) // 2])
    (train / "dia126_utt1.mp4").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def meld(raw: Path) -> Corpus:
    splits = {
        split: tuple(
            Dialogue(clip.stem, (utterance(clip, name=f"{split} {clip.stem}"),))
            for clip in sorted((raw / house).iterdir())
        )
        for split, house in HOUSES.items()
    }
    return Corpus("meld", LABELS, splits)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def extracted(meld: Corpus, tmp_path_factory: pytest.TempPathFactory) -> ExtractedCorpus:
    """The corpus's ComParE, by two processes that ran undisturbed."""
    return run(meld, tmp_path_factory.mktemp("cache"), representation="compare", workers=2)


def test_rows_are_the_clips_features(extracted: ExtractedCorpus, meld: Corpus) -> None:
    """Row by row what the representation gives for the clip that the utterance names."""
    representation = open_representation("compare")
    for split, dialogues in meld.splits.items():
        for row, dialogue in enumerate(dialogues):
            clip = dialogue.utterances[0].audio
            assert clip is not None
            if clip.stem.startswith("dia0_"):
                expected = representation.extract(read_audio(clip))
                np.testing.assert_array_equal(extracted.features[split][row], expected)
    assert {split: len(rows) for split, rows in extracted.features.items()} == {
        "train": 5,
        "dev": 1,
        "test": 1,
    }
    representation.close()


def test_broken_clips_are_named_and_skipped(extracted: ExtractedCorpus, raw: Path) -> None:
    """Cut short with and without its index, and empty: a reason each, and a row of nan."""
    train = raw / "train_splits"
    lost, short, empty = extracted.skipped
    assert (lost.id, lost.path) == ("train dia125_utt3", train / "dia125_utt3.mp4")
    assert lost.reason == "not a sound file, or damaged"
    assert short.path == train / "dia126_utt0.mp4"
    assert short.reason.startswith("damaged or cut short at ")
    assert str(empty) == f"train dia126_utt1: {train}/dia126_utt1.mp4: is empty"
    assert np.isnan(extracted.features["train"]).all(axis=1).tolist() == [False] * 2 + [True] * 3


KILLED = """
import multiprocessing, os, pickle, signal, sys
from pathlib import Path
from stream_hbaf.corpora.extraction import extract_corpus

def progress(done, total, clip):
    if done == 3:
        for child in multiprocessing.active_children():
            print(child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    corpus, cache = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    extract_corpus(corpus, representation="compare", cache=cache, workers=1, progress=progress)
"""
LIMITED = """
import pickle, resource, sys
from pathlib import Path
from stream_hbaf.corpora.extraction import extract_corpus
from stream_hbaf.errors import StreamHbafError

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    corpus, cache = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    try:
        extract_corpus(
            corpus, representation="compare", cache=cache, workers=1, progress=lambda *_: None
        )
    except StreamHbafError as error:
        print(error)
"""


def run_script(script: str, corpus: Corpus, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own, which may be killed or limited; its cache is folder/cache."""
    import pickle

    (folder / "corpus.pickle").write_bytes(pickle.dumps(corpus))
    (folder / "script.py").write_text(script, encoding="utf-8")
    return subprocess.run(
        [sys.executable, folder / "script.py", folder / "corpus.pickle", folder / "cache"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_and_started_again(extracted: ExtractedCorpus, meld: Corpus, tmp_path: Path) -> None:
    """A killed extraction goes on where it was, to the same bits, and leaves no process behind."""
    killed = run_script(KILLED, meld, tmp_path)
    assert killed.returncode == -9
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in killed.stdout.split()):
        assert time.monotonic() < deadline, "a worker outlives the extraction"
        time.sleep(0.02)
    before = finished(tmp_path / "cache")
    assert 1 <= len(before) < 4  # of the four clips that are whole
    resumed = run(meld, tmp_path / "cache", representation="compare")
    after = finished(tmp_path / "cache")
    assert len(after) == 4
    assert {file: after[file] for file in before} == before  # finished ones aren't made again
    assert resumed.skipped == extracted.skipped
    for split in meld.splits:
        np.testing.assert_array_equal(resumed.features[split], extracted.features[split])


def test_files_that_cannot_grow(meld: Corpus, tmp_path: Path) -> None:
    """Where features can't be written whole: one line, and nothing that looks whole."""
    stopped = run_script(LIMITED, meld, tmp_path)
    home = next((tmp_path / "cache" / "compare").iterdir())
    assert stopped.stdout.startswith(f"{home}/")
    assert ": disk full (File too large, " in stopped.stdout
    assert stopped.stdout.endswith("run it again and it goes on from there\n")
    assert (stopped.stdout.count("\n"), stopped.stderr) == (1, "")
    assert [file for file in home.rglob("*") if file.is_file()] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 kB, for which one must be root."""
    (folder := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(
    small_disk: Path, meld: Corpus, extracted: ExtractedCorpus, tmp_path: Path
) -> None:
    """A full disk is one line that names it, and what was finished is used once there is room."""
    with pytest.raises(StreamHbafError) as raised:
        run(meld, small_disk / "cache", representation="compare")
    message = str(raised.value)
    assert message.startswith(f"{small_disk}/cache/compare/")
    assert "disk full (No space left on device, 0 MB left); make room; " in message
    assert "of 7 clips are kept, run it again and it goes on from there" in message
    before = finished(small_disk)
    assert 1 <= len(before) < 4
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    resumed = run(meld, small_disk / "cache", representation="compare")
    after = finished(small_disk)
    assert {file: after[file] for file in before} == before
    np.testing.assert_array_equal(resumed.features["train"], extracted.features["train"])


def test_cache_of_another_version(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of another version are never read, stay where they are, and are named in a line."""
    corpus = one_dialogue(utterance(raw / "train_splits" / "dia0_utt0.mp4"))
    old = run(corpus, tmp_path)
    (file,) = finished(tmp_path)
    np.save(file, np.zeros(28, np.float32))  # would show if it was read
    version = open_representation("mfcc").version
    monkeypatch.setattr(representations, "VERSION", "2")
    new = run(corpus, tmp_path)
    np.testing.assert_array_equal(new.features["train"], old.features["train"])
    assert old.leftovers == ""
    assert new.leftovers == (
        f"{tmp_path}/mfcc: cache holds 1 features of mfcc version {version}; "
        f"this is version 2{version[1:]}; they are ignored"
    )
    assert file.is_file()


def test_cache_knows_content_not_names(raw: Path, tmp_path: Path) -> None:
    """A renamed clip is known, a changed one is made anew, and so is a cache file cut short."""
    contents = [clip.read_bytes() for clip in sorted(raw.rglob("dia0_*.mp4"))[:3]]
    clips = [tmp_path / f"{n}.mp4" for n in range(3)]
    clips[0].write_bytes(contents[0])
    known = run(one_dialogue(utterance(clips[0])), tmp_path / "cache").features["train"]
    before = finished(tmp_path / "cache")
    clips[1].write_bytes(contents[1])
    clips[0].rename(clips[2])
    clips[0].write_bytes(contents[2])
    found = run(one_dialogue(*map(utterance, clips)), tmp_path / "cache").features["train"]
    after = finished(tmp_path / "cache")
    mfcc = open_representation("mfcc")
    np.testing.assert_array_equal(found[0], mfcc.extract(read_audio(clips[0])))
    np.testing.assert_array_equal(found[2], known[0])
    assert (len(after), {file: after[file] for file in before}) == (3, before)
    for file in after:
        file.write_bytes(file.read_bytes()[:-50])
    mended = run(one_dialogue(*map(utterance, clips)), tmp_path / "cache").features["train"]
    np.testing.assert_array_equal(mended, found)


def test_cuts_from_one_recording(tmp_path: Path) -> None:
    """Start and end cut to the sample; a cut outside its recording, or too short, is skipped."""
    clip = RECORDINGS / "jfk.flac"  # 11 s
    calls: list[tuple[int, int, Path]] = []
    found = extract_corpus(
        one_dialogue(
            utterance(clip, name="a", start_s=1.0, end_s=2.5),
            utterance(clip, name="b", start_s=9.5),
            utterance(clip, name="c", start_s=11.0, end_s=12.0),
            utterance(clip, name="d", start_s=10.0, end_s=12.0),
            utterance(clip, name="e", start_s=3.0, end_s=3.05),
            utterance(None, name="f"),
            utterance(tmp_path / "gone.wav", name="g"),
        ),
        representation="mfcc",
        cache=tmp_path / "cache",
        workers=1,
        progress=lambda *step: calls.append(step),
    )
    mfcc = open_representation("mfcc")
    for row, samples in enumerate((SPEECH[RATE : RATE * 5 // 2], SPEECH[RATE * 19 // 2 :])):
        np.testing.assert_array_equal(found.features["train"][row], mfcc.extract(samples))
    assert np.isnan(found.features["train"][2:]).all()
    assert found.skipped == (
        Skipped("c", clip, "cut from 11.0 to 12.0 s, but the clip ends at 11.00 s"),
        Skipped("d", clip, "cut from 10.0 to 12.0 s, but the clip ends at 11.00 s"),
        Skipped("e", clip, "too short for mfcc: 0.050 s"),
        Skipped("f", None, "the corpus names no clip"),
        Skipped("g", tmp_path / "gone.wav", "can't be read (No such file or directory)"),
    )
    assert calls == [(2, 2, clip)]  # two recordings, of which one can't be read


def test_a_clip_far_longer_than_its_table_says_is_skipped(raw: Path, tmp_path: Path) -> None:
    """What isn't the utterance isn't measured as one; tables are rounded, so some more is."""
    clip = tmp_path / "long.mp4"
    write_mp4(clip, np.tile(SPEECH[:RATE], 9))
    corpus = one_dialogue(
        utterance(clip, name="far", length_s=1.3),
        utterance(clip, name="near", length_s=2.0),
        utterance(raw / "train_splits/dia0_utt0.mp4", name="right", length_s=1.9),
    )
    found = run(corpus, tmp_path / "cache")
    assert [str(one) for one in found.skipped] == [
        f"far: {clip}: 1.3 s by the table, but the clip lasts 9.1 s"
    ]
    assert np.isnan(found.features["train"]).all(axis=1).tolist() == [True, False, False]


def test_corpus_without_sound(tmp_path: Path) -> None:
    """A corpus that names no clip at all can't be extracted, and says so at once."""
    with pytest.raises(
        CorpusError, match=r"^meld: no utterance has a clip; put the corpus's clips"
    ):
        run(one_dialogue(utterance(None), utterance(None)), tmp_path)


def test_representation_that_cannot_be_opened(raw: Path, tmp_path: Path) -> None:
    """What fails only in the process that measures still ends in its own one line."""
    config = Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        conv_dim=(8,) * 7,
        num_conv_pos_embedding_groups=1,
    )
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^device nonsense: can't be used \(.*\); choose cpu$"):
        extract_corpus(
            one_dialogue(utterance(raw / "train_splits" / "dia0_utt0.mp4")),
            representation=str(tmp_path),
            cache=tmp_path / "cache",
            workers=2,
            device="nonsense",
            progress=lambda *_: None,
        )


def test_prosody_comes_from_the_tables(tmp_path: Path) -> None:
    """Rows are what describe_prosody gives for each dialogue; an utterance without is named."""
    draw = np.random.default_rng(0)
    tables = draw.uniform(1, 200, (5, 8))
    utterances = [utterance(None, name=str(n), prosody=tuple(row)) for n, row in enumerate(tables)]
    without = utterance(None, name="lost")
    unmeasured = utterance(None, name="empty", prosody=(np.nan,) * 8)
    corpus = Corpus(
        "meld",
        LABELS,
        {
            "train": (Dialogue("0", tuple(utterances[:3])), Dialogue("1", tuple(utterances[3:]))),
            "dev": (Dialogue("0", (*utterances[:1], without, unmeasured)),),
            "test": (),
        },
    )
    found = run(corpus, tmp_path, representation="prosody")
    expected = [
        describe_prosody(tables[:3], ["Ross"] * 3),
        describe_prosody(tables[3:], ["Ross"] * 2),
    ]
    np.testing.assert_array_equal(found.features["train"], np.concatenate(expected))
    assert np.isnan(found.features["dev"]).all(axis=1).tolist() == [False, True, True]
    assert found.features["test"].shape == (0, PROSODY_WIDTH)
    assert found.skipped == (
        Skipped("lost", None, "the corpus has no prosody of it"),
        Skipped("empty", None, "the corpus has no prosody of it"),
    )
    with pytest.raises(
        CorpusError, match=r"^meld: no utterance has a clip; put the corpus's prosody"
    ):
        run(one_dialogue(without), tmp_path, representation="prosody")


def jobs_of(clip: Path) -> list[ClipJob]:
    """The clip as recorded, and augmented in two ways."""
    return [
        ClipJob("one", clip, segmented=True, condition=condition)
        for condition in training_conditions(0, AugmentationConfig(copies=2))
    ]


def noises() -> NoisesAndRooms:
    return NoisesAndRooms(noises=(SPEECH[::-1].copy(),), rooms=(SPEECH[:800],))


def test_augmented_rows_are_the_live_features(tmp_path: Path) -> None:
    """Bit for bit what a representation gives for the utterance that the live segmenter cuts, put
    under the condition; parts that stand side by side are extracted once each, then cached."""
    jobs = jobs_of(RECORDINGS / "jfk.flac")
    segmentation = Segmentation()
    speech = segmentation.longest_utterance(SPEECH)
    calls: list[tuple[int, int, Path]] = []
    for name in ("compare", "mfcc", "compare+mfcc"):
        rows, again = (
            extract_features(
                jobs,
                representation=name,
                cache=tmp_path,
                workers=1,
                sounds=noises(),
                progress=lambda *call: calls.append(call),
            ).features
            for _ in range(2)
        )
        opened = open_representation(name)
        expected = [opened.extract(augment(speech, job.condition, noises())) for job in jobs]
        opened.close()
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(again, rows)
    assert calls == [(1, 1, RECORDINGS / "jfk.flac")] * 2  # the first time of either part
    assert len(finished(tmp_path)) == 6


def test_silence_around_a_clip_is_cut_as_live() -> None:
    """Of a second of silence at either end at most pre-roll and post-roll remain."""
    segmentation = Segmentation()
    silence = np.zeros(RATE, np.int16)
    speech = SPEECH[: 3 * RATE]
    clip = np.concatenate([silence, speech, silence])
    cut = segmentation.longest_utterance(clip)
    assert len(cut) <= len(speech) + (256 + 160 + 64) * 16
    nothing = np.concatenate([silence, silence])
    np.testing.assert_array_equal(segmentation.longest_utterance(nothing), nothing)


def test_a_bad_clip_costs_only_its_own_rows(raw: Path, tmp_path: Path) -> None:
    """Damaged, empty or missing: named once whatever the number of conditions, the rest is done."""
    bad = [raw / "train_splits" / "dia126_utt0.mp4", raw / "train_splits" / "dia126_utt1.mp4"]
    bad.append(tmp_path / "gone.flac")
    jobs = [job for clip in [*bad, RECORDINGS / "jfk.flac"] for job in jobs_of(clip)]
    found = extract_features(
        jobs, representation="mfcc", cache=tmp_path, workers=2, progress=lambda *_: None
    )
    assert np.isfinite(found.features).all(axis=1).tolist() == [False] * 9 + [True] * 3
    assert [skipped.path for skipped in found.skipped] == bad


def test_the_same_features_for_any_number_of_workers(raw: Path, tmp_path: Path) -> None:
    """Rows stand in the order of the jobs."""
    files = sorted(raw.rglob("dia0_*.mp4"))
    jobs = [job for clip in files for job in jobs_of(clip)][::-1]
    one, three = (
        extract_features(
            jobs,
            representation="mfcc",
            cache=tmp_path / str(workers),
            workers=workers,
            progress=lambda *_: None,
        )
        for workers in (1, 3)
    )
    np.testing.assert_array_equal(one.features, three.features)


DYING = """
import os, signal, sys
from pathlib import Path
from stream_hbaf.corpora import clips, extraction
from stream_hbaf.corpora.clips import ClipJob
from stream_hbaf.errors import StreamHbafError

decode = extraction.decode_clip

def decode_or_die(clip):
    if clip.stem == "dia0_utt1":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does for want of memory
    return decode(clip)

extraction.decode_clip = decode_or_die  # in the worker, too: it imports this file

if __name__ == "__main__":
    jobs = [ClipJob(path, Path(path)) for path in sys.argv[2:]]
    try:
        extraction.extract_features(
            jobs, representation="mfcc", cache=Path(sys.argv[1]), workers=1, progress=print
        )
    except StreamHbafError as error:
        print(error)
"""


def test_a_worker_that_dies_is_one_line(raw: Path, tmp_path: Path) -> None:
    """It names the clip, and what was finished is kept."""
    (tmp_path / "script.py").write_text(DYING, encoding="utf-8")
    house = raw / "train_splits"
    died = subprocess.run(
        [
            sys.executable,
            tmp_path / "script.py",
            tmp_path / "cache",
            house / "dia0_utt0.mp4",
            house / "dia0_utt1.mp4",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.stdout.splitlines() == [
        f"1 2 {house}/dia0_utt0.mp4",
        f"{house}/dia0_utt1.mp4: a worker process died (signal SIGKILL), perhaps for lack of "
        "memory; use fewer workers; 1 of 2 clips are kept, run it again and it goes on from there",
    ]
    assert died.stderr == ""


PREPARATION = Preparation(noises(), Segmentation())
PLAIN = ClipJob("one", Path("one.wav"))
SEGMENTED = replace(PLAIN, segmented=True)
AUGMENTED = replace(SEGMENTED, condition=Condition(snr_db=10.0))


def test_cache_key_holds_what_the_job_needs() -> None:
    """No more: other noises must not cost the features of clean clips."""

    def key(job: ClipJob, preparation: Preparation = PREPARATION) -> dict[str, list[object]]:
        return preparation.dependencies(job, content="content")

    assert [*key(PLAIN)] == ["decoding"]
    assert [*key(SEGMENTED)] == ["decoding", "segmentation"]
    assert [*key(AUGMENTED)] == ["decoding", "segmentation", "condition"]
    assert key(replace(PLAIN, id="two", clip=Path("two.wav"))) == key(PLAIN)
    assert key(SEGMENTED, Preparation(NoisesAndRooms(), Segmentation())) == key(SEGMENTED)


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        ("decoding", "another clip"),
        ("decoding", replace(AUGMENTED, start_s=1.0)),
        ("decoding", replace(AUGMENTED, end_s=1.0)),
        ("segmentation", Segmentation(SegmenterConfig(pre_roll_ms=100))),
        ("segmentation", Segmentation(vad=VadConfig(engine="webrtc"))),
        ("condition", replace(AUGMENTED, condition=Condition(snr_db=10.0, seed=1))),
        ("condition", replace(AUGMENTED, condition=Condition(speed=Fraction(9, 10)))),
        ("condition", NoisesAndRooms((SPEECH,), ())),
    ],
)
def test_cache_key_covers_every_setting(
    step: str, changed: str | ClipJob | Segmentation | NoisesAndRooms
) -> None:
    """Whatever shapes the samples and changes, changes the part of the key that is of its step."""
    job = changed if isinstance(changed, ClipJob) else AUGMENTED
    content = changed if isinstance(changed, str) else "content"
    preparation = PREPARATION
    if isinstance(changed, Segmentation):
        preparation = replace(PREPARATION, segmentation=changed)
    elif isinstance(changed, NoisesAndRooms):
        preparation = replace(PREPARATION, sounds=changed)
    before = PREPARATION.dependencies(AUGMENTED, content="content")
    after = preparation.dependencies(job, content=content)
    assert [name for name in after if after[name] != before[name]] == [step]


@pytest.mark.parametrize("step", ["decoding", "segmentation", "condition"])
def test_cache_key_covers_code_and_packages(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes part with a digest of its modules, and the versions of its packages."""
    before = PREPARATION.dependencies(AUGMENTED, content="content")
    monkeypatch.setitem(clips.CODE, step, ("stream_hbaf.errors",))
    after = PREPARATION.dependencies(AUGMENTED, content="content")
    assert [name for name in after if after[name] != before[name]] == [step]
    monkeypatch.setitem(clips.LIBRARIES, step, ("pytest",))
    found = PREPARATION.dependencies(AUGMENTED, content="content")
    assert found[step][-1] == f"pytest {pytest.__version__}"


def test_cache_key_covers_the_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its version, and the code of all representations."""
    part = Part("mfcc", version="1", width=28, device="cpu", home=Path("home"))
    assert replace(part, device="cuda", home=Path("other")).key == part.key
    keys = [part.key, replace(part, name="egemaps").key, replace(part, version="2").key]
    monkeypatch.setattr(extraction, "CODE", ("stream_hbaf.errors",))
    keys.append(part.key)
    assert len({*map(tuple, keys)}) == 4


def test_digest_of_sounds_covers_all_of_them() -> None:
    """A noise is no room, and two are not one."""
    one, two = SPEECH[RATE : RATE + 100], SPEECH[2 * RATE : 2 * RATE + 100]
    both = np.concatenate([one, two])
    kinds = [((one, two), ()), ((two, one), ()), ((one,), (two,)), ((both,), ()), ((), ())]
    found = [Preparation(NoisesAndRooms(*kind), Segmentation()).sounds_digest for kind in kinds]
    assert len(set(found)) == len(kinds)


def test_code_digest_knows_code_from_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments, docstrings and layout don't count; a number does."""
    texts = {
        "plain": "def f(x):\n    return x + 1\n",
        "described": '"""Doc."""\n\ndef f(x):  # c\n    """Doc."""\n    return (x +\n 1)\n',
        "other": "def f(x):\n    return x + 2\n",
    }
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in texts.items():
        (tmp_path / f"code_{name}.py").write_text(text, encoding="utf-8")
    digests = {name: digest_code(f"code_{name}") for name in texts}
    assert digests["plain"] == digests["described"] != digests["other"]
    assert digest_code("stream_hbaf.files") != digest_code("stream_hbaf.processes")
    with pytest.raises(ModuleNotFoundError, match=r"^no module stream_hbaf\.nothing"):
        digest_code("stream_hbaf.nothing")


def test_sounds_are_part_of_the_cache(tmp_path: Path) -> None:
    """With other noises augmented rows are extracted anew, the clean one isn't."""
    jobs = jobs_of(RECORDINGS / "jfk.flac")
    rows = [
        extract_features(
            jobs,
            representation="mfcc",
            cache=tmp_path,
            workers=1,
            sounds=sounds,
            progress=lambda *_: None,
        ).features
        for sounds in (noises(), NoisesAndRooms((SPEECH,), ()))
    ]
    np.testing.assert_array_equal(rows[0][0], rows[1][0])
    assert len(finished(tmp_path)) == 1 + 2 + 2


def test_published_embeddings_stand_beside_prosody(tmp_path: Path) -> None:
    """Of a corpus without clips; what an utterance lacks is NaN, and nothing else."""
    tables = np.arange(24.0).reshape(3, 8) + 1
    voices = np.eye(3, 256, dtype=np.float32)
    turns = [
        utterance(None, name="0", prosody=tuple(tables[0]), ge2e=voices[0]),
        utterance(None, name="unmeasured", ge2e=voices[1]),
        utterance(None, name="voiceless", prosody=tuple(tables[2])),
    ]
    voice = run(one_dialogue(*turns), tmp_path, representation="ge2e")
    np.testing.assert_array_equal(voice.features["train"][:2], voices[:2])
    assert [one.id for one in voice.skipped] == ["voiceless"]
    both = run(one_dialogue(*turns), tmp_path, representation="prosody+ge2e")
    described = describe_prosody(np.array([tables[0], [np.nan] * 8, tables[2]]), ["Ross"] * 3)
    np.testing.assert_array_equal(
        both.features["train"][0], np.concatenate([described[0], voices[0]])
    )
    prosody, embeddings = np.split(both.features["train"], [both.widths[0]], axis=1)
    assert both.widths == (described.shape[1], 256)
    np.testing.assert_array_equal(prosody, described)
    np.testing.assert_array_equal(embeddings[1], voices[1])
    assert np.isnan(embeddings[2]).all()
    assert not both.skipped


def test_prosody_of_clips_is_relative_to_their_dialogue(raw: Path, tmp_path: Path) -> None:
    """Without tables the clips are measured; each is described as live, after those before it."""
    clips = [raw / "train_splits" / f"dia0_utt{n}.mp4" for n in range(2)]
    found = run(one_dialogue(*map(utterance, clips)), tmp_path, representation="prosody")
    measured = [Prosody().extract(read_audio(clip)) for clip in clips]
    expected = describe_prosody(np.array(measured), ["Ross"] * 2)
    np.testing.assert_array_equal(found.features["train"], expected)
    assert found.skipped == ()
