"""M2FNet, TelME, M2R2 and Broad Mamba against their papers' equations in float64 plain loops."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks_kit import (
    LIVE_MAMBA,
    M2FNET,
    M2R2,
    MAMBA,
    TELME,
    both_present,
    dialogues,
    map_floats,
    randomised,
    ready,
    tensor,
)
from oracle import (
    Sequence,
    Vector,
    add,
    assert_same,
    attend,
    attend_by_head,
    dot,
    gru_step,
    layer_norm,
    linear,
    norm,
    plain,
    relu,
    scaled,
    sigmoid,
    softmax,
    tanh,
    times,
    weighted,
)
from torch import Tensor

from stream_hbaf.networks.baselines import m2r2
from stream_hbaf.networks.baselines.fusion import M2FNet, Shift, feature_loss, response_loss
from stream_hbaf.networks.baselines.mamba import (
    KERNEL,
    Broad,
    BroadMamba,
    MambaConfig,
    SelectiveScan,
)
from stream_hbaf.networks.network import PARTIES

pytestmark = pytest.mark.usefixtures("one_thread")


# --- M2FNet -------------------------------------------------------------------------------------


def multi_head(attention: Any, queries: Sequence, keys: Sequence, values: Sequence) -> Sequence:
    k = [linear(attention.key, x) for x in keys]
    v = [linear(attention.value, x) for x in values]
    return [
        linear(
            attention.out, attend_by_head(linear(attention.query, x), k, v, heads=attention.heads)
        )
        for x in queries
    ]


def transformer(layer: Any, sequence: Sequence) -> Sequence:
    attended = multi_head(layer.attention, sequence, sequence, sequence)
    first, last = layer.feed_forward[0], layer.feed_forward[3]
    results = []
    for x, a in zip(sequence, attended, strict=True):
        x = layer_norm(layer.attended, add(x, a))
        results.append(layer_norm(layer.fed, add(x, linear(last, relu(linear(first, x))))))
    return results


@pytest.mark.parametrize("switches", [{}, {"use_skips": False}, {"use_fusion": False}], ids=str)
def test_m2fnet_is_encoders_fusion_and_classifier(switches: dict[str, Any]) -> None:
    """Encoders with skip connections; text weighted by audio and joined; both classified."""
    net: Any = randomised(M2FNet(replace(M2FNET, layers=2, **switches)))
    features = map_floats(dialogues(4, 7), Tensor.double)
    inputs = net.inputs(features)
    h = {m: plain(inputs.modality(m)[0, :4]) for m in "al"}
    for m, sequence in h.items():
        for encoder in net.encoders[m].stack:
            encoded = sequence
            for layer in encoder:
                encoded = transformer(layer, encoded)
            if switches.get("use_skips", True):
                encoded = [add(x, e) for x, e in zip(sequence, encoded, strict=True)]
            sequence = encoded
        h[m] = sequence
    for layer in net.fusion:
        attended = multi_head(layer.attention, h["l"], h["a"], h["l"])
        h["l"] = [
            relu(linear(layer.join, relu(x + a))) for x, a in zip(h["l"], attended, strict=True)
        ]
    first, last = net.classifier[0], net.classifier[3]
    wanted = [linear(last, relu(linear(first, a + x))) for a, x in zip(h["a"], h["l"], strict=True)]
    assert_same(net(features).logits[0, :4], wanted)


# --- TelME --------------------------------------------------------------------------------------


def test_telme_classifies_each_utterance_by_itself() -> None:
    """Earlier utterances change nothing."""
    net, features = ready(TELME), dialogues(6)
    text = tensor(features.text).clone()
    text[:, 0] += 3
    with torch.no_grad():
        moved = net(replace(features, text=text)).logits != net(features).logits
    assert moved[0].any(dim=-1).tolist() == [True] + [False] * 5


def test_telme_shift_is_bounded_by_the_teachers_length() -> None:
    """Z = F_T + λ H, with λ at the bound for some utterances and 1 for others."""
    shift: Any = randomised(Shift(replace(TELME, bound=0.9)))
    teacher, student = torch.randn(2, 12, 8).double()
    teacher[6:] *= 9
    wanted, bounded = [], []
    for t, s in zip(plain(teacher), plain(student), strict=True):
        attended = layer_norm(shift.attended, add(s, linear(shift.out, linear(shift.value, s))))
        gate = relu(linear(shift.gate, t + attended))
        moved = times(gate, linear(shift.move, attended))
        share = min(0.9 * norm(t) / max(norm(moved), 1e-6), 1.0)
        bounded.append(share < 1)
        wanted.append(layer_norm(shift.shifted, add(t, scaled(share, moved))))
    assert_same(shift(teacher, student), wanted)
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
    for of_student, of_teacher in (rows, columns):
        correlations = [correlation(x, y) for x, y in zip(of_student, of_teacher, strict=True)]
        wanted += 16 * (1 - sum(correlations) / len(correlations))
    assert response_loss(student, teacher, temperature=4.0).item() == pytest.approx(
        wanted, abs=1e-9
    )
    assert response_loss(teacher, teacher, temperature=4.0).item() == pytest.approx(0, abs=1e-9)


def test_telme_feature_loss_is_divergence_of_similarities() -> None:
    """KL of a teacher's similarities to the teacher's vectors from those to the student's."""
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 8).double()
    students, teachers = ([[v / norm(x) for v in x] for x in plain(p)] for p in (student, teacher))
    wanted = 0.0
    for x in teachers:
        p, q = softmax([dot(x, y) for y in teachers]), softmax([dot(x, y) for y in students])
        wanted += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
    assert feature_loss(student, teacher).item() == pytest.approx(wanted, abs=1e-9)


