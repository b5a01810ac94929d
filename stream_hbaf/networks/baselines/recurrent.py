"""bc-LSTM and DialogueRNN, the contexts of which are recurrent networks over the utterances."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.layers import Inputs, LstmState, Projected, run_packed
from stream_hbaf.networks.network import (
    PARTIES,
    Features,
    Mode,
    Network,
    NetworkConfig,
    Output,
    Recurrent,
    State,
    masked_softmax,
)


@dataclass(frozen=True, slots=True)
class BcLstmConfig(NetworkConfig):
    """bc-LSTM's sizes and the variants of its paper."""

    kind: Literal["bc-lstm"] = "bc-lstm"
    hidden: int = 128
    mode: Mode = "offline"
    use_hierarchy: bool = True  # else one LSTM over both modalities side by side
    use_dense: bool = True  # else the LSTM's own output is classified ("h-LSTM")


@dataclass(frozen=True, slots=True, eq=False)
class BcLstmState(State):
    """sc-LSTM's state: hidden and cell of each of its N LSTMs."""

    OWN: ClassVar[int] = 2

    hidden: Tensor  # [.., N, H]
    cell: Tensor  # [.., N, H]


class ContextualLstm(nn.Module):
    """Utterances [B, U, I] → context-dependent features [B, U, ``width``].

    z_t = ReLU(W_z h_t + b_z) of an LSTM's outputs h_t. Outputs in padding have no meaning.
    """

    def __init__(self, incoming: int, config: BcLstmConfig) -> None:
        super().__init__()
        both_ways = config.mode == "offline"
        self.lstm = nn.LSTM(incoming, config.hidden, batch_first=True, bidirectional=both_ways)
        width = config.hidden * (2 if both_ways else 1)
        self.dense = nn.Linear(width, config.hidden) if config.use_dense else None
        self.width = config.hidden if config.use_dense else width
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, utterances: Tensor, mask: Tensor, before: LstmState
    ) -> tuple[Tensor, LstmState]:
        """The features, and live the LSTM's state after them."""
        start = None if self.lstm.bidirectional else before
        outputs, after = run_packed(self.lstm, utterances, mask, start)
        dense = outputs if self.dense is None else self.dense(outputs).relu()
        return self.dropout(dense), after


