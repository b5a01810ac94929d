"""Reference arithmetic in float64 plain loops, to check networks against their papers' equations.

A sequence is a list of vectors. Functions that take a module read its weights and nothing else.
"""

import math
from collections.abc import Sequence as Iterated
from typing import Any

import torch
from torch import Tensor, nn

Vector = list[float]
Sequence = list[Vector]


def plain(tensor: Tensor) -> Any:
    """A tensor as nested lists of float64."""
    return tensor.detach().double().tolist()


def assert_same(ours: Tensor, oracle: Any, *, atol: float = 1e-9) -> None:
    """The tensor is the plain loops' nested list, element by element."""
    expected = torch.tensor(oracle, dtype=torch.float64)
    torch.testing.assert_close(ours.detach(), expected, atol=atol, rtol=0)


def weights(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters as nested lists, by name."""
    return {name: plain(tensor) for name, tensor in module.named_parameters(recurse=False)}


# --- vectors --------------------------------------------------------------------------------------


def dot(x: Vector, y: Vector) -> float:
    return sum(p * q for p, q in zip(x, y, strict=True))


def add(*vectors: Vector) -> Vector:
    return [sum(column) for column in zip(*vectors, strict=True)]


def times(x: Vector, y: Vector) -> Vector:
    return [p * q for p, q in zip(x, y, strict=True)]


def scaled(share: float, x: Vector) -> Vector:
    return [share * v for v in x]


def weighted(shares: Iterated[float], vectors: Sequence) -> Vector:
    """Σ share · vector."""
    return add(*[scaled(s, v) for s, v in zip(shares, vectors, strict=True)])


def mean(vectors: Sequence) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def norm(x: Vector) -> float:
    return math.sqrt(dot(x, x))


def cosine(x: Vector, y: Vector) -> float:
    return dot(x, y) / (norm(x) * norm(y))


def sigmoid(x: Vector) -> Vector:
    return [1 / (1 + math.exp(-v)) for v in x]


def tanh(x: Vector) -> Vector:
    return [math.tanh(v) for v in x]


def relu(x: Vector) -> Vector:
    return [max(v, 0.0) for v in x]


def softmax(x: Vector) -> Vector:
    total = sum(math.exp(v) for v in x)
    return [math.exp(v) / total for v in x]


# --- layers ---------------------------------------------------------------------------------------


def apply(weight: Sequence, x: Vector, bias: Vector | None = None) -> Vector:
    """W x, plus b if there is one."""
    product = [dot(row, x) for row in weight]
    return product if bias is None else add(product, bias)


def linear(layer: nn.Module, x: Vector) -> Vector:
    own = weights(layer)
    return apply(own["weight"], x, own.get("bias"))


def layer_norm(layer: nn.Module, x: Vector) -> Vector:
    centre = sum(x) / len(x)
    variance = sum((v - centre) ** 2 for v in x) / len(x)
    unit = [(v - centre) / math.sqrt(variance + 1e-5) for v in x]
    own = weights(layer)
    return add(times(unit, own["weight"]), own["bias"])


def attend(query: Vector, keys: Sequence, values: Sequence) -> Vector:
    """softmax(q Kᵀ/√d) V of one query."""
    shares = softmax([dot(query, key) / math.sqrt(len(query)) for key in keys])
    return weighted(shares, values)


def attend_by_head(query: Vector, keys: Sequence, values: Sequence, *, heads: int) -> Vector:
    """Each head's attention with its part of query, keys and values, side by side."""
    size, attended = len(query) // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        attended += attend(query[part], [key[part] for key in keys], [v[part] for v in values])
    return attended


def gru_step(gru: nn.Module, x: Vector, hidden: Vector, *, suffix: str = "") -> Vector:
    """One step of an ``nn.GRUCell``, or of an ``nn.GRU`` with the suffix "_l0"."""
    own, size = weights(gru), len(hidden)
    a = apply(own[f"weight_ih{suffix}"], x, own[f"bias_ih{suffix}"])
    b = apply(own[f"weight_hh{suffix}"], hidden, own[f"bias_hh{suffix}"])
    reset = sigmoid(add(a[:size], b[:size]))
    update = sigmoid(add(a[size : 2 * size], b[size : 2 * size]))
    new = tanh(add(a[2 * size :], times(reset, b[2 * size :])))
    return [(1 - z) * n + z * h for z, n, h in zip(update, new, hidden, strict=True)]


def lstm(layer: nn.LSTM, inputs: Sequence, *, suffix: str) -> Sequence:
    """The outputs of one layer and direction, for example "_l0" or "_l0_reverse"."""
    own, size = weights(layer), layer.hidden_size
    hidden, cell, outputs = [0.0] * size, [0.0] * size, []
    for x in inputs:
        gates = add(
            apply(own[f"weight_ih{suffix}"], x, own[f"bias_ih{suffix}"]),
            apply(own[f"weight_hh{suffix}"], hidden, own[f"bias_hh{suffix}"]),
        )
        i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
        cell = add(times(sigmoid(f), cell), times(sigmoid(i), tanh(g)))
        hidden = times(sigmoid(o), tanh(cell))
        outputs.append(hidden)
    return outputs


def bilstm(layer: nn.LSTM, inputs: Sequence, *, level: int = 0) -> Sequence:
    """One level's outputs in both directions, side by side."""
    forward = lstm(layer, inputs, suffix=f"_l{level}")
    backward = lstm(layer, inputs[::-1], suffix=f"_l{level}_reverse")[::-1]
    return [f + b for f, b in zip(forward, backward, strict=True)]


def residual(module: Any, before: Vector, refined: Vector) -> Vector:
    """HBAF's equations 14-17, ⊕ read as addition: LayerNorm, feed-forward, AddNorm."""
    normed = layer_norm(module.norm, add(before, refined))
    first, *_, second = module.feed_forward
    return layer_norm(module.add_norm, add(normed, linear(second, relu(linear(first, normed)))))
