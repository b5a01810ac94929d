"""MMGCN and HGraph-CL, graphs whose nodes are a dialogue's utterances, one for each modality."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.layers import (
    BiLstm,
    Inputs,
    Projected,
    pairs_of_nodes,
    supervised_contrast,
)
from stream_hbaf.networks.network import (
    PARTIES,
    Criterion,
    Features,
    Mode,
    NetworkConfig,
    Output,
    WithoutState,
    masked_softmax,
)

ALMOST_ONE = 0.99999  # of a cosine: the arc cosine's slope at 1 is infinite
CONTRAST_WEIGHT = 0.1  # of HGraph-CL's views, and of its labels
SHORTEST = 1e-2  # a vector's length below which its direction counts for less: zero has none


@dataclass(frozen=True, slots=True)
class MmgcnConfig(NetworkConfig):
    """MMGCN's sizes and switches. ConfigError if they can't fit."""

    ONLY: ClassVar[Mode] = "offline"

    kind: Literal["mmgcn"] = "mmgcn"
    mode: Mode = "offline"
    layers: int = 4  # of the graph
    alpha: float = 0.1  # the initial residual's share of a layer
    decay: float = 0.5  # λ: how much of a layer is its matrix, less with each layer
    use_speakers: bool = True  # a speaker embedding in every node
    use_cross_edges: bool = True  # edges between the modalities of an utterance

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.hidden % 2:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2")


class Mmgcn(WithoutState):
    """MMGCN (Hu, Liu, Zhao, Jin: "MMGCN: Multimodal Fusion via Deep Graph Convolution Network for
    Emotion Recognition in Conversation", ACL-IJCNLP 2021). Not causal: each utterance is joined to
    all.

    Kept: the text's context by a BiLSTM, audio by a linear map; a node for every modality of every
    utterance; edges within a modality between all utterances of a dialogue, and between the
    modalities of one utterance; edges weighted by angular similarity; deep spectral convolution as
    in GCNII, with initial residual and identity mapping; the graph's inputs and outputs side by
    side before the classifier. Sizes of the released code: 4 layers, α 0.1, λ 0.5.

    Left out: vision, and the encoders before the features. Changed: every node has its speaker's
    embedding, which the released code gives to text alone, since here text may be switched off; the
    convolution is the plain one, where the released code maps H and H⁰ by matrices of their own.
    """

    config: MmgcnConfig

    def __init__(self, config: MmgcnConfig) -> None:
        super().__init__(config)
        hidden = config.hidden
        self.inputs = Inputs(config)
        if config.use_audio:
            self.audio = nn.Linear(hidden, hidden)
        if config.use_text:
            self.text = BiLstm(hidden, dropout=config.dropout)
        if config.use_speakers:
            self.speakers = nn.Embedding(PARTIES, hidden)
        self.graph = DeepGraph(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(2 * hidden * len(config.modalities), config.classes)

    def forward(self, features: Features) -> Output:
        """As every network's; h_m [B, U, 2 M H] is the graph's inputs and outputs."""
        inputs: Projected = self.inputs(features)
        nodes = self._nodes(inputs)
        flat = torch.cat(nodes, dim=1)  # [B, M U, H], one modality after the other
        cross = self.config.use_cross_edges
        adjacency = propagation(flat, inputs.mask, modalities=len(nodes), cross=cross)
        convolved = self.graph(flat, adjacency).chunk(len(nodes), dim=1)
        joined = torch.cat([*nodes, *convolved], dim=-1)
        h = dict(zip(self.config.modalities, convolved, strict=True))
        return inputs.output(self.classifier(self.dropout(torch.relu(joined))), h, joined)

    def _nodes(self, inputs: Projected) -> list[Tensor]:
        """[B, U, H] of each modality in use."""
        nodes = [self.audio(inputs.audio)] if self.config.use_audio else []
        if self.config.use_text:
            nodes.append(self.text(inputs.text, inputs.mask))
        if self.config.use_speakers:
            speaker = self.speakers(inputs.speaker)
            nodes = [states + speaker for states in nodes]
        return nodes


def propagation(nodes: Tensor, mask: Tensor, *, modalities: int, cross: bool = True) -> Tensor:
    """P = D^-½ A D^-½ over the nodes [B, M U, H] of M modalities: [B, M U, M U].

    A_ij = 1 - arccos(cos(x_i, x_j)) / π for nodes i and j of one modality, i = j included, and,
    where ``cross``, for those of one utterance; zero for all others, and in padding.
    """
    directions = F.normalize(nodes, dim=-1, eps=SHORTEST)
    cosine = directions @ directions.transpose(1, 2)
    similarity = 1 - torch.arccos(cosine.clamp(-1, 1) * ALMOST_ONE) / math.pi
    same_modality, same_turn, there = pairs_of_nodes(mask, modalities=modalities)
    joined = (same_modality | same_turn if cross else same_modality) & there
    weights = similarity.masked_fill(~joined, 0.0)
    scale = weights.sum(dim=-1).clamp_min(1e-6).rsqrt()  # padding has no edges at all
    return scale[..., None] * weights * scale[:, None]


class DeepGraph(nn.Module):
    """GCNII (Chen et al. 2020): nodes [B, N, H] and P [B, N, N] → [B, N, H].

    H⁰ = ReLU(W x); H^l = ReLU(((1-α) P H^(l-1) + α H⁰) ((1-β_l) I + β_l W_l)),
    β_l = log(λ / l + 1).
    """

    def __init__(self, config: MmgcnConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.alpha, self.decay = config.alpha, config.decay
        self.enter = nn.Linear(hidden, hidden)
        layers = (nn.Linear(hidden, hidden, bias=False) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        first = states = torch.relu(self.enter(self.dropout(nodes)))
        for number, layer in enumerate(self.layers, start=1):
            spread = adjacency @ self.dropout(states)
            mixed = (1 - self.alpha) * spread + self.alpha * first
            share = math.log(self.decay / number + 1)
            states = torch.relu((1 - share) * mixed + share * layer(mixed))
        return states


@dataclass(frozen=True, slots=True)
class HgraphClConfig(NetworkConfig):
    """HGraph-CL's sizes and switches. ConfigError if they can't fit."""

    ONLY: ClassVar[Mode] = "offline"

    kind: Literal["hgraph-cl"] = "hgraph-cl"
    mode: Mode = "offline"
    heads: int = 4
    layers: int = 1  # of each graph
    reach: int = 10  # turns between utterances joined within a modality
    perturbed: float = 0.2  # chance of a pair of nodes to change in the second view
    temperature: float = 0.07
    use_graph: bool = True  # the graph over all modalities, else its nodes as they are
    use_intra_contrast: bool = True  # the graphs of one modality; only contrast needs them
    use_inter_contrast: bool = True
    use_labels: bool = True  # contrast utterances by label as well, not by view alone

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.hidden % 2 or self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2 and by heads")


@dataclass(frozen=True, slots=True)
class HgraphClOutput(Output):
    """With the contrasted views: each level's utterances [B, U, ..], plain and perturbed.

    Empty unless training: prediction needs neither view.
    """

    views: tuple[tuple[Tensor, Tensor], ...] = ()


class HgraphCl(WithoutState):
    """HGraph-CL (Lin, Liang, Long, Dang, Yang, Zhang, Xu: "Modeling Intra- and Inter-Modal
    Relations: Hierarchical Graph Contrastive Learning for Multimodal Sentiment Analysis", COLING
    2022). Not causal: an utterance is joined to later ones, its encoders run in both directions.

    The original works inside one utterance: its nodes are tokens, pooled to one vector before the
    classifier. HERE THE NODES ARE A DIALOGUE'S UTTERANCES, and nothing is pooled, since each
    utterance is classified and the features have one vector for each.

    Kept, as in the released code: a BiLSTM before the graphs; a graph for each modality and one
    over all modalities, each by gated graph attention with a residual, the last of which is
    classified; a second view of each graph with perturbed edges; at both levels contrastive
    learning of the two views, and of labels, weighted 0.1 each, temperature 0.07. Left out: vision,
    BERT, regression.

    Changed: within a modality, utterances at most ``reach`` turns apart are joined (our choice),
    where the original joins tokens by their dependency tree; between modalities all are, as there.
    The released code is meant to remove some edges and to add others, but removes twice; here each
    pair may be joined or separated.
    """

    config: HgraphClConfig

    def __init__(self, config: HgraphClConfig) -> None:
        super().__init__(config)
        hidden, modalities = config.hidden, config.modalities
        self.inputs = Inputs(config)
        self.encoders = nn.ModuleDict({m: BiLstm(hidden, layers=1) for m in modalities})
        self.projects = nn.ModuleDict({m: nn.Linear(hidden, hidden) for m in modalities})
        if config.use_intra_contrast:
            self.intra = nn.ModuleDict({m: AttentionGraph(config) for m in modalities})
        if config.use_graph:
            self.inter = AttentionGraph(config)
        width = hidden * len(modalities)
        self.readout = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, config.classes)

    def forward(self, features: Features) -> HgraphClOutput:
        """As every network's; h_m [B, U, M H] is the read-out of the graph over all modalities."""
        inputs: Projected = self.inputs(features)
        nodes = {
            m: torch.relu(self.projects[m](encoder(inputs.modality(m), inputs.mask)))
            for m, encoder in self.encoders.items()
        }
        edges = edges_within(inputs.mask, reach=self.config.reach)
        every = edges_of_all(inputs.mask, edges, modalities=len(nodes))
        fused = self._fuse(nodes, every)
        return HgraphClOutput(
            inputs.masked(self.classifier(self.dropout(fused))),
            h_m=inputs.masked(fused),
            views=self._views(nodes, fused, inputs.mask, edges, every) if self.training else (),
        )

    def criterion(self) -> "ViewsContrast | None":
        """The contrastive loss at both levels, unless both are switched off."""
        config = self.config
        contrasted = config.use_intra_contrast or config.use_inter_contrast
        return ViewsContrast(config) if contrasted else None

    def _fuse(self, nodes: dict[str, Tensor], edges: Tensor) -> Tensor:
        """[B, U, H] of each modality, edges [B, M U, M U] → [B, U, M H]."""
        states = torch.cat(list(nodes.values()), dim=1)
        if self.config.use_graph:
            states = self.inter(states, edges)
        parts = states.chunk(len(nodes), dim=1)
        return torch.relu(self.readout(torch.cat(parts, dim=-1)))

    def _views(
        self, nodes: dict[str, Tensor], fused: Tensor, mask: Tensor, edges: Tensor, every: Tensor
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Both views of each modality's graph and of the one over all."""
        config, views = self.config, []
        if config.use_intra_contrast:
            for m, graph in self.intra.items():
                second = perturb(edges, mask, chance=config.perturbed)
                views.append((graph(nodes[m], edges), graph(nodes[m], second)))
        if config.use_inter_contrast:
            second = perturb(every, mask.repeat(1, len(nodes)), chance=config.perturbed)
            views.append((fused, self._fuse(nodes, second)))
        return tuple(views)


def edges_within(mask: Tensor, *, reach: int) -> Tensor:
    """Utterances of a dialogue [B, U] at most so many turns apart, themselves too: [B, U, U]."""
    turn = torch.arange(mask.shape[1], device=mask.device)
    near = (turn[:, None] - turn).abs() <= reach
    return near & mask[:, None] & mask[..., None]


def edges_of_all(mask: Tensor, within: Tensor, *, modalities: int) -> Tensor:
    """Each modality's own edges, and all pairs between modalities: [B, M U, M U]."""
    same_modality, _, there = pairs_of_nodes(mask, modalities=modalities)
    return there & (~same_modality | within.repeat(1, modalities, modalities))


def perturb(edges: Tensor, mask: Tensor, *, chance: float) -> Tensor:
    """Edges [B, N, N] with pairs of nodes joined or separated by chance; self-loops stay."""
    possible = mask[:, None] & mask[..., None]
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    changed = (torch.rand(edges.shape, device=edges.device) < chance) & possible & ~itself
    return edges ^ changed


class AttentionGraph(nn.Module):
    """Nodes [B, N, H], edges [B, N, N] → ReLU(x + the layers' result), [B, N, H]."""

    def __init__(self, config: HgraphClConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(config) for _ in range(config.layers))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        states = nodes
        for layer in self.layers:
            states = layer(states, edges)
        return torch.relu(states + nodes)


class AttentionLayer(nn.Module):
    """Graph attention (Veličković et al. 2018), gated between the result and the node itself.

    v = W x; e_ij = LeakyReLU(s · tanh(v_i) + d · tanh(v_j)); g = sigmoid(G x);
    y_i = ELU(Σ_j softmax_j(e_ij) v_j + b); g y + (1-g) x. Each head has its own part of v, s, d.
    """

    def __init__(self, config: HgraphClConfig) -> None:
        super().__init__()
        hidden, self.heads = config.hidden, config.heads
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.bias = nn.Parameter(torch.zeros(hidden))
        shape = self.heads, hidden // self.heads
        self.source = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
        self.target = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
        self.gate = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        values = self.value(nodes).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, N, H/h]
        squashed = torch.tanh(values)
        source = torch.einsum("bhnk,hk->bhn", squashed, self.source)
        target = torch.einsum("bhnk,hk->bhn", squashed, self.target)
        scores = F.leaky_relu(source[..., None] + target[:, :, None], 0.2)
        weights = masked_softmax(scores, edges[:, None])
        gathered = F.elu((weights @ values).transpose(1, 2).flatten(2) + self.bias)
        gate = torch.sigmoid(self.gate(nodes))
        result: Tensor = self.dropout(gate * gathered + (1 - gate) * nodes)
        return result


class ViewsContrast(Criterion[HgraphClOutput]):
    """Contrastive loss of each level's two views, and of its labels: their weighted sum."""

    def __init__(self, config: HgraphClConfig) -> None:
        super().__init__()
        self.temperature, self.use_labels = config.temperature, config.use_labels

    def forward(self, output: HgraphClOutput, mask: Tensor, labels: Tensor) -> Tensor:
        """As every criterion's; zero for the output of a network in prediction."""
        loss = output.logits.sum() * 0.0
        known = mask & (labels >= 0)
        alike = labels[known][:, None] == labels[known]
        for plain, perturbed in output.views:
            both = torch.cat([plain[mask], perturbed[mask]])
            twin = torch.eye(len(both) // 2, dtype=torch.bool, device=mask.device).repeat(2, 2)
            by_view = supervised_contrast(both, twin, temperature=self.temperature)
            loss = loss + CONTRAST_WEIGHT * by_view
            if self.use_labels:
                by_label = supervised_contrast(plain[known], alike, temperature=self.temperature)
                loss = loss + CONTRAST_WEIGHT * by_label
        return loss
