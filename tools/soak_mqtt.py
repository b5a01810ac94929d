#!/usr/bin/env python3
"""What survives when broker and recogniser are killed, again and again.

    tools/soak_mqtt.py [--utterances 1000] [--restarts 50] [--kills 20] [--seed 0]

First a long recording, made of the tests' sentences, is recognised as fast as it goes while a
mosquitto is killed at random and started again. Then the recogniser is killed at random while it
reports on stdout, and started again. Counted is what a subscriber gets whose session the broker
keeps: every `end`, none twice (by `id` and `rev`), in order.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
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
# mosquitto keeps what it acknowledged through a kill only if it writes down each change.
SETTINGS = """
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {folder}/
autosave_on_changes true
autosave_interval 1
max_inflight_messages 0
max_queued_messages 0
user root
"""


class Broker:
    """A mosquitto that can be killed and started again at the same port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._file = folder / "mosquitto.conf"
        self._file.write_text(SETTINGS.format(port=self.port, folder=folder))
        self._child: asyncio.subprocess.Process | None = None

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


@dataclass
class Arrived:
    """What a subscriber got, in order, again and again included."""

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
async def subscriber(port: int) -> AsyncIterator[Arrived]:
    """mosquitto_sub with a session, so that the broker keeps for it what comes meanwhile."""
    arrived = Arrived()
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
                arrived.connections += 1
            elif (event := end_of(line)) is not None:
                arrived.ends.append((event["id"], event["rev"]))

    reading = asyncio.create_task(read())
    await until(lambda: arrived.connections > 0)
    yield arrived
    reading.cancel()
    child.kill()
    await child.wait()


async def lines(child: asyncio.subprocess.Process) -> AsyncIterator[str]:
    assert child.stdout
    while line := await child.stdout.readline():
        yield line.decode().rstrip("\n")


def end_of(line: str) -> dict[str, Any] | None:
    """The `end` that a line is, if it is one; half a line is none."""
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and event.get("type") == "end":
            return event
    return None


def long_recording(folder: Path, utterances: int) -> Path:
    """The tests' sentences over and over, each with the silence that ends an utterance."""
    silence = np.zeros(int(SILENCE_S * SAMPLE_RATE_HZ), np.int16)
    found = sorted(RECORDINGS.glob("sense_and_sensibility_*.flac"))
    sentences = [np.concatenate([read_audio(path), silence]) for path in found]
    path = folder / f"{utterances}.flac"
    with soundfile.SoundFile(path, "w", SAMPLE_RATE_HZ, 1, "PCM_16") as recording:
        for number in range(utterances):
            recording.write(sentences[number % len(sentences)])
    return path


class Recogniser:
    """The command itself, at full speed, and what it reports on stdout."""

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
            self._give_up()
        await self._reading

    async def kill(self) -> None:
        if self._child.returncode is not None:
            self._give_up()
        self._child.kill()
        await self._child.wait()
        await self._reading

    def _give_up(self) -> NoReturn:
        why = self._stderr.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"the recogniser ended, but nobody killed it:\n{why}")

    async def reports(self, count: int) -> None:
        await until(lambda: len(self.reported) >= count or self._child.returncode is not None)

    async def _read(self) -> None:
        async for line in lines(self._child):
            if (event := end_of(line)) is not None:
                self.reported.append((event["id"], event["rev"]))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  another program has no event to wait for
        await asyncio.sleep(0.02)


async def start_again(broker: Broker, arrived: Arrived) -> None:
    """Returns once the subscriber is back: what is for nobody is kept by nobody."""
    connections = arrived.connections
    await broker.start()
    await until(lambda: arrived.connections > connections)


async def kill_broker(
    broker: Broker,
    arrived: Arrived,
    recogniser: Recogniser,
    *,
    moments: list[int],
    rest: random.Random,
) -> None:
    """Each time when so many ends have been reported, or as soon as the subscriber is back."""
    for number, moment in enumerate(moments, start=1):
        await recogniser.reports(moment)
        await asyncio.sleep(rest.uniform(0.0, 1.0))
        await broker.kill()
        await asyncio.sleep(rest.choice((0.0, rest.uniform(0.0, 3.0))))
        await start_again(broker, arrived)
        print(f"  broker killed {number} times, {len(arrived.first)} ends so far", flush=True)


