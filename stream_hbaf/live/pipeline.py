"""The live pipeline: sound in, events out, from one source or several, without ever blocking
the event loop."""

import asyncio
import resource
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from stream_hbaf.audio.source import AudioSource
from stream_hbaf.config import SourceConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import AnyEvent, Health, State, SwitchName, Trigger
from stream_hbaf.live.runtime import STAGES, Conversation, Publisher, Recognition, Runtime
from stream_hbaf.live.source import OnSound, SourcePipeline
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.recognizer import Recognizer

__all__ = ["LivePipeline", "OnSound", "Publisher", "Recognition", "replay"]

POLL_S = 0.02
GOODBYE_S = 1.0  # for each publisher to deliver what is finished


class LivePipeline:
    """Runs sources through the recogniser and tells the publishers what happens."""

    def __init__(
        self,
        recognizer: Recognizer,
        publishers: Sequence[Publisher],
        *,
        on_recognition: Callable[[Recognition], None] = lambda recognition: None,
        on_sound: OnSound | None = None,
        recording: bool = False,
        modalities: Collection[Modality] = MODALITIES,
    ) -> None:
        """``on_sound`` hears every chunk; where ``recording``, each source has that switch, on.

        A modality that isn't among ``modalities`` is withheld from the network; it is transcribed
        and measured all the same.
        """
        self.sources: dict[str, SourcePipeline] = {}  # by name, once it runs
        self._runtime = Runtime(
            recognizer, publishers, on_recognition=on_recognition, modalities=modalities
        )
        self._on_sound = on_sound or (lambda source, heard: None)
        self._recording = recording

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
        """Recognise until all sources end or ``stop`` is set, then finish what was heard.

        Sources are open already; what they captured before now is skipped, because nobody had
        been told that we listen. What runs ``beside`` is cancelled in the end. Errors come out as
        an ExceptionGroup.
        """
        since = time.monotonic()
        runtime = self._runtime
        if not isinstance(source, Mapping):
            source = {runtime.config.source: source}
        with ExitStack() as executors:
            runtime.executors = {
                stage: executors.enter_context(ThreadPoolExecutor(1, thread_name_prefix=stage))
                for stage in STAGES[1:]
            }
            async with asyncio.TaskGroup() as tasks:
                runtime.tasks = tasks
                lasting = [
                    runtime.task(publisher.run(), f"publish {type(publisher).__name__}")
                    for publisher in runtime.publishers
                ]
                lasting += [runtime.task(other, "beside") for other in beside]
                self.sources = {
                    config.name: SourcePipeline(
                        runtime, config, on_sound=self._on_sound, recording=self._recording
                    )
                    for config in source
                }
                running = [
                    runtime.task(self.sources[config.name].run(opened, since=since), config.name)
                    for config, opened in source.items()
                ]
                lasting.append(runtime.task(self._stop_when(stop), "stop"))
                await asyncio.wait(running)
                for publisher in runtime.publishers:
                    await publisher.close(GOODBYE_S)
                for task in lasting:
                    task.cancel()
                runtime.tasks = None

    async def _stop_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        for pipeline in self.sources.values():
            pipeline.stop()

    def report_capture(self, state: State, detail: str, *, source: str = "") -> None:
        """How a source is; meant to be the source's ``on_status``.

        A lost device may never come back: what was said until then ends here and now.
        """
        if self._runtime.tasks is None:
            return
        for name, pipeline in self.sources.items():
            if source in ("", name):
                report = pipeline.report("capture", state, detail)
                self._runtime.task(report, "report capture")
                if state == "offline":
                    self._runtime.task(pipeline.cut("end_of_input"), "break off")

    def take(self, recognizer: Recognizer) -> Recognizer:
        """Let another recogniser begin the next utterances; returns the one so far.

        That one is needed until what began with it is finished. Dialogues begin anew.
        """
        before, self._runtime.recognizer = self._runtime.recognizer, recognizer
        return before

    async def cut(self, trigger: Trigger, *, source: str = "") -> None:
        """End what is being said, at one source or at all of them."""
        for pipeline in self._chosen(source):
            await pipeline.cut(trigger)

    async def turn(self, source: str, switch: SwitchName, *, on: bool) -> None:
        """Set a source's switch. Raises ConfigError for a source that isn't there."""
        for pipeline in self._chosen(source):
            await pipeline.turn(switch, on=on)

    def restart(self, *, source: str = "", dialogue_id: str = "") -> int:
        """End the dialogues of a source, or this one, or all; returns how many ended."""
        chosen = {id(c): c for c in map(self._conversation, self._chosen(source))}
        ended = [
            conversation
            for conversation in chosen.values()
            if conversation.dialogue is not None and dialogue_id in ("", conversation.dialogue.id)
        ]
        for conversation in ended:
            conversation.restart()
        return len(ended)

    async def end_dialogue(self, dialogue_id: str) -> int:
        """End a dialogue, and wait until all that was said in it is told; 1 if it was going on."""
        speaking = [
            pipeline
            for pipeline in self.sources.values()
            if (dialogue := self._conversation(pipeline).dialogue) and dialogue.id == dialogue_id
        ]
        ended = self.restart(dialogue_id=dialogue_id)
        for pipeline in speaking:
            await pipeline.cut("request")
        while self._runtime.open[dialogue_id] > 0:  # noqa: ASYNC110  seldom, and soon over
            await asyncio.sleep(POLL_S)
        del self._runtime.open[dialogue_id]
        return ended

    def _conversation(self, pipeline: SourcePipeline) -> Conversation:
        return self._runtime.conversation(pipeline.config)

    def dialogues(self) -> dict[str, str]:
        """The dialogue that each source is in, where one has begun."""
        return {
            name: conversation.dialogue.id
            for name, pipeline in self.sources.items()
            if (conversation := self._conversation(pipeline)).dialogue is not None
        }

    def health(self) -> Health:
        """How the pipeline bears up now; what publishers hold is theirs to add."""
        waiting = [pipeline.waiting() for pipeline in self.sources.values()]
        return Health(
            uptime_s=round(time.monotonic() - self._runtime.began_at, 1),
            memory_mb=round(_resident_mb(), 1),
            utterances=self._runtime.utterances,
            queues={name: sum(one[name] for one in waiting) for name in ("chunks", "finished")},
            dropped={},
            latency_ms=self._runtime.latency(),
        )

    async def tell(self, event: AnyEvent) -> None:
        """Publish what isn't about a source's sound."""
        await self._runtime.emit(event)

    def _chosen(self, source: str) -> list[SourcePipeline]:
        if source and source not in self.sources:
            known = ", ".join(self.sources) or "none"
            raise ConfigError(f"no source '{source}': there is {known}")
        return [pipe for name, pipe in self.sources.items() if source in ("", name)]


def replay(
    recognizer: Recognizer,
    source: AudioSource,
    *,
    on_recognition: Callable[[Recognition], None],
    modalities: Collection[Modality] = MODALITIES,
) -> None:
    """Run a source to its end and publish nothing, for callers that have no event loop.

    A modality that isn't among ``modalities`` is withheld from the network.
    """

    async def run() -> None:
        pipeline = LivePipeline(
            recognizer, [], on_recognition=on_recognition, modalities=modalities
        )
        async with source:
            await pipeline.run(source, stop=asyncio.Event())

    asyncio.run(run())


def _resident_mb() -> float:
    """Memory held now, where the system tells; else the most that was ever held."""
    try:
        with open("/proc/self/statm", encoding="ascii") as told:  # noqa: PTH123
            return int(told.read().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
