"""Broad Mamba: Shou et al., "Revisiting Multi-modal Emotion Learning with Broad State Space Models
and Probability-guidance Fusion", 2024 (arXiv:2404.17858).

Kept: selective state spaces (S6, Gu and Dao 2023) run over the dialogue in both directions, for
each modality; a broad learning system (Chen and Liu 2018) maps their outputs through random feature
and enhancement nodes; the modalities are weighted by the probabilities of the labels that each
predicts by itself.

Left out: vision, and the encoders before the features.

Not given by the paper, our choice: one input map and one gate for both directions, whose results
are added; the random nodes' output is added to their input; a modality's weight is the probability
of its most likely label, over the sum of all modalities'; its own classifier is trained by cross
entropy; memories begin shorter than in Mamba, since dialogues have few turns.

``offline`` is the original. ``live`` leaves the second direction out and is causal: a state space
is a recurrence, whose state is all that is carried. Letters as in network.py; M modalities, E inner
width, N states of each inner dimension, K the convolution's width.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.baselines.layers import Inputs, Projected
from stream_hbaf.networks.network import (
    Criterion,
    Features,
    Mode,
    NetworkConfig,
    Output,
    Recurrent,
    State,
)

KERNEL = 4  # K, turns that the convolution sees
INITIAL_DELTA = 0.01, 1.0  # the range of Δ before training


@dataclass(frozen=True, slots=True)
class MambaConfig(NetworkConfig):
    """Broad Mamba's sizes and switches."""

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
    """Broad Mamba's state."""

    OWN: ClassVar[int] = 4

    recent: Tensor  # [.., M, layers, K - 1, E] the last inputs of the convolution
    memory: Tensor  # [.., M, layers, E, N]


@dataclass(frozen=True, slots=True)
class MambaOutput(Output):
    """With the logits that each modality predicts by itself."""

    unimodal: Tensor | None = None  # [B, U, M, C]


class SelectiveScan(nn.Module):
    """S6 in one direction: convolution, then h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t.

    y_t = C_t h_t + D x_t, where Δ_t = softplus(W_Δ x_t + b_Δ), B_t = W_B x_t and C_t = W_C x_t
    depend on the input, and A = -exp(A_log).
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        inner, states = config.hidden, config.states
        self.rank, self.states = max(1, inner // 16), states
        self.convolution = nn.Conv1d(inner, inner, KERNEL, groups=inner)
        self.select = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.rate = nn.Linear(self.rank, inner)  # W_Δ of low rank, b_Δ
        self.decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))  # A_log
        self.skip = nn.Parameter(torch.ones(inner))  # D
        initial = torch.empty(inner).uniform_(*map(math.log, INITIAL_DELTA)).exp()
        with torch.no_grad():
            self.rate.bias.copy_(initial.expm1().log())  # the inverse of softplus

    def forward(
        self, x: Tensor, mask: Tensor, recent: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [S, U, E], zero in padding, and the state before → y [S, U, E] and the state after.

        Padding doesn't change the memory, so that it may stand first, as when run backwards.
        """
        seen = torch.cat([recent, x], dim=1)
        x = F.silu(self.convolution(seen.transpose(1, 2))).transpose(1, 2)
        rate, b, c = self.select(x).split([self.rank, self.states, self.states], dim=-1)
        delta = F.softplus(self.rate(rate)).masked_fill(~mask[..., None], 0.0)
        decays = torch.exp(delta[..., None] * -self.decay.exp())  # [S, U, E, N]
        updates = (delta * x)[..., None] * b[:, :, None]
        memories = []
        for decay, update in zip(decays.unbind(1), updates.unbind(1), strict=True):
            memory = torch.addcmul(update, decay, memory)
            memories.append(memory)
        y = (torch.stack(memories, dim=1) @ c[..., None])[..., 0]
        return y + self.skip * x, seen[:, -KERNEL + 1 :], memory


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
        self, hidden: Tensor, mask: Tensor, recent: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[S, U, H] and the state before → [S, U, H] and the state after."""
        x, gate = self.into(self.norm(hidden)).masked_fill(~mask[..., None], 0.0).chunk(2, dim=-1)
        y, recent_after, memory_after = self.onward(x, mask, recent, memory)
        if self.back is not None:
            backwards, _, _ = self.back(x.flip(1), mask.flip(1), recent, memory)
            y = y + backwards.flip(1)
        return hidden + self.dropout(self.out(y * F.silu(gate))), recent_after, memory_after


class Broad(nn.Module):
    """X ← X + W [Z; E], feature nodes Z = tanh(X W_e + β_e), enhancement E = tanh(Z W_h + β_h).

    As in broad learning, only W is trained; the other weights are drawn once and stay.
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

    def forward(self, hidden: Tensor) -> Tensor:
        features = torch.tanh(self.norm(hidden) @ self.feature[:-1] + self.feature[-1])
        enhanced = torch.tanh(features @ self.enhancement[:-1] + self.enhancement[-1])
        result: Tensor = hidden + self.out(torch.cat([features, enhanced], dim=-1))
        return result


