"""Where emotions go: over MQTT, with nothing finished lost while the broker is away."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import StreamHbafError
from stream_hbaf.events import AnyEvent, Info, Speech, Utterance
from stream_hbaf.publish.connection import (
    Client,
    MqttError,
    OnStatus,
    allowed,
    backoff,
    close_client,
    node_name,
    open_client,
    publish,
    read_address,
    received,
)
from stream_hbaf.publish.homeassistant import birth_topic, discovery
from stream_hbaf.publish.messages import Message, available, erasure, messages
from stream_hbaf.publish.outbox import Outbox
from stream_hbaf.publish.requests import Control, Requests

__all__ = ["Control", "Message", "MqttPublisher", "messages", "node_name", "read_address"]

IN_FLIGHT = 16  # messages sent before the first is acknowledged; mosquitto takes 20
DROPPABLE = 16  # partial results held; older ones are dropped and counted
FAREWELL_S = 0.5  # kept of the time to close for saying `stopped`
CLOSING_DELAY_S = 0.25  # between attempts to reach the broker once the program ends


class MqttPublisher:
    """Publishes events in order; finished ones at least once, whatever the connection does.

    What is finished is on disk when ``send`` returns, and is published by the next run if this
    one is killed. Receivers tell a repeated utterance message by its ``id`` and ``rev``. What is
    published as state (retained) is published again whenever the broker or Home Assistant comes
    back.
    """

    def __init__(
        self,
        config: MqttConfig,
        *,
        info: Info,
        on_status: OnStatus | None = None,
        control: Control | None = None,
    ) -> None:
        """``on_status`` hears when the broker is lost, when it is back, and what else there is
        to say; ``control`` does what is asked for over MQTT, without it nobody listens."""
        self.dropped = 0  # partial results that were never sent
        self.address = read_address(config)
        self._config = config
        self._names = {"prefix": config.prefix, "node": node_name(config)}
        self._info = info
        self._on_status = on_status or (lambda _connected, _line: None)
        self._client: Client | None = None
        self._delivery: asyncio.Task[None] | None = None
        self._outbox = Outbox(config, say=self._say)
        self._droppable: deque[Message] = deque()
        self._state: dict[str, Message] = {}  # by topic: retained messages, as they should be
        self._speech: dict[str, Message] = {}  # by topic: the latest ON or OFF
        self._labels: dict[str, str] = {}  # by source: the last emotion
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._closing = asyncio.Event()
        self._restore_due = False
        self._requests = Requests(
            control, **self._names, sources=info.sources, send=self._queue_answer, say=self._say
        )

    @property
    def waiting(self) -> int:
        """Messages that the broker has not acknowledged yet."""
        return len(self._outbox)

    @property
    def let_go(self) -> int:
        """Utterance messages that were too many or too old to be kept for a broker."""
        return self._outbox.let_go

    async def connect(self) -> None:
        """The first connection. Raises BrokerError, in one line, if there is none to be had."""
        will = available("offline", **self._names)
        client = await open_client(self._config, will=will)
        await self._outbox.open()
        self._client = client

    async def run(self) -> None:
        """Deliver what is sent, until ``close``. A task of its own."""
        if self._delivery is None:  # else `close` was quicker
            self._delivery = asyncio.create_task(self._deliver(), name="mqtt-delivery")
        try:
            await self._delivery
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closing.is_set() or (task and task.cancelling()):
                raise

    async def send(self, event: AnyEvent) -> None:
        """Take an event; what is finished is on disk then.

        Waits while the outbox is full and the broker there, unless the event may be dropped.
        """
        source = event.source if isinstance(event, Utterance) else ""
        found = messages(event, **self._names, last_label=self._labels.get(source, ""))
        if isinstance(event, Utterance) and event.type == "end" and event.emotion:
            self._labels[source] = event.emotion.label
        if isinstance(event, Speech):
            self._speech |= {message.topic: message for message in found}
        if isinstance(event, Info):
            self._info, self._restore_due = event, True
            self._wake.set()
        elif any(not message.droppable for message in found):
            await self._queue(found)
        else:
            self._offer(found)

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue: what waits of it, here and on disk, and what the broker keeps.

        Returns how many messages that were.
        """
        passing = [m for m in self._droppable if m.dialogue_id == dialogue_id]
        for message in passing:
            self._droppable.remove(message)
        waiting = await self._outbox.forget(dialogue_id)
        kept = [m for m in self._state.values() if m.dialogue_id == dialogue_id]
        self._labels.clear()  # a label that comes again is news to who has just forgotten it
        await self._queue([erasure(message) for message in kept])
        return len(passing) + waiting + len(kept)

    async def close(self, timeout_s: float) -> int:
        """Deliver what is queued, say ``stopped``, leave; within ``timeout_s``.

        Returns how many messages could not be delivered and wait for the next start;
        ``on_status`` hears it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._closing.set()
        self._wake.set()
        self._space.set()
        if self._delivery is None or self._delivery.done():
            self._delivery = asyncio.create_task(self._deliver(), name="mqtt-delivery")
        await asyncio.wait({self._delivery}, timeout=timeout_s - min(FAREWELL_S, timeout_s / 4))
        self._delivery.cancel()
        await asyncio.wait({self._delivery})
        kept = await self._outbox.close()
        with contextlib.suppress(TimeoutError, MqttError):
            async with asyncio.timeout_at(deadline):
                await self._say_stopped()
        if not self._delivery.cancelled():
            self._delivery.result()  # a programming error must not pass silently
        return kept

    def _offer(self, found: Sequence[Message]) -> None:
        for message in found:
            if len(self._droppable) == DROPPABLE:
                self._droppable.popleft()
                self.dropped += 1
            self._droppable.append(message)
        self._wake.set()

    async def _queue(self, found: Sequence[Message]) -> None:
        """In order. Of state only the last matters while the broker is away."""
        try:
            while self._client and self._outbox.full and not self._closing.is_set():
                self._space.clear()
                await self._space.wait()
        finally:  # who is interrupted while waiting still leaves what is finished
            if self._client is None:
                self._state |= {message.topic: message for message in found if message.retain}
                found = [message for message in found if not message.retain]
            self._wake.set()  # delivery need not wait for the disk
            await self._outbox.put(found, broker_away=self._client is None)

    async def _queue_answer(self, answer: Message) -> None:
        await self._queue([answer])

    async def _deliver(self) -> None:
        """Over as many connections as it takes; ends once closing and nothing is left to do."""
        async with asyncio.TaskGroup() as group:
            answering = group.create_task(self._requests.run(), name="mqtt-requests")
            while self._client or await self._reconnect():
                assert self._client
                try:
                    await self._converse(self._client)
                except* MqttError:  # its text speaks of the client's inside
                    lost, self._client = self._client, None
                    self._state |= {m.topic: m for m in self._outbox.take_retained()}
                    self._space.set()
                    self._on_status(False, f"{self.address}: connection lost; trying again")
                    await close_client(lost)
                else:
                    break
            answering.cancel()

    async def _reconnect(self) -> bool:
        """True once connected; False if the program ends and nobody needs the connection."""
        reported = ""
        for delay_s in backoff():
            await self._pause(delay_s)
            try:
                await self.connect()
            except StreamHbafError as error:
                if self._closing.is_set() and not len(self._outbox):
                    return False
                if str(error) != reported:
                    self._on_status(False, reported := str(error))
            else:
                self._on_status(True, f"{self.address}: connected again")
                return True
        raise AssertionError("backoff has no end")

    async def _pause(self, delay_s: float) -> None:
        """Cut short when the program ends: what is left must go now or never."""
        if self._closing.is_set():
            await asyncio.sleep(CLOSING_DELAY_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._closing.wait()

    async def _converse(self, client: Client) -> None:
        """Over one connection. Returns when closing and all is delivered; raises when it breaks."""
        self._droppable = deque(m for m in self._droppable if m.topic not in self._speech)
        self._restore_due = True
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(self._listen(client), name="mqtt-connection")
            await self._drain(client)
            listening.cancel()

    async def _listen(self, client: Client) -> None:
        """Take what others send; raises once the connection breaks (publishing doesn't notice)."""
        birth = birth_topic(self._config)
        if not await allowed(client, [*self._requests.topics, *([birth] if birth else [])]):
            self._say(
                f"{self.address}: may not subscribe: requests are not heard; "
                "check the broker's access rules"
            )
        async for message in received(client):
            if message.topic != birth:
                self._requests.take(message)
            elif message.payload == b"online" and not message.retained:  # else it was there
                self._restore_due = True
                self._wake.set()

    async def _restore(self, client: Client) -> None:
        """What a broker that has just started, or a last will, made everybody forget."""
        self._restore_due = False
        known = [available("online", **self._names), *messages(self._info, **self._names)]
        if self._config.homeassistant:
            known.append(discovery(self._info, self._config))
        for message in [*known, *self._state.values(), *self._speech.values()]:
            await self._publish(client, message)
            if not message.payload:  # it is forgotten
                self._state.pop(message.topic, None)

    async def _drain(self, client: Client) -> None:
        while True:
            if self._restore_due:
                await self._restore(client)
            elif len(self._outbox):
                await self._publish_finished(client)
            elif self._droppable:
                message = self._droppable.popleft()
                try:
                    await self._publish(client, message)
                except MqttError:
                    self.dropped += 1
                    raise
            elif self._closing.is_set():
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _publish_finished(self, client: Client) -> None:
        """Several at once, so that a distant broker takes a backlog at more than one a round trip.

        They leave in order. Only those acknowledged with all before them leave the outbox: after
        a broken connection the others are sent again, in order.
        """
        waiting = self._outbox.first(IN_FLIGHT)
        sent: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for each in waiting:
                    sent.append(group.create_task(self._publish(client, each.message)))
        finally:
            arrived = []
            for each, task in zip(waiting, sent, strict=False):
                if not task.done() or task.cancelled() or task.exception():
                    break
                arrived.append(each)
                if each.message.retain:
                    self._remember(each.message, forgotten=each not in self._outbox)
            await self._outbox.remove(arrived)
            self._space.set()

    def _remember(self, message: Message, *, forgotten: bool) -> None:
        """``forgotten`` while it was on its way: the broker has to forget it as well."""
        if forgotten:
            self._state[message.topic] = erasure(message)
            self._restore_due = True
        elif message.payload:
            self._state[message.topic] = message
        else:
            self._state.pop(message.topic, None)

    async def _publish(self, client: Client, message: Message) -> None:
        await publish(client, message, version=self._config.version)

    async def _say_stopped(self) -> None:
        client, self._client = self._client, None
        if client:
            await self._publish(client, available("stopped", **self._names))
            await close_client(client)

    def _say(self, line: str) -> None:
        self._on_status(self._client is not None, line)
