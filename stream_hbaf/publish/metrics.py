"""Counts what happens in a run, for Prometheus.

Metrics hold no text, no speaker's name and no address. Their labels have few values: sources are
those of the settings, emotions those of the bundles, all others are listed here. What the privacy
mode forbids isn't there at all.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import product
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from stream_hbaf.events import (
    AnyEvent,
    Health,
    Info,
    Latency,
    Stage,
    State,
    Status,
    Switch,
    SwitchName,
    Utterance,
)

# From a fast stage on a quiet machine to an overloaded one, denser where the answer is expected:
# half a second of silence ends an utterance, and after 1.5 s an answer is late.
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0)
PARTS = tuple(name for name in Latency.model_fields if name != "total")  # stages of the latency


class Metrics:
    """The metrics of one run.

    ``info`` describes the recogniser, ``health`` is asked for the queues at each reading. Without a
    broker (``has_broker``) there is nothing about one.
    """

    def __init__(
        self, info: Info, *, health: Callable[[], Health], has_broker: bool = True
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the series
        self._registry = registry = CollectorRegistry()
        self._capture: dict[str, State] = {}
        self._was_connected = True
        self._sources: set[str] = set()
        self._define(registry)
        self._define_restricted(
            registry if info.privacy != "label_only" else None,
            words=registry if info.privacy == "full" else None,
        )
        self._define_broker(registry if has_broker else None)
        registry.register(_HealthCollector(health))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self._describe(info)

    def _define_broker(self, registry: CollectorRegistry | None) -> None:
        """Define what is about the broker, which a run begins connected to."""
        self._connected = Gauge(
            "stream_hbaf_broker_connected",
            "1 while the broker is connected.",
            registry=registry,
        )
        self._connected.set(1)
        self._reconnects = Counter(
            "stream_hbaf_broker_reconnects_total",
            "Times that a lost connection to the broker was restored.",
            registry=registry,
        )

    def count(self, event: AnyEvent) -> None:
        """Count an event, as it is published."""
        match event:
            case Utterance(type="end", revision=None):
                self._count_end(event)
            case Status():
                self._set_state(event)
            case Switch():
                self._switch.labels(event.source, event.switch).set(event.on)
            case Info():
                self._describe(event)

    def broker_is_connected(self, connected: bool) -> None:
        """Note whether the broker can be reached."""
        if connected and not self._was_connected:
            self._reconnects.inc()
        self._was_connected = connected
        self._connected.set(connected)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, in the format that an ``Accept`` header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def families(self) -> Iterator[Metric]:
        """All metrics with their present values."""
        return iter(self._registry.collect())

    def _define(self, registry: CollectorRegistry) -> None:
        """Define what every privacy mode permits."""
        self._info = Gauge(
            "stream_hbaf_info",
            "Always 1; its labels are the version, the bundle and the privacy mode.",
            ["version", "model", "sha256", "privacy"],
            registry=registry,
        )
        self._utterances = Counter(
            "stream_hbaf_utterances_total",
            "Finished utterances: one for each end event, but for revisions.",
            ["source"],
            registry=registry,
        )
        self._speech = Counter(
            "stream_hbaf_speech_seconds_total",
            "Length of the finished utterances.",
            ["source"],
            registry=registry,
        )
        self._emotions = Counter(
            "stream_hbaf_emotions_total",
            "Finished utterances with an emotion, by its label.",
            ["source", "label"],
            registry=registry,
        )
        self._state = Gauge(
            "stream_hbaf_stage_state",
            "1 for the state that a stage of a source is in, 0 for its others.",
            ["source", "stage", "state"],
            registry=registry,
        )
        self._returns = Counter(
            "stream_hbaf_source_reconnects_total",
            "Times that a source's sound came back after it was offline.",
            ["source"],
            registry=registry,
        )
        self._switch = Gauge(
            "stream_hbaf_switch_on",
            "1 for a source's switch that is on, 0 for one that is off.",
            ["source", "switch"],
            registry=registry,
        )

    def _define_restricted(
        self, registry: CollectorRegistry | None, *, words: CollectorRegistry | None
    ) -> None:
        """Define what some privacy modes forbid; without a registry it is never shown."""
        self._latency = Histogram(
            "stream_hbaf_latency_seconds",
            "From the last speech sample of an utterance to its end event.",
            ["source"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._parts = Histogram(
            "stream_hbaf_stage_latency_seconds",
            "Part of the latency that a stage took, as in the event's latency_ms.",
            ["stage"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._abstentions = Counter(
            "stream_hbaf_abstentions_total",
            "Emotions that are too uncertain to rely on, by their label.",
            ["source", "label"],
            registry=registry,
        )
        self._degraded = Counter(
            "stream_hbaf_degraded_utterances_total",
            "Finished utterances for which a stage failed.",
            ["source"],
            registry=registry,
        )
        self._words = Counter(
            "stream_hbaf_words_total",
            "Words of the transcripts, by the label of their utterance.",
            ["source", "label"],
            registry=words,
        )

    def _describe(self, info: Info) -> None:
        """Name the recogniser, begin at 0 what it can count, and end what is about lost sources."""
        for source in self._sources - {*info.sources}:
            self._remove(source, labels=info.labels)
        self._sources = {*info.sources}
        self._info.clear()
        model = info.model
        self._info.labels(info.version, model.id, model.sha256, info.privacy).set(1)
        for source in info.sources:
            for counter in (self._utterances, self._speech, self._returns, self._degraded):
                counter.labels(source)
            self._latency.labels(source)
            for label in info.labels:
                for counter in (self._emotions, self._abstentions, self._words):
                    counter.labels(source, label)
        for part in PARTS:
            self._parts.labels(part)

    def _remove(self, source: str, *, labels: list[str]) -> None:
        """Remove the series of a source that is gone: names that come and go would fill memory."""
        self._capture.pop(source, None)
        plain = (self._utterances, self._speech, self._returns, self._degraded, self._latency)
        by_label = (self._emotions, self._abstentions, self._words)
        series: list[tuple[Gauge | Counter | Histogram, tuple[str, ...]]] = [
            *((metric, (source,)) for metric in plain),
            *((metric, (source, label)) for metric in by_label for label in labels),
            *((self._switch, (source, switch)) for switch in get_args(SwitchName)),
            *((self._state, (source, *at)) for at in product(get_args(Stage), get_args(State))),
        ]
        for metric, values in series:
            with suppress(KeyError):  # which older clients raise for what was never counted
                metric.remove(*values)

    def _count_end(self, end: Utterance) -> None:
        self._utterances.labels(end.source).inc()
        if end.audio_end_ms is not None:
            self._speech.labels(end.source).inc((end.audio_end_ms - end.audio_start_ms) / 1000)
        if end.degraded:
            self._degraded.labels(end.source).inc()
        if end.latency_ms is not None:
            self._latency.labels(end.source).observe(end.latency_ms.total / 1000)
            for part in PARTS:
                self._parts.labels(part).observe(getattr(end.latency_ms, part) / 1000)
        if end.emotion is not None:
            self._emotions.labels(end.source, end.emotion.label).inc()
            self._words.labels(end.source, end.emotion.label).inc(len(end.text.split()))
            if end.emotion.abstained:
                self._abstentions.labels(end.source, end.emotion.label).inc()

    def _set_state(self, status: Status) -> None:
        for state in get_args(State):
            shown = self._state.labels(status.source, status.stage, state)
            shown.set(state == status.state)
        if status.stage == "capture":
            before = self._capture.get(status.source)
            if before == "offline" and status.state == "online":
                self._returns.labels(status.source).inc()
            self._capture[status.source] = status.state


class _HealthCollector(Collector):
    """What ``health`` says when the metrics are read."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        health = self._health()
        queues = GaugeMetricFamily(
            "stream_hbaf_queue_length",
            "Chunks of sound and finished utterances that wait, of all sources, and messages in "
            "the outbox.",
            labels=["queue"],
        )
        for name, length in health.queues.items():
            queues.add_metric([name], length)
        dropped = CounterMetricFamily(
            "stream_hbaf_dropped_total", "Messages that were dropped, by kind.", labels=["kind"]
        )
        for kind, count in health.dropped.items():
            dropped.add_metric([kind], count)
        hints = GaugeMetricFamily(
            "stream_hbaf_hints",
            "Sources that a person should look at: nothing but silence, sound without speech, "
            "channels that cancel each other.",
            value=len(health.hints),
        )
        yield from (queues, dropped, hints)


def metrics_table(families: Iterable[Metric]) -> str:
    """The metrics of this program as a Markdown table, for the documentation."""
    head = "| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n"
    rows = []
    for family in families:
        if not family.name.startswith("stream_hbaf"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
        named = ", ".join(f"`{label}`" for label in labels if label != "le")
        rows.append(f"| `{name}` | {family.type} | {named} | {family.documentation} |\n")
    return head + "".join(rows)
