"""The service against clients that break rules, vanish, don't read, or may not be there."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from mosquitto import make_certificates, require_mosquitto
from serve_kit import (
    S16_16K,
    Service,
    Sound,
    assert_same,
    closed_for,
    ends_of,
    next_event,
    open_client,
    pieces,
    serving,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from stream_hbaf.audio import pace
from stream_hbaf.config import ServeConfig
from stream_hbaf.errors import ConfigError, ServiceError
from stream_hbaf.events import Status, Utterance
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.serve import results
from stream_hbaf.serve.server import StreamServer
from stream_hbaf.stream_client import stream

BIND = "serve: anybody on the network could connect to 0.0.0.0:0; set a token (serve.token), or"
BROKEN: list[
    tuple[tuple[str | bytes, ...], int, str]
] = [  # messages, the close code and the reason
    ((b"\0\0",), 1008, "sound came before its format"),
    (('{"rate": 1}',), 1008, "a rate that isn't between 8000 and 192000 Hz"),
    ((S16_16K, b"odd"), 1008, "3 bytes are no whole number of frames of 2 bytes"),
    (("GET / HTTP/1.1",), 1008, "a text message that is no JSON object"),
    ((S16_16K, bytes(10_000_000)), 1009, ""),
    (('{"format": "opus"}', b"\xff" * 300), 1008, "300 bytes that are no Opus packet"),
    (
        ('{"format": "opus", "channels": 6}',),
        1008,
        "a number of Opus channels that is neither 1 nor 2",
    ),
]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FASTEST", 8.0)


async def broken(service: Service, number: int) -> tuple[int, str]:
    connection = await open_client(service, f"source=bad-{number}")
    with contextlib.suppress(ConnectionClosed):
        for message in BROKEN[number][0]:
            await connection.send(message)
    return await closed_for(connection)


async def other_protocols(service: Service) -> None:
    """What is no WebSocket is answered as HTTP, or not at all."""
    for sent in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"SSH\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.server.address.port)
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(12), 15)
        assert answer in (b"HTTP/1.1 426", b"HTTP/1.1 400", b"")
        writer.close()


async def vanishes(service: Service) -> None:
    connection = await open_client(service, "source=gone")
    await connection.send(S16_16K)
    await connection.send(bytes(3200))
    connection.transport.abort()


def test_hostile_clients_disturb_nobody(
    recognizer: Recognizer, sentences: list[Sound], caplog: pytest.LogCaptureFixture
) -> None:
    """One line each, to the client and in the log of states; a good stream beside them goes on."""
    sound = np.concatenate(sentences[1:3])

    async def scene() -> None:
        async with serving(recognizer, max_streams=16) as service:
            alone = await ends_of(service, sound)
            going_on = asyncio.create_task(ends_of(service, sound))
            found = await asyncio.gather(*(broken(service, n) for n in range(len(BROKEN))))
            await asyncio.gather(other_protocols(service), vanishes(service))
            assert [code for code, _ in found] == [code for _, code, _ in BROKEN]
            assert_same(await going_on, alone)
            for number, (_, _, reason) in enumerate(BROKEN):
                await service.until_gone(f"bad-{number}")
                lines = [
                    event.detail
                    for event in service.log.events
                    if isinstance(event, Status)
                    and event.source == f"bad-{number}"
                    and (event.state, event.stage) == ("offline", "capture")
                ]
                assert len(lines) == 1
                assert reason in lines[0]

    asyncio.run(scene())
    assert not caplog.records


def test_sound_faster_than_real_time_waits(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is recognised, one line says what happens, and others are served meanwhile."""
    monkeypatch.setattr(pace, "FASTEST", 1.5)

    async def scene() -> None:
        async with serving(recognizer) as service:
            (expected,) = await ends_of(service, sentences[1])
            async with open_client(service, "source=fast") as connection:
                await connection.send(S16_16K)
                for piece in [p async for p in pieces(sentences[1])]:
                    await connection.send(piece)
                await connection.send('{"end": true}')
                events = [json.loads(message) async for message in connection]
            found = [Utterance(**e) for e in events if e.get("type") == "end"]
            assert [e.text for e in found] == [expected.text]
            (line,) = (e["detail"] for e in events if e.get("state") == "degraded")
            assert line.endswith(f"{pace.FASTER}; it is read at 1.5 times that")

    asyncio.run(scene())


