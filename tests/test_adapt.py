"""Adapting a bundle to corrections: what is fitted, what is written, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from recognizer_kit import LABELS, SENTENCES, save_bundle

from stream_hbaf.bundle import Bundle
from stream_hbaf.cli import main
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.events import Emotion, Feedback, Model, Utterance
from stream_hbaf.networks.calibration import Calibration, Head, softmax
from stream_hbaf.sessions.format import Header
from stream_hbaf.sessions.writer import SessionWriter
from stream_hbaf.training.adapt import FEWEST, adapt, fit_head

PLAIN = Calibration.of_temperature(1.0)


def draw(
    count: int, *, seed: int, scale: float = 1.0, shift: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Answers [N, 3] and labels, where the true probabilities are of other scale and bias."""
    generator = np.random.default_rng(seed)
    logits = 1.5 * generator.normal(size=(count, 3))
    true = softmax(scale * logits + np.array([shift, 0.0, 0.0]))
    labels = np.array([generator.choice(3, p=row) for row in true])
    return softmax(logits), labels


def test_a_head_is_a_scale_and_a_bias_of_log_probabilities() -> None:
    """p' ~ p ** scale * exp(bias), after everything else that calibration does."""
    head = Head(scale=1.4, bias=(0.5, 0.0, -0.3))
    logits = np.array([[1.0, 0.2, -0.5], [0.0, 3.0, 1.0]])
    plain = PLAIN.probabilities(logits, pattern="text")
    powers = plain**1.4 * np.exp([0.5, 0.0, -0.3])
    found = PLAIN.model_copy(update={"head": head}).probabilities(logits, pattern="text")
    np.testing.assert_allclose(found, powers / powers.sum(1, keepdims=True))


def test_scale_and_bias_are_found() -> None:
    """With many corrections the head is the true one, to a constant in the bias."""
    answers, gold = draw(4000, seed=0, scale=0.5, shift=1.5)
    found = fit_head(PLAIN, answers, gold, labels=LABELS)
    head = found.calibration.head
    assert head is not None
    assert head.scale == pytest.approx(0.5, abs=0.06)
    assert head.bias[0] - np.mean(head.bias[1:]) == pytest.approx(1.5, abs=0.15)
    assert found.loss[1] < found.loss[0] - 0.2
    assert found.coverage == pytest.approx(0.9, abs=0.02)
    assert found.shares["angry"] == pytest.approx((gold == 0).mean(), abs=0.01)


def test_a_few_dozen_corrections_help_on_new_utterances() -> None:
    """Forty of them, in most draws; on average clearly."""
    gains = []
    for seed in range(10):
        head = fit_head(
            PLAIN, *draw(40, seed=seed, scale=0.5, shift=2.0), labels=LABELS
        ).calibration.head
        assert head is not None
        answers, gold = draw(2000, seed=100 + seed, scale=0.5, shift=2.0)
        rows = np.arange(2000), gold
        gains.append(np.log(head(answers)[rows]).mean() - np.log(answers[rows]).mean())
    assert np.mean(gains) > 0.15
    assert np.mean(np.array(gains) > 0) >= 0.9


def test_answers_that_are_right_already_stay_nearly_the_same() -> None:
    """Cross-validation picks a strong penalty, or none at all of a head."""
    losses = []
    for seed in range(10):
        head = fit_head(PLAIN, *draw(40, seed=seed), labels=LABELS).calibration.head
        assert head is not None
        answers, gold = draw(2000, seed=200 + seed)
        rows = np.arange(2000), gold
        losses.append(np.log(answers[rows]).mean() - np.log(head(answers)[rows]).mean())
    assert np.mean(losses) < 0.03


# --- the whole way --------------------------------------------------------------------------------


def record(folder: Path, *, corrected: int, label: str = "happy") -> Path:
    """A session of dialogues of seven sentences, the first utterances of which are corrected."""
    model = Model(id="read", sha256="ab" * 32)
    header = Header(
        id="20260101T120000Z-abcdef",
        began="2026-01-01T12:00:00.000+00:00",
        model=model,
        labels=LABELS,
        settings={},
        versions={},
    )
    writer = SessionWriter(folder, header=header)
    for n in range(max(corrected, 1)):
        dialogue, turn = divmod(n, len(SENTENCES))
        end = Utterance(
            id=f"d{dialogue}-{turn + 1}",
            rev=1,
            type="end",
            source="kitchen",
            dialogue_id=f"d{dialogue}",
            turn=turn + 1,
            speaker="",
            start_time="2026-01-01T12:00:01.000+00:00",
            audio_start_ms=1000.0 * n,
            audio_end_ms=1000.0 * n + 900,
            text=SENTENCES[turn],
            emotion=Emotion(label="sad", probabilities={"sad": 1.0}),
            model=model,
        )
        writer.write_event(end)
        if n < corrected:
            given = label if n % 3 else LABELS[0]
            writer.write_event(Feedback(id=end.id, label=given, by="Ann"))
    writer.close()
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bundle(tmp_path_factory.mktemp("adapts")).model


def test_an_adapted_bundle_is_a_new_folder_that_leans_to_the_corrections(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same network with a head; the card and the figures say what was done."""
    sessions = record(tmp_path / "sessions", corrected=42)
    out, cache = tmp_path / "kitchen", str(tmp_path / "cache")
    assert main(["adapt", bundle, str(sessions), "--out", str(out), "--cache", cache]) == 0
    assert "adapted to 42 corrections" in capsys.readouterr().out
    before, after = Bundle.load(bundle), Bundle.load(str(out))
    head = after.calibration.head
    assert (after.id, after.labels) == ("kitchen", before.labels)
    assert head is not None
    assert head.bias[1] > head.bias[0] > head.bias[2]
    assert after.config.shares["happy"] == pytest.approx(29 / 45)
    assert before.calibration.head is None
    for name, weight in before.network.state_dict().items():
        np.testing.assert_array_equal(weight, after.network.state_dict()[name])
    figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert figures["adapted"]["corrected"] == {"angry": 14, "happy": 28}
    assert figures["adapted"]["from"] == {"id": "read", "sha256": before.sha256}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "42 corrected\nutterances (angry 14, happy 28)" in card


def test_adapting_again_replaces_the_head(bundle: str, tmp_path: Path) -> None:
    """An adapted bundle adapted to the same corrections is the same once more."""
    sessions = record(tmp_path / "sessions", corrected=42)
    first = adapt(bundle, sessions, out=tmp_path / "one", cache=tmp_path / "cache")
    second = adapt(str(tmp_path / "one"), sessions, out=tmp_path / "two", cache=tmp_path / "cache")
    assert first.calibration.head == second.calibration.head


def test_what_cannot_be_adapted_is_refused(bundle: str, tmp_path: Path) -> None:
    """Too few corrections, of one label alone, to other labels; a folder that exists."""
    few = record(tmp_path / "few", corrected=FEWEST - 1)
    said: list[str] = []
    with pytest.raises(CorpusError, match=r"29 corrected utterances of 2 labels.*at least 30"):
        adapt(bundle, few, out=tmp_path / "new", cache=tmp_path / "cache")
    strange = record(tmp_path / "strange", corrected=33, label="bored")
    with pytest.raises(CorpusError, match="11 corrected utterances of 1 label"):
        adapt(bundle, strange, out=tmp_path / "new", cache=tmp_path / "cache", progress=said.append)
    assert said == ["22 corrections to labels that the bundle doesn't have are left out"]
    with pytest.raises(ConfigError, match="exists already"):
        adapt(bundle, few, out=tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "new").exists()
