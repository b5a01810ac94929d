"""Turns the tensors of a bundle's weights file into network, scaling and familiarity, and back.

The sizes are those of the tensors that are there: a configuration that says otherwise is refused
before any memory is taken for it.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from stream_hbaf.features.representations import Scaling
from stream_hbaf.networks.arousal import ArousalHead
from stream_hbaf.networks.familiarity import Block, Familiarity
from stream_hbaf.networks.network import Network, NetworkConfig
from stream_hbaf.networks.registry import build, join

MOST_COLUMNS = 65_536  # of acoustic features; ComParE's functionals are 6,373
FAMILIARITY = "familiarity."
BLOCK_PARTS = ("mean", "projection", "neighbours")
AROUSAL = "arousal."
EXACT = ("acoustic.", FAMILIARITY, AROUSAL)  # kept in float32, for their range of values


def read_weights(
    settings: NetworkConfig, tensors: Mapping[str, Tensor], *, members: int
) -> Network:
    """The network, or the ensemble of ``members``, with its weights.

    Raises RuntimeError or ValueError if they don't fit its settings.
    """
    found = widen(tensors_under(tensors, "network."))
    one = {n.removeprefix("members.0."): t.shape for n, t in found.items() if "members.0." in n}
    with torch.device("meta"):  # without memory, however large the configuration says it is
        wanted = {name: t.shape for name, t in build(settings).state_dict().items()}
    if wanted != (one or {name: t.shape for name, t in found.items()}):
        raise RuntimeError("the network has other sizes")
    network = join([build(settings) for _ in range(members)])
    network.load_state_dict(found)
    return network


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming a tensor whose NaN or infinity would reach every prediction."""
    for name, tensor in tensors.items():
        if (
            name.startswith(
                ("network.", "encoder.", "commonsense.", f"{FAMILIARITY}blocks.", AROUSAL)
            )
            and not tensor.isfinite().all()
        ):
            raise ValueError(f"{name} holds a number that isn't finite")


def read_scaling(tensors: Mapping[str, Tensor], *, width: int) -> Scaling:
    """The scaling to ``width`` acoustic features.

    Raises LookupError or ValueError for sizes that don't fit each other or the width.
    """
    components = tensors.get("acoustic.components")
    scaling = Scaling(
        selected=tensors["acoustic.selected"].numpy().astype(np.int64),
        mean=tensors["acoustic.mean"].numpy(),
        deviation=tensors["acoustic.deviation"].numpy(),
        components=None if components is None else components.numpy(),
    )
    columns = scaling.selected.shape
    fit = len(columns) == 1 and scaling.mean.shape == scaling.deviation.shape == columns
    if scaling.components is not None:
        fit = fit and scaling.components.ndim == 2 and len(scaling.components) <= columns[0]
    if not fit or scaling.width != width:
        raise ValueError("the acoustic scaling has other sizes")
    if scaling.selected.min() < 0 or scaling.selected.max() >= MOST_COLUMNS:
        raise ValueError("the acoustic scaling selects a column that isn't there")
    return scaling


def read_familiarity(tensors: Mapping[str, Tensor], *, width: int) -> Familiarity | None:
    """The statistics of the training sound, ``width`` features wide; None if there are none.

    Raises LookupError or ValueError for sizes that don't fit each other or the width.
    """
    found = {name: t.numpy() for name, t in tensors_under(tensors, FAMILIARITY).items()}
    if not found:
        return None
    names = sorted({name[7:].rpartition(".")[0] for name in found if name.startswith("blocks.")})
    blocks = {
        name: Block(
            found[f"blocks.{name}.columns"].astype(np.int64),
            *(found[f"blocks.{name}.{part}"] for part in BLOCK_PARTS),
        )
        for name in names
    }
    familiarity = Familiarity(blocks, found["reference"], found["weights"])
    if not _fits(familiarity, width=width):
        raise ValueError("the familiarity's statistics have other sizes")
    return familiarity


def _fits(familiarity: Familiarity, *, width: int) -> bool:
    """Whether the sizes of statistics belong together, and to audio of that width."""
    count, weights = len(familiarity.reference), familiarity.weights
    if familiarity.reference.shape != (count, len(familiarity.blocks)) or count == 0:
        return False
    if weights.shape != (count,) or not (np.isfinite(weights) & (weights > 0)).all():
        return False
    for block in familiarity.blocks.values():
        columns = block.columns.shape
        known = len(columns) == 1 and ((block.columns >= 0) & (block.columns < width)).all()
        if not known or block.mean.shape != columns or block.projection.ndim != 2:
            return False
        space = block.projection.shape[1:]
        if block.projection.shape[:1] != columns or block.neighbours.shape[1:] != space:
            return False
        if len(block.neighbours) == 0:
            return False
    return True


def familiarity_tensors(familiarity: Familiarity) -> dict[str, Tensor]:
    """What ``read_familiarity`` reads under its prefix, blocks in the order of their names."""
    order = sorted(familiarity.blocks)
    columns = [list(familiarity.blocks).index(name) for name in order]
    arrays = {"reference": familiarity.reference[:, columns], "weights": familiarity.weights}
    for name in order:
        block, start = familiarity.blocks[name], f"blocks.{name}."
        arrays[start + "columns"] = block.columns.astype(np.int32)
        arrays |= {start + part: getattr(block, part) for part in BLOCK_PARTS}
    return {name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in arrays.items()}


def read_arousal(tensors: Mapping[str, Tensor], *, width: int) -> ArousalHead | None:
    """The head for the arousal of voices, ``width`` features wide; None if there is none.

    Raises LookupError or ValueError for sizes that don't fit each other or the width.
    """
    found = tensors_under(tensors, AROUSAL)
    if not found:
        return None
    weights, bias = found["weights"], found["bias"]
    if weights.shape != (width,) or bias.shape != (1,):
        raise ValueError("the head for arousal has other sizes")
    return ArousalHead(weights.numpy(), float(bias))


def arousal_tensors(head: ArousalHead) -> dict[str, Tensor]:
    """What ``read_arousal`` reads under its prefix."""
    weights = torch.from_numpy(np.ascontiguousarray(head.weights))
    return {"weights": weights, "bias": torch.tensor([head.bias], dtype=torch.float32)}


def narrow(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float16, which halves the file; scaling and familiarity in float32."""
    narrow = {
        name: t.half() if t.is_floating_point() and not name.startswith(EXACT) else t
        for name, t in tensors.items()
    }
    return {name: tensor.cpu().contiguous() for name, tensor in narrow.items()}


def widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float32, in which they are used."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def tensors_under(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Those whose names begin with ``start``, without it."""
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def scaling_tensors(scaling: Scaling) -> dict[str, Tensor]:
    """What ``read_scaling`` reads, by name."""
    arrays = {
        "selected": scaling.selected.astype(np.int32),
        "mean": scaling.mean,
        "deviation": scaling.deviation,
        "components": scaling.components,
    }
    found = {name: torch.from_numpy(one) for name, one in arrays.items() if one is not None}
    return {f"acoustic.{name}": tensor for name, tensor in found.items()}
