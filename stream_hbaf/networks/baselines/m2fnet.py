"""M2FNet: Chudasama et al., "M2FNet: Multi-modal Fusion Network for Emotion Recognition in
Conversation", CVPR Workshops 2022.

Kept: for each modality a stack of Transformer encoders over the whole dialogue, each with a skip
connection; stacked layers of multi-head attention in which audio weights the text; audio and fused
text side by side are classified.

Left out: vision; RoBERTa and the audio network before the features, and with the latter its
triplet loss with an adaptive margin.

Not given by the paper, our choice: query, key and value in the fusion (text, audio and text, as in
public re-implementations), no positional encoding (as there), widths and numbers of layers, a
classifier of two layers.

Not causal: every encoder sees the whole dialogue. Letters as in network.py; h heads.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.inputs import Inputs, Offline, Projected, require_offline_mode
from stream_hbaf.networks.network import Features, Mode, NetworkConfig, Output


@dataclass(frozen=True, slots=True)
class M2FNetConfig(NetworkConfig):
    """M2FNet's sizes and switches. ConfigError if they can't fit."""

    kind: Literal["m2fnet"] = "m2fnet"
    mode: Mode = "offline"
    heads: int = 8
    encoders: int = 2  # Transformer encoders of each modality, each with a skip connection
    layers: int = 1  # of each encoder
    fusions: int = 2  # layers of fusion attention
    use_encoders: bool = True
    use_skips: bool = True
    use_fusion: bool = True  # else the outputs of the encoders side by side

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        require_offline_mode(self)
        if self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by heads {self.heads}")


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) over the utterances of ``mask``."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads, self.drop = config.heads, config.dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor) -> Tensor:
        """[B, U, H] each, mask [B, U] → [B, U, H]."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(query)),
            self._split(self.key(key)),
            self._split(self.value(value)),
            attn_mask=mask[:, None, None],
            dropout_p=self.drop if self.training else 0.0,
        )
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended

    def _split(self, sequence: Tensor) -> Tensor:
        """[B, U, H] → [B, h, U, H/h]."""
        return sequence.view(*sequence.shape[:2], self.heads, -1).transpose(1, 2)


class EncoderLayer(nn.Module):
    """One layer of a Transformer encoder, norm after each sum."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.attention = Attention(config)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, 2 * hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * hidden, hidden),
        )
        self.attended, self.fed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attended(x + self.dropout(self.attention(x, x, x, mask=mask)))
        result: Tensor = self.fed(x + self.dropout(self.feed_forward(x)))
        return result


class Encoders(nn.Module):
    """One modality's context: X ← X + Encoder(X), for each encoder of the stack."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        self.skips = config.use_skips
        self.stack = nn.ModuleList(
            nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
            for _ in range(config.encoders if config.use_encoders else 0)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for encoder in self.stack:
            encoded = x
            for layer in encoder if isinstance(encoder, nn.ModuleList) else ():
                encoded = layer(encoded, mask)
            x = x + encoded if self.skips else encoded
        return x


class FusionLayer(nn.Module):
    """T ← W [T; attention(query T, key A, value T)]: audio A weights the text T."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.join = nn.Linear(2 * config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, text: Tensor, audio: Tensor, mask: Tensor) -> Tensor:
        attended = self.attention(text, audio, text, mask=mask)
        joined = self.join(torch.relu(torch.cat([text, attended], dim=-1)))
        result: Tensor = self.dropout(torch.relu(joined))
        return result


class M2FNet(Offline):
    """The whole network; with one modality without fusion."""

    config: M2FNetConfig

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        self.config = config
        hidden, modalities = config.hidden, config.modalities
        fuses = config.use_fusion and len(modalities) == 2
        self.inputs = Inputs(config)
        self.encoders = nn.ModuleDict({m: Encoders(config) for m in modalities})
        self.fusion = nn.ModuleList(
            FusionLayer(config) for _ in range(config.fusions if fuses else 0)
        )
        self.classifier = nn.Sequential(
            nn.Linear(hidden * len(modalities), hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.classes),
        )

    def forward(self, features: Features) -> Output:
        """As every network's."""
        inputs: Projected = self.inputs(features)
        # An empty dialogue attends to its first slot: a softmax over nothing would be NaN.
        mask = inputs.mask.clone()
        mask[:, 0] = True
        h = {m: encoders(inputs.modality(m), mask) for m, encoders in self.encoders.items()}
        for layer in self.fusion:
            h["l"] = layer(h["l"], h["a"], mask)
        padding = inputs.padding
        h = {m: states.masked_fill(padding, 0.0) for m, states in h.items()}
        h_m = torch.cat(list(h.values()), dim=-1)
        logits = self.classifier(h_m).masked_fill(padding, 0.0)
        return Output(logits, h.get("a"), h.get("l"), h_m)
