"""Promises of tools/case_study.py: one dialogue with and without fusion, as the network sees it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_encoder import save_tiny_bert
from training_kit import ONE, make_meld

TOOL = Path(__file__).parent.parent / "tools" / "case_study.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("case")
    make_meld(place)
    (place / "bert").mkdir()
    save_tiny_bert(place / "bert")
    recipe = ONE | {"id": "tiny", "text_encoder": {"name": str(place / "bert")}}
    (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    rows = {
        "both": {"network.window": 2},
        "without_fusion": {
            "network.use_bimodal_attention": False,
            "network.use_gate": False,
            "network.use_residual": False,
        },
    }
    experiment = {"id": "case", "recipe": "tiny.yaml", "seeds": [0], "rows": rows}
    (place / "case.yaml").write_text(yaml.safe_dump(experiment))
    return place


def run(place: Path, dialogue: str) -> subprocess.CompletedProcess[str]:
    options = ["--dialogue", dialogue, "--corpora", ".", "--cache", "cache", "--out", "out"]
    command = [sys.executable, str(TOOL), "case.yaml", *options]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)


def test_a_dialogue_is_shown_with_and_without_fusion(place: Path) -> None:
    """A row for each utterance with both predictions, gates and attention that sums to 1."""
    done = run(place, "dev/dia0")
    assert done.returncode == 0, done.stderr
    page = (place / "out" / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")][2:]
    assert f"out/README.md: of {len(rows)} labelled utterances of dev/dia0 " in done.stdout
    for number, cells in enumerate(rows):
        assert len(cells) == 9
        assert all(0 < float(gate) < 1 for gate in cells[5:7])
        for weights in cells[7:]:
            spread = [float(weight) for weight in weights.split()]
            assert len(spread) == min(number + 1, 2)
            assert sum(spread) == pytest.approx(1.0, abs=0.02)
    for row in ("both", "without_fusion"):
        assert f"![Confusion of {row} on dev](confusion-{row}.svg)" in page
        assert (place / "out" / f"confusion-{row}.svg").read_text().startswith("<svg")


def test_a_dialogue_that_is_not_there_is_one_line(place: Path) -> None:
    """The error names dialogues that there are."""
    done = run(place, "Ses09")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "case_study: --dialogue: neither dev nor test of meld has 'Ses09'"
    )
    assert done.stderr.count("\n") == 1
