"""Equations 18-23, written a second time in float64 plain loops; gradients of the losses."""

import math
from collections.abc import Callable

import pytest
import torch
from networks_kit import tensor
from oracle import Sequence, cosine
from torch import Tensor

from stream_hbaf.networks.hbaf import (
    HBAF,
    HbafConfig,
    InterModalLoss,
    absolute_inter_modal_loss,
    inter_modal_loss,
    relative_inter_modal_loss,
    total_loss,
)
from stream_hbaf.networks.network import Features, Output


def representations(n: int = 5, *, count: int = 3) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def one_direction(anchors: Sequence, others: Sequence, tau: float) -> float:
    """Equations 18-20 for anchors i: the positive once, every other utterance k a negative."""
    total = 0.0
    for i, anchor in enumerate(anchors):
        positive = math.exp(cosine(anchor, others[i]) / tau)
        negatives = sum(
            math.exp(cosine(anchor, other) / tau) for k, other in enumerate(others) if k != i
        )
        total -= math.log(positive / (positive + negatives))
    return total / len(anchors)


def oracle(x: Tensor, y: Tensor, tau: float) -> float:
    """Symmetric."""
    p, q = x.tolist(), y.tolist()
    return (one_direction(p, q, tau) + one_direction(q, p, tau)) / 2


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_absolute_inter_modal_loss_is_equations_18_and_19(tau: float) -> None:
    """A modality against the fused representation."""
    h_a, h_m = representations(count=2)
    loss = absolute_inter_modal_loss(h_a, h_m, temperature=tau)
    assert loss.item() == pytest.approx(oracle(h_a, h_m, tau), abs=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_relative_inter_modal_loss_is_equation_20(tau: float) -> None:
    """Audio against text."""
    h_a, h_l = representations(count=2)
    loss = relative_inter_modal_loss(h_a, h_l, temperature=tau)
    assert loss.item() == pytest.approx(oracle(h_a, h_l, tau), abs=1e-6)


def test_inter_modal_loss_is_equation_21() -> None:
    """λ1, λ2 and λ3 weigh audio-fused, text-fused and audio-text, in this order."""
    h_a, h_l, h_m = representations()
    loss = inter_modal_loss(h_a, h_l, h_m, weights=(0.5, 0.3, 0.2), temperature=0.4)
    expected = (
        0.5 * oracle(h_a, h_m, 0.4) + 0.3 * oracle(h_l, h_m, 0.4) + 0.2 * oracle(h_a, h_l, 0.4)
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_total_loss_is_equations_22_and_23() -> None:
    """Cross entropy, the mean over utterances, plus μ times the inter-modal loss."""
    (logits,) = representations(count=1)
    labels = [2, 0, 3, 3, 1]
    cross_entropy = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        p = math.exp(row[label]) / sum(math.exp(v) for v in row)
        cross_entropy -= math.log(p) / len(labels)
    loss = total_loss(logits, torch.tensor(labels), torch.tensor(1.7), mu=0.2)
    assert loss.item() == pytest.approx(cross_entropy + 0.2 * 1.7, abs=1e-6)


def test_total_loss_weighs_classes() -> None:
    """With class weights it is the weighted mean; a class of weight 0 has no influence."""
    (logits,) = representations(count=1)
    labels = torch.tensor([2, 0, 3, 3, 1])
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    total, mass = 0.0, 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(math.exp(v) for v in row)
        total -= weights[label].item() * math.log(p)
        mass += weights[label].item()
    assert total_loss(logits, labels, class_weights=weights).item() == pytest.approx(total / mass)


@pytest.mark.parametrize("loss", [absolute_inter_modal_loss, relative_inter_modal_loss])
def test_gradient_of_a_contrastive_loss_is_right(loss: Callable[..., Tensor]) -> None:
    """autograd's gradient agrees with finite differences."""
    assert torch.autograd.gradcheck(
        lambda x, y: loss(x, y, temperature=0.5), representations(count=2)
    )


def test_gradient_of_the_whole_loss_is_right() -> None:
    """Equations 21-23 together agree with finite differences."""
    labels = torch.tensor([2, 0, 3, 3, 1])

    def loss(logits: Tensor, h_a: Tensor, h_l: Tensor, h_m: Tensor) -> Tensor:
        return total_loss(logits, labels, inter_modal_loss(h_a, h_l, h_m, temperature=0.5))

    assert torch.autograd.gradcheck(loss, representations(count=4))


@pytest.mark.parametrize(
    ("weights", "parts"),
    [((0, 0, 1), ["al"]), ((0.5, 0.5, 0), ["am", "lm"]), ((0.5, 0, 0), ["am"]), ((0, 0, 0), [])],
    ids=["relative", "absolute", "audio", "none"],
)
def test_inter_modal_loss_of_an_ablation_is_its_parts_alone(
    weights: tuple[float, ...], parts: list[str]
) -> None:
    """A weight of zero leaves its equation out, value and gradient."""
    h = dict(zip("alm", representations(), strict=True))
    loss = inter_modal_loss(h["a"], h["l"], h["m"], weights=weights, temperature=0.5)
    loss.backward()
    expected = sum(oracle(h[pair[0]], h[pair[1]], 0.5) for pair in parts) * max(weights)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    for name, part in h.items():
        assert bool(tensor(part.grad).any()) == (name in "".join(parts))


def test_gradient_of_the_projected_loss_is_right() -> None:
    """Equation 21 with h_m mapped from 2H to H agrees with finite differences."""
    h_a, h_l = representations(count=2)
    h_m = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    criterion = InterModalLoss(4, temperature=0.5).double()
    mask = torch.tensor([[True, True, False, True, True]])

    def loss(h_a: Tensor, h_l: Tensor, h_m: Tensor) -> Tensor:
        found: Tensor = criterion(Output(h_m[None], h_a[None], h_l[None], h_m[None]), mask)
        return found

    assert torch.autograd.gradcheck(loss, (h_a, h_l, h_m))


def test_loss_of_a_sharp_temperature_does_not_overflow() -> None:
    """At τ = 0.001 exp overflows float32; the loss of opposite pairs does not."""
    h = torch.eye(2)
    loss = relative_inter_modal_loss(h, h.flip(0), temperature=1e-3)
    assert loss.item() == pytest.approx(1000.0, rel=1e-5)


def test_loss_of_pairs_that_agree_is_less() -> None:
    """Pairs of one direction have a loss of almost 0, shuffled ones a large one."""
    h = torch.eye(4)
    assert relative_inter_modal_loss(h, 3 * h).item() < 1e-3
    assert relative_inter_modal_loss(h, h.roll(1, 0)).item() > 9


@pytest.mark.parametrize("n", [0, 1])
def test_loss_without_negatives_is_zero(n: int) -> None:
    """With one utterance or none the loss is 0, and so is its gradient."""
    h_a, h_l, h_m = representations(n)
    loss = inter_modal_loss(h_a, h_l, h_m)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(tensor(h_a.grad), torch.zeros_like(h_a))


TINY = HbafConfig(audio_width=3, text_width=5, commonsense_width=2, hidden=4, heads=2, dropout=0)


def test_inter_modal_loss_of_an_output_counts_masked_utterances_only() -> None:
    """It is equation 21 of the chosen utterances, h_m projected to H."""
    torch.manual_seed(1)
    output = HBAF(TINY)(Features(torch.randn(2, 3, 3), torch.randn(2, 3, 5)))
    criterion = InterModalLoss(4, weights=(0.2, 0.3, 0.5), temperature=0.3)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    h_a, h_l, h_m = (tensor(part)[mask] for part in (output.h_a, output.h_l, output.h_m))
    h_m = h_m @ criterion.project.weight.T + criterion.project.bias
    expected = inter_modal_loss(h_a, h_l, h_m, weights=(0.2, 0.3, 0.5), temperature=0.3)
    assert criterion(output, mask).item() == pytest.approx(expected.item(), abs=1e-6)


def test_inter_modal_loss_of_one_modality_is_refused() -> None:
    """A network of one modality has nothing to contrast: an error that says so."""
    output = HBAF(HbafConfig(audio_width=3, hidden=16, use_text=False))(
        Features(torch.randn(1, 2, 3))
    )
    with pytest.raises(ValueError, match="one modality"):
        InterModalLoss(16)(output, torch.ones(1, 2, dtype=torch.bool))
