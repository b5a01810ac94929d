"""Several sources at once, and what may be asked of them while they run; real sound and models."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from live_kit import EventLog, RandomChunks
from numpy.typing import NDArray

from stream_hbaf.audio.source import AudioSource, Chunk
from stream_hbaf.config import SourceConfig, load_config
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import (
    DialogueSummary,
    Feedback,
    Info,
    Request,
    Response,
    Switch,
    Utterance,
)
from stream_hbaf.live.control import Controls
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.publish.messages import COMMANDS
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.running import sources_of

Sound = NDArray[np.int16]


class Store:
    """Stores dialogues; notes which utterances had ended when it was told to forget."""

    def __init__(self, log: EventLog) -> None:
        self.found: list[str] = []
        self._diary = log

    async def forget(self, dialogue_id: str) -> int:
        ends = [end.id for end in self._diary.ends() if end.dialogue_id == dialogue_id]
        self.found += ends
        return len(ends)


def controls_of(pipeline: LivePipeline, *stores: Store) -> Controls:
    bundle = pipeline.recognizer.bundle

    def info() -> Info:
        model = pipeline.recognizer.model
        return Info(version="0", model=model, labels=list(bundle.labels), licence="", sources=[])

    return Controls(pipeline, info=info, recording=None, stores=lambda: stores)


def listen(
    recognizer: Recognizer,
    sources: Mapping[SourceConfig, AudioSource],
    meanwhile: Callable[[Controls, EventLog], Awaitable[Any]] | None = None,
    *,
    log: EventLog | None = None,
    stores: Sequence[Store] = (),
) -> EventLog:
    """Run the sources to their end; what was published."""
    log = log or EventLog()

    async def run() -> None:
        pipeline = LivePipeline(recognizer, [log])
        running = asyncio.create_task(pipeline.run(sources, stop=asyncio.Event()))
        if meanwhile is not None:
            await meanwhile(controls_of(pipeline, *stores), log)
        await running

    asyncio.run(run())
    return log


def named(name: str, *, dialogue: str = "") -> SourceConfig:
    return SourceConfig(name=name, speaker=name.title(), dialogue=dialogue)


def ask(command: str, **arguments: Any) -> Request:
    return Request(command=command, arguments=arguments, transaction="t")


@pytest.mark.parametrize("dialogue", ["table", ""])
def test_sources_talk_with_each_other_only_if_they_share_a_dialogue(
    recognizer: Recognizer, sentences: list[Sound], dialogue: str
) -> None:
    """Two microphones at one table are one dialogue with two speakers; else each has its own."""
    sources = {
        named("ann", dialogue=dialogue): RandomChunks(sentences[1], seed=1),
        named("bob", dialogue=dialogue): RandomChunks(sentences[4], seed=2),
    }
    log = listen(recognizer, sources)
    ends = log.ends()
    assert {(end.source, end.speaker) for end in ends} == {("ann", "Ann"), ("bob", "Bob")}
    assert all(end.text for end in ends)
    shared = len({end.dialogue_id for end in ends}) == 1
    assert shared == bool(dialogue)
    if shared:
        assert sorted(end.turn for end in ends) == list(range(1, len(ends) + 1))
        last = [e for e in log.events if isinstance(e, DialogueSummary)][-1]
        assert (last.turns, set(last.speakers)) == (len(ends), {"Ann", "Bob"})
        assert sum(last.emotions.values()) == len(ends)


def test_a_source_beside_others_says_what_it_says_alone(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Sharing the models changes no answer."""
    alone = listen(recognizer, {named("ann"): RandomChunks(sentences[1], seed=1)}).ends()
    both = listen(
        recognizer,
        {
            named("ann"): RandomChunks(sentences[1], seed=3),
            named("bob"): RandomChunks(sentences[4], seed=4),
        },
    )
    beside = [end for end in both.ends() if end.source == "ann"]
    assert [end.text for end in beside] == [end.text for end in alone]
    for one, other in zip(beside, alone, strict=True):
        assert one.emotion is not None
        assert other.emotion is not None
        assert one.emotion.probabilities == pytest.approx(other.emotion.probabilities, abs=1e-5)


