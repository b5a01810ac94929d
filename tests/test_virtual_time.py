"""The virtual clock: threads share its cores, and nothing waits for real."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

import pytest
from virtual_time import Machine, run_virtually

T = TypeVar("T")


def run(scene: Callable[[Machine], Coroutine[Any, Any, T]], *, hop_s: float = 0.0) -> T:
    """A scene on two cores that compute 1.5 times as much as one."""

    async def main() -> T:
        return await scene(machine)

    machine = Machine([1.0, 1.5], hop_s=hop_s)
    return run_virtually(main, machine)


def test_a_thread_that_is_alone_takes_its_own_time_and_no_real_time() -> None:
    async def scene(machine: Machine) -> tuple[float, float]:
        began = time.monotonic()
        await machine.cores.work(3600.0)
        return time.monotonic() - began, time.process_time()

    began = time.perf_counter()
    assert run(scene) == pytest.approx((3600.0, 3600.0))
    assert time.perf_counter() - began < 60


def test_threads_share_the_cores_equally() -> None:
    """Two get 0.75 each, three 0.5, and the last one all of a core."""

    async def scene(machine: Machine) -> list[float]:
        began = time.monotonic()

        async def work(seconds: float) -> float:
            await machine.cores.work(seconds)
            return time.monotonic() - began

        return [*await asyncio.gather(work(1.0), work(1.0), work(2.0))]

    # Three until 1 s is done in each, at 2.0 s; then one alone.
    assert run(scene) == pytest.approx([2.0, 2.0, 3.0])


def test_calls_of_one_executor_wait_for_each_other_and_cancelled_ones_never_run() -> None:
    async def scene(machine: Machine) -> tuple[list[str], float]:
        began, ran = time.monotonic(), list[str]()

        def call(name: str) -> None:
            ran.append(name)
            machine.spend(1.0)

        with machine.executor(1) as thread:
            jobs = [thread.submit(call, name) for name in ("first", "second", "third")]
            assert jobs[1].cancel()
            assert not jobs[0].cancel()  # it runs
            await asyncio.gather(asyncio.wrap_future(jobs[0]), asyncio.wrap_future(jobs[2]))
        return ran, time.monotonic() - began

    ran, took = run(scene)
    assert ran == ["first", "third"]
    assert took == pytest.approx(2.0)


def test_a_generator_yields_its_seconds_one_after_the_other() -> None:
    """So that it may give up in between, by what has happened meanwhile."""

    async def scene(machine: Machine) -> tuple[str, float]:
        began, over = time.monotonic(), asyncio.Event()

        def steps() -> Generator[float, None, str]:
            for _ in range(10):
                if over.is_set():
                    return "given up"
                yield 1.0
            return "done"

        asyncio.get_running_loop().call_later(2.5, over.set)
        with machine.executor(1) as thread:
            value: Any = await asyncio.wrap_future(thread.submit(steps))
        return value, time.monotonic() - began

    value, took = run(scene)
    assert value == "given up"
    assert took == pytest.approx(3.0)


def test_each_call_costs_the_event_loop_a_turn() -> None:
    """Two threads are done at the same time; the loop takes one after the other."""

    async def scene(machine: Machine) -> list[float]:
        began = time.monotonic()

        async def call() -> float:
            with machine.executor(1) as thread:
                await asyncio.wrap_future(thread.submit(lambda: machine.spend(0.75)))
            return time.monotonic() - began

        return [*await asyncio.gather(call(), call())]

    assert run(scene, hop_s=0.1) == pytest.approx([1.1, 1.2])


def test_a_simulation_in_which_nobody_waits_for_a_time_ends_with_an_error() -> None:
    async def scene(machine: Machine) -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="stands still"):
        run(scene)
