"""The events of one stream that its client hasn't received yet.

Nobody waits for a client: what may be dropped is dropped, oldest first. An ``end`` is kept until
the client has acknowledged it (a WebSocket's pongs come in the order of its messages), and sent
again if the connection is lost before.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from stream_hbaf.events import Event, Utterance
from stream_hbaf.publish.messages import event_message

MAX_WAITING = 64  # messages that may be dropped; half a minute of lively talk
MAX_ENDS = 256  # that aren't acknowledged: half an hour of it


class Result(NamedTuple):
    """A message for the client."""

    message: str
    end: int = 0  # the number of an ``end``, which counts from 1; 0: it may be dropped


class Results:
    """A bounded queue to one client, which comes and goes."""

    def __init__(self, ends: Sequence[str] = ()) -> None:
        """``ends`` are messages that an earlier service has left."""
        self.dropped = 0
        self.are_unread = False  # the client leaves too many ends without acknowledgement
        self._waiting = deque(Result(message, n) for n, message in enumerate(ends, 1))
        self._sent: deque[Result] = deque()  # ends that aren't acknowledged
        self._ends = len(ends)
        self._has_client = False
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def is_delivered(self) -> bool:
        """Whether the client has all of it, and nothing will come."""
        return self._closed and not self._waiting and not self._sent

    @property
    def unacknowledged(self) -> tuple[str, ...]:
        """The messages of all ``end``s that the client may not have."""
        return tuple(one.message for one in (*self._sent, *self._waiting) if one.end)

    def put(self, event: Event) -> None:
        """Queue an event; without a client only an ``end``."""
        if isinstance(event, Utterance) and event.type == "end":
            if self._kept >= MAX_ENDS:
                self._drop_oldest_end()
            self._ends += 1
            self._waiting.append(Result(event_message(event), self._ends))
            self.are_unread = self._has_client and self._kept >= MAX_ENDS
        elif self._has_client:
            droppable = [one for one in self._waiting if not one.end]
            if len(droppable) >= MAX_WAITING:
                self._waiting.remove(droppable[0])
                self.dropped += 1
            self._waiting.append(Result(event_message(event)))
        self._changed.set()

    def begin(self) -> None:
        """A client has connected: it gets first what it may have missed."""
        ends = [one for one in self._waiting if one.end]
        self._waiting, self._sent = deque([*self._sent, *ends]), deque()
        self._has_client, self.are_unread = True, False

    def pause(self) -> None:
        """The client has left; it may come back."""
        self._waiting = deque(one for one in self._waiting if one.end)
        self._has_client = False

    def close(self) -> None:
        """Nothing follows."""
        self._closed = True
        self._changed.set()

    async def next(self) -> Result | None:
        """The next message; None once nothing follows."""
        while not self._waiting:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        result = self._waiting.popleft()
        if result.end:
            self._sent.append(result)
        return result

    def acknowledge(self, end: int | None = None) -> None:
        """The client has received an ``end`` and all before it; without a number, all."""
        self._sent = deque(one for one in self._sent if end is not None and one.end > end)

    @property
    def _kept(self) -> int:
        """The number of ends that aren't acknowledged."""
        return len(self._sent) + sum(1 for one in self._waiting if one.end)

    def _drop_oldest_end(self) -> None:
        if self._sent:
            self._sent.popleft()
        else:
            self._waiting.remove(next(one for one in self._waiting if one.end))
        self.dropped += 1
