"""M2FNet, TelME, M2R2 and Broad Mamba: their equations, and the promises that all networks keep.

The equations are written a second time: float64, plain loops, no torch.
"""

import math
from dataclasses import replace

import pytest
import torch
from test_hbaf_equations import (
    Sequence,
    Vector,
    add,
    apply,
    dot,
    layer_norm,
    linear,
    plain,
    randomised,
    relu,
    sigmoid,
    softmax,
    tanh,
    times,
)
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.baselines.m2fnet import Attention, M2FNet, M2FNetConfig
from stream_hbaf.networks.baselines.m2r2 import M2R2, M2R2Config
from stream_hbaf.networks.baselines.mamba import (
    KERNEL,
    Broad,
    BroadMamba,
    MambaConfig,
    SelectiveScan,
)
from stream_hbaf.networks.baselines.telme import (
    Shift,
    Telme,
    TelmeConfig,
    feature_loss,
    response_loss,
)
from stream_hbaf.networks.network import Network, NetworkConfig
from stream_hbaf.networks.state import PARTIES, Features

SIZES = {"audio_width": 6, "text_width": 5, "hidden": 8, "classes": 3, "dropout": 0.0}
M2FNET = M2FNetConfig(**SIZES, heads=2)
TELME = TelmeConfig(**SIZES)
M2R2_ = M2R2Config(**SIZES)
MAMBA = MambaConfig(**SIZES, states=3, nodes=6, layers=2)
LIVE_MAMBA = replace(MAMBA, mode="live")

