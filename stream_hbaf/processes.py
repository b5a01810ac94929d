"""Runs a function on many items in worker processes.

Workers are spawned, not forked: threads of torch, onnxruntime and openSMILE don't survive a fork.
Each does its numerics in one thread, ignores Ctrl-C (the parent ends it), and ends with its
parent, even if that is killed. Standard library only.

Other pools were weighed. Workers of joblib outlive a killed parent by minutes, tasks of
concurrent.futures can't be ended before they are done, and neither says at which item a worker
died.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from stream_hbaf.errors import StreamHbafError

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Mapper = Callable[..., Generator[tuple[int, Any], None, None]]  # as map_as_completed
ELSEWHERE: ContextVar[Mapper | None] = ContextVar("ELSEWHERE", default=None)
END_S = 3.0  # a worker that hasn't ended by then is killed


class WorkerDiedError(StreamHbafError):
    """A worker process ended without a result: killed, out of memory, or crashed in a library."""

    def __init__(self, message: str, *, index: int = -1) -> None:
        super().__init__(message)
        self.index = index  # of the item that it was given


@contextmanager
def mapped_by(mapper: Mapper) -> Iterator[None]:
    """In the block, ``map_as_completed`` has its items done elsewhere, as on a cluster."""
    former = ELSEWHERE.set(mapper)
    try:
        yield
    finally:
        ELSEWHERE.reset(former)


def map_as_completed(
    function: Callable[..., Result],
    items: Sequence[Item],
    *,
    workers: int,
    shared: tuple[Any, ...] = (),
    isolated: bool = False,
) -> Generator[tuple[int, Result], None, None]:
    """Yield each item's index and ``function(item, *shared)``, as they are completed.

    The function must be a module's own, everything else picklable; ``shared`` is sent to each
    worker once. With one worker everything runs in this process, unless it is to be ``isolated``.
    An exception of the function is raised here. It ends the other workers, as Ctrl-C does and
    closing the generator. Raises WorkerDiedError if a worker ends before its item is done.
    """
    if (elsewhere := ELSEWHERE.get()) is not None:
        yield from elsewhere(function, items, shared=shared)
        return
    if workers <= 1 and not isolated:
        for index, item in enumerate(items):
            yield index, function(item, *shared)
        return
    waiting = deque(enumerate(items))
    running: list[_Worker] = []
    try:
        for _ in range(min(max(1, workers), len(items))):
            running.append(_Worker(function, shared))
            running[-1].send(*waiting.popleft())
        while running:
            ready = wait([worker.connection for worker in running])
            for worker in [one for one in running if one.connection in ready]:
                index, result = worker.receive()
                if waiting:
                    worker.send(*waiting.popleft())
                else:
                    running.remove(worker)
                    worker.finish()
                yield index, result
    finally:
        _end(running)


class _Worker:
    """A worker process, seen from its parent."""

    def __init__(self, function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end,))
        self.process.start()
        far_end.close()  # of the parent's copy: the connection then ends with the worker
        self._index = -1
        # Not as arguments of the process: while multiprocessing sends those it holds the worker's
        # end of the pipe open, and if the worker dies then it waits for ever.
        self._send((function, shared))

    def send(self, index: int, item: object) -> None:
        """Have the worker work on an item. Raises WorkerDiedError."""
        self._index = index
        self._send(item)

    def _send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_died()

    def receive(self) -> tuple[int, Any]:
        """The item's index and result; raises what the function raised."""
        try:
            succeeded, outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._raise_died()
        if not succeeded:
            raise outcome
        return self._index, outcome

    def finish(self) -> None:
        """Have the worker end: it has nothing left to do."""
        self.connection.close()
        self.process.join(END_S)
        _end([self])

    def _raise_died(self) -> NoReturn:
        self.process.join(END_S)
        code = self.process.exitcode or 0
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        raise WorkerDiedError(
            f"a worker process died ({reason}), perhaps for lack of memory; use fewer workers",
            index=self._index,
        )


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(END_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()


# ---- in a worker


def _serve(connection: Connection) -> None:
    """Receive a function and what all its calls share, then answer each item with (True, result)
    or (False, exception), until the parent hangs up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ``finally`` blocks remove their files
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(dict.fromkeys(THREADS, "1"))  # read when a library is loaded
    function, shared = connection.recv()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(item, *shared)))
        except Exception as error:  # noqa: BLE001  raised in the parent
            connection.send((False, _portable(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The exception as it can be sent, with its traceback as a note where it shows a bug."""
    if not isinstance(error, StreamHbafError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever it raises, it can't be sent
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
