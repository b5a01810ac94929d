#!/usr/bin/env python3
"""Plays a day of sound through the recogniser within an hour or two, and says what grows.

    tools/soak.py [--hours 24] [--speech 0.25] [--dialogue 12] [--corpora DIR] [--asr MODEL]
                  [--mqtt mosquitto|embedded|none] [--record] [--dashboard] [--allocations]

Speech with pauses, silence, noise, music, and an hour of one dialogue without a pause go the way of
a microphone's sound: voice activity, Whisper, openSMILE, network, broker, recording, page. A line
for each hour has memory and the CPU time of a chunk by kind of sound. Exits with 1 if memory grows
by more than LIMIT_MB an hour after the first hour, or if chunks take longer in the end.

Time is compressed by leaving out what is waiting only: a chunk is given once everything that the
one before has caused is done, running transcripts, final ones and messages included. So queues hold
what they hold in real time on a machine that is fast enough, as many running transcripts are made,
and times of capture, silences and the ends of dialogues are those of the simulated day.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from stream_hbaf.commands import limit_library_caches, limit_library_threads

limit_library_threads()
limit_library_caches()

import aiohttp  # noqa: E402
import numpy as np  # noqa: E402
from soak_mqtt import Broker  # noqa: E402
from soak_sound import HOUR_S, Block, Kind, Sound, day, load_clips, play  # noqa: E402

from stream_hbaf.audio.source import Chunk  # noqa: E402
from stream_hbaf.commands.run import FULL_SPEED_CHUNK_MS  # noqa: E402
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, SourceConfig, load_config  # noqa: E402
from stream_hbaf.events import AnyEvent, Level, Speech, Utterance  # noqa: E402
from stream_hbaf.features.turn_model import choose_engine  # noqa: E402
from stream_hbaf.recognizer import Recognizer  # noqa: E402
from stream_hbaf.running import Run, load_optional, with_broker  # noqa: E402

LIMIT_MB = 1.0  # an hour, of resident memory that is no file's
FLAT = 1.25  # the mean chunk of the last third, relative to the first third's
CHUNK = FULL_SPEED_CHUNK_MS * SAMPLE_RATE_HZ // 1000  # samples; each gives a level
SAMPLES = 10  # of memory and time, an hour
CAUSED = ("partial ", "transcribe ", "acoustic ", "turn ")  # names of tasks that a chunk causes
GROWTHS = 15  # places with the largest growth that are printed


class Following:
    """A publisher that knows whether all that a chunk has caused is done."""

    def __init__(self) -> None:
        self.utterances = 0
        self._followed = False  # the newest chunk has gone through the detector
        self._closing = 0  # utterances that have ended and aren't published
        self._changed = asyncio.Event()

    async def send(self, event: AnyEvent) -> None:
        match event:
            case Level():  # the chunk's last event
                self._followed = True
            case Speech(on=False):
                self._closing += 1
            case Utterance(type="end"):
                self._closing -= 1
                self.utterances += 1
        self._changed.set()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        pass

    async def settled(self) -> None:
        """Wait until the chunk that was given is done, and all that it has caused."""
        while not self._followed:
            await self._next()
        self._followed = False
        while caused := [t for t in asyncio.all_tasks() if t.get_name().startswith(CAUSED)]:
            await asyncio.wait(caused)
        while self._closing:
            await self._next()

    async def _next(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class PlayedSound:
    """A source: each chunk once the one before is done."""

    name = "soak"

    def __init__(
        self,
        sound: Iterable[tuple[Kind, Sound]],
        report: "Report",
        *,
        each_minute: Callable[[], Awaitable[None]],
    ) -> None:
        self._sound = sound
        self._report = report
        self._each_minute = each_minute

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def chunks(self) -> AsyncIterator[Chunk]:
        began, position, minutes = time.monotonic(), 0, 0
        for kind, piece in self._sound:
            for start in range(0, len(piece), CHUNK):
                samples = piece[start : start + CHUNK]
                end = position + len(samples)
                before = time.process_time()
                yield Chunk(position, samples, captured_at=began + end / SAMPLE_RATE_HZ)
                await self._report.following.settled()
                seconds, position = time.process_time() - before, end
                if position >= 60 * SAMPLE_RATE_HZ * (minutes + 1):
                    minutes += 1
                    await self._each_minute()
                self._report.add(kind, end, seconds)


class Report:
    """Samples memory and time while the sound plays, and prints a line for each hour."""

    def __init__(self, *, every_h: float, allocations: bool) -> None:
        self.following = Following()
        self.memory: list[tuple[float, float]] = []  # simulated hours, megabytes
        self.means: dict[Kind, list[float]] = defaultdict(list)  # CPU seconds of a chunk, by sample
        self._every_h = every_h
        self._allocations = allocations
        self._first: tracemalloc.Snapshot | None = None
        self._newest: dict[Kind, list[float]] = defaultdict(list)  # chunks since the last sample
        self._line: dict[Kind, list[float]] = defaultdict(list)  # chunks since the last line
        self._sample_due, self._line_due = 1 / SAMPLES, 0.0
        self._began = time.monotonic()

    def add(self, kind: Kind, samples: int, seconds: float) -> None:
        """A chunk that ends at ``samples`` is done."""
        hours = samples / SAMPLE_RATE_HZ / HOUR_S
        self._newest[kind].append(seconds)
        self._line[kind].append(seconds)
        if hours >= self._sample_due:
            self._sample_due += 1 / SAMPLES
            self.memory.append((hours, memory_mb("RssAnon")))
            for one, taken in self._newest.items():
                self.means[one].append(float(np.mean(taken)))
            self._newest.clear()
        if hours >= self._line_due:
            self._line_due += self._every_h
            self._print(hours)
            self._line.clear()

    def _print(self, hours: float) -> None:
        heap = " ".join(f"{name} {size:.0f}" for name, size in native_heap().items())
        chunks = ", ".join(
            f"{kind} {1000 * np.mean(taken):.1f} {1000 * np.quantile(taken, 0.95):.1f}"
            for kind, taken in sorted(self._line.items())
        )
        files = len(list(Path("/proc/self/fd").iterdir()))
        print(
            f"{hours:6.2f} h ({(time.monotonic() - self._began) / 60:.1f} min): "
            f"{memory_mb('VmRSS'):.0f} MB resident, {memory_mb('RssAnon'):.1f} MB of it own "
            f"({heap}), {len(gc.get_objects())} objects, "
            f"{len(asyncio.all_tasks())} tasks, {threading.active_count()} threads, {files} files, "
            f"{self.following.utterances} utterances; ms a chunk, mean and 95 %: {chunks}",
            flush=True,
        )
        if self._allocations:
            self._compare()

    def _compare(self) -> None:
        """Print where Python holds more than at the first line."""
        gc.collect()
        newest = tracemalloc.take_snapshot()
        if self._first is None:
            self._first = newest
        for one in newest.compare_to(self._first, "lineno")[:GROWTHS]:
            print(f"    {one.size_diff / 1e3:+9.1f} kB {one.count_diff:+8} {one.traceback}")

    def passes(self) -> bool:
        """Print whether memory and time are flat after the first hour; True if they are."""
        if len(self.memory) < SAMPLES:
            print("too short to tell whether anything grows; play some hours")
            return False
        hours, megabytes = np.array(self.memory).T
        later = hours >= min(1.0, hours[-1] / 4)
        slope = float(np.polyfit(hours[later], megabytes[later], 1)[0])
        print(
            f"memory after {hours[later][0]:.1f} h: {megabytes[later][0]:.0f} MB → "
            f"{megabytes[-1]:.0f} MB, at most {megabytes.max():.0f} MB; {slope:+.2f} MB an hour "
            f"(limit {LIMIT_MB:+.2f})"
        )
        flat = True
        for kind, means in sorted(self.means.items()):
            third = max(1, len(means) // 3)
            first, last = np.mean(means[:third]), np.mean(means[-third:])
            flat &= bool(last <= FLAT * first)
            print(
                f"{kind}: a chunk took {1000 * first:.1f} ms at first, {1000 * last:.1f} ms at last"
            )
        return slope <= LIMIT_MB and flat


class _MallInfo(ctypes.Structure):
    """glibc's mallinfo2, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("heap", "_1", "_2", "_3", "mapped", "_4", "_5", "used", "free", "_6")
    ]


