"""Offline evaluation: a bundle's predictions for a corpus are those it would give live."""

import csv
import json
import shutil
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stream_hbaf.audio.file import read_audio
from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.corpora.dialogue import LABELS, Corpus
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.evaluation.metrics import paired_bootstrap, score
from stream_hbaf.evaluation.offline import predict_corpus
from stream_hbaf.evaluation.report import evaluate_offline
from stream_hbaf.features.commonsense import Event2MindHeads
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import TextEncoder, Turn
from stream_hbaf.networks.calibration import Calibration
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.network import Features

RECORDINGS = Path(__file__).parent / "recordings"
DIALOGUES = 3
TEXTS = (
    "Hi!",
    "I told you not to touch it.",
    "Oh my God, that is wonderful news!",
    "Well.",
    "I am so sorry about what happened to you",
    "Who is there?",
)


def make_meld(folder: Path) -> Path:
    """Three dialogues of six, five and four turns a split, as MELD's own files."""
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        with (folder / f"{split}_sent_emo.csv").open("w", encoding="utf-8", newline="") as out:
            table = csv.writer(out)
            table.writerow(["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"])
            for dialogue in range(DIALOGUES):
                for turn, text in enumerate(TEXTS[dialogue:]):
                    label = LABELS[(2 * dialogue + turn) % len(LABELS)]
                    table.writerow([text, "AB"[turn % 2], label, dialogue, turn])
    return folder


def make_bundle(
    name: str, *, seed: int, labels: tuple[str, ...] = LABELS, **network: Any
) -> Bundle:
    torch.manual_seed(seed)
    sizes = HbafConfig(audio_width=12, hidden=16, heads=2, layers=1, filters=4, window=3, **network)
    return Bundle(
        config=BundleConfig(
            id=name,
            labels=labels,
            encoder="all-MiniLM-L6-v2",
            calibration=Calibration.of_temperature(0.7),
            network=sizes,
        ),
        scaling=Scaling(
            selected=np.arange(0, 120, 10),
            mean=np.zeros(12, np.float32),
            deviation=np.ones(12, np.float32),
        ),
        encoder=TextEncoder(),
        commonsense=Event2MindHeads(text_width=384, width=384, hidden=8).half().float().eval(),
        network=HBAF(sizes).half().float().eval(),
    )


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    make_meld(folder / "meld")
    return folder


@pytest.fixture(scope="module")
def corpus(corpora: Path) -> Corpus:
    return open_corpus("meld", corpora)


@pytest.fixture(scope="module")
def live() -> Bundle:
    return make_bundle("live", seed=0)


def step_through(bundle: Bundle, corpus: Corpus) -> np.ndarray:
    """The test split's probabilities as the live recogniser gives them, an utterance at a time."""
    found = []
    heads = bundle.commonsense
    assert isinstance(heads, Event2MindHeads)
    for dialogue in corpus.splits["test"]:
        state = bundle.network.initial_state()
        for utterance in dialogue.utterances:
            text = bundle.encoder.encode_dialogues([[Turn(utterance.speaker, utterance.text)]])[0]
            features = Features(
                text=torch.from_numpy(text[0]),
                commonsense=torch.from_numpy(heads.infer(text)[0]),
            )
            logits, state = bundle.network.step(features, state)
            found.append(bundle.calibration.probabilities(logits.numpy(), pattern="text"))
    return np.stack(found)


def test_a_live_bundle_predicts_what_it_predicts_live(
    live: Bundle, corpus: Corpus, tmp_path: Path
) -> None:
    """Predictions of whole dialogues are those of stepping through them."""
    predicted = predict_corpus(live, corpus, "test", cache=tmp_path)
    np.testing.assert_allclose(predicted.probabilities, step_through(live, corpus), atol=2e-5)


def test_utterances_come_with_their_place_and_length(
    live: Bundle, corpus: Corpus, tmp_path: Path
) -> None:
    """Ids, gold labels, turn numbers, words and dialogues stand in the corpus's order."""
    predicted = predict_corpus(live, corpus, "test", cache=tmp_path)
    assert predicted.ids[5:8] == ("dia0_utt5", "dia1_utt0", "dia1_utt1")
    assert [LABELS[n] for n in predicted.gold[:3]] == ["anger", "disgust", "fear"]
    assert predicted.turns.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert predicted.words[:6].tolist() == [1, 7, 7, 1, 9, 3]
    assert predicted.dialogues.tolist() == [0] * 6 + [1] * 5 + [2] * 4
    assert predicted.with_audio == 0


