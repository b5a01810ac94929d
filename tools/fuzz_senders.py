"""Senders of sound over real sockets, for ``tools/fuzz.py``: after each, the next must be heard."""

import asyncio
import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any

from damages import BYTES, change, damage
from fuzz_kinds import damaged_text
from source_log import SourceLog

from stream_hbaf.audio.push_source import Address, PushSource
from stream_hbaf.audio.websocket import WebSocketSource
from stream_hbaf.audio.wyoming import WyomingSource

ANSWER_S = 0.3  # for a server to hang up after nonsense; it may also wait for more
AGAIN_S = 0.02  # until a source that is still claimed is tried again
SOUND = struct.pack("<h", 500) * 3_200  # 0.2 s at 16 kHz
FORMAT = {"rate": 16_000, "channels": 1, "format": "s16le", "speaker": "Anna"}
PCM = {"rate": 16_000, "width": 2, "channels": 1}
# What a JSON reader of a line may meet.
LINES = ('{"a":' * 10_000, "[" * 10_000, "", "null", "[]", '"\\ud83d"', '{"type":{}}', "x" * 70_000)


async def send_bytes(port: int, content: bytes, *, ended: bool = True) -> bytes:
    """Send bytes, no more if ``ended``; returns the answer when the server hangs up, or waits."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    with contextlib.closing(writer), contextlib.suppress(TimeoutError):
        writer.write(content)
        if ended:
            writer.write_eof()
        async with asyncio.timeout(ANSWER_S):
            while part := await reader.read(1 << 16):
                answer += part
    return answer


class Senders:
    """Listens on a free port; ``read`` sends an input to it, then sound, which must arrive."""

    command = ()

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._errors: list[str] = []
        self._loop.set_exception_handler(lambda _, about: self._errors.append(str(about)))
        self._log = SourceLog()
        self._seed = 0
        self._source = self.open()
        self._loop.run_until_complete(self._source.__aenter__())
        self._following = self._loop.create_task(self._log.follow(self._source))

    def open(self) -> Any:
        """The source."""
        raise NotImplementedError

    async def send(self, draw: random.Random) -> None:
        """Send the input of ``self._seed``."""
        raise NotImplementedError

    async def send_sound(self) -> None:
        """Send sound as the protocol has it; returns when some has arrived, or it was refused."""
        raise NotImplementedError

    @property
    def address(self) -> Address:
        address: Address = self._source.address
        return address

    def write(self, seed: int) -> None:
        self._seed = seed

    def read(self) -> str:
        self._errors.clear()
        self._loop.run_until_complete(self._try())
        assert not self._errors, self._errors[0][:300]
        lines = " ".join(line for _, line in self._log.statuses)
        self._log.statuses.clear()
        return lines

    async def _try(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self.send(random.Random(self._seed))
        self._log.chunks.clear()
        while not any(len(chunk.samples) for chunk in self._log.chunks):
            with contextlib.suppress(ConnectionError):
                await self.send_sound()
            await asyncio.sleep(AGAIN_S)

    async def _arrives(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                await self._log.until(lambda: bool(self._log.chunks))

    async def _send_bytes(self, content: bytes) -> None:
        await send_bytes(self.address.port, content)


class WebSockets(Senders):
    """Handshakes and messages of browsers and programs."""

    def open(self) -> PushSource:
        address = Address("127.0.0.1", 0)
        return WebSocketSource(address, chunk_ms=32, on_status=self._log.on_status)

    def _request(self) -> bytes:
        lines = ["GET / HTTP/1.1", f"Host: {self.address}", "Upgrade: websocket"]
        lines += ("Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        lines += ("Sec-WebSocket-Version: 13", f"Origin: http://{self.address}", "", "")
        # A masked text frame of two bytes, a ping, and a frame that is longer than what follows.
        frames = b"\x81\x82\0\0\0\0{}\x89\x80\0\0\0\0\x82\xfe\xff\xff\0\0\0\0ab"
        return "\r\n".join(lines).encode() + frames

    async def send(self, draw: random.Random) -> None:
        if self._seed % 3 == 0:
            await self._send_bytes(damage(self._request(), self._seed))
            return
        from websockets.asyncio.client import connect
        from websockets.exceptions import ConnectionClosed

        async with connect(f"ws://{self.address}") as connection:
            with contextlib.suppress(ConnectionClosed):
                for number in range(draw.choice((1, 2, 4))):
                    text = damaged_text(FORMAT, self._seed + number, fixed=LINES)
                    await connection.send(text.decode(errors="replace"))
                    await connection.send(draw.randbytes(draw.choice((0, 1, 2, 641, 70_000))))
                    await connection.send('{"pause": true}')

    async def send_sound(self) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import ConnectionClosed

        async with connect(f"ws://{self.address}") as connection:
            with contextlib.suppress(ConnectionClosed):
                await connection.send(json.dumps(FORMAT))
                await connection.send(SOUND)
                await self._arrives()


class Wyoming(Senders):
    """Events of voice satellites."""

    def open(self) -> PushSource:
        address = Address("127.0.0.1", 0)
        return WyomingSource(address, chunk_ms=32, on_status=self._log.on_status)

    def _events(self) -> list[tuple[dict[str, Any], bytes]]:
        chunk = {"type": "audio-chunk", "data": PCM, "payload_length": len(SOUND)}
        return [
            ({"type": "describe"}, b""),
            ({"type": "ping", "data": {"text": "a"}}, b""),
            ({"type": "audio-start", "data": PCM}, b""),
            (chunk, SOUND),
            ({"type": "audio-stop", "data": {"timestamp": None}, "data_length": 2}, b"{}"),
        ]

    async def send(self, draw: random.Random) -> None:
        events = self._events()
        if self._seed % 2:
            events = [(change(header, draw.randrange(1 << 30)), rest) for header, rest in events]
        whole = b"".join(json.dumps(header).encode() + b"\n" + rest for header, rest in events)
        if self._seed % 2 == 0:
            whole = damage(whole, self._seed)
        elif draw.random() < 0.2:
            whole = draw.choice(LINES).encode() + draw.choice(BYTES) + b"\n" + whole
        await self._send_bytes(whole)

    async def send_sound(self) -> None:
        _, writer = await asyncio.open_connection(self.address.host, self.address.port)
        with contextlib.closing(writer):
            for header, rest in self._events():
                writer.write(json.dumps(header).encode() + b"\n" + rest)
            await self._arrives()
