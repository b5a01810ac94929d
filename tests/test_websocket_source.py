"""Browsers and programs send their sound over a real WebSocket; it comes out as chunks."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from source_log import SourceLog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from stream_hbaf.audio.file import read_audio
from stream_hbaf.audio.push_source import Address, PushSource
from stream_hbaf.audio.source import CANCELS, to_int16
from stream_hbaf.audio.websocket import WebSocketSource, receive
from stream_hbaf.errors import AudioError, DeviceError

SPEECH = Path(__file__).parent / "recordings" / "sense_and_sensibility_01_austen_64kb-0880.flac"
S16_16K = json.dumps({"rate": 16_000, "channels": 1, "format": "s16le"})
Samples = NDArray[np.int16]


@asynccontextmanager
async def listening(
    *, received: SourceLog, token: str | None = None, channel: int | None = None, chunk_ms: int = 32
) -> AsyncIterator[WebSocketSource]:
    source = WebSocketSource(
        Address("127.0.0.1", 0),
        token=token,
        channel=channel,
        chunk_ms=chunk_ms,
        on_status=received.on_status,
    )
    async with source:
        following = asyncio.create_task(received.follow(source))
        yield source
    async with asyncio.timeout(5):
        await following


def address(source: WebSocketSource) -> str:
    return f"ws://{source.address}"


async def send(source: WebSocketSource, *messages: str | bytes) -> None:
    """Connect, send, hang up."""
    async with connect(address(source)) as connection:
        for message in messages:
            await connection.send(message)


async def closed_for(connection: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as closed:
        await asyncio.wait_for(connection.recv(), 5)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


def run(
    scene: Callable[[WebSocketSource, SourceLog], Awaitable[None]],
    *,
    channel: int | None = None,
    token: str | None = None,
    chunk_ms: int = 32,
) -> SourceLog:
    """Play a scene with a source that is listened to; what was received until it was closed."""

    async def play() -> SourceLog:
        received = SourceLog()
        async with listening(
            received=received, token=token, channel=channel, chunk_ms=chunk_ms
        ) as source:
            await scene(source, received)
        return received

    return asyncio.run(play())


def has_left(received: SourceLog, *, times: int) -> bool:
    return received.states.count("offline") == times


def gone(received: SourceLog) -> Callable[[], bool]:
    """That a sender came and went."""
    return lambda: len(received.states) >= 3 and received.states[-1] == "offline"


@settings(deadline=None, max_examples=15)
@given(draw=st.data(), chunk_ms=st.sampled_from([10, 32, 500]))
def test_websocket_any_split(draw: st.DataObject, chunk_ms: int) -> None:
    """However 16 kHz mono is cut into messages and chunks, it arrives bit for bit, tail and all."""
    speech = read_audio(SPEECH)
    cuts = draw.draw(st.lists(st.integers(0, len(speech)), min_size=4, max_size=40))
    pieces = np.split(speech, sorted({*cuts, *range(0, len(speech), 20_000)}))

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        await send(source, S16_16K, *(piece.tobytes() for piece in pieces))
        await received.until(gone(received))

    received = run(scene, chunk_ms=chunk_ms)
    assert np.array_equal(received.samples, speech)
    sizes = [len(chunk.samples) for chunk in received.chunks]
    whole, rest = divmod(len(speech), 16 * chunk_ms)
    assert sizes == [16 * chunk_ms] * whole + [rest] * (rest > 0) + [0]
    assert [chunk.start for chunk in received.chunks] == np.cumsum([0, *sizes])[:-1].tolist()


def test_websocket_browser() -> None:
    """A browser's 48 kHz floats become what the resampler makes of the whole."""
    rng = np.random.default_rng(0)
    sound = (rng.standard_normal((48_000, 2)) * 0.2).astype("<f4")
    format_message = json.dumps(
        {"rate": 48_000, "channels": 2, "format": "f32le", "speaker": "Anna"}
    )

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        pieces = [sound[start : start + 2_048].tobytes() for start in range(0, 48_000, 2_048)]
        async with connect(address(source)) as connection:
            await connection.send(format_message)
            for piece in pieces:
                await connection.send(piece)
            await received.until(lambda: len(received.chunks) > 20)
            assert source.speaker == "Anna"
        await received.until(gone(received))

    received = run(scene)
    mono = ((sound[:, 0] + sound[:, 1]) / np.float32(2)).astype("f4")
    assert np.array_equal(
        received.samples, to_int16(soxr.resample(mono, 48_000, 16_000, quality="HQ"))
    )
    assert received.statuses[1][1].endswith("127.0.0.1 (Anna) is sending")


