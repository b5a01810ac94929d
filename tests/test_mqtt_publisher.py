"""The publisher against a real mosquitto: nothing finished is lost, whatever the broker does."""

import asyncio
import contextlib
import json
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from mosquitto import (
    Mosquitto,
    Subscriber,
    free_port,
    make_certificates,
    mosquitto,
    password_file,
    require_mosquitto,
)
from mqtt_kit import INFO, config, send_all, utterance

from stream_hbaf.client import follow
from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, ConfigError
from stream_hbaf.events import Status, Utterance
from stream_hbaf.publish.messages import messages
from stream_hbaf.publish.mqtt import MqttPublisher


def test_payload_on_the_wire(tmp_path: Path) -> None:
    """What another program receives is what `messages` says, and a life ends with `stopped`."""

    async def main(broker: Mosquitto) -> list[str]:
        publisher = MqttPublisher(config(broker.url), info=INFO)
        async with Subscriber(broker.port) as subscriber:
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            await send_all(
                publisher,
                Status(source="m", stage="vad", state="online"),
                utterance(1),
                utterance(2),
                utterance(3, label="anger"),
            )
            assert await publisher.close(3) == 0
            await running
            return await subscriber.until("stopped")

    with mosquitto(tmp_path) as broker:
        lines = asyncio.run(main(broker))
    payloads = [
        messages(utterance(n, label=label), prefix="p", node="n")[0].payload.decode()
        for n, label in ((1, "joy"), (2, "joy"), (3, "anger"))
    ]
    assert lines == [
        "0 1 p/n/available online",
        f"0 1 p/n/info {messages(INFO, prefix='p', node='n')[0].payload.decode()}",
        "0 1 p/n/m/status/vad online",
        f"0 1 p/n/m/utterance {payloads[0]}",
        "0 1 p/n/m/emotion joy",
        f"0 1 p/n/m/utterance {payloads[1]}",
        f"0 1 p/n/m/utterance {payloads[2]}",
        "0 1 p/n/m/emotion anger",
        "0 1 p/n/available stopped",
    ]


def test_a_revision_changes_the_emotion_of_the_newest_utterance_only(tmp_path: Path) -> None:
    """Each revised `end` is published; `emotion` is that of what was said last."""

    def revised(turn: int, label: str) -> Utterance:
        return utterance(turn, label=label).model_copy(update={"rev": 3, "revision": 1})

    async def main(broker: Mosquitto) -> list[str]:
        publisher = MqttPublisher(config(broker.url), info=INFO)
        async with Subscriber(broker.port, topic="p/n/m/#") as subscriber:
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            await send_all(
                publisher,
                utterance(1),
                utterance(2, label="anger"),
                revised(1, "fear"),
                revised(2, "sadness"),
                utterance(3, label="sadness"),
                utterance(4, label="surprise"),
            )
            await publisher.close(3)
            await running
            return await subscriber.until("p/n/m/emotion surprise")

    with mosquitto(tmp_path) as broker:
        lines = asyncio.run(main(broker))
    heard = [line.split(" ", 3) for line in lines]
    assert [
        word if topic.endswith("emotion") else json.loads(word)["id"] for _, _, topic, word in heard
    ] == ["u1", "joy", "u2", "anger", "u1", "u2", "sadness", "u3", "u4", "surprise"]


def test_last_will_after_kill(tmp_path: Path) -> None:
    """A recogniser that is killed is `offline`, also for later subscribers."""
    script = """
        import asyncio, sys
        from mqtt_kit import INFO, MqttPublisher, config
        async def main():
            publisher = MqttPublisher(config(sys.argv[1]), info=INFO)
            await publisher.connect()
            await publisher.run()
        asyncio.run(main())
    """

    async def main(broker: Mosquitto) -> str:
        async with Subscriber(broker.port, topic="p/n/available") as subscriber:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                textwrap.dedent(script),
                broker.url,
                cwd=Path(__file__).parent,
            )
            assert await subscriber.next(timeout_s=30) == "0 1 p/n/available online"
            child.send_signal(signal.SIGKILL)
            await child.wait()
            assert await subscriber.next() == "0 1 p/n/available offline"
        async with Subscriber(broker.port, topic="p/n/available") as late:
            return await late.next()

    with mosquitto(tmp_path) as broker:
        assert asyncio.run(main(broker)) == "1 1 p/n/available offline"


async def connect(settings: MqttConfig) -> None:
    publisher = MqttPublisher(settings, info=INFO)
    await publisher.connect()
    await publisher.close(2)


