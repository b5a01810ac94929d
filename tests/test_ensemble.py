"""Networks of several seeds as one: mean probability, steps and states."""

from dataclasses import replace

import pytest
import torch
from networks_kit import utterances_at

from stream_hbaf.errors import ModelError
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.network import Features
from stream_hbaf.networks.registry import Ensemble, join

CONFIG = HbafConfig(
    audio_width=5, text_width=6, commonsense_width=4, hidden=16, classes=3, window=3, heads=2
)


def make(seed: int, config: HbafConfig = CONFIG) -> HBAF:
    torch.manual_seed(seed)
    return HBAF(config).eval()


@pytest.fixture
def members() -> list[HBAF]:
    return [make(seed) for seed in range(3)]


def dialogues(turns: int) -> Features:
    draw = torch.Generator().manual_seed(7)
    return Features(
        audio=torch.randn(2, turns, 5, generator=draw),
        text=torch.randn(2, turns, 6, generator=draw),
        commonsense=torch.randn(2, turns, 3, 4, generator=draw),
        text_mask=torch.rand(2, turns, generator=draw) > 0.2,
    )


def test_logits_are_those_of_the_mean_probability(members: list[HBAF]) -> None:
    """Of members that differ; h_m is that of all side by side."""
    features = dialogues(4)
    with torch.no_grad():
        own = torch.stack([member(features).logits.softmax(-1) for member in members])
        together = Ensemble(members)(features)
    torch.testing.assert_close(together.logits.softmax(-1), own.mean(0))
    assert (own - own.mean(0)).abs().max() > 0.01
    assert together.h_m.shape == (2, 4, 3 * 2 * 16)


def test_steps_equal_the_batch(members: list[HBAF]) -> None:
    """One dialogue and several streams; the state before a step stays as it was."""
    ensemble, features = Ensemble(members), dialogues(6)
    with torch.no_grad():
        whole = ensemble(features).logits
    streams = ensemble.initial_state(2)
    single = ensemble.initial_state()
    for turn in range(6):
        at = utterances_at(features, turn)
        logits, streams = ensemble.step(at, streams)
        torch.testing.assert_close(logits, whole[:, turn], atol=1e-5, rtol=0)
        before = single.map(torch.clone)
        logits, after = ensemble.step(at.map(lambda part: part[1]), single)
        torch.testing.assert_close(logits, whole[1, turn], atol=1e-5, rtol=0)
        assert single == before
        single = after
    last = streams.map(lambda part: part[1])
    for name, part in last.tensors().items():
        torch.testing.assert_close(part, single.tensors()[name], atol=1e-5, rtol=0)


def test_states_are_stacked_as_any_other(members: list[HBAF]) -> None:
    """Each tensor has the members after the streams."""
    ensemble = Ensemble(members)
    first = ensemble.initial_state()
    stacked = first.stack([first, first])
    assert stacked == ensemble.initial_state(2)
    assert all(len(part) == 3 for part in first.tensors().values())


def test_a_single_network_is_no_ensemble(members: list[HBAF]) -> None:
    """``join`` of one network gives that network."""
    assert join(members[:1]) is members[0]
    assert isinstance(join(members), Ensemble)


def test_an_ensemble_of_offline_networks_has_no_state() -> None:
    """As each of its members."""
    ensemble = Ensemble([make(seed, replace(CONFIG, mode="offline")) for seed in range(2)])
    with pytest.raises(ModelError, match="trained offline"):
        ensemble.initial_state()
