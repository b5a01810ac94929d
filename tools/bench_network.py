"""Measures how fast HBAF trains, steps and computes whole dialogues, and MGCMA's step beside it.

    python tools/bench_network.py [--hidden 128 --layers 1] [--device cpu] [--corpora DIR]

Features are random numbers of the corpora's shapes; --corpora takes the lengths of the real
dialogues. No measurement depends on a feature's value. Training is measured as it is done: two
processes of one thread each, with a network each; an epoch is its number of steps times the mean
of those timed.
"""

import argparse
import csv
import multiprocessing
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from stream_hbaf.networks.hbaf import HBAF, HbafConfig, InterModalLoss, total_loss
from stream_hbaf.networks.mgcma import MgcmaConfig
from stream_hbaf.networks.network import Features, Network, NetworkConfig
from stream_hbaf.networks.registry import build

TURNS = (10, 100, 1_000, 10_000)
COMPARED = (10, 1_000)
SPEECH_TOKENS, TEXT_TOKENS = 38, 12  # an utterance of three seconds
PROCESSES = 2


@dataclass(frozen=True)
class Shape:
    """A corpus' training split: the lengths of its dialogues and its batch size."""

    name: str
    lengths: tuple[int, ...]
    batch: int


def drawn_shapes() -> list[Shape]:
    """As many random lengths as the training splits have dialogues, distributed like theirs."""
    draw = random.Random(0)
    long = tuple(max(20, min(110, round(draw.gauss(65, 20)))) for _ in range(108))
    short = tuple(max(1, min(24, round(draw.gauss(9.6, 5.8)))) for _ in range(1_038))
    return [Shape("IEMOCAP", long, 8), Shape("MELD", short, 32)]


def real_shapes(corpora: Path) -> list[Shape]:
    """The lengths of the real training dialogues, from the corpora's own tables."""

    def lengths(table: Path, dialogue: str, split: str | None) -> tuple[int, ...]:
        with table.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if split in (None, row.get("mode"))]
        return tuple(Counter(row[dialogue] for row in rows).values())

    return [
        Shape("IEMOCAP", lengths(corpora / "iemocap/utterances.csv", "video_id", "train"), 8),
        Shape("MELD", lengths(corpora / "meld/train_sent_emo.csv", "Dialogue_ID", None), 32),
    ]


def random_dialogues(config: HbafConfig, lengths: tuple[int, ...], *, device: str) -> Features:
    """[B, U, ..], every utterance with audio and text."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Features(
        torch.randn(*mask.shape, config.audio_width),
        torch.randn(*mask.shape, config.text_width),
        torch.randn(*mask.shape, 3, config.commonsense_width),
        utterance_mask=mask,
    ).map(lambda part: part.to(device))


def utterances_of(features: Features, b: int) -> list[Features]:
    """One dialogue's utterances as the live recogniser passes them to ``step``."""
    one = replace(features, utterance_mask=None).map(lambda part: part[b])
    return [one.map(itemgetter(turn)) for turn in range(len(one.present()))]


def random_utterance(network: Network, *, device: str) -> Features:
    """One utterance with audio and text, as the live recogniser passes it to ``step``."""
    config = network.config
    tokens = config.takes_tokens
    return Features(
        torch.randn(*([SPEECH_TOKENS] if tokens else []), config.audio_width),
        torch.randn(*([TEXT_TOKENS] if tokens else []), config.text_width),
        torch.randn(3, config.commonsense_width),
        audio_mask=torch.tensor(True),
        text_mask=torch.tensor(True),
    ).map(lambda part: part.to(device))


def synchronise(device: str) -> None:
    """Wait until a GPU has finished: its calls return before."""
    if device != "cpu":
        torch.cuda.synchronize()


