"""The live pipeline: sound in, events out, without ever blocking the event loop.

    capture ─chunks─▶ listen ─▶ decode (at each pause, in the hope that it is the end)
                        │          │
                        └─finished─▶ classify ─▶ publishers

Every model runs in an executor of one thread. Both queues are bounded: when the models are
slower than the sound, ``listen`` waits, then ``capture``, and in the end the source says what it
had to let go. Partials are dropped whenever they are in the way; finished utterances never.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from stream_hbaf.audio.source import AudioSource, Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import StreamHbafError
from stream_hbaf.events import AnyEvent, Level, Model, Speech, Stage, State, Status
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.transcript import Transcript
from stream_hbaf.recognizer import Dialogue, Int16, Prediction, Recognizer, Sound, Words
from stream_hbaf.speech.segmenter import Begin, Finish, Pause, Resume
from stream_hbaf.utterance import SpokenUtterance

T = TypeVar("T")

STAGES: tuple[Stage, ...] = ("capture", "vad", "transcript", "acoustic", "classifier")
# What a model may raise on one utterance without the next one being in danger; anything else is
# a programming error and ends the pipeline.
UTTERANCE_ERRORS = (StreamHbafError, RuntimeError, MemoryError)
LEVEL_EVERY_S = 0.1
CHUNKS_WAITING = 16
FINISHED_WAITING = 4
GOODBYE_S = 1.0  # for each publisher to deliver what is finished


class Publisher(Protocol):
    """Where events go: MQTT, a terminal, JSON lines."""

    async def send(self, event: AnyEvent) -> None:
        """Take the event; wait for room if it must not be lost."""

    async def run(self) -> None:
        """Carry events away until cancelled."""

    async def close(self, timeout_s: float) -> object:
        """Deliver what is finished and say goodbye."""


@dataclass(frozen=True, slots=True)
class Recognition:
    """A finished utterance and all that its emotion was read from."""

    id: str
    finish: Finish
    acoustic: Acoustic | None
    words: Words | None
    prediction: Prediction


class LivePipeline:
    """Runs one source through the recogniser and tells the publishers what happens."""

    def __init__(
        self,
        recognizer: Recognizer,
        publishers: Sequence[Publisher],
        *,
        on_recognition: Callable[[Recognition], None] = lambda recognition: None,
    ) -> None:
        self._recognizer = recognizer
        self._publishers = publishers
        self._on_recognition = on_recognition
        config = recognizer.config
        self._source = config.source
        self._model = Model(id=recognizer.bundle.id, sha256=recognizer.bundle.sha256)
        self._gap = config.dialogue.gap_s * SAMPLE_RATE_HZ
        self._partial_every = config.transcript.partial_every_ms * SAMPLE_RATE_HZ // 1000
        self._listener = recognizer.listener()
        self._dialogue = recognizer.dialogue()
        self._last_end = 0
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue(CHUNKS_WAITING)
        self._newest: Chunk | None = None  # that was captured
        self._finished: asyncio.Queue[SpokenUtterance | None] = asyncio.Queue(FINISHED_WAITING)
        self._decoding = 0  # finals queued or running, for which partials step aside
        self._partial: asyncio.Task[None] | None = None
        self._states: dict[Stage, State] = {}
        self._level_due = 0.0
        self._tasks: asyncio.TaskGroup | None = None  # while it runs

    async def run(self, source: AudioSource, *, stop: asyncio.Event) -> None:
        """Recognise until the source ends or ``stop`` is set, then finish what was heard.

        ``source`` is open already; what it captured before now is skipped, because nobody had
        been told that we listen. Errors come out as an ExceptionGroup.
        """
        since = time.monotonic()
        with ExitStack() as executors:
            self._executors = {
                stage: executors.enter_context(ThreadPoolExecutor(1, thread_name_prefix=stage))
                for stage in STAGES[1:]
            }
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                lasting = [
                    self._task(publisher.run(), f"publish {type(publisher).__name__}")
                    for publisher in self._publishers
                ]
                for stage in STAGES:
                    await self._report(stage, "online")
                capture = self._task(self._capture(source, since=since), "capture")
                lasting.append(self._task(_cancel_when(stop, capture), "stop"))
                listen = self._task(self._listen(), "listen")
                await self._task(self._classify(), "classify")
                await listen
                for publisher in self._publishers:
                    await publisher.close(GOODBYE_S)
                for task in lasting:
                    task.cancel()
                self._tasks = None

    def report_capture(self, state: State, detail: str) -> None:
        """How the source is; meant to be the source's ``on_status``."""
        if self._tasks is not None:
            self._task(self._report("capture", state, detail), "report capture")
            if state == "offline":
                self._task(self._break_off(), "break off")

    async def _break_off(self) -> None:
        """A lost device may never come back: what was said until then ends here and now."""
        if self._newest is not None:
            end = self._newest.start + len(self._newest.samples)
            nothing = np.zeros(0, np.int16)
            await self._chunks.put(
                replace(self._newest, start=end, samples=nothing, after_gap=True)
            )

    async def _capture(self, source: AudioSource, *, since: float) -> None:
        try:
            async for chunk in source.chunks():
                if chunk.captured_at >= since:
                    self._newest = chunk
                    await self._chunks.put(chunk)
        finally:
            await self._chunks.put(None)

    async def _listen(self) -> None:
        """Follow the sound, and with it at most one utterance that is being spoken."""
        spoken: SpokenUtterance | None = None
        chunk: Chunk | None = None
        async for following in _drain(self._chunks):
            heard: list[object] = []
            if chunk is None or following.after_gap:
                heard += self._listener.flush(resume_at=following.start)
            chunk = following
            heard += await self._in("vad", self._listener.feed, chunk.samples)
            for action in heard:
                spoken = await self._follow(action, spoken, chunk)
            await self._tell_level(chunk, speech=spoken is not None)
        if chunk is not None:
            for action in self._listener.flush(resume_at=0):
                spoken = await self._follow(action, spoken, chunk)
        await self._finished.put(None)

    async def _follow(
        self, action: object, spoken: SpokenUtterance | None, chunk: Chunk
    ) -> SpokenUtterance | None:
        """Do what one action asks for; returns the utterance that is being spoken after it."""
        if isinstance(action, Begin):
            return await self._begin(action, chunk)
        if spoken is None:
            return None
        match action:
            case Sound(samples=samples):
                await self._feed(spoken, samples)
            case Pause(mean_score=score):
                self._decode_soon(spoken, speech_score=score)
            case Resume() if spoken.words is not None:
                spoken.words.cancel()
                spoken.words = None
            case Finish():
                await self._end(spoken, action, chunk)
                return None
        return spoken

    async def _begin(self, begin: Begin, chunk: Chunk) -> SpokenUtterance:
        if begin.start - self._last_end > self._gap:
            self._dialogue = self._recognizer.dialogue()
        self._dialogue.turns += 1
        spoken = SpokenUtterance(
            dialogue=self._dialogue,
            turn=self._dialogue.turns,
            start=begin.start,
            started_at=_unix_time(_captured_at(chunk, begin.start)),
            partial_due=self._partial_every,
        )
        if self._recognizer.acoustic is not None:
            spoken.session = await self._attempt(spoken, "acoustic", self._recognizer.acoustic.open)
        await self._emit(Speech(source=self._source.name, on=True))
        await self._emit(spoken.event("new", self._source, model=self._model))
        return spoken

    async def _feed(self, spoken: SpokenUtterance, samples: Int16) -> None:
        spoken.add(samples)
        if spoken.session is not None:
            await self._attempt(spoken, "acoustic", spoken.session.feed, samples)
            if "acoustic" in spoken.failures:  # features of a part would pass for the whole's
                spoken.session = None
        idle = not self._decoding and (self._partial is None or self._partial.done())
        if spoken.length >= spoken.partial_due and idle:
            spoken.partial_due = spoken.length + self._partial_every
            self._partial = self._task(self._tell_partial(spoken), f"partial {spoken.id}")

    async def _end(self, spoken: SpokenUtterance, finish: Finish, chunk: Chunk) -> None:
        spoken.finish = finish
        spoken.timing.spoken = _captured_at(chunk, finish.speech_end)
        spoken.timing.confirmed = time.monotonic()
        self._last_end = finish.end
        if spoken.words is None:
            self._decode_soon(spoken, speech_score=finish.mean_score)
        await self._finished.put(spoken)
        await self._emit(Speech(source=self._source.name, on=False))

    def _decode_soon(self, spoken: SpokenUtterance, *, speech_score: float) -> None:
        self._decoding += 1  # at once, so that a running partial is abandoned
        words = self._decode(spoken, spoken.samples, speech_score=speech_score)
        spoken.words = self._task(words, f"decode {spoken.id}")
        spoken.words.add_done_callback(self._decoded)

    def _decoded(self, _: object) -> None:
        self._decoding -= 1

    async def _decode(
        self, spoken: SpokenUtterance, samples: Int16, *, speech_score: float
    ) -> Words | None:
        """The words of ``samples`` and what they mean; None when the transcript failed."""
        final = partial(self._recognizer.transcriber.final, speech_score=speech_score)
        transcript = await self._attempt(spoken, "transcript", final, samples)
        if transcript is None:
            return None
        spoken.timing.transcript = time.monotonic()
        words = await self._understand(spoken, transcript)
        spoken.timing.text = time.monotonic()
        if words is not None and words.text is not None and spoken.finish is None:
            await self._tell_update(spoken, words)
        return words

    async def _understand(self, spoken: SpokenUtterance, transcript: Transcript) -> Words | None:
        """The words read with what the dialogue is known to have said before them."""
        read = partial(
            self._recognizer.understand,
            speaker=self._source.speaker,
            window=spoken.dialogue.window,
        )
        return await self._attempt(spoken, "classifier", read, transcript)

    async def _classify(self) -> None:
        """Finished utterances in their order: gather features, predict, publish."""
        async for spoken in _drain(self._finished):
            assert spoken.words is not None
            assert spoken.finish is not None
            acoustic, words = await asyncio.gather(self._functionals(spoken), spoken.words)
            spoken.timing.classify_began = time.monotonic()
            prediction = await self._predict(spoken, acoustic, words, commit=True)
            spoken.timing.classified = now = time.monotonic()
            inferences = prediction.inferences if prediction is not None else None
            end = spoken.event(
                "end",
                self._source,
                model=self._model,
                words=words,
                prediction=prediction,
                now=now,
            )
            await self._emit(end.model_copy(update={"inferences": inferences}))
            if prediction is not None:
                self._on_recognition(
                    Recognition(spoken.id, spoken.finish, acoustic, words, prediction)
                )

    async def _functionals(self, spoken: SpokenUtterance) -> Acoustic | None:
        if spoken.session is None:
            return None
        acoustic = await self._attempt(spoken, "acoustic", spoken.session.finish)
        spoken.timing.acoustic = time.monotonic()
        return acoustic

    async def _predict(
        self,
        spoken: SpokenUtterance,
        acoustic: Acoustic | None,
        words: Words | None,
        *,
        commit: bool = False,
    ) -> Prediction | None:
        """The emotion as far as it can be told; only a final one moves the dialogue's state."""

        def step(dialogue: Dialogue) -> Prediction:
            if commit:
                return self._recognizer.conclude(
                    acoustic=acoustic, words=words, dialogue=dialogue, explain=True
                )
            prediction, _ = self._recognizer.classify(
                acoustic=acoustic, words=words, state=dialogue.state
            )
            return prediction

        return await self._attempt(spoken, "classifier", step, spoken.dialogue)

    async def _tell_partial(self, spoken: SpokenUtterance) -> None:
        running = partial(self._recognizer.transcriber.partial, abandon=lambda: self._decoding > 0)
        transcript = await self._attempt(spoken, "transcript", running, spoken.samples)
        if transcript is None:  # a final decode came first
            return
        words = await self._understand(spoken, transcript)
        prediction = await self._predict(spoken, None, words)
        if words is not None and prediction is not None and spoken.finish is None:
            await self._emit(spoken.partial(self._source, words=words, prediction=prediction))

    async def _tell_update(self, spoken: SpokenUtterance, words: Words) -> None:
        prediction = await self._predict(spoken, None, words)
        if prediction is not None and spoken.finish is None:
            await self._emit(
                spoken.event(
                    "update", self._source, model=self._model, words=words, prediction=prediction
                )
            )

    async def _tell_level(self, chunk: Chunk, *, speech: bool) -> None:
        if chunk.captured_at < self._level_due or not len(chunk.samples):
            return
        self._level_due = chunk.captured_at + LEVEL_EVERY_S
        power = float(np.mean(np.square(chunk.samples.astype(np.float32) / 32768)))
        dbfs = 10 * float(np.log10(power + 1e-10))
        await self._emit(Level(source=self._source.name, dbfs=dbfs, speech=speech))

    async def _attempt(
        self, spoken: SpokenUtterance, stage: Stage, function: Callable[..., T], *arguments: object
    ) -> T | None:
        """Run a model on one utterance; if it fails, note that and go on without its part."""
        try:
            result = await self._in(stage, function, *arguments)
        except UTTERANCE_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            spoken.failures[stage] = reason
            await self._report(stage, "degraded", reason)
            return None
        if stage != "acoustic":  # a later attempt makes up for an earlier one
            spoken.failures.pop(stage, None)
        await self._report(stage, "online")
        return result

    async def _in(self, stage: Stage, function: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executors[stage], function, *arguments)

    async def _report(self, stage: Stage, state: State, detail: str = "") -> None:
        """Tell how a stage is, when that changed."""
        if self._states.get(stage) != state or (detail and stage == "capture"):
            self._states[stage] = state
            await self._emit(
                Status(source=self._source.name, stage=stage, state=state, detail=detail)
            )

    async def _emit(self, event: AnyEvent) -> None:
        for publisher in self._publishers:
            await publisher.send(event)

    def _task(self, coroutine: Coroutine[object, object, T], name: str) -> "asyncio.Task[T]":
        assert self._tasks is not None  # everything happens in ``run``
        return self._tasks.create_task(coroutine, name=name)


def replay(
    recognizer: Recognizer,
    source: AudioSource,
    *,
    on_recognition: Callable[[Recognition], None],
) -> None:
    """Run a source to its end and publish nothing, for callers that have no event loop."""

    async def run() -> None:
        pipeline = LivePipeline(recognizer, [], on_recognition=on_recognition)
        async with source:
            await pipeline.run(source, stop=asyncio.Event())

    asyncio.run(run())


async def _drain(queue: "asyncio.Queue[T | None]") -> AsyncIterator[T]:
    """The queue's values until None."""
    while (value := await queue.get()) is not None:
        yield value


async def _cancel_when(stop: asyncio.Event, task: "asyncio.Task[None]") -> None:
    await stop.wait()
    task.cancel()


def _captured_at(chunk: Chunk, sample: int) -> float:
    """When a sample near this chunk was captured, on the monotonic clock."""
    behind = chunk.start + len(chunk.samples) - sample
    return chunk.captured_at - behind / SAMPLE_RATE_HZ


def _unix_time(monotonic: float) -> float:
    return time.time() - time.monotonic() + monotonic
