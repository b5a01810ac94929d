"""What a broker does not take is named, and does not keep the rest from being delivered."""

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest
from mosquitto import Subscriber, free_port, mosquitto, password_file, require_mosquitto
from mqtt_kit import INFO, StatusLog, config, partial, utterance, utterance_ids

from stream_hbaf.client import follow, request
from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError
from stream_hbaf.events import AnyEvent, Speech, Status
from stream_hbaf.publish import mqtt
from stream_hbaf.publish.connection import check_broker
from stream_hbaf.publish.mqtt import MqttPublisher


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


VERSIONS = pytest.mark.parametrize("version", ["3.1.1", "5"])


@VERSIONS
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("retain_available false", "keeps no retained messages, which are needed"),
        ("max_qos 0", "takes no messages with QoS 1, which are needed"),
    ],
)
def test_broker_that_lacks_what_is_needed(
    tmp_path: Path, setting: str, reason: str, version: str
) -> None:
    """One line names it, though with 3.1.1 the broker hangs up without a word."""
    with (
        mosquitto(tmp_path, setting) as broker,
        pytest.raises(BrokerError, match=f"^{broker.url}: {reason}"),
    ):
        asyncio.run(check_broker(config(broker.url, version=version)))


def test_user_name_with_an_at_sign(tmp_path: Path) -> None:
    """It is percent-encoded in the URL."""
    require_mosquitto()
    file = password_file(tmp_path, user="ann@example.org", password="right")
    tmp_path.chmod(0o755)
    with mosquitto(tmp_path, f"password_file {file}", "user root") as broker:
        url = broker.url.replace("//", "//ann%40example.org@")
        asyncio.run(check_broker(config(url, password="right")))


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6(tmp_path: Path) -> None:
    """Plain, and over WebSocket, whose request names the host as a URL does."""
    port = free_port()
    requests: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.read(2000)).decode())
        writer.close()

    async def main() -> None:
        await check_broker(config(f"mqtt://[::1]:{port}"))
        async with await asyncio.start_server(answer, "::1", 0) as server:
            web_port = server.sockets[0].getsockname()[1]
            with pytest.raises(BrokerError):
                await check_broker(config(f"ws://[::1]:{web_port}/a b"))
        assert requests[-1].startswith("GET /a%20b HTTP/1.1\r\n")
        assert f"\r\nHost: [::1]:{web_port}\r\n" in requests[-1]

    with mosquitto(tmp_path, f"listener {port} ::1"):
        asyncio.run(main())


async def publish(
    settings: MqttConfig, statuses: StatusLog, *events: AnyEvent, rest_s: float, close_s: float
) -> MqttPublisher:
    """A publisher's whole life: it sends the events, rests, and closes."""
    publisher = MqttPublisher(settings, info=INFO, on_status=statuses)
    await publisher.connect()
    running = asyncio.create_task(publisher.run())
    for event in events:
        await publisher.send(event)
    await asyncio.sleep(rest_s)
    await publisher.close(close_s)
    await running
    return publisher


async def life(
    settings: MqttConfig, *events: AnyEvent, port: int, rest_s: float = 0.5
) -> tuple[list[str], list[str], MqttPublisher]:
    """The lines of a subscriber and the reports of one publisher, from its start to its end."""
    statuses = StatusLog()
    async with Subscriber(port) as subscriber:
        publisher = await publish(settings, statuses, *events, rest_s=rest_s, close_s=10)
        lines = await subscriber.until("0 1 p/n/available stopped")
    return lines, statuses.lines, publisher


def sized(turn: int, size: int) -> AnyEvent:
    return utterance(turn).model_copy(update={"text": "x" * size})


@VERSIONS
def test_message_that_is_too_large(tmp_path: Path, version: str) -> None:
    """It is set aside after a few tries and named once with its size; everything else arrives;
    the next run delivers first what can be delivered."""
    sizes = enumerate((10, 1500, 20, 1400, 30, 1600, 40))
    events = [Speech(source="m", on=True), *(sized(n, size) for n, size in sizes)]
    with mosquitto(tmp_path, "max_packet_size 1000") as broker:
        settings = config(broker.url, version=version)
        lines, reports, _ = asyncio.run(life(settings, *events, port=broker.port))
        again, _, publisher = asyncio.run(life(settings, sized(9, 10), port=broker.port))
    assert list(dict.fromkeys(utterance_ids(lines))) == ["u0", "u2", "u4", "u6"]
    (line,) = [report for report in reports if "a message on" in report]
    assert "p/n/m/utterance" in line
    assert "stays in the outbox; raise the broker's limit" in line
    assert ("(1856 bytes" if version == "3.1.1" else "(1940 bytes, of at most 1000)") in line
    hang_ups = sum(line.endswith("available offline") for line in lines)
    assert hang_ups <= 4 if version == "3.1.1" else hang_ups == 0
    assert reports[-1] == "outbox: messages kept for the next start: 3"
    assert utterance_ids(again) == ["u9"]
    assert sum(line.endswith("available offline") for line in again) <= 2
    assert publisher.outbox_depth == 3


