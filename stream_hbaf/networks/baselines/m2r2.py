"""M2R2: Wang et al., "M2R2: Missing-Modality Robust Emotion Recognition Framework with Iterative
Data Augmentation", IEEE Transactions on Artificial Intelligence 2022 (arXiv:2205.02524).

Kept: the party attentive network (PANet), which tracks the state of every speaker and of the
dialogue's topic, the speaker attending to the other participants and to the topic; common
representation learning, by which a missing modality is reconstructed from the one that is present;
in training, modalities are dropped at random and replaced by their reconstructions.

Left out: vision, the encoders before the features, the adversarial loss of the reconstructions.

Changed: the original augments its data in rounds, alternating training and reconstruction. Here a
round is one batch, augmented with the network's current reconstructions.

Our choice, since the abstract names the parts but not their equations: topic, parties and emotion
are GRUs as in DialogueRNN (Majumder et al. 2019), which has these three; attention is a scaled
product; the common representation is a linear map of each modality, and back.

Causal: one forward recurrence; the state is one vector for each party, for the topic and for the
emotion, whatever the dialogue's length. Letters as in network.py; P parties.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.layers import Inputs, Projected
from stream_hbaf.networks.network import (
    PARTIES,
    Criterion,
    Features,
    Mode,
    NetworkConfig,
    Output,
    Recurrent,
    State,
)


@dataclass(frozen=True, slots=True)
class M2R2Config(NetworkConfig):
    """M2R2's sizes and switches. ConfigError if they can't fit."""

    ONLY: ClassVar[Mode] = "live"

    kind: Literal["m2r2"] = "m2r2"
    dropped: float = 0.2  # share of the utterances of both modalities that lose one in training
    reconstruction_weight: float = 1.0  # of the criterion
    use_reconstruction: bool = True  # else a learned vector stands for a missing modality
    use_attention: bool = True  # else the speaker's context is the topic only

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if not 0 <= self.dropped <= 1:
            raise ConfigError(f"network: dropped {self.dropped} must be from 0 to 1")


@dataclass(frozen=True, slots=True, eq=False)
class M2R2State(State):
    """M2R2's state: of every party, of the topic and of the emotion."""

    OWN: ClassVar[int] = 1

    topic: Tensor  # [.., H]
    emotion: Tensor  # [.., H]
    parties: Tensor  # [.., P, H]
    party_mask: Tensor  # [.., P] whether a party has spoken


@dataclass(frozen=True, slots=True)
class M2R2Output(Output):
    """With the criterion's inputs; the first of the two is audio, or reconstructed audio."""

    common: Tensor | None = None  # [B, U, 2, H] the common representation of each modality
    reconstructed: Tensor | None = None  # [B, U, 2, H] each modality, from the other


class CommonRepresentation(nn.Module):
    """z_m = E_m x_m, alike for both modalities of an utterance; x̂_m = D_m z of the other."""

    def __init__(self, config: M2R2Config) -> None:
        super().__init__()
        hidden = config.hidden

        def maps() -> nn.ModuleDict:
            return nn.ModuleDict({m: nn.Linear(hidden, hidden) for m in ("a", "l")})

        self.encode, self.decode = maps(), maps()

    def forward(self, inputs: Projected) -> tuple[Tensor, Tensor]:
        """[B, U, H] of each modality → common and reconstructed, both [B, U, 2, H]."""
        common_a = torch.tanh(self.encode["a"](inputs.audio))
        common_l = torch.tanh(self.encode["l"](inputs.text))
        reconstructed = [self.decode["a"](common_l), self.decode["l"](common_a)]
        return torch.stack([common_a, common_l], dim=-2), torch.stack(reconstructed, dim=-2)


class PartyAttentiveNetwork(nn.Module):
    """PANet, turn by turn: the topic, the speaker's context, the speaker's state.

    g_t = GRU(W [u_t; p], g_{t-1}), with p the speaker's state before; c_t = Σ_k α_k k, where k is
    the topic or the state of another party that has spoken, and α their softmax of
    (W_q p + W_u u_t) · k / √H; p' = GRU([u_t; c_t], p). The other parties keep their states.
    """

    def __init__(self, config: M2R2Config) -> None:
        super().__init__()
        hidden = config.hidden
        self.use_attention = config.use_attention
        self.topic = nn.GRUCell(2 * hidden, hidden)
        self.party = nn.GRUCell(2 * hidden, hidden)
        if config.use_attention:
            self.query = nn.Linear(2 * hidden, hidden)

    def forward(
        self, utterances: Tensor, speaker: Tensor, state: M2R2State
    ) -> tuple[Tensor, M2R2State]:
        """Utterances [S, U, H] and their speakers [S, U] → p' of each [S, U, H], state after."""
        topic, parties, party_mask = state.topic, state.parties, state.party_mask
        speaker_states = []
        for u, number in zip(utterances.unbind(1), speaker.unbind(1), strict=True):
            is_speaker = F.one_hot(number, PARTIES).bool()  # [S, P]
            before = parties[torch.arange(len(number), device=number.device), number]
            joined = torch.cat([u, before], dim=-1)
            topic = self.topic(joined, topic)
            context = topic
            if self.use_attention:
                query, others = self.query(joined), party_mask & ~is_speaker
                context = _attend(query, topic=topic, parties=parties, party_mask=others)
            after = self.party(torch.cat([u, context], dim=-1), before)
            parties = torch.where(is_speaker[..., None], after[:, None], parties)
            party_mask = party_mask | is_speaker
            speaker_states.append(after)
        state = replace(state, topic=topic, parties=parties, party_mask=party_mask)
        return torch.stack(speaker_states, dim=1), state


