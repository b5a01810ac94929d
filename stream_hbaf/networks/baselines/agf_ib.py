"""AGF-IB (Shou, Meng, Ai, Zhang, Yin, Li: "Adversarial alignment and graph fusion via information
bottleneck for multimodal emotion recognition in conversations", Information Fusion 112, 2024).
Not causal: each utterance is joined to all of its dialogue.

Sources: the paper's abstract, and the released code, which holds the generators, the
discriminators and the graph, but neither the contrastive loss nor the bottleneck.

Kept from the code: a generator for each modality (linear map, ReLU, LSTM); a graph of all
utterances within a modality and of the modalities of one utterance, convolved four times with
signed weights; a speaker embedding; the graph's inputs and outputs side by side. Kept from the
abstract: modalities aligned by an adversary; contrastive learning of emotions within and between
modalities; an information bottleneck.

Left out: vision. Changed, or not in these sources and so our choice: one discriminator that tells
audio from text for each utterance, instead of one for each modality that reads whole dialogues; it
learns through a reversed gradient, where the code adds both sides' losses and so cancels them; the
forms of the contrastive loss and of the bottleneck, given below; the weights of all losses.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.baselines.layers import (
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
)

INITIAL_LOG_VARIANCE = -4.0  # that of N(0, 1) would drown the gradient in noise


@dataclass(frozen=True, slots=True)
class AgfIbConfig(NetworkConfig):
    """AGF-IB's sizes and switches."""

    ONLY: ClassVar[Mode] = "offline"

    kind: Literal["agf-ib"] = "agf-ib"
    mode: Mode = "offline"
    layers: int = 4  # of the graph
    temperature: float = 0.1
    use_alignment: bool = True  # the adversary
    use_graph: bool = True
    use_contrast: bool = True
    use_bottleneck: bool = True  # else a linear map of the graph's output


@dataclass(frozen=True, slots=True)
class AgfIbOutput(Output):
    """With the inputs of the losses: each modality's [B, U, H], by its letter."""

    aligned: dict[str, Tensor] | None = None  # before the graph
    nodes: dict[str, Tensor] | None = None  # after it
    means: dict[str, Tensor] | None = None  # of the bottleneck's normal distributions
    log_variances: dict[str, Tensor] | None = None  # None: no bottleneck


