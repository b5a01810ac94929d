"""CMN: Hazarika, Poria, Zadeh, Cambria, Morency, Zimmermann, "Conversational Memory Network for
Emotion Recognition in Dyadic Dialogue Videos", NAACL 2018.

Kept: the utterance is a query; what its speaker and what the others have said in the last K
utterances are two histories, each made a memory by a GRU of its own; the query reads both by
attention, several times over ("hops"), and what is read is added to it. The original is causal,
and so is this: there is no offline form.

Left out: vision, the encoders before it, and the L2 penalty (the trainer's weight decay stands for
it). Changed: a dialogue of more than two has the speaker and "all others"; K is 20, not 40. The
equations follow the authors' published code, since the paper's text wasn't at hand: tanh around
the scores, one memory for all hops. That code stacks two GRUs on each history and lets the
softmax count the other history's slots as zeros; here it is one GRU, and a history's own slots.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.inputs import Heard, Inputs, require_live
from stream_hbaf.networks.network import Network, NetworkConfig, Output
from stream_hbaf.networks.state import Features, State


@dataclass(frozen=True, slots=True)
class CmnConfig(NetworkConfig):
    """CMN's sizes and switches. ConfigError for what can't be."""

    kind: Literal["cmn"] = "cmn"
    hidden: int = 128
    memory: int = 20  # K, utterances before the current one
    hops: int = 3  # R
    use_own: bool = True  # the speaker's own history
    use_others: bool = True  # that of all others
    use_attention: bool = True  # else each read is the memory's mean

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        require_live(self)
        if self.memory < 1 or self.hops < 1:
            raise ConfigError("network: memory and hops of cmn must be at least 1")
        if not (self.use_own or self.use_others):
            raise ConfigError("network: use_own and use_others are both off; switch one on")


@dataclass(frozen=True, slots=True, eq=False)
class CmnState(State):
    """What CMN remembers: the last K utterances as they were heard, unused slots first."""

    OWN: ClassVar[int] = 2

    utterances: Tensor  # [.., K, 2H]
    speaker: Tensor  # [.., K] int64
    utterance_mask: Tensor  # [.., K]


class History(nn.Module):
    """A GRU over the utterances of one history, from zero at the window's beginning.

    ``forward`` [N, n, 3H] → memory [N, n, H] from what ``gates`` has made of each utterance. The
    equations of ``nn.GRU``; written out, so that an utterance's own products are computed once,
    not once for every window that it is in.
    """

    def __init__(self, incoming: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(incoming, hidden)

    def gates(self, utterances: Tensor) -> Tensor:
        """[.., I] → [.., 3H], the utterance's part of reset gate, update gate and new state."""
        return F.linear(utterances, self.cell.weight_ih, self.cell.bias_ih)

    def forward(self, gates: Tensor) -> Tensor:
        hidden, memory = gates.new_zeros(len(gates), self.cell.hidden_size), []
        for reset, update, new in (turn.chunk(3, dim=-1) for turn in gates.unbind(1)):
            recurrent = F.linear(hidden, self.cell.weight_hh, self.cell.bias_hh).chunk(3, dim=-1)
            now = torch.tanh(new + torch.sigmoid(reset + recurrent[0]) * recurrent[2])
            hidden = torch.lerp(now, hidden, torch.sigmoid(update + recurrent[1]))
            memory.append(hidden)
        return torch.stack(memory, dim=1)


