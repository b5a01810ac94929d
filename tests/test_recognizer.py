"""The recogniser: a dialogue classified utterance by utterance equals the dialogue at once."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RECORDINGS
from numpy.typing import NDArray
from recognizer_kit import (
    LABELS,
    SENTENCES,
    SIZES,
    TURNS,
    random_acoustic,
    save_bundle,
    settings,
    transcript,
)
from safetensors.torch import load, save

from stream_hbaf.audio.file import read_audio
from stream_hbaf.bundle import resolve_bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.config import SourceConfig, load_config
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import BundleError, ConfigError
from stream_hbaf.features.acoustic import Acoustic, AcousticExtractor
from stream_hbaf.features.baseline import Baseline
from stream_hbaf.features.commonsense import RELATIONS, Inferences
from stream_hbaf.features.ge2e import Ge2e
from stream_hbaf.features.prosody import PROSODY_WIDTH, Prosody, describe_prosody
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import EMPTY_WINDOW
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.live.utterance import LiveUtterance
from stream_hbaf.networks.calibration import MODALITIES, Calibration, Pattern, pattern_of
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.network import Features
from stream_hbaf.prediction import Prediction, TextFeatures, network_input
from stream_hbaf.publish.messages import encode
from stream_hbaf.recognizer import ENCODERS, Recognizer, open_front_end, require_live
from stream_hbaf.speech.segmenter import Finish

Float64 = NDArray[np.float64]

CALIBRATION = Calibration(
    temperatures={"": 0.3, "audio": 0.1, "text": 0.08, "audio+text": 0.2},
    thresholds={"": 0.0, "audio": 0.1, "text": 0.2, "audio+text": 0.3},
    answers_above={"": 1.0, "audio": 0.6, "text": 0.7, "audio+text": 0.5},
    risk=0.3,
)


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recognizer]:
    with Recognizer(save_bundle(tmp_path_factory.mktemp("reads"))) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def bimodal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recognizer]:
    """A recogniser of audio and text: its text alone gives joy, random audio any label."""
    config = HbafConfig(**SIZES, use_audio=True, audio_width=12, audio_skip=True)
    changes: dict[str, Any] = {"acoustic": "compare", "network": config, "calibration": CALIBRATION}
    place = tmp_path_factory.mktemp("hears")
    with Recognizer(save_bundle(place, labels=("anger", "joy", "neutral"), **changes)) as loaded:
        text = loaded.encode_text(transcript(SENTENCES[0]))
        features, network = network_input(loaded.bundle, None, text), loaded.bundle.network
        assert isinstance(network, HBAF)
        with torch.no_grad():
            logits, _ = network.step(features, network.initial_state())
            network.classifier.bias.add_(torch.tensor([0.0, 0.2, 0.0]) - logits)
        yield loaded


@pytest.fixture(scope="module")
def expected(recognizer: Recognizer) -> Float64:
    """Probabilities of the whole dialogue read at once, [U, C]."""
    bundle = recognizer.bundle
    text = bundle.encoder.encode_dialogues([TURNS])[0]
    inferred = bundle.commonsense.infer_texts(SENTENCES, features=text)
    features = Features(
        text=torch.from_numpy(text)[None], commonsense=torch.from_numpy(inferred)[None]
    )
    with torch.no_grad():
        logits: Float64 = bundle.network(features).logits[0].numpy()
    return bundle.calibration.probabilities(logits, pattern="text")


def classify_next(
    recognizer: Recognizer, dialogue: LiveDialogue, turn: int, *, audio: bool, text: bool
) -> Prediction:
    """Classify the next of SENTENCES and explain it, with or without its text and random audio."""
    spoken = transcript(SENTENCES[turn] if text else "")
    return recognizer.classify_final(
        acoustic=random_acoustic(turn) if audio else None,
        text=recognizer.encode_text(spoken, window=dialogue.window),
        dialogue=dialogue,
        explain=True,
    )


def shares(prediction: Prediction) -> dict[str, float]:
    assert prediction.contributions is not None
    contributions: dict[str, float] = prediction.contributions.model_dump()
    return contributions


def values(prediction: Prediction) -> list[float]:
    return [prediction.probabilities[label] for label in LABELS]


def test_utterance_by_utterance_equals_the_whole_dialogue(
    recognizer: Recognizer, expected: Float64
) -> None:
    """Words, commonsense and state: live gives what evaluation gives, through several windows."""
    dialogue, state, window = recognizer.new_dialogue(), None, EMPTY_WINDOW
    windows = []
    for turn, row in zip(TURNS, expected, strict=True):
        text = recognizer.encode_text(transcript(turn.text), speaker=turn.speaker, window=window)
        stepped, state = recognizer.classify(
            acoustic=None, text=text, state=state or dialogue.state
        )
        window = text.window_after
        windows.append(len(window.turns))
        np.testing.assert_allclose(values(stepped), row, atol=1e-5)
        assert stepped.modalities == ("text",)
    assert 1 < max(windows) < len(TURNS)


def test_provisional_predictions_change_nothing(recognizer: Recognizer, expected: Float64) -> None:
    """Partial transcripts are classified too, but the dialogue remembers final text only."""
    dialogue = recognizer.new_dialogue()
    for turn, row in zip(TURNS, expected, strict=True):
        for words in (turn.text[: len(turn.text) // 2], turn.text):
            text = recognizer.encode_text(
                transcript(words), speaker=turn.speaker, window=dialogue.window
            )
            recognizer.classify(acoustic=None, text=text, state=dialogue.state)
        final = recognizer.classify_final(
            acoustic=None, text=text, dialogue=dialogue, speaker=turn.speaker
        )
        np.testing.assert_allclose(values(final), row, atol=1e-5)


def test_text_encoded_too_early_is_encoded_again(recognizer: Recognizer, expected: Float64) -> None:
    """The text of an utterance may be encoded before the utterance before it is final."""
    dialogue = recognizer.new_dialogue()
    early = [recognizer.encode_text(transcript(t.text), speaker=t.speaker) for t in TURNS]
    for turn, text, row in zip(TURNS, early, expected, strict=True):
        final = recognizer.classify_final(
            acoustic=None, text=text, dialogue=dialogue, speaker=turn.speaker
        )
        np.testing.assert_allclose(values(final), row, atol=1e-5)


def test_an_utterance_without_words_leaves_the_window(recognizer: Recognizer) -> None:
    """A cough is an utterance, but nothing to be read before the next one."""
    dialogue = recognizer.new_dialogue()
    text = recognizer.encode_text(transcript("no !"), speaker="ross", window=dialogue.window)
    his: dict[str, Any] = {"acoustic": None, "dialogue": dialogue, "speaker": "ross"}
    recognizer.classify_final(text=text, **his)
    before = dialogue.window
    silent = recognizer.encode_text(transcript(""), speaker="ross", window=before)
    prediction = recognizer.classify_final(text=silent, **his)
    assert prediction.modalities == ()
    recognizer.classify_final(text=None, **his)
    assert dialogue.window == before != EMPTY_WINDOW
    assert dialogue.speakers == ["ross"]  # also where his transcript failed


def test_a_withheld_modality_is_as_if_it_were_not_there(bimodal: Recognizer) -> None:
    """Audio alone, text alone: the prediction without the other; withheld text is no context."""
    dialogue = bimodal.new_dialogue()
    text = bimodal.encode_text(transcript(SENTENCES[0]), window=dialogue.window)
    without = {"text": (random_acoustic(1), None), "audio": (None, text)}
    for modality, (acoustic, read) in without.items():
        kept = tuple(one for one in MODALITIES if one != modality)
        ours, alone = bimodal.new_dialogue(), bimodal.new_dialogue()
        withheld = bimodal.classify_final(
            acoustic=random_acoustic(1), text=text, dialogue=ours, explain=True, modalities=kept
        )
        assert withheld == bimodal.classify_final(
            acoustic=acoustic, text=read, dialogue=alone, explain=True
        )
        assert withheld.modalities == kept
        assert ours.window == alone.window
        assert (ours.window == EMPTY_WINDOW) == (modality == "text")


def test_text_that_the_bundle_cannot_read_is_published_only(recognizer: Recognizer) -> None:
    """The transcript stays as it is; the network isn't given it, and no later text either."""
    polish = Transcript(SENTENCES[0], "pl", avg_logprob=0.0, no_speech_prob=0.0)
    window = recognizer.encode_text(transcript(SENTENCES[1])).window_after
    text = recognizer.encode_text(polish, window=window)
    assert text.transcript == polish
    assert text.embedding is None
    assert text.commonsense is None
    assert text.window_after == window
    assert recognizer.encode_text(transcript(SENTENCES[0]), window=window).embedding is not None


