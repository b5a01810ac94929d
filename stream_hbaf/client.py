"""A client for Python programs: subscribes to published events, and sends requests.

    async for event in subscribe("mqtt://broker.local", kinds=(Utterance,)):
        print(event.speaker, event.emotion)

``stream`` sends sound to ``stream-hbaf serve`` and yields its events.

An utterance may end more than once: a later ``end`` with a ``revision`` takes the place of the
one before. Importing it imports neither models nor numpy. An ``MqttConfig`` may take the
place of the URL; it also holds prefix, user, password and certificates.
"""

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from typing import Any, Generic, Literal, cast

from pydantic import ValidationError
from pydantic_core import from_json
from typing_extensions import TypeVar

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, ConfigError, StreamHbafError, shorten
from stream_hbaf.events import Event, Response, Speech, Status, Switch, Utterance
from stream_hbaf.publish.address import read_address
from stream_hbaf.publish.connection import (
    STEADY_S,
    MqttError,
    OnConnectionStatus,
    Received,
    backoff,
    close_client,
    open_client,
    receive,
    subscribe_to,
)
from stream_hbaf.publish.messages import TOPICS, Topic, find_topic
from stream_hbaf.publish.mqtt_client import RefusedError
from stream_hbaf.stream_client import StreamEvent as StreamEvent
from stream_hbaf.stream_client import stream as stream

E_co = TypeVar("E_co", bound=Event, covariant=True, default=Event)

MAX_REVISIONS = 20_000  # utterances whose latest revision is kept: more than an outbox resends
GROUP = re.compile(r"[^/+#\s\x00-\x1f\x7f]{1,200}")  # of subscribers that share a subscription
LONGEST_ID = 200  # characters, of an utterance that is kept; those of a recogniser have 20


class Availability(Event):
    """A recogniser has connected, stopped, or lost its connection (the topic ``available``)."""

    node: str
    state: Literal["online", "offline", "stopped"]


class EmotionLabel(Event):
    """The label of a source's latest utterance, when it changes (the topic ``emotion``)."""

    source: str
    label: str


# By the topic's name; without the topics that other programs publish.
KINDS: dict[str, type[Event]] = {
    "available": Availability,
    "status": Status,
    "speech": Speech,
    "emotion": EmotionLabel,
    "switch": Switch,
    **{
        topic.name: topic.payload
        for topic in TOPICS
        if topic.published and not isinstance(topic.payload, tuple) and topic.name != "discovery"
    },
}