class Cmn(Network[CmnState]):
    """The whole network: N utterances, each with the K before it, are read at once."""

    config: CmnConfig

    def __init__(self, config: CmnConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.inputs = Inputs(config)
        self.query = nn.Linear(2 * hidden, hidden)
        names = ("own",) * config.use_own + ("others",) * config.use_others
        self.histories = nn.ModuleDict({name: History(2 * hidden, hidden) for name in names})
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden, config.classes)

    def forward(self, features: Features) -> Output:
        """As every network's; h_m is the query after all hops."""
        heard: Heard = self.inputs(features)
        there = heard.mask.nonzero()  # [N, 2]: padding is worth no window
        read = heard.audio.new_zeros(*heard.mask.shape, self.config.hidden)
        if len(there):
            told = self._read(heard.both, heard.speaker, heard.mask, there[:, 0], there[:, 1])
            read = read.index_put((there[:, 0], there[:, 1]), told.to(read.dtype))
        logits = self.classifier(self.dropout(read)).masked_fill(~heard.mask[..., None], 0.0)
        return Output(logits, h_m=read)

    def step_streams(self, turn: Features, state: CmnState) -> tuple[Tensor, CmnState]:
        """As every network's."""
        heard: Heard = self.inputs(turn)
        utterances = torch.cat([state.utterances, heard.both], dim=1)
        speaker = torch.cat([state.speaker, heard.speaker], dim=1)
        mask = torch.cat([state.utterance_mask, heard.mask], dim=1)
        streams = torch.arange(len(mask), device=mask.device)
        last = torch.full_like(streams, self.config.memory)
        read = self._read(utterances, speaker, mask, streams, last)
        after = CmnState(utterances[:, 1:], speaker[:, 1:], mask[:, 1:])
        return self.classifier(self.dropout(read)), after

    def blank(self, streams: int) -> CmnState:
        """The state before the first utterance, [S, ..]."""
        zeros = self.classifier.weight.new_zeros(streams, self.config.memory)
        utterances = zeros[..., None].repeat(1, 1, 2 * self.config.hidden)
        return CmnState(utterances, zeros.long(), zeros.bool())

    def _read(
        self, utterances: Tensor, speaker: Tensor, mask: Tensor, dialogue: Tensor, turn: Tensor
    ) -> Tensor:
        """The queries after R hops, [N, H]: of ``turn`` [N] in ``dialogue`` [N] of [B, T, 2H].

        q¹ = tanh(W u + b); each hop reads from both memories m and c, which are one:
        p = softmax(tanh(mᵀq)), o = Σ p c, and q ← tanh(q + o_own + o_others).
        """
        slots = turn[:, None] - torch.arange(self.config.memory, 0, -1, device=turn.device)
        rows = dialogue[:, None], slots.clamp_min(0)
        before = mask[rows] & (slots >= 0)  # [N, K]
        own = speaker[rows] == speaker[dialogue, turn][:, None]
        places = rows[0] * mask.shape[1] + rows[1]
        memories = []
        for name, history in self.histories.items():
            chosen = before & (own if name == "own" else ~own)
            memories.append(self._remember(history, utterances, places, chosen))
        query = torch.tanh(self.query(utterances[dialogue, turn]))
        for _ in range(self.config.hops):
            told = [self._attend(query, memory, heard) for memory, heard in memories]
            query = torch.tanh(query + torch.stack(told).sum(dim=0))
        return query

    def _remember(
        self, history: nn.Module, utterances: Tensor, places: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The memory [N, n, H] of the chosen among K places [N, K], in order, and its mask.

        n is as many as any has, at least 1. A GRU doesn't see what comes after, so that the
        slots that aren't chosen can all stand last.
        """
        assert isinstance(history, History)
        order = torch.argsort((~chosen).int(), dim=1, stable=True)
        used = max(1, int(chosen.sum(dim=1).max()))
        order = order[:, :used]
        gates = history.gates(utterances.flatten(0, 1))
        # Not gates[...]: the gradient of index_select is the faster by far.
        gates = gates.index_select(0, places.gather(1, order).flatten())
        memory = self.dropout(history(gates.view(*order.shape, -1)))
        return memory, chosen.gather(1, order)

    def _attend(self, query: Tensor, memory: Tensor, heard: Tensor) -> Tensor:
        """What a query [N, H] reads of a memory [N, n, H]; nothing of an empty one."""
        scores = torch.tanh(memory @ query[..., None])[..., 0]
        if not self.config.use_attention:
            scores = torch.zeros_like(scores)
        lowest = torch.finfo(scores.dtype).min  # not -inf: an empty memory would be NaN
        weights = torch.softmax(scores.masked_fill(~heard, lowest), dim=1) * heard
        return (weights[:, None] @ memory)[:, 0]
