"""Tokens of audio and of text, the input of networks that align them."""

from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import save_tiny_bert

from stream_hbaf.audio.file import read_audio
from stream_hbaf.features.acoustic import AcousticExtractor
from stream_hbaf.features.representations import (
    MAX_TOKENS,
    Scaling,
    frames_to_tokens,
    open_representation,
    rows_to_tokens,
    tokens_to_row,
)
from stream_hbaf.features.text import (
    EMPTY_WINDOW,
    MAX_TEXT_TOKENS,
    ContextConfig,
    TextEncoder,
    Turn,
)
from stream_hbaf.training.audio_features import scale, select_features

RECORDING = Path(__file__).parent / "recordings"
TEXTS = ["i can't believe it !", "no", "are you angry ? well , i am happy today"]
LONG = " ".join(["joey left home today"] * 20)


def test_a_token_is_the_mean_of_eighty_milliseconds() -> None:
    """Eight frames of 10 ms each, in order; the last token has what is left."""
    frames = np.arange(20.0)[:, None] * [1.0, -2.0]
    tokens = frames_to_tokens(frames, frame_ms=10)
    assert tokens.tolist() == [[3.5, -7.0], [11.5, -23.0], [17.5, -35.0]]
    assert frames_to_tokens(frames, frame_ms=20).shape == (5, 2)
    assert frames_to_tokens(frames[:0], frame_ms=10).shape == (0, 2)


@pytest.mark.parametrize(("frames", "tokens"), [(512, 64), (513, 57), (3_000, 64)])
def test_a_long_utterance_has_longer_tokens_instead_of_more(frames: int, tokens: int) -> None:
    """Never more than 64, and none of the audio is left out."""
    found = frames_to_tokens(np.ones((frames, 1)), frame_ms=10)
    assert found.shape == (tokens, 1)
    assert len(found) <= MAX_TOKENS
    assert (found == 1.0).all()


def test_a_missing_value_is_left_out_of_the_mean() -> None:
    """The mean is of the frames that have the value; without any it is NaN."""
    frames = np.array([[1.0, np.nan]] * 4 + [[3.0, np.nan]] * 4)
    frames[0, 0] = np.nan
    token = frames_to_tokens(frames, frame_ms=10)[0]
    assert token[0] == pytest.approx(15 / 7)
    assert np.isnan(token[1])


def test_rows_of_a_cache_are_the_tokens_again() -> None:
    """What is cached as one vector for each utterance comes back as tokens."""
    short, full = np.ones((3, 2), np.float32), np.full((MAX_TOKENS, 2), 2.0, np.float32)
    back = rows_to_tokens(np.stack([tokens_to_row(short), tokens_to_row(full)]))
    assert back.shape == (2, MAX_TOKENS, 2)
    assert np.array_equal(back[0, :3], short)
    assert np.isnan(back[0, 3:]).all()
    assert np.array_equal(back[1], full)


def test_low_level_descriptors_of_a_recording_become_its_tokens() -> None:
    """The representation "lld" is openSMILE's own rows, averaged."""
    samples = read_audio(next(RECORDING.glob("*.flac")))[:32_000]
    extractor, representation = AcousticExtractor(), open_representation("lld")
    try:
        acoustic = extractor.extract(samples)
        row = representation.extract(samples)
        assert acoustic is not None
        assert row is not None
        tokens = rows_to_tokens(row[None])[0]
        assert tokens.shape == (MAX_TOKENS, 65)
        assert representation.extract(samples[:200]) is None
    finally:
        extractor.close()
        representation.close()
    np.testing.assert_allclose(tokens[2], acoustic.lld[16:24].mean(0), rtol=1e-4, atol=1e-5)
    assert np.isnan(tokens[-(-len(acoustic.lld) // 8) :]).all()


def test_scaling_never_makes_a_token_of_none() -> None:
    """Each column by its own mean and deviation over all tokens; absent ones stay absent."""
    draw = np.random.default_rng(0)
    measured = (5 + 3 * draw.standard_normal((6, 4, 2))).astype(np.float32)
    measured[1, 2:] = np.nan
    measured[3] = np.nan
    scaling = select_features(measured, np.zeros(6, np.int64), None)
    scaled = scale(scaling, measured)
    assert np.array_equal(np.isnan(scaled), np.isnan(measured))
    np.testing.assert_allclose(np.nanmean(scaled, axis=(0, 1)), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(scaled, axis=(0, 1)), 1.0, atol=1e-5)
    assert isinstance(scaling, Scaling)


@pytest.fixture(scope="module", params=[0, 40], ids=["alone", "in its dialogue"])
def encoders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextEncoder, TextEncoder]:
    """One of means and one of tokens, with the same weights."""
    folder = str(save_tiny_bert(tmp_path_factory.mktemp("encoder")))
    context = ContextConfig(tokens=request.param, speakers=True)
    mean, tokens = (TextEncoder(folder, context=context, tokens=kind) for kind in (False, True))
    return mean, tokens


def test_the_mean_of_text_tokens_is_the_text_feature(
    encoders: tuple[TextEncoder, TextEncoder],
) -> None:
    """Both come from the same states; of 32 tokens or fewer none is lost."""
    mean, tokens = encoders
    turns = [Turn("ross", text) for text in TEXTS]
    of_tokens = tokens.encode_dialogues([turns])[0]
    assert of_tokens.shape == (3, MAX_TEXT_TOKENS, 16)
    expected = mean.encode_dialogues([turns])[0]
    np.testing.assert_allclose(np.nanmean(of_tokens, axis=1), expected, atol=1e-5)


def test_text_tokens_turn_by_turn_are_those_of_the_whole_dialogue(
    encoders: tuple[TextEncoder, TextEncoder],
) -> None:
    """Live and in training the network gets the same tokens."""
    _, tokens = encoders
    turns = [Turn(("ross", "joey")[n % 2], text) for n, text in enumerate([*TEXTS, LONG])]
    whole, window = tokens.encode_dialogues([turns])[0], EMPTY_WINDOW
    for n, turn in enumerate(turns):
        found, window = tokens.encode_next(turn, window)
        np.testing.assert_allclose(found, whole[n], atol=1e-5)
    assert np.isfinite(whole[3]).all()  # a long turn fills all of its places, and is cut there
