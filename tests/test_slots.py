"""Whose utterance is next, under load: order, fairness, bounds."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from typing import Any

import pytest

from stream_hbaf.live.slots import LONG_WAIT_S, WAITS, PrioritySlots, Urgency

FINAL, SPECULATIVE, PARTIAL = Urgency


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own."""

    @wraps(test)
    def run(**named: Any) -> None:
        asyncio.run(test(**named))

    return run


class Stage:
    """Requests that hold their slot until ``done`` is called; notes their order."""

    def __init__(self, *, at_once: int = 1) -> None:
        self.slots = PrioritySlots(at_once=at_once)
        self.began: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._gates: dict[str, asyncio.Event] = {}

    async def ask(
        self, name: str, urgency: Urgency | Callable[[], Urgency] = FINAL, *, source: str = ""
    ) -> None:
        asked = urgency if callable(urgency) else lambda: urgency
        gate = self._gates[name] = asyncio.Event()

        async def hold() -> None:
            async with self.slots.hold(source or name, asked):
                self.began.append(name)
                await gate.wait()

        self.tasks[name] = asyncio.create_task(hold())
        await asyncio.sleep(0.001)  # so that no two ask at the same time

    async def done(self, name: str) -> None:
        self._gates[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait({self.tasks[name]})

    async def finish(self, names: Iterable[str]) -> list[str]:
        """Let those that wait have their slots, one after the other; returns the order."""
        for name in names:
            self._gates[name].set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        return self.began


@in_loop
async def test_final_before_speculative_before_partial() -> None:
    """Whatever the order in which they asked."""
    stage = Stage()
    await stage.ask("first")
    await stage.ask("partial", PARTIAL)
    await stage.ask("speculative", SPECULATIVE)
    await stage.ask("final", FINAL)
    assert stage.slots.waiting == 3
    order = await stage.finish(("first", "final", "speculative", "partial"))
    assert order == ["first", "final", "speculative", "partial"]
    assert stage.slots.waiting == 0


@in_loop
async def test_an_utterance_that_ends_while_it_waits_is_final() -> None:
    """It comes before others that pause."""
    stage, has_ended = Stage(), False
    await stage.ask("first")
    await stage.ask("other", SPECULATIVE)
    await stage.ask("ends", lambda: FINAL if has_ended else SPECULATIVE)
    has_ended = True
    assert await stage.finish(("first", "ends", "other")) == ["first", "ends", "other"]


@in_loop
async def test_what_is_cancelled_never_runs() -> None:
    """Neither while it waits, nor at the moment at which its slot comes; the next is served."""
    stage = Stage()
    await stage.ask("first")
    await stage.ask("resumed", SPECULATIVE)
    await stage.ask("stale", PARTIAL)
    await stage.ask("unlucky", SPECULATIVE)
    await stage.ask("last", SPECULATIVE)
    await stage.cancel("resumed")
    await stage.cancel("stale")
    stage.tasks["first"].cancel()
    stage.tasks["unlucky"].cancel()
    assert await stage.finish(("last",)) == ["first", "last"]
    assert stage.slots.partials_given_up == 1


@in_loop
async def test_cancelled_slots_are_given_back() -> None:
    """A holder that is cancelled makes room for the next one."""
    stage = Stage()
    await stage.ask("first")
    await stage.ask("next")
    await stage.cancel("first")
    assert await stage.finish(("next",)) == ["first", "next"]


@in_loop
async def test_one_with_much_to_compute_takes_turns_with_the_others() -> None:
    """Twenty requests of one stream delay another stream by one of them, not by twenty."""
    stage = Stage()
    await stage.ask("greedy 0", source="greedy")
    for n in range(1, 4):
        await stage.ask(f"greedy {n}", source="greedy")
    await stage.ask("polite 0", source="polite")
    await stage.ask("polite 1", source="other")
    for name in ("greedy 0", "polite 0", "polite 1", "greedy 1"):
        await stage.done(name)
    assert stage.began[:5] == ["greedy 0", "polite 0", "polite 1", "greedy 1", "greedy 2"]
    await stage.finish(("greedy 2", "greedy 3"))


@pytest.mark.parametrize(("at_once", "partials"), [(1, 1), (2, 1), (4, 3)])
@in_loop
async def test_partials_leave_a_slot_free(at_once: int, partials: int) -> None:
    """So that a final one begins at once; with a single slot they take it."""
    stage = Stage(at_once=at_once)
    for n in range(5):
        await stage.ask(f"partial {n}", PARTIAL)
    assert len(stage.began) == partials
    await stage.ask("final", FINAL)
    assert ("final" in stage.began) is (at_once > 1)
    assert stage.slots.is_crowded is (at_once < 3)
    await stage.finish(stage.tasks)


@in_loop
async def test_no_more_at_once_than_there_are_slots() -> None:
    """Of final ones as many as there are."""
    stage = Stage(at_once=2)
    for n in range(4):
        await stage.ask(str(n))
    assert stage.began == ["0", "1"]
    assert stage.slots.is_crowded
    await stage.done("1")
    assert stage.began == ["0", "1", "2"]
    await stage.finish(stage.tasks)
    assert not stage.slots.is_crowded


@in_loop
async def test_a_machine_that_does_not_keep_up_is_late() -> None:
    """By the median of the newest waits of what is urgent; it recovers."""
    stage = Stage()
    await stage.ask("first")
    await stage.ask("second")
    await asyncio.sleep(LONG_WAIT_S + 0.1)
    assert not stage.slots.is_late
    await stage.finish(("first", "second"))
    assert stage.slots.usual_wait_s > LONG_WAIT_S / 2
    for n in range(WAITS):
        await stage.ask(f"quick {n}")
        await stage.done(f"quick {n}")
    assert stage.slots.usual_wait_s < 0.1
    assert not stage.slots.is_late
