"""Run a training: epochs, checkpoints, early stopping, weight averaging, logs, several devices.

A plain torch loop. Lightning was taken out: its hooks hid the order of the steps, and checkpoints,
averaging, logs and agreement between processes were ours already. accelerate would replace four
calls of torch only, and leave checkpoints to us.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter

from stream_hbaf.config import Positive, Section
from stream_hbaf.errors import ModelError
from stream_hbaf.files import atomic_write
from stream_hbaf.training.distributed import Processes, join_processes

Weight = Annotated[float, Field(ge=0.0, le=1e6)]

CHECKPOINT = "last.ckpt"

Measured = float | Mapping[str, float]  # the score, or the "score" beside other figures
Progress = Callable[[str], None]
Weights = dict[str, Tensor]


class TrainerConfig(Section):
    """Length, precision and devices of a training."""

    epochs: Positive
    patience: Positive  # epochs without a better dev score after which training stops
    precision: Literal["32", "bf16"] = "32"
    accelerator: Literal["auto", "cpu", "gpu"] = "cpu"
    devices: Positive | Literal["auto"] = 1  # of each node; batches are divided among them
    nodes: Positive = 1
    clip: Weight = 1.0  # largest norm of all gradients; 0 for no limit
    average: Weight = 0.0  # epochs over which weights are averaged, exponentially; 0 for none


@dataclass(frozen=True)
class TrainingHistory:
    """Scores and losses of a training, epoch by epoch; the first epoch is 1."""

    losses: tuple[float, ...]  # mean of the training loss over an epoch's batches
    measured: tuple[Mapping[str, float], ...]  # all figures that ``score`` gave
    seconds: float = 0.0  # of all epochs, those before an interruption included

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(figures["score"] for figures in self.measured)

    @property
    def best_score(self) -> float:
        return max(self.scores)

    @property
    def best_epoch(self) -> int:
        """The first of those with the best score."""
        return 1 + self.scores.index(self.best_score)


def fit(
    module: nn.Module,
    *,
    loss: Callable[[Any], Tensor],
    batches: Callable[[int], Sequence[Any]],
    optimizer: Callable[[int], tuple[Optimizer, LRScheduler | None]],
    score: Callable[[], Measured],
    plan: TrainerConfig,
    seed: int,
    folder: Path | None = None,
    progress: Progress,
) -> TrainingHistory:
    """Train ``module``, which ends in eval mode with the weights of the epoch of the highest score.

    ``batches(epoch)`` must depend on the seed and the epoch alone, and give at least one batch;
    ``loss`` moves a batch to the module's device itself. ``optimizer`` receives the number of
    steps of all epochs; its scheduler advances at each step. ``score`` is called after each epoch,
    the module in eval mode. torch is seeded from (seed, epoch) before each epoch, so a training
    that was killed resumes from ``folder``'s checkpoint to the same bits. The folder belongs to
    this training alone. Its checkpoint holds the trained parameters; frozen ones are the caller's.

    With several devices, each process takes its share of an epoch's batches, gradients are
    averaged, and the main process writes, logs and reports. Raises ModelError, naming epoch and
    step, for a loss that is not finite, and for devices that the machine doesn't have.
    """
    home = next(module.parameters()).device
    with join_processes(plan.accelerator, devices=plan.devices, nodes=plan.nodes) as processes:
        module.to(processes.device)
        run = _Run(module, loss, batches, plan, seed, processes)
        run.optimizer, run.schedule = optimizer(plan.epochs * len(run.share(1)))
        run.resume(folder, progress)
        with _open_log(folder if processes.is_main else None) as log:
            while not run.is_over():
                run.train_epoch()
                run.measure(score)
                if processes.is_main:
                    run.save(folder)
                    run.report(log, progress)
    run.put(run.best)
    module.to(home).eval()
    return run.history


@dataclass
class _Run:
    """A training between two epochs; the fields from ``step`` on are in the checkpoint."""

    module: nn.Module
    loss: Callable[[Any], Tensor]
    batches: Callable[[int], Sequence[Any]]
    plan: TrainerConfig
    seed: int
    processes: Processes
    optimizer: Optimizer = field(init=False)
    schedule: LRScheduler | None = field(init=False)
    step: int = 0  # of all epochs
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    averaged: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        step: nn.Module = _LossModule(self.module, self.loss)
        if self.processes.count > 1:
            # A modality that a batch lacks leaves parameters without a gradient.
            step = DistributedDataParallel(step, find_unused_parameters=True)
        self.loss_module = step

    def share(self, epoch: int) -> list[Any]:
        """This process's batches; the same number in each, or processes would wait forever."""
        whole = self.batches(epoch)
        if not len(whole):
            raise ModelError(f"training: epoch {epoch} has no batches; the train split is empty")
        count = self.processes.count
        short = -len(whole) % count
        return [*whole, *whole[:short]][self.processes.rank :: count]

    def train_epoch(self) -> None:
        began, epoch = time.monotonic(), len(self.measured) + 1
        words = [self.seed, epoch, self.processes.rank]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        self.module.train()
        batches = self.share(epoch)
        total = 0.0
        for number, batch in enumerate(batches, start=1):
            value = self._train_step(batch)
            if not math.isfinite(value):
                raise ModelError(
                    f"training: the loss is {value} at epoch {epoch}, step {number}; look for "
                    "features that are not finite, or lower the rate"
                )
            total += value
            if self.plan.average:
                self._average(window=self.plan.average * len(batches))
        self.losses.append(total / len(batches))
        self.seconds += time.monotonic() - began

    def _train_step(self, batch: Any) -> float:
        """One step of the optimiser, unless the loss is not finite; the loss."""
        half = self.plan.precision == "bf16"
        self.optimizer.zero_grad()
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=half):
            loss: Tensor = self.loss_module(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        torch.autograd.backward(loss)
        if self.plan.clip:
            groups = self.optimizer.param_groups
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], self.plan.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        return value

    @torch.no_grad()
    def _average(self, *, window: float) -> None:
        """Exponential moving average over ``window`` steps; the plain mean of the first ones."""
        trained = self.trained()
        if not self.averaged:
            self.averaged = {name: tensor.clone() for name, tensor in trained.items()}
        weight = max(1.0 / max(1.0, window), 1.0 / self.step)
        for name, mean in self.averaged.items():
            tensor = trained[name]
            if tensor.is_floating_point():
                mean.lerp_(tensor, weight)
            else:
                mean.copy_(tensor)

    def measure(self, score: Callable[[], Measured]) -> None:
        """Score the averaged weights, if there are, and keep the best; training keeps its own."""
        began = time.monotonic()
        own = {name: tensor.clone() for name, tensor in self.trained().items()}
        self.put(self.averaged)
        self.module.eval()
        found = score()
        figures = dict(found) if isinstance(found, Mapping) else {"score": float(found)}
        # The main process's figures for all: processes that disagree about stopping would hang.
        self.measured.append(self.processes.from_main(figures))
        if self.history.best_epoch == len(self.measured):
            self.best = {name: tensor.cpu().clone() for name, tensor in self.trained().items()}
        self.put(own)
        self.seconds += time.monotonic() - began

    def trained(self) -> Weights:
        """The module's own tensors that training changes."""
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
        state: Weights = self.module.state_dict()
        return {name: tensor.detach() for name, tensor in state.items() if name not in frozen}

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        trained = self.trained()
        for name, tensor in weights.items():
            trained[name].copy_(tensor)

    @property
    def history(self) -> TrainingHistory:
        return TrainingHistory(tuple(self.losses), tuple(self.measured), self.seconds)

    def is_over(self) -> bool:
        done = len(self.measured)
        return done > 0 and (
            done >= self.plan.epochs or done - self.history.best_epoch >= self.plan.patience
        )

    def save(self, folder: Path | None) -> None:
        """Write the checkpoint, whole or not at all."""
        if folder is None:
            return
        kept = {
            "weights": self.trained(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            **{name: getattr(self, name) for name in _KEPT},
        }
        with atomic_write(folder / CHECKPOINT) as part:
            torch.save(kept, part)

    def resume(self, folder: Path | None, progress: Progress) -> None:
        """Go on from the folder's checkpoint, if it is one of a module of the same tensors."""
        file = None if folder is None else folder / CHECKPOINT
        kept = None
        if self.processes.is_main and file is not None and file.is_file():
            kept = torch.load(file, map_location="cpu", weights_only=True)
            shapes = {name: tensor.shape for name, tensor in self.trained().items()}
            if {name: tensor.shape for name, tensor in kept["weights"].items()} != shapes:
                progress(f"{file}: of another version's network; starting from the beginning")
                kept = None
        kept = self.processes.from_main(kept)
        if kept is None:
            return
        self.put(kept["weights"])
        self.optimizer.load_state_dict(kept["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(kept["schedule"])
        for name in _KEPT:
            setattr(self, name, kept[name])
        trained = self.trained()
        self.averaged = {name: t.to(trained[name].device) for name, t in self.averaged.items()}

    def report(self, log: SummaryWriter | None, progress: Progress) -> None:
        epoch, score = len(self.measured), self.measured[-1]["score"]
        progress(
            f"epoch {epoch} of {self.plan.epochs}: loss {self.losses[-1]:.4f}, "
            f"dev score {score:.4f}"
        )
        if log is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            figures = {"loss": self.losses[-1], "rate": rate, "seconds": self.seconds}
            for name, value in (figures | self.measured[-1]).items():
                log.add_scalar(name, value, epoch)


_KEPT = ("step", "seconds", "losses", "measured", "best", "averaged")


class _LossModule(nn.Module):
    """The loss as the forward of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, module: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(batch)


def _open_log(folder: Path | None) -> AbstractContextManager[SummaryWriter | None]:
    """TensorBoard's log under ``folder``; None without a folder."""
    return nullcontext() if folder is None else SummaryWriter(folder / "logs")