async def soak_broker(folder: Path, *, utterances: int, restarts: int, seed: int) -> bool:
    """The broker is killed while one long recording is recognised."""
    recording = long_recording(folder, utterances)
    broker, rest = Broker(folder), random.Random(seed)
    await broker.start()
    async with subscriber(broker.port) as arrived:
        began = time.monotonic()
        recogniser = await Recogniser.start(recording, broker.port, state=folder)
        await recogniser.reports(1)
        moments = sorted(rest.choices(range(1, max(2, utterances * 9 // 10)), k=restarts))
        killing = asyncio.create_task(
            kill_broker(broker, arrived, recogniser, moments=moments, rest=rest)
        )
        await recogniser.ends()
        took_s = time.monotonic() - began
        early = not killing.done()
        killing.cancel()
        await settle(arrived, recogniser.reported)
    await broker.kill()
    if early:
        print("  it was over before the last kill: take more utterances or fewer restarts")
    return judge("broker killed", recogniser.reported, arrived, took_s=took_s) and not early


async def soak_recogniser(folder: Path, *, kills: int, seed: int) -> bool:
    """The recogniser is killed, every other time after the broker, so that its outbox counts."""
    recording = long_recording(folder, 40)
    last = long_recording(folder, 1)
    broker, rest = Broker(folder), random.Random(seed)
    reported: list[tuple[str, int]] = []
    await broker.start()
    async with subscriber(broker.port) as arrived:
        began = time.monotonic()
        for number in range(kills):
            recogniser = await Recogniser.start(recording, broker.port, state=folder)
            await recogniser.reports(1)
            await asyncio.sleep(rest.uniform(0.0, 2.0))
            away = number % 2 == 1
            if away:
                await broker.kill()
                await asyncio.sleep(rest.uniform(0.0, 2.0))
            await recogniser.kill()
            reported += recogniser.reported
            if away:
                await start_again(broker, arrived)
            print(
                f"  recogniser killed {number + 1} times, {len(reported)} ends reported", flush=True
            )
        recogniser = await Recogniser.start(last, broker.port, state=folder)
        await recogniser.ends()  # it publishes what the killed ones left
        reported += recogniser.reported
        await settle(arrived, reported)
    await broker.kill()
    return judge("recogniser killed", reported, arrived, took_s=time.monotonic() - began)


async def settle(arrived: Arrived, reported: Sequence[tuple[str, int]]) -> None:
    """Until all that was reported is there, for 10 s at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            await until(lambda: set(reported) <= set(arrived.ends))


def judge(
    what: str, reported: Sequence[tuple[str, int]], arrived: Arrived, *, took_s: float
) -> bool:
    """Print the figures; True if nothing is missing, double or out of order."""
    known = set(reported)
    missing = known - set(arrived.ends)
    once = [end for end in dict.fromkeys(arrived.ends) if end in known]
    double = len(arrived.first) - len(set(arrived.first))
    in_order = once == [end for end in reported if end not in missing]
    print(
        f"{what}: {len(reported)} ends reported, {len(missing)} missing, "
        f"{len(arrived.ends) - len(dict.fromkeys(arrived.ends))} sent again, "
        f"{double} double after de-duplication, {'in' if in_order else 'OUT OF'} order; "
        f"{arrived.connections} connections of the subscriber, {took_s:.0f} s"
    )
    return not missing and not double and in_order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=50, help="of the broker")
    parser.add_argument("--kills", type=int, default=20, help="of the recogniser")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    sound = True
    if chosen.restarts:
        with tempfile.TemporaryDirectory() as folder:
            soak = soak_broker(
                Path(folder),
                utterances=chosen.utterances,
                restarts=chosen.restarts,
                seed=chosen.seed,
            )
            sound &= asyncio.run(soak)
    if chosen.kills:
        with tempfile.TemporaryDirectory() as folder:
            sound &= asyncio.run(
                soak_recogniser(Path(folder), kills=chosen.kills, seed=chosen.seed)
            )
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