def test_a_language_that_the_bundle_cannot_read_is_logged_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why the text doesn't count."""
    config = save_bundle(tmp_path)
    polish = config.transcript.model_copy(update={"language": "pl"})
    with Recognizer(config.model_copy(update={"transcript": polish})):
        pass
    assert "reads 'en' only: words in 'pl' are shown" in caplog.text


def test_a_bundle_of_text_needs_no_audio_features(recognizer: Recognizer) -> None:
    """Nothing is measured of the sound, and what is given is not used."""
    assert recognizer.acoustic is None
    assert recognizer.bundle.scaling is None


@pytest.mark.parametrize("acoustic", ["lld+ge2e", "egemaps", "facebook/wav2vec2-base"])
def test_a_bundle_whose_acoustic_input_is_not_live_is_refused(
    tmp_path: Path, acoustic: str
) -> None:
    """Before anything is loaded: which bundle, its acoustic input, and what to take instead."""
    network = HbafConfig(audio_width=9, text_width=16, commonsense_width=6, classes=3)
    config = save_bundle(tmp_path, acoustic=acoustic, network=network)
    with pytest.raises(
        BundleError, match=rf"bundle read: .*'{re.escape(acoustic)}'.*live-en"
    ) as raised:
        Recognizer(config)
    assert "\n" not in str(raised.value)