def test_websocket_channel() -> None:
    """One channel of two can be listened to alone."""
    stereo = np.stack([np.full(16_000, 300), np.full(16_000, -7)], axis=1).astype("<i2")

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        await send(source, json.dumps({"rate": 16_000, "channels": 2}), stereo.tobytes())
        await received.until(gone(received))

    assert set(run(scene, channel=1).samples.tolist()) == {-7}
    assert set(run(scene, channel=0).samples.tolist()) == {300}


def test_websocket_channels_cancel() -> None:
    """A sender whose channels cancel each other out is reported, once."""
    wave = 9_000 * np.sin(np.arange(8_000) / 5)
    stereo = np.stack([wave, -wave], axis=1).astype("<i2").tobytes()

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        await send(source, json.dumps({"rate": 16_000, "channels": 2}), *[stereo] * 6)
        await received.until(gone(received))

    received = run(scene)
    assert received.states == ["offline", "online", "degraded", "offline"]
    assert received.statuses[2][1].endswith(f": {CANCELS}")


def test_websocket_senders_after_each_other() -> None:
    """A sender that leaves is reported, the next one's sound comes after a gap and is whole."""
    speech = read_audio(SPEECH)[:16_000]

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        for turn in (1, 2):
            await send(source, S16_16K, speech.tobytes())
            await received.until(partial(has_left, received, times=turn + 1))

    received = run(scene)
    assert received.states == ["offline", "online", "offline", "online", "offline"]
    name = received.statuses[0][1].removesuffix(": waiting for sound")
    assert received.statuses[2][1] == f"{name}: 127.0.0.1 has left (waiting for the next)"
    assert np.array_equal(received.samples, np.concatenate([speech, speech]))
    after_gap = {chunk.start for chunk in received.chunks if chunk.after_gap}
    assert after_gap == {16_000, 32_000}


def test_websocket_second_sender() -> None:
    """While one sends, another is refused with the reason, not told who it is, and the first goes
    on undisturbed."""
    speech = read_audio(SPEECH)[:16_000]

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        async with connect(address(source)) as first:
            await first.send(S16_16K)
            await received.until(lambda: "online" in received.states)
            async with connect(address(source)) as second:
                code, reason = await closed_for(second)
            assert code == 1013
            assert reason == f"{source.name}: somebody else is sending already; one can at a time"
            await first.send(speech.tobytes())
        await received.until(gone(received))

    received = run(scene)
    assert np.array_equal(received.samples, speech)
    assert received.states == ["offline", "online", "offline"]


def test_websocket_pause() -> None:
    """A pause gives what was held back, and an empty chunk after a gap that ends the utterance."""

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        async with connect(address(source)) as connection:
            await connection.send(S16_16K)
            await connection.send(np.ones(700, "<i2").tobytes())
            await connection.send(json.dumps({"pause": True}))
            await received.until(lambda: len(received.chunks) == 3)
            await connection.send(np.ones(512, "<i2").tobytes())
            await received.until(lambda: len(received.chunks) == 4)

    received = run(scene)
    assert [len(chunk.samples) for chunk in received.chunks[:4]] == [512, 188, 0, 512]
    assert [chunk.after_gap for chunk in received.chunks[:4]] == [False, False, True, True]
    assert [chunk.start for chunk in received.chunks[:4]] == [0, 512, 700, 700]


def test_websocket_silent_sender() -> None:
    """A sender that stops sending without a word ends the utterance as well."""

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        async with connect(address(source)) as connection:
            await connection.send(S16_16K)
            await connection.send(np.ones(700, "<i2").tobytes())
            await received.until(lambda: len(received.chunks) == 3)
            last, empty = received.chunks[1:]
            assert (len(last.samples), len(empty.samples), empty.after_gap) == (188, 0, True)
            assert 1.5 < empty.captured_at - last.captured_at < 4

    assert run(scene).states == ["offline", "online", "offline"]


