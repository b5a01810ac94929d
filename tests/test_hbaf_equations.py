"""The paper's equations 1-17 and 22, written a second time: float64, plain loops, no torch.

Each test gives the module random weights and compares it with the loops; the last one compares
the whole network, so that the wiring between the equations is checked as well.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks_kit import randomised, tensor
from oracle import (
    Sequence,
    Vector,
    add,
    apply,
    assert_same,
    attend,
    attend_by_head,
    bilstm,
    dot,
    gru_step,
    layer_norm,
    linear,
    plain,
    relu,
    residual,
    sigmoid,
    tanh,
    weighted,
)
from torch import nn

from stream_hbaf.networks.hbaf import (
    HBAF,
    AudioContextNetwork,
    BimodalAttention,
    DynamicFilterGate,
    HbafConfig,
    Residual,
    TransformerEncoder,
)
from stream_hbaf.networks.network import Features
from stream_hbaf.networks.windows import run_side_by_side

TINY = HbafConfig(
    audio_width=3,
    text_width=5,
    commonsense_width=2,
    hidden=4,
    filters=3,
    heads=2,
    layers=2,
    classes=3,
    window=3,
    dropout=0.0,
)


# --- section 3.1 --------------------------------------------------------------------------------


def transformer_layer(layer: Any, inputs: Sequence) -> Sequence:
    heads, width = layer.self_attn.num_heads, len(inputs[0])
    weight, bias = plain(layer.self_attn.in_proj_weight), plain(layer.self_attn.in_proj_bias)
    q, k, v = (
        [apply(weight[s : s + width], x, bias[s : s + width]) for x in inputs]
        for s in (0, width, 2 * width)
    )
    outputs = []
    for query, x in zip(q, inputs, strict=True):
        attended = attend_by_head(query, k, v, heads=heads)
        x = layer_norm(layer.norm1, add(x, linear(layer.self_attn.out_proj, attended)))
        fed = linear(layer.linear2, relu(linear(layer.linear1, x)))
        outputs.append(layer_norm(layer.norm2, add(x, fed)))
    return outputs


def audio_context(network: Any, inputs: Sequence) -> Sequence:
    if isinstance(network, nn.Linear):
        return [linear(network, x) for x in inputs]
    kernel, bias = plain(network.convolution.weight), plain(network.convolution.bias)
    edge = [[0.0] * len(inputs[0])]
    padded = edge + inputs + edge
    sequence = [
        relu(
            [
                b + sum(dot([column[k] for column in kernel[f]], padded[t + k]) for k in range(3))
                for f, b in enumerate(bias)
            ]
        )
        for t in range(len(inputs))
    ]
    for level in range(2):
        sequence = bilstm(network.lstm, sequence, level=level)
    for layer in network.transformer.layers:
        sequence = transformer_layer(layer, sequence)
    if network.skip is not None:
        sequence = [add(s, linear(network.skip, x)) for s, x in zip(sequence, inputs, strict=True)]
    return sequence


def equations_1_to_3(
    attention: Any, utterances: Sequence, present: list[bool], t: int, kind: str, reach: int
) -> Vector:
    """l_t^c; ``reach`` bounds the past of "query" only."""
    first = max(0, t - reach) if kind == "query" else 0
    past = [i for i in range(first, t) if present[i]]
    width = len(utterances[0])
    if not past:
        return [0.0] * width
    u = {i: tanh(linear(attention.project, utterances[i])) for i in past}  # (1)
    if kind == "literal":  # (2) with exp of a vector: every dimension has its own softmax
        context = []
        for d in range(width):
            total = sum(math.exp(u[i][d]) for i in past)
            context.append(sum(math.exp(u[i][d]) / total * utterances[i][d] for i in past))
        return context
    if kind == "scalar":
        w = plain(attention.score.weight)[0]
    else:
        w = linear(attention.query, utterances[t])
    total = sum(math.exp(dot(w, u[i])) for i in past)
    alpha = [math.exp(dot(w, u[i])) / total for i in past]  # (2)
    return weighted(alpha, [utterances[i] for i in past])  # (3)


def text_context(
    network: Any,
    texts: Sequence,
    relations: list[Sequence],
    present: list[bool],
    config: HbafConfig,
) -> Sequence:
    absent = plain(network.absent)
    utterances = [
        linear(network.project, x) if given else absent
        for x, given in zip(texts, present, strict=True)
    ]
    states = {name: [0.0] * config.hidden for name in ("external", "internal", "purpose")}
    outputs = []
    for t, current in enumerate(utterances):
        reach = config.window - 1 if config.mode == "live" else len(utterances)
        context = equations_1_to_3(
            network.attention, utterances, present, t, config.attention, reach
        )
        for k, name in enumerate(states):  # (4), (5), (6)
            relation = relations[t][k] if present[t] else [0.0] * config.commonsense_width
            x = current + context + (relation if config.use_commonsense else [])
            x = linear(network.combine[name], x)
            states[name] = gru_step(getattr(network, name), x, states[name], suffix="_l0")
        outputs.append(linear(network.reduce, [v for state in states.values() for v in state]))
    return outputs


# --- section 3.2 --------------------------------------------------------------------------------


def equations_7_to_9(
    attention: Any, target: dict[str, Vector], window: dict[str, Sequence]
) -> dict[str, Vector]:
    """The keys are the printed names: "a" and "l" (7), "a-l" (8), "l-a" (9)."""
    q = {m: linear(attention.query[m], target[m]) for m in target}
    k = {m: [linear(attention.key[m], x) for x in window[m]] for m in target}
    v = {m: [linear(attention.value[m], x) for x in window[m]] for m in target}
    zeta = {m: attend(q[m], k[m], v[m]) for m in target}
    if len(target) == 2:
        zeta["a-l"] = attend(q["a"], k["l"], v["l"])
        zeta["l-a"] = attend(q["l"], k["a"], v["a"])
    return zeta


def equations_10_to_13(gate: Any, own: Vector, cross: Vector) -> Vector:
    opened = sigmoid(
        add(
            apply(plain(gate.own.weight), own),
            apply(plain(gate.cross.weight), cross),
            plain(gate.own.bias),
        )
    )
    return [g * o + (1 - g) * c for g, o, c in zip(opened, own, cross, strict=True)]


def fuse(network: Any, target: dict[str, Vector], window: dict[str, Sequence]) -> Vector:
    fusion, config = network.fusion, network.config
    refined = dict(target)
    if config.use_bimodal_attention:
        zeta = equations_7_to_9(fusion.attention, target, window)
        # The printed equations give audio (l-a), text (a-l).
        cross = {"a": "l-a", "l": "a-l"} if config.literal_cross else {"a": "a-l", "l": "l-a"}
        for m in target:
            if len(target) == 1:
                refined[m] = zeta[m]
            elif config.use_gate:
                refined[m] = equations_10_to_13(fusion.gate[m], zeta[m], zeta[cross[m]])
            else:
                refined[m] = [v / 2 for v in add(zeta[m], zeta[cross[m]])]
    h_m: Vector = []
    for m in target:
        kept = config.use_residual
        h_m += residual(fusion.residual[m], target[m], refined[m]) if kept else refined[m]
    return h_m


def whole(network: Any, features: Features) -> Sequence:
    """Logits of one dialogue, [U][C]: every utterance's window is built anew."""
    config: HbafConfig = network.config
    audio = plain(tensor(features.audio)[0])
    streams: dict[str, Sequence] = {}
    if config.use_audio:
        absent, present = plain(network.absent_audio), tensor(features.audio_mask)[0].tolist()
        audio = [x if given else absent for x, given in zip(audio, present, strict=True)]
    if config.use_text:
        streams["l"] = text_context(
            network.text_context,
            plain(tensor(features.text)[0]),
            plain(tensor(features.commonsense)[0]),
            tensor(features.text_mask)[0].tolist(),
            config,
        )
    logits = []
    for t in range(len(audio)):
        live = config.mode == "live"
        first, end = (max(0, t - config.window + 1), t + 1) if live else (0, len(audio))
        window = {}
        if config.use_audio:
            window["a"] = audio_context(network.audio_context, audio[first:end])
        if config.use_text:
            window["l"] = streams["l"][first:end]
        target = {m: sequence[t - first] for m, sequence in window.items()}
        logits.append(linear(network.classifier, fuse(network, target, window)))
    return logits