def test_a_bundle_that_sees_the_future_is_refused() -> None:
    """An offline network is for evaluation."""
    with pytest.raises(BundleError, match="bundle read: was trained offline"):
        require_live(settings("x", network=HbafConfig(mode="offline", use_audio=False)))


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "text", "pattern"),
    [
        (False, False, ""),
        (True, False, "audio"),
        (False, True, "text"),
        (True, True, "audio+text"),
    ],
)
def test_a_prediction_is_calibrated_by_what_it_was_given(
    bimodal: Recognizer, audio: bool, text: bool, pattern: Pattern
) -> None:
    """Temperature, set and silence are those of the modalities that were there."""
    abstained = set()
    for turn in range(len(SENTENCES)):
        prediction = classify_next(bimodal, bimodal.new_dialogue(), turn, audio=audio, text=text)
        assert "+".join(prediction.modalities) == pattern
        found = prediction.probabilities
        ranked = sorted(found, key=found.__getitem__, reverse=True)
        least = CALIBRATION.thresholds[pattern]
        assert prediction.labels_in_set == tuple(n for n in ranked if found[n] >= least)
        assert prediction.abstained == (found[ranked[0]] < CALIBRATION.answers_above[pattern])
        abstained.add(prediction.abstained)
    assert abstained == ({True} if pattern == "" else abstained)


