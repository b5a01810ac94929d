"""Promises of results: what was measured is kept whole, summed up and compared fairly."""

from pathlib import Path

import numpy as np
import pytest
from results_kit import cost_of, run_of, two_systems, weighted_f1_of

from stream_hbaf.errors import ConfigError
from stream_hbaf.training.results import (
    ComparisonRecord,
    Results,
    compare_rows,
    correct,
    predictions_file,
    read_results,
    summarise,
    write_results,
)

PAIR = ("both", "text")


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    """One record a line, nothing lost, no unfinished file left."""
    runs = two_systems(tmp_path / "kept", rights=(0.7, 0.7))
    comparison = compare_rows(runs, PAIR, predictions=tmp_path / "kept")
    runs[0] = runs[0].model_copy(
        update={"test": None, "commit": None, "overrides": {"fold": None, "fit.rate": 1e-7}}
    )
    costs = (cost_of("both", live_step_ms=None), cost_of("text"))
    results = Results(runs=runs, comparisons=(comparison,), costs=costs)
    write_results(tmp_path / "out" / "meld.json", results)
    assert read_results(tmp_path / "out" / "meld.json") == results
    lines = (tmp_path / "out" / "meld.json").read_text().splitlines()
    assert sum(line.startswith('{"experiment"') for line in lines) == 6 + 1 + 2
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["meld.json"]


def test_a_damaged_result_file_is_named(tmp_path: Path) -> None:
    """A file that was cut short, or that holds something else, ends in one line."""
    file = tmp_path / "meld.json"
    file.write_text('{"runs": [{"row": "both"', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"meld\.json: can't be read \(Invalid JSON"):
        read_results(file)
    file.write_text('{"runs": [{"row": "both"}]}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"meld\.json: can't be read \(runs\.0\.experiment: "):
        read_results(file)


def test_a_summary_is_mean_and_deviation_over_seeds() -> None:
    """Seeds of one row are one line: mean, sample deviation, x 100; a single seed has no spread."""
    both, text = summarise(
        [run_of("both", 0, 0.60), run_of("both", 1, 0.62), run_of("text", 0, 0.5)]
    )
    assert (both.seeds, both.percent("test"), both.percent("dev")) == (
        (0, 1),
        "61.0 ± 1.4",
        "51.0 ± 1.4",
    )
    assert (text.percent("test"), text.commits) == ("50.0", ("0123456+changes",))


def test_a_row_with_a_seed_of_dev_alone_has_no_figure_of_test() -> None:
    """A mean over some of the seeds would be compared with means over all."""
    (row,) = summarise([run_of("both", 0, 0.6), run_of("both", 1, None)])
    assert (row.percent("test"), row.percent("dev")) == ("", "50.0 ± 0.0")


def test_a_better_row_is_told_from_a_worse(tmp_path: Path) -> None:
    """80 % right against 60 % in all three seeds: the gain is the tables', p is small."""
    runs = two_systems(tmp_path, rights=(0.8, 0.6))
    found = compare_rows(runs, PAIR, predictions=tmp_path)
    means = [np.mean([weighted_f1_of(run) for run in runs if run.row == row]) for row in PAIR]
    assert found.gain == pytest.approx(means[0] - means[1], abs=1e-6)
    assert (found.better, found.seeds, found.split) == (3, 3, "test")
    assert (found.compare, found.recipes) == (PAIR, ("abc-both", "abc-text"))
    assert found.low < found.gain < found.high
    assert found.p < 0.001
    assert found.p_dialogues < 0.001


def test_equal_rows_are_not_told_apart(tmp_path: Path) -> None:
    """Two systems of one strength: the interval holds zero and p is large."""
    found = compare_rows(two_systems(tmp_path, rights=(0.7, 0.7)), PAIR, predictions=tmp_path)
    assert found.low < 0 < found.high
    assert found.p > 0.1


def test_a_comparison_needs_predictions_of_both(tmp_path: Path) -> None:
    """Lost predictions and rows that were never run are named, not compared with less."""
    runs = two_systems(tmp_path, rights=(0.7, 0.7))
    with pytest.raises(ConfigError, match="no seed of both"):
        compare_rows(runs, ("both", "audio"), predictions=tmp_path)
    predictions_file(tmp_path, runs[0]).unlink()
    with pytest.raises(ConfigError, match=r"abc-both-seed-0\.npz: can't be read"):
        compare_rows(runs, PAIR, predictions=tmp_path)


def test_a_comparison_needs_the_same_utterances(tmp_path: Path) -> None:
    """Rows that were measured on other utterances can't be paired."""
    runs = two_systems(tmp_path, rights=(0.7, 0.7))
    for run in runs[3:]:
        with np.load(predictions_file(tmp_path, run)) as kept:
            arrays = dict(kept) | {"test_gold": np.roll(kept["test_gold"], 1)}
        np.savez(predictions_file(tmp_path, run), **arrays)
    with pytest.raises(ConfigError, match="they were measured on different utterances"):
        compare_rows(runs, PAIR, predictions=tmp_path)


def test_p_is_corrected_for_the_number_of_comparisons() -> None:
    """Holm's own example: 0.01, 0.04, 0.03, 0.005 of four; those of another corpus apart."""

    def comparison(p: float, corpus: str = "meld") -> ComparisonRecord:
        numbers = dict.fromkeys(("gain", "sd", "low", "high", "p"), 0.0)
        return ComparisonRecord(
            experiment="x",
            corpus=corpus,
            compare=("a", "b"),
            recipes=("", ""),
            better=0,
            seeds=3,
            p_dialogues=p,
            **numbers,
        )

    four = [comparison(p) for p in (0.01, 0.04, 0.03, 0.005)]
    assert correct(four) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct([*four, comparison(0.04, "iemocap")])[-1] == pytest.approx(0.04)
    assert correct([comparison(0.6), comparison(0.7)]) == [1.0, 1.0]
    assert correct([]) == []
