"""What every baseline promises: absence, padding, causality, steps, states, gradients, learning."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks_kit import (
    AGF_IB,
    BC_LSTM,
    BI_DIALOGUE_RNN,
    CMN,
    DIALOGUE_RNN,
    HGRAPH_CL,
    LIVE,
    LIVE_MAMBA,
    M2FNET,
    M2R2,
    MAMBA,
    MMGCN,
    OFFLINE,
    SC_LSTM,
    TELME,
    absent_as_nan,
    both_present,
    changed,
    dialogue,
    dialogues,
    map_floats,
    ready,
    stepped,
    tensor,
    utterance,
    utterances_at,
)
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.network import Criterion, Features, Network, NetworkConfig

LIVE_VARIANTS = LIVE | {
    "sc-lstm-plain": replace(SC_LSTM, use_hierarchy=False, use_dense=False),
    "cmn-own": replace(CMN, use_others=False),
    "cmn-others-mean": replace(CMN, use_own=False, use_attention=False, hops=1),
    "dialogue-rnn-listener": replace(DIALOGUE_RNN, use_listener=True),
    "dialogue-rnn-bare": replace(DIALOGUE_RNN, use_parties=False, use_emotion=False, memory=1),
}
OFFLINE_VARIANTS = OFFLINE | {
    "bc-lstm-plain": replace(BC_LSTM, use_hierarchy=False, use_dense=False),
    "bi-dialogue-rnn-listener": replace(BI_DIALOGUE_RNN, use_listener=True, use_attention=False),
    "mmgcn-bare": replace(MMGCN, use_speakers=False, use_cross_edges=False),
    "hgraph-cl-labels-off": replace(HGRAPH_CL, use_graph=False, use_labels=False),
    "hgraph-cl-inter": replace(HGRAPH_CL, use_intra_contrast=False, layers=2),
    "hgraph-cl-no-contrast": replace(HGRAPH_CL, use_inter_contrast=False, use_intra_contrast=False),
    "agf-ib-bare": replace(AGF_IB, use_graph=False, use_bottleneck=False),
    "agf-ib-cross-entropy": replace(AGF_IB, use_alignment=False, use_contrast=False),
}
EACH = LIVE | OFFLINE
EVERY = LIVE_VARIANTS | OFFLINE_VARIANTS
CONTRASTED = {
    name: EACH[name] for name in ("hgraph-cl", "agf-ib", "telme", "m2r2", "mamba", "mamba-live")
}
MODALITIES: dict[str, dict[str, Any]] = {
    "both": {},
    "text": {"use_audio": False},
    "audio": {"use_text": False},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def named(configs: dict[str, Any], name: str = "config") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, configs.values(), ids=configs.keys())


def criterion_of(network: Network) -> Criterion:
    criterion = network.criterion()
    assert criterion is not None
    return criterion


def whole_loss(
    network: Network, criterion: Criterion | None, features: Features, labels: Tensor
) -> Tensor:
    """Cross entropy, and the criterion if there is one."""
    output, mask = network(features), features.present()
    loss = F.cross_entropy(output.logits[mask], labels[mask])
    if criterion is None:
        return loss
    present = features.audio_mask is not None and features.text_mask is not None
    added: Tensor = criterion(output, both_present(features) if present else mask, labels)
    return loss + added


# --- padding and absence --------------------------------------------------------------------------


@named(EVERY)
@named(MODALITIES, "use")
def test_padding_never_changes_a_result(config: NetworkConfig, use: dict[str, Any]) -> None:
    """A dialogue gives the same alone and in a batch whose padding is NaN; zeros in padding."""
    network = ready(replace(config, **use))
    features, lengths = dialogues(3, 9, 0, 6, present=0.7), (3, 9, 0, 6)
    with torch.no_grad():
        padded = network(features)
        for b, length in enumerate(lengths):
            if length:
                alone = network(dialogue(features, b, length)).logits[0]
                torch.testing.assert_close(padded.logits[b, :length], alone, atol=1e-5, rtol=0)
    padding = ~tensor(features.utterance_mask)
    for part in (padded.logits, padded.h_a, padded.h_l, padded.h_m):
        assert part is None or not part[padding].any()
    assert padded.logits.isfinite().all()
    assert padded.logits[1].std() > 0.01


@named(EVERY)
def test_values_of_an_absent_modality_are_never_used(config: NetworkConfig) -> None:
    """NaN where a modality is absent changes neither logits nor gradients."""
    network, clean = ready(config), dialogues(7, 4, present=0.5)
    results = []
    for features in (clean, absent_as_nan(clean)):
        network.zero_grad()
        logits = network(features).logits
        logits.square().sum().backward()
        gradients = [w.grad.clone() for w in network.parameters() if w.grad is not None]
        results.append([logits.detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@named(EACH)
@pytest.mark.parametrize("part", ["audio", "text"])
def test_a_missing_tensor_equals_a_mask_of_false(config: NetworkConfig, part: str) -> None:
    """None and an all-False mask are two ways to say that a modality is absent."""
    network, features = ready(config), dialogues(6, 3)
    nowhere = torch.zeros(2, 6, dtype=torch.bool)
    with torch.no_grad():
        masked = network(replace(features, **{f"{part}_mask": nowhere})).logits
        without = network(replace(features, **{part: None, f"{part}_mask": None})).logits
        present = network(features).logits
    torch.testing.assert_close(masked, without, atol=1e-6, rtol=0)
    assert not torch.allclose(masked, present, atol=1e-3)


@named(EACH)
@pytest.mark.parametrize("part", ["audio", "text"])
def test_a_modality_switched_off_has_no_influence(config: NetworkConfig, part: str) -> None:
    """Without its switch a modality's features change nothing; with it they do."""
    features = dialogues(6)
    other = replace(features, **{part: tensor(getattr(features, part)) + 1})
    with torch.no_grad():
        switch: dict[str, Any] = {f"use_{part}": False}
        without, whole = ready(replace(config, **switch)), ready(config)
        assert torch.equal(without(features).logits, without(other).logits)
        assert not torch.allclose(whole(features).logits, whole(other).logits, atol=1e-4)


