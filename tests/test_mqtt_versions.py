"""MQTT 5 and MQTT over WebSocket, against a real mosquitto."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from mosquitto import (
    Mosquitto,
    Subscriber,
    find_program,
    free_port,
    make_certificates,
    mosquitto,
    require_mosquitto,
)
from mqtt_kit import INFO, config, partial, send_all, utterance, utterance_ids

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError
from stream_hbaf.events import Speech, Status
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.publish.mqtt import MqttPublisher


async def life(settings: MqttConfig) -> None:
    """One publisher, from its start to its end."""
    publisher = MqttPublisher(settings, info=INFO, traceparent=lambda end: f"00-{end.id}-01")
    await publisher.connect()
    running = asyncio.create_task(publisher.run())
    await publisher.send(utterance(1))
    await publisher.send(partial(1))
    await send_all(
        publisher, Speech(source="m", on=True), Status(source="m", stage="vad", state="online")
    )
    await asyncio.sleep(0.2)
    assert await publisher.close(3) == 0
    await running


async def until_listening(port: int) -> None:
    """mosquitto opens one listener after the other."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.01)


# Content type, payload format (1: text), expiry in seconds, and user properties.
PROPERTIES = {
    "available": "text/plain 1  ",
    "info": "application/json 1  schema:stream_hbaf/info/1",
    "m/utterance": "application/json 1  schema:stream_hbaf/utterance/1 source:m speaker:Zoë "
    "traceparent:00-u1-01",
    "m/emotion": "text/plain 1  source:m",
    "m/partial": "application/json 1 10 schema:stream_hbaf/partial/1 source:m",
    "m/speech": "text/plain 1 10 source:m",
    "m/status/vad": "text/plain 1  source:m",
}


def test_properties_of_mqtt_5(tmp_path: Path) -> None:
    """Content type, payload format, expiry of what passes, who and what it is about, its trace."""

    async def main(broker: Mosquitto) -> dict[str, str]:
        found: dict[str, str] = {}
        watching = await asyncio.create_subprocess_exec(
            *("stdbuf", "-oL", find_program("mosquitto_sub"), "-p", str(broker.port)),
            *("-V", "5", "-q", "1", "-t", "p/n/#", "-F", "%t %C %F %E %P"),
            stdout=asyncio.subprocess.PIPE,
        )
        assert watching.stdout
        await asyncio.sleep(0.2)
        await life(config(broker.url, version="5"))
        async with asyncio.timeout(5):
            while found.keys() != PROPERTIES.keys():
                line = (await watching.stdout.readline()).decode().rstrip("\n")
                topic, _, properties = line.partition(" ")
                found[topic.removeprefix("p/n/")] = properties
        watching.kill()
        await watching.wait()
        return found

    with mosquitto(tmp_path) as broker:
        assert asyncio.run(main(broker)) == PROPERTIES


@pytest.mark.parametrize("version", ["3.1.1", "5"])
def test_over_websocket(tmp_path: Path, version: str) -> None:
    """A broker that is reached through a web server's port, with either version."""
    port = free_port()

    async def main(broker: Mosquitto) -> list[str]:
        await until_listening(port)
        async with Subscriber(broker.port, topic="p/n/#") as subscriber:
            await life(config(f"ws://127.0.0.1:{port}/mqtt", version=version))
            return await subscriber.until("stopped")

    with mosquitto(tmp_path, f"listener {port} 127.0.0.1", "protocol websockets") as broker:
        lines = asyncio.run(main(broker))
    assert utterance_ids(lines) == ["u1"]


def test_over_websocket_with_tls(tmp_path: Path) -> None:
    """wss:// needs a trusted certificate, like mqtts://."""
    require_mosquitto()
    made = make_certificates(tmp_path)
    port = free_port()
    listener = (
        f"listener {port} 127.0.0.1",
        "protocol websockets",
        f"certfile {made.localhost}",
        f"keyfile {made.key}",
        "user root",
    )

    async def main(broker: Mosquitto) -> str:
        url = f"wss://localhost:{port}"
        await until_listening(port)
        with pytest.raises(BrokerError, match=r"not trusted.*set mqtt.ca_file"):
            await life(config(url))
        async with Subscriber(broker.port, topic="p/n/available") as subscriber:
            await life(config(url, ca_file=made.authority))
            return (await subscriber.until("stopped"))[-1]

    with mosquitto(tmp_path, *listener) as broker:
        assert asyncio.run(main(broker)) == "0 1 p/n/available stopped"


def test_over_websocket_where_there_is_none(tmp_path: Path) -> None:
    """A port without WebSocket is one line that says what to check."""

    with mosquitto(tmp_path) as broker:
        url = f"ws://127.0.0.1:{broker.port}"
        with pytest.raises(BrokerError, match=f"^{url}/mqtt: listens, but .*the path of ws://"):
            asyncio.run(life(config(url)))


def test_mqtt_5_with_a_broker_of_3_1_1() -> None:
    """One line says which version to set."""
    port = free_port()

    async def main() -> None:
        async with embedded_broker(port) as broker:
            await life(config(broker.url, version="5"))

    with pytest.raises(BrokerError, match=r"set mqtt\.version to 3\.1\.1"):
        asyncio.run(main())
