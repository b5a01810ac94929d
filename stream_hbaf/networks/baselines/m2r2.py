"""M2R2: Wang et al., "M2R2: Missing-Modality Robust Emotion Recognition Framework with Iterative
Data Augmentation", IEEE Transactions on Artificial Intelligence 2022 (arXiv:2205.02524).

Kept: the party attentive network (PANet), which tracks the state of every speaker and of the
dialogue's topic, the speaker attending to the other participants and to the topic; common
representation learning, by which a missing modality is made up from the one that is there; in
training, modalities are taken away at random and what is made up stands in for them.

Left out: vision, the encoders before the features, the adversary that judges what is made up.

Changed: the original augments its data in rounds, training and making up features in turn. Here
a round is one batch: it is augmented with what the network makes up by then.

Not given to us, our choice: the abstract names the parts, not their equations. Topic, parties and
emotion are GRUs as in DialogueRNN (Majumder et al. 2019), which has these three; attention is a
scaled product; the common representation is a linear map of each modality, and back.

Causal: all is one recurrence forward; the state is one vector for each party, the topic and the
emotion, whatever the dialogue's length. Letters as in state.py; P parties.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.inputs import PARTIES, Heard, Inputs, require_live
from stream_hbaf.networks.network import Criterion, Network, NetworkConfig, Output
from stream_hbaf.networks.state import Features, State


@dataclass(frozen=True, slots=True)
class M2R2Config(NetworkConfig):
    """M2R2's sizes and what can be left out. ConfigError if they can't fit."""

    kind: Literal["m2r2"] = "m2r2"
    taken_away: float = 0.2  # share of the utterances of both modalities that lose one in training
    rebuilding_weight: float = 1.0  # of the criterion
    use_rebuilding: bool = True  # else a learned vector stands for what is missing
    use_attention: bool = True  # else a speaker hears the topic only

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        require_live(self)
        if not 0 <= self.taken_away <= 1:
            raise ConfigError(f"network: taken_away {self.taken_away} must be from 0 to 1")


@dataclass(frozen=True, slots=True, eq=False)
class M2R2State(State):
    """What M2R2 remembers: of every party, of the topic and of the emotion."""

    OWN: ClassVar[int] = 1

    topic: Tensor  # [.., H]
    emotion: Tensor  # [.., H]
    parties: Tensor  # [.., P, H]
    spoken: Tensor  # [.., P] whether a party has been heard yet


@dataclass(frozen=True, slots=True)
class M2R2Output(Output):
    """With what the criterion compares; first of the two is audio, or made from it."""

    common: Tensor | None = None  # [B, U, 2, H] the common representation of each modality
    rebuilt: Tensor | None = None  # [B, U, 2, H] each modality, from the other


class CommonRepresentation(nn.Module):
    """z_m = E_m x_m, alike for both modalities of an utterance; x̂_m = D_m z of the other."""

    def __init__(self, config: M2R2Config) -> None:
        super().__init__()
        hidden = config.hidden

        def maps() -> nn.ModuleDict:
            return nn.ModuleDict({m: nn.Linear(hidden, hidden) for m in ("a", "l")})

        self.encode, self.decode = maps(), maps()

    def forward(self, heard: Heard) -> tuple[Tensor, Tensor]:
        """[B, U, H] of each → common and rebuilt, both [B, U, 2, H]."""
        common_a = torch.tanh(self.encode["a"](heard.audio))
        common_l = torch.tanh(self.encode["l"](heard.text))
        rebuilt = [self.decode["a"](common_l), self.decode["l"](common_a)]
        return torch.stack([common_a, common_l], dim=-2), torch.stack(rebuilt, dim=-2)


class PartyAttentiveNetwork(nn.Module):
    """Turn by turn: topic, then what the speaker hears, then the speaker's state.

    g_t = GRU(W [u_t; p], g_{t-1}), with p the speaker's state before; c_t = Σ_k α_k k, where k is
    the topic or the state of another party that has spoken, and α their softmax of
    (W_q p + W_u u_t) · k / √H; p' = GRU([u_t; c_t], p). All others keep their states.
    """

    def __init__(self, config: M2R2Config) -> None:
        super().__init__()
        hidden = config.hidden
        self.use_attention = config.use_attention
        self.topic = nn.GRUCell(2 * hidden, hidden)
        self.party = nn.GRUCell(2 * hidden, hidden)
        if config.use_attention:
            self.query = nn.Linear(2 * hidden, hidden)

    def forward(self, told: Tensor, speaker: Tensor, state: M2R2State) -> tuple[Tensor, M2R2State]:
        """Utterances [S, U, H] and who says them [S, U] → p' of each [S, U, H], state after."""
        topic, parties, spoken = state.topic, state.parties, state.spoken
        said = []
        for u, who in zip(told.unbind(1), speaker.unbind(1), strict=True):
            speaks = F.one_hot(who, PARTIES).bool()  # [S, P]
            before = parties[torch.arange(len(who), device=who.device), who]
            utterance = torch.cat([u, before], dim=-1)
            topic = self.topic(utterance, topic)
            hears = topic
            if self.use_attention:
                query = self.query(utterance)
                hears = _attend(query, topic=topic, parties=parties, others=spoken & ~speaks)
            after = self.party(torch.cat([u, hears], dim=-1), before)
            parties = torch.where(speaks[..., None], after[:, None], parties)
            spoken = spoken | speaks
            said.append(after)
        return torch.stack(said, dim=1), replace(state, topic=topic, parties=parties, spoken=spoken)


