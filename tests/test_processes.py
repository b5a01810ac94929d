"""Promises of the worker processes: each result once, and an end whatever happens on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stream_hbaf.errors import CorpusError
from stream_hbaf.processes import WorkerDiedError, map_as_completed


def square(n: int, offset: int = 0) -> int:
    time.sleep(0.2 if n == 0 else 0.0)  # the first is the last to be done
    return n * n + offset


def wait_for_the_others(n: int, folder: Path) -> int:
    """Item 0 is done when all others are, however late a worker starts."""
    (folder / str(n)).touch()
    while n == 0 and len(list(folder.iterdir())) < 4:
        time.sleep(0.01)
    return n * n


def number_of_threads(_: int) -> tuple[int, str, int]:
    import torch  # seconds, which the other functions' workers need not pay

    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.getpid()


def fail(n: int) -> int:
    if n == 1:
        raise CorpusError("line 1: mend it")
    if n == 2:
        raise KeyError("bug")
    return n


def die(n: int) -> int:
    if n == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


class UnsendableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("it fails")


def fail_unsendably(_: int) -> None:
    raise UnsendableError(1, 2)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_have_their_items_index(workers: int) -> None:
    """The same for any number of workers, also where the first item takes the longest."""
    found = map_as_completed(square, range(5), workers=workers)
    assert sorted(found) == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    shared = map_as_completed(square, range(3), workers=workers, shared=(100,))
    assert sorted(shared) == [(0, 100), (1, 101), (2, 104)]


def test_results_as_they_are_completed(tmp_path: Path) -> None:
    """Each once, with its index; nothing is held back by a slow one."""
    found = list(map_as_completed(wait_for_the_others, [3, 0, 2, 1], workers=2, shared=(tmp_path,)))
    assert sorted(found) == [(0, 9), (1, 0), (2, 4), (3, 1)]
    assert found[-1] == (1, 0)
    assert list(map_as_completed(square, [], workers=2)) == []


def test_workers_have_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are other processes than this, a single one too if it is to be isolated."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for workers in (1, 2):
        for _, (threads, variable, pid) in map_as_completed(
            number_of_threads, range(2), workers=workers, isolated=True
        ):
            assert (threads, variable) == (1, "1")
            assert pid != os.getpid()


def test_exceptions_of_the_function_are_raised_here() -> None:
    """Errors of users as they are, bugs with the worker's traceback."""
    with pytest.raises(CorpusError, match=r"^line 1: mend it$"):
        list(map_as_completed(fail, [0, 1], workers=2))
    with pytest.raises(KeyError) as raised:
        list(map_as_completed(fail, [2, 0], workers=2))
    assert 'raise KeyError("bug")' in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="it fails"):
        list(map_as_completed(fail_unsendably, [1], workers=1, isolated=True))


def test_a_worker_that_dies_is_one_line() -> None:
    """It names the item, and what happened to the process."""
    with pytest.raises(WorkerDiedError) as raised:
        list(map_as_completed(die, [0, 1], workers=2))
    assert raised.value.index == 1
    assert str(raised.value) == (
        "a worker process died (signal SIGKILL), perhaps for lack of memory; use fewer workers"
    )


SLEEPERS = """
import os, sys, time
from pathlib import Path
from stream_hbaf.processes import map_as_completed

def sleep(n, folder):
    (folder / str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    list(map_as_completed(sleep, range(2), workers=2, shared=(Path(sys.argv[1]),)))
"""


class EndsItsReceiver:
    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)


def test_a_worker_that_dies_at_its_start_is_not_waited_for() -> None:
    """Also with more on its way to it than a pipe holds."""
    shared = (EndsItsReceiver(), bytes(2**20))
    with pytest.raises(WorkerDiedError, match=r"died \(status 3\)"):
        list(map_as_completed(square, [1], workers=1, shared=shared, isolated=True))


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path: Path, ending: signal.Signals) -> None:
    """In the middle of an item, whether the parent is killed or interrupted."""
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SLEEPERS, encoding="utf-8")
    pids.mkdir()
    with subprocess.Popen(
        [sys.executable, script, pids], stderr=subprocess.PIPE, text=True
    ) as parent:
        _wait_until(lambda: len(list(pids.iterdir())) == 2, "workers start")
        parent.send_signal(ending)
        _, errors = parent.communicate(timeout=10)
    _wait_until(
        lambda: not any(Path(f"/proc/{pid.name}").exists() for pid in pids.iterdir()),
        "workers end",
    )
    assert errors.count("Traceback") == (1 if ending == signal.SIGINT else 0)  # the parent's own


def test_closing_early_ends_the_workers() -> None:
    """Whoever takes only the first results doesn't wait for the rest."""
    begun = time.monotonic()
    results = map_as_completed(time.sleep, [0, 60, 60], workers=2)
    assert next(results) == (0, None)
    results.close()
    assert time.monotonic() - begun < 30


def _wait_until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within 20 s"
        time.sleep(0.02)
