"""MMGCN, HGraph-CL and AGF-IB: their equations in plain loops, and what every network promises."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.baselines.agf_ib import (
    AgfIb,
    AgfIbConfig,
    AgfIbLoss,
    SignedGraph,
    divergence,
    emotion_contrast,
)
from stream_hbaf.networks.baselines.hgraph_cl import (
    AttentionGraph,
    HgraphCl,
    HgraphClConfig,
    edges_of_all,
    edges_within,
    perturb,
    supervised_contrast,
)
from stream_hbaf.networks.baselines.mmgcn import DeepGraph, Mmgcn, MmgcnConfig, propagation
from stream_hbaf.networks.network import Network, Output
from stream_hbaf.networks.state import Features

SIZES = {"audio_width": 6, "text_width": 5, "hidden": 8, "classes": 3, "dropout": 0.0}
MMGCN = MmgcnConfig(**SIZES)
HGRAPH = HgraphClConfig(**SIZES, heads=2, reach=2)
AGF = AgfIbConfig(**SIZES)
NETWORKS = [(Mmgcn, MMGCN), (HgraphCl, HGRAPH), (AgfIb, AGF)]
EACH = pytest.mark.parametrize(("build", "config"), NETWORKS, ids=["mmgcn", "hgraph-cl", "agf-ib"])


pytestmark = pytest.mark.usefixtures("one_thread")


def ready(build, config) -> Network:
    """Ready to predict; every weight drawn, absent vectors too (they start at zero)."""
    torch.manual_seed(3)
    network = build(config).eval()
    for name, weight in network.named_parameters():
        if "absent" in name:
            nn.init.normal_(weight)
    return network


def dialogues(*lengths: int, present: float = 1.0) -> Features:
    """Random dialogues of two speakers, padded to the longest with NaN; a modality so often."""
    draw = torch.Generator().manual_seed(1)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    heard, spoken = (torch.rand(shape, generator=draw) < present for _ in range(2))

    def noise(width: int, there: Tensor) -> Tensor:
        values = torch.randn(*shape, width, generator=draw)
        return values.masked_fill(~(mask & there)[..., None], torch.nan)

    return Features(
        audio=noise(SIZES["audio_width"], heard),
        text=noise(SIZES["text_width"], spoken),
        audio_mask=heard,
        text_mask=spoken,
        utterance_mask=mask,
        speaker=torch.randint(0, 2, shape, generator=draw),
    )


def drawn(module: nn.Module) -> nn.Module:
    """In float64, with weights that are all far from zero."""
    torch.manual_seed(5)
    module.double().eval()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.5)
    return module


def same(ours: Tensor, oracle: list) -> None:
    expected = torch.tensor(oracle, dtype=torch.float64)
    torch.testing.assert_close(ours.detach(), expected, atol=1e-9, rtol=0)


# --- plain arithmetic ---------------------------------------------------------------------------

Vector = list[float]


def dot(x: Vector, y: Vector) -> float:
    return sum(p * q for p, q in zip(x, y, strict=True))


def linear(layer: nn.Linear, x: Vector) -> Vector:
    rows = layer.weight.tolist()
    bias = [0.0] * len(rows) if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + b for row, b in zip(rows, bias, strict=True)]


def relu(x: Vector) -> Vector:
    return [max(v, 0.0) for v in x]


def cosine(x: Vector, y: Vector) -> float:
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def weighted(weights: Vector, rows: list[Vector]) -> Vector:
    return [dot(weights, list(column)) for column in zip(*rows, strict=True)]


def place(node: int, turns: int) -> tuple[int, int]:
    """A node's modality and turn: one modality's nodes stand after the other's."""
    return divmod(node, turns)


# --- MMGCN --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross", [True, False])
def test_graph_of_mmgcn_is_weighed_by_angles(cross: bool) -> None:
    """A_ij = 1 - arccos(cos) / π where joined; P = D^-½ A D^-½; padding has no part in it."""
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
    same(propagation(nodes, mask, modalities=2, cross=cross)[0], oracle)


