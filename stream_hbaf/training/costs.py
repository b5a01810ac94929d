"""Measure what networks cost, side by side: parameters, a training step, a live step.

The networks take turns, one call each a round, so that a slower machine slows all of them down.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import median

import torch
from torch import nn

from stream_hbaf.corpora.dataset import Dataset, Rows, all_features, pad_dialogues
from stream_hbaf.networks.network import Network
from stream_hbaf.networks.registry import build
from stream_hbaf.training.batches import TrainingSet, draw_steps
from stream_hbaf.training.fitting import (
    balance_of,
    criterion_of,
    make_optimizer,
    step_loss,
    without_audio,
)
from stream_hbaf.training.preparation import Prepared
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.results import DECIMALS
from stream_hbaf.training.train import network_config

THREADS = 2
ROUNDS = 11  # after a warm-up round


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one recipe's network, on the processor."""

    parameters: int  # that ship
    train_step_s: float  # one batch of the recipe's size: forward, loss, backward, optimiser
    live_step_ms: float | None  # one utterance whose features are there; None offline
    threads: int


def measure_costs(recipes: Sequence[Recipe], prepared: Prepared) -> list[Cost]:
    """The cost of each recipe's network, in their order, on the train split that was prepared."""
    train = prepared.training.dialogues
    networks = [build(network_config(recipe, prepared)) for recipe in recipes]
    live = [network for network in networks if network.config.mode == "live"]
    with _threads(THREADS):
        steps = [
            _training_step(network, recipe, prepared.training)
            for network, recipe in zip(networks, recipes, strict=True)
        ]
        trained = _median_seconds(steps)
        dialogues = _median_seconds([_live_dialogue(one.eval(), train) for one in live])
    turns = len(_middle(train))
    streamed = iter(round(1000 * seconds / turns, DECIMALS) for seconds in dialogues)
    return [
        Cost(
            parameters=sum(weight.numel() for weight in network.parameters()),
            train_step_s=round(seconds, DECIMALS),
            live_step_ms=next(streamed) if network in live else None,
            threads=THREADS,
        )
        for network, seconds in zip(networks, trained, strict=True)
    ]


def _training_step(network: Network, recipe: Recipe, training: TrainingSet) -> Callable[[], None]:
    """A function of one training step, on the same batch each time, one of median size."""
    training = training if network.config.use_audio else without_audio(training)
    network.standardise(torch.from_numpy(training.dialogues.text_features))
    criterion = criterion_of(network, recipe.losses)
    steps = draw_steps(training, recipe.batches, size=recipe.fit.batch, epoch=0, seed=0)
    middle = sorted(steps, key=lambda one: sum(map(len, one.dialogues)))[len(steps) // 2]
    balance = balance_of(training, recipe.losses, classes=network.config.classes)
    both = nn.ModuleList([network] if criterion is None else [network, criterion])
    optimizer, _ = make_optimizer(both, recipe.fit, 1)

    def step() -> None:
        optimizer.zero_grad()
        loss = step_loss(network, criterion, training, middle, recipe=recipe, balance=balance)
        torch.autograd.backward(loss)
        if recipe.fit.clip:
            nn.utils.clip_grad_norm_(both.parameters(), recipe.fit.clip)
        optimizer.step()

    return step


def _live_dialogue(network: Network, dataset: Dataset) -> Callable[[], None]:
    """A function that streams a dialogue of median length, utterance by utterance."""
    version = "" if network.config.use_audio else None
    dialogue = _middle(dataset)
    whole = all_features(dataset, pad_dialogues([dialogue]), version=version)
    utterances = [
        replace(whole.map(itemgetter((0, turn))), utterance_mask=None)
        for turn in range(len(dialogue))
    ]

    @torch.inference_mode()
    def stream() -> None:
        state = network.initial_state()
        for utterance in utterances:
            _, state = network.step(utterance, state)

    return stream


def _middle(dataset: Dataset) -> Rows:
    """The rows of a dialogue of median length."""
    return sorted(dataset.dialogues, key=len)[len(dataset.dialogues) // 2]


def _median_seconds(calls: Sequence[Callable[[], None]]) -> list[float]:
    """Each function's median seconds over rounds in which each is called once."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + ROUNDS):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return [median(taken[1:]) for taken in seconds]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
