"""Results that wait for a client, and the pace at which its sound is read: without a service."""

import asyncio
import time

import pytest
from dialogue_samples import utterance
from hypothesis import given
from hypothesis import strategies as st

from stream_hbaf.audio import pace
from stream_hbaf.audio.pace import FASTEST, LAG_S, LEAD_S, Pace
from stream_hbaf.audio.push_source import AudioFormat, PushSource
from stream_hbaf.events import Speech
from stream_hbaf.serve import results
from stream_hbaf.serve.results import MAX_ENDS, MAX_WAITING, Results


async def taken(queue: Results, count: int) -> list[str]:
    found = [await asyncio.wait_for(queue.next(), 5) for _ in range(count)]
    return [one.message for one in found if one is not None]


def test_an_end_is_sent_again_until_it_is_acknowledged() -> None:
    async def scene() -> None:
        queue = Results()
        queue.begin()
        for turn in (1, 2, 3):
            queue.put(utterance(turn))
        first = await taken(queue, 2)
        queue.acknowledge(1)
        queue.pause()
        queue.put(Speech(source="ann", on=True))  # nobody is there
        queue.put(utterance(4))
        queue.begin()
        again = await taken(queue, 3)
        assert again[0] == first[1]
        assert ['"turn":3' in again[1], '"turn":4' in again[2]] == [True, True]
        queue.close()
        assert await queue.next() is None
        assert not queue.is_delivered
        queue.acknowledge()
        assert queue.is_delivered

    asyncio.run(scene())


@given(st.lists(st.booleans(), max_size=600), st.integers(0, 5))
def test_a_client_that_reads_nothing_takes_bounded_memory(kinds: list[bool], read: int) -> None:
    """Of what may be dropped the newest is kept, and of ends, however many there are."""

    async def scene() -> None:
        queue = Results()
        queue.begin()
        for number, is_end in enumerate(kinds):
            queue.put(utterance(number) if is_end else Speech(source="ann", on=number % 2 > 0))
            if number < read:
                await queue.next()
        ends = sum(kinds)
        assert queue.are_unread == (ends >= MAX_ENDS)
        queue.close()
        queue.pause()
        queue.begin()
        left = 0
        while (await queue.next()) is not None:
            left += 1
        assert left == min(ends, MAX_ENDS)
        assert queue.dropped >= len(kinds) - read - MAX_WAITING - MAX_ENDS

    asyncio.run(scene())


def test_ends_beyond_the_bound_are_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MAX_ENDS", 2)

    async def scene() -> None:
        queue = Results()
        for turn in (1, 2, 3):
            queue.put(utterance(turn))
        queue.begin()
        assert ['"turn":2' in one for one in await taken(queue, 2)] == [True, False]

    asyncio.run(scene())


class Clock:
    """A clock that stands still but for sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def reported(
    monkeypatch: pytest.MonkeyPatch, messages: int, *, sound_s: float, every_s: float
) -> tuple[float, list[str]]:
    """How long a sender had to wait, and what was said of its sound."""
    lines: list[str] = []

    async def scene() -> None:
        source = PushSource("ann", chunk_ms=64, on_status=lambda *_: None)
        monkeypatch.setattr(source, "report", lambda state, line: lines.append(line))
        with source.sender("somebody") as sender:
            sender.begin(AudioFormat(16_000, 1, "s16le"))
            lines.clear()
            kept = Pace()
            for _ in range(messages):
                clock.now += every_s
                await kept.keep(sound_s, sender=sender)

    with asyncio.Runner() as runner:  # whose loop has taken the real clock already
        runner.get_loop()
        clock = Clock(monkeypatch)
        runner.run(scene())
        monkeypatch.undo()
    return clock.slept, lines


def test_sound_in_real_time_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reported(monkeypatch, 2000, sound_s=0.1, every_s=0.1) == (0.0, [])


def test_sound_at_once_is_read_a_little_faster_than_real_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept, lines = reported(monkeypatch, 600, sound_s=0.1, every_s=0.0)
    assert slept == pytest.approx((60 - LEAD_S) / FASTEST)
    assert lines == [f"ann: somebody: {pace.FASTER}; it is read at 1.25 times that"]


def test_sound_after_a_stall_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network held back for some seconds is read at once, up to the lead."""
    slept, lines = reported(monkeypatch, 1, sound_s=LEAD_S, every_s=10.0)
    assert (slept, lines) == (0.0, [])


def test_sound_that_is_too_slow_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a sender whose rate is another than it says."""
    slept, lines = reported(monkeypatch, 600, sound_s=0.03, every_s=0.1)
    assert slept == 0.0
    assert lines == [f"ann: somebody: {pace.SLOWER}, {LAG_S:.0f} s behind by now"]


def test_pauses_are_not_slow_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reported(monkeypatch, 20, sound_s=0.1, every_s=5.0) == (0.0, [])
