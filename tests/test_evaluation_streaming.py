"""Promises of live judging: real sound through the whole recogniser, every figure accounted for."""

import hashlib
import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.augment import Condition, NoisesAndRooms
from stream_hbaf.corpora.dialogue import LABELS, Corpus, Dialogue, LabelledUtterance
from stream_hbaf.corpora.playlist import DIALOGUE_S, SURROUNDED_S, TURN_S, Playlist
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.evaluation.conditions import (
    choose_rows,
    evaluate_live,
    measure_row,
    sex_of,
    surest_half_gain,
)
from stream_hbaf.evaluation.report import render_live
from stream_hbaf.evaluation.streaming import (
    LiveJudged,
    judge_live,
    judge_words,
    open_recognizer,
)
from stream_hbaf.features.whisper import Transcript

BUNDLE = "live-en"
RECORDINGS = Path(__file__).parent / "recordings"
CLIPS = [
    RECORDINGS / f"sense_and_sensibility_01_austen_64kb-{n}.flac" for n in ("0880", "0930", "0870")
]
WORDS = [clip.with_suffix(".txt").read_text().strip() for clip in CLIPS]


@pytest.fixture(scope="module")
def judge():
    with open_recognizer(BUNDLE) as opened:
        yield opened


def corpus_of(*utterances: LabelledUtterance) -> Corpus:
    dialogues = tuple(Dialogue(one.id, (one,)) for one in utterances)
    return Corpus("read", LABELS, {"train": (), "dev": (), "test": dialogues})


def read(number: int, label: str | None = "neutral") -> LabelledUtterance:
    return LabelledUtterance(f"u{number}", "Actor_01", WORDS[number], label, audio=CLIPS[number])


@pytest.fixture(scope="module")
def played(judge) -> LiveJudged:
    """Two sentences as fast as the recogniser listens, between them a clip that isn't there."""
    lost = LabelledUtterance("lost", "Actor_02", "Hello there.", "joy", audio=Path("no-such.flac"))
    told: list[str] = []
    judged = judge_live(judge, corpus_of(read(0), lost, read(1)), "test", progress=told.append)
    assert any(line.startswith("not played: lost: no-such.flac: can't be read") for line in told)
    assert told[-1] == "3 of 3 clips, u1"
    return judged


def test_each_clip_is_heard_as_an_utterance(played):
    """What is read is found in its clip, with its words; what can't be read is missed, not lost."""
    assert played.ids == ("u0", "lost", "u1")
    assert played.heard.tolist() == [True, False, True]
    assert played.missed == ("lost",)
    np.testing.assert_array_equal(played.probabilities[1], np.full(7, 1 / 7))
    np.testing.assert_allclose(played.probabilities.sum(1), 1)
    assert played.wer is not None
    assert played.wer < 0.3
    assert set(played.cost_ms) == {"vad", "acoustic", "text", "classifier"}


def test_speed_changes_nothing(judge, played):
    """At twenty times real time and at once: the same probabilities of the same utterances."""
    paced = judge_live(
        judge, corpus_of(read(0), read(1)), "test", speed=20.0, progress=lambda line: None
    )
    np.testing.assert_allclose(paced.probabilities, played.probabilities[[0, 2]], atol=1e-5)
    np.testing.assert_array_equal(paced.sets, played.sets[[0, 2]])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["longest last", "longest first"])