BUILD = {M2FNetConfig: M2FNet, TelmeConfig: Telme, M2R2Config: M2R2, MambaConfig: BroadMamba}
OFFLINE = {"m2fnet": M2FNET, "mamba": MAMBA}
LIVE = {"telme": TELME, "m2r2": M2R2_, "mamba-live": LIVE_MAMBA}
EVERY = OFFLINE | LIVE
PART_OFF = {"use_audio": {"use_audio": False}, "use_text": {"use_text": False}}
ABLATIONS = [
    (M2FNET, "use_encoders"),
    (M2FNET, "use_skips"),
    (M2FNET, "use_fusion"),
    (TELME, "use_shift"),
    (TELME, "use_response"),
    (TELME, "use_feature"),
    (M2R2_, "use_reconstruction"),
    (M2R2_, "use_attention"),
    (MAMBA, "use_broad"),
    (MAMBA, "use_guidance"),
    (LIVE_MAMBA, "use_broad"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def network(config: NetworkConfig, seed: int = 0) -> Network:
    """Ready to predict; every weight drawn, absent vectors too (they start at zero)."""
    torch.manual_seed(seed)
    built = BUILD[type(config)](config).eval()
    for name, weight in built.named_parameters():
        if "absent" in name:
            nn.init.normal_(weight)
    return built


def dialogues(*lengths: int, seed: int = 0, present: float = 1.0) -> Features:
    """Random dialogues of three speakers; NaN in padding and where a modality is absent."""
    draw = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def modality(width: int) -> tuple[Tensor, Tensor]:
        there = torch.rand(shape, generator=draw) < present
        values = torch.randn(*shape, width, generator=draw)
        return values.masked_fill(~(mask & there)[..., None], torch.nan), there

    (audio, audio_mask), (text, text_mask) = modality(6), modality(5)
    speaker = torch.randint(0, 3, shape, generator=draw)
    return Features(audio, text, None, audio_mask, text_mask, mask, speaker)


def both(features: Features) -> Tensor:
    """The utterances that have audio and text."""
    return features.utterance_mask & features.audio_mask & features.text_mask


def stepped(net: Network, features: Features, b: int) -> Tensor:
    """Logits [U, C] of dialogue b, one utterance at a time, absent modalities None."""
    state, logits = net.initial_state(), []
    for t in range(int(features.utterance_mask[b].sum())):
        turn = Features(
            audio=features.audio[b, t] if features.audio_mask[b, t] else None,
            text=features.text[b, t] if features.text_mask[b, t] else None,
            speaker=features.speaker[b, t],
        )
        one, state = net.step(turn, state)
        logits.append(one)
    return torch.stack(logits)


def named(configs: dict[str, NetworkConfig]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", configs.values(), ids=configs.keys())


# --- what every network promises ----------------------------------------------------------------


@named(EVERY)
@pytest.mark.parametrize("off", [{}, *PART_OFF.values()], ids=["both", *PART_OFF])
def test_padding_and_other_dialogues_never_change_a_result(
    config: NetworkConfig, off: dict[str, bool]
) -> None:
    """A dialogue gives the same alone and in a batch whose padding is NaN; zeros in padding."""
    net = network(replace(config, **off))
    features = dialogues(3, 9, 0, 6, present=0.7)
    with torch.no_grad():
        padded = net(features)
        for b, length in ((0, 3), (1, 9), (3, 6)):
            alone = net(features.map(lambda part, b=b, n=length: part[b : b + 1, :n]))
            torch.testing.assert_close(
                padded.logits[b, :length], alone.logits[0], atol=1e-5, rtol=0
            )
            assert not padded.logits[b, length:].any()
    assert not padded.logits[2].any()
    assert padded.logits.isfinite().all()
    assert padded.logits[1].std() > 0.01
    parts = (padded.h_a, padded.h_l, padded.h_m)
    assert all(not part[~features.utterance_mask].any() for part in parts if part is not None)


@named(EVERY)
def test_absent_modality_is_never_read(config: NetworkConfig) -> None:
    """NaN where a modality is absent changes neither logits nor gradients; None is as absent."""
    net, dirty = network(config), dialogues(7, 4, present=0.5)
    clean = replace(dirty, audio=dirty.audio.nan_to_num(9), text=dirty.text.nan_to_num(9))
    results = []
    for features in (clean, dirty):
        net.zero_grad()
        logits = net(features).logits
        logits.square().sum().backward()
        grads = [weight.grad for weight in net.parameters() if weight.grad is not None]
        results.append([logits.detach(), *(grad.clone() for grad in grads)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    silent = torch.zeros_like(clean.audio_mask)
    with torch.no_grad():
        masked = net(replace(clean, audio_mask=silent)).logits
        none = net(replace(clean, audio=None, audio_mask=None)).logits
    torch.testing.assert_close(masked, none, atol=1e-6, rtol=0)
    assert not torch.allclose(masked, logits, atol=1e-3)


@named(LIVE)
@pytest.mark.parametrize("off", [{}, *PART_OFF.values()], ids=["both", *PART_OFF])
def test_step_of_each_utterance_equals_batch(config: NetworkConfig, off: dict[str, bool]) -> None:
    """Stepping through a dialogue gives what forward gives for it, to 1e-5."""
    net, features = network(replace(config, **off)), dialogues(11, 1, 6, present=0.7)
    with torch.no_grad():
        logits = net(features).logits
    for b, length in enumerate((11, 1, 6)):
        torch.testing.assert_close(stepped(net, features, b), logits[b, :length], atol=1e-5, rtol=0)


@named(LIVE)
def test_step_of_many_streams_equals_each_alone(config: NetworkConfig) -> None:
    """S streams stepped together give what each gives by itself; the given state is untouched."""
    net, features = network(config), dialogues(5, 5, 5, present=0.6)
    state, logits = net.initial_state(3), []
    for t in range(5):
        kept = state.map(torch.clone)
        now = replace(features, utterance_mask=None).map(lambda part, t=t: part[:, t])
        one, after = net.step(now, state)
        assert state == kept
        state = after
        logits.append(one)
    for b in range(3):
        alone = stepped(net, features, b)
        torch.testing.assert_close(torch.stack(logits)[:, b], alone, atol=1e-5, rtol=0)


@named(LIVE)
def test_state_size_does_not_grow(config: NetworkConfig) -> None:
    """The state of turn 100 holds the bytes of turn 1's."""
    net, features = network(config), dialogues(10)
    state, sizes = net.initial_state(), []
    for t in range(100):
        now = replace(features, utterance_mask=None).map(lambda part, t=t: part[0, t % 10])
        _, state = net.step(now, state)
        sizes.append([part.numel() for part in state.tensors().values()])
    assert sizes[0] == sizes[-1]


@named(LIVE)
@pytest.mark.parametrize("t", [1, 4, 8])
def test_live_output_never_depends_on_a_later_utterance(config: NetworkConfig, t: int) -> None:
    """Changing utterance t moves no output before t, but t's own."""
    net, features = network(config), dialogues(9, 9)
    audio, text = features.audio.clone(), features.text.clone()
    audio[:, t] = 3 - audio[:, t]
    text[:, t] = 3 - text[:, t]
    with torch.no_grad():
        before = net(features).logits
        after = net(replace(features, audio=audio, text=text)).logits
    torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
    assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@named(OFFLINE)
def test_offline_output_sees_the_future_and_refuses_to_step(config: NetworkConfig) -> None:
    """The last utterance changes what is said of the first; stepping is an error that says why."""
    net, features = network(config), dialogues(4)
    text = features.text.clone()
    text[:, 3] = 3 - text[:, 3]
    with torch.no_grad():
        moved = net(replace(features, text=text)).logits - net(features).logits
    assert moved[0, 0].abs().max() > 1e-3
    with pytest.raises(ModelError, match="sees the future"):
        net.initial_state()
    with pytest.raises(ModelError, match="sees the future"):
        net.step(features, None)


def test_telme_hears_each_utterance_by_itself() -> None:
    """What was said before changes nothing."""
    net, features = network(TELME), dialogues(6)
    text = features.text.clone()
    text[:, 0] += 3
    with torch.no_grad():
        moved = net(replace(features, text=text)).logits != net(features).logits
    assert moved[0].any(dim=-1).tolist() == [True] + [False] * 5


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (M2FNetConfig, {"mode": "live"}),
        (M2FNetConfig, {"heads": 3, "hidden": 8}),
        (TelmeConfig, {"mode": "offline"}),
        (M2R2Config, {"mode": "offline"}),
        (M2R2Config, {"dropped": 1.5}),
    ],
)
def test_configuration_that_cannot_be_is_refused(kind: type, changes: dict[str, object]) -> None:
    """A mode that the original doesn't have, or sizes that don't fit, is a ConfigError."""
    with pytest.raises(ConfigError, match="network:"):
        kind(**changes)


@pytest.mark.parametrize(
    ("config", "switch"), ABLATIONS, ids=lambda part: part if isinstance(part, str) else part.kind
)
def test_every_switch_changes_what_is_learned(config: NetworkConfig, switch: str) -> None:
    """Without the part the network still trains, on other gradients than with it."""
    features = dialogues(6, 5, present=0.7)
    labels = torch.randint(0, 3, (2, 6), generator=torch.Generator().manual_seed(1))
    grads = []
    for on in (True, False):
        net = network(replace(config, **{switch: on}))
        criterion = net.criterion()
        output = net(features)
        mask = features.utterance_mask
        loss = nn.functional.cross_entropy(output.logits[mask], labels[mask])
        if criterion is not None:
            torch.manual_seed(5)
            loss = loss + criterion(output, both(features), labels)
        loss.backward()
        grads.append(net.inputs.audio.weight.grad.clone())
    assert grads[1].isfinite().all()
    assert not torch.allclose(grads[0], grads[1], atol=1e-5)


@named(EVERY)
def test_gradient_reaches_every_parameter(config: NetworkConfig) -> None:
    """Cross entropy and the criterion together move all that is trained."""
    net, features = network(config).train(), dialogues(12, 9, 7, present=0.6)
    labels = torch.randint(0, 3, (3, 12), generator=torch.Generator().manual_seed(1))
    criterion = net.criterion()
    output = net(features)
    mask = features.utterance_mask
    loss = nn.functional.cross_entropy(output.logits[mask], labels[mask])
    if criterion is not None:
        loss = loss + criterion(output, both(features), labels)
    loss.backward()
    own = () if criterion is None else criterion.named_parameters(prefix="criterion")
    still = [
        name
        for name, weight in (*net.named_parameters(), *own)
        if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert still == []


@named({name: config for name, config in EVERY.items() if name != "m2fnet"})
def test_criterion_of_nothing_to_compare_is_zero_with_a_gradient(config: NetworkConfig) -> None:
    """No utterance of both modalities, or no label: a batch trains on, with no NaN."""
    net, features = network(config), dialogues(4, 3)
    criterion = net.criterion()
    nowhere, labels = torch.zeros(2, 4, dtype=torch.bool), torch.full((2, 4), -1)
    loss = criterion(net(features), nowhere, labels)
    loss.backward()
    assert loss.item() == 0
    assert all(w.grad.isfinite().all() for w in net.parameters() if w.grad is not None)
    unlabelled = criterion(net(features), features.utterance_mask, labels)
    assert unlabelled.isfinite()


@named({name: config for name, config in EVERY.items() if name != "m2fnet"})
@pytest.mark.parametrize("off", PART_OFF.values(), ids=PART_OFF)
def test_network_of_one_modality_has_no_criterion(
    config: NetworkConfig, off: dict[str, bool]
) -> None:
    """There is nobody to teach, to make up or to weigh."""
    assert network(replace(config, **off)).criterion() is None


@named(EVERY)
def test_network_learns_what_it_is_made_for(config: NetworkConfig) -> None:
    """The first utterance tells the label of all; TelME's, each its own."""
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (12, 6), generator=draw)
    if config.kind != "telme":
        labels = labels[:, :1].repeat(1, 6)
    tells = nn.functional.one_hot(labels, 5).float() * 3
    noise = torch.randn(12, 6, 11, generator=draw) / 3
    if config.kind != "telme":
        tells[:, 1:] = 0
    mask = torch.ones(12, 6, dtype=torch.bool)
    features = Features(noise[..., :6], tells + noise[..., 6:], None, mask, mask, mask, labels * 0)
    net = network(replace(config, hidden=16)).train()
    criterion = net.criterion()
    weights = [*net.parameters(), *(() if criterion is None else criterion.parameters())]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    for _ in range(60):
        output = net(features)
        error = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        extra = 0.0 if criterion is None else criterion(output, mask, labels)
        optimizer.zero_grad()
        (error + extra).backward()
        optimizer.step()
    assert error.item() < 0.1


# --- M2FNet -------------------------------------------------------------------------------------


def multi_head(
    attention: Attention, queries: Sequence, keys: Sequence, values: Sequence
) -> Sequence:
    size = len(queries[0]) // attention.heads
    q = [linear(attention.query, x) for x in queries]
    k = [linear(attention.key, x) for x in keys]
    v = [linear(attention.value, x) for x in values]
    told = []
    for query in q:
        joined: Vector = []
        for head in range(attention.heads):
            part = slice(head * size, (head + 1) * size)
            shares = softmax([dot(query[part], key[part]) / math.sqrt(size) for key in k])
            joined += add(*[[s * e for e in val[part]] for s, val in zip(shares, v, strict=True)])
        told.append(linear(attention.out, joined))
    return told


def transformer(layer: nn.Module, told: Sequence) -> Sequence:
    attended = multi_head(layer.attention, told, told, told)
    first, last = layer.feed_forward[0], layer.feed_forward[3]
    results = []
    for x, a in zip(told, attended, strict=True):
        x = layer_norm(layer.attended, add(x, a))
        results.append(layer_norm(layer.fed, add(x, linear(last, relu(linear(first, x))))))
    return results


@pytest.mark.parametrize("switches", [{}, {"use_skips": False}, {"use_fusion": False}], ids=str)
def test_m2fnet_is_encoders_fusion_and_classifier(switches: dict[str, bool]) -> None:
    """Skips around encoders; text that attends by sound, joined to itself; both classified."""
    net = randomised(M2FNet(replace(M2FNET, layers=2, **switches)))
    features = dialogues(4, 7).map(lambda part: part.double() if part.is_floating_point() else part)
    heard = net.inputs(features)
    told = {"a": plain(heard.audio[0, :4]), "l": plain(heard.text[0, :4])}
    for m, sequence in told.items():
        for encoder in net.encoders[m].stack:
            encoded = sequence
            for layer in encoder:
                encoded = transformer(layer, encoded)
            if switches.get("use_skips", True):
                encoded = [add(x, e) for x, e in zip(sequence, encoded, strict=True)]
            sequence = encoded
        told[m] = sequence
    for layer in net.fusion:
        attended = multi_head(layer.attention, told["l"], told["a"], told["l"])
        told["l"] = [
            relu(linear(layer.join, relu(x + a))) for x, a in zip(told["l"], attended, strict=True)
        ]
    first, last = net.classifier[0], net.classifier[3]
    wanted = [
        linear(last, relu(linear(first, a + x))) for a, x in zip(told["a"], told["l"], strict=True)
    ]
    assert_equal(net(features).logits[0, :4], wanted)


# --- TelME --------------------------------------------------------------------------------------


def norm(x: Vector) -> float:
    return math.sqrt(dot(x, x))


def test_telme_shift_is_bounded_by_the_teachers_length() -> None:
    """Z = F_T + λ H, with λ at the bound for some utterances and 1 for others."""
    shift = randomised(Shift(replace(TELME, bound=0.9)))
    teacher, student = torch.randn(2, 12, 8).double()
    teacher[6:] *= 9
    wanted, bounded = [], []
    for t, s in zip(plain(teacher), plain(student), strict=True):
        attended = layer_norm(shift.attended, add(s, linear(shift.out, linear(shift.value, s))))
        gate = relu(linear(shift.gate, t + attended))
        moved = times(gate, linear(shift.move, attended))
        share = min(0.9 * norm(t) / max(norm(moved), 1e-6), 1.0)
        bounded.append(share < 1)
        wanted.append(layer_norm(shift.shifted, add(t, [share * v for v in moved])))
    assert_equal(shift(teacher, student), wanted)
    assert set(bounded) == {True, False}


def correlation(x: Vector, y: Vector) -> float:
    x, y = ([v - sum(z) / len(z) for v in z] for z in (x, y))
    return dot(x, y) / (norm(x) * norm(y))


def test_telme_response_loss_is_correlation_between_and_within_classes() -> None:
    """τ² (1 - ρ) of the rows and of the columns of softened probabilities."""
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 5, 3).double()
    rows = [[softmax([v / 4 for v in x]) for x in plain(part)] for part in (student, teacher)]
    columns = [[list(column) for column in zip(*part, strict=True)] for part in rows]
    wanted = 0.0
    for ours, theirs in (rows, columns):
        alike = [correlation(x, y) for x, y in zip(ours, theirs, strict=True)]
        wanted += 16 * (1 - sum(alike) / len(alike))
    assert response_loss(student, teacher, temperature=4.0).item() == pytest.approx(
        wanted, abs=1e-9
    )
    assert response_loss(teacher, teacher, temperature=4.0).item() == pytest.approx(0, abs=1e-9)


def test_telme_feature_loss_is_divergence_of_likenesses() -> None:
    """KL of how alike a teacher's vector is to the teacher's, from how alike to the student's."""
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 8).double()
    ours, theirs = ([[v / norm(x) for v in x] for x in plain(p)] for p in (student, teacher))
    wanted = 0.0
    for x in theirs:
        p, q = softmax([dot(x, y) for y in theirs]), softmax([dot(x, y) for y in ours])
        wanted += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
    assert feature_loss(student, teacher).item() == pytest.approx(wanted, abs=1e-9)


def test_telme_teacher_learns_nothing_from_its_student() -> None:
    """Distillation moves what hears sound and leaves what reads text."""
    net, features = network(TELME), dialogues(5, 4)
    criterion = net.criterion()
    unlabelled = torch.full((2, 5), -1)
    criterion(net(features), both(features), unlabelled).backward()
    taught = {name: weight.grad for name, weight in net.named_parameters()}
    assert taught["encoders.a.last.weight"].abs().sum() > 0
    assert not taught["encoders.l.last.weight"].any()
    assert not criterion.teacher.weight.grad.any()


# --- M2R2 ---------------------------------------------------------------------------------------


def gru_cell(cell: nn.Module, x: Vector, hidden: Vector, suffix: str = "") -> Vector:
    def gates(name: str, vector: Vector) -> list[Vector]:
        weight, bias = (getattr(cell, f"{part}_{name}{suffix}") for part in ("weight", "bias"))
        given = apply(plain(weight), vector, plain(bias))
        return [given[k * len(hidden) : (k + 1) * len(hidden)] for k in range(3)]

    a, b = gates("ih", x), gates("hh", hidden)
    reset, update = sigmoid(add(a[0], b[0])), sigmoid(add(a[1], b[1]))
    new = tanh(add(a[2], times(reset, b[2])))
    return [(1 - z) * n + z * h for z, n, h in zip(update, new, hidden, strict=True)]


@pytest.mark.parametrize("use_attention", [True, False])
def test_m2r2_is_topic_attention_party_and_emotion(use_attention: bool) -> None:
    """Missing modalities from the other, then the recurrence, turn by turn, of three speakers."""
    net = randomised(M2R2(replace(M2R2_, use_attention=use_attention)))
    features = dialogues(9, present=0.7)
    features = features.map(lambda part: part.double() if part.is_floating_point() else part)
    heard = net.inputs(features)
    topic, emotion, parties = [0.0] * 8, [0.0] * 8, {}
    wanted = []
    for t, who in enumerate(features.speaker[0].tolist()):
        audio, text = plain(heard.audio[0, t]), plain(heard.text[0, t])
        a_there, l_there = bool(features.audio_mask[0, t]), bool(features.text_mask[0, t])
        if l_there and not a_there:
            audio = linear(net.common.decode["a"], tanh(linear(net.common.encode["l"], text)))
        elif a_there and not l_there:
            text = linear(net.common.decode["l"], tanh(linear(net.common.encode["a"], audio)))
        u = relu(linear(net.join, audio + text))
        before = parties.get(who, [0.0] * 8)
        topic = gru_cell(net.panet.topic, u + before, topic)
        hears = topic
        if use_attention:
            known = [topic, *(state for party, state in parties.items() if party != who)]
            query = linear(net.panet.query, u + before)
            shares = softmax([dot(query, k) / math.sqrt(8) for k in known])
            hears = add(*[[s * v for v in k] for s, k in zip(shares, known, strict=True)])
        parties[who] = gru_cell(net.panet.party, u + hears, before)
        emotion = gru_cell(net.emotion, parties[who], emotion, "_l0")
        wanted.append(linear(net.classifier, emotion))
    assert len(parties) == 3
    assert_equal(net(features).logits[0], wanted)


def test_m2r2_takes_modalities_away_in_training_only() -> None:
    """Utterances of both lose one now and then, never both; what is missing is made up always."""
    net, features = network(replace(M2R2_, dropped=0.5)), dialogues(200, present=0.8)
    torch.manual_seed(0)
    one_of_two = features.audio_mask ^ features.text_mask
    assert torch.equal(net._replaced(features).any(dim=-1), one_of_two)
    made_up = net.train()._replaced(features)
    assert not made_up.all(dim=-1).any()
    assert torch.equal(made_up.any(dim=-1) & ~both(features), one_of_two)
    assert made_up[both(features)].float().mean(dim=0).tolist() == pytest.approx(
        [0.25] * 2, abs=0.1
    )


def test_m2r2_loss_is_what_is_made_up_less_what_was_there() -> None:
    """Mean squared differences, of utterances of both modalities only."""
    net, features = randomised(M2R2(M2R2_)), dialogues(5, 3, present=0.7)
    features = features.map(lambda part: part.double() if part.is_floating_point() else part)
    output = net(features)
    chosen = both(features)
    loss = net.criterion()(output, chosen, torch.zeros(2, 5, dtype=torch.long))
    encode, decode = net.common.encode, net.common.decode
    rebuilt, alike = [], []
    for audio, text in zip(plain(output.h_a[chosen]), plain(output.h_l[chosen]), strict=True):
        z_a, z_l = tanh(linear(encode["a"], audio)), tanh(linear(encode["l"], text))
        made = linear(decode["a"], z_l) + linear(decode["l"], z_a)
        rebuilt += [(x - y) ** 2 for x, y in zip(made, audio + text, strict=True)]
        alike += [(x - y) ** 2 for x, y in zip(z_a, z_l, strict=True)]
    wanted = sum(rebuilt) / len(rebuilt) + sum(alike) / len(alike)
    assert loss.item() == pytest.approx(wanted, abs=1e-9)


def test_m2r2_tells_speakers_apart_and_takes_any_number_of_them() -> None:
    """Who spoke matters; a hundredth speaker is one of those that aren't told apart."""
    net, features = network(M2R2_), dialogues(6)
    one = replace(features, speaker=torch.zeros(1, 6, dtype=torch.long))
    many = replace(features, speaker=torch.full((1, 6), 99))
    last = replace(features, speaker=torch.full((1, 6), PARTIES - 1))
    with torch.no_grad():
        assert (net(one).logits - net(features).logits).abs().max() > 1e-3
        assert torch.equal(net(many).logits, net(last).logits)


# --- Broad Mamba --------------------------------------------------------------------------------


def silu(x: Vector) -> Vector:
    return times(x, sigmoid(x))


def selective_scan(scan: SelectiveScan, given: Sequence) -> Sequence:
    kernel, bias = plain(scan.convolution.weight), plain(scan.convolution.bias)
    a, skip = plain(-scan.decay.exp()), plain(scan.skip)
    inner, states = len(given[0]), scan.states
    padded = [[0.0] * inner] * (KERNEL - 1) + given
    memory = [[0.0] * states for _ in range(inner)]
    told = []
    for t in range(len(given)):
        x = [
            bias[e] + sum(kernel[e][0][k] * padded[t + k][e] for k in range(KERNEL))
            for e in range(inner)
        ]
        x = silu(x)
        selected = linear(scan.select, x)
        b, c = selected[scan.rank : scan.rank + states], selected[scan.rank + states :]
        delta = [math.log1p(math.exp(v)) for v in linear(scan.rate, selected[: scan.rank])]
        for e in range(inner):
            for n in range(states):
                memory[e][n] = math.exp(delta[e] * a[e][n]) * memory[e][n] + delta[e] * b[n] * x[e]
        told.append([dot(memory[e], c) + skip[e] * x[e] for e in range(inner)])
    return told


def broad(nodes: Broad, x: Vector) -> Vector:
    def spread(weights: Tensor, given: Vector) -> Vector:
        *rows, bias = plain(weights)
        return tanh(add(bias, *[[v * w for w in row] for v, row in zip(given, rows, strict=True)]))

    feature = spread(nodes.feature, layer_norm(nodes.norm, x))
    return add(x, linear(nodes.out, feature + spread(nodes.enhancement, feature)))


@pytest.mark.parametrize("config", [MAMBA, LIVE_MAMBA], ids=["offline", "live"])
def test_mamba_is_scans_nodes_and_guided_fusion(config: MambaConfig) -> None:
    """S6 in one direction or two, broad nodes, and modalities weighed by how sure they are."""
    net = randomised(BroadMamba(config))
    features = dialogues(6, 9).map(lambda part: part.double() if part.is_floating_point() else part)
    heard = net.inputs(features)
    told = {"a": plain(heard.audio[0, :6]), "l": plain(heard.text[0, :6])}
    for m, sequence in told.items():
        context = net.contexts[m]
        for block in context.blocks:
            split = [linear(block.into, layer_norm(block.norm, x)) for x in sequence]
            x, gate = [row[:8] for row in split], [row[8:] for row in split]
            y = selective_scan(block.onward, x)
            if config.mode == "offline":
                back = selective_scan(block.back, x[::-1])[::-1]
                y = [add(p, q) for p, q in zip(y, back, strict=True)]
            sequence = [
                add(s, linear(block.out, times(p, silu(g))))
                for s, p, g in zip(sequence, y, gate, strict=True)
            ]
        told[m] = [layer_norm(context.norm, broad(context.broad, x)) for x in sequence]
    wanted = []
    for a, text in zip(told["a"], told["l"], strict=True):
        sure = [max(softmax(linear(net.guides[m], x))) for m, x in (("a", a), ("l", text))]
        fused = [(sure[0] * p + sure[1] * q) / sum(sure) for p, q in zip(a, text, strict=True)]
        wanted.append(linear(net.classifier, fused))
    assert_equal(net(features).logits[0, :6], wanted)


def test_mamba_guidance_loss_is_the_mean_of_the_modalities_own() -> None:
    """Cross entropy of labelled utterances of both modalities, by each modality's classifier."""
    net, features = network(MAMBA), dialogues(4, 3, present=0.8)
    labels = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 0]])
    output = net(features)
    loss = net.criterion()(output, both(features), labels)
    chosen = (both(features) & (labels >= 0)).nonzero().tolist()
    wanted = [
        -math.log(softmax(plain(output.unimodal[b, t, m]))[labels[b, t]])
        for b, t in chosen
        for m in range(2)
    ]
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_mamba_random_nodes_are_kept_with_the_weights() -> None:
    """They aren't trained, but another network is another one without them."""
    one, other = network(MAMBA, seed=1), network(MAMBA, seed=2)
    assert "contexts.a.broad.feature" not in dict(one.named_parameters())
    other.load_state_dict(one.state_dict())
    features = dialogues(3)
    with torch.no_grad():
        assert torch.equal(one(features).logits, other(features).logits)


def assert_equal(ours: Tensor, oracle: list) -> None:
    torch.testing.assert_close(
        ours.detach(), torch.tensor(oracle, dtype=torch.float64), atol=1e-9, rtol=0
    )
