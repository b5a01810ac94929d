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
from typing import Any, TypeVar

from stream_hbaf.audio.source import AudioSource, Chunk, Cut
from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.errors import UTTERANCE_ERRORS
from stream_hbaf.events import (
    AnyEvent,
    Speech,
    Switch,
    SwitchName,
    Trigger,
)
from stream_hbaf.features.acoustic import AcousticStream
from stream_hbaf.features.turn_model import TurnModel
from stream_hbaf.live.finishing import publish_finished
from stream_hbaf.live.runtime import STAGES, Runtime
from stream_hbaf.live.slots import Urgency
from stream_hbaf.live.sound_monitor import SoundMonitor
from stream_hbaf.live.stages import SourceStages, reason_of
from stream_hbaf.live.utterance import LiveUtterance, Voice
from stream_hbaf.prediction import TextFeatures
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
        self._partial_every = runtime.config.transcript.partial_every_ms * SAMPLE_RATE_HZ // 1000
        # Where settings say who speaks, the voice is not asked.
        self._by_voice = runtime.recognizer.speaker_encoder is not None and not config.speaker
        asks = runtime.turn_model is not None
        self._detector = UtteranceDetector(runtime.config, asks=asks)
        self._monitor = SoundMonitor(config.name, runtime, on_hint=on_hint)
        self._chunks: asyncio.Queue[Chunk | Cut | None] = asyncio.Queue(CHUNKS_WAITING)
        self._newest: Chunk | None = None  # that was captured
        self._finished: asyncio.Queue[LiveUtterance | None] = asyncio.Queue(FINISHED_WAITING)
        self._stopped = False
        self._capturing: asyncio.Task[None] | None = None
        self._partial: asyncio.Task[None] | None = None
        self.stages = SourceStages(runtime, config.name, on_report=self._monitor.report)

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
                if self._runtime.turn_model is not None:
                    ends = self._probability(utterance, self._runtime.turn_model)
                    utterance.turn_probability = self._runtime.task(ends, f"turn {utterance.id}")
                utterance.parts = await self._split(utterance)
                for part in utterance.parts:
                    self._transcribe_soon(part, speech_score=score)
                if utterance.voice is not None:
                    self._runtime.run_soon("speaker", utterance.voice.pause)
                if len(utterance.parts) == 1:
                    self._measure_soon(utterance)
            case Resume():
                utterance.resume()
            case Finish():
                await self._end(utterance, finish=action, chunk=chunk)
                return None
        return utterance

    async def _probability(self, utterance: LiveUtterance, model: TurnModel) -> float | None:
        """How likely the turn is over; None if the model failed, and silence has to decide."""
        try:
            found = await self._runtime.run_model("turn", model.probability, utterance.samples)
        except UTTERANCE_ERRORS as error:
            await self.stages.report("vad", "degraded", f"end of turn: {reason_of(error)}")
            return None
        await self.stages.report("vad", "online")
        return found

    async def _answer(
        self, last: UtteranceAction, utterance: LiveUtterance | None
    ) -> list[UtteranceAction]:
        """What the answer to a Consult brings about; nothing if the ``last`` action isn't one.

        The answer is waited for, so that it is given at the sample at which it was asked for.
        """
        if not isinstance(last, Consult):
            return []
        assert utterance is not None
        assert utterance.turn_probability is not None  # a Pause came before
        probability = await utterance.turn_probability
        evidence = Evidence(last.trigger, last.habit, probability)
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
            partial_due=self._partial_every,
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
        idle = self._partial is None or self._partial.done()
        if utterance.length >= utterance.partial_due and idle and self.switches["transcribe"]:
            transcribe = self._transcribe_partial(utterance)
            self._partial = self._runtime.task(transcribe, f"partial {utterance.id}")

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
        if self._partial is not None:
            self._partial.cancel()
        for part, own in zip(parts, finish.split([one.start for one in further]), strict=True):
            part.finish = own
            part.timing.speech_end = chunk.time_of(own.speech_end)
            part.timing.confirmed = confirmed
            if part in further:
                await self._runtime.publish(part.event("new"))
            if part.text is None:
                self._transcribe_soon(part, speech_score=own.mean_score)
            if part.measured is None:
                self._measure_soon(part)
            await self._finished.put(part)
        await self._runtime.publish(Speech(source=self.config.name, on=False))

    def _transcribe_soon(self, utterance: LiveUtterance, *, speech_score: float) -> None:
        text = self._transcribe(utterance, utterance.samples, speech_score=speech_score)
        utterance.text = self._runtime.task(text, f"transcribe {utterance.id}")

    async def _transcribe(
        self, utterance: LiveUtterance, samples: Int16, *, speech_score: float
    ) -> TextFeatures | None:
        """The text features of ``samples``; None if the transcript failed."""
        final = partial(
            utterance.recognizer.transcriber.final,
            speech_score=speech_score,
            decode=self.switches["transcribe"],
            abandon=_is_cancelled(asyncio.current_task()),
        )

        slots, was_open = self._runtime.slots, utterance.finish is None
        async with slots.hold(self.config.name, partial(_urgency, utterance)) as urgency:
            slots.speculations_missed += was_open and urgency is Urgency.FINAL
            transcript = await self.stages.attempt(utterance, "transcript", final, samples)
        if transcript is None:
            return None
        utterance.timing.transcript = time.monotonic()
        text = await self.stages.attempt(utterance, "classifier", utterance.encode_text, transcript)
        utterance.timing.text = time.monotonic()
        is_open = utterance.finish is None and utterance.turn > 0
        if text is not None and text.embedding is not None and is_open:
            await self._publish_provisional(utterance, text, partial(utterance.event, "update"))
        return text

    def _measure_soon(self, utterance: LiveUtterance) -> None:
        if utterance.session is not None:
            measure = self._measure(utterance, utterance.session)
            utterance.measured = self._runtime.task(measure, f"embed {utterance.id}")

    async def _measure(self, utterance: LiveUtterance, session: AcousticStream) -> None:
        """Compute the embeddings of the utterance's sound, which need all of it."""
        async with self._runtime.slots.hold(self.config.name, partial(_urgency, utterance)):
            await self.stages.attempt(utterance, "acoustic", session.pause, thread="embedding")

    async def _transcribe_partial(self, utterance: LiveUtterance) -> None:
        slots, is_cancelled = self._runtime.slots, _is_cancelled(asyncio.current_task())
        async with slots.hold(self.config.name, lambda: Urgency.PARTIAL):
            if utterance.parts:  # speech pauses meanwhile, and its transcript is due
                return
            utterance.partial_due = utterance.length + self._partial_every
            transcript = await self.stages.attempt(
                utterance,
                "transcript",
                utterance.recognizer.transcriber.partial,
                utterance.samples,
                lambda: slots.is_crowded or is_cancelled(),
            )
        if transcript is None:  # abandoned or failed
            slots.partials_given_up += 1
            return
        text = await self.stages.attempt(utterance, "classifier", utterance.encode_text, transcript)
        if text is not None:
            await self._publish_provisional(utterance, text, utterance.partial)

    async def _publish_provisional(
        self, utterance: LiveUtterance, text: TextFeatures, event: Callable[..., AnyEvent]
    ) -> None:
        """Publish an event with the emotion of the text so far, unless the utterance has ended."""
        prediction = await self.stages.attempt(
            utterance, "classifier", utterance.classify_text, text
        )
        if prediction is not None and utterance.finish is None:
            await self._runtime.publish(event(text=text, prediction=prediction))

    async def _classify(self) -> None:
        """Classify and publish finished utterances in their order."""
        async for utterance in _drain(self._finished):
            await publish_finished(
                utterance, runtime=self._runtime, tracker=self.tracker, stages=self.stages
            )


def _urgency(utterance: LiveUtterance) -> Urgency:
    return Urgency.SPECULATIVE if utterance.finish is None else Urgency.FINAL


def _is_cancelled(task: "asyncio.Task[Any] | None") -> Callable[[], bool]:
    """What tells, in any thread, whether a task has been cancelled."""
    assert task is not None
    return lambda: task.cancelling() > 0


async def _drain(queue: "asyncio.Queue[T | None]") -> AsyncIterator[T]:
    """The queue's values until None."""
    while (value := await queue.get()) is not None:
        yield value
