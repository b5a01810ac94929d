"""Promises of the scaling of acoustic features: what is selected, joined and standardised."""

import numpy as np
import pytest

from stream_hbaf.corpora.dataset import NO_LABEL
from stream_hbaf.errors import CorpusError
from stream_hbaf.training.audio_features import class_balanced, fit_components, select_features
from stream_hbaf.training.recipe import SelectionConfig


def test_selection_finds_the_functionals_that_tell_the_classes_apart() -> None:
    """Of 50 columns, one of them constant, the two that depend on the label are kept."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    functionals = draw.standard_normal((200, 50)).astype(np.float32)
    functionals[:, 7] += 3 * labels
    functionals[:, 31] -= 3 * labels
    functionals[:, 12] = 4.0
    scaling = select_features(functionals, labels, SelectionConfig(width=2))
    assert scaling.selected.tolist() == [7, 31]
    np.testing.assert_allclose(scaling(functionals).mean(0), 0.0, atol=1e-5)


def test_unlabelled_rows_select_nothing() -> None:
    """The selection is fitted on labelled utterances only."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    rows = draw.standard_normal((200, 20)).astype(np.float32)
    rows[:, 4] += 3 * labels
    labels[::2] = NO_LABEL
    assert select_features(rows, labels, SelectionConfig(width=1)).selected.tolist() == [4]


def test_without_a_selection_all_columns_are_kept() -> None:
    """Every column that isn't constant stays, whatever is missing in it."""
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    rows[:, 2] = 3.0
    rows[:10, 0] = np.nan
    scaling = select_features(rows, np.arange(50) % 2, None)
    assert scaling.selected.tolist() == [0, 1, 3]
    np.testing.assert_allclose(scaling(rows)[10:].std(0), 1.0, atol=0.1)
    assert scaling(rows)[:10, 0].tolist() == [0.0] * 10


def test_components_join_what_moves_together() -> None:
    """Twenty columns that two causes move become those two, each of deviation 1; others stay."""
    draw = np.random.default_rng(0)
    causes = draw.standard_normal((400, 2))
    joined = causes @ draw.standard_normal((2, 20)) + 0.01 * draw.standard_normal((400, 20))
    rows = np.column_stack([joined, 5 * draw.standard_normal(400) + 3]).astype(np.float32)
    rows[:, 4] = 7.0  # constant
    weights = np.ones(400, np.float32)
    scaling = fit_components(rows, weights=weights, among=20, components=2)
    scaled = scaling(rows)
    assert scaled.shape == (400, scaling.width) == (400, 3)
    np.testing.assert_allclose(scaled[:, :2].T @ scaled[:, :2] / 400, np.eye(2), atol=0.02)
    explained = np.linalg.lstsq(scaled[:, :2], causes - causes.mean(0), rcond=None)[1]
    assert explained.max() < 0.05 * 400  # the causes can be read from the components
    whole = fit_components(rows, weights=weights, among=20, components=None)
    np.testing.assert_array_equal(scaled[:, 2], whole(rows)[:, -1])
    assert (whole.components, whole.width) == (None, 20)


def test_every_class_of_every_corpus_weighs_the_same() -> None:
    """Whatever its size; what has no label weighs nothing."""
    weights = class_balanced([np.array([0, 0, 1]), np.array([1, 1, 1, 1, NO_LABEL])])
    np.testing.assert_allclose(weights[:3] / weights[2], [0.5, 0.5, 1.0])
    np.testing.assert_allclose(weights[3:] / weights[2], [0.25, 0.25, 0.25, 0.25, 0.0])


def test_audio_that_never_varies_is_refused() -> None:
    """Clips of silence, or one clip again and again: one line instead of a tensor error."""
    with pytest.raises(CorpusError, match=r"^audio: none of 5 features varies over the train spl"):
        select_features(np.ones((9, 5), np.float32), np.arange(9) % 2, None)