def by_permutation(
    recognizer: Recognizer, features: Features, past: list[Features], label: str
) -> dict[str, float]:
    """What each part adds on average over its six orders, in float64, one single step each."""
    config = recognizer.bundle.config.network
    assert isinstance(config, HbafConfig)
    wide = HBAF(config).double().eval()
    wide.load_state_dict(recognizer.bundle.network.state_dict())
    state = wide.initial_state()
    for one in past:
        _, state = wide.step(one, state)
    column = recognizer.bundle.labels.index(label)

    def worth(parts: tuple[str, ...]) -> float:
        given = Features(
            audio=features.audio if "audio" in parts else None,
            text=features.text if "text" in parts else None,
            commonsense=features.commonsense if "text" in parts else None,
        )
        before = state if "context" in parts else wide.initial_state()
        logits = wide.step(given, before)[0].numpy()
        pattern = pattern_of(audio="audio" in parts, text="text" in parts)
        powers = np.exp(logits / CALIBRATION.temperatures[pattern])
        return float(powers[column] / powers.sum())

    added = dict.fromkeys(("audio", "text", "context"), 0.0)
    for order in permutations(added):
        for place, part in enumerate(order):
            added[part] += (worth(order[: place + 1]) - worth(order[:place])) / 6
    return added | {"sum": worth(("audio", "text", "context")) - worth(())}


def test_the_mean_of_whispers_encoder_is_part_of_the_acoustic_input(tmp_path: Path) -> None:
    """Such a bundle is given it beside the functionals; without either there is no audio."""
    network = HbafConfig(**SIZES, use_audio=True, audio_width=12)
    config = save_bundle(tmp_path, acoustic="compare+whisper:tiny.en", network=network)
    with Recognizer(config) as recognizer:
        columns = np.array([0, 1, 2, 6372, *range(6373, 6381)])  # both parts
        standard = Scaling(columns, np.zeros(12, np.float32), np.ones(12, np.float32))
        recognizer.bundle = replace(recognizer.bundle, scaling=standard)
        assert recognizer.transcriber.encoder_width == 384
        encoded = np.linspace(-1, 1, 384, dtype=np.float32)
        whole = recognizer.encode_text(replace(transcript(SENTENCES[0]), encoder_mean=encoded))
        lacking = recognizer.encode_text(transcript(SENTENCES[0]))
        given = network_input(recognizer.bundle, random_acoustic(0), whole).audio
        both = np.concatenate([random_acoustic(0).functionals, encoded])[columns]
        assert given is not None
        np.testing.assert_array_equal(given.numpy(), np.clip(both, -5, 5))
        acoustic = random_acoustic(0)
        lacks: list[tuple[Acoustic | None, TextFeatures | None]] = [
            (None, whole),
            (acoustic, lacking),
            (acoustic, None),
        ]
        for functionals, text in lacks:
            assert network_input(recognizer.bundle, functionals, text).audio is None


def test_blocks_of_whole_utterances_are_part_of_the_acoustic_input(tmp_path: Path) -> None:
    """Streamed with pauses they are what the utterance has at once; prosody is relative to the
    dialogue's past, and an utterance that lacks a block has no audio."""
    network = HbafConfig(**SIZES, use_audio=True, audio_width=256 + PROSODY_WIDTH)
    config = save_bundle(tmp_path, acoustic="prosody+ge2e", network=network)
    speech = read_audio(RECORDINGS / "jfk.flac")
    first, second = speech[:48_000], speech[48_000:96_000]
    with Recognizer(config) as recognizer:
        assert recognizer.acoustic is not None
        stream = recognizer.acoustic.open()
        for piece in np.array_split(first, 5):
            stream.feed(piece)
            stream.pause()  # more speech follows, but for the last time
        streamed, whole = stream.finish(), recognizer.acoustic.extract(first)
        assert streamed is not None
        assert whole is not None
        assert streamed.blocks.keys() == {"prosody", "ge2e"}
        for name, features in whole.blocks.items():
            np.testing.assert_array_equal(streamed.blocks[name], features)
        np.testing.assert_array_equal(whole.blocks["ge2e"], Ge2e().extract(first))

        inputs = given_to_the_network(recognizer)
        dialogue = recognizer.new_dialogue()
        for samples in (first, second):
            acoustic = recognizer.acoustic.extract(samples)
            recognizer.classify_final(acoustic=acoustic, text=None, dialogue=dialogue, speaker="a")
        measured = [Prosody().extract(samples) for samples in (first, second)]
        described = describe_prosody(np.array(measured), ["a", "a"])
        for given, row, samples in zip(inputs, described, (first, second), strict=True):
            embedding = Ge2e().extract(samples)
            assert embedding is not None
            expected = recognizer.bundle.scale(np.concatenate([row, embedding])[None])[0]
            np.testing.assert_array_equal(given, expected)
        lacking = replace(whole, blocks={"ge2e": whole.blocks["ge2e"]})
        assert network_input(recognizer.bundle, lacking, None).audio is None


