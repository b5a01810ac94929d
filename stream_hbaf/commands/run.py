"""Runs the recogniser: opens sources, broker, models and publishers, recognises, closes them."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stream_hbaf import __version__
from stream_hbaf.audio.capture import list_devices
from stream_hbaf.audio.open_source import open_source
from stream_hbaf.audio.source import AudioSource, OnStatus
from stream_hbaf.audio.wyoming import WyomingSource
from stream_hbaf.cluster import connected
from stream_hbaf.commands import print_status
from stream_hbaf.config import Config, SourceConfig
from stream_hbaf.errors import DeviceError
from stream_hbaf.events import Health, Info, State
from stream_hbaf.features.turn_model import choose_engine
from stream_hbaf.features.voice_prints import enrolled_voices
from stream_hbaf.live.answers import Answers
from stream_hbaf.live.control import Controls, DialogueStore
from stream_hbaf.live.pipeline import LivePipeline, release_memory
from stream_hbaf.live.runtime import Publisher
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.publish.connection import check_broker
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.publish.outbox import LeftOutboxes
from stream_hbaf.publish.terminal import JsonLines, Terminal
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.recorder import SessionRecorder

if TYPE_CHECKING:  # extras
    from stream_hbaf.dashboard.metrics_server import MetricsServer
    from stream_hbaf.dashboard.server import Dashboard
    from stream_hbaf.publish.traces import Traces

T = TypeVar("T")

EXAMPLE = Path(__file__).parent.parent / "audio" / "example.flac"
# At full speed, larger chunks save switches between threads; they never change the result.
FULL_SPEED_CHUNK_MS = 320
HEALTH_EVERY_S = 60.0


async def listen(config: Config, *, speed: float | None, json: bool) -> None:
    """Recognise until all sources end, or Ctrl-C or SIGTERM asks for the end.

    ``speed`` is that of recordings, in times real time; None: as fast as they are processed.
    Raises a StreamHbafError if a source, the broker, the models or a publisher can't be opened.
    """
    stop = asked_to_stop()
    config, speed = _fall_back(choose_engine(config), speed)
    async with contextlib.AsyncExitStack() as opened:
        optional = load_optional(config)
        pipelines: list[LivePipeline] = []

        def report(source: str, state: State, detail: str) -> None:
            for pipeline in pipelines:
                pipeline.report_capture(state, detail, source=source)

        sources: dict[SourceConfig, AudioSource] = {}
        for source in _sources(config):
            found = _open_source(
                source, speed, optional.page, on_status=partial(report, source.name)
            )
            entered = await _unless(stop, opened.enter_async_context(found))
            if entered is None:
                return
            sources[source] = entered
        config = await with_broker(config, opened)
        print_status("loading the models")
        recognizer = await asyncio.to_thread(Recognizer, config)
        run = Run(config, recognizer, optional)
        opened.callback(lambda: run.pipeline.recognizer.close())  # it may have been swapped
        answering = {one.name: s for one, s in sources.items() if isinstance(s, WyomingSource)}
        await run.start(Answers(answering), JsonLines(stop=stop) if json else Terminal())
        pipelines.append(run.pipeline)
        names = ", ".join(source.name for source in sources)
        print_status(f"listening to {names}; Ctrl-C ends")
        await run.pipeline.run(sources, stop=stop, beside=[run.publish_health()])


async def serve(config: Config, *, json: bool) -> None:
    """Serve until Ctrl-C or SIGTERM asks for the end.

    Raises a StreamHbafError if the port, the broker, the models or a publisher can't be opened.
    """
    from stream_hbaf.serve.server import StreamServer  # 0.2 s that other runs need not spend

    stop = asked_to_stop()
    config = choose_engine(config)
    async with contextlib.AsyncExitStack() as opened:
        optional = load_optional(config)
        server = StreamServer(config.serve)
        await server.open()
        config = await with_broker(config, opened)
        print_status("loading the models")
        recognizer = await _open_recognizer(config, opened, stop=stop)
        run = Run(config, recognizer, optional, serving=True)
        opened.callback(lambda: run.pipeline.recognizer.close())  # it may have been swapped
        server.pipeline = run.pipeline
        await run.start(server, JsonLines(stop=stop) if json else Terminal())
        print_status(f"serving up to {server.max_streams} streams at {server.url}; Ctrl-C ends")
        beside = [run.publish_health(), server.start()]
        await run.pipeline.run({}, stop=stop, beside=beside)


async def _open_recognizer(
    config: Config, opened: contextlib.AsyncExitStack, *, stop: asyncio.Event
) -> Recognizer:
    """The recogniser, with its models here or on a cluster."""
    if config.serve.ray is None:
        return await asyncio.to_thread(Recognizer, config)
    # Not in the main thread, where Ray would handle SIGTERM.
    await asyncio.to_thread(opened.enter_context, connected(config.serve.ray))
    set_on_signals(stop)  # Ray has set handlers that abort
    from stream_hbaf.serve.remote import RemoteRecognizer
    from stream_hbaf.serve.replicas import deploy

    models = await asyncio.to_thread(deploy, config)
    return await asyncio.to_thread(RemoteRecognizer, config, models)


@dataclass(frozen=True, slots=True)
class OptionalPublishers:
    """The publishers whose libraries are extras, as far as they are wanted; not yet started."""

    page: "Dashboard | None" = None
    metrics: "MetricsServer | None" = None
    traces: "Traces | None" = None


def load_optional(config: Config) -> OptionalPublishers:
    """What the settings want of them.

    Raises ModuleNotFoundError for an extra that is missing, before the models are loaded.
    """
    page = metrics = traces = None
    if config.dashboard is not None:
        from stream_hbaf.dashboard.server import Dashboard

        page = Dashboard(config.dashboard, sessions=config.record)
    if config.metrics is not None:
        from stream_hbaf.dashboard.metrics_server import MetricsServer

        metrics = MetricsServer(config.metrics)
    if config.traces:
        from stream_hbaf.publish.traces import Traces

        traces = Traces()
    return OptionalPublishers(page, metrics, traces)


def asked_to_stop() -> asyncio.Event:
    """An event that Ctrl-C and SIGTERM set."""
    stop = asyncio.Event()
    set_on_signals(stop)
    return stop


def set_on_signals(stop: asyncio.Event) -> None:
    """Have Ctrl-C and SIGTERM set an event, whatever they did before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


