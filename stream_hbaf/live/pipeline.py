"""The live pipeline: runs sources through the recogniser and publishes events, without ever
blocking the event loop."""

import asyncio
import ctypes
import logging
import math
import resource
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import cast

from stream_hbaf.audio.source import AudioSource
from stream_hbaf.config import SourceConfig
from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.events import AnyEvent, Health, State, SwitchName, Trigger
from stream_hbaf.live.runtime import Publisher, Recognition, Runtime
from stream_hbaf.live.source import OnAudio, SourcePipeline
from stream_hbaf.live.tracker import SavedDialogue
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.format import SpeakerChange

LOG = logging.getLogger(__name__)

GOODBYE_S = 1.0  # for each publisher to deliver what is finished
LATE = (
    "transcripts wait for {:.1f} s: {streams} streams are more than this machine keeps up with; "
    "partial transcripts are left out"
)
FINISH_S = 60.0  # an utterance that began with the former recogniser is over by then


class LivePipeline:
    """Runs one source or several through the recogniser and publishes what is recognised."""

    def __init__(
        self,
        recognizer: Recognizer,
        publishers: Sequence[Publisher],
        *,
        on_recognition: Callable[[Recognition], None] = lambda recognition: None,
        on_audio: OnAudio | None = None,
        on_speaker_change: Callable[[SpeakerChange], None] | None = None,
        recording: bool = False,
        modalities: Collection[Modality] = MODALITIES,
        complete_health: Callable[[Health], Health] = lambda health: health,
        on_sources: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``on_audio`` gets every chunk, ``on_speaker_change`` what people say about speakers. With
        ``recording``, each source has a switch for it, on. ``complete_health`` adds what
        publishers know, such as their queues. ``on_sources`` is called when a source has been
        added, and when it is gone.

        A modality that isn't among ``modalities`` is withheld from the network, though it is
        transcribed or measured all the same.
        """
        self.sources: dict[str, SourcePipeline] = {}  # by name, once they run
        self._runtime = Runtime(
            recognizer, publishers, on_recognition=on_recognition, modalities=modalities
        )
        self._on_speaker_change = on_speaker_change or (lambda change: None)
        self._on_audio = on_audio or (lambda source, audio: None)
        self._recording = recording
        self._complete_health = complete_health
        self._on_sources = on_sources
        self._running: set[asyncio.Task[None]] = set()  # of the sources
        self._ended = False  # no source may be added any more

    @property
    def recognizer(self) -> Recognizer:
        """The one that the next utterance begins with."""
        return self._runtime.recognizer

    async def run(
        self,
        source: AudioSource | Mapping[SourceConfig, AudioSource],
        *,
        stop: asyncio.Event,
        beside: Sequence[Coroutine[object, object, None]] = (),
    ) -> None:
        """Recognise until all sources end or ``stop`` is set, then finish the utterances.

        Sources are open already; what they captured before this call is skipped, because the
        program had not announced yet that it listens. Without any source it runs until ``stop``:
        ``add`` brings them. The coroutines ``beside`` run along and are cancelled in the end.
        Errors are raised as an ExceptionGroup.
        """
        since = time.monotonic()
        runtime = self._runtime
        if not isinstance(source, Mapping):
            source = {runtime.config.source: source}
        self.sources = {config.name: self._pipeline_of(config) for config in source}
        async with runtime.started():
            background = [
                runtime.task(publisher.run(), f"publish {type(publisher).__name__}")
                for publisher in runtime.publishers
            ]
            background += [runtime.task(other, "beside") for other in beside]
            self._running = {
                runtime.task(self.sources[config.name].run(opened, since=since), config.name)
                for config, opened in source.items()
            }
            stopping = runtime.task(self._stop_when(stop), "stop")
            if not source:
                await asyncio.wait({stopping})
            while running := {task for task in self._running if not task.done()}:
                await asyncio.wait(running)
            self._ended = True
            for publisher in runtime.publishers:
                await publisher.close(GOODBYE_S)
            for task in (*background, stopping):
                task.cancel()

    def _pipeline_of(self, config: SourceConfig, *, opened_s: float = 0.0) -> SourcePipeline:
        return SourcePipeline(
            self._runtime,
            config,
            on_audio=self._on_audio,
            on_hint=self.publish_health,
            recording=self._recording,
            opened_s=opened_s,
        )

    async def _stop_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._ended = True
        for pipeline in self.sources.values():
            pipeline.stop()

    def add(self, config: SourceConfig, source: AudioSource) -> "asyncio.Task[None]":
        """Run one more open source while ``run`` goes on; other sources don't notice.

        The task ends when the source has ended and its utterances are published; it is forgotten
        then. Raises ConfigError for a name that another source has, and once the run is ending.
        """
        if self._runtime.tasks is None or self._ended:
            raise ConfigError(f"{config.name}: the recogniser is stopping; try again later")
        if config.name in self.sources:
            raise ConfigError(f"{config.name}: another source has this name; choose another one")
        opened_s = time.monotonic() - self._runtime.began_at
        self.sources[config.name] = self._pipeline_of(config, opened_s=opened_s)
        task = self._runtime.task(self._run_added(config, source), config.name)
        self._running.add(task)
        return task

    async def _run_added(self, config: SourceConfig, source: AudioSource) -> None:
        pipeline = self.sources[config.name]
        if self._on_sources is not None:
            await self._on_sources()
        await pipeline.run(source, since=-math.inf)
        del self.sources[config.name]
        self._running.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        self._runtime.hints.pop(config.name, None)
        if all(other.tracker is not pipeline.tracker for other in self.sources.values()):
            self._runtime.forget_tracker(pipeline.tracker)
        if self._on_sources is not None:
            await self._on_sources()

    def report_capture(self, state: State, detail: str, *, source: str = "") -> None:
        """Publish the state of a source's capture; meant to be the source's ``on_status``.

        A lost device may never come back, so the open utterance ends at once.
        """
        if self._runtime.tasks is None:
            return
        for name, pipeline in self.sources.items():
            if source in ("", name):
                report = pipeline.stages.report("capture", state, detail)
                self._runtime.task(report, "report capture")
                if state == "offline":
                    self._runtime.task(pipeline.cut("end_of_input"), "cut")

    def swap_recognizer(self, recognizer: Recognizer) -> Recognizer:
        """Let another recogniser begin the next utterances; returns the former one.

        The former one is needed until ``retire`` has finished. Each source begins a new dialogue.
        """
        former, self._runtime.recognizer = self._runtime.recognizer, recognizer
        return former

    async def retire(self, former: Recognizer) -> None:
        """Close a former recogniser once the utterances that began with it are published."""
        try:
            async with asyncio.timeout(FINISH_S):
                await self._runtime.wait_closed(*self._runtime.open_dialogues)
        except TimeoutError:
            LOG.warning("an utterance of bundle %s hasn't ended; it goes on", former.model.id)
        finally:
            for tracker in {pipeline.tracker for pipeline in self.sources.values()}:
                if tracker.recognizer is former:
                    tracker.end()
            former.close()

    async def cut(self, trigger: Trigger, *, source: str = "") -> None:
        """End the open utterance of a source, or of all. Raises ConfigError for an unknown one."""
        for pipeline in self._chosen(source):
            await pipeline.cut(trigger)

    async def set_switch(self, source: str, switch: SwitchName, *, on: bool) -> None:
        """Set a source's switch. Raises ConfigError for an unknown source."""
        for pipeline in self._chosen(source):
            await pipeline.set_switch(switch, on=on)

    async def change_speakers(self, change: SpeakerChange) -> int:
        """Apply what a person says about the speakers of a dialogue, and publish what changes.

        Returns how many utterances changed. Raises ConfigError for a dialogue that isn't going on,
        and for an utterance or a speaker that isn't there.
        """
        for tracker in {pipeline.tracker for pipeline in self.sources.values()}:
            speakers, dialogue = tracker.speakers, tracker.dialogue
            if speakers is None or dialogue is None or dialogue.id != change.dialogue_id:
                continue
            async with speakers.lock:
                revisions = await self._runtime.run_model("classifier", speakers.apply, change)
                self._on_speaker_change(change)
                await self._runtime.publish_revisions(speakers, revisions)
            return len(revisions)
        going_on = ", ".join(sorted(set(self.dialogues().values()))) or "none"
        raise ConfigError(
            f"no dialogue '{shorten(change.dialogue_id)}' is going on; there is {going_on}"
        )

    def end_dialogues(self, *, source: str = "", dialogue_id: str = "") -> int:
        """End the dialogues of a source, or one of them, or all; returns how many were ended.

        Raises ConfigError for an unknown source.
        """
        ended = [
            tracker
            for tracker in {pipeline.tracker for pipeline in self._chosen(source)}
            if tracker.dialogue is not None and dialogue_id in ("", tracker.dialogue.id)
        ]
        for tracker in ended:
            tracker.end()
        return len(ended)

    async def finish_dialogue(self, dialogue_id: str) -> int:
        """End a dialogue and wait until all its utterances are published; 1 if it was going on."""
        speaking = [
            pipeline
            for pipeline in self.sources.values()
            if pipeline.tracker.dialogue and pipeline.tracker.dialogue.id == dialogue_id
        ]
        ended = self.end_dialogues(dialogue_id=dialogue_id)
        for pipeline in self.sources.values():  # what was kept of its voices goes as well
            dialogue = pipeline.tracker.dialogue
            if dialogue is not None and dialogue_id in dialogue.follows:
                pipeline.tracker.end()
        for pipeline in speaking:
            await pipeline.cut("request")
        await self._runtime.wait_closed(dialogue_id)
        return ended

    def save_dialogue(self, source: str) -> SavedDialogue | None:
        """The dialogue that a source is in, to go on with it in another run; None: in none."""
        tracker = self.sources[source].tracker
        return tracker.save(at_s=time.monotonic() - self._runtime.began_at)

    def resume_dialogue(self, source: str, saved: SavedDialogue, *, later_s: float) -> None:
        """Have a source go on with a dialogue that was saved ``later_s`` seconds ago.

        If others that share it are in a dialogue already, the source takes part in that one.
        """
        tracker = self.sources[source].tracker
        if tracker.dialogue is None:
            at_s = time.monotonic() - self._runtime.began_at
            tracker.resume(self.recognizer, saved, at_s=at_s, later_s=later_s)

    def dialogues(self) -> dict[str, str]:
        """The id of the dialogue that each source is in, where one has begun."""
        return {
            name: pipeline.tracker.dialogue.id
            for name, pipeline in self.sources.items()
            if pipeline.tracker.dialogue is not None
        }

    def health(self) -> Health:
        """Memory, queues, latency and hints now."""
        waiting = [pipeline.queue_lengths() for pipeline in self.sources.values()]
        slots, hints = self._runtime.slots, list(self._runtime.hints.values())
        sets = self.recognizer.sets
        if slots.is_late:
            hints.append(LATE.format(slots.usual_wait_s, streams=len(self.sources)))
        health = Health(
            uptime_s=round(time.monotonic() - self._runtime.began_at, 1),
            memory_mb=round(_resident_mb(), 1),
            utterances=self._runtime.utterances,
            queues={
                **{name: sum(one[name] for one in waiting) for name in ("chunks", "finished")},
                "transcripts": slots.waiting,
            },
            dropped={
                "partial_transcripts": slots.partials_given_up,
                "speculative_transcripts": slots.speculations_missed,
            },
            latency_ms=self._runtime.latency(),
            hints=hints,
            sets=None if sets is None else sets.coverage(),
        )
        return self._complete_health(health)

    async def publish_health(self) -> None:
        """Publish the health now."""
        await self.publish(self.health())

    async def publish(self, event: AnyEvent) -> None:
        """Publish an event that isn't about a source's sound."""
        await self._runtime.publish(event)

    def _chosen(self, source: str) -> list[SourcePipeline]:
        if source and source not in self.sources:
            known = ", ".join(self.sources) or "none"
            raise ConfigError(f"no source '{source}': there is {known}")
        return [pipe for name, pipe in self.sources.items() if source in ("", name)]


def recognise_source(
    recognizer: Recognizer,
    source: AudioSource,
    *,
    on_recognition: Callable[[Recognition], None],
    modalities: Collection[Modality] = MODALITIES,
) -> None:
    """Run a source to its end without publishing, for callers that have no event loop.

    A modality that isn't among ``modalities`` is withheld from the network.
    """

    async def run() -> None:
        pipeline = LivePipeline(
            recognizer, [], on_recognition=on_recognition, modalities=modalities
        )
        async with source:
            await pipeline.run(source, stop=asyncio.Event())

    asyncio.run(run())


def release_memory() -> None:
    """Give the memory that C libraries have freed back to the system, where it is glibc's.

    Each length of sound needs buffers of another size, and those of some megabytes are mixed with
    small ones that stay: glibc keeps them, and 250 MB were free after ten minutes of speech.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _resident_mb() -> float:
    """Resident memory now where /proc tells it, else the peak so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123
            return int(statm.read().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
