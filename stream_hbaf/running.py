"""One run: a recogniser's pipeline with its publishers and its controls."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stream_hbaf import __version__
from stream_hbaf.config import Config, SourceConfig
from stream_hbaf.events import Health, Info
from stream_hbaf.features.voice_prints import enrolled_voices
from stream_hbaf.live.control import Controls, DialogueStore
from stream_hbaf.live.pipeline import LivePipeline, release_memory
from stream_hbaf.live.runtime import Publisher
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.publish.connection import check_broker
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.publish.outbox import LeftOutboxes
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.recorder import SessionRecorder

if TYPE_CHECKING:  # extras
    from stream_hbaf.dashboard.metrics_server import MetricsServer
    from stream_hbaf.dashboard.server import Dashboard
    from stream_hbaf.publish.traces import Traces

HEALTH_EVERY_S = 60.0


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


class Run:
    """The pipeline of one run with its publishers and its controls."""

    def __init__(
        self,
        config: Config,
        recognizer: Recognizer,
        optional: OptionalPublishers,
        *,
        tell: Callable[[str], None],
        serving: bool = False,
    ) -> None:
        """``tell`` gets lines for who started it. With ``serving`` there are no sources but those
        that are added."""
        self._tell = tell
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
            self._tell(f"publishing to {self._mqtt.address}")
        if self._recorder is not None:
            self._publishers.append(self._recorder)
            self._tell(f"recording to {self._recorder.folder}")
        if self._page is not None:
            self._page.info, self._page.control = self._info(), controls
            await self._page.start()
            self._publishers.append(self._page)
            self._tell(f"showing all of it at {self._page.address}")
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
        self._tell(f"metrics are at {server.address}")

    def _report_broker(self, connected: bool, line: str) -> None:
        self._tell(line)
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
            else [source.name for source in sources_of(self._config)],
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


def sources_of(config: Config) -> list[SourceConfig]:
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
