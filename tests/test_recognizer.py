"""Promises of the one path: a dialogue told utterance by utterance is the dialogue read whole."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoder import save_tiny_bert

from stream_hbaf.bundle import Bundle, BundleConfig, Scaling
from stream_hbaf.config import Config
from stream_hbaf.errors import BundleError
from stream_hbaf.features.commonsense import Event2MindHeads
from stream_hbaf.features.context import EMPTY_WINDOW, ContextConfig, Turn
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.features.transcript import Transcript
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.state import Features
from stream_hbaf.recognizer import Prediction, Recognizer, require_live

LABELS = ("angry", "happy", "sad")
CONTEXT = ContextConfig(tokens=24, speakers=True)
SAID = (
    "i can't believe it !",
    "no , you never came home",
    "what ? joey left",
    "so sad . the friend is great",
    "always work",
    "are you angry ?",
    "well , i am happy today",
)
TURNS = [Turn(("ross", "rachel")[n % 2], text) for n, text in enumerate(SAID)]


def settings(encoder: str, **changes: object) -> BundleConfig:
    network = HbafConfig(
        text_width=16,
        commonsense_width=6,
        classes=3,
        hidden=16,
        heads=2,
        layers=1,
        filters=4,
        window=3,
        use_audio=False,
    )
    fields = {"acoustic": "none", "context": CONTEXT, "network": network, **changes}
    return BundleConfig(id="read", labels=LABELS, encoder=encoder, **fields)


def save_bundle(place: Path, **changes: object) -> Config:
    """The settings of a recogniser whose bundle has a tiny encoder."""
    (place / "encoder").mkdir()
    torch.manual_seed(0)
    encoder = TextEncoder(str(save_tiny_bert(place / "encoder")), context=CONTEXT)
    config = settings(encoder.id, **changes)
    heads = Event2MindHeads(text_width=16, width=6, hidden=8)
    width = config.network.audio_width
    scaling = Scaling(np.arange(width), np.zeros(width, np.float32), np.ones(width, np.float32))
    kept = scaling if config.network.use_audio else None
    bundle = Bundle(config, kept, encoder, heads, HBAF(config.network))
    bundle.save(place / "bundle", metrics={}, card="")
    return Config(model=str(place / "bundle"))


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory) -> Iterator[Recognizer]:
    with Recognizer(save_bundle(tmp_path_factory.mktemp("reads"))) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(recognizer) -> np.ndarray:
    """Probabilities of the whole dialogue read at once, [U, C]."""
    bundle = recognizer.bundle
    text = bundle.encoder.encode_dialogue(TURNS)
    inferred = bundle.commonsense.infer_texts(SAID, features=text)
    features = Features(
        text=torch.from_numpy(text)[None], commonsense=torch.from_numpy(inferred)[None]
    )
    with torch.no_grad():
        return bundle.probabilities(bundle.network(features).logits[0].numpy())


def transcript(text: str) -> Transcript:
    return Transcript(text, "en", avg_logprob=0.0, no_speech_prob=0.0)


def values(prediction: Prediction) -> list[float]:
    return [prediction.probabilities[label] for label in LABELS]


def test_utterance_by_utterance_equals_the_whole_dialogue(recognizer, expected):
    """Words, commonsense and state: live gives what evaluation gives, through several windows."""
    dialogue, state, window = recognizer.dialogue(), None, EMPTY_WINDOW
    windows = []
    for turn, row in zip(TURNS, expected, strict=True):
        words = recognizer.understand(transcript(turn.text), speaker=turn.speaker, window=window)
        stepped, state = recognizer.classify(
            acoustic=None, words=words, state=state or dialogue.state
        )
        window = words.after
        windows.append(len(window.turns))
        np.testing.assert_allclose(values(stepped), row, atol=1e-5)
        assert stepped.modalities == ("text",)
    assert 1 < max(windows) < len(TURNS)


def test_provisional_predictions_change_nothing(recognizer, expected):
    """Running transcripts are read and told, and the dialogue remembers final words only."""
    dialogue = recognizer.dialogue()
    for turn, row in zip(TURNS, expected, strict=True):
        for text in (turn.text[: len(turn.text) // 2], turn.text):
            words = recognizer.understand(
                transcript(text), speaker=turn.speaker, window=dialogue.window
            )
            recognizer.classify(acoustic=None, words=words, state=dialogue.state)
        final = recognizer.conclude(acoustic=None, words=words, dialogue=dialogue)
        np.testing.assert_allclose(values(final), row, atol=1e-5)


def test_words_read_too_early_are_read_again(recognizer, expected):
    """The words of an utterance may be ready before the one before it is concluded."""
    dialogue = recognizer.dialogue()
    early = [recognizer.understand(transcript(t.text), speaker=t.speaker) for t in TURNS]
    for words, row in zip(early, expected, strict=True):
        final = recognizer.conclude(acoustic=None, words=words, dialogue=dialogue)
        np.testing.assert_allclose(values(final), row, atol=1e-5)


def test_an_utterance_without_words_leaves_the_window(recognizer):
    """A cough is an utterance, but nothing to be read before the next one."""
    dialogue = recognizer.dialogue()
    words = recognizer.understand(transcript("no !"), speaker="ross", window=dialogue.window)
    recognizer.conclude(acoustic=None, words=words, dialogue=dialogue)
    before = dialogue.window
    silent = recognizer.understand(transcript(""), speaker="ross", window=before)
    prediction = recognizer.conclude(acoustic=None, words=silent, dialogue=dialogue)
    assert prediction.modalities == ()
    recognizer.conclude(acoustic=None, words=None, dialogue=dialogue)
    assert dialogue.window == before != EMPTY_WINDOW


def test_a_bundle_of_words_needs_no_sound_features(recognizer):
    """Nothing is measured of the sound, and what is given is not used."""
    assert recognizer.acoustic is None
    assert recognizer.bundle.scaling is None


@pytest.mark.parametrize("acoustic", ["prosody", "egemaps", "facebook/wav2vec2-base"])
def test_a_bundle_that_cannot_hear_live_is_refused(tmp_path, acoustic):
    """Before anything is loaded: which bundle, what it hears, and what to take instead."""
    hears = HbafConfig(audio_width=9, text_width=16, commonsense_width=6, classes=3)
    config = save_bundle(tmp_path, acoustic=acoustic, network=hears)
    with pytest.raises(BundleError, match=rf"bundle read: hears '{acoustic}'.*live-en-0") as told:
        Recognizer(config)
    assert "\n" not in str(told.value)


def test_a_bundle_that_sees_the_future_is_refused():
    """An offline network is for evaluation."""
    with pytest.raises(BundleError, match="bundle read: was trained offline"):
        require_live(settings("x", network=HbafConfig(mode="offline", use_audio=False)))