def time_training_step(config: HbafConfig, shape: Shape, device: str, count: int) -> float:
    """Mean seconds of a training step: forward, losses, backward and optimiser."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, criterion = HBAF(config).to(device), InterModalLoss(config.hidden).to(device)
    optimizer = torch.optim.AdamW([*network.parameters(), *criterion.parameters()])
    order = random.Random(1).sample(shape.lengths, len(shape.lengths))
    steps = [tuple(order[at : at + shape.batch]) for at in range(0, len(order), shape.batch)]
    steps = steps[:count]
    batches = [random_dialogues(config, lengths, device=device) for lengths in steps]
    times: list[float] = []
    for features in [batches[0], *batches]:  # the first one warms up
        began = time.perf_counter()
        mask = features.present()
        output = network(features)
        labels = torch.zeros(int(mask.sum()), dtype=torch.long, device=device)
        loss = total_loss(output.logits[mask], labels, criterion(output, mask))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return statistics.mean(times[1:])


def measure_training(config: HbafConfig, shapes: list[Shape], *, device: str, steps: int) -> None:
    """Print epochs a second of each corpus."""
    count = PROCESSES if device == "cpu" else 1
    for shape in shapes:
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            seconds = pool.starmap(time_training_step, [(config, shape, device, steps)] * count)
        in_epoch = -(-len(shape.lengths) // shape.batch)
        epochs = sum(1 / (second * in_epoch) for second in seconds)
        print(
            f"training, {shape.name}: {epochs:.3f} epochs a second, {count} networks at once; a"
            f" step of {shape.batch} dialogues {statistics.mean(seconds) * 1e3:.0f} ms, {in_epoch}"
            f" in an epoch of {sum(shape.lengths)} utterances",
            flush=True,
        )


def measure_step(network: HBAF, *, device: str, runs: int) -> None:
    """Time the step at each of the turns alternately, so that noise affects all alike."""
    turns = utterances_of(random_dialogues(network.config, (64,), device=device), 0)
    state, reached = network.initial_state(), {}
    for turn in range(1, max(TURNS) + 1):
        if turn in TURNS:
            reached[turn] = state
        _, state = network.step(turns[turn % len(turns)], state)
    times: dict[int, list[float]] = {turn: [] for turn in TURNS}
    for run in range(runs):
        for turn in TURNS:
            synchronise(device)
            began = time.perf_counter()
            network.step(turns[run % len(turns)], reached[turn])
            synchronise(device)
            times[turn].append(time.perf_counter() - began)
    medians = {turn: statistics.median(taken) * 1e3 for turn, taken in times.items()}
    ratio = max(medians.values()) / min(medians.values())
    print("live step: " + ", ".join(f"turn {turn:,} {ms:.2f} ms" for turn, ms in medians.items()))
    print(f"live step: largest to smallest {ratio:.3f} (must be at most 1.1)")


def compare_steps(configs: Sequence[NetworkConfig], *, device: str, runs: int) -> None:
    """Time live steps of several networks alternately, and compare their memory."""
    networks = {config.kind: build(config).eval().to(device) for config in configs}
    utterances = {kind: random_utterance(net, device=device) for kind, net in networks.items()}
    reached = {}
    for kind, network in networks.items():
        state = network.initial_state()
        for turn in range(1, max(COMPARED) + 1):
            if turn in COMPARED:
                reached[kind, turn] = state
            _, state = network.step(utterances[kind], state)
    times: dict[tuple[str, int], list[float]] = {place: [] for place in reached}
    for _ in range(runs):
        for (kind, turn), state in reached.items():
            synchronise(device)
            began = time.perf_counter()
            networks[kind].step(utterances[kind], state)
            synchronise(device)
            times[kind, turn].append(time.perf_counter() - began)
    medians = {place: statistics.median(taken) * 1e3 for place, taken in times.items()}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        grown = {c.kind: pool.apply(grown_memory, (c,)) for c in configs}
    for kind, network in networks.items():
        weights = sum(part.numel() * part.element_size() for part in network.parameters())
        for turn in COMPARED:
            parts = reached[kind, turn].tensors().values()
            size = sum(part.numel() * part.element_size() for part in parts)
            print(
                f"{kind}: turn {turn:,} {medians[kind, turn]:.2f} ms, state {size:,} bytes, "
                f"weights {weights / 1e6:.1f} MB"
            )
        print(f"{kind}: its process grew by {grown[kind]:.1f} MB from turn 10 to 1,000")
    first, second = (medians[config.kind, COMPARED[-1]] for config in configs)
    print(f"{configs[1].kind}'s step takes {second / first:.2f} of {configs[0].kind}'s")


def grown_memory(config: NetworkConfig) -> float:
    """MB by which this process, one for each network, grows between the two turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build(config).eval()
    utterance, state = random_utterance(network, device="cpu"), network.initial_state()
    resident = {}
    for turn in range(1, max(COMPARED) + 1):
        _, state = network.step(utterance, state)
        if turn in COMPARED:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            resident[turn] = pages * resource.getpagesize() / 1e6
    return resident[COMPARED[-1]] - resident[COMPARED[0]]


def measure_batched(network: HBAF, *, device: str) -> None:
    """Time whole dialogues at once and the same dialogues one utterance at a time."""
    features = random_dialogues(network.config, (65,) * 4, device=device)

    def forward() -> Tensor:
        with torch.no_grad():
            return network.forward(features).logits

    def stepped() -> Tensor:
        every = []
        for b in range(4):
            state = network.initial_state()
            for utterance in utterances_of(features, b):
                logits, state = network.step(utterance, state)
                every.append(logits)
        return torch.stack(every).reshape(4, 65, -1)

    seconds, results = {}, {}
    for name, way in (("batched", forward), ("stepped", stepped)):
        way()
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            results[name] = way()
            synchronise(device)
            taken.append(time.perf_counter() - began)
        seconds[name] = min(taken)
    apart = (results["batched"] - results["stepped"]).abs().max().item()
    print(
        f"4 dialogues of 65 turns: batched {seconds['batched'] * 1e3:.0f} ms, stepped"
        f" {seconds['stepped'] * 1e3:.0f} ms: {seconds['stepped'] / seconds['batched']:.1f} times;"
        f" logits at most {apart:.1e} apart"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--corpora", type=Path, help="take the real dialogues' lengths from here")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--audio", type=int, default=24, help="width of the audio features")
    parser.add_argument("--text", type=int, default=768, help="width of text and commonsense")
    parser.add_argument("--steps", type=int, default=14, help="steps of an epoch that are timed")
    parser.add_argument("--runs", type=int, default=500, help="live steps timed at each turn")
    options = parser.parse_args()
    config = HbafConfig(
        audio_width=options.audio,
        text_width=options.text,
        commonsense_width=options.text,
        hidden=options.hidden,
        layers=options.layers,
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = HBAF(config).eval().to(options.device)
    print(f"torch {torch.__version__}, {options.device}, hidden {config.hidden},", end=" ")
    print(f"layers {config.layers}, audio {config.audio_width}, text {config.text_width}")
    shapes = drawn_shapes() if options.corpora is None else real_shapes(options.corpora)
    measure_training(config, shapes, device=options.device, steps=options.steps)
    measure_step(network, device=options.device, runs=options.runs)
    measure_batched(network, device=options.device)
    tokens = MgcmaConfig(audio_width=65, text_width=384)
    compare_steps((config, tokens), device=options.device, runs=options.runs)


if __name__ == "__main__":
    main()
