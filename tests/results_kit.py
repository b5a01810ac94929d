"""Records of results with figures that a test chooses, and predictions that belong to them."""

from pathlib import Path
from typing import Any

import numpy as np

from stream_hbaf.evaluation.metrics import weighted_f1
from stream_hbaf.training.results import CostRecord, Figures, RunRecord, predictions_file

CLASSES = 3


def run_of(row: str, seed: int, test: float | None, **changed: Any) -> RunRecord:
    """A record whose every figure of test is ``test``, of dev 0.1 less; None: of dev alone."""
    names = Figures.model_fields
    facts = {
        "experiment": "meld",
        "row": row,
        "corpus": "meld",
        "network": "hbaf",
        "mode": "live",
        "modalities": "audio+text",
        "overrides": {},
        "recipe": f"abc-{row}",
        "audio": "prosody",
        "encoder": "all-mpnet-base-v2",
        "transcripts": "gold",
        "command": "stream-hbaf experiment meld.yaml",
        "seed": seed,
        "commit": "0123456789+changes",
        "dev": dict.fromkeys(names, 0.5 if test is None else test - 0.1),
        "test": None if test is None else dict.fromkeys(names, test),
        "dev_by_loss": {"weighted_f1": 0.5},
        "epoch": 3,
        "seconds": 1.5,
    }
    return RunRecord.model_validate(facts | changed)


def weighted_f1_of(run: RunRecord) -> float:
    """On test, where it was measured."""
    assert run.test is not None
    return run.test.weighted_f1


def cost_of(row: str, **changed: Any) -> CostRecord:
    """What the network of a row of that name costs."""
    facts = {
        "experiment": "baselines",
        "row": row,
        "corpus": "meld",
        "recipe": f"abc-{row}",
        "commit": None,
        "parameters": 1_234_567,
        "train_step_s": 0.04567,
        "live_step_ms": 1.234,
        "threads": 2,
    }
    return CostRecord.model_validate(facts | changed)


def two_systems(folder: Path, *, rights: tuple[float, float]) -> list[RunRecord]:
    """Three seeds of the rows both and text, of which about these shares are right."""
    return [
        _with_predictions(folder, run_of(row, seed, 0.0), right=right, draw=10 * system + seed)
        for system, (row, right) in enumerate(zip(("both", "text"), rights, strict=True))
        for seed in range(3)
    ]


def _with_predictions(folder: Path, run: RunRecord, *, right: float, draw: int) -> RunRecord:
    """300 test utterances in 30 dialogues; the record with the figure that they give."""
    gold = np.arange(300) % CLASSES
    chance = np.random.default_rng(draw)
    predicted = np.where(chance.random(300) < right, gold, (gold + 1) % CLASSES)
    probabilities = np.full((300, CLASSES), 0.1, np.float16)
    probabilities[np.arange(300), predicted] = 0.8
    file = predictions_file(folder, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, test=probabilities, test_gold=gold, test_dialogues=np.arange(300) // 10)
    assert run.test is not None
    reached = weighted_f1(gold, predicted)
    return run.model_copy(update={"test": run.test.model_copy(update={"weighted_f1": reached})})
