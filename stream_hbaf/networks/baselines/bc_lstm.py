"""bc-LSTM: Poria, Cambria, Hazarika, Majumder, Zadeh, Morency, "Context-Dependent Sentiment
Analysis in User-Generated Videos", ACL 2017.

Kept: for each modality a "contextual LSTM", which is an LSTM over a dialogue's utterances, a dense
layer and a softmax; the hierarchical fusion, in which a further contextual LSTM takes the outputs
of those of the modalities, and the plain one, in which it takes the utterances; the variants
bc-LSTM (two directions, mode ``offline``), sc-LSTM (one direction, mode ``live``: causal) and
h-LSTM (no dense layer). Speakers are not used.

Left out: vision, and the encoders of audio and text before it. Changed: all is trained as one,
where the paper trains the modalities first and the fusing LSTM on their outputs; a linear map and
dropout stand before the first LSTMs, as in all baselines here. Not given by the paper, our choice:
the place of dropout, and ReLU in the dense layer.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stream_hbaf.networks.baselines.inputs import Inputs, run_packed
from stream_hbaf.networks.network import Features, Mode, Network, NetworkConfig, Output, State

LstmState = tuple[Tensor, Tensor]  # hidden and cell, [S, H] each


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

    def forward(self, utterances: Tensor, mask: Tensor) -> Tensor:
        return self._dense(run_packed(self.lstm, utterances, mask))

    def step(self, utterances: Tensor, before: LstmState) -> tuple[Tensor, LstmState]:
        """One utterance of each of S streams [S, I] → its features [S, width], the LSTM's state."""
        hidden, cell = (part[None].contiguous() for part in before)
        outputs, (hidden, cell) = self.lstm(utterances[:, None], (hidden, cell))
        return self._dense(outputs[:, 0]), (hidden[0], cell[0])

    def _dense(self, outputs: Tensor) -> Tensor:
        dense = outputs if self.dense is None else self.dense(outputs).relu()
        features: Tensor = self.dropout(dense)
        return features


class BcLstm(Network[BcLstmState]):
    """The whole network: a contextual LSTM for each modality, and one that fuses them.

    With one modality there is no fusing LSTM.
    """

    config: BcLstmConfig

    def __init__(self, config: BcLstmConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs = Inputs(config)
        modalities = config.modalities
        unimodal = modalities if config.use_hierarchy or len(modalities) == 1 else ()
        self.contexts = nn.ModuleDict({m: ContextualLstm(config.hidden, config) for m in unimodal})
        widths = [context.width for context in self._each] or [config.hidden] * len(modalities)
        self.fusing = ContextualLstm(sum(widths), config) if len(modalities) > 1 else None
        self.classifier = nn.Linear((self.fusing or self._each[0]).width, config.classes)

    @property
    def _each(self) -> list[ContextualLstm]:
        """The modalities' own, in the order of ``config.modalities``."""
        return [part for part in self.contexts.values() if isinstance(part, ContextualLstm)]

    def forward(self, features: Features) -> Output:
        """As every network's; h_a and h_l are the outputs of the modalities' LSTMs."""
        streams, mask = self._streams(features)
        if self.contexts:
            contexts = zip(self._each, streams, strict=True)
            streams = [context(stream, mask) for context, stream in contexts]
        fused = streams[0]
        if self.fusing is not None:
            fused = self.fusing(torch.cat(streams, dim=-1), mask)
        padding = ~mask[..., None]
        parts = dict(
            zip(self.config.modalities, [s.masked_fill(padding, 0.0) for s in streams], strict=True)
        )
        logits = self.classifier(fused).masked_fill(padding, 0.0)
        return Output(logits, parts.get("a"), parts.get("l"), fused.masked_fill(padding, 0.0))

    def step_streams(self, utterance: Features, state: BcLstmState) -> tuple[Tensor, BcLstmState]:
        """As every network's."""
        streams = [stream[:, 0] for stream in self._streams(utterance)[0]]
        before = list(zip(state.hidden.unbind(1), state.cell.unbind(1), strict=True))
        after_each: list[LstmState] = []
        for n, context in enumerate(self._each):
            streams[n], after = context.step(streams[n], before[n])
            after_each.append(after)
        fused = streams[0]
        if self.fusing is not None:
            fused, after = self.fusing.step(torch.cat(streams, dim=-1), before[-1])
            after_each.append(after)
        hidden, cell = (torch.stack(parts, dim=1) for parts in zip(*after_each, strict=True))
        return self.classifier(fused), BcLstmState(hidden, cell)

    def blank(self, streams: int) -> BcLstmState:
        """The state before the first utterance, [S, ..]. Raises ModelError offline."""
        self.require_live()
        lstms = len(self.contexts) + (self.fusing is not None)
        zeros = self.classifier.weight.new_zeros(streams, lstms, self.config.hidden)
        return BcLstmState(zeros, zeros.clone())

    def _streams(self, features: Features) -> tuple[list[Tensor], Tensor]:
        """The modalities in use, [B, U, H] each, and the mask of utterances."""
        inputs = self.inputs(features)
        return [inputs.modality(m) for m in self.config.modalities], inputs.mask