def test_telme_distillation_trains_the_student_alone() -> None:
    """Without labels the audio encoder has a gradient, the text encoder none."""
    net, features = ready(TELME), dialogues(5, 4)
    criterion: Any = net.criterion()
    unlabelled = torch.full((2, 5), -1)
    criterion(net(features), both_present(features), unlabelled).backward()
    assert tensor(net.get_parameter("encoders.a.last.weight").grad).any()
    assert not tensor(net.get_parameter("encoders.l.last.weight").grad).any()
    assert not criterion.teacher.weight.grad.any()


# --- M2R2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_attention", [True, False])
def test_m2r2_is_topic_attention_party_and_emotion(use_attention: bool) -> None:
    """Missing modalities reconstructed, then the recurrence, turn by turn, of three speakers."""
    net: Any = randomised(m2r2.M2R2(replace(M2R2, use_attention=use_attention)))
    features = map_floats(dialogues(9, present=0.7), Tensor.double)
    inputs = net.inputs(features)
    topic, emotion = [0.0] * 8, [0.0] * 8
    parties: dict[int, Vector] = {}
    wanted = []
    for t, speaker in enumerate(tensor(features.speaker)[0].tolist()):
        audio, text = plain(inputs.audio[0, t]), plain(inputs.text[0, t])
        has_audio = bool(tensor(features.audio_mask)[0, t])
        has_text = bool(tensor(features.text_mask)[0, t])
        if has_text and not has_audio:
            audio = linear(net.common.decode["a"], tanh(linear(net.common.encode["l"], text)))
        elif has_audio and not has_text:
            text = linear(net.common.decode["l"], tanh(linear(net.common.encode["a"], audio)))
        u = relu(linear(net.join, audio + text))
        before = parties.get(speaker, [0.0] * 8)
        topic = gru_step(net.panet.topic, u + before, topic)
        context = topic
        if use_attention:
            keys = [topic, *(state for party, state in parties.items() if party != speaker)]
            context = attend(linear(net.panet.query, u + before), keys, keys)
        parties[speaker] = gru_step(net.panet.party, u + context, before)
        emotion = gru_step(net.emotion, parties[speaker], emotion, suffix="_l0")
        wanted.append(linear(net.classifier, emotion))
    assert len(parties) == 3
    assert_same(net(features).logits[0], wanted)


def test_m2r2_drops_modalities_in_training_only() -> None:
    """Utterances of both modalities lose one at times, never both; absent ones are replaced."""
    net = m2r2.M2R2(replace(M2R2, dropped=0.5)).eval()
    features = dialogues(200, present=0.8)
    torch.manual_seed(0)
    one_of_two = tensor(features.audio_mask) ^ tensor(features.text_mask)
    assert torch.equal(net._replaced(features).any(dim=-1), one_of_two)
    replaced = net.train()._replaced(features)
    both = both_present(features)
    assert not replaced.all(dim=-1).any()
    assert torch.equal(replaced.any(dim=-1) & ~both, one_of_two)
    assert replaced[both].float().mean(dim=0).tolist() == pytest.approx([0.25] * 2, abs=0.1)


