"""MMGCN, HGraph-CL and AGF-IB against their papers' equations in float64 plain loops."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks_kit import AGF_IB, HGRAPH_CL, MMGCN, dialogues, randomised, tensor
from oracle import (
    Vector,
    add,
    assert_same,
    cosine,
    dot,
    linear,
    plain,
    relu,
    scaled,
    sigmoid,
    softmax,
    tanh,
    times,
    weighted,
)
from torch import nn

from stream_hbaf.networks.baselines.agf_ib import (
    AgfIb,
    AgfIbLoss,
    SignedGraph,
    divergence,
    emotion_contrast,
)
from stream_hbaf.networks.baselines.graph import (
    AttentionGraph,
    DeepGraph,
    HgraphCl,
    Mmgcn,
    edges_of_all,
    edges_within,
    perturb,
    propagation,
)
from stream_hbaf.networks.baselines.layers import supervised_contrast

pytestmark = pytest.mark.usefixtures("one_thread")


def place(node: int, turns: int) -> tuple[int, int]:
    """A node's modality and turn: one modality's nodes stand after the other's."""
    return divmod(node, turns)


# --- MMGCN --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross", [True, False])
def test_graph_of_mmgcn_is_weighted_by_angles(cross: bool) -> None:
    """A_ij = 1 - arccos(cos) / π where joined; P = D^-½ A D^-½; padding has no edges."""
    torch.manual_seed(0)
    turns, length = 4, 3
    nodes = torch.randn(1, 2 * turns, 5, dtype=torch.float64)
    mask = torch.arange(turns)[None] < length
    rows = nodes[0].tolist()
    weights = [[0.0] * (2 * turns) for _ in rows]
    for i, x in enumerate(rows):
        for j, y in enumerate(rows):
            (m, t), (n, u) = place(i, turns), place(j, turns)
            if t < length and u < length and (m == n or (cross and t == u)):
                angle = math.acos(max(-1.0, min(1.0, cosine(x, y))) * 0.99999)
                weights[i][j] = 1 - angle / math.pi
    degrees = [sum(row) for row in weights]
    oracle = [
        [w / math.sqrt(degrees[i] * degrees[j]) if w else 0.0 for j, w in enumerate(row)]
        for i, row in enumerate(weights)
    ]
    assert_same(propagation(nodes, mask, modalities=2, cross=cross)[0], oracle)


def test_convolution_of_mmgcn_is_gcnii() -> None:
    """Initial residual and identity mapping, layer by layer, with β_l = log(λ / l + 1)."""
    graph = randomised(DeepGraph(replace(MMGCN, layers=3)))
    nodes = torch.randn(1, 4, 8, dtype=torch.float64)
    spread = torch.rand(1, 4, 4, dtype=torch.float64)
    first = states = [relu(linear(graph.enter, x)) for x in nodes[0].tolist()]
    for number, layer in enumerate(graph.layers, start=1):
        beta = math.log(0.5 / number + 1)
        after = []
        for i, row in enumerate(spread[0].tolist()):
            mixed = add(scaled(0.9, weighted(row, states)), scaled(0.1, first[i]))
            after.append(relu(add(scaled(1 - beta, mixed), scaled(beta, linear(layer, mixed)))))
        states = after
    assert_same(graph(nodes, spread)[0], states)


def test_mmgcn_of_absent_modalities_learns_without_exploding() -> None:
    """Vectors of zero have no direction: their edges still have a gradient that can be used."""
    network = Mmgcn(replace(MMGCN, use_speakers=False))
    nn.init.zeros_(network.audio.weight)
    nn.init.zeros_(network.audio.bias)
    features = replace(dialogues(5, 3), audio=None)
    network(features).logits.square().sum().backward()
    assert tensor(network.audio.bias.grad).norm() < 1e3


# --- HGraph-CL ----------------------------------------------------------------------------------


def test_edges_of_hgraph_cl_join_near_turns_and_all_between_modalities() -> None:
    """Within a modality up to ``reach`` turns apart, between modalities any; no padding."""
    mask = torch.tensor([[True, True, True, False]])
    every = edges_of_all(mask, edges_within(mask, reach=1), modalities=2)
    for i in range(8):
        for j in range(8):
            (m, t), (n, u) = place(i, 4), place(j, 4)
            assert every[0, i, j] == (t < 3 and u < 3 and (m != n or abs(t - u) <= 1))


