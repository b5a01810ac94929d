"""The network's promises: step equals batch, no future, no padding, switches that do what they say.

Which numbers are right is tests/test_hbaf_equations.py's concern.
"""

import io
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.hbaf import HBAF, DialogueState, HbafConfig, InterModalLoss, total_loss
from stream_hbaf.networks.network import Output
from stream_hbaf.networks.state import Features

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


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0, **switches) -> HBAF:
    """Ready to predict; every weight drawn, absent vectors too (they start at zero)."""
    torch.manual_seed(seed)
    net = HBAF(replace(SMALL, **switches)).eval()
    for name, weight in net.named_parameters():
        if "absent" in name:
            torch.nn.init.normal_(weight)
    return net


def dialogues(*lengths: int, seed: int = 0, present: float = 1.0) -> Features:
    """Random dialogues, padded to the longest with NaN; each modality present so often."""
    draw = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def noise(*width: int) -> Tensor:
        values = torch.randn(*shape, *width, generator=draw)
        values[~mask] = torch.nan
        return values

    return Features(
        audio=noise(SMALL.audio_width),
        text=noise(SMALL.text_width),
        commonsense=noise(3, SMALL.commonsense_width),
        audio_mask=torch.rand(shape, generator=draw) < present,
        text_mask=torch.rand(shape, generator=draw) < present,
        utterance_mask=mask,
        speaker=torch.randint(0, 12, shape, generator=draw),
    )


def turn(features: Features, b: int, t: int) -> Features:
    """One utterance, as the recogniser hands it to step: absent modalities are None."""
    heard, spoken = bool(features.audio_mask[b, t]), bool(features.text_mask[b, t])
    return Features(
        audio=features.audio[b, t] if heard else None,
        text=features.text[b, t] if spoken else None,
        commonsense=features.commonsense[b, t] if spoken else None,
        speaker=features.speaker[b, t],
    )


def parts(output: Output) -> list[Tensor]:
    """Everything that the network gave."""
    return [getattr(output, field.name) for field in fields(output)]


def stepped(net: HBAF, features: Features, b: int) -> Tensor:
    """Logits [U, C] of dialogue b, one utterance at a time."""
    state, logits = net.initial_state(), []
    for t in range(int(features.utterance_mask[b].sum())):
        one, state = net.step(turn(features, b, t), state)
        logits.append(one)
    return torch.stack(logits)


PARTS_OF_FEATURES = ("audio", "text", "commonsense", "audio_mask")


def changed(features: Features, t: int, parts: tuple[str, ...] = PARTS_OF_FEATURES) -> Features:
    """The same dialogues with utterance t of each replaced by another."""

    def put(values: Tensor) -> Tensor:
        values = values.clone()
        values[:, t] = ~values[:, t] if values.dtype == torch.bool else 3 - values[:, t]
        return values

    return replace(features, **{part: put(getattr(features, part)) for part in parts})


# --- step, batch, time --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    present=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    window=st.integers(1, 6),
    attention=st.sampled_from(["scalar", "literal", "query"]),
)
def test_step_of_each_utterance_equals_batch(lengths, seed, present, window, attention) -> None:
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
]


@pytest.mark.parametrize("switches", SWITCHES, ids="-".join)
def test_step_of_each_utterance_equals_batch_in_every_ablation(switches: dict) -> None:
    """Whatever is left out, what was trained in batches is what the live recogniser runs."""
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
        now = replace(features, utterance_mask=None).map(lambda part, t=t: part[:, t])
        one, together = net.step(now, together)
        logits.append(one)
    for b in range(3):
        alone = stepped(net, features, b)
        torch.testing.assert_close(torch.stack(logits)[:, b], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["scalar", "literal", "query"])
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
    """Nor does one part of it, on either side of where the soft attention's blocks of 32 meet."""
    net, features = network(), dialogues(36)
    with torch.no_grad():
        before, after = net(features).logits, net(changed(features, t, (part,))).logits
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_live_output_depends_on_audio_of_the_window_only() -> None:
    """Audio of W utterances ago is forgotten; of W-1 ago it isn't."""
    net, features = network(), dialogues(9)
    audio = features.audio.clone()
    audio[:, 2] += 1
    with torch.no_grad():
        moved = net(features).logits != net(replace(features, audio=audio)).logits
    assert moved[0].any(dim=-1).tolist() == [False] * 2 + [True] * SMALL.window + [False] * 3