def test_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right password is accepted; a wrong or missing one is one line that leaves it out."""
    require_mosquitto()
    file = password_file(tmp_path, user="eve", password="right")
    tmp_path.chmod(0o755)
    with mosquitto(tmp_path, f"password_file {file}", "user root") as broker:
        asyncio.run(connect(config(broker.url, username="eve", password="right")))
        with pytest.raises(BrokerError, match="refuses user 'eve' or the password") as caught:
            asyncio.run(connect(config(broker.url, username="eve", password="wrong")))
        assert "wrong" not in str(caught.value)
        assert broker.url in str(caught.value)
        with pytest.raises(BrokerError, match=r"set mqtt.username and STREAM_HBAF_MQTT__PASSWORD"):
            asyncio.run(connect(config(broker.url)))


def test_tls(tmp_path: Path) -> None:
    """TLS needs a certificate for the name used, from an authority that is trusted."""
    require_mosquitto()
    made = make_certificates(tmp_path)
    tls = (f"keyfile {made.key}", "user root")
    with mosquitto(tmp_path, f"certfile {made.localhost}", *tls) as broker:
        url = f"mqtts://localhost:{broker.port}"
        asyncio.run(connect(config(url, ca_file=made.authority)))
        with pytest.raises(BrokerError, match=r"not trusted.*set mqtt.ca_file"):
            asyncio.run(connect(config(url)))
        with pytest.raises(ConfigError, match=r"absent.pem: No such file"):
            asyncio.run(connect(config(url, ca_file=tmp_path / "absent.pem")))
        with pytest.raises(ConfigError, match="not a PEM certificate"):
            asyncio.run(connect(config(url, ca_file=Path(__file__))))
    with mosquitto(tmp_path, f"certfile {made.elsewhere}", *tls) as broker:
        url = f"mqtts://localhost:{broker.port}"
        with pytest.raises(BrokerError, match="certificate is not for 'localhost'"):
            asyncio.run(connect(config(url, ca_file=made.authority)))
    with mosquitto(tmp_path) as broker, pytest.raises(BrokerError, match="does not speak TLS"):
        asyncio.run(connect(config(f"mqtts://localhost:{broker.port}")))


def test_client_certificate(tmp_path: Path) -> None:
    """A client certificate is sent if the broker asks; without one the line says what to set."""
    require_mosquitto()
    made = make_certificates(tmp_path)
    tls = (f"certfile {made.localhost}", f"keyfile {made.key}", f"cafile {made.authority}")
    with mosquitto(tmp_path, *tls, "require_certificate true", "user root") as broker:
        url, ca = f"mqtts://localhost:{broker.port}", made.authority
        asyncio.run(connect(config(url, ca_file=ca, certificate=made.localhost, key=made.key)))
        with pytest.raises(BrokerError, match=r"and mqtt\.certificate$"):
            asyncio.run(connect(config(url, ca_file=ca)))
        with pytest.raises(ConfigError, match=r"mqtt.certificate: .*or mqtt.key is not its key"):
            asyncio.run(connect(config(url, ca_file=ca, certificate=made.localhost)))


def test_no_broker() -> None:
    """A closed port and an unknown host are different messages, with the address."""
    port = free_port()
    with pytest.raises(BrokerError, match=f"^mqtt://127.0.0.1:{port}: nothing listens there"):
        asyncio.run(connect(config(f"mqtt://127.0.0.1:{port}")))
    with pytest.raises(BrokerError, match=r"no host 'broker\.invalid' is known"):
        asyncio.run(connect(config("mqtt://broker.invalid")))


def test_no_answer() -> None:
    """Something that accepts and says nothing is no MQTT broker, after 5 s."""

    async def main() -> None:
        silent = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        await connect(config(f"mqtt://127.0.0.1:{port}"))

    with pytest.raises(BrokerError, match="does not answer as an MQTT broker"):
        asyncio.run(main())


def test_close_after_run_was_cancelled(tmp_path: Path) -> None:
    """A cancelled publisher still delivers its utterances, and publishes `stopped`."""

    async def main(broker: Mosquitto) -> list[str]:
        publisher = MqttPublisher(config(broker.url), info=INFO)
        async with Subscriber(broker.port) as subscriber:
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            await asyncio.sleep(0.1)
            await publisher.send(utterance(1))
            running.cancel()
            await asyncio.wait({running})
            assert running.cancelled()
            assert await publisher.close(3) == 0
            return await subscriber.until("stopped")

    with mosquitto(tmp_path) as broker:
        lines = asyncio.run(main(broker))
    assert sum("/utterance " in line for line in lines) >= 1
    assert lines[-1] == "0 1 p/n/available stopped"


def test_transcript_of_a_million_characters(tmp_path: Path) -> None:
    """It arrives whole, and what follows it too."""
    words = "“word” " * 150_000

    async def main(broker: Mosquitto) -> list[bytes]:
        publisher = MqttPublisher(config(broker.url), info=INFO)
        settings = config(broker.url)
        received = follow(settings, topic="p/n/m/utterance", on_status=lambda *_: None)
        async with contextlib.aclosing(received):
            receiving = asyncio.ensure_future(anext(received))
            await asyncio.sleep(0.2)
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            await send_all(publisher, utterance(1).model_copy(update={"text": words}), utterance(2))
            first = await receiving
            second = await anext(received)
            await publisher.close(3)
            await running
        return [first.payload, second.payload]

    with mosquitto(tmp_path) as broker:
        long, short = asyncio.run(main(broker))
    assert json.loads(long)["text"] == words
    assert json.loads(short)["id"] == "u2"
