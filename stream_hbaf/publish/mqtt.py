"""The MQTT publisher: delivers events in order, through any number of broken connections."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, StreamHbafError
from stream_hbaf.events import AnyEvent, Info, Speech, Utterance
from stream_hbaf.files import is_locked
from stream_hbaf.publish.address import node_name, read_address
from stream_hbaf.publish.broker import broker_lock
from stream_hbaf.publish.connection import (
    STEADY_S,
    Client,
    MqttError,
    OnConnectionStatus,
    backoff,
    close_client,
    open_client,
    receive,
    subscribe_to,
)
from stream_hbaf.publish.messages import Message, available, erasure, messages
from stream_hbaf.publish.outbox import Outbox
from stream_hbaf.publish.outbox_rows import Queued
from stream_hbaf.publish.refusals import IN_FLIGHT, Refusals
from stream_hbaf.publish.requests import Control, Requests
from stream_hbaf.publish.retained import RetainedState

DROPPABLE = 16  # droppable messages that may wait; the oldest are dropped and counted
FAREWELL_S = 0.5  # part of the time to close that is reserved for ``stopped``
AGAIN_S = 60.0  # until a message is sent again whose refusal may pass by itself
CLOSING_DELAY_S = 0.25  # between attempts to reach the broker when the program ends


class MqttPublisher:
    """Publishes events in order: durable messages at least once, others at most once.

    Durable messages (utterances) are on disk when ``send`` returns; if this run is killed, the
    next one publishes them. Receivers recognise a repeated utterance message by ``id`` and
    ``rev``. Retained messages are published again when the broker or Home Assistant comes back.
    """

    def __init__(
        self,
        config: MqttConfig,
        *,
        info: Info,
        on_status: OnConnectionStatus | None = None,
        control: Control | None = None,
        traceparent: Callable[[Utterance], str] | None = None,
    ) -> None:
        """``on_status`` is called when the connection is lost or restored, and for warnings.
        ``control`` carries out requests; without it requests are not subscribed to.
        ``traceparent`` gives the W3C trace context of an ``end``, where utterances are traced."""
        self.address = read_address(config)
        self._config = config
        self._names = {"prefix": config.prefix, "node": node_name(config)}
        self._on_status = on_status or (lambda _connected, _line: None)
        self._traceparent = traceparent or (lambda _end: "")
        self._client: Client | None = None
        self._delivery: asyncio.Task[None] | None = None
        self._outbox = Outbox(config, on_report=self._report)
        self._droppable: deque[Message] = deque(maxlen=DROPPABLE)
        self._dropped = 0
        self._state = RetainedState(config, info, self._outbox)
        self._newest: dict[str, Utterance] = {}  # by source: the one whose label is published
        self._wake = asyncio.Event()  # something is to be sent
        self._room = asyncio.Event()  # the outbox has become shorter, or the connection is lost
        self._closing = asyncio.Event()
        self._republish_due = False
        self._refusals = Refusals(str(self.address), version=config.version, on_report=self._report)
        self._delays = backoff()
        self._connected_at = 0.0  # in the loop's time
        self._again: asyncio.TimerHandle | None = None
        self._requests = Requests(
            control,
            **self._names,
            sources=info.sources,
            send=lambda response: self._enqueue([response]),
            on_report=self._report,
        )

    @property
    def outbox_depth(self) -> int:
        """The number of messages that the broker has not acknowledged yet."""
        return self._outbox.depth

    @property
    def dropped(self) -> dict[str, int]:
        """The number of messages dropped since the start, by kind, as ``health`` reports it."""
        return {"partials": self._dropped, "utterances": self._outbox.dropped}

    async def connect(self) -> None:
        """Connect, and read the outbox. Raises BrokerError or ConfigError if that fails.

        With the URL ``embedded`` the broker is that of another stream-hbaf, and only that one:
        after its end another program may listen at the port.
        """
        port = self._config.port
        if self._config.url == "embedded" and not is_locked(broker_lock(port)):
            raise BrokerError(f"{self.address}: the embedded broker that was shared has ended")
        client = await open_client(self._config, will=available("offline", **self._names))
        await self._outbox.open()
        self._client, self._connected_at = client, asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Deliver messages until ``close``; to be run as a task."""
        if self._delivery is None:  # else ``close`` came first
            self._delivery = asyncio.create_task(self._deliver(), name="mqtt-delivery")
        try:
            await self._delivery
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closing.is_set() or (task and task.cancelling()):
                raise

    async def send(self, event: AnyEvent) -> None:
        """Queue an event for publication; its durable messages are on disk when this returns.

        Waits while the outbox is full and the broker connected, unless the event is droppable.
        """
        end = event if isinstance(event, Utterance) and event.type == "end" else None
        found = messages(
            event,
            **self._names,
            last_label=self._last_label(event),
            traceparent=self._traceparent(end) if end else "",
        )
        if isinstance(event, Speech):
            self._state.hold_speech(found)
        if isinstance(event, Info):
            erasures = self._state.describe(event)
            self._requests.sources = event.sources
            self._newest = {s: end for s, end in self._newest.items() if s in event.sources}
            self._republish_due = True
            self._wake.set()
            if erasures:
                await self._enqueue(erasures)
        elif any(not message.droppable for message in found):
            await self._enqueue(found)
        else:
            for message in found:
                self._dropped += len(self._droppable) == DROPPABLE
                self._droppable.append(message)
            self._wake.set()

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue's messages from memory, disk and broker; returns how many they were.

        Raises ConfigError if the disk refuses; then it can be tried again.
        """
        droppable = [m for m in self._droppable if m.dialogue_id == dialogue_id]
        for message in droppable:
            self._droppable.remove(message)
        retained = self._state.of_dialogue(dialogue_id)
        self._newest.clear()  # the next label is published even if it is the erased one
        await self._enqueue([erasure(message) for message in retained])
        waiting = await self._outbox.forget(dialogue_id)
        return len(droppable) + waiting + len(retained)

    async def close(self, timeout_s: float) -> int:
        """Deliver what is queued, publish ``stopped`` and disconnect, all within ``timeout_s``.

        Returns the number of messages that stay on disk for the next start; ``on_status`` is
        called with it as well.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._closing.set()
        self._wake.set()
        self._room.set()
        if self._again:
            self._again.cancel()
        if self._delivery is None or self._delivery.done():
            self._delivery = asyncio.create_task(self._deliver(), name="mqtt-delivery")
        await asyncio.wait({self._delivery}, timeout=timeout_s - min(FAREWELL_S, timeout_s / 4))
        self._delivery.cancel()
        await asyncio.wait({self._delivery})
        kept = await self._outbox.close()
        with contextlib.suppress(TimeoutError, MqttError):
            async with asyncio.timeout_at(deadline):
                await self._publish_stopped()
        if not self._delivery.cancelled():
            self._delivery.result()  # raises if delivery ended with a programming error
        return kept

    def _last_label(self, event: AnyEvent) -> str:
        """The label that the source's ``emotion`` topic holds, or should hold: a revision of an
        earlier utterance doesn't change it."""
        if not isinstance(event, Utterance) or event.type != "end" or event.emotion is None:
            return ""
        newest = self._newest.get(event.source)
        if event.revision is not None and (newest is None or newest.id != event.id):
            return event.emotion.label
        self._newest[event.source] = event
        return newest.emotion.label if newest is not None and newest.emotion is not None else ""

    async def _enqueue(self, found: Sequence[Message]) -> None:
        """Put messages in the outbox, in order. While the broker is away, of retained messages only
        the latest of each topic is kept, in ``_state``."""
        try:
            while self._client and self._outbox.full and not self._closing.is_set():
                self._room.clear()
                await self._room.wait()
        finally:  # a cancelled call stores its messages as well
            if self._client is None:
                self._state.hold(found)
                found = [message for message in found if not message.retain]
            self._wake.set()  # delivery need not wait for the disk
            await self._outbox.put(found, broker_away=self._client is None)

    async def _deliver(self) -> None:
        """Deliver over as many connections as it takes, until closing and nothing is left."""
        async with asyncio.TaskGroup() as group:
            answering = group.create_task(self._requests.run(), name="mqtt-requests")
            while self._client or await self._reconnect():
                assert self._client
                try:
                    await self._use_connection(self._client)
                except* MqttError:  # whose text is about aiomqtt's internals
                    lost, self._client = self._client, None
                    self._connection_lost(lost)
                    await close_client(lost)
                else:
                    break
            answering.cancel()

    def _connection_lost(self, lost: Client) -> None:
        self._state.hold(self._outbox.pop_retained())
        self._room.set()
        why = f" ({lost.ending})" if lost.ending else ""
        self._on_status(False, f"{self.address}: connection lost{why}; trying again")
        lasted_s = asyncio.get_running_loop().time() - self._connected_at
        if self._refusals.connection_lost(lost) or lasted_s > STEADY_S:
            self._delays = backoff()  # else it goes on: the broker may hang up at once for ever

    async def _reconnect(self) -> bool:
        """Try until the connection is there: True; or closing with nothing to send: False."""
        reported = ""
        for delay_s in self._delays:
            await self._wait_or_closing(delay_s)
            try:
                await self.connect()
            except StreamHbafError as error:
                self._refusals.broker_was_away()
                self._outbox.take_back()
                if self._closing.is_set() and not len(self._outbox):
                    return False
                if str(error) != reported:
                    self._on_status(False, reported := str(error))
            else:
                self._on_status(True, f"{self.address}: connected again")
                return True
        raise AssertionError("backoff has no end")

    async def _wait_or_closing(self, delay_s: float) -> None:
        """Wait before the next attempt; when closing, only shortly."""
        if self._closing.is_set():
            await asyncio.sleep(CLOSING_DELAY_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._closing.wait()

    async def _use_connection(self, client: Client) -> None:
        """Send and receive over one connection. Returns when closing and everything is delivered;
        raises MqttError when the connection breaks."""
        kept = [m for m in self._droppable if not self._state.is_speech(m)]
        self._droppable = deque(kept, maxlen=DROPPABLE)
        self._republish_due = True
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(self._receive(client), name="mqtt-connection")
            await self._send_queued(client)
            receiving.cancel()

    async def _receive(self, client: Client) -> None:
        """Receive requests. Also what notices that the connection is broken: publishing doesn't."""
        # Where Home Assistant announces its start.
        birth = f"{self._config.homeassistant}/status" if self._config.homeassistant else ""
        if not await subscribe_to(client, [*self._requests.topics, *([birth] if birth else [])]):
            self._report(
                f"{self.address}: may not subscribe, so requests are not received; "
                "check the broker's access rules"
            )
        async for message in receive(client):
            if message.topic != birth:
                self._requests.put(message)
            elif message.payload == b"online" and not message.retained:
                self._republish_due = True
                self._wake.set()

    async def _republish(self, client: Client) -> None:
        """Publish what is retained: a restarted broker has forgotten it. First clear what ended
        runs left."""
        self._republish_due = False
        for message in self._state.known():
            await self._publish_retained(client, message)
        await self._state.announced()
        cleared = self._state.erasures()
        for message in cleared:
            await self._refusals.publish(client, message)
        await self._state.published(cleared)
        for message in self._state.held():
            await self._publish_retained(client, message)

    async def _publish_retained(self, client: Client, message: Message) -> None:
        await self._state.note([message])
        if await self._refusals.publish(client, message) and not message.payload:
            await self._state.published([message])

    async def _send_queued(self, client: Client) -> None:
        while True:
            if self._republish_due:
                await self._republish(client)
            elif len(self._outbox):
                await self._send_outbox(client)
            elif self._droppable:
                message = self._droppable.popleft()
                try:
                    self._dropped += not await self._refusals.publish(client, message)
                except MqttError:
                    self._dropped += 1
                    raise
            elif self._closing.is_set():
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _send_outbox(self, client: Client) -> None:
        """Send the oldest messages, several at once, so that the round trip doesn't limit the rate.

        They are sent in order. Only those that are answered, with all before them, leave the
        outbox: after a broken connection the others are sent again, in order.
        """
        oldest = self._refusals.select(self._outbox.first(IN_FLIGHT), client)
        await self._state.note([each.message for each in oldest])
        sent: list[asyncio.Task[bool]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for each in oldest:
                    sent.append(group.create_task(self._refusals.publish(client, each.message)))
        finally:
            answered: list[tuple[Queued, bool]] = []
            for each, task in zip(oldest, sent, strict=False):
                if not task.done() or task.cancelled() or task.exception():
                    break
                answered.append((each, task.result()))
            await self._leave_outbox(answered)

    async def _leave_outbox(self, answered: Sequence[tuple[Queued, bool]]) -> None:
        """Note what the broker takes; a message forgotten meanwhile is erased there as well."""
        taken = [each for each, is_taken in answered if is_taken]
        retained = [each for each in taken if each.message.retain]
        gone = [erasure(each.message) for each in retained if each not in self._outbox]
        self._state.hold(gone)
        self._republish_due |= bool(gone)
        await self._state.published([e.message for e in retained if e in self._outbox])
        await self._outbox.remove(taken)
        await self._outbox.set_aside([each for each, is_taken in answered if not is_taken])
        if self._refusals.may_pass and not self._again and not self._closing.is_set():
            self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._try_again)
        self._room.set()

    def _try_again(self) -> None:
        self._again, self._refusals.may_pass = None, False
        self._outbox.take_back()
        self._wake.set()

    async def _publish_stopped(self) -> None:
        client, self._client = self._client, None
        if client:
            await self._refusals.publish(client, available("stopped", **self._names))
            await close_client(client)

    def _report(self, line: str) -> None:
        self._on_status(self._client is not None, line)
