"""Training: the text encoder's top layers, and the commonsense heads on top of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stream_hbaf.config import Positive, Section
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.evaluation import weighted_f1
from stream_hbaf.features.text import TextEncoder

Progress = Callable[[str], None]
Labelled = Sequence[tuple[str, int]]  # text, index of its label


class TuningConfig(Section):
    """How the text encoder is fitted to the corpus before everything else."""

    layers: int = 3  # the topmost so many are tuned and stored in the bundle; 0 for none
    epochs: Positive = 5
    batch: Positive = 32
    rate: float = 1e-4
    head_rate: float = 1e-3
    dropout: float = 0.2
    smoothing: float = 0.05
    bfloat16: bool = True  # half-width arithmetic while tuning, where the processor has it
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """The encoder's tuned tensors in float16, as the bundle holds them."""

    tensors: dict[str, Tensor]
    dev_weighted_f1: float
    epoch: int


def tune_encoder(
    encoder: TextEncoder, *, train: Labelled, dev: Labelled, plan: TuningConfig, progress: Progress
) -> Tuned:
    """Fit the top layers of ``encoder`` to the labels; the epoch is picked on dev weighted F1.

    A linear head on the pooled feature is trained along and thrown away. ``encoder`` is changed.
    """
    torch.manual_seed(plan.seed)
    chosen = top_layers(encoder, count=plan.layers)
    for name, parameter in encoder.model.named_parameters():
        parameter.requires_grad_(name in chosen)
    head = nn.Sequential(nn.Dropout(plan.dropout), nn.Linear(encoder.width, len(LABELS)))
    optimizer = torch.optim.AdamW(
        [
            {"params": list(chosen.values()), "lr": plan.rate},
            {"params": list(head.parameters()), "lr": plan.head_rate},
        ],
        weight_decay=0.01,
    )
    steps = plan.epochs * math.ceil(len(train) / plan.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _ramp(n, steps=steps))
    draw = np.random.default_rng(plan.seed)
    best = Tuned({}, -1.0, 0)
    for epoch in range(1, plan.epochs + 1):
        encoder.model.train()
        head.train()
        for batch in _batches(train, size=plan.batch, draw=draw):
            with torch.autocast(encoder.device, torch.bfloat16, enabled=plan.bfloat16):
                features = encoder.features([train[n][0] for n in batch])
            logits = head(features.float())
            gold = torch.tensor([train[n][1] for n in batch])
            loss = F.cross_entropy(logits, gold, label_smoothing=plan.smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(chosen.values(), 1.0)
            optimizer.step()
            schedule.step()
        reached = _dev_score(encoder, head, dev)
        progress(f"text encoder: epoch {epoch} of {plan.epochs}, dev weighted F1 {reached:.4f}")
        if reached > best.dev_weighted_f1:
            tensors = {name: p.detach().half().cpu().clone() for name, p in chosen.items()}
            best = Tuned(tensors, reached, epoch)
    return best


def top_layers(encoder: TextEncoder, *, count: int) -> dict[str, nn.Parameter]:
    """The parameters of the topmost ``count`` transformer layers, by name."""
    depth = int(encoder.model.config.num_hidden_layers)
    marks = tuple(f".layer.{n}." for n in range(depth - count, depth))
    return {n: p for n, p in encoder.model.named_parameters() if any(m in f".{n}" for m in marks)}


def _dev_score(encoder: TextEncoder, head: nn.Module, dev: Labelled) -> float:
    encoder.model.eval()
    head.eval()
    with torch.inference_mode():
        said = head(torch.from_numpy(encoder.encode([text for text, _ in dev]))).argmax(1).numpy()
    gold = np.array([label for _, label in dev], dtype=np.int64)
    return weighted_f1(gold, said, classes=len(LABELS))


def _ramp(step: int, *, steps: int) -> float:
    """Warm up over a tenth of the steps, then decay linearly to nothing."""
    warm = max(1, steps // 10)
    return min(1.0, (step + 1) / warm) * max(0.0, (steps - step) / max(1, steps - warm // 2))


def _batches(texts: Labelled, *, size: int, draw: np.random.Generator) -> list[NDArray[np.intp]]:
    """Shuffled batches of texts of about one length: padding would double the work."""
    order = draw.permutation(len(texts))
    pools = [order[start : start + 16 * size] for start in range(0, len(order), 16 * size)]
    batches = []
    for pool in pools:
        by_length = pool[np.argsort([len(texts[n][0]) for n in pool], kind="stable")]
        batches += [by_length[start : start + size] for start in range(0, len(pool), size)]
    return [batches[n] for n in draw.permutation(len(batches))]
