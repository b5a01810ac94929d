"""The order of the rooms, and which file knows which library: what keeps the way of the data
plain."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "stream_hbaf"

# A file imports only from its own line or from those above it.
ROOMS = (
    ("errors", "config", "events", "__init__"),
    ("topics",),
    ("schema", "certainty"),
    ("audio",),
    ("speech",),
    ("features", "networks"),
    ("bundle",),
    ("recognizer",),
    ("privacy",),
    ("runtime", "utterance", "source_pipeline", "terminal", "live", "publish"),
    ("control", "client", "corpora", "sessions"),
    ("dashboard",),
    ("evaluation", "training"),
    ("listening",),
    ("commands",),
    ("cli",),
)

# Each outside library is known to these files only, so that it can be replaced there.
LIBRARIES = {
    "aiohttp": {"dashboard/server.py"},
    "aiomqtt": {"publish/connection.py"},
    "amqtt": {"publish/broker.py"},
    "audformat": {"sessions/audformat.py"},
    "av": {"audio/file.py", "sessions/flac.py"},
    "faster_whisper": {"features/transcript.py"},
    "onnxruntime": {"speech/vad.py"},
    "opensmile": {"features/acoustic.py"},
    "rich": {"terminal.py"},
    "jellyfish": {"corpora/mishearing.py"},
    "jinja2": {"training/report.py"},
    "lightning": {"training/trainer.py"},
    "markupsafe": {"training/report.py"},
    "matplotlib": {"training/pictures.py"},
    "paho": {"publish/connection.py"},
    "peft": {"training/tuning.py"},
    "safetensors": {
        "bundle.py",
        "features/pretrained.py",
        "training/preparation.py",
    },
    "sounddevice": {"audio/capture.py"},
    "soxr": {"audio/pcm.py"},
    "transformers": {
        "features/comet.py",
        "features/pretrained.py",
        "features/speech_encoder.py",
        "features/text.py",
    },
    "webrtcvad": {"speech/vad.py"},
    "websockets": {"audio/websocket.py"},
    "sklearn": {"training/embeddings.py", "training/selection.py"},
}
LOOPS = (
    "audio/",
    "runtime.py",
    "utterance.py",
    "source_pipeline.py",
    "live.py",
    "terminal.py",
    "publish/",
    "control.py",
    "client.py",
    "sessions/",
    "dashboard/",
    "listening.py",
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
    return found


def rank(room: str) -> int:
    ranks = [n for n, rooms in enumerate(ROOMS) if room in rooms]
    assert ranks, f"{room} has no place in the order of rooms"
    return ranks[0]


def test_rooms_import_only_from_those_before_them() -> None:
    """Nothing reaches back up the design's sentence."""
    for file, module in imports():
        if module.startswith("stream_hbaf."):
            own = file.split("/")[0].removesuffix(".py")
            other = module.split(".")[1]
            assert rank(other) <= rank(own), f"{file} imports {module}"


def test_each_library_is_known_to_one_file() -> None:
    """A library that is replaced one day is replaced in one place."""
    for library, files in LIBRARIES.items():
        known = {file for file, module in imports() if module.split(".")[0] == library}
        assert known == files, library


def test_only_the_outer_rooms_know_of_the_event_loop() -> None:
    """Everything else is plain calls, testable without a loop."""
    for file, module in imports():
        if module.split(".")[0] == "asyncio":
            assert file.startswith(LOOPS), file
