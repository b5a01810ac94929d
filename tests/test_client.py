"""The client against a real mosquitto: typed events, each once, whatever comes and goes."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mosquitto import Mosquitto, free_port, mosquitto
from mqtt_kit import StatusLog

from stream_hbaf import client
from stream_hbaf.client import Availability, EmotionLabel, Subscription, request, subscribe
from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, ConfigError
from stream_hbaf.events import (
    AnyEvent,
    Emotion,
    Event,
    Info,
    Model,
    Partial,
    Speech,
    Status,
    Utterance,
)
from stream_hbaf.publish.connection import close_client, open_client
from stream_hbaf.publish.messages import Message, available, encode, messages

JOY = Emotion(label="joy", score=0.9, abstained=False, set=["joy"], probabilities={"joy": 0.9})
INFO = Info(version="0", model=Model(id="b", sha256="c"), labels=["joy"], licence="", sources=["m"])


def utterance(number: int, *, rev: int = 1, source: str = "m") -> Utterance:
    return Utterance(
        id=f"d-{number}",
        rev=rev,
        type="end",
        source=source,
        dialogue_id="d",
        turn=number,
        speaker="Zoë",
        start_time="t",
        audio_start_ms=0.0,
        text=f"“{number}”",
        emotion=JOY,
    )


FIRST = utterance(0)  # retained, so that it comes as soon as we have subscribed
LAST = Speech(source="m", on=False)  # tests end with it


def partial(number: int) -> Partial:
    return Partial(
        id=f"d-{number}", source="m", dialogue_id="d", speaker="", text="", modalities=["audio"],
        emotion=JOY,
    )  # fmt: skip


def sent(*events: AnyEvent, node: str = "n") -> list[Message]:
    return [m for event in events for m in messages(event, prefix="stream_hbaf", node=node)]


async def publish(broker: Mosquitto, *found: Message) -> None:
    speaker = await open_client(MqttConfig(url=broker.url))
    for message in found:
        await speaker.publish(message.topic, message.payload, message.qos, message.retain)
    await close_client(speaker)


async def collect(
    events: Subscription[Any], *, until: Event, send: Callable[[], Coroutine[Any, Any, None]]
) -> list[Event]:
    """The events that ``send``, called once the subscription is there, brings before ``until``."""
    found: list[Event] = []
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        async for event in events:
            if event == FIRST:
                group.create_task(send())
            elif event == until:
                break
            else:
                found.append(event)
    await events.aclose()
    return found


def round_trip(folder: Path, *sent_messages: Message, until: Event = LAST, **options: Any) -> Any:
    """The subscription, and the events that it yields of the messages."""

    async def main(broker: Mosquitto) -> tuple[Subscription[Any], list[Event]]:
        events = subscribe(broker.url, **options)
        await publish(broker, replace(sent(FIRST)[0], retain=True))
        last = sent(LAST) if until == LAST else []
        send = lambda: publish(broker, *sent_messages, *last)  # noqa: E731
        return events, await collect(events, until=until, send=send)

    with mosquitto(folder) as broker:
        return asyncio.run(main(broker))


def test_events_are_those_that_were_published(tmp_path: Path) -> None:
    """Each message becomes the event that it was, bare words too, in their order."""
    status = Status(source="m", stage="vad", state="degraded")
    state = available("online", prefix="stream_hbaf", node="n")
    published = sent(INFO, status, Speech(source="m", on=True), partial(1), utterance(1))
    events, found = round_trip(tmp_path, state, *published)
    assert found == [
        Availability(node="n", state="online"),
        INFO,
        status,
        Speech(source="m", on=True),
        partial(1),
        utterance(1),
        EmotionLabel(source="m", label="joy"),
    ]
    assert (events.node, events.damaged, events.repeated) == ("n", 0, 0)


def test_kinds_choose(tmp_path: Path) -> None:
    """Who wants utterances and speech gets nothing else."""
    published = sent(INFO, partial(1), utterance(1), utterance(2))
    _, found = round_trip(tmp_path, *published, kinds=(Utterance, Speech))
    assert found == [utterance(1), utterance(2)]


def test_one_kind_is_one_narrow_subscription(tmp_path: Path) -> None:
    """Who wants utterances only has the broker send utterances only."""
    last = utterance(9)
    _, found = round_trip(
        tmp_path, *sent(partial(1), utterance(1), last), kinds=(Utterance,), until=last
    )
    assert found == [utterance(1)]


def test_node_and_source_choose(tmp_path: Path) -> None:
    """Who asks for one source of one node hears no other, nor what the node says of itself."""
    other_node = sent(utterance(1), node="attic")
    published = sent(INFO, utterance(2, source="file"), utterance(3))
    _, found = round_trip(tmp_path, *other_node, *published, node="n", source="m")
    assert found == [utterance(3), EmotionLabel(source="m", label="joy")]


def test_repeated_utterances_are_given_once(tmp_path: Path) -> None:
    """The same id and rev again, or an older rev, is counted and not given; a higher one is."""
    published = [
        utterance(1, rev=1),
        utterance(1, rev=2),
        utterance(1, rev=1),
        utterance(1, rev=2),
    ]
    events, found = round_trip(
        tmp_path, *sent(*published, utterance(2), utterance(1, rev=3)), kinds=(Utterance, Speech)
    )
    assert found == [utterance(1, rev=1), utterance(1, rev=2), utterance(2), utterance(1, rev=3)]
    assert events.repeated == 2


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of old utterances the revisions are forgotten, oldest first; young ones stay known."""
    monkeypatch.setattr(client, "MAX_REVISIONS", 2)
    published = [
        utterance(1),
        utterance(2),
        utterance(3),
        utterance(3),
        utterance(2),
        utterance(1),
    ]
    events, found = round_trip(tmp_path, *sent(*published), kinds=(Utterance, Speech))
    assert [event.turn for event in found] == [1, 2, 3, 1]
    assert events.repeated == 2


