"""Sound by the Wyoming protocol, against the protocol's own client and server."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dialogue_samples import utterance
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from source_log import SourceLog
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong
from wyoming.satellite import RunSatellite
from wyoming.server import AsyncEventHandler, AsyncTcpServer

from stream_hbaf.audio import wyoming
from stream_hbaf.audio.file import read_audio
from stream_hbaf.audio.push_source import Address, PushSource
from stream_hbaf.audio.wyoming import SatelliteSource, WyomingSource
from stream_hbaf.errors import AudioError, DeviceError
from stream_hbaf.events import Speech
from stream_hbaf.live.answers import Answers
from stream_hbaf.publish.messages import encode

SPEECH = Path(__file__).parent / "recordings" / "sense_and_sensibility_01_austen_64kb-0880.flac"
S16_16K = {"rate": 16_000, "width": 2, "channels": 1}


@asynccontextmanager
async def followed(source: PushSource, *, received: SourceLog) -> AsyncIterator[None]:
    async with source:
        following = asyncio.create_task(received.follow(source))
        yield
    async with asyncio.timeout(5):
        await following


def run(scene: Callable[[WyomingSource, SourceLog], Awaitable[None]]) -> SourceLog:
    """Play a scene with a source that listens; what was received until it was closed."""

    async def play() -> SourceLog:
        received = SourceLog()
        source = WyomingSource(Address("127.0.0.1", 0), chunk_ms=32, on_status=received.on_status)
        async with followed(source, received=received):
            await scene(source, received)
        return received

    return asyncio.run(play())


def client_of(source: WyomingSource) -> AsyncTcpClient:
    return AsyncTcpClient(source.address.host, source.address.port)


def sound_events(speech: NDArray[np.int16], *, size: int) -> list[Event]:
    pieces = [speech[start : start + size].tobytes() for start in range(0, len(speech), size)]
    chunks = [AudioChunk(**S16_16K, audio=piece).event() for piece in pieces]
    return [AudioStart(**S16_16K).event(), *chunks, AudioStop().event()]


@pytest.mark.parametrize("size", [100, 1_024, 20_000])
def test_wyoming_sound(size: int) -> None:
    """What the protocol's own client sends arrives bit for bit, in whatever pieces."""
    speech = read_audio(SPEECH)

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        async with client_of(source) as client:
            for event in sound_events(speech, size=size):
                await client.write_event(event)
            await received.until(
                lambda: sum(len(chunk.samples) for chunk in received.chunks) == len(speech)
            )
            assert received.states == ["offline", "online"]
        await received.until(lambda: len(received.states) == 3)

    received = run(scene)
    assert np.array_equal(received.samples, speech)
    assert received.statuses[-1][1].endswith("127.0.0.1 has left (waiting for the next)")


def test_wyoming_stop() -> None:
    """What follows an audio-stop is a new beginning, possibly of another format."""
    loud = np.full(1_000, 2**24, "<i4").tobytes()
    events = [
        *sound_events(np.full(700, 5, np.int16), size=700),
        AudioChunk(rate=16_000, width=4, channels=1, audio=loud).event(),
    ]

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        async with client_of(source) as client:
            for event in events:
                await client.write_event(event)
            await received.until(lambda: len(received.chunks) >= 4)

    received = run(scene)
    assert [len(chunk.samples) for chunk in received.chunks] == [512, 188, 0, 512, 488, 0]
    assert [chunk.start for chunk in received.chunks] == [0, 512, 700, 700, 1_212, 1_700]
    assert [chunk.after_gap for chunk in received.chunks] == [False, False, True, True, False, True]
    assert set(received.samples[700:].tolist()) == {256}


def test_wyoming_description() -> None:
    """Asked what it is, it says that it listens, and claims no service that would owe an answer."""

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        async with client_of(source) as client:
            await client.write_event(Describe().event())
            answer = await client.read_event()
            assert answer is not None
            about = Info.from_event(answer)
            assert (about.asr, about.tts, about.wake, about.handle, about.satellite) == (
                [],
                [],
                [],
                [],
                None,
            )
            [listener] = about.snd
            assert listener.name == "stream-hbaf"
            assert listener.snd_format.rate == 16_000
            await client.write_event(Ping(text="there?").event())
            answer = await client.read_event()
            assert answer is not None
            assert Pong.from_event(answer).text == "there?"

    assert run(scene).states == ["offline"]


def test_wyoming_emotions() -> None:
    """A client that asks gets the ends of its source, with the published fields; others get none,
    and nothing else is answered."""
    end = utterance(1, source="hall")

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        answers = Answers({"hall": source})
        async with client_of(source) as client, client_of(source) as other:
            await client.write_event(Event("emotions"))
            for one in (client, other):
                await one.write_event(Ping("here").event())
                pong = await one.read_event()
                assert pong is not None
                assert pong.type == "pong"
            for event in (
                end.model_copy(update={"type": "update"}),
                utterance(2, source="another"),
                Speech(source="hall", on=False),
                end,
            ):
                await answers.send(event)
            answer = await asyncio.wait_for(client.read_event(), 5)
            assert answer is not None
            assert answer.type == "emotion"
            assert answer.data == json.loads(encode(end))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(other.read_event(), 0.2)
        await answers.send(end)  # nobody is there any more

    run(scene)