def test_a_block_may_be_missing_and_others_are_relative_to_the_past(tmp_path: Path) -> None:
    """Where the bundle knows the parts' widths; what a later turn is relative to can be revised."""
    network = HbafConfig(**SIZES, use_audio=True, audio_width=256 + 4)
    config = save_bundle(
        tmp_path,
        acoustic="compare+ge2e",
        acoustic_widths=(6373, 256),
        baseline={"parts": ["compare"], "prior": 2.0},
        network=network,
    )
    with Recognizer(config) as recognizer:
        columns = np.array([0, 1, 2, 3, *range(6373, 6629)])
        zeros, ones = np.zeros(260, np.float32), np.ones(260, np.float32)
        recognizer.bundle = replace(recognizer.bundle, scaling=Scaling(columns, zeros, ones))
        inputs = given_to_the_network(recognizer)
        dialogue = recognizer.new_dialogue()
        sounds = [random_acoustic(n) for n in range(3)]
        embedding = np.full(256, 0.5, np.float32)
        sounds[1] = replace(sounds[1], blocks={"ge2e": embedding})
        for turn, acoustic in enumerate(sounds, start=1):
            recognizer.classify_final(
                acoustic=acoustic, text=None, dialogue=dialogue, speaker="a", turn=turn
            )
        measured = np.clip([sound.functionals[:4] for sound in sounds], -5, 5)
        baseline = Baseline(np.ones(4, bool), prior=2.0)
        expected = baseline.relative_dialogues(measured[None], np.ones((1, 3), bool), None)[0]
        np.testing.assert_allclose([row[:4] for row in inputs], expected, atol=1e-5)
        assert [bool(row[4:].any()) for row in inputs] == [False, True, False]
        np.testing.assert_array_equal(inputs[1][4:], embedding)
        inputs.clear()
        recognizer.revise(dialogue, {2: "b"})
        np.testing.assert_allclose(inputs[0][:4], measured[1], atol=1e-5)


def test_a_bundle_does_without_an_encoder_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says what is missing and how to get it; earlier bundles need every part."""
    monkeypatch.setitem(ENCODERS, "ge2e", (lambda: None, "pip install it"))
    network = HbafConfig(**SIZES, use_audio=True, audio_width=260)
    settings = {"id": "x", "labels": LABELS, "encoder": "e", "acoustic": "compare+ge2e"}
    config = BundleConfig(**settings, network=network, acoustic_widths=(6373, 256))
    front_end = open_front_end(config, device="cpu")
    assert front_end is not None
    front_end.close()
    assert isinstance(front_end, AcousticExtractor)
    assert "listens with ge2e, whose weights are missing" in caplog.text
    assert "pip install it" in caplog.text


def given_to_the_network(recognizer: Recognizer) -> list[NDArray[np.float32]]:
    """The acoustic inputs of the network's steps from now on."""
    inputs: list[NDArray[np.float32]] = []
    network = recognizer.bundle.network
    step = network.step

    def watched(features: Features, state: Any) -> Any:
        assert features.audio is not None
        inputs.append(features.audio[-1].numpy())
        return step(features, state)

    network.step = watched  # type: ignore[method-assign]
    return inputs


