"""Fits one network to a training set: HBAF with the paper's losses (sections 3.3 to 3.5), any other
with its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from stream_hbaf.networks.hbaf import HBAF, InterModalLoss, UnimodalLoss
from stream_hbaf.networks.network import Network
from stream_hbaf.networks.registry import build
from stream_hbaf.training.batches import (
    Batch,
    Step,
    TrainingSet,
    clip_batch,
    dialogue_batch,
    draw_steps,
)
from stream_hbaf.training.preparation import Prepared
from stream_hbaf.training.recipe import FitConfig, LossConfig, Recipe
from stream_hbaf.training.scoring import (
    Evaluation,
    ScoredCorpus,
    conditions_of,
    dev_score,
    evaluate,
    score_of,
)
from stream_hbaf.training.trainer import TrainingHistory, fit

SLOWEST = 0.05  # the rate falls linearly to this share of itself


@dataclass(frozen=True)
class Fitted:
    """A network in the precision that ships, its training, and what was measured of it."""

    network: Network
    history: TrainingHistory
    evaluation: Evaluation

    def score(self, dev: Sequence[ScoredCorpus]) -> float:
        """The dev score of the network as it ships."""
        return score_of(self.evaluation.scores["dev"], dev, self.network.config)

    @property
    def dev_by_loss(self) -> float:
        """The dev score of the epoch of the lowest dev loss."""
        return min(self.history.measured, key=lambda figures: figures["loss"])["score"]


@dataclass(frozen=True)
class Objective:
    """A new network, and all that training it needs."""

    network: Network
    module: nn.Module  # the network and its criteria, which are trained along
    training: TrainingSet
    loss: Callable[[Step], Tensor]
    balance: Tensor | None  # weights [C] of the classes in the cross entropy; None: all the same


def fit_network(
    recipe: Recipe,
    prepared: Prepared,
    *,
    seed: int,
    splits: Sequence[Split] | None = None,
    folder: Path | None = None,
) -> Fitted:
    """Train a network, stop and pick the epoch on dev, then score ``splits``; None: all prepared.

    The same seed gives the same network. ``folder`` keeps the training's checkpoint, from which it
    resumes; it must be of this recipe, preparation and seed alone. Raises ModelError for a loss
    that isn't finite.
    """
    # The sums of several threads come in another order each time: seeds would not repeat.
    with torch_threads(1):
        torch.manual_seed(seed)
        objective = objective_of(recipe, prepared)
        network, size = objective.network, recipe.fit.batch
        dev = conditions_of(prepared.scored["dev"], network.config)
        history = fit(
            objective.module,
            loss=objective.loss,
            batches=partial(draw_steps, objective.training, recipe.batches, size=size, seed=seed),
            optimizer=partial(make_optimizer, objective.module, recipe.fit),
            score=lambda: dev_score(network, dev, class_weights=objective.balance),
            plan=recipe.fit,
            seed=seed,
            folder=folder,
            progress=lambda line: None,
        )
        network = network.half().float().eval()
        evaluation = evaluate(network, prepared.scored, recipe.calibration, splits=splits)
    return Fitted(network, history, evaluation)


def objective_of(recipe: Recipe, prepared: Prepared) -> Objective:
    """The recipe's network for the features that were prepared, before its training."""
    network = build(recipe.network_config(**prepared.widths))
    training, config = prepared.training, network.config
    if not config.use_audio:
        dialogues = replace(training.dialogues, audio={}, audio_mask=None)
        training = replace(training, dialogues=dialogues)
    clips = training.clips
    standard = training.dialogues if clips is None or training.versions else clips.dataset
    network.standardise(torch.from_numpy(standard.text_features))
    criteria = _criteria(network, recipe.losses)
    balance = None
    if recipe.losses.balanced:
        balance = class_weights(training.dialogues.labels, classes=config.classes)
    return Objective(
        network,
        nn.ModuleDict({"network": network, "criteria": criteria}),
        training,
        partial(step_loss, network, criteria, training, recipe=recipe, balance=balance),
        balance,
    )


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """torch on so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_optimizer(
    module: nn.Module, plan: FitConfig, steps: int
) -> tuple[Optimizer, LRScheduler | None]:
    """AdamW whose rate falls linearly over all ``steps``, or section 4.3's Adam with L2."""
    if plan.optimizer == "adam":
        return Adam(module.parameters(), lr=plan.rate, weight_decay=plan.decay), None
    optimizer = AdamW(module.parameters(), lr=plan.rate, weight_decay=plan.decay)
    return optimizer, LambdaLR(optimizer, lambda step: max(SLOWEST, 1.0 - step / steps))