class Subscription(AsyncIterator[E_co], Generic[E_co]):
    """Events as they arrive. Utterance messages that are repeated are skipped, a lost connection
    is restored."""

    node = ""  # the recogniser that published the latest event
    retained = False  # whether that event was published before the subscription
    damaged = 0  # skipped messages that could not be decoded
    repeated = 0  # skipped utterance messages that had been received before

    def __init__(
        self,
        received: AsyncGenerator[Received, None],
        *,
        prefix: str,
        source: str | None,
        kinds: Collection[type[Event]],
    ) -> None:
        self._received = received
        self._prefix = prefix
        self._source = source
        self._kinds = kinds
        self._revisions: OrderedDict[tuple[str, str], int] = OrderedDict()

    def __aiter__(self) -> "Subscription[E_co]":
        return self

    async def __anext__(self) -> E_co:
        """The next event. Raises BrokerError or ConfigError if the first connection fails."""
        async for message in self._received:
            event = self._decode(message)
            if event is not None:
                return cast(E_co, event)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Disconnect. Also happens when the subscription is garbage collected."""
        await self._received.aclose()

    def _decode(self, message: Received) -> Event | None:
        """None for a message that is not subscribed to, not known, repeated or damaged."""
        found = find_topic(message.topic)
        if found is None or not message.payload:  # an empty payload erases a retained message
            return None
        topic, levels = found
        if KINDS.get(topic.name) not in self._kinds or levels["prefix"] != self._prefix:
            return None
        if self._source is not None and levels.get("source") != self._source:
            return None
        event: Event | None
        try:
            event = _decode(message.payload, topic=topic, levels=levels)
        except ValueError:
            event = None
        if event is None or len(getattr(event, "id", "")) > LONGEST_ID:
            self.damaged += 1
            return None
        if isinstance(event, Utterance) and not self._is_new(event, node=levels["node"]):
            self.repeated += 1
            return None
        self.node, self.retained = levels["node"], message.retained
        return event

    def _is_new(self, event: Utterance, *, node: str) -> bool:
        """Whether the revision is higher than before: after a broken connection or a crash
        messages are sent again."""
        key = (node, event.id)
        new = event.rev > self._revisions.get(key, 0)
        self._revisions[key] = max(event.rev, self._revisions.pop(key, 0))  # moved to the end
        if len(self._revisions) > MAX_REVISIONS:
            self._revisions.popitem(last=False)
        return new


def subscribe(
    where: str | MqttConfig,
    *,
    kinds: Collection[type[E_co]] = cast(Any, tuple(KINDS.values())),
    node: str | None = None,
    source: str | None = None,
    group: str | None = None,
    on_status: OnConnectionStatus | None = None,
) -> Subscription[E_co]:
    """Subscribe to the events that recognisers publish, retained ones first.

    ``where`` is a URL or the settings of ``mqtt``; ``kinds`` are the types of events to yield,
    ``node`` and ``source`` limit them to one recogniser or audio source. Of the subscriptions with
    the same ``group`` one gets each message (a shared subscription of MQTT 5), and none gets
    retained ones. A lost connection is restored; events published meanwhile are missed.
    ``on_status`` is called when the connection is lost and restored.
    """
    config = MqttConfig(url=where) if isinstance(where, str) else where
    topic = _topic_filter(kinds, prefix=config.prefix, node=node, source=source)
    if group is not None:
        if not GROUP.fullmatch(group):
            raise ConfigError(f"group {shorten(group)!r}: must not be empty, nor hold /, + or #")
        topic = f"$share/{group}/{topic}"
    received = follow(config, topic=topic, on_status=on_status)
    return Subscription(received, prefix=config.prefix, source=source, kinds=kinds)


async def request(
    where: str | MqttConfig, command: str, *, node: str, timeout_s: float = 10.0, **arguments: Any
) -> Response:
    """Send a command to a recogniser and return its response, whose ``status`` may be ``error``.

    Raises BrokerError if the broker can't be reached or denies it, or there is no response in time.
    """
    config = MqttConfig(url=where) if isinstance(where, str) else where
    root = f"{config.prefix}/{node}"
    transaction = uuid.uuid4().hex
    payload = json.dumps({**arguments, "transaction": transaction})
    client = await open_client(config)
    try:
        async with asyncio.timeout(timeout_s):
            if not await subscribe_to(client, [f"{root}/response/{command}"]):
                raise BrokerError(
                    f"{read_address(config)}: may not subscribe to {root}/response/{command}; "
                    "check the broker's access rules"
                )
            await client.publish(f"{root}/request/{command}", payload, qos=1)
            async for message in receive(client):
                with contextlib.suppress(ValidationError):  # anybody may publish there
                    response = Response.model_validate_json(message.payload)
                    if response.transaction == transaction:
                        return response
        raise AssertionError("messages have no end")
    except TimeoutError:
        raise BrokerError(
            f"{read_address(config)}: '{node}' does not answer '{command}' within {timeout_s:g} s; "
            f"check that it is {config.prefix}/{node}, and running"
        ) from None
    except RefusedError as error:
        raise BrokerError(
            f"{read_address(config)}: may not publish to {root}/request/{command} ({error}); "
            "check the broker's access rules"
        ) from None
    except MqttError:
        raise BrokerError(
            f"{read_address(config)}: connection lost before '{command}' was answered; ask again"
        ) from None
    finally:
        await close_client(client)


async def follow(
    config: MqttConfig, *, topic: str, on_status: OnConnectionStatus | None = None
) -> AsyncGenerator[Received, None]:
    """Messages as they arrive; a lost connection is opened again.

    Raises BrokerError or ConfigError if the first connection fails, and BrokerError if the broker
    denies the subscription.
    """
    on_status = on_status or (lambda _connected, _line: None)
    address = read_address(config)
    client = await open_client(config)
    delays = backoff()
    while True:
        connected_at = time.monotonic()
        try:
            if not await subscribe_to(client, [topic]):
                advice = "check the broker's access rules"
                raise BrokerError(f"{address}: may not subscribe to {topic}; {advice}")
            async for message in receive(client):
                yield message
        except MqttError:
            on_status(False, f"{address}: connection lost; trying again")
        finally:
            await close_client(client)
        if time.monotonic() - connected_at > STEADY_S:
            delays = backoff()
        for delay_s in delays:
            await asyncio.sleep(delay_s)
            with contextlib.suppress(StreamHbafError):
                client = await open_client(config)
                break
        on_status(True, f"{address}: connected again")


def _decode(payload: bytes, *, topic: Topic, levels: dict[str, str]) -> Event:
    """The event of a payload; unknown fields are ignored. Raises ValueError for a damaged one."""
    model = KINDS[topic.name]
    if not isinstance(topic.payload, tuple):
        return model.model_validate(from_json(payload, allow_inf_nan=False))
    word = payload.decode()
    if topic.payload and word not in topic.payload:
        raise ValueError(f"'{word}' is not a payload of {topic.address}")
    return model.model_validate({**levels, "state": word, "label": word, "on": word == "ON"})


def _topic_filter(
    kinds: Collection[type[Event]], *, prefix: str, node: str | None, source: str | None
) -> str:
    """The narrowest filter that one subscription can have."""
    wanted = [topic for topic in TOPICS if KINDS.get(topic.name) in kinds]
    if len(wanted) != 1:
        return f"{prefix}/{node or '+'}/{f'{source}/' if source else ''}#"
    levels = {"prefix": prefix, "node": node, "source": source}
    given = {level: value for level, value in levels.items() if value}
    return wanted[0].address.format_map(defaultdict(lambda: "+", given))
