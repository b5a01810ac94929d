"""A little training that tests can watch, interrupt and repeat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stream_hbaf.training.trainer import TrainerConfig, TrainingHistory, fit

Rows = NDArray[np.int64]


def learn(
    *,
    folder: Path | None = None,
    seed: int = 0,
    dropout: float = 0.2,
    joined: int = 1,
    watch: Callable[[int, int], None] = lambda epoch, step: None,
    progress: Callable[[str], None] = lambda line: None,
    **plan: Any,
) -> tuple[nn.Module, TrainingHistory]:
    """Fit a sum of four numbers with a little network that has dropout and a schedule.

    A step takes ``joined`` of the eight batches and averages their losses; ``watch`` is called
    with epoch and step.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 1))
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((64, 4)).astype(np.float32))
    y = x.sum(1, keepdim=True)
    at = [0, 0]

    def batches(epoch: int) -> list[list[Rows]]:
        at[:] = [epoch, 0]
        split = np.array_split(np.random.default_rng([seed, epoch]).permutation(64), 8)
        return [split[first : first + joined] for first in range(0, 8, joined)]

    def loss(batch: list[Rows]) -> Tensor:
        at[1] += 1
        watch(*at)
        return torch.stack([((net(x[rows]) - y[rows]) ** 2).mean() for rows in batch]).mean()

    def optimizer(steps: int) -> tuple[Optimizer, LRScheduler]:
        adam = torch.optim.AdamW(net.parameters(), lr=1e-2)
        return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)

    def score() -> dict[str, float]:
        with torch.no_grad():
            error = float(((net(x) - y) ** 2).mean())
        return {"score": -error, "error": error}

    history = fit(
        net,
        loss=loss,
        batches=batches,
        optimizer=optimizer,
        score=score,
        plan=TrainerConfig(**{"epochs": 6, "patience": 6} | plan),
        seed=seed,
        folder=folder,
        progress=progress,
    )
    return net, history
