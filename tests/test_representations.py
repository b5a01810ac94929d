"""Promises of the acoustic representations: one vector an utterance, as an independent way gives
it."""

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import opensmile
import pytest
import torch
from conftest import RECORDINGS
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Data2VecAudioConfig,
    Data2VecAudioModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from stream_hbaf.audio.file import read_audio
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.features.acoustic import EGEMAPS, AcousticExtractor
from stream_hbaf.features.representations import (
    Scaling,
    join_parts,
    open_representation,
    rows_to_tokens,
    without_incomplete,
)
from stream_hbaf.features.speech_encoder import PIECE_S, SpeechEncoder
from stream_hbaf.features.whisper_encoder import WhisperEncoder

RATE = 16_000
SPEECH = read_audio(RECORDINGS / "jfk.flac")
CLASSES: dict[str, tuple[Any, Any]] = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "data2vec": (Data2VecAudioConfig, Data2VecAudioModel),
    "wavlm": (WavLMConfig, WavLMModel),
}


def smile(feature_set: opensmile.FeatureSet, level: opensmile.FeatureLevel) -> Any:
    """What openSMILE's own package gives for the speech as a whole: a table of float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return opensmile.Smile(feature_set, level).process_signal(
            SPEECH.astype(np.float32) / 32768, RATE
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each class with random weights."""
    folders = {}
    for name, (config_class, model_class) in CLASSES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = config_class(
            hidden_size=16,
            num_hidden_layers=5,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            conv_pos_kernel_size=5,
        )
        model_class(config).save_pretrained(folders[name])
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folders[name])
    return folders


