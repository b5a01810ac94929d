"""The live pipeline on real sound: live equals replay, events, failures, bounds."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.audio.file import FileSource
from stream_hbaf.audio.source import AudioSource, Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError
from stream_hbaf.events import AnyEvent, Level, Partial, Speech, Status, Utterance
from stream_hbaf.features.inferences import Inferences
from stream_hbaf.live.pipeline import LivePipeline, Publisher, Recognition
from stream_hbaf.live.source import CHUNKS_WAITING
from stream_hbaf.recognizer import Recognizer

Sound = NDArray[np.int16]

PATIENCE_S = 60  # for what takes 0.1 s on a machine that isn't busy


class Pieces:
    """A source of given sound in chunks of random size; counts what was taken from it."""

    name = "pieces"

    def __init__(self, sound: Sound, *, seed: int, pace: bool = False) -> None:
        self._sound = sound
        self._draw = random.Random(seed)
        self._pace = pace
        self.taken = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def chunks(self) -> AsyncIterator[Chunk]:
        position = 0
        while position < len(self._sound):
            samples = self._sound[position : position + self._draw.randint(1, 4000)]
            end = position + len(samples)
            if self._pace:
                await asyncio.sleep(len(samples) / SAMPLE_RATE_HZ)
            self.taken += 1
            yield Chunk(start=position, samples=samples, captured_at=time.monotonic())
            position = end


class Notebook:
    """A publisher that writes down what it is sent."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []

    async def send(self, event: AnyEvent) -> None:
        self.events.append(event)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        pass

    def ends(self) -> list[Utterance]:
        return [e for e in self.events if isinstance(e, Utterance) and e.type == "end"]

    def partials(self) -> list[Partial]:
        return [e for e in self.events if isinstance(e, Partial)]


def recognise(
    recognizer: Recognizer,
    source: AudioSource,
    publishers: Sequence[Publisher] = (),
    *,
    meanwhile: Callable[[LivePipeline], Any] | None = None,
) -> list[Recognition]:
    """Run a source to its end and return what was recognised."""
    found: list[Recognition] = []

    async def run() -> None:
        pipeline = LivePipeline(recognizer, publishers, on_recognition=found.append)
        async with source:
            running = asyncio.create_task(pipeline.run(source, stop=asyncio.Event()))
            if meanwhile is not None:
                await meanwhile(pipeline)
            await running

    asyncio.run(run())
    return found


def assert_same(live: list[Recognition], replayed: list[Recognition], *, shift: int = 0) -> None:
    assert [(r.finish.start - shift, r.finish.end - shift) for r in live] == [
        (r.finish.start, r.finish.end) for r in replayed
    ]
    for one, other in zip(live, replayed, strict=True):
        assert one.acoustic is not None
        assert other.acoustic is not None
        assert np.array_equal(one.acoustic.functionals, other.acoustic.functionals)
        assert np.array_equal(one.acoustic.lld, other.acoustic.lld)
        assert one.words is not None
        assert other.words is not None
        assert one.words.transcript == other.words.transcript
        for label, probability in one.prediction.probabilities.items():
            assert probability == pytest.approx(other.prediction.probabilities[label], abs=1e-5)


