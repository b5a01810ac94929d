"""Requests, switches and corrections over a real mosquitto: each is answered or refused."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from mosquitto import Mosquitto, Subscriber, find_program, mosquitto
from mqtt_kit import INFO, StatusLog, config
from recording_control import Call, RecordingControl

from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Feedback, Request
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.publish.requests import MAX_PAYLOAD, MAX_QUEUED


def make_control() -> RecordingControl:
    """One command fails with a user's error, another with a bug."""
    return RecordingControl(
        failures={
            "set_model": ConfigError("there is no such model; choose one of: live-en"),
            "reset": RuntimeError("a bug"),
        }
    )


class Requester:
    """Publishes with mosquitto_pub, and reads responses."""

    def __init__(self, broker: Mosquitto, answers: Subscriber) -> None:
        self._port = broker.port
        self._answers = answers

    async def publish(self, topic: str, payload: str | bytes = "", *options: str) -> None:
        command = [find_program("mosquitto_pub"), "-p", str(self._port), "-t", f"p/n/{topic}"]
        child = await asyncio.create_subprocess_exec(
            *command, "-s" if payload else "-n", "-q", "1", *options, stdin=asyncio.subprocess.PIPE
        )
        await child.communicate(payload.encode() if isinstance(payload, str) else payload)
        assert child.returncode == 0

    async def answer(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads((await self._answers.next()).split(" ", 3)[3])
        return fields

    async def ask(self, topic: str, payload: str | bytes = "", *options: str) -> dict[str, Any]:
        await self.publish(topic, payload, *options)
        return await self.answer()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  nothing to await
            await asyncio.sleep(0.01)


async def start(publisher: MqttPublisher, broker: Mosquitto) -> "asyncio.Task[None]":
    """Returns once the publisher has subscribed, which it does before it publishes `info`."""
    async with Subscriber(broker.port, topic="p/n/info") as subscriber:
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await subscriber.next()
    return running


def carried_out(
    folder: Path,
    script: Callable[[Requester, RecordingControl], Awaitable[None]],
    *,
    version: str = "3.1.1",
    lines: list[str] | None = None,
) -> list[Call]:
    """Run ``script`` against a publisher; returns what its control was asked to do."""
    control = make_control()
    statuses = StatusLog()

    async def main(broker: Mosquitto) -> None:
        publisher = MqttPublisher(
            config(broker.url, version=version),
            info=INFO,
            control=control,
            on_status=statuses,
        )
        async with Subscriber(broker.port, topic="+/n/response/#") as answers:
            running = await start(publisher, broker)
            await script(Requester(broker, answers), control)
        assert await publisher.close(5) == 0
        await running

    with mosquitto(folder) as broker:
        asyncio.run(main(broker))
    if lines is not None:
        lines += statuses.lines
    return control.calls


def test_request_is_answered(tmp_path: Path) -> None:
    """The transaction comes back, other keys are arguments; an empty payload is no argument."""

    async def script(requester: Requester, _: RecordingControl) -> None:
        assert await requester.ask("request/ping", '{"transaction": "t 1", "echo": ["é", 1]}') == {
            "schema": "stream_hbaf/response/1",
            "command": "ping",
            "status": "ok",
            "data": {"echo": ["é", 1]},
            "error": "",
            "transaction": "t 1",
        }
        assert (await requester.ask("request/flush"))["status"] == "ok"

    assert carried_out(tmp_path, script) == [
        Request(command="ping", arguments={"echo": ["é", 1]}, transaction="t 1"),
        Request(command="flush"),
    ]


def test_request_that_cannot_be_done(tmp_path: Path) -> None:
    """The response gives the reason, for a user's error and for a bug; the next one is served."""

    async def script(requester: Requester, _: RecordingControl) -> None:
        refused = await requester.ask("request/set_model", '{"transaction": "t"}')
        assert (refused["status"], refused["transaction"]) == ("error", "t")
        assert refused["error"] == "there is no such model; choose one of: live-en"
        failed = await requester.ask("request/reset")
        assert failed["error"] == "failed because of a bug (RuntimeError); the log says more"
        assert (await requester.ask("request/ping"))["status"] == "ok"

    assert len(carried_out(tmp_path, script)) == 3


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ("[1]", "the payload must be a JSON object, or nothing"),
        ("{", "the payload is not JSON in UTF-8"),
        ('{"a": NaN}', "the payload is not JSON in UTF-8"),
        ('{"a": "\\ud800"}', "the payload is not JSON in UTF-8"),
        (b'{"a": "\xff"}', "the payload is not JSON in UTF-8"),
        ("[" * 60_000, "the payload is not JSON in UTF-8"),
        ('{"transaction": 1}', "'transaction' must be text of at most 256 characters"),
        (" " * (MAX_PAYLOAD + 1), f"the payload is larger than {MAX_PAYLOAD} bytes"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_malformed_request(tmp_path: Path, payload: str | bytes, error: str) -> None:
    """The answer says what is wrong with it; nothing is done."""

    async def script(requester: Requester, _: RecordingControl) -> None:
        answer = await requester.ask("request/ping", payload)
        assert (answer["status"], answer["error"]) == ("error", error)

    assert carried_out(tmp_path, script) == []


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        ("request/Ping!", "", "the command must be a word in small letters"),
        ("m/listening/set", "yes", "a switch is set to ON or OFF"),
        ("m/volume/set", "ON", "there is no such switch; there are listening, transcribe, record"),
        ("x/record/set", "ON", "there is no such source; there are m"),
        ("x/feedback", '{"id": "u", "label": "joy"}', "there is no such source; there are m"),
        (
            "m/feedback",
            '{"id": "u"}',
            'a correction has an "id", and "label" or "speaker" or both; it may have "by"',
        ),
        ("m/feedback", "secret words", "the payload is not JSON in UTF-8"),
    ],
)
def test_malformed_without_answer(tmp_path: Path, topic: str, payload: str, reason: str) -> None:
    """What has no topic for an answer is one line with topic and reason, without its content."""
    lines: list[str] = []

    async def script(requester: Requester, _: RecordingControl) -> None:
        await requester.publish(topic, payload)
        await requester.ask("request/ping")

    assert carried_out(tmp_path, script, lines=lines) == [Request(command="ping")]
    assert lines == [f"refused: {f'p/n/{topic}'!r}: {reason}"]


