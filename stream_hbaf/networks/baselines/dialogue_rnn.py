"""DialogueRNN: Majumder, Poria, Hazarika, Mihalcea, Gelbukh, Cambria, "DialogueRNN: An Attentive
RNN for Emotion Detection in Conversations", AAAI 2019.

Kept: the global GRU over all utterances, the party GRU with its attention over past global
states, the emotion GRU; the variants "l" (listeners' states change too, ``use_listener``), "Bi"
(a second network from the end to the beginning) and "Att" (attention over all emotion
representations). Mode ``live`` is DialogueRNN, which is causal; mode ``offline`` is
BiDialogueRNN+Att.

Left out: vision and the encoders before it. Changed: live, the party GRU attends to the last
``memory`` global states, not to all, so that the state has a fixed size; parties beyond the ninth
share a state; a listener's GRU takes the utterance and the speaker's new state, as in the authors'
code, since the paper's takes the listener's face; no dropout within the recurrence, where the
authors' code has some. Live, e_t itself is classified.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.inputs import Inputs, Projected
from stream_hbaf.networks.network import (
    PARTIES,
    Features,
    Mode,
    Network,
    NetworkConfig,
    Output,
    State,
)


@dataclass(frozen=True, slots=True)
class DialogueRnnConfig(NetworkConfig):
    """DialogueRNN's sizes and switches. ConfigError if they can't fit."""

    kind: Literal["dialogue-rnn"] = "dialogue-rnn"
    hidden: int = 128
    mode: Mode = "offline"
    memory: int = 20  # global states attended to; of no meaning offline, where it is all
    use_parties: bool = True  # else all speakers are one
    use_emotion: bool = True  # else the speaker's state is its emotion
    use_listener: bool = False  # the states of listeners change as well
    use_attention: bool = True  # over the emotions of the whole dialogue; of no meaning live

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.memory < 1:
            raise ConfigError("network: memory of dialogue-rnn must be at least 1 state")


@dataclass(frozen=True, slots=True, eq=False)
class DialogueRnnState(State):
    """DialogueRNN's state; the last global states, unused slots first."""

    OWN: ClassVar[int] = 2

    past: Tensor  # [.., memory, H] g_1 .. g_{t-1}
    past_mask: Tensor  # [.., memory]
    parties: Tensor  # [.., PARTIES, H] q
    emotion: Tensor  # [.., H] e


