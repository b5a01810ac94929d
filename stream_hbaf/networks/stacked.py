"""Computes the members of an ensemble side by side: each layer of all of them in one call.

A step of a small network on a CPU costs mostly calls, so that five members one after the other take
five times as long as one. ``stack`` makes of M networks one of the same class, whose layers hold
the weights of all. It is given the rows of member 0, then as many of member 1, and so on: rows
[M · n, ..], for any n. Between its layers a network must keep this order, and must not mix rows.

For steps only: layers that run over time take one utterance. M members, D and E widths of rows.
"""

from collections.abc import Mapping, Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.network import Standardise


def stack(members: Sequence[nn.Module]) -> nn.Module:
    """One module of the members' class for the rows of all; ValueError if they are too different.

    The members' weights become parts of its own, so that they take no more memory, and later
    changes in place concern both.
    """
    first = members[0]
    for layer, stacked in LAYERS.items():
        if isinstance(first, layer):
            built: nn.Module = stacked(members)
            return built
    if any(len(member._modules) != len(first._modules) for member in members):
        raise ValueError("members of an ensemble have the same layers; these differ")
    whole = copy(first)
    whole.__dict__ |= {
        "_parameters": {},
        "_buffers": {},
        "_modules": {},
        "side_by_side": len(members),
    }
    for name, _ in first.named_parameters(recurse=False):
        whole.register_parameter(name, nn.Parameter(_together(members, name), requires_grad=False))
    for name, child in first.named_children():
        children = [getattr(member, name) for member in members]
        whole.add_module(name, stack(children) if child.state_dict() else child)
    return whole


