"""An utterance on its way, from its first sample to its end event."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import numpy as np

from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.events import Asr, Emotion, Latency, Partial, Stage, Utterance
from stream_hbaf.features.acoustic import AcousticSession
from stream_hbaf.recognizer import Dialogue, Int16, Prediction, Recognizer, Words
from stream_hbaf.speech.segmenter import Finish


@dataclass(slots=True)
class Timing:
    """When each part was ready, in seconds of the monotonic clock; 0 is never."""

    spoken: float = 0.0  # the last speech sample was captured
    confirmed: float = 0.0  # the segmenter was sure of the end
    transcript: float = 0.0
    text: float = 0.0
    acoustic: float = 0.0
    classify_began: float = 0.0
    classified: float = 0.0

    def latency(self, now: float) -> Latency:
        """What the milliseconds from the last speech sample until ``now`` were spent on."""

        def ms(start: float, end: float) -> float:
            return round(max(0.0, end - start) * 1000, 1)

        return Latency(
            vad=ms(self.spoken, self.confirmed),
            transcript=ms(self.confirmed, self.transcript),
            acoustic=ms(self.confirmed, self.acoustic),
            text=ms(max(self.confirmed, self.transcript), self.text),
            classify=ms(self.classify_began, self.classified),
            publish=ms(self.classified, now),
            total=ms(self.spoken, now),
        )


@dataclass(slots=True)
class SpokenUtterance:
    """What the live pipeline knows of one utterance so far."""

    recognizer: Recognizer  # that it began with, and is finished by
    dialogue: Dialogue
    turn: int
    start: int  # sample
    started_at: float  # Unix time in seconds
    session: AcousticSession | None = None
    rev: int = 0
    sound: list[Int16] = field(default_factory=list)
    length: int = 0  # samples in ``sound``
    partial_due: int = 0  # length at which the next running transcript is due
    words: "asyncio.Task[Words | None] | None" = None  # of all that was said, if that is all
    finish: Finish | None = None
    failures: dict[Stage, str] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    @property
    def id(self) -> str:
        return f"{self.dialogue.id}-{self.turn}"

    @property
    def samples(self) -> Int16:
        return np.concatenate(self.sound) if self.sound else np.zeros(0, np.int16)

    def add(self, samples: Int16) -> None:
        self.sound.append(samples)
        self.length += len(samples)

    def event(
        self,
        kind: Literal["new", "update", "end"],
        source: SourceConfig,
        *,
        words: Words | None = None,
        prediction: Prediction | None = None,
        now: float = 0.0,
    ) -> Utterance:
        """The next message about this utterance; ``now`` is the monotonic clock's."""
        self.rev += 1
        transcript = words.transcript if words is not None else None
        finish = self.finish if kind == "end" else None
        return Utterance(
            id=self.id,
            rev=self.rev,
            type=kind,
            source=source.name,
            dialogue_id=self.dialogue.id,
            turn=self.turn,
            speaker=source.speaker,
            start_time=_iso(self.started_at),
            end_time=_iso(self.started_at + _ms(finish.end - self.start) / 1000)
            if finish
            else None,
            audio_start_ms=_ms(self.start),
            audio_end_ms=_ms(finish.end) if finish else None,
            trigger=finish.trigger if finish else None,
            text=transcript.text if transcript else "",
            language=transcript.language if transcript else "",
            asr=Asr(avg_logprob=transcript.avg_logprob, no_speech_prob=transcript.no_speech_prob)
            if transcript
            else None,
            modalities=list(prediction.modalities) if prediction else [],
            emotion=_emotion(prediction) if prediction else None,
            contributions=prediction.contributions if prediction else None,
            conflict=prediction.conflict if prediction else None,
            inferences=prediction.inferences if prediction else None,
            degraded="; ".join(f"{stage}: {why}" for stage, why in self.failures.items()),
            latency_ms=self.timing.latency(now) if finish else None,
            model=self.recognizer.model if finish else None,
        )

    def partial(self, source: SourceConfig, *, words: Words, prediction: Prediction) -> Partial:
        """The running transcript with its provisional emotion."""
        return Partial(
            id=self.id,
            source=source.name,
            dialogue_id=self.dialogue.id,
            speaker=source.speaker,
            text=words.transcript.text,
            modalities=list(prediction.modalities),
            emotion=_emotion(prediction),
        )


def _emotion(prediction: Prediction) -> Emotion:
    return Emotion(
        label=prediction.label,
        score=prediction.probabilities[prediction.label],
        abstained=prediction.abstained,
        set=list(prediction.labels_in_set),
        probabilities=prediction.probabilities,
    )


def _ms(sample: int) -> float:
    return sample * 1000 / SAMPLE_RATE_HZ


def _iso(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time, UTC).isoformat(timespec="milliseconds")
