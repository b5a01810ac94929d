"""The common first layer of the baselines: each modality's features mapped to one width.

The originals take audio and text that other networks have encoded; here these are the features
that HBAF is given, without commonsense, which none of them uses.
"""

from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.network import (
    SEES_THE_FUTURE,
    Features,
    Network,
    NetworkConfig,
    Standardise,
    Stateless,
)


@dataclass(frozen=True, slots=True)
class Projected:
    """Utterances with both modalities at width H; a modality that is switched off is zero."""

    audio: Tensor  # [B, U, H]
    text: Tensor  # [B, U, H]
    mask: Tensor  # [B, U] False in padding
    speaker: Tensor  # [B, U] int64, 0 .. PARTIES - 1

    @property
    def both(self) -> Tensor:
        """Audio and text side by side: [B, U, 2H]."""
        return torch.cat([self.audio, self.text], dim=-1)

    @property
    def padding(self) -> Tensor:
        """True in padding, [B, U, 1], to mask [B, U, ..] with."""
        return ~self.mask[..., None]

    def modality(self, letter: str) -> Tensor:
        """[B, U, H] of "a", audio, or "l", text."""
        return {"a": self.audio, "l": self.text}[letter]


class Inputs(nn.Module):
    """A linear map of each modality, with dropout; a learned vector where it is absent."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.use_audio, self.use_text = config.use_audio, config.use_text
        self.standardise = Standardise(config.text_width)
        self.audio = nn.Linear(config.audio_width, hidden)
        self.text = nn.Linear(config.text_width, hidden)
        self.absent_audio = nn.Parameter(torch.zeros(hidden))
        self.absent_text = nn.Parameter(torch.zeros(hidden))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Features) -> Projected:
        """[B, U, ..] → the same utterances, [B, U, H] each modality."""
        mask = features.present()
        audio = self._map(
            self.audio, features.audio, features.audio_mask, absent=self.absent_audio, mask=mask
        )
        text = None if features.text is None else self.standardise(features.text)
        text = self._map(self.text, text, features.text_mask, absent=self.absent_text, mask=mask)
        return Projected(
            audio if self.use_audio else torch.zeros_like(audio),
            text if self.use_text else torch.zeros_like(text),
            mask,
            features.parties(mask),
        )

    def _map(
        self,
        layer: nn.Linear,
        features: Tensor | None,
        present: Tensor | None,
        *,
        absent: Tensor,
        mask: Tensor,
    ) -> Tensor:
        if features is None:
            return absent.expand(*mask.shape, -1)
        present = mask if present is None else mask & present
        # Zero first: a gradient through NaN is NaN, even where it is not chosen.
        mapped = self.dropout(layer(features.masked_fill(~present[..., None], 0.0)))
        return torch.where(present[..., None], mapped, absent)


def run_packed(lstm: nn.LSTM, sequences: Tensor, mask: Tensor) -> Tensor:
    """An LSTM's outputs [B, U, ..] over padded sequences [B, U, ..], zero in padding.

    Packed, because the backward direction must begin at a sequence's end, not in its padding. An
    empty sequence counts as one of length 1.
    """
    lengths = mask.sum(dim=1).clamp_min(1).cpu()
    packed = pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
    outputs, _ = pad_packed_sequence(
        lstm(packed)[0], batch_first=True, total_length=sequences.shape[1]
    )
    return outputs


class Offline(Network[Stateless]):
    """A network that uses the whole dialogue and therefore has neither step nor state."""

    def step_streams(self, utterance: Features, state: Stateless) -> Never:
        """Raises ModelError: the result of an utterance depends on later ones."""
        raise ModelError(SEES_THE_FUTURE)

    def blank(self, streams: int) -> Never:
        """Raises ModelError: there is no state to begin with."""
        raise ModelError(SEES_THE_FUTURE)


def require_offline_mode(config: NetworkConfig) -> None:
    """Raise ConfigError unless the mode is offline: this network has no causal form."""
    if config.mode != "offline":
        raise ConfigError(f"network: {config.kind} sees the whole dialogue; its mode is offline")


def require_live_mode(config: NetworkConfig) -> None:
    """Raise ConfigError unless the mode is live: this network never uses later utterances."""
    if config.mode != "live":
        raise ConfigError(f"network: {config.kind} never looks ahead; its mode is live")