def test_convolution_of_mmgcn_is_gcnii() -> None:
    """Initial residual and identity mapping, layer by layer, with β_l = log(λ / l + 1)."""
    graph = drawn(DeepGraph(replace(MMGCN, layers=3)))
    nodes = torch.randn(1, 4, 8, dtype=torch.float64)
    spread = torch.rand(1, 4, 4, dtype=torch.float64)
    first = states = [relu(linear(graph.enter, x)) for x in nodes[0].tolist()]
    for number, layer in enumerate(graph.layers, start=1):
        beta = math.log(0.5 / number + 1)
        after = []
        for i, row in enumerate(spread[0].tolist()):
            reached = weighted(row, states)
            mixed = [0.9 * p + 0.1 * q for p, q in zip(reached, first[i], strict=True)]
            mapped = linear(layer, mixed)
            after.append(
                relu([(1 - beta) * p + beta * q for p, q in zip(mixed, mapped, strict=True)])
            )
        states = after
    same(graph(nodes, spread)[0], states)


def test_mmgcn_of_absent_modalities_learns_without_exploding() -> None:
    """Vectors of zero have no direction: their edges still have a gradient that can be used."""
    network = Mmgcn(replace(MMGCN, use_speakers=False))
    nn.init.zeros_(network.audio.weight)
    nn.init.zeros_(network.audio.bias)
    features = replace(dialogues(5, 3), audio=None)
    network(features).logits.square().sum().backward()
    assert network.audio.bias.grad.norm() < 1e3


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
    graph = drawn(AttentionGraph(HGRAPH))
    (layer,) = graph.layers
    nodes = torch.randn(1, 4, 8, dtype=torch.float64)
    edges = edges_within(torch.ones(1, 4, dtype=torch.bool), reach=1)
    rows, size = nodes[0].tolist(), 4
    values = [linear(layer.value, x) for x in rows]
    oracle = []
    for i, x in enumerate(rows):
        gathered = []
        for head in range(2):
            part = [v[head * size : (head + 1) * size] for v in values]
            squashed = [[math.tanh(e) for e in v] for v in part]
            near = [j for j in range(4) if abs(i - j) <= 1]
            source = dot(layer.source[head].tolist(), squashed[i])
            scores = [source + dot(layer.target[head].tolist(), squashed[j]) for j in near]
            shares = [math.exp(s if s > 0 else 0.2 * s) for s in scores]
            gathered += weighted([s / sum(shares) for s in shares], [part[j] for j in near])
        biased = [v + b for v, b in zip(gathered, layer.bias.tolist(), strict=True)]
        bent = [v if v > 0 else math.expm1(v) for v in biased]
        gate = [1 / (1 + math.exp(-v)) for v in linear(layer.gate, x)]
        mixed = [g * y + (1 - g) * v for g, y, v in zip(gate, bent, x, strict=True)]
        oracle.append(relu([y + v for y, v in zip(mixed, x, strict=True)]))
    same(graph(nodes, edges)[0], oracle)


def test_perturbed_graph_keeps_every_node_joined_to_itself() -> None:
    """At chance 1 each pair changes, itself and padding excepted; at 0 none does."""
    mask = torch.tensor([[True, True, True, False]])
    edges = edges_within(mask, reach=1)
    assert torch.equal(perturb(edges, mask, chance=0.0), edges)
    turned = perturb(edges, mask, chance=1.0)
    assert turned[0].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_contrast_is_the_supervised_contrastive_loss() -> None:
    """-log share of each alike among all others, mean over alikes, then over points with any."""
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
    same(ours, sum(losses) / len(losses))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_contrast_without_alikes_is_zero(count: int) -> None:
    """Nothing to pull together: the loss and its gradient are 0, never NaN."""
    points = torch.randn(count, 4, requires_grad=True)
    loss = supervised_contrast(points, torch.eye(count, dtype=torch.bool), temperature=0.07)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(points.grad, torch.zeros(count, 4))


@pytest.mark.parametrize("use_labels", [True, False])
def test_views_of_hgraph_cl_are_contrasted_by_twins_and_by_labels(use_labels: bool) -> None:
    """The criterion is 0.1 of both contrasts at each level, over the masked utterances only."""
    torch.manual_seed(0)
    network = HgraphCl(replace(HGRAPH, use_labels=use_labels)).train()
    output = network(dialogues(4, 3))
    mask = torch.tensor([[True, True, False, True], [True, True, True, False]])
    labels = torch.tensor([[0, 1, 1, 0], [1, -1, 0, -1]])
    expected = 0.0
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
    assert network.criterion()(output, mask, labels).item() == pytest.approx(expected.item())


def test_hgraph_cl_predicts_without_chance() -> None:
    """The perturbed views are for training alone: twice the same prediction, and no views."""
    network, features = ready(HgraphCl, HGRAPH), dialogues(5, 3)
    first, second = network(features), network(features)
    assert torch.equal(first.logits, second.logits)
    assert first.views == ()


