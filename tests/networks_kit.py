"""Networks, tiny configurations and random features for the tests of networks."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict, TypeVar

import torch
from torch import Tensor, nn

from stream_hbaf.networks.baselines.agf_ib import AgfIbConfig
from stream_hbaf.networks.baselines.cmn import CmnConfig
from stream_hbaf.networks.baselines.fusion import M2FNetConfig, TelmeConfig
from stream_hbaf.networks.baselines.graph import HgraphClConfig, MmgcnConfig
from stream_hbaf.networks.baselines.m2r2 import M2R2Config
from stream_hbaf.networks.baselines.mamba import MambaConfig
from stream_hbaf.networks.baselines.recurrent import BcLstmConfig, DialogueRnnConfig
from stream_hbaf.networks.network import Features, Network, NetworkConfig, Output
from stream_hbaf.networks.registry import build

ModuleT = TypeVar("ModuleT", bound=nn.Module)
CHANGED = ("audio", "text", "commonsense", "audio_mask", "speaker")


class Sizes(TypedDict):
    audio_width: int
    text_width: int
    hidden: int
    classes: int
    dropout: float


SIZES = Sizes(audio_width=6, text_width=5, hidden=8, classes=3, dropout=0.0)
SC_LSTM = BcLstmConfig(**SIZES, mode="live")
BC_LSTM = replace(SC_LSTM, mode="offline")
CMN = CmnConfig(**SIZES, memory=4)
DIALOGUE_RNN = DialogueRnnConfig(**SIZES, mode="live", memory=3)
BI_DIALOGUE_RNN = replace(DIALOGUE_RNN, mode="offline")
MMGCN = MmgcnConfig(**SIZES)
HGRAPH_CL = HgraphClConfig(**SIZES, heads=2, reach=2)
AGF_IB = AgfIbConfig(**SIZES)
M2FNET = M2FNetConfig(**SIZES, heads=2)
TELME = TelmeConfig(**SIZES)
M2R2 = M2R2Config(**SIZES)
MAMBA = MambaConfig(**SIZES, states=3, nodes=6, layers=2)
LIVE_MAMBA = replace(MAMBA, mode="live")

LIVE: dict[str, NetworkConfig] = {
    "sc-lstm": SC_LSTM,
    "cmn": CMN,
    "dialogue-rnn": DIALOGUE_RNN,
    "telme": TELME,
    "m2r2": M2R2,
    "mamba-live": LIVE_MAMBA,
}
OFFLINE: dict[str, NetworkConfig] = {
    "bc-lstm": BC_LSTM,
    "bi-dialogue-rnn": BI_DIALOGUE_RNN,
    "mmgcn": MMGCN,
    "hgraph-cl": HGRAPH_CL,
    "agf-ib": AGF_IB,
    "m2fnet": M2FNET,
    "mamba": MAMBA,
}


def with_absent_drawn(network: ModuleT) -> ModuleT:
    """Ready to predict, with random vectors for absent modalities, which are zero at first."""
    for name, weight in network.named_parameters():
        if "absent" in name:
            nn.init.normal_(weight)
    return network.eval()


def ready(config: NetworkConfig, seed: int = 0) -> Network:
    """A network that is ready to predict, every weight drawn."""
    torch.manual_seed(seed)
    return with_absent_drawn(build(config))


def randomised(module: ModuleT, *, seed: int = 3, std: float = 0.6) -> ModuleT:
    """Ready to predict, in float64; every weight drawn, also those that start at zero or one."""
    torch.manual_seed(seed)
    module.double().eval()
    for weight in module.parameters():
        nn.init.normal_(weight, std=std)
    return module


def dialogues(
    *lengths: int,
    config: NetworkConfig | None = None,
    seed: int = 0,
    present: float = 1.0,
    parties: int = 3,
) -> Features:
    """Random dialogues, padded to the longest with NaN; ``present`` is each modality's chance."""
    draw = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def noise(*width: int) -> Tensor:
        values = torch.randn(*shape, *width, generator=draw)
        values[~mask] = torch.nan
        return values

    sizes = config or TELME
    return Features(
        audio=noise(sizes.audio_width),
        text=noise(sizes.text_width),
        commonsense=noise(3, sizes.commonsense_width),
        audio_mask=torch.rand(shape, generator=draw) < present,
        text_mask=torch.rand(shape, generator=draw) < present,
        utterance_mask=mask,
        speaker=torch.randint(0, parties, shape, generator=draw),
    )


