"""Training: what networks cost, side by side: a training step, a step when live, parameters.

Whatever slows the machine down meanwhile slows all of them down: in each round each has one turn.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import median

import torch
from torch import nn

from stream_hbaf.corpora.dataset import Dataset, Rows, all_features, class_weights, pad_dialogues
from stream_hbaf.networks.network import Network
from stream_hbaf.networks.registry import build
from stream_hbaf.training.fitting import criterion_of, draw_batches, loss_of, make_optimizer
from stream_hbaf.training.preparation import Prepared
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.train import network_config

THREADS = 2
ROUNDS = 11  # after one that isn't counted


@dataclass(frozen=True, slots=True)
class Cost:
    """What one recipe's network costs, on the processor."""

    parameters: int  # that ship
    train_step_s: float  # one batch of the recipe's size: forward, loss, backward, optimiser
    live_step_ms: float | None  # one utterance, once its features are there; None offline
    threads: int


def measure_costs(recipes: Sequence[Recipe], prepared: Prepared) -> list[Cost]:
    """The cost of each recipe's network, in their order; all are of what was prepared."""
    heard = prepared.material["train"]
    networks = [build(network_config(recipe, prepared)) for recipe in recipes]
    live = [network for network in networks if network.config.mode == "live"]
    with _threads(THREADS):
        steps = [
            _training(network, recipe, heard)
            for network, recipe in zip(networks, recipes, strict=True)
        ]
        trained = _take_turns(steps)
        talked = iter(_take_turns([_conversation(network.eval(), heard) for network in live]))
    turns = len(_middle(heard))
    return [
        Cost(
            parameters=sum(weight.numel() for weight in network.parameters()),
            train_step_s=seconds,
            live_step_ms=1000 * next(talked) / turns if network in live else None,
            threads=THREADS,
        )
        for network, seconds in zip(networks, trained, strict=True)
    ]


def _training(network: Network, recipe: Recipe, material: Dataset) -> Callable[[], None]:
    """One step of its training; the same batch, that of the middle size, each time."""
    plan, losses = recipe.fitting, recipe.losses
    network.standardise(torch.from_numpy(material.text_features))
    between = criterion_of(network, losses)
    every = draw_batches(material.dialogues, 0, size=plan.batch, seed=0)
    batch = sorted(every, key=lambda dialogues: sum(map(len, dialogues)))[len(every) // 2]
    classes = network.config.classes
    weights = class_weights(material.labels, classes=classes) if losses.balanced else None
    version = "" if network.config.use_audio else None
    both = nn.ModuleList([network] if between is None else [network, between])
    optimizer, _ = make_optimizer(both, 1, rate=plan.rate, decay=plan.decay, kind=plan.optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of(network, between, material, batch, version=version, weights=weights)
        torch.autograd.backward(loss)
        if plan.clip:
            nn.utils.clip_grad_norm_(both.parameters(), plan.clip)
        optimizer.step()

    return step


def _conversation(network: Network, material: Dataset) -> Callable[[], None]:
    """A dialogue of the middle length, utterance by utterance."""
    version = "" if network.config.use_audio else None
    dialogue = _middle(material)
    whole = all_features(material, pad_dialogues([dialogue]), version=version)
    utterances = [
        replace(whole.map(itemgetter((0, turn))), utterance_mask=None)
        for turn in range(len(dialogue))
    ]

    @torch.inference_mode()
    def converse() -> None:
        state = network.initial_state()
        for utterance in utterances:
            _, state = network.step(utterance, state)

    return converse


def _middle(material: Dataset) -> Rows:
    """The rows of a dialogue of the middle length."""
    return sorted(material.dialogues, key=len)[len(material.dialogues) // 2]


def _take_turns(works: Sequence[Callable[[], None]]) -> list[float]:
    """Each one's median seconds over rounds in which each is done once."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(1 + ROUNDS):
        for work, taken in zip(works, seconds, strict=True):
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
    return [median(taken[1:]) for taken in seconds]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
