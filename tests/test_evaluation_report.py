"""Promises of the report: it shows the figures that were measured, on a page that stands alone."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import BundleError, StreamHbafError
from stream_hbaf.evaluation.metrics import paired_bootstrap, score, weighted_f1
from stream_hbaf.evaluation.offline import OfflinePredictions, System, require_same_system
from stream_hbaf.evaluation.report import (
    measure,
    render_offline,
    write_report,
)
from stream_hbaf.networks.hbaf import HbafConfig

DIALOGUES, TURNS = 40, 8
COUNT = DIALOGUES * TURNS
GOLD = np.random.default_rng(0).integers(len(LABELS), size=COUNT)
WHERE: Any = {"corpus": "meld", "split": "test"}
LONE = {"meta", "link", "br", "img", "hr", "input"}  # elements that have no end


def config(**network: Any) -> BundleConfig:
    sizes = HbafConfig(audio_width=12, hidden=16, heads=2, layers=1, filters=4, window=3, **network)
    return BundleConfig(id="tiny", labels=LABELS, encoder="all-MiniLM-L6-v2", network=sizes)


def predictions(*, right: float, seed: int) -> OfflinePredictions:
    """Forty dialogues of eight turns, predicted by a system that is right about so often."""
    draw = np.random.default_rng(seed)
    said = np.where(draw.random(COUNT) < right, GOLD, draw.integers(len(LABELS), size=COUNT))
    sure = draw.uniform(0.4, 0.95, COUNT)[:, None]
    ones = np.eye(len(LABELS))[said]
    return OfflinePredictions(
        ids=tuple(f"utterance{n}" for n in range(COUNT)),
        gold=GOLD,
        probabilities=ones * sure + (1 - ones) * (1 - sure) / (len(LABELS) - 1),
        turns=np.tile(np.arange(1, TURNS + 1), DIALOGUES),
        words=np.random.default_rng(1).integers(1, 30, COUNT),
        dialogues=np.repeat(np.arange(DIALOGUES), TURNS),
        with_audio=300,
    )


def system(name: str, *, right: float, seeds: range, **network: Any) -> System:
    one = config(**network).model_copy(update={"id": name})
    return System(
        name=name,
        labels=LABELS,
        configs=(one,) * len(seeds),
        sums=tuple(f"{seed:064x}" for seed in seeds),
        predictions=tuple(predictions(right=right, seed=seed) for seed in seeds),
    )


@pytest.fixture(scope="module")
def pair() -> tuple[System, System]:
    both = system("both", right=0.7, seeds=range(3))
    text = system("text", right=0.5, seeds=range(10, 13), mode="offline", use_audio=False)
    return both, text


@pytest.fixture(scope="module")
def metrics(pair: tuple[System, System]) -> dict[str, Any]:
    return measure(*pair, **WHERE)


@pytest.fixture(scope="module")
def page(metrics: dict[str, Any]) -> str:
    return render_offline(metrics)


class Checker(HTMLParser):
    """Fails at an end that doesn't match its start; gathers text, ids and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.cells: list[list[str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in LONE:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href"):
                self.references.append(value or "")


@pytest.fixture(scope="module")
def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_the_page_is_well_formed_and_stands_alone(page: str, checked: Checker) -> None:
    """Every element ends, no id is there twice, and nothing is fetched from anywhere."""
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    assert all(reference.startswith("#") for reference in checked.references)
    assert not re.search(r"@import|<script|<link|url\((?!#)", page)
    assert {reference[1:] for reference in checked.references} <= set(checked.ids)


def test_the_page_holds_the_exact_figures(checked: Checker, pair: tuple[System, System]) -> None:
    """Weighted F1 and its spread, as computed from the predictions by the functions of papers."""
    each = [weighted_f1(GOLD, one.probabilities.argmax(1)) for one in pair[0].predictions]
    text = "".join(checked.text)
    assert f"{100 * np.mean(each):.2f}" in text
    assert f"± {100 * np.std(each, ddof=1):.2f}" in text


def test_the_page_holds_each_emotion_and_bundle(
    checked: Checker, pair: tuple[System, System], metrics: dict[str, Any]
) -> None:
    """A row for each emotion with its support, a row for each bundle with its own figures."""
    rows = {row[0]: row[1:] for row in checked.cells if len(row) == 5}
    for number, label in enumerate(LABELS):
        f1 = metrics["system"]["classes"][label]["f1"]["mean"]
        assert rows[label][2].startswith(f"{100 * f1:.2f}")
        assert rows[label][3] == str(int(np.bincount(GOLD)[number]))
    bundles = [row[1:] for row in checked.cells if row[0] == "both " + "0" * 12]
    for row, one in zip(bundles, pair[0].predictions, strict=True):
        found = score(GOLD, one.probabilities)
        figures = (found.weighted_f1, found.macro_f1, found.accuracy, found.uar, found.ece)
        assert row == [f"{100 * figure:.2f}" for figure in figures]


