"""Computes what an utterance is classified from, while it is spoken.

At each pause, in case that it is the end, come the transcript with its text features, the
embeddings of sound, and how likely the turn is over; while speech goes on, running transcripts.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import UTTERANCE_ERRORS
from stream_hbaf.events import AnyEvent
from stream_hbaf.features.acoustic import AcousticStream
from stream_hbaf.features.turn_model import TurnModel
from stream_hbaf.live.runtime import Runtime
from stream_hbaf.live.slots import Urgency
from stream_hbaf.live.stages import SourceStages, reason_of
from stream_hbaf.live.utterance import LiveUtterance
from stream_hbaf.prediction import TextFeatures
from stream_hbaf.recognizer import Int16


class LiveFeatures:
    """The features of one source's utterances; tasks whose results the utterance holds."""

    def __init__(self, runtime: Runtime, source: str, *, stages: SourceStages) -> None:
        # Samples from one running transcript to the next.
        self.partial_every = runtime.config.transcript.partial_every_ms * SAMPLE_RATE_HZ // 1000
        self._runtime = runtime
        self._slots = runtime.slots
        self._source = source
        self._stages = stages
        self._partial: asyncio.Task[None] | None = None

    def transcribe_soon(
        self, utterance: LiveUtterance, *, speech_score: float, decode: bool
    ) -> None:
        """Compute the text features of all samples so far; without ``decode`` of no words."""
        text = self._transcribe(
            utterance, utterance.samples, speech_score=speech_score, decode=decode
        )
        utterance.text = self._runtime.task(text, f"transcribe {utterance.id}")

    def embed_soon(self, utterance: LiveUtterance) -> None:
        """Compute the embeddings of all sound so far, unless openSMILE failed in it."""
        if utterance.session is not None:
            embed = self._embed(utterance, utterance.session)
            utterance.embedded = self._runtime.task(embed, f"embed {utterance.id}")

    def ask_turn_model_soon(self, utterance: LiveUtterance) -> None:
        """Compute how likely the turn is over, if a model for that is chosen."""
        if self._runtime.turn_model is not None:
            ends = self._turn_probability(utterance, self._runtime.turn_model)
            utterance.turn_probability = self._runtime.task(ends, f"turn {utterance.id}")

    def transcribe_partial_soon(self, utterance: LiveUtterance) -> None:
        """Publish a running transcript, unless one is being computed."""
        if self._partial is None or self._partial.done():
            transcribe = self._transcribe_partial(utterance)
            self._partial = self._runtime.task(transcribe, f"partial {utterance.id}")

    def cancel_partial(self) -> None:
        """Give the running transcript up: the utterance is over."""
        if self._partial is not None:
            self._partial.cancel()

    async def _transcribe(
        self, utterance: LiveUtterance, samples: Int16, *, speech_score: float, decode: bool
    ) -> TextFeatures | None:
        """The text features of ``samples``; None if the transcript failed."""
        final = partial(
            utterance.recognizer.transcriber.final,
            speech_score=speech_score,
            decode=decode,
            abandon=_is_cancelled(asyncio.current_task()),
        )
        was_open = utterance.finish is None
        async with self._slots.hold(self._source, partial(_urgency, utterance)) as urgency:
            self._slots.speculations_missed += was_open and urgency is Urgency.FINAL
            transcript = await self._stages.attempt(utterance, "transcript", final, samples)
        if transcript is None:
            return None
        utterance.timing.transcript = time.monotonic()
        text = await self._stages.attempt(
            utterance, "classifier", utterance.encode_text, transcript
        )
        utterance.timing.text = time.monotonic()
        is_open = utterance.finish is None and utterance.turn > 0
        if text is not None and text.embedding is not None and is_open:
            await self._publish_provisional(utterance, text, partial(utterance.event, "update"))
        return text

    async def _embed(self, utterance: LiveUtterance, session: AcousticStream) -> None:
        async with self._slots.hold(self._source, partial(_urgency, utterance)):
            await self._stages.attempt(utterance, "acoustic", session.pause, thread="embedding")

    async def _turn_probability(self, utterance: LiveUtterance, model: TurnModel) -> float | None:
        """How likely the turn is over; None if the model failed, and has no say."""
        try:
            found = await self._runtime.run_model("turn", model.probability, utterance.samples)
        except UTTERANCE_ERRORS as error:
            await self._stages.report("vad", "degraded", f"end of turn: {reason_of(error)}")
            return None
        await self._stages.report("vad", "online")
        return found

    async def _transcribe_partial(self, utterance: LiveUtterance) -> None:
        slots, is_cancelled = self._slots, _is_cancelled(asyncio.current_task())
        async with slots.hold(self._source, lambda: Urgency.PARTIAL):
            if utterance.parts:  # speech pauses meanwhile, and its transcript is due
                return
            utterance.partial_due = utterance.length + self.partial_every
            transcript = await self._stages.attempt(
                utterance,
                "transcript",
                utterance.recognizer.transcriber.partial,
                utterance.samples,
                lambda: slots.is_crowded or is_cancelled(),
            )
        if transcript is None:  # abandoned or failed
            slots.partials_given_up += 1
            return
        text = await self._stages.attempt(
            utterance, "classifier", utterance.encode_text, transcript
        )
        if text is not None:
            await self._publish_provisional(utterance, text, utterance.partial)

    async def _publish_provisional(
        self, utterance: LiveUtterance, text: TextFeatures, event: Callable[..., AnyEvent]
    ) -> None:
        """Publish an event with the emotion of the text so far, unless the utterance has ended."""
        prediction = await self._stages.attempt(
            utterance, "classifier", utterance.classify_text, text
        )
        if prediction is not None and utterance.finish is None:
            await self._runtime.publish(event(text=text, prediction=prediction))


def _urgency(utterance: LiveUtterance) -> Urgency:
    return Urgency.SPECULATIVE if utterance.finish is None else Urgency.FINAL


def _is_cancelled(task: "asyncio.Task[Any] | None") -> Callable[[], bool]:
    """What tells, in any thread, whether a task has been cancelled."""
    assert task is not None
    return lambda: task.cancelling() > 0
