"""All kinds of networks in a bundle and in the recogniser."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recognizer_kit import CONTEXT, SENTENCES, TURNS, random_acoustic, transcript
from tiny_encoder import save_tiny_bert

from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.config import Config
from stream_hbaf.errors import BundleError, ConfigError, ModelError
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.commonsense import NoCommonsense
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.networks.network import NetworkConfig
from stream_hbaf.networks.registry import NETWORKS, build, read_network
from stream_hbaf.recognizer import Recognizer, require_live

WIDTHS = {"audio_width": 65, "text_width": 16, "commonsense_width": 1, "classes": 3}
SIZES = {"hidden": 16, "heads": 2}
BOTH_WAYS = ("hbaf", "bc-lstm", "dialogue-rnn", "mamba")
FORMS = [
    (kind, mode)
    for kind, (config, _) in NETWORKS.items()
    for mode in (("live", "offline") if kind in BOTH_WAYS else (config().mode,))
]
LIVE = [kind for kind, mode in FORMS if mode == "live"]


def configured(kind: str, mode: str = "live") -> NetworkConfig:
    known = NETWORKS[kind][0].__dataclass_fields__
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return read_network({"kind": kind, "mode": mode, **WIDTHS, **sizes})


def saved(kind: str, place: Path, *, mode: str = "live", acoustic: str = "") -> Config:
    """The settings of a recogniser whose bundle has a network of that kind."""
    (place / "encoder").mkdir()
    network = configured(kind, mode)
    tokens = network.takes_tokens
    encoder = TextEncoder(
        str(save_tiny_bert(place / "encoder")), context=CONTEXT, tokens=network.takes_tokens
    )
    config = BundleConfig(
        id=kind,
        labels=("anger", "joy", "sadness"),
        encoder=encoder.id,
        context=CONTEXT,
        acoustic=acoustic or ("lld" if tokens else "compare"),
        commonsense="none",
        network=network,
    )
    columns = np.arange(65)
    scaling = Scaling(columns, np.zeros(65, np.float32), np.ones(65, np.float32))
    torch.manual_seed(0)
    bundle = Bundle(config, scaling, encoder, NoCommonsense(1), build(network).eval())
    bundle.save(place / "bundle", metrics={}, card="")
    return Config(model=str(place / "bundle"))


def acoustic_of(turn: int) -> Acoustic:
    """Random functionals, and descriptors of one second."""
    lld = np.random.default_rng(turn).standard_normal((100, 65)).astype(np.float32)
    return replace(random_acoustic(turn), lld=lld)


@pytest.mark.parametrize(("kind", "mode"), FORMS)
def test_a_bundle_of_any_network_is_what_was_saved(kind: str, mode: str, tmp_path: Path) -> None:
    """Settings and weights come back."""
    settings = saved(kind, tmp_path, mode=mode)
    loaded = Bundle.load(settings.model)
    assert loaded.config.network == configured(kind, mode)
    assert type(loaded.network) is NETWORKS[kind][1]
    torch.manual_seed(0)
    drawn = build(loaded.config.network).state_dict()
    for name, tensor in loaded.network.state_dict().items():
        torch.testing.assert_close(tensor, drawn[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind, mode in FORMS if mode == "offline"])
def test_an_offline_network_refuses_live_use(kind: str, tmp_path: Path) -> None:
    """Before anything is loaded, in one line; and it has no state to begin a dialogue with."""
    network = configured(kind, "offline")
    config = BundleConfig(id="x", labels=("a", "b", "c"), encoder="x", network=network)
    with pytest.raises(BundleError, match="was trained offline and sees the future"):
        require_live(config)
    with pytest.raises(ModelError, match="sees the future"):
        build(network).initial_state()


@pytest.mark.parametrize("kind", LIVE)
def test_every_live_network_runs_in_the_recogniser(kind: str, tmp_path: Path) -> None:
    """Turns of audio and text, some without one of them, have probabilities and contributions."""
    with Recognizer(saved(kind, tmp_path)) as recognizer:
        dialogue, found = recognizer.new_dialogue(), []
        for turn, sentence in enumerate(SENTENCES):
            text = recognizer.encode_text(
                transcript("" if turn == 3 else sentence),
                speaker=TURNS[turn].speaker,
                window=dialogue.window,
            )
            acoustic = None if turn == 4 else acoustic_of(turn)
            provisional, _ = recognizer.classify(acoustic=None, text=text, state=dialogue.state)
            final = recognizer.classify_final(
                acoustic=acoustic,
                text=text,
                dialogue=dialogue,
                speaker=TURNS[turn].speaker,
                explain=True,
            )
            assert sum(provisional.probabilities.values()) == pytest.approx(1.0)
            assert final.contributions is not None
            found.append((final.modalities, tuple(final.probabilities.values())))
        assert dialogue.speakers == ["ross", "rachel"]
        assert [modalities for modalities, _ in found][2:5] == [
            ("audio", "text"),
            ("audio",),
            ("text",),
        ]
        assert len({probabilities for _, probabilities in found}) == len(SENTENCES)


def test_the_speaker_matters_to_a_network_that_tracks_speakers(tmp_path: Path) -> None:
    """The speaker's number changes the result of DialogueRNN, and not that of HBAF."""
    moved = {}
    for kind in ("dialogue-rnn", "hbaf"):
        place = tmp_path / kind
        place.mkdir()
        with Recognizer(saved(kind, place)) as recognizer:
            found = []
            for second in ("ross", "rachel"):
                dialogue = recognizer.new_dialogue()
                for speaker in ("ross", second, "ross"):
                    # Read without names or context: only the number of the speaker differs.
                    text = recognizer.encode_text(transcript(SENTENCES[0]))
                    final = recognizer.classify_final(
                        acoustic=acoustic_of(0),
                        text=replace(
                            text,
                            window_before=dialogue.window,
                            window_after=dialogue.window,
                            speaker=speaker,
                        ),
                        dialogue=dialogue,
                        speaker=speaker,
                    )
                found.append(list(final.probabilities.values()))
            moved[kind] = float(np.abs(np.subtract(found[0], found[1])).max())
    assert moved["hbaf"] == 0.0
    assert moved["dialogue-rnn"] > 1e-6


