"""The metrics as Prometheus reads them: over HTTP, with its own client's parser."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import wave
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from conftest import RECORDINGS
from dialogue_samples import INFO, LABELS, MODEL, utterance
from metrics_kit import HEALTH, Sample, all_metrics, parsed, sample_metrics, values
from prometheus_client.openmetrics import parser as openmetrics
from pydantic import SecretStr

from stream_hbaf.audio.file import read_audio
from stream_hbaf.cli import main
from stream_hbaf.config import SAMPLE_RATE_HZ, MetricsConfig
from stream_hbaf.dashboard.metrics_server import MetricsServer
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import AnyEvent, Privacy, Status, Switch
from stream_hbaf.live.runtime import redact
from stream_hbaf.publish.metrics import BUCKETS_S, PARTS, Metrics, metrics_table

ROOT = Path(__file__).parent.parent


def sample(name: str, **labels: str) -> Sample:
    return f"stream_hbaf_{name}", tuple(sorted(labels.items()))


def count(counted: Metrics, events: list[AnyEvent], *, privacy: Privacy = "full") -> None:
    """Count events as the pipeline hands them to publishers."""
    for event in events:
        allowed = redact(event, privacy)
        if allowed is not None:
            counted.count(allowed)


ABSTAINED = utterance(3, "anger").model_copy(deep=True)
assert ABSTAINED.emotion is not None
ABSTAINED = ABSTAINED.model_copy(
    update={"emotion": ABSTAINED.emotion.model_copy(update={"abstained": True})}
)
UTTERANCES: list[AnyEvent] = [
    utterance(1).model_copy(update={"type": "new", "rev": 1}),
    utterance(1),
    utterance(2, source="ben", text="Is this yours?"),
    ABSTAINED,
    utterance(1, "anger", rev=4, revision=1),  # of the first
    utterance(4, source="ben", emotion=None, text="", degraded="transcript: out of memory"),
]


# ---- what is counted


def test_source_that_leaves_has_no_series() -> None:
    """Clients of a service come and go: what is about those that are gone takes no memory."""
    counted = sample_metrics()
    count(counted, [*UTTERANCES, Status(source="ann", stage="vad", state="degraded")])
    count(counted, [Switch(source="ann", switch="record", on=True)])
    assert any(("source", "ann") in labels for _, labels in values(counted))
    counted.count(INFO.model_copy(update={"sources": ["ben"]}))
    assert not any(("source", "ann") in labels for _, labels in values(counted))
    assert values(counted)[sample("utterances_total", source="ben")] == 2


def test_utterances_are_counted_once_each() -> None:
    """By source and label; of the messages about one utterance the first end alone."""
    counted = sample_metrics()
    count(counted, UTTERANCES)
    found = values(counted)
    assert found[sample("utterances_total", source="ann")] == 2
    assert found[sample("utterances_total", source="ben")] == 2
    assert found[sample("speech_seconds_total", source="ann")] == 2.0
    assert found[sample("degraded_utterances_total", source="ben")] == 1
    assert found[sample("degraded_utterances_total", source="ann")] == 0
    for source, label, times, words in (("ann", "joy", 1, 2), ("ben", "joy", 1, 3)):
        assert found[sample("emotions_total", source=source, label=label)] == times
        assert found[sample("words_total", source=source, label=label)] == words
        assert found[sample("abstentions_total", source=source, label=label)] == 0
    assert found[sample("emotions_total", source="ann", label="anger")] == 1
    assert found[sample("abstentions_total", source="ann", label="anger")] == 1


def test_latency_is_in_seconds_and_in_its_bucket() -> None:
    """An end 612 ms after the speech lies between 0.5 and 0.75 s."""
    counted = sample_metrics()
    count(counted, [utterance(1)])
    found = values(counted)
    assert found[sample("latency_seconds_sum", source="ann")] == pytest.approx(0.612)
    assert found[sample("latency_seconds_bucket", source="ann", le="0.5")] == 0
    assert found[sample("latency_seconds_bucket", source="ann", le="0.75")] == 1
    assert found[sample("stage_latency_seconds_sum", stage="vad")] == pytest.approx(0.6)
    assert found[sample("stage_latency_seconds_bucket", stage="transcript", le="0.01")] == 1
    assert (BUCKETS_S[0], BUCKETS_S[-1]) == (0.01, 10.0)
    stages = {dict(labels)["stage"] for name, labels in found if "stage_latency" in name}
    assert stages == set(PARTS)


def test_states_switches_and_reconnections_follow_their_events() -> None:
    counted = sample_metrics()
    for state in ("online", "offline", "online", "degraded", "online"):
        counted.count(Status(source="ann", stage="capture", state=state))
    counted.count(Status(source="ann", stage="vad", state="degraded", detail="out of memory"))
    counted.count(Switch(source="ann", switch="listening", on=False))
    counted.broker_is_connected(True)  # a report while it is connected
    for connected in (False, False, True):
        counted.broker_is_connected(connected)
    found = values(counted)
    assert found[sample("source_reconnects_total", source="ann")] == 1
    assert found[sample("source_reconnects_total", source="ben")] == 0
    capture = {"source": "ann", "stage": "capture"}
    assert found[sample("stage_state", **capture, state="online")] == 1
    assert found[sample("stage_state", **capture, state="offline")] == 0
    assert found[sample("stage_state", source="ann", stage="vad", state="degraded")] == 1
    assert found[sample("switch_on", source="ann", switch="listening")] == 0
    assert found[sample("broker_connected")] == 1
    assert found[sample("broker_reconnects_total")] == 1


def test_health_is_asked_at_each_reading() -> None:
    """Queues and drops are those of the moment, not those of the last minute."""
    health = HEALTH
    counted = Metrics(INFO, health=lambda: health)
    assert values(counted)[sample("queue_length", queue="outbox")] == 40
    health = health.model_copy(update={"queues": {"outbox": 0}})
    found = values(counted)
    assert found[sample("queue_length", queue="outbox")] == 0
    assert found[sample("dropped_total", kind="partials")] == 3
    assert found[sample("hints")] == 1


def test_everything_begins_at_0() -> None:
    """A rate needs a series before its first event; another bundle's labels begin at 0, too."""
    counted = sample_metrics()
    found = values(counted)
    for source in INFO.sources:
        assert found[sample("utterances_total", source=source)] == 0
        assert found[sample("latency_seconds_count", source=source)] == 0
        for label in LABELS:
            assert found[sample("emotions_total", source=source, label=label)] == 0
    other = MODEL.model_copy(update={"id": "other"})
    counted.count(INFO.model_copy(update={"model": other, "labels": ["calm"]}))
    found = values(counted)
    assert found[sample("emotions_total", source="ann", label="calm")] == 0
    described = {"version": "0", "sha256": MODEL.sha256, "privacy": "full"}
    assert found[sample("info", **described, model="other")] == 1
    assert sample("info", **described, model="live-en") not in found