def native_heap() -> dict[str, float]:
    """Megabytes that malloc has in use, keeps free, and has mapped one by one; {} without glibc."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return {}
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return {name: getattr(found, name) / 1e6 for name in ("used", "free", "mapped")}


def memory_mb(what: str) -> float:
    """``VmRSS``, resident memory, or ``RssAnon``, the part of it that is no file's: pages of
    libraries and weights come and go as the system likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith(what))


def sound_of(
    blocks: Iterable[Block], clips: Sequence[Sound], *, seed: int
) -> Iterator[tuple[Kind, Sound]]:
    """The blocks' sound in pieces, each with its kind."""
    for number, block in enumerate(blocks):
        for piece in play(block, clips, chunk=CHUNK, seed=seed + number):
            yield block.kind, piece


async def soak(
    recognizer: Recognizer, config: Config, sound: Iterable[tuple[Kind, Sound]], report: Report
) -> None:
    """Recognise the sound, publish, record and show it as ``config`` says."""
    optional = load_optional(config)
    run = Run(config, recognizer, optional, tell=print)
    await run.start(report.following)
    source = PlayedSound(sound, report, each_minute=run.each_minute)
    beside = [read_page(optional.page.address)] if optional.page else []
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # the report is of what was played
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run.pipeline.run({SourceConfig(name="soak"): source}, stop=stop, beside=beside)


