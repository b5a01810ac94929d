"""What all baselines begin with: an utterance's features as two vectors of one width.

The originals take sound and words that other networks have encoded; here these are the features
that HBAF is given, but for commonsense, which none of them knows.
"""

from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.network import SEES_THE_FUTURE, Network, NetworkConfig, Standardise
from stream_hbaf.networks.state import PARTIES as PARTIES
from stream_hbaf.networks.state import Features, Stateless


@dataclass(frozen=True, slots=True)
class Heard:
    """Utterances as a baseline takes them; a modality not in use is zero."""

    audio: Tensor  # [B, U, H]
    text: Tensor  # [B, U, H]
    mask: Tensor  # [B, U] False in padding
    speaker: Tensor  # [B, U] int64, 0 .. PARTIES - 1

    @property
    def both(self) -> Tensor:
        """Audio and text side by side: [B, U, 2H]."""
        return torch.cat([self.audio, self.text], dim=-1)


class Inputs(nn.Module):
    """A linear map a modality, with dropout; a learned vector where it is absent."""

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

    def forward(self, features: Features) -> Heard:
        """[B, U, ..] → the same utterances, [B, U, H] each."""
        mask = features.present()
        audio = self._map(
            self.audio, features.audio, features.audio_mask, absent=self.absent_audio, mask=mask
        )
        given = None if features.text is None else self.standardise(features.text)
        text = self._map(self.text, given, features.text_mask, absent=self.absent_text, mask=mask)
        return Heard(
            audio if self.use_audio else torch.zeros_like(audio),
            text if self.use_text else torch.zeros_like(text),
            mask,
            features.parties(mask),
        )

    def _map(
        self,
        layer: nn.Linear,
        given: Tensor | None,
        there: Tensor | None,
        *,
        absent: Tensor,
        mask: Tensor,
    ) -> Tensor:
        if given is None:
            return absent.expand(*mask.shape, -1)
        there = mask if there is None else mask & there
        # Zero first: a gradient through NaN is NaN, even where it is not chosen.
        known = self.dropout(layer(given.masked_fill(~there[..., None], 0.0)))
        return torch.where(there[..., None], known, absent)


class Offline(Network[Stateless]):
    """A network that has only the form that sees the future: it refuses all that is live."""

    def step_streams(self, utterance: Features, state: Stateless) -> Never:
        """Raises ModelError: an utterance alone can't be told."""
        raise ModelError(SEES_THE_FUTURE)

    def blank(self, streams: int) -> Never:
        """Raises ModelError: there is no state to begin with."""
        raise ModelError(SEES_THE_FUTURE)


def require_offline(config: NetworkConfig) -> None:
    """Raise ConfigError unless the mode is offline: this network has no causal form."""
    if config.mode != "offline":
        raise ConfigError(f"network: {config.kind} sees the whole dialogue; its mode is offline")


def require_live(config: NetworkConfig) -> None:
    """Raise ConfigError unless the mode is live: this network never looks at the future."""
    if config.mode != "live":
        raise ConfigError(f"network: {config.kind} never looks ahead; its mode is live")
