"""The broker away or killed, the recogniser killed: no utterance is lost, state is restored."""

import asyncio
import random
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from mosquitto import Mosquitto, Subscriber, mosquitto
from mqtt_kit import INFO, StatusLog, config, partial, payload, send_all, utterance, utterance_ids

from stream_hbaf.events import Speech, Status
from stream_hbaf.publish import mqtt
from stream_hbaf.publish.messages import messages
from stream_hbaf.publish.mqtt import MqttPublisher


def give_signal(broker: Mosquitto, number: signal.Signals) -> None:
    assert broker._process
    broker._process.send_signal(number)


# A broker that is killed keeps what it acknowledged only if it has written it down.
CAREFUL = (
    "persistence true",
    "autosave_on_changes true",
    "autosave_interval 1",
    "max_inflight_messages 0",
    "max_queued_messages 0",
    "user root",
)


def test_broker_is_killed(tmp_path: Path) -> None:
    """Three times during 150 utterances, at random: each `end` arrives, in order, none twice."""
    statuses = StatusLog()
    lines: list[str] = []
    moments = random.Random(5)

    async def kill(broker: Mosquitto) -> None:
        for times in range(3):
            await asyncio.sleep(moments.uniform(0.1, 0.5))
            give_signal(broker, signal.SIGKILL)
            await asyncio.to_thread(broker.stop)
            await asyncio.to_thread(broker.start)
            while sum("received CONNACK" in line for line in lines) <= times:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # without a subscriber the broker keeps nothing

    async def collect(subscriber: Subscriber) -> None:
        while True:
            lines.append(await subscriber._line())

    async def main(broker: Mosquitto) -> None:
        publisher = MqttPublisher(config(broker.url), info=INFO, on_status=statuses)
        async with Subscriber(broker.port, topic="p/n/m/utterance", session="s") as subscriber:
            collecting = asyncio.create_task(collect(subscriber))
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            killing = asyncio.create_task(kill(broker))
            for number in range(150):
                await publisher.send(utterance(number))
                await asyncio.sleep(0.02)
            await killing
            assert await publisher.close(10) == 0
            await running
            await asyncio.sleep(0.5)
            collecting.cancel()

    with mosquitto(tmp_path, *CAREFUL, f"persistence_location {tmp_path}/") as broker:
        asyncio.run(main(broker))
    arrived = utterance_ids([line for line in lines if line.startswith(("0 1 ", "1 1 "))])
    assert list(dict.fromkeys(arrived)) == [f"u{number}" for number in range(150)]
    assert [connected for connected, _ in statuses.calls].count(False) >= 3


def test_partials_while_disconnected(tmp_path: Path) -> None:
    """While the broker is away old partials are dropped and counted; utterances wait."""
    statuses = StatusLog()

    async def main(broker: Mosquitto) -> tuple[list[str], int]:
        publisher = MqttPublisher(config(broker.url), info=INFO, on_status=statuses)
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(Speech(source="m", on=True))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(broker.stop)
        await statuses.until(connected=False)
        for number in range(mqtt.DROPPABLE + 5):
            await publisher.send(partial(number))
        await send_all(publisher, Speech(source="m", on=False), utterance(1))
        dropped = publisher.dropped["partials"]
        await asyncio.to_thread(broker.start)
        async with Subscriber(broker.port) as subscriber:
            await publisher.close(5)
            await running
            return await subscriber.until("stopped"), dropped

    with mosquitto(tmp_path) as broker:
        lines, dropped = asyncio.run(main(broker))
    texts = [payload(line)["text"] for line in lines if "/partial " in line]
    assert dropped == 6  # five partials, and one more for the speech message
    assert texts == [str(number) for number in range(6, mqtt.DROPPABLE + 5)]
    assert [line for line in lines if line.endswith(("ON", "OFF"))] == ["0 0 p/n/m/speech OFF"]
    assert sum("/utterance " in line for line in lines) == 1


def test_full_outbox_holds_the_sender_back(tmp_path: Path) -> None:
    """With the outbox full and a slow broker `send` waits; cancelled meanwhile it loses nothing."""

    async def main(broker: Mosquitto) -> list[object]:
        publisher = MqttPublisher(config(broker.url, outbox=3), info=INFO)
        async with Subscriber(broker.port, topic="p/n/m/utterance") as subscriber:
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            await asyncio.sleep(0.2)
            broker.pause()
            await send_all(publisher, utterance(1), utterance(2))  # and one emotion
            waiting = asyncio.create_task(publisher.send(utterance(3)))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait({waiting})
            give_signal(broker, signal.SIGCONT)
            assert await publisher.close(5) == 0
            await running
            return utterance_ids([await subscriber.next() for _ in range(3)])

    with mosquitto(tmp_path) as broker:
        assert asyncio.run(main(broker)) == ["u1", "u2", "u3"]


