"""The order of the rooms, and which file knows which library: what keeps the way of the data
plain."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "stream_hbaf"

# A room imports only from its own line or from those above it. Each file and folder right under
# the package is a room.
ROOMS = (
    (
        *("errors", "config", "events", "affect", "files", "onnx", "processes", "untrusted"),
        *("cluster", "__init__"),
    ),
    ("audio",),
    ("networks",),
    ("features", "speech"),
    ("publish", "client", "stream_client", "agent_stream", "pipecat", "livekit"),
    ("weights",),
    ("bundle", "bundle_config", "bundle_weights", "prediction", "dialogue", "recognizer"),
    ("corpora", "sessions"),
    ("live",),
    ("training", "evaluation"),
    ("dashboard", "running", "serve"),
    ("commands",),
    ("cli",),
)

# Each outside library is known to these files only, so that it can be replaced there.
LIBRARIES = {
    "aiohttp": {
        "dashboard/access.py",
        "dashboard/http_server.py",
        "dashboard/metrics_server.py",
        "dashboard/server.py",
    },
    "aiomqtt": {"publish/connection.py", "publish/mqtt_client.py"},
    "amqtt": {"publish/broker.py"},
    "audformat": {"corpora/exchange.py"},
    "av": {"audio/container.py", "audio/decode.py", "audio/opus.py", "sessions/format.py"},
    "faster_whisper": {"features/whisper_encoder.py"},
    "huggingface_hub": {"features/pretrained.py"},
    "onnxruntime": {"onnx.py"},
    "kaldi_native_fbank": {"features/speaker.py"},
    "opensmile": {"features/acoustic.py"},
    "prometheus_client": {"publish/metrics.py"},
    "ray": {"cluster.py", "serve/app.py", "serve/remote.py", "serve/replicas.py"},
    "rich": {"publish/terminal.py"},
    "jellyfish": {"corpora/asr_errors.py"},
    "jinja2": {"evaluation/report.py", "training/card.py"},
    "jiwer": {"evaluation/metrics.py"},
    "markupsafe": {"evaluation/report.py"},
    "matplotlib": {"evaluation/plots.py"},
    "opentelemetry": {"publish/traces.py"},
    "paho": {"publish/connection.py", "publish/mqtt_client.py"},
    "livekit": {"livekit.py"},
    "pipecat": {"pipecat.py"},
    "peft": {"training/text_encoder.py"},
    "shtab": {"cli.py"},
    "safetensors": {
        "bundle.py",
        "features/pretrained.py",
        "training/commonsense_heads.py",
        "training/text_encoder.py",
    },
    "sounddevice": {"audio/capture.py"},
    "soxr": {"audio/source.py"},
    "transformers": {
        "features/comet.py",
        "features/pretrained.py",
        "features/speech_encoder.py",
        "features/text.py",
    },
    "webrtcvad": {"speech/vad.py"},
    "websockets": {"audio/websocket.py", "serve/server.py", "serve/stream.py", "stream_client.py"},
    "sklearn": {
        "evaluation/plots.py",
        "evaluation/metrics.py",
        "training/audio_features.py",
    },
}
ASYNC_ROOMS = (
    "audio/",
    "live/",
    "publish/",
    "client.py",
    "sessions/",
    "dashboard/",
    "running.py",
    "serve/",
    "stream_client.py",
    "agent_stream.py",
    "pipecat.py",
    "livekit.py",
    "commands/",
)


@cache
def imports() -> list[tuple[str, str]]:
    """(file, imported module), wherever in the file the import stands."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.append((name, node.module))
                found += [(name, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@cache
def file_graph() -> dict[str, set[str]]:
    """Each file of the package → the files of the package that it imports."""
    graph: dict[str, set[str]] = {}
    for file, module in imports():
        if module.startswith("stream_hbaf."):
            other = "/".join(module.split(".")[1:]) + ".py"
            if (PACKAGE / other).is_file():
                graph.setdefault(file, set()).add(other)
    return graph


def room_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def rank(room: str) -> int:
    ranks = [n for n, rooms in enumerate(ROOMS) if room in rooms]
    assert ranks, f"{room} has no place in the order of rooms"
    return ranks[0]


def find_cycle(graph: dict[str, set[str]]) -> tuple[str, ...]:
    """The nodes of one cycle, () if there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def test_rooms_import_only_from_those_before_them() -> None:
    """No import runs up the order of rooms."""
    for file, others in file_graph().items():
        for other in others:
            assert rank(room_of(other)) <= rank(room_of(file)), f"{file} imports {other}"


def test_no_imports_run_in_circles_between_files() -> None:
    assert find_cycle(file_graph()) == ()


def test_no_imports_run_in_circles_between_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for file, others in file_graph().items():
        beyond = {room_of(other) for other in others} - {room_of(file)}
        rooms.setdefault(room_of(file), set()).update(beyond)
    assert find_cycle(rooms) == ()


def test_a_cycle_is_found() -> None:
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


def test_each_library_is_known_to_one_file() -> None:
    """A library that is replaced one day is replaced in one place."""
    for library, files in LIBRARIES.items():
        known = {file for file, module in imports() if module.split(".")[0] == library}
        assert known == files, library


def test_only_the_outer_rooms_know_of_the_event_loop() -> None:
    """Everything else is plain calls, testable without a loop."""
    for file, module in imports():
        if module.split(".")[0] == "asyncio":
            assert file.startswith(ASYNC_ROOMS), file
