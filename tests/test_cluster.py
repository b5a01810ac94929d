"""A real Ray cluster of two nodes: the same answers as in one process, whatever is killed."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_kit import rewritten
from conftest import RECORDINGS
from experiment_kit import Workspace
from mosquitto import free_port, mosquitto
from serve_kit import Sound, assert_same, ends, ends_of, pieces, serving

from stream_hbaf.cluster import ENVIRONMENT
from stream_hbaf.config import Config, load_config
from stream_hbaf.corpora.clips import ClipJob
from stream_hbaf.corpora.extraction import extract_features
from stream_hbaf.errors import ConfigError, ModelError, StreamHbafError
from stream_hbaf.evaluation.conditions import evaluate_streaming
from stream_hbaf.events import Connected, Utterance
from stream_hbaf.processes import WorkerDiedError, mapped_by
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.stream_client import stream

os.environ.update(ENVIRONMENT)  # read when Ray is imported
pytest.importorskip("ray", reason="needs the extra scale")

from ray_nodes import two_nodes

from stream_hbaf.cluster import RETRIES, _nodes, connected, map_on_cluster, run_on_each_node
from stream_hbaf.serve.remote import Models, RemoteRecognizer, ask

pytestmark = pytest.mark.timeout(400)  # the first cluster of a busy machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray.cloudpickle

    # Workers can't import a module of tests: they get its functions themselves.
    cloudpickle: Any = ray.cloudpickle
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def settings() -> Config:
    return load_config(environ={}, overrides={"transcript.model": "tiny.en", "serve.replicas": "1"})


@pytest.fixture(scope="module")
def models(cluster: Any, settings: Config) -> Models:
    from stream_hbaf.serve.replicas import deploy

    return deploy(settings)


@pytest.fixture(scope="module")
def remote(models: Models, settings: Config) -> Iterator[Recognizer]:
    with RemoteRecognizer(settings, models) as recognizer:
        yield recognizer


# ---- streams


def test_the_same_answers(remote: Recognizer, settings: Config, sentences: list[Sound]) -> None:
    """Segments and words equal, probabilities within 1e-5, in a dialogue of two sentences."""

    sound = np.concatenate(sentences[1:3])
    found = asyncio.run(_recognised(remote, sound))
    with Recognizer(settings) as local:
        expected = asyncio.run(_recognised(local, sound))
        assert remote.model == local.model
    assert_same(found, expected)
    assert all(one.contributions is not None for one in found)


async def _recognised(recognizer: Recognizer, sound: Sound) -> list[Utterance]:
    async with serving(recognizer) as service:
        return await ends_of(service, sound)


def test_bundles_share_whisper(
    models: Models, settings: Config, sentences: list[Sound], tmp_path: Path
) -> None:
    """A service of another bundle has its own ``Understand``, with its own answers."""
    from ray import serve

    from stream_hbaf.bundle import resolve_bundle
    from stream_hbaf.serve.replicas import deploy

    shipped = resolve_bundle("live-en")
    config = (shipped / "config.yaml").read_text(encoding="utf-8")
    warm = re.search(r"audio\+text: (\S+)", config)
    assert warm
    config = config.replace(warm[0], f"audio+text: {float(warm[1]) / 2}", 1)
    colder = rewritten(shipped, tmp_path / "colder", config=config.encode())
    other = settings.model_copy(update={"model": str(colder)})
    theirs = deploy(other)
    try:
        assert theirs.transcribe.app_name == models.transcribe.app_name
        with RemoteRecognizer(other, theirs) as remote, Recognizer(other) as local:
            found, expected = (
                asyncio.run(_recognised(one, sentences[1])) for one in (remote, local)
            )
        assert_same(found, expected)
    finally:
        serve.delete(theirs.understand.app_name)


def test_a_cluster_without_room_is_refused(
    cluster: Any, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, where Serve itself would wait for a node without end."""
    from ray import serve

    from stream_hbaf.serve import replicas

    monkeypatch.setattr(replicas, "START_WITHIN_S", 1.0)
    on_gpus = settings.serve.model_copy(update={"gpus_each": 1.0})
    before = {*serve.status().applications}
    with pytest.raises(ModelError, match=r"^replicas of Transcribe don't start within 1 s: "):
        replicas.deploy(settings.model_copy(update={"serve": on_gpus}))
    for name in {*serve.status().applications} - before:
        serve.delete(name)


