"""Streaming evaluation: clips through the whole live path, and every figure of its report."""

import hashlib
import json
import shutil
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stream_hbaf import evaluation
from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.augment import Condition, NoisesAndRooms
from stream_hbaf.corpora.clips import DIALOGUE_S, MARGIN_S, TURN_S, Playlist
from stream_hbaf.corpora.dialogue import LABELS, Corpus, Dialogue, LabelledUtterance
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.evaluation.conditions import (
    _load,
    _Task,
    choose_conditions,
    evaluate_streaming,
)
from stream_hbaf.evaluation.report import render_streaming
from stream_hbaf.evaluation.streaming import (
    StreamingPredictions,
    open_recognizer,
    predict_clips,
    predict_text,
)
from stream_hbaf.evaluation.summary import (
    CONDITION_TITLES,
    confident_half_gain,
    measure_condition,
    sex_of,
)
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.networks.calibration import Modality
from stream_hbaf.recognizer import Recognizer

BUNDLE = "live-en"
RECORDINGS = Path(__file__).parent / "recordings"
CLIPS = [
    RECORDINGS / f"sense_and_sensibility_01_austen_64kb-{n}.flac" for n in ("0880", "0930", "0870")
]
WORDS = [clip.with_suffix(".txt").read_text().strip() for clip in CLIPS]


@pytest.fixture(scope="module")
def recognizer() -> Iterator[Recognizer]:
    with open_recognizer(BUNDLE) as opened:
        yield opened


def corpus_of(*utterances: LabelledUtterance) -> Corpus:
    dialogues = tuple(Dialogue(one.id, (one,)) for one in utterances)
    return Corpus("read", LABELS, {"train": (), "dev": (), "test": dialogues})


def read(number: int, label: str | None = "neutral") -> LabelledUtterance:
    return LabelledUtterance(f"u{number}", "Actor_01", WORDS[number], label, audio=CLIPS[number])


@pytest.fixture(scope="module")
def played(recognizer: Recognizer) -> StreamingPredictions:
    """Two sentences as fast as possible, between them a clip that isn't there."""
    lost = LabelledUtterance("lost", "Actor_02", "Hello there.", "joy", audio=Path("no-such.flac"))
    lines: list[str] = []
    found = predict_clips(
        recognizer, corpus_of(read(0), lost, read(1)), "test", progress=lines.append
    )
    assert any(line.startswith("not played: lost: no-such.flac: can't be read") for line in lines)
    assert lines[-1] == "3 of 3 clips, u1"
    return found


def test_each_clip_has_a_prediction(played: StreamingPredictions) -> None:
    """A clip's utterance and words are found; one that can't be read is missed, and counts."""
    assert played.ids == ("u0", "lost", "u1")
    assert played.detected.tolist() == [True, False, True]
    assert played.missed == ("lost",)
    np.testing.assert_array_equal(played.probabilities[1], np.full(7, 1 / 7))
    np.testing.assert_allclose(played.probabilities.sum(1), 1)
    assert played.wer is not None
    assert played.wer < 0.3
    assert set(played.cost_ms) == {"vad", "acoustic", "text", "classifier"}


def test_speed_changes_nothing(recognizer: Recognizer, played: StreamingPredictions) -> None:
    """At twenty times real time and at once: the same probabilities of the same utterances."""
    paced = predict_clips(
        recognizer, corpus_of(read(0), read(1)), "test", speed=20.0, progress=lambda line: None
    )
    np.testing.assert_allclose(paced.probabilities, played.probabilities[[0, 2]], atol=1e-5)
    np.testing.assert_array_equal(paced.sets, played.sets[[0, 2]])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["longest last", "longest first"])