# --- time -----------------------------------------------------------------------------------------


@named(LIVE_VARIANTS)
@named(MODALITIES, "use")
def test_step_of_each_utterance_equals_batch(config: NetworkConfig, use: dict[str, Any]) -> None:
    """Stepping through a dialogue gives what forward gives for it in a batch, to 1e-5."""
    network, features = ready(replace(config, **use)), dialogues(11, 1, 6, present=0.7)
    with torch.no_grad():
        logits = network(features).logits
    for b, length in enumerate((11, 1, 6)):
        ours = stepped(network, features, b)
        torch.testing.assert_close(ours, logits[b, :length], atol=1e-5, rtol=0)


@named(LIVE_VARIANTS)
def test_streams_at_different_turns_step_as_each_alone(config: NetworkConfig) -> None:
    """Dialogues stepped together, each at its own turn, give what each gives by itself."""
    network, features = ready(config), dialogues(4, 4, 4, 4, present=0.5)
    states = [network.initial_state()]
    for b in range(1, 4):
        state = states[0]
        for t in range(b):
            _, state = network.step(utterance(features, b, t), state)
        states.append(state)
    together = states[0].stack(states)
    logits, after = network.step(utterances_at(features, 3), together)
    for b, state in enumerate(states):
        alone, next_state = network.step(utterance(features, b, 3), state)
        torch.testing.assert_close(logits[b], alone, atol=1e-5, rtol=0)
        for name, part in next_state.tensors().items():
            torch.testing.assert_close(after.tensors()[name][b], part, atol=1e-5, rtol=0)


@named(LIVE_VARIANTS)
@pytest.mark.parametrize("t", [1, 4, 8])
def test_live_output_never_depends_on_a_later_utterance(config: NetworkConfig, t: int) -> None:
    """Changing utterance t moves no output before t, not by a single bit, but t's own."""
    network, features = ready(config), dialogues(9, 9)
    with torch.no_grad():
        before, after = network(features).logits, network(changed(features, t)).logits
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@named(LIVE_VARIANTS)
def test_state_keeps_its_size_and_is_left_as_it_was(config: NetworkConfig) -> None:
    """The state of turn 100 has the bytes of turn 1's; a step doesn't change its argument."""
    network, features = ready(config), dialogues(10)
    state, sizes = network.initial_state(), set()
    for t in range(100):
        kept = state.map(torch.clone)
        _, after = network.step(utterance(features, 0, t % 10), state)
        assert state == kept
        state = after
        sizes.add(sum(part.untyped_storage().nbytes() for part in state.tensors().values()))
    assert len(sizes) == 1


