"""Promises of the GE2E embedding: it is the package's own, for any audio, and nothing else's."""

from pathlib import Path

import numpy as np
import pytest
from conftest import RECORDINGS
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.errors import ModelError
from stream_hbaf.features import ge2e
from stream_hbaf.features.ge2e import Ge2e, mel_bands, window_starts
from stream_hbaf.features.representations import open_representation

# By resemblyzer 0.1.4 itself, from tests/recordings: embeddings, and those of the windows.
REFERENCE = Path(__file__).parent / "ge2e.npz"
PUBLISHED = Path(__file__).parents[2] / "shared/data/iemocap/ge2e.npz"  # of IEMOCAP, where it is


@pytest.fixture(scope="module")
def encoder() -> Ge2e:
    return Ge2e()


def audio_of(name: str) -> NDArray[np.int16]:
    """A recording; "quiet": jfk at 1/200 of its level, "short": three quarters of a second."""
    if name == "quiet":
        return (read_audio(RECORDINGS / "jfk.flac") // 200).astype(np.int16)
    if name == "short":
        return read_audio(RECORDINGS / "jfk.flac")[8000:20000]
    return read_audio(RECORDINGS / f"{name}.flac")


@pytest.mark.parametrize(
    "name", sorted(name for name in np.load(REFERENCE).files if not name.endswith("/windows"))
)
def test_embeddings_are_those_of_the_package(encoder: Ge2e, name: str) -> None:
    """Of the utterance and of each of its windows: cosine at least 0.9999."""
    audio = audio_of(name)
    with np.load(REFERENCE) as reference:
        expected, expected_windows = reference[name], reference[f"{name}/windows"]
    found, windows = encoder.extract(audio), encoder.windows(audio)
    assert found is not None
    assert windows is not None
    assert found @ expected >= 0.9999
    assert windows.shape == expected_windows.shape
    assert (windows * expected_windows).sum(axis=1).min() >= 0.9999
    assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="IEMOCAP's embeddings are not there")
def test_published_embeddings_have_the_same_statistics(encoder: Ge2e) -> None:
    """Unit length, no negative value, as many zeros: what was published is this encoder's."""
    with np.load(PUBLISHED) as arrays:
        published = arrays["embedding"].astype(np.float32)
    ours = [encoder.extract(read_audio(path)) for path in sorted(RECORDINGS.glob("*.flac"))]
    own = np.stack([one for one in ours if one is not None])
    assert np.abs(np.linalg.norm(published, axis=1) - 1).max() < 2e-3
    assert min(published.min(), own.min()) == 0.0
    assert (published == 0).mean() == pytest.approx((own == 0).mean(), abs=0.1)
    assert np.corrcoef(published.mean(axis=0), own.mean(axis=0))[0, 1] > 0.5


@pytest.mark.parametrize(
    "audio",
    [np.zeros(0, np.int16), np.zeros(16_000, np.int16), np.full(479, 900, np.int16)],
    ids=["nothing", "silence", "under 30 ms"],
)
def test_audio_without_a_voice_has_no_embedding(encoder: Ge2e, audio: NDArray[np.int16]) -> None:
    """None, as of any representation, rather than a vector that says nothing."""
    assert encoder.extract(audio) is None


def test_audio_in_which_no_speech_is_found_is_kept_whole(encoder: Ge2e) -> None:
    """Breath that the detector doesn't call speech is an utterance all the same."""
    breath = (np.random.default_rng(0).normal(size=16_000) * 20).astype(np.int16)
    windows = encoder.windows(breath)
    assert windows is not None
    assert windows.shape == (1, 256)


def test_windows_cover_the_audio() -> None:
    """One for anything short; a last one that audio covers by less than three quarters is left."""
    assert window_starts(480) == [0]
    assert window_starts(160 * 160) == [0]
    assert window_starts(160 * (77 + 120)) == [0, 77]
    assert window_starts(160 * (77 + 119)) == [0]


def test_mel_bands_have_equal_area() -> None:
    """Triangles of one area; linear below 1 kHz: the lowest bands are equally wide."""
    bands = mel_bands()
    assert bands.shape == (201, 40)
    wide = bands[:, 20:]  # of enough bins for a sum to be an area
    assert wide.sum(axis=0) * 40 == pytest.approx(np.ones(20), abs=0.02)  # 40 Hz a bin


def test_weights_of_another_encoder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of other weights would be read as these; and a missing package is named."""
    other = tmp_path / "pretrained.pt"
    other.write_bytes(b"other weights")
    monkeypatch.setattr(ge2e, "find_ge2e", lambda: other)
    with pytest.raises(ModelError, match=r"^ge2e: .*pretrained\.pt has SHA-256 \w{64}, not 3937"):
        open_representation("ge2e")
    monkeypatch.setattr(ge2e, "find_ge2e", lambda: None)
    with pytest.raises(ModelError, match=r"^ge2e: resemblyzer, .*pip install --no-deps resembly"):
        open_representation("ge2e")