def test_mgcma_takes_tokens_of_low_level_descriptors(tmp_path: Path) -> None:
    """Other descriptors change the result, other functionals don't."""
    with Recognizer(saved("mgcma", tmp_path)) as recognizer:
        state = recognizer.new_dialogue().state
        first, _ = recognizer.classify(acoustic=acoustic_of(0), text=None, state=state)
        other, _ = recognizer.classify(acoustic=acoustic_of(1), text=None, state=state)
        same, _ = recognizer.classify(
            acoustic=replace(acoustic_of(0), functionals=acoustic_of(1).functionals),
            text=None,
            state=state,
        )
    assert first == same
    assert first.probabilities != other.probabilities


def test_functionals_are_one_token_for_mgcma(tmp_path: Path) -> None:
    """Trained on one vector for each utterance, it gets one vector live."""
    with Recognizer(saved("mgcma", tmp_path, acoustic="compare")) as recognizer:
        state = recognizer.new_dialogue().state
        first, _ = recognizer.classify(acoustic=acoustic_of(0), text=None, state=state)
        other, _ = recognizer.classify(acoustic=acoustic_of(1), text=None, state=state)
    assert first.modalities == ("audio",)
    assert first.probabilities != other.probabilities


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "lstm"}, "there is no network 'lstm'; choose hbaf, mgcma, bc-lstm"),
        ({"kind": "mmgcn", "window": 4}, "there is no setting 'window' of the network"),
        ({"kind": "mmgcn", "mode": "live"}, "mmgcn sees the whole dialogue"),
        ({"kind": "cmn", "mode": "offline"}, "cmn never looks ahead"),
        ({"kind": "mgcma", "hidden": "wide"}, "'hidden': Input should be a valid integer"),
    ],
)
def test_a_setting_that_a_network_cannot_have_is_named(
    settings: dict[str, object], complaint: str
) -> None:
    """Unknown kinds, unknown names and invalid values, in one line."""
    with pytest.raises(ConfigError, match=complaint):
        read_network(settings)


def test_settings_without_a_kind_are_hbafs() -> None:
    """A bundle or recipe that names no kind has HBAF's settings."""
    plain = {name: value for name, value in asdict(configured("hbaf")).items() if name != "kind"}
    assert read_network(plain) == configured("hbaf")