async def _unless(stop: asyncio.Event, opening: Coroutine[object, object, T]) -> T | None:
    """Open something that may have to be waited for, such as a pipe; None if ``stop`` is set."""
    task, stopping = asyncio.ensure_future(opening), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stopping.cancel()


class Run:
    """The pipeline of one run with its publishers and its controls."""

    def __init__(
        self,
        config: Config,
        recognizer: Recognizer,
        optional: OptionalPublishers,
        *,
        serving: bool = False,
    ) -> None:
        """With ``serving`` there are no sources but those that are added."""
        self._config = config
        self._serving = serving
        self._page, self._metrics = optional.page, optional.metrics
        self._traces = optional.traces
        voices = {} if config.privacy == "label_only" else enrolled_voices(config)
        self._speakers = list(voices)
        self._mqtt: MqttPublisher | None = None
        self._recorder: SessionRecorder | None = None
        if config.record is not None:
            self._recorder = SessionRecorder(config.record, config=config, recognizer=recognizer)
        self._publishers: list[Publisher] = []
        self.pipeline = LivePipeline(
            recognizer,
            self._publishers,
            on_audio=self._recorder.on_audio if self._recorder else None,
            on_speaker_change=self._recorder.on_speaker_change if self._recorder else None,
            recording=self._recorder is not None,
            complete_health=self._complete_health,
            on_sources=self._publish_info,
        )

    async def start(self, *screens: Publisher) -> None:
        """Connect the publishers; MQTT before others, as its outbox keeps utterances on disk.

        Only traces come before: they take the time at which they are told for that of publication.
        """
        controls = Controls(
            self.pipeline,
            info=self._info,
            recording=self._recorder,
            stores=self._stores,
        )
        if self._traces is not None:
            self._publishers.append(self._traces)
        if self._config.mqtt.url != "none":
            self._mqtt = MqttPublisher(
                self._config.mqtt,
                info=self._info(),
                on_status=self._report_broker,
                control=controls,
                traceparent=self._traces.traceparent if self._traces else None,
            )
            await self._mqtt.connect()
            self._publishers.append(self._mqtt)
            print_status(f"publishing to {self._mqtt.address}")
        if self._recorder is not None:
            self._publishers.append(self._recorder)
            print_status(f"recording to {self._recorder.folder}")
        if self._page is not None:
            self._page.info, self._page.control = self._info(), controls
            await self._page.start()
            self._publishers.append(self._page)
            print_status(f"showing all of it at {self._page.address}")
        if self._metrics is not None:
            await self._start_metrics(self._metrics)
        self._publishers.extend(screens)

    async def _start_metrics(self, server: "MetricsServer") -> None:
        from stream_hbaf.publish.metrics import Metrics

        server.metrics = Metrics(
            self._info(), health=self.pipeline.health, has_broker=self._mqtt is not None
        )
        await server.start()
        self._publishers.append(server)
        print_status(f"metrics are at {server.address}")

    def _report_broker(self, connected: bool, line: str) -> None:
        print_status(line)
        if self._metrics is not None and self._metrics.metrics is not None:
            self._metrics.metrics.broker_is_connected(connected)

    def _stores(self) -> list[DialogueStore]:
        """Everything that holds parts of dialogues; without a broker, what other runs left."""
        stores = (self._mqtt or LeftOutboxes(), self._recorder, self._page)
        return [store for store in stores if store is not None]

    def _info(self) -> Info:
        """The description of this recogniser, as of now."""
        recognizer = self.pipeline.recognizer
        bundle = recognizer.bundle
        return Info(
            version=__version__,
            model=recognizer.model,
            labels=list(bundle.labels),
            licence=bundle.config.licence,
            sources=[*self.pipeline.sources]
            if self._serving
            else [source.name for source in _sources(self._config)],
            privacy=self._config.privacy,
            speakers=self._speakers,
        )

    async def _publish_info(self) -> None:
        await self.pipeline.publish(self._info())

    async def publish_health(self) -> None:
        """Publish the pipeline's health every minute, after ``release_memory``."""
        await asyncio.to_thread(release_memory)  # loading the models took more than they need
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            await self.each_minute()

    async def each_minute(self) -> None:
        """What ``publish_health`` does every minute."""
        await asyncio.to_thread(release_memory)
        await self.pipeline.publish_health()

    def _complete_health(self, health: Health) -> Health:
        """The health with the publisher's queue and losses."""
        if self._mqtt is None:
            return health
        queues = health.queues | {"outbox": self._mqtt.outbox_depth}
        dropped = health.dropped | self._mqtt.dropped
        return health.model_copy(update={"queues": queues, "dropped": dropped})


