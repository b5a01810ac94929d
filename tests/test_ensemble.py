"""Networks of several seeds as one: mean probability, steps and states."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from networks_kit import utterances_at

from stream_hbaf.errors import ModelError
from stream_hbaf.networks.hbaf import HBAF, DialogueState, HbafConfig
from stream_hbaf.networks.network import Features
from stream_hbaf.networks.registry import Ensemble, join
from stream_hbaf.networks.windows import find_equal

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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"by_speaker": True, "text_skip": True, "audio_skip": True, "audio_baseline": True},
        {"attention": "speakers", "memory": 2, "layers": 1},
        {"attention": "literal", "use_audio_context": False, "literal_cross": True},
        {"use_audio": False, "use_commonsense": False},
        {"use_text": False, "use_residual": False},
        {"use_bimodal_attention": False, "window": 1},
    ],
)
def test_members_side_by_side_step_as_each_by_itself(changes: dict[str, Any]) -> None:
    """Logits and states within 1e-5, for streams whose dialogues are of different lengths."""
    members = [make(seed, replace(CONFIG, **changes)) for seed in range(3)]
    ensemble, features = Ensemble(members), dialogues(5)
    speakers = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 2, 1]])
    features = replace(features, speaker=speakers, audio_mask=speakers == 0)
    # One that is at turn 2, one at its first, one at turn 3: windows of several lengths.
    late = ensemble.initial_state()
    for turn in range(2):
        _, late = ensemble.step(utterances_at(features, turn).map(lambda part: part[0]), late)
    streams = late.stack([late, ensemble.initial_state()])
    for turn in range(2, 5):
        at = utterances_at(features, turn)
        logits, after = ensemble.step(at, streams)
        for n, member in enumerate(members):
            own = streams.map(lambda part, n=n: part[:, n])  # type: ignore[misc]
            assert isinstance(own, DialogueState)
            alone, own_after = member.step(at, own)
            if n == 0:
                mean = torch.zeros_like(alone)
            mean += alone.softmax(-1) / len(members)
            for name, part in own_after.tensors().items():
                torch.testing.assert_close(after.tensors()[name][:, n], part, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits.softmax(-1), mean, atol=1e-5, rtol=0)
        streams = after


@pytest.mark.parametrize("absent", [("text", "commonsense"), ("commonsense",), ("audio",)])
def test_members_side_by_side_without_a_modality(members: list[HBAF], absent: list[str]) -> None:
    """None for a tensor, in one dialogue and in streams, at its first turn and at its third."""
    ensemble, features = Ensemble(members), dialogues(3)
    given = replace(features, **dict.fromkeys(absent), text_mask=None)
    state, each = ensemble.initial_state(), [member.initial_state() for member in members]
    for turn in range(3):
        at = utterances_at(given, turn).map(lambda part: part[0])
        logits, state = ensemble.step(at, state)
        stepped = [member.step(at, own) for member, own in zip(members, each, strict=True)]
        each = [own for _, own in stepped]
        mean = torch.stack([own.softmax(-1) for own, _ in stepped]).mean(0)
        torch.testing.assert_close(logits.softmax(-1), mean, atol=1e-5, rtol=0)


def test_later_weights_are_those_of_the_next_step(members: list[HBAF]) -> None:
    """Changed in place, and moved to other memory; members take no more memory than before."""
    ensemble, at = Ensemble(members), utterances_at(dialogues(1), 0)
    state = ensemble.initial_state(2)
    first, _ = ensemble.step(at, state)
    others = [make(seed) for seed in range(5, 8)]
    ensemble.load_state_dict(Ensemble(others).state_dict())
    expected, _ = Ensemble(others).step(at, state)
    assert not torch.allclose(first, expected, atol=1e-3)
    torch.testing.assert_close(ensemble.step(at, state)[0], expected)
    ensemble.double()
    wide = ensemble.step(at.map(_double), state.map(_double))[0]
    torch.testing.assert_close(wide.float(), expected, atol=1e-5, rtol=0)
    assert not any("stacked" in name for name in ensemble.state_dict())


def test_equal_windows_are_found() -> None:
    """Once for each member; none where all differ, or where there are too many to compare."""
    rows = torch.tensor([[1.0], [2.0], [1.0], [2.0], [2.0]])
    found = find_equal(torch.cat([rows, rows + 5])[:, None], members=2)
    assert found is not None
    assert [part.tolist() for part in found] == [[0, 1, 5, 6], [0, 1, 0, 1, 1, 2, 3, 2, 3, 3]]
    assert find_equal(rows[:2, None]) is None
    assert find_equal(torch.ones(100, 1, 1)) is None
    differs = torch.tensor([1.0, 1.0, 1.0, 2.0])[:, None, None]
    assert find_equal(differs, members=2) is None


def _double(part: torch.Tensor) -> torch.Tensor:
    return part.double() if part.is_floating_point() else part
