"""Promises of the page of results: every row as measured, beside the paper's figures."""

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest
from results_kit import cost_of, run_of, two_systems

from stream_hbaf.errors import ConfigError
from stream_hbaf.training.results import (
    ComparisonRecord,
    CostRecord,
    Figures,
    Results,
    RunRecord,
    compare_rows,
    write_results,
)
from stream_hbaf.training.results_page import MARK, PAPER, PAPER_NETWORKS, write_page

MODELS = Path(__file__).parent.parent / "models"


def page_of(
    folder: Path,
    *,
    runs: Sequence[RunRecord] = (),
    comparisons: Sequence[ComparisonRecord] = (),
    costs: Sequence[CostRecord] = (),
) -> str:
    """The page of one experiment with these records."""
    results = Results(runs=tuple(runs), comparisons=tuple(comparisons), costs=tuple(costs))
    write_results(folder / "results" / "one.json", results)
    return write_page(folder / "results").read_text(encoding="utf-8")


def test_the_projects_page_is_made_from_its_records(tmp_path: Path) -> None:
    """models/README.md and its pictures are what `stream-hbaf experiment` would write."""
    for file in (MODELS / "results").glob("*.json"):
        (tmp_path / "results").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "results")
    written = write_page(tmp_path / "results").read_text(encoding="utf-8")
    assert written == (MODELS / "README.md").read_text(encoding="utf-8")
    pictures = sorted((tmp_path / "results").glob("*.svg"))
    assert [picture.name for picture in pictures] == ["meld-window.svg"]
    assert all((MODELS / "results" / picture.name).is_file() for picture in pictures)


def test_the_page_shows_every_row_beside_the_paper(tmp_path: Path) -> None:
    """A row's line has its figures; the paper's stand beside it with the difference."""
    page = page_of(tmp_path, runs=[run_of("both", seed, 0.65) for seed in range(2)])
    assert (
        "| meld | meld | both | live | audio+text | prosody | all-mpnet-base-v2 | gold | 2 "
        "| 55.0 ± 0.0 | 65.0 ± 0.0 | 65.0 ± 0.0 | 65.0 ± 0.0 | 0123456+changes |" in page
    )
    assert "| meld | both | live | 65.0 ± 0.0 | 67.1 | -2.1 |" in page


def test_the_page_shows_the_parts_of_a_test_split(tmp_path: Path) -> None:
    """Improvised and scripted apart, for the rows that were measured so."""
    names = Figures.model_fields
    parts = {"improvised": dict.fromkeys(names, 0.62), "scripted": dict.fromkeys(names, 0.7)}
    runs = (run_of("both", 0, 0.6, test_parts=parts), run_of("text", 0, 0.6))
    page = page_of(tmp_path, runs=runs)
    assert "| corpus | experiment | row | improvised | scripted |" in page
    assert "| meld | meld | both | 62.0 | 70.0 |" in page
    assert "| meld | meld | text | 6" not in page


def test_a_row_of_dev_alone_stands_beside_no_figure_of_the_papers(tmp_path: Path) -> None:
    """Its cells of test are empty, and the paper's are of test."""
    page = page_of(tmp_path, runs=[run_of("both", 0, None), run_of("text", 0, None)])
    assert "| gold | 1 | 50.0 |  |  |  | 0123456+changes |" in page
    assert "67.1" not in page


def test_the_page_shows_an_ablation_beside_the_papers(tmp_path: Path) -> None:
    """Each part's worth is the distance to the whole network, the paper's beside ours."""
    of = {"experiment": "meld-ablation"}
    runs = [run_of("both", 0, 0.65, **of), run_of("without_fusion", 0, 0.63, **of)]
    page = page_of(tmp_path, runs=runs)
    assert "| both | 55.0 | 65.0 |  | 65.0 | 65.0 | 67.1 |  |" in page
    assert "| without fusion | 53.0 | 63.0 | -2.0 | 63.0 | 63.0 | 63.5 | -3.6 |" in page


def test_the_page_shows_another_networks_ablation_with_its_own_papers_figures(
    tmp_path: Path,
) -> None:
    """A row's name is not enough to stand beside HBAF's paper: its network must be HBAF."""
    of = {"experiment": "mgcma-ablation", "network": "mgcma"}
    page = page_of(tmp_path, runs=[run_of("both", 0, 0.65, **of), run_of("text", 0, 0.63, **of)])
    assert "WA 78.9 and UA 80.2" in page
    assert "| text | 53.0 | 63.0 | -2.0 | 63.0 | 63.0 |" in page
    assert "67.1" not in page


def test_the_page_shows_comparisons(tmp_path: Path) -> None:
    """Split, gain, interval and both p-values of a pair that the experiment named."""
    runs = two_systems(tmp_path / "kept", rights=(0.8, 0.6))
    found = compare_rows(runs, ("both", "text"), predictions=tmp_path / "kept")
    page = page_of(tmp_path, runs=runs, comparisons=[found])
    shown = f"| test | {100 * found.gain:.1f} ± {100 * found.sd:.1f} | 3 of 3 |"
    assert f"| meld | both | text {shown}" in page
    assert (
        f"| {found.p_dialogues:.4f} | {found.p_dialogues:.4f} |" in page
    )  # one: nothing to correct