# --- tests --------------------------------------------------------------------------------------


def dialogue(turns: int = 6) -> Features:
    torch.manual_seed(11)
    audio_mask = torch.ones(1, turns, dtype=torch.bool)
    text_mask = audio_mask.clone()
    audio_mask[0, 1::4] = False
    text_mask[0, 0::3] = False
    return Features(
        audio=torch.randn(1, turns, 3).double(),
        text=torch.randn(1, turns, 5).double(),
        commonsense=torch.randn(1, turns, 3, 2).double(),
        audio_mask=audio_mask,
        text_mask=text_mask,
    )


@pytest.mark.parametrize("kind", ["scalar", "literal", "query"])
@pytest.mark.parametrize("mode", ["live", "offline"])
def test_soft_attention_is_equations_1_to_3(kind: Any, mode: Any) -> None:
    """The carried sums are the paper's softmax over the past, for each reading of eq 2."""
    network: Any = randomised(HBAF(replace(TINY, attention=kind, mode=mode)))
    utterances = torch.randn(1, 7, 4).double() * 3
    present = [True, False, True, True, False, True, True]
    attention: Any = network.text_context.attention
    contexts, _ = attention(utterances, torch.tensor([present]), network.blank(1))
    reach = TINY.window - 1 if mode == "live" else 7
    oracle = [
        equations_1_to_3(attention, plain(utterances[0]), present, t, kind, reach) for t in range(7)
    ]
    assert_same(contexts[0], oracle)