def test_flood_of_tiny_messages_is_slowed_down(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message counts for some time, whatever is in it."""
    monkeypatch.setattr(pace, "FASTEST", 1.0)

    async def scene() -> None:
        async with serving(recognizer) as service:
            connection = await open_client(service)
            await connection.send(S16_16K)
            for _ in range(1000):
                await connection.send(b"")
            await service.log.until(
                lambda: any(
                    isinstance(e, Status) and e.state == "degraded" and "faster" in e.detail
                    for e in service.log.events
                )
            )
            connection.transport.abort()

    asyncio.run(scene())


def test_slow_reader_holds_nobody_up(
    recognizer: Recognizer,
    sentences: list[Sound],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that reads nothing is disconnected with a line; its ends are kept for it."""
    monkeypatch.setattr(results, "MAX_ENDS", 2)
    sound = np.concatenate([sentences[1]] * 3)

    async def mute(service: Service) -> None:
        """A client that sends and never reads, not even pings."""
        reader, writer = await asyncio.open_connection("127.0.0.1", service.server.address.port)
        writer.write(
            b"GET /?id=abcdefgh&source=mute HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        for payload, opcode in ((S16_16K.encode(), 1), *[(p, 2) async for p in pieces(sound)]):
            length = bytes([0xFE]) + len(payload).to_bytes(2, "big")
            writer.write(bytes([0x80 | opcode]) + length + bytes(4) + payload)
        await writer.drain()
        await service.until(lambda: any("not read" in r.message for r in caplog.records))
        writer.close()

    async def scene() -> None:
        async with serving(recognizer) as service:
            silent = asyncio.create_task(mute(service))
            assert len(await ends_of(service, sentences[1])) == 1
            await silent
            async with open_client(service, "id=abcdefgh") as again:
                assert (await next_event(again))["resumed"] is True
                kept = [await next_event(again, "utterance") for _ in range(2)]
            assert [one["type"] for one in kept] == ["end", "end"]
            assert kept[0]["turn"] < kept[1]["turn"]

    asyncio.run(scene())
    assert [r.message for r in caplog.records] == [
        "mute: the results are not read; its client is disconnected"
    ]


@pytest.mark.parametrize(
    ("path", "status", "line"),
    [
        ("/other", 404, "no such path; connect to /"),
        ("/?id=short", 400, "'id' must be 8 to 64 letters, digits, - and _; draw a random one"),
        (
            "/?rate=1",
            400,
            "unknown parameter 'rate'; there is source, dialogue, speaker, id, token",
        ),
        (
            "/?source=request",
            400,
            "'source': Value error, 'request' is the beginning of other topics",
        ),
        ("/?source=a/b", 400, "'source': String should match pattern"),
        (f"/?speaker={'x' * 65}", 400, "'speaker' must be of at most 64 printable characters"),
    ],
)
def test_wrong_request_is_refused(
    recognizer: Recognizer, path: str, status: int, line: str
) -> None:
    async def scene() -> None:
        async with serving(recognizer) as service:
            with pytest.raises(ServiceError) as refused:
                async for _ in stream_to(service, path):
                    pass
            assert line in str(refused.value)
            assert f"({status})" in str(refused.value)
            assert not service.pipeline.sources

    asyncio.run(scene())


async def stream_to(service: Service, path: str, **named: object) -> AsyncIterator[object]:
    url = service.server.url.rstrip("/") + path
    async for event in stream(url, pieces(np.zeros(0, np.int16)), **named):  # type: ignore[arg-type]
        yield event


def test_token_and_origin(recognizer: Recognizer) -> None:
    """Without the token nobody is let in; pages of other hosts only where settings name them."""
    allowed, other = "https://app.example", "https://evil.example"

    async def scene() -> None:
        async with serving(recognizer, token="secret", origins=[allowed]) as service:
            for query, page in (("", None), ("token=wrong", None), ("token=secret", other)):
                with pytest.raises(InvalidStatus) as refused:
                    await open_client(service, query, origin=page)
                assert refused.value.response.status_code == 403
            with pytest.raises(InvalidStatus):
                await open_client(service, origin=allowed)
            async with open_client(service, "token=secret", origin=allowed) as app:
                assert (await next_event(app))["event"] == "connected"
            header = {"Authorization": "Bearer secret"}
            async with open_client(service, additional_headers=header) as program:
                assert (await next_event(program))["source"] == "stream-1"

    asyncio.run(scene())


def test_tls(recognizer: Recognizer, sentences: list[Sound], tmp_path: Path) -> None:
    """With a certificate the address is wss://, and nothing else is spoken there."""
    require_mosquitto()  # for openssl
    made = make_certificates(tmp_path)

    async def scene() -> None:
        tls = {"certificate": made.localhost, "key": made.key}
        async with serving(recognizer, **tls) as service:
            assert service.server.url.startswith("wss://")
            (end,) = await ends_of(service, sentences[1], ca_file=made.authority)
            assert "young man" in end.text
            with pytest.raises((InvalidHandshake, ssl.SSLError, ConnectionError)):
                await connect(service.server.url.replace("wss:", "ws:"))

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"host": "0.0.0.0"}, BIND),
        ({"key": "key.pem"}, "serve.key: it needs serve.certificate"),
        ({"certificate": "none.pem"}, "serve.certificate: none.pem can't be used (No such file"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], line: str) -> None:
    async def scene() -> None:
        await StreamServer(ServeConfig.model_validate({"port": 0, **settings})).open()

    with pytest.raises(ConfigError) as error:
        asyncio.run(scene())
    assert line in str(error.value)


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"serve: can't listen on 127.0.0.1:{port} \(Address"
        ):
            asyncio.run(StreamServer(ServeConfig(port=port)).open())


async def send_all(connection: ClientConnection, sound: Sound) -> None:
    with contextlib.suppress(ConnectionClosed):
        await connection.send(S16_16K)
        async for piece in pieces(sound):
            await connection.send(piece)


def test_stop_finishes_what_was_said(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """Who is speaking when the service stops gets the end before the connection is closed."""

    async def scene() -> None:
        async with serving(recognizer) as service, open_client(service) as connection:
            sending = asyncio.create_task(send_all(connection, np.concatenate([sentences[1]] * 20)))
            while (await next_event(connection, "utterance"))["type"] != "new":
                pass
            service.stop.set()  # while most of it isn't read yet
            last = [json.loads(message) async for message in connection]
            assert [e["trigger"] for e in last if e.get("type") == "end"] == ["end_of_input"]
            assert (connection.close_code, connection.close_reason) == (1001, "the service stops")
            await sending

    asyncio.run(scene())