class Context(nn.Module):
    """One modality: its blocks, then its broad learning system."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.broad = Broad(config) if config.use_broad else nn.Identity()
        self.norm = nn.LayerNorm(config.hidden)

    def forward(
        self, hidden: Tensor, mask: Tensor, recent: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[S, U, H], the state before [S, layers, ..] → [S, U, H] and the state after."""
        states = []
        for n, block in enumerate(self.blocks):
            hidden, *state = block(hidden, mask, recent[:, n], memory[:, n])
            states.append(state)
        recent, memory = (torch.stack(parts, dim=1) for parts in zip(*states, strict=True))
        return self.norm(self.broad(hidden)), recent, memory


class BroadMamba(Recurrent[MambaState]):
    """The whole network; h_m is the weighted sum of the modalities."""

    config: MambaConfig

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        hidden, classes = config.hidden, config.classes
        self.inputs = Inputs(config)
        self.contexts = nn.ModuleDict({m: Context(config) for m in config.modalities})
        guided = config.use_guidance and len(config.modalities) == 2
        guides = config.modalities if guided else ()
        self.guides = nn.ModuleDict({m: nn.Linear(hidden, classes) for m in guides})
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden, classes)

    def blank(self, streams: int) -> MambaState:
        config = self.config
        each = streams, len(config.modalities), config.layers
        new = self.classifier.weight.new_zeros
        return MambaState(
            recent=new(*each, KERNEL - 1, config.hidden),
            memory=new(*each, config.hidden, config.states),
        )

    def criterion(self) -> "GuidanceLoss | None":
        """The loss of the modalities' own classifiers, if they are in use."""
        return GuidanceLoss(self.config.guidance_weight) if self.guides else None

    def _continue(self, features: Features, state: MambaState) -> tuple[MambaOutput, MambaState]:
        inputs: Projected = self.inputs(features)
        h, states = {}, []
        for n, (m, context) in enumerate(self.contexts.items()):
            before = state.recent[:, n], state.memory[:, n]
            hidden, *after = context(inputs.modality(m), inputs.mask, *before)
            h[m] = inputs.masked(hidden)
            states.append(after)
        h_m, unimodal = self._fuse(h)
        logits = inputs.masked(self.classifier(self.dropout(h_m)))
        unimodal = None if unimodal is None else inputs.masked(unimodal)
        recent, memory = (torch.stack(parts, dim=1) for parts in zip(*states, strict=True))
        output = MambaOutput(logits, h.get("a"), h.get("l"), h_m, unimodal)
        return output, MambaState(recent, memory)

    def _fuse(self, h: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Σ w_m h_m, with w_m = max p_m / Σ max p: [B, U, H], and the unimodal logits."""
        parts = torch.stack(list(h.values()), dim=-2)  # [B, U, M, H]
        if not self.guides:
            return parts.mean(dim=-2), None
        unimodal = torch.stack([guide(h[m]) for m, guide in self.guides.items()], dim=-2)
        likeliest = unimodal.softmax(dim=-1).amax(dim=-1, keepdim=True)
        weights = likeliest / likeliest.sum(dim=-2, keepdim=True)
        return (parts * weights).sum(dim=-2), unimodal


class GuidanceLoss(Criterion[MambaOutput]):
    """Cross entropy of the unimodal logits, the mean over modalities."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, output: MambaOutput, mask: Tensor, labels: Tensor) -> Tensor:
        if output.unimodal is None:
            raise ValueError("no modality predicts by itself; leave this loss out")
        mask = mask & (labels >= 0)
        unimodal, labels = output.unimodal[mask], labels[mask]
        if not len(labels):
            return output.unimodal.sum() * 0.0
        return self.weight * F.cross_entropy(
            unimodal.flatten(0, 1), labels.repeat_interleave(unimodal.shape[1])
        )
