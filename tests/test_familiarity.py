"""How familiar a voice sounds: the share of unseen speakers that lie at least as far away."""

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.bundle_weights import familiarity_tensors, read_familiarity
from stream_hbaf.networks.familiarity import NEIGHBOURS, Familiarity, fit_familiarity

Float32 = NDArray[np.float32]
BLOCKS = {"prosody": range(4), "ge2e": range(4, 12)}


def draw(count: int, *, seed: int, shift: float = 0.0) -> Float32:
    """Audio vectors [N, 12] whose directions vary differently, ``shift`` from the usual ones."""
    spread = np.geomspace(0.2, 3.0, 12)
    drawn = np.random.default_rng(seed).standard_normal((count, 12)) * spread + shift * spread
    return drawn.astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> Familiarity:
    return fit_familiarity(draw(600, seed=0), draw(300, seed=1), blocks=BLOCKS)


def by_hand(fitted: Familiarity, training: Float32, row: Float32, name: str) -> float:
    """The log distance of one utterance in a block, from the training set itself."""
    columns = list(BLOCKS[name])
    values = training[:, columns].astype(np.float64)
    _, singular, axes = np.linalg.svd(values - values.mean(0), full_matrices=False)
    white = axes.T / singular * np.sqrt(len(values) - 1)
    points = (values - row[columns]) @ white
    nearest = np.sort(np.sqrt((points**2).sum(1)))[:NEIGHBOURS]
    return float(np.log(nearest.mean()))


def test_familiarity_is_the_share_that_lies_at_least_as_far(fitted: Familiarity) -> None:
    """Distances, their mean over blocks and the share, calculated again in plain loops."""
    training, held_out = draw(600, seed=0), draw(300, seed=1)
    strange = draw(3, seed=2, shift=1.0)
    logs = {
        name: np.array([by_hand(fitted, training, row, name) for row in [*held_out, *strange]])
        for name in BLOCKS
    }
    scaled = [(one - one[:300].mean()) / one[:300].std() for one in logs.values()]
    mean = np.mean(scaled, axis=0)
    expected = [(mean[:300] >= mean[300 + n]).mean() for n in range(3)]
    np.testing.assert_allclose(fitted(strange), expected, atol=1 / 299)


def test_familiarity_of_unseen_speakers_is_uniform_and_of_strangers_small(
    fitted: Familiarity,
) -> None:
    """New utterances like the reference lie anywhere in it; far away ones beyond nearly all."""
    usual = np.sort(fitted(draw(400, seed=3)))
    assert np.abs(usual - np.linspace(0, 1, 400)).max() < 0.12
    assert fitted(draw(50, seed=4, shift=4.0)).max() < 0.02


def test_a_missing_block_is_left_out_on_both_sides(fitted: Familiarity) -> None:
    """The share is among the reference's distances in the blocks that there are."""
    usual = draw(400, seed=3)
    usual[:, 4:] = np.nan
    found = np.sort(fitted(usual))
    assert np.abs(found - np.linspace(0, 1, 400)).max() < 0.12
    alone = fit_familiarity(
        draw(600, seed=0), draw(300, seed=1), blocks={"prosody": BLOCKS["prosody"]}
    )
    np.testing.assert_array_equal(alone(usual), fitted(usual))
    assert np.isnan(fitted(np.full((2, 12), np.nan, np.float32))).all()


def test_a_block_that_only_some_corpora_have_is_compared_with_them() -> None:
    """A reference utterance without the block counts only for utterances without it."""
    training, held_out = draw(600, seed=0), draw(300, seed=1)
    training[::2, 4:], held_out[::2, 4:] = np.nan, np.nan
    fitted = fit_familiarity(training, held_out, blocks=BLOCKS)
    whole = draw(400, seed=3)
    assert np.abs(np.sort(fitted(whole)) - np.linspace(0, 1, 400)).max() < 0.15
    absent = fit_familiarity(training, held_out[::2], blocks=BLOCKS)
    assert set(absent.blocks) == {"prosody"}


def test_each_corpus_weighs_the_same() -> None:
    """Ten times the utterances of one corpus don't decide what is usual."""
    training = np.concatenate([draw(550, seed=0), draw(50, seed=5, shift=5.0)])
    held_out = np.concatenate([draw(300, seed=1), draw(30, seed=6, shift=5.0)])
    names = ["many"] * 550 + ["few"] * 50
    fitted = fit_familiarity(
        training,
        held_out,
        blocks=BLOCKS,
        corpora=names,
        held_out_corpora=["many"] * 300 + ["few"] * 30,
    )
    assert fitted.weights[:300].sum() == pytest.approx(fitted.weights[300:].sum())


def test_familiarity_survives_a_bundles_file(fitted: Familiarity) -> None:
    """Bit for bit, whatever the order of its blocks; none is none."""
    tensors = {f"familiarity.{name}": t for name, t in familiarity_tensors(fitted).items()}
    again = read_familiarity(tensors, width=12)
    assert again is not None
    assert list(again.blocks) == sorted(BLOCKS)
    rows = draw(20, seed=7, shift=0.5)
    np.testing.assert_allclose(again(rows), fitted(rows), atol=1e-6)
    assert read_familiarity({}, width=12) is None


@pytest.mark.parametrize("damage", ["columns", "mean", "neighbours", "reference", "weights"])
def test_statistics_of_other_sizes_are_refused(fitted: Familiarity, damage: str) -> None:
    """A file that says otherwise never reaches a prediction."""
    tensors = {f"familiarity.{name}": t for name, t in familiarity_tensors(fitted).items()}
    name = next(name for name in tensors if name.endswith(damage))
    tensors[name] = tensors[name] + 50 if damage == "columns" else tensors[name][..., :-1]
    with pytest.raises(ValueError, match="other sizes"):
        read_familiarity(tensors, width=12)