@named({name: c for name, c in OFFLINE_VARIANTS.items() if name != "agf-ib-bare"})
def test_offline_output_depends_on_the_future(config: NetworkConfig) -> None:
    """The last utterance changes the first one's output."""
    network, features = ready(config), dialogues(5)
    with torch.no_grad():
        before, after = network(features).logits, network(changed(features, 4, ("text",))).logits
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-6


@named(OFFLINE)
def test_offline_networks_refuse_to_step(config: NetworkConfig) -> None:
    """Neither state nor step, also with a live network's state: an error that says why."""
    network, state = ready(config), ready(TELME).initial_state()
    with pytest.raises(ModelError, match="sees the future"):
        network.initial_state()
    with pytest.raises(ModelError, match="sees the future"):
        network.initial_state(2)
    with pytest.raises(ModelError, match="sees the future"):
        network.step(utterance(dialogues(1), 0, 0), state)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "complaint"),
    [
        (CMN, {"mode": "offline"}, "never looks ahead"),
        (CMN, {"memory": 0}, "memory and hops"),
        (CMN, {"hops": 0}, "memory and hops"),
        (CMN, {"use_own": False, "use_others": False}, "use_own and use_others"),
        (DIALOGUE_RNN, {"memory": 0}, "memory of dialogue-rnn"),
        (BC_LSTM, {"use_audio": False, "use_text": False}, "both off"),
        (MMGCN, {"mode": "live"}, "mode is offline"),
        (HGRAPH_CL, {"mode": "live"}, "mode is offline"),
        (AGF_IB, {"mode": "live"}, "mode is offline"),
        (M2FNET, {"mode": "live"}, "mode is offline"),
        (M2FNET, {"heads": 3}, "must divide"),
        (TELME, {"mode": "offline"}, "mode is live"),
        (M2R2, {"mode": "offline"}, "mode is live"),
        (M2R2, {"dropped": 1.5}, "from 0 to 1"),
    ],
    ids=lambda part: part.kind if isinstance(part, NetworkConfig) else None,
)
def test_a_configuration_that_cannot_be_built_is_refused(
    config: NetworkConfig, changes: dict[str, Any], complaint: str
) -> None:
    """The error names the setting before anything is trained."""
    with pytest.raises(ConfigError, match=f"network: .*{complaint}"):
        replace(config, **changes)


SWITCHES = [
    (M2FNET, "use_encoders"),
    (M2FNET, "use_skips"),
    (M2FNET, "use_fusion"),
    (TELME, "use_shift"),
    (TELME, "use_response"),
    (TELME, "use_feature"),
    (M2R2, "use_reconstruction"),
    (M2R2, "use_attention"),
    (MAMBA, "use_broad"),
    (MAMBA, "use_guidance"),
    (LIVE_MAMBA, "use_broad"),
]


@pytest.mark.parametrize(
    ("config", "switch"), SWITCHES, ids=lambda part: part if isinstance(part, str) else part.kind
)
def test_every_switch_changes_what_is_learned(config: NetworkConfig, switch: str) -> None:
    """Without the part the network still trains, with other gradients than with it."""
    features = dialogues(6, 5, present=0.7)
    labels = torch.randint(0, 3, (2, 6), generator=torch.Generator().manual_seed(1))
    gradients = []
    for on in (True, False):
        changes: dict[str, Any] = {switch: on}
        network = ready(replace(config, **changes))
        criterion = network.criterion()
        torch.manual_seed(5)
        whole_loss(network, criterion, features, labels).backward()
        gradients.append(tensor(network.get_parameter("inputs.audio.weight").grad))
    assert gradients[1].isfinite().all()
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-5)


# --- training -------------------------------------------------------------------------------------


