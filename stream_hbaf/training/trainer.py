"""Training: one loop for all that is trained, through Lightning; the only file that imports it.

Whoever trains brings the module, its loss, its batches and its score; epochs, devices, early
stopping, weight averaging, checkpoints and logs are here.
"""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stream_hbaf.config import Positive, Section
from stream_hbaf.errors import ModelError

CHECKPOINT = "last.ckpt"
OWN = "stream_hbaf"  # our part of a checkpoint
SILENCED = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_utilities")

Measured = float | Mapping[str, float]  # the score, or the "score" beside other figures
Progress = Callable[[str], None]


class TrainerConfig(Section):
    """How long, how precisely and where something is trained."""

    epochs: Positive
    patience: Positive  # epochs without a better score after which training stops
    precision: Literal["32", "bf16"] = "32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = "auto"  # of each node; each takes its share of the batches
    nodes: Positive = 1
    clip: float = 1.0  # largest norm of all gradients; 0 for no limit
    average: float = 0.0  # epochs over which weights are averaged, exponentially; 0 for none


@dataclass(frozen=True)
class History:
    """How a training went, epoch by epoch; the first epoch is 1."""

    best_score: float
    best_epoch: int
    scores: tuple[float, ...]
    losses: tuple[float, ...]  # mean of the training loss over an epoch's batches
    measured: tuple[Mapping[str, float], ...]  # all figures that ``score`` gave
    seconds: float = 0.0  # of all epochs, those before an interruption included


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
) -> History:
    """Train ``module``, which ends with the weights of the epoch of the highest score.

    ``batches(epoch)`` must depend on the seed and the epoch alone, and give at least one batch;
    ``loss`` moves a batch to the module's device itself. ``optimizer`` is given the number of
    steps in all; its scheduler advances at each step. ``score`` is asked after each epoch, the
    module in eval mode. torch is seeded from (seed, epoch) before each epoch, so a training that
    was killed goes on from ``folder``'s checkpoint to the same bits. The folder belongs to this
    one training: its checkpoint holds the trained parameters only, the others are the caller's.

    Raises ModelError, naming epoch and step, for a loss that isn't a number.
    """
    task = _Task(
        module,
        loss=loss,
        batches=batches,
        optimizer=optimizer,
        score=score,
        plan=plan,
        seed=seed,
        folder=folder,
        progress=progress,
    )
    home = next(module.parameters()).device
    with _silence():
        trainer = _open_trainer(plan, folder)
        found = None if folder is None else _checkpoint(folder, task)
        trainer.fit(task, ckpt_path=found, weights_only=True)
    task.restore_best()
    module.to(home).eval()  # Lightning leaves it on the processor
    return task.history()


def _checkpoint(folder: Path, task: "_Task") -> Path | None:
    """The checkpoint to go on from, unless there is none or it is of a module of other parts."""
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    kept = torch.load(file, map_location="cpu", weights_only=True)[OWN]["best"]
    live = task.live()
    if {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in live.items()}:
        return file
    task.progress(f"{file}: of another version's network; starting from the beginning")
    return None


def leads() -> bool:
    """Whether this process, among those of a training on several devices, writes the results."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


class _Batches:
    """One rank's share of an epoch; all ranks have the same number, or they would wait forever."""

    def __init__(self, every: Sequence[Any], *, rank: int, ranks: int) -> None:
        short = -len(every) % ranks
        self.own = [*every, *every[:short]][rank::ranks]

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.own)


