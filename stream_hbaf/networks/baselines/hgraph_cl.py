"""HGraph-CL (Lin, Liang, Long, Dang, Yang, Zhang, Xu: "Modeling Intra- and Inter-Modal Relations:
Hierarchical Graph Contrastive Learning for Multimodal Sentiment Analysis", COLING 2022).
Not causal: an utterance is joined to later ones, and its encoders run in both directions.

The original works inside one utterance: its nodes are tokens, pooled to one vector before the
classifier. HERE THE NODES ARE A DIALOGUE'S UTTERANCES, and nothing is pooled, since each utterance
is classified and the features have one vector for each.

Kept, as in the released code: a BiLSTM before the graphs; a graph for each modality and one over
all modalities, each by gated graph attention with a residual, the last of which is classified; a
second view of each graph with perturbed edges; at both levels contrastive learning of the two
views, and of labels, weighted 0.1 each, temperature 0.07. Left out: vision, BERT, regression.

Changed: within a modality, utterances at most ``reach`` turns apart are joined (our choice), where
the original joins tokens by their dependency tree; between modalities all are, as there. The
released code is meant to remove some edges and to add others, but removes twice; here each pair may
be joined or separated.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.inputs import Inputs, Offline, Projected, require_offline_mode
from stream_hbaf.networks.baselines.mmgcn import BiLstm
from stream_hbaf.networks.network import Criterion, Features, Mode, NetworkConfig, Output


@dataclass(frozen=True, slots=True)
class HgraphClConfig(NetworkConfig):
    """HGraph-CL's sizes and switches. ConfigError if they can't fit."""

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
        require_offline_mode(self)
        if self.hidden % 2 or self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2 and by heads")


@dataclass(frozen=True, slots=True)
class HgraphClOutput(Output):
    """With the contrasted views: each level's utterances [B, U, ..], plain and perturbed.

    Empty unless training: prediction needs neither view.
    """

    views: tuple[tuple[Tensor, Tensor], ...] = ()


class HgraphCl(Offline):
    """The whole network: encoders, a graph for each modality, one over all of them, classifier."""

    config: HgraphClConfig

    def __init__(self, config: HgraphClConfig) -> None:
        super().__init__()
        self.config = config
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
        nodes = self._nodes(inputs)
        edges = edges_within(inputs.mask, reach=self.config.reach)
        every = edges_of_all(inputs.mask, edges, modalities=len(nodes))
        fused = self._fuse(nodes, every)
        logits = self.classifier(self.dropout(fused))
        padding = inputs.padding
        return HgraphClOutput(
            logits.masked_fill(padding, 0.0),
            h_m=fused.masked_fill(padding, 0.0),
            views=self._views(nodes, fused, inputs.mask, edges, every) if self.training else (),
        )

    def criterion(self) -> "ViewsContrast | None":
        """The contrastive loss at both levels, unless both are switched off."""
        config = self.config
        contrasted = config.use_intra_contrast or config.use_inter_contrast
        return ViewsContrast(config) if contrasted else None

    def _nodes(self, inputs: Projected) -> dict[str, Tensor]:
        return {
            m: torch.relu(self.projects[m](encoder(inputs.modality(m), inputs.mask)))
            for m, encoder in self.encoders.items()
        }

    def _fuse(self, nodes: dict[str, Tensor], edges: Tensor) -> Tensor:
        """[B, U, H] of each modality, edges [B, M U, M U] → [B, U, M H]."""
        states = torch.cat(list(nodes.values()), dim=1)
        if self.config.use_graph:
            states = self.inter(states, edges)
        parts = states.chunk(len(nodes), dim=1)
        return torch.relu(self.readout(torch.cat(parts, dim=-1)))

    def _views(
        self,
        nodes: dict[str, Tensor],
        fused: Tensor,
        mask: Tensor,
        edges: Tensor,
        every: Tensor,
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
    between = mask[:, None] & mask[..., None]
    rows = [
        torch.cat([within if m == n else between for n in range(modalities)], dim=2)
        for m in range(modalities)
    ]
    return torch.cat(rows, dim=1)


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
        self.source = nn.Parameter(torch.empty(self.heads, hidden // self.heads))
        self.target = nn.Parameter(torch.empty(self.heads, hidden // self.heads))
        nn.init.xavier_uniform_(self.source)
        nn.init.xavier_uniform_(self.target)
        self.gate = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        values = self.value(nodes).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, N, H/h]
        squashed = torch.tanh(values)
        source = torch.einsum("bhnk,hk->bhn", squashed, self.source)
        target = torch.einsum("bhnk,hk->bhn", squashed, self.target)
        scores = F.leaky_relu(source[..., None] + target[:, :, None], 0.2)
        # Not -inf: a row of padding would be NaN, and so would be all gradients.
        lowest = torch.finfo(scores.dtype).min
        weights = torch.softmax(scores.masked_fill(~edges[:, None], lowest), dim=-1)
        gathered = F.elu((weights @ values).transpose(1, 2).flatten(2) + self.bias)
        gate = torch.sigmoid(self.gate(nodes))
        result: Tensor = self.dropout(gate * gathered + (1 - gate) * nodes)
        return result


class ViewsContrast(Criterion[HgraphClOutput]):
    """Contrastive loss of each level's two views, and of its labels: their weighted sum."""

    def __init__(
        self, config: HgraphClConfig, *, views_weight: float = 0.1, labels_weight: float = 0.1
    ) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.views_weight = views_weight
        self.labels_weight = labels_weight if config.use_labels else 0.0

    def forward(self, output: HgraphClOutput, mask: Tensor, labels: Tensor) -> Tensor:
        """As every criterion's; zero for the output of a network in prediction."""
        loss = output.logits.sum() * 0.0
        known = mask & (labels >= 0)
        alike = labels[known][:, None] == labels[known]
        for plain, perturbed in output.views:
            both = torch.cat([plain[mask], perturbed[mask]])
            twin = torch.eye(len(both) // 2, dtype=torch.bool, device=mask.device).repeat(2, 2)
            loss = loss + self.views_weight * supervised_contrast(
                both, twin, temperature=self.temperature
            )
            if self.labels_weight:
                by_label = supervised_contrast(plain[known], alike, temperature=self.temperature)
                loss = loss + self.labels_weight * by_label
        return loss


def supervised_contrast(points: Tensor, alike: Tensor, *, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020): [P, H], pairs [P, P] → [].

    ``alike`` marks the positives. -log of a positive's share among all other points, mean over a
    point's positives, then over the points that have any; zero if none has.
    """
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    alike = alike & ~itself
    directions = F.normalize(points, dim=-1, eps=1e-6)
    similarity = (directions @ directions.T / temperature).masked_fill(itself, -torch.inf)
    shares = similarity.log_softmax(dim=-1).masked_fill(~alike, 0.0)
    count = alike.sum(dim=-1)
    losses = -shares.sum(dim=-1) / count.clamp_min(1)
    return losses.sum() / (count > 0).sum().clamp_min(1)
