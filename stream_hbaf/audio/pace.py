"""Reads a sender's sound no faster than real time, and no faster than it is recognised.

What isn't read waits in the connection, whose sender has to wait then (backpressure): a recording
that is sent at once is recognised in real time, and none of it is lost. No sender takes the others'
turn.
"""

import asyncio
import time
from typing import TYPE_CHECKING

from stream_hbaf.audio.source import SETTLED_S

if TYPE_CHECKING:
    from stream_hbaf.audio.push_source import Sender

LEAD_S = 2.0  # sound that may come at once, as after a stall of the network; below QUEUE_S
FASTEST = 1.25  # times real time, beyond the lead: so that a live sender catches up after a stall
SHORTEST_S = 0.005  # of sound that a message counts for: at most 250 messages a second
LAG_S = 5.0  # sound that comes this much too slowly is reported
STEADY_S = 1.0  # between two messages, at most; else the sender has paused
FASTER = "sound comes faster than real time (is its rate right?)"
SLOWER = "sound comes slower than real time (is its rate right, is the network too slow?)"


class Pace:
    """The pace of one connection; a departure from real time is reported in a line."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._due = now  # when all that was read would have been captured
        self._latest = now  # message
        self._behind_s = 0.0  # that the sound is slower than real time, since the last pause
        self._reported_at: float | None = None

    async def keep(self, sound_s: float, *, sender: "Sender") -> None:
        """Wait as long as the next message has to; ``sound_s`` is the length of the newest one."""
        now = time.monotonic()
        since_s, self._latest = now - self._latest, now
        self._due = max(self._due, now) + max(sound_s, SHORTEST_S) / FASTEST
        self._behind_s = max(0.0, self._behind_s + since_s - sound_s) if since_s < STEADY_S else 0.0
        wait_s = self._due - now - LEAD_S / FASTEST
        if wait_s > 0:
            self._report(f"{FASTER}; it is read at {FASTEST:g} times that", sender)
            await asyncio.sleep(wait_s)
        await sender.room()
        self._latest = time.monotonic()
        if self._latest - now - max(0.0, wait_s) > STEADY_S:
            self._report("sound waits: it comes faster than it is recognised", sender)
        elif self._behind_s > LAG_S:
            self._report(f"{SLOWER}, {self._behind_s:.0f} s behind by now", sender)
        elif self._reported_at is not None and now - self._reported_at > SETTLED_S:
            self._reported_at = None
            sender.report("online", "sound comes in real time again")

    def _report(self, line: str, sender: "Sender") -> None:
        if self._reported_at is None:
            sender.report("degraded", line)
        self._reported_at = time.monotonic()
