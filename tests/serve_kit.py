"""A running service for streams, and clients of it, for the tests of ``stream-hbaf serve``."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import av
import numpy as np
import pytest
from live_kit import PATIENCE_S, EventLog
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from stream_hbaf.config import SAMPLE_RATE_HZ, ServeConfig
from stream_hbaf.events import Utterance
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.runtime import Publisher
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.serve.server import StreamServer
from stream_hbaf.stream_client import StreamEvent, stream

Sound = NDArray[np.int16]

S16_16K = json.dumps({"rate": 16_000})
CHUNK = 1600  # samples: 100 ms


class Service:
    """What a test may look at, and stop."""

    def __init__(self, server: StreamServer, pipeline: LivePipeline, log: EventLog) -> None:
        self.server = server
        self.pipeline = pipeline
        self.log = log
        self.stop = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what no event tells of."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def until_gone(self, *names: str) -> None:
        await self.until(lambda: not self.pipeline.sources.keys() & set(names))


@asynccontextmanager
async def serving(
    recognizer: Recognizer, *publishers: Publisher, **settings: Any
) -> AsyncIterator[Service]:
    server = StreamServer(ServeConfig.model_validate({"port": 0, **settings}))
    await server.open()
    log = EventLog()
    pipeline = LivePipeline(recognizer, [log, *publishers, server])
    server.pipeline = pipeline
    service = Service(server, pipeline, log)
    running = asyncio.create_task(
        pipeline.run({}, stop=service.stop, beside=[server.start()]), name="service"
    )
    await service.until(lambda: server.is_started or running.done())
    try:
        yield service
    finally:
        service.stop.set()
        await running


async def pieces(sound: Sound) -> AsyncIterator[bytes]:
    for start in range(0, len(sound), CHUNK):
        yield sound[start : start + CHUNK].astype("<i2").tobytes()


async def opus_packets(sound: Sound) -> AsyncIterator[bytes]:
    """The sound as Opus packets of 20 ms."""
    codec = av.CodecContext.create("libopus", "w")
    assert isinstance(codec, av.AudioCodecContext)
    codec.sample_rate, codec.layout, codec.format = SAMPLE_RATE_HZ, "mono", "s16"
    whole = len(sound) // 320 * 320
    for start in range(0, whole, 320):
        frame = av.AudioFrame.from_ndarray(sound[None, start : start + 320], layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE_HZ, start
        for packet in codec.encode(frame):
            yield bytes(packet)


async def ends_of(service: Service, sound: Sound, **named: Any) -> list[Utterance]:
    """What a client gets for a sound."""
    return ends([e async for e in stream(service.server.url, pieces(sound), **named)])


def assert_same(found: list[Utterance], expected: list[Utterance]) -> None:
    """Times and text equal, probabilities within 1e-5; and there are some."""
    assert [(e.audio_start_ms, e.audio_end_ms, e.text) for e in found] == [
        (e.audio_start_ms, e.audio_end_ms, e.text) for e in expected
    ]
    assert found
    for one, other in zip(found, expected, strict=True):
        assert one.emotion is not None
        assert other.emotion is not None
        assert one.emotion.probabilities == pytest.approx(other.emotion.probabilities, abs=1e-5)


def ends(events: Sequence[StreamEvent]) -> list[Utterance]:
    return [e for e in events if isinstance(e, Utterance) and e.type == "end"]


async def next_event(connection: ClientConnection, *kinds: str) -> dict[str, Any]:
    """The next message, or the next of some kinds."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            fields: dict[str, Any] = json.loads(await connection.recv())
            if not kinds or fields["event"] in kinds:
                return fields


async def next_end(connection: ClientConnection) -> dict[str, Any]:
    while (fields := await next_event(connection, "utterance"))["type"] != "end":
        pass
    return fields


async def closed_for(connection: ClientConnection) -> tuple[int, str]:
    """Why the service closes a connection."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            while True:
                await connection.recv()
        except ConnectionClosed:
            return connection.close_code or 0, connection.close_reason or ""


def open_client(service: Service, query: str = "", **named: Any) -> connect:
    return connect(f"{service.server.url}?{query}", **named)
