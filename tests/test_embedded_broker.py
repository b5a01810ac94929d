"""The broker inside the recogniser, and `watch`, against mosquitto's own clients."""

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import TextIO

import pytest
from conftest import RECORDINGS
from mosquitto import (
    Subscriber,
    find_program,
    free_port,
    mosquitto,
    password_file,
    require_mosquitto,
)
from mqtt_kit import INFO, StatusLog, config, partial, utterance
from recording_control import RecordingControl

from stream_hbaf.cli import main
from stream_hbaf.client import follow
from stream_hbaf.errors import BrokerError
from stream_hbaf.events import Request, Status
from stream_hbaf.publish.broker import LocalBroker, embedded_broker
from stream_hbaf.publish.connection import Received
from stream_hbaf.publish.messages import messages
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.publish.terminal import human_line, json_line, watch

SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"


async def publish(port: int, topic: str, payload: str, *options: str) -> None:
    """With QoS 1: amqtt may lose a QoS 0 message whose sender hangs up at once."""
    words = ["-p", str(port), "-t", topic, "-m", payload, "-q", "1", *options]
    child = await asyncio.create_subprocess_exec(find_program("mosquitto_pub"), *words)
    assert await child.wait() == 0


def test_embedded_round_trip() -> None:
    """mosquitto_sub sees the publisher's whole life through our own broker, last state kept."""
    require_mosquitto()
    port = free_port()

    async def main() -> tuple[LocalBroker, list[str], set[str]]:
        async with embedded_broker(port) as broker:
            publisher = MqttPublisher(config(broker.url), info=INFO)
            async with Subscriber(port) as subscriber:
                await publisher.connect()
                running = asyncio.create_task(publisher.run())
                await publisher.send(Status(source="m", stage="vad", state="online"))
                await publisher.send(utterance(1))
                await publisher.close(3)
                await running
                lines = await subscriber.until("stopped")
            async with Subscriber(port) as late:
                return broker, lines, {await late.next() for _ in range(4)}

    broker, lines, retained = asyncio.run(main())
    info = messages(INFO, prefix="p", node="n")[0].payload.decode()
    payload = messages(utterance(1), prefix="p", node="n")[0].payload.decode()
    assert broker == LocalBroker(f"mqtt://127.0.0.1:{port}", started=True)
    assert lines == [
        "0 1 p/n/available online",
        f"0 1 p/n/info {info}",
        "0 1 p/n/m/status/vad online",
        f"0 1 p/n/m/utterance {payload}",
        "0 1 p/n/m/emotion joy",
        "0 1 p/n/available stopped",
    ]
    assert retained == {
        "1 1 p/n/available stopped",
        f"1 1 p/n/info {info}",
        "1 1 p/n/m/status/vad online",
        "1 1 p/n/m/emotion joy",
    }


def test_embedded_takes_requests() -> None:
    """What others ask for reaches us through our own broker too, and the answer them."""
    require_mosquitto()
    port = free_port()
    control = RecordingControl()

    async def main() -> str:
        async with embedded_broker(port) as broker:
            publisher = MqttPublisher(config(broker.url), info=INFO, control=control)
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            async with Subscriber(port, topic="p/n/response/+") as subscriber:
                await asyncio.sleep(0.3)
                await publish(port, "p/n/m/record/set", "ON")
                await publish(port, "p/n/request/ping", '{"transaction":"t"}')
                answer = await subscriber.next()
            await publisher.close(3)
            await running
            return answer

    answer = asyncio.run(main())
    assert answer.startswith("0 1 p/n/response/ping ")
    assert json.loads(answer.split(" ", 3)[3])["transaction"] == "t"
    assert control.calls == [("m", "record", True), Request(command="ping", transaction="t")]


def test_embedded_forwards_everything_before_it_ends() -> None:
    """Hundreds of utterances and `stopped` reach a subscriber though the broker ends at once."""
    require_mosquitto()
    port = free_port()

    async def main() -> list[str]:
        async with embedded_broker(port) as broker:
            subscriber = await Subscriber(port).__aenter__()
            publisher = MqttPublisher(config(broker.url), info=INFO)
            for turn in range(300):
                await publisher.send(utterance(turn))
            assert await publisher.close(3) == 0
        try:
            return await subscriber.until("stopped")
        finally:
            await subscriber.__aexit__()

    lines = asyncio.run(main())
    received = [json.loads(line.split(" ", 3)[3])["turn"] for line in lines if "/utter" in line]
    assert received == list(range(300))


def test_embedded_last_will() -> None:
    """Our own broker delivers the last will of a client that is killed."""
    require_mosquitto()
    port = free_port()
    script = """
        import asyncio, sys
        from mqtt_kit import INFO, MqttPublisher, config
        async def main():
            publisher = MqttPublisher(config(sys.argv[1]), info=INFO)
            await publisher.connect()
            await publisher.run()
        asyncio.run(main())
    """

    async def main() -> list[str]:
        async with (
            embedded_broker(port) as broker,
            Subscriber(port, topic="p/n/available") as subscriber,
        ):
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                textwrap.dedent(script),
                broker.url,
                cwd=Path(__file__).parent,
            )
            lines = [await subscriber.next(timeout_s=30)]
            child.kill()
            await child.wait()
            return [*lines, await subscriber.next()]

    assert asyncio.run(main()) == ["0 1 p/n/available online", "0 1 p/n/available offline"]


