"""CMN: Hazarika, Poria, Zadeh, Cambria, Morency, Zimmermann, "Conversational Memory Network for
Emotion Recognition in Dyadic Dialogue Videos", NAACL 2018.

Kept: the utterance is a query; the last K utterances are split into those of its speaker and those
of the others, and each of the two histories becomes a memory through a GRU of its own; the query
attends to both memories several times ("hops"), and each result is added to it. The original is
causal, and so is this: there is no offline form.

Left out: vision, the encoders before it, and the L2 penalty (the trainer's weight decay replaces
it). Changed: in a dialogue of more than two, all others are one party; K is 20, not 40. The
equations follow the authors' published code, since the paper's text wasn't available: tanh around
the scores, one memory for all hops. That code stacks two GRUs on each history and lets the softmax
count the other history's slots as zeros; here there is one GRU, and a history has its own slots
only.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.layers import Inputs, Projected
from stream_hbaf.networks.network import (
    Features,
    Mode,
    Network,
    NetworkConfig,
    Output,
    State,
    masked_softmax,
)


@dataclass(frozen=True, slots=True)
class CmnConfig(NetworkConfig):
    """CMN's sizes and switches. ConfigError if they can't fit."""

    ONLY: ClassVar[Mode] = "live"

    kind: Literal["cmn"] = "cmn"
    hidden: int = 128
    memory: int = 20  # K, utterances before the current one
    hops: int = 3  # R
    use_own: bool = True  # the speaker's own history
    use_others: bool = True  # the history of all others
    use_attention: bool = True  # else each read is the memory's mean

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.memory < 1 or self.hops < 1:
            raise ConfigError("network: memory and hops of cmn must be at least 1")
        if not (self.use_own or self.use_others):
            raise ConfigError("network: use_own and use_others are both off; switch one on")


@dataclass(frozen=True, slots=True, eq=False)
class CmnState(State):
    """CMN's state: the projected features of the last K utterances, unused slots first."""

    OWN: ClassVar[int] = 2

    utterances: Tensor  # [.., K, 2H]
    speaker: Tensor  # [.., K] int64
    utterance_mask: Tensor  # [.., K]


