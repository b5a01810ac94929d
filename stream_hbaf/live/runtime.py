"""What all sources of a run share: models, executors, dialogues, publishers and tasks.

Every model runs in an executor of its own, so that nothing blocks the event loop. What is heavy,
Whisper and the embeddings of sound, runs for several utterances at once, in ``slots``. The
recogniser can be swapped while sound comes in: each utterance is finished by the one that it began
with.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np

from stream_hbaf.config import Config, SourceConfig
from stream_hbaf.events import (
    AnyEvent,
    DialogueSummary,
    Emotion,
    Latency,
    Partial,
    Privacy,
    Quantiles,
    Stage,
    State,
    Status,
    Utterance,
)
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.turn_model import open_turn_model
from stream_hbaf.live.slots import PrioritySlots
from stream_hbaf.live.speakers import DialogueSpeakers, Revision
from stream_hbaf.live.tracker import DialogueTracker
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.prediction import Prediction, TextFeatures
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.speech.segmenter import Finish

T = TypeVar("T")

STAGES: tuple[Stage, ...] = (
    *("capture", "vad", "transcript", "acoustic", "speaker"),
    "classifier",
)
Thread = Stage | Literal["embedding", "turn"]
# Those of which there are several, since they serve all streams at once; of others there is one.
SEVERAL: tuple[Thread, ...] = ("transcript", "acoustic", "embedding")
THREADS: tuple[Thread, ...] = (*STAGES[1:], "embedding", "turn")
LATENCIES = 100  # newest utterances that the quantiles are computed over
# Fields of a finished utterance that are published under label_only, besides the label.
UNREDACTED = {
    *("id", "rev", "type", "revision", "source", "dialogue_id", "turn"),
    *("start_time", "end_time", "audio_start_ms", "audio_end_ms"),
}


# A source's detail may name who sends, and from where; under label_only these stand for it.
UNNAMED: Mapping[State, str] = {
    "online": "sound comes in",
    "offline": "no sound comes in",
    "degraded": "sound is lost or incomplete",
}


class Publisher(Protocol):
    """Takes events: MQTT, a terminal, JSON lines, the dashboard, the session recorder."""

    async def send(self, event: AnyEvent) -> None:
        """Take the event; wait for room if it must not be lost."""

    async def run(self) -> None:
        """Deliver events until cancelled."""

    async def close(self, timeout_s: float) -> object:
        """Deliver finished utterances and say goodbye, within ``timeout_s`` seconds."""


@dataclass(frozen=True, slots=True)
class Recognition:
    """A finished utterance with all that its emotion was computed from."""

    id: str
    finish: Finish
    acoustic: Acoustic | None
    text: TextFeatures | None
    prediction: Prediction


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
        self.recognizer = recognizer
        self.config: Config = recognizer.config
        self.publishers = publishers
        self.on_recognition = on_recognition
        self.modalities = modalities
        self.turn_model = open_turn_model(self.config.endpoint)
        self.slots = PrioritySlots(at_once=recognizer.decoders)
        self.utterances = 0  # finished
        self.hints: dict[str, str] = {}  # what a person should check, by source
        self.began_at = time.monotonic()
        self.executors: Mapping[Thread, ThreadPoolExecutor] = {}
        self.tasks: asyncio.TaskGroup | None = None  # while it runs
        self._open: Counter[str] = Counter()  # utterances without an end event, by dialogue id
        self._closed = asyncio.Condition()  # notified when one of them ends
        self._latencies: deque[Latency] = deque(maxlen=LATENCIES)
        self._trackers: dict[str, DialogueTracker] = {}

    @asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Start the models' threads; leaving waits for all tasks, and stops the threads."""
        with ExitStack() as executors:
            self.executors = {
                name: executors.enter_context(
                    ThreadPoolExecutor(
                        self.recognizer.decoders if name in SEVERAL else 1,
                        thread_name_prefix=name,
                    )
                )
                for name in THREADS
            }
            async with asyncio.TaskGroup() as tasks:
                self.tasks = tasks
                yield
                self.tasks = None

    def tracker(self, source: SourceConfig) -> DialogueTracker:
        """The dialogue that a source takes part in: its own unless its settings name one."""
        name = f"dialogue {source.dialogue}" if source.dialogue else f"source {source.name}"
        return self._trackers.setdefault(name, DialogueTracker())

    def forget_tracker(self, tracker: DialogueTracker) -> None:
        """Forget a dialogue that no source takes part in any more."""
        self._trackers = {name: one for name, one in self._trackers.items() if one is not tracker}

    async def run_model(self, thread: Thread, function: Callable[..., T], *arguments: object) -> T:
        """Run a model in its thread; a call cancelled in mid-run ends when the thread is free."""
        job = self.executors[thread].submit(function, *arguments)
        result = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            if not job.cancel():
                await asyncio.gather(result, return_exceptions=True)
            raise

    def run_soon(self, stage: Stage, function: Callable[..., None], *arguments: object) -> None:
        """Have a function that raises nothing run in the thread of its stage, after those that
        wait already."""
        self.executors[stage].submit(function, *arguments)

    def task(self, coroutine: Coroutine[object, object, T], name: str) -> "asyncio.Task[T]":
        """Start a task that ends with the run."""
        assert self.tasks is not None  # everything happens while it is started
        return self.tasks.create_task(coroutine, name=name)

    async def publish(self, event: AnyEvent) -> None:
        """Send to every publisher, in their order, what the privacy mode allows."""
        allowed = redact(event, self.config.privacy)
        if allowed is None:
            return
        for publisher in self.publishers:
            await publisher.send(allowed)

    async def publish_revisions(
        self, speakers: DialogueSpeakers, revisions: Sequence[Revision]
    ) -> None:
        """Publish the new ``end`` of earlier utterances, and the summary with them."""
        summary = None
        for revision in revisions:
            was, now = (redact(end, self.config.privacy) for end in revision)
            if was is not None and now is not None and _differ(was, now):
                await self.publish(revision.after)
            summary = speakers.summarise(revision) or summary
        if summary is not None:
            await self.publish(summary)

    def open_utterance(self, dialogue_id: str) -> None:
        """Count an utterance that has begun."""
        self._open[dialogue_id] += 1

    async def close_utterance(self, end: Utterance) -> None:
        """Count a finished utterance, whose end event has been published."""
        self.utterances += 1
        if end.latency_ms is not None:
            self._latencies.append(end.latency_ms)
        async with self._closed:
            self._open[end.dialogue_id] -= 1
            if not self._open[end.dialogue_id]:
                del self._open[end.dialogue_id]
            self._closed.notify_all()

    @property
    def open_dialogues(self) -> tuple[str, ...]:
        """The dialogues of which an utterance has begun and isn't published yet."""
        return tuple(self._open)

    async def wait_closed(self, *dialogue_ids: str) -> None:
        """Wait until every utterance of some dialogues that has begun is published."""
        async with self._closed:
            await self._closed.wait_for(lambda: not self._open.keys() & set(dialogue_ids))

    def latency(self) -> dict[str, Quantiles]:
        """Quantiles by stage over the newest utterances; empty before the first."""
        if not self._latencies:
            return {}
        table = [latency.model_dump() for latency in self._latencies]
        quantiles = {}
        for stage in table[0]:
            p50, p95 = np.quantile([row[stage] for row in table], [0.5, 0.95])
            quantiles[stage] = Quantiles(p50=round(float(p50), 1), p95=round(float(p95), 1))
        return quantiles


