#!/usr/bin/env python3
"""Tests that no utterance is lost when broker and recogniser are killed again and again.

    tools/soak_mqtt.py [--utterances 1000] [--restarts 50] [--kills 20] [--seed 0]

First a long recording, made of the tests' sentences, is recognised at full speed while a mosquitto
is killed at random times and restarted. Then the recogniser is killed at random times and
restarted. A subscriber with a persistent session must receive every `end` that was reported on
stdout, in order, and none twice (by `id` and `rev`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import soundfile

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ

RECORDINGS = Path(__file__).parents[1] / "tests" / "recordings"
SILENCE_S = 1.0  # ends an utterance
TOPIC = "stream_hbaf/soak/file/utterance"
# mosquitto keeps acknowledged messages when it is killed only if it saves each change.
SETTINGS = """
persistence true
persistence_location {folder}/
autosave_on_changes true
autosave_interval 1
max_inflight_messages 0
max_queued_messages 0
user root
listener {port} 127.0.0.1
"""


class Broker:
    """A mosquitto that can be killed and started again at the same port."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._folder = folder
        self._file = folder / "mosquitto.conf"
        self._child: asyncio.subprocess.Process | None = None
        self.configure("allow_anonymous true")

    def configure(self, *settings: str) -> None:
        """Set lines of mosquitto.conf about the listener, for the next start."""
        whole = SETTINGS.format(port=self.port, folder=self._folder)
        self._file.write_text("\n".join([whole, *settings, ""]))

    async def start(self) -> None:
        self._child = await asyncio.create_subprocess_exec(
            find("mosquitto"), "-c", str(self._file), stderr=asyncio.subprocess.DEVNULL
        )
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return
            await asyncio.sleep(0.01)

    async def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            await self._child.wait()

    def signal(self, number: signal.Signals) -> None:
        """Stop it, or let it go on."""
        assert self._child
        self._child.send_signal(number)


@dataclass
class Received:
    """The `end` events that a subscriber received, in order, with repetitions."""

    ends: list[tuple[str, int]] = field(default_factory=list)
    connections: int = 0

    @property
    def first(self) -> list[str]:
        return [name for name, _ in dict.fromkeys(self.ends)]


def find(name: str) -> str:
    """Debian keeps mosquitto in /usr/sbin."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise SystemExit(f"needs {name}: apt-get install mosquitto mosquitto-clients")
    return found


@contextlib.asynccontextmanager
async def subscriber(port: int) -> AsyncIterator[Received]:
    """mosquitto_sub with a persistent session."""
    received = Received()
    child = await asyncio.create_subprocess_exec(
        *("stdbuf", "-oL", find("mosquitto_sub"), "-p", str(port), "-t", TOPIC, "-q", "1"),
        *("-c", "-i", "soak", "-d"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=2**20,
    )

    async def read() -> None:
        async for line in lines(child):
            if line.startswith("Subscribed"):
                received.connections += 1
            elif (event := end_of(line)) is not None:
                received.ends.append((event["id"], event["rev"]))

    reading = asyncio.create_task(read())
    try:
        await until(lambda: received.connections > 0)
        yield received
    finally:
        reading.cancel()
        child.kill()
        await child.wait()


async def lines(child: asyncio.subprocess.Process) -> AsyncIterator[str]:
    assert child.stdout
    while line := await child.stdout.readline():
        yield line.decode().rstrip("\n")


def end_of(line: str) -> dict[str, Any] | None:
    """The `end` event of a line; None for other lines."""
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and event.get("type") == "end":
            return event
    return None


def long_recording(folder: Path, utterances: int) -> Path:
    """The tests' sentences in turn, each with the silence that ends an utterance."""
    silence = np.zeros(int(SILENCE_S * SAMPLE_RATE_HZ), np.int16)
    found = sorted(RECORDINGS.glob("sense_and_sensibility_*.flac"))
    sentences = [np.concatenate([read_audio(path), silence]) for path in found]
    path = folder / f"{utterances}.flac"
    with soundfile.SoundFile(path, "w", SAMPLE_RATE_HZ, 1, "PCM_16") as recording:
        for number in range(utterances):
            recording.write(sentences[number % len(sentences)])
    return path


class Recogniser:
    """A `stream-hbaf` process at full speed, and the `end` events on its stdout."""

    def __init__(self, child: asyncio.subprocess.Process, *, stderr: Path) -> None:
        self._child = child
        self._stderr = stderr
        self.reported: list[tuple[str, int]] = []
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, recording: Path, port: int, *, state: Path) -> "Recogniser":
        stderr = state / "stderr"
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stream_hbaf.cli", "--file", str(recording), "--speed", "max"),
            *("--json", "--mqtt", f"mqtt://127.0.0.1:{port}", "--set", "mqtt.node=soak"),
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr.open("wb"),
            env=os.environ | {"XDG_STATE_HOME": str(state)},
            limit=2**20,
        )
        return cls(child, stderr=stderr)

    async def ends(self) -> None:
        if await self._child.wait() != 0:
            self._fail()
        await self._reading

    async def kill(self) -> None:
        if self._child.returncode is not None:
            self._fail()
        self._child.kill()
        await self._child.wait()
        await self._reading

    def _fail(self) -> NoReturn:
        stderr = self._stderr.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"the recogniser failed:\n{stderr}")

    async def reports(self, count: int) -> None:
        await until(lambda: len(self.reported) >= count or self._child.returncode is not None)

    async def _read(self) -> None:
        async for line in lines(self._child):
            if (event := end_of(line)) is not None:
                self.reported.append((event["id"], event["rev"]))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  about another process
        await asyncio.sleep(0.02)