def test_websocket_too_fast() -> None:
    """Of a flood the last five seconds are kept; the rest is a gap that is reported once."""
    numbered = np.arange(60 * 16_000, dtype="<i2")  # wraps, but the last five seconds are unique

    async def play() -> SourceLog:
        received = SourceLog()
        source = WebSocketSource(
            Address("127.0.0.1", 0), chunk_ms=100, on_status=received.on_status
        )
        async with source:
            async with connect(address(source)) as connection:
                await connection.send(S16_16K)
                for start in range(0, len(numbered), 16_000):
                    await connection.send(numbered[start : start + 16_000].tobytes())
            following = asyncio.create_task(received.follow(source))  # too late for most of it
            await received.until(
                lambda: received.states[-1:] == ["offline"] and len(received.chunks) > 40
            )
        await following
        return received

    received = asyncio.run(play())
    assert np.array_equal(received.samples, numbered[-len(received.samples) :])
    assert 4.5 < len(received.samples) / 16_000 <= 5.1
    assert received.states == ["degraded", "offline"]
    assert received.statuses[0][1].endswith(" s dropped, sent faster than it is processed")
    seconds = float(received.statuses[0][1].split(": ")[1].split(" ")[0])
    assert seconds == pytest.approx(60 - len(received.samples) / 16_000, abs=0.11)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([b"\0\0"], "sound came before its format"),
        (["sound!"], "a text message that is no JSON object"),
        (["[1]"], "a text message that is no JSON object"),
        (["{}"], 'a format without "rate" (Hz) and "channels" in whole numbers'),
        (['{"rate": "fast"}'], 'a format without "rate" (Hz) and "channels" in whole numbers'),
        (['{"rate": 1}'], "a rate that isn't between 8000 and 192000 Hz"),
        (['{"rate": 16000, "channels": 99}'], "a number of channels that isn't between 1 and 8"),
        (
            ['{"rate": 16000, "format": ["mp3"]}'],
            'a format whose "format" is none of s16le, s32le, f32le, opus',
        ),
        (['{"rate": 16000, "speaker": 7}'], 'a format whose "speaker" is no text'),
        ([S16_16K, b"odd"], "3 bytes are no whole number of frames of 2 bytes"),
    ],
)
def test_websocket_wrong_message(messages: list[str | bytes], reason: str) -> None:
    """A message that breaks a rule ends its connection with the reason, which is reported once."""

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        async with connect(address(source)) as connection:
            for message in messages:
                await connection.send(message)
            assert await closed_for(connection) == (1008, reason)
        await received.until(lambda: any(reason in line for _, line in received.statuses))

    received = run(scene)
    [(state, line)] = [status for status in received.statuses if reason in status[1]]
    assert state == "offline"
    assert line.endswith(f": 127.0.0.1: {reason} (waiting for the next)")


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
        for name in ("rate", "channels", "format", "speaker", "pause")
    },
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.one_of(st.binary(), st.text(), FIELDS.map(json.dumps), st.just(S16_16K)), max_size=6
    )
)
def test_protocol_anything(messages: list[str | bytes]) -> None:
    """Whatever is sent is sound, or an AudioError: nothing else comes of it."""

    async def scene() -> None:
        received = SourceLog()
        async with PushSource("push", chunk_ms=32, on_status=received.on_status) as source:
            with contextlib.suppress(AudioError), source.sender("somebody") as sender:
                for message in messages:
                    receive(message, sender=sender)
        await received.follow(source)
        assert received.states[-1] == "offline"
        assert all("\n" not in line for _, line in received.statuses)

    asyncio.run(scene())


@pytest.mark.parametrize("rounds", range(5))
def test_a_cancellation_beside_a_new_item_is_not_lost(rounds: int) -> None:
    """However many rounds of the event loop lie between the two, waiting for sound ends."""

    async def scene() -> None:
        received = SourceLog()
        async with PushSource("push", chunk_ms=32, on_status=received.on_status) as source:
            following = asyncio.create_task(received.follow(source))
            source.feed(np.ones(16, np.int16), captured_at=0.0)  # then a pause is waited for, too
            await asyncio.sleep(0.01)
            source.report("offline", "somebody has left")
            for _ in range(rounds):
                await asyncio.sleep(0)
            following.cancel()
            await asyncio.wait({following}, timeout=1)
            assert following.cancelled()

    asyncio.run(scene())