def test_wyoming_emotions_that_are_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asks and doesn't read is disconnected with a line."""
    monkeypatch.setattr(wyoming, "MOST_UNREAD", 1 << 12)

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        answers = Answers({"hall": source})
        reader, writer = await asyncio.open_connection("127.0.0.1", source.address.port, limit=1)
        writer.write(b'{"type": "emotions"}\n{"type": "ping"}\n')
        assert b"pong" in await reader.readexactly(20)
        end = utterance(1, source="hall", text="x" * 100_000)
        for _ in range(500):
            await answers.send(end)
            await asyncio.sleep(0)
        writer.close()

    run(scene)
    (record,) = caplog.records
    assert record.message.endswith("a client doesn't read its emotions: disconnected")


def test_wyoming_second_sender() -> None:
    """While one sends, another is refused with a reason; it may still ask what we are."""

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        async with client_of(source) as first, client_of(source) as second:
            await first.write_event(AudioStart(**S16_16K).event())
            await received.until(lambda: "online" in received.states)
            await second.write_event(Describe().event())
            assert (await second.read_event() or Event("end")).type == "info"
            await second.write_event(AudioStart(**S16_16K).event())
            refusal = await second.read_event()
            assert refusal is not None
            reason = f"{source.name}: somebody else is sending already; one can at a time"
            assert Error.from_event(refusal).text == reason
            assert await second.read_event() is None
            await first.write_event(AudioChunk(**S16_16K, audio=bytes(1_024)).event())
            await received.until(lambda: len(received.chunks) == 1)

    assert run(scene).states == ["offline", "online", "offline"]


def header(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello\n", "a line that is no JSON object"),
        (b"[]\n", "a line that is no JSON object"),
        (b"\xff\xfe\n", "a line that is no JSON object"),
        (b"x" * 70_000, "a line longer than 65536 bytes"),
        (header(data={}), 'an event without a "type", or whose "data" is no object'),
        (header(type="ping", data=[1]), 'an event without a "type", or whose "data" is no object'),
        (header(type="ping", data_length=2) + b"[]", "a line that is no JSON object"),
        (header(type="x", data_length=-1), 'a "data_length" that is no number from 0 to 65536'),
        (
            header(type="x", payload_length=10**12),
            'a "payload_length" that is no number from 0 to 131072',
        ),
        (
            header(type="audio-start", data={"rate": 16_000, "channels": 1, "width": {"a": 2}}),
            'an audio-start without "rate", "channels" and a "width" of 2 or 4 bytes',
        ),
        (
            header(type="audio-start", data={"rate": 16_000, "channels": 1, "width": 1}),
            'an audio-start without "rate", "channels" and a "width" of 2 or 4 bytes',
        ),
        (
            header(type="audio-chunk", data=S16_16K, payload_length=3) + b"odd",
            "3 bytes are no whole number of frames of 2 bytes",
        ),
    ],
)
def test_wyoming_malformed(content: bytes, reason: str) -> None:
    """An event that can't be understood ends its connection; sender and user get one line."""

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        reader, writer = await asyncio.open_connection(source.address.host, source.address.port)
        writer.write(content)
        answer = json.loads(await reader.readline())
        assert answer == {"type": "error", "data": {"text": reason}}
        await reader.read()  # until it hangs up
        writer.close()
        await received.until(lambda: any(reason in line for _, line in received.statuses))

    received = run(scene)
    [(state, line)] = [status for status in received.statuses if reason in status[1]]
    assert state == "offline"
    assert line.split(": ", 1)[1].removesuffix(" (waiting for the next)") == f"127.0.0.1: {reason}"


HEADERS = st.dictionaries(
    st.sampled_from(["type", "data", "data_length", "payload_length"]),
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(), st.just({"a": 1})
    ),
)


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.binary(), HEADERS.map(lambda fields: header(**fields))), st.binary())
def test_wyoming_anything(line: bytes, rest: bytes) -> None:
    """Whatever comes is events, or an AudioError: nothing else comes of it."""

    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(line + rest)
        reader.feed_eof()
        with contextlib.suppress(AudioError):
            while (event := await wyoming.read_event(reader)) is not None:
                assert isinstance(event.type, str)

    asyncio.run(read())