def test_unlabelled_utterances_are_context_only(
    live: Bundle, corpus: Corpus, tmp_path: Path
) -> None:
    """Without a label an utterance counts for nothing and stays in its neighbours' past."""
    first, *others = corpus.splits["test"]
    unnamed = (replace(first.utterances[0], label=None), *first.utterances[1:])
    changed = (replace(first, utterances=unnamed), *others)
    context = replace(corpus, splits={**corpus.splits, "test": changed})
    predicted = predict_corpus(live, context, "test", cache=tmp_path)
    assert predicted.ids[0] == "dia0_utt1"
    assert predicted.turns[0] == 2
    np.testing.assert_allclose(predicted.probabilities, step_through(live, corpus)[1:], atol=2e-5)


def test_batches_and_caches_change_nothing(live: Bundle, corpus: Corpus, tmp_path: Path) -> None:
    """One dialogue at a time, or from the cache: the same to the last bits of float32."""
    first = predict_corpus(live, corpus, "test", cache=tmp_path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "text").iterdir()}
    again = predict_corpus(live, corpus, "test", cache=tmp_path, batch=1)
    np.testing.assert_allclose(again.probabilities, first.probabilities, atol=2e-5)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "text").iterdir()} == files


def test_labels_in_another_order_are_put_in_the_corpus_s(
    live: Bundle, corpus: Corpus, tmp_path: Path
) -> None:
    """Each column is its label's, whatever the bundle's order."""
    turned = replace(live, config=live.config.model_copy(update={"labels": LABELS[::-1]}))
    there = predict_corpus(live, corpus, "test", cache=tmp_path)
    back = predict_corpus(turned, corpus, "test", cache=tmp_path)
    np.testing.assert_array_equal(back.probabilities, there.probabilities[:, ::-1])
    np.testing.assert_array_equal(back.gold, there.gold)


def test_other_labels_are_refused(live: Bundle, corpus: Corpus, tmp_path: Path) -> None:
    """The error names both sets of labels."""
    six = ("ang", "exc", "fru", "hap", "neu", "sad")
    other = replace(live, config=live.config.model_copy(update={"labels": six}))
    with pytest.raises(BundleError, match=r"ang, exc, fru.*meld has anger, disgust"):
        predict_corpus(other, corpus, "test", cache=tmp_path)


def test_an_offline_bundle_sees_the_future(corpus: Corpus, tmp_path: Path) -> None:
    """Offline, the last text changes the prediction of the first utterance."""
    offline = make_bundle("offline", seed=0, mode="offline")
    first, *others = corpus.splits["test"]
    last = replace(first.utterances[-1], text="I hate you, get out of here!")
    changed = (replace(first, utterances=(*first.utterances[:-1], last)), *others)
    before = predict_corpus(offline, corpus, "test", cache=tmp_path)
    after = predict_corpus(
        offline, replace(corpus, splits={"test": changed}), "test", cache=tmp_path
    )
    moved = np.abs(before.probabilities - after.probabilities).max(1)
    assert moved[0] > 1e-5
    assert moved[6:].max() < 2e-5


