"""Training: a network on one corpus's features: HBAF with the paper's losses (sections 3.3 to 3.5),
any other with its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from stream_hbaf.config import Positive, Section
from stream_hbaf.corpora.dataset import (
    Dataset,
    Rows,
    all_features,
    class_weights,
    labels_of,
    on_device_of,
    pad_dialogues,
    predict,
)
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.errors import ModelError
from stream_hbaf.evaluation.metrics import Score, score, weighted_f1
from stream_hbaf.networks.calibration import softmax
from stream_hbaf.networks.hbaf import HBAF, InterModalLoss, total_loss
from stream_hbaf.networks.network import Criterion, Network, NetworkConfig
from stream_hbaf.networks.registry import build
from stream_hbaf.training.trainer import TrainerConfig, TrainingHistory, fit

Float32 = NDArray[np.float32]
Share = Annotated[float, Field(ge=0.0)]

POOLED = 4  # batches whose dialogues are sorted by length together: padding, but no fixed company
SLOWEST = 0.05  # the rate falls linearly to this share of itself
TEMPERATURES = np.geomspace(0.4, 5.0, 60)


class LossConfig(Section):
    """Equation 23: cross entropy and, μ times, what draws the two modalities together.

    All but ``balanced`` is HBAF's; the weights of other networks' losses stand in their settings.
    """

    mu: Share = 0.2
    absolute: bool = True  # eqs 18 and 19
    relative: bool = True  # eq 20
    temperature: Annotated[float, Field(gt=0.0)] = 0.1
    balanced: bool = False  # rare classes weigh as much as frequent ones (decision 16)

    @property
    def weights(self) -> tuple[float, float, float] | None:
        """λ1, λ2, λ3 of equation 21; None without it."""
        absolute, relative = self.absolute, self.relative
        if not self.mu or not (absolute or relative):
            return None
        if absolute and relative:
            return 1 / 3, 1 / 3, 1 / 3
        return (1 / 2, 1 / 2, 0.0) if absolute else (0.0, 0.0, 1.0)


class FittingConfig(Section):
    """How the network is trained on one corpus."""

    epochs: Positive = 60
    patience: Positive = 15  # epochs without a better dev weighted F1
    batch: Positive = 8  # dialogues in a step
    optimizer: Literal["adamw", "adam"] = "adamw"  # adam: the paper's, L2 and a constant rate
    rate: float = 5e-4  # falls linearly with adamw
    decay: Share = 1e-2
    clip: Share = 1.0  # largest norm of all gradients; 0 for no limit
    average: Share = 0.0  # epochs over which weights are averaged, exponentially; 0 for none
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    workers: Positive = 2  # processes of one thread each, a seed at a time; on the processor only
    precision: Literal["32", "bf16"] = "32"
    accelerator: Literal["auto", "cpu", "gpu"] = "cpu"
    devices: int | Literal["auto"] = 1
    nodes: Positive = 1

    def trainer(self) -> TrainerConfig:
        """What of this is the trainer's."""
        return TrainerConfig(**{name: getattr(self, name) for name in TrainerConfig.model_fields})


@dataclass(frozen=True)
class Fitted:
    """A network in the precision that ships, how it got there, and how good it is."""

    network: Network
    history: TrainingHistory
    temperature: float  # fitted on dev
    dev_by_loss: float  # dev weighted F1 of the epoch of the lowest dev loss (decision 15)
    scores: Mapping[Split, Score]  # of the splits asked for, the labelled utterances
    probabilities: Mapping[Split, NDArray[np.float64]]  # of those splits, all utterances [N, C]

    @property
    def dev(self) -> Score:
        return self.scores["dev"]

    @property
    def test(self) -> Score:
        return self.scores["test"]

    @property
    def epoch(self) -> int:
        return self.history.best_epoch