def test_soft_attention_keeps_scores_that_would_overflow() -> None:
    """Scores of many hundreds, whose exp is no float64 and no float32, still weigh the past."""
    network = randomised(HBAF(TINY))
    attention: Any = network.text_context.attention
    with torch.no_grad():
        attention.score.weight.fill_(1e4)
    utterances = torch.randn(1, 5, 4).double()
    contexts, _ = attention(utterances, torch.ones(1, 5, dtype=torch.bool), network.blank(1))
    scores = [sum(tanh(linear(attention.project, x))) for x in plain(utterances[0])]
    largest = max(range(4), key=lambda i: scores[i])
    assert_same(contexts[0, 4], plain(utterances[0, largest]))


@pytest.mark.parametrize("kind", ["scalar", "literal", "query"])
@pytest.mark.parametrize("textless", [0, 34], ids=["text", "no-text-at-first"])
def test_soft_attention_of_a_long_dialogue_is_equations_1_to_3(kind: Any, textless: int) -> None:
    """Blocks of 32 utterances give what the loops give, also after a block without text."""
    network = randomised(HBAF(replace(TINY, attention=kind)))
    utterances = torch.randn(1, 70, 4).double() * 3
    present = [t >= textless and t % 5 != 2 for t in range(70)]
    attention: Any = network.text_context.attention
    contexts, _ = attention(utterances, torch.tensor([present]), network.blank(1))
    for t in (0, 1, 31, 32, 33, 35, 36, 63, 64, 65, 69):
        reach = TINY.window - 1
        oracle = equations_1_to_3(attention, plain(utterances[0]), present, t, kind, reach)
        assert_same(contexts[0, t], oracle)


