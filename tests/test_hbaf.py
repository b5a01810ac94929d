"""HBAF's promises: step equals batch, no future, no padding, and what each switch does.

The equations are checked in test_hbaf_equations.py, the losses in test_hbaf_losses.py.
"""

import io
import math
from dataclasses import fields, replace
from typing import Any

import networks_kit as kit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_kit import absent_as_nan, stepped, tensor, utterance, utterances_at, with_absent_drawn
from torch import Tensor

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.hbaf import (
    ATTENTIONS,
    HBAF,
    DialogueState,
    HbafConfig,
    InterModalLoss,
    SpeakerBaseline,
    TrainingOutput,
    UnimodalLoss,
    total_loss,
)
from stream_hbaf.networks.network import Features, Output

SMALL = HbafConfig(
    audio_width=6,
    text_width=5,
    commonsense_width=4,
    hidden=16,
    filters=8,
    heads=2,
    layers=2,
    window=4,
)
CHANGED = ("audio", "text", "commonsense", "audio_mask")

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0, **switches: Any) -> HBAF:
    """Ready to predict; every weight drawn, absent vectors too (they start at zero)."""
    torch.manual_seed(seed)
    return with_absent_drawn(HBAF(replace(SMALL, **switches)))


def dialogues(*lengths: int, seed: int = 0, present: float = 1.0) -> Features:
    """Random dialogues of twelve speakers, more than are distinguished."""
    return kit.dialogues(*lengths, config=SMALL, seed=seed, present=present, parties=12)


def changed(features: Features, t: int, parts: tuple[str, ...] = CHANGED) -> Features:
    return kit.changed(features, t, parts)


def parts(output: Output) -> list[Tensor]:
    """Everything that the network gave."""
    return [getattr(output, field.name) for field in fields(output)]


# --- step, batch, time --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    present=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    window=st.integers(1, 6),
    attention=st.sampled_from(ATTENTIONS),
)
def test_step_of_each_utterance_equals_batch(
    lengths: list[int], seed: int, present: float, window: int, attention: str
) -> None:
    """Stepping through a dialogue gives what forward gives for it in any batch, to 1e-5."""
    net = network(seed, window=window, attention=attention)
    features = dialogues(*lengths, seed=seed, present=present)
    with torch.no_grad():
        logits = net(features).logits
    for b, length in enumerate(lengths):
        torch.testing.assert_close(stepped(net, features, b), logits[b, :length], atol=1e-5, rtol=0)


SWITCHES = [
    {"use_audio": False},
    {"use_text": False},
    {"use_commonsense": False},
    {"use_audio_context": False},
    {"audio_skip": True},
    {"use_bimodal_attention": False},
    {"use_gate": False},
    {"use_residual": False},
    {"use_bimodal_attention": False, "use_gate": False, "use_residual": False},
    {"literal_cross": True},
    {"by_speaker": True},
    {"text_skip": True},
    {"audio_baseline": True},
    {"audio_baseline": True, "use_audio_context": False},
    {"attention": "speakers", "memory": 6},
    {"attention": "query", "memory": 0},
]


@pytest.mark.parametrize("switches", SWITCHES, ids="-".join)
def test_step_of_each_utterance_equals_batch_in_every_ablation(switches: dict[str, Any]) -> None:
    """Every ablation that is trained in batches can also run live, to 1e-5."""
    net, features = network(**switches), dialogues(9, 5, present=0.7)
    with torch.no_grad():
        logits = net(features).logits
    for b, length in enumerate((9, 5)):
        torch.testing.assert_close(stepped(net, features, b), logits[b, :length], atol=1e-5, rtol=0)


def test_step_of_a_long_dialogue_equals_batch() -> None:
    """The carried sums don't drift: 300 utterances later the two agree to 1e-5 still."""
    net, features = network(), dialogues(300, present=0.9)
    with torch.no_grad():
        logits = net(features).logits[0]
    torch.testing.assert_close(stepped(net, features, 0), logits, atol=1e-5, rtol=0)


