"""The publisher against a real mosquitto: nothing finished is lost, whatever the broker does."""

import asyncio
import json
import signal
import sys
import textwrap
import time
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

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, ConfigError
from stream_hbaf.events import Emotion, Info, Model, Partial, Speech, Status, Utterance
from stream_hbaf.publish import mqtt
from stream_hbaf.publish.mqtt import MqttPublisher, messages

INFO = Info(
    version="0", model=Model(id="b", sha256="c"), labels=["joy"], licence="MIT", sources=["m"]
)


def emotion(label: str) -> Emotion:
    return Emotion(label=label, score=0.9, abstained=False, set=[label], probabilities={label: 0.9})


def utterance(turn: int, *, label: str | None = "joy") -> Utterance:
    return Utterance(
        id=f"u{turn}",
        rev=2,
        type="end",
        source="m",
        dialogue_id="d",
        turn=turn,
        speaker="Zoë",
        start_time="t",
        audio_start_ms=0.0,
        text=f"“{turn}”",
        emotion=emotion(label) if label else None,
    )


def partial(number: int) -> Partial:
    return Partial(
        id="u",
        source="m",
        dialogue_id="d",
        speaker="",
        text=str(number),
        modalities=["text"],
        emotion=emotion("joy"),
    )


def config(url: str, **settings: object) -> MqttConfig:
    return MqttConfig.model_validate({"url": url, "prefix": "p", "node": "n", **settings})


async def until_said(said: list[tuple[bool, str]], *, connected: bool) -> None:
    async with asyncio.timeout(10):
        while [last for last, _ in said[-1:]] != [connected]:  # noqa: ASYNC110  no event to await
            await asyncio.sleep(0.01)


async def send_all(publisher: MqttPublisher, *events: Utterance | Status | Speech) -> None:
    for event in events:
        await publisher.send(event)


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
            assert await publisher.close(3) is None
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


