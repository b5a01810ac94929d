"""The dashboard's server with a plain HTTP client: access, events, requests, audio."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from conftest import RECORDINGS
from dialogue_samples import HEADER, INFO, LABELS, record_session, utterance
from pydantic import SecretStr
from recording_control import RecordingControl

from stream_hbaf.audio.file import read_audio
from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import DashboardConfig, SourceConfig
from stream_hbaf.dashboard.access import AccessControl
from stream_hbaf.dashboard.feed import (
    MAX_EVENTS,
    MAX_QUEUED,
    LatestEvents,
    PageQueue,
    Recordings,
)
from stream_hbaf.dashboard.server import MAX_PAGES, Dashboard
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Feedback, Info, Level, Request, Response, Status, Utterance
from stream_hbaf.publish.messages import event_message
from stream_hbaf.sessions.writer import SessionWriter

Events = aiohttp.ClientWebSocketResponse
JFK = RECORDINGS / "jfk.flac"


def level(dbfs: float) -> Level:
    return Level(source="ann", dbfs=dbfs, speech=False)


@asynccontextmanager
async def dashboard(
    *,
    control: RecordingControl | None = None,
    sessions: Path | None = None,
    token: str | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Dashboard]:
    config = DashboardConfig(host=host, port=0, token=SecretStr(token) if token else None)
    served = Dashboard(config, info=INFO, control=control, sessions=sessions)
    await served.start()
    try:
        yield served
    finally:
        await served.close(1)


@asynccontextmanager
async def client(served: Dashboard) -> AsyncIterator[aiohttp.ClientSession]:
    jar = aiohttp.CookieJar(unsafe=True)  # cookies from an address without a name
    base = served.address.partition("?")[0]
    async with aiohttp.ClientSession(base, cookie_jar=jar) as session:
        yield session


async def next_message(page: Events, *, kind: str = "") -> dict[str, Any]:
    """The next message to a page, or the next of a kind."""
    async with asyncio.timeout(10):
        while True:
            message: dict[str, Any] = await page.receive_json()
            if kind in ("", message["event"]):
                return message


async def ask(page: Events, command: str, **arguments: Any) -> dict[str, Any]:
    """The response to a request, whatever else is sent before."""
    await page.send_json({"command": command, "arguments": arguments, "transaction": "7"})
    message = await next_message(page, kind="response")
    assert message["transaction"] == "7"
    return message


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))


# ---- access


def test_states_of_a_source_that_leaves_are_dropped() -> None:
    """Its utterances stay; what was the state of its stages is of nobody any more."""
    latest = LatestEvents()
    both = INFO.model_copy(update={"sources": ["ann", "ben"]})
    for event in (
        both,
        Status(source="ann", stage="capture", state="online"),
        Status(source="ben", stage="capture", state="online"),
        utterance(1, source="ann"),
        both.model_copy(update={"sources": ["ben"]}),
    ):
        latest.add(event, type(event).__name__)
    assert latest.messages() == ["Info", "Status", "Utterance"]


def test_loopback_answers_under_its_own_names_only() -> None:
    """A foreign name that leads to this machine (DNS rebinding) gets nothing."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            port = served.address.split(":")[2].rstrip("/")
            for host, status in (
                (f"127.0.0.1:{port}", 200),
                (f"localhost:{port}", 200),
                (f"[::1]:{port}", 200),
                (f"evil.example:{port}", 421),
                ("", 421),
            ):
                async with session.get("/", headers={"Host": host}) as answer:
                    assert answer.status == status, host

    run(scene)


