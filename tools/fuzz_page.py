"""Requests to the dashboard, for ``tools/fuzz.py``: after each, a page must still be answered."""

import asyncio
import contextlib
import random
from pathlib import Path

from damages import BYTES, NAMES, damage
from fuzz_senders import FORMAT, send_bytes

HANDSHAKE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
# A masked text frame of two bytes, a ping, and a frame that is longer than what follows.
FRAMES = b"\x81\x82\0\0\0\0{}\x89\x80\0\0\0\0\x82\xfe\xff\xff\0\0\0\0ab"
PATHS = (
    *("/", "/events", "/microphone/page", "/recordings", "/recordings/good", "/recordings/bad"),
    *("/recordings/good/a.flac", "/recordings/../two", "/%2e%2e/%2e%2e/etc/passwd", "/index.html"),
)


class Requests:
    """Requests of browsers: pages, sockets, recordings and their sound."""

    command = ()

    def __init__(self, folder: Path) -> None:
        from dialogue_samples import INFO
        from session_damages import record_two

        from stream_hbaf.config import DashboardConfig, SourceConfig
        from stream_hbaf.dashboard.server import Dashboard

        self._loop = asyncio.new_event_loop()
        self._errors: list[str] = []
        self._loop.set_exception_handler(lambda _, about: self._errors.append(str(about)))
        two = record_two(folder / "two")
        served = Dashboard(DashboardConfig(port=0), info=INFO, sessions=two)
        served.microphone(SourceConfig(name="page"), on_status=lambda state, line: None)
        self._loop.run_until_complete(served.start())
        self._served = served  # lives as long as this
        self._port = int(served.address.rstrip("/").rpartition(":")[2])
        self._content = b""

    def _request(self, path: str, *lines: str) -> bytes:
        head = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{self._port}", *lines]
        return "\r\n".join([*head, "", ""]).encode(errors="surrogatepass")

    def write(self, seed: int) -> None:
        draw = random.Random(seed)
        path = draw.choice(PATHS)
        if draw.random() < 0.3:
            path += f"/{draw.choice(NAMES)}"
        lines = [HANDSHAKE.strip()] if draw.random() < 0.5 else []
        if draw.random() < 0.3:
            part = draw.choice(BYTES).decode(errors="replace")
            lines.append(f"Range: bytes={draw.choice((part, '5-1', '-0', '9' * 99 + '-'))}")
        whole = self._request(path, *lines) + FRAMES + str(FORMAT).encode()
        self._content = damage(whole, seed) if seed % 4 else whole

    def read(self) -> str:
        self._errors.clear()
        self._loop.run_until_complete(self._try())
        assert not self._errors, self._errors[0][:300]
        return ""

    async def _try(self) -> None:
        with contextlib.suppress(ConnectionError):
            await send_bytes(self._port, self._content)
        page = self._request("/", "Connection: close")
        answer = await send_bytes(self._port, page, ended=False)
        assert answer.startswith(b"HTTP/1.1 200"), answer[:100]
