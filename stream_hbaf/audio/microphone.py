"""The microphone as an audio source, captured by a child process that is restarted when lost."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Self, Unpack

import numpy as np

from stream_hbaf.audio.capture import CRASHED, FIRST_SOUND_S, HEADER
from stream_hbaf.audio.source import RATE_HZ, Chunk, OnStatus, SourceOptions, retries
from stream_hbaf.errors import DeviceError

START_S = 10.0  # for the child to start, on a busy machine
LAST_RETRY_S = 5.0
END_S = 0.5  # for the child to exit by itself, before it is killed
UNREAD_BYTES = 1 << 14  # asyncio holds twice this, one second; then the child has to queue


class Microphone:
    """A microphone as a source; when its device is lost, it is reopened until it is back.

    ``device`` is a name, part of a name, a number, or None for the default. Opening waits for the
    first sound, or raises DeviceError. Afterwards a loss is reported to ``on_status``, and the
    first chunk after it has ``after_gap``; samples are numbered as if no sound had been lost.
    """

    def __init__(self, device: str | int | None, **options: Unpack[SourceOptions]) -> None:
        self.name = "default" if device is None else str(device)
        self._device = device
        self._channel, self._chunk_ms = options.get("channel"), options["chunk_ms"]
        self._on_status = options["on_status"]
        self._child: _Child | None = None
        self._closed = asyncio.Event()
        self._position = 0  # samples given so far
        self._first: tuple[float, bool, bytes] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._closed.set()
        if self._child is not None:
            await self._child.end()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The microphone's sound until the source is closed."""
        assert self._child is not None, "open the microphone first"
        returned = False
        while not self._closed.is_set():
            piece, self._first = self._first or await self._child.read(), None
            if piece is None:
                returned = True
                await self._restart(self._child)
                continue
            captured_at, after_gap, content = piece
            samples = np.frombuffer(content, "<i2").astype(np.int16, copy=False)
            start, self._position = self._position, self._position + len(samples)
            gap, returned = after_gap or returned, False
            yield Chunk(start=start, samples=samples, captured_at=captured_at, after_gap=gap)

    async def _start(self) -> None:
        """Spawn the child and wait for its first chunk. Raises DeviceError if there is none."""
        self._child = child = _Child(self._device, channel=self._channel, chunk_ms=self._chunk_ms)
        await child.connect(self._on_status)
        try:
            async with asyncio.timeout(START_S + FIRST_SOUND_S):
                self._first = await child.read()
        except TimeoutError:
            await child.end()
            raise DeviceError(
                f"microphone {self.name!r} gives no sound; try another ('stream-hbaf devices')"
            ) from None
        if self._first is None:
            reason = await child.reason()
            await child.end()
            raise DeviceError(reason)
        child.opened = True

    async def _restart(self, dead: "_Child") -> None:
        """Spawn children until one gives sound or the source is closed."""
        reason = await dead.reason()
        if self._closed.is_set():
            return
        self._on_status("offline", f"{reason} (trying again)")
        await dead.end()
        async for _ in retries(self._closed, longest_s=LAST_RETRY_S):
            with contextlib.suppress(DeviceError):  # reported already: the device is still away
                await self._start()
                self._on_status("online", f"microphone {self.name!r} is back")
                return


class _Child:
    """One capture process (``capture.py``) with its sound and its status lines."""

    def __init__(self, device: str | int | None, *, channel: int | None, chunk_ms: int) -> None:
        self._pipes: list[asyncio.ReadTransport] = []
        self._follower: asyncio.Task[None] | None = None
        self._size = chunk_ms * RATE_HZ // 1000 * 2
        self._detail = CRASHED
        self.opened = False  # it has given sound; an earlier status is the outcome of opening
        options = {"chunk-ms": chunk_ms, "device": device, "channel": channel}
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        command = [sys.executable, "-m", "stream_hbaf.audio.capture", *given]
        self._popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    async def connect(self, on_status: OnStatus) -> None:
        """Read the child's pipes on the event loop; ``on_status`` gets its later statuses."""
        loop = asyncio.get_running_loop()
        self._sound, self._lines = asyncio.StreamReader(UNREAD_BYTES), asyncio.StreamReader()
        ends = ((self._sound, self._popen.stdout), (self._lines, self._popen.stderr))
        for reader, pipe in ends:
            protocol = partial(asyncio.StreamReaderProtocol, reader)
            self._pipes.append((await loop.connect_read_pipe(protocol, pipe))[0])
        self._follower = asyncio.create_task(self._follow(on_status), name="capture status")

    async def read(self) -> tuple[float, bool, bytes] | None:
        """captured_at, after_gap and the samples' bytes; None once the child has ended."""
        try:
            piece = await self._sound.readexactly(HEADER.size + self._size)
        except asyncio.IncompleteReadError:
            return None
        captured_at, after_gap = HEADER.unpack_from(piece)
        return captured_at, after_gap, piece[HEADER.size :]

    async def reason(self) -> str:
        """Why the child has ended, in a line."""
        if self._follower is not None:
            await asyncio.wait([self._follower], timeout=END_S)
        return self._detail

    async def end(self) -> None:
        """End the child within a second, and reap it."""
        self._popen.terminate()
        try:
            await asyncio.to_thread(self._popen.wait, END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            await asyncio.to_thread(self._popen.wait)
        finally:
            self._popen.kill()  # in case this task was cancelled; does nothing if it has ended
            self._popen.wait()
            for pipe in self._pipes:
                pipe.close()
            if self._follower is not None:
                self._follower.cancel()

    async def _follow(self, on_status: OnStatus) -> None:
        async for line in self._lines:
            try:
                status = json.loads(line)
                state, detail = status["state"], status["detail"]
            except (ValueError, TypeError, KeyError):
                self._detail = line.decode(errors="replace").strip() or self._detail
                continue
            if state == "offline":
                self._detail = detail
            elif self.opened:
                on_status(state, detail)