async def restart(broker: Broker, received: Received) -> None:
    """Restart the broker; returns when the subscriber, whose session it keeps, has reconnected."""
    connections = received.connections
    await broker.start()
    await until(lambda: received.connections > connections)


async def kill_broker(
    broker: Broker,
    received: Received,
    recogniser: Recogniser,
    *,
    moments: list[int],
    generator: random.Random,
) -> None:
    """Kill the broker at each of the ``moments``: numbers of reported ends."""
    for number, moment in enumerate(moments, start=1):
        await recogniser.reports(moment)
        await asyncio.sleep(generator.uniform(0.0, 1.0))
        await broker.kill()
        await asyncio.sleep(generator.choice((0.0, generator.uniform(0.0, 3.0))))
        await restart(broker, received)
        print(f"  broker killed {number} times, {len(received.first)} ends so far", flush=True)


async def soak_broker(folder: Path, *, utterances: int, restarts: int, seed: int) -> bool:
    """Kill the broker while one long recording is recognised."""
    recording = long_recording(folder, utterances)
    broker, generator = Broker(folder), random.Random(seed)
    await broker.start()
    async with subscriber(broker.port) as received:
        began = time.monotonic()
        recogniser = await Recogniser.start(recording, broker.port, state=folder)
        await recogniser.reports(1)
        moments = sorted(generator.choices(range(1, max(2, utterances * 9 // 10)), k=restarts))
        killing = asyncio.create_task(
            kill_broker(broker, received, recogniser, moments=moments, generator=generator)
        )
        await recogniser.ends()
        took_s = time.monotonic() - began
        early = not killing.done()
        killing.cancel()
        await settle(received, recogniser.reported)
    await broker.kill()
    if early:
        print("  the run ended before the last kill: use more utterances or fewer restarts")
    return report("broker killed", recogniser.reported, received, took_s=took_s) and not early


async def soak_recogniser(folder: Path, *, kills: int, seed: int) -> bool:
    """Kill the recogniser; every other time while the broker is down, to test the outbox."""
    recording = long_recording(folder, 40)
    last = long_recording(folder, 1)
    broker, generator = Broker(folder), random.Random(seed)
    reported: list[tuple[str, int]] = []
    await broker.start()
    async with subscriber(broker.port) as received:
        began = time.monotonic()
        for number in range(kills):
            recogniser = await Recogniser.start(recording, broker.port, state=folder)
            await recogniser.reports(1)
            await asyncio.sleep(generator.uniform(0.0, 2.0))
            away = number % 2 == 1
            if away:
                await broker.kill()
                await asyncio.sleep(generator.uniform(0.0, 2.0))
            await recogniser.kill()
            reported += recogniser.reported
            if away:
                await restart(broker, received)
            print(
                f"  recogniser killed {number + 1} times, {len(reported)} ends reported", flush=True
            )
        recogniser = await Recogniser.start(last, broker.port, state=folder)
        await recogniser.ends()  # it publishes what the killed ones left in the outbox
        reported += recogniser.reported
        await settle(received, reported)
    await broker.kill()
    return report("recogniser killed", reported, received, took_s=time.monotonic() - began)


async def settle(received: Received, reported: Sequence[tuple[str, int]]) -> None:
    """Wait until all reported ends have been received, at most 10 s."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            await until(lambda: set(reported) <= set(received.ends))


def report(
    what: str, reported: Sequence[tuple[str, int]], received: Received, *, took_s: float
) -> bool:
    """Print the figures; True if nothing is missing, double or out of order."""
    known = set(reported)
    missing = known - set(received.ends)
    once = [end for end in dict.fromkeys(received.ends) if end in known]
    double = len(received.first) - len(set(received.first))
    in_order = once == [end for end in reported if end not in missing]
    print(
        f"{what}: {len(reported)} ends reported, {len(missing)} missing, "
        f"{len(received.ends) - len(dict.fromkeys(received.ends))} sent again, "
        f"{double} double after de-duplication, {'in' if in_order else 'OUT OF'} order; "
        f"{received.connections} connections of the subscriber, {took_s:.0f} s"
    )
    return not missing and not double and in_order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=50, help="of the broker")
    parser.add_argument("--kills", type=int, default=20, help="of the recogniser")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    passed = True
    if chosen.restarts:
        with tempfile.TemporaryDirectory() as folder:
            soak = soak_broker(
                Path(folder),
                utterances=chosen.utterances,
                restarts=chosen.restarts,
                seed=chosen.seed,
            )
            passed &= asyncio.run(soak)
    if chosen.kills:
        with tempfile.TemporaryDirectory() as folder:
            passed &= asyncio.run(
                soak_recogniser(Path(folder), kills=chosen.kills, seed=chosen.seed)
            )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
