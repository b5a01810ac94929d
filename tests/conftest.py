"""What many tests share: the recordings, and one recogniser for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Threads that wait by spinning starve each other when cores are few: under load a decode took 13 s
# with them and 0.1 s without. Read once, by the first library that brings OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
from contract import every_message_keeps_the_contract  # noqa: F401  # for every test
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, load_config

if TYPE_CHECKING:
    from stream_hbaf.recognizer import Recognizer

RECORDINGS = Path(__file__).parent / "recordings"

# What the tests of a module need, by the module of ours that provides it.
PROVIDERS = {"mosquitto": "broker", "chromium": "browser", "virtual_microphone": "device"}
# Modules whose tests train, start processes or play recordings: most take more than a second.
SLOW = [
    "audio_file",
    "baselines",
    "cluster",
    "command",
    "control",
    "downloads",
    "drill",
    "evaluation_offline",
    "evaluation_streaming",
    "experiment",
    "experiment_networks",
    "extraction",
    "fitting",
    "fuzz",
    "live",
    "live_endpoints",
    "live_replay",
    "live_speakers",
    "live_streams",
    "preparation",
    "processes",
    "readme",
    "recipe",
    "serve_command",
    "serve_examples",
    "session_corpus",
    "train",
    "trainer",
    "training_tokens",
    "wheel",
    "whisper",
]
# Of these, what ``tools/test --all`` runs beside the default: attacks and drills, packaging, and
# training in depth, which take a third of the time of all tests.
LONG = [
    "case_study",
    "cluster",
    "downloads",
    "drill",
    "experiment_networks",
    "fitting",
    "fuzz",
    "mqtt_refusals",
    "processes",
    "serve_hostile",
    "soak",
    "train",
    "trainer",
    "training_tokens",
    "wheel",
]


assert all((Path(__file__).parent / f"test_{module}.py").is_file() for module in (*SLOW, *LONG))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``tools/test`` leaves out unless it is asked for all, and ``--fast`` besides."""
    for item in items:
        assert isinstance(item, pytest.Function)
        for provider in {getattr(value, "__module__", "") for value in vars(item.module).values()}:
            if provider in PROVIDERS:
                item.add_marker(PROVIDERS[provider])
        if item.module.__name__.removeprefix("test_") in SLOW or "recognizer" in item.fixturenames:
            item.add_marker("slow")
        if item.module.__name__.removeprefix("test_") in LONG:
            item.add_marker("long")


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test its own outbox, and none in the home of whoever runs it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for one another."""
    import torch  # seconds, which most tests need not pay

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def recognizer() -> Iterator["Recognizer"]:
    """The recogniser as it ships, with real Whisper and the trained bundle."""
    from stream_hbaf.recognizer import Recognizer  # seconds, which most tests need not pay

    config = load_config(
        environ=os.environ, overrides={"source.name": "test", "source.speaker": "reader"}
    )
    with Recognizer(config) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def sentences() -> list[NDArray[np.int16]]:
    """Five sentences read for LibriVox, each with silence after it that ends the utterance."""
    silence = np.zeros(SAMPLE_RATE_HZ, np.int16)
    return [
        np.concatenate([read_audio(path), silence])
        for path in sorted(RECORDINGS.glob("sense_and_sensibility_*.flac"))
    ]
