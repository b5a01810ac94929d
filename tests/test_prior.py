"""Class shares of a deployment: given or estimated, and what they make of the answers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from recognizer_kit import LABELS, SENTENCES, save_bundle, transcript

from stream_hbaf.config import load_config
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.prior import REMEMBERED, Prior, adjust, open_prior
from stream_hbaf.prediction import Prediction
from stream_hbaf.recognizer import Recognizer

TRAINING = {"angry": 0.5, "happy": 0.3, "sad": 0.2}


def test_answers_are_multiplied_by_the_odds_of_the_shares() -> None:
    """Deployment's share over training's, renormalised; labels that aren't named share the rest."""
    prior = open_prior({"happy": 0.65}, labels=LABELS, training=TRAINING, bundle="b")
    assert prior is not None
    np.testing.assert_allclose(prior.shares, [0.25, 0.65, 0.10])
    found = adjust(np.array([0.6, 0.3, 0.1]), prior.odds)
    by_hand = np.array([0.6 * 0.25 / 0.5, 0.3 * 0.65 / 0.3, 0.1 * 0.10 / 0.2])
    np.testing.assert_allclose(found, by_hand / by_hand.sum())


def test_a_label_without_share_is_never_answered() -> None:
    """Unless nothing else is left; then the answer stays."""
    odds = np.array([0.0, 1.0, 1.0])
    np.testing.assert_allclose(adjust(np.array([0.8, 0.15, 0.05]), odds), [0, 0.75, 0.25])
    np.testing.assert_allclose(adjust(np.array([1.0, 0.0, 0.0]), odds), [1, 0, 0])


@pytest.mark.parametrize(
    ("setting", "training", "problem"),
    [
        ({"joy": 0.3}, TRAINING, "no label 'joy'; there is angry, happy, sad"),
        ({"angry": 0.8, "sad": 0.5}, TRAINING, "sum to 1.30; they may not exceed 1"),
        ({"angry": 0.2, "happy": 0.2, "sad": 0.2}, TRAINING, "sum to 0.60; they must sum to 1"),
        ({"angry": 0.0}, TRAINING, "must sum to 1"),
        ("auto", {}, "doesn't say the shares"),
    ],
)
def test_bad_shares_are_one_line(
    setting: dict[str, float], training: dict[str, float], problem: str
) -> None:
    """What is wrong, and of which bundle or label."""
    with pytest.raises(ConfigError, match=problem) as raised:
        open_prior(setting, labels=LABELS, training=training, bundle="b")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"prior": "often"}, "'prior': must be auto, or a share"),
        ({"prior.joy": "much"}, "'prior': must be auto, or a share"),
        ({"prior.joy": 1.3}, "'prior': the share of 'joy' must be from 0 to 1"),
    ],
)
def test_a_prior_that_is_none_is_refused(overrides: dict[str, object], problem: str) -> None:
    """Before any model is loaded, with where it was set."""
    with pytest.raises(ConfigError, match=f"--set prior.*{problem}"):
        load_config(overrides=overrides)
    assert load_config(overrides={"prior.joy": "0.3"}).prior == {"joy": 0.3}
    assert load_config(overrides={"prior": "auto"}).prior == "auto"


def draw(shares: list[float], count: int, *, seed: int) -> NDArray[np.float64]:
    """Answers [N, C] of a classifier that is calibrated for equal shares, on others."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, count, p=shares)
    means = 2.0 * np.eye(3)
    seen = means[labels] + generator.normal(size=(count, 3))
    powers = np.exp(seen @ means.T)
    return np.asarray(powers / powers.sum(1, keepdims=True))


def test_shares_are_estimated_from_the_answers() -> None:
    """The EM estimate comes close to the true shares, the first answers move it little."""
    prior = Prior(np.full(3, 1 / 3))
    shares = [0.7, 0.2, 0.1]
    for n, answer in enumerate(draw(shares, 1500, seed=0)):
        prior.learn(adjust(answer, prior.odds), odds=prior.odds)
        if n == 2:
            assert np.abs(prior.shares - 1 / 3).max() < 0.05
    assert np.abs(prior.shares - shares).max() < 0.06


def test_the_estimate_is_that_of_saerens() -> None:
    """Expectation and maximisation in plain loops, with training's shares as fifty answers."""
    prior, answers = Prior(np.full(3, 1 / 3)), draw([0.5, 0.4, 0.1], 40, seed=1)
    for answer in answers:
        prior.learn(adjust(answer, prior.odds), odds=prior.odds)
    shares = [1 / 3] * 3
    for _ in range(200):
        counts = [0.0, 0.0, 0.0]
        for answer in answers:
            weighed = [p * s * 3 for p, s in zip(answer, shares, strict=True)]
            for n in range(3):
                counts[n] += weighed[n] / sum(weighed)
        shares = [(50 / 3 + count) / 90 for count in counts]
    np.testing.assert_allclose(prior.shares, shares, atol=1e-4)