def test_the_longest_utterance_of_a_clip_counts(
    recognizer: Recognizer, tmp_path: Path, order: tuple[int, int]
) -> None:
    """Two sentences in one clip sound as they do in two clips; the longer one is the clip's."""
    dialogue = Dialogue("d", tuple(map(read, order)))
    corpus = Corpus("read", LABELS, {"test": (dialogue,)})
    apart = predict_clips(recognizer, corpus, "test", progress=lambda line: None)
    between = np.zeros(round((TURN_S + 2 * MARGIN_S) * SAMPLE_RATE_HZ), np.int16)
    first, second = (read_audio(CLIPS[number]) for number in order)
    with wave.open(str(tmp_path / "both.wav"), "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        out.writeframes(np.concatenate([first, between, second]).tobytes())
    words = " ".join(WORDS[number] for number in order)
    clip = LabelledUtterance("both", "Actor_01", words, "joy", audio=tmp_path / "both.wav")
    both = predict_clips(recognizer, corpus_of(clip), "test", progress=lambda line: None)
    longer = order.index(1)  # 3.1 s against 3.0 s
    np.testing.assert_allclose(both.probabilities[0], apart.probabilities[longer], atol=1e-5)
    assert np.abs(both.probabilities[0] - apart.probabilities[1 - longer]).max() > 1e-3
    assert both.missed == ()
    assert both.wer == apart.wer  # the words of both are the clip's


def test_a_bundle_that_is_not_live_is_refused(tmp_path: Path) -> None:
    """A network that sees the future is refused before anything is loaded, with what to choose."""
    offline = tmp_path / "offline"
    shutil.copytree(Path(__file__).parent.parent / "models" / BUNDLE, offline)
    settings = (offline / "config.yaml").read_bytes()
    changed = settings.replace(b"mode: live", b"mode: offline")
    (offline / "config.yaml").write_bytes(changed)
    old, new = (hashlib.sha256(content).hexdigest() for content in (settings, changed))
    sums = offline / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, new))
    with pytest.raises(BundleError, match=r"was trained offline .*; take one of mode live"):
        open_recognizer(str(offline))