def test_set_aside_messages_are_delivered_by_a_broker_that_takes_them(tmp_path: Path) -> None:
    """The next run, whose broker has a higher limit, sends them after the others."""
    with mosquitto(tmp_path, "max_packet_size 1000") as broker:
        asyncio.run(life(config(broker.url), sized(1, 1500), sized(2, 10), port=broker.port))
    with mosquitto(tmp_path, port=broker.port) as broker:
        lines, _, publisher = asyncio.run(life(config(broker.url), port=broker.port))
    assert utterance_ids(lines) == ["u1"]
    assert publisher.outbox_depth == 0


def test_partials_and_state_that_are_too_large(tmp_path: Path) -> None:
    """The broker doesn't hang up at each of them for ever; utterances arrive."""
    large = partial(1).model_copy(update={"text": "x" * 1500})
    events = [event for n in range(8) for event in (large, utterance(n))]
    info = INFO.model_copy(update={"licence": "y" * 1500})

    async def main(port: int, url: str) -> tuple[list[str], list[str]]:
        statuses = StatusLog()
        async with Subscriber(port) as subscriber:
            publisher = MqttPublisher(config(url), info=info, on_status=statuses)
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            for event in events:
                await publisher.send(event)
                await asyncio.sleep(0.7)
            await publisher.close(10)
            await running
            return await subscriber.until("stopped"), statuses.lines

    with mosquitto(tmp_path, "max_packet_size 1000") as broker:
        lines, reports = asyncio.run(main(broker.port, broker.url))
    assert list(dict.fromkeys(utterance_ids(lines))) == [f"u{n}" for n in range(8)]
    assert sum(line.endswith("available offline") for line in lines) <= 6
    assert sum("p/n/info" in report and "left out" in report for report in reports) == 1


ACL = ("topic readwrite #", "topic deny p/+/+/utterance", "topic deny p/n/m/status/vad")


def test_topic_that_may_not_be_published(tmp_path: Path) -> None:
    """MQTT 5: the refusal is one line, the messages stay in the outbox, the rest arrives."""
    rules = tmp_path / "rules"
    rules.write_text("\n".join(ACL) + "\n")
    rules.chmod(0o644)
    tmp_path.chmod(0o755)
    events: list[AnyEvent] = [
        utterance(1),
        Status(source="m", stage="vad", state="online"),
        utterance(2),
    ]
    with mosquitto(tmp_path, f"acl_file {rules}", "user root") as broker:
        settings = config(broker.url, version="5")
        lines, reports, publisher = asyncio.run(life(settings, *events, port=broker.port))
    assert "0 1 p/n/m/emotion joy" in lines
    assert not any("/utterance" in line or "status" in line for line in lines)
    what = f"{broker.url}: a message on p/n/m/"
    advice = "check the broker's access rules"
    assert reports == [
        f"{what}utterance may not be published (Not authorized); it stays in the outbox; {advice}",
        f"{what}status/vad may not be published (Not authorized); it is left out; {advice}",
        "outbox: messages kept for the next start: 2",
    ]
    assert publisher.outbox_depth == 2
    with mosquitto(tmp_path, port=broker.port) as broker:
        lines, _, _ = asyncio.run(life(settings, port=broker.port))
    assert utterance_ids(lines) == ["u1", "u2"]


def test_request_that_is_denied(tmp_path: Path) -> None:
    """MQTT 5: one line says so at once."""
    rules = tmp_path / "rules"
    rules.write_text("topic readwrite #\ntopic deny p/n/request/ping\n")
    rules.chmod(0o644)
    tmp_path.chmod(0o755)
    with mosquitto(tmp_path, f"acl_file {rules}", "user root") as broker:
        settings = config(broker.url, version="5")
        with pytest.raises(BrokerError, match=r"may not publish to p/n/request/ping \(Not auth"):
            asyncio.run(request(settings, "ping", node="n"))