def test_process_is_measured_by_the_client() -> None:
    found = values(sample_metrics())
    assert found["process_resident_memory_bytes", ()] > 1e6
    assert found["process_open_fds", ()] > 0


def test_without_a_broker_nothing_is_said_of_one() -> None:
    """A broker that nobody wants must not look like one that is away."""
    assert not [name for name, _ in values(sample_metrics(has_broker=False)) if "broker" in name]


# ---- privacy and size


@pytest.mark.parametrize("privacy", ["full", "no_text", "label_only"])
def test_nothing_personal_is_in_the_metrics(privacy: Privacy) -> None:
    """In no mode words, speakers or addresses; in private modes what these forbid isn't there."""
    secret = utterance(1, text="Meet Zebulon at noon", speaker="Zebulon", degraded="vad: Zebulon")
    asked = Status(source="ann", stage="capture", state="online", detail="Zebulon at 10.0.0.7")
    counted = sample_metrics(privacy=privacy)
    count(counted, [secret, asked, ABSTAINED], privacy=privacy)
    text = counted.exposition("")[0].decode()
    for personal in ("Zebulon", "10.0.0.7", "noon", "silence", secret.id):
        assert personal not in re.sub("^#.*$", "", text, flags=re.MULTILINE)
    assert ("stream_hbaf_words" in text) == (privacy == "full")
    for family in ("latency", "stage_latency", "abstentions", "degraded_utterances"):
        assert (f"stream_hbaf_{family}" in text) == (privacy != "label_only"), family
    assert parsed(text)[sample("emotions_total", source="ann", label="joy")] == 1


def test_number_of_series_is_bounded() -> None:
    """Whatever happens, it grows with the configured sources and the bundle's labels alone."""
    info = INFO.model_copy(update={"sources": [f"s{number}" for number in range(16)]})
    counted = sample_metrics(info=info)
    before = len(values(counted))
    for turn in range(200):
        count(counted, [utterance(turn, source=f"s{turn % 16}", dialogue=f"d{turn}")])
    assert len(values(counted)) == before < 1000


