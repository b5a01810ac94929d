"""Clients of the broker inside the recogniser: how many, how large, and what if they vanish."""

import asyncio
import gc
import logging
import random
import socket
import struct
from collections.abc import Coroutine
from typing import Any

import pytest
from mosquitto import free_port
from mqtt_kit import INFO, config, partial, utterance

from stream_hbaf.errors import BrokerError
from stream_hbaf.publish import broker
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.publish.connection import Client, close_client, open_client
from stream_hbaf.publish.mqtt import MqttPublisher

SUBSCRIBE = bytes([0x82, 6, 0, 1, 0, 1, ord("#"), 1])
PUBLISH_1 = bytes([0x32, 8, 0, 3, *b"a/b", 0, 7, ord("x")])
PUBLISH_2 = bytes([0x34, 8, 0, 3, *b"a/b", 0, 7, ord("x")])
PING = bytes([0xC0, 0])


def connect(client: str, *, clean: bool = True, will: bool = False) -> bytes:
    flags = 2 * clean + (0x2C if will else 0)
    body = b"\0\4MQTT\4" + bytes([flags, 0, 5, 0, len(client)]) + client.encode()
    body += b"\0\1w\0\1x" if will else b""
    return bytes([0x10, len(body)]) + body


def run(main: Coroutine[Any, Any, None], caplog: pytest.LogCaptureFixture) -> None:
    """Run it; nothing may be logged as a warning or worse, at the end of its tasks either."""
    with caplog.at_level(logging.WARNING):
        asyncio.run(main)
        gc.collect()
    assert [record.getMessage() for record in caplog.records] == []


def hang_up(client: socket.socket) -> None:
    """End a connection without a word: the other side gets a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_number_of_clients(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One more is refused with the reason; when another has gone there is room again."""
    monkeypatch.setattr(broker, "MAX_CLIENTS", 5)
    port = free_port()

    async def main() -> None:
        async with embedded_broker(port) as local:
            idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
            await asyncio.sleep(0.1)
            with pytest.raises(BrokerError, match=r"the broker refuses .*unavailable"):
                await open_client(config(local.url))
            for client in idle:
                hang_up(client)
            await asyncio.sleep(0.1)
            await close_client(await open_client(config(local.url)))

    run(main(), caplog)


@pytest.mark.parametrize(
    "words", [b"", b"\x10", b"\x10\xff\xff\xff\x7f", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_client_that_does_not_connect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, words: bytes
) -> None:
    """Whoever says nothing, or something else, is hung up on."""
    monkeypatch.setattr(broker, "CONNECT_S", 0.2)
    port = free_port()

    async def main() -> None:
        async with embedded_broker(port), asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(words)
            assert await reader.read() in (b"", bytes([0x20, 2, 0, 1]))
            writer.close()

    run(main(), caplog)


def test_packet_that_is_too_large(caplog: pytest.LogCaptureFixture) -> None:
    """Its sender is hung up on before it is read."""
    port = free_port()

    async def main() -> None:
        async with embedded_broker(port), asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(connect("c") + b"\x32\xff\xff\xff\x7f\0\3a/b\0\7")
            assert await reader.read() == bytes([0x20, 2, 0, 0])
            writer.close()

    run(main(), caplog)


def test_clients_that_vanish(caplog: pytest.LogCaptureFixture) -> None:
    """In any state, at any time: the recogniser's messages are delivered, and nothing is logged."""
    port, chance = free_port(), random.Random(3)

    async def publish(publisher: MqttPublisher) -> None:
        for turn in range(10_000):
            await publisher.send(utterance(turn))
            await publisher.send(partial(turn))
            await asyncio.sleep(0.005)

    def words(number: int) -> bytes:
        name = f"c{chance.randrange(8) if number % 3 == 0 else number}"
        rest = (SUBSCRIBE, PUBLISH_1, PUBLISH_2, PING * 3, b"\x82\0", b"\x10\0", b"\xff" * 9)
        first = connect(name, clean=chance.random() < 0.5, will=chance.random() < 0.3)
        return first + b"".join(part for part in rest if chance.random() < 0.4)

    async def main() -> None:
        kept: list[socket.socket] = []
        async with embedded_broker(port) as local:
            publisher = MqttPublisher(config(local.url), info=INFO)
            await publisher.connect()
            running = asyncio.create_task(publisher.run())
            publishing = asyncio.create_task(publish(publisher))
            for number in range(150):
                client = socket.create_connection(("127.0.0.1", port))
                client.send(words(number))
                await asyncio.sleep(chance.choice((0, 0.01, 0.03)))
                if chance.random() < 0.7:
                    hang_up(client)
                else:
                    kept.append(client)
            publishing.cancel()
            for client in kept:
                hang_up(client)
            await asyncio.sleep(0.3)
            assert await publisher.close(5) == 0
            await running

    run(main(), caplog)


def test_writer_of_a_closed_socket(caplog: pytest.LogCaptureFixture) -> None:
    """A broker that refuses may have closed it before the loop adds the writer: nothing happens."""

    async def main() -> None:
        client = Client("127.0.0.1")
        with socket.socket() as closed:
            pass
        client._on_socket_register_write(None, None, closed)
        await asyncio.sleep(0.01)

    run(main(), caplog)


def test_client_that_outlasts_the_program(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A broker that has no time left to say goodbye ends without a word too."""
    monkeypatch.setattr(broker, "SHUTDOWN_S", 0)
    port = free_port()

    async def main() -> None:
        async with embedded_broker(port):
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
            clients[0].send(connect("c"))
            await asyncio.sleep(0.1)
        for client in clients:
            client.close()

    run(main(), caplog)
