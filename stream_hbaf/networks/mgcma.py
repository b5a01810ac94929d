"""MGCMA (Wang et al., ICASSP 2025): speech and text of one utterance, aligned token by token.

Multi-Granularity Cross-Modal Alignment has three alignments: of distributions and of instances,
which are losses (alignment.py), and of tokens, which is here. Only a summary of the paper is
available, so that the form of each part is our choice; its docstring says which.

Letters: a speech, l text; B dialogues, U utterances, S streams, V utterances of a batch without
padding; F speech and T text tokens of an utterance, n of either, N of all V together; A and L the
widths of speech and text tokens, H hidden, C classes.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.alignment import AlignmentCriterion
from stream_hbaf.networks.hbaf import Residual
from stream_hbaf.networks.network import (
    Features,
    Mode,
    NetworkConfig,
    Output,
    Standardise,
    WithoutState,
)
from stream_hbaf.networks.windows import Sequences


@dataclass(frozen=True, slots=True)
class MgcmaConfig(NetworkConfig):
    """MGCMA's sizes and every switch of its ablations. ConfigError if they can't fit."""

    ONLY: ClassVar[Mode] = "live"
    takes_tokens: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    kind: Literal["mgcma"] = "mgcma"
    hidden: int = 128
    heads: int = 4
    layers: int = 1  # of self-attention, a modality
    use_distribution_alignment: bool = True
    use_token_alignment: bool = True
    use_instance_alignment: bool = True
    distribution: float = 0.1  # weight of the distribution alignment loss
    instance: float = 0.1  # weight of the instance alignment loss
    supervised: bool = False  # instances of one label are positives, not the pair only
    temperature: float = 0.1

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.hidden % 2 or self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2 and by heads")
        if self.temperature <= 0:
            raise ConfigError(f"network: temperature {self.temperature} must be above 0")
        if self.distribution < 0 or self.instance < 0:
            raise ConfigError("network: the weights distribution and instance must be at least 0")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The N tokens of one modality of V utterances, packed in the order of the utterances.

    Packed, because utterances differ in length more than tenfold and padding would be computed.
    """

    values: Tensor  # [N, ..]
    mask: Tensor  # [V, n] the places of the tokens when padded

    def mean(self) -> Tensor:
        """The mean of each utterance's tokens, at least one of each: [V, ..]."""
        owner = self.mask.nonzero()[:, 0]
        total = self.values.new_zeros(len(self.mask), self.values.shape[-1])
        counts = self.mask.sum(dim=1, keepdim=True)
        return total.index_add(0, owner, self.values) / counts

    def pad(self, values: Tensor) -> Tensor:
        """Values [N, H] of the tokens → [V, n, H], zero in padding."""
        padded = values.new_zeros(self.mask.numel(), values.shape[-1])
        return padded.index_copy(0, self._rows(), values).view(*self.mask.shape, values.shape[1])

    def pack(self, padded: Tensor) -> "Tokens":
        """[V, n, ..] → tokens at the same places."""
        return replace(self, values=padded.flatten(0, 1).index_select(0, self._rows()))

    def _rows(self) -> Tensor:
        return self.mask.flatten().nonzero()[:, 0]


class FeatureProjection(nn.Module):
    """A modality's token features to width H.

    Our choice: a linear map, normed, plus a sinusoidal positional encoding (Vaswani et al. 2017).
    An utterance without tokens gets one learned token; a missing value of a token (NaN) is zero.
    """

    def __init__(self, config: MgcmaConfig, *, modality: str) -> None:
        super().__init__()
        text, hidden = modality == "l", config.hidden
        width = config.text_width if text else config.audio_width
        self.standardise = Standardise(width) if text else nn.Identity()
        self.linear = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.absent = nn.Parameter(torch.randn(hidden))  # of the size of a normed token
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        """[N, A or L] → [N', H], N' ≥ N since every utterance has a token then."""
        values = self.standardise(tokens.values)
        projected = self.norm(self.linear(values.masked_fill(values.isnan(), 0.0)))
        present = tokens.mask
        encoding = positional_encoding(present.shape[1], like=self.absent)
        projected = projected + encoding[present.nonzero()[:, 1]]
        mask = present.clone()
        mask[:, 0] |= ~present.any(dim=1)
        values = self.absent.expand(int(mask.sum()), -1).index_put((present[mask],), projected)
        return Tokens(self.dropout(values), mask)