def _attend(query: Tensor, *, topic: Tensor, parties: Tensor, party_mask: Tensor) -> Tensor:
    """Attention of a query [S, H] over the topic and the parties of the mask [S, P]: [S, H]."""
    keys = torch.cat([topic[:, None], parties], dim=1)  # [S, 1 + P, H]
    mask = torch.cat([torch.ones_like(party_mask[:, :1]), party_mask], dim=1)
    scores = (keys @ query[..., None])[..., 0] / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    attended: Tensor = (weights[:, None] @ keys)[:, 0]
    return attended


class M2R2(Recurrent[M2R2State]):
    """The whole network: missing modalities are reconstructed, then PANet and emotion GRU run."""

    config: M2R2Config

    def __init__(self, config: M2R2Config) -> None:
        super().__init__(config)
        hidden = config.hidden
        both = len(config.modalities) == 2
        self.inputs = Inputs(config)
        self.common = CommonRepresentation(config) if both and config.use_reconstruction else None
        self.join = nn.Linear(2 * hidden, hidden)
        self.panet = PartyAttentiveNetwork(config)
        self.emotion = nn.GRU(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden, config.classes)

    def blank(self, streams: int) -> M2R2State:
        hidden, new = self.config.hidden, self.classifier.weight.new_zeros
        return M2R2State(
            topic=new(streams, hidden),
            emotion=new(streams, hidden),
            parties=new(streams, PARTIES, hidden),
            party_mask=new(streams, PARTIES, dtype=torch.bool),
        )

    def criterion(self) -> "ReconstructionLoss | None":
        """The error of the reconstructions, if they are in use."""
        if self.common is None:
            return None
        return ReconstructionLoss(self.config.reconstruction_weight)

    def _continue(self, features: Features, state: M2R2State) -> tuple[M2R2Output, M2R2State]:
        """As every recurrent network's; in training some modalities are dropped."""
        inputs: Projected = self.inputs(features)
        parts = torch.stack([inputs.audio, inputs.text], dim=-2)  # [B, U, 2, H]
        common = reconstructed = None
        if self.common is not None:
            common, reconstructed = (inputs.masked(part) for part in self.common(inputs))
            parts = torch.where(self._replaced(features)[..., None], reconstructed, parts)
        utterances = self.dropout(torch.relu(self.join(parts.flatten(2))))
        speaker_states, state = self.panet(utterances, inputs.speaker, state)
        emotions, last = self.emotion(self.dropout(speaker_states), state.emotion[None])
        emotions = inputs.masked(emotions)
        logits = inputs.masked(self.classifier(self.dropout(emotions)))
        h_a, h_l = inputs.masked(inputs.audio), inputs.masked(inputs.text)
        output = M2R2Output(logits, h_a, h_l, emotions, common, reconstructed)
        return output, replace(state, emotion=last[0])

    def _replaced(self, features: Features) -> Tensor:
        """[B, U, 2]: where a modality is missing or dropped, and the other is present."""
        mask = features.present()
        audio, text = features.given("a", mask), features.given("l", mask)
        missing = torch.stack([text & ~audio, audio & ~text], dim=-1)
        if not self.training:
            return missing
        chance, share = torch.rand(mask.shape, device=mask.device), self.config.dropped
        first = chance < share / 2
        dropped = torch.stack([first, (chance < share) & ~first], dim=-1)
        return missing | (dropped & (audio & text)[..., None])


class ReconstructionLoss(Criterion[M2R2Output]):
    """Mean squared errors of the reconstructions, and between the two common representations.

    The reconstructed features are detached, or they would shrink to be reconstructed easily.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, output: M2R2Output, mask: Tensor, labels: Tensor) -> Tensor:
        if output.h_a is None or output.h_l is None:
            raise ValueError("a network of one modality reconstructs nothing; leave this loss out")
        if output.common is None or output.reconstructed is None:
            raise ValueError("the network reconstructs nothing; leave this loss out")
        if not bool(mask.any()):
            return (output.common.sum() + output.reconstructed.sum()) * 0.0
        original = torch.stack([output.h_a, output.h_l], dim=-2)[mask].detach()
        audio, text = output.common[mask].unbind(-2)
        error = F.mse_loss(output.reconstructed[mask], original)
        return self.weight * (error + F.mse_loss(audio, text))