def test_old_answers_are_forgotten() -> None:
    """After as many others as are remembered, the estimate is that of these alone."""
    long, short = Prior(np.full(3, 1 / 3)), Prior(np.full(3, 1 / 3))
    for answer in draw([0.1, 0.1, 0.8], 300, seed=2):
        long.learn(adjust(answer, long.odds), odds=long.odds)
    for answer in draw([0.8, 0.1, 0.1], REMEMBERED, seed=3):
        for prior in (long, short):
            prior.learn(adjust(answer, prior.odds), odds=prior.odds)
    np.testing.assert_allclose(long.shares, short.shares, atol=1e-9)


# --- live -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_bundle(tmp_path_factory.mktemp("prior"), shares=TRAINING).model)


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Recognizer]:
    with Recognizer(load_config(overrides={"model": str(bundle)})) as loaded:
        yield loaded


def classify(recognizer: Recognizer, dialogue: LiveDialogue, n: int) -> Prediction:
    text = recognizer.encode_text(transcript(SENTENCES[n]), window=dialogue.window)
    return recognizer.classify_final(
        acoustic=None, text=text, dialogue=dialogue, turn=n + 1, explain=True
    )


def values(prediction: Prediction) -> NDArray[np.float64]:
    return np.array(list(prediction.probabilities.values()))


def test_live_answers_are_adjusted_and_explained(bundle: Path, plain: Recognizer) -> None:
    """All probabilities are, so contributions sum to what is published; sets follow."""
    shares = {"model": str(bundle), "prior.angry": 0.1, "prior.happy": 0.8}
    with Recognizer(load_config(overrides=shares)) as recognizer:
        ours, theirs = recognizer.new_dialogue(), plain.new_dialogue()
        odds = np.array([0.1 / 0.5, 0.8 / 0.3, 0.1 / 0.2])
        nothing, _ = recognizer.classify(acoustic=None, text=None, state=ours.state)
        for n in range(3):
            found, before = classify(recognizer, ours, n), classify(plain, theirs, n)
            np.testing.assert_allclose(values(found), adjust(values(before), odds), atol=1e-6)
            assert found.contributions is not None
            added = sum(found.contributions.model_dump().values())
            changed = found.probabilities[found.label] - nothing.probabilities[found.label]
            assert added == pytest.approx(changed, abs=1e-6)


def test_estimated_shares_use_earlier_answers_alone(bundle: Path, plain: Recognizer) -> None:
    """The first answer is as without, the next ones by what came before; revision changes none."""
    with Recognizer(load_config(overrides={"model": str(bundle), "prior": "auto"})) as recognizer:
        ours, theirs = recognizer.new_dialogue(), plain.new_dialogue()
        prior = Prior(np.array(list(TRAINING.values())))
        answers = []
        for n in range(len(SENTENCES)):
            found, before = classify(recognizer, ours, n), classify(plain, theirs, n)
            expected = adjust(values(before), prior.odds)
            np.testing.assert_allclose(values(found), expected, atol=1e-6)
            prior.learn(expected, odds=prior.odds)
            answers.append(expected)
        assert recognizer.prior is not None
        np.testing.assert_allclose(recognizer.prior.shares, prior.shares, atol=1e-6)
        state = recognizer.prior.shares
        again = recognizer.revise(ours, {1: "somebody"})
        assert len(again) == len(SENTENCES)
        np.testing.assert_array_equal(recognizer.prior.shares, state)
