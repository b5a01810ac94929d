"""What calibration promises of new utterances, on logits of which the truth is known."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.calibration import ALWAYS_ABSTAIN, PATTERNS, Calibration, Pattern, softmax
from stream_hbaf.training.calibration_fit import Evidence, fit_calibration

FRESH = 20_000


def draw(count: int, *, seed: int, spread: float = 2.0, overdone: float = 1.0) -> Evidence:
    """Logits [N, 7] too sure by ``overdone``, and labels drawn from what they should have been."""
    random = np.random.default_rng(seed)
    truth = spread * random.standard_normal((count, 7))
    cumulative = softmax(truth).cumsum(axis=1)
    labels = (random.random((count, 1)) > cumulative[:, :-1]).sum(axis=1)
    return (overdone * truth).astype(np.float32), labels


def coverage(
    calibration: Calibration,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    pattern: Pattern = "text",
) -> float:
    probabilities = calibration.probabilities(logits, pattern=pattern)
    sets = calibration.label_sets(probabilities, pattern=pattern)
    return float(sets[np.arange(len(labels)), labels].mean())


def answered(
    calibration: Calibration,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    pattern: Pattern = "text",
) -> tuple[float, float]:
    """Share of utterances answered, and how many of those answers are wrong."""
    probabilities = calibration.probabilities(logits, pattern=pattern)
    told = ~calibration.abstains(probabilities, pattern=pattern)
    wrong = probabilities.argmax(1) != labels
    return float(told.mean()), float(wrong[told].mean()) if told.any() else 0.0


@pytest.mark.parametrize("overdone", [0.5, 1.0, 2.5])
def test_temperature_is_what_logits_were_overdone_by(overdone: float) -> None:
    """To within the grid's 4 %."""
    found = fit_calibration({"text": [draw(4000, seed=1, overdone=overdone)]}, risk=0.3)
    assert found.temperatures["text"] == pytest.approx(overdone, rel=0.05)


@pytest.mark.parametrize("promised", [0.8, 0.9])
def test_sets_hold_the_right_label_as_often_as_promised(promised: float) -> None:
    """On 20,000 new utterances to within 2 %."""
    evidence: dict[Pattern, list[Evidence]] = {"text": [draw(3000, seed=2, overdone=2.0)]}
    found = fit_calibration(evidence, coverage=promised, risk=0.3)
    reached = coverage(found, *draw(FRESH, seed=3, overdone=2.0))
    assert reached == pytest.approx(promised, abs=0.02)


def test_sets_cover_however_wrong_the_probabilities_are() -> None:
    """Conformal sets need no right probabilities: labels drawn of other logits are covered too."""
    logits, _ = draw(3000, seed=4)
    labels = (logits.argmax(1) + np.random.default_rng(5).integers(0, 2, 3000)) % 7
    found = fit_calibration({"audio": [(logits[:2000], labels[:2000])]}, risk=0.3)
    assert 0.88 < coverage(found, logits[2000:], labels[2000:], pattern="audio") < 0.92


@pytest.mark.parametrize(("count", "share", "rank"), [(9, 0.9, 9), (8, 0.9, None), (99, 0.5, 50)])
def test_threshold_is_the_finite_sample_quantile(
    count: int, share: float, rank: int | None
) -> None:
    """The ceil((n+1) coverage)-th largest probability of a right label; too few: every label."""
    logits, labels = draw(count, seed=6)
    found = fit_calibration({"text": [(logits, labels)]}, coverage=share, risk=0.3)
    gold = found.probabilities(logits, pattern="text")[np.arange(count), labels]
    assert found.thresholds["text"] == (0.0 if rank is None else np.sort(gold)[::-1][rank - 1])


