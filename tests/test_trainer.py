"""Promises of the trainer: the best epoch is kept, seeds repeat, a killed training resumes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from trainer_kit import learn

from stream_hbaf.errors import ModelError
from stream_hbaf.training.trainer import CHECKPOINT, TrainerConfig, TrainingHistory, fit

TESTS = Path(__file__).parent

# A process that trains as ``learn`` does and is killed in the middle of its third epoch.
CHILD = """
import os, signal, sys
from pathlib import Path
from trainer_kit import learn
def die(epoch, step):
    if (epoch, step) == (3, 5):
        os.kill(os.getpid(), signal.SIGKILL)
learn(folder=Path(sys.argv[1]), average=2.0, watch=die)
"""
# Two processes; in the second epoch the main one is killed ("kill"), or the other fails ("fail").
TWO = """
import os, signal, sys
from pathlib import Path
import numpy as np
from trainer_kit import learn
from stream_hbaf.errors import ModelError
from stream_hbaf.training.distributed import is_main_process
place, event = Path(sys.argv[1]), sys.argv[2]
def watch(epoch, step):
    if (epoch, step, event, is_main_process()) == (2, 3, "kill", True):
        os.kill(os.getpid(), signal.SIGKILL)
    if (epoch, step, event, is_main_process()) == (2, 3, "fail", False):
        raise SystemExit(1)
try:
    net, history = learn(devices=2, epochs=2, dropout=0.0, watch=watch, folder=place / "run")
except ModelError as error:
    sys.exit(str(error))
if is_main_process():
    weights = [tensor.numpy() for tensor in net.state_dict().values()]
    np.savez(place / "two.npz", *weights, losses=history.losses)
"""


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def run_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run(place: Path, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    file = place / "child.py"
    file.write_text(program, encoding="utf-8")
    return run_python(str(file), *arguments)


def test_a_killed_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Killed in the middle of epoch 3 and started again: weights and history as if never killed."""
    assert run(tmp_path, CHILD, str(tmp_path / "killed")).returncode == -signal.SIGKILL
    lines: list[str] = []
    resumed, history = learn(folder=tmp_path / "killed", average=2.0, progress=lines.append)
    whole, uninterrupted = learn(average=2.0)
    assert lines[0].startswith("epoch 3 of 6")
    assert same(resumed, whole)
    assert replace(history, seconds=0.0) == replace(uninterrupted, seconds=0.0)


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    """The folder of a training that stopped early gives its result, without one more step."""
    first, history = learn(folder=tmp_path, epochs=40, patience=1)
    assert len(history.scores) < 40

    def refuse(epoch: int, step: int) -> None:
        raise AssertionError("trained again")

    second, again = learn(folder=tmp_path, epochs=40, patience=1, watch=refuse)
    assert same(first, second)
    assert again == history


def test_the_same_seed_gives_the_same_network() -> None:
    """Twice the same bits; another seed gives another network."""
    first, second, other = learn()[0], learn()[0], learn(seed=1)[0]
    assert same(first, second)
    assert not same(first, other)


def test_the_best_epoch_is_kept_and_patience_ends_training() -> None:
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
        plan=TrainerConfig(epochs=9, patience=2),
        seed=0,
        progress=lambda line: None,
    )
    assert (history.best_score, history.best_epoch) == (3.0, 2)
    assert history.scores == (1.0, 3.0, 2.0, 2.0)
    assert float(net.weight.detach()) == pytest.approx(2.0)  # one up a step, one step an epoch
    assert not net.training


def test_averaged_weights_are_scored_and_kept() -> None:
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
        plan=TrainerConfig(epochs=3, patience=3, average=100.0),
        seed=0,
        progress=lambda line: None,
    )
    assert seen == pytest.approx([1.0, 1.5, 2.0])  # means of 1; 1, 2; 1, 2, 3
    assert float(net.weight.detach()) == pytest.approx(2.0)


def test_a_loss_that_is_no_number_names_epoch_and_step() -> None:
    """Training ends at once, in one line, instead of filling the network with NaN."""
    net = nn.Linear(1, 1)
    steps = iter(range(100))

    def loss(batch: int) -> Tensor:
        loss: Tensor = net(torch.ones(1, 1)).sum()
        return loss * (float("nan") if next(steps) == 4 else 1.0)

    with pytest.raises(ModelError, match="loss is nan at epoch 2, step 2;") as raised:
        fit(
            net,
            loss=loss,
            batches=lambda epoch: [0, 1, 2],
            optimizer=lambda steps: (torch.optim.SGD(net.parameters(), lr=0.1), None),
            score=lambda: 0.0,
            plan=TrainerConfig(epochs=3, patience=3),
            seed=0,
            progress=lambda line: None,
        )
    assert "\n" not in str(raised.value)


def fit_weight(
    net: nn.Module,
    *,
    loss: Callable[[int], Tensor],
    optimizer: Callable[[int], tuple[Optimizer, LRScheduler | None]],
    **plan: Any,
) -> TrainingHistory:
    """Fit with two steps an epoch and a score that does not change."""
    return fit(
        net,
        loss=loss,
        batches=lambda epoch: [0, 1],
        optimizer=optimizer,
        score=lambda: 0.0,
        plan=TrainerConfig(patience=9, **plan),
        seed=0,
        progress=lambda line: None,
    )