class AgfIb(WithoutState):
    """The whole network: generators, graph, a bottleneck for each modality, classifier."""

    config: AgfIbConfig

    def __init__(self, config: AgfIbConfig) -> None:
        super().__init__(config)
        hidden, modalities = config.hidden, config.modalities
        self.inputs = Inputs(config)
        self.generators = nn.ModuleDict({m: Generator(hidden) for m in modalities})
        self.speakers = nn.Embedding(PARTIES, hidden)
        if config.use_graph:
            self.graph = SignedGraph(hidden, layers=config.layers)
        width = 2 * hidden if config.use_graph else hidden
        self.means = nn.ModuleDict({m: nn.Linear(width, hidden) for m in modalities})
        if config.use_bottleneck:
            self.variances = nn.ModuleDict({m: nn.Linear(width, hidden) for m in modalities})
            for layer in self.variances.values():
                nn.init.constant_(layer.get_parameter("bias"), INITIAL_LOG_VARIANCE)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden * len(modalities), config.classes)

    def forward(self, features: Features) -> AgfIbOutput:
        """As every network's; h_m [B, U, M H] is the output of the bottlenecks."""
        inputs: Projected = self.inputs(features)
        aligned = {m: generator(inputs.modality(m)) for m, generator in self.generators.items()}
        nodes = self._graph(aligned, inputs)
        wide = {m: self.dropout(torch.relu(states)) for m, states in nodes.items()}
        means = {m: layer(wide[m]) for m, layer in self.means.items()}
        log_variances = None
        if self.config.use_bottleneck:
            log_variances = {m: layer(wide[m]) for m, layer in self.variances.items()}
        samples = self._sample(means, log_variances)
        fused = inputs.masked(torch.cat(list(samples.values()), dim=-1))
        return AgfIbOutput(
            inputs.masked(self.classifier(torch.relu(fused))),
            h_m=fused,
            aligned=aligned,
            nodes=nodes,
            means=means,
            log_variances=log_variances,
        )

    def criterion(self) -> "AgfIbLoss":
        """The adversarial, contrastive and bottleneck losses that are in use."""
        return AgfIbLoss(self.config)

    def _graph(self, aligned: dict[str, Tensor], inputs: Projected) -> dict[str, Tensor]:
        """[B, U, H] → [B, U, 2H] of each modality: before and after the graph."""
        speaker = self.speakers(inputs.speaker)
        before = {m: states + speaker for m, states in aligned.items()}
        if not self.config.use_graph:
            return before
        nodes = torch.cat(list(before.values()), dim=1)
        after = self.graph(nodes, inputs.mask, modalities=len(before)).chunk(len(before), dim=1)
        return {
            m: torch.cat([states, convolved], dim=-1)
            for (m, states), convolved in zip(before.items(), after, strict=True)
        }

    def _sample(
        self, means: dict[str, Tensor], log_variances: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """z ~ N(μ, σ²) in training, μ itself in prediction."""
        if log_variances is None or not self.training:
            return means
        return {
            m: mean + torch.exp(log_variances[m] / 2) * torch.randn_like(mean)
            for m, mean in means.items()
        }


class Generator(nn.Module):
    """One modality's utterances [B, U, H] into the common space: [B, U, H]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(hidden, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        states: Tensor = self.lstm(torch.relu(self.enter(sequence)))[0]
        return states


class SignedGraph(nn.Module):
    """Graph convolution with signed weights: nodes [B, M U, H] of M modalities → the same.

    x_i += Σ_j tanh(w [x_i; x_j] + b) / √(d_i d_j) x_j over the d_i neighbours j of i: the other
    utterances of its modality and the other modalities of its utterance. A positive weight adds
    what neighbours share, a negative one subtracts it and so sharpens the difference.
    """

    def __init__(self, hidden: int, *, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(hidden, hidden)
        self.own = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(layers))
        self.other = nn.ModuleList(nn.Linear(hidden, 1, bias=False) for _ in range(layers))

    def forward(self, nodes: Tensor, mask: Tensor, *, modalities: int) -> Tensor:
        edges = neighbours(mask, modalities=modalities).to(nodes.dtype)
        scale = edges.sum(dim=-1).clamp_min(1.0).rsqrt()
        norm = scale[..., None] * edges * scale[:, None]
        states: Tensor = self.enter(nodes)
        for own, other in zip(self.own, self.other, strict=True):
            signs = torch.tanh(own(states) + other(states).transpose(1, 2))
            states = states + (signs * norm) @ states
        return states


def neighbours(mask: Tensor, *, modalities: int) -> Tensor:
    """Edges between nodes of one modality, and between those of one utterance: [B, M U, M U]."""
    same_modality, same_turn, there = pairs_of_nodes(mask, modalities=modalities)
    return (same_modality ^ same_turn) & there  # a node itself is both


class AgfIbLoss(Criterion[AgfIbOutput]):
    """The weighted sum of the adversarial, contrastive and bottleneck losses.

    Holds the discriminator, which prediction doesn't need.
    """

    def __init__(
        self,
        config: AgfIbConfig,
        *,
        adversary_weight: float = 0.1,
        contrast_weight: float = 0.1,
        bottleneck_weight: float = 1e-3,
    ) -> None:
        super().__init__()
        self.config = config
        self.weights = adversary_weight, contrast_weight, bottleneck_weight
        self.aligns = config.use_alignment and len(config.modalities) == 2
        if self.aligns:
            layers = nn.Linear(config.hidden, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1)
            self.discriminator = nn.Sequential(*layers)

    def forward(self, output: AgfIbOutput, mask: Tensor, labels: Tensor) -> Tensor:
        loss = output.logits.sum() * 0.0
        adversary, contrast, bottleneck = self.weights
        if self.aligns and output.aligned and bool(mask.any()):
            loss = loss + adversary * self._adversarial(output.aligned, mask)
        if self.config.use_contrast and output.nodes:
            known = mask & (labels >= 0)
            nodes = [states[known] for states in output.nodes.values()]
            loss = loss + contrast * emotion_contrast(
                nodes, labels[known], temperature=self.config.temperature
            )
        if output.means and output.log_variances and bool(mask.any()):
            for m, mean in output.means.items():
                loss = loss + bottleneck * divergence(mean[mask], output.log_variances[m][mask])
        return loss

    def _adversarial(self, aligned: dict[str, Tensor], mask: Tensor) -> Tensor:
        """The discriminator's cross entropy at telling audio from text.

        It is minimised by the discriminator and maximised by the generators.
        """
        # Gradient reversal: the value stays, the gradient changes its sign.
        flipped = [2 * states[mask].detach() - states[mask] for states in aligned.values()]
        guesses = [self.discriminator(states)[:, 0] for states in flipped]
        truths = [torch.full_like(guess, float(n)) for n, guess in enumerate(guesses)]
        return F.binary_cross_entropy_with_logits(torch.cat(guesses), torch.cat(truths))


def emotion_contrast(nodes: list[Tensor], labels: Tensor, *, temperature: float) -> Tensor:
    """Supervised contrastive loss within and between M modalities: [N, H] of each → [].

    Within: a modality's nodes of one emotion against all of its nodes. Between: nodes of one
    emotion of all modalities, an utterance's own among them, against all nodes. Their mean.
    """
    alike = labels[:, None] == labels
    losses = [supervised_contrast(states, alike, temperature=temperature) for states in nodes]
    if (count := len(nodes)) > 1:
        every = alike.repeat(count, count)
        losses.append(supervised_contrast(torch.cat(nodes), every, temperature=temperature))
    return torch.stack(losses).mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean over N of KL(N(μ, σ²) ‖ N(0, 1)), [N, H] twice: Σ_h (μ² + σ² - log σ² - 1) / 2.

    An upper bound of the information that a modality's bottleneck keeps of its input (Alemi et al.
    2017), and so of what the bottlenecks of two modalities can have in common.
    """
    return ((mean.square() + log_variance.exp() - log_variance - 1) / 2).sum(dim=-1).mean()
