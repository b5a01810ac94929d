"""Sends a trace of each utterance to an OpenTelemetry collector: a span with a child a stage.

The spans are made of the end event, so that recognition knows nothing of tracing. OpenTelemetry's
own environment variables say where the collector is, and how it is spoken to.
"""

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Status, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.util.types import AttributeValue

from stream_hbaf import __version__
from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.events import AnyEvent, Utterance

LOG = logging.getLogger(__name__)

UTTERANCE = "utterance"  # name of the span that the stages are children of
PROTOCOL = "http/protobuf"  # the one that is spoken, and OpenTelemetry's default
COMPLAIN_EVERY_S = 60.0
NS_PER_MS = 1_000_000


class Traces:
    """A publisher that makes spans of finished utterances.

    A trace's ids follow from its utterance's id, so that other publishers can name it. Spans that
    the collector doesn't take are dropped, at most 2,048 wait (``OTEL_BSP_MAX_QUEUE_SIZE``).
    """

    def __init__(self) -> None:
        """Raises ConfigError if the environment names no collector's address."""
        _check_environment()
        self._ids = _UtteranceIds()
        about = Resource.create({"service.name": "stream-hbaf", "service.version": __version__})
        self._provider = TracerProvider(
            id_generator=self._ids,
            resource=about.merge(OTELResourceDetector().detect()),  # the environment's comes first
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter()))
        self._tracer = self._provider.get_tracer("stream_hbaf", __version__)

    def traceparent(self, end: Utterance) -> str:
        """The W3C trace context of an end event, for those who go on with its trace."""
        trace_id, span_id = _ids(end.id)
        decision = self._provider.sampler.should_sample(None, trace_id, UTTERANCE).decision
        flags = TraceFlags(decision is Decision.RECORD_AND_SAMPLE)
        return f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"

    async def send(self, event: AnyEvent) -> None:
        """Record an end event, but no revision of one, as published now; never waits."""
        if isinstance(event, Utterance) and event.type == "end" and event.revision is None:
            self.record(event, published_ns=time.time_ns())

    def record(self, end: Utterance, *, published_ns: int) -> None:
        """Queue the spans of an utterance that was published at a Unix time in nanoseconds."""
        began_ns = int(datetime.fromisoformat(end.start_time).timestamp() * 1000) * NS_PER_MS
        self._ids.begin(end.id)
        span = self._tracer.start_span(
            UTTERANCE, context=Context(), start_time=began_ns, attributes=_attributes(end)
        )
        if end.degraded:
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span, Context())
        for stage, since_ns, until_ns in _stages(end, began_ns=began_ns, published_ns=published_ns):
            self._tracer.start_span(stage, context=inside, start_time=since_ns).end(until_ns)
        span.end(published_ns)

    async def run(self) -> None:
        """Wait until cancelled: a thread of OpenTelemetry's sends the spans."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        """Send what is queued; what the collector doesn't take within ``timeout_s`` is dropped."""
        # A request may hang for longer than that, and mustn't keep the program from ending.
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, timeout_s)
        if sending.is_alive():
            LOG.warning("traces: the collector hasn't taken the latest; they are dropped")


class _UtteranceIds(RandomIdGenerator):
    """Gives the span of an utterance the ids that ``traceparent`` names; others are random."""

    def __init__(self) -> None:
        self._trace_id = self._span_id = 0

    def begin(self, utterance_id: str) -> None:
        """The next span is that of an utterance."""
        self._trace_id, self._span_id = _ids(utterance_id)

    def generate_trace_id(self) -> int:
        """Called for a span without a parent."""
        return self._trace_id

    def generate_span_id(self) -> int:
        """Called for each span."""
        given, self._span_id = self._span_id, 0
        return given or super().generate_span_id()


class _Exporter(SpanExporter):
    """OTLP over HTTP, which reports failures as one line a minute, not each with its details."""

    def __init__(self) -> None:
        self._otlp = trace_exporter.OTLPSpanExporter()
        logging.getLogger(trace_exporter.__name__).setLevel(logging.CRITICAL + 1)
        self._complain_at = 0.0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called in OpenTelemetry's thread."""
        result = self._otlp.export(spans)
        now = time.monotonic()
        if result is not SpanExportResult.SUCCESS and now >= self._complain_at:
            self._complain_at = now + COMPLAIN_EVERY_S
            LOG.warning(
                "traces: the collector takes none, so they are dropped for now; check "
                "%s and the collector", OTEL_EXPORTER_OTLP_ENDPOINT
            )  # fmt: skip
        return result

    def shutdown(self) -> None:
        """Give up what hasn't been sent."""
        self._otlp.shutdown()  # type: ignore[no-untyped-call]


def _ids(utterance_id: str) -> tuple[int, int]:
    """The ids of an utterance's trace and span."""
    digest = hashlib.sha256(utterance_id.encode()).digest()
    return int.from_bytes(digest[:16]), int.from_bytes(digest[16:24])


def _attributes(end: Utterance) -> dict[str, AttributeValue]:
    """What is known of an utterance; what is about a person is marked as personal."""
    emotion, model = end.emotion, end.model
    found: dict[str, AttributeValue | None] = {
        "stream_hbaf.id": end.id,
        "stream_hbaf.source": end.source,
        "stream_hbaf.dialogue_id": end.dialogue_id,
        "stream_hbaf.turn": end.turn,
        "stream_hbaf.trigger": end.trigger,
        "stream_hbaf.language": end.language,
        "stream_hbaf.modalities": end.modalities,
        "stream_hbaf.degraded": end.degraded,
        "stream_hbaf.model": model.id if model else None,
        "stream_hbaf.emotion.label": emotion.label if emotion else None,
        "stream_hbaf.emotion.score": emotion.score if emotion else None,
        # Without a score nothing is said of its certainty either.
        "stream_hbaf.emotion.abstained": emotion.abstained if emotion and emotion.score else None,
        "stream_hbaf.personal.text": end.text,
        "stream_hbaf.personal.speaker": end.speaker,
    }
    return {name: value for name, value in found.items() if value not in (None, "", [])}


def _stages(end: Utterance, *, began_ns: int, published_ns: int) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each stage; none where the event has no latency."""
    if end.latency_ms is None:
        return
    took = {name: int(ms * NS_PER_MS) for name, ms in end.latency_ms.model_dump().items()}
    spoken = published_ns - took["total"]
    confirmed = spoken + took["vad"]
    transcribed = confirmed + took["transcript"]
    classified = published_ns - took["publish"]
    yield "speech", min(began_ns, spoken), spoken
    yield "vad", spoken, confirmed
    yield "transcript", confirmed, transcribed
    yield "acoustic", confirmed, confirmed + took["acoustic"]
    yield "text", transcribed, transcribed + took["text"]
    yield "classify", classified - took["classify"], classified
    yield "publish", classified, published_ns


def _check_environment() -> None:
    """Raise ConfigError for an address or a protocol that can't be used."""
    for name in (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT):
        address = os.environ.get(name, "")
        try:
            parts = urlsplit(address)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if address and not usable:  # it isn't shown: it may hold a password
            raise ConfigError(f"{name}: is no URL; write it as http://HOST:4318")
    for name in (OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, OTEL_EXPORTER_OTLP_PROTOCOL):
        protocol = os.environ.get(name, PROTOCOL)
        if protocol != PROTOCOL:
            raise ConfigError(f"{name}: '{shorten(protocol)}' isn't spoken; set it to {PROTOCOL}")