def fit_network(
    config: NetworkConfig,
    *,
    losses: LossConfig,
    plan: FittingConfig,
    material: Mapping[Split, Dataset],
    seed: int,
    splits: Sequence[Split] = ("dev", "test"),
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Train on train, stop and pick by dev's weighted F1, then score ``splits``, dev among them.

    The same seed gives the same network; ``folder`` keeps the training's checkpoint, from which
    it goes on. Raises ModelError for a loss that isn't a number.
    """
    torch.manual_seed(seed)
    network = build(config)
    network.standardise(torch.from_numpy(material["train"].text_features))
    between = criterion_of(network, losses)
    both = nn.ModuleDict({"network": network} | ({"between": between} if between else {}))
    train, dev = material["train"], material["dev"]
    weights = class_weights(train.labels, classes=config.classes) if losses.balanced else None
    version = "" if config.use_audio else None
    history = fit(
        both,
        loss=partial(loss_of, network, between, train, version=version, weights=weights),
        batches=partial(draw_batches, train.dialogues, size=plan.batch, seed=seed),
        optimizer=partial(
            make_optimizer, both, rate=plan.rate, decay=plan.decay, kind=plan.optimizer
        ),
        score=partial(_measure, network, dev, version=version, weights=weights),
        plan=plan.trainer(),
        seed=seed,
        folder=folder,
        progress=progress,
    )
    network = network.half().float().eval()
    return _judge(network, history, {split: material[split] for split in splits}, version=version)


def draw_batches(
    dialogues: Sequence[Rows], epoch: int, *, size: int, seed: int
) -> list[list[Rows]]:
    """One epoch's batches of dialogues of about one length, drawn from (seed, epoch)."""
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(dialogues))
    batches = []
    for start in range(0, len(order), POOLED * size):
        pool = sorted(order[start : start + POOLED * size], key=lambda n: len(dialogues[n]))
        batches += [pool[first : first + size] for first in range(0, len(pool), size)]
    return [[dialogues[n] for n in batches[k]] for k in draw.permutation(len(batches))]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: sums of several come in another order each time, seeds don't repeat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_optimizer(
    module: nn.Module,
    steps: int,
    *,
    rate: float,
    decay: float,
    kind: Literal["adamw", "adam"] = "adamw",
) -> tuple[Optimizer, LRScheduler | None]:
    """AdamW whose rate falls linearly over all ``steps``, or section 4.3's Adam with L2."""
    if kind == "adam":
        return Adam(module.parameters(), lr=rate, weight_decay=decay), None
    optimizer = AdamW(module.parameters(), lr=rate, weight_decay=decay)
    return optimizer, LambdaLR(optimizer, lambda step: max(SLOWEST, 1.0 - step / steps))


def fit_temperature(sets: Sequence[tuple[Float32, NDArray[np.int64]]]) -> float:
    """The temperature under which labels are likeliest, each (logits, labels) weighing the same.

    Guo et al. 2017.
    """
    return float(min(TEMPERATURES, key=lambda t: sum(_surprise(x / t, gold) for x, gold in sets)))


def judge(material: Dataset, probabilities: NDArray[np.float64]) -> Score:
    """Every figure of the labelled utterances, from probabilities [N, C] of all."""
    counted = material.labelled
    return score(material.labels[counted], probabilities[counted])


def criterion_of(network: Network, losses: LossConfig) -> Criterion | None:
    """What the network is trained with beside cross entropy; HBAF as ``losses`` say."""
    if not isinstance(network, HBAF):
        return network.criterion()
    if losses.weights is None or len(network.config.modalities) < 2:
        return None
    return InterModalLoss(
        network.config.hidden,
        mu=losses.mu,
        weights=losses.weights,
        temperature=losses.temperature,
    )


def loss_of(
    network: Network,
    between: Criterion | None,
    material: Dataset,
    batch: Sequence[Rows],
    *,
    version: str | None,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of a batch of dialogues; ``weights`` [C] balance the classes."""
    index = pad_dialogues(batch)
    features = on_device_of(network, all_features(material, index, version=version))
    output = network(features)
    labels = labels_of(material, index).to(output.logits.device)
    inter: Tensor | float = 0.0
    if between is not None and features.audio_mask is not None and features.text_mask is not None:
        inter = between(output, features.audio_mask & features.text_mask, labels)
    counted = labels >= 0
    if not counted.any():  # a batch of context only: a mean over nothing would be NaN
        nothing: Tensor = output.logits.sum() * 0.0 + inter
        return nothing
    weights = None if weights is None else weights.to(labels.device)
    return total_loss(output.logits[counted], labels[counted], inter, mu=1, class_weights=weights)


def _measure(
    network: Network, material: Dataset, *, version: str | None, weights: Tensor | None
) -> dict[str, float]:
    """Weighted F1 and cross entropy of the labelled utterances."""
    counted = material.labelled
    gold = material.labels[counted]
    logits = predict(network, material, version=version)[counted]
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(gold), weight=weights)
    reached = weighted_f1(gold, logits.argmax(1))
    return {"score": reached, "loss": float(loss)}


def _judge(
    network: Network,
    history: TrainingHistory,
    material: Mapping[Split, Dataset],
    *,
    version: str | None,
) -> Fitted:
    logits = {split: predict(network, data, version=version) for split, data in material.items()}
    for split, found in logits.items():
        if not np.isfinite(found).all():
            raise ModelError(f"training: the network says NaN on {split}; lower fitting.rate")
    counted = material["dev"].labelled
    temperature = fit_temperature([(logits["dev"][counted], material["dev"].labels[counted])])
    probabilities = {split: softmax(found / temperature) for split, found in logits.items()}
    by_loss = min(history.measured, key=lambda figures: figures["loss"])
    return Fitted(
        network=network,
        history=history,
        temperature=temperature,
        dev_by_loss=by_loss["score"],
        scores={split: judge(data, probabilities[split]) for split, data in material.items()},
        probabilities=probabilities,
    )


def _surprise(logits: NDArray[np.floating], gold: NDArray[np.int64]) -> float:
    probabilities = softmax(logits)[np.arange(len(gold)), gold]
    return float(-np.log(np.maximum(probabilities, 1e-12)).mean())
