"""Multi-modal fusion (section 3.2, equations 7-17): audio and text, each with the other's past.

Letters as in hbaf.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stream_hbaf.networks.config import HbafConfig

Streams = dict[str, Tensor]  # by modality: "a", "l"


class BimodalAttention(nn.Module):
    """Section 3.2.1, equations 7-9: targets [N, Q, H], their window [N, n, H] → both [N, Q, H].

    Gives, for each modality m, what its own utterances propagate to it, ζH_m (eq 7), and what
    the other modality's do: softmax(Q_a K_lᵀ/√d) V_l for audio (eq 8), softmax(Q_l K_aᵀ/√d) V_a
    for text (eq 9). Departure (decision 10): the paper's eqs 10-13 use these two the other way
    round, so that audio would receive only audio values; ``literal_cross`` does so.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()

        def projections() -> nn.ModuleDict:
            hidden = config.hidden
            return nn.ModuleDict(
                {m: nn.Linear(hidden, hidden, bias=False) for m in config.modalities}
            )

        self.query, self.key, self.value = projections(), projections(), projections()
        self.literal_cross = config.literal_cross

    def forward(self, targets: Streams, window: Streams) -> tuple[Streams, Streams]:
        queries = {m: self.query[m](targets[m]) for m in targets}
        own = {m: self._attend(queries[m], window, telling=m) for m in targets}
        cross = {}
        if len(targets) == 2:
            audio = self._attend(queries["a"], window, telling="l")  # eq 8
            text = self._attend(queries["l"], window, telling="a")  # eq 9
            cross = {"a": text, "l": audio} if self.literal_cross else {"a": audio, "l": text}
        return own, cross

    def _attend(self, query: Tensor, window: Streams, *, telling: str) -> Tensor:
        """softmax(Q Kᵀ/√d) V with K = X W_kᵀ, V = X W_vᵀ, as softmax((Q W_k) Xᵀ/√d) X W_vᵀ.

        The same products in another order: W_k and W_v meet one target, not a window's n.
        """
        told = window[telling]
        scores = (query @ self.key[telling].get_parameter("weight")) @ told.transpose(1, 2)
        weights = torch.softmax(scores / query.shape[-1] ** 0.5, dim=-1)
        attended: Tensor = self.value[telling](weights @ told)
        return attended


class DynamicFilterGate(nn.Module):
    """Section 3.2.2, equations 10-11 (audio) or 12-13 (text): two [.., H] → H_m* [.., H]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.own = nn.Linear(hidden, hidden)  # W_s, and b
        self.cross = nn.Linear(hidden, hidden, bias=False)  # W_c

    def forward(self, own: Tensor, cross: Tensor) -> Tensor:
        gate = torch.sigmoid(self.own(own) + self.cross(cross))
        return gate * own + (1 - gate) * cross


class Residual(nn.Module):
    """Section 3.2.3, equations 14-15 (audio) or 16-17 (text): H_m, H_m* [.., H] → h_m [.., H].

    Departure (decision 11): ⊕ is addition, and AddNorm adds once. Feed-forward width H, not
    given by the paper.
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden)
        )
        self.add_norm = nn.LayerNorm(hidden)

    def forward(self, before: Tensor, refined: Tensor) -> Tensor:
        normed = self.norm(before + refined)
        result: Tensor = self.add_norm(normed + self.feed_forward(normed))
        return result


class Fusion(nn.Module):
    """Section 3.2: target utterances and their windows, each {"a", "l"} → h_a, h_l.

    Each part can be left out. Without the gate both parts weigh the same (G = 1/2). Without the
    attention, or with one modality, nothing crosses over, so there is nothing to gate:
    H_m* = ζH_m, or H_m itself. Without all three, h_m is [H_a; H_l].
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden, modalities = config.hidden, config.modalities
        crosses = config.use_bimodal_attention and len(modalities) == 2
        gated = modalities if config.use_gate and crosses else ()
        kept = modalities if config.use_residual else ()
        self.attention = BimodalAttention(config) if config.use_bimodal_attention else None
        self.gate = nn.ModuleDict({m: DynamicFilterGate(hidden) for m in gated})
        self.residual = nn.ModuleDict({m: Residual(hidden, config.dropout) for m in kept})

    def forward(self, groups: Sequence[tuple[Streams, Streams]]) -> Streams:
        """Groups of (targets [N, Q, H], window [N, n, H]), each of its own N and n → [ΣNQ, H].

        Only the attention looks at windows; what follows takes the targets of all at once.
        """
        before = _joined([targets for targets, _ in groups])
        refined = before
        if self.attention is not None:
            spread = [self.attention(targets, window) for targets, window in groups]
            own = _joined([own for own, _ in spread])
            refined = self._weigh(own, _joined([cross for _, cross in spread]))
        if not self.residual:
            return refined
        return {m: self.residual[m](before[m], refined[m]) for m in before}

    def _weigh(self, own: Streams, cross: Streams) -> Streams:
        if not cross:
            return own
        if not self.gate:
            return {m: (own[m] + cross[m]) / 2 for m in own}
        return {m: self.gate[m](own[m], cross[m]) for m in own}


def _joined(groups: Sequence[Streams]) -> Streams:
    return {m: torch.cat([group[m].flatten(0, 1) for group in groups]) for m in groups[0]}