# --- AGF-IB -------------------------------------------------------------------------------------


def test_graph_of_agf_ib_adds_and_takes_away_neighbours() -> None:
    """x_i += Σ_j tanh(w [x_i; x_j] + b) / √(d_i d_j) x_j, layer by layer."""
    graph = drawn(SignedGraph(5, layers=2))
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
                moved = [p + size * q for p, q in zip(moved, states[j], strict=True)]
            after.append(moved)
        states = after
    ours = graph(nodes, mask, modalities=2)[0]
    kept = [i for i in range(2 * turns) if i % turns < length]
    same(ours[kept], [states[i] for i in kept])


def test_bottleneck_is_the_divergence_from_a_standard_normal() -> None:
    """Against torch's own distributions: the mean of each utterance's sum."""
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 6, 4, dtype=torch.float64).unbind(0)
    kept = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    plain = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(kept, plain).sum(dim=-1).mean()
    assert divergence(mean, log_variance).item() == pytest.approx(expected.item(), abs=1e-9)


def test_emotions_of_agf_ib_meet_within_and_between_modalities() -> None:
    """One emotion's nodes in one direction cost little, in both modalities; in two, much."""
    labels = torch.tensor([0, 0, 1, 1])
    emotions = F.one_hot(labels, 4).double()
    agreed = emotion_contrast([emotions, emotions], labels, temperature=0.05)
    between = emotion_contrast([emotions, emotions.roll(2, 1)], labels, temperature=0.05)
    within = emotion_contrast([torch.eye(4).double(), emotions], labels, temperature=0.05)
    assert agreed.item() < 0.6  # log 3 of 7 in part: alikes share what is left
    assert between.item() > agreed.item() + 3
    assert within.item() > agreed.item() + 0.3


def test_adversary_of_agf_ib_turns_the_gradient_for_those_it_judges() -> None:
    """What lowers the discriminator's loss for itself raises it for the generators."""
    torch.manual_seed(0)
    criterion = AgfIbLoss(replace(AGF, use_contrast=False), adversary_weight=1.0)
    states = {m: torch.randn(1, 6, 8, requires_grad=True) for m in "al"}
    mask = torch.ones(1, 6, dtype=torch.bool)
    output = AgfIb(AGF)(dialogues(6))
    judged = replace(output, aligned=states, means=None)
    before = criterion(judged, mask, torch.zeros(1, 6).long())
    before.backward()
    with torch.no_grad():
        along = {m: x - 0.1 * x.grad for m, x in states.items()}
        misled = criterion(replace(judged, aligned=along), mask, torch.zeros(1, 6).long())
        for weight in criterion.parameters():
            weight -= 0.01 * weight.grad
        wiser = criterion(judged, mask, torch.zeros(1, 6).long())
    assert misled.item() > before.item()
    assert wiser.item() < before.item()


# --- what every network promises ----------------------------------------------------------------


@EACH
def test_padding_and_other_dialogues_change_nothing(build, config) -> None:
    """A dialogue alone gives what it gives in any batch, to 1e-5; padding has logits of zero."""
    network, features = ready(build, config), dialogues(7, 4, 1, present=0.7)
    logits = network(features).logits
    for b, length in enumerate((7, 4, 1)):

        def cut(part: Tensor, b: int = b, length: int = length) -> Tensor:
            return part[b : b + 1, :length]

        alone = network(features.map(cut)).logits[0]
        torch.testing.assert_close(logits[b, :length], alone, atol=1e-5, rtol=0)
        assert torch.equal(logits[b, length:], torch.zeros(7 - length, 3))


@EACH
@pytest.mark.parametrize("absent", ["audio", "text"])
def test_absent_modality_is_never_read(build, config, absent: str) -> None:
    """None, NaN or anything else where there is no such modality: the same finite logits."""
    network, features = ready(build, config), dialogues(6, 3)
    nowhere = torch.zeros(2, 6, dtype=torch.bool)
    rubbish = torch.full_like(getattr(features, absent), 1e9)
    logits = [
        network(replace(features, **{absent: given, f"{absent}_mask": nowhere})).logits
        for given in (None, rubbish, rubbish * torch.nan)
    ]
    assert torch.isfinite(logits[0]).all()
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    assert torch.equal(logits[1], logits[2])
    assert not torch.allclose(logits[0], network(features).logits)