def _attend(query: Tensor, *, topic: Tensor, parties: Tensor, others: Tensor) -> Tensor:
    """A speaker's [S, H] among the topic and those ``others`` [S, P] of the parties: [S, H]."""
    known = torch.cat([topic[:, None], parties], dim=1)  # [S, 1 + P, H]
    reach = torch.cat([torch.ones_like(others[:, :1]), others], dim=1)
    scores = (known @ query[..., None])[..., 0] / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~reach, -torch.inf).softmax(dim=-1)
    hears: Tensor = (weights[:, None] @ known)[:, 0]
    return hears


class M2R2(Network[M2R2State]):
    """The whole network: missing modalities are made up, then told to PANet."""

    config: M2R2Config

    def __init__(self, config: M2R2Config) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        both = len(config.modalities) == 2
        self.inputs = Inputs(config)
        self.common = CommonRepresentation(config) if both and config.use_rebuilding else None
        self.join = nn.Linear(2 * hidden, hidden)
        self.panet = PartyAttentiveNetwork(config)
        self.emotion = nn.GRU(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden, config.classes)

    def forward(self, features: Features) -> M2R2Output:
        """As every network's; in training some modalities are taken away."""
        return self._hear(features, self.blank(len(features.present())))[0]

    def step_streams(self, turn: Features, state: M2R2State) -> tuple[Tensor, M2R2State]:
        """As every network's."""
        output, state = self._hear(turn, state)
        return output.logits[:, 0], state

    def blank(self, streams: int) -> M2R2State:
        """The state before the first utterance, [S, ..]."""
        hidden, new = self.config.hidden, self.classifier.weight.new_zeros
        return M2R2State(
            topic=new(streams, hidden),
            emotion=new(streams, hidden),
            parties=new(streams, PARTIES, hidden),
            spoken=new(streams, PARTIES, dtype=torch.bool),
        )

    def criterion(self) -> "RebuildingLoss | None":
        """How well a modality is made up from the other."""
        return None if self.common is None else RebuildingLoss(self.config.rebuilding_weight)

    def _hear(self, features: Features, state: M2R2State) -> tuple[M2R2Output, M2R2State]:
        heard = self.inputs(features)
        padding = ~heard.mask[..., None]
        parts = torch.stack([heard.audio, heard.text], dim=-2)  # [B, U, 2, H]
        common = rebuilt = None
        if self.common is not None:
            made = (part.masked_fill(padding[..., None], 0.0) for part in self.common(heard))
            common, rebuilt = made
            parts = torch.where(self._made_up(features)[..., None], rebuilt, parts)
        told = self.dropout(torch.relu(self.join(parts.flatten(2))))
        said, state = self.panet(told, heard.speaker, state)
        felt, emotion = self.emotion(self.dropout(said), state.emotion[None])
        felt = felt.masked_fill(padding, 0.0)
        logits = self.classifier(self.dropout(felt)).masked_fill(padding, 0.0)
        h_a, h_l = (part.masked_fill(padding, 0.0) for part in (heard.audio, heard.text))
        output = M2R2Output(logits, h_a, h_l, felt, common, rebuilt)
        return output, replace(state, emotion=emotion[0])

    def _made_up(self, features: Features) -> Tensor:
        """[B, U, 2]: where a modality is missing, or taken away, and the other is there."""
        mask = features.present()
        nowhere = torch.zeros_like(mask)
        audio = nowhere if features.audio is None else mask
        text = nowhere if features.text is None else mask
        audio = audio if features.audio_mask is None else audio & features.audio_mask
        text = text if features.text_mask is None else text & features.text_mask
        missing = torch.stack([text & ~audio, audio & ~text], dim=-1)
        if not self.training:
            return missing
        lot = torch.rand(mask.shape, device=mask.device)
        share = self.config.taken_away
        lost = torch.stack([lot < share / 2, (lot >= share / 2) & (lot < share)], dim=-1)
        return missing | (lost & (audio & text)[..., None])


class RebuildingLoss(Criterion[M2R2Output]):
    """Mean squared: what is made up less what was there; one common representation less the other.

    What was there is detached, or it would shrink to be easily made up.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, output: M2R2Output, mask: Tensor, labels: Tensor) -> Tensor:
        if output.h_a is None or output.h_l is None:
            raise ValueError("a network of one modality makes up no other; leave it out")
        if output.common is None or output.rebuilt is None:
            raise ValueError("a network without rebuilding has nothing to compare; leave it out")
        if not bool(mask.any()):
            return (output.common.sum() + output.rebuilt.sum()) * 0.0
        there = torch.stack([output.h_a, output.h_l], dim=-2)[mask].detach()
        audio, text = output.common[mask].unbind(-2)
        rebuilt = F.mse_loss(output.rebuilt[mask], there)
        return self.weight * (rebuilt + F.mse_loss(audio, text))
