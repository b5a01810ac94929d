"""An utterance in the live pipeline, from its first sample to its end event."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import numpy as np

from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.events import Asr, Emotion, Latency, Partial, Stage, Utterance
from stream_hbaf.features.acoustic import Acoustic, AcousticStream
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.prediction import Prediction, TextFeatures
from stream_hbaf.recognizer import Int16, Recognizer
from stream_hbaf.speech.segmenter import Finish


@dataclass(slots=True)
class Timing:
    """When each part was ready, in seconds of the monotonic clock; 0 is never."""

    speech_end: float = 0.0  # the last speech sample was captured
    confirmed: float = 0.0  # the segmenter decided on the end
    transcript: float = 0.0
    text: float = 0.0
    acoustic: float = 0.0
    classify_began: float = 0.0
    classified: float = 0.0

    def latency(self, now: float) -> Latency:
        """The milliseconds of each stage between the last speech sample and ``now``."""

        def ms(start: float, end: float) -> float:
            return round(max(0.0, end - start) * 1000, 1)

        return Latency(
            vad=ms(self.speech_end, self.confirmed),
            transcript=ms(self.confirmed, self.transcript),
            acoustic=ms(self.confirmed, self.acoustic),
            text=ms(max(self.confirmed, self.transcript), self.text),
            classify=ms(self.classify_began, self.classified),
            publish=ms(self.classified, now),
            total=ms(self.speech_end, now),
        )


@dataclass(slots=True)
class LiveUtterance:
    """What the live pipeline knows of one utterance so far."""

    recognizer: Recognizer  # the one that it began with, which finishes it
    source: SourceConfig
    dialogue: LiveDialogue
    turn: int
    start: int  # sample
    started_at: float  # Unix time in seconds
    modalities: Collection[Modality] = MODALITIES  # others are withheld from the network
    session: AcousticStream | None = None
    rev: int = 0
    pieces: list[Int16] = field(default_factory=list)
    length: int = 0  # samples in ``pieces``
    partial_due: int = 0  # length at which the next partial transcript is due
    text: "asyncio.Task[TextFeatures | None] | None" = None  # of all samples so far
    turn_probability: "asyncio.Task[float | None] | None" = None  # that it is over, at the pause
    finish: Finish | None = None
    failures: dict[Stage, str] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    @property
    def id(self) -> str:
        """The id that is published."""
        return f"{self.dialogue.id}-{self.turn}"

    @property
    def samples(self) -> Int16:
        """All samples so far, [n]."""
        return np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.int16)

    def add(self, samples: Int16) -> None:
        """Append the utterance's next samples."""
        self.pieces.append(samples)
        self.length += len(samples)

    def encode_text(self, transcript: Transcript) -> TextFeatures:
        """The transcript's features, encoded with the dialogue's text as it is known now."""
        return self.recognizer.encode_text(
            transcript, speaker=self.source.speaker, window=self.dialogue.window
        )

    def classify_text(self, text: TextFeatures) -> Prediction:
        """The provisional emotion of the text so far; the dialogue stays as it is."""
        return self.recognizer.classify(
            acoustic=None,
            text=text,
            state=self.dialogue.state,
            speaker=self.dialogue.number_of(self.source.speaker),
            modalities=self.modalities,
        )[0]

    def classify_final(self, acoustic: Acoustic | None, text: TextFeatures | None) -> Prediction:
        """The emotion of the whole utterance, explained; moves the dialogue on."""
        return self.recognizer.classify_final(
            acoustic=acoustic,
            text=text,
            dialogue=self.dialogue,
            speaker=self.source.speaker,
            explain=True,
            modalities=self.modalities,
        )

    def event(
        self,
        kind: Literal["new", "update", "end"],
        *,
        text: TextFeatures | None = None,
        prediction: Prediction | None = None,
        now: float = 0.0,
    ) -> Utterance:
        """The next message about this utterance; ``now`` is the monotonic clock's."""
        self.rev += 1
        transcript = text.transcript if text is not None else None
        finish = self.finish if kind == "end" else None
        return Utterance(
            id=self.id,
            rev=self.rev,
            type=kind,
            source=self.source.name,
            dialogue_id=self.dialogue.id,
            turn=self.turn,
            speaker=self.source.speaker,
            start_time=self._iso_time(self.start),
            end_time=self._iso_time(finish.end) if finish else None,
            audio_start_ms=self.start * 1000 / SAMPLE_RATE_HZ,
            audio_end_ms=finish.end * 1000 / SAMPLE_RATE_HZ if finish else None,
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

    def partial(self, *, text: TextFeatures, prediction: Prediction) -> Partial:
        """The partial transcript with its provisional emotion."""
        return Partial(
            id=self.id,
            source=self.source.name,
            dialogue_id=self.dialogue.id,
            speaker=self.source.speaker,
            text=text.transcript.text,
            modalities=list(prediction.modalities),
            emotion=_emotion(prediction),
        )

    def _iso_time(self, sample: int) -> str:
        unix_time = self.started_at + (sample - self.start) / SAMPLE_RATE_HZ
        return datetime.fromtimestamp(unix_time, UTC).isoformat(timespec="milliseconds")


def _emotion(prediction: Prediction) -> Emotion:
    return Emotion(
        label=prediction.label,
        score=prediction.probabilities[prediction.label],
        abstained=prediction.abstained,
        set=list(prediction.labels_in_set),
        probabilities=prediction.probabilities,
    )