def test_the_longest_utterance_of_a_clip_counts(judge, tmp_path, order):
    """Two sentences in one clip sound as they do in two clips; the longer one is the clip's."""
    dialogue = Dialogue("d", tuple(map(read, order)))
    apart = judge_live(
        judge, Corpus("read", LABELS, {"test": (dialogue,)}), "test", progress=lambda line: None
    )
    between = np.zeros(round((TURN_S + 2 * SURROUNDED_S) * SAMPLE_RATE_HZ), np.int16)
    first, second = (read_audio(CLIPS[number]) for number in order)
    with wave.open(str(tmp_path / "both.wav"), "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        out.writeframes(np.concatenate([first, between, second]).tobytes())
    words = " ".join(WORDS[number] for number in order)
    clip = LabelledUtterance("both", "Actor_01", words, "joy", audio=tmp_path / "both.wav")
    both = judge_live(judge, corpus_of(clip), "test", progress=lambda line: None)
    longer = order.index(1)  # 3.1 s against 3.0 s
    np.testing.assert_allclose(both.probabilities[0], apart.probabilities[longer], atol=1e-5)
    assert np.abs(both.probabilities[0] - apart.probabilities[1 - longer]).max() > 1e-3
    assert both.missed == ()
    assert both.wer == apart.wer  # the words of both are the clip's


def test_a_bundle_that_is_not_live_is_refused(tmp_path):
    """A network that sees the future is told before anything is loaded, with what to take."""
    offline = tmp_path / "offline"
    shutil.copytree(Path(__file__).parent.parent / "models" / BUNDLE, offline)
    settings = (offline / "config.yaml").read_bytes()
    changed = settings.replace(b"mode: live", b"mode: offline")
    (offline / "config.yaml").write_bytes(changed)
    digests = [hashlib.sha256(content).hexdigest() for content in (settings, changed)]
    sums = offline / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(*digests))
    with pytest.raises(BundleError, match=r"was trained offline .*; take one of mode live"):
        open_recognizer(str(offline))


def test_a_withheld_modality_is_not_used(judge, played, monkeypatch):
    """Without its sound the prediction is that of the words alone, and the other way round."""
    one = corpus_of(read(0))
    # The words as the corpus writes them: Whisper's full stop and capitals count as well.
    words = Transcript(WORDS[0], "en", avg_logprob=0.0, no_speech_prob=0.0)
    monkeypatch.setattr(judge.transcriber, "final", lambda *_, **__: words)
    text = judge_live(judge, one, "test", modalities=["text"], progress=lambda line: None)
    audio = judge_live(judge, one, "test", modalities=["audio"], progress=lambda line: None)
    probabilities = [played.probabilities[0], text.probabilities[0], audio.probabilities[0]]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(probabilities[a] - probabilities[b]).max() > 1e-3
    alone = judge_words(judge, one, "test", progress=lambda line: None)
    np.testing.assert_allclose(text.probabilities, alone.probabilities, atol=1e-5)


@pytest.mark.parametrize(
    "modalities", [("audio", "text"), ("audio",), ("text",)], ids=lambda given: "+".join(given)
)
def test_a_withheld_modality_takes_nothing_else_along(judge, modalities):
    """Whisper's encoder gives audio features as well: without the text they are still used."""
    samples = read_audio(read(0).audio)
    text = judge.encode_text(judge.transcriber.final(samples, speech_score=1.0))
    acoustic = judge.acoustic.extract(samples)
    prediction = judge.classify_final(
        acoustic=acoustic, text=text, dialogue=judge.new_dialogue(), modalities=modalities
    )
    assert prediction.modalities == modalities


def test_words_are_read_with_their_dialogue(judge):
    """Gold words have no errors, misheard ones about as many as asked for, the same every time."""
    turns = [LabelledUtterance(f"t{n}", "A", WORDS[n % 3], "joy") for n in range(6)]
    corpus = Corpus("read", LABELS, {"test": (Dialogue("d", tuple(turns)),)})
    gold = judge_words(judge, corpus, "test", progress=lambda line: None)
    first, again = (
        judge_words(judge, corpus, "test", error_rate=0.3, progress=lambda line: None)
        for _ in range(2)
    )
    assert gold.wer == 0
    assert first.wer == again.wer
    assert 0.1 < first.wer < 0.6
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert np.abs(gold.probabilities[0] - gold.probabilities[3]).max() > 1e-4  # its past differs


