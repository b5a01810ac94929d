"""Several networks as one: deep ensembles (Lakshminarayanan et al. 2017).

Networks that differ in the seed only agree on easy utterances and differ on hard ones, so that
their mean probability is more accurate, and better calibrated, than each of them.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stream_hbaf.networks.network import Network, Output
from stream_hbaf.networks.state import Features, State


class Ensemble(Network[State]):
    """M networks of one configuration with one network's interface.

    Logits are the logarithm of the mean probability. The state is the members' own, with M after
    the streams, [.., M, ..], so that it is stacked, moved and compared as any other.
    """

    state_dims = 1  # M

    def __init__(self, members: Sequence[Network]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.config = members[0].config

    @property
    def _each(self) -> list[Network]:
        return [member for member in self.members if isinstance(member, Network)]

    def forward(self, features: Features) -> Output:
        """As every network's; h_m is that of all members side by side, h_a and h_l are None."""
        outputs = [member(features) for member in self._each]
        parts = [output.h_m for output in outputs if output.h_m is not None]
        joined = torch.cat(parts, dim=-1) if parts else None
        return Output(_mean_logits([output.logits for output in outputs]), h_m=joined)

    def step_streams(self, utterance: Features, state: State) -> tuple[Tensor, State]:
        """As every network's."""
        stepped = [
            member.step_streams(utterance, state.map(partial(torch.select, dim=1, index=n)))
            for n, member in enumerate(self._each)
        ]
        after = state.stack([state for _, state in stepped])
        logits = _mean_logits([logits for logits, _ in stepped])
        return logits, after.map(lambda part: part.transpose(0, 1))

    def blank(self, streams: int) -> State:
        """The state before the first utterance, [S, M, ..]."""
        states = [member.blank(streams) for member in self._each]
        return states[0].stack(states).map(lambda part: part.transpose(0, 1))


def _mean_logits(every: Sequence[Tensor]) -> Tensor:
    """M times logits [.., C] → the logarithm of the mean probability [.., C]."""
    log_probabilities = torch.stack([logits.log_softmax(-1) for logits in every])
    return torch.logsumexp(log_probabilities, dim=0) - torch.log(torch.tensor(float(len(every))))


def join(members: Sequence[Network]) -> Network:
    """An ensemble of the networks; a single network is returned as it is."""
    return members[0] if len(members) == 1 else Ensemble(members)
