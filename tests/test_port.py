"""Nobody who can reach a port takes the process's connections, files or log away."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import ConnectionClosed

from stream_hbaf.audio import port, websocket, wyoming
from stream_hbaf.audio.port import MOST_CONNECTIONS, Port, open_port
from stream_hbaf.audio.push_source import Address
from stream_hbaf.audio.websocket import WebSocketSource
from stream_hbaf.audio.wyoming import WyomingSource
from stream_hbaf.config import DashboardConfig
from stream_hbaf.dashboard import http_server
from stream_hbaf.dashboard.server import Dashboard
from stream_hbaf.events import Info, Model

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
INFO = Info(version="1", model=Model(id="m", sha256=""), labels=[], licence="", sources=[])
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answer(connection: Connection, request: bytes = REQUEST) -> bytes:
    """The first bytes of the answer; empty if there is none."""
    reader, writer = connection
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(12), 5)
    except ConnectionError:
        return b""


class Echo(asyncio.Protocol):
    """Sends back what it receives."""

    transport: asyncio.Transport

    def __init__(self, listening: Port) -> None:
        self._listening = listening

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._listening.establish(self.transport.get_extra_info("peername"))
        self.transport.write(data)


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """A server that sends back what it receives; yields its port."""
    listening = await open_port("here", "127.0.0.1", 0)
    number: int = listening.getsockname()[1]
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: Echo(listening), sock=listening):
        yield number


@asynccontextmanager
async def dashboard() -> AsyncIterator[int]:
    served = Dashboard(DashboardConfig(port=0), info=INFO)
    await served.start()
    try:
        yield int(served.address.rstrip("/").rpartition(":")[2])
    finally:
        await served.close(1)


async def connect(number: int, *, count: int) -> list[Connection]:
    return [await asyncio.open_connection("127.0.0.1", number) for _ in range(count)]


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def play() -> None:
        async with asyncio.timeout(30):
            await scene()

    asyncio.run(play())


async def connect_and_talk(number: int, *, count: int) -> list[Connection]:
    """Connections that have sent something, and are answered."""
    connections = await connect(number, count=count)
    for one in connections:
        assert await answer(one, b"hello") == b"hello"
    return connections


def test_port_refuses_beyond_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """Those within it are served, those beyond are closed at once, with one line for all."""

    async def scene() -> None:
        async with echoing() as number:
            within = await connect_and_talk(number, count=MOST_CONNECTIONS)
            beyond = await connect(number, count=20)
            assert [await answer(one, b"hello") for one in beyond] == [b""] * 20
            for one in within:
                assert await answer(one, b"hello") == b"hello"
            for _, writer in within:
                writer.close()
            await asyncio.sleep(0.1)
            await connect_and_talk(number, count=1)

    run(scene)
    assert caplog.messages == ["here: too many connections; some are refused for now"]


def test_port_refuses_one_peer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One peer doesn't take all connections; a proxy on this machine may."""
    monkeypatch.setattr(port, "MOST_OF_PEER", 3)

    async def scene() -> None:
        async with echoing() as number:
            await connect_and_talk(number, count=5)
            monkeypatch.setattr(port, "_is_local", lambda host: False)
            [sixth] = await connect(number, count=1)
            assert await answer(sixth, b"hello") == b""

    run(scene)
    assert caplog.messages == [
        "here: too many connections from 127.0.0.1; some are refused for now"
    ]


def test_port_ends_half_open_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that have sent what is asked for first may stay."""
    monkeypatch.setattr(port, "FIRST_S", 0.3)

    async def scene() -> None:
        async with echoing() as number:
            silent, talking = await connect(number, count=2)
            assert await answer(talking, b"hello") == b"hello"
            assert await asyncio.wait_for(silent[0].read(1), 5) == b""
            assert await answer(talking, b"hello") == b"hello"

    run(scene)


def test_dashboard_answers_beside_half_open_connections() -> None:
    """Incomplete headers give way to whoever sends a request."""

    async def scene() -> None:
        async with dashboard() as number:
            half_open = []
            for _ in range(6):
                half_open += await connect(number, count=100)
                for _, writer in half_open[-100:]:
                    writer.write(REQUEST[:-2])
                [late] = await connect(number, count=1)
                assert await answer(late) == b"HTTP/1.1 200"

    run(scene)


def test_dashboard_ends_idle_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that begins another request and doesn't complete it."""
    monkeypatch.setattr(http_server, "IDLE_S", 0.3)

    async def scene() -> None:
        async with dashboard() as number:
            [(reader, writer)] = await connect(number, count=1)
            writer.write(REQUEST)
            assert (await reader.read(12)) == b"HTTP/1.1 200"
            writer.write(REQUEST[:20])
            while await asyncio.wait_for(reader.read(1 << 16), 5):
                pass

    run(scene)