def test_unknown_labels_are_counted_apart(judge):
    """A label that the bundle doesn't have isn't judged; a corpus of such labels is refused."""
    known, strange = (
        LabelledUtterance(label, "A", "Well.", label) for label in ("fear", "boredom")
    )
    judged = judge_words(judge, corpus_of(known, strange), "test", progress=lambda line: None)
    assert (judged.ids, judged.foreign) == (("fear",), 1)
    with pytest.raises(BundleError, match=r"says anger, .*but read has boredom; judge it on"):
        judge_words(judge, corpus_of(strange), "test")


def test_a_corpus_that_cannot_be_heard_is_refused(judge):
    """No clip that can be played, neither clips nor words, nothing at all: one line each."""
    lost = LabelledUtterance("lost", "A", "Hello.", "joy", audio=Path("no-such.flac"))
    with pytest.raises(CorpusError, match=r"^read: no clip can be played: no-such.flac: can't be"):
        judge_live(judge, corpus_of(lost), "test", progress=lambda line: None)
    silent = LabelledUtterance("silent", "A", " ", "joy")
    with pytest.raises(CorpusError, match="test split has neither clips nor words"):
        choose_rows(corpus_of(silent), "test")
    with pytest.raises(CorpusError, match="dev split is empty; choose another with --split"):
        choose_rows(corpus_of(silent), "dev")
    with pytest.raises(ConfigError, match=r"row 'words': read's test split has clean, noise_10db"):
        choose_rows(corpus_of(lost), "test", rows=["words"])


def test_a_wrong_speed_is_refused(tmp_path):
    """Before anything is loaded, in one line."""
    with pytest.raises(ConfigError, match=r"--speed 0: must be 'max' or a number above 0"):
        evaluate_live(BUNDLE, corpus="meld", corpora=tmp_path, speed=0, out=tmp_path)


def test_clips_are_told_apart_by_silence():
    """Dialogues are further apart than turns, and every sample leads to its clip."""
    turns = Dialogue("d", (read(0), read(1)))
    playlist = Playlist([turns, Dialogue("e", (read(2),))])
    pieces = list(playlist)
    lengths = [len(read_audio(clip)) for clip in CLIPS]
    around = [DIALOGUE_S, TURN_S, DIALOGUE_S]
    assert [len(piece) for piece in pieces] == [
        length + round((silence + 2 * SURROUNDED_S) * SAMPLE_RATE_HZ)
        for length, silence in zip(lengths, around, strict=True)
    ]
    stream = np.concatenate(pieces)
    for number in range(3):
        start, sound = playlist.start_of(number), playlist.sound(number)
        np.testing.assert_array_equal(stream[start : start + len(sound)], sound)
        assert playlist.number_at(start) == playlist.number_at(start + len(sound) - 1) == number


def test_noise_is_measured_against_the_speech():
    """Silence around a clip doesn't make its noise weaker: 10 dB stay 10 dB below the speech."""
    clip = read_audio(CLIPS[0]).astype(float)
    noise = np.random.default_rng(0).integers(-1000, 1000, 16000).astype(np.int16)
    condition = Condition(snr_db=10.0)
    playlist = Playlist(
        [Dialogue("d", (read(0),))], condition=condition, sounds=NoisesAndRooms((noise,), ())
    )
    margin = round(SURROUNDED_S * SAMPLE_RATE_HZ)
    added = playlist.sound(0)[:margin].astype(float)  # nothing else is there yet
    loudness = [10 * np.log10(np.mean(np.square(sound))) for sound in (clip, added)]
    assert loudness[0] - loudness[1] == pytest.approx(10, abs=1.5)