def test_websockets_of_other_sites_are_refused() -> None:
    """Neither events nor the microphone are there for pages of another origin or port."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            served.microphone(SourceConfig(name="ann"), on_status=lambda state, line: None)
            own = served.address.rstrip("/")
            for path in ("/events", "/microphone/ann"):
                for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
                    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                        await session.ws_connect(path, headers={"Origin": origin})
                    assert refused.value.status == 403, origin
                page = await session.ws_connect(path, headers={"Origin": own})
                await page.close()

    run(scene)


def test_token_opens_the_page_once_in_the_address_and_then_as_a_cookie() -> None:
    """Nothing is served without it, and it doesn't stay in the address."""

    async def scene() -> None:
        async with dashboard(token="süß & geheim;") as served, client(served) as session:
            for path in ("/", "/app.js", "/events", "/recordings", "/?token=falsch", "/?token="):
                async with session.get(path) as answer:
                    assert answer.status == 401, path
                    assert "address that stream-hbaf printed" in await answer.text()
            async with session.get(served.address, allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, "/")
                cookie = answer.headers["Set-Cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=Lax" in cookie
            page = await session.ws_connect("/events")
            assert (await next_message(page))["event"] == "snapshot"
            await page.close()

    run(scene)


def test_token_is_drawn_where_others_can_connect() -> None:
    """Bound elsewhere than to this machine the page is never open, and each run draws anew."""
    checks = [AccessControl(DashboardConfig(host="0.0.0.0"), advice="") for _ in range(2)]
    assert len({check.token for check in checks}) == 2
    assert min(len(check.token) for check in checks) >= 32
    host = "192.168.1.5:8770"
    assert checks[0].refuse(host=host, origin=None, token=checks[0].token) is None
    for token in ("", checks[1].token, "\udcff"):
        refusal = checks[0].refuse(host=host, origin=None, token=token)
        assert refusal is not None
        assert refusal.status == 401
    assert AccessControl(DashboardConfig(host="localhost"), advice="").token == ""


def test_taken_port_is_one_line() -> None:
    """Which port, and what to do about it."""

    async def scene() -> None:
        async with dashboard() as served:
            port = int(served.address.split(":")[2].rstrip("/"))
            second = Dashboard(DashboardConfig(port=port), info=INFO, control=None, sessions=None)
            with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*dashboard\.port"):
                await second.start()

    run(scene)


def test_page_may_load_nothing_from_elsewhere() -> None:
    """Every answer says so, refusals too, and no file of the page names another site."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            for path in ("/", "/style.css", "/app.js", "/recordings", "/nowhere"):
                async with session.get(path) as answer:
                    policy = answer.headers["Content-Security-Policy"]
                    assert policy.startswith("default-src 'self';"), path
                    assert "unsafe" not in policy
                    assert answer.headers["X-Content-Type-Options"] == "nosniff"
                    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
                    text = await answer.text()
                    assert "http://" not in text
                    assert "https://" not in text

    run(scene)


# ---- events


def test_late_page_gets_what_happened_before() -> None:
    """The latest message about each utterance, in order; no levels, which are outdated."""

    async def scene() -> None:
        async with (
            dashboard(control=RecordingControl(labels=LABELS)) as served,
            client(served) as session,
        ):
            await served.send(utterance(1).model_copy(update={"type": "new", "rev": 1}))
            await served.send(level(-30))
            await served.send(utterance(2, "anger"))
            await served.send(utterance(1))
            await served.send(Status(source="ann", stage="vad", state="online"))
            page = await session.ws_connect("/events")
            snapshot = await next_message(page)
            assert snapshot["info"]["labels"] == INFO.labels
            assert [one.get("id", one["event"]) for one in snapshot["history"]] == [
                "d-1",
                "d-2",
                "status",
            ]
            assert snapshot["history"][0] == json.loads(event_message(utterance(1)))
            await served.send(utterance(3))
            assert (await next_message(page))["id"] == "d-3"

    run(scene)


def test_oldest_utterances_are_dropped_from_snapshots() -> None:
    """Memory stays bounded in a long run; states and switches are kept."""
    latest = LatestEvents()
    status = Status(source="ann", stage="vad", state="online")
    latest.add(status, "status")
    for turn in range(MAX_EVENTS + 10):
        latest.add(utterance(turn), str(turn))
    messages = latest.messages()
    assert len(messages) == MAX_EVENTS
    assert messages[:2] == ["status", "11"]


def test_full_queue_drops_levels_and_keeps_utterances() -> None:
    """A slow page loses droppable messages first."""

    async def scene() -> None:
        queue = PageQueue()
        assert await queue.next() is None  # a snapshot
        queue.put("utterance 0")
        for n in range(MAX_QUEUED - 1):
            queue.put(f"level {n}", droppable=True)
        queue.put("utterance 1")
        assert [await queue.next() for _ in range(2)] == ["utterance 0", "utterance 1"]

    run(scene)


def test_page_that_falls_behind_gets_a_snapshot() -> None:
    """What it missed is in the snapshot: nothing is lost."""

    async def scene() -> None:
        queue = PageQueue()
        assert await queue.next() is None
        for n in range(MAX_QUEUED + 1):
            queue.put(f"utterance {n}")
        assert await queue.next() is None
        queue.put("after")
        assert await queue.next() == "after"

    run(scene)


def test_page_that_does_not_read_delays_nothing() -> None:
    """Thousands of events are taken although one page reads none; the other has the last."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session, client(served) as other:
            asleep = await other.ws_connect("/events")
            awake = await session.ws_connect("/events", max_msg_size=0)
            await next_message(awake)
            words = "word " * 100
            for turn in range(5_000):
                await served.send(utterance(turn, text=words))
                if turn % 100 == 0:
                    await asyncio.sleep(0)
            newest = ""
            while newest != "d-4999":
                message = await next_message(awake)
                newest = message.get("history", [message])[-1]["id"]
            assert not asleep.closed

    run(scene)


def test_new_model_is_sent_to_every_page() -> None:
    """Labels may change while it runs."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            page = await session.ws_connect("/events")
            await next_message(page)
            await served.send(INFO.model_copy(update={"labels": ["calm", "cross"]}))
            assert (await next_message(page))["labels"] == ["calm", "cross"]
            later = await session.ws_connect("/events")
            assert Info.model_validate((await next_message(later))["info"]).labels == [
                "calm",
                "cross",
            ]

    run(scene)


def test_forgotten_dialogue_is_gone_from_all_pages() -> None:
    """Pages get a snapshot without it and its corrections."""

    async def scene() -> None:
        async with (
            dashboard(control=RecordingControl(labels=LABELS)) as served,
            client(served) as session,
        ):
            for one in (utterance(1), utterance(2), utterance(1, dialogue="other")):
                await served.send(one)
            page = await session.ws_connect("/events")
            await next_message(page)
            await ask(page, "correct", id="d-1", label="anger")
            assert await served.forget("d") == 2
            snapshot = await next_message(page, kind="snapshot")
            assert [one["id"] for one in snapshot["history"]] == ["other-1"]

    run(scene)


class ForgettingControl(RecordingControl):
    """Erases the dialogue in the dashboard as well, as the live pipeline's control does."""

    served: Dashboard

    async def answer(self, request: Request) -> Response:
        await self.served.forget(str(request.arguments["dialogue_id"]))
        return await super().answer(request)


def test_request_to_forget_is_answered() -> None:
    """The snapshot that follows doesn't replace the response."""
    control = ForgettingControl()

    async def scene() -> None:
        async with dashboard(control=control) as served, client(served) as session:
            control.served = served
            await served.send(utterance(1))
            page = await session.ws_connect("/events")
            await next_message(page)
            await page.send_json({"command": "forget", "arguments": {"dialogue_id": "d"}})
            both = [await next_message(page) for _ in range(2)]
            assert {message["event"] for message in both} == {"response", "snapshot"}
            assert [message["history"] for message in both if "history" in message] == [[]]

    run(scene)


def test_pages_are_bounded_in_number() -> None:
    """A client that opens connections without end gets an error."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            pages = [await session.ws_connect("/events") for _ in range(MAX_PAGES)]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect("/events")
            assert refused.value.status == 503
            await pages.pop().close()
            async with asyncio.timeout(10):
                assert (await next_message(await session.ws_connect("/events")))[
                    "event"
                ] == "snapshot"

    run(scene)


# ---- requests


def test_requests_reach_control_and_are_answered() -> None:
    """Requests, switches and corrections, each with its own answer."""
    control = RecordingControl(labels=LABELS)

    async def scene() -> None:
        async with dashboard(control=control) as served, client(served) as session:
            page = await session.ws_connect("/events")
            answer = await ask(page, "reset", source="ann")
            assert (answer["status"], answer["data"]) == ("ok", {"source": "ann"})
            answer = await ask(page, "set_switch", source="ann", switch="record", on=True)
            assert answer["status"] == "ok"
            answer = await ask(page, "correct", id="d-1", label="joy", by="page")
            assert answer["status"] == "ok"

    run(scene)
    assert [request.command for request in control.requests] == ["reset"]
    assert control.switched == [("ann", "record", True)]
    assert control.corrections == [Feedback(id="d-1", label="joy", by="page")]


def test_correction_is_shown_on_the_other_pages() -> None:
    """And on those that come later."""

    async def scene() -> None:
        async with (
            dashboard(control=RecordingControl(labels=LABELS)) as served,
            client(served) as session,
        ):
            page, other = [await session.ws_connect("/events") for _ in range(2)]
            await next_message(other)
            await ask(page, "correct", id="d-1", label="fear")
            assert (await next_message(other, kind="feedback"))["label"] == "fear"
            later = await session.ws_connect("/events")
            assert (await next_message(later))["history"][0]["label"] == "fear"

    run(scene)


def test_corrections_of_label_and_speaker_replace_one_another_each() -> None:
    """A later page gets the latest of both, though they came together at first."""

    async def scene() -> None:
        async with (
            dashboard(control=RecordingControl(labels=LABELS)) as served,
            client(served) as session,
        ):
            page = await session.ws_connect("/events")
            await ask(page, "correct", id="d-1", label="fear", speaker="Ann")
            await ask(page, "correct", id="d-1", label="joy")
            await ask(page, "correct", id="d-1", speaker="Ben")
            later = await session.ws_connect("/events")
            history = (await next_message(later))["history"]
            assert [(one["label"], one["speaker"]) for one in history] == [("joy", ""), ("", "Ben")]

    run(scene)


def test_request_that_fails_has_a_response() -> None:
    """Malformed and refused requests get one line; the connection stays."""

    async def scene() -> None:
        async with (
            dashboard(control=RecordingControl(labels=LABELS)) as served,
            client(served) as session,
        ):
            page = await session.ws_connect("/events")
            answer = await ask(page, "correct", id="d-1", label="hunger")
            assert (answer["status"], answer["error"]) == ("error", "no label 'hunger'")
            for text in (
                "[1]",
                "nonsense",
                '{"command": "set_switch", "arguments": 3}',
                "[" * 9000,
            ):
                await page.send_str(text)
                answer = await next_message(page, kind="response")
                assert answer["status"] == "error", text
            assert (await ask(page, "set_switch", source="ann", switch="x"))["status"] == "error"
            assert (await ask(page, "ping"))["status"] == "ok"

    run(scene)


def test_page_without_control_only_shows() -> None:
    """Requests are refused with the reason."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            page = await session.ws_connect("/events")
            assert (await next_message(page))["control"] is False
            assert "only shows" in (await ask(page, "reset"))["error"]

    run(scene)


# ---- audio


def test_browser_sound_becomes_chunks() -> None:
    """16 kHz mono that a browser sends comes out of the source to the bit, in whole chunks."""
    sound = read_audio(JFK)[:16_000]
    config = SourceConfig(name="ann", chunk_ms=50)

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            source = served.microphone(config, on_status=lambda state, line: None)
            browser = await session.ws_connect("/microphone/ann")
            await browser.send_json({"rate": 16_000, "channels": 1, "format": "s16le"})
            for first in range(0, len(sound), 2048):
                await browser.send_bytes(sound[first : first + 2048].tobytes())
            chunks = []
            async with source:
                async for chunk in source.chunks():
                    chunks.append(chunk)
                    if len(chunks) == 20:
                        break
            assert {len(chunk.samples) for chunk in chunks} == {800}
            assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), sound)

    run(scene)