def test_a_killed_replica_costs_a_retry(
    remote: Recognizer, models: Models, sentences: list[Sound]
) -> None:
    """One of each kind is killed while an utterance goes on: nothing is lost or degraded."""
    sound = np.concatenate(sentences[1:4])

    async def scene() -> None:
        async with serving(remote) as service:
            unbroken = await ends_of(service, sound)
            waiting = [models.transcribe, models.understand]
            events = []
            async for event in stream(service.server.url, pieces(sound)):
                events.append(event)
                if isinstance(event, Utterance) and event.type == "new" and waiting:
                    pid = await asyncio.to_thread(ask, waiting.pop(), "pid")
                    os.kill(pid, signal.SIGKILL)
            assert not waiting
            assert [e.degraded for e in ends(events)] == [""] * len(unbroken)
            assert_same(ends(events), unbroken)

    asyncio.run(scene())


def test_a_killed_session_goes_on(models: Models, sentences: list[Sound], tmp_path: Path) -> None:
    """Ray starts it again; its client is back in the dialogue, and misses no ``end``."""
    from ray import serve

    from stream_hbaf.serve.app import build

    port = free_port()
    given = {
        "transcript.model": "tiny.en",
        "serve.replicas": "1",
        "serve.port": str(port),
        "serve.checkpoints": str(tmp_path / "kept"),
    }
    serve.run(build(given), name="whole", route_prefix=None)
    session = serve.get_deployment_handle("Session", app_name="whole")
    silence = np.zeros(1600, np.int16)
    over = asyncio.Event()

    async def talk() -> AsyncIterator[bytes]:
        """A sentence; after it silence until the session is back; another one."""
        async for piece in pieces(sentences[1]):
            yield piece
        while not over.is_set():  # in real time: what isn't read yet waits in the connection
            yield silence.tobytes()
            await asyncio.sleep(len(silence) / 16_000)
        async for piece in pieces(sentences[2]):
            yield piece

    async def scene() -> None:
        events = []
        async for event in stream(f"ws://127.0.0.1:{port}", talk()):
            events.append(event)
            if len(ends(events)) == 1 and event in ends(events):
                os.kill(await asyncio.to_thread(ask, session, "pid"), signal.SIGKILL)
            if isinstance(event, Connected) and event.resumed:
                over.set()
        first, second = ends(events)
        assert (first.turn, second.turn) == (1, 2)
        assert first.dialogue_id == second.dialogue_id
        assert "young man" in first.text

    asyncio.run(scene())
    serve.delete("whole")


# ---- offline


def test_extracted_features_are_bit_equal(cluster: Any, tmp_path: Path) -> None:
    jobs = [ClipJob(path.stem, path, None, None) for path in sorted(RECORDINGS.glob("*.flac"))[:2]]
    extract = partial(extract_features, jobs, representation="compare", workers=1, progress=_quiet)
    here = extract(cache=tmp_path / "here")
    with mapped_by(map_on_cluster):
        there = extract(cache=tmp_path / "there")
        again = extract(cache=tmp_path / "there")
    assert np.isfinite(here.features).all()
    assert here.features.tobytes() == there.features.tobytes() == again.features.tobytes()


def test_an_experiment_has_the_same_records(cluster: Any, tmp_path: Path) -> None:
    """Seeds and rows as tasks: the same figures, but for the time that they took."""
    places = [Workspace(tmp_path / name) for name in ("here", "there")]
    places[0].run(workers=1)
    with mapped_by(map_on_cluster):
        places[1].run(workers=1)
    here, there = (
        {key: run.model_copy(update={"seconds": 0.0}) for key, run in place.runs.items()}
        for place in places
    )
    assert here == there