def judged(gold: list[int], said: list[int], *, sure: list[float]) -> LiveJudged:
    """Four labels; -1 where nothing was said."""
    probabilities = np.full((len(gold), 4), 0.25)
    for row, (label, top) in enumerate(zip(said, sure, strict=True)):
        if label >= 0:
            probabilities[row] = (1 - top) / 3
            probabilities[row, label] = top
    return LiveJudged(
        ids=tuple(map(str, range(len(gold)))),
        speakers=("Actor_21", "Actor_22") * (len(gold) // 2),
        gold=np.array(gold),
        probabilities=probabilities,
        sets=probabilities >= 0.25,
        abstained=probabilities.max(1) < 0.5,
        heard=np.array(said) >= 0,
        foreign=0,
        wer=None,
    )


def test_figures_count_what_was_missed_as_wrong():
    """UAR over the labels that occur, coverage and risk over what something was said of."""
    one = judged([0, 0, 1, 1], [0, -1, 1, 3], sure=[0.9, 0, 0.8, 0.4])
    row = measure_row(one, labels=("a", "b", "c", "d"))
    assert row["missed"] == ["1"]
    assert row["uar"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert row["accuracy"] == 0.5
    assert row["set_coverage"] == pytest.approx(2 / 3)
    assert row["set_size"] == 1
    assert row["abstention"] == pytest.approx(1 / 3)
    assert row["risk"] == 0
    assert row["sexes"]["male"]["accuracy"] == 1
    assert row["sexes"]["female"] == {
        "count": 2, "uar": 0, "uar_shared": 0, "weighted_f1": 0, "accuracy": 0
    }  # fmt: skip
    assert row["classes"]["a"] == {"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2}


def test_shared_recall_leaves_out_labels_that_do_not_occur():
    """Saying a label that the corpus lacks costs UAR; the likeliest of the others counts shared."""
    one = judged([0, 1], [3, 1], sure=[0.6, 0.9])
    one.probabilities[0] = [0.3, 0.05, 0.05, 0.6]
    row = measure_row(one)
    assert row["uar"] == 0.5
    assert row["uar_shared"] == 1


def test_the_surest_half_is_compared_with_all():
    """Right where it is sure: a gain; the sureness of nothing is no gain."""
    sure = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45]])
    assert surest_half_gain(np.array([0, 0, 1, 0]), sure) == 0.25
    assert surest_half_gain(np.array([], int), sure[:0]) == 0


def test_sexes_are_told_where_the_corpus_tells_them():
    """RAVDESS by number, nEMO by word, TESS's two women; nobody else is guessed."""
    speakers = ("Actor_21", "Actor_22", "KD0 female", "TP0 male", "OAF", "Ross", "Mrs Geller", "")
    assert [sex_of(s) for s in speakers] == [
        "male", "female", "female", "male", "female", "", "", ""
    ]  # fmt: skip


def test_the_report_holds_every_row(tmp_path):
    """Figures of played rows, in metrics.json and on a page that stands alone."""
    actor = tmp_path / "corpora"
    for number in range(1, 25):
        (actor / "ravdess" / f"Actor_{number:02d}").mkdir(parents=True)
        name = f"03-01-05-01-02-01-{number:02d}.flac"
        shutil.copy(CLIPS[0], actor / "ravdess" / f"Actor_{number:02d}" / name)
    told: list[str] = []
    metrics = evaluate_live(
        BUNDLE,
        corpus="ravdess",
        corpora=actor,
        rows=["clean", "gain_minus_20db"],
        out=tmp_path / "report",
        progress=told.append,
    )
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == metrics
    assert list(metrics["rows"]) == ["clean", "gain_minus_20db"]
    clean, quiet = metrics["rows"].values()
    assert metrics["shown"]["uar"] == clean["uar"]
    assert metrics["shown"]["uar_change_worst_gain"] == quiet["uar"] - clean["uar"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page == render_live(metrics)
    assert page.count("<svg") == 4
    assert f"{100 * clean['set_size'] / 100:.2f}</td>" in page
    assert told[-1] == str(tmp_path / "report" / "report.html")
    assert not any(line.startswith("not played") for line in told)