@pytest.mark.parametrize(("clip", "step"), [(1.0, [0.6, 0.8]), (0.0, [30.0, 40.0])])
def test_gradients_are_clipped_by_their_joint_norm(clip: float, step: list[float]) -> None:
    """A gradient of (30, 40) is scaled to the norm 1; clip 0 leaves it as it is."""
    net = nn.Linear(2, 1, bias=False)
    net.weight.data.zero_()
    fit_weight(
        net,
        loss=lambda batch: -net(torch.tensor([[30.0, 40.0]])).sum(),
        optimizer=lambda steps: (torch.optim.SGD(net.parameters(), lr=0.5), None),
        epochs=1,
        clip=clip,
    )
    assert net.weight.detach()[0].tolist() == pytest.approx(step)


def test_the_schedule_advances_at_each_step() -> None:
    """Three epochs of two steps: the scheduler is made for six, and the rate falls at each."""
    net = nn.Linear(1, 1, bias=False)
    sgd = torch.optim.SGD(net.parameters(), lr=6.0)
    rates: list[float] = []

    def optimizer(steps: int) -> tuple[Optimizer, LRScheduler]:
        return sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 - step / steps)

    def loss(batch: int) -> Tensor:
        rates.append(sgd.param_groups[0]["lr"])
        loss: Tensor = net(torch.ones(1, 1)).sum()
        return loss

    fit_weight(net, loss=loss, optimizer=optimizer, epochs=3)
    assert rates == pytest.approx([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize(("precision", "computed"), [("bf16", torch.bfloat16), ("32", torch.float)])
def test_bf16_computes_in_half_precision_on_float32_weights(
    precision: str, computed: torch.dtype
) -> None:
    """Layers compute in the precision asked for; the weights that are trained stay float32."""
    net = nn.Linear(4, 1)
    types = []

    def loss(batch: int) -> Tensor:
        output: Tensor = net(torch.ones(2, 4))
        types.append(output.dtype)
        return output.float().sum()

    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    fit_weight(net, loss=loss, optimizer=lambda steps: (sgd, None), epochs=1, precision=precision)
    assert types == [computed] * 2
    assert net.weight.dtype == torch.float


def test_frozen_parameters_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    """A pretrained encoder's untouched layers aren't written at every epoch."""
    net = nn.Sequential(nn.Linear(1, 50), nn.Linear(50, 1))
    net[0].requires_grad_(False)
    fit(
        net,
        loss=lambda batch: net(torch.ones(1, 1)).sum(),
        batches=lambda epoch: [0],
        optimizer=lambda steps: (torch.optim.SGD(net[1].parameters(), lr=0.1), None),
        score=lambda: 0.0,
        plan=TrainerConfig(epochs=1, patience=1),
        seed=0,
        folder=tmp_path,
        progress=lambda line: None,
    )
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert set(kept["weights"]) == {"1.weight", "1.bias"}
    assert set(kept["best"]) == {"1.weight", "1.bias"}


def test_training_prints_nothing_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the trainer's own on either stream; logs for TensorBoard in the folder."""
    lines: list[str] = []
    learn(folder=tmp_path, epochs=2, progress=lines.append)
    assert capfd.readouterr() == ("", "")
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert len(list((tmp_path / "logs").glob("events.out.tfevents.*"))) == 1


def assert_as_one(place: Path) -> None:
    """The two processes' network is that of one process with their batches joined."""
    net, history = learn(epochs=2, dropout=0.0, joined=2)
    with np.load(place / "two.npz") as two:
        for number, tensor in enumerate(net.state_dict().values()):
            np.testing.assert_allclose(two[f"arr_{number}"], tensor.numpy(), atol=1e-5)
        assert len(two["losses"]) == len(history.losses) == 2


def test_two_processes_train_as_one_with_their_joined_batches(tmp_path: Path) -> None:
    """Gradients are those of both batches' mean loss, also where the main process was killed."""
    assert run(tmp_path, TWO, str(tmp_path), "kill").returncode == -signal.SIGKILL
    assert not (tmp_path / "two.npz").exists()
    done = run(tmp_path, TWO, str(tmp_path), "resume")
    assert done.returncode == 0, done.stderr
    assert_as_one(tmp_path)


def test_a_process_that_fails_ends_the_training_of_all(tmp_path: Path) -> None:
    """The main process does not wait for one that is gone; it says so in one line."""
    done = run(tmp_path, TWO, str(tmp_path), "fail")
    assert done.returncode == 1
    assert "training: another process failed; its error stands above" in done.stderr
    assert not (tmp_path / "two.npz").exists()


def test_processes_of_torchrun_are_used(tmp_path: Path) -> None:
    """Processes that torchrun started train together and start no others."""
    (tmp_path / "child.py").write_text(TWO, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_python(*launch, str(tmp_path / "child.py"), str(tmp_path), "")
    assert done.returncode == 0, done.stderr
    assert_as_one(tmp_path)


def test_devices_that_are_not_there_are_refused() -> None:
    """A GPU that the machine lacks ends in one line before the first step."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match="accelerator gpu: no GPU was found; choose cpu or auto"):
        learn(accelerator="gpu")


def test_a_checkpoint_of_another_network_is_reported_and_not_used(tmp_path: Path) -> None:
    """After a change of the network's tensors the training starts from the beginning."""
    learn(folder=tmp_path, epochs=2)
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    kept["weights"]["gone"] = torch.zeros(1)
    torch.save(kept, tmp_path / CHECKPOINT)
    lines: list[str] = []
    anew, _ = learn(folder=tmp_path, epochs=2, progress=lines.append)
    assert (
        lines[0]
        == f"{tmp_path / CHECKPOINT}: of another version's network; starting from the beginning"
    )
    assert same(anew, learn(epochs=2)[0])
