"""The README's commands and examples run as they are printed.

Names that stand for the reader's own things (a recording, a broker) are replaced by real ones.
"""

import ast
import asyncio
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mosquitto import Mosquitto, free_port, mosquitto, require_mosquitto
from virtual_microphone import DEVICE, VirtualMicrophone, virtual_microphone

from stream_hbaf.cli import settings_table

__all__ = ["virtual_microphone"]

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDING = ROOT / "tests" / "recordings" / "sense_and_sensibility_01_austen_64kb-0930.flac"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.strip()
]
LIVE = [line for line in COMMANDS if line.startswith("stream-hbaf --mic")]
SECONDS = 60.0


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    known = (*LIVE, "tools/listen", "tools/test")
    for line in COMMANDS:
        assert line in known or line.startswith(
            ("stream-hbaf --file", "stream-hbaf watch", "pip install", "mosquitto_sub")
        ), f"{line}: no test runs it"


@pytest.mark.parametrize("script", ["tools/listen", "tools/test"])
def test_scripts_of_the_readme_are_there(script: str) -> None:
    assert script in COMMANDS
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_extras_of_the_readme_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"stream-hbaf\[([\w,]+)\]", README)
    assert named
    for extras in named:
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert "docs/usage.md" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_settings_page_lists_all_settings() -> None:
    """To renew it, put what ``settings_table`` returns into the page."""
    assert settings_table() in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def as_command(line: str, replaced: dict[str, str]) -> list[str]:
    """The arguments after ``stream-hbaf``, in this interpreter."""
    words = [replaced.get(word, word) for word in shlex.split(line)[1:]]
    if "--mic" in words:
        words.insert(words.index("--mic") + 1, DEVICE)
    return [sys.executable, "-m", "stream_hbaf.cli", *words]


@contextmanager
def running(command: list[str], *, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command that listens; afterwards it is ended as by Ctrl-C, which must succeed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | env
    )
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait() == 0, rest
        assert "Traceback" not in rest
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read the command's output until a line holds ``text``."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"no {text!r} in\n{''.join(seen)}")


@pytest.mark.parametrize("line", LIVE)
def test_live_commands_recognise_speech(
    line: str, virtual_microphone: VirtualMicrophone, tmp_path: Path
) -> None:
    require_mosquitto()
    with mosquitto(tmp_path) as broker:
        replaced = {"mqtts://broker.local": broker.url, "sessions": str(tmp_path / "sessions")}
        env = {"STREAM_HBAF_MQTT__PORT": str(free_port())}
        if "--dashboard" in line:
            env["STREAM_HBAF_DASHBOARD__PORT"] = "0"
        with running(as_command(line, replaced), env=env) as process:
            wait_for(process, "istening")
            virtual_microphone.play(RECORDING).wait()
            wait_for(process, "%")  # the emotion's score
        if "--record" in line:
            assert list((tmp_path / "sessions").glob("*/events.jsonl"))


def test_file_command_writes_json_lines(tmp_path: Path) -> None:
    (line,) = (line for line in COMMANDS if line.startswith("stream-hbaf --file"))
    recording = tmp_path / "talk.mp3"
    subprocess.run(["ffmpeg", "-loglevel", "error", "-i", RECORDING, recording], check=True)
    command = as_command(line, {"talk.mp3": str(recording)})
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert '"type": "end"' in done.stdout


def event_of_the_readme(broker: Mosquitto) -> None:
    """Publish an utterance as the recogniser would, to the broker."""
    from stream_hbaf.config import MqttConfig
    from stream_hbaf.events import Emotion, Utterance
    from stream_hbaf.publish.connection import close_client, open_client
    from stream_hbaf.publish.messages import messages

    event = Utterance(
        id="d-1",
        rev=3,
        type="end",
        source="microphone",
        dialogue_id="d",
        turn=1,
        speaker="Ann",
        start_time="2026-01-02T03:04:05.600+00:00",
        audio_start_ms=0.0,
        text="I got the job!",
        emotion=Emotion(label="joy", score=0.71, set=["joy"], probabilities={"joy": 0.71}),
    )

    async def publish() -> None:
        client = await open_client(MqttConfig(url=broker.url))
        for message in messages(event, prefix="stream_hbaf", node="kitchen"):
            await client.publish(message.topic, message.payload, message.qos, message.retain)
        await close_client(client)

    asyncio.run(publish())


@contextmanager
def published_each_half_second(broker: Mosquitto) -> Iterator[None]:
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(0.5):
            event_of_the_readme(broker)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_watch_shows_what_is_published(tmp_path: Path) -> None:
    require_mosquitto()
    (line,) = (line for line in COMMANDS if line.startswith("stream-hbaf watch"))
    with (
        mosquitto(tmp_path) as broker,
        published_each_half_second(broker),
        running([*as_command(line, {}), "--mqtt", broker.url], env={}) as process,
    ):
        wait_for(process, "I got the job!")


def test_shell_example_prints_label_and_text(tmp_path: Path) -> None:
    require_mosquitto()
    (line,) = (line for line in COMMANDS if line.startswith("mosquitto_sub"))
    if shutil.which("jq") is None:
        pytest.skip("needs jq: apt-get install jq")
    with mosquitto(tmp_path) as broker, published_each_half_second(broker):
        once = line.replace("mosquitto_sub", f"mosquitto_sub -C 1 -p {broker.port}")
        done = subprocess.run(["bash", "-c", once], capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout == "joy\tI got the job!\n"


def test_python_example_prints_speaker_label_and_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_mosquitto()
    (example,) = (block for language, block in BLOCKS if language == "python")
    with mosquitto(tmp_path) as broker, published_each_half_second(broker):
        code = compile(
            example.replace("mqtt://localhost", broker.url) + "        break\n",
            "README.md",
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        )
        assert code.co_flags & inspect.CO_COROUTINE

        async def run() -> None:
            async with asyncio.timeout(SECONDS):
                await eval(code, {})

        asyncio.run(run())
    assert capsys.readouterr().out == "Ann joy I got the job!\n"