def test_a_withheld_modality_is_not_used(
    recognizer: Recognizer, played: StreamingPredictions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its sound the prediction is that of the words alone, and the other way round."""
    one = corpus_of(read(0))
    # The words as the corpus writes them: Whisper's full stop and capitals count as well.
    words = Transcript(WORDS[0], "en", avg_logprob=0.0, no_speech_prob=0.0)
    monkeypatch.setattr(recognizer.transcriber, "final", lambda *_, **__: words)
    text, audio = (
        predict_clips(recognizer, one, "test", modalities=[modality], progress=lambda line: None)
        for modality in ("text", "audio")
    )
    probabilities = [played.probabilities[0], text.probabilities[0], audio.probabilities[0]]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(probabilities[a] - probabilities[b]).max() > 1e-3
    alone = predict_text(recognizer, one, "test", progress=lambda line: None)
    np.testing.assert_allclose(text.probabilities, alone.probabilities, atol=1e-5)


@pytest.mark.parametrize(
    "modalities", [("audio", "text"), ("audio",), ("text",)], ids=lambda given: "+".join(given)
)
def test_a_withheld_modality_takes_nothing_else_along(
    recognizer: Recognizer, modalities: tuple[Modality, ...]
) -> None:
    """Whisper's encoder gives audio features as well: without the text they are still used."""
    samples = read_audio(CLIPS[0])
    text = recognizer.encode_text(recognizer.transcriber.final(samples, speech_score=1.0))
    assert recognizer.acoustic is not None
    acoustic = recognizer.acoustic.extract(samples)
    prediction = recognizer.classify_final(
        acoustic=acoustic, text=text, dialogue=recognizer.new_dialogue(), modalities=modalities
    )
    assert prediction.modalities == modalities


def test_texts_are_read_with_their_dialogue(recognizer: Recognizer) -> None:
    """Reference texts have no errors, simulated ASR errors are as many as asked for, every time."""
    turns = [LabelledUtterance(f"t{n}", "A", WORDS[n % 3], "joy") for n in range(6)]
    corpus = Corpus("read", LABELS, {"test": (Dialogue("d", tuple(turns)),)})
    gold = predict_text(recognizer, corpus, "test", progress=lambda line: None)
    first, again = (
        predict_text(recognizer, corpus, "test", error_rate=0.3, progress=lambda line: None)
        for _ in range(2)
    )
    assert gold.wer == 0
    assert first.wer is not None
    assert first.wer == again.wer
    assert 0.1 < first.wer < 0.6
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert np.abs(gold.probabilities[0] - gold.probabilities[3]).max() > 1e-4  # its past differs


def test_unknown_labels_are_counted_apart(recognizer: Recognizer) -> None:
    """Utterances whose label the bundle lacks are left out; a corpus of such alone is refused."""
    known, strange = (
        LabelledUtterance(label, "A", "Well.", label) for label in ("fear", "boredom")
    )
    found = predict_text(recognizer, corpus_of(known, strange), "test", progress=lambda line: None)
    assert (found.ids, found.unknown_labels) == (("fear",), 1)
    with pytest.raises(BundleError, match=r"predicts anger, .*but read has boredom; choose a"):
        predict_text(recognizer, corpus_of(strange), "test")


def test_a_corpus_without_clips_or_texts_is_refused(recognizer: Recognizer) -> None:
    """No clip that can be played, neither clips nor words, nothing at all: one line each."""
    lost = LabelledUtterance("lost", "A", "Hello.", "joy", audio=Path("no-such.flac"))
    with pytest.raises(CorpusError, match=r"^read: no clip can be played: no-such.flac: can't be"):
        predict_clips(recognizer, corpus_of(lost), "test", progress=lambda line: None)
    silent = LabelledUtterance("silent", "A", " ", "joy")
    with pytest.raises(CorpusError, match="test split has neither clips nor texts"):
        choose_conditions(corpus_of(silent), "test")
    with pytest.raises(CorpusError, match="dev split is empty; choose another with --split"):
        choose_conditions(corpus_of(silent), "dev")
    for names in (["reference_text"], ["clean", "reverb"]):
        message = rf"condition '{names[-1]}': read's test split has clean, noise_10db"
        with pytest.raises(ConfigError, match=message):
            choose_conditions(corpus_of(lost), "test", names=names)


def test_conditions_are_those_of_the_corpus() -> None:
    """Of the names that are asked for, a corpus with clips and one without take their own."""
    clips, texts = corpus_of(read(0)), corpus_of(LabelledUtterance("t", "A", "Well.", "joy"))
    names = ["clean", "reference_text"]
    assert list(choose_conditions(clips, "test", names=names)) == ["clean"]
    assert list(choose_conditions(texts, "test", names=names)) == ["reference_text"]
    every = [*choose_conditions(clips, "test"), *choose_conditions(texts, "test")]
    assert sorted(every) == sorted(CONDITION_TITLES)


def test_a_wrong_speed_is_refused(tmp_path: Path) -> None:
    """Before anything is loaded, in one line."""
    with pytest.raises(ConfigError, match=r"--speed 0: must be 'max' or a number above 0"):
        evaluate_streaming(BUNDLE, ["meld"], corpora=tmp_path, speed=0, out=tmp_path)


def test_clips_are_told_apart_by_silence() -> None:
    """Dialogues are further apart than turns, and every sample leads to its clip."""
    turns = Dialogue("d", (read(0), read(1)))
    playlist = Playlist([turns, Dialogue("e", (read(2),))])
    pieces = list(playlist)
    lengths = [len(read_audio(clip)) for clip in CLIPS]
    around = [DIALOGUE_S, TURN_S, DIALOGUE_S]
    assert [len(piece) for piece in pieces] == [
        length + round((silence + 2 * MARGIN_S) * SAMPLE_RATE_HZ)
        for length, silence in zip(lengths, around, strict=True)
    ]
    stream = np.concatenate(pieces)
    for number in range(3):
        start, sound = playlist.start_of(number), playlist.clip(number)
        np.testing.assert_array_equal(stream[start : start + len(sound)], sound)
        assert playlist.number_at(start) == playlist.number_at(start + len(sound) - 1) == number


def test_noise_is_measured_against_the_speech() -> None:
    """Silence around a clip doesn't make its noise weaker: 10 dB stay 10 dB below the speech."""
    clip = read_audio(CLIPS[0]).astype(float)
    noise = np.random.default_rng(0).integers(-1000, 1000, 16000).astype(np.int16)
    condition = Condition(snr_db=10.0)
    playlist = Playlist(
        [Dialogue("d", (read(0),))], condition=condition, sounds=NoisesAndRooms((noise,), ())
    )
    margin = round(MARGIN_S * SAMPLE_RATE_HZ)
    added = playlist.clip(0)[:margin].astype(float)  # nothing else is there yet
    loudness = [10 * np.log10(np.mean(np.square(sound))) for sound in (clip, added)]
    assert loudness[0] - loudness[1] == pytest.approx(10, abs=1.5)


def predictions(
    gold: list[int], predicted: list[int], *, confidence: list[float]
) -> StreamingPredictions:
    """Four labels; -1 where there is no prediction."""
    probabilities = np.full((len(gold), 4), 0.25)
    for row, (label, top) in enumerate(zip(predicted, confidence, strict=True)):
        if label >= 0:
            probabilities[row] = (1 - top) / 3
            probabilities[row, label] = top
    return StreamingPredictions(
        ids=tuple(map(str, range(len(gold)))),
        speakers=("Actor_21", "Actor_22") * (len(gold) // 2),
        gold=np.array(gold),
        probabilities=probabilities,
        sets=probabilities >= 0.25,
        abstained=probabilities.max(1) < 0.5,
        detected=np.array(predicted) >= 0,
        unknown_labels=0,
        wer=None,
    )


NAMES = ("a", "b", "c", "d")


def test_figures_count_what_was_missed_as_wrong() -> None:
    """UAR over the labels that occur, coverage and risk over what has a prediction."""
    one = predictions([0, 0, 1, 1], [0, -1, 1, 3], confidence=[0.9, 0, 0.8, 0.4])
    figures = measure_condition(one, NAMES)
    assert figures["missed"] == ["1"]
    assert figures["uar"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert figures["accuracy"] == 0.5
    assert figures["set_coverage"] == pytest.approx(2 / 3)
    assert figures["set_size"] == 1
    assert figures["abstention"] == pytest.approx(1 / 3)
    assert figures["risk"] == 0
    assert figures["by_sex"]["male"]["accuracy"] == 1
    assert figures["by_sex"]["female"] == {
        "count": 2, "uar": 0, "uar_shared": 0, "weighted_f1": 0, "accuracy": 0
    }  # fmt: skip
    assert figures["by_class"]["a"] == {"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2}
    assert figures["confusion"] == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_figures_of_a_corpus_in_which_nothing_was_detected() -> None:
    """Every score is 0, and what describes confidence has no value or 0."""
    figures = measure_condition(predictions([0, 1], [-1, -1], confidence=[0, 0]), NAMES)
    assert (figures["uar"], figures["accuracy"], figures["ece"]) == (0, 0, 0)
    assert (figures["ece_by_chance"], figures["set_coverage"], figures["risk"]) == (0, None, None)
    assert json.dumps(figures, allow_nan=False)


def test_shared_recall_leaves_out_labels_that_do_not_occur() -> None:
    """Predicting a label that the corpus lacks costs UAR; shared takes the likeliest other."""
    one = predictions([0, 1], [3, 1], confidence=[0.6, 0.9])
    one.probabilities[0] = [0.3, 0.05, 0.05, 0.6]
    figures = measure_condition(one, NAMES)
    assert figures["uar"] == 0.5
    assert figures["uar_shared"] == 1


def test_the_confident_half_is_compared_with_all() -> None:
    """Right where it is confident: a gain; of no predictions there is none."""
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45]])
    assert confident_half_gain(np.array([0, 0, 1, 0]), probabilities) == 0.25
    assert confident_half_gain(np.array([], int), probabilities[:0]) == 0


def test_sexes_are_those_that_the_corpus_gives() -> None:
    """RAVDESS by number, nEMO by word, TESS's two women; nobody else is guessed."""
    speakers = ("Actor_21", "Actor_22", "KD0 female", "TP0 male", "OAF", "Ross", "Mrs Geller", "")
    assert [sex_of(s) for s in speakers] == [
        "male", "female", "female", "male", "female", "", "", ""
    ]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of one's own: two clips with labels, and no other column."""
    file = tmp_path_factory.mktemp("own") / "mine.csv"
    file.write_text(f"audio,label\n{CLIPS[0]},neutral\n{CLIPS[1]},joy\n", encoding="utf-8")
    return file


def test_the_report_holds_every_condition(table: Path, tmp_path: Path) -> None:
    """Figures of played conditions, in metrics.json and on a page that stands alone."""
    lines: list[str] = []
    out = tmp_path / "report"
    live = evaluate_streaming(
        BUNDLE,
        [str(table)],
        corpora=tmp_path,
        conditions=["clean", "gain_minus_20db"],
        out=out,
        progress=lines.append,
    )
    report = json.loads((out / "metrics.json").read_text())
    assert list(report["conditions"]) == ["clean", "gain_minus_20db"]
    assert (report["corpus"], report["input"], report["bundle"]["id"]) == ("mine", "clips", BUNDLE)
    clean, quiet = report["conditions"].values()
    assert (clean["utterances"], clean["missed"], clean["wer"]) == (2, [], None)
    assert report["summary"]["uar"] == clean["uar"] == live["mine_uar"]
    assert report["summary"]["uar_change_worst_gain"] == quiet["uar"] - clean["uar"]
    assert live["conditions"]["mine/gain_minus_20db"]["ece"] == quiet["ece"]
    page = (out / "report.html").read_text()
    assert page == render_streaming(report)
    assert page.count("<svg") == 4
    assert f"{clean['set_size']:.2f}</td>" in page
    assert lines[-1] == str(out / "report.html")
    assert not any(line.startswith("not played") for line in lines)


def test_conditions_that_need_noises_are_left_out_where_there_are_none(
    table: Path, tmp_path: Path
) -> None:
    """One line says so; for conditions that are asked for by name, noises have to be there."""
    lines: list[str] = []
    task = _Task(BUNDLE, str(table), role="", split="test", names=())
    work = _load(task, corpora=tmp_path, progress=lines.append)
    assert list(work.conditions) == [
        "clean", "gain_minus_20db", "gain_plus_20db", "gain_minus_10db", "gain_plus_10db",
        "telephone", "audio_only", "text_only",
    ]  # fmt: skip
    (line,) = lines
    assert line.startswith(f"mine: without noise_10db, noise_10db_room: {tmp_path / 'speech'}, ")
    with pytest.raises(CorpusError, match=r"speech/noise is missing"):
        evaluate_streaming(
            BUNDLE, [str(table)], corpora=tmp_path, conditions=["noise_10db"], out=tmp_path
        )


def test_several_corpora_and_bundles_for_comparison(table: Path, tmp_path: Path) -> None:
    """A folder for each report, a key for each comparison, and a report isn't made twice."""
    other = table.with_name("other.csv")
    other.write_text(table.read_text(), encoding="utf-8")
    lines: list[str] = []
    runs = [
        evaluate_streaming(
            BUNDLE,
            [str(table), str(other)],
            corpora=tmp_path,
            conditions=["clean"],
            held_out={str(table): BUNDLE},
            resume=True,
            out=tmp_path / "report",
            progress=lines.append,
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "mine", "mine-held-out", "other"
    ]  # fmt: skip
    kept = [line for line in lines if line.endswith("kept, made of the same bundle")]
    assert len(kept) == 3
    assert runs[0]["held_out_corpus_uar_each"] == {"mine": runs[0]["mine_uar_shared"]}
    with pytest.raises(ConfigError, match="--live: 2 corpora are called 'mine'; rename one"):
        evaluate_streaming(BUNDLE, [str(table), "mine.csv"], corpora=tmp_path, out=tmp_path)
    with pytest.raises(BundleError, match="takes audio and text; --single-modality compares"):
        evaluate_streaming(
            BUNDLE,
            ["meld"],
            corpora=tmp_path,
            single_modality={"meld": BUNDLE},
            out=tmp_path,
        )


def test_a_report_without_matplotlib_has_no_plots(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain install gives every figure; one line says that plots are left out, and why."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name == "stream_hbaf.evaluation.plots"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(evaluation, "plots", raising=False)
    lines: list[str] = []
    evaluate_streaming(
        BUNDLE,
        [str(table)],
        corpora=tmp_path,
        conditions=["clean"],
        out=tmp_path / "report",
        progress=lines.append,
    )
    assert any("has no plots, since matplotlib is not installed" in line for line in lines)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<svg" not in page
    assert "as recorded" in page
