"""Runs one source through the recogniser: chunks become utterances, utterances become events.

    capture ─chunks─▶ detect ─▶ transcribe (at each pause, in case it is the end)
                        │          │
                        └─finished─▶ classify ─▶ publishers

Both queues are bounded: when the models are slower than the sound, ``detect`` waits, then
``capture`` (backpressure), and the source reports what it had to drop. Partial transcripts are
dropped whenever a final one is due; finished utterances never are.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from stream_hbaf.audio.source import AudioSource, Chunk, Cut
from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.events import (
    Speech,
    Switch,
    SwitchName,
    Trigger,
)
from stream_hbaf.live.features import LiveFeatures
from stream_hbaf.live.finishing import publish_finished
from stream_hbaf.live.runtime import STAGES, Runtime
from stream_hbaf.live.sound_monitor import SoundMonitor
from stream_hbaf.live.stages import SourceStages
from stream_hbaf.live.utterance import LiveUtterance, Voice
from stream_hbaf.recognizer import Int16
from stream_hbaf.speech.detector import Feed, UtteranceAction, UtteranceDetector
from stream_hbaf.speech.endpointer import Evidence, is_over
from stream_hbaf.speech.segmenter import Begin, Consult, Finish, Pause, Resume

T = TypeVar("T")

CHUNKS_WAITING = 16
FINISHED_WAITING = 4

OnAudio = Callable[[SourceConfig, Chunk | Cut], None]


class SourcePipeline:
    """Recognises the utterances of one source and publishes their events."""

    def __init__(
        self,
        runtime: Runtime,
        config: SourceConfig,
        *,
        on_audio: OnAudio,
        on_hint: Callable[[], Awaitable[None]],
        recording: bool,
        opened_s: float = 0.0,
    ) -> None:
        """``on_audio`` gets every chunk that is recognised, and every cut between chunks.

        ``on_hint`` is called when the source's hint in ``runtime.hints`` has changed. ``opened_s``
        is how long after the first sources this one was opened: who shares a dialogue shares time.
        """
        self.config = config
        self._opened_s = opened_s
        self.switches: dict[SwitchName, bool] = {"listening": True, "transcribe": True}
        if recording:
            self.switches["record"] = True
        self._runtime = runtime
        self._on_audio = on_audio
        self.tracker = runtime.tracker(config)
        # Where settings say who speaks, the voice is not asked.
        self._by_voice = runtime.recognizer.speaker_encoder is not None and not config.speaker
        asks = runtime.config.endpoint.engine != "silence"
        self._detector = UtteranceDetector(runtime.config, asks=asks)
        self._monitor = SoundMonitor(config.name, runtime, on_hint=on_hint)
        self._chunks: asyncio.Queue[Chunk | Cut | None] = asyncio.Queue(CHUNKS_WAITING)
        self._newest: Chunk | None = None  # that was captured
        self._finished: asyncio.Queue[LiveUtterance | None] = asyncio.Queue(FINISHED_WAITING)
        self._stopped = False
        self._capturing: asyncio.Task[None] | None = None
        self.stages = SourceStages(runtime, config.name, on_report=self._monitor.report)
        self._features = LiveFeatures(runtime, config.name, stages=self.stages)

    async def run(self, source: AudioSource, *, since: float) -> None:
        """Recognise until the source ends or ``stop``, then finish the utterances.

        Chunks captured before ``since``, by the monotonic clock, are skipped: the program had not
        announced yet that it listens.
        """
        for stage in STAGES:
            if stage != "speaker" or self._by_voice:
                await self.stages.report(stage, "online")
        for switch, on in self.switches.items():
            await self._publish_switch(switch, on=on)
        detect = self._runtime.task(self._detect(), "detect")
        classify = self._runtime.task(self._classify(), "classify")
        self._capturing = self._runtime.task(self._capture(source, since=since), "capture")
        if self._stopped:
            self._capturing.cancel()
        await asyncio.wait({self._capturing})
        await self._chunks.put(None)
        await asyncio.wait({detect, classify})

    def stop(self) -> None:
        """End the capture, or prevent it if it hasn't begun."""
        self._stopped = True
        if self._capturing is not None:
            self._capturing.cancel()

    def queue_lengths(self) -> dict[str, int]:
        """How many chunks and finished utterances wait."""
        return {"chunks": self._chunks.qsize(), "finished": self._finished.qsize()}

    async def cut(self, trigger: Trigger) -> None:
        """End the open utterance after the newest chunk."""
        if self._newest is not None:
            end = self._newest.start + len(self._newest.samples)
            await self._put(Cut(resume_at=end, trigger=trigger))

    async def _put(self, audio: Chunk | Cut) -> None:
        self._on_audio(self.config, audio)
        await self._chunks.put(audio)

    async def set_switch(self, switch: SwitchName, *, on: bool) -> None:
        """Set a switch and publish its state, also if that doesn't change."""
        changes = self.switches.get(switch) != on
        # A recording begins and ends with whole utterances, and so does listening.
        if changes and (switch == "record" or (switch == "listening" and not on)):
            await self.cut("request")
        self.switches[switch] = on
        await self._publish_switch(switch, on=on)

    async def _publish_switch(self, switch: SwitchName, *, on: bool) -> None:
        await self._runtime.publish(Switch(source=self.config.name, switch=switch, on=on))

    async def _capture(self, source: AudioSource, *, since: float) -> None:
        skipped = False
        async for chunk in source.chunks():
            if chunk.captured_at < since or not self.switches["listening"]:
                skipped = True
                continue
            if skipped and self._newest is not None:
                await self._put(Cut(resume_at=chunk.start, trigger="request"))
            skipped = False
            self._newest = chunk
            await self._put(chunk)

    async def _detect(self) -> None:
        """Detect utterances in the chunks and follow the one that is open, if any."""
        utterance: LiveUtterance | None = None
        chunk: Chunk | None = None
        incoming: AsyncIterator[Chunk | Cut] = _drain(self._chunks)
        async for audio in incoming:
            actions: list[UtteranceAction] = []
            if isinstance(audio, Cut):
                actions += self._detector.flush(resume_at=audio.resume_at, trigger=audio.trigger)
            else:
                if chunk is None or audio.after_gap:
                    actions += self._detector.flush(resume_at=audio.start)
                chunk = audio
                actions += await self._runtime.run_model("vad", self._detector.feed, chunk.samples)
            while actions:
                for action in actions:
                    assert chunk is not None
                    utterance = await self._follow(action, utterance=utterance, chunk=chunk)
                actions = await self._answer(actions[-1], utterance)
            if chunk is audio:
                score, is_speech = self._detector.highest_score, utterance is not None
                await self._monitor.add(chunk, is_speech=is_speech, highest_score=score)
        await self._monitor.end(highest_score=self._detector.highest_score)
        if chunk is not None:
            for action in self._detector.flush(resume_at=0):
                utterance = await self._follow(action, utterance=utterance, chunk=chunk)
        await self._finished.put(None)

    async def _follow(
        self, action: UtteranceAction, *, utterance: LiveUtterance | None, chunk: Chunk
    ) -> LiveUtterance | None:
        """Apply one action of the detector; returns the utterance that is open after it."""
        if isinstance(action, Begin):
            return await self._begin(action, chunk=chunk)
        if utterance is None:
            return None
        match action:
            case Feed(samples=samples):
                await self._feed(utterance, samples)
            case Pause(mean_score=score):
                self._features.ask_turn_model_soon(utterance)
                utterance.parts = await self._split(utterance)
                for part in utterance.parts:
                    self._transcribe_soon(part, speech_score=score)
                if utterance.voice is not None:
                    self._runtime.run_soon("speaker", utterance.voice.pause)
                if len(utterance.parts) == 1:
                    self._features.embed_soon(utterance)
            case Resume():
                utterance.resume()
            case Finish():
                await self._end(utterance, finish=action, chunk=chunk)
                return None
        return utterance

    async def _answer(
        self, last: UtteranceAction, utterance: LiveUtterance | None
    ) -> list[UtteranceAction]:
        """What the answer to a Consult brings about; nothing if the ``last`` action isn't one.

        The answer is waited for, so that it is given at the sample at which it was asked for.
        """
        if not isinstance(last, Consult):
            return []
        assert utterance is not None
        ends = utterance.turn_probability  # computed since the Pause
        probability = None if ends is None else await ends
        evidence = Evidence(last.trigger, last.habit, last.score, probability)
        over = is_over(evidence, config=self._runtime.config.endpoint)
        answer = partial(self._detector.answer, is_over=over)
        return await self._runtime.run_model("vad", answer)

    async def _begin(self, begin: Begin, *, chunk: Chunk) -> LiveUtterance:
        await self._monitor.begin_utterance()
        recognizer = self._runtime.recognizer
        at_s = self._opened_s + begin.start / SAMPLE_RATE_HZ
        dialogue, turn = self.tracker.next_turn(recognizer, at_s=at_s)
        self._runtime.open_utterance(dialogue.id)
        utterance = LiveUtterance(
            recognizer=recognizer,
            dialogue=dialogue,
            speakers=self.tracker.speakers,
            source=self.config,
            turn=turn,
            start=begin.start,
            started_at=time.time() - time.monotonic() + chunk.time_of(begin.start),
            modalities=self._runtime.modalities,
            partial_due=self._features.partial_every,
        )
        if recognizer.acoustic is not None:
            utterance.session = await self.stages.attempt(
                utterance, "acoustic", recognizer.acoustic.open
            )
        if self._by_voice and recognizer.speaker_encoder is not None:
            utterance.voice = Voice(recognizer.speaker_encoder.open)
        await self._runtime.publish(Speech(source=self.config.name, on=True))
        await self._runtime.publish(utterance.event("new"))
        return utterance

    async def _feed(self, utterance: LiveUtterance, samples: Int16) -> None:
        utterance.add(samples)
        if utterance.session is not None:
            await self.stages.attempt(utterance, "acoustic", utterance.session.feed, samples)
            if "acoustic" in utterance.failures:  # a part must not pass for the whole utterance
                utterance.session = None
        if utterance.voice is not None:
            self._runtime.run_soon("speaker", utterance.voice.feed, samples)
        if utterance.length >= utterance.partial_due and self.switches["transcribe"]:
            self._features.transcribe_partial_soon(utterance)

    async def _split(self, utterance: LiveUtterance) -> list[LiveUtterance]:
        """The utterance so far, as one or, where speakers change, as several."""
        if utterance.voice is None:
            return [utterance]
        changes = await self._runtime.run_model("speaker", utterance.voice.changes)
        return utterance.split(changes)

    async def _end(self, utterance: LiveUtterance, *, finish: Finish, chunk: Chunk) -> None:
        utterance.finish, confirmed = finish, time.monotonic()
        self.tracker.last_end_s = self._opened_s + finish.end / SAMPLE_RATE_HZ
        parts, utterance.parts = utterance.parts or await self._split(utterance), []
        further = [part for part in parts if not part.turn]
        for part in further:  # before the first one's end, so that the dialogue isn't over with it
            part.turn = part.dialogue.next_turn()
            self._runtime.open_utterance(part.dialogue.id)
        self._features.cancel_partial()
        for part, own in zip(parts, finish.split([one.start for one in further]), strict=True):
            part.finish = own
            part.timing.speech_end = chunk.time_of(own.speech_end)
            part.timing.confirmed = confirmed
            if part in further:
                await self._runtime.publish(part.event("new"))
            if part.text is None:
                self._transcribe_soon(part, speech_score=own.mean_score)
            if part.embedded is None:
                self._features.embed_soon(part)
            await self._finished.put(part)
        await self._runtime.publish(Speech(source=self.config.name, on=False))

    def _transcribe_soon(self, utterance: LiveUtterance, *, speech_score: float) -> None:
        decode = self.switches["transcribe"]
        self._features.transcribe_soon(utterance, speech_score=speech_score, decode=decode)

    async def _classify(self) -> None:
        """Classify and publish finished utterances in their order."""
        async for utterance in _drain(self._finished):
            await publish_finished(utterance, runtime=self._runtime, stages=self.stages)


async def _drain(queue: "asyncio.Queue[T | None]") -> AsyncIterator[T]:
    """The queue's values until None."""
    while (value := await queue.get()) is not None:
        yield value