def test_attention_of_hgraph_cl_is_gated_graph_attention() -> None:
    """Two heads, each with its part of values and scores; then ELU, gate and residual."""
    graph = randomised(AttentionGraph(HGRAPH_CL))
    layer: Any = graph.layers[0]
    nodes = torch.randn(1, 4, 8, dtype=torch.float64)
    edges = edges_within(torch.ones(1, 4, dtype=torch.bool), reach=1)
    rows, size = nodes[0].tolist(), 4
    values = [linear(layer.value, x) for x in rows]
    oracle = []
    for i, x in enumerate(rows):
        gathered: Vector = []
        for head in range(2):
            part = [v[head * size : (head + 1) * size] for v in values]
            squashed = [tanh(v) for v in part]
            near = [j for j in range(4) if abs(i - j) <= 1]
            source = dot(layer.source[head].tolist(), squashed[i])
            scores = [source + dot(layer.target[head].tolist(), squashed[j]) for j in near]
            shares = softmax([s if s > 0 else 0.2 * s for s in scores])
            gathered += weighted(shares, [part[j] for j in near])
        biased = add(gathered, plain(layer.bias))
        elu = [v if v > 0 else math.expm1(v) for v in biased]
        gate = sigmoid(linear(layer.gate, x))
        mixed = add(times(gate, elu), times([1 - g for g in gate], x))
        oracle.append(relu(add(mixed, x)))
    assert_same(graph(nodes, edges)[0], oracle)


def test_perturbed_graph_keeps_self_loops() -> None:
    """At chance 1 each pair changes, self-loops and padding excepted; at 0 none does."""
    mask = torch.tensor([[True, True, True, False]])
    edges = edges_within(mask, reach=1)
    assert torch.equal(perturb(edges, mask, chance=0.0), edges)
    turned = perturb(edges, mask, chance=1.0)
    assert turned[0].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_supervised_contrast_is_its_papers_loss() -> None:
    """-log share of a positive among all others, mean over positives, then over the points."""
    torch.manual_seed(0)
    points = torch.randn(5, 4, dtype=torch.float64)
    labels = [0, 1, 0, 2, 0]
    rows, losses = points.tolist(), []
    for i, x in enumerate(rows):
        shares = {j: math.exp(cosine(x, y) / 0.3) for j, y in enumerate(rows) if j != i}
        alike = [j for j in shares if labels[j] == labels[i]]
        if alike:
            total = sum(shares.values())
            losses.append(-sum(math.log(shares[j] / total) for j in alike) / len(alike))
    given = torch.tensor(labels)
    ours = supervised_contrast(points, given[:, None] == given, temperature=0.3)
    assert_same(ours, sum(losses) / len(losses))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_supervised_contrast_without_positives_is_zero(count: int) -> None:
    """Without a pair of the same label the loss and its gradient are 0, never NaN."""
    points = torch.randn(count, 4, requires_grad=True)
    loss = supervised_contrast(points, torch.eye(count, dtype=torch.bool), temperature=0.07)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(tensor(points.grad), torch.zeros(count, 4))