def test_chunks_of_any_size_give_the_same_utterances(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Promise 1, for the whole path: how the sound is cut into chunks changes nothing."""
    sound = np.concatenate(sentences[1:3])
    first = recognise(recognizer, Pieces(sound, seed=1))
    second = recognise(recognizer, Pieces(sound, seed=2, pace=True))
    assert len(first) >= 2
    assert_same(first, second)


class SpeakerWhoWaits(Pieces):
    """Speaks on after 1.5 s, and after 2.75 s, once the running transcript has caught up.

    How busy the machine is then makes no difference to how many there are.
    """

    def __init__(self, sound: Sound, *, seed: int) -> None:
        super().__init__(sound, seed=seed, pace=True)
        self.read_partial = asyncio.Semaphore(0)

    async def chunks(self) -> AsyncIterator[Chunk]:
        stops = [3 * SAMPLE_RATE_HZ // 2, 11 * SAMPLE_RATE_HZ // 4]
        async for chunk in super().chunks():
            yield chunk
            if stops and chunk.start + len(chunk.samples) >= stops[0]:
                stops.pop(0)
                async with asyncio.timeout(PATIENCE_S):
                    await self.read_partial.acquire()


def test_utterance_is_told_from_new_to_end(recognizer: Recognizer, sentences: list[Sound]) -> None:
    """One id, rising revs, new first and end last, a partial a second, then the whole event."""
    speaker = SpeakerWhoWaits(sentences[1], seed=3)

    class Read(Notebook):
        async def send(self, event: AnyEvent) -> None:
            await super().send(event)
            if isinstance(event, Partial):
                speaker.read_partial.release()

    notebook = Read()
    recognise(recognizer, speaker, [notebook])
    told = [e for e in notebook.events if isinstance(e, Utterance)]
    assert len({e.id for e in told}) == 1
    assert [e.rev for e in told] == list(range(1, len(told) + 1))
    assert [told[0].type, told[-1].type] == ["new", "end"]
    assert {e.type for e in told[1:-1]} <= {"update"}
    partials = notebook.partials()
    assert len(partials) >= 2
    assert partials[-1].id == told[0].id
    assert "was not" in partials[-1].text
    speech = [e.on for e in notebook.events if isinstance(e, Speech)]
    assert speech == [True, False]
    assert any(isinstance(e, Level) and e.dbfs > -40 for e in notebook.events)

    end = told[-1]
    assert "young man" in end.text
    assert end.speaker == "reader"
    assert end.trigger == "silence"
    assert end.modalities == ["audio", "text"]
    assert end.emotion is not None
    assert sum(end.emotion.probabilities.values()) == pytest.approx(1)
    assert end.emotion.score == max(end.emotion.probabilities.values())
    assert end.emotion.label in end.emotion.set
    assert end.contributions is not None
    assert end.contributions.context == 0.0  # a dialogue's first
    assert end.contributions.audio != 0.0 != end.contributions.text
    assert end.conflict is not None
    assert all(e.contributions is None for e in told[:-1])
    assert end.latency_ms is not None
    assert end.latency_ms.total >= end.latency_ms.vad > 300
    assert end.degraded == ""
    assert end.model is not None
    assert end.model == recognizer.model


def test_failing_transcript_degrades_one_utterance_only(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Whisper that fails once costs that utterance its words and what it would have heard."""
    real, calls = recognizer.transcriber.final, []

    def failing_first(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise ModelError("out of memory; close other programs")
        return real(*arguments, **named)

    monkeypatch.setattr(recognizer.transcriber, "final", failing_first)
    notebook = Notebook()
    recognise(recognizer, Pieces(np.concatenate(sentences[1:3]), seed=4), [notebook])
    first, *others = notebook.ends()
    assert first.degraded == "transcript: out of memory; close other programs"
    assert first.modalities == []
    assert first.emotion is not None
    assert first.emotion.abstained
    assert others
    assert all(end.degraded == "" and end.text for end in others)
    states = [e.state for e in notebook.events if isinstance(e, Status) and e.stage == "transcript"]
    assert states == ["online", "degraded", "online"]


def test_inferences_are_told_at_the_end_and_only_of_words(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ``end`` with text says what its words imply; one without, or before the end, doesn't."""
    width = recognizer.bundle.config.network.commonsense_width

    def encode(phrases: Sequence[str]) -> NDArray[np.float32]:
        draw = np.random.default_rng(len(phrases))
        return draw.normal(size=(len(phrases), width)).astype(np.float32)

    written = {"external": ["sad"], "internal": ["ill", "glad"], "purpose": ["to a", "to b"]}
    known = Inferences.choose(
        {relation: dict.fromkeys(phrases, 1) for relation, phrases in written.items()},
        encode_phrases=encode,
        temperature=0.07,
    )
    monkeypatch.setattr(recognizer, "bundle", replace(recognizer.bundle, inferences=known))
    wanted = recognizer.config.model_copy(update={"inferences": True})
    monkeypatch.setattr(recognizer, "config", wanted)
    real, calls = recognizer.transcriber.final, []

    def silent_first(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        found = real(*arguments, **named)
        return replace(found, text="") if len(calls) == 1 else found

    monkeypatch.setattr(recognizer.transcriber, "final", silent_first)
    notebook = Notebook()
    found = recognise(recognizer, Pieces(np.concatenate(sentences[1:3]), seed=4), [notebook])
    silent, *spoken = notebook.ends()
    assert (silent.text, silent.inferences) == ("", None)
    assert spoken
    for end, recognition in zip(spoken, found[1:], strict=True):
        assert recognition.words is not None
        assert recognition.words.commonsense is not None
        assert end.inferences is not None
        said = end.inferences.model_dump()
        assert said == known.nearest(recognition.words.commonsense)
        assert {relation: sorted(phrases) for relation, phrases in said.items()} == {
            relation: sorted(phrases) for relation, phrases in written.items()
        }
    others = [e for e in notebook.events if isinstance(e, Utterance) and e.type != "end"]
    assert all(e.inferences is None for e in others)


def test_models_never_run_on_the_event_loop(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: each model is called in its own thread and in no other."""
    threads: dict[str, set[str]] = {}

    def watch(owner: Any, name: str, stage: str) -> None:
        real = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> Any:
            threads.setdefault(stage, set()).add(threading.current_thread().name)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, called)

    watch(recognizer.transcriber, "final", "transcript")
    watch(recognizer.transcriber, "partial", "transcript")
    watch(recognizer.acoustic, "open", "acoustic")
    watch(recognizer, "understand", "classifier")
    watch(recognizer, "classify", "classifier")
    recognise(recognizer, Pieces(sentences[1], seed=5))
    assert threads == {stage: {f"{stage}_0"} for stage in ("transcript", "acoustic", "classifier")}


def test_slow_publisher_holds_the_source_back_and_loses_nothing(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Promise 6: queues are bounded; what is finished waits, and comes in order."""
    gate = asyncio.Event()

    class Stuck(Notebook):
        async def send(self, event: AnyEvent) -> None:
            if isinstance(event, Utterance) and event.type == "end":
                await gate.wait()
            await super().send(event)

    stuck = Stuck()
    source = Pieces(np.tile(sentences[4], 20), seed=6)

    async def let_go(_: LivePipeline) -> None:
        before = -1
        while source.taken != before:  # until nothing moves any more
            before = source.taken
            await asyncio.sleep(3)
        heard = len([e for e in stuck.events if isinstance(e, Utterance) and e.type == "new"])
        assert heard <= 8
        assert source.taken * 2000 < 9 * len(sentences[4]) + CHUNKS_WAITING * 4000
        gate.set()

    recognise(recognizer, source, [stuck], meanwhile=let_go)
    ends = stuck.ends()
    assert [end.turn for end in ends] == list(range(1, 21))


def test_utterance_ends_when_the_device_is_lost(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """What was said before a microphone went is told at once, not when it comes back."""

    class EndTold(Notebook):
        def __init__(self) -> None:
            super().__init__()
            self.told = asyncio.Event()

        async def send(self, event: AnyEvent) -> None:
            await super().send(event)
            if self.ends():
                self.told.set()

    notebook = EndTold()
    pipelines: list[LivePipeline] = []

    class Unplugged(Pieces):
        async def chunks(self) -> AsyncIterator[Chunk]:
            async for chunk in super().chunks():
                yield chunk
            pipelines[0].report_capture("offline", "unplugged")
            async with asyncio.timeout(PATIENCE_S):
                await notebook.told.wait()

    async def know(pipeline: LivePipeline) -> None:
        pipelines.append(pipeline)

    half = sentences[1][: 3 * SAMPLE_RATE_HZ // 2]
    recognise(recognizer, Unplugged(half, seed=9), [notebook], meanwhile=know)
    (end,) = notebook.ends()
    assert end.text
    assert end.trigger == "end_of_input"
    states = [e.state for e in notebook.events if isinstance(e, Status) and e.stage == "capture"]
    assert states == ["online", "offline"]


def test_long_silence_begins_a_new_dialogue(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After dialogue.gap_s nothing is remembered: a new dialogue id, turn 1."""
    config = recognizer.config.model_copy(
        update={"dialogue": recognizer.config.dialogue.model_copy(update={"gap_s": 3})}
    )
    monkeypatch.setattr(recognizer, "config", config)
    silence = np.zeros(4 * SAMPLE_RATE_HZ, np.int16)
    sound = np.concatenate([sentences[1], sentences[4], silence, sentences[4]])
    notebook = Notebook()
    recognise(recognizer, Pieces(sound, seed=7), [notebook])
    ends = notebook.ends()
    assert [end.turn for end in ends] == [1, 2, 1]
    assert ends[0].dialogue_id == ends[1].dialogue_id != ends[2].dialogue_id


def test_recording_replayed_from_a_file_equals_live(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path
) -> None:
    """Promise 2, file against paced chunks: same segments, features, words, probabilities."""
    import wave

    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(sentences[2].tobytes())
    replayed = recognise(
        recognizer, FileSource(path, speed=None, chunk_ms=320, on_status=lambda *_: None)
    )
    assert_same(recognise(recognizer, Pieces(sentences[2], seed=8, pace=True)), replayed)