class OneWay(nn.Module):
    """DialogueRNN in one direction: utterances [B, U, 2H], speakers [B, U] → e [B, U, H].

    g_t = GRU_G(g_{t-1}, [u_t; q_{s,t-1}]); α = softmax(u_tᵀ W_α [g_1 .. g_{t-1}]) and
    c_t = Σ α_i g_i; q_{s,t} = GRU_P(q_{s,t-1}, [u_t; c_t]) for the speaker s; a listener's state
    stays, or is GRU_L(q_{i,t-1}, [u_t; q_{s,t}]); e_t = GRU_E(e_{t-1}, q_{s,t}).
    """

    def __init__(self, config: DialogueRnnConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.whole = nn.GRUCell(3 * hidden, hidden)  # GRU_G
        self.key = nn.Linear(2 * hidden, hidden, bias=False)  # W_α
        self.party = nn.GRUCell(3 * hidden, hidden)  # GRU_P
        self.listener = nn.GRUCell(3 * hidden, hidden) if config.use_listener else None  # GRU_L
        self.emotion = nn.GRU(hidden, hidden, batch_first=True) if config.use_emotion else None
        self.use_parties = config.use_parties
        self.reach = config.memory if config.mode == "live" else None

    def forward(
        self, utterances: Tensor, speaker: Tensor, state: DialogueRnnState
    ) -> tuple[Tensor, DialogueRnnState]:
        """e of U more utterances after ``state``, and the state after them."""
        speaker = speaker if self.use_parties else torch.zeros_like(speaker)
        one_hot = F.one_hot(speaker, state.parties.shape[1])[..., None].to(utterances.dtype)
        speaker_states = []
        # Not [:, t]: each would have a gradient as long as the dialogue.
        turns = (part.unbind(1) for part in (utterances, self.key(utterances), one_hot))
        for u, key, is_speaker in zip(*turns, strict=True):
            before = (state.parties * is_speaker).sum(dim=1)  # q_{s,t-1}
            context = self._context(key, state)
            whole = self.whole(torch.cat([u, before], dim=-1), state.past[:, -1])
            after = self.party(torch.cat([u, context], dim=-1), before)  # q_{s,t}
            listeners = self._listeners(u, after, state.parties)
            parties = torch.where(is_speaker > 0, after[:, None], listeners)
            state = replace(self._append(whole, state), parties=parties)
            speaker_states.append(after)
        emotions = torch.stack(speaker_states, dim=1)
        if self.emotion is None:
            return emotions, state
        emotions, last = self.emotion(emotions, state.emotion[None].contiguous())
        return emotions, replace(state, emotion=last[0])

    def _context(self, key: Tensor, state: DialogueRnnState) -> Tensor:
        """c_t [B, H]; zero where there is no past: unused slots are zero themselves."""
        scores = (state.past @ key[..., None])[..., 0]
        # Not -inf: without a past there would be NaN.
        scores = scores.masked_fill(~state.past_mask, torch.finfo(scores.dtype).min)
        return (torch.softmax(scores, dim=-1)[:, None] @ state.past)[:, 0]

    def _listeners(self, u: Tensor, speaker: Tensor, parties: Tensor) -> Tensor:
        """The states of all P parties [B, P, H], updated as listeners to the speaker's [B, H]."""
        if self.listener is None:
            return parties
        inputs = torch.cat([u, speaker], dim=-1).repeat_interleave(parties.shape[1], dim=0)
        updated: Tensor = self.listener(inputs, parties.flatten(0, 1))
        return updated.view_as(parties)

    def _append(self, whole: Tensor, state: DialogueRnnState) -> DialogueRnnState:
        past = torch.cat([state.past, whole[:, None]], dim=1)
        mask = F.pad(state.past_mask, (0, 1), value=True)
        surplus = 0 if self.reach is None else past.shape[1] - self.reach
        return replace(state, past=past[:, surplus:], past_mask=mask[:, surplus:])


class DialogueRnn(Network[DialogueRnnState]):
    """The whole network; offline with a second direction, and attention over both."""

    config: DialogueRnnConfig

    def __init__(self, config: DialogueRnnConfig) -> None:
        super().__init__()
        self.config = config
        hidden, both_ways = config.hidden, config.mode == "offline"
        width = hidden * (2 if both_ways else 1)
        self.inputs = Inputs(config)
        self.forwards = OneWay(config)
        self.backwards = OneWay(config) if both_ways else None
        attends = both_ways and config.use_attention
        self.match = nn.Linear(width, width, bias=False) if attends else None  # W_β
        self.dense = nn.Linear(width, hidden)  # W_l
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden, config.classes)

    def forward(self, features: Features) -> Output:
        """As every network's; h_m is e_t, offline that of both directions."""
        inputs: Projected = self.inputs(features)
        utterances, speaker, mask = inputs.both, inputs.speaker, inputs.mask
        start = self._start(len(mask))
        # Parties that never speak have no influence on the others.
        start = replace(start, parties=start.parties[:, : int(speaker.max()) + 1])
        emotions, _ = self.forwards(utterances, speaker, start)
        if self.backwards is not None:
            rows = torch.arange(len(mask), device=mask.device)[:, None], _backwards(mask)
            reverse, _ = self.backwards(utterances[rows], speaker[rows], start)
            emotions = torch.cat([emotions, reverse[rows]], dim=-1)
        emotions = emotions.masked_fill(~mask[..., None], 0.0)
        logits = self._classify(self._attend(emotions, mask)).masked_fill(~mask[..., None], 0.0)
        return Output(logits, h_m=emotions)

    def step_streams(
        self, utterance: Features, state: DialogueRnnState
    ) -> tuple[Tensor, DialogueRnnState]:
        """As every network's."""
        inputs: Projected = self.inputs(utterance)
        emotions, after = self.forwards(inputs.both, inputs.speaker, state)
        return self._classify(emotions[:, 0]), after

    def blank(self, streams: int) -> DialogueRnnState:
        """The state before the first utterance, [S, ..]. Raises ModelError offline."""
        self.require_live()
        return self._start(streams)

    def _start(self, streams: int) -> DialogueRnnState:
        """All zero; offline with one unused slot, which is the global state before the first."""
        config, weight = self.config, self.classifier.weight
        slots = config.memory if config.mode == "live" else 1
        return DialogueRnnState(
            past=weight.new_zeros(streams, slots, config.hidden),
            past_mask=weight.new_zeros(streams, slots).bool(),
            parties=weight.new_zeros(streams, PARTIES, config.hidden),
            emotion=weight.new_zeros(streams, config.hidden),
        )

    def _attend(self, emotions: Tensor, mask: Tensor) -> Tensor:
        """β_t = softmax(e_tᵀ W_β [e_1 .. e_U]), Σ β_i e_i; without attention e_t itself."""
        if self.match is None:
            return emotions
        scores = self.match(emotions) @ emotions.transpose(1, 2)
        # Not -inf: an empty dialogue would be NaN.
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1) @ emotions

    def _classify(self, emotions: Tensor) -> Tensor:
        """l_t = ReLU(W_l e_t + b_l), and logits of it."""
        logits: Tensor = self.classifier(self.dropout(torch.relu(self.dense(emotions))))
        return logits


def _backwards(mask: Tensor) -> Tensor:
    """The turns of each dialogue from its end to its beginning, padding after them: [B, U]."""
    turns = torch.arange(mask.shape[1], device=mask.device)
    reverse = mask.sum(dim=1, keepdim=True) - 1 - turns
    return torch.where(reverse >= 0, reverse, turns)
