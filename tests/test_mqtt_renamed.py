"""What an ended run left retained at the broker is cleared by the next one."""

import asyncio
import json
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

from mosquitto import Mosquitto, Subscriber, mosquitto
from mqtt_kit import INFO, config, utterance

from stream_hbaf.events import Status, Switch
from stream_hbaf.publish.mqtt import MqttPublisher

DISCOVERY = "homeassistant/device/p_n/config"


async def life(broker: Mosquitto, *, source: str, node: str = "n", **settings: object) -> None:
    """One run, with retained state of one source."""
    chosen = config(broker.url, **{"homeassistant": "homeassistant", "node": node, **settings})
    publisher = MqttPublisher(chosen, info=INFO.model_copy(update={"sources": [source]}))
    await publisher.connect()
    running = asyncio.create_task(publisher.run())
    await publisher.send(Status(source=source, stage="capture", state="online"))
    await publisher.send(utterance(1).model_copy(update={"source": source}))
    await asyncio.sleep(0.2)
    await publisher.close(3)
    await running


async def retained(broker: Mosquitto) -> dict[str, str]:
    """The payloads that the broker retains, by topic."""
    found: dict[str, str] = {}
    async with Subscriber(broker.port) as subscriber:
        await asyncio.sleep(0.3)
        try:
            while True:
                flag, _, topic, payload = (await subscriber.next(timeout_s=0.3)).split(" ", 3)
                assert flag == "1"
                found[topic] = payload
        except TimeoutError:
            return found


def own(node: str, source: str) -> set[str]:
    """The topics that a run of ``life`` retains, without discovery."""
    root = f"p/{node}"
    return {f"{root}/available", f"{root}/info", f"{root}/{source}/emotion"} | {
        f"{root}/{source}/status/capture"
    }


def entities(payload: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(payload)["cmps"]
    return found


def test_renamed_source(tmp_path: Path) -> None:
    """Nothing of the old name is left; Home Assistant is told once which entities are gone."""

    async def main(broker: Mosquitto) -> list[dict[str, str]]:
        await life(broker, source="kitchen")
        await life(broker, source="hall")
        second = await retained(broker)
        await life(broker, source="hall")
        return [second, await retained(broker)]

    with mosquitto(tmp_path) as broker:
        second, third = asyncio.run(main(broker))
    assert second.keys() == own("n", "hall") | {DISCOVERY} == third.keys()
    gone = {key: e for key, e in entities(second[DISCOVERY]).items() if "kitchen" in key}
    assert gone == {
        "kitchen_emotion": {"p": "sensor"},
        "kitchen_utterance": {"p": "event"},
        "kitchen_speech": {"p": "binary_sensor"},
        "kitchen_listening": {"p": "switch"},
        "kitchen_transcribe": {"p": "switch"},
        "kitchen_record": {"p": "switch"},
    }
    present = {key: e for key, e in entities(second[DISCOVERY]).items() if key not in gone}
    assert present == entities(third[DISCOVERY])
    assert set(present) == {"health"} | {key.replace("kitchen", "hall") for key in gone}


def test_renamed_node_and_no_discovery(tmp_path: Path) -> None:
    """A run under another name clears the old node and its device; one without discovery clears
    its own device."""

    async def main(broker: Mosquitto) -> list[dict[str, str]]:
        await life(broker, source="m", node="old")
        await life(broker, source="m", node="new")
        second = await retained(broker)
        await life(broker, source="m", node="new", homeassistant=None)
        return [second, await retained(broker)]

    with mosquitto(tmp_path) as broker:
        second, third = asyncio.run(main(broker))
    assert second.keys() == own("new", "m") | {"homeassistant/device/p_new/config"}
    assert third.keys() == own("new", "m")


def test_two_recognisers_are_no_renamed_one(tmp_path: Path) -> None:
    """Nodes that were seen running at the same time clear nothing of each other, ever."""

    async def main(broker: Mosquitto) -> dict[str, str]:
        first = MqttPublisher(config(broker.url, node="a"), info=INFO)
        await first.connect()
        running = asyncio.create_task(first.run())
        await life(broker, source="m", node="b")
        await first.close(3)
        await running
        await life(broker, source="m", node="a")
        await life(broker, source="m", node="b")
        return await retained(broker)

    with mosquitto(tmp_path) as broker:
        found = asyncio.run(main(broker))
    devices = {f"homeassistant/device/p_{node}/config" for node in "ab"}
    assert found.keys() == own("a", "m") | own("b", "m") | devices


def test_killed_run(tmp_path: Path) -> None:
    """What a killed run left is known too, also another run's at the same time."""
    script = """
        import asyncio, os, signal, sys
        from mqtt_kit import INFO, MqttPublisher, config, utterance
        async def main():
            publisher = MqttPublisher(config(sys.argv[1]), info=INFO)
            await publisher.connect()
            asyncio.create_task(publisher.run())
            await publisher.send(utterance(1))
            await asyncio.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """

    async def main(broker: Mosquitto) -> dict[str, str]:
        command = [sys.executable, "-c", textwrap.dedent(script), broker.url]
        child = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parent)
        assert await child.wait() == -signal.SIGKILL
        assert "p/n/m/emotion" in await retained(broker)
        await life(broker, source="other", homeassistant=None)
        return await retained(broker)

    with mosquitto(tmp_path) as broker:
        assert asyncio.run(main(broker)).keys() == own("n", "other")


def test_another_brokers_topics_stay(tmp_path: Path) -> None:
    """A run clears only what was left at its own broker."""

    async def main(first: Mosquitto, second: Mosquitto) -> dict[str, str]:
        await life(first, source="kitchen")
        await life(second, source="hall", node="other")
        return await retained(first)

    with mosquitto(tmp_path) as first, mosquitto(tmp_path) as second:
        found = asyncio.run(main(first, second))
    assert found.keys() == own("n", "kitchen") | {DISCOVERY}


def test_source_that_leaves_while_others_stay(tmp_path: Path) -> None:
    """Its topics are cleared, Home Assistant is told, and requests know who is there."""
    two, one = (INFO.model_copy(update={"sources": names}) for names in (["a", "b"], ["b"]))

    async def main(broker: Mosquitto) -> dict[str, str]:
        chosen = config(broker.url, homeassistant="homeassistant")
        publisher = MqttPublisher(chosen, info=INFO.model_copy(update={"sources": []}))
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(two)
        for source in two.sources:
            await publisher.send(Status(source=source, stage="capture", state="online"))
            await publisher.send(Switch(source=source, switch="listening", on=True))
            await publisher.send(utterance(1).model_copy(update={"source": source}))
        await publisher.send(one)
        await asyncio.sleep(0.3)
        found = await retained(broker)
        await publisher.close(3)
        await running
        return found

    with mosquitto(tmp_path) as broker:
        found = asyncio.run(main(broker))
    assert found.keys() == own("n", "b") | {"p/n/b/listening/state", DISCOVERY}
    assert json.loads(found["p/n/info"])["sources"] == ["b"]
    assert entities(found[DISCOVERY])["a_emotion"] == {"p": "sensor"}
    assert entities(found[DISCOVERY])["b_emotion"]["name"] == "b emotion"
