"""MGCMA (Wang et al., ICASSP 2025): speech and text of one utterance, aligned token by token.

Multi-Granularity Cross-Modal Alignment has three alignments: of distributions and of instances,
which are losses (alignment.py), and of tokens, which is here. Only the paper's summary is to be
had, so each form is our choice, and says so.

Letters: a speech, l text; B dialogues, U utterances, S streams, V the utterances that are there;
F speech and T text tokens of an utterance, n of either, N of all V together; A and L the widths of
speech and text tokens, H hidden, C classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.alignment import AlignmentCriterion
from stream_hbaf.networks.hbaf import Residual
from stream_hbaf.networks.network import Network, NetworkConfig, Output, Standardise
from stream_hbaf.networks.state import Features, Stateless


@dataclass(frozen=True, slots=True)
class MgcmaConfig(NetworkConfig):
    """MGCMA's sizes and every switch of its ablations. ConfigError if they can't fit."""

    kind: Literal["mgcma"] = "mgcma"
    hidden: int = 128
    heads: int = 4
    layers: int = 1  # of self-attention, a modality
    use_distribution_alignment: bool = True
    use_token_alignment: bool = True
    use_instance_alignment: bool = True
    distribution: float = 0.1  # the loss's weight
    instance: float = 0.1  # the loss's weight
    supervised: bool = False  # instances of one label are drawn together, not pairs only
    temperature: float = 0.1

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.mode != "live":
            raise ConfigError("network: mgcma sees the utterance itself only; its mode is live")
        if self.hidden % 2 or self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2 and by heads")
        if self.temperature <= 0:
            raise ConfigError(f"network: temperature {self.temperature} must be above 0")
        if self.distribution < 0 or self.instance < 0:
            raise ConfigError("network: distribution and instance are weights; 0 is the least")

    @property
    def takes_tokens(self) -> bool:
        """Whether an utterance is given as tokens of speech and of text: it is."""
        return True

    @property
    def remembers(self) -> bool:
        """Whether an utterance is seen among others: it isn't."""
        return False


@dataclass(frozen=True, slots=True)
class Tokens:
    """One modality of V utterances: its N tokens, an utterance's after the last one's.

    What isn't there isn't computed: utterances differ in length more than tenfold.
    """

    values: Tensor  # [N, ..]
    mask: Tensor  # [V, n] where they stand

    def with_values(self, values: Tensor) -> "Tokens":
        """Others in their places."""
        return Tokens(values, self.mask)

    def mean(self) -> Tensor:
        """The mean of each utterance's tokens, of which it must have one: [V, ..]."""
        owner = self.mask.nonzero()[:, 0]
        total = self.values.new_zeros(len(self.mask), self.values.shape[-1])
        counts = self.mask.sum(dim=1, keepdim=True)
        return total.index_add(0, owner, self.values) / counts

    def spread(self) -> Tensor:
        """In rows of one utterance each, zero where no token stands: [V, n, ..]."""
        table = self.values.new_zeros(self.mask.numel(), self.values.shape[-1])
        return table.index_copy(0, self._rows(), self.values).view(
            *self.mask.shape, table.shape[-1]
        )

    def gathered(self, table: Tensor) -> "Tokens":
        """The other way round, from [V, n, ..]."""
        return self.with_values(table.flatten(0, 1).index_select(0, self._rows()))

    def _rows(self) -> Tensor:
        return self.mask.flatten().nonzero()[:, 0]


class FeatureProjection(nn.Module):
    """A modality's tokens as they were measured, to width H.

    Our choice: a linear map, normed, and the place of a token by sine and cosine (Vaswani et al.
    2017). Of an utterance that has no token, one learned token is all there is; a measurement that
    a token lacks (NaN) counts as the usual one, zero.
    """

    def __init__(self, width: int, *, hidden: int, standardised: bool, dropout: float) -> None:
        super().__init__()
        self.standardise = Standardise(width) if standardised else nn.Identity()
        self.linear = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.absent = nn.Parameter(torch.randn(hidden))  # as large as what is normed
        self.dropout = nn.Dropout(dropout)

    def forward(self, measured: Tokens) -> Tokens:
        """[N, A or L] → [N', H]; here an utterance may come without a token."""
        values = self.standardise(measured.values)
        projected = self.norm(self.linear(values.masked_fill(values.isnan(), 0.0)))
        known = measured.mask
        projected = projected + places(known.shape[1], like=self.absent)[known.nonzero()[:, 1]]
        mask = known.clone()
        mask[:, 0] |= ~known.any(dim=1)
        values = self.absent.expand(int(mask.sum()), -1).index_put((known[mask],), projected)
        return Tokens(self.dropout(values), mask)


