"""Decides which heavy computation is next, where many streams wait for a few cores.

Transcripts and embeddings of sound are heavy: each keeps a core busy for a tenth of a second. What
finished utterances need comes before what those need that pause, and this before utterances that go
on. Among equals the one that has waited longest is next; a stream waits from when it was last
served, so that one with much to compute takes turns with the others. What is cancelled while it
waits never runs.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

WAITS = 20  # newest urgent requests whose wait says whether this machine keeps up
LONG_WAIT_S = 0.5  # median wait above which it doesn't: longer than the endpoint hides


class Urgency(IntEnum):
    """Who waits for the result; the least is the most urgent."""

    FINAL = 0  # the ``end`` of an utterance that is over
    SPECULATIVE = 1  # nobody yet: the utterance may be over
    PARTIAL = 2  # a running transcript


@dataclass(eq=False, slots=True)
class _Request:
    source: str
    urgency: Callable[[], Urgency]  # now: an utterance may end while it waits
    asked_at: float
    granted: "asyncio.Future[None]"
    taken: Urgency | None = None  # its urgency when it got its slot


class PrioritySlots:
    """A semaphore of ``at_once`` slots, whose next holder is the most urgent one.

    Partial transcripts leave one slot free for what is more urgent, if there are several.
    Everything is called from one event loop, except ``is_crowded``, which any thread may read.
    """

    def __init__(self, *, at_once: int) -> None:
        self.partials_given_up = 0  # due, but late or abandoned
        self.speculations_missed = 0  # utterances that ended before their pause got its slot
        self._at_once = at_once
        self._for_partials = max(1, at_once - 1)
        self._waiting: list[_Request] = []
        self._running = [0 for _ in Urgency]
        self._served_at: dict[str, float] = {}  # by source, while any request waits
        self._waits: deque[float] = deque(maxlen=WAITS)

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._waiting)

    @property
    def usual_wait_s(self) -> float:
        """The median wait of the newest requests for finished utterances and pauses."""
        return float(np.median(self._waits)) if self._waits else 0.0

    @property
    def is_late(self) -> bool:
        """Whether this machine doesn't keep up with the streams."""
        return self.usual_wait_s > LONG_WAIT_S

    @property
    def is_crowded(self) -> bool:
        """Whether partial transcripts should make room: something urgent waits, or takes it."""
        urgent = sum(self._running) - self._running[Urgency.PARTIAL]
        waits = any(request.urgency() < Urgency.PARTIAL for request in self._waiting)
        return waits or urgent >= self._for_partials

    @asynccontextmanager
    async def hold(self, source: str, urgency: Callable[[], Urgency]) -> AsyncIterator[Urgency]:
        """Wait for a slot, and hold it inside the ``with``; cancelling gives the place up.

        ``urgency`` is asked again whenever a slot becomes free; yields what it was then.
        """
        loop = asyncio.get_running_loop()
        request = _Request(source, urgency, loop.time(), loop.create_future())
        self._waiting.append(request)
        self._serve()
        try:
            await request.granted
            assert request.taken is not None
            if request.taken is not Urgency.PARTIAL:
                self._waits.append(loop.time() - request.asked_at)
            yield request.taken
        finally:
            self._leave(request, at=loop.time())

    def _serve(self) -> None:
        """Give slots while there are some for those who wait."""
        while self._waiting and sum(self._running) < self._at_once:
            request = min(self._waiting, key=self._place)
            urgency = request.urgency()
            if urgency is Urgency.PARTIAL and sum(self._running) >= self._for_partials:
                return
            self._waiting.remove(request)
            if not request.granted.done():  # else it was cancelled a moment ago
                request.taken = urgency
                self._running[urgency] += 1
                request.granted.set_result(None)

    def _place(self, request: _Request) -> tuple[Urgency, float]:
        since = max(request.asked_at, self._served_at.get(request.source, 0.0))
        return request.urgency(), since

    def _leave(self, request: _Request, *, at: float) -> None:
        if request.taken is not None:
            self._running[request.taken] -= 1
            self._served_at[request.source] = at
        elif request in self._waiting:
            self._waiting.remove(request)
            self.partials_given_up += request.urgency() is Urgency.PARTIAL
        if not self._waiting:
            self._served_at.clear()
        self._serve()
