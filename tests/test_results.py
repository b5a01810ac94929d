"""Promises of results: what was measured is kept whole, compared fairly and shown as measured."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import weighted_f1
from stream_hbaf.training.papers import PAPER, PAPER_NETWORKS
from stream_hbaf.training.results import (
    compare_rows,
    comparison_row,
    predictions_file,
    read_rows,
    summarise,
    write_rows,
)
from stream_hbaf.training.tables import MARK, write_page

CLASSES = 3


def row_of(name: str, seed: int, test: float, **changed: Any) -> dict[str, Any]:
    """A row of results whose every figure is ``test``, but dev's, which are 0.1 less."""
    figures = ("weighted_f1", "macro_f1", "accuracy", "uar", "ece")
    return {
        "experiment": "meld",
        "row": name,
        "corpus": "meld",
        "mode": "live",
        "modalities": "audio+text",
        "switches": {},
        "recipe": f"abc-{name}",
        "audio": "prosody",
        "encoder": "all-mpnet-base-v2",
        "transcripts": "gold",
        "seed": seed,
        "dev": dict.fromkeys(figures, test - 0.1),
        "test": dict.fromkeys(figures, test),
        "commit": "0123456789+changes",
    } | changed


def keep_predictions(folder: Path, row: dict[str, Any], *, right: float, draw: int) -> None:
    """300 test utterances in 30 dialogues, of which about ``right`` are said rightly."""
    gold = np.arange(300) % CLASSES
    chance = np.random.default_rng(draw)
    said = np.where(chance.random(300) < right, gold, (gold + 1) % CLASSES)
    probabilities = np.full((300, CLASSES), 0.1, np.float16)
    probabilities[np.arange(300), said] = 0.8
    row["test"]["weighted_f1"] = weighted_f1(gold, said)
    file = predictions_file(folder, row)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, test=probabilities, test_gold=gold, test_dialogues=np.arange(300) // 10)


def two_systems(folder: Path, *, rights: tuple[float, float]) -> list[dict[str, Any]]:
    rows = []
    for system, (name, right) in enumerate(zip(("both", "text"), rights, strict=True)):
        for seed in range(3):
            rows.append(row_of(name, seed, 0.0))
            keep_predictions(folder, rows[-1], right=right, draw=10 * system + seed)
    return rows


def test_rows_come_back_as_they_were_written(tmp_path):
    """One row a line, nothing lost, no unfinished file left."""
    rows = [row_of("both", seed, 0.6) for seed in range(2)]
    write_rows(tmp_path / "meld.json", rows)
    assert read_rows(tmp_path / "meld.json") == rows
    assert (tmp_path / "meld.json").read_text().count("\n") == 4
    assert [file.name for file in tmp_path.iterdir()] == ["meld.json"]