@pytest.mark.breaks_contract
def test_damaged_messages_are_counted_and_skipped(tmp_path: Path) -> None:
    """Nonsense of any sort costs a count; what we don't know costs nothing."""
    root = "stream_hbaf/n/m"
    fields = json.loads(encode(utterance(1)))
    damaged = [
        Message(f"{root}/utterance", b"not JSON"),
        Message(f"{root}/utterance", b"\xff\xfe"),
        Message(f"{root}/utterance", b"[1, 2]"),
        Message(f"{root}/utterance", b"[" * 100_000),
        Message(f"{root}/utterance", json.dumps(fields | {"rev": "many"}).encode()),
        Message(
            f"{root}/utterance", json.dumps(fields | {"audio_start_ms": float("nan")}).encode()
        ),
        Message(f"{root}/utterance", json.dumps(fields | {"schema": "another/2"}).encode()),
        Message(f"{root}/utterance", json.dumps(fields | {"id": "x" * 10_000}).encode()),
        Message(f"{root}/speech", b"MAYBE"),
        Message(f"{root}/status/vad", b"\xff"),
    ]
    unknown = [
        Message(f"{root}/mood", b"fine"),
        Message("stream_hbaf/elsewhere/n/m/speech", b"ON"),
        Message(f"{root}/emotion", b""),
    ]
    newer = Message(f"{root}/utterance", json.dumps(fields | {"mood": "fine"}).encode())
    events, found = round_trip(tmp_path, *damaged, *unknown, newer)
    assert found == [utterance(1)]
    assert events.damaged == len(damaged)


