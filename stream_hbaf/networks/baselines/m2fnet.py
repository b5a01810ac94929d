"""M2FNet: Chudasama et al., "M2FNet: Multi-modal Fusion Network for Emotion Recognition in
Conversation", CVPR Workshops 2022.

Kept: for each modality a stack of Transformer encoders over the whole dialogue, each with a skip
around it; stacked layers of multi-head attention that let the text take in the sound; audio and
fused text side by side are classified.

Left out: vision; RoBERTa and the audio network before the features, and with them the triplet
loss with an adaptive margin that trains the latter: here the features are given.

Not given to us, our choice: which of query, key and value is which in the fusion (text asks, audio
answers where, and what is taken is text: so public re-implementations read it), no code of
positions (as in those), widths and numbers of layers, a classifier of two layers.

Not causal: every encoder sees the whole dialogue. Letters as in state.py; h heads.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.inputs import Inputs, Offline, require_offline
from stream_hbaf.networks.network import Mode, NetworkConfig, Output
from stream_hbaf.networks.state import Features


@dataclass(frozen=True, slots=True)
class M2FNetConfig(NetworkConfig):
    """M2FNet's sizes and what can be left out. ConfigError if they can't fit."""

    kind: Literal["m2fnet"] = "m2fnet"
    mode: Mode = "offline"
    heads: int = 8
    encoders: int = 2  # Transformer encoders of each modality, a skip around each
    layers: int = 1  # of each encoder
    fusions: int = 2  # layers of fusion attention
    use_encoders: bool = True
    use_skips: bool = True
    use_fusion: bool = True  # else what the encoders give stands side by side

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        require_offline(self)
        if self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by heads {self.heads}")


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) over those utterances that ``reach`` names."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads, self.drop = config.heads, config.dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, reach: Tensor) -> Tensor:
        """[B, U, H] each, reach [B, U] → [B, U, H]."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(query)),
            self._split(self.key(key)),
            self._split(self.value(value)),
            attn_mask=reach[:, None, None],
            dropout_p=self.drop if self.training else 0.0,
        )
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended

    def _split(self, given: Tensor) -> Tensor:
        """[B, U, H] → [B, h, U, H/h]."""
        return given.view(*given.shape[:2], self.heads, -1).transpose(1, 2)


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

    def forward(self, told: Tensor, reach: Tensor) -> Tensor:
        told = self.attended(told + self.dropout(self.attention(told, told, told, reach=reach)))
        result: Tensor = self.fed(told + self.dropout(self.feed_forward(told)))
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

    def forward(self, told: Tensor, reach: Tensor) -> Tensor:
        for encoder in self.stack:
            encoded = told
            for layer in encoder if isinstance(encoder, nn.ModuleList) else ():
                encoded = layer(encoded, reach)
            told = told + encoded if self.skips else encoded
        return told


class FusionLayer(nn.Module):
    """T ← W [T; attention(T asks, A answers where, of T)]: the text, shaped by the sound."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.join = nn.Linear(2 * config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, text: Tensor, audio: Tensor, reach: Tensor) -> Tensor:
        attended = self.attention(text, audio, text, reach=reach)
        joined = self.join(torch.relu(torch.cat([text, attended], dim=-1)))
        result: Tensor = self.dropout(torch.relu(joined))
        return result


class M2FNet(Offline):
    """The whole network. With one modality there is nothing to fuse."""

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
        heard = self.inputs(features)
        # A dialogue without utterances reaches its first slot: of nothing there is no softmax.
        reach = heard.mask.clone()
        reach[:, 0] = True
        given = {"a": heard.audio, "l": heard.text}
        told = {m: encoders(given[m], reach) for m, encoders in self.encoders.items()}
        for layer in self.fusion:
            told["l"] = layer(told["l"], told["a"], reach)
        padding = ~heard.mask[..., None]
        told = {m: part.masked_fill(padding, 0.0) for m, part in told.items()}
        hidden = torch.cat(list(told.values()), dim=-1)
        logits = self.classifier(hidden).masked_fill(padding, 0.0)
        return Output(logits, told.get("a"), told.get("l"), hidden)