def test_contributions_are_shapley_values(bimodal: Recognizer) -> None:
    """To 1e-5 the mean over all orders of what each part adds, computed the long way in float64."""
    dialogue = bimodal.new_dialogue()
    past: list[Features] = []
    for turn in range(4):
        text = bimodal.encode_text(transcript(SENTENCES[turn]), window=dialogue.window)
        assert text.embedding is not None
        assert text.commonsense is not None
        features = Features(
            audio=torch.from_numpy(
                bimodal.bundle.scale(random_acoustic(turn).functionals[None])[0]
            ),
            text=torch.from_numpy(text.embedding),
            commonsense=torch.from_numpy(text.commonsense),
        ).map(torch.Tensor.double)
        prediction = classify_next(bimodal, dialogue, turn, audio=True, text=True)
        expected = by_permutation(bimodal, features, past, prediction.label)
        found = shares(prediction)
        assert sum(found.values()) == pytest.approx(expected.pop("sum"), abs=1e-5)
        assert found == pytest.approx(expected, abs=1e-5)
        past.append(features)
    assert min(map(abs, found.values())) > 1e-3


@pytest.mark.parametrize(("audio", "text"), [(True, True), (True, False), (False, True)])
def test_what_is_not_there_adds_exactly_nothing(
    bimodal: Recognizer, audio: bool, text: bool
) -> None:
    """A missing modality, and the past of a dialogue's first utterance."""
    dialogue = bimodal.new_dialogue()
    first, second = (classify_next(bimodal, dialogue, n, audio=audio, text=text) for n in (0, 1))
    assert [name for name, share in shares(first).items() if share == 0.0] == (
        ["audio"] * (not audio) + ["text"] * (not text) + ["context"]
    )
    assert [name for name, share in shares(second).items() if share == 0.0] == (
        ["audio"] * (not audio) + ["text"] * (not text)
    )


def test_without_any_input_nothing_contributes(bimodal: Recognizer) -> None:
    """Without audio, text and context there is a guess, and it is abstained."""
    prediction = classify_next(bimodal, bimodal.new_dialogue(), 0, audio=False, text=False)
    assert shares(prediction) == {"audio": 0.0, "text": 0.0, "context": 0.0}
    assert prediction.abstained
    assert set(prediction.labels_in_set) == {"anger", "joy", "neutral"}


def test_explaining_changes_neither_prediction_nor_state(bimodal: Recognizer) -> None:
    """State and probabilities are the same to 1e-5, and only an explanation has shares."""
    dialogue = bimodal.new_dialogue()
    classify_next(bimodal, dialogue, 0, audio=True, text=True)
    text = bimodal.encode_text(transcript(SENTENCES[1]), window=dialogue.window)
    given: dict[str, Any] = {"acoustic": random_acoustic(1), "text": text, "state": dialogue.state}
    plain, after = bimodal.classify(**given)
    explained, same = bimodal.classify(**given, explain=True)
    assert explained.probabilities == pytest.approx(plain.probabilities, abs=1e-5)
    for name, part in after.tensors().items():
        torch.testing.assert_close(same.tensors()[name], part, atol=1e-5, rtol=0)
    assert (plain.contributions, plain.conflict) == (None, None)


def test_conflict_is_audio_alone_against_text_alone(bimodal: Recognizer) -> None:
    """Each read alone, with the same past; opposite and sure, else there is none."""
    dialogue, conflicts = bimodal.new_dialogue(), []
    classify_next(bimodal, dialogue, 0, audio=True, text=True)
    for seed in range(42):
        spoken = transcript(SENTENCES[seed % len(SENTENCES)])
        text = bimodal.encode_text(spoken, window=dialogue.window)
        state, acoustic = dialogue.state, random_acoustic(seed)
        audio, _ = bimodal.classify(acoustic=acoustic, text=None, state=state)
        alone, _ = bimodal.classify(acoustic=None, text=text, state=state)
        both, _ = bimodal.classify(acoustic=acoustic, text=text, state=state, explain=True)
        opposite = {audio.label, alone.label} == {"anger", "joy"}
        sure = all(max(p.probabilities.values()) >= 0.5 for p in (audio, alone))
        assert both.conflict == (opposite and sure)
        conflicts.append(both.conflict)
    assert 0 < sum(conflicts) < len(conflicts)