def test_live_output_depends_on_text_of_the_whole_past() -> None:
    """The text context network carries the first utterance to the twentieth."""
    net, features = network(), dialogues(20)
    text = features.text.clone()
    text[:, 0] += 1
    with torch.no_grad():
        moved = net(features).logits != net(replace(features, text=text)).logits
    assert moved[0].any(dim=-1).all()


@pytest.mark.parametrize("switches", [{}, {"use_audio": False}, {"use_text": False}], ids=str)
def test_offline_output_sees_the_future(switches: dict) -> None:
    """Offline, the last utterance changes what is said of the first, by sound and by words."""
    net, features = network(mode="offline", **switches), dialogues(9)
    with torch.no_grad():
        before, after = net(features).logits, net(changed(features, 8)).logits
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3


def test_offline_network_refuses_to_step() -> None:
    """What needs the future can't run live, and says so before the first utterance."""
    with pytest.raises(ModelError, match="offline and sees the future"):
        network(mode="offline").initial_state()


@pytest.mark.parametrize("mode", ["live", "offline"])
@pytest.mark.parametrize("attention", ["scalar", "literal", "query"])
def test_padding_never_changes_a_result(mode: str, attention: str) -> None:
    """A dialogue gives the same alone and padded in a batch, though the padding is NaN."""
    net = network(mode=mode, attention=attention)
    features = dialogues(3, 9, 1, 6, present=0.7)
    with torch.no_grad():
        padded = net(features)
        for b, length in enumerate((3, 9, 1, 6)):
            alone = net(features.map(lambda part, b=b, n=length: part[b : b + 1, :n]))
            for ours, theirs in zip(parts(padded), parts(alone), strict=True):
                torch.testing.assert_close(ours[b, :length], theirs[0], atol=1e-6, rtol=0)
                assert torch.equal(ours[b, length:], torch.zeros_like(ours[b, length:]))


def test_padding_before_an_utterance_is_refused() -> None:
    """A mask with a hole would shift the turns: it is an error, not a wrong answer."""
    features = replace(dialogues(3), utterance_mask=torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="utterances come first"):
        network()(features)


def test_empty_dialogue_in_a_batch_gives_zeros() -> None:
    """A dialogue of padding only costs nothing and breaks nothing, in both modes."""
    for mode in ("live", "offline"):
        with torch.no_grad():
            logits = network(mode=mode)(dialogues(2, 0)).logits
        assert torch.equal(logits[1], torch.zeros(2, SMALL.classes))
        assert logits[0].isfinite().all()


# --- missing modalities -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["live", "offline"])
def test_absent_modality_is_never_read(mode: str) -> None:
    """Whatever stands where a modality is absent, NaN included, changes nothing, gradients too."""
    net = network(mode=mode)
    clean = dialogues(7, 4, present=0.5)
    dirty = replace(
        clean,
        audio=clean.audio.masked_fill(~clean.audio_mask[..., None], torch.nan),
        text=clean.text.masked_fill(~clean.text_mask[..., None], torch.nan),
        commonsense=clean.commonsense.masked_fill(~clean.text_mask[..., None, None], torch.nan),
    )
    results = []
    for features in (clean, dirty):
        net.zero_grad()
        logits = net(features).logits
        logits.sum().backward()
        results.append([logits.detach(), *(weight.grad.clone() for weight in net.parameters())])
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
    _, first = net.step(turn(features, 0, 0), net.initial_state())
    _, second = net.step(replace(turn(features, 0, 1), text=None, commonsense=None), first)
    assert torch.equal(first.score_max, second.score_max)
    assert torch.equal(first.score_sum, second.score_sum)
    assert torch.equal(first.weighted_sum, second.weighted_sum)
    assert not torch.equal(first.external, second.external)


def test_absent_vectors_are_learned() -> None:
    """Training with missing modalities moves what stands in for them."""
    net = network()
    net(dialogues(6, present=0.5)).logits.square().sum().backward()
    assert net.absent_audio.grad.abs().sum() > 0
    assert net.text_context.absent.grad.abs().sum() > 0


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["scalar", "literal", "query"])
def test_state_size_does_not_grow(attention: str) -> None:
    """The state of turn 1000 has the bytes of turn 10's, what its tensors hold on to included."""
    net, features = network(attention=attention), dialogues(10)
    state, sizes = net.initial_state(), {}
    for t in range(1, 1001):
        _, state = net.step(turn(features, 0, t % 10), state)
        if t in (10, 1000):
            buffer = io.BytesIO()
            torch.save(state.tensors(), buffer)
            held = sum(part.untyped_storage().nbytes() for part in state.tensors().values())
            sizes[t] = len(buffer.getvalue()), held
    assert sizes[10] == sizes[1000]


