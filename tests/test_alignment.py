"""MGCMA's losses against plain loops, and their values where nothing can be compared."""

import math
from dataclasses import replace

import pytest
import scipy
import torch
from networks_kit import output_of_pairs, randomised, tensor
from oracle import Sequence, Vector, cosine, layer_norm, linear, relu
from torch import Tensor, nn

from stream_hbaf.networks.alignment import (
    AlignmentCriterion,
    DistributionConstructor,
    info_nce,
    squared_wasserstein,
)
from stream_hbaf.networks.network import Output


def gaussians(count: int, width: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mean, log_sigma = torch.randn(2, count, width, generator=draw, dtype=torch.float64)
    return mean, log_sigma


def share(row: Vector, positives: list[int]) -> float:
    """-log of the positives' shares among all, their mean."""
    total = math.log(sum(math.exp(v) for v in row))
    return -sum(row[p] - total for p in positives) / len(positives)


def both_ways(similarity: Sequence, positives: list[list[int]]) -> float:
    columns = [list(column) for column in zip(*similarity, strict=True)]
    losses = [
        share(row, own)
        for table in (similarity, columns)
        for row, own in zip(table, positives, strict=True)
    ]
    return sum(losses) / len(losses)


def test_squared_wasserstein_is_that_of_full_covariances() -> None:
    """W₂² by scipy's matrix square roots, of random Gaussians, is ours times the width."""
    one, other = gaussians(3, seed=1), gaussians(4, seed=2)
    ours = squared_wasserstein(one, other)
    assert ours.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            mean, other_mean = one[0][i].numpy(), other[0][j].numpy()
            p, q = ((2 * part[1][k]).exp().diag().numpy() for part, k in ((one, i), (other, j)))
            root = scipy.linalg.sqrtm(p)
            between = scipy.linalg.sqrtm(root @ q @ root)
            expected = ((mean - other_mean) ** 2).sum() + (p + q - 2 * between).trace()
            assert ours[i, j].item() * 4 == pytest.approx(expected, abs=1e-9)


def test_squared_wasserstein_of_a_gaussian_and_itself_is_zero() -> None:
    """The distance of a Gaussian to itself is 0."""
    one = gaussians(5)
    torch.testing.assert_close(
        squared_wasserstein(one, one).diagonal(), torch.zeros(5).double(), atol=1e-12, rtol=0
    )


def test_distribution_constructor_clamps_log_sigma() -> None:
    """log σ stays between -6 and 3; μ has no bounds."""
    constructor = randomised(DistributionConstructor(4))
    with torch.no_grad():
        constructor.log_sigma.bias.copy_(torch.tensor([-100.0, 100.0, 0.0, 0.0]))
        constructor.mean.bias.fill_(50.0)
        mean, log_sigma = constructor(torch.randn(6, 4).double())
    assert log_sigma[:, 0].tolist() == [-6.0] * 6
    assert log_sigma[:, 1].tolist() == [3.0] * 6
    assert bool((log_sigma[:, 2:].abs() < 6.0).all())
    assert bool((mean > 30.0).all())


def test_distribution_constructor_is_the_plain_loops() -> None:
    """Linear, norm, ReLU; then a linear map each for μ and for log σ."""
    constructor = randomised(DistributionConstructor(4))
    pooled = torch.randn(5, 4).double()
    ours = constructor(pooled)
    for i, row in enumerate(pooled.tolist()):
        common = relu(layer_norm(constructor.common[1], linear(constructor.common[0], row)))
        assert ours[0][i].tolist() == pytest.approx(linear(constructor.mean, common), abs=1e-9)
        bounded = [min(max(v, -6.0), 3.0) for v in linear(constructor.log_sigma, common)]
        assert ours[1][i].tolist() == pytest.approx(bounded, abs=1e-9)


def test_info_nce_is_the_plain_loops() -> None:
    """Each row against all columns and each column against all rows, the pair once."""
    similarity = torch.randn(5, 5).double()
    expected = both_ways(similarity.tolist(), [[i] for i in range(5)])
    assert info_nce(similarity, torch.eye(5).bool()).item() == pytest.approx(expected, abs=1e-9)


def test_info_nce_of_equal_similarities_is_the_logarithm_of_their_number() -> None:
    """8 pairs of equal similarity cost log 8, pairs of a much larger similarity nothing."""
    pairs = torch.eye(8)
    assert info_nce(torch.zeros(8, 8), pairs.bool()).item() == pytest.approx(math.log(8))
    assert info_nce(100.0 * pairs, pairs.bool()).item() == pytest.approx(0.0, abs=1e-6)


def distribution_oracle(criterion: AlignmentCriterion, speech: Tensor, text: Tensor) -> float:
    module = criterion.distribution
    ones = [part.tolist() for part in module.construct(speech)]
    others = [part.tolist() for part in module.construct(text)]
    similarity = []
    for mean, log_sigma in zip(*ones, strict=True):
        row = []
        for other_mean, other_sigma in zip(*others, strict=True):
            distance = sum((p - q) ** 2 for p, q in zip(mean, other_mean, strict=True))
            distance += sum(
                (math.exp(p) - math.exp(q)) ** 2
                for p, q in zip(log_sigma, other_sigma, strict=True)
            )
            row.append(-math.exp(module.log_scale.item()) * distance / len(mean))
        similarity.append(row)
    return both_ways(similarity, [[i] for i in range(len(similarity))])


def instance_oracle(
    criterion: AlignmentCriterion, speech: Tensor, text: Tensor, positives: list[list[int]]
) -> float:
    def projected(layers: nn.Sequential, rows: Tensor) -> Sequence:
        return [linear(layers[2], relu(linear(layers[0], row))) for row in rows.tolist()]

    ones = projected(criterion.instance.project, speech)
    others = projected(criterion.instance.project, text)

    temperature = criterion.instance.temperature
    return both_ways([[cosine(x, y) / temperature for y in others] for x in ones], positives)


@pytest.mark.parametrize("supervised", [False, True])
def test_criterion_is_the_plain_loops(supervised: bool) -> None:
    """The weighted losses of the masked pairs; supervised, instances of one label are positives.

    The only positive of an utterance without a label is itself, in either case.
    """
    criterion = randomised(
        AlignmentCriterion(
            4, distribution=0.3, instance=0.7, supervised=supervised, temperature=0.4
        )
    )
    output, mask, labels = output_of_pairs()
    speech, text = tensor(output.h_a)[mask], tensor(output.h_l)[mask]
    alike = [[0, 2], [1], [0, 2], [3], [4]] if supervised else [[i] for i in range(5)]
    expected = 0.3 * distribution_oracle(criterion, speech, text)
    expected += 0.7 * instance_oracle(criterion, speech, text, alike)
    assert criterion(output, mask, labels).item() == pytest.approx(expected, abs=1e-9)


def test_criterion_begins_with_the_temperature_as_scale() -> None:
    """a is 1/τ before training."""
    module = AlignmentCriterion(4, temperature=0.2).distribution
    assert module.log_scale.exp().item() == pytest.approx(5.0)


@pytest.mark.parametrize("chosen", [0, 1])
def test_criterion_of_fewer_than_two_pairs_is_zero_with_a_gradient(chosen: int) -> None:
    """Without a second pair the loss is 0, and so is its gradient."""
    output, mask, labels = output_of_pairs()
    mask[0, 1 + chosen :] = False
    loss = AlignmentCriterion(4).double()(output, mask, labels)
    loss.backward()
    assert loss.item() == 0.0
    gradient = tensor(tensor(output.h_a).grad)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_criterion_of_one_modality_is_refused() -> None:
    """An output without h_l has nothing to align, and the error says so."""
    output, mask, labels = output_of_pairs()
    with pytest.raises(ValueError, match="one modality"):
        AlignmentCriterion(4)(replace(output, h_l=None), mask, labels)


def test_gradient_of_the_criterion_is_right() -> None:
    """autograd's gradient agrees with finite differences."""
    criterion = randomised(AlignmentCriterion(4, temperature=0.5))
    output, mask, labels = output_of_pairs()

    def loss(h_a: Tensor, h_l: Tensor) -> Tensor:
        found: Tensor = criterion(Output(output.logits, h_a, h_l), mask, labels)
        return found

    assert torch.autograd.gradcheck(loss, (tensor(output.h_a), tensor(output.h_l)))


def test_criterion_trained_alone_draws_pairs_together() -> None:
    """Pairs with common content: after some steps both losses have fallen by half."""
    torch.manual_seed(0)
    common = torch.randn(1, 20, 8)
    output = Output(common, common @ torch.randn(8, 8), common @ torch.randn(8, 8))
    for criterion in (
        AlignmentCriterion(8, instance=None),
        AlignmentCriterion(8, distribution=None),
    ):
        optimizer = torch.optim.Adam(criterion.parameters(), lr=3e-2)
        losses = []
        for _ in range(50):
            losses.append(criterion(output, torch.ones(1, 20).bool(), torch.zeros(1, 20).long()))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1].item() < losses[0].item() / 2