@pytest.mark.parametrize(("audio", "text"), [(True, False), (False, True), (False, False)])
def test_one_modality_cannot_contradict_itself(
    bimodal: Recognizer, audio: bool, text: bool
) -> None:
    """Whether there is a conflict isn't known then."""
    assert (
        classify_next(bimodal, bimodal.new_dialogue(), 1, audio=audio, text=text).conflict is None
    )


def test_fields_of_an_end_event(bimodal: Recognizer) -> None:
    """An ``end`` has exactly these fields; a provisional emotion has no contributions."""
    dialogue = bimodal.new_dialogue()
    text = bimodal.encode_text(transcript(SENTENCES[0]))
    given: dict[str, Any] = {"acoustic": random_acoustic(0), "text": text, "state": dialogue.state}
    explained, _ = bimodal.classify(**given, explain=True)
    source = SourceConfig(name="m")
    utterance = LiveUtterance(bimodal, source, dialogue=dialogue, turn=1, start=0, started_at=0.0)
    utterance.finish = Finish(
        0, 16000, "silence", confirmed_at=24000, mean_score=0.9, speech_end=15000
    )
    end = utterance.event("end", text=text, prediction=explained, now=1.0)
    fields = json.loads(encode(end))
    assert list(fields) == [
        *("schema", "id", "rev", "type", "source", "dialogue_id", "turn", "speaker"),
        *("speaker_source", "start_time", "end_time", "audio_start_ms", "audio_end_ms"),
        *(
            "trigger",
            "text",
            "language",
            "asr",
            "modalities",
            "emotion",
            "contributions",
            "conflict",
        ),
        *("degraded", "latency_ms", "model"),
    ]
    emotion = ["label", "score", "abstained", "set", "probabilities", "affect"]
    assert list(fields["emotion"]) == emotion
    assert fields["emotion"]["set"] == list(explained.labels_in_set)
    assert fields["emotion"]["abstained"] is explained.abstained
    assert fields["contributions"] == pytest.approx(shares(explained), abs=1e-4)
    assert fields["conflict"] is explained.conflict
    provisional, _ = bimodal.classify(**given)
    update = utterance.event("update", text=text, prediction=provisional)
    assert not {"contributions", "conflict"} & set(json.loads(encode(update)))
    partial = json.loads(encode(utterance.partial(text=text, prediction=provisional)))
    assert partial["emotion"] == fields["emotion"]
    assert "contributions" not in partial


# --- inferences ---------------------------------------------------------------------------------


def made_up_inferences() -> Inferences:
    """Forty phrases a relation, "to" included, each of its own direction and frequency."""
    written = {
        relation: {f"to {relation} {'i' * n}": n for n in range(1, 41)} for relation in RELATIONS
    }

    def encode_phrases(phrases: Sequence[str]) -> NDArray[np.float32]:
        return np.array([np.random.default_rng(len(p)).normal(size=6) for p in phrases], np.float32)

    return Inferences.choose(written, encode_phrases=encode_phrases, temperature=0.05)


@pytest.fixture(scope="module")
def inferring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recognizer]:
    config = save_bundle(tmp_path_factory.mktemp("infers"), inferences=made_up_inferences())
    with Recognizer(config.model_copy(update={"inferences": True})) as loaded:
        yield loaded


