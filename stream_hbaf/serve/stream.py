"""One stream: a client's sound as a source, and its results, over any number of connections."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from stream_hbaf.audio.pace import Pace
from stream_hbaf.audio.push_source import PushSource
from stream_hbaf.audio.websocket import RULE_BROKEN, TRY_LATER, take_sound
from stream_hbaf.config import SourceConfig
from stream_hbaf.events import AnyEvent, Connected
from stream_hbaf.publish.messages import event_message
from stream_hbaf.serve.results import Results

LOG = logging.getLogger(__name__)

UNREAD_S = 20.0  # that a message may wait for its client to read
REPLACED = 4000  # WebSocket close code: another connection with this id took its place
DONE, GOING_AWAY = 1000, 1001  # WebSocket close codes
# Close codes after which a client isn't waited for: it has said goodbye, or broken a rule.
FINAL = {DONE, 1002, 1003, 1007, RULE_BROKEN, 1009}


class Stream:
    """One client's stream, from its first connection until nobody waits for it any more."""

    def __init__(
        self,
        stream_id: str,
        config: SourceConfig,
        source: PushSource,
        *,
        resume_s: int,
        on_over: Callable[["Stream"], None],
        ends: Sequence[str] | None = None,
    ) -> None:
        """``on_over`` is called once: the stream's sound is recognised, and nobody waits for it.

        ``ends`` are those that an earlier service has left; None: the stream is new.
        """
        self.id = stream_id
        self.config = config
        self.waits_until: float | None = None  # in the loop's time: for its client to come back
        self.may_return = True  # the client, to this service or the next one
        self._source = source
        self._resume_s = resume_s
        self._on_over = on_over
        self._results = Results(ends or ())
        self._connection: ServerConnection | None = None  # the newest
        self._turn = asyncio.Lock()  # of the connection that is served
        self._expiry: asyncio.TimerHandle | None = None
        self._said_end = False
        self._recognised = False
        self._unwanted = False  # nobody waits for what is still to come
        self._connections = 0 if ends is None else 1

    def put(self, event: AnyEvent) -> None:
        """Queue an event for the client; never waits."""
        if not self._recognised:  # else it is of another stream, whose source got the name
            self._results.put(event)

    @property
    def unacknowledged(self) -> tuple[str, ...]:
        """The messages of all ``end``s that the client may not have."""
        return self._results.unacknowledged

    def finish(self) -> None:
        """The sound is recognised to its end: no event follows."""
        self._recognised = True
        self._source.close()
        self._results.close()
        if self._unwanted:
            self._on_over(self)

    async def serve(self, connection: ServerConnection) -> None:
        """Take sound and send events until the connection ends. It replaces an earlier one."""
        former, self._connection = self._connection, connection
        if former is not None:
            await former.close(REPLACED, "another connection with this id took its place")
        async with self._turn:
            if self._connection is connection:
                await self._converse(connection)
            if self._connection is connection:  # no other one has come
                self._connection = None
                self._leave(connection)
            else:
                await connection.close(REPLACED)

    async def _converse(self, connection: ServerConnection) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self.waits_until = None
        self._connections += 1
        self._results.begin()
        sending = asyncio.create_task(self._send(connection), name=f"results {self.config.name}")
        try:
            if await take_sound(connection, self._source, pace=Pace()):
                self._said_end = True
                self._source.close()
            if self._source.is_closed:
                await sending  # the last events, behind which it closes the connection
        finally:
            sending.cancel()
            self._results.pause()

    async def _send(self, connection: ServerConnection) -> None:
        about = Connected(
            id=self.id,
            source=self.config.name,
            resumed=self._connections > 1,
            resume_s=self._resume_s,
        )
        with contextlib.suppress(ConnectionClosed):
            try:
                await connection.send(event_message(about))
                while (result := await self._results.next()) is not None:
                    async with asyncio.timeout(UNREAD_S):
                        await connection.send(result.message)
                    if result.end:
                        await self._acknowledge(result.end, connection)
            except TimeoutError:
                line = "the results are not read"
                LOG.warning("%s: %s; its client is disconnected", self.config.name, line)
                await connection.close(TRY_LATER, line)
                return
            ending = (DONE, "") if self._said_end else (GOING_AWAY, "the service stops")
            await connection.close(*ending)
            if connection.protocol.close_rcvd is not None:
                self._results.acknowledge()

    async def _acknowledge(self, end: int, connection: ServerConnection) -> None:
        """Have a pong acknowledge an ``end``. Raises TimeoutError if too many have none."""
        if self._results.are_unread:
            raise TimeoutError
        pong = asyncio.ensure_future(await connection.ping())
        pong.add_done_callback(partial(self._note_pong, end))

    def _note_pong(self, end: int, pong: "asyncio.Future[float]") -> None:
        if not pong.cancelled() and pong.exception() is None:
            self._results.acknowledge(end)

    def _leave(self, connection: ServerConnection) -> None:
        """The client has left; wait for it to come back, unless it said that it won't."""
        closed = (connection.protocol.close_rcvd, connection.protocol.close_sent)
        said_goodbye = any(close is not None and close.code in FINAL for close in closed)
        self.may_return = not (self._said_end or said_goodbye)
        if self._results.is_delivered or said_goodbye:
            self._end()
            return
        loop = asyncio.get_running_loop()
        self.waits_until = loop.time() + self._resume_s
        self._expiry = loop.call_at(self.waits_until, self._expire)

    def _expire(self) -> None:
        self.may_return = False
        self._end()

    def _end(self) -> None:
        self._unwanted = True
        self._source.close()
        if self._recognised:
            self._on_over(self)