def test_the_comparison_is_the_paired_bootstrap(
    checked: Checker, pair: tuple[System, System], metrics: dict[str, Any]
) -> None:
    """Gain, interval and p of seeds' means, by utterances and by whole dialogues."""
    both, text = (np.stack([one.probabilities for one in s.predictions]) for s in pair)
    found = paired_bootstrap(GOLD, both, text)
    dialogues = np.repeat(np.arange(DIALOGUES), TURNS)
    grouped = paired_bootstrap(GOLD, both, text, groups=dialogues)
    assert metrics["comparison"]["weighted_f1"] == {
        "utterances": asdict(found),
        "dialogues": asdict(grouped),
    }
    row = next(row for row in checked.cells if row[0] == "weighted F1" and len(row) == 8)
    assert row[3:] == [
        f"{100 * found.gain:+.2f}",
        f"{100 * found.low:+.2f} … {100 * found.high:+.2f}",
        "< 0.001",
        f"{100 * grouped.low:+.2f} … {100 * grouped.high:+.2f}",
        "< 0.001",
    ]


def test_the_page_says_what_was_evaluated(checked: Checker) -> None:
    """Causal or offline, gold transcripts, modalities, how much had audio, and whole checksums."""
    text = " ".join("".join(checked.text).split())
    assert "both on meld, test" in text
    assert "Causal (a prediction uses the utterance and what came before it)." in text
    assert "Offline (a prediction uses the whole dialogue, its future included)" in text
    assert "320 utterances of 40 dialogues, gold transcripts" in text
    assert "audio and text; audio features of 300 of 320 utterances" in text
    assert f"{12:064x}" in text


def test_one_seed_has_no_spread() -> None:
    """Of one bundle no deviation is shown, and the page says why."""
    page = render_offline(measure(system("one", right=0.6, seeds=range(1)), None, **WHERE))
    assert "One seed: the spread over seeds is not known." in page
    assert "±" not in page


def test_turns_and_lengths_cover_every_utterance(metrics: dict[str, Any]) -> None:
    """The stretches count each utterance once."""
    for key in ("by_turn", "by_words"):
        assert sum(one["count"] for one in metrics["system"][key]) == COUNT
    assert [(s["first"], s["last"]) for s in metrics["system"]["by_turn"]] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
    ]


def test_a_strange_name_stays_a_name() -> None:
    """A bundle's id is shown as it is written, also by the pictures."""
    first = system("a<b>&$x$", right=0.6, seeds=range(1))
    page = render_offline(measure(first, system("other", right=0.5, seeds=range(5, 6)), **WHERE))
    assert "<b>&$" not in page
    assert page.count("a&lt;b&gt;&amp;$x$") >= 6


def test_the_same_metrics_give_the_same_page(metrics: dict[str, Any], page: str) -> None:
    """No date and no chance: two reports that differ have something to tell."""
    assert render_offline(metrics) == page


def test_the_files_hold_what_was_measured(
    metrics: dict[str, Any], page: str, tmp_path: Path
) -> None:
    """metrics.json reads back as the metrics, and is JSON proper."""
    write_report(metrics, tmp_path / "new" / "folder")
    files = {file.name: file.read_text() for file in (tmp_path / "new" / "folder").iterdir()}
    assert set(files) == {"report.html", "metrics.json"}
    assert files["report.html"] == page
    assert json.loads(files["metrics.json"], parse_constant=pytest.fail) == metrics


def test_a_place_that_takes_no_report_is_named(metrics: dict[str, Any], tmp_path: Path) -> None:
    """One line says where and what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamHbafError, match=r"report: .*file.*--out") as raised:
        write_report(metrics, tmp_path / "file" / "report")
    assert "\n" not in str(raised.value)


def test_seeds_of_two_systems_are_not_mixed() -> None:
    """A mean over a causal and an offline network means nothing."""
    with pytest.raises(BundleError, match=r"not seeds of one system.*--against"):
        require_same_system([config(), config(mode="offline")])
    require_same_system([config(), config()])