def test_wyoming_broken_off() -> None:
    """A sender that dies in the middle of an event has its sound used, and its end reported."""

    async def scene(source: WyomingSource, received: SourceLog) -> None:
        _, writer = await asyncio.open_connection(source.address.host, source.address.port)
        writer.write(header(type="audio-chunk", data=S16_16K, payload_length=1_400) + bytes(1_400))
        writer.write(header(type="audio-chunk", data=S16_16K, payload_length=1_400) + bytes(9))
        writer.close()
        await received.until(lambda: len(received.states) == 3)

    received = run(scene)
    assert len(received.samples) == 700
    assert "an event broken off in the middle" in received.statuses[-1][1]


class Satellite(AsyncEventHandler):
    """Sends speech to a client after run-satellite and an answered ping, as satellites do."""

    def __init__(
        self, speech: NDArray[np.int16], hang_up: bool, log: list[str], *streams: Any
    ) -> None:
        super().__init__(*streams)
        self._speech, self._hang_up, self._log = speech, hang_up, log

    async def handle_event(self, event: Event) -> bool:
        self._log.append(event.type)
        if RunSatellite.is_type(event.type):
            await self.write_event(Ping(text="there?").event())
        elif Pong.is_type(event.type):
            for sound in sound_events(self._speech, size=1_024)[1:-1]:
                await self.write_event(sound)
            return not self._hang_up
        return True


@asynccontextmanager
async def satellite(
    speech: NDArray[np.int16], *, port: int = 0, hang_up: bool, log: list[str]
) -> AsyncIterator[int]:
    server = AsyncTcpServer("127.0.0.1", port)
    await server.start(partial(Satellite, speech, hang_up, log))
    assert server._server is not None
    listener: Any = server._server
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        await server.stop()
        await listener.wait_closed()


def test_satellite_sound() -> None:
    """A satellite gets run-satellite, its pings are answered, and its sound arrives bit for bit."""
    speech = read_audio(SPEECH)
    log: list[str] = []

    async def play() -> SourceLog:
        received = SourceLog()
        async with satellite(speech, hang_up=False, log=log) as port:
            source = SatelliteSource(
                Address("127.0.0.1", port), chunk_ms=32, on_status=received.on_status
            )
            async with followed(source, received=received):
                await received.until(
                    lambda: sum(len(chunk.samples) for chunk in received.chunks) == len(speech)
                )
        return received

    received = asyncio.run(play())
    assert np.array_equal(received.samples[: len(speech)], speech)
    assert received.states[0] == "online"
    assert log == ["run-satellite", "pong"]


def test_satellite_away_and_back() -> None:
    """A satellite that hangs up and goes away is connected to again; its sound follows a gap."""
    speech = np.full(700, 3, np.int16)
    log: list[str] = []

    async def play() -> SourceLog:
        received = SourceLog()
        async with satellite(speech, hang_up=True, log=log) as port:
            source = SatelliteSource(
                Address("127.0.0.1", port), chunk_ms=32, on_status=received.on_status
            )
            listening = followed(source, received=received)
            await listening.__aenter__()
            await received.until(lambda: "offline" in received.states)
        await asyncio.sleep(0.8)  # at least one attempt fails
        async with satellite(speech, port=port, hang_up=False, log=log):
            await received.until(
                lambda: received.states[-1] == "online" and len(received.chunks) >= 4
            )
            await listening.__aexit__(None, None, None)
        return received

    received = asyncio.run(play())
    assert received.states[:3] == ["online", "offline", "online"]
    assert received.statuses[1][1].endswith(
        "the satellite: it hung up; does another program use it? (trying again)"
    )
    assert [len(chunk.samples) for chunk in received.chunks[:4]] == [512, 188, 0, 512]
    assert [chunk.after_gap for chunk in received.chunks[:4]] == [False, False, True, True]


def test_satellite_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A satellite that neither sends nor answers pings counts as gone."""
    monkeypatch.setattr(wyoming, "PING_S", 0.05)
    monkeypatch.setattr(wyoming, "GONE_S", 0.2)
    pings: list[bytes] = []

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            pings.append(line)
        writer.close()

    async def play() -> SourceLog:
        received = SourceLog()
        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        place = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        source = SatelliteSource(place, chunk_ms=32, on_status=received.on_status)
        async with server, followed(source, received=received):
            await received.until(lambda: "offline" in received.states)
        return received

    received = asyncio.run(play())
    assert received.statuses[1][1].endswith("the satellite: no answer to pings (trying again)")
    assert [json.loads(line)["type"] for line in pings[:5]] == ["run-satellite", *["ping"] * 4]


def test_satellite_unreachable() -> None:
    """A satellite that isn't there is one line at the opening."""

    async def play() -> None:
        async with SatelliteSource(
            Address("127.0.0.1", 9), chunk_ms=32, on_status=SourceLog().on_status
        ):
            pass

    with pytest.raises(DeviceError) as error:
        asyncio.run(play())
    assert str(error.value) == (
        "satellite://127.0.0.1:9: can't be reached (Connection refused); "
        "does the satellite run there?"
    )
