"""Promises of the changes of speaker inside an utterance."""

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.speech.changes import split
from stream_hbaf.speech.diarizer import unit

Float64 = NDArray[np.float64]


def windows(*speakers: int, likeness: float = 0.8) -> Float64:
    """Embeddings of windows of made-up voices, each at about this cosine to its voice."""
    random = np.random.default_rng(7)
    voices = {one: unit(random.normal(size=192)) for one in sorted({*speakers})}
    apart = [unit(random.normal(size=192)) * np.sqrt(1 / likeness**2 - 1) for _ in speakers]
    return np.array([unit(voices[one] + off) for one, off in zip(speakers, apart, strict=True)])


@pytest.mark.parametrize(
    ("speakers", "stretches"),
    [
        pytest.param([1] * 12, [(0, 12)], id="one voice"),
        pytest.param([1] * 6 + [2] * 6, [(0, 6), (6, 12)], id="two voices"),
        pytest.param([1] * 4 + [2] * 3 + [1] * 5, [(0, 4), (4, 7), (7, 12)], id="back again"),
        pytest.param([1] * 5 + [2] * 5 + [3] * 5, [(0, 5), (5, 10), (10, 15)], id="three"),
        pytest.param([1, 2, 2], [(0, 3)], id="too short to tell"),
    ],
)
def test_stretches_are_of_one_voice_each(
    speakers: list[int], stretches: list[tuple[int, int]]
) -> None:
    assert split(windows(*speakers)) == stretches


def test_nothing_has_no_changes() -> None:
    assert split(np.zeros((0, 192))) == [(0, 0)]


def test_ten_minutes_are_cut_in_time() -> None:
    """The longest utterance that settings allow."""
    found = split(windows(*([1] * 600 + [2] * 600)))
    assert found == [(0, 600), (600, 1200)]