def for_rows(parameter: Tensor, rows: int) -> Tensor:
    """A parameter [D] as it is; of M members [M, D] as [rows, D]."""
    if parameter.dim() == 1:
        return parameter
    return parameter.repeat_interleave(rows // len(parameter), dim=0)


def _together(members: Sequence[nn.Module], name: str) -> Tensor:
    """A tensor of all members [M, ..], of which theirs become parts; empty where there is none."""
    each: list[Tensor] = [getattr(member, name) for member in members]
    if each[0] is None:
        return torch.zeros(0)
    whole = torch.stack([one.detach() for one in each])
    for one, part in zip(each, whole, strict=True):
        one.data = part
    return whole


class _Layer(nn.Module):
    """A layer of M members."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = len(members)

    def _by_member(self, rows: Tensor) -> Tensor:
        """[M · n, .., D] → [M, rows of each, D]."""
        return rows.reshape(self.members, -1, rows.shape[-1])

    def _keep(self, members: Sequence[nn.Module], name: str) -> Tensor:
        self.register_buffer(name, whole := _together(members, name))
        return whole


class Linears(_Layer):
    """``nn.Linear`` of each member."""

    weight: Tensor  # [M, E, D]
    bias: Tensor  # [M, E]; empty without

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self.in_features = self._keep(members, "weight").shape[2]
        self._keep(members, "bias")

    def forward(self, rows: Tensor) -> Tensor:
        """[M · n, .., D] → [M · n, .., E]."""
        return linear(self._by_member(rows), self.weight, self.bias).view(*rows.shape[:-1], -1)

    def unproject(self, rows: Tensor) -> Tensor:
        """[M · n, .., E] times the weight → [M · n, .., D]."""
        return torch.bmm(self._by_member(rows), self.weight).view(*rows.shape[:-1], -1)


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[M, n, D], [M, E, D] and [M, E] or empty → [M, n, E]."""
    weight = weight.transpose(1, 2)
    return torch.baddbmm(bias[:, None], rows, weight) if len(bias) else torch.bmm(rows, weight)


class SelfAttentions(Linears):
    """The weights of ``nn.MultiheadAttention`` of each member."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        _Layer.__init__(self, members)
        first = members[0]
        assert isinstance(first, nn.MultiheadAttention)
        self.num_heads, self.head_dim = first.num_heads, first.head_dim
        self.weight = self._keep(members, "in_proj_weight")
        self.bias = self._keep(members, "in_proj_bias")
        self.out_proj = Linears([member.get_submodule("out_proj") for member in members])

    project_in = Linears.forward


class LayerNorms(_Layer):
    """``nn.LayerNorm`` over the last dimension, of each member."""

    weight: Tensor  # [M, D]
    bias: Tensor  # [M, D]

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        assert isinstance(members[0], nn.LayerNorm)
        self.eps = members[0].eps
        self._keep(members, "weight")
        self._keep(members, "bias")

    def forward(self, rows: Tensor) -> Tensor:
        """[M · n, .., D] → the same shape."""
        normed = self._by_member(F.layer_norm(rows, rows.shape[-1:], eps=self.eps))
        return torch.addcmul(self.bias[:, None], normed, self.weight[:, None]).view(rows.shape)


class Standardises(_Layer):
    """``Standardise`` of each member."""

    mean: Tensor  # [M, D]
    deviation: Tensor  # [M, D]

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self._keep(members, "mean")
        self._keep(members, "deviation")

    def forward(self, rows: Tensor) -> Tensor:
        """[M · n, .., D] → the same shape."""
        relative = (self._by_member(rows) - self.mean[:, None]) / self.deviation[:, None]
        return relative.view(rows.shape)


class Convolutions(_Layer):
    """``nn.Conv1d`` of each member, by matrix products of the frames that a kernel covers."""

    weight: Tensor  # [M, E, D, K]
    bias: Tensor  # [M, E]

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        first = members[0]
        assert isinstance(first, nn.Conv1d)
        if (first.stride, first.dilation, first.groups) != ((1,), (1,), 1):
            raise ValueError("convolutions with stride, dilation or groups can't be stacked")
        self.padding, self.kernel = int(first.padding[0]), first.kernel_size[0]
        self._keep(members, "weight")
        self._keep(members, "bias")

    def forward(self, rows: Tensor) -> Tensor:
        """[M · n, D, T] → [M · n, E, T']."""
        frames = F.pad(rows, (self.padding, self.padding)).unfold(2, self.kernel, 1)
        covered = frames.transpose(1, 2).flatten(2)  # [M · n, T', D · K]
        found = linear(self._by_member(covered), self.weight.flatten(2), self.bias)
        return found.view(*covered.shape[:2], -1).transpose(1, 2)


class Grus(_Layer):
    """``nn.GRU`` of each member, one layer, batch first, for a single utterance."""

    weight_ih_l0: Tensor  # [M, 3H, D]
    weight_hh_l0: Tensor  # [M, 3H, H]
    bias_ih_l0: Tensor  # [M, 3H]
    bias_hh_l0: Tensor  # [M, 3H]

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        for name, _ in members[0].named_parameters():
            self._keep(members, name)

    def forward(self, rows: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """[M · n, 1, D] and the states before [1, M · n, H] → the states [M · n, 1, H], twice."""
        hidden = self._by_member(before)
        given = linear(self._by_member(rows), self.weight_ih_l0, self.bias_ih_l0)
        recurrent = linear(hidden, self.weight_hh_l0, self.bias_hh_l0)
        after = gru_cell(given, recurrent, hidden).view(len(rows), 1, -1)
        return after, after.transpose(0, 1)


def gru_cell(given: Tensor, recurrent: Tensor, hidden: Tensor) -> Tensor:
    """A GRU's next state [.., H], from its gates [.., 3H] of the input and of the state [.., H]."""
    size = 2 * hidden.shape[-1]
    opened = torch.sigmoid(given[..., :size] + recurrent[..., :size])
    reset, update = opened.chunk(2, dim=-1)
    new = torch.tanh(torch.addcmul(given[..., size:], reset, recurrent[..., size:]))
    return new + update * (hidden - new)


class Lstms(_Layer):
    """``nn.LSTM`` of each member, bidirectional and batch first; both directions step together."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        first = members[0]
        assert isinstance(first, nn.LSTM)
        if not (first.bidirectional and first.batch_first):
            raise ValueError("only bidirectional LSTMs that are batch first can be stacked")
        self.layers = first.num_layers
        for name, _ in first.named_parameters():
            self._keep(members, name)

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        """[M · n, T, D] → the states of both directions, [M · n, T, 2H]."""
        for layer in range(self.layers):
            ways = [self._weights(f"l{layer}{way}") for way in ("", "_reverse")]
            given = [
                linear(self._by_member(rows), weight, bias).view(
                    self.members, -1, rows.shape[1], weight.shape[1]
                )
                for weight, _, bias in ways
            ]
            both = torch.cat([given[0], given[1].flip(2)])  # [2M, n, T, 4H]
            states = _run_lstm(both, torch.cat([recurrent for _, recurrent, _ in ways]))
            onward, backward = states.chunk(2)
            rows = torch.cat([onward, backward.flip(2)], dim=-1).flatten(0, 1)
        return rows, None

    def _weights(self, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """[M, 4H, D], [M, 4H, H] and the bias of both, [M, 4H]."""
        names = (f"{name}_{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        of_input, recurrent, bias, other = (self.get_buffer(name) for name in names)
        return of_input, recurrent, bias + other


def _run_lstm(given: Tensor, recurrent: Tensor) -> Tensor:
    """Gates of the input [L, n, T, 4H] of L LSTMs, weights [L, 4H, H] → states [L, n, T, H]."""
    weight, states = recurrent.transpose(1, 2), []
    hidden = cell = given.new_zeros(*given.shape[:2], recurrent.shape[2])
    for step in given.unbind(2):
        gates = torch.baddbmm(step, hidden, weight)
        into, forget, _, out = torch.sigmoid(gates).chunk(4, dim=-1)
        cell = torch.addcmul(forget * cell, into, torch.tanh(gates.chunk(4, dim=-1)[2]))
        hidden = out * torch.tanh(cell)
        states.append(hidden)
    return torch.stack(states, dim=2)


# What a layer becomes; the first that fits.
LAYERS: Mapping[type[nn.Module], type[_Layer]] = {
    nn.MultiheadAttention: SelfAttentions,
    nn.Linear: Linears,
    nn.LayerNorm: LayerNorms,
    nn.Conv1d: Convolutions,
    nn.GRU: Grus,
    nn.LSTM: Lstms,
    Standardise: Standardises,
}