def test_embedded_is_for_this_machine_only() -> None:
    """Anybody may connect, so the broker listens on the loopback address alone."""
    port = free_port()

    async def main() -> None:
        async with embedded_broker(port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            with pytest.raises(OSError, match="Connect call failed"):
                await asyncio.open_connection("127.0.0.2", port)
            assert reader is not None

    asyncio.run(main())


async def open_and_close(port: int) -> LocalBroker:
    async with embedded_broker(port) as broker:
        return broker


def test_second_instance_shares_the_first_ones_broker() -> None:
    """Two recognisers of one user publish to one broker; after them the port is free at once."""
    port = free_port()

    async def twice() -> list[LocalBroker]:
        async with embedded_broker(port) as first, embedded_broker(port) as second:
            return [first, second]

    assert [broker.started for broker in asyncio.run(twice())] == [True, False]
    assert asyncio.run(open_and_close(port)).started


def test_broker_of_another_process_is_shared_until_that_process_is_killed(tmp_path: Path) -> None:
    """A lock file that a killed recogniser left behind makes no other broker ours."""
    port = free_port()
    script = """
        import asyncio, sys
        from stream_hbaf.publish.broker import embedded_broker
        async def main():
            async with embedded_broker(int(sys.argv[1])):
                print("ready", flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        shared = asyncio.run(open_and_close(port))
        process.kill()
    assert shared == LocalBroker(f"mqtt://127.0.0.1:{port}", started=False)
    with mosquitto(tmp_path, port=port), pytest.raises(BrokerError, match="another program's"):
        asyncio.run(open_and_close(port))


def test_shared_broker_is_not_replaced_by_another_programs(tmp_path: Path) -> None:
    """After the first recogniser has ended the second waits for another embedded broker."""
    port, statuses = free_port(), StatusLog()

    async def main() -> list[str]:
        publisher = MqttPublisher(config("embedded", port=port), info=INFO, on_status=statuses)
        async with embedded_broker(port):
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
        await statuses.until(connected=False)
        with mosquitto(tmp_path, port=port):
            async with Subscriber(port) as subscriber:
                await publisher.send(utterance(1))
                with pytest.raises(TimeoutError):
                    await subscriber.next(timeout_s=2)
        async with embedded_broker(port), Subscriber(port, topic="p/n/m/utterance") as subscriber:
            line = await subscriber.next(timeout_s=30)
            await publisher.close(3)
            await running
        return [line.split("{")[0], *statuses.lines]

    line, *lines = asyncio.run(main())
    assert line == "0 1 p/n/m/utterance "
    assert f"mqtt://127.0.0.1:{port}: the embedded broker that was shared has ended" in lines


def test_broker_of_another_program_is_refused(tmp_path: Path) -> None:
    """It may be open to the network: it is named, and used only if its URL is given."""
    with mosquitto(tmp_path) as other:
        line = rf"port {other.port} is taken by another program's MQTT broker \(mosquitto, process "
        advice = rf"--mqtt mqtt://127\.0\.0\.1:{other.port}"
        with pytest.raises(BrokerError, match=f"{line}.*user .*{advice}"):
            asyncio.run(open_and_close(other.port))
    (tmp_path / "none").touch()
    with (
        mosquitto(tmp_path, f"password_file {tmp_path / 'none'}", "user root") as locked,
        pytest.raises(BrokerError, match="another program's MQTT broker"),
    ):
        asyncio.run(open_and_close(locked.port))


def test_broker_is_tried_before_the_models_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign broker on the port, a closed port, a wrong password: one line, and no loading."""
    passwords = password_file(tmp_path, user="ann", password="right")
    monkeypatch.setenv("STREAM_HBAF_MQTT__USERNAME", "ann")
    monkeypatch.setenv("STREAM_HBAF_MQTT__PASSWORD", "wrong")
    with mosquitto(tmp_path, f"password_file {passwords}", "user root") as broker:
        for arguments, line in (
            (["--set", f"mqtt.port={broker.port}"], "another program's MQTT broker"),
            (["--mqtt", "mqtt://127.0.0.1:1"], "nothing listens there"),
            (["--mqtt", broker.url], "refuses user 'ann' or the password"),
        ):
            assert main(["--file", str(SPEECH), *arguments]) == 2
            complaint = capsys.readouterr().err
            assert line in complaint
            assert complaint.count("\n") == 1


def test_port_taken() -> None:
    """A port with something else at it ends in one line that says how to go on."""

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"port {port} is taken.*--set mqtt\.port=PORT"):
            asyncio.run(open_and_close(port))


async def watch_json(url: str, *, out: TextIO, on_status: StatusLog | None = None) -> None:
    received = follow(config(url), topic="p/+/#", on_status=on_status)
    await watch(received, prefix="p", out=out, json=True)


