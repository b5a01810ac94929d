"""Join the processes of a training on several devices: one a device, on one machine or more."""

import atexit
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from stream_hbaf.errors import ModelError

T = TypeVar("T")
GRACE_S = 5.0  # in which a process that fails ends, after its connections have closed


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's place among those that train together."""

    device: torch.device
    rank: int
    count: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def is_main_process() -> bool:
    """Whether this process, among those of a training on several devices, writes the results."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def join_processes(
    accelerator: Literal["auto", "cpu", "gpu"], *, devices: int | Literal["auto"], nodes: int
) -> Iterator[Processes]:
    """The processes of a training on ``devices`` of each of ``nodes`` machines.

    Where torchrun has set RANK and WORLD_SIZE, its processes are used. Otherwise each machine's
    first process starts the others, by its own command line: they come to the same call and wait.
    Raises ModelError if there is no such GPU, or another process has failed meanwhile.
    """
    on_gpu, local = _find_devices(accelerator, devices=devices, nodes=nodes)
    count = nodes * local
    device = torch.device("cuda" if on_gpu else "cpu")
    if count == 1:
        yield Processes(device, 0, 1)
        return
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            _start_others(local, nodes=nodes)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        atexit.register(_end)
    if dist.get_world_size() != count:
        raise ModelError(
            f"training: {dist.get_world_size()} processes were started for {local} "
            f"devices on {nodes} nodes; start {count}"
        )
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        yield Processes(device, dist.get_rank(), count)
    except RuntimeError as error:  # torch's, of a connection that another process has closed
        if _has_failed():
            raise ModelError("training: another process failed; its error stands above") from error
        raise


def _find_devices(
    accelerator: Literal["auto", "cpu", "gpu"], *, devices: int | Literal["auto"], nodes: int
) -> tuple[bool, int]:
    """Whether GPUs train, and how many of this machine's devices."""
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    if accelerator == "gpu" and not on_gpu:
        raise ModelError("training: accelerator gpu: no GPU was found; choose cpu or auto")
    there = torch.cuda.device_count() if on_gpu else 1
    if devices == "auto":
        started = int(os.environ.get("WORLD_SIZE", "0"))
        return on_gpu, started // nodes if started else there
    if on_gpu and devices > there:
        raise ModelError(f"training: {devices} devices, but {there} are there; lower the number")
    return on_gpu, devices


_started: list["subprocess.Popen[bytes]"] = []  # by this process


def _start_others(devices: int, *, nodes: int) -> None:
    """Start this machine's other processes, and be the first of them."""
    node = int(os.environ.get("NODE_RANK", "0"))
    if nodes == 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    elif not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise ModelError(
            f"training: {nodes} nodes need MASTER_ADDR, MASTER_PORT and NODE_RANK in each one's "
            "environment; set them, or start with torchrun"
        )
    os.environ["WORLD_SIZE"] = str(devices * nodes)
    for local in reversed(range(devices)):
        os.environ |= {"RANK": str(node * devices + local), "LOCAL_RANK": str(local)}
        if local:
            command = [sys.executable, *sys.orig_argv[1:]]
            _started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))


def _end() -> None:
    # Freed by the interpreter's exit, DistributedDataParallel aborts the process now and then.
    gc.collect()
    dist.destroy_process_group()
    for process in _started:
        process.terminate()
        process.wait()


def _has_failed() -> bool:
    """Whether a process that this one started has ended with an error."""
    for process in _started:
        with suppress(subprocess.TimeoutExpired):
            if process.wait(GRACE_S):
                return True
    return False
