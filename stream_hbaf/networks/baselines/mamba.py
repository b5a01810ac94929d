"""Broad Mamba: Shou et al., "Revisiting Multi-modal Emotion Learning with Broad State Space Models
and Probability-guidance Fusion", 2024 (arXiv:2404.17858).

Kept: each modality's context is told by selective state spaces (S6, Gu and Dao 2023) that run over
the dialogue in both directions; a broad learning system (Chen and Liu 2018) spreads what they tell
over random feature and enhancement nodes; the modalities are weighed by the probabilities of the
labels that each predicts by itself.

Left out: vision, and the encoders before the features.

Not given to us, our choice: one input map and one gate for both directions, whose results are
added; the random nodes' part is added to what they are made of; a modality's weight is the
probability of the label that it thinks likeliest, over the sum of all modalities'; its own
classifier is trained by cross entropy; memories begin shorter than in Mamba, turns being few.

``offline`` is the original. ``live`` leaves the second direction out and is causal: a state space
is a recurrence, so that its state is all that there is to remember. Letters as in state.py;
M modalities, E inner width, N states of each inner dimension, K the convolution's reach.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.baselines.inputs import Inputs
from stream_hbaf.networks.network import Criterion, Mode, Network, NetworkConfig, Output
from stream_hbaf.networks.state import Features, State

REACH = 4  # K, turns that the convolution sees
SHORTEST, LONGEST = 0.01, 1.0  # Δ before training


@dataclass(frozen=True, slots=True)
class MambaConfig(NetworkConfig):
    """Broad Mamba's sizes and what can be left out."""

    kind: Literal["mamba"] = "mamba"
    mode: Mode = "offline"
    layers: int = 1  # of each modality
    states: int = 8  # N
    nodes: int = 128  # random feature nodes, and as many enhancement nodes
    guidance_weight: float = 1.0  # of the loss of the modalities' own classifiers
    use_broad: bool = True
    use_guidance: bool = True  # else all modalities weigh the same


@dataclass(frozen=True, slots=True, eq=False)
class MambaState(State):
    """What Broad Mamba remembers."""

    OWN: ClassVar[int] = 4

    recent: Tensor  # [.., M, layers, K - 1, E] what the convolution will see again
    memory: Tensor  # [.., M, layers, E, N]


@dataclass(frozen=True, slots=True)
class MambaOutput(Output):
    """With what each modality predicts by itself."""

    alone: Tensor | None = None  # [B, U, M, C]


class SelectiveScan(nn.Module):
    """S6 in one direction: convolution, then h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t.

    y_t = C_t h_t + D x_t, where Δ_t = softplus(W_Δ x_t + b_Δ), B_t = W_B x_t and C_t = W_C x_t
    depend on the input, and A = -exp(A_log).
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        inner, states = config.hidden, config.states
        self.rank, self.states = max(1, inner // 16), states
        self.convolution = nn.Conv1d(inner, inner, REACH, groups=inner)
        self.select = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.rate = nn.Linear(self.rank, inner)  # W_Δ of low rank, b_Δ
        self.decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))  # A_log
        self.skip = nn.Parameter(torch.ones(inner))  # D
        begun = torch.empty(inner).uniform_(math.log(SHORTEST), math.log(LONGEST)).exp()
        with torch.no_grad():
            self.rate.bias.copy_(begun.expm1().log())  # softplus of this is what it begins with

    def forward(
        self, given: Tensor, mask: Tensor, recent: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[S, U, E], zero in padding, and the state before → the same, and the state after.

        Padding leaves the memory as it is, so that it may as well come first.
        """
        seen = torch.cat([recent, given], dim=1)
        x = F.silu(self.convolution(seen.transpose(1, 2))).transpose(1, 2)
        rate, b, c = self.select(x).split([self.rank, self.states, self.states], dim=-1)
        delta = F.softplus(self.rate(rate)).masked_fill(~mask[..., None], 0.0)
        kept = torch.exp(delta[..., None] * -self.decay.exp())  # [S, U, E, N]
        taken = (delta * x)[..., None] * b[:, :, None]
        memories = []
        for keep, take in zip(kept.unbind(1), taken.unbind(1), strict=True):
            memory = torch.addcmul(take, keep, memory)
            memories.append(memory)
        told = (torch.stack(memories, dim=1) @ c[..., None])[..., 0]
        return told + self.skip * x, seen[:, -REACH + 1 :], memory


class Block(nn.Module):
    """X ← X + W_out (SiLU(z) ⊙ S6(x)), where [x, z] = W_in norm(X); offline in both directions."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.norm = nn.LayerNorm(hidden)
        self.into = nn.Linear(hidden, 2 * hidden, bias=False)
        self.onward = SelectiveScan(config)
        self.back = SelectiveScan(config) if config.mode == "offline" else None
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, told: Tensor, mask: Tensor, recent: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[S, U, H] and the state before → [S, U, H] and the state after."""
        x, gate = self.into(self.norm(told)).masked_fill(~mask[..., None], 0.0).chunk(2, dim=-1)
        y, after, remembered = self.onward(x, mask, recent, memory)
        if self.back is not None:
            backwards, _, _ = self.back(x.flip(1), mask.flip(1), recent, memory)
            y = y + backwards.flip(1)
        return told + self.dropout(self.out(y * F.silu(gate))), after, remembered