class _Task(LightningModule):
    """What Lightning calls; holds all that a checkpoint must hold."""

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: Callable[[Any], Tensor],
        batches: Callable[[int], Sequence[Any]],
        optimizer: Callable[[int], tuple[Optimizer, LRScheduler | None]],
        score: Callable[[], Measured],
        plan: TrainerConfig,
        seed: int,
        folder: Path | None,
        progress: Progress,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # frozen parameters aren't in a checkpoint
        self.module = module
        self.loss, self.batches, self.optimizer = loss, batches, optimizer
        self.score, self.plan, self.seed = score, plan, seed
        self.folder, self.progress = folder, progress
        self.measured: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.seconds = 0.0
        self.best: dict[str, Tensor] = {}
        self.averaged: dict[str, Tensor] = {}
        self._sum, self._steps, self._started = 0.0, 0, 0.0
        self._share_size = 0

    # What Lightning asks for, in its order.

    def configure_optimizers(self) -> Any:
        steps = self.plan.epochs * len(self._share(1))
        optimizer, schedule = self.optimizer(max(1, steps))
        if schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> _Batches:
        return self._share(self.current_epoch + 1)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch  # ``loss`` knows what a batch holds

    def on_train_start(self) -> None:
        if self._is_over():  # the checkpoint of a training that had ended
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        words = [self.seed, self.current_epoch + 1, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        self._sum, self._steps, self._started = 0.0, 0, time.monotonic()
        self.module.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"training: the loss is {value} at epoch {self.current_epoch + 1}, "
                f"step {batch_idx + 1}; look for features that aren't numbers, or lower the rate"
            )
        self._sum += value
        self._steps += 1
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.plan.average:
            self._average()

    def on_train_epoch_end(self) -> None:
        self._measure()
        self.seconds += time.monotonic() - self._started
        self.losses.append(self._sum / max(1, self._steps))
        if self._is_over():
            self.trainer.should_stop = True
        self._report()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: t for n, t in weights.items() if n not in frozen}
        checkpoint[OWN] = {
            "measured": self.measured,
            "losses": self.losses,
            "seconds": self.seconds,
            "best": self.best,
            "averaged": self.averaged,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint[OWN]
        self.measured, self.losses = own["measured"], own["losses"]
        self.seconds, self.best, self.averaged = own["seconds"], own["best"], own["averaged"]

    # What is done with it.

    def history(self) -> History:
        best = self._best_epoch()
        scores = tuple(figures["score"] for figures in self.measured)
        return History(
            best_score=scores[best - 1],
            best_epoch=best,
            scores=scores,
            losses=tuple(self.losses),
            measured=tuple(self.measured),
            seconds=self.seconds,
        )

    def restore_best(self) -> None:
        self._put(self.best)

    def _share(self, epoch: int) -> _Batches:
        every = self.batches(epoch)
        if not len(every):
            raise ModelError(f"training: epoch {epoch} has no batches; the train split is empty")
        share = _Batches(every, rank=self.global_rank, ranks=self.trainer.world_size)
        self._share_size = len(share)
        return share

    def _measure(self) -> None:
        """The score of the weights as they would be kept; training goes on from its own."""
        trained = {name: tensor.clone() for name, tensor in self.live().items()}
        self._put(self.averaged)
        self.module.eval()
        found = self.score()
        figures = dict(found) if isinstance(found, Mapping) else {"score": float(found)}
        # One rank's figures for all: ranks that disagree about stopping would wait forever.
        agreed: dict[str, float] = self.trainer.strategy.broadcast(figures)
        self.measured.append(agreed)
        if self._best_epoch() == len(self.measured):
            self.best = {n: tensor.cpu().clone() for n, tensor in self.live().items()}
        self._put(trained)

    def live(self) -> dict[str, Tensor]:
        """The module's own tensors that training changes."""
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
        state: dict[str, Tensor] = self.module.state_dict()
        return {name: tensor.detach() for name, tensor in state.items() if name not in frozen}

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        live = self.live()
        for name, tensor in weights.items():
            live[name].copy_(tensor)

    @torch.no_grad()
    def _average(self) -> None:
        """Go a small part of the way to the weights after this step; at first, their plain mean."""
        live = self.live()
        if not self.averaged:
            self.averaged = {name: tensor.clone() for name, tensor in live.items()}
            return
        if next(iter(self.averaged.values())).device != next(iter(live.values())).device:
            self.averaged = {name: t.to(live[name].device) for name, t in self.averaged.items()}
        steps = self.plan.average * self._share_size
        weight = max(1.0 / max(1.0, steps), 1.0 / self.global_step)
        for name, tensor in live.items():
            mean = self.averaged[name]
            if tensor.is_floating_point():
                mean.lerp_(tensor, weight)
            else:
                mean.copy_(tensor)

    def _best_epoch(self) -> int:
        scores = [figures["score"] for figures in self.measured]
        return 1 + scores.index(max(scores))  # the first of equals

    def _is_over(self) -> bool:
        done = len(self.measured)
        return done > 0 and (
            done >= self.plan.epochs or done - self._best_epoch() >= self.plan.patience
        )

    def _report(self) -> None:
        epoch, score = len(self.measured), self.measured[-1]["score"]
        self.progress(
            f"epoch {epoch} of {self.plan.epochs}: loss {self.losses[-1]:.4f}, "
            f"dev score {score:.4f}"
        )
        if self.folder is None:
            return
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        figures = {"loss": self.losses[-1], "rate": rate, "seconds": self.seconds}
        assert self.logger is not None
        self.logger.log_metrics({**figures, **self.measured[-1]}, step=epoch)


class _Keeper(Checkpoint):
    """Writes the checkpoint after each epoch, all or nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unfinished = self.file.with_suffix(".part")
        trainer.save_checkpoint(unfinished)  # on every rank: Lightning lets the first one write
        if trainer.is_global_zero:
            unfinished.replace(self.file)


def _open_trainer(plan: TrainerConfig, folder: Path | None) -> Trainer:
    several = plan.nodes > 1 or plan.devices not in (1, "auto") or torch.cuda.device_count() > 1
    return Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        num_nodes=plan.nodes,
        # A modality that a batch lacks leaves parameters without a gradient.
        strategy="ddp_find_unused_parameters_true" if several else "auto",
        precision="bf16-mixed" if plan.precision == "bf16" else "32-true",
        max_epochs=plan.epochs,
        gradient_clip_val=plan.clip or None,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False if folder is None else TensorBoardLogger(folder, name="", version="logs"),
        callbacks=[] if folder is None else [_Keeper(folder / CHECKPOINT)],
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Lightning's banners and advice are for those who write its modules, not for our users."""
    loggers = [logging.getLogger(name) for name in SILENCED]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