def test_second_browser_is_refused_with_a_reason() -> None:
    """One at a time; nonsense ends its own connection only."""

    async def scene() -> None:
        async with dashboard() as served, client(served) as session:
            served.microphone(SourceConfig(name="ann"), on_status=lambda state, line: None)
            first = await session.ws_connect("/microphone/ann")
            await first.send_json({"rate": 48_000})
            await asyncio.sleep(0.1)
            second = await session.ws_connect("/microphone/ann")
            refused = await second.receive()
            assert (refused.type, refused.data) == (aiohttp.WSMsgType.CLOSE, 1013)
            assert refused.extra == "ann: somebody else is sending already; one can at a time"
            await first.send_str("nonsense")
            ended = await first.receive()
            assert (ended.data, ended.extra) == (1008, "a text message that is no JSON object")
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect("/microphone/nobody")

    run(scene)


def test_recording_is_listed_sent_and_played_in_parts(tmp_path: Path) -> None:
    """A session's sound comes by ranges, so that players can jump in it."""
    folder = record_session(tmp_path, JFK, utterances=[utterance(1), utterance(2, "anger")])
    sound = (folder / "ann.flac").read_bytes()

    async def scene() -> None:
        async with dashboard(sessions=tmp_path) as served, client(served) as session:
            async with session.get("/recordings") as answer:
                (title,) = await answer.json()
            assert (title["name"], title["utterances"]) == (folder.name, 2)
            assert title["speakers"] == ["Ann"]
            async with session.get(f"/recordings/{folder.name}") as answer:
                recorded = await answer.json()
            assert [Utterance.model_validate(one).id for one in recorded["events"]] == [
                "d-1",
                "d-2",
            ]
            (audio,) = recorded["sounds"]
            (stretch,) = audio["stretches"]
            assert (audio["source"], stretch["opened_ms"], stretch["file_ms"]) == ("ann", 0, 0)
            assert stretch["length_ms"] == pytest.approx(11_000)
            path = f"/recordings/{folder.name}/ann.flac"
            async with session.get(path, headers={"Range": "bytes=100-199"}) as answer:
                assert (answer.status, answer.content_type) == (206, "audio/flac")
                assert await answer.read() == sound[100:200]

    run(scene)


