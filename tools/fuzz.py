#!/usr/bin/env python3
"""Tries damaged and hostile inputs of everything that is read: nothing may crash, hang or grow.

    tools/fuzz.py [--inputs 10000] [--kinds audio,settings] [--seed 0] [--commands 2]

The inputs are divided among the kinds. Each is made from a number, the seed, and is read in a
child process with a limit of time and memory. What can't be read must be one printable line. A
few of each kind are also given to the real command, which must end with status 0 or 2 and without
a traceback. Prints a table, and for each fault the command that repeats it; the status is 1 then.
Needs FFmpeg (apt-get install ffmpeg).
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: more threads only wait for one another
os.environ["TQDM_DISABLE"] = "1"  # bars of libraries would stand in the table
os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged name of a model is looked for on this machine only
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]  # damages and samples of the tests

import fuzz_kinds  # noqa: E402
import fuzz_mqtt  # noqa: E402
from fuzz_kinds import Kind  # noqa: E402
from fuzz_page import Requests  # noqa: E402
from fuzz_senders import WebSockets, Wyoming  # noqa: E402

KINDS: dict[str, type[Kind]] = {
    "audio": fuzz_kinds.Audio,
    "settings": fuzz_kinds.Settings,
    "recipes": fuzz_kinds.Recipes,
    "manifests": fuzz_kinds.Manifests,
    "bundles": fuzz_kinds.Bundles,
    "sessions": fuzz_kinds.Sessions,
    "voices": fuzz_kinds.Voices,
    "mqtt": fuzz_mqtt.Messages,
    "outbox": fuzz_mqtt.Outboxes,
    "websocket": WebSockets,
    "wyoming": Wyoming,
    "dashboard": Requests,
}
WITHOUT_COMMAND = ("mqtt", "outbox", "websocket", "wyoming", "dashboard")  # no file can be given

CASE_S = 10.0  # for one input; the slowest take under a second
PREPARE_S = 120.0  # for a kind's imports and its whole input
COMMAND_S = 120.0  # for the real command, which loads its models
MEMORY = 1 << 30  # bytes of address space beyond what the imports take
LONGEST_LINE = 1000  # characters of a complaint
USER_ERROR = 2


@dataclass
class Outcome:
    """What came of the inputs of a kind."""

    kind: str
    inputs: int = 0
    commands: int = 0
    tracebacks: int = 0
    hangs: int = 0
    slowest_s: float = 0.0
    memory_mb: int = 0
    faults: list[str] = field(default_factory=list)  # each with the command that repeats it

    def read(self, seconds: float, memory_mb: int) -> None:
        """Count an input that was read or refused."""
        self.inputs += 1
        self.slowest_s, self.memory_mb = (
            max(self.slowest_s, seconds),
            max(self.memory_mb, memory_mb),
        )

    def failed(self, seed: int, what: str, *, hangs: bool = False, command: bool = False) -> None:
        """Count a fault."""
        self.hangs += hangs
        self.tracebacks += not hangs
        counts = "--inputs 0 --commands 1" if command else "--inputs 1 --commands 0"
        repeat = f"tools/fuzz.py --kinds {self.kind} --seed {seed} {counts}"
        self.faults.append(f"{self.kind} {seed}: {what}\n    {repeat}")

    @property
    def row(self) -> str:
        counts = f"{self.inputs:>8,}{self.commands:>10}{self.tracebacks:>12}{self.hangs:>7}"
        return f"{self.kind:<10}{counts}{self.slowest_s:>9.2f} s{self.memory_mb:>8} MB"


HEAD = f"{'kind':<10}{'inputs':>8}{'commands':>10}{'tracebacks':>12}{'hangs':>7}{'slowest':>11}"
HEAD += f"{'memory':>11}"


def is_line(text: str) -> bool:
    """Whether a complaint is one short line that controls no terminal."""
    return text.isprintable() and len(text) <= LONGEST_LINE


class Errors(logging.Handler):
    """Keeps what is logged as an error, with a traceback, or not as one short printable line."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.levelno >= logging.ERROR or record.exc_info or not is_line(line):
            error = record.exc_info[1] if record.exc_info else ""
            self.found.append(f"logged: {line[:300]!r} {error!r}")


# ---- in a child process