class Broker5:
    """An MQTT 5 broker that answers each publication as a test says."""

    def __init__(
        self, *, answers: dict[bytes, list[int]], connack: bytes = b"", delay_s: float = 0.0
    ) -> None:
        """``answers``: by the end of the topic, the reason codes of the acknowledgements in turn,
        the last one for ever; 255 hangs up. ``connack`` are properties."""
        self.most_in_flight = 0
        self._in_flight = 0
        self._delay_s = delay_s
        self.topics: list[str] = []
        self.connections = 0
        self._connack = connack
        self._answers = answers

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while self._answer(*await self._packet(reader), writer):
                await writer.drain()
        writer.close()

    async def _packet(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        kind = (await reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return kind, await reader.readexactly(length)

    def _answer(self, kind: int, body: bytes, writer: asyncio.StreamWriter) -> bool:
        match kind >> 4:
            case 1:
                self.connections += 1
                properties = bytes([len(self._connack)]) + self._connack
                writer.write(bytes([0x20, 2 + len(properties), 0, 0]) + properties)
            case 3 if kind & 6:
                end = 2 + int.from_bytes(body[:2])
                topic, number = body[2:end], body[end : end + 2]
                code = self._code(topic)
                if code == 255:
                    return False
                if code == 0:
                    self.topics.append(topic.decode())
                self._in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
                answer = b"\x40\x03" + number + bytes([code])
                asyncio.get_running_loop().call_later(self._delay_s, self._send, writer, answer)
            case 8:
                writer.write(b"\x90\x04" + body[:2] + b"\x00\x01")
            case 12:
                writer.write(b"\xd0\x00")
        return True

    def _send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        self._in_flight -= 1
        writer.write(answer)

    def _code(self, topic: bytes) -> int:
        for end, codes in self._answers.items():
            if topic.endswith(end):
                return codes.pop(0) if len(codes) > 1 else codes[0]
        return 0


async def against(
    broker: Broker5, *events: AnyEvent, rest_s: float = 0.5, close_s: float = 5
) -> list[str]:
    """What one publisher reports."""
    statuses = StatusLog()
    async with await asyncio.start_server(broker, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = config(f"mqtt://127.0.0.1:{port}", version="5")
        await publish(settings, statuses, *events, rest_s=rest_s, close_s=close_s)
    return statuses.lines


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (149, "is too large (447 bytes); it stays in the outbox; raise the broker's limit"),
        (151, "is refused for now (Quota exceeded); it stays in the outbox; check the broker's"),
        (131, "is refused (Implementation specific error); it stays in the outbox; check the"),
    ],
)
def test_negative_acknowledgement(code: int, reason: str) -> None:
    """It is no success: one line, and the message stays in the outbox."""
    broker = Broker5(answers={b"/utterance": [code]})
    lines = asyncio.run(against(broker, utterance(1), utterance(2)))
    assert lines[0].partition("p/n/m/utterance ")[2].startswith(reason)
    assert lines[1:] == ["outbox: messages kept for the next start: 2"]
    assert broker.topics[-2:] == ["p/n/m/emotion", "p/n/available"]


def test_broker_that_receives_few_messages_at_once() -> None:
    """Its Receive Maximum is kept to: a broker ends the connection of who exceeds it."""
    broker = Broker5(answers={}, connack=b"\x21\x00\x02", delay_s=0.01)
    lines = asyncio.run(against(broker, *(utterance(turn) for turn in range(20))))
    assert broker.most_in_flight == 2
    assert broker.topics.count("p/n/m/utterance") == 20
    assert lines == []


def test_quota_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was refused for now is sent again by the same run."""
    monkeypatch.setattr(mqtt, "AGAIN_S", 0.2)
    broker = Broker5(answers={b"/utterance": [151, 151, 0]})
    lines = asyncio.run(against(broker, utterance(1), utterance(2)))
    assert len(lines) == 1
    assert broker.topics.count("p/n/m/utterance") == 2


def test_broker_that_hangs_up_at_a_topic() -> None:
    """Some brokers answer what is not allowed so: the topic is given up, the rest arrives."""
    broker = Broker5(answers={b"/utterance": [255]})
    status = Status(source="m", stage="vad", state="online")
    events: list[AnyEvent] = [utterance(1).model_copy(update={"text": ""}), status, utterance(2)]
    lines = asyncio.run(against(broker, *events, rest_s=4))
    assert broker.connections <= 5
    assert {"p/n/m/emotion", "p/n/m/status/vad"} <= set(broker.topics)
    assert sum("makes the broker hang up" in line for line in lines) == 1
    assert lines[-1] == "outbox: messages kept for the next start: 2"


def test_broker_that_hangs_up_at_everything() -> None:
    """Nothing is given up, the reason is named once, and it is tried less and less often."""
    broker = Broker5(answers={b"": [255]})
    lines = asyncio.run(against(broker, utterance(1), rest_s=5, close_s=0.2))
    assert broker.connections <= 6
    assert sum("makes the broker hang up, as any" in line for line in lines) == 1
    assert lines[-1] == "outbox: messages kept for the next start: 1"


def test_subscriber_that_is_hung_up_on() -> None:
    """It tries less and less often as well, though each connection is accepted."""

    class Ending(Broker5):
        def _answer(self, kind: int, body: bytes, writer: asyncio.StreamWriter) -> bool:
            return super()._answer(kind, body, writer) and kind >> 4 != 8  # SUBSCRIBE

    async def main(broker: Broker5) -> None:
        async with await asyncio.start_server(broker, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            received = follow(config(f"mqtt://127.0.0.1:{port}", version="5"), topic="#")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3), contextlib.aclosing(received):
                    await anext(received)

    broker = Ending(answers={})
    asyncio.run(main(broker))
    assert 2 <= broker.connections <= 5