def places(count: int, *, like: Tensor) -> Tensor:
    """Sines and cosines of each place, wavelengths from 2π to 10,000 · 2π: [count, H]."""
    half = len(like) // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=like.dtype, device=like.device) / half)
    angles = torch.arange(count, dtype=like.dtype, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Tokens look at tokens, their own modality's or the other's: softmax(QKᵀ/√d) V.

    Vaswani et al. 2017, but the heads' results are still side by side: whoever asks maps them.
    Our choice: no dropout of the weights, which on a CPU costs as much as the attention.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.query = nn.Linear(hidden, hidden)
        self.told = nn.Linear(hidden, 2 * hidden)  # key and value

    def forward(self, asking: Tokens, told: Tokens) -> Tokens:
        """[N, H] and the other's [M, H] → [N, H]."""
        query = self._by_head(asking.with_values(self.query(asking.values)).spread())
        pairs = told.with_values(self.told(told.values)).spread()
        key, value = (self._by_head(part) for part in pairs.chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=told.mask[:, None, None]
        )
        return asking.gathered(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, table: Tensor) -> Tensor:
        """[V, n, H] → [V, heads, n, H/heads]."""
        count, length, hidden = table.shape
        return table.view(count, length, self.heads, hidden // self.heads).transpose(1, 2)


class SelfAttention(nn.Module):
    """A modality's tokens look at one another: [N, H] → [N, H].

    Our choice: sum, norm and feed-forward are as HBAF's.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.residual = Residual(config.hidden, config.dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        attended = self.out(self.attention(tokens, tokens).values)
        return tokens.with_values(self.residual(tokens.values, attended))


def feature_extractor(config: MgcmaConfig, *, modality: str) -> nn.Sequential:
    """What a modality's tokens go through before they meet the other's: [N, A or L] → [N', H].

    The projection, then layers of self-attention.
    """
    text = modality == "l"
    projection = FeatureProjection(
        config.text_width if text else config.audio_width,
        hidden=config.hidden,
        standardised=text,
        dropout=config.dropout,
    )
    return nn.Sequential(projection, *(SelfAttention(config) for _ in range(config.layers)))


class CrossAttention(nn.Module):
    """A modality's tokens look at the other's, and are pooled: [N, H], [M, H] → [V, H].

    Our choice: the masked mean is taken of the tokens' sums, before norm and feed-forward, so that
    all but the looking itself is done once an utterance and not once a token.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.residual = Residual(config.hidden, config.dropout)

    def forward(self, asking: Tokens, told: Tokens) -> Tensor:
        attended = self.attention(asking, told).mean()
        pooled: Tensor = self.residual(asking.mean(), self.out(attended))
        return pooled


class TokenAlignment(nn.Module):
    """Speech tokens look at text tokens and text tokens at speech tokens: [V, H] each.

    Our choice: one layer of cross-attention each way, after each modality's self-attention, which
    stays when this is switched off: it aligns nothing.
    """

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        self.speech = CrossAttention(config)
        self.text = CrossAttention(config)

    def forward(self, speech: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        return self.speech(speech, text), self.text(text, speech)


class MGCMA(Network[Stateless]):
    """The whole network: each utterance by itself, so that it remembers nothing and sees no other.

    Speech and text are projected, attend to themselves, are aligned token by token, pooled and
    classified. Our choice: the classifier has two layers, so that speech and text can still be
    weighed against each other where their tokens aren't aligned. h_a and h_l of its output are
    the means before the token alignment, h_m those after it.
    """

    config: MgcmaConfig

    def __init__(self, config: MgcmaConfig) -> None:
        super().__init__()
        self.config = config
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
        present = features.present()  # [B, U, F] if there are nothing but tokens to tell by
        mask = present.new_ones(present.shape[:2]) if present.dim() > 2 else present
        there = mask.nonzero(as_tuple=True)
        tokens: dict[str, Tokens] = {}
        if self.config.use_audio:
            measured = self._measured(
                features.audio, features.audio_mask, there, width=self.config.audio_width
            )
            tokens["a"] = self.feature_extractor["a"](measured)
        if self.config.use_text:
            measured = self._measured(
                features.text, features.text_mask, there, width=self.config.text_width
            )
            tokens["l"] = self.feature_extractor["l"](measured)
        met = {m: part.mean() for m, part in tokens.items()}
        aligned = list(met.values())
        if self.token_alignment is not None:
            aligned = list(self.token_alignment(tokens["a"], tokens["l"]))
        joined = torch.cat(aligned, dim=-1)

        def padded(rows: Tensor) -> Tensor:
            return rows.new_zeros(*mask.shape, rows.shape[-1]).index_put(there, rows)

        h_a, h_l = (padded(met[m]) if m in met else None for m in "al")
        return Output(padded(self.classifier(joined)), h_a, h_l, padded(joined))

    def step_streams(self, utterance: Features, state: Stateless) -> tuple[Tensor, Stateless]:
        """As every network's; the state it gives is the one it got."""
        return self(utterance).logits[:, 0], state

    @torch.no_grad()
    def standardise(self, text: Tensor) -> None:
        """Before training: hear text relative to the training set's tokens [.., L].

        Rows with NaN in them don't count.
        """
        super().standardise(text[~text.isnan().any(dim=-1)])

    def blank(self, streams: int) -> Stateless:
        """The state before the first utterance, [S, 0]: nothing is remembered."""
        return Stateless(next(self.parameters()).new_zeros(streams, 0))

    def criterion(self) -> AlignmentCriterion | None:
        """The alignment of distributions and of instances, of what is switched on."""
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

    def _measured(
        self, given: Tensor | None, mask: Tensor | None, there: tuple[Tensor, ...], *, width: int
    ) -> Tokens:
        """The tokens of the V utterances that are there, no longer than the longest of them.

        At least one column, without a token where the modality is nowhere.
        """
        if given is None or given.shape[-2] == 0:
            nothing = next(self.parameters()).new_zeros(0, width)
            return Tokens(nothing, there[0].new_zeros(len(there[0]), 1).bool())
        tokens = given[there]
        token_mask = ~tokens.isnan().all(dim=-1)
        if mask is not None:
            token_mask = token_mask & mask[there][:, None]
        used = token_mask.any(dim=0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        return Tokens(tokens[token_mask], token_mask[:, :longest])
