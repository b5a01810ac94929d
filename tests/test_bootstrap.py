"""Promises of the paired bootstrap: what is no better isn't called better, and what is, is."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_hbaf.evaluation.metrics import (
    FigureName,
    accuracy,
    macro_f1,
    paired_bootstrap,
    unweighted_recall,
    weighted_f1,
)

CLASSES = 4


def system(gold: np.ndarray, *, right: float, seed: int) -> np.ndarray:
    """Probabilities [N, C] of a system that is right about so often."""
    draw = np.random.default_rng(seed)
    guess = draw.integers(CLASSES, size=len(gold))
    said = np.where(draw.random(len(gold)) < right, gold, guess)
    return np.eye(CLASSES)[said] * 0.6 + 0.1


def labels(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(CLASSES, size=count)


def test_a_system_is_no_better_than_itself() -> None:
    """No gain, no interval, and p is 1."""
    gold = labels(300)
    same = system(gold, right=0.6, seed=1)
    found = paired_bootstrap(gold, same, same, draws=500)
    assert (found.gain, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_clearly_better_system_is_called_better() -> None:
    """p is as small as the draws allow, and the interval lies above nothing."""
    gold = labels(1000)
    good, bad = system(gold, right=0.7, seed=1), system(gold, right=0.4, seed=2)
    found = paired_bootstrap(gold, good, bad, draws=999)
    assert found.p == pytest.approx(2 / 1000)
    assert 0.1 < found.low < found.gain < found.high < 0.4


def test_the_other_way_round_the_gain_is_a_loss() -> None:
    """Exchanged, the gain changes its sign and p stays."""
    gold = labels(200)
    a, b = system(gold, right=0.55, seed=1), system(gold, right=0.5, seed=2)
    there, back = (paired_bootstrap(gold, *pair, draws=999) for pair in ((a, b), (b, a)))
    assert (back.gain, back.low, back.high) == pytest.approx((-there.gain, -there.high, -there.low))
    assert back.p == there.p
    assert 0.05 < there.p < 1


@pytest.mark.parametrize("figure", ["weighted_f1", "macro_f1", "accuracy", "uar"])
def test_the_gain_is_the_difference_of_the_figures(figure: FigureName) -> None:
    """Without any draw the figures are those of the single functions."""
    gold = np.minimum(labels(150), 2)  # a class that is said but never there
    a, b = system(gold, right=0.7, seed=1), system(gold, right=0.5, seed=2)
    alone = {
        "weighted_f1": weighted_f1,
        "macro_f1": macro_f1,
        "accuracy": accuracy,
        "uar": unweighted_recall,
    }[figure]
    found = paired_bootstrap(gold, a, b, draws=10, figure=figure)
    gain = alone(gold, a.argmax(1)) - alone(gold, b.argmax(1))
    assert found.gain == pytest.approx(gain, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30))
def test_drawn_figures_are_those_of_the_drawn_utterances(seed: int, count: int) -> None:
    """One draw equals computing the F1 of the utterances that it drew, one by one."""
    gold = labels(count, seed=seed)
    a, b = system(gold, right=0.6, seed=seed + 1), system(gold, right=0.3, seed=seed + 2)
    found = paired_bootstrap(gold, a, b, draws=1, seed=seed)
    drawn = np.random.default_rng(seed).integers(count, size=(1, count))[0]
    scores = [weighted_f1(gold[drawn], s[drawn].argmax(1)) for s in (a, b)]
    assert found.low == pytest.approx(scores[0] - scores[1], abs=1e-12)


def test_whole_dialogues_are_drawn_together() -> None:
    """Ten copies of each utterance tell no more than one: the interval knows it by its groups."""
    gold = labels(60)
    a, b = system(gold, right=0.7, seed=1), system(gold, right=0.5, seed=2)
    once = paired_bootstrap(gold, a, b, draws=2000)
    copied = [np.repeat(array, 10, axis=0) for array in (gold, a, b)]
    dialogues = np.repeat(np.arange(60), 10)
    apart = paired_bootstrap(*copied, draws=2000)
    together = paired_bootstrap(*copied, draws=2000, groups=dialogues)
    assert (together.low, together.high, together.p) == pytest.approx((once.low, once.high, once.p))
    assert apart.high - apart.low < 0.5 * (together.high - together.low)


def test_seeds_are_averaged_before_systems_are_compared() -> None:
    """A system of several seeds has the mean of their figures, not that of their votes."""
    gold = labels(200)
    seeds = np.stack([system(gold, right=right, seed=n) for n, right in enumerate((0.4, 0.5, 0.8))])
    other = system(gold, right=0.5, seed=9)
    found = paired_bootstrap(gold, seeds, other, draws=50)
    each = [weighted_f1(gold, one.argmax(1)) for one in (*seeds, other)]
    assert found.gain == pytest.approx(np.mean(each[:3]) - each[3], abs=1e-12)


def test_equal_systems_are_rarely_called_different() -> None:
    """Of systems equally good, about one pair in twenty gets p < 0.05: p means what it says."""
    gold = labels(400)
    called = [
        paired_bootstrap(
            gold,
            system(gold, right=0.5, seed=2 * n),
            system(gold, right=0.5, seed=2 * n + 1),
            draws=200,
        ).p
        < 0.05
        for n in range(200)
    ]
    assert 0.01 <= np.mean(called) <= 0.10


def test_the_same_seed_draws_the_same() -> None:
    """A p that is read twice is the same p."""
    gold = labels(100)
    a, b = system(gold, right=0.6, seed=1), system(gold, right=0.5, seed=2)
    assert paired_bootstrap(gold, a, b, draws=300) == paired_bootstrap(gold, a, b, draws=300)


def test_ten_thousand_draws_take_seconds() -> None:
    """MELD's test split: half a second on one core; the bound allows for a slow machine."""
    gold = labels(2610)
    a, b = system(gold, right=0.6, seed=1), system(gold, right=0.5, seed=2)
    start = time.perf_counter()
    paired_bootstrap(gold, a, b)
    assert time.perf_counter() - start < 10