class BcLstm(Recurrent[BcLstmState]):
    """bc-LSTM: Poria, Cambria, Hazarika, Majumder, Zadeh, Morency, "Context-Dependent Sentiment
    Analysis in User-Generated Videos", ACL 2017.

    Kept: for each modality a "contextual LSTM", which is an LSTM over a dialogue's utterances, a
    dense layer and a softmax; the hierarchical fusion, in which a further contextual LSTM takes the
    outputs of those of the modalities, and the plain one, in which it takes the utterances; the
    variants bc-LSTM (two directions, mode ``offline``), sc-LSTM (one direction, mode ``live``:
    causal) and h-LSTM (no dense layer). Speakers are not used. With one modality there is no fusing
    LSTM.

    Left out: vision, and the encoders of audio and text before it. Changed: all is trained as one,
    where the paper trains the modalities first and the fusing LSTM on their outputs; a linear map
    and dropout stand before the first LSTMs, as in all baselines here. Not given by the paper, our
    choice: the place of dropout, and ReLU in the dense layer.
    """

    config: BcLstmConfig

    def __init__(self, config: BcLstmConfig) -> None:
        super().__init__(config)
        self.inputs = Inputs(config)
        modalities = config.modalities
        unimodal = modalities if config.use_hierarchy or len(modalities) == 1 else ()
        contexts = {m: ContextualLstm(config.hidden, config) for m in unimodal}
        self.contexts = nn.ModuleDict(contexts)
        widths = [contexts[m].width if m in contexts else config.hidden for m in modalities]
        self.fusing = ContextualLstm(sum(widths), config) if len(modalities) > 1 else None
        width = widths[0] if self.fusing is None else self.fusing.width
        self.classifier = nn.Linear(width, config.classes)

    def _continue(self, features: Features, state: BcLstmState) -> tuple[Output, BcLstmState]:
        """As every network's; h_a and h_l are the outputs of the modalities' LSTMs."""
        inputs: Projected = self.inputs(features)
        streams = {m: inputs.modality(m) for m in self.config.modalities}
        before = list(zip(state.hidden.unbind(1), state.cell.unbind(1), strict=True))
        after: list[LstmState] = []
        for n, (m, context) in enumerate(self.contexts.items()):
            streams[m], last = context(streams[m], inputs.mask, before[n])
            after.append(last)
        fused = next(iter(streams.values()))
        if self.fusing is not None:
            joined = torch.cat(list(streams.values()), dim=-1)
            fused, last = self.fusing(joined, inputs.mask, before[-1])
            after.append(last)
        hidden, cell = (torch.stack(parts, dim=1) for parts in zip(*after, strict=True))
        output = inputs.output(self.classifier(fused), streams, fused)
        return output, BcLstmState(hidden, cell)

    def blank(self, streams: int) -> BcLstmState:
        lstms = len(self.contexts) + (self.fusing is not None)
        zeros = self.classifier.weight.new_zeros(streams, lstms, self.config.hidden)
        return BcLstmState(zeros, zeros.clone())


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
        """c_t [B, H]; zero where there is no past."""
        weights = masked_softmax((state.past @ key[..., None])[..., 0], state.past_mask)
        return (weights[:, None] @ state.past)[:, 0]

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
    """DialogueRNN: Majumder, Poria, Hazarika, Mihalcea, Gelbukh, Cambria, "DialogueRNN: An
    Attentive RNN for Emotion Detection in Conversations", AAAI 2019.

    Kept: the global GRU over all utterances, the party GRU with its attention over past global
    states, the emotion GRU; the variants "l" (listeners' states change too, ``use_listener``), "Bi"
    (a second network from the end to the beginning) and "Att" (attention over all emotion
    representations). Mode ``live`` is DialogueRNN, which is causal; mode ``offline`` is
    BiDialogueRNN+Att.

    Left out: vision and the encoders before it. Changed: live, the party GRU attends to the last
    ``memory`` global states, not to all, so that the state has a fixed size; parties beyond the
    ninth share a state; a listener's GRU takes the utterance and the speaker's new state, as in the
    authors' code, since the paper's takes the listener's face; no dropout within the recurrence,
    where the authors' code has some. Live, e_t itself is classified.
    """

    config: DialogueRnnConfig

    def __init__(self, config: DialogueRnnConfig) -> None:
        super().__init__(config)
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
        start = self.blank(len(mask))
        # Parties that never speak have no influence on the others.
        start = replace(start, parties=start.parties[:, : int(speaker.max()) + 1])
        emotions, _ = self.forwards(utterances, speaker, start)
        if self.backwards is not None:
            rows = torch.arange(len(mask), device=mask.device)[:, None], _backwards(mask)
            reverse, _ = self.backwards(utterances[rows], speaker[rows], start)
            emotions = torch.cat([emotions, reverse[rows]], dim=-1)
        emotions = inputs.masked(emotions)
        return inputs.output(self._classify(self._attend(emotions, mask)), {}, emotions)

    def step_streams(
        self, utterance: Features, state: DialogueRnnState
    ) -> tuple[Tensor, DialogueRnnState]:
        inputs: Projected = self.inputs(utterance)
        emotions, after = self.forwards(inputs.both, inputs.speaker, state)
        return self._classify(emotions[:, 0]), after

    def blank(self, streams: int) -> DialogueRnnState:
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
        return masked_softmax(scores, mask[:, None]) @ emotions

    def _classify(self, emotions: Tensor) -> Tensor:
        """l_t = ReLU(W_l e_t + b_l), and logits of it."""
        logits: Tensor = self.classifier(self.dropout(torch.relu(self.dense(emotions))))
        return logits


def _backwards(mask: Tensor) -> Tensor:
    """The turns of each dialogue from its end to its beginning, padding after them: [B, U]."""
    turns = torch.arange(mask.shape[1], device=mask.device)
    reverse = mask.sum(dim=1, keepdim=True) - 1 - turns
    return torch.where(reverse >= 0, reverse, turns)
