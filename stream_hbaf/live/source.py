"""One source's way: chunks become utterances, and these their events.

    capture ─chunks─▶ listen ─▶ decode (at each pause, in the hope that it is the end)
                        │          │
                        └─finished─▶ classify ─▶ publishers

Both queues are bounded: when the models are slower than the sound, ``listen`` waits, then
``capture``, and in the end the source says what it had to let go. Partials are dropped whenever
they are in the way; finished utterances never.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeVar

import numpy as np

from stream_hbaf.audio.source import AudioSource, Chunk, Cut
from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.errors import StreamHbafError
from stream_hbaf.events import Level, Speech, Stage, State, Status, Switch, SwitchName, Trigger
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.live.runtime import STAGES, Recognition, Runtime
from stream_hbaf.live.utterance import SpokenUtterance
from stream_hbaf.recognizer import Dialogue, Int16, Prediction, Words
from stream_hbaf.speech.listener import Sound
from stream_hbaf.speech.segmenter import Begin, Finish, Pause, Resume

T = TypeVar("T")

# What a model may raise on one utterance without the next one being in danger; anything else is
# a programming error and ends the pipeline.
UTTERANCE_ERRORS = (StreamHbafError, RuntimeError, MemoryError)
LEVEL_EVERY_S = 0.1
CHUNKS_WAITING = 16
FINISHED_WAITING = 4


OnSound = Callable[[SourceConfig, Chunk | Cut], None]


class SourcePipeline:
    """Runs one source through the recogniser and tells the publishers what happens."""

    def __init__(
        self, runtime: Runtime, config: SourceConfig, *, on_sound: OnSound, recording: bool
    ) -> None:
        """``on_sound`` is told of every chunk that is listened to, and of every cut between."""
        self.config = config
        self.switches: dict[SwitchName, bool] = {"listening": True, "transcribe": True}
        if recording:
            self.switches["record"] = True
        self._runtime = runtime
        self._on_sound = on_sound
        self._conversation = runtime.conversation(config)
        self._partial_every = runtime.config.transcript.partial_every_ms * SAMPLE_RATE_HZ // 1000
        self._listener = runtime.recognizer.listener()
        self._chunks: asyncio.Queue[Chunk | Cut | None] = asyncio.Queue(CHUNKS_WAITING)
        self._newest: Chunk | None = None  # that was captured
        self._finished: asyncio.Queue[SpokenUtterance | None] = asyncio.Queue(FINISHED_WAITING)
        self._stopped = False
        self._capturing: asyncio.Task[None] | None = None
        self._partial: asyncio.Task[None] | None = None
        self._states: dict[Stage, State] = {}
        self._level_due = 0.0

    async def run(self, source: AudioSource, *, since: float) -> None:
        """Recognise until the source ends or ``stop``, then finish what was heard.

        What was captured before ``since``, by the monotonic clock, is skipped: nobody had been
        told that we listen.
        """
        for stage in STAGES:
            await self.report(stage, "online")
        for switch, on in self.switches.items():
            await self._emit_switch(switch, on=on)
        listen = self._runtime.task(self._listen(), "listen")
        classify = self._runtime.task(self._classify(), "classify")
        self._capturing = self._runtime.task(self._capture(source, since=since), "capture")
        if self._stopped:
            self._capturing.cancel()
        await asyncio.wait({self._capturing})
        await self._chunks.put(None)
        await asyncio.wait({listen, classify})

    def stop(self) -> None:
        """Listen no longer, or don't begin."""
        self._stopped = True
        if self._capturing is not None:
            self._capturing.cancel()

    def waiting(self) -> dict[str, int]:
        """What stands in the queues."""
        return {"chunks": self._chunks.qsize(), "finished": self._finished.qsize()}

    async def cut(self, trigger: Trigger) -> None:
        """End what is being said, here and now."""
        if self._newest is not None:
            end = self._newest.start + len(self._newest.samples)
            await self._take(Cut(resume_at=end, trigger=trigger))

    async def _take(self, heard: Chunk | Cut) -> None:
        self._on_sound(self.config, heard)
        await self._chunks.put(heard)

    async def turn(self, switch: SwitchName, *, on: bool) -> None:
        """Set a switch; what stands so already stays so."""
        changes = self.switches.get(switch) != on
        # What is recorded, and what is heard, begins and ends with whole utterances.
        if changes and (switch == "record" or (switch == "listening" and not on)):
            await self.cut("request")
        self.switches[switch] = on
        await self._emit_switch(switch, on=on)

    async def _emit_switch(self, switch: SwitchName, *, on: bool) -> None:
        await self._runtime.emit(Switch(source=self.config.name, switch=switch, on=on))

    async def _capture(self, source: AudioSource, *, since: float) -> None:
        skipped = False
        async for chunk in source.chunks():
            if chunk.captured_at < since or not self.switches["listening"]:
                skipped = True
                continue
            if skipped and self._newest is not None:
                await self._take(Cut(resume_at=chunk.start, trigger="request"))
            skipped = False
            self._newest = chunk
            await self._take(chunk)

    async def _listen(self) -> None:
        """Follow the sound, and with it at most one utterance that is being spoken."""
        spoken: SpokenUtterance | None = None
        chunk: Chunk | None = None
        sound: AsyncIterator[Chunk | Cut] = _drain(self._chunks)
        async for following in sound:
            heard: list[object] = []
            if isinstance(following, Cut):
                heard += self._listener.flush(
                    resume_at=following.resume_at, trigger=following.trigger
                )
            else:
                if chunk is None or following.after_gap:
                    heard += self._listener.flush(resume_at=following.start)
                chunk = following
                heard += await self._runtime.call("vad", self._listener.feed, chunk.samples)
            for action in heard:
                assert chunk is not None
                spoken = await self._follow(action, spoken, chunk)
            if chunk is following:
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
        recognizer = self._runtime.recognizer
        dialogue, turn = self._conversation.begin(recognizer, at_s=begin.start / SAMPLE_RATE_HZ)
        self._runtime.open[dialogue.id] += 1
        spoken = SpokenUtterance(
            recognizer=recognizer,
            dialogue=dialogue,
            turn=turn,
            start=begin.start,
            started_at=_unix_time(_captured_at(chunk, begin.start)),
            partial_due=self._partial_every,
        )
        if recognizer.acoustic is not None:
            spoken.session = await self._attempt(spoken, "acoustic", recognizer.acoustic.open)
        await self._runtime.emit(Speech(source=self.config.name, on=True))
        await self._runtime.emit(spoken.event("new", self.config))
        return spoken

    async def _feed(self, spoken: SpokenUtterance, samples: Int16) -> None:
        spoken.add(samples)
        if spoken.session is not None:
            await self._attempt(spoken, "acoustic", spoken.session.feed, samples)
            if "acoustic" in spoken.failures:  # features of a part would pass for the whole's
                spoken.session = None
        idle = not self._runtime.decoding and (self._partial is None or self._partial.done())
        if spoken.length >= spoken.partial_due and idle and self.switches["transcribe"]:
            spoken.partial_due = spoken.length + self._partial_every
            self._partial = self._runtime.task(self._tell_partial(spoken), f"partial {spoken.id}")

    async def _end(self, spoken: SpokenUtterance, finish: Finish, chunk: Chunk) -> None:
        spoken.finish = finish
        spoken.timing.spoken = _captured_at(chunk, finish.speech_end)
        spoken.timing.confirmed = time.monotonic()
        self._conversation.last_end_s = finish.end / SAMPLE_RATE_HZ
        if spoken.words is None:
            self._decode_soon(spoken, speech_score=finish.mean_score)
        await self._finished.put(spoken)
        await self._runtime.emit(Speech(source=self.config.name, on=False))

    def _decode_soon(self, spoken: SpokenUtterance, *, speech_score: float) -> None:
        self._runtime.decoding += 1  # at once, so that a running partial is abandoned
        words = self._decode(spoken, spoken.samples, speech_score=speech_score)
        spoken.words = self._runtime.task(words, f"decode {spoken.id}")
        spoken.words.add_done_callback(self._decoded)

    def _decoded(self, _: object) -> None:
        self._runtime.decoding -= 1

    async def _decode(
        self, spoken: SpokenUtterance, samples: Int16, *, speech_score: float
    ) -> Words | None:
        """The words of ``samples`` and what they mean; None when the transcript failed."""
        final = partial(
            spoken.recognizer.transcriber.final,
            speech_score=speech_score,
            write=self.switches["transcribe"],
        )
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
            spoken.recognizer.understand,
            speaker=self.config.speaker,
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
            end = spoken.event("end", self.config, words=words, prediction=prediction, now=now)
            await self._runtime.emit(end)
            self._runtime.count(end)
            summary = self._conversation.summarise(end)
            if summary is not None:
                await self._runtime.emit(summary)
            self._runtime.open[end.dialogue_id] -= 1
            if prediction is not None:
                self._runtime.on_recognition(
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
            recognizer, speaker = spoken.recognizer, self.config.speaker
            modalities = self._runtime.modalities
            if commit:
                return recognizer.conclude(
                    acoustic=acoustic,
                    words=words,
                    dialogue=dialogue,
                    speaker=speaker,
                    explain=True,
                    modalities=modalities,
                )
            number = dialogue.number_of(speaker)
            prediction, _ = recognizer.classify(
                acoustic=acoustic,
                words=words,
                state=dialogue.state,
                speaker=number,
                modalities=modalities,
            )
            return prediction

        return await self._attempt(spoken, "classifier", step, spoken.dialogue)

    async def _tell_partial(self, spoken: SpokenUtterance) -> None:
        running = partial(
            spoken.recognizer.transcriber.partial, abandon=lambda: self._runtime.decoding > 0
        )
        transcript = await self._attempt(spoken, "transcript", running, spoken.samples)
        if transcript is None:  # a final decode came first
            return
        words = await self._understand(spoken, transcript)
        prediction = await self._predict(spoken, None, words)
        if words is not None and prediction is not None and spoken.finish is None:
            await self._runtime.emit(
                spoken.partial(self.config, words=words, prediction=prediction)
            )

    async def _tell_update(self, spoken: SpokenUtterance, words: Words) -> None:
        prediction = await self._predict(spoken, None, words)
        if prediction is not None and spoken.finish is None:
            update = spoken.event("update", self.config, words=words, prediction=prediction)
            await self._runtime.emit(update)

    async def _tell_level(self, chunk: Chunk, *, speech: bool) -> None:
        if chunk.captured_at < self._level_due or not len(chunk.samples):
            return
        self._level_due = chunk.captured_at + LEVEL_EVERY_S
        power = float(np.mean(np.square(chunk.samples.astype(np.float32) / 32768)))
        dbfs = 10 * float(np.log10(power + 1e-10))
        await self._runtime.emit(Level(source=self.config.name, dbfs=dbfs, speech=speech))

    async def _attempt(
        self, spoken: SpokenUtterance, stage: Stage, function: Callable[..., T], *arguments: object
    ) -> T | None:
        """Run a model on one utterance; if it fails, note that and go on without its part."""
        try:
            result = await self._runtime.call(stage, function, *arguments)
        except UTTERANCE_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            spoken.failures[stage] = reason
            await self.report(stage, "degraded", reason)
            return None
        if stage != "acoustic":  # a later attempt makes up for an earlier one
            spoken.failures.pop(stage, None)
        await self.report(stage, "online")
        return result

    async def report(self, stage: Stage, state: State, detail: str = "") -> None:
        """Tell how a stage is, when that changed."""
        if self._states.get(stage) != state or (detail and stage == "capture"):
            self._states[stage] = state
            await self._runtime.emit(
                Status(source=self.config.name, stage=stage, state=state, detail=detail)
            )


async def _drain(queue: "asyncio.Queue[T | None]") -> AsyncIterator[T]:
    """The queue's values until None."""
    while (value := await queue.get()) is not None:
        yield value


def _captured_at(chunk: Chunk, sample: int) -> float:
    """When a sample near this chunk was captured, on the monotonic clock."""
    behind = chunk.start + len(chunk.samples) - sample
    return chunk.captured_at - behind / SAMPLE_RATE_HZ


def _unix_time(monotonic: float) -> float:
    return time.time() - time.monotonic() + monotonic