def test_switches_and_corrections(tmp_path: Path) -> None:
    """They reach the control in order; unknown fields of a correction are ignored."""

    async def script(requester: Requester, _: RecordingControl) -> None:
        await requester.publish("m/listening/set", "OFF")
        await requester.publish("m/feedback", '{"id": "u1", "label": "joy", "by": "Zoë", "x": 1}')
        await requester.publish("m/feedback", '{"id": "u1", "speaker": "Ann"}')
        await requester.publish("m/record/set", "ON")
        await requester.ask("request/ping")

    assert carried_out(tmp_path, script)[:-1] == [
        ("m", "listening", False),
        Feedback(id="u1", label="joy", by="Zoë"),
        Feedback(id="u1", speaker="Ann"),
        ("m", "record", True),
    ]


def test_retained_commands(tmp_path: Path) -> None:
    """A retained switch counts once, though the broker repeats it at every connection; a
    retained request, which would come at every start, not at all."""
    control = make_control()
    statuses = StatusLog()

    async def main(broker: Mosquitto) -> None:
        publisher = MqttPublisher(
            config(broker.url),
            info=INFO,
            control=control,
            on_status=statuses,
        )
        async with Subscriber(broker.port, topic="p/n/response/#") as answers:
            requester = Requester(broker, answers)
            await requester.publish("m/listening/set", "OFF", "-r")
            await requester.publish("request/reset", "{}", "-r")
            running = await start(publisher, broker)
            await until(lambda: control.calls == [("m", "listening", False)])
            await requester.publish("m/listening/set", "ON")
            await until(lambda: len(control.calls) == 2)
        await asyncio.to_thread(broker.stop)
        await statuses.until(connected=False)
        await asyncio.to_thread(broker.start)
        await statuses.until(connected=True)
        await asyncio.sleep(0.3)
        await publisher.close(3)
        await running

    store = ("persistence true", f"persistence_location {tmp_path}/", "user root")
    with mosquitto(tmp_path, *store) as broker:
        asyncio.run(main(broker))
    assert control.calls == [("m", "listening", False), ("m", "listening", True)]
    assert "requests must not be retained" in statuses.lines[0]


def test_response_topic(tmp_path: Path) -> None:
    """With MQTT 5 the answer goes where the sender asks for it, with its correlation data."""

    async def main(broker: Mosquitto) -> str:
        publisher = MqttPublisher(
            config(broker.url, version="5"), info=INFO, control=make_control()
        )
        running = await start(publisher, broker)
        words = ["-p", str(broker.port), "-V", "5", "-t", "p/n/request/ping", "-e", "mine/here"]
        form = ["-F", "%t %D %C %p", "-W", "5", "-m", "", "-D", "publish", "correlation-data", "c7"]
        child = await asyncio.create_subprocess_exec(
            find_program("mosquitto_rr"), *words, *form, stdout=asyncio.subprocess.PIPE
        )
        answer, _ = await child.communicate()
        await publisher.close(3)
        await running
        return answer.decode()

    with mosquitto(tmp_path) as broker:
        topic, correlation, kind, payload = asyncio.run(main(broker)).split(" ", 3)
    assert (topic, correlation, kind) == ("mine/here", "c7", "application/json")
    assert json.loads(payload)["status"] == "ok"


@pytest.mark.parametrize("topic", ["p/n/available", "p/n/m/utterance", "$SYS/x"])
def test_response_topic_that_is_not_the_senders(tmp_path: Path, topic: str) -> None:
    """A response must not pass for another message of this node: it is an error instead."""

    async def script(requester: Requester, _: RecordingControl) -> None:
        answer = await requester.ask(
            "request/ping", "{}", "-V", "5", "-D", "publish", "response-topic", topic
        )
        assert answer["error"] == "the response topic must be one of yours, without wildcards"

    assert carried_out(tmp_path, script, version="5") == []


def test_too_many_requests(tmp_path: Path) -> None:
    """Of a flood a bounded number is queued; the rest is refused, counted, and reported in one
    line, and the recogniser goes on."""
    lines: list[str] = []
    flood = 1000

    async def script(requester: Requester, control: RecordingControl) -> None:
        control.pause_s = 0.01
        payload = "\n".join(json.dumps({"transaction": str(n)}) for n in range(flood))
        start = time.monotonic()
        command = [find_program("mosquitto_pub"), "-p", str(requester._port), "-q", "1", "-l"]
        child = await asyncio.create_subprocess_exec(
            *command, "-t", "p/n/request/ping", stdin=asyncio.subprocess.PIPE
        )
        await child.communicate(payload.encode())
        assert time.monotonic() - start < 5
        numbers = [int((await requester.answer())["transaction"]) for _ in range(MAX_QUEUED)]
        assert numbers == sorted(numbers)
        await requester.publish("request/flush")
        while (await requester.answer())["command"] != "flush":
            pass

    done = carried_out(tmp_path, script, lines=lines)
    answered = [request for request in done if isinstance(request, Request)]
    assert MAX_QUEUED <= len(answered) < flood
    assert len(lines) == 1
    assert f"{MAX_QUEUED} requests are queued already; try again later" in lines[0]
