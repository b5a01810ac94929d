"""Where emotions go: over MQTT, with nothing finished lost while the broker is away."""

import asyncio
import contextlib
import json
import os
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import StreamHbafError
from stream_hbaf.events import AnyEvent, Info, Speech, Utterance
from stream_hbaf.publish.connection import (
    Client,
    MqttError,
    OnStatus,
    backoff,
    close_client,
    node_name,
    open_client,
    read_address,
    until_lost,
)
from stream_hbaf.publish.messages import Message, available, messages

__all__ = ["Message", "MqttPublisher", "messages", "node_name", "read_address"]

IN_FLIGHT = 16  # messages sent before the first is acknowledged; mosquitto takes 20
DROPPABLE = 16  # partial results held; older ones are dropped and counted
ACKNOWLEDGE_TIMEOUT_S = 10.0  # a broker that takes longer is taken for lost
FAREWELL_S = 0.5  # kept of the time to close for saying `stopped`
CLOSING_DELAY_S = 0.25  # between attempts to reach the broker once the program ends


class MqttPublisher:
    """Publishes events in order; finished ones at least once, whatever the connection does.

    Receivers tell a repeated utterance message by its ``id`` and ``rev``. What is published as
    state (retained) is published again whenever the broker comes back.
    """

    def __init__(self, config: MqttConfig, *, info: Info, on_status: OnStatus | None = None):
        """``on_status`` hears when the broker is lost, and when it is back."""
        self.dropped = 0  # partial results that were never sent
        self.address = read_address(config)
        self._config = config
        self._prefix = config.prefix
        self._node = node_name(config)
        self._info = info
        self._on_status = on_status or (lambda _connected, _line: None)
        self._client: Client | None = None
        self._delivery: asyncio.Task[None] | None = None
        self._finished: deque[Message] = deque()  # left in the queue until acknowledged
        self._droppable: deque[Message] = deque()
        self._state: dict[str, Message] = {}  # by topic: retained messages the broker has seen
        self._speech: dict[str, Message] = {}  # by topic: the latest ON or OFF
        self._labels: dict[str, str] = {}  # by source: the last emotion
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._closing = asyncio.Event()

    async def connect(self) -> None:
        """The first connection. Raises BrokerError, in one line, if there is none to be had."""
        will = available("offline", prefix=self._prefix, node=self._node)
        self._client = await open_client(self._config, will=will)

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
        """Queue an event. Waits while the outbox is full, unless the event may be dropped."""
        source = event.source if isinstance(event, Utterance) else ""
        found = messages(
            event,
            prefix=self._prefix,
            node=self._node,
            last_label=self._labels.get(source, ""),
        )
        if isinstance(event, Utterance) and event.type == "end" and event.emotion:
            self._labels[source] = event.emotion.label
        if isinstance(event, Speech):
            self._speech |= {message.topic: message for message in found}
        if any(not message.droppable for message in found):
            try:
                while len(self._finished) >= self._config.outbox and not self._closing.is_set():
                    self._space.clear()
                    await self._space.wait()
            finally:  # who is interrupted while waiting still leaves what is finished
                self._put(found)
        else:
            self._put(found)

    async def close(self, timeout_s: float) -> Path | None:
        """Deliver what is queued, say ``stopped``, leave; within ``timeout_s``.

        Utterance messages that could not be delivered are kept in a file, one JSON object a
        line; returns its path, and ``on_status`` hears it.
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
        kept = self._keep(message for message in self._finished if not message.retain)
        with contextlib.suppress(TimeoutError, MqttError):
            async with asyncio.timeout_at(deadline):
                await self._say_stopped()
        if not self._delivery.cancelled():
            self._delivery.result()  # a programming error must not pass silently
        return kept

    def _put(self, found: Iterable[Message]) -> None:
        for message in found:
            if not message.droppable:
                self._finished.append(message)
                continue
            if len(self._droppable) == DROPPABLE:
                self._droppable.popleft()
                self.dropped += 1
            self._droppable.append(message)
        self._wake.set()

    async def _deliver(self) -> None:
        """Over as many connections as it takes; ends once closing and nothing is left to do."""
        while self._client or await self._reconnect():
            assert self._client
            try:
                await self._converse(self._client)
            except* MqttError:  # its text speaks of the client's inside
                lost, self._client = self._client, None
                self._on_status(False, f"{self.address}: connection lost; trying again")
                await close_client(lost)
            else:
                return

    async def _reconnect(self) -> bool:
        """True once connected; False if the program ends and nobody needs the connection."""
        reported = ""
        for delay_s in backoff():
            await self._pause(delay_s)
            try:
                await self.connect()
            except StreamHbafError as error:
                if self._closing.is_set() and all(message.retain for message in self._finished):
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
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(until_lost(client), name="mqtt-connection")
            await self._restore(client)
            await self._drain(client)
            watch.cancel()

    async def _restore(self, client: Client) -> None:
        """What a broker that has just started, or a last will, made everybody forget."""
        names = {"prefix": self._prefix, "node": self._node}
        self._droppable = deque(m for m in self._droppable if m.topic not in self._speech)
        known = [
            available("online", **names),
            *messages(self._info, **names),
            *self._state.values(),
            *self._speech.values(),
        ]
        for message in known:
            await _publish(client, message)

    async def _drain(self, client: Client) -> None:
        while True:
            if self._finished:
                await self._publish_finished(client)
            elif self._droppable:
                message = self._droppable.popleft()
                try:
                    await _publish(client, message)
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

        They leave in order. Only those acknowledged with all before them leave the queue: after
        a broken connection the others are sent again, in order.
        """
        sent: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for message in islice(self._finished, IN_FLIGHT):
                    sent.append(group.create_task(_publish(client, message)))
        finally:
            for task in sent:
                if not task.done() or task.cancelled() or task.exception():
                    break
                message = self._finished.popleft()
                if message.retain:
                    self._state[message.topic] = message
            self._space.set()

    async def _say_stopped(self) -> None:
        client, self._client = self._client, None
        if client:
            await _publish(client, available("stopped", prefix=self._prefix, node=self._node))
            await close_client(client)

    def _keep(self, unsent: Iterable[Message]) -> Path | None:
        """Readable by the owner only: it holds what people said."""
        lines = [
            json.dumps({"topic": m.topic, "payload": m.payload.decode()}, ensure_ascii=False) + "\n"
            for m in unsent
        ]
        if not lines:
            return None
        path = _state_folder() / f"unsent-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.jsonl"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600, exist_ok=False)
            path.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            line = f"{len(lines)} messages lost: {path}: {error.strerror}; set XDG_STATE_HOME"
            self._on_status(False, line)
            return None
        self._on_status(False, f"{len(lines)} messages not delivered; they are in {path}")
        return path


async def _publish(client: Client, message: Message) -> None:
    """Returns once acknowledged (QoS 1) or handed to the network (QoS 0)."""
    await client.publish(
        message.topic,
        message.payload,
        qos=message.qos,
        retain=message.retain,
        timeout=ACKNOWLEDGE_TIMEOUT_S,
    )


def _state_folder() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "stream_hbaf"
