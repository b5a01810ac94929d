"""An utterance in the live pipeline, from its first sample to its end event."""

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import ModelError
from stream_hbaf.events import (
    Asr,
    Latency,
    Partial,
    SpeakerSource,
    Stage,
    Utterance,
)
from stream_hbaf.features.acoustic import Acoustic, AcousticStream
from stream_hbaf.features.speaker import Part, SpeakerStream
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.live.speakers import DialogueSpeakers, Revision
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.prediction import Prediction, TextFeatures, emotion_of
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


class Voice:
    """An utterance's voice, embedded in another thread while speech goes on."""

    def __init__(self, open_stream: Callable[[], SpeakerStream]) -> None:
        self._open_stream = open_stream
        self._stream: SpeakerStream | None = None
        self._failure: Exception | None = None
        self._parts: tuple[Part, ...] = ()  # of all so far, once computed

    def feed(self, samples: Int16) -> None:
        """Take the utterance's next samples; ``embedding`` raises what goes wrong here."""
        self._parts = ()
        if self._failure is not None:
            return
        try:
            self._stream = self._stream or self._open_stream()
            self._stream.feed(samples)
        except Exception as error:  # noqa: BLE001  # nobody waits for the result
            self._failure = error

    def changes(self) -> tuple[int, ...]:
        """The samples at which the speaker changes so far; ``embedding`` raises what goes wrong."""
        try:
            return self._stream.changes() if self._stream and not self._failure else ()
        except Exception as error:  # noqa: BLE001  # the utterance stays whole
            self._failure = error
            return ()

    def pause(self) -> None:
        """Embed what there is, in case that it is all; ``embedding`` raises what goes wrong."""
        try:
            self._parts = self._stream.parts() if self._stream and not self._failure else ()
        except Exception as error:  # noqa: BLE001  # nobody waits for the result
            self._failure = error

    def embedding(self, part: int) -> NDArray[np.float32] | None:
        """The embedding [192] of a part, as ``changes`` cut the utterance; None for no voice.

        Raises ModelError for one that isn't finite.
        """
        if not self._parts:
            self.pause()
        if self._failure is not None:
            raise self._failure
        embedding = self._parts[part].embedding if self._parts else None
        if embedding is not None and not np.isfinite(embedding).all():
            raise ModelError("the speaker encoder gave numbers that aren't finite")
        return embedding


@dataclass(slots=True, eq=False)
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
    speakers: DialogueSpeakers | None = None  # of the dialogue
    voice: Voice | None = None  # where it says who speaks
    part: int | None = None  # its number among those that somebody spoke on from or to
    parts: "list[LiveUtterance]" = field(default_factory=list)  # of it, since the pause
    speaker: str = field(init=False)  # as far as known by now
    speaker_score: float | None = None
    speaker_source: SpeakerSource = ""
    revs: Iterator[int] = field(default_factory=partial(count, 1))
    pieces: list[Int16] = field(default_factory=list)
    length: int = 0  # samples in ``pieces``
    partial_due: int = 0  # length at which the next partial transcript is due
    text: "asyncio.Task[TextFeatures | None] | None" = None  # of all samples so far
    embedded: "asyncio.Task[None] | None" = None  # computes the embeddings of all samples so far
    turn_probability: "asyncio.Task[float | None] | None" = None  # that it is over, at the pause
    finish: Finish | None = None
    failures: dict[Stage, str] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        self.speaker = self.source.speaker
        if self.speaker:
            self.speaker_source = "source"

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

    def split(self, changes: Sequence[int]) -> "list[LiveUtterance]":
        """One utterance for each speaker, cut at samples of this one; this one without changes.

        The first goes on with this one's id, others have no ``turn`` yet.
        """
        if not changes:
            return [self]
        samples, edges = self.samples, (0, *changes, self.length)
        return [
            replace(
                self,
                turn=0 if part else self.turn,
                start=self.start + start,
                started_at=self.started_at + start / SAMPLE_RATE_HZ,
                part=part,
                revs=count(1) if part else self.revs,
                pieces=[samples[start:end]],
                length=end - start,
                session=None,
                text=None,
                parts=[],
                failures={},
                timing=Timing(),
            )
            for part, (start, end) in enumerate(pairwise(edges))
        ]

    def resume(self) -> None:
        """Forget what was computed at the pause: the utterance goes on."""
        for part in self.parts:
            if part.text is not None:
                part.text.cancel()
                part.text = None
        self.parts = []
        for task in (self.embedded, self.turn_probability):
            if task is not None:
                task.cancel()
        self.embedded = self.turn_probability = None

    def attribute(self, embedding: NDArray[np.float32] | None) -> list[Revision]:
        """Say by the voice who spoke the finished utterance; returns what that revises."""
        assert self.speakers is not None
        assert self.finish is not None
        samples = self.finish.end - self.finish.start
        own, revisions = self.speakers.attribute(self.turn, embedding, samples=samples)
        self.speaker, self.speaker_score, self.speaker_source = own.speaker, own.score, own.source
        return revisions

    def encode_text(self, transcript: Transcript) -> TextFeatures:
        """The transcript's features, encoded with the dialogue's text as it is known now."""
        return self.recognizer.encode_text(
            transcript, speaker=self.speaker, window=self.dialogue.window
        )

    def classify_text(self, text: TextFeatures) -> Prediction:
        """The provisional emotion of the text so far; the dialogue stays as it is."""
        return self.recognizer.classify(
            acoustic=None,
            text=text,
            state=self.dialogue.state,
            speaker=self.dialogue.number_of(self.speaker),
            modalities=self.modalities,
        )[0]

    def classify_final(self, acoustic: Acoustic | None, text: TextFeatures | None) -> Prediction:
        """The emotion of the whole utterance, explained; moves the dialogue on."""
        if self.speaker_source in ("source", "enrolled"):
            self.dialogue.known.add(self.speaker)
        return self.recognizer.classify_final(
            acoustic=acoustic,
            text=text,
            dialogue=self.dialogue,
            speaker=self.speaker,
            turn=self.turn,
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
        transcript = text.transcript if text is not None else None
        finish = self.finish if kind == "end" else None
        return Utterance(
            id=self.id,
            rev=next(self.revs),
            type=kind,
            source=self.source.name,
            dialogue_id=self.dialogue.id,
            turn=self.turn,
            speaker=self.speaker,
            speaker_score=self.speaker_score,
            speaker_source=self.speaker_source,
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
            emotion=emotion_of(prediction) if prediction else None,
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
            speaker=self.speaker,
            text=text.transcript.text,
            modalities=list(prediction.modalities),
            emotion=emotion_of(prediction),
        )

    def _iso_time(self, sample: int) -> str:
        unix_time = self.started_at + (sample - self.start) / SAMPLE_RATE_HZ
        return datetime.fromtimestamp(unix_time, UTC).isoformat(timespec="milliseconds")
