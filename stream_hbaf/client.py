"""For other programs in Python: what is published, as the typed events it was.

    async for event in subscribe("mqtt://broker.local", kinds=(Utterance,)):
        print(event.speaker, event.emotion)

Neither models nor numpy are imported. Where a url is not enough, an ``MqttConfig`` has the rest:
prefix, user, password, certificates.
"""

import asyncio
import json
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from typing import Any, Generic, Literal, TypeVar, cast, overload

from pydantic import ValidationError
from pydantic_core import from_json

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError
from stream_hbaf.events import Event, Response, Speech, Status, Switch, Utterance
from stream_hbaf.publish.connection import (
    MqttError,
    OnStatus,
    Received,
    close_client,
    open_client,
    read_address,
)
from stream_hbaf.publish.connection import subscribe as receive
from stream_hbaf.publish.topics import TOPICS, Topic, find_topic

E_co = TypeVar("E_co", bound=Event, covariant=True)

REMEMBERED = 20_000  # utterances whose newest revision is known: more than an outbox sends again


class Available(Event):
    """A recogniser has come or gone."""

    node: str
    state: Literal["online", "offline", "stopped"]


class Label(Event):
    """What a source's latest finished utterance was."""

    source: str
    label: str


# By the topic's name; requests and the like are for the recogniser, not for those who watch it.
KINDS: dict[str, type[Event]] = {
    "available": Available,
    "status": Status,
    "speech": Speech,
    "emotion": Label,
    "switch": Switch,
    **{
        topic.name: topic.carries
        for topic in TOPICS
        if topic.ours and not isinstance(topic.carries, tuple) and topic.name != "discovery"
    },
}


class Subscription(AsyncIterator[E_co], Generic[E_co]):
    """Events as they come, each utterance message once, over as many connections as it takes."""

    node = ""  # that published the latest event
    retained = False  # whether that was published before we subscribed
    damaged = 0  # messages that could not be read and were skipped
    repeated = 0  # utterance messages that had come before and were skipped

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
        """The next event. Raises BrokerError or ConfigError if there is no first connection."""
        async for message in self._received:
            event = self._read(message)
            if event is not None:
                return cast(E_co, event)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Disconnect. Also happens when nobody holds the subscription any more."""
        await self._received.aclose()

    def _read(self, message: Received) -> Event | None:
        """None for what is not wanted, not known, not new, or damaged."""
        found = find_topic(message.topic)
        if found is None or not message.payload:  # an empty one takes a retained one away
            return None
        topic, levels = found
        if KINDS.get(topic.name) not in self._kinds or levels["prefix"] != self._prefix:
            return None
        if self._source is not None and levels.get("source") != self._source:
            return None
        try:
            event = _decode(message.payload, topic=topic, levels=levels)
        except ValueError:
            self.damaged += 1
            return None
        if isinstance(event, Utterance) and not self._is_new(event, node=levels["node"]):
            self.repeated += 1
            return None
        self.node, self.retained = levels["node"], message.retained
        return event

    def _is_new(self, event: Utterance, *, node: str) -> bool:
        """Revisions rise: one that doesn't is sent again after a connection or a process broke."""
        key = (node, event.id)
        new = event.rev > self._revisions.get(key, 0)
        self._revisions[key] = max(event.rev, self._revisions.pop(key, 0))  # now the youngest
        if len(self._revisions) > REMEMBERED:
            self._revisions.popitem(last=False)
        return new


@overload
def subscribe(
    where: str | MqttConfig,
    *,
    node: str | None = None,
    source: str | None = None,
    on_status: OnStatus | None = None,
) -> Subscription[Event]: ...


@overload
def subscribe(
    where: str | MqttConfig,
    *,
    kinds: Collection[type[E_co]],
    node: str | None = None,
    source: str | None = None,
    on_status: OnStatus | None = None,
) -> Subscription[E_co]: ...


def subscribe(
    where: str | MqttConfig,
    *,
    kinds: Collection[type[Event]] = tuple(KINDS.values()),
    node: str | None = None,
    source: str | None = None,
    on_status: OnStatus | None = None,
) -> Subscription[Any]:
    """What recognisers publish, from now on and as far as it is retained.

    ``where`` is a url or the settings of ``mqtt``; ``kinds`` are the types to give, ``node`` and
    ``source`` whose. A lost connection comes back by itself, ``on_status`` hears of it; what was
    published in between is not seen.
    """
    config = MqttConfig(url=where) if isinstance(where, str) else where
    received = receive(
        config,
        topic=_topic_filter(kinds, prefix=config.prefix, node=node, source=source),
        on_status=on_status or (lambda _connected, _line: None),
    )
    return Subscription(received, prefix=config.prefix, source=source, kinds=kinds)


async def request(
    where: str | MqttConfig,
    command: str,
    *,
    node: str,
    timeout_s: float = 10.0,
    **arguments: Any,
) -> Response:
    """Ask one recogniser for something, and wait for its answer, which may be an error.

    Raises BrokerError if there is no broker, or no answer in time.
    """
    config = MqttConfig(url=where) if isinstance(where, str) else where
    root = f"{config.prefix}/{node}"
    transaction = uuid.uuid4().hex
    asked = json.dumps({**arguments, "transaction": transaction})
    client = await open_client(config)
    try:
        async with asyncio.timeout(timeout_s):
            await client.subscribe(f"{root}/response/{command}", qos=1)
            await client.publish(f"{root}/request/{command}", asked, qos=1)
            async for message in client.messages:
                answer = _answer(message.payload)
                if answer is not None and answer.transaction == transaction:
                    return answer
        raise AssertionError("messages have no end")
    except TimeoutError:
        raise BrokerError(
            f"{read_address(config)}: '{node}' does not answer '{command}' within {timeout_s:g} s; "
            f"check that it is {config.prefix}/{node}, and running"
        ) from None
    except MqttError:
        raise BrokerError(
            f"{read_address(config)}: connection lost before '{command}' was answered; ask again"
        ) from None
    finally:
        await close_client(client)


def _decode(payload: bytes, *, topic: Topic, levels: dict[str, str]) -> Event:
    """The event that a message was; fields that we don't know are ignored. Raises ValueError."""
    model = KINDS[topic.name]
    if not isinstance(topic.carries, tuple):
        return model.model_validate(from_json(payload, allow_inf_nan=False))
    word = payload.decode()
    if topic.carries and word not in topic.carries:
        raise ValueError(f"'{word}' says nothing on {topic.address}")
    return model.model_validate({**levels, "state": word, "label": word, "on": word == "ON"})


def _answer(payload: object) -> Response | None:
    try:
        return Response.model_validate_json(payload if isinstance(payload, bytes) else b"")
    except ValidationError:
        return None  # others may ask for the same, and anybody may answer


def _topic_filter(
    kinds: Collection[type[Event]], *, prefix: str, node: str | None, source: str | None
) -> str:
    """As narrow as one subscription can be: who wants ends only needn't hear each partial."""
    wanted = [topic for topic in TOPICS if KINDS.get(topic.name) in kinds]
    if len(wanted) != 1:
        return f"{prefix}/{node or '+'}/{f'{source}/' if source else ''}#"
    level = {"{prefix}": prefix, "{node}": node or "+", "{source}": source or "+"}
    return "/".join(
        level.get(part, "+" if "{" in part else part) for part in wanted[0].address.split("/")
    )