def test_flush_ends_the_open_utterance(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """The utterance so far is published at once; the next one belongs to the same dialogue."""

    async def flush(controls: Controls, log: EventLog) -> None:
        await log.until(log.has_begun)
        answer = await controls.answer(ask("flush"))
        assert (answer.status, answer.transaction) == ("ok", "t")

    source = RandomChunks(sentences[0], seed=5, pace=3)
    first, *others = listen(recognizer, {named("ann"): source}, flush).ends()
    assert first.trigger == "request"
    assert others
    assert {end.dialogue_id for end in others} == {first.dialogue_id}


def test_reset_begins_a_new_dialogue(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """The next utterance has another dialogue id, and turn 1."""

    async def reset(controls: Controls, log: EventLog) -> None:
        await log.until(log.has_begun)
        answer = await controls.answer(ask("reset"))
        assert answer.content == {"ended": 1}

    source = RandomChunks(sentences[0], seed=6, pace=3)
    first, *others = listen(recognizer, {named("ann"): source}, reset).ends()
    assert others[0].turn == 1
    assert others[0].dialogue_id != first.dialogue_id


def test_an_open_utterance_is_forgotten_too(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """An open utterance ends before its dialogue is erased, so that nothing of it comes later."""
    log = EventLog()
    store = Store(log)

    async def forget(controls: Controls, log: EventLog) -> None:
        await log.until(log.has_begun)
        (new,) = [e for e in log.events if isinstance(e, Utterance)]
        answer = await controls.answer(ask("forget", dialogue_id=new.dialogue_id))
        assert answer.content == {"erased": 2}  # the dialogue, and what the store held of it
        forgotten.append(new)

    forgotten: list[Utterance] = []
    source = RandomChunks(sentences[0], seed=10, pace=3)
    listen(recognizer, {named("ann"): source}, forget, log=log, stores=[store])
    assert store.found == [forgotten[0].id]
    mine = [end.id for end in log.ends() if end.dialogue_id == forgotten[0].dialogue_id]
    assert mine == store.found
    assert len(log.ends()) > 1


def test_nothing_is_recognised_while_not_listening(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Switched off, the open utterance ends and the rest of the sound is skipped."""

    async def stop_listening(controls: Controls, log: EventLog) -> None:
        await log.until(log.has_begun)
        await controls.set_switch("ann", switch="listening", on=False)

    source = RandomChunks(np.concatenate([sentences[1]] * 2), seed=7, pace=3)
    log = listen(recognizer, {named("ann"): source}, stop_listening)
    (end,) = log.ends()
    assert end.trigger == "request"
    states = [e.on for e in log.events if isinstance(e, Switch) and e.switch == "listening"]
    assert states == [True, False]


def test_nothing_is_transcribed_while_the_switch_is_off(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """The emotion comes from the audio alone."""

    async def stop_transcribing(controls: Controls, log: EventLog) -> None:
        await log.until(lambda: any(isinstance(e, Switch) for e in log.events))
        await controls.set_switch("ann", switch="transcribe", on=False)

    source = RandomChunks(sentences[1], seed=8, pace=3)
    ends = listen(recognizer, {named("ann"): source}, stop_transcribing).ends()
    assert ends
    assert {(end.text, tuple(end.modalities)) for end in ends} == {("", ("audio",))}


def test_the_bundle_is_swapped_between_utterances(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """The new bundle begins a new dialogue; nothing is lost in between.

    Of requests that wait for another's bundle only the last is carried out, and the former bundle
    is closed.
    """
    answers: list[Response] = []
    closed: list[Recognizer] = []
    swapped = asyncio.Event()

    class Waiting(RandomChunks):
        """Speaks the last sentence once the bundle is there, however long that takes."""

        async def chunks(self) -> AsyncIterator[Chunk]:
            async for chunk in super().chunks():
                if chunk.start + len(chunk.samples) > 3 * len(sentences[1]):
                    await swapped.wait()
                yield chunk

    class Closing(Recognizer):
        def close(self) -> None:
            closed.append(self)
            super().close()

    async def exchange(controls: Controls, log: EventLog) -> None:
        await log.until(log.has_begun)
        request = ask("set_model", model=recognizer.bundle.id)
        answers.extend(await asyncio.gather(*(controls.answer(request) for _ in range(3))))
        swapped.set()

    source = Waiting(np.concatenate([sentences[1]] * 4), seed=9, pace=3)
    former = Closing(recognizer.config)
    log = listen(former, {named("ann"): source}, exchange)
    ends = log.ends()
    assert closed[0] is former
    assert answers[-1].content == {
        "model": recognizer.bundle.id,
        "sha256": recognizer.model.sha256,
    }
    assert answers[1].error == "set_model: a later request took the place of this one"
    assert len(ends) == 4
    assert len({end.dialogue_id for end in ends}) in (2, 3)  # the first bundle may come too late
    assert [e for e in log.events if isinstance(e, Info)]


def test_every_command_of_the_contract_is_known(recognizer: Recognizer) -> None:
    """The documented commands are implemented, and no others."""
    answer = asyncio.run(controls_of(LivePipeline(recognizer, [])).answer(ask("dance")))
    known = answer.error.partition("there is ")[2].split(", ")
    assert set(known) == {command.name for command in COMMANDS}


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (ask("dance"), "no command 'dance'; there is ping, reset"),
        (ask("set_model"), "give a bundle's name"),
        (ask("set_model", model="nowhere"), "bundle 'nowhere': no such"),
        (ask("set_model", model=3), "'model' must be text, not 3"),
        (ask("flush", source="cellar"), "no source 'cellar': there is ann"),
        (ask("forget"), "give the dialogue's id"),
    ],
)
def test_a_request_that_fails_is_answered(
    recognizer: Recognizer, sentences: list[Sound], request_: Request, complaint: str
) -> None:
    """One line that says what is wrong; the run goes on."""

    async def send(controls: Controls, log: EventLog) -> None:
        await log.until(lambda: bool(log.events))
        answer = await controls.answer(request_)
        assert answer.status == "error"
        assert complaint in answer.error
        assert "\n" not in answer.error

    silence = np.zeros(16_000, np.int16)
    listen(recognizer, {named("ann"): RandomChunks(silence, seed=1)}, send)


def test_get_state_gives_switches_dialogues_and_health(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """A late client can learn the current state."""
    found: list[dict[str, Any]] = []

    async def look(controls: Controls, log: EventLog) -> None:
        await log.until(lambda: bool(log.ends()))
        found.append((await controls.answer(ask("get_state"))).content)

    log = listen(
        recognizer, {named("ann"): RandomChunks(np.tile(sentences[1], 2), seed=2, pace=3)}, look
    )
    (state,) = found
    assert state["switches"] == {"ann": {"listening": True, "transcribe": True}}
    assert state["dialogues"] == {"ann": log.ends()[0].dialogue_id}
    assert state["health"]["utterances"] >= 1
    assert state["health"]["latency_ms"]["total"]["p50"] > 0


def test_a_correction_without_a_recording_says_so(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Nothing is recorded unless asked, so there is nothing to correct."""

    async def correct(controls: Controls, log: EventLog) -> None:
        await log.until(lambda: bool(log.events))
        with pytest.raises(ConfigError, match="start with --record"):
            await controls.correct(Feedback(id="x", label="joy"))
        with pytest.raises(ConfigError, match="no label 'bliss'; there is anger"):
            await controls.correct(Feedback(id="x", label="bliss"))
        with pytest.raises(ConfigError, match="start with --record"):
            await controls.set_switch("ann", switch="record", on=True)

    listen(recognizer, {named("ann"): RandomChunks(np.zeros(16_000, np.int16), seed=1)}, correct)


def test_the_token_of_the_environment_is_that_of_every_source() -> None:
    """A command line may not hold it, and a source of its own keeps its own."""
    own = {"name": "bob", "where": "ws://0.0.0.0:2", "token": "other"}
    config = load_config(
        environ={"STREAM_HBAF_SOURCE__TOKEN": "word"},
        overrides={"sources": [{"name": "ann", "where": "ws://0.0.0.0:1"}, own]},
    )
    tokens = [source.token for source in sources_of(config)]
    assert [token.get_secret_value() for token in tokens if token] == ["word", "other"]