class HistoryGru(nn.Module):
    """A GRU over the utterances of one history, from zero at the window's beginning.

    ``forward`` [N, n, 3H] → memory [N, n, H] from the input products that ``gates`` gives. The
    equations of ``nn.GRU``, written out so that an utterance's input products are computed once,
    not once for every window that it is in.
    """

    def __init__(self, incoming: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(incoming, hidden)

    def gates(self, utterances: Tensor) -> Tensor:
        """[.., I] → [.., 3H], the input products of reset gate, update gate and new state."""
        return F.linear(utterances, self.cell.weight_ih, self.cell.bias_ih)

    def forward(self, gates: Tensor) -> Tensor:
        hidden, memory = gates.new_zeros(len(gates), self.cell.hidden_size), []
        for reset, update, new in (step.chunk(3, dim=-1) for step in gates.unbind(1)):
            recurrent = F.linear(hidden, self.cell.weight_hh, self.cell.bias_hh).chunk(3, dim=-1)
            now = torch.tanh(new + torch.sigmoid(reset + recurrent[0]) * recurrent[2])
            hidden = torch.lerp(now, hidden, torch.sigmoid(update + recurrent[1]))
            memory.append(hidden)
        return torch.stack(memory, dim=1)


class Cmn(Network[CmnState]):
    """The whole network: N utterances, each with the K before it, are computed at once."""

    config: CmnConfig

    def __init__(self, config: CmnConfig) -> None:
        super().__init__(config)
        hidden = config.hidden
        self.inputs = Inputs(config)
        self.query = nn.Linear(2 * hidden, hidden)
        names = ("own",) * config.use_own + ("others",) * config.use_others
        self.histories = nn.ModuleDict({name: HistoryGru(2 * hidden, hidden) for name in names})
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden, config.classes)

    def forward(self, features: Features) -> Output:
        """As every network's; h_m is the query after all hops."""
        inputs: Projected = self.inputs(features)
        places = inputs.mask.nonzero(as_tuple=True)  # N dialogues and turns, without padding
        queries = inputs.audio.new_zeros(*inputs.mask.shape, self.config.hidden)
        if len(places[0]):
            found = self._query(inputs.both, inputs.speaker, inputs.mask, *places)
            queries = queries.index_put(places, found.to(queries.dtype))
        return inputs.output(self.classifier(self.dropout(queries)), {}, queries)

    def step_streams(self, utterance: Features, state: CmnState) -> tuple[Tensor, CmnState]:
        inputs: Projected = self.inputs(utterance)
        utterances = torch.cat([state.utterances, inputs.both], dim=1)
        speaker = torch.cat([state.speaker, inputs.speaker], dim=1)
        mask = torch.cat([state.utterance_mask, inputs.mask], dim=1)
        streams = torch.arange(len(mask), device=mask.device)
        last = torch.full_like(streams, self.config.memory)
        queries = self._query(utterances, speaker, mask, streams, last)
        after = CmnState(utterances[:, 1:], speaker[:, 1:], mask[:, 1:])
        return self.classifier(self.dropout(queries)), after

    def blank(self, streams: int) -> CmnState:
        zeros = self.classifier.weight.new_zeros(streams, self.config.memory)
        utterances = zeros[..., None].repeat(1, 1, 2 * self.config.hidden)
        return CmnState(utterances, zeros.long(), zeros.bool())

    def _query(
        self, utterances: Tensor, speaker: Tensor, mask: Tensor, dialogue: Tensor, turn: Tensor
    ) -> Tensor:
        """The queries after R hops, [N, H]: of ``turn`` [N] in ``dialogue`` [N] of [B, T, 2H].

        q¹ = tanh(W u + b); each hop attends to each history's memory m, which is key and value:
        p = softmax(tanh(mᵀq)), o = Σ p m, and q ← tanh(q + o_own + o_others).
        """
        slots = turn[:, None] - torch.arange(self.config.memory, 0, -1, device=turn.device)
        rows = dialogue[:, None], slots.clamp_min(0)
        before = mask[rows] & (slots >= 0)  # [N, K]
        own = speaker[rows] == speaker[dialogue, turn][:, None]
        places = rows[0] * mask.shape[1] + rows[1]
        memories = []
        for name, history in self.histories.items():
            chosen = before & (own if name == "own" else ~own)
            memories.append(self._memory(history, utterances, places, chosen))
        query = torch.tanh(self.query(utterances[dialogue, turn]))
        for _ in range(self.config.hops):
            attended = [self._attend(query, memory, mask) for memory, mask in memories]
            query = torch.tanh(query + torch.stack(attended).sum(dim=0))
        return query

    def _memory(
        self, history: nn.Module, utterances: Tensor, places: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The memory [N, n, H] of the chosen among K places [N, K], in order, and its mask [N, n].

        n is the largest number of chosen places, at least 1. Places that aren't chosen stand last:
        a GRU's earlier states don't depend on them.
        """
        assert isinstance(history, HistoryGru)
        order = torch.argsort((~chosen).int(), dim=1, stable=True)
        used = max(1, int(chosen.sum(dim=1).max()))
        order = order[:, :used]
        gates = history.gates(utterances.flatten(0, 1))
        # Not gates[...]: the gradient of index_select is the faster by far.
        gates = gates.index_select(0, places.gather(1, order).flatten())
        memory = self.dropout(history(gates.view(*order.shape, -1)))
        return memory, chosen.gather(1, order)

    def _attend(self, query: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Attention of a query [N, H] over a memory [N, n, H]; zero for an empty one."""
        scores = torch.tanh(memory @ query[..., None])[..., 0]
        if not self.config.use_attention:
            scores = torch.zeros_like(scores)
        return (masked_softmax(scores, mask)[:, None] @ memory)[:, 0]