def test_a_damaged_result_file_is_named(tmp_path):
    """Results that were cut short end in one line, and are not overwritten."""
    file = tmp_path / "meld.json"
    file.write_text('[{"row": "both"', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"meld\.json: can't be read"):
        read_rows(file)
    file.write_text('{"row": "both"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a list of rows"):
        read_rows(file)


def test_a_summary_is_mean_and_deviation_over_seeds():
    """Seeds of one row are one line: mean, sample deviation, x 100; a single seed has no spread."""
    both, text = summarise(
        [row_of("both", 0, 0.60), row_of("both", 1, 0.62), row_of("text", 0, 0.5)]
    )
    assert (both.seeds, both.percent("test"), both.percent("dev")) == (
        (0, 1),
        "61.0 ± 1.4",
        "51.0 ± 1.4",
    )
    assert (text.percent("test"), text.commits) == ("50.0", ("0123456+changes",))


def test_a_better_row_is_told_from_a_worse(tmp_path):
    """80 % right against 60 % in all three seeds: the gain is the tables', p is small."""
    rows = two_systems(tmp_path, rights=(0.8, 0.6))
    found = compare_rows(rows, "both", "text", predictions=tmp_path)
    means = [
        np.mean([r["test"]["weighted_f1"] for r in rows if r["row"] == n]) for n in ("both", "text")
    ]
    assert found.gain == pytest.approx(means[0] - means[1])
    assert (found.better, found.seeds) == (3, 3)
    assert found.low < found.gain < found.high
    assert found.p < 0.001
    assert found.p_dialogues < 0.001


def test_equal_rows_are_not_told_apart(tmp_path):
    """Two systems of one strength: the interval holds zero and p says so."""
    rows = two_systems(tmp_path, rights=(0.7, 0.7))
    found = compare_rows(rows, "both", "text", predictions=tmp_path)
    assert found.low < 0 < found.high
    assert found.p > 0.1


def test_a_comparison_needs_predictions_of_both(tmp_path):
    """Lost predictions and rows that were never run are named, not compared with less."""
    rows = two_systems(tmp_path, rights=(0.7, 0.7))
    with pytest.raises(ConfigError, match="no seed of both"):
        compare_rows(rows, "both", "audio", predictions=tmp_path)
    predictions_file(tmp_path, rows[0]).unlink()
    with pytest.raises(ConfigError, match=r"abc-both-seed-0\.npz: can't be read"):
        compare_rows(rows, "both", "text", predictions=tmp_path)


def test_the_page_shows_every_row_beside_the_paper(tmp_path):
    """A row's line has its figures; the paper's stand beside it with the difference."""
    rows = [row_of("both", seed, 0.65) for seed in range(2)]
    write_rows(tmp_path / "results" / "meld.json", rows)
    page = write_page(tmp_path / "results").read_text(encoding="utf-8")
    assert (
        "| meld | meld | both | live | audio+text | prosody | all-mpnet-base-v2 | gold | 2 "
        "| 55.0 ± 0.0 | 65.0 ± 0.0 | 65.0 ± 0.0 | 65.0 ± 0.0 | 0123456+changes |" in page
    )
    assert "| meld | both | live | 65.0 ± 0.0 | 67.1 | -2.1 |" in page


def test_the_page_shows_an_ablation_beside_the_papers(tmp_path):
    """Each part's worth is the distance to the whole network, the paper's beside ours."""
    of = {"experiment": "meld-ablation"}
    rows = [row_of("both", 0, 0.65, **of), row_of("without_fusion", 0, 0.63, **of)]
    write_rows(tmp_path / "results" / "meld-ablation.json", rows)
    page = write_page(tmp_path / "results").read_text(encoding="utf-8")
    assert "| both | 55.0 | 65.0 |  | 65.0 | 65.0 | 67.1 |  |" in page
    assert "| without fusion | 53.0 | 63.0 | -2.0 | 63.0 | 63.0 | 63.5 | -3.6 |" in page


def test_the_page_shows_another_networks_ablation_with_its_own_papers_figures(tmp_path):
    """A row's name is not enough to stand beside HBAF's paper: its network must be HBAF."""
    of = {"experiment": "mgcma-ablation", "network": "mgcma"}
    rows = [row_of("both", 0, 0.65, **of), row_of("text", 0, 0.63, **of)]
    write_rows(tmp_path / "results" / "mgcma-ablation.json", rows)
    page = write_page(tmp_path / "results").read_text(encoding="utf-8")
    assert "WA 78.9 and UA 80.2" in page
    assert "| text | 53.0 | 63.0 | -2.0 | 63.0 | 63.0 |" in page
    assert "67.1" not in page


def test_the_page_shows_comparisons(tmp_path):
    """Gain, interval and both chances of a pair that the experiment named."""
    rows = two_systems(tmp_path / "kept", rights=(0.8, 0.6))
    found = compare_rows(rows, "both", "text", predictions=tmp_path / "kept")
    rows.append(comparison_row(rows, ("both", "text"), found))
    write_rows(tmp_path / "results" / "meld.json", rows)
    page = write_page(tmp_path / "results").read_text(encoding="utf-8")
    shown = f"| {100 * found.gain:.1f} ± {100 * found.sd:.1f} | 3 of 3 |"
    assert f"| meld | both | text {shown}" in page


def cost_of(name: str, **changed: Any) -> dict[str, Any]:
    """What the network of a row of that name costs."""
    return {
        "cost": name,
        "experiment": "baselines",
        "corpus": "meld",
        "recipe": f"abc-{name}",
        "parameters": 1_234_567,
        "train_step_s": 0.04567,
        "live_step_ms": 1.234,
        "threads": 2,
    } | changed


def test_the_page_shows_networks_side_by_side(tmp_path):
    """A network's line: figures, gain over HBAF, costs, and what the two papers report."""
    of = {"experiment": "baselines"}
    rows = [row_of("meld-hbaf", seed, 0.65, **of, network="hbaf") for seed in range(2)]
    for name, mode in (("telme", "live"), ("mamba_offline", "offline")):
        of_this = {**of, "network": name.removesuffix("_offline"), "mode": mode}
        rows += [row_of(f"meld-{name}", seed, 0.62 + seed / 50, **of_this) for seed in range(2)]
    comparison = {"compare": ["meld-telme", "meld-hbaf"], "recipes": ["", ""], "seeds": 2}
    figures = {"gain": -0.02, "sd": 0.01, "better": 0, "low": -0.031, "high": -0.009}
    rows.append(of | comparison | figures | {"p": 0.0123, "p_dialogues": 0.02, "corpus": "meld"})
    rows += [cost_of("meld-hbaf"), cost_of("meld-mamba_offline", live_step_ms=None)]
    write_rows(tmp_path / "results" / "baselines.json", rows)
    write_rows(tmp_path / "results" / "meld.json", [row_of("both", 0, 0.65)])
    page = write_page(tmp_path / "results").read_text(encoding="utf-8")
    section = page.split("## Networks side by side: baselines, meld\n")[1].split("\n## ")[0]
    assert section.splitlines()[-3:] == [
        "| hbaf | the past | 55.0 ± 0.0 | 65.0 ± 0.0 | 65.0 ± 0.0 |  |  |  "
        "| 1,234,567 | 0.046 | 1.23 | 67.1 |  |",
        "| telme | the past | 53.0 ± 1.4 | 63.0 ± 1.4 | 63.0 ± 1.4 | -2.0 | -3.1 to -0.9 | 0.0123 "
        "|  |  |  | 64.9 | 67.4 (Yun et al. 2024, audio, text, vision) |",
        "| mamba offline | the future too | 53.0 ± 1.4 | 63.0 ± 1.4 | 63.0 ± 1.4 |  |  |  "
        "| 1,234,567 | 0.046 |  |  |  |",
    ]
    assert "on 2 threads" in section
    assert page.count("Networks side by side") == 1


def test_costs_of_other_settings_are_not_shown(tmp_path):
    """A row that was changed since its network was timed has no costs on the page."""
    of = {"experiment": "baselines"}
    rows = [row_of("hbaf", 0, 0.6, **of), row_of("cmn", 0, 0.5, **of, network="cmn")]
    rows.append(cost_of("cmn", recipe="of-before"))
    write_rows(tmp_path / "results" / "baselines.json", rows)
    page = write_page(tmp_path / "results").read_text(encoding="utf-8")
    assert "| cmn | the past | 40.0 | 50.0 | 50.0 |  |  |  |  |  |  |  |  |" in page


def test_the_papers_figures_of_other_networks_agree_with_its_sentence():
    """Section 5: 2.2 over TelME on MELD, 6.9 over Mamba on IEMOCAP."""
    meld, iemocap = PAPER_NETWORKS["meld"], PAPER_NETWORKS["iemocap"]
    assert round(meld["hbaf"] - meld["telme"], 1) == 2.2
    assert round(iemocap["hbaf"] - iemocap["mamba"], 1) == 6.9


def test_the_page_has_a_picture_of_the_window(tmp_path):
    """Rows that differ in the window alone become a curve, whatever else all of them switch."""
    rows = [
        row_of(
            f"window_{length}",
            seed,
            0.5 + length / 100 + seed / 100,
            experiment="meld-window",
            switches={"tuning.epochs": 5, "network.window": length},
        )
        for length in (8, 1, 16)
        for seed in (0, 1)
    ]
    results = tmp_path / "results"
    write_rows(results / "meld-window.json", rows)
    page = write_page(results).read_text(encoding="utf-8")
    assert "](results/meld-window.svg)" in page
    picture = ElementTree.parse(results / "meld-window.svg").getroot()
    words = {"".join(text.itertext()).strip() for text in picture.findall(".//{*}text")}
    assert {"1", "8", "16", "weighted F1 × 100"} <= words


def test_a_page_of_somebody_else_is_left_alone(tmp_path):
    """A README.md that wasn't made from results is not overwritten; ours is."""
    (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
    write_rows(tmp_path / "results" / "meld.json", [row_of("both", 0, 0.6)])
    with pytest.raises(ConfigError, match=r"README\.md: is not a page of results"):
        write_page(tmp_path / "results")
    (tmp_path / "README.md").write_text(f"{MARK}\n", encoding="utf-8")
    assert "60.0" in write_page(tmp_path / "results").read_text(encoding="utf-8")


def test_the_papers_figures_agree_with_its_sentences():
    """Sections 5.1 to 5.3: +2.3 and +5.1 over text, text over sound by 23.6 and 6.2, fusion worth
    3.6 and 6.6, the audio context network 1.4 and 1.6."""
    differences = [
        [
            round(p[a] - p[b], 1)
            for a, b in (
                ("both", "text"),
                ("text", "audio"),
                ("both", "without_fusion"),
                ("audio", "audio_without_context"),
            )
        ]
        for p in (PAPER["meld"], PAPER["iemocap"])
    ]
    assert differences == [[2.3, 23.6, 3.6, 1.4], [5.1, 6.2, 6.6, 1.6]]