@pytest.mark.parametrize("kind", ["scalar", "literal", "query"])
def test_soft_attention_is_the_same_in_any_pieces(kind: Any) -> None:
    """Contexts and state don't depend on how many utterances are given at a time."""
    network = randomised(HBAF(replace(TINY, attention=kind)))
    attention: Any = network.text_context.attention
    utterances = torch.randn(2, 40, 4).double()
    present = torch.rand(2, 40) < 0.7
    whole_at_once, end = attention(utterances, present, network.blank(2))
    state, parts = network.blank(2), []
    for piece in (slice(0, 1), slice(1, 34), slice(34, 36), slice(36, 40)):
        contexts, state = attention(utterances[:, piece], present[:, piece], state)
        parts.append(contexts)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_at_once, atol=1e-12, rtol=0)
    for name, part in state.tensors().items():
        torch.testing.assert_close(part, end.tensors()[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["scalar", "literal", "query"])
def test_gradient_of_soft_attention_is_right(kind: Any) -> None:
    """Through blocks, masks and the carried sums: autograd agrees with finite differences."""
    network = randomised(HBAF(replace(TINY, attention=kind, hidden=2)))
    attention: Any = network.text_context.attention
    utterances = torch.randn(1, 36, 2).double().requires_grad_()
    present = torch.ones(1, 36, dtype=torch.bool)
    present[0, [0, 3, 33]] = False
    start = network.blank(1)
    assert torch.autograd.gradcheck(lambda x: attention(x, present, start)[0], utterances)


@pytest.mark.parametrize("kind", ["scalar", "literal", "query"])
def test_gradient_of_soft_attention_without_any_text_is_zero(kind: Any) -> None:
    """Two blocks with nothing in the sums give zeros, and gradients of zero, never NaN."""
    network = HBAF(replace(TINY, attention=kind))
    attention: Any = network.text_context.attention
    utterances = torch.randn(1, 36, 4, requires_grad=True)
    no_text = torch.zeros(1, 36, dtype=torch.bool)
    contexts, _ = attention(utterances, no_text, network.blank(1))
    contexts.sum().backward()
    assert torch.equal(contexts, torch.zeros(1, 36, 4))
    assert torch.equal(tensor(utterances.grad), torch.zeros(1, 36, 4))


def test_soft_attention_keeps_its_sums_when_a_larger_score_comes() -> None:
    """In float32, scores that rise by hundreds: each context is the largest one's utterance."""
    attention: Any = HBAF(TINY).text_context.attention
    with torch.no_grad():
        attention.project.weight.copy_(torch.eye(4))
        attention.project.bias.zero_()
        attention.score.weight.copy_(torch.tensor([[1e4, 0.0, 0.0, 0.0]]))
        utterances = torch.zeros(1, 40, 4)
        utterances[0, :, 0] = torch.linspace(-1, 1, 40)  # about 200 to 500 apart, once scored
        contexts, _ = attention(
            utterances, torch.ones(1, 40, dtype=torch.bool), HBAF(TINY).blank(1)
        )
    torch.testing.assert_close(contexts[0, 1:], utterances[0, :-1], atol=1e-6, rtol=0)


def test_grus_side_by_side_are_torchs_own() -> None:
    """One loop for all three gives the states, and the gradients, of three ``nn.GRU``."""
    torch.manual_seed(2)
    grus = [nn.GRU(4, 4, batch_first=True).double() for _ in range(3)]
    inputs = [torch.randn(2, 6, 4).double() for _ in range(3)]
    before = [torch.randn(2, 4).double() for _ in range(3)]
    states = run_side_by_side(grus, inputs, before)
    for gru, x, start, ours in zip(grus, inputs, before, states, strict=True):
        expected, _ = gru(x, start[None])
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
        wanted = torch.autograd.grad(expected.square().sum(), list(gru.parameters()))
        got = torch.autograd.grad(ours.square().sum(), list(gru.parameters()), retain_graph=True)
        for gradient, reference in zip(got, wanted, strict=True):
            torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=0)