def test_names_follow_prometheus_conventions() -> None:
    """A prefix, base units, _total for counters and for nothing else."""
    for family in sample_metrics().families():
        if family.name.startswith(("process_", "python_")):
            continue
        assert re.fullmatch(r"stream_hbaf(_[a-z]+)+", family.name)
        assert family.documentation.endswith(".")
        assert not re.search("_(ms|mb|total)", family.name)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")


def test_documentation_lists_all_metrics() -> None:
    """To renew it, put what ``metrics_table`` returns into the page."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert metrics_table(all_metrics().families()) in page


# ---- over HTTP


@asynccontextmanager
async def served(counted: Metrics | None = None, **config: Any) -> AsyncIterator[MetricsServer]:
    server = MetricsServer(MetricsConfig(**{"port": 0, **config}))
    server.metrics = counted or sample_metrics()
    await server.start()
    try:
        yield server
    finally:
        await server.close(1)


@asynccontextmanager
async def client(server: MetricsServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.address.partition("/metrics")[0]) as session:
        yield session


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))


def test_prometheus_reads_both_formats() -> None:
    """What its parsers make of the answers is what was counted."""
    openmetrics_type = "application/openmetrics-text; version=1.0.0"

    async def scene() -> None:
        async with served() as server, client(server) as session:
            await server.send(utterance(1))
            async with session.get("/metrics") as answer:
                assert answer.status == 200
                assert answer.content_type == "text/plain"
                found = parsed(await answer.text())
                assert found[sample("utterances_total", source="ann")] == 1
            async with session.get("/metrics", headers={"Accept": openmetrics_type}) as answer:
                assert answer.content_type == "application/openmetrics-text"
                text = await answer.text()
                families = list(openmetrics.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
                (utterances,) = (f for f in families if f.name == "stream_hbaf_utterances")
                assert [s.value for s in utterances.samples] == [1, 0]

    run(scene)


def test_health_needs_no_token_and_metrics_do() -> None:
    """Beyond this machine the bearer token opens the metrics; probes have none."""

    async def scene() -> None:
        secret = SecretStr("süß & geheim")
        async with served(host="0.0.0.0", token=secret) as server, client(server) as session:
            base = f"http://127.0.0.1:{server.address.split(':')[2].split('/')[0]}"
            assert "geheim" not in server.address
            for headers, status in (
                ({}, 401),
                ({"Authorization": "Bearer falsch"}, 401),
                ({"Authorization": "Basic süß & geheim"}, 401),
                ({"Authorization": "Bearer süß & geheim"}, 200),
            ):
                async with session.get(f"{base}/metrics", headers=headers) as answer:
                    assert answer.status == status, headers
                    if status == 401:
                        assert "Authorization: Bearer" in await answer.text()
            async with session.get(f"{base}/healthz") as answer:
                assert (answer.status, await answer.text()) == (200, "ok\n")
            async with session.get(f"{base}/other") as answer:
                assert answer.status == 401

    run(scene)


def test_drawn_token_is_printed_and_lets_in() -> None:
    """Bound elsewhere than to this machine the metrics are never open to everybody."""

    async def scene() -> None:
        async with served(host="0.0.0.0") as server:
            found = re.search(r"bearer token: (\S{32,})\)", server.address)
            assert found is not None
            address = server.address.partition(" ")[0].replace(
                server.address.split("/")[2].split(":")[0], "127.0.0.1"
            )
            headers = {"Authorization": f"Bearer {found[1]}"}
            async with (
                aiohttp.ClientSession(headers=headers) as session,
                session.get(address) as answer,
            ):
                assert answer.status == 200

    run(scene)


def test_other_names_and_pages_are_refused() -> None:
    """A web page can't read the metrics by a name that leads here, nor from another site."""

    async def scene() -> None:
        async with served() as server, client(server) as session:
            for path in ("/metrics", "/healthz"):
                async with session.get(path, headers={"Host": "evil.example"}) as answer:
                    assert answer.status == 421
                async with session.get(path, headers={"Origin": "https://evil.example"}) as answer:
                    assert answer.status == 403
                async with session.post(path) as answer:
                    assert answer.status == 405

    run(scene)