def positional_encoding(count: int, *, like: Tensor) -> Tensor:
    """Sines and cosines of each position, wavelengths from 2π to 10,000 · 2π: [count, H]."""
    half = len(like) // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=like.dtype, device=like.device) / half)
    angles = torch.arange(count, dtype=like.dtype, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention softmax(QKᵀ/√d) V (Vaswani et al. 2017) without the output map.

    The output map stands in the modules that use it, after pooling where possible. Our choice: no
    dropout of the weights, which on a CPU costs as much as the attention.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(hidden, 2 * hidden)

    def forward(self, target: Tokens, source: Tokens) -> Tokens:
        """Queries of the target [N, H], keys and values of the source [M, H] → [N, H]."""
        padded = target.pad(self.query(target.values))
        key_value = source.pad(self.key_value(source.values))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [V, heads, n, H/heads]
            for part in (padded, *key_value.chunk(2, dim=-1))
        )
        attn_mask = source.mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask)
        return target.pack(mixed.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Attention among a modality's own tokens: [N, H] → [N, H].

    Our choice: residual, norm and feed-forward are HBAF's.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.residual = Residual(config.hidden, config.dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        attended = self.out(self.attention(tokens, tokens).values)
        return replace(tokens, values=self.residual(tokens.values, attended))


def feature_extractor(config: MgcmaConfig, *, modality: str) -> nn.Sequential:
    """Projection, then layers of self-attention, of a modality's tokens: [N, A or L] → [N', H]."""
    projection = FeatureProjection(config, modality=modality)
    return nn.Sequential(projection, *(SelfAttention(config) for _ in range(config.layers)))


class CrossAttention(nn.Module):
    """Attention of a modality's tokens over the other's, pooled: [N, H] and [M, H] → [V, H].

    Our choice: the mean over tokens is taken before output map, norm and feed-forward, which are
    then computed once an utterance and not once a token.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.residual = Residual(config.hidden, config.dropout)

    def forward(self, target: Tokens, source: Tokens) -> Tensor:
        attended = self.attention(target, source).mean()
        pooled: Tensor = self.residual(target.mean(), self.out(attended))
        return pooled


class TokenAlignment(nn.Module):
    """Cross-attention of speech tokens over text tokens, and of text over speech: [V, H] each.

    Our choice: one layer in each direction, after each modality's self-attention. Switched off,
    the self-attention stays.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        self.speech = CrossAttention(config)
        self.text = CrossAttention(config)

    def forward(self, speech: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        return self.speech(speech, text), self.text(text, speech)


class MGCMA(WithoutState):
    """The whole network: each utterance by itself, without state.

    Speech and text are projected, go through self-attention, are aligned token by token, pooled
    and classified. Our choice: the classifier has two layers, so that speech and text can still
    be weighed against each other where token alignment is switched off. h_a and h_l of its output
    are the means before the token alignment, h_m those after it.
    """

    config: MgcmaConfig

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__(config)
        self.feature_extractor = nn.ModuleDict(
            {m: feature_extractor(config, modality=m) for m in config.modalities}
        )
        crosses = config.use_token_alignment and len(config.modalities) == 2
        self.token_alignment = TokenAlignment(config) if crosses else None
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden * len(config.modalities), config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.classes),
        )

    def forward(self, features: Features) -> Output:
        """Audio [B, U, F, A] and text [B, U, T, L] → logits of every utterance."""
        present = features.present()  # [B, U, F] if tokens alone show the shape
        mask = present.new_ones(present.shape[:2]) if present.dim() > 2 else present
        utterances = Sequences.of_dialogues(mask)
        tokens = {m: self._tokens(features, m, utterances) for m in self.config.modalities}
        tokens = {m: self.feature_extractor[m](part) for m, part in tokens.items()}
        pooled = {m: part.mean() for m, part in tokens.items()}
        aligned = list(pooled.values())
        if self.token_alignment is not None:
            aligned = list(self.token_alignment(tokens["a"], tokens["l"]))
        joined = torch.cat(aligned, dim=-1)
        h_a, h_l = (utterances.pad(pooled[m]) if m in pooled else None for m in "al")
        logits = utterances.pad(self.classifier(joined))
        return Output(logits, h_a, h_l, utterances.pad(joined))

    @torch.no_grad()
    def standardise(self, text: Tensor) -> None:
        """Fit mean and deviation of the training set's text tokens [.., L], before training.

        Rows with NaN in them are left out.
        """
        super().standardise(text[~text.isnan().any(dim=-1)])

    def criterion(self) -> AlignmentCriterion | None:
        """The alignment losses that are switched on; None with one modality or without any."""
        config = self.config
        distribution = config.distribution if config.use_distribution_alignment else None
        instance = config.instance if config.use_instance_alignment else None
        if len(config.modalities) < 2 or (distribution is None and instance is None):
            return None
        return AlignmentCriterion(
            config.hidden,
            distribution=distribution,
            instance=instance,
            supervised=config.supervised,
            temperature=config.temperature,
        )

    def _tokens(self, features: Features, m: str, utterances: Sequences) -> Tokens:
        """A modality's tokens of V utterances, padded to the longest of these.

        At least one column, without a token where the modality is absent everywhere.
        """
        padded = features.audio if m == "a" else features.text
        if padded is None or padded.shape[-2] == 0:
            width = self.config.audio_width if m == "a" else self.config.text_width
            none = next(self.parameters()).new_zeros(0, width)
            return Tokens(none, utterances.place.new_zeros(len(utterances.place), 1).bool())
        tokens = utterances.pack(padded)
        there = utterances.pack(features.given(m, utterances.mask))
        token_mask = ~tokens.isnan().all(dim=-1) & there[:, None]
        used = token_mask.any(dim=0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        return Tokens(tokens[token_mask], token_mask[:, :longest])
