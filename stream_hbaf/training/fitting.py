"""Fits one network to a training set: HBAF with the paper's losses (sections 3.3 to 3.5), any other
with its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from stream_hbaf.corpora.dataset import NO_LABEL, class_weights, on_device_of
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.evaluation.metrics import Score
from stream_hbaf.networks.hbaf import HBAF, InterModalLoss
from stream_hbaf.networks.network import Criterion, Network, NetworkConfig
from stream_hbaf.networks.registry import build
from stream_hbaf.training.batches import (
    Batch,
    Step,
    TrainingSet,
    clip_batch,
    dialogue_batch,
    draw_steps,
)
from stream_hbaf.training.recipe import FitConfig, LossConfig, Recipe
from stream_hbaf.training.scoring import (
    Evaluation,
    ScoredCorpus,
    conditions_of,
    dev_score,
    evaluate,
    score_of,
)
from stream_hbaf.training.trainer import TrainerConfig, TrainingHistory, fit

SLOWEST = 0.05  # the rate falls linearly to this share of itself


@dataclass(frozen=True)
class Fitted:
    """A network in the precision that ships, its training, and what was measured of it."""

    network: Network
    history: TrainingHistory
    evaluation: Evaluation

    @property
    def dev(self) -> Score:
        """The main corpus's figures on dev."""
        return self.evaluation.main("dev")

    def score(self, dev: Sequence[ScoredCorpus]) -> float:
        """The dev score of the network as it ships."""
        return score_of(self.evaluation.scores["dev"], dev, self.network.config)

    @property
    def dev_by_loss(self) -> float:
        """The dev score of the epoch of the lowest dev loss."""
        return min(self.history.measured, key=lambda figures: figures["loss"])["score"]


def fit_network(
    config: NetworkConfig,
    recipe: Recipe,
    *,
    training: TrainingSet,
    scored: Mapping[Split, Sequence[ScoredCorpus]],
    seed: int,
    splits: Sequence[Split] | None = None,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Train a network, stop and pick the epoch on dev, then score ``splits``; None: all of scored.

    The same seed gives the same network; ``folder`` keeps the training's checkpoint, from which
    it resumes. Raises ModelError for a loss that isn't finite.
    """
    torch.manual_seed(seed)
    network = build(config)
    if not config.use_audio:
        training = without_audio(training)
    network.standardise(torch.from_numpy(_text_features(training)))
    criterion = criterion_of(network, recipe.losses)
    both = nn.ModuleDict({"network": network} | ({"criterion": criterion} if criterion else {}))
    balance = balance_of(training, recipe.losses, classes=config.classes)
    dev = conditions_of(scored["dev"], config)
    plan = recipe.fit
    history = fit(
        both,
        loss=partial(step_loss, network, criterion, training, recipe=recipe, balance=balance),
        batches=partial(draw_steps, training, recipe.batches, size=plan.batch, seed=seed),
        optimizer=partial(make_optimizer, both, plan),
        score=lambda: dev_score(network, dev, class_weights=balance),
        plan=TrainerConfig(**{name: getattr(plan, name) for name in TrainerConfig.model_fields}),
        seed=seed,
        folder=folder,
        progress=progress,
    )
    network = network.half().float().eval()
    evaluation = evaluate(network, scored, recipe.calibration, splits=splits)
    return Fitted(network, history, evaluation)


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
    module: nn.Module, plan: FitConfig, steps: int
) -> tuple[Optimizer, LRScheduler | None]:
    """AdamW whose rate falls linearly over all ``steps``, or section 4.3's Adam with L2."""
    if plan.optimizer == "adam":
        return Adam(module.parameters(), lr=plan.rate, weight_decay=plan.decay), None
    optimizer = AdamW(module.parameters(), lr=plan.rate, weight_decay=plan.decay)
    return optimizer, LambdaLR(optimizer, lambda step: max(SLOWEST, 1.0 - step / steps))


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


def balance_of(training: TrainingSet, losses: LossConfig, *, classes: int) -> Tensor | None:
    """Weights [C] of the classes in the cross entropy; None: they are as frequent as they are."""
    labels = training.dialogues.labels
    return class_weights(labels, classes=classes) if losses.balanced else None


def step_loss(
    network: Network,
    criterion: Criterion | None,
    training: TrainingSet,
    step: Step,
    *,
    recipe: Recipe,
    balance: Tensor | None = None,
) -> Tensor:
    """The loss of a step: of its dialogues, and of its clips as ``recipe.batches`` weigh them."""
    plan, draw = recipe.batches, np.random.default_rng(step.seed)
    parts: list[Tensor] = []
    dialogues = clips = None
    if step.dialogues:
        dialogues = dialogue_batch(training, step.dialogues, plan=plan, draw=draw)
    if step.clips and training.clips is not None:
        clips = clip_batch(training, training.clips, step.clips, plan=plan, draw=draw)
        smoothing = plan.clip_label_smoothing
        of_clips = batch_loss(network, criterion, clips, smoothing=smoothing)
        parts.append(plan.clip_weight * of_clips)
    if dialogues is not None:
        parts.append(batch_loss(network, criterion, dialogues, balance=balance))
    return torch.stack(parts).sum()


def batch_loss(
    network: Network,
    criterion: Criterion | None,
    batch: Batch,
    *,
    balance: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of the labelled utterances (eq 22), and the criterion's loss (eq 23).

    ``balance`` [C] weighs the classes, ``batch.weights`` the utterances; the mean is
    weighted as well.
    """
    output = network(on_device_of(network, batch.features))
    device = output.logits.device
    labels = batch.labels.to(device)
    between = 0.0 if criterion is None else criterion(output, batch.paired.to(device), labels)
    known = labels != NO_LABEL
    if not known.any():  # a batch of context only: a mean over nothing would be NaN
        nothing: Tensor = output.logits.sum() * 0.0 + between
        return nothing
    entropy = partial(
        F.cross_entropy,
        output.logits[known],
        labels[known],
        weight=None if balance is None else balance.to(device),
        label_smoothing=smoothing,
    )
    if batch.weights is None:
        mean: Tensor = entropy() + between
        return mean
    weights = batch.weights.to(device)[known]
    weighted: Tensor = (entropy(reduction="none") * weights).sum() / weights.sum() + between
    return weighted


def without_audio(training: TrainingSet) -> TrainingSet:
    """The same without the dialogues' own audio, which a network of texts alone doesn't take."""
    dialogues = replace(training.dialogues, audio={}, audio_mask=None)
    return replace(training, dialogues=dialogues)


def _text_features(training: TrainingSet) -> np.ndarray:
    """Those that standardisation is fitted on: of the dialogues, or without any of the clips."""
    if training.clips is not None and not training.versions:
        return training.clips.dataset.text_features
    return training.dialogues.text_features
