"""What all sources of a run share: the models, the dialogues, and who is told.

Every model runs in an executor of one thread, so that nothing blocks the event loop and no model
is used by two utterances at once. Another recogniser may take over while sound comes in: each
utterance is finished by the one that it began with.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from stream_hbaf.config import Config, SourceConfig
from stream_hbaf.events import AnyEvent, DialogueSummary, Latency, Quantiles, Stage, Utterance
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.live.privacy import veil
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.recognizer import Dialogue, Prediction, Recognizer, Words
from stream_hbaf.speech.segmenter import Finish

T = TypeVar("T")

STAGES: tuple[Stage, ...] = ("capture", "vad", "transcript", "acoustic", "classifier")
LATENCIES = 100  # utterances that the quantiles are of


class Publisher(Protocol):
    """Where events go: MQTT, a terminal, JSON lines, a page, a recording."""

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


@dataclass(slots=True)
class Conversation:
    """The dialogue that sources have with each other, until a long silence or a request ends it."""

    dialogue: Dialogue | None = None
    recognizer: Recognizer | None = None  # whose states the dialogue holds
    last_end_s: float = 0.0  # of sound, since the sources were opened
    ends: list[Utterance] = field(default_factory=list)  # without their words

    def begin(self, recognizer: Recognizer, *, at_s: float) -> tuple[Dialogue, int]:
        """The dialogue that the next utterance belongs to, and its turn there."""
        late = at_s - self.last_end_s > recognizer.config.dialogue.gap_s
        if self.dialogue is None or self.recognizer is not recognizer or late:
            self.restart()
            self.dialogue, self.recognizer = recognizer.dialogue(), recognizer
        self.dialogue.turns += 1
        return self.dialogue, self.dialogue.turns

    def restart(self) -> None:
        """Nothing is remembered: the next utterance is a dialogue's first."""
        self.dialogue = self.recognizer = None
        self.ends = []

    def summarise(self, end: Utterance) -> DialogueSummary | None:
        """The dialogue with its newest ``end``; None if that is of an earlier dialogue."""
        if self.dialogue is None or end.dialogue_id != self.dialogue.id:
            return None
        self.ends.append(end.model_copy(update={"text": "", "inferences": None}))
        felt = [said.emotion for said in self.ends if said.emotion is not None]
        labels = felt[0].probabilities if felt else {}
        return DialogueSummary(
            source=end.source,
            dialogue_id=end.dialogue_id,
            start_time=self.ends[0].start_time,
            end_time=end.end_time or end.start_time,
            turns=len(self.ends),
            speakers={said.speaker: said.emotion.label for said in self.ends if said.emotion},
            emotions=dict(Counter(emotion.label for emotion in felt)),
            probabilities={
                label: float(np.mean([emotion.probabilities[label] for emotion in felt]))
                for label in labels
            },
        )


class Runtime:
    """One run: its recogniser, executors, dialogues, publishers and tasks."""

    def __init__(
        self,
        recognizer: Recognizer,
        publishers: Sequence[Publisher],
        *,
        on_recognition: Callable[[Recognition], None],
        modalities: Collection[Modality] = MODALITIES,
    ) -> None:
        self.modalities = modalities  # the others are withheld from the network
        self.recognizer = recognizer
        self.config: Config = recognizer.config
        self.publishers = publishers
        self.on_recognition = on_recognition
        self.decoding = 0  # finals queued or running, for which partials step aside
        self.utterances = 0  # finished
        self.open: Counter[str] = Counter()  # utterances begun and not told of, by dialogue's id
        self.began_at = time.monotonic()
        self._latencies: deque[Latency] = deque(maxlen=LATENCIES)
        self._conversations: dict[str, Conversation] = {}
        self.executors: Mapping[Stage, ThreadPoolExecutor] = {}
        self.tasks: asyncio.TaskGroup | None = None  # while it runs

    def conversation(self, source: SourceConfig) -> Conversation:
        """What the source takes part in; it talks to itself if no dialogue is named."""
        name = f"dialogue {source.dialogue}" if source.dialogue else f"source {source.name}"
        return self._conversations.setdefault(name, Conversation())

    async def call(self, stage: Stage, function: Callable[..., T], *arguments: object) -> T:
        """Run a model, in its own thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executors[stage], function, *arguments)

    def task(self, coroutine: Coroutine[object, object, T], name: str) -> "asyncio.Task[T]":
        assert self.tasks is not None  # everything happens in ``run``
        return self.tasks.create_task(coroutine, name=name)

    async def emit(self, event: AnyEvent) -> None:
        """Tell every publisher, in their order, what may leave the process."""
        seen = veil(event, self.config.privacy)
        if seen is None:
            return
        for publisher in self.publishers:
            await publisher.send(seen)

    def count(self, end: Utterance) -> None:
        """One more is finished."""
        self.utterances += 1
        if end.latency_ms is not None:
            self._latencies.append(end.latency_ms)

    def latency(self) -> dict[str, Quantiles]:
        """By stage, of the newest utterances; empty before the first."""
        if not self._latencies:
            return {}
        table = [latency.model_dump() for latency in self._latencies]
        found = {}
        for stage in table[0]:
            p50, p95 = np.quantile([row[stage] for row in table], [0.5, 0.95])
            found[stage] = Quantiles(p50=round(float(p50), 1), p95=round(float(p95), 1))
        return found