def test_lost_sound_is_not_counted_in_the_file(tmp_path: Path) -> None:
    """After two seconds that were lost the page knows that the file is behind the clock."""
    writer = SessionWriter(tmp_path, header=HEADER)
    second = read_audio(JFK)[:16_000]
    writer.write_audio("ann", Chunk(start=0, samples=second, captured_at=1.0))
    writer.write_audio("ann", Chunk(start=48_000, samples=second, captured_at=4.0, after_gap=True))
    writer.close()
    (sound,) = json.loads(Recordings(tmp_path).session(HEADER.id))["sounds"]
    assert [(one["opened_ms"], one["file_ms"], one["length_ms"]) for one in sound["stretches"]] == [
        (0, 0, 1000),
        (3000, 1000, 1000),
    ]


def test_damaged_recording_is_listed_with_its_error(tmp_path: Path) -> None:
    """One bad folder doesn't empty the list."""
    record_session(tmp_path, JFK, utterances=[utterance(1)])
    (tmp_path / "zzz").mkdir()
    (tmp_path / "zzz" / "session.json").write_text("{}")

    async def scene() -> None:
        async with dashboard(sessions=tmp_path) as served, client(served) as session:
            async with session.get("/recordings") as answer:
                damaged, whole = await answer.json()
            assert "format None" in damaged["error"]
            assert whole["utterances"] == 1

    run(scene)


def test_paths_lead_nowhere_but_to_recordings(tmp_path: Path) -> None:
    """No name, however it is written, opens another file."""
    folder = record_session(tmp_path / "sessions", JFK, utterances=[utterance(1)])
    (tmp_path / "secret.flac").write_text("secret")

    async def scene() -> None:
        async with dashboard(sessions=tmp_path / "sessions") as served, client(served) as session:
            for path in (
                "/recordings/..%2Fsecret",
                "/recordings/../secret.flac",
                f"/recordings/{folder.name}/..%2F..%2Fsecret.flac",
                f"/recordings/{folder.name}/nobody.flac",
                "/%2e%2e/server.py",
                "/..%2Fserver.py",
            ):
                async with session.get(path) as answer:
                    assert answer.status in (403, 404), path

    run(scene)