HANDSHAKE = (
    b"GET /events HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
GARBAGE = (
    *(b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\0" * 9_000, b"A" * 70_000),
    REQUEST + b"\r\nabc",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/9.9.9\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHo\x00st: localhost\r\n\r\n",
    REQUEST.replace(b"/ ", b"/" + b"x" * 300 + b" ") + b"\r\n",
    HANDSHAKE.replace(b"dGhl", b"\xff\xfe"),
)


def test_dashboard_logs_no_garbage(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a peer sends, there is no traceback."""

    async def scene() -> None:
        async with dashboard() as number:
            for garbage in GARBAGE:
                [connection] = await connect(number, count=1)
                connection[1].write(garbage)
                connection[1].write_eof()
                await asyncio.wait_for(connection[0].read(), 5)
            for _ in range(20):  # vanish during the handshake
                [connection] = await connect(number, count=1)
                connection[1].write(HANDSHAKE)
                connection[1].transport.abort()
            [connection] = await connect(number, count=1)
            assert await answer(connection) == b"HTTP/1.1 200"

    run(scene)
    assert caplog.messages == []


@pytest.mark.parametrize("kind", [WebSocketSource, WyomingSource])
def test_sources_end_half_open_connections(
    kind: type[WebSocketSource | WyomingSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are those of the dashboard."""
    monkeypatch.setattr(port, "FIRST_S", 0.3)

    async def scene() -> None:
        address = Address("127.0.0.1", 0)
        async with kind(address, chunk_ms=32, on_status=lambda *_: None) as source:
            connections = await connect(source.address.port, count=MOST_CONNECTIONS + 9)
            for reader, _ in connections:
                while await asyncio.wait_for(reader.read(1 << 12), 5):
                    pass

    run(scene)


def test_wyoming_ends_idle_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has asked for a description may not stay for ever."""
    monkeypatch.setattr(wyoming, "SILENT_S", 0.3)

    async def scene() -> None:
        address = Address("127.0.0.1", 0)
        async with WyomingSource(address, chunk_ms=32, on_status=lambda *_: None) as source:
            [(reader, writer)] = await connect(source.address.port, count=1)
            writer.write(b'{"type": "describe"}\n')
            assert b'"info"' in await reader.readline()
            assert await asyncio.wait_for(reader.read(), 5) == b""

    run(scene)


def test_wyoming_open_to_the_network_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The protocol has no password, so one line says who can send."""

    async def scene() -> None:
        for host in ("0.0.0.0", "127.0.0.1"):
            address = Address(host, 0)
            async with WyomingSource(address, chunk_ms=32, on_status=lambda *_: None):
                pass

    run(scene)
    [line] = caplog.messages
    assert line.startswith("wyoming://0.0.0.0:0: anybody on the network can send sound here")


FEW_FILES = """
import asyncio, resource, sys
from stream_hbaf.audio.port import open_port
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

async def main():
    listening = await open_port("here", "127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=listening)
    print(listening.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def test_port_without_files_left() -> None:
    """When no file can be opened, that is one line, and connections are refused."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", FEW_FILES]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        connections = [socket.create_connection(("127.0.0.1", number)) for _ in range(100)]
        connections[-1].settimeout(5)
        assert connections[-1].recv(1) == b""  # refused, and not left waiting
        _, complaints = process.communicate("end\n", timeout=20)
        for connection in connections:
            connection.close()
    assert complaints.splitlines() == [
        "here: can't accept connections (Too many open files); some are refused for now"
    ]


def test_idle_senders_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that sends nothing for minutes doesn't keep the source to itself."""
    monkeypatch.setattr(websocket, "IDLE_S", 0.3)
    monkeypatch.setattr(wyoming, "IDLE_S", 0.3)
    address = Address("127.0.0.1", 0)

    async def scene() -> None:
        source = WebSocketSource(address, chunk_ms=32, on_status=lambda *_: None)
        async with source, ws_connect(f"ws://{source.address}") as sender:
            await sender.send('{"rate": 16000}')
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(sender.recv(), 5)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.reason == "nothing came"
        async with WyomingSource(address, chunk_ms=32, on_status=lambda *_: None) as wyo:
            [(reader, writer)] = await connect(wyo.address.port, count=1)
            start = '{"type": "audio-start", "data": {"rate": 16000, "width": 2, "channels": 1}}'
            writer.write(start.encode() + b"\n")
            assert await asyncio.wait_for(reader.read(), 5) == b""

    run(scene)
