"""The examples that send sound to a service run unchanged, against a real one."""

import asyncio
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import Loop, chromium
from mosquitto import Mosquitto, mosquitto
from mqtt_kit import send_all, utterance
from serve_kit import Sound, ends_of, serving

from stream_hbaf.audio import pace
from stream_hbaf.config import MqttConfig
from stream_hbaf.events import Info, Level, Model
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.recognizer import Recognizer

EXAMPLES = Path(__file__).parent.parent / "examples"
INFO = Info(version="0", model=Model(id="b", sha256="c"), labels=[], licence="", sources=["m"])


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FASTEST", 8.0)


async def shown(sound: Sound, *command: str | Path) -> str:
    """What an example prints for a sound on its standard input."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(100):
        out, _ = await process.communicate(sound.tobytes())
    assert process.returncode == 0
    return out.decode()


def test_examples_print_what_the_service_says(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Python and JavaScript, each utterance once."""
    commands: list[tuple[str | Path, ...]] = [(sys.executable, EXAMPLES / "stream.py")]
    if shutil.which("node"):
        commands.append(("node", "--experimental-websocket", EXAMPLES / "stream.js"))

    async def scene() -> None:
        async with serving(recognizer) as service:
            (end,) = await ends_of(service, sentences[1])
            assert end.emotion is not None
            for command in commands:
                found = await shown(sentences[1], *command, service.server.url)
                assert found == f"{end.emotion.label}\t{end.text}\n"

    asyncio.run(scene())


def test_node_example_says_what_is_wrong() -> None:
    if shutil.which("node") is None:
        pytest.skip("needs node: apt-get install nodejs")

    async def scene() -> None:
        process = await asyncio.create_subprocess_exec(
            *("node", "--experimental-websocket", EXAMPLES / "stream.js", "ws://127.0.0.1:1"),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, error = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 2
        assert b"can't be reached, or refuses" in error

    asyncio.run(scene())


@contextmanager
def website(folder: Path) -> Iterator[str]:
    """A web server of a folder's files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_page_sends_its_microphone(recognizer: Recognizer) -> None:
    """A real browser's microphone, which beeps, comes in; the page gets the stream's events."""
    with Loop() as loop, chromium() as browser, website(EXAMPLES) as site:
        context = serving(recognizer, token="secret")
        service = loop.run(context.__aenter__())
        page = browser.new_page()
        page.goto(f"{site}/stream.html?{service.server.url}?token=secret")
        page.click("#start")
        page.wait_for_function("document.body.dataset.event === 'connected'")
        loud = service.log.until(
            lambda: any(isinstance(e, Level) and e.dbfs > -40 for e in service.log.events)
        )
        loop.run(loud)
        page.close()
        loop.run(context.__aexit__(None, None, None))


def test_workers_share_the_utterances(tmp_path: Path) -> None:
    """Of two processes with the same group one gets each utterance, of the broker's own choice."""
    turns = range(1, 21)

    async def first_line(stream: asyncio.StreamReader) -> str:
        return (await stream.readline()).decode()

    async def scene(broker: Mosquitto) -> list[list[str]]:
        command = (sys.executable, EXAMPLES / "workers.py", broker.url, "team")
        workers = [
            await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            for _ in range(2)
        ]
        publisher = MqttPublisher(MqttConfig(url=broker.url), info=INFO)
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        found: list[list[str]] = [[], []]

        async def read(number: int) -> None:
            out = workers[number].stdout
            assert out is not None
            while line := await first_line(out):
                found[number].append(line.split("\t")[2].strip())

        reading = [asyncio.create_task(read(number)) for number in range(2)]
        async with asyncio.timeout(60):
            while not all(found):  # until both have subscribed
                await send_all(publisher, utterance(0))
                await asyncio.sleep(0.2)
            await send_all(publisher, *(utterance(turn) for turn in turns))
            while sum(line != "“0”" for lines in found for line in lines) < len(turns):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for worker in workers:
            worker.kill()
        await asyncio.gather(*reading, *(worker.wait() for worker in workers))
        await publisher.close(1)
        await running
        return [[line for line in lines if line != "“0”"] for lines in found]

    with mosquitto(tmp_path) as broker:
        found = asyncio.run(scene(broker))
    assert sorted(found[0] + found[1]) == sorted(f"“{turn}”" for turn in turns)
    assert all(found)