def test_step_leaves_its_state_alone() -> None:
    """A provisional prediction is forgotten with its new state: the given one is untouched."""
    net, features = network(), dialogues(5)
    state = net.initial_state()
    for t in range(3):
        _, state = net.step(turn(features, 0, t), state)
    kept = state.map(torch.clone)
    provisional, _ = net.step(replace(turn(features, 0, 3), text=None), state)
    final, after = net.step(turn(features, 0, 3), state)
    assert state == kept
    assert after != kept
    assert not torch.equal(provisional, final)


def test_states_of_dialogues_stacked_go_on_as_each_alone() -> None:
    """Dialogues at different turns, stepped together with sound or words or neither, to 1e-5."""
    net, features = network(), dialogues(4, 4, 4, 4, present=0.5)
    states = [net.initial_state()]
    for b in range(1, 4):
        state = states[0]
        for t in range(b):
            _, state = net.step(turn(features, b, t), state)
        states.append(state)
    now = replace(features, utterance_mask=None).map(lambda part: part[:, 3])
    logits, after = net.step(now, DialogueState.stack(states))
    for b, state in enumerate(states):
        alone, next_state = net.step(turn(features, b, 3), state)
        torch.testing.assert_close(logits[b], alone, atol=1e-5, rtol=0)
        for name, part in next_state.tensors().items():
            torch.testing.assert_close(after.tensors()[name][b], part, atol=1e-5, rtol=0)


def test_states_of_each_speaker_are_moved_by_his_own_turns_alone() -> None:
    """What one speaker feels and wants stays as it was while another speaks; what others feel is
    the dialogue's, and moves."""
    net, features = network(by_speaker=True), dialogues(2)
    speaks = (replace(turn(features, 0, t), speaker=torch.tensor(t)) for t in range(2))
    _, first = net.step(next(speaks), net.initial_state())
    _, second = net.step(next(speaks), first)
    for name in ("internal", "purpose"):
        before, after = getattr(first, name), getattr(second, name)
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])
        assert (before[1:] == 0.0).all()
    assert not torch.equal(first.external, second.external)


def test_one_speakers_dialogue_is_the_same_by_speaker() -> None:
    """With nobody to be told apart the switch changes nothing, and neither do its weights."""
    features = replace(dialogues(6, 3, 9), speaker=None)
    with torch.no_grad():
        plain, apart = (network(by_speaker=kept)(features) for kept in (False, True))
    torch.testing.assert_close(plain.logits, apart.logits, atol=1e-6, rtol=0)


def test_a_step_of_many_streams_tells_their_speakers_apart() -> None:
    """Side by side, each dialogue has its own speakers' states."""
    net, features = network(by_speaker=True), dialogues(5, 5, 5)
    together, logits = net.initial_state(3), []
    for t in range(5):
        now = replace(features, utterance_mask=None).map(lambda part, t=t: part[:, t])
        one, together = net.step(now, together)
        logits.append(one)
    for b in range(3):
        alone = stepped(net, features, b)
        torch.testing.assert_close(torch.stack(logits)[:, b], alone, atol=1e-5, rtol=0)


def test_state_saved_and_restored_goes_on_alike() -> None:
    """A state through a file gives the very same next logits."""
    net, features = network(), dialogues(4)
    _, state = net.step(turn(features, 0, 0), net.initial_state())
    buffer = io.BytesIO()
    torch.save(state.tensors(), buffer)
    buffer.seek(0)
    restored = DialogueState(**torch.load(buffer))
    assert restored == state
    ours, theirs = (net.step(turn(features, 0, 1), s)[0] for s in (state, restored))
    assert torch.equal(ours, theirs)


# --- learning, switches, figures ----------------------------------------------------------------