def test_full_outbox_while_the_broker_is_away(tmp_path: Path) -> None:
    """Then the oldest utterances are dropped, counted, and reported once; state stays."""
    statuses = StatusLog()

    async def main(broker: Mosquitto) -> tuple[int, list[str], set[str]]:
        settings = config(broker.url, outbox=3)
        publisher = MqttPublisher(settings, info=INFO, on_status=statuses)
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await asyncio.to_thread(broker.stop)
        await statuses.until(connected=False)
        status = Status(source="m", stage="vad", state="degraded")
        await send_all(publisher, status, *(utterance(n) for n in range(1, 6)))
        assert publisher.outbox_depth == 3
        await asyncio.to_thread(broker.start)
        async with Subscriber(broker.port) as subscriber:
            assert await publisher.close(5) == 0
            await running
            lines = await subscriber.until("stopped")
        return publisher.dropped["utterances"], lines, set(lines)

    with mosquitto(tmp_path) as broker:
        dropped, lines, seen = asyncio.run(main(broker))
    assert dropped == 2
    assert utterance_ids(lines) == ["u3", "u4", "u5"]
    assert {"0 1 p/n/m/status/vad degraded", "0 1 p/n/m/emotion joy"} <= seen
    assert [line for line in statuses.lines if "full" in line] == [
        "outbox: full with 3 messages; the oldest are dropped"
    ]


def test_forgotten_dialogue(tmp_path: Path) -> None:
    """Nothing of it is published any more, its retained label is erased; others stay."""

    async def main(broker: Mosquitto) -> tuple[int, list[str], set[str]]:
        statuses = StatusLog()
        publisher = MqttPublisher(config(broker.url), info=INFO, on_status=statuses)
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(utterance(1))
        await asyncio.sleep(0.2)
        async with Subscriber(broker.port) as subscriber:
            assert {await subscriber.next() for _ in range(3)} >= {"1 1 p/n/m/emotion joy"}
            broker.pause()
            other = utterance(4).model_copy(update={"dialogue_id": "other", "source": "o"})
            await send_all(publisher, utterance(2), utterance(3), other)
            erased = await publisher.forget("d")
            give_signal(broker, signal.SIGCONT)
            await publisher.close(3)
            await running
            lines = await subscriber.until("stopped")
        async with Subscriber(broker.port) as late:
            return erased, lines, {(await late.next())[4:].split("{")[0] for _ in range(3)}

    with mosquitto(tmp_path) as broker:
        erased, lines, retained = asyncio.run(main(broker))
    assert erased >= 2  # one utterance may be under way already
    assert utterance_ids(lines)[-1] == "u4"
    assert "0 1 p/n/m/emotion " in lines
    assert "u3" not in "".join(lines)
    assert retained == {"p/n/available stopped", "p/n/info ", "p/n/o/emotion joy"}


@pytest.mark.parametrize("silence", ["stopped", "paused"])
def test_close_without_broker(tmp_path: Path, silence: str) -> None:
    """What can't be delivered in time stays on disk, and the next start publishes it first."""
    statuses = StatusLog()

    async def first(broker: Mosquitto) -> int:
        publisher = MqttPublisher(config(broker.url), info=INFO, on_status=statuses)
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

    async def second(broker: Mosquitto) -> list[object]:
        publisher = MqttPublisher(config(broker.url), info=INFO)
        async with Subscriber(broker.port, topic="p/n/m/utterance") as subscriber:
            await publisher.connect()
            await publisher.send(utterance(3))
            assert await publisher.close(3) == 0
            return utterance_ids([await subscriber.next() for _ in range(3)])

    with mosquitto(tmp_path) as broker:
        start = time.monotonic()
        assert asyncio.run(first(broker)) == 2
        assert time.monotonic() - start < 2.0
        broker.stop()
        broker.start()
        assert asyncio.run(second(broker)) == ["u1", "u2", "u3"]
    assert "outbox: messages kept for the next start: 2" in statuses.lines


def test_killed_recogniser_loses_nothing(tmp_path: Path) -> None:
    """Each event that `send` returned for is published by the next run."""
    script = """
        import asyncio, os, signal, sys
        from mqtt_kit import INFO, MqttPublisher, config, utterance
        async def main():
            publisher = MqttPublisher(config(sys.argv[1]), info=INFO)
            await publisher.connect()
            for turn in range(50):
                await publisher.send(utterance(turn))
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """

    async def main(broker: Mosquitto) -> list[object]:
        command = [sys.executable, "-c", textwrap.dedent(script), broker.url]
        child = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parent)
        assert await child.wait() == -signal.SIGKILL
        publisher = MqttPublisher(config(broker.url), info=INFO)
        async with Subscriber(broker.port, topic="p/n/m/utterance") as subscriber:
            await publisher.connect()
            assert await publisher.close(5) == 0
            return utterance_ids([await subscriber.next() for _ in range(50)])

    with mosquitto(tmp_path) as broker:
        assert asyncio.run(main(broker)) == [f"u{number}" for number in range(50)]


def test_state_is_back_after_a_restart(tmp_path: Path) -> None:
    """After its restart a broker without persistence has the retained messages again."""
    statuses = StatusLog()

    async def main(broker: Mosquitto) -> set[str]:
        publisher = MqttPublisher(config(broker.url), info=INFO, on_status=statuses)
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(Status(source="m", stage="vad", state="degraded"))
        await publisher.send(utterance(1, label="fear"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(broker.stop)
        await statuses.until(connected=False)
        await asyncio.to_thread(broker.start)
        await statuses.until(connected=True)
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
