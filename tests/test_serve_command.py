"""The command serve as a process: streams come and go, beside a broker and metrics."""

import asyncio
import os
import re
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RECORDINGS
from mosquitto import Subscriber, mosquitto
from mqtt_kit import payload
from numpy.typing import NDArray
from serve_kit import ends, pieces

from stream_hbaf.audio.file import read_audio
from stream_hbaf.cli import main
from stream_hbaf.stream_client import stream

COMMAND = [sys.executable, "-m", "stream_hbaf.cli", "serve", "--port", "0"]
SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"


@asynccontextmanager
async def running(*options: str) -> AsyncIterator[tuple[str, str]]:
    """A service of its own process: its address, and that of its metrics. It ends with 0."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *options, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    said = ""
    async with asyncio.timeout(100):
        while "serving up to" not in said:
            line = (await process.stderr.readline()).decode()
            assert line, said
            said += line
    service = re.search(r"(ws://\S+?);", said)
    metrics = re.search(r"(http://\S+)/metrics", said)
    try:
        yield service[1] if service else "", metrics[1] if metrics else ""
    finally:
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            _, rest = await process.communicate()
    assert (process.returncode, rest) == (0, b"")


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        found: str = response.read().decode()
        return found


async def until_topic(subscriber: Subscriber, topic: str, *, empty: bool = False) -> str:
    while True:
        line = await subscriber.next(timeout_s=60)
        _, _, name, *rest = line.split(" ", 3)
        if name == topic and empty == (not "".join(rest)):
            return line


def test_serve_with_a_broker_and_metrics(tmp_path: Path) -> None:
    """The events go to the broker as well; a stream that leaves clears its topics and series."""
    sound: NDArray[np.int16] = read_audio(SPEECH)

    async def scene(port: int) -> None:
        options = ("--mqtt", f"mqtt://127.0.0.1:{port}", "--metrics", "0")
        named = ("--set", "mqtt.prefix=p", "--set", "mqtt.node=n")
        async with Subscriber(port) as subscriber, running(*options, *named) as (url, metrics):
            assert read(f"{metrics}/healthz") == "ok\n"
            events: list[Any] = []
            async for event in stream(url, pieces(sound), source="ann"):
                events.append(event)
                if len(events) == 2:
                    assert 'source="ann"' in await asyncio.to_thread(read, f"{metrics}/metrics")
            (end,) = ends(events)
            published = payload(await until_topic(subscriber, "p/n/ann/utterance"))
            while published["type"] != "end":
                published = payload(await until_topic(subscriber, "p/n/ann/utterance"))
            assert (published["id"], published["text"]) == (end.id, end.text)
            assert payload(await until_topic(subscriber, "p/n/info"))["sources"] == []
            await until_topic(subscriber, "p/n/ann/emotion", empty=True)
            assert 'source="ann"' not in await asyncio.to_thread(read, f"{metrics}/metrics")

    with mosquitto(tmp_path) as broker:
        asyncio.run(scene(broker.port))


@pytest.mark.parametrize("command", [["serve", "--mqtt", "none"], ["extract", "meld"]])
def test_without_ray(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "meld").mkdir()
    for split in ("train", "dev", "test"):
        header = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID"
        rows = f"{header}\nHi.,Ann,joy,0,0\n"
        (tmp_path / "meld" / f"{split}_sent_emo.csv").write_text(rows, encoding="utf-8")
    corpora = ["--corpora", str(tmp_path)] if command[0] == "extract" else []
    assert main([*command, *corpora, "--ray"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("ray is not installed; pip install 'stream-hbaf[scale]'\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--host", "0.0.0.0"], "serve: anybody on the network could connect to 0.0.0.0:8772"),
        (["--port", "many"], "--set serve.port: 'serve.port' must be a valid integer"),
        (["--set", "serve.token=x"], "--set serve.token: a password on the command line"),
        (["--set", "serve.max_streams=0"], "'serve.max_streams' must be greater than 0"),
    ],
)
def test_wrong_options(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """One line, before the models are loaded."""
    for name in [name for name in os.environ if name.startswith("STREAM_HBAF_")]:
        monkeypatch.delenv(name)
    assert main(["serve", "--mqtt", "none", *options]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