def test_step_of_many_streams_equals_each_alone() -> None:
    """S streams stepped together give what each gives by itself, at whatever turn each stands."""
    net, features = network(), dialogues(6, 6, 6, present=0.6)
    together = net.initial_state(3)
    logits = []
    for t in range(6):
        one, together = net.step(utterances_at(features, t), together)
        logits.append(one)
    for b in range(3):
        alone = stepped(net, features, b)
        torch.testing.assert_close(torch.stack(logits)[:, b], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("t", range(1, 9))
def test_live_output_never_depends_on_a_later_utterance(attention: str, t: int) -> None:
    """Changing utterance t moves no output before t, not by a single bit, but t's own."""
    net, features = network(attention=attention), dialogues(9, 9, present=0.8)
    with torch.no_grad():
        before, after = net(features), net(changed(features, t))
    for old, new in zip(parts(before), parts(after), strict=True):
        assert torch.equal(old[:, :t], new[:, :t])
    assert not torch.equal(before.logits[:, t], after.logits[:, t])


@pytest.mark.parametrize("part", ["audio", "text", "commonsense", "audio_mask", "text_mask"])
@pytest.mark.parametrize("t", [5, 31, 32, 33])
def test_live_output_never_depends_on_any_part_of_a_later_utterance(part: str, t: int) -> None:
    """Nor on one part of it, on either side of the boundary of the soft attention's blocks."""
    net, features = network(), dialogues(36)
    with torch.no_grad():
        before, after = net(features).logits, net(changed(features, t, (part,))).logits
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_live_output_depends_on_audio_of_the_window_only() -> None:
    """Audio of W-1 utterances ago has an influence, of W ago it has none."""
    net, features = network(), dialogues(9)
    audio = tensor(features.audio).clone()
    audio[:, 2] += 1
    with torch.no_grad():
        moved = net(features).logits != net(replace(features, audio=audio)).logits
    assert moved[0].any(dim=-1).tolist() == [False] * 2 + [True] * SMALL.window + [False] * 3


def test_live_output_depends_on_text_of_the_whole_past() -> None:
    """The text context network carries the first utterance to the twentieth."""
    net, features = network(), dialogues(20)
    text = tensor(features.text).clone()
    text[:, 0] += 1
    with torch.no_grad():
        moved = net(features).logits != net(replace(features, text=text)).logits
    assert moved[0].any(dim=-1).all()


@pytest.mark.parametrize("switches", [{}, {"use_audio": False}, {"use_text": False}], ids=str)
def test_offline_output_depends_on_the_future(switches: dict[str, Any]) -> None:
    """Offline, the last utterance changes the first one's output, by audio and by text."""
    net, features = network(mode="offline", **switches), dialogues(9)
    with torch.no_grad():
        before, after = net(features).logits, net(changed(features, 8)).logits
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3


def test_offline_network_refuses_to_step() -> None:
    """An offline network has no state; the error says why."""
    with pytest.raises(ModelError, match="offline and sees the future"):
        network(mode="offline").initial_state()


@pytest.mark.parametrize("mode", ["live", "offline"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_never_changes_a_result(mode: str, attention: str) -> None:
    """A dialogue gives the same alone and padded in a batch, though the padding is NaN."""
    net = network(mode=mode, attention=attention)
    features = dialogues(3, 9, 1, 6, present=0.7)
    with torch.no_grad():
        padded = net(features)
        for b, length in enumerate((3, 9, 1, 6)):
            alone = net(kit.dialogue(features, b, length))
            for ours, theirs in zip(parts(padded), parts(alone), strict=True):
                torch.testing.assert_close(ours[b, :length], theirs[0], atol=1e-5, rtol=0)
                assert torch.equal(ours[b, length:], torch.zeros_like(ours[b, length:]))


def test_padding_before_an_utterance_is_refused() -> None:
    """A mask with a hole would shift the turns: it is an error."""
    features = replace(dialogues(3), utterance_mask=torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="utterances come first"):
        network()(features)


def test_empty_dialogue_in_a_batch_gives_zeros() -> None:
    """A dialogue of padding only gives zeros, in both modes."""
    for mode in ("live", "offline"):
        with torch.no_grad():
            logits = network(mode=mode)(dialogues(2, 0)).logits
        assert torch.equal(logits[1], torch.zeros(2, SMALL.classes))
        assert logits[0].isfinite().all()


# --- missing modalities -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["live", "offline"])
def test_values_of_an_absent_modality_are_never_used(mode: str) -> None:
    """NaN where a modality is absent changes neither logits nor gradients."""
    net = network(mode=mode)
    clean = dialogues(7, 4, present=0.5)
    results = []
    for features in (clean, absent_as_nan(clean)):
        net.zero_grad()
        logits = net(features).logits
        logits.sum().backward()
        results.append([logits.detach(), *(tensor(w.grad).clone() for w in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_missing_tensor_equals_a_mask_of_false() -> None:
    """None and an all-False mask are two ways to say that a modality is absent."""
    net, features = network(), dialogues(5)
    nowhere = torch.zeros(1, 5, dtype=torch.bool)
    with torch.no_grad():
        without_audio = net(replace(features, audio=None, audio_mask=None)).logits
        masked_audio = net(replace(features, audio_mask=nowhere)).logits
        without_text = net(replace(features, text=None, text_mask=None, commonsense=None)).logits
        masked_text = net(replace(features, text_mask=nowhere)).logits
    torch.testing.assert_close(without_audio, masked_audio, atol=1e-6, rtol=0)
    torch.testing.assert_close(without_text, masked_text, atol=1e-6, rtol=0)
    assert not torch.allclose(without_audio, without_text, atol=1e-3)


def test_utterance_without_text_stays_out_of_the_soft_attention() -> None:
    """It moves the turn and the GRU states on, but the sums of eqs 2-3 stay as they were."""
    net, features = network(), dialogues(2)
    _, first = net.step(utterance(features, 0, 0), net.initial_state())
    _, second = net.step(replace(utterance(features, 0, 1), text=None, commonsense=None), first)
    assert torch.equal(first.score_max, second.score_max)
    assert torch.equal(first.score_sum, second.score_sum)
    assert torch.equal(first.weighted_sum, second.weighted_sum)
    assert not torch.equal(first.external, second.external)


def test_absent_vectors_are_learned() -> None:
    """Training with missing modalities moves the vectors that replace them."""
    net = network()
    net(dialogues(6, present=0.5)).logits.square().sum().backward()
    assert tensor(net.absent_audio.grad).any()
    assert tensor(net.text_context.absent.grad).any()


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_state_size_does_not_grow(attention: str) -> None:
    """The state of turn 1000 has the bytes of turn 10's, its tensors' storage included."""
    net, features = network(attention=attention), dialogues(10)
    state, sizes = net.initial_state(), {}
    for t in range(1, 1001):
        _, state = net.step(utterance(features, 0, t % 10), state)
        if t in (10, 1000):
            buffer = io.BytesIO()
            torch.save(state.tensors(), buffer)
            held = sum(part.untyped_storage().nbytes() for part in state.tensors().values())
            sizes[t] = len(buffer.getvalue()), held
    assert sizes[10] == sizes[1000]


def test_step_leaves_its_state_as_it_was() -> None:
    """A provisional prediction can be dropped with its state: the given one is unchanged."""
    net, features = network(), dialogues(5)
    state = net.initial_state()
    for t in range(3):
        _, state = net.step(utterance(features, 0, t), state)
    kept = state.map(torch.clone)
    provisional, _ = net.step(replace(utterance(features, 0, 3), text=None), state)
    final, after = net.step(utterance(features, 0, 3), state)
    assert state == kept
    assert after != kept
    assert not torch.equal(provisional, final)


def test_stacked_states_step_as_each_alone() -> None:
    """Dialogues at different turns, stepped together with audio, text or neither, to 1e-5."""
    net, features = network(), dialogues(4, 4, 4, 4, present=0.5)
    states = [net.initial_state()]
    for b in range(1, 4):
        state = states[0]
        for t in range(b):
            _, state = net.step(utterance(features, b, t), state)
        states.append(state)
    logits, after = net.step(utterances_at(features, 3), DialogueState.stack(states))
    for b, state in enumerate(states):
        alone, next_state = net.step(utterance(features, b, 3), state)
        torch.testing.assert_close(logits[b], alone, atol=1e-5, rtol=0)
        for name, part in next_state.tensors().items():
            torch.testing.assert_close(after.tensors()[name][b], part, atol=1e-5, rtol=0)


def test_state_of_a_speaker_depends_on_own_turns_alone() -> None:
    """By speaker, internal and purpose states stay while another speaks; the external one is the
    dialogue's."""
    net, features = network(by_speaker=True), dialogues(2)
    turns = (replace(utterance(features, 0, t), speaker=torch.tensor(t)) for t in range(2))
    _, first = net.step(next(turns), net.initial_state())
    _, second = net.step(next(turns), first)
    for name in ("internal", "purpose"):
        before, after = getattr(first, name), getattr(second, name)
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])
        assert (before[1:] == 0.0).all()
    assert not torch.equal(first.external, second.external)


def test_speaker_baseline_is_of_the_speakers_earlier_audio() -> None:
    """Mean and deviation as plain loops have them; utterances without audio don't count."""
    audio = torch.randn(1, 9, 4, dtype=torch.float64)
    speaker = torch.tensor([[0, 1, 0, 0, 1, 11, 0, 1, 0]]).clamp(max=8)
    present = torch.tensor([[True, True, True, False, True, True, True, True, True]])
    state = network(audio_width=4, audio_baseline=True).blank(1).map(lambda part: part.double())
    found, after = SpeakerBaseline()(audio, present, speaker, state)
    assert torch.equal(found[..., :4], audio)
    for t in range(9):
        past = [i for i in range(t) if speaker[0, i] == speaker[0, t] and present[0, i]]
        for d in range(4):
            heard = [float(audio[0, i, d]) for i in past]
            mean = sum(heard) / (len(heard) + 1)
            variance = (sum(x * x for x in heard) + 1) / (len(heard) + 1) - mean**2
            relative = (float(audio[0, t, d]) - mean) / max(variance, 0.1) ** 0.5
            expected = relative if present[0, t] else 0.0
            assert found[0, t, 4 + d].item() == pytest.approx(expected, abs=1e-12)
    assert after.audio_count[0].tolist() == [4, 3, 0, 0, 0, 0, 0, 0, 1]


def test_attention_of_speakers_tells_own_past_from_the_others() -> None:
    """Who said an earlier utterance matters, though not by which number the speaker goes."""
    net, features = network(attention="speakers", memory=5), dialogues(6)
    with torch.no_grad():
        one = net(replace(features, speaker=torch.tensor([[0, 1, 0, 1, 0, 1]]))).logits
        same = net(replace(features, speaker=torch.tensor([[4, 2, 4, 2, 4, 2]]))).logits
        other = net(replace(features, speaker=torch.tensor([[0, 0, 0, 1, 0, 1]]))).logits
    assert torch.equal(one, same)
    assert torch.equal(one[:, 0], other[:, 0])
    assert not torch.allclose(one[:, 4], other[:, 4])


def test_attention_with_a_query_reaches_as_far_as_its_memory() -> None:
    """l_t^c depends on the last ``memory`` utterances, whatever the window."""
    net, features = network(attention="query", memory=2, window=1), dialogues(6)
    utterances, mask = torch.randn(1, 6, SMALL.hidden), torch.ones(1, 6, dtype=torch.bool)
    changed = utterances.clone()
    changed[0, 1] += 1
    attention: Any = net.text_context.attention
    with torch.no_grad():
        before, after = (attention(x, mask, net.blank(1))[0] for x in (utterances, changed))
    moved = (before != after).any(-1)[0]
    assert moved[2:].tolist() == [True, True, False, False]
    assert net.blank(1).past_window.shape[1] == 2
    assert features.text is not None


def test_unimodal_losses_are_cross_entropies_before_the_fusion() -> None:
    """Of H_a and H_l, of the labelled utterances that have both; nothing of the fusion."""
    net, features = network(), dialogues(5, 3, present=0.8)
    net.train()
    output, labels = net(features), torch.tensor([[0, 1, -1, 2, 3], [4, 5, 6, -1, -1]])
    assert isinstance(output, TrainingOutput)
    mask = kit.both_present(features)
    criterion = UnimodalLoss(SMALL.hidden, SMALL.classes, weight=0.5)
    loss = criterion(output, mask, labels)
    known = mask & (labels >= 0)
    expected = 0.0
    for m, states in (("a", tensor(output.H_a)), ("l", tensor(output.H_l))):
        weight, bias = (criterion.heads.get_parameter(f"{m}.{name}") for name in ("weight", "bias"))
        logits = states[known] @ weight.T + bias
        shares = logits.softmax(-1)[range(int(known.sum())), labels[known]]
        expected += 0.5 * -shares.log().mean().item() / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert all(weight.grad is None for weight in net.fusion.parameters())
    assert tensor(net.text_context.project.weight.grad).any()
    assert not isinstance(net.eval()(features), TrainingOutput)


def test_unimodal_losses_without_a_pair_are_zero_with_a_gradient() -> None:
    """A batch without an utterance that has both trains on."""
    net, features = network(), dialogues(3)
    net.train()
    criterion = UnimodalLoss(SMALL.hidden, SMALL.classes, weight=0.5)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    loss = criterion(net(features), mask, torch.zeros(1, 3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


def test_dialogue_of_one_speaker_is_the_same_by_speaker() -> None:
    """With one speaker the switch ``by_speaker`` changes nothing."""
    features = replace(dialogues(6, 3, 9), speaker=None)
    with torch.no_grad():
        plain, apart = (network(by_speaker=kept)(features) for kept in (False, True))
    torch.testing.assert_close(plain.logits, apart.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "switches",
    [{"by_speaker": True}, {"attention": "speakers", "memory": 3}, {"audio_baseline": True}],
    ids=str,
)
def test_streams_step_with_speakers_of_their_own(switches: dict[str, Any]) -> None:
    """Stepped together, each dialogue keeps its own speakers' states."""
    net, features = network(**switches), dialogues(5, 5, 5)
    together, logits = net.initial_state(3), []
    for t in range(5):
        one, together = net.step(utterances_at(features, t), together)
        logits.append(one)
    for b in range(3):
        alone = stepped(net, features, b)
        torch.testing.assert_close(torch.stack(logits)[:, b], alone, atol=1e-5, rtol=0)


def test_state_survives_a_file() -> None:
    """A restored state is equal and gives the same next logits."""
    net, features = network(), dialogues(4)
    _, state = net.step(utterance(features, 0, 0), net.initial_state())
    buffer = io.BytesIO()
    torch.save(state.tensors(), buffer)
    buffer.seek(0)
    restored = DialogueState(**torch.load(buffer))
    assert restored == state
    logits = [net.step(utterance(features, 0, 1), s)[0] for s in (state, restored)]
    assert torch.equal(*logits)


# --- learning, switches, figures ----------------------------------------------------------------


def test_network_overfits_eight_utterances() -> None:
    """Two dialogues of four utterances with arbitrary labels are learned."""
    torch.manual_seed(0)
    net, loss = HBAF(replace(SMALL, dropout=0.0)), InterModalLoss(SMALL.hidden)
    features, labels = dialogues(4, 4), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    mask = tensor(features.utterance_mask)
    optimiser = torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=5e-3)
    for _ in range(150):
        output = net(features)
        optimiser.zero_grad()
        total_loss(output.logits[mask], labels, loss(output, mask)).backward()
        optimiser.step()
    assert net(features).logits[mask].argmax(dim=-1).tolist() == labels.tolist()
    assert total_loss(net(features).logits[mask], labels).item() < 0.05


PARTS = {
    "use_audio": "absent_audio audio_context fusion.attention.query.a fusion.residual.a "
    "fusion.attention.key.a fusion.attention.value.a fusion.gate",
    "use_text": "text_context fusion.attention.query.l fusion.residual.l fusion.attention.key.l "
    "fusion.attention.value.l fusion.gate",
    "use_audio_context": "audio_context.convolution audio_context.lstm audio_context.transformer",
    "use_bimodal_attention": "fusion.attention fusion.gate",
    "use_gate": "fusion.gate",
    "use_residual": "fusion.residual",
}


@pytest.mark.parametrize("mode", ["live", "offline"])
@pytest.mark.parametrize("switch", PARTS)
def test_switch_off_takes_exactly_its_part_away(switch: str, mode: str) -> None:
    """The parameters that go are those of the part that is named, and the network still runs."""
    whole, less = network(mode=mode), network(mode=mode, **{switch: False})
    gone = set(whole.state_dict()) - set(less.state_dict())
    named = tuple(PARTS[switch].split())
    assert gone == {name for name in whole.state_dict() if name.startswith(named)}
    with torch.no_grad():
        output = less(dialogues(5, 3, present=0.8))
    assert output.logits.shape == (2, 5, SMALL.classes)
    assert output.logits.isfinite().all()
    assert (output.h_a is None) == (switch == "use_audio")
    assert (output.h_l is None) == (switch == "use_text")


def test_switch_commonsense_off_narrows_the_gru_inputs() -> None:
    """Without commonsense the GRUs' input is [utterance; context]; relations change nothing."""
    net, features = network(use_commonsense=False), dialogues(4)
    assert net.get_parameter("text_context.combine.purpose.weight").shape[1] == 2 * SMALL.hidden
    other = replace(features, commonsense=tensor(features.commonsense) + 1)
    with torch.no_grad():
        assert torch.equal(net(features).logits, net(other).logits)
        assert not torch.equal(network()(features).logits, network()(other).logits)


@pytest.mark.parametrize(
    ("switch", "place"),
    [("audio_skip", "audio_context.skip"), ("text_skip", "text_context.skip")],
)
def test_switch_of_a_skip_adds_a_linear_map(switch: str, place: str) -> None:
    """The skip adds its own two tensors, and moves the output."""
    plain, skipping = network(), network(**{switch: True})
    added = set(skipping.state_dict()) - set(plain.state_dict())
    assert added == {f"{place}.weight", f"{place}.bias"}
    plain.load_state_dict(skipping.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(plain(dialogues(4)).logits, skipping(dialogues(4)).logits)


@pytest.mark.parametrize(
    "switches", [{"literal_cross": True}, {"mode": "offline"}, {"window": 2}], ids=str
)
def test_switch_without_weights_of_its_own_changes_the_output(switches: dict[str, Any]) -> None:
    """The same weights give another output when the switch is set."""
    ours, theirs = network(), network(**switches)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        difference = ours(dialogues(6)).logits - theirs(dialogues(6)).logits
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("attention", "own"),
    [
        ("scalar", {"project.weight", "project.bias", "score.weight"}),
        ("literal", {"project.weight", "project.bias"}),
        ("query", {"project.weight", "project.bias", "query.weight"}),
        (
            "speakers",
            {"project.weight", "project.bias", "query.weight", "query_others.weight"}
            | {"join.weight", "join.bias"},
        ),
    ],
)
def test_switch_attention_has_its_own_weights(attention: str, own: set[str]) -> None:
    """w for the scalar score, nothing for the literal one, W_q for the query."""
    assert set(network(attention=attention).text_context.attention.state_dict()) == own


@pytest.mark.parametrize(
    ("switches", "complaint"),
    [
        ({"use_audio": False, "use_text": False}, "both off"),
        ({"hidden": 18, "heads": 4}, "must divide"),
        ({"window": 0}, "at least 1"),
        ({"mode": "online"}, "live or offline"),
        ({"attention": "dot"}, "scalar, literal, query, speakers"),
        ({"memory": -1}, "0 or more"),
        ({"memory": 10**9}, "at most 1024"),
    ],
)
def test_config_that_cannot_be_built_is_refused(switches: dict[str, Any], complaint: str) -> None:
    """The error names the setting and what it may be."""
    with pytest.raises(ConfigError, match=complaint):
        replace(SMALL, **switches)


def by_hand(*shape: int, phase: float) -> Tensor:
    """Values that don't depend on the version of a random generator."""
    return torch.sin(torch.arange(math.prod(shape)) * 0.7 + phase).reshape(shape)


# From the plain loops of test_hbaf_equations.py, in float64.
GOLDEN = [
    [-0.3161498, -0.6403933, 0.2136090],
    [-0.3436465, -0.6756354, 0.2267970],
    [-0.5051149, -0.6013061, 0.4184437],
]


def test_golden_network_gives_the_committed_logits() -> None:
    """Weights and features set by hand give these logits in every version of torch."""
    config = replace(SMALL, hidden=8, classes=3, window=2, layers=1)
    net = HBAF(config).eval()
    with torch.no_grad():
        for k, (_, weight) in enumerate(sorted(net.named_parameters())):
            weight.copy_(0.5 * by_hand(*weight.shape, phase=k))
        features = Features(
            by_hand(1, 3, 6, phase=0.1),
            by_hand(1, 3, 5, phase=0.2),
            by_hand(1, 3, 3, 4, phase=0.3),
            audio_mask=torch.tensor([[True, False, True]]),
            text_mask=torch.tensor([[True, True, False]]),
        )
        logits = net(features).logits[0]
    torch.testing.assert_close(logits, torch.tensor(GOLDEN), atol=1e-5, rtol=0)


# --- standardised text features -----------------------------------------------------


def test_standardised_text_makes_the_features_scale_irrelevant() -> None:
    """Scaling and shifting all text features changes nothing once they are fitted."""
    torch.manual_seed(0)
    features, known = dialogues(5, 3), torch.randn(200, SMALL.text_width)
    ours, theirs = network(), network()
    ours.standardise(known)
    theirs.standardise(40.0 * known + 7.0)
    moved = replace(features, text=40.0 * tensor(features.text) + 7.0)
    torch.testing.assert_close(ours(features).logits, theirs(moved).logits, atol=1e-5, rtol=1e-4)


def test_switch_standardise_text_off_takes_features_as_they_are() -> None:
    """Without it, training's features change nothing."""
    features = dialogues(4)
    plain, switched = network(), network(standardise_text=False)
    switched.standardise(100.0 + torch.randn(50, SMALL.text_width))
    assert torch.equal(plain(features).logits, switched(features).logits)