def _differ(before: AnyEvent, after: AnyEvent) -> bool:
    """Whether a revision says anything new of what the privacy mode allows."""
    numbers = {"rev", "revision"}
    return before.model_dump(exclude=numbers) != after.model_dump(exclude=numbers)


def redact(event: AnyEvent, privacy: Privacy) -> AnyEvent | None:
    """The event without what may not leave the process; None if all of it may not.

    full        everything is published
    no_text     everything but the text, and the inferences that are made from it
    label_only  the label and the times of each finished utterance; nothing of utterances before
                that, nobody's name or address, and not how many speakers there are
    """
    match privacy, event:
        case "no_text", Utterance():
            return event.model_copy(update={"text": "", "inferences": None})
        case "no_text", Partial():
            return event.model_copy(update={"text": ""})
        case "label_only", Utterance(type="end"):
            label = Emotion(label=event.emotion.label) if event.emotion else None
            return Utterance(**event.model_dump(include=UNREDACTED), speaker="", emotion=label)
        case "label_only", Utterance() | Partial():
            return None
        case "label_only", Status(stage="capture", state=state) if event.detail:
            return event.model_copy(update={"detail": UNNAMED[state]})
        case "label_only", DialogueSummary():
            return event.model_copy(
                update={"speakers": {}, "probabilities": {}, "mood": {}, "shift": False}
            )
    return event