def test_a_large_corpus_weighs_no_more_than_a_small_one() -> None:
    """Coverage holds for the even mixture, where by numbers alone the hard corpus would lose."""
    easy, hard = draw(8000, seed=7, spread=6.0), draw(800, seed=8, spread=0.7)
    fresh = draw(FRESH, seed=9, spread=6.0), draw(FRESH, seed=10, spread=0.7)
    even = fit_calibration({"text": [easy, hard]}, risk=0.3)
    one = np.concatenate([easy[0], hard[0]]), np.concatenate([easy[1], hard[1]])
    by_numbers = fit_calibration({"text": [one]}, risk=0.3)
    assert np.mean([coverage(even, *one) for one in fresh]) == pytest.approx(0.9, abs=0.02)
    assert np.mean([coverage(by_numbers, *one) for one in fresh]) < 0.86


def test_temperature_weighs_corpora_the_same() -> None:
    """A corpus told ten times over changes nothing."""
    one, other = draw(500, seed=11, overdone=3.0), draw(500, seed=12)
    tenfold = np.tile(one[0], (10, 1)), np.tile(one[1], 10)
    once = fit_calibration({"text": [one, other]}, risk=0.3)
    often = fit_calibration({"text": [tenfold, other]}, risk=0.3)
    assert once.temperatures == often.temperatures


def test_answers_are_wrong_no_more_often_than_stated() -> None:
    """In at least nine of ten calibrations the risk holds for new utterances; many are answered."""
    fresh = draw(FRESH, seed=13, overdone=2.0)
    found = [
        fit_calibration({"text": [draw(3000, seed=seed, overdone=2.0)]}, risk=0.25)
        for seed in range(100, 110)
    ]
    told = [answered(one, *fresh) for one in found]
    assert sum(wrong > 0.25 for _, wrong in told) <= 1
    assert min(share for share, _ in told) > 0.3
    assert answered(Calibration.of_temperature(2.0), *fresh)[1] > 0.35  # without abstention


def test_a_small_risk_cannot_be_held_and_a_large_one_always() -> None:
    """By chance alone nothing is sure enough; what is right anyway is always answered."""
    chance = np.random.default_rng(14).standard_normal((500, 7)).astype(np.float32)
    labels = np.random.default_rng(15).integers(0, 7, 500)
    right = 9 * np.eye(7, dtype=np.float32)[labels] + chance
    found = fit_calibration({"audio": [(chance, labels)], "text": [(right, labels)]}, risk=0.1)
    assert found.answers_above["audio"] == ALWAYS_ABSTAIN
    assert found.answers_above["text"] == 0.0


def test_a_pattern_without_evidence_promises_nothing() -> None:
    """It has everybody's temperature, every label in its set, and always abstains."""
    audio, text = draw(2000, seed=16, overdone=2.0), draw(2000, seed=17, overdone=2.0)
    found = fit_calibration({"audio": [audio], "text": [text], "audio+text": []}, risk=0.4)
    assert found.temperatures["audio+text"] == found.temperatures[""] == pytest.approx(2, rel=0.05)
    assert found.thresholds["audio+text"] == found.thresholds[""] == 0.0
    assert found.answers_above["audio+text"] == found.answers_above[""] == ALWAYS_ABSTAIN
    assert 0 < found.answers_above["text"] < ALWAYS_ABSTAIN
    assert set(found.temperatures) == set(PATTERNS)


def test_unlabelled_utterances_do_not_count() -> None:
    """What is only there to be read before others has no right label to learn from."""
    logits, labels = draw(600, seed=18)
    more = np.concatenate([logits, 50 * logits[:200]]), np.append(labels, np.full(200, -1))
    assert fit_calibration({"text": [more]}, risk=0.3) == fit_calibration(
        {"text": [(logits, labels)]}, risk=0.3
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"evidence": {}, "risk": 0.3}, "no dev utterance has a label"),
        ({"evidence": {"text": [draw(9, seed=0)]}, "risk": 1.0}, "risk 1.0 must be between"),
        (
            {"evidence": {"text": [draw(9, seed=0)]}, "risk": 0.3, "coverage": 0.0},
            "coverage 0.0 must be between",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(settings: dict[str, Any], complaint: str) -> None:
    """In one line that says which number is wrong."""
    evidence = settings.pop("evidence")
    with pytest.raises(ConfigError, match=complaint):
        fit_calibration(evidence, **settings)