@EACH
@pytest.mark.parametrize("off", ["audio", "text"])
def test_modality_switched_off_has_no_influence(build, config, off: str) -> None:
    """The network of one modality gives the same whatever the other says."""
    network = ready(build, replace(config, **{f"use_{off}": False}))
    features = dialogues(6, 3)
    other = replace(features, **{off: torch.randn_like(getattr(features, off))})
    assert torch.equal(network(features).logits, network(other).logits)


@EACH
def test_later_utterance_changes_an_earlier_one(build, config) -> None:
    """The whole dialogue is seen, the future included; that is why it must be offline."""
    network, features = ready(build, config), dialogues(4)
    later = features.text.clone()
    later[0, 3] += 1.0
    changed = network(replace(features, text=later)).logits - network(features).logits
    assert changed[0, 0].abs().max() > 1e-6


@EACH
def test_live_use_is_refused(build, config) -> None:
    """No state, no step, no configuration that claims to be live."""
    network = ready(build, config)
    one = Features(audio=torch.randn(6), text=torch.randn(5))
    for ask in (network.initial_state, lambda: network.blank(2), lambda: network.step(one, None)):
        with pytest.raises(ModelError, match="sees the future"):
            ask()
    with pytest.raises(ConfigError, match="mode is offline"):
        replace(config, mode="live")


SWITCHED = [
    *NETWORKS,
    (Mmgcn, replace(MMGCN, use_speakers=False, use_cross_edges=False)),
    (HgraphCl, replace(HGRAPH, use_graph=False, use_labels=False)),
    (HgraphCl, replace(HGRAPH, use_intra_contrast=False, layers=2)),
    (HgraphCl, replace(HGRAPH, use_inter_contrast=False, use_intra_contrast=False)),
    (AgfIb, replace(AGF, use_graph=False, use_bottleneck=False)),
    (AgfIb, replace(AGF, use_alignment=False, use_contrast=False)),
]


def whole_loss(network: Network, criterion, features: Features, labels: Tensor) -> Tensor:
    """Cross entropy, and the criterion if there is one."""
    output: Output = network(features)
    mask = features.present()
    loss = F.cross_entropy(output.logits[mask], labels[mask])
    both = mask
    for present in (features.audio_mask, features.text_mask):
        both = both if present is None else both & present
    return loss if criterion is None else loss + criterion(output, both, labels)


@pytest.mark.parametrize(("build", "config"), SWITCHED)
def test_gradient_reaches_every_parameter(build, config) -> None:
    """Each weight, the criterion's too, is trained by something, and never by NaN."""
    network = ready(build, config).train()
    criterion = network.criterion()
    features = dialogues(7, 4, 1, present=0.7)
    labels = torch.randint(0, 3, (3, 7))
    whole_loss(network, criterion, features, labels).backward()
    parts = nn.ModuleList([network] if criterion is None else [network, criterion])
    for name, weight in parts.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize(("build", "config"), NETWORKS[1:], ids=["hgraph-cl", "agf-ib"])
@pytest.mark.parametrize("off", [{}, {"use_audio": False}, {"use_text": False}])
def test_loss_without_anything_to_compare_is_zero(build, config, off: dict) -> None:
    """A batch in which nothing has both modalities trains on, with cross entropy alone."""
    network = ready(build, replace(config, **off)).train()
    criterion = network.criterion()
    output = network(dialogues(4, 2))
    loss = criterion(output, torch.zeros(2, 4, dtype=torch.bool), torch.full((2, 4), -1))
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.isfinite(w.grad).all() for w in network.parameters() if w.grad is not None)


@EACH
def test_what_was_said_before_is_learned(build, config) -> None:
    """Labels that are the utterance before: only its context tells them, and it is found."""
    torch.manual_seed(0)
    network = build(replace(config, hidden=16, classes=2)).train()
    criterion = network.criterion()
    trained = [*network.parameters(), *(criterion.parameters() if criterion else ())]
    optimiser = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(150):
        said = torch.randint(0, 2, (16, 6))
        text = F.one_hot(said, 5).float() * 2
        features = Features(torch.randn(16, 6, 6), text, speaker=said * 0)
        labels = torch.cat([said[:, :1] * 0, said[:, :-1]], dim=1)
        loss = whole_loss(network, criterion, features, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            losses.append(F.cross_entropy(network(features).logits.flatten(0, 1), labels.flatten()))
    assert sum(losses[-10:]) / 10 < 0.25  # without context: log 2 of 5 turns in 6, 0.58