def likeliest(inferred: NDArray[np.float32]) -> dict[str, list[str]]:
    """The three phrases of each relation that score best, computed the long way."""
    phrases = {}
    for relation, direction in zip(RELATIONS, inferred, strict=True):
        known = made_up_inferences().relations[relation]
        scores = {
            text: sum(float(a) * float(b) for a, b in zip(row, direction, strict=True)) + prior
            for text, row, prior in zip(known.texts, known.embeddings, known.prior, strict=True)
        }
        phrases[relation] = sorted(scores, key=scores.__getitem__, reverse=True)[:3]
    return phrases


def test_inferences_are_those_of_the_final_text(inferring: Recognizer) -> None:
    """Of text encoded too early they are those of the text with its context."""
    dialogue, window, changed = inferring.new_dialogue(), EMPTY_WINDOW, 0
    for turn in TURNS:
        early = inferring.encode_text(transcript(turn.text), speaker=turn.speaker)
        read = inferring.encode_text(transcript(turn.text), speaker=turn.speaker, window=window)
        window = read.window_after
        final = inferring.classify_final(
            acoustic=None, text=early, dialogue=dialogue, speaker=turn.speaker, explain=True
        )
        assert final.inferences is not None
        assert read.commonsense is not None
        assert early.commonsense is not None
        assert final.inferences.model_dump() == likeliest(read.commonsense)
        changed += likeliest(early.commonsense) != likeliest(read.commonsense)
    assert changed


def test_nothing_is_inferred_without_text(inferring: Recognizer) -> None:
    """Zeros would say the most frequent phrases; a provisional emotion says none either."""
    dialogue = inferring.new_dialogue()
    for text in (None, inferring.encode_text(transcript(""))):
        given: dict[str, Any] = {"acoustic": None, "text": text, "dialogue": dialogue}
        assert inferring.classify_final(**given, explain=True).inferences is None
    text = inferring.encode_text(transcript(SENTENCES[0]))
    provisional, _ = inferring.classify(acoustic=None, text=text, state=dialogue.state)
    assert provisional.inferences is None


def test_inferences_are_given_only_if_asked_for(tmp_path: Path) -> None:
    """A bundle that has phrases keeps them to itself by default."""
    with Recognizer(save_bundle(tmp_path, inferences=made_up_inferences())) as recognizer:
        prediction = classify_next(recognizer, recognizer.new_dialogue(), 0, audio=False, text=True)
    assert prediction.contributions is not None
    assert prediction.inferences is None


def test_inferences_that_the_bundle_has_no_phrases_for_are_refused(tmp_path: Path) -> None:
    """In one line: which bundle, and what to do."""
    config = save_bundle(tmp_path).model_copy(update={"inferences": True})
    with pytest.raises(ConfigError, match=r"read has no phrases.*leave --inferences out") as raised:
        Recognizer(config)
    assert "\n" not in str(raised.value)


def test_the_published_digest_tells_another_speech_recogniser(recognizer: Recognizer) -> None:
    """The bundle is the same; what writes the words takes part, so the digest changes."""
    transcript = recognizer.config.transcript.model_copy(update={"model": "tiny.en"})
    config = recognizer.config.model_copy(update={"transcript": transcript})
    with Recognizer(config) as other:
        assert other.bundle.sha256 == recognizer.bundle.sha256
        assert other.model.id == recognizer.model.id
        assert other.model.sha256 != recognizer.model.sha256


def test_a_bundle_whose_features_are_not_those_here_is_refused(tmp_path: Path) -> None:
    """At the start, not at the first utterance: here it takes a column that openSMILE hasn't."""
    folder = shutil.copytree(resolve_bundle("live-en"), tmp_path / "b")
    weights = folder / "model.safetensors"
    tensors = load(weights.read_bytes())
    tensors["acoustic.selected"][0] = 60_000
    weights.write_bytes(save(tensors))
    names = ("config.yaml", "model.safetensors")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in names))
    config = load_config(overrides={"model": str(folder), "device": "cpu"})
    with pytest.raises(BundleError, match=r"takes other features than 'compare\+campplus\+"):
        Recognizer(config)
