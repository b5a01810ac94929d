"""Promises of the trainer: the best epoch is kept, seeds repeat, a killed training goes on."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stream_hbaf.errors import ModelError
from stream_hbaf.training.trainer import CHECKPOINT, OWN, History, TrainerConfig, fit

# A process that trains as ``learn`` does and is killed in the middle of its third epoch.
CHILD = """
import os, signal, sys
from pathlib import Path
from tests.test_trainer import learn
def die(epoch, step):
    if (epoch, step) == (3, 5):
        os.kill(os.getpid(), signal.SIGKILL)
learn(folder=Path(sys.argv[1]), average=2.0, watch=die)
"""
RANKS = """
import sys
from pathlib import Path
from tests.test_trainer import learn
from stream_hbaf.training.trainer import leads
net, history = learn(devices=2, epochs=2)
if leads():
    print(repr(history.scores))
"""


def learn(
    *, folder=None, epochs=6, patience=6, average=0.0, devices=1, seed=0, watch=None, told=None
) -> tuple[nn.Module, History]:
    """Fit a sum of four numbers with a little network that has dropout and a schedule."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((64, 4)).astype(np.float32))
    y = x.sum(1, keepdim=True)
    at = [0, 0]

    def batches(epoch: int) -> list[np.ndarray]:
        at[:] = [epoch, 0]
        return np.array_split(np.random.default_rng([seed, epoch]).permutation(64), 8)

    def loss(rows: np.ndarray) -> Tensor:
        at[1] += 1
        if watch is not None:
            watch(*at)
        return ((net(x[rows]) - y[rows]) ** 2).mean()

    def optimizer(steps: int):
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
        plan=TrainerConfig(
            epochs=epochs, patience=patience, average=average, accelerator="cpu", devices=devices
        ),
        seed=seed,
        folder=folder,
        progress=(lambda line: None) if told is None else told,
    )
    return net, history


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def run(place: Path, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    file = place / "child.py"
    file.write_text(program, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(file), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    """Killed in the middle of epoch 3 and started again: weights and history as if never killed."""
    assert run(tmp_path, CHILD, str(tmp_path / "killed")).returncode == -signal.SIGKILL
    lines: list[str] = []
    resumed, history = learn(folder=tmp_path / "killed", average=2.0, told=lines.append)
    whole, uninterrupted = learn(average=2.0)
    assert lines[0].startswith("epoch 3 of 6")
    assert same(resumed, whole)
    assert replace(history, seconds=0.0) == replace(uninterrupted, seconds=0.0)


def test_a_finished_training_is_not_done_again(tmp_path):
    """The folder of a training that stopped early gives its result, without one more step."""
    first, history = learn(folder=tmp_path, epochs=40, patience=1)
    assert len(history.scores) < 40

    def refuse(epoch: int, step: int) -> None:
        raise AssertionError("trained again")

    second, again = learn(folder=tmp_path, epochs=40, patience=1, watch=refuse)
    assert same(first, second)
    assert again == history


def test_the_same_seed_gives_the_same_network():
    """Twice the same bits; another seed gives another network."""
    first, second, other = learn()[0], learn()[0], learn(seed=1)[0]
    assert same(first, second)
    assert not same(first, other)


def test_the_best_epoch_is_kept_and_patience_ends_training():
    """Scores 1, 3, 2, 2 with patience 2: four epochs, and the weights of the second."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.zero_()
    scores = iter([1.0, 3.0, 2.0, 2.0, 9.0])
    history = fit(
        net,
        loss=lambda batch: -net(torch.ones(1, 1)).sum(),
        batches=lambda epoch: [0],
        optimizer=lambda steps: (torch.optim.SGD(net.parameters(), lr=1.0), None),
        score=lambda: next(scores),
        plan=TrainerConfig(epochs=9, patience=2, accelerator="cpu", devices=1),
        seed=0,
        progress=lambda line: None,
    )
    assert (history.best_score, history.best_epoch) == (3.0, 2)
    assert history.scores == (1.0, 3.0, 2.0, 2.0)
    assert float(net.weight.detach()) == pytest.approx(2.0)  # one up a step, one step an epoch
    assert not net.training


def test_averaged_weights_are_scored_and_kept():
    """The mean over steps is what is scored and kept; training goes on from its own weights."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.zero_()
    seen = []

    def score() -> float:
        seen.append(float(net.weight.detach()))
        return seen[-1]

    fit(
        net,
        loss=lambda batch: -net(torch.ones(1, 1)).sum(),
        batches=lambda epoch: [0],
        optimizer=lambda steps: (torch.optim.SGD(net.parameters(), lr=1.0), None),
        score=score,
        plan=TrainerConfig(epochs=3, patience=3, average=100.0, accelerator="cpu", devices=1),
        seed=0,
        progress=lambda line: None,
    )
    assert seen == pytest.approx([1.0, 1.5, 2.0])  # means of 1; 1, 2; 1, 2, 3
    assert float(net.weight.detach()) == pytest.approx(2.0)


def test_a_loss_that_is_no_number_names_epoch_and_step():
    """Training ends at once, in one line, instead of filling the network with NaN."""
    net = nn.Linear(1, 1)
    steps = iter(range(100))

    def loss(batch: int) -> Tensor:
        return net(torch.ones(1, 1)).sum() * (float("nan") if next(steps) == 4 else 1.0)

    with pytest.raises(ModelError, match="loss is nan at epoch 2, step 2;") as raised:
        fit(
            net,
            loss=loss,
            batches=lambda epoch: [0, 1, 2],
            optimizer=lambda steps: (torch.optim.SGD(net.parameters(), lr=0.1), None),
            score=lambda: 0.0,
            plan=TrainerConfig(epochs=3, patience=3, accelerator="cpu", devices=1),
            seed=0,
            progress=lambda line: None,
        )
    assert "\n" not in str(raised.value)


def test_frozen_parameters_are_not_in_the_checkpoint(tmp_path):
    """A pretrained encoder's untouched layers aren't written at every epoch."""
    net = nn.Sequential(nn.Linear(1, 50), nn.Linear(50, 1))
    net[0].requires_grad_(False)
    fit(
        net,
        loss=lambda batch: net(torch.ones(1, 1)).sum(),
        batches=lambda epoch: [0],
        optimizer=lambda steps: (torch.optim.SGD(net[1].parameters(), lr=0.1), None),
        score=lambda: 0.0,
        plan=TrainerConfig(epochs=1, patience=1, accelerator="cpu", devices=1),
        seed=0,
        folder=tmp_path,
        progress=lambda line: None,
    )
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert set(kept["state_dict"]) == {"module.1.weight", "module.1.bias"}
    assert set(kept["stream_hbaf"]["best"]) == {"1.weight", "1.bias"}


def test_training_says_only_what_it_is_asked_to(tmp_path, capfd):
    """Nothing of the trainer's own on either stream; logs for TensorBoard in the folder."""
    lines: list[str] = []
    learn(folder=tmp_path, epochs=2, told=lines.append)
    assert capfd.readouterr() == ("", "")
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert len(list((tmp_path / "logs").glob("events.out.tfevents.*"))) == 1


def test_two_processes_share_the_batches(tmp_path):
    """On two devices of one machine training learns and ends, and one of them has the say."""
    done = run(tmp_path, RANKS)
    assert done.returncode == 0, done.stderr
    scores = eval(done.stdout.strip().splitlines()[-1])
    assert len(scores) == 2
    assert scores[1] > scores[0]


def test_a_checkpoint_of_another_network_is_told_and_left_alone(tmp_path):
    """Code that changed the network's parts doesn't go on with weights of the old ones."""
    learn(folder=tmp_path, epochs=2)
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    kept[OWN]["best"]["gone"] = torch.zeros(1)
    torch.save(kept, tmp_path / CHECKPOINT)
    lines: list[str] = []
    anew, _ = learn(folder=tmp_path, epochs=2, told=lines.append)
    assert (
        lines[0]
        == f"{tmp_path / CHECKPOINT}: of another version's network; starting from the beginning"
    )
    assert same(anew, learn(epochs=2)[0])