def test_last_will_after_kill(tmp_path: Path) -> None:
    """A recogniser that is killed is `offline`, also for whoever subscribes later."""
    script = """
        import asyncio, sys
        from test_mqtt_publisher import INFO, MqttPublisher, config
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
    """The right password is let in; a wrong or missing one is told in a line without it."""
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


def test_no_broker() -> None:
    """Nobody listening, and no such host, are told apart, with the address."""
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


def test_broker_restarts(tmp_path: Path) -> None:
    """Five restarts during 200 utterances: each `end` arrives, in order, none lost."""
    said: list[tuple[bool, str]] = []

    async def restart(broker: Mosquitto) -> None:
        for _ in range(5):
            await asyncio.sleep(0.8)
            await asyncio.to_thread(broker.stop)
            await asyncio.to_thread(broker.start)

    async def main(broker: Mosquitto) -> list[tuple[str, int]]:
        publisher = MqttPublisher(
            config(broker.url, outbox=20), info=INFO, on_status=lambda *status: said.append(status)
        )
        seen: list[tuple[str, int]] = []
        async with Subscriber(broker.port, topic="p/n/m/utterance", session="s") as subscriber:
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            restarting = asyncio.create_task(restart(broker))
            for turn in range(200):
                await publisher.send(utterance(turn))
                await asyncio.sleep(0.02)
            await restarting
            while len(seen) < 200:
                payload = json.loads((await subscriber.next()).split(" ", 3)[3])
                if (key := (payload["id"], payload["rev"])) not in seen:
                    seen.append(key)
            await publisher.close(3)
            await running
        return seen

    store = ("persistence true", f"persistence_location {tmp_path}/", "user root")
    with mosquitto(tmp_path, *store, "max_queued_messages 0") as broker:
        seen = asyncio.run(main(broker))
    assert seen == [(f"u{turn}", 2) for turn in range(200)]
    assert [connected for connected, _ in said].count(False) >= 5


def test_partials_while_disconnected(tmp_path: Path) -> None:
    """While the broker is away old partials give way to new ones, counted; utterances wait."""
    said: list[tuple[bool, str]] = []

    async def main(broker: Mosquitto) -> tuple[list[str], int]:
        publisher = MqttPublisher(
            config(broker.url), info=INFO, on_status=lambda *status: said.append(status)
        )
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(Speech(source="m", on=True))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(broker.stop)
        await until_said(said, connected=False)
        for number in range(mqtt.DROPPABLE + 5):
            await publisher.send(partial(number))
        await send_all(publisher, Speech(source="m", on=False), utterance(1))
        dropped = publisher.dropped
        await asyncio.to_thread(broker.start)
        async with Subscriber(broker.port) as subscriber:
            await publisher.close(5)
            await running
            return await subscriber.until("stopped"), dropped

    with mosquitto(tmp_path) as broker:
        lines, dropped = asyncio.run(main(broker))
    texts = [json.loads(line.split(" ", 3)[3])["text"] for line in lines if "/partial " in line]
    assert dropped == 6  # five partials, and one more for the speech message
    assert texts == [str(number) for number in range(6, mqtt.DROPPABLE + 5)]
    assert [line for line in lines if line.endswith(("ON", "OFF"))] == ["0 0 p/n/m/speech OFF"]
    assert sum("/utterance " in line for line in lines) == 1


def test_full_outbox_holds_the_sender_back(tmp_path: Path) -> None:
    """With the outbox full `send` waits; who is cancelled while waiting loses nothing."""

    async def main(broker: Mosquitto) -> Path | None:
        publisher = MqttPublisher(config(broker.url, outbox=3), info=INFO)
        await send_all(publisher, utterance(1), utterance(2))  # and one emotion
        waiting = asyncio.create_task(publisher.send(utterance(3)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait({waiting})
        async with Subscriber(broker.port, topic="p/n/m/utterance") as subscriber:
            await publisher.connect()
            kept = await publisher.close(3)
            ids = [json.loads((await subscriber.next()).split(" ", 3)[3])["id"] for _ in range(3)]
        assert ids == ["u1", "u2", "u3"]
        return kept

    with mosquitto(tmp_path) as broker:
        assert asyncio.run(main(broker)) is None


@pytest.mark.parametrize("silence", ["stopped", "paused"])
def test_close_without_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silence: str
) -> None:
    """What can't be delivered in time is in a private file, in order, and a line says where."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    said: list[tuple[bool, str]] = []

    async def main(broker: Mosquitto) -> Path | None:
        publisher = MqttPublisher(
            config(broker.url), info=INFO, on_status=lambda *status: said.append(status)
        )
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await asyncio.sleep(0.2)
        if silence == "stopped":
            await asyncio.to_thread(broker.stop)
        else:
            broker.pause()
        await send_all(publisher, utterance(1), utterance(2))
        kept = await publisher.close(1.0)
        await running
        return kept

    with mosquitto(tmp_path) as broker:
        start = time.monotonic()
        path = asyncio.run(main(broker))
        assert time.monotonic() - start < 2.0
    assert path is not None
    assert path.parent == tmp_path / "state" / "stream_hbaf"
    assert path.stat().st_mode & 0o777 == 0o600
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["topic"], json.loads(line["payload"])["id"]) for line in kept] == [
        ("p/n/m/utterance", "u1"),
        ("p/n/m/utterance", "u2"),
    ]
    assert said[-1] == (False, f"2 messages not delivered; they are in {path}")


def test_close_after_run_was_cancelled(tmp_path: Path) -> None:
    """A pipeline that is torn down still delivers what it had finished, and says `stopped`."""

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
            assert await publisher.close(3) is None
            return await subscriber.until("stopped")

    with mosquitto(tmp_path) as broker:
        lines = asyncio.run(main(broker))
    assert sum("/utterance " in line for line in lines) >= 1
    assert lines[-1] == "0 1 p/n/available stopped"


def test_state_is_back_after_a_restart(tmp_path: Path) -> None:
    """A broker that forgot everything shows the retained state again once it is back."""
    said: list[tuple[bool, str]] = []

    async def main(broker: Mosquitto) -> set[str]:
        publisher = MqttPublisher(
            config(broker.url), info=INFO, on_status=lambda *status: said.append(status)
        )
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(Status(source="m", stage="vad", state="degraded"))
        await publisher.send(utterance(1, label="fear"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(broker.stop)
        await until_said(said, connected=False)
        await asyncio.to_thread(broker.start)
        await until_said(said, connected=True)
        await asyncio.sleep(0.2)
        async with Subscriber(broker.port) as late:
            retained = {await late.next() for _ in range(4)}
        await publisher.close(3)
        await running
        return retained

    with mosquitto(tmp_path) as broker:
        retained = asyncio.run(main(broker))
    assert retained == {
        "1 1 p/n/available online",
        f"1 1 p/n/info {messages(INFO, prefix='p', node='n')[0].payload.decode()}",
        "1 1 p/n/m/status/vad degraded",
        "1 1 p/n/m/emotion fear",
    }