class Broad(nn.Module):
    """X ← X + W [Z; E], feature nodes Z = tanh(X W_e + β_e), enhancement E = tanh(Z W_h + β_h).

    As in broad learning, only W is trained; what leads to the nodes is drawn once and kept.
    """

    feature: Tensor
    enhancement: Tensor

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        hidden, nodes = config.hidden, config.nodes
        # The last row is β.
        self.register_buffer("feature", torch.randn(hidden + 1, nodes) / hidden**0.5)
        self.register_buffer("enhancement", torch.randn(nodes + 1, nodes) / nodes**0.5)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(2 * nodes, hidden)

    def forward(self, told: Tensor) -> Tensor:
        spread = torch.tanh(self.norm(told) @ self.feature[:-1] + self.feature[-1])
        enhanced = torch.tanh(spread @ self.enhancement[:-1] + self.enhancement[-1])
        result: Tensor = told + self.out(torch.cat([spread, enhanced], dim=-1))
        return result


class Context(nn.Module):
    """One modality: its blocks, then its nodes."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.broad = Broad(config) if config.use_broad else nn.Identity()
        self.norm = nn.LayerNorm(config.hidden)

    def forward(
        self, told: Tensor, mask: Tensor, recent: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[S, U, H], the state before [S, layers, ..] → [S, U, H] and the state after."""
        seen, remembered = [], []
        for n, block in enumerate(self.blocks):
            told, after, kept = block(told, mask, recent[:, n], memory[:, n])
            seen.append(after)
            remembered.append(kept)
        told = self.norm(self.broad(told))
        return told, torch.stack(seen, dim=1), torch.stack(remembered, dim=1)


class BroadMamba(Network[MambaState]):
    """The whole network; ``step`` goes on with the recurrence that ``forward`` begins."""

    config: MambaConfig

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, classes = config.hidden, config.classes
        self.inputs = Inputs(config)
        self.contexts = nn.ModuleDict({m: Context(config) for m in config.modalities})
        guided = config.use_guidance and len(config.modalities) == 2
        guides = config.modalities if guided else ()
        self.guides = nn.ModuleDict({m: nn.Linear(hidden, classes) for m in guides})
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, features: Features) -> MambaOutput:
        """As every network's."""
        return self._hear(features, self.blank(len(features.present())))[0]

    def step_streams(self, turn: Features, state: MambaState) -> tuple[Tensor, MambaState]:
        """As every network's."""
        output, state = self._hear(turn, state)
        return output.logits[:, 0], state

    def blank(self, streams: int) -> MambaState:
        """The state before the first utterance, [S, ..]."""
        config = self.config
        each = streams, len(config.modalities), config.layers
        new = self.classifier.weight.new_zeros
        return MambaState(
            recent=new(*each, REACH - 1, config.hidden),
            memory=new(*each, config.hidden, config.states),
        )

    def criterion(self) -> "GuidanceLoss | None":
        """What the modalities' own classifiers learn."""
        return GuidanceLoss(self.config.guidance_weight) if self.guides else None

    def _hear(self, features: Features, state: MambaState) -> tuple[MambaOutput, MambaState]:
        heard = self.inputs(features)
        padding = ~heard.mask[..., None]
        given = {"a": heard.audio, "l": heard.text}
        told, recent, memory = {}, [], []
        for n, (m, context) in enumerate(self.contexts.items()):
            part, seen, kept = context(given[m], heard.mask, state.recent[:, n], state.memory[:, n])
            told[m] = part.masked_fill(padding, 0.0)
            recent.append(seen)
            memory.append(kept)
        fused, alone = self._fuse(told)
        logits = self.classifier(self.dropout(fused)).masked_fill(padding, 0.0)
        if alone is not None:
            alone = alone.masked_fill(padding[..., None], 0.0)
        output = MambaOutput(logits, told.get("a"), told.get("l"), fused, alone)
        return output, MambaState(torch.stack(recent, dim=1), torch.stack(memory, dim=1))

    def _fuse(self, told: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Σ w_m h_m, with w_m = max p_m / Σ max p: [B, U, H] and what each predicts alone."""
        parts = torch.stack(list(told.values()), dim=-2)  # [B, U, M, H]
        if not self.guides:
            return parts.mean(dim=-2), None
        alone = torch.stack([guide(told[m]) for m, guide in self.guides.items()], dim=-2)
        sure = alone.softmax(dim=-1).amax(dim=-1, keepdim=True)
        return (parts * (sure / sure.sum(dim=-2, keepdim=True))).sum(dim=-2), alone


class GuidanceLoss(Criterion[MambaOutput]):
    """Cross entropy of what each modality predicts by itself, the mean over modalities."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, output: MambaOutput, mask: Tensor, labels: Tensor) -> Tensor:
        if output.alone is None:
            raise ValueError("no modality predicts by itself; leave the criterion out")
        alone, labels = output.alone[mask & (labels >= 0)], labels[mask & (labels >= 0)]
        if not len(labels):
            return output.alone.sum() * 0.0
        return self.weight * F.cross_entropy(
            alone.flatten(0, 1), labels.repeat_interleave(alone.shape[1])
        )