def test_the_page_shows_networks_side_by_side(tmp_path: Path) -> None:
    """A network's line: figures, gain over HBAF, costs, and what the two papers report."""
    of = {"experiment": "baselines"}
    runs = [run_of("meld-hbaf", seed, 0.65, **of) for seed in range(2)]
    for name, mode in (("telme", "live"), ("mamba_offline", "offline")):
        of_this = {**of, "network": name.removesuffix("_offline"), "mode": mode}
        runs += [run_of(f"meld-{name}", seed, 0.62 + seed / 50, **of_this) for seed in range(2)]
    comparison = ComparisonRecord(
        experiment="baselines",
        corpus="meld",
        compare=("meld-telme", "meld-hbaf"),
        recipes=("", ""),
        split="test",
        gain=-0.02,
        sd=0.01,
        better=0,
        seeds=2,
        low=-0.031,
        high=-0.009,
        p=0.0123,
        p_dialogues=0.02,
    )
    on_dev = comparison.model_copy(update={"split": "dev", "gain": 0.5})
    costs = [cost_of("meld-hbaf"), cost_of("meld-mamba_offline", live_step_ms=None)]
    write_results(tmp_path / "results" / "meld.json", Results(runs=[run_of("both", 0, 0.65)]))
    page = page_of(tmp_path, runs=runs, comparisons=[on_dev, comparison], costs=costs)
    section = page.split("## Networks side by side: baselines, meld\n")[1].split("\n## ")[0]
    assert section.splitlines()[-3:] == [
        "| hbaf | past | 55.0 ± 0.0 | 65.0 ± 0.0 | 65.0 ± 0.0 |  |  |  "
        "| 1,234,567 | 0.046 | 1.23 | 67.1 |  |",
        "| telme | past | 53.0 ± 1.4 | 63.0 ± 1.4 | 63.0 ± 1.4 | -2.0 | -3.1 to -0.9 | 0.0123 "
        "|  |  |  | 64.9 | 67.4 (Yun et al. 2024, audio, text, vision) |",
        "| mamba offline | past and future | 53.0 ± 1.4 | 63.0 ± 1.4 | 63.0 ± 1.4 |  |  |  "
        "| 1,234,567 | 0.046 |  |  |  |",
    ]
    assert "on 2 threads" in section
    assert page.count("Networks side by side") == 1


def test_costs_of_other_settings_are_not_shown(tmp_path: Path) -> None:
    """A row that was changed since its network was timed has no costs on the page."""
    of = {"experiment": "baselines"}
    runs = [run_of("hbaf", 0, 0.6, **of), run_of("cmn", 0, 0.5, **of, network="cmn")]
    page = page_of(tmp_path, runs=runs, costs=[cost_of("cmn", recipe="of-before")])
    assert "| cmn | past | 40.0 | 50.0 | 50.0 |  |  |  |  |  |  |  |  |" in page


def test_the_papers_figures_of_other_networks_agree_with_its_sentence() -> None:
    """Section 5: 2.2 over TelME on MELD, 6.9 over Mamba on IEMOCAP."""
    meld, iemocap = PAPER_NETWORKS["meld"], PAPER_NETWORKS["iemocap"]
    assert round(meld["hbaf"] - meld["telme"], 1) == 2.2
    assert round(iemocap["hbaf"] - iemocap["mamba"], 1) == 6.9


@pytest.mark.parametrize("split", ["test", "dev"])
def test_the_page_has_a_picture_of_the_window(tmp_path: Path, split: str) -> None:
    """Rows that differ in the window alone become a curve, whatever else all of them override."""
    runs = [
        run_of(
            f"window_{length}",
            seed,
            0.5 + length / 100 + seed / 100 if split == "test" else None,
            experiment="meld-window",
            overrides={"text_encoder.epochs": 5, "network.window": length},
        )
        for length in (8, 1, 16)
        for seed in (0, 1)
    ]
    assert "](results/meld-window.svg)" in page_of(tmp_path, runs=runs)
    picture = ElementTree.parse(tmp_path / "results" / "meld-window.svg").getroot()
    words = {"".join(text.itertext()).strip() for text in picture.findall(".//{*}text")}
    assert {"1", "8", "16", "weighted F1 × 100"} <= words
    assert f"meld: {split} weighted F1 by window" in words


def test_a_page_of_another_author_is_left_alone(tmp_path: Path) -> None:
    """A README.md that wasn't made from results is not overwritten; ours is."""
    (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"README\.md: is not a page of results"):
        page_of(tmp_path, runs=[run_of("both", 0, 0.6)])
    (tmp_path / "README.md").write_text(f"{MARK}\n", encoding="utf-8")
    assert "60.0" in page_of(tmp_path, runs=[run_of("both", 0, 0.6)])


def test_the_papers_figures_agree_with_its_sentences() -> None:
    """Sections 5.1 to 5.3: +2.3 and +5.1 over text, text over audio by 23.6 and 6.2, fusion worth
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
