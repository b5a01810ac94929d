"""MMGCN (Hu, Liu, Zhao, Jin: "MMGCN: Multimodal Fusion via Deep Graph Convolution Network for
Emotion Recognition in Conversation", ACL-IJCNLP 2021). Not causal: each utterance is joined to all.

Kept: the text's context by a BiLSTM, audio by a linear map; a node for every modality of every
utterance; edges within a modality between all utterances of a dialogue, and between the
modalities of one utterance; edges weighted by angular similarity; deep spectral convolution as in
GCNII, with initial residual and identity mapping; the graph's inputs and outputs side by side
before the classifier. Sizes of the released code: 4 layers, α 0.1, λ 0.5.

Left out: vision, and the encoders before the features. Changed: every node has its speaker's
embedding, which the released code gives to text alone, since here text may be switched off; the
convolution is the plain one, where the released code maps H and H⁰ by matrices of their own.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.inputs import (
    Inputs,
    Offline,
    Projected,
    require_offline_mode,
    run_packed,
)
from stream_hbaf.networks.network import PARTIES, Features, Mode, NetworkConfig, Output

ALMOST_ONE = 0.99999  # of a cosine: the arc cosine's slope at 1 is infinite
SHORTEST = 1e-2  # a vector's length below which its direction counts for less: zero has none


@dataclass(frozen=True, slots=True)
class MmgcnConfig(NetworkConfig):
    """MMGCN's sizes and switches. ConfigError if they can't fit."""

    kind: Literal["mmgcn"] = "mmgcn"
    mode: Mode = "offline"
    layers: int = 4  # of the graph
    alpha: float = 0.1  # the initial residual's share of a layer
    decay: float = 0.5  # λ: how much of a layer is its matrix, less with each layer
    use_speakers: bool = True  # a speaker embedding in every node
    use_cross_edges: bool = True  # edges between the modalities of an utterance

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        require_offline_mode(self)
        if self.hidden % 2:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2")


class Mmgcn(Offline):
    """The whole network: modality encoders, one graph for each dialogue, classifier."""

    config: MmgcnConfig

    def __init__(self, config: MmgcnConfig) -> None:
        super().__init__()
        self.config = config
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
        count, turns = len(nodes), inputs.mask.shape[1]
        flat = torch.cat(nodes, dim=1)  # [B, M U, H], one modality after the other
        adjacency = propagation(
            flat, inputs.mask, modalities=count, cross=self.config.use_cross_edges
        )
        convolved = self.graph(flat, adjacency).split(turns, dim=1)
        joined = torch.cat([*nodes, *convolved], dim=-1)
        logits = self.classifier(self.dropout(torch.relu(joined)))
        padding = inputs.padding
        after = {
            m: states.masked_fill(padding, 0.0)
            for m, states in zip(self.config.modalities, convolved, strict=True)
        }
        return Output(
            logits.masked_fill(padding, 0.0),
            after.get("a"),
            after.get("l"),
            joined.masked_fill(padding, 0.0),
        )

    def _nodes(self, inputs: Projected) -> list[Tensor]:
        """[B, U, H] of each modality in use."""
        nodes = []
        if self.config.use_audio:
            nodes.append(self.audio(inputs.audio))
        if self.config.use_text:
            nodes.append(self.text(inputs.text, inputs.mask))
        if self.config.use_speakers:
            speaker = self.speakers(inputs.speaker)
            nodes = [states + speaker for states in nodes]
        return nodes


class BiLstm(nn.Module):
    """BiLSTM over the utterances of a dialogue, H/2 a direction: [B, U, H] → [B, U, H]."""

    def __init__(self, hidden: int, *, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            hidden,
            hidden // 2,
            num_layers=layers,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,
            batch_first=True,
        )

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        """Zero in padding."""
        return run_packed(self.lstm, sequence, mask)


def propagation(nodes: Tensor, mask: Tensor, *, modalities: int, cross: bool = True) -> Tensor:
    """P = D^-½ A D^-½ over the nodes [B, M U, H] of M modalities: [B, M U, M U].

    A_ij = 1 - arccos(cos(x_i, x_j)) / π for nodes i and j of one modality, i = j included, and,
    where ``cross``, for those of one utterance; zero for all others, and in padding.
    """
    turns = mask.shape[1]
    directions = F.normalize(nodes, dim=-1, eps=SHORTEST)
    cosine = directions @ directions.transpose(1, 2)
    similarity = 1 - torch.arccos(cosine.clamp(-1, 1) * ALMOST_ONE) / math.pi
    place = torch.arange(modalities * turns, device=nodes.device)
    modality, turn = place // turns, place % turns
    joined = modality[:, None] == modality
    if cross:
        joined = joined | (turn[:, None] == turn)
    node_mask = mask.repeat(1, modalities)
    joined = joined & node_mask[:, None] & node_mask[..., None]
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
        self.layers = nn.ModuleList(
            nn.Linear(hidden, hidden, bias=False) for _ in range(config.layers)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        first = states = torch.relu(self.enter(self.dropout(nodes)))
        for number, layer in enumerate(self.layers, start=1):
            spread = adjacency @ self.dropout(states)
            mixed = (1 - self.alpha) * spread + self.alpha * first
            share = math.log(self.decay / number + 1)
            states = torch.relu((1 - share) * mixed + share * layer(mixed))
        return states
