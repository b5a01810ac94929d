"""Builds networks by the kind that configurations name, and ensembles of several as one.

Networks that differ in the seed only agree on easy utterances and differ on hard ones, so that
their mean probability is more accurate, and better calibrated, than each of them (deep ensembles,
Lakshminarayanan et al. 2017).
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.agf_ib import AgfIb, AgfIbConfig
from stream_hbaf.networks.baselines.cmn import Cmn, CmnConfig
from stream_hbaf.networks.baselines.fusion import M2FNet, M2FNetConfig, Telme, TelmeConfig
from stream_hbaf.networks.baselines.graph import HgraphCl, HgraphClConfig, Mmgcn, MmgcnConfig
from stream_hbaf.networks.baselines.m2r2 import M2R2, M2R2Config
from stream_hbaf.networks.baselines.mamba import BroadMamba, MambaConfig
from stream_hbaf.networks.baselines.recurrent import (
    BcLstm,
    BcLstmConfig,
    DialogueRnn,
    DialogueRnnConfig,
)
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.mgcma import MGCMA, MgcmaConfig
from stream_hbaf.networks.network import Features, Network, NetworkConfig, Output, State
from stream_hbaf.networks.stacked import stack

# By kind, the configuration and its network. "hbaf" is meant where no kind is named.
NETWORKS: Mapping[str, tuple[type[NetworkConfig], type[Network]]] = {
    "hbaf": (HbafConfig, HBAF),
    "mgcma": (MgcmaConfig, MGCMA),
    "bc-lstm": (BcLstmConfig, BcLstm),
    "cmn": (CmnConfig, Cmn),
    "dialogue-rnn": (DialogueRnnConfig, DialogueRnn),
    "hgraph-cl": (HgraphClConfig, HgraphCl),
    "mmgcn": (MmgcnConfig, Mmgcn),
    "m2fnet": (M2FNetConfig, M2FNet),
    "agf-ib": (AgfIbConfig, AgfIb),
    "telme": (TelmeConfig, Telme),
    "m2r2": (M2R2Config, M2R2),
    "mamba": (MambaConfig, BroadMamba),
}


def build(config: NetworkConfig) -> Network:
    """A new network, its weights drawn from torch's default generator."""
    network: Network = NETWORKS[config.kind][1](config)
    return network


def read_network(settings: Any) -> NetworkConfig:
    """Network settings by name → the configuration class of their ``kind``.

    Raises ConfigError for an unknown kind, and for the first unknown name or invalid value.
    """
    if isinstance(settings, NetworkConfig):
        return settings
    name = settings.get("kind", "hbaf")
    if name not in NETWORKS:
        raise ConfigError(f"there is no network '{name}'; choose {', '.join(NETWORKS)}")
    kind = NETWORKS[name][0]
    known = {field.name for field in fields(kind)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"there is no setting '{name}' of the network")
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"'{first['loc'][0]}': {first['msg']}") from None


class Ensemble(Network[State]):
    """M networks of one configuration with one network's interface.

    Logits are the logarithm of the mean probability. The state is the members' own, with M after
    the streams, [.., M, ..], so that it is stacked, moved and compared as any other.
    """

    state_dims = 1  # M

    def __init__(self, members: Sequence[Network]) -> None:
        super().__init__(members[0].config)
        self.members = nn.ModuleList(members)
        self._stacked: tuple[list[int], Network] | None = None  # as a tuple it is no part of this

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
        if self._each[0].stackable:
            return self._step_stacked(utterance, state)
        stepped = [
            member.step_streams(utterance, state.map(partial(torch.select, dim=1, index=n)))
            for n, member in enumerate(self._each)
        ]
        after = state.stack([state for _, state in stepped])
        logits = _mean_logits([logits for logits, _ in stepped])
        return logits, after.map(lambda part: part.transpose(0, 1))

    def _step_stacked(self, utterance: Features, state: State) -> tuple[Tensor, State]:
        """The same, all members side by side in the dimension of the streams: [M · S, ..]."""
        members = len(self.members)
        whole = self._side_by_side()
        every = utterance.map(lambda part: part.expand(members, *part.shape).flatten(0, 1))
        logits, after = whole.step_streams(every, state.map(_members_first))
        return _mean_logits(logits.chunk(members)), after.map(
            lambda part: part.unflatten(0, (members, -1)).transpose(0, 1)
        )

    def _side_by_side(self) -> Network:
        """The members stacked: once, and again after their weights have moved."""
        places = [next(member.parameters()).data_ptr() for member in self._each]
        if self._stacked is None or self._stacked[0] != places:
            with torch.inference_mode(mode=False):
                whole = stack(self._each)
            assert isinstance(whole, Network)
            places = [next(member.parameters()).data_ptr() for member in self._each]
            self._stacked = places, whole
        return self._stacked[1]

    def blank(self, streams: int) -> State:
        """The state before the first utterance, [S, M, ..]: alike for all members."""
        members = len(self.members)
        return self._each[0].blank(streams).map(lambda part: torch.stack([part] * members, dim=1))


def _members_first(part: Tensor) -> Tensor:
    """[S, M, ..] → [M · S, ..]."""
    return part.transpose(0, 1).flatten(0, 1)


def _mean_logits(every: Sequence[Tensor]) -> Tensor:
    """M times logits [.., C] → the logarithm of the mean probability [.., C]."""
    log_probabilities = torch.stack([logits.log_softmax(-1) for logits in every])
    return torch.logsumexp(log_probabilities, dim=0) - torch.log(torch.tensor(float(len(every))))


def join(members: Sequence[Network]) -> Network:
    """An ensemble of the networks; a single network is returned as it is."""
    return members[0] if len(members) == 1 else Ensemble(members)
