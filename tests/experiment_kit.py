"""A tiny MELD, a recipe that trains on it in a second, and an experiment run in a folder."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.features.prosody import PROSODY
from stream_hbaf.training.experiment import run_experiment
from stream_hbaf.training.results import Results, RunRecord, read_results

RECIPE: dict[str, Any] = {
    "id": "tiny",
    "corpora": "meld",
    "commonsense": {"source": "none"},
    "network": {"hidden": 8, "heads": 2, "layers": 1, "filters": 4, "window": 3},
    "fit": {"epochs": 2, "batch": 2},
}
EXPERIMENT: dict[str, Any] = {
    "id": "tiny",
    "recipe": "tiny-recipe.yaml",
    "rows": {"both": {}, "text": {"network.use_audio": False}},
    "seeds": [0, 1],
    "compare": [["both", "text"]],
    "test": True,
}


def write_table(file: Path, header: list[str], rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([header, *rows])


def make_meld(folder: Path) -> None:
    """MELD's layout: three dialogues of seven utterances a split, with prosody tables."""
    draw = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        texts, prosody = [], []
        for dialogue in range(3):
            for turn, label in enumerate(LABELS):
                place = [str(dialogue), str(turn)]
                texts.append([f"I feel {label} now", "Ann", label, *place])
                numbers = [f"{n:.3f}" for n in 1 + draw.random(len(PROSODY))]
                prosody.append([f"dia{dialogue}_utt{turn}.wav", *numbers])
        header = ["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"]
        write_table(folder / f"{split}_sent_emo.csv", header, texts)
        write_table(folder / f"prosody_{split}.csv", ["filename", *PROSODY], prosody)


def write_experiment(folder: Path, **changed: Any) -> Path:
    """The experiment of one recipe; a value of None leaves a key out."""
    (folder / "tiny-recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return write_yaml(folder / "tiny.yaml", EXPERIMENT | changed)


def write_yaml(file: Path, tree: dict[str, Any]) -> Path:
    tree = {key: value for key, value in tree.items() if value is not None}
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


@dataclass
class Workspace:
    """A folder in which an experiment is run, and the progress lines of its last run."""

    folder: Path
    id: str = "tiny"
    write: Callable[..., Path] = write_experiment
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_meld(self.folder / "corpora" / "meld")

    @property
    def file(self) -> Path:
        return self.folder / "models" / "results" / f"{self.id}.json"

    @property
    def results(self) -> Results:
        return read_results(self.file)

    @property
    def runs(self) -> dict[tuple[str, int], RunRecord]:
        return {(run.row, run.seed): run for run in self.results.runs}

    @property
    def page(self) -> str:
        return (self.folder / "models" / "README.md").read_text(encoding="utf-8")

    def run(self, *, workers: int = 1, command_line_test: bool = False, **changed: Any) -> None:
        self.lines = []
        run_experiment(
            self.write(self.folder, **changed),
            corpora=self.folder / "corpora",
            results=self.file.parent,
            cache=self.folder / "cache",
            workers=workers,
            test=command_line_test,
            progress=self.lines.append,
        )

    def trained(self) -> list[str]:
        """The rows and seeds that the last run trained."""
        lines = [line for line in self.lines if ": dev weighted F1" in line]
        return [line.split(": ")[1] for line in lines]
