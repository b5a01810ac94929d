"""One word of the command line becomes the source that it names."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.audio.microphone import Microphone
from stream_hbaf.audio.open_source import open_source
from stream_hbaf.audio.source import AudioSource, OnStatus
from stream_hbaf.audio.websocket import WebSocketSource
from stream_hbaf.audio.wyoming import SatelliteSource, WyomingSource
from stream_hbaf.errors import DeviceError

SPEECH = Path(__file__).parent / "recordings" / "sense_and_sensibility_01_austen_64kb-0880.flac"


def ignore(state: str, line: str) -> None:
    pass


def source_of(where: str, *, on_status: OnStatus = ignore) -> AudioSource:
    return open_source(where, chunk_ms=32, on_status=on_status)


@pytest.mark.parametrize(
    ("where", "kind", "name"),
    [
        ("mic", Microphone, "default"),
        ("mic:3", Microphone, "3"),
        ("mic:USB: Microphone", Microphone, "USB: Microphone"),
        ("./mic", FileSource, "mic"),
        ("talks/monday.flac", FileSource, "monday.flac"),
        ("http://radio.example/live?key=hidden", FileSource, "http://radio.example/live"),
        ("rtsp://anna:secret@camera.example/1", FileSource, "rtsp://camera.example/1"),
        ("ws://localhost:8765", WebSocketSource, "ws://localhost:8765"),
        ("WS://[::1]:8765/", WebSocketSource, "ws://[::1]:8765"),
        ("wyoming://0.0.0.0:10700", WyomingSource, "wyoming://0.0.0.0:10700"),
        ("satellite://kitchen.local:10700", SatelliteSource, "satellite://kitchen.local:10700"),
    ],
)
def test_open_source_kinds(where: str, kind: type, name: str) -> None:
    """Each form of the word names its own kind of source, and no secret is in its name."""
    source = source_of(where)
    assert type(source) is kind
    assert source.name == name


@pytest.mark.parametrize(
    "where", ["ws://localhost", "ws://:8765", "ws://x:port", "ws://x:99999", "ws://x:1/path"]
)
def test_open_source_without_an_address(where: str) -> None:
    """A server without host or port is one line with an example."""
    with pytest.raises(DeviceError) as error:
        source_of(where)
    assert str(error.value) == (
        f"{where}: no address; give a host and a port: ws://127.0.0.1:10700"
    )


def test_open_source_browser() -> None:
    """A browser's sound needs the dashboard, which is one line."""
    with pytest.raises(DeviceError) as error:
        source_of("browser")
    assert str(error.value) == (
        "browser: it is the dashboard that a browser sends to; add --dashboard"
    )


def test_open_source_plays() -> None:
    """A path, opened by its word, plays at the speed that was asked for."""

    async def run() -> np.ndarray:
        source = open_source(str(SPEECH), speed=None, chunk_ms=100, on_status=ignore)
        async with source:
            return np.concatenate([chunk.samples async for chunk in source.chunks()])

    assert np.array_equal(asyncio.run(run()), read_audio(SPEECH))
