"""The service for streams, over real sockets, with real sound."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from contract import validator
from serve_kit import (
    S16_16K,
    Sound,
    assert_same,
    closed_for,
    ends,
    ends_of,
    next_end,
    next_event,
    open_client,
    opus_packets,
    pieces,
    serving,
)
from websockets.exceptions import InvalidStatus

from stream_hbaf.audio import pace
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ServiceError
from stream_hbaf.events import Connected, DialogueSummary, Partial, Utterance
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.stream_client import stream

SILENCE = np.zeros(SAMPLE_RATE_HZ, np.int16)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound is read at eight times its pace: what comes of it is the same."""
    monkeypatch.setattr(pace, "FASTEST", 8.0)


def test_streams_at_once_give_what_each_gives_alone(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Two streams beside each other change nothing of each other's utterances."""
    sounds = [np.concatenate(sentences[1:3]), sentences[3]]

    async def scene() -> None:
        async with serving(recognizer) as service:
            alone = [await ends_of(service, sound) for sound in sounds]
            together = await asyncio.gather(*(ends_of(service, sound) for sound in sounds))
            for one, other in zip(together, alone, strict=True):
                assert_same(one, other)
            assert not service.pipeline.sources

    asyncio.run(scene())


def test_events_are_those_of_mqtt(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """Each message has the fields of the contract, and its kind; the client yields them typed."""

    async def scene() -> None:
        async with serving(recognizer) as service:
            async with open_client(service, "source=ann&speaker=Ann") as connection:
                await connection.send(S16_16K)
                for piece in [p async for p in pieces(sentences[1])]:
                    await connection.send(piece)
                await connection.send('{"end": true}')
                raw: list[dict[str, Any]] = [json.loads(message) async for message in connection]
                assert connection.close_code == 1000
            assert [raw[0].pop(key) for key in ("event", "source", "resumed")] == [
                *("connected", "ann", False)
            ]
            kinds = {"utterance": Utterance, "partial": Partial, "dialoguesummary": DialogueSummary}
            for fields in raw[1:]:
                if (kind := fields.pop("event")) in kinds:
                    validator(kinds[kind]).validate(fields)
            assert [f["type"] for f in raw if "type" in f][-1] == "end"

            typed = [
                event
                async for event in stream(
                    service.server.url, pieces(sentences[1]), source="ann", speaker="Ann"
                )
            ]
            assert isinstance(typed[0], Connected)
            (end,) = ends(typed)
            assert (end.source, end.speaker) == ("ann", "Ann")
            assert "young man" in end.text
            assert any(isinstance(event, DialogueSummary) for event in typed)

    asyncio.run(scene())


def test_opus_gives_the_same_words(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """Packets without a container, as WebCodecs has them."""

    async def scene() -> None:
        async with serving(recognizer) as service:
            (plain,) = await ends_of(service, sentences[1])
            events = [
                event
                async for event in stream(
                    service.server.url, opus_packets(sentences[1]), sample_format="opus"
                )
            ]
            (end,) = ends(events)
            assert end.text == plain.text
            assert end.emotion is not None
            assert plain.emotion is not None
            assert end.emotion.label == plain.emotion.label

    asyncio.run(scene())


def test_streams_join_a_dialogue(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """Streams that name a dialogue share it: turns count on, though each gets its own events."""

    async def scene() -> None:
        async with serving(recognizer) as service, open_client(service, "dialogue=table") as _:
            first = await ends_of(service, sentences[1], source="ann", dialogue="table")
            second = await ends_of(service, sentences[2], source="ben", dialogue="table")
            apart = await ends_of(service, sentences[2], source="ben")
            assert [(e.source, e.turn) for e in first + second] == [("ann", 1), ("ben", 2)]
            assert first[0].dialogue_id == second[0].dialogue_id != apart[0].dialogue_id

    asyncio.run(scene())


def test_full_service_refuses_and_says_when(
    recognizer: Recognizer, sentences: list[Sound], caplog: pytest.LogCaptureFixture
) -> None:
    """503 with Retry-After for programs, a close code for pages; then there is room again."""

    async def scene() -> None:
        async with serving(recognizer, max_streams=1) as service:
            going_on = asyncio.create_task(ends_of(service, sentences[1]))
            await service.until(lambda: len(service.pipeline.sources) == 1)
            with pytest.raises(InvalidStatus) as refused:
                await open_client(service)
            response = refused.value.response
            assert (response.status_code, response.headers["Retry-After"]) == (503, "30")
            assert response.body == b"full: 1 of 1 streams; try again in 30 s\n"
            page = f"http://{service.server.address}"
            async with open_client(service, origin=page) as browser:
                assert await closed_for(browser) == (
                    1013,
                    "full: 1 of 1 streams; try again in 30 s",
                )
            with pytest.raises(ServiceError, match="full: 1 of 1") as error:
                await ends_of(service, sentences[2])
            assert error.value.retry_after_s == 30
            assert len(await going_on) == 1
            assert len(await ends_of(service, sentences[2])) == 1

    asyncio.run(scene())
    assert [r.message for r in caplog.records if r.name.startswith("stream_hbaf.serve")] == [
        "serve: full: 1 of 1 streams; others are refused for now"
    ]


def test_client_that_comes_back_goes_on(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """A lost connection: the same dialogue goes on, and the end that was missed comes."""

    async def scene() -> None:
        async with serving(recognizer, max_streams=1, resume_s=60) as service:
            connection = await open_client(service, "id=abcdefgh")
            await connection.send(S16_16K)
            for piece in [p async for p in pieces(sentences[1])]:
                await connection.send(piece)
            assert (await next_event(connection, "utterance"))["type"] == "new"
            connection.transport.abort()
            await service.log.until(lambda: len(service.log.ends()) == 1)
            with pytest.raises(InvalidStatus) as refused:  # the place is kept
                await open_client(service)
            assert 50 < int(refused.value.response.headers["Retry-After"]) <= 60
            async with open_client(service, "id=abcdefgh") as again:
                about = await next_event(again)
                assert (about["resumed"], about["id"], about["source"]) == (
                    *(True, "abcdefgh"),
                    "stream-1",
                )
                missed = await next_end(again)
                await again.send(S16_16K)
                for piece in [p async for p in pieces(sentences[2])]:
                    await again.send(piece)
                await again.send('{"end": true}')
                end = await next_end(again)
            assert (missed["turn"], end["turn"]) == (1, 2)
            assert missed["dialogue_id"] == end["dialogue_id"]
            await service.until_gone("stream-1")

    asyncio.run(scene())


def test_client_restores_its_connection(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """``stream`` goes on by itself, and yields each end once."""
    sound = np.concatenate([sentences[1], SILENCE, sentences[2]])

    async def scene() -> None:
        async with serving(recognizer) as service:
            events = []
            async for event in stream(service.server.url, pieces(sound)):
                events.append(event)
                if len(ends(events)) == 1 and event is events[-1] and event in ends(events):
                    for connection in service.server.connections:
                        connection.transport.abort()
            assert [e.resumed for e in events if isinstance(e, Connected)] == [False, True]
            found = ends(events)
            assert len({e.id for e in found}) == len(found) >= 2
            assert len({e.dialogue_id for e in found}) == 1

    asyncio.run(scene())


def test_client_that_does_not_come_back_is_given_up(recognizer: Recognizer) -> None:
    """After ``resume_s`` its place is free, and its id begins a new stream."""

    async def scene() -> None:
        async with serving(recognizer, max_streams=1, resume_s=1) as service:
            connection = await open_client(service, "id=abcdefgh&source=ann")
            await next_event(connection)
            connection.transport.abort()
            await service.until_gone("ann")
            async with open_client(service, "id=abcdefgh&source=ann") as again:
                assert (await next_event(again))["resumed"] is False

    asyncio.run(scene())


def test_second_connection_with_an_id_takes_its_place(recognizer: Recognizer) -> None:
    """As with MQTT: the older one is closed with the reason, whatever it was doing."""

    async def scene() -> None:
        async with serving(recognizer) as service:
            async with open_client(service, "id=abcdefgh") as first:
                await next_event(first)
                async with open_client(service, "id=abcdefgh") as second:
                    assert (await next_event(second))["resumed"] is True
                    assert await closed_for(first) == (
                        *(4000,),
                        "another connection with this id took its place",
                    )
                    assert [*service.pipeline.sources] == ["stream-1"]
                    with pytest.raises(InvalidStatus) as refused:
                        await open_client(service, "source=stream-1")
                    assert refused.value.response.status_code == 409
            await service.until_gone("stream-1")

    asyncio.run(scene())
