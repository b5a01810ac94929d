"""Streams through ``stream-hbaf serve``, a process of its own, for ``bench_streams.py``."""

import asyncio
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from talks import CHUNK, RATE_HZ, Int16

MOST_STREAMS = 1000  # none is refused
STARTED = re.compile(r"serving up to .* at (ws://\S+?);")


class Service:
    """A service that runs, with what it has cost so far."""

    def __init__(self, pid: int, url: str) -> None:
        self.url = url
        self._proc = Path(f"/proc/{pid}")

    def cpu_s(self) -> float:
        """CPU seconds of its process."""
        times = (self._proc / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Its resident memory."""
        pages = (self._proc / "statm").read_text(encoding="ascii").split()[1]
        return int(pages) * resource.getpagesize() / 1e6


@contextmanager
def service(settings: Mapping[str, object]) -> Iterator[Service]:
    """Start a service with settings by name, without a broker, and end it."""
    changed = {**settings, "serve.max_streams": MOST_STREAMS, "mqtt.url": "none"}
    options = [part for item in changed.items() for part in ("--set", "{}={}".format(*item))]
    process = subprocess.Popen(
        [sys.executable, "-m", "stream_hbaf.cli", "serve", "--port", "0", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = ""
        while (found := STARTED.search(lines)) is None:
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"the service doesn't start: {lines}")
            lines += line
        threading.Thread(target=process.stderr.read, daemon=True).start()  # else it could block
        yield Service(process.pid, found[1])
    finally:
        process.terminate()
        process.wait()


async def follow(
    url: str, sound: Int16, *, delay_s: float, note: Callable[[Any, float], None]
) -> None:
    """Stream sound in real time; ``note`` gets each event and the ms since its speech ended.

    That is from when a microphone would have captured the speech's last sample until the client
    has the event: waiting to be sent, the network, and reading it back are included.
    """
    from stream_hbaf.config import SegmenterConfig
    from stream_hbaf.stream_client import stream

    began = time.monotonic() + delay_s

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(sound), CHUNK):
            piece = sound[start : start + CHUNK]
            due = began + (start + len(piece)) / RATE_HZ
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield piece.astype("<i2").tobytes()

    async for event in stream(url, chunks()):
        end_ms = getattr(event, "audio_end_ms", None) or 0.0
        if getattr(event, "trigger", None) == "silence":  # then the utterance has a post-roll
            end_ms -= SegmenterConfig().post_roll_ms
        note(event, (time.monotonic() - began) * 1000 - end_ms)