def given(features: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Features that the test knows not to be None."""
    assert features is not None
    return features


def hidden_layers(folder: Path, samples: NDArray[np.int16]) -> list[NDArray[np.float64]]:
    """Each layer's frames, [T, width], of a sound scaled by hand to mean 0 and deviation 1."""
    sound = samples.astype(np.float64) / 32768
    sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(torch.tensor(sound[None], dtype=torch.float32), output_hidden_states=True)
    return [layer[0].double().numpy() for layer in output.hidden_states]


def test_compare_is_opensmiles() -> None:
    """6373 functionals, to the last bit those of openSMILE's own package."""
    representation = open_representation("compare")
    level = opensmile.FeatureLevel.Functionals
    expected = smile(opensmile.FeatureSet.ComParE_2016, level).to_numpy()[0]
    assert representation.width == 6373
    np.testing.assert_array_equal(representation.extract(SPEECH), expected)


def test_egemaps_is_opensmiles() -> None:
    """88 functionals of eGeMAPSv02, to the last bit those of openSMILE's own package."""
    representation = open_representation("egemaps")
    level = opensmile.FeatureLevel.Functionals
    expected = smile(opensmile.FeatureSet.eGeMAPSv02, level).to_numpy()[0]
    assert representation.width == 88
    np.testing.assert_array_equal(representation.extract(SPEECH), expected)


def test_egemaps_any_split() -> None:
    """eGeMAPS may be streamed as ComParE is: the split of the sound changes no bit."""
    with AcousticExtractor(EGEMAPS) as extractor:
        whole = extractor.extract(SPEECH[:RATE])
        with extractor.open() as session:
            for start in range(0, RATE, 777):
                session.feed(SPEECH[start : min(start + 777, RATE)])
            streamed = session.finish()
    assert whole is not None
    assert streamed is not None
    np.testing.assert_array_equal(streamed.functionals, whole.functionals)
    np.testing.assert_array_equal(streamed.lld, whole.lld)
    assert streamed.lld.shape == (96, 25)


def test_mfcc_is_mean_and_deviation_of_opensmiles() -> None:
    """28 values: coefficients 1-14 averaged over frames, then their standard deviations."""
    level = opensmile.FeatureLevel.LowLevelDescriptors
    table = smile(opensmile.FeatureSet.ComParE_2016, level).astype(np.float64)
    columns = [f"mfcc_sma[{n}]" for n in range(1, 15)]
    expected = [table[c].mean() for c in columns] + [table[c].std(ddof=0) for c in columns]
    representation = open_representation("mfcc")
    assert representation.width == 28
    np.testing.assert_allclose(given(representation.extract(SPEECH)), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["compare", "egemaps", "mfcc"])
def test_opensmile_too_short(name: str) -> None:
    """Under 60 ms there is no result, and the next utterance's is unaffected."""
    representation = open_representation(name)
    first = representation.extract(SPEECH[:RATE])
    assert representation.extract(SPEECH[:959]) is None
    assert representation.extract(SPEECH[:0]) is None
    np.testing.assert_array_equal(representation.extract(SPEECH[:RATE]), first)
    representation.close()


def test_whisper_is_its_encoders_description() -> None:
    """384 values, those of the transcriber's own encoder; the version names the weights."""
    representation = open_representation("whisper:tiny.en")
    encoder = WhisperEncoder("tiny.en", threads=1)
    assert (representation.name, representation.width) == ("whisper:tiny.en", 384)
    assert representation.version == f"1-{encoder.version}"
    np.testing.assert_array_equal(representation.extract(SPEECH), encoder.embed(SPEECH))
    assert representation.extract(np.zeros(RATE, np.int16)) is None
    representation.close()


def test_representations_side_by_side() -> None:
    """One vector, its parts bit for bit what each gives alone; none if one of them finds none."""
    both = open_representation("compare+whisper:tiny.en")
    parts = [open_representation(name) for name in ("compare", "whisper:tiny.en")]
    sound = SPEECH[: 2 * RATE]
    found = both.extract(sound)
    assert found is not None
    assert both.width == found.size == 6373 + 384
    compare, whisper = (part.extract(sound) for part in parts)
    np.testing.assert_array_equal(found[:6373], compare)
    np.testing.assert_array_equal(found[6373:], whisper)
    assert both.name == "compare+whisper:tiny.en"
    assert both.version == "+".join(part.version for part in parts)
    assert both.extract(sound[:959]) is None  # too short for openSMILE
    for opened in (both, *parts):
        opened.close()


def test_one_part_that_cannot_be_had() -> None:
    """Side by side, a part that isn't offered is named as it is alone."""
    with pytest.raises(ModelError, match=r"^vggish: no maintained package offers it; choose"):
        open_representation("mfcc+vggish")


@pytest.mark.parametrize("name", CLASSES)
def test_encoder_is_the_mean_of_the_last_four_layers(name: str, tiny: dict[str, Path]) -> None:
    """The mean over frames of the last four layers' average; with layers=1, of the last alone."""
    samples = SPEECH[:20_321]  # fills no whole number of frames
    layers = hidden_layers(tiny[name], samples)
    encoder = open_representation(str(tiny[name]))
    found = given(encoder.extract(samples))
    assert encoder.width == 16
    expected = np.mean([layer.mean(0) for layer in layers[-4:]], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    last = SpeechEncoder(str(tiny[name]), layers=1).extract(samples)
    assert last is not None
    np.testing.assert_allclose(last, layers[-1].mean(0), atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_encoder_any_length(name: str, tiny: dict[str, Path]) -> None:
    """From a single frame on there are features; below, none."""
    encoder = open_representation(str(tiny[name]))
    assert encoder.extract(SPEECH[:399]) is None
    for length in (400, 720, 16_001):
        features = encoder.extract(SPEECH[:length])
        assert features is not None
        assert np.isfinite(features).all()
        np.testing.assert_array_equal(encoder.extract(SPEECH[:length]), features)


def test_encoder_long_sound_in_pieces(tiny: dict[str, Path]) -> None:
    """Beyond 20 s memory stays bounded: the mean is that of equal pieces, weighted by frames."""
    half = np.tile(SPEECH, 2)[: PIECE_S * RATE - 80_000]
    encoder = open_representation(str(tiny["wavlm"]))
    # The same half twice: scaling the whole is scaling the half, so its vector is the half's.
    twice, once = given(encoder.extract(np.tile(half, 2))), given(encoder.extract(half))
    np.testing.assert_allclose(twice, once, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_tokens_are_the_frames_of_the_last_four_layers(name: str, tiny: dict[str, Path]) -> None:
    """A token a frame, 20 ms apart; with layers=1, those of the last layer alone; below a frame,
    none."""
    samples = SPEECH[:20_321]
    layers = hidden_layers(tiny[name], samples)
    tokens = SpeechEncoder(str(tiny[name])).tokens(samples)
    assert tokens is not None
    assert tokens.dtype == np.float32
    assert tokens.shape == ((20_321 - 400) // 320 + 1, 16)  # convolutions see 400, step 320
    np.testing.assert_allclose(tokens, np.mean(layers[-4:], axis=0), atol=1e-4)
    last = SpeechEncoder(str(tiny[name]), layers=1)
    np.testing.assert_allclose(given(last.tokens(samples)), layers[-1], atol=1e-4)
    assert last.tokens(samples[:399]) is None


def test_tokens_of_long_sound_have_its_vector_as_mean(tiny: dict[str, Path]) -> None:
    """Encoded in pieces, which come in their order."""
    half = np.tile(SPEECH, 2)[: PIECE_S * RATE - 80_000]
    encoder = SpeechEncoder(str(tiny["wavlm"]))
    sound = np.concatenate([half, half])
    tokens, first = given(encoder.tokens(sound)), given(encoder.tokens(half))
    assert tokens is not None
    assert first is not None
    np.testing.assert_allclose(tokens, np.concatenate([first, first]), atol=1e-4)
    np.testing.assert_allclose(tokens.mean(0), given(encoder.extract(sound)), atol=1e-5)


def test_states_of_an_encoder_are_tokens_of_eighty_milliseconds(tiny: dict[str, Path]) -> None:
    """By the name "tokens:" and the encoder's, four states each, as one row of a cache."""
    opened = open_representation(f"tokens:{tiny['wav2vec2']}")
    row, states = given(opened.extract(SPEECH[:32_000])), SpeechEncoder(str(tiny["wav2vec2"]))
    tokens, expected = rows_to_tokens(row[None])[0], given(states.tokens(SPEECH[:32_000]))
    assert (opened.width, tokens.shape) == (64 * 16, (64, 16))
    np.testing.assert_allclose(tokens[3], expected[12:16].mean(0), atol=1e-5)
    assert np.isfinite(tokens).all(axis=1).sum() == -(-len(expected) // 4)
    assert opened.extract(SPEECH[:300]) is None
    opened.close()


def test_encoder_version_names_its_weights(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Another folder of the same weights is the same version; other weights are another."""
    (moved := tmp_path / "moved").mkdir()
    for file in tiny["wavlm"].iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    here, there = SpeechEncoder(str(tiny["wavlm"])), SpeechEncoder(str(moved))
    assert (there.name, there.version) == ("moved", here.version)
    assert SpeechEncoder(str(tiny["wavlm"]), layers=1).version != here.version
    model = AutoModel.from_pretrained(moved)
    model.encoder.layers[0].attention.q_proj.weight.data[0, 0] += 1.0
    model.save_pretrained(moved)
    assert SpeechEncoder(str(moved)).version != here.version


def test_loading_an_encoder_is_silent(
    tiny: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed while loading: standard output belongs to the results."""
    before = logging.getLogger("transformers").level
    open_representation(str(tiny["data2vec"]))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == before


def test_a_folder_that_is_no_encoder(tmp_path: Path, tiny: dict[str, Path]) -> None:
    """An empty folder, and one with weights cut short, end in one line that names it."""
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in tiny["wav2vec2"].iterdir():
        (cut / file.name).write_bytes(file.read_bytes())
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for folder in (tmp_path, cut):
        with pytest.raises(ModelError, match=r"it needs config\.json") as raised:
            open_representation(str(folder))
        assert str(raised.value).startswith(f"speech encoder {folder}: ")
        assert "\n" not in str(raised.value)


def test_a_text_encoder_is_refused(tmp_path: Path) -> None:
    """A model that doesn't take audio is refused in one line."""
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a bert doesn't take raw audio; choose"):
        open_representation(str(tmp_path))


def test_an_encoder_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor downloadable, or no folder at all: one line that says what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not on this machine and can't be downloaded") as raised:
        open_representation("nobody/no-such-encoder")
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match="/no/such: there is no such folder"):
        open_representation("/no/such")


def test_a_device_that_is_not_there(tiny: dict[str, Path]) -> None:
    """A device that torch doesn't know ends in one line that names it."""
    with pytest.raises(ConfigError, match=r"^device nonsense: can't be used \(.*\); choose cpu$"):
        open_representation(str(tiny["wav2vec2"]), device="nonsense")


@pytest.mark.parametrize("name", ["vggish", "openl3"])
def test_representations_that_no_package_offers(name: str) -> None:
    """The paper's other two are refused in words, not looked for on a hub."""
    with pytest.raises(ModelError, match=f"^{name}: no maintained package offers it; choose"):
        open_representation(name)


def test_missing_parts_are_nan_where_widths_are_known() -> None:
    """Without widths, as in earlier bundles, an utterance that lacks a part has nothing."""
    one = np.ones(2, np.float32)
    joined = join_parts([one, None], (2, 3))
    assert joined is not None
    np.testing.assert_array_equal(joined, [1, 1, np.nan, np.nan, np.nan])
    assert join_parts([one, None], ()) is None
    assert join_parts([None, None], (2, 3)) is None
    rows = np.array([[1, np.nan, 2], [1, np.nan, np.nan]], np.float32)
    whole = without_incomplete(rows, (2, 1))
    assert np.isnan(whole).all(axis=1).tolist() == [False, True]


def test_the_columns_of_each_part_are_known() -> None:
    """Of a selection, and of components in the first part's place."""
    ones = np.ones(4, np.float32)
    scaling = Scaling(np.array([0, 2, 3, 5]), 0 * ones, ones)
    assert scaling.blocks((3, 3)) == (slice(0, 2), slice(2, 4))
    reduced = replace(scaling, components=np.ones((2, 1), np.float32))
    assert reduced.blocks((3, 3)) == (slice(0, 1), slice(1, 3))