# With a memory of one state DialogueRNN's attention has nothing to choose from.
@named({name: config for name, config in EVERY.items() if name != "dialogue-rnn-bare"})
def test_gradient_reaches_every_parameter(config: NetworkConfig) -> None:
    """Cross entropy and the criterion together move every weight, never by NaN."""
    network, features = ready(config).train(), dialogues(12, 9, 7, present=0.6)
    labels = torch.randint(0, 3, (3, 12), generator=torch.Generator().manual_seed(1))
    criterion = network.criterion()
    whole_loss(network, criterion, features, labels).backward()
    parts = nn.ModuleList([network] if criterion is None else [network, criterion])
    for name, weight in parts.named_parameters():
        assert tensor(weight.grad).isfinite().all(), name
        assert tensor(weight.grad).any(), name


@named(CONTRASTED)
def test_criterion_without_anything_to_compare_is_zero(config: NetworkConfig) -> None:
    """A batch without an utterance of both modalities, or without labels, can be trained on."""
    network, features = ready(config).train(), dialogues(4, 3)
    criterion = criterion_of(network)
    nowhere, unlabelled = torch.zeros(2, 4, dtype=torch.bool), torch.full((2, 4), -1)
    loss = criterion(network(features), nowhere, unlabelled)
    loss.backward()
    assert loss.item() == 0.0
    assert all(w.grad.isfinite().all() for w in network.parameters() if w.grad is not None)
    assert criterion(network(features), tensor(features.utterance_mask), unlabelled).isfinite()


@named({name: CONTRASTED[name] for name in ("telme", "m2r2", "mamba", "mamba-live")})
@named({"text": {"use_audio": False}, "audio": {"use_text": False}}, "use")
def test_a_network_of_one_modality_has_no_criterion(
    config: NetworkConfig, use: dict[str, Any]
) -> None:
    """There is no other modality to distil from, to reconstruct or to weight."""
    assert ready(replace(config, **use)).criterion() is None


def train(
    network: Network, batches: "list[tuple[Features, Tensor]]", *, rate: float
) -> list[float]:
    """Adam steps over the batches; the cross entropy of each after its step."""
    criterion = network.train().criterion()
    trained = nn.ModuleList([network] if criterion is None else [network, criterion])
    optimiser = torch.optim.Adam(trained.parameters(), lr=rate)
    losses = []
    for features, labels in batches:
        optimiser.zero_grad()
        whole_loss(network, criterion, features, labels).backward()
        optimiser.step()
        with torch.no_grad():
            logits = network(features).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    return losses


@named({name: config for name, config in EACH.items() if name not in ("telme", "m2fnet")})
def test_network_learns_what_only_context_tells(config: NetworkConfig) -> None:
    """Each utterance's label is the text of the one before: guessing would cost 0.9."""
    torch.manual_seed(0)
    batches = []
    for _ in range(100):
        content = torch.randint(3, (12, 6))
        labels = torch.cat([torch.zeros(12, 1, dtype=torch.long), content[:, :-1]], dim=1)
        text = F.pad(F.one_hot(content, 3).float() * 2, (0, 2))
        speaker = torch.arange(6).expand(12, 6) % 2
        batches.append((Features(torch.randn(12, 6, 6), text, speaker=speaker), labels))
    losses = train(ready(replace(config, hidden=16)), batches, rate=0.02)
    assert sum(losses[-10:]) / 10 < 0.4


@named({name: EACH[name] for name in ("telme", "m2fnet")})
def test_network_without_order_learns_from_its_utterances(config: NetworkConfig) -> None:
    """M2FNet: the first utterance's text tells the label of all; TelME: each its own."""
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (12, 6), generator=draw)
    if config.kind == "m2fnet":
        labels = labels[:, :1].repeat(1, 6)
    content = F.one_hot(labels, 5).float() * 3
    if config.kind == "m2fnet":
        content[:, 1:] = 0
    noise = torch.randn(12, 6, 11, generator=draw) / 3
    mask = torch.ones(12, 6, dtype=torch.bool)
    text = content + noise[..., 6:]
    features = Features(noise[..., :6], text, None, mask, mask, mask, labels * 0)
    losses = train(ready(replace(config, hidden=16)), [(features, labels)] * 60, rate=0.02)
    assert losses[-1] < 0.1


def test_features_of_another_type_keep_their_result() -> None:
    """In float64 the logits are those of float32, to 1e-5."""
    features = dialogues(5, 3)
    for config in EACH.values():
        network = ready(config)
        with torch.no_grad():
            single = network(features).logits
            double = network.double()(map_floats(features, Tensor.double)).logits
        torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)