def test_taken_port_and_foreign_address_are_one_line() -> None:
    """Which port, and what to do about it."""

    async def scene() -> None:
        async with served() as first:
            port = int(first.address.split(":")[2].split("/")[0])
            for config, said in (
                ({"port": port}, rf"metrics: can't listen on 127\.0\.0\.1:{port}.*metrics\.port"),
                ({"host": "192.0.2.1"}, r"192\.0\.2\.1:0 \(Cannot assign requested address\)"),
                ({"host": "nowhere.invalid"}, "nowhere.invalid"),
            ):
                with pytest.raises(ConfigError, match=said):
                    async with served(**config):
                        pass

    run(scene)


def test_half_open_connections_keep_nobody_out() -> None:
    """The limits are those of the dashboard."""

    async def scene() -> None:
        async with served() as server, client(server) as session:
            port = int(server.address.split(":")[2].split("/")[0])
            opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
            for _, writer in opened:
                writer.write(b"GET /metrics HTTP/1.1\r\n")
            async with session.get("/metrics") as answer:
                assert answer.status == 200
            for _, writer in opened:
                writer.close()

    run(scene)


# ---- the command


def test_missing_client_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is an extra; the message names it."""
    for library in ("aiohttp", "prometheus_client"):
        monkeypatch.setitem(sys.modules, library, None)
    for name in ("publish.metrics", "dashboard.metrics_server"):
        monkeypatch.delitem(sys.modules, f"stream_hbaf.{name}", raising=False)
    wanted = [
        "aiohttp>=3.10; extra == 'dashboard'",
        "aiohttp>=3.10; extra == 'metrics'",
        "prometheus-client>=0.22; extra == 'metrics'",
    ]
    monkeypatch.setattr("stream_hbaf.cli.requires", lambda name: wanted)
    assert main(["--mqtt", "none", "--metrics"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "stream-hbaf: prometheus-client is not installed; pip install 'stream-hbaf[metrics]'"
    )


def speech_with_silence() -> bytes:
    """Two sentences, each ended by silence, as a WAV file."""
    silence = np.zeros(SAMPLE_RATE_HZ, np.int16)
    parts = [read_audio(path) for path in sorted(RECORDINGS.glob("sense_*.flac"))[:2]]
    file = BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        for part in parts:
            written.writeframes(np.concatenate([part, silence]).tobytes())
        written.writeframes(silence.tobytes())
    return file.getvalue()


@pytest.mark.slow
def test_metrics_of_a_run_add_up() -> None:
    """The command counts as many utterances, labels and words as it prints."""
    command = [sys.executable, "-m", "stream_hbaf.cli", "--file", "-", "--speed", "max"]
    command += ["--mqtt", "none", "--asr", "tiny.en", "--json", "--metrics", "0"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # It stays open, so that the run goes on.
        threading.Thread(target=process.stdin.write, args=[speech_with_silence()]).start()
        said = next(line for line in process.stderr if b"metrics are at" in line).decode()
        ends: list[dict[str, Any]] = []
        for line in process.stdout:
            event = json.loads(line)
            ends += [event] if event.get("type") == "end" else []
            if len(ends) == 2:
                break
        found = asyncio.run(read(said.split()[-1]))
        process.send_signal(signal.SIGINT)
        rest, said_last = process.communicate(timeout=60)
    assert process.returncode == 0, said_last
    assert not [line for line in rest.splitlines() if json.loads(line).get("type") == "end"]

    def total(name: str, **labels: str) -> float:
        chosen = sample(name, source="file", **labels)
        return sum(v for (n, of), v in found.items() if n == chosen[0] and {*chosen[1]} <= {*of})

    assert total("utterances_total") == len(ends)
    assert total("latency_seconds_count") == len(ends)
    assert total("emotions_total") == sum("emotion" in end for end in ends)
    for label in {end["emotion"]["label"] for end in ends}:
        of_label = [end for end in ends if end["emotion"]["label"] == label]
        assert total("emotions_total", label=label) == len(of_label)
        words = sum(len(end["text"].split()) for end in of_label)
        assert total("words_total", label=label) == words > 0
        abstained = sum(end["emotion"]["abstained"] for end in of_label)
        assert total("abstentions_total", label=label) == abstained
    latency_s = sum(end["latency_ms"]["total"] for end in ends) / 1000
    assert total("latency_seconds_sum") == pytest.approx(latency_s)
    assert total("stage_state", stage="capture", state="online") == 1


async def read(address: str) -> dict[Sample, float]:
    """The metrics, once the utterances that have been printed are counted."""
    async with aiohttp.ClientSession() as session, session.get(address) as answer:
        return parsed(await answer.text())