async def read_page(address: str) -> None:
    """Receive what an open page of the dashboard is sent."""
    async with aiohttp.ClientSession() as client, client.ws_connect(f"{address}events") as page:
        async for _ in page:
            pass


async def soak_with_broker(
    overrides: dict[str, Any], sound: Iterable[tuple[Kind, Sound]], report: Report, *, folder: Path
) -> None:
    """As ``soak``, with the broker that is asked for: a mosquitto of its own, for instance."""
    async with contextlib.AsyncExitStack() as opened:
        if overrides["mqtt.url"] == "mosquitto":
            broker = Broker(folder / "mosquitto")
            await broker.start()
            opened.push_async_callback(broker.kill)
            overrides = overrides | {"mqtt.url": f"mqtt://127.0.0.1:{broker.port}"}
        config = choose_engine(load_config(overrides=overrides))
        config = await with_broker(config, opened)
        recognizer = opened.enter_context(Recognizer(config))
        await soak(recognizer, config, sound, report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=24, help="simulated")
    parser.add_argument("--speech", type=float, default=0.25, help="its share of an hour")
    parser.add_argument("--dialogue", type=int, help="the hour (from 0) without a pause")
    parser.add_argument("--corpora", type=Path, help="a folder with more speech")
    parser.add_argument("--asr", default="base", help="the Whisper model")
    parser.add_argument("--mqtt", default="mosquitto", metavar="mosquitto|URL|embedded|none")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--dashboard", action="store_true")
    parser.add_argument("--every", type=float, default=1.0, help="hours between two lines")
    parser.add_argument("--allocations", action="store_true", help="where Python's memory grows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_args()
    if chosen.allocations:
        tracemalloc.start()
    clips = load_clips(chosen.corpora, seed=chosen.seed)
    blocks = day(chosen.hours, speech=chosen.speech, dialogue=chosen.dialogue, seed=chosen.seed)
    report = Report(every_h=chosen.every, allocations=chosen.allocations)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        overrides = {"transcript.model": chosen.asr, "mqtt.url": chosen.mqtt, "mqtt.node": "soak"}
        overrides |= {"record": str(folder / "sessions")} if chosen.record else {}
        overrides |= {"dashboard.port": 0} if chosen.dashboard else {}
        overrides |= dict(pair.split("=", 1) for pair in chosen.set)
        sound = sound_of(blocks, clips, seed=chosen.seed)
        asyncio.run(soak_with_broker(overrides, sound, report, folder=folder))
    return 0 if report.passes() else 1


if __name__ == "__main__":
    sys.exit(main())