def test_transformer_encoder_is_torchs_own() -> None:
    """Names of weights and results are those of ``nn.TransformerEncoder``."""
    ours = randomised(TransformerEncoder(TINY))
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    reference.load_state_dict(ours.state_dict())
    sequence = torch.randn(3, 5, 4).double()
    torch.testing.assert_close(ours(sequence), reference(sequence), atol=1e-12, rtol=0)


@pytest.mark.parametrize("use_commonsense", [True, False])
def test_text_context_network_is_equations_4_to_6(use_commonsense: bool) -> None:
    """Three GRUs of [utterance; context; relation], reduced to H."""
    config = replace(TINY, use_commonsense=use_commonsense)
    network = randomised(HBAF(config))
    features = dialogue()
    ours, state = network.text_context(features, features.present(), network.blank(1))
    oracle = text_context(
        network.text_context,
        plain(tensor(features.text)[0]),
        plain(tensor(features.commonsense)[0]),
        tensor(features.text_mask)[0].tolist(),
        config,
    )
    assert_same(ours[0], oracle)
    assert state.external.shape == (1, 4)


@pytest.mark.parametrize("skip", [False, True])
def test_audio_context_network_is_section_3_1_1(skip: bool) -> None:
    """Convolution, two BiLSTM layers and the Transformer layers, by hand."""
    network = randomised(AudioContextNetwork(replace(TINY, audio_skip=skip)))
    audio = torch.randn(1, 4, 3).double()
    assert_same(network(audio)[0], audio_context(network, plain(audio[0])))


@pytest.mark.parametrize("literal_cross", [False, True])
def test_bimodal_attention_is_equations_7_to_9(literal_cross: bool) -> None:
    """Self- and cross-attention as printed; the switch exchanges the two."""
    attention = randomised(BimodalAttention(replace(TINY, literal_cross=literal_cross)))
    window = {m: torch.randn(1, 3, 4).double() for m in "al"}
    own, cross = attention({m: H[:, -1:] for m, H in window.items()}, window)
    sequences = {m: plain(H[0]) for m, H in window.items()}
    zeta = equations_7_to_9(attention, {m: s[-1] for m, s in sequences.items()}, sequences)
    assert_same(own["a"][0, 0], zeta["a"])
    assert_same(own["l"][0, 0], zeta["l"])
    assert_same(cross["a"][0, 0], zeta["l-a" if literal_cross else "a-l"])
    assert_same(cross["l"][0, 0], zeta["a-l" if literal_cross else "l-a"])


def test_dynamic_filter_gate_is_equations_10_to_13() -> None:
    """The sigmoid gate mixes own and cross-modal information."""
    gate = randomised(DynamicFilterGate(4))
    own, cross = torch.randn(4).double(), torch.randn(4).double()
    assert_same(gate(own, cross), equations_10_to_13(gate, plain(own), plain(cross)))


def test_residual_is_equations_14_to_17() -> None:
    """Addition and one norm, feed-forward, addition and one norm."""
    module = randomised(Residual(4, 0.0))
    before, refined = torch.randn(4).double(), torch.randn(4).double()
    ours = module(before, refined)
    assert_same(ours, residual(module, plain(before), plain(refined)))


@pytest.mark.parametrize("mode", ["live", "offline"])
@pytest.mark.parametrize(
    "switches",
    [
        {},
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
        {"attention": "literal"},
        {"attention": "query"},
        {"window": 1},
        {"window": 6, "layers": 1},
    ],
    ids=lambda switches: "-".join(switches) or "paper",
)
def test_whole_network_is_the_equations_in_order(mode: Any, switches: dict[str, Any]) -> None:
    """From features to logits (the fully connected layer of eq 22) for every switch and mode."""
    network = randomised(HBAF(replace(TINY, mode=mode, **switches)))
    features = dialogue()
    assert_same(network(features).logits[0], whole(network, features))