def fault_of(kind: Kind, seed: int, errors: Errors) -> str:
    """Make one input and read it; returns what went wrong, if anything."""
    errors.found.clear()
    try:
        kind.write(seed)
        said = kind.read()
    except Exception as error:  # noqa: BLE001  any kind of error is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:300]
    if not is_line(said):
        return f"not one short line: {said[:200]!r}"
    return errors.found[0] if errors.found else ""


def limit_memory() -> None:
    """From here on an allocation beyond ``MEMORY`` fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(name: str, seeds: range, pipe: Connection) -> None:
    """Read inputs; send each seed when it begins, then the fault, the time and the memory."""
    errors = Errors()
    logging.basicConfig(handlers=[errors], level=logging.WARNING, force=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(pipe):
        kind = KINDS[name](Path(folder))
        limit_memory()
        for seed in seeds:
            pipe.send(seed)
            began = time.monotonic()
            fault = fault_of(kind, seed, errors)
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            pipe.send((fault, time.monotonic() - began, memory_mb))
        pipe.send(None)


# ---- in this one


@contextlib.contextmanager
def child(name: str, seeds: range) -> Iterator[Connection]:
    """A process that reads inputs; yields what it sends."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=work, args=(name, seeds, there))
    process.start()
    there.close()
    try:
        yield here
    finally:
        process.kill()
        process.join()
        here.close()


def follow(pipe: Connection, outcome: Outcome) -> int | None:
    """Take what a child sends; returns the seed at which it hung or died, None at its end."""
    seed: int | None = None
    while True:
        try:
            if not pipe.poll(PREPARE_S if seed is None else CASE_S):
                what, hangs = f"hangs for more than {CASE_S:g} s", True
                break
            match pipe.recv():
                case int(begun):
                    seed = begun
                case (fault, seconds, memory_mb):
                    outcome.read(seconds, memory_mb)
                    if fault and seed is not None:
                        outcome.failed(seed, fault)
                case None:
                    return None
        except EOFError:
            what, hangs = "the process died", False
            break
    if seed is None:
        raise SystemExit(f"{outcome.kind}: its inputs can't be prepared")
    outcome.inputs += 1
    outcome.failed(seed, what, hangs=hangs)
    return seed


def read_all(outcome: Outcome, seeds: range) -> None:
    """Read all inputs; after one that hangs or kills its process, the next are read in another."""
    while seeds:
        with child(outcome.kind, seeds) as pipe:
            ended = follow(pipe, outcome)
        seeds = seeds[:0] if ended is None else range(ended + 1, seeds.stop)


def run_command(outcome: Outcome, kind: Kind, seed: int, folder: Path) -> None:
    """Give an input to the real command line."""
    kind.write(seed)
    command = [sys.executable, "-m", "stream_hbaf.cli", *kind.command]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "XDG_STATE_HOME": str(folder)}
    outcome.commands += 1
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=COMMAND_S
        )
    except subprocess.TimeoutExpired:
        outcome.failed(seed, f"runs for more than {COMMAND_S:g} s", hangs=True, command=True)
        return
    complaint = done.stderr.decode(errors="replace")
    if done.returncode not in (0, USER_ERROR) or "Traceback (most recent" in complaint:
        last = (complaint.splitlines() or [""])[-1]
        outcome.failed(seed, f"status {done.returncode}: {last[:300]}", command=True)


def run_commands(outcome: Outcome, seeds: range) -> None:
    """A few of the inputs through the real command line, where the kind has one."""
    if not seeds or outcome.kind in WITHOUT_COMMAND:
        return
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[outcome.kind](Path(folder))
        for seed in seeds:
            run_command(outcome, kind, seed, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--commands", type=int, default=2, help="of each kind, by the real command")
    chosen = parser.parse_args()
    names = chosen.kinds.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        parser.error(f"no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    each = -(-chosen.inputs // len(names))
    outcomes = [Outcome(name) for name in names]
    for outcome in outcomes:
        print(f"reads {each} {outcome.kind}", file=sys.stderr, flush=True)
        read_all(outcome, range(chosen.seed, chosen.seed + each))
    for outcome in outcomes:  # last: what they import would count for the processes of the others
        run_commands(outcome, range(chosen.seed, chosen.seed + chosen.commands))
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    print(HEAD, *(outcome.row for outcome in outcomes), *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