@pytest.fixture(scope="module")
def saved(live: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two seeds of a live system and one offline, in folders."""
    folder = tmp_path_factory.mktemp("bundles")
    others = {
        "seed-1": make_bundle("live", seed=1),
        "off": make_bundle("off", seed=2, mode="offline"),
    }
    for name, bundle in {"seed-0": live, **others}.items():
        bundle.save(folder / name, metrics={}, card="")
    return [str(folder / name) for name in ("seed-0", "seed-1", "off")]


def test_evaluate_reports_two_systems(
    saved: list[str], corpora: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """From folders to a page: figures, spread and bootstrap are those of the predictions."""
    said: list[str] = []
    metrics = evaluate_offline(
        saved[:2],
        corpus="meld",
        corpora=corpora,
        against=saved[2:],
        out=tmp_path / "report",
        cache=tmp_path / "cache",
        progress=said.append,
    )
    predicted = [
        predict_corpus(Bundle.load(name), corpus, "test", cache=tmp_path / "cache")
        for name in saved
    ]
    scores = [score(one.gold, one.probabilities) for one in predicted]
    f1 = [one.weighted_f1 for one in scores]
    assert metrics["system"]["figures"]["weighted_f1"] == {
        "mean": pytest.approx(np.mean(f1[:2])),
        "sd": pytest.approx(np.std(f1[:2], ddof=1)),
    }
    assert metrics["against"]["figures"]["uar"] == {"mean": scores[2].uar, "sd": 0.0}
    found = paired_bootstrap(
        predicted[0].gold,
        np.stack([one.probabilities for one in predicted[:2]]),
        predicted[2].probabilities,
    )
    assert metrics["comparison"]["weighted_f1"]["utterances"]["p"] == found.p
    assert [b["sha256"] for b in metrics["system"]["bundles"]] == [
        Bundle.load(name).sha256 for name in saved[:2]
    ]
    assert (metrics["system"]["causal"], metrics["against"]["causal"]) == (True, False)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert f"{100 * np.mean(f1[:2]):.2f}" in page
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == metrics
    assert said[-1].startswith(f"{tmp_path / 'report' / 'report.html'}: weighted F1 ")


def test_evaluate_hears_the_clips_that_are_there(
    saved: list[str], corpora: Path, tmp_path: Path
) -> None:
    """Two of the test split's clips are there: two utterances have sound, the others are named."""
    shutil.copytree(corpora / "meld", tmp_path / "meld")
    clips = tmp_path / "meld" / "output_repeated_splits_test"
    clips.mkdir()
    speech = read_audio(RECORDINGS / "jfk.flac")
    for turn in range(2):
        with wave.open(str(clips / f"dia0_utt{turn}.mp4"), "wb") as out:
            out.setparams((1, 2, 16_000, 0, "NONE", ""))
            out.writeframes(speech[16_000 * turn :][:16_000].tobytes())
    said: list[str] = []
    where: Any = {"cache": tmp_path / "cache", "out": tmp_path / "report", "progress": said.append}
    metrics = evaluate_offline(saved[:1], corpus="meld", corpora=tmp_path, workers=1, **where)
    assert metrics["system"]["with_audio"] == 2
    assert any("13 without audio" in line and "dia0_utt2" in line for line in said)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "audio features of 2 of 15 utterances" in page


def test_evaluate_of_what_is_not_there_says_so(
    saved: list[str], corpora: Path, tmp_path: Path
) -> None:
    """A corpus that is missing or unknown, a bundle that isn't there: one line each."""
    where: Any = {"out": tmp_path / "report", "cache": tmp_path / "cache"}
    with pytest.raises(CorpusError, match=r"(test|train)_sent_emo"):
        evaluate_offline(saved, corpus="meld", corpora=tmp_path / "nowhere", **where)
    with pytest.raises(ConfigError, match="unknown corpus 'mled'"):
        evaluate_offline(saved, corpus="mled", corpora=corpora, **where)
    with pytest.raises(BundleError, match="no such folder and no such name"):
        evaluate_offline(["no-such"], corpus="meld", corpora=corpora, **where)
    with pytest.raises(BundleError, match="not seeds of one system"):
        evaluate_offline(saved, corpus="meld", corpora=corpora, progress=lambda line: None, **where)
    assert not (tmp_path / "report").exists()


def test_features_that_a_corpus_publishes_need_no_clips(
    live: Bundle, corpus: Corpus, tmp_path: Path
) -> None:
    """Each part of the representation may be published."""
    published: dict[str, Any] = {
        "audio": None,
        "prosody": (1.0,) * 8,
        "ge2e": np.ones(97, np.float32),
    }
    dialogues = tuple(
        replace(one, utterances=tuple(replace(u, **published) for u in one.utterances))
        for one in corpus.splits["test"]
    )
    settings = live.config.model_copy(update={"acoustic": "prosody+ge2e"})
    lines: list[str] = []
    found = predict_corpus(
        replace(live, config=settings),
        replace(corpus, splits={"test": dialogues}),
        "test",
        cache=tmp_path,
        progress=lines.append,
    )
    assert found.with_audio == len(found.ids) > 0
    assert lines == []
