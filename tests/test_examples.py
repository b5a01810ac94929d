"""Each example runs unchanged, against a real broker."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jinja2
import pytest
import yaml
from mosquitto import Mosquitto, Subscriber, mosquitto

from stream_hbaf.config import MqttConfig
from stream_hbaf.events import Emotion, Utterance
from stream_hbaf.publish.connection import close_client, open_client
from stream_hbaf.publish.messages import find_topic, messages

EXAMPLES = Path(__file__).parent.parent / "examples"
AUTOMATION = yaml.safe_load((EXAMPLES / "homeassistant.yaml").read_text(encoding="utf-8"))


def utterance(
    text: str, *, turn: int, label: str | None, kind: Literal["new", "update", "end"] = "end"
) -> Utterance:
    return Utterance(
        id=f"d-{turn}",
        rev=3 if kind == "end" else 1,
        type=kind,
        source="microphone",
        dialogue_id="d",
        turn=turn,
        speaker="Zoë",
        start_time="2026-01-02T03:04:05.600+00:00",
        audio_start_ms=0.0,
        text=text,
        emotion=Emotion(label=label, score=1.0, set=[label], probabilities={label: 1.0})
        if label
        else None,
    )


EVENTS = (
    utterance("", turn=2, label=None, kind="new"),
    utterance("I lost", turn=2, label="neutral", kind="update"),
    utterance("I lost my “key” 🔑", turn=2, label="sadness"),
    utterance("", turn=3, label=None),
    utterance("Here it is!", turn=4, label="joy"),
)
FIRST = utterance("Hello.", turn=1, label="neutral")  # retained: comes once we have subscribed
REPEATED = (*EVENTS[:3], EVENTS[2], *EVENTS[3:])  # as after a broken connection
LINES = ["Zoë\tsadness\tI lost my “key” 🔑", "Zoë\tjoy\tHere it is!"]


async def publish(broker: Mosquitto, *events: Utterance, retain: bool = False) -> None:
    client = await open_client(MqttConfig(url=broker.url))
    for event in events:
        message = replace(messages(event, prefix="stream_hbaf", node="kitchen")[0], retain=retain)
        await client.publish(message.topic, message.payload, message.qos, message.retain)
    await close_client(client)


@asynccontextmanager
async def running(*command: str | Path) -> Any:
    """The example as a process of its own; all that it started ends with it."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        yield process.stdout
    finally:
        os.killpg(process.pid, 9)
        await process.wait()


async def shown(
    broker: Mosquitto, *command: str | Path, events: tuple[Utterance, ...] = EVENTS
) -> list[str]:
    """The lines that the example prints for the events."""
    await publish(broker, FIRST, retain=True)
    async with running(*command) as out, asyncio.timeout(30):
        assert await out.readline() == "Zoë\tneutral\tHello.\n".encode()
        await publish(broker, *events)
        return [(await out.readline()).decode().rstrip("\n") for _ in LINES]


def test_python_example(tmp_path: Path) -> None:
    """The client's ten lines print who feels what, each utterance once."""
    with mosquitto(tmp_path) as broker:
        command = (sys.executable, EXAMPLES / "listen.py", broker.url)
        assert asyncio.run(shown(broker, *command, events=REPEATED)) == LINES


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq: apt-get install jq")
def test_shell_example(tmp_path: Path) -> None:
    """mosquitto_sub and jq print who feels what."""
    with mosquitto(tmp_path) as broker:
        command = (EXAMPLES / "listen.sh", "-p", str(broker.port))
        assert asyncio.run(shown(broker, *command)) == LINES


def test_node_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node prints who feels what, each utterance once."""
    # Where Debian's node-mqtt is; a node that isn't Debian's doesn't look there.
    places = filter(None, (os.environ.get("NODE_PATH"), "/usr/share/nodejs"))
    monkeypatch.setenv("NODE_PATH", os.pathsep.join(places))
    if shutil.which("node") is None:
        pytest.skip("needs node: apt-get install nodejs")
    if subprocess.run(
        ["node", "-e", "require('mqtt')"], cwd=EXAMPLES, capture_output=True
    ).returncode:
        pytest.skip(
            "needs mqtt for node: apt-get install node-mqtt, or npm install mqtt and set NODE_PATH"
        )
    with mosquitto(tmp_path) as broker:
        command = ("node", EXAMPLES / "listen.js", broker.url)
        assert asyncio.run(shown(broker, *command, events=REPEATED)) == LINES


def test_homeassistant_example_is_an_automation() -> None:
    """Nothing but the keys that Home Assistant knows, and a topic that we publish."""
    (automation,) = AUTOMATION
    assert set(automation) == {"alias", "triggers", "conditions", "actions", "mode"}
    (trigger,) = automation["triggers"]
    assert set(trigger) == {"trigger", "topic", "value_template", "payload"}
    assert trigger["trigger"] == "mqtt"
    topic, levels = find_topic(trigger["topic"]) or pytest.fail(trigger["topic"])
    assert (topic.name, levels["prefix"]) == ("utterance", "stream_hbaf")
    (action,) = automation["actions"]
    assert set(action) == {"action", "target", "data"}


def test_homeassistant_example_acts_on_sadness_only(tmp_path: Path) -> None:
    """Its templates, given what arrived from the broker, are true for one message of five."""
    (automation,) = AUTOMATION
    (trigger,) = automation["triggers"]

    async def arrived(broker: Mosquitto) -> list[Any]:
        async with Subscriber(broker.port, topic=trigger["topic"]) as subscriber:
            await publish(broker, *EVENTS)
            return [json.loads((await subscriber.next()).split(" ", 3)[3]) for _ in EVENTS]

    with mosquitto(tmp_path) as broker:
        found = asyncio.run(arrived(broker))

    def renders(template: str, **known: Any) -> str:
        return (
            jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template).render(known)
        )

    texts = []
    for payload in found:
        if renders(trigger["value_template"], value_json=payload) != trigger["payload"]:
            continue
        (condition,) = automation["conditions"]
        if renders(condition, trigger={"payload_json": payload}) == "True":
            texts.append(payload["text"])
        revised = {**payload, "revision": 1}  # of what the light has shown already
        assert renders(condition, trigger={"payload_json": revised}) == "False"
    assert texts == ["I lost my “key” 🔑"]
