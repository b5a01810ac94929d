"""What the drills of ``tools/drill.py`` have: runs of the real command, and a broker."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soak_mqtt import Broker, Received, end_of, lines, long_recording, until

ROOT = Path(__file__).parent.parent
UTTERANCES = 6  # of a recording
LONGEST_LINE = 1 << 22  # bytes on stdout


class Failed(Exception):  # noqa: N818  of a drill
    """A run did not end as it should."""


class Run:
    """A ``stream-hbaf`` process, the `end` events on its stdout, and the lines on its stderr."""

    def __init__(self, child: asyncio.subprocess.Process, *, log: Path) -> None:
        self.child = child
        self.reported: list[tuple[str, int]] = []
        self.printed = 0  # lines on stdout
        self._log = log
        self._reading = asyncio.create_task(self._read())

    async def reports(self, count: int) -> None:
        """Wait for the number of reported ends. Raises Failed if the run ends before."""
        await until(lambda: len(self.reported) >= count or self.child.returncode is not None)
        if len(self.reported) < count:
            raise Failed(f"ended after {len(self.reported)} utterances: {self.last_line}")

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.kill()
        await self.child.wait()
        await self._reading

    async def ends(self, *statuses: int) -> str:
        """Wait for the end; returns the last line. Raises Failed for another exit status."""
        status = await self.child.wait()
        await self._reading
        if status not in statuses or "Traceback (most recent" in self._lines:
            raise Failed(f"ended with status {status}: {self.last_line}")
        return self.last_line

    @property
    def _lines(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def last_line(self) -> str:
        return (self._lines.strip().splitlines() or [""])[-1]

    def line_with(self, word: str) -> str:
        """The first line that has the word. Raises Failed if there is none."""
        found = [line for line in self._lines.splitlines() if word in line]
        if not found:
            raise Failed(f"no line says '{word}'; the last one: {self.last_line}")
        return found[0]

    async def _read(self) -> None:
        async for line in lines(self.child):
            self.printed += 1
            if (event := end_of(line)) is not None:
                self.reported.append((event["id"], event["rev"]))


@dataclass
class Stage:
    """What a drill has: a folder, a broker with a subscriber, and the runs that it starts."""

    folder: Path
    broker: Broker
    received: Received
    runs: list[Run] = field(default_factory=list)
    excused: set[tuple[str, int]] = field(default_factory=set)  # in a file that was damaged

    async def start(
        self,
        *options: str,
        utterances: int = UTTERANCES,
        state: Path | None = None,
        mqtt: str = "",
        environ: dict[str, str] | None = None,
        limit: Callable[[], None] | None = None,
    ) -> Run:
        """Start the command; ``limit`` is called in its process before."""
        recording = long_recording(self.folder, utterances)
        arguments = ["--file", str(recording), "--speed", "max", "--json", "--asr", "tiny.en"]
        arguments += ["--mqtt", mqtt or self.url, "--set", "mqtt.node=soak", *options]
        environ = {"XDG_STATE_HOME": str(state or self.folder)} | (environ or {})
        return await self.command(*arguments, environ=environ, limit=limit)

    async def command(
        self,
        *arguments: str,
        environ: dict[str, str] | None = None,
        limit: Callable[[], None] | None = None,
    ) -> Run:
        """Start the command with these arguments."""
        log = self.folder / f"stderr-{len(self.runs)}"
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stream_hbaf.cli", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=log.open("wb"),
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (environ or {}),
            limit=LONGEST_LINE,
            preexec_fn=limit,
        )
        self.runs.append(Run(child, log=log))
        return self.runs[-1]

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.broker.port}"

    async def deliver(self) -> None:
        """A run that ends in order, and delivers what others have left."""
        await (await self.start(utterances=1)).ends(0)

    async def refused(self, mqtt: str, *options: str) -> str:
        """Start with a broker that can't be used; returns the one line that says so."""
        run = await self.start(*options, mqtt=mqtt)
        return (await run.ends(2)).removeprefix("stream-hbaf: ")

    @property
    def reported(self) -> list[tuple[str, int]]:
        return [end for run in self.runs for end in run.reported]