def test_network_overfits_eight_utterances() -> None:
    """Two dialogues of four utterances with arbitrary labels are learned by heart."""
    torch.manual_seed(0)
    net, loss = HBAF(replace(SMALL, dropout=0.0)), InterModalLoss(SMALL.hidden)
    features, labels = dialogues(4, 4), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    mask = features.utterance_mask
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
    """Without commonsense the GRUs read [utterance; context], and relations change nothing."""
    net, features = network(use_commonsense=False), dialogues(4)
    assert net.text_context.combine["purpose"].in_features == 2 * SMALL.hidden
    with torch.no_grad():
        ours, theirs = net(features), net(replace(features, commonsense=features.commonsense + 1))
        other = network()(replace(features, commonsense=features.commonsense + 1))
        assert not torch.equal(network()(features).logits, other.logits)
    assert torch.equal(ours.logits, theirs.logits)


def test_switch_audio_skip_adds_a_linear_map() -> None:
    """The skip adds its own two tensors, and moves the output."""
    plain, skipping = network(), network(audio_skip=True)
    added = set(skipping.state_dict()) - set(plain.state_dict())
    assert added == {"audio_context.skip.weight", "audio_context.skip.bias"}
    plain.load_state_dict(skipping.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(plain(dialogues(4)).logits, skipping(dialogues(4)).logits)


@pytest.mark.parametrize(
    "switches", [{"literal_cross": True}, {"mode": "offline"}, {"window": 2}], ids=str
)
def test_switch_without_weights_of_its_own_changes_the_output(switches: dict) -> None:
    """The same weights say something else when they are wired the other way."""
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
    ],
)
def test_switch_attention_has_its_own_weights(attention: str, own: set) -> None:
    """w for the scalar score, nothing for the literal one, W_q for the query."""
    assert set(network(attention=attention).text_context.attention.state_dict()) == own


@pytest.mark.parametrize(
    ("switches", "complaint"),
    [
        ({"use_audio": False, "use_text": False}, "both off"),
        ({"hidden": 18, "heads": 4}, "must divide"),
        ({"window": 0}, "at least 1"),
        ({"mode": "online"}, "live or offline"),
        ({"attention": "dot"}, "scalar, literal or query"),
    ],
)
def test_config_that_cannot_be_built_is_refused(switches: dict, complaint: str) -> None:
    """The error names the setting and what it may be."""
    with pytest.raises(ConfigError, match=complaint):
        replace(SMALL, **switches)


def by_hand(tensor: Tensor, phase: float) -> Tensor:
    """Values that no random generator's next version can change."""
    return torch.sin(torch.arange(tensor.numel()) * 0.7 + phase).reshape(tensor.shape)


# From the plain loops of test_hbaf_equations.py, in float64.
GOLDEN = [
    [-0.3161498, -0.6403933, 0.2136090],
    [-0.3436465, -0.6756354, 0.2267970],
    [-0.5051149, -0.6013061, 0.4184437],
]


def test_golden_network_gives_the_committed_logits() -> None:
    """Weights and features set by hand give these logits in every version of torch and of ours."""
    config = replace(SMALL, hidden=8, classes=3, window=2, layers=1)
    net = HBAF(config).eval()
    with torch.no_grad():
        for k, (_, weight) in enumerate(sorted(net.named_parameters())):
            weight.copy_(0.5 * by_hand(weight, k))
        features = Features(
            by_hand(torch.empty(1, 3, 6), 0.1),
            by_hand(torch.empty(1, 3, 5), 0.2),
            by_hand(torch.empty(1, 3, 3, 4), 0.3),
            audio_mask=torch.tensor([[True, False, True]]),
            text_mask=torch.tensor([[True, True, False]]),
        )
        logits = net(features).logits[0]
    torch.testing.assert_close(logits, torch.tensor(GOLDEN), atol=1e-5, rtol=0)


# --- text features as the network hears them -----------------------------------------------------


def test_standardised_text_makes_the_features_scale_irrelevant() -> None:
    """Two networks alike but for the scale and place of their text features say the same."""
    torch.manual_seed(0)
    features, known = dialogues(5, 3), torch.randn(200, SMALL.text_width)
    ours, theirs = network(), network()
    ours.standardise(known)
    theirs.standardise(40.0 * known + 7.0)
    moved = replace(features, text=40.0 * features.text + 7.0)
    torch.testing.assert_close(ours(features).logits, theirs(moved).logits, atol=1e-5, rtol=1e-4)


def test_switch_standardise_text_off_hears_features_as_they_are() -> None:
    """Without it, training's features change nothing."""
    features = dialogues(4)
    plain, switched = network(), network(standardise_text=False)
    switched.standardise(100.0 + torch.randn(50, SMALL.text_width))
    assert torch.equal(plain(features).logits, switched(features).logits)
