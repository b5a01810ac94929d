"""Traces of utterances, as an OpenTelemetry collector receives them over HTTP."""

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from conftest import RECORDINGS
from dialogue_samples import NOON, utterance
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stream_hbaf.cli import main
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Privacy, Speech, Utterance
from stream_hbaf.live.runtime import redact
from stream_hbaf.publish.messages import messages
from stream_hbaf.publish.traces import Traces

SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"
Span = Any  # of protobuf, without types
NS = 1_000_000_000
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
# Of the sample utterance: 612 ms after the last speech sample.
PUBLISHED_NS = int((NOON + timedelta(seconds=3.612)).timestamp()) * NS + 612_000_000
STAGES = ["speech", "vad", "transcript", "acoustic", "text", "classify", "publish"]


class Collector(ThreadingHTTPServer):
    """Keeps what it is sent; refuses it with ``status``."""

    daemon_threads = True

    def __init__(self, *, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Reception)
        self.status = status
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list[Span]:
        scopes = [s for r in self.requests for rs in r.resource_spans for s in rs.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def resource(self) -> dict[str, Any]:
        (resource,) = {str(r.resource_spans[0].resource): r for r in self.requests}.values()
        return attributes(resource.resource_spans[0].resource)


class Reception(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.server.headers.append({"path": self.path, **self.headers})
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def collector(monkeypatch: pytest.MonkeyPatch, *, status: int = 200) -> Iterator[Collector]:
    """A collector that the environment names."""
    opened = Collector(status=status)
    monkeypatch.setenv(ENDPOINT, opened.address)
    serving = Thread(target=opened.serve_forever, args=[0.05])
    serving.start()
    try:
        yield opened
    finally:
        opened.shutdown()
        serving.join()
        opened.server_close()


def attributes(of: Any) -> dict[str, Any]:
    found = {}
    for each in of.attributes:
        value = getattr(each.value, each.value.WhichOneof("value"))
        found[each.key] = (
            [one.string_value for one in value.values] if hasattr(value, "values") else value
        )
    return found


def record(end: Utterance) -> None:
    """Trace one utterance, and deliver that."""
    traces = Traces()
    traces.record(end, published_ns=PUBLISHED_NS)
    asyncio.run(traces.close(10))


def test_utterance_is_a_span_with_a_child_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the times that its latency says, from when speech began until it was published."""
    with collector(monkeypatch) as received:
        record(utterance(1))
    spans = {span.name: span for span in received.spans()}
    root = spans.pop("utterance")
    assert sorted(spans) == sorted(STAGES)
    began_ns = PUBLISHED_NS - int(1.612 * NS)
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (began_ns, PUBLISHED_NS)
    assert root.parent_span_id == b""
    for span in spans.values():
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
    ms = {
        name: tuple(
            (at - began_ns) // 1_000_000
            for at in (span.start_time_unix_nano, span.end_time_unix_nano)
        )
        for name, span in spans.items()
    }
    assert ms == {
        "speech": (0, 1000),
        "vad": (1000, 1600),
        "transcript": (1600, 1605),
        "acoustic": (1600, 1604),
        "text": (1605, 1608),
        "classify": (1609, 1611),
        "publish": (1611, 1612),
    }


def test_words_and_names_are_marked_as_personal(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector(monkeypatch) as received:
        record(utterance(1, degraded="vad: out of memory"))
    (root,) = (span for span in received.spans() if span.name == "utterance")
    found = attributes(root)
    assert found == {
        "stream_hbaf.id": "d-1",
        "stream_hbaf.source": "ann",
        "stream_hbaf.dialogue_id": "d",
        "stream_hbaf.turn": 1,
        "stream_hbaf.trigger": "silence",
        "stream_hbaf.language": "en",
        "stream_hbaf.modalities": ["audio", "text"],
        "stream_hbaf.degraded": "vad: out of memory",
        "stream_hbaf.model": "live-en",
        "stream_hbaf.emotion.label": "joy",
        "stream_hbaf.emotion.score": 0.7,
        "stream_hbaf.emotion.abstained": False,
        "stream_hbaf.personal.text": "Sentence 1.",
        "stream_hbaf.personal.speaker": "Ann",
    }
    assert root.status.code == 2  # an error
    assert received.resource()["service.name"] == "stream-hbaf"


@pytest.mark.parametrize(
    ("privacy", "left_out"),
    [
        ("no_text", {"personal.text"}),
        (
            "label_only",
            {
                *("trigger", "language", "modalities", "model", "emotion.score"),
                *("emotion.abstained", "personal.text", "personal.speaker"),
            },
        ),
    ],
)
def test_private_modes_leave_out_what_they_forbid(
    monkeypatch: pytest.MonkeyPatch, privacy: Privacy, left_out: set[str]
) -> None:
    """In label_only there are no latencies, and so no stages."""
    public = redact(utterance(1), privacy)
    assert isinstance(public, Utterance)
    with collector(monkeypatch) as received:
        record(public)
        record(utterance(1))
    first, second = (span for span in received.spans() if span.name == "utterance")
    missing = attributes(second).keys() - attributes(first).keys()
    assert missing == {f"stream_hbaf.{name}" for name in left_out}
    assert len(received.spans()) == (16 if privacy == "no_text" else 9)
    assert b"Sentence" not in received.requests[0].SerializeToString()


def test_environment_says_where_to_and_as_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's variables for headers, the service's name and the sampler apply."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=geheim")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "hall")
    with collector(monkeypatch) as received:
        record(utterance(1))
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        record(utterance(2))
        assert Traces().traceparent(utterance(2)).endswith("-00")
    assert [(head["path"], head["api-key"]) for head in received.headers] == [
        ("/v1/traces", "geheim")
    ]
    assert received.resource()["service.name"] == "hall"


def test_traceparent_names_the_span_of_the_utterance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscribers go on with its trace; it is a property of the end alone."""
    end = utterance(1)
    with collector(monkeypatch) as received:
        traces = Traces()
        traceparent = traces.traceparent(end)
        traces.record(utterance(7), published_ns=PUBLISHED_NS)
        traces.record(end, published_ns=PUBLISHED_NS)
        asyncio.run(traces.close(10))
    (root,) = (s for s in received.spans() if attributes(s).get("stream_hbaf.id") == end.id)
    assert traceparent == f"00-{root.trace_id.hex()}-{root.span_id.hex()}-01"
    assert len({span.span_id for span in received.spans()}) == 16
    first, *others = messages(end, prefix="p", node="n", traceparent=traceparent)
    assert dict(first.properties)["traceparent"] == traceparent
    assert not [other for other in others if "traceparent" in dict(other.properties)]


def test_events_of_a_run_are_timed_when_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end alone is traced, until now."""

    async def scene() -> None:
        traces = Traces()
        running = asyncio.create_task(traces.run())
        await traces.send(utterance(1).model_copy(update={"type": "new"}))
        await traces.send(Speech(source="ann", on=False))
        await traces.send(utterance(2))
        await traces.send(utterance(2).model_copy(update={"rev": 4, "revision": 1}))
        await traces.close(10)
        running.cancel()

    before = time.time_ns()
    with collector(monkeypatch) as received:
        asyncio.run(scene())
    (root,) = (span for span in received.spans() if span.name == "utterance")
    assert attributes(root)["stream_hbaf.id"] == "d-2"
    assert before <= root.end_time_unix_nano <= time.time_ns()


@pytest.mark.slow
def test_traces_of_a_run_are_its_utterances(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command delivers a trace for each end that it prints, until its end."""
    command = [sys.executable, "-m", "stream_hbaf.cli", "--file", str(SPEECH), "--speed", "max"]
    command += ["--mqtt", "none", "--asr", "tiny.en", "--json", "--traces"]
    with collector(monkeypatch) as received:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    ends = {event["id"]: event for event in events if event.get("type") == "end"}
    roots = {attributes(s)["stream_hbaf.id"]: s for s in received.spans() if s.name == "utterance"}
    assert roots.keys() == ends.keys()
    for name, end in ends.items():
        found = attributes(roots[name])
        assert found["stream_hbaf.personal.text"] == end["text"] != ""
        spans = {s.name: s for s in received.spans() if s.parent_span_id == roots[name].span_id}
        assert spans.keys() == {*STAGES}
        since_ns, until_ns = spans["vad"].start_time_unix_nano, roots[name].end_time_unix_nano
        assert (until_ns - since_ns) / 1e6 == pytest.approx(end["latency_ms"]["total"], abs=0.2)


# ---- collectors that fail


@pytest.mark.parametrize("refuses", [True, False])
def test_absent_collector_costs_one_line_and_no_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    """Utterances go on; the end of the run doesn't wait for it."""

    async def scene() -> None:
        traces = Traces()
        for turn in range(50):
            await traces.send(utterance(turn))
        await traces.close(0.5)

    with collector(monkeypatch, status=400) as received:
        if not refuses:
            monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
        began = time.monotonic()
        asyncio.run(scene())
        assert time.monotonic() - began < 5
        assert bool(received.requests) == refuses
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    said = "takes none" if refuses else "hasn't taken the latest"  # it is tried again for 10 s
    assert [said in record.message for record in warnings] == [True]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (ENDPOINT, "collector:4318", "OTEL_EXPORTER_OTLP_ENDPOINT: is no URL"),
        (ENDPOINT, "http://", "is no URL"),
        (ENDPOINT, "http://ann:geheim@host:many", "is no URL"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://x", "TRACES_ENDPOINT: is no URL"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "'grpc' isn't spoken; set it to http/protobuf"),
    ],
)
def test_wrong_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=said) as raised:
        Traces()
    assert "geheim" not in str(raised.value)


def test_missing_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is an extra; the message names it."""
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    monkeypatch.delitem(sys.modules, "stream_hbaf.publish.traces", raising=False)
    wanted = ["opentelemetry-sdk>=1.30; extra == 'metrics'"]
    monkeypatch.setattr("stream_hbaf.cli.requires", lambda name: wanted)
    assert main(["--mqtt", "none", "--traces"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "stream-hbaf: opentelemetry is not installed; pip install 'stream-hbaf[metrics]'"
    )
