"""Layers that baselines share: the first one of all, a BiLSTM, edges of graphs, contrast by label.

The originals take audio and text that other networks have encoded; here these are the features
that HBAF is given, without commonsense, which none of them uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stream_hbaf.networks.network import Features, NetworkConfig, Output, Standardise

LstmState = tuple[Tensor, Tensor]  # hidden and cell, [B, H] each


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

    def modality(self, letter: str) -> Tensor:
        """[B, U, H] of "a", audio, or "l", text."""
        return {"a": self.audio, "l": self.text}[letter]

    def masked(self, states: Tensor) -> Tensor:
        """[B, U, ..] with zeros in padding."""
        return states.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (states.dim() - 2)), 0.0)

    def output(self, logits: Tensor, h: Mapping[str, Tensor], h_m: Tensor) -> Output:
        """A network's output, zero in padding; ``h`` holds h_a and h_l by modality, if any."""
        h = {m: self.masked(states) for m, states in h.items()}
        return Output(self.masked(logits), h.get("a"), h.get("l"), self.masked(h_m))


class Inputs(nn.Module):
    """A linear map of each modality, with dropout; a learned vector where it is absent."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.modalities = config.modalities
        self.standardise = Standardise(config.text_width)
        self.audio = nn.Linear(config.audio_width, hidden)
        self.text = nn.Linear(config.text_width, hidden)
        self.absent_audio = nn.Parameter(torch.zeros(hidden))
        self.absent_text = nn.Parameter(torch.zeros(hidden))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Features) -> Projected:
        """[B, U, ..] → the same utterances, [B, U, H] each modality."""
        mask = features.present()
        text = None if features.text is None else self.standardise(features.text)
        audio = self._map(self.audio, features.audio, features.given("a", mask), self.absent_audio)
        text = self._map(self.text, text, features.given("l", mask), self.absent_text)
        audio, text = (
            states if m in self.modalities else torch.zeros_like(states)
            for m, states in (("a", audio), ("l", text))
        )
        return Projected(audio, text, mask, features.parties(mask))

    def _map(
        self, layer: nn.Linear, features: Tensor | None, present: Tensor, absent: Tensor
    ) -> Tensor:
        if features is None:
            return absent.expand(*present.shape, -1)
        present = present[..., None]
        # Zero first: a gradient through NaN is NaN, even where it is not chosen.
        mapped = self.dropout(layer(features.masked_fill(~present, 0.0)))
        return torch.where(present, mapped, absent)


def run_packed(
    lstm: nn.LSTM, sequences: Tensor, mask: Tensor, before: LstmState | None = None
) -> tuple[Tensor, LstmState]:
    """An LSTM over padded sequences [B, U, ..]: its outputs, zero in padding, and its last state.

    Packed, because the backward direction must begin at a sequence's end, not in its padding. An
    empty sequence counts as one of length 1. A state is of one direction; None begins with zeros.
    """
    lengths = mask.sum(dim=1).clamp_min(1).cpu()
    packed = pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
    given = None if before is None else tuple(part[None].contiguous() for part in before)
    outputs, (hidden, cell) = lstm(packed, given)
    padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=sequences.shape[1])
    return padded, (hidden[0], cell[0])


class BiLstm(nn.Module):
    """BiLSTM over the utterances of a dialogue, H/2 a direction: [B, U, H] → [B, U, H]."""

    def __init__(self, hidden: int, *, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            hidden,
            hidden // 2,
            num_layers=layers,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,
            batch_first=True,
        )

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        """Zero in padding."""
        return run_packed(self.lstm, sequence, mask)[0]


def pairs_of_nodes(mask: Tensor, *, modalities: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whether two nodes of a graph belong together, for M U nodes, one modality after the other.

    Two nodes may be of one modality [M U, M U], of one utterance [M U, M U], and neither of them
    padding [B, M U, M U].
    """
    turns = mask.shape[1]
    place = torch.arange(modalities * turns, device=mask.device)
    modality, turn = place // turns, place % turns
    node_mask = mask.repeat(1, modalities)
    there = node_mask[:, None] & node_mask[..., None]
    return modality[:, None] == modality, turn[:, None] == turn, there


def supervised_contrast(points: Tensor, alike: Tensor, *, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020): [P, H], pairs [P, P] → [].

    ``alike`` marks the positives. -log of a positive's share among all other points, mean over a
    point's positives, then over the points that have any; zero if none has.
    """
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    alike = alike & ~itself
    directions = F.normalize(points, dim=-1, eps=1e-6)
    similarity = (directions @ directions.T / temperature).masked_fill(itself, -torch.inf)
    shares = similarity.log_softmax(dim=-1).masked_fill(~alike, 0.0)
    count = alike.sum(dim=-1)
    losses = -shares.sum(dim=-1) / count.clamp_min(1)
    return losses.sum() / (count > 0).sum().clamp_min(1)
