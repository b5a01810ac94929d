"""The turn model: its front end beside the package's, and what is said where it can't be used."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stream_hbaf.audio.file import read_audio
from stream_hbaf.errors import ModelError
from stream_hbaf.features import turn_model
from stream_hbaf.features.turn_model import TurnModel, find_turn_model, turn_features
from stream_hbaf.features.whisper_encoder import mel_filters

RECORDINGS = Path(__file__).parent / "recordings"
NETWORK = find_turn_model()
installed = pytest.mark.skipif(NETWORK is None, reason="pipecat-ai is not installed")


def packages_front_end() -> ModuleType:
    """The package's own module, without the package, which imports what isn't installed."""
    assert NETWORK is not None
    path = NETWORK.parent.parent / "_whisper_features.py"
    spec = importlib.util.spec_from_file_location("front_end", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@installed
@pytest.mark.parametrize("samples", [8_000, 100_001, 150_000])
def test_turn_features_beside_the_packages(samples: int) -> None:
    """The same spectrogram as the package's front end computes; longer sound keeps its end."""
    sound = read_audio(RECORDINGS / "jfk.flac")[:samples]
    padded = np.zeros(128_000, np.float32)
    padded[max(0, 128_000 - samples) :] = sound[-128_000:].astype(np.float32) / 32768
    theirs = packages_front_end().compute_whisper_log_mel_features(padded, do_normalize=True)
    ours = turn_features(sound, filters=mel_filters(80))
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@installed
def test_probability_of_the_same_sound() -> None:
    """A second model, and one that was asked something else before, say the same to the bit."""
    sound = read_audio(RECORDINGS / "jfk.flac")
    first, second = TurnModel(), TurnModel()
    expected = first.probability(sound)
    second.probability(sound[:30_000])
    assert second.probability(sound) == expected
    assert 0.5 < expected < 1  # a sentence that is over
    assert first.probability(sound[:28_000]) < 0.5  # "And so my fellow Americans"


@installed
def test_probability_of_silence_and_of_nothing() -> None:
    """Neither is an error."""
    model = TurnModel()
    assert 0 <= model.probability(np.zeros(0, np.int16)) <= 1
    assert 0 <= model.probability(np.zeros(200_000, np.int16)) <= 1


def test_missing_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the command that brings them."""
    monkeypatch.setattr(turn_model, "package_folder", lambda name: None)
    with pytest.raises(ModelError, match=r"end of turn: .*--no-deps pipecat-ai==1\.14\.0$"):
        TurnModel()


def test_other_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights with another digest are refused before they are loaded."""
    network = tmp_path / "audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx"
    network.parent.mkdir(parents=True)
    network.write_bytes(b"other")
    monkeypatch.setattr(turn_model, "package_folder", lambda name: tmp_path)
    with pytest.raises(ModelError, match=r"has SHA-256 \w+, not 2bb02631\w+; pip install") as error:
        TurnModel()
    assert "\n" not in str(error.value)