def test_a_streaming_evaluation_has_the_same_figures(
    cluster: Any, settings: Config, tmp_path: Path
) -> None:
    """Conditions as tasks: equal, but for what an utterance costs."""
    table = tmp_path / "clips.csv"
    clips = sorted(RECORDINGS.glob("sense*.flac"))[:2]
    rows = [f"{clip},{label}" for clip, label in zip(clips, ("joy", "neutral"), strict=True)]
    table.write_text("\n".join(["audio,label", *rows]), encoding="utf-8")

    def evaluated(folder: Path) -> dict[str, Any]:
        evaluate_streaming(
            "live-en",
            [str(table)],
            corpora=tmp_path,
            conditions=("clean", "audio_only"),
            out=folder,
            config=settings,
            progress=_silent,
        )
        report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for measured in (report["summary"], *report["conditions"].values()):
            assert measured.pop("cost_ms")
        return dict(report)

    here = evaluated(tmp_path / "here")
    with mapped_by(map_on_cluster):
        there = evaluated(tmp_path / "there")
    assert here == there
    assert here["conditions"]["clean"]["count"] == 2
    assert here["conditions"]["clean"]["ece"] != here["conditions"]["audio_only"]["ece"]


def test_an_item_is_done_again_where_its_worker_died(cluster: Any, tmp_path: Path) -> None:
    done = dict(map_on_cluster(_die_once, [1, 2, 3], shared=(tmp_path,)))
    assert done == {0: 1, 1: 4, 2: 9}
    with pytest.raises(WorkerDiedError, match=rf"died {RETRIES + 1} times") as died:
        dict(map_on_cluster(_die, [1]))
    assert died.value.index == 0


def test_errors_come_back_as_they_are(cluster: Any) -> None:
    with pytest.raises(StreamHbafError, match=r"^no such clip: 7$"):
        dict(map_on_cluster(_refuse, [7]))
    with pytest.raises(ConfigError, match=r"^node \S+: no such clip: 8$"):
        run_on_each_node(_refuse, 8)
    assert len(run_on_each_node(os.getpid)) == 2


def _quiet(done: int, total: int, clip: Path) -> None:
    pass


def _silent(line: str) -> None:
    pass


def _die_once(item: int, folder: Path) -> int:
    marker = folder / str(item)
    if item == 2 and not marker.exists():
        marker.touch()
        _die(item)
    return item * item


def _die(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(item: int) -> None:
    raise StreamHbafError(f"no such clip: {item}")


# ---- addresses


def test_nothing_listens_at_the_address() -> None:
    """One line within seconds, where Ray itself would try for minutes."""
    with (
        pytest.raises(ConfigError, match=r"^--ray 127\.0\.0\.1:9: no cluster .*refused"),
        connected("127.0.0.1:9"),
    ):
        raise AssertionError


@pytest.fixture(params=["HTTP", "MQTT", "silent", "a node that isn't the head"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that isn't the head of a cluster."""
    if request.param == "HTTP":
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()
    elif request.param == "MQTT":
        with mosquitto(request.getfixturevalue("tmp_path")) as broker:
            yield f"127.0.0.1:{broker.port}"
    elif request.param == "silent":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"127.0.0.1:{silent.getsockname()[1]}"
    else:
        request.getfixturevalue("cluster")
        node = _nodes()[0]
        yield f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def test_no_head_listens_at_the_address(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused as if nothing did, whatever it speaks."""
    monkeypatch.setattr("stream_hbaf.cluster.ANSWERS_WITHIN_S", 3.0)
    line = rf"^--ray {elsewhere}: no cluster .*what listens there isn't Ray's head node"
    with pytest.raises(ConfigError, match=line), connected(elsewhere):
        raise AssertionError