def _criteria(network: Network, losses: LossConfig) -> nn.ModuleList:
    """What the network is trained with beside cross entropy; HBAF as ``losses`` say."""
    if not isinstance(network, HBAF):
        own = network.criterion()
        return nn.ModuleList([] if own is None else [own])
    config, criteria = network.config, nn.ModuleList()
    if len(config.modalities) < 2:
        return criteria
    if losses.weights is not None:
        criteria.append(
            InterModalLoss(
                config.hidden, mu=losses.mu, weights=losses.weights, temperature=losses.temperature
            )
        )
    if losses.unimodal:
        criteria.append(UnimodalLoss(config.hidden, config.classes, weight=losses.unimodal))
    return criteria


def step_loss(
    network: Network,
    criteria: Iterable[nn.Module],
    training: TrainingSet,
    step: Step,
    *,
    recipe: Recipe,
    balance: Tensor | None = None,
) -> Tensor:
    """The loss of a step: of its dialogues, and of its clips as ``recipe.batches`` weigh them."""
    plan, draw = recipe.batches, np.random.default_rng(step.seed)
    parts: list[Tensor] = []
    dialogues = None
    if step.dialogues:
        dialogues = dialogue_batch(training, step.dialogues, plan=plan, draw=draw)
    if step.clips and training.clips is not None:
        clips = clip_batch(training, training.clips, step.clips, plan=plan, draw=draw)
        smoothing = plan.clip_label_smoothing
        of_clips = batch_loss(network, criteria, clips, smoothing=smoothing)
        parts.append(plan.clip_weight * of_clips)
    if dialogues is not None:
        votes = recipe.losses.votes
        parts.append(batch_loss(network, criteria, dialogues, balance=balance, votes=votes))
    return torch.stack(parts).sum()


def batch_loss(
    network: Network,
    criteria: Iterable[nn.Module],
    batch: Batch,
    *,
    balance: Tensor | None = None,
    smoothing: float = 0.0,
    votes: float = 0.0,
) -> Tensor:
    """Cross entropy of the labelled utterances (eq 22), and the criteria's losses (eq 23).

    ``balance`` [C] weighs the classes, ``batch.weights`` the utterances; the mean is
    weighted as well. Undecided utterances weigh ``votes``; their targets are annotators' votes.
    """
    output = network(on_device_of(network, batch.features))
    device = output.logits.device
    labels = batch.labels.to(device)
    paired = batch.paired.to(device)
    between = sum((criterion(output, paired, labels) for criterion in criteria), start=0.0)
    known = labels != NO_LABEL
    voted = torch.zeros_like(known) if batch.votes is None else batch.votes.to(device).any(-1)
    if not known.any() and not (votes and voted.any()):  # a mean over nothing would be NaN
        nothing: Tensor = output.logits.sum() * 0.0 + between
        return nothing
    entropy = F.cross_entropy(
        output.logits[known],
        labels[known],
        weight=None if balance is None else balance.to(device),
        label_smoothing=smoothing,
        reduction="mean" if batch.weights is None else "none",
    )
    if batch.weights is not None:
        weights = batch.weights.to(device)[known]
        entropy = (entropy * weights).sum() / weights.sum()
    if votes and batch.votes is not None and voted.any():
        undecided = F.cross_entropy(output.logits[voted], batch.votes.to(device)[voted])
        # As many votes' worth of utterances beside the labelled ones.
        share = votes * voted.sum() / (known.sum() + votes * voted.sum())
        entropy = torch.lerp(entropy.nan_to_num(), undecided, share)
    whole: Tensor = entropy + between
    return whole