@pytest.mark.parametrize("use_labels", [True, False])
def test_views_of_hgraph_cl_are_contrasted_by_view_and_by_label(use_labels: bool) -> None:
    """The criterion is 0.1 of both contrasts at each level, over the masked utterances only."""
    torch.manual_seed(0)
    network = HgraphCl(replace(HGRAPH_CL, use_labels=use_labels)).train()
    output = network(dialogues(4, 3))
    mask = torch.tensor([[True, True, False, True], [True, True, True, False]])
    labels = torch.tensor([[0, 1, 1, 0], [1, -1, 0, -1]])
    expected = torch.tensor(0.0)
    for first, second in output.views:
        n = int(mask.sum())
        twins = torch.arange(2 * n) % n
        known = mask & (labels >= 0)
        expected += 0.1 * supervised_contrast(
            torch.cat([first[mask], second[mask]]), twins[:, None] == twins, temperature=0.07
        )
        classes = labels[known]
        alike = classes[:, None] == classes
        pulled = supervised_contrast(first[known], alike, temperature=0.07)
        expected += 0.1 * pulled * use_labels
    assert len(output.views) == 3  # audio, text, both
    criterion = network.criterion()
    assert criterion is not None
    assert criterion(output, mask, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hgraph_cl_predicts_without_perturbation() -> None:
    """The perturbed views are computed in training only: two predictions are the same."""
    torch.manual_seed(3)
    network, features = HgraphCl(HGRAPH_CL).eval(), dialogues(5, 3)
    first, second = network(features), network(features)
    assert torch.equal(first.logits, second.logits)
    assert first.views == ()


# --- AGF-IB -------------------------------------------------------------------------------------


def test_graph_of_agf_ib_adds_and_subtracts_neighbours() -> None:
    """x_i += Σ_j tanh(w [x_i; x_j] + b) / √(d_i d_j) x_j, layer by layer."""
    graph = randomised(SignedGraph(5, layers=2))
    turns, length = 4, 3
    nodes = torch.randn(1, 2 * turns, 5, dtype=torch.float64)
    mask = torch.arange(turns)[None] < length
    near: dict[int, list[int]] = {}
    for i in range(2 * turns):
        m, t = place(i, turns)
        near[i] = [
            n * turns + u
            for n in range(2)
            for u in range(length)
            if t < length and (m == n) != (t == u)
        ]
    assert len(near[0]) == 3  # two other turns, the other modality
    states = [linear(graph.enter, x) for x in nodes[0].tolist()]
    for own, other in zip(graph.own, graph.other, strict=True):
        after = []
        for i, x in enumerate(states):
            moved = list(x)
            for j in near[i]:
                sign = math.tanh(linear(own, x)[0] + linear(other, states[j])[0])
                size = sign / math.sqrt(len(near[i]) * len(near[j]))
                moved = add(moved, scaled(size, states[j]))
            after.append(moved)
        states = after
    ours = graph(nodes, mask, modalities=2)[0]
    kept = [i for i in range(2 * turns) if i % turns < length]
    assert_same(ours[kept], [states[i] for i in kept])


def test_bottleneck_is_the_divergence_from_a_standard_normal() -> None:
    """Against torch's own distributions: the mean of each utterance's sum."""
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 6, 4, dtype=torch.float64).unbind(0)
    kept = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    plain = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(kept, plain).sum(dim=-1).mean()
    assert divergence(mean, log_variance).item() == pytest.approx(expected.item(), abs=1e-9)


def test_contrast_of_agf_ib_compares_within_and_between_modalities() -> None:
    """One emotion's nodes in one direction cost little, in both modalities; in two, much."""
    labels = torch.tensor([0, 0, 1, 1])
    emotions = F.one_hot(labels, 4).double()
    agreed = emotion_contrast([emotions, emotions], labels, temperature=0.05)
    between = emotion_contrast([emotions, emotions.roll(2, 1)], labels, temperature=0.05)
    within = emotion_contrast([torch.eye(4).double(), emotions], labels, temperature=0.05)
    assert agreed.item() < 0.6  # not 0: several positives share the probability
    assert between.item() > agreed.item() + 3
    assert within.item() > agreed.item() + 0.3


def test_adversary_of_agf_ib_reverses_the_gradient_of_the_generators() -> None:
    """A gradient step lowers the loss for the discriminator and raises it for the generators."""
    torch.manual_seed(0)
    criterion = AgfIbLoss(replace(AGF_IB, use_contrast=False), adversary_weight=1.0)
    states = {m: torch.randn(1, 6, 8, requires_grad=True) for m in "al"}
    mask = torch.ones(1, 6, dtype=torch.bool)
    output = AgfIb(AGF_IB)(dialogues(6))
    output, labels = replace(output, aligned=states, means=None), torch.zeros(1, 6).long()
    before = criterion(output, mask, labels)
    before.backward()
    with torch.no_grad():
        stepped = {m: x - 0.1 * tensor(x.grad) for m, x in states.items()}
        of_generators = criterion(replace(output, aligned=stepped), mask, labels)
        for weight in criterion.parameters():
            weight.sub_(0.01 * tensor(weight.grad))
        of_discriminator = criterion(output, mask, labels)
    assert of_generators.item() > before.item()
    assert of_discriminator.item() < before.item()
