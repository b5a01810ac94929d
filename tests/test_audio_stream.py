"""Sound behind a URL, from a real HTTP server: recordings end, live streams come back."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.audio import container, decode
from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.audio.source import Chunk
from stream_hbaf.errors import AudioError

RECORDINGS = Path(__file__).parent / "recordings"
SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"
Samples = NDArray[np.int16]
MORE = np.zeros(48_000, np.int16)  # FFmpeg looks at 64 KiB before it calls a stream a wave file

# A wave file whose header says that its length isn't known: how sound is streamed plainly.
LIVE_WAV = (
    b"RIFF\xff\xff\xff\xffWAVEfmt "
    + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    + b"data\xff\xff\xff\xff"
)


class Radio(ThreadingHTTPServer):
    """Serves one recording, a page of text, and live broadcasts, each listener the next one."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answer)
        self.broadcasts: list[Samples] = []
        self.over = threading.Event()  # the last broadcast ends with this, the others at once

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Answer(BaseHTTPRequestHandler):
    server: Radio

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/speech.flac":
                self._whole(SPEECH.read_bytes())
            case "/page":
                self._whole(b"<html>no sound here</html>" * 100)
            case "/live" if self.server.broadcasts:
                self._broadcast(self.server.broadcasts.pop(0))
            case "/live":
                self.send_error(503)
            case "/mute":
                self.server.over.wait(20)
            case _:
                self.send_error(404)

    def _whole(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _broadcast(self, samples: Samples) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(LIVE_WAV + samples.tobytes())
        if not self.server.broadcasts:
            self.wfile.write(MORE.tobytes())
            self.server.over.wait(20)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def radio() -> Iterator[Radio]:
    with serving(Radio()) as server:
        yield server


@contextmanager
def serving(server: Radio) -> Iterator[Radio]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Statuses(list[tuple[str, str]]):
    def __init__(self) -> None:
        self.changed = asyncio.Event()

    def __call__(self, state: str, line: str) -> None:
        self.append((state, line))
        self.changed.set()

    @property
    def states(self) -> list[str]:
        return [state for state, _ in self]


def listen(
    url: str,
    *,
    enough: Callable[[list[Chunk]], bool] = lambda chunks: False,
    statuses: Statuses | None = None,
    chunk_ms: int = 32,
    channel: int | None = None,
) -> list[Chunk]:
    """What a URL gives, until it ends or it is enough."""

    async def run() -> list[Chunk]:
        chunks: list[Chunk] = []
        on_status = Statuses() if statuses is None else statuses
        source = FileSource(
            url, speed=None, channel=channel, chunk_ms=chunk_ms, on_status=on_status
        )
        async with asyncio.timeout(20), source:
            async for chunk in source.chunks():
                chunks.append(chunk)
                if enough(chunks):
                    break
        return chunks

    return asyncio.run(run())


def joined(chunks: list[Chunk]) -> Samples:
    return np.concatenate([chunk.samples for chunk in chunks])


@pytest.mark.parametrize("chunk_ms", [10, 32, 1_000])
def test_stream_recording(radio: Radio, chunk_ms: int) -> None:
    """A recording behind a URL gives what the file gives, bit for bit, and ends."""
    statuses = Statuses()
    chunks = listen(radio.url("speech.flac"), chunk_ms=chunk_ms, statuses=statuses)
    assert np.array_equal(joined(chunks), read_audio(SPEECH))
    assert not any(chunk.after_gap for chunk in chunks)
    assert statuses == []


@pytest.mark.parametrize("chunk_ms", [10, 32, 1_000])
def test_stream_live(radio: Radio, chunk_ms: int) -> None:
    """Live sound is given as it comes, bit for bit, while the stream goes on."""
    speech = read_audio(SPEECH)
    radio.broadcasts = [speech]
    count = len(speech) * 1_000 // 16_000 // chunk_ms
    chunks = listen(
        radio.url("live"), chunk_ms=chunk_ms, enough=lambda chunks: len(chunks) == count
    )
    assert np.array_equal(joined(chunks), speech[: 16 * chunk_ms * count])


def test_stream_breaks_and_comes_back(radio: Radio) -> None:
    """When a live stream ends, that is reported; it is reopened, and goes on after a gap."""
    first, second = np.split(read_audio(SPEECH)[:32_700], [16_700])
    radio.broadcasts = [first, second]
    statuses = Statuses()
    chunks = listen(
        radio.url("live"),
        statuses=statuses,
        enough=lambda chunks: sum(len(chunk.samples) for chunk in chunks) == 16_700 + 15_872,
    )
    assert np.array_equal(joined(chunks), np.concatenate([first, second[:15_872]]))
    assert [chunk.start for chunk in chunks if chunk.after_gap] == [16_700]
    sizes = [len(chunk.samples) for chunk in chunks]
    assert [chunk.start for chunk in chunks] == np.cumsum([0, *sizes])[:-1].tolist()
    url = radio.url("live")
    [(state, line), back] = statuses
    assert state == "offline"
    assert line.startswith(f"{url}: ")
    assert line.endswith(" (trying again)")
    assert back == ("online", f"{url} is back")


def test_stream_server_away() -> None:
    """A server that is gone for a while is found again when it is back."""
    speech = read_audio(SPEECH)[:16_000]
    statuses = Statuses()
    with serving(Radio()) as radio:
        url, port = radio.url("live"), radio.server_port
        radio.broadcasts = [speech, speech]  # the second is never played

        async def run() -> list[Chunk]:
            chunks: list[Chunk] = []
            source = FileSource(url, speed=None, chunk_ms=100, on_status=statuses)
            async with asyncio.timeout(20), source:
                async for chunk in source.chunks():
                    if not chunks:
                        radio.shutdown()
                        radio.server_close()
                        threading.Timer(1.2, open_again).start()
                    chunks.append(chunk)
                    if len(chunks) == 20:
                        break
            return chunks

        again: list[Radio] = []

        def open_again() -> None:
            again.append(Radio(port))
            again[0].broadcasts = [speech]
            threading.Thread(target=again[0].serve_forever, args=(0.01,), daemon=True).start()

        chunks = asyncio.run(run())
        again[0].over.set()
        again[0].shutdown()
        again[0].server_close()
    assert np.array_equal(joined(chunks), np.concatenate([speech, speech]))
    assert statuses.states == ["offline", "online"]
    assert [chunk.after_gap for chunk in chunks] == [False] * 10 + [True] + [False] * 9
    assert chunks[10].captured_at - chunks[9].captured_at > 1.0


def test_stream_stalls(radio: Radio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live stream that stays connected and falls silent counts as broken off."""
    for module in (container, decode):
        monkeypatch.setattr(module, "STALL_S", 0.3)
    radio.broadcasts = [np.ones(16_000, np.int16)]
    statuses = Statuses()

    async def run() -> None:
        source = FileSource(radio.url("live"), speed=None, chunk_ms=100, on_status=statuses)
        async with source:
            hearing = asyncio.create_task(collect(source.chunks()))
            await asyncio.wait_for(statuses.changed.wait(), 10)
        await asyncio.wait_for(hearing, 5)

    asyncio.run(run())
    assert statuses == [("offline", f"{radio.url('live')}: it stopped sending (trying again)")]


def test_stream_closed_while_waiting(radio: Radio) -> None:
    """Closing doesn't wait for a live stream that has fallen silent, and its chunks end."""
    radio.broadcasts = [np.ones(16_000, np.int16)]

    async def run() -> float:
        loop = asyncio.get_running_loop()
        source = FileSource(radio.url("live"), speed=None, chunk_ms=500, on_status=Statuses())
        async with source:
            chunks = source.chunks()
            assert [len((await anext(chunks)).samples) for _ in range(2)] == [8_000, 8_000]
            rest = asyncio.ensure_future(collect(chunks))
            await asyncio.sleep(0.2)
            closing = loop.time()
        await asyncio.wait_for(rest, 1)
        return loop.time() - closing

    assert asyncio.run(run()) < 1


async def collect(chunks: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def opening_error(url: str, *, channel: int | None = None) -> str:
    with pytest.raises(AudioError) as error:
        listen(url, channel=channel)
    return str(error.value)


def test_stream_unreachable(radio: Radio) -> None:
    """A URL that gives no sound is one line at the opening."""
    missing, page = radio.url("nothing"), radio.url("page")
    assert opening_error(missing) == (
        f"{missing}: can't be read (Server returned 404 Not Found); check the URL and its server"
    )
    assert opening_error(page) == (
        f"{page}: no sound that FFmpeg can read; check what the URL gives"
    )
    assert opening_error("http://127.0.0.1:9/x") == (
        "http://127.0.0.1:9/x: can't be read (Connection refused); check the URL and its server"
    )
    assert opening_error("sounds://here") == (
        "sounds://here: can't be read (Protocol not found); check the URL and its server"
    )


def test_stream_silent_server(radio: Radio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and says nothing is one line, too."""
    monkeypatch.setattr(container, "OPEN_S", 0.3)
    url = radio.url("mute")
    assert opening_error(url) == (
        f"{url}: can't be read (it stopped sending); check the URL and its server"
    )


def test_stream_unknown_channel(radio: Radio) -> None:
    """A channel that the recording doesn't have is one line."""
    url = radio.url("speech.flac")
    assert opening_error(url, channel=1) == f"{url}: no channel 1; it has one channel, 0"


def test_stream_secrets(radio: Radio) -> None:
    """User name, password and query of a URL are in no name and no line."""
    url = radio.url("speech.flac?key=hidden").replace("http://", "http://anna:secret@")
    source = FileSource(url, speed=None, chunk_ms=32, on_status=Statuses())
    assert source.name == radio.url("speech.flac")
    wrong = url.replace("speech", "nothing")
    assert opening_error(wrong).startswith(f"{radio.url('nothing.flac')}: can't be read (")
    assert len(joined(listen(url))) == len(read_audio(SPEECH))
