"""All networks by the kind that configurations name."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.agf_ib import AgfIb, AgfIbConfig
from stream_hbaf.networks.baselines.bc_lstm import BcLstm, BcLstmConfig
from stream_hbaf.networks.baselines.cmn import Cmn, CmnConfig
from stream_hbaf.networks.baselines.dialogue_rnn import DialogueRnn, DialogueRnnConfig
from stream_hbaf.networks.baselines.hgraph_cl import HgraphCl, HgraphClConfig
from stream_hbaf.networks.baselines.m2fnet import M2FNet, M2FNetConfig
from stream_hbaf.networks.baselines.m2r2 import M2R2, M2R2Config
from stream_hbaf.networks.baselines.mamba import BroadMamba, MambaConfig
from stream_hbaf.networks.baselines.mmgcn import Mmgcn, MmgcnConfig
from stream_hbaf.networks.baselines.telme import Telme, TelmeConfig
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.mgcma import MGCMA, MgcmaConfig
from stream_hbaf.networks.network import Network, NetworkConfig

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


def config_class(kind: str) -> type[NetworkConfig]:
    """The configuration class of a kind of network. Raises ConfigError for an unknown kind."""
    if kind not in NETWORKS:
        raise ConfigError(f"there is no network '{kind}'; choose {', '.join(NETWORKS)}")
    return NETWORKS[kind][0]


def build(config: NetworkConfig) -> Network:
    """A new network, its weights drawn from torch's default generator."""
    network: Network = NETWORKS[config.kind][1](config)
    return network


def read_network(settings: Any) -> NetworkConfig:
    """Network settings by name → the configuration class of their ``kind``.

    Raises ConfigError for the first unknown name or invalid value.
    """
    if isinstance(settings, NetworkConfig):
        return settings
    kind = config_class(settings.get("kind", "hbaf"))
    for name in settings:
        if name not in kind.__dataclass_fields__:
            raise ConfigError(f"there is no setting '{name}' of the network")
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"'{first['loc'][0]}': {first['msg']}") from None