def test_websocket_large_message() -> None:
    """A message of more than 64 KiB ends its connection, and the next sender is received."""

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        async with connect(address(source)) as connection:
            await connection.send(S16_16K)
            await connection.send(bytes(70_000))
            assert (await closed_for(connection))[0] == 1009
        await received.until(gone(received))
        await send(source, S16_16K, np.ones(512, "<i2").tobytes())
        await received.until(lambda: len(received.states) == 5)

    received = run(scene)
    assert "a message of more than 65536 bytes" in received.statuses[2][1]
    assert received.samples.tolist() == [1] * 512


def test_websocket_not_a_number() -> None:
    """Floats that are no numbers, or beyond full scale, harm nothing but themselves."""
    broken = np.array([np.nan, np.inf, -np.inf, 1e38, 0.5], "<f4")
    format_message = json.dumps({"rate": 16_000, "format": "f32le"})

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        await send(source, format_message, broken.tobytes())
        await received.until(gone(received))

    assert run(scene).samples.tolist() == [0, 32767, -32768, 32767, 16384]


async def expect(connecting: connect, received: SourceLog, *, admitted: bool) -> None:
    """A connection that is let in and may send, or is refused with status 403."""
    if admitted:
        async with connecting as connection:
            await connection.send(S16_16K)
            await received.until(lambda: "online" in received.states)
    else:
        with pytest.raises(InvalidStatus) as refused:
            await connecting
        assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    ("path", "headers", "admitted"),
    [
        ("/?token=secret", {}, True),
        ("/", {"Authorization": "Bearer secret"}, True),
        ("/", {}, False),
        ("/?token=guess", {}, False),
        ("/?token=secret", {"Origin": "http://localhost:8000"}, True),
        ("/?token=secret", {"Origin": "https://elsewhere.example"}, False),
        ("/?token=secret", {"Origin": "null"}, False),
        ("/?token=secret", {"Host": "elsewhere.example"}, False),
    ],
)
def test_websocket_admission(path: str, headers: dict[str, str], admitted: bool) -> None:
    """Only who knows the token is let in, and no page of another host, nor under its name."""

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        host = headers.get("Host", "127.0.0.1")
        others = {name: value for name, value in headers.items() if name != "Host"}
        connecting = connect(
            f"ws://{host}:{source.address.port}{path}",
            additional_headers=others,
            host="127.0.0.1",
            port=source.address.port,
        )
        await expect(connecting, received, admitted=admitted)

    assert ("online" in run(scene, token="secret").states) == admitted


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [("http://{own}", True), ("http://localhost:8000", False), ("http://127.0.0.1", False)],
)
def test_websocket_page_without_token(origin: str, admitted: bool) -> None:
    """Without a token, no page of another port may send sound."""

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        headers = {"Origin": origin.format(own=source.address)}
        connecting = connect(address(source), additional_headers=headers)
        await expect(connecting, received, admitted=admitted)

    assert ("online" in run(scene).states) == admitted


def opening_error(place: Address) -> str:
    async def play() -> None:
        async with WebSocketSource(place, chunk_ms=32, on_status=SourceLog().on_status):
            pass

    with pytest.raises(DeviceError) as error:
        asyncio.run(play())
    return str(error.value)


def test_websocket_port_in_use() -> None:
    """A port that somebody else has is one line."""

    async def scene(source: WebSocketSource, received: SourceLog) -> None:
        assert await asyncio.to_thread(opening_error, source.address) == (
            f"ws://{source.address}: can't listen there (Address already in use); "
            "choose another port, or end the program that uses it"
        )

    run(scene)


def test_websocket_open_to_the_network() -> None:
    """Without a token nobody but this machine is listened to."""
    assert opening_error(Address("0.0.0.0", 0)) == (
        "ws://0.0.0.0:0: anybody on the network could send sound here; "
        "set a token (source.token), or listen on 127.0.0.1"
    )