def _fall_back(config: Config, speed: float | None) -> tuple[Config, float | None]:
    """Play the bundled recording in real time if no source was given and no microphone is there."""
    if config.sources or "where" in config.source.model_fields_set:
        return config, speed
    try:
        if list_devices():
            return config, speed
        why = "no microphone found"
    except DeviceError as error:
        why = str(error)
    print_status(f"{why}: listening to the bundled recording in real time")
    source = config.source.model_copy(update={"where": str(EXAMPLE)})
    return config.model_copy(update={"source": source}), 1.0


def _sources(config: Config) -> list[SourceConfig]:
    """All sources; a single one that isn't a microphone and has no name is called "file".

    ``source.token``, which can't be given on the command line, applies to every source that has
    none of its own.
    """
    source = config.source
    if config.sources:
        return [
            one.model_copy(update={"token": one.token or source.token}) for one in config.sources
        ]
    if "name" in source.model_fields_set or source.where.partition(":")[0] == "mic":
        return [source]
    return [source.model_copy(update={"name": "file"})]


def _open_source(
    source: SourceConfig, speed: float | None, page: "Dashboard | None", *, on_status: OnStatus
) -> AudioSource:
    if source.where == "browser" and page is not None:
        return page.microphone(source, on_status=on_status)
    return open_source(
        source.where,
        speed=speed,
        token=source.token.get_secret_value() if source.token else None,
        channel=source.channel,
        chunk_ms=FULL_SPEED_CHUNK_MS if speed is None else source.chunk_ms,
        on_status=on_status,
    )


async def with_broker(config: Config, opened: contextlib.AsyncExitStack) -> Config:
    """The settings with the embedded broker's address, if there is one to start.

    Any broker is tried here, so that a wrong address or password shows before the models load.
    Raises BrokerError.
    """
    mqtt = config.mqtt
    if mqtt.url == "none":
        return config
    if mqtt.url == "embedded":
        broker = await opened.enter_async_context(embedded_broker(mqtt.port))
        if broker.started:  # else the publisher has to check whose broker it is, each time
            mqtt = mqtt.model_copy(update={"url": broker.url})
    await check_broker(mqtt)
    return config.model_copy(update={"mqtt": mqtt})