def test_watch_shows_json_lines() -> None:
    """With `json` each message is one line: its topic, and the object or word it carries."""
    require_mosquitto()
    port = free_port()
    out = io.StringIO()

    async def main() -> None:
        async with embedded_broker(port) as broker:
            await publish(port, "p/n/m/emotion", "joy", "-r")
            watching = asyncio.create_task(watch_json(broker.url, out=out))
            while not out.getvalue():  # noqa: ASYNC110  a text file has no event
                await asyncio.sleep(0.01)
            await publish(port, "p/n/m/utterance", '{"id":"u1","text":"“oh”"}')
            await publish(port, "elsewhere/n/m", "not ours")
            await publish(port, "p/n/m/speech", "ON")
            while out.getvalue().count("\n") < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            watching.cancel()
            await asyncio.wait({watching})

    asyncio.run(main())
    assert out.getvalue().splitlines() == [
        '{"topic": "p/n/m/emotion", "payload": "joy"}',
        '{"topic": "p/n/m/utterance", "payload": {"id": "u1", "text": "“oh”"}}',
        '{"topic": "p/n/m/speech", "payload": "ON"}',
    ]


def test_watch_into_a_closed_pipe() -> None:
    """When nobody reads any more, `watch` ends without complaint."""
    require_mosquitto()
    port = free_port()
    reading, writing = os.pipe()
    os.close(reading)

    async def run() -> tuple[int | None, bytes]:
        async with embedded_broker(port) as broker, asyncio.timeout(30):
            await publish(port, "p/n/available", "online", "-r")
            words = ["watch", "--mqtt", broker.url, "--set", "mqtt.prefix=p"]
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "stream_hbaf.cli", *words),
                stdout=writing,
                stderr=subprocess.PIPE,
            )
            _, complaints = await child.communicate()
            return child.returncode, complaints

    with os.fdopen(writing):
        assert asyncio.run(run()) == (0, b"")


def test_watch_without_broker() -> None:
    """A broker that isn't there is one line with its address."""
    port = free_port()
    with pytest.raises(BrokerError, match=f"mqtt://127.0.0.1:{port}: nothing listens there"):
        asyncio.run(watch_json(f"mqtt://127.0.0.1:{port}", out=io.StringIO()))


def test_watch_reconnects(tmp_path: Path) -> None:
    """`watch` outlives its broker and says so."""
    out, statuses = io.StringIO(), StatusLog()

    async def main() -> None:
        watching = asyncio.create_task(watch_json(broker.url, out=out, on_status=statuses))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(broker.stop)
        await statuses.until(connected=False)
        await asyncio.to_thread(broker.start)
        await statuses.until(connected=True)
        await publish(broker.port, "p/n/available", "online", "-r")
        async with asyncio.timeout(10):
            while not out.getvalue():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.wait({watching})

    with mosquitto(tmp_path) as broker:
        asyncio.run(main())
    assert out.getvalue() == '{"topic": "p/n/available", "payload": "online"}\n'


AT = datetime(2026, 1, 2, 3, 4, 5)


def received(topic: str, payload: bytes) -> Received:
    return Received(topic, payload, retained=False)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (received("p/n/available", b"online"), "03:04:05  n  available online"),
        (received("p/n/m/status/vad", b"degraded"), "03:04:05  n/m  status/vad degraded"),
        (
            received("p/n/m/utterance", messages(utterance(1), prefix="p", node="n")[0].payload),
            "03:04:05  n/m  Zoë  joy 0.90  '“1”'",
        ),
        (
            received("p/n/m/partial", messages(partial(7), prefix="p", node="n")[0].payload),
            "03:04:05  n/m  joy 0.90  '7'  (partial)",
        ),
        (
            received(
                "p/n/m/utterance",
                b'{"type": "end", "text": "Fine.", "conflict": true, '
                b'"emotion": {"label": "joy", "score": 0.41, "abstained": true}}',
            ),
            "03:04:05  n/m  joy? 0.41  ≠  'Fine.'",
        ),
        (
            received(
                "p/n/m/utterance",
                b'{"type": "end", "revision": 1, "speaker": "Ann", "speaker_score": 0.7, '
                b'"text": "Fine."}',
            ),
            "03:04:05  n/m  ↺  Ann?  'Fine.'",
        ),
        (
            received("p/n/m/utterance", b'{"speaker": 1, "speaker_score": "x"}'),
            "03:04:05  n/m  1  (partial)",
        ),
        (received("p/n/m/emotion", b"\x1b[2J\xff"), "03:04:05  n/m  emotion �[2J�"),
        (received("p/n/m/utterance", b'{"emotion": 3, "text": '), "03:04:05  n/m  {"),
    ],
)
def test_watch_human_line(message: Received, line: str) -> None:
    """People read when, where, who, which emotion and the words; nothing reaches the terminal
    but text, whatever somebody publishes."""
    shown = human_line(message, prefix="p", at=AT)
    assert shown == line or (line.endswith("{") and shown.startswith(line))


def test_watch_json_line_of_damage() -> None:
    """What is not JSON, NaN included, is shown as the text it is."""
    assert json.loads(json_line(received("t", b'{"a":NaN}')))["payload"] == '{"a":NaN}'