def test_m2r2_loss_is_the_error_of_the_reconstructions() -> None:
    """Mean squared differences, of utterances of both modalities only."""
    net: Any = randomised(m2r2.M2R2(M2R2))
    features = map_floats(dialogues(5, 3, present=0.7), Tensor.double)
    output, chosen = net(features), both_present(features)
    loss = net.criterion()(output, chosen, torch.zeros(2, 5, dtype=torch.long))
    encode, decode = net.common.encode, net.common.decode
    errors, differences = [], []
    for audio, text in zip(
        plain(tensor(output.h_a)[chosen]), plain(tensor(output.h_l)[chosen]), strict=True
    ):
        z_a, z_l = tanh(linear(encode["a"], audio)), tanh(linear(encode["l"], text))
        reconstructed = linear(decode["a"], z_l) + linear(decode["l"], z_a)
        errors += [(x - y) ** 2 for x, y in zip(reconstructed, audio + text, strict=True)]
        differences += [(x - y) ** 2 for x, y in zip(z_a, z_l, strict=True)]
    wanted = sum(errors) / len(errors) + sum(differences) / len(differences)
    assert loss.item() == pytest.approx(wanted, abs=1e-9)


def test_m2r2_distinguishes_speakers_and_takes_any_number_of_them() -> None:
    """The speaker has an influence; a hundredth speaker counts as the last one."""
    net, features = ready(M2R2), dialogues(6)
    one = replace(features, speaker=torch.zeros(1, 6, dtype=torch.long))
    many = replace(features, speaker=torch.full((1, 6), 99))
    last = replace(features, speaker=torch.full((1, 6), PARTIES - 1))
    with torch.no_grad():
        assert (net(one).logits - net(features).logits).abs().max() > 1e-3
        assert torch.equal(net(many).logits, net(last).logits)


# --- Broad Mamba --------------------------------------------------------------------------------


def silu(x: Vector) -> Vector:
    return times(x, sigmoid(x))


def selective_scan(scan: SelectiveScan, inputs: Sequence) -> Sequence:
    kernel, bias = plain(scan.convolution.weight), plain(tensor(scan.convolution.bias))
    a, skip = plain(-scan.decay.exp()), plain(scan.skip)
    inner, states = len(inputs[0]), scan.states
    padded = [[0.0] * inner] * (KERNEL - 1) + inputs
    memory = [[0.0] * states for _ in range(inner)]
    outputs = []
    for t in range(len(inputs)):
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
        outputs.append([dot(memory[e], c) + skip[e] * x[e] for e in range(inner)])
    return outputs


def broad(nodes: Broad, x: Vector) -> Vector:
    def random_nodes(weights: Tensor, inputs: Vector) -> Vector:
        *rows, bias = plain(weights)
        return tanh(add(bias, weighted(inputs, rows)))

    feature = random_nodes(nodes.feature, layer_norm(nodes.norm, x))
    return add(x, linear(nodes.out, feature + random_nodes(nodes.enhancement, feature)))


@pytest.mark.parametrize("config", [MAMBA, LIVE_MAMBA], ids=["offline", "live"])
def test_mamba_is_scans_nodes_and_guided_fusion(config: MambaConfig) -> None:
    """S6 in one direction or two, broad nodes, modalities weighted by their probabilities."""
    net: Any = randomised(BroadMamba(config))
    features = map_floats(dialogues(6, 9), Tensor.double)
    inputs = net.inputs(features)
    h = {m: plain(inputs.modality(m)[0, :6]) for m in "al"}
    for m, sequence in h.items():
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
        h[m] = [layer_norm(context.norm, broad(context.broad, x)) for x in sequence]
    wanted = []
    for audio, text in zip(h["a"], h["l"], strict=True):
        unimodal = linear(net.guides["a"], audio), linear(net.guides["l"], text)
        likeliest = [max(softmax(logits)) for logits in unimodal]
        fused = weighted([p / sum(likeliest) for p in likeliest], [audio, text])
        wanted.append(linear(net.classifier, fused))
    assert_same(net(features).logits[0, :6], wanted)


def test_mamba_guidance_loss_is_the_mean_over_modalities() -> None:
    """Cross entropy of labelled utterances of both modalities, by each modality's classifier."""
    net, features = BroadMamba(MAMBA), dialogues(4, 3, present=0.8)
    labels = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 0]])
    criterion, output = net.criterion(), net(features)
    assert criterion is not None
    loss = criterion(output, both_present(features), labels)
    chosen = (both_present(features) & (labels >= 0)).nonzero().tolist()
    wanted = [
        -math.log(softmax(plain(tensor(output.unimodal)[b, t, m]))[int(labels[b, t])])
        for b, t in chosen
        for m in range(2)
    ]
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_mamba_random_nodes_are_kept_with_the_weights() -> None:
    """They aren't parameters, but a network without them would give another result."""
    one, other = ready(MAMBA, seed=1), ready(MAMBA, seed=2)
    assert "contexts.a.broad.feature" not in dict(one.named_parameters())
    other.load_state_dict(one.state_dict())
    features = dialogues(3)
    with torch.no_grad():
        assert torch.equal(one(features).logits, other(features).logits)
