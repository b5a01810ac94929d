"""Promises of the pictures that stand alone: embeddings in panels."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from stream_hbaf.evaluation.plots import Panel, embedding_panels

LABELS = ("anger", "happiness", "neutral", "sadness")
COUNT = 400


def make_panel(title: str, seed: int) -> Panel:
    draw = np.random.default_rng(seed)
    speech, text = draw.normal(size=(2, COUNT, 2)).astype(np.float32)
    return Panel(title, speech, text, draw.integers(len(LABELS), size=COUNT))


def draw_panels(count: int = 2) -> str:
    panels = [make_panel(f"row {n}", n) for n in range(count)]
    return embedding_panels(panels, labels=LABELS, title="Speech and text")


def test_every_utterance_is_drawn_twice_in_every_panel() -> None:
    """Once for its speech, once for its words, in two shades of its emotion's colour."""
    picture = ElementTree.fromstring(draw_panels())
    panels = [g for g in picture.findall(".//{*}g") if re.fullmatch("e-axes_[12]", g.get("id", ""))]
    assert len(panels) == 2
    for seed, panel in enumerate(panels):
        counts = np.bincount(make_panel("", seed).labels).tolist()
        fills = [use.get("style", "").removeprefix("fill: ") for use in panel.findall(".//{*}use")]
        shades = dict.fromkeys(fills)
        assert len(fills) == 2 * COUNT
        assert [fills.count(shade) for shade in shades] == [n for n in counts for _ in "al"]
    words = ["".join(text.itertext()).strip() for text in picture.findall(".//{*}text")]
    assert [word for word in words if word in LABELS] == list(LABELS)
    assert {"row 0", "row 1", "speech dark, its text light"} <= set(words)


def test_panels_are_the_same_file_each_time_and_small() -> None:
    """Drawn again, the same bytes; four panels of four hundred utterances stay below 300 kB."""
    assert draw_panels() == draw_panels()
    assert len(draw_panels(4)) < 300_000


def test_a_point_is_where_it_was_put() -> None:
    """Rounding to tenths keeps the picture: distances between points are the embeddings'."""
    speech = np.array([[0.0, 0.0], [30.0, 0.0], [0.0, 40.0]], np.float32)
    panel = Panel("one", speech, speech + 100, np.zeros(3, np.int64))
    picture = ElementTree.fromstring(embedding_panels([panel], labels=LABELS[:1], title="x"))
    axes = next(g for g in picture.findall(".//{*}g") if g.get("id") == "e-axes_1")
    points = np.array(
        [[float(use.get("x", "")), float(use.get("y", ""))] for use in axes.findall(".//{*}use")]
    )
    near, right, up = points[3:]  # text is drawn first
    scale = (right - near)[0] / 30
    assert (right - near)[1] == pytest.approx(0, abs=0.11)
    assert (up - near).tolist() == pytest.approx([0, -40 * scale], abs=0.2)
