"""A machine on a virtual clock: asyncio code runs unchanged, and what it computes only takes time.

The event loop never waits: its clock jumps to the next timer. Threads are executors whose calls
spend seconds on the cores, which all running threads share equally. So that the scheduling that is
simulated is the program's own, and no copy of it.
"""

import asyncio
import heapq
import selectors
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Executor, Future
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar
from unittest import mock

T = TypeVar("T")

BEGAN = 1_000_000.0  # virtual seconds, of the monotonic and of the wall clock
DONE_S = 1e-9  # of work, less than which none is left: rounding


class _Skipping(selectors.SelectSelector):
    """Never waits for a timeout, but says that the time has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGAN

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation stands still: nobody waits for a time")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        self._clock = _Skipping()
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds."""
        return self._clock.now


class Cores:
    """Processor cores, shared equally by the threads that run.

    ``rates`` says how much 1, 2, … threads compute together, in seconds of one that runs alone a
    second; more threads than it has entries compute as much as its last one.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self.spent_s = 0.0  # by all threads, as if each had run alone
        self._rates = rates
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []  # by when they are done
        self._numbers = count()
        self._served = 0.0  # seconds that each thread has got since the beginning
        self._served_at = BEGAN
        self._timer: asyncio.TimerHandle | None = None

    async def work(self, seconds: float) -> None:
        """Compute for so long, in seconds of a thread that runs alone."""
        if seconds <= 0:
            return
        loop = asyncio.get_running_loop()
        self._advance(loop.time())
        done = loop.create_future()
        heapq.heappush(self._running, (self._served + seconds, next(self._numbers), done))
        self._plan(loop)
        await done
        self.spent_s += seconds

    def _rate(self) -> float:
        """Of each running thread."""
        running = len(self._running)
        return self._rates[min(running, len(self._rates)) - 1] / running

    def _advance(self, now: float) -> None:
        if self._running:
            self._served += (now - self._served_at) * self._rate()
        self._served_at = now

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            left = max(0.0, self._running[0][0] - self._served)
            self._timer = loop.call_later(left / self._rate(), self._finish, loop)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        self._advance(loop.time())
        while self._running and self._running[0][0] <= self._served + DONE_S:
            heapq.heappop(self._running)[2].set_result(None)
        self._plan(loop)


class Machine:
    """Cores, and executors on them. Every call costs the event loop ``hop_s`` on top."""

    def __init__(self, rates: Sequence[float], *, hop_s: float) -> None:
        self.cores = Cores(rates)
        self._hop_s = hop_s
        self._loop_turn = asyncio.Lock()  # there is one event loop
        self._due_s = 0.0  # of the call that is being made
        self._tasks: set[asyncio.Task[None]] = set()

    def spend(self, seconds: float) -> None:
        """The call that is being made takes so long, longer than it has so far."""
        self._due_s += seconds

    def beside(self, seconds: float) -> None:
        """Compute for so long in another thread, for which nobody waits."""
        self.start(self.cores.work(seconds))

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine to its end."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def executor(self, workers: int, *, thread_name_prefix: str = "") -> "SimulatedExecutor":
        """In place of a ThreadPoolExecutor."""
        return SimulatedExecutor(self, workers)

    async def call(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
        """A function's value, after the time that it spends, or that its generator yields."""
        value = function(*arguments)
        if isinstance(value, Generator):
            try:
                while True:
                    await self.cores.work(next(value))
            except StopIteration as end:
                value = end.value
        due, self._due_s = self._due_s, 0.0
        await self.cores.work(due)
        return value

    async def hop(self) -> None:
        """A turn of the event loop."""
        async with self._loop_turn:
            await self.cores.work(self._hop_s)


class SimulatedExecutor(Executor):
    """Runs calls one after the other on each of its workers, in the order in which they came."""

    def __init__(self, machine: Machine, workers: int) -> None:
        self._machine = machine
        self._free = workers
        self._waiting: deque[tuple[Future[Any], Callable[..., Any], tuple[object, ...]]] = deque()

    def submit(  # type: ignore[override]
        self, function: Callable[..., T], *arguments: object
    ) -> Future[T]:
        """The call's future; it can be cancelled until its turn comes."""
        job: Future[T] = Future()
        self._waiting.append((job, function, arguments))
        self._start()
        return job

    def _start(self) -> None:
        while self._waiting and self._free:
            job, function, arguments = self._waiting.popleft()
            if job.set_running_or_notify_cancel():
                self._free -= 1
                self._machine.start(self._run(job, function, arguments))

    async def _run(
        self, job: Future[Any], function: Callable[..., Any], arguments: tuple[object, ...]
    ) -> None:
        value = await self._machine.call(function, arguments)
        self._free += 1
        self._start()
        await self._machine.hop()
        job.set_result(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing runs any more: the pipeline has waited for all it asked for."""


def run_virtually(main: Callable[[], Coroutine[Any, Any, T]], machine: Machine) -> T:
    """What a coroutine returns that runs on a virtual clock.

    All of the program sees that clock. The process's CPU time is that of the machine's cores.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        clocks: dict[str, Any] = dict.fromkeys(("monotonic", "time", "perf_counter"), loop.time)
        clocks["process_time"] = lambda: machine.cores.spent_s
        with mock.patch.multiple(time, **clocks):
            return runner.run(main())