def tensor(part: Tensor | None) -> Tensor:
    """A tensor that the test knows to be given."""
    assert part is not None
    return part


def map_floats(features: Features, change: Callable[[Tensor], Tensor]) -> Features:
    """The features with audio, text and commonsense changed, for example to another type."""
    return features.map(lambda part: change(part) if part.is_floating_point() else part)


def both_present(features: Features) -> Tensor:
    """The utterances [B, U] that have audio and text."""
    masks = (features.utterance_mask, features.audio_mask, features.text_mask)
    audio, text, utterance = (tensor(mask) for mask in masks)
    return audio & text & utterance


def absent_as_nan(features: Features) -> Features:
    """The same features with NaN wherever a modality is absent."""
    text_mask = tensor(features.text_mask)
    commonsense = features.commonsense
    if commonsense is not None:
        commonsense = commonsense.masked_fill(~text_mask[..., None, None], torch.nan)
    return replace(
        features,
        audio=tensor(features.audio).masked_fill(
            ~tensor(features.audio_mask)[..., None], torch.nan
        ),
        text=tensor(features.text).masked_fill(~text_mask[..., None], torch.nan),
        commonsense=commonsense,
    )


def dialogue(features: Features, b: int, length: int) -> Features:
    """One dialogue of a batch by itself, without padding: [1, length, ..]."""
    return features.map(lambda part: part[b : b + 1, :length])


def utterance(features: Features, b: int, t: int) -> Features:
    """One utterance as the recogniser passes it to ``step``: absent modalities are None."""
    audio = bool(tensor(features.audio_mask)[b, t])
    text = bool(tensor(features.text_mask)[b, t])
    return Features(
        audio=tensor(features.audio)[b, t] if audio else None,
        text=tensor(features.text)[b, t] if text else None,
        commonsense=tensor(features.commonsense)[b, t] if text else None,
        speaker=tensor(features.speaker)[b, t],
    )


def utterances_at(features: Features, t: int) -> Features:
    """Turn t of each dialogue, as one utterance of each of S streams."""
    return replace(features, utterance_mask=None).map(lambda part: part[:, t])


def stepped(network: Network, features: Features, b: int) -> Tensor:
    """Logits [U, C] of dialogue b, one utterance at a time."""
    state, logits = network.initial_state(), []
    for t in range(int(tensor(features.utterance_mask)[b].sum())):
        one, state = network.step(utterance(features, b, t), state)
        logits.append(one)
    return torch.stack(logits)


def changed(features: Features, t: int, parts: tuple[str, ...] = CHANGED) -> Features:
    """The same dialogues with utterance t of each replaced by another, of another speaker."""

    def put(values: Tensor) -> Tensor:
        values = values.clone()
        values[:, t] = ~values[:, t] if values.dtype == torch.bool else 3 - values[:, t]
        return values

    return replace(features, **{part: put(getattr(features, part)) for part in parts})


def output_of_pairs(count: int = 6, hidden: int = 4) -> tuple[Output, Tensor, Tensor]:
    """An output of one dialogue, the mask of its utterances (not the first), and labels."""
    torch.manual_seed(7)
    h_a, h_l = torch.randn(2, 1, count, hidden, dtype=torch.float64)
    mask = torch.ones(1, count, dtype=torch.bool)
    mask[0, 0] = False
    labels = torch.tensor([[0, 1, 2, 1, -1, -1, 2, 0][:count]])
    return (
        Output(h_a.new_zeros(1, count, 3), h_a.requires_grad_(), h_l.requires_grad_()),
        mask,
        labels,
    )