def test_retained_events_are_marked(tmp_path: Path) -> None:
    """Who subscribes later gets what is retained, and can tell that it is from before."""

    async def main(broker: Mosquitto) -> list[tuple[Event, bool]]:
        await publish(broker, *sent(INFO))
        events = subscribe(broker.url)
        found = []
        async with asyncio.timeout(10):
            async for event in events:
                found.append((event, events.retained))
                if event == LAST:
                    break
                await publish(broker, *sent(LAST))
        await events.aclose()
        return found

    with mosquitto(tmp_path) as broker:
        assert asyncio.run(main(broker)) == [(INFO, True), (LAST, False)]


def test_broker_that_comes_back(tmp_path: Path) -> None:
    """Events go on after the broker has been restarted, and the callback is called."""

    async def main(broker: Mosquitto) -> tuple[list[Event], list[bool]]:
        statuses = StatusLog()

        async def send() -> None:
            await publish(broker, *sent(utterance(1)))
            broker.stop()
            broker.start()
            await statuses.until(connected=True)
            await publish(broker, *sent(utterance(1), utterance(2), LAST))

        await publish(broker, replace(sent(FIRST)[0], retain=True))
        events = subscribe(broker.url, kinds=(Utterance, Speech), on_status=statuses)
        found = await collect(events, until=LAST, send=send)
        return found, [connected for connected, _ in statuses.calls]

    with mosquitto(tmp_path) as broker:
        found, connected = asyncio.run(main(broker))
    assert found == [utterance(1), utterance(2)]
    assert connected == [False, True]


def test_no_broker_is_one_line() -> None:
    """Nobody there: the first event asked for says so."""

    async def main() -> None:
        async for _ in subscribe(f"mqtt://127.0.0.1:{free_port()}"):
            pass

    with pytest.raises(BrokerError, match="nothing listens there; start the broker"):
        asyncio.run(main())
    with pytest.raises(ConfigError, match="use mqtt://HOST"):
        asyncio.run(anext(subscribe("broker")))


async def answering(broker: Mosquitto, *answers: str, ready: asyncio.Event) -> None:
    """A recogniser that gives these answers, with the request's transaction in place of T."""
    recogniser = await open_client(MqttConfig(url=broker.url))
    await recogniser.subscribe("stream_hbaf/n/request/+", qos=1)
    ready.set()
    async for message in recogniser.messages:
        assert isinstance(message.payload, bytes)
        asked = json.loads(message.payload)
        topic = str(message.topic).replace("/request/", "/response/")
        for answer in answers:
            payload = answer.replace("MODEL", asked.get("model", "")).replace(
                "T", asked["transaction"]
            )
            await recogniser.publish(topic, payload, qos=1)
        break
    await close_client(recogniser)


@pytest.mark.breaks_contract
def test_request_is_answered(tmp_path: Path) -> None:
    """The response is the one with our transaction, whatever else is published there."""
    answers = (
        "nonsense",
        '{"command":"set_model","status":"ok","transaction":"another"}',
        '{"command":"set_model","status":"error","error":"no bundle MODEL","transaction":"T"}',
    )

    async def main(broker: Mosquitto) -> Any:
        async with asyncio.TaskGroup() as group:
            group.create_task(answering(broker, *answers, ready=(ready := asyncio.Event())))
            await ready.wait()
            return await request(broker.url, "set_model", node="n", model="mine")

    with mosquitto(tmp_path) as broker:
        answer = asyncio.run(main(broker))
    assert (answer.status, answer.error) == ("error", "no bundle mine")


def test_request_without_an_answer(tmp_path: Path) -> None:
    """Nobody of that name: one line that names node, command and time, not later than asked."""
    with (
        mosquitto(tmp_path) as broker,
        pytest.raises(BrokerError, match=r"'attic' does not answer 'ping' within 0\.3 s; check"),
    ):
        asyncio.run(request(broker.url, "ping", node="attic", timeout_s=0.3))


def test_import_is_light() -> None:
    """A small program that listens loads no model's library."""
    heavy = ("torch", "numpy", "av", "transformers", "faster_whisper", "amqtt")
    script = f"import sys, stream_hbaf.client; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "[]\n"
