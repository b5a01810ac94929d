"""MGCMA's losses, which align the speech and the text representation of each utterance.

Only a summary of the paper is available, so that the form of each loss is our choice; its docstring
says which. N is the number of pairs: a batch's utterances that have both speech and text. H hidden.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.network import Criterion, Output

LOG_SIGMA_RANGE = (-6.0, 3.0)  # σ from e⁻⁶, nearly a point, to e³, nearly uniform


class DistributionConstructor(nn.Module):
    """Speech or text [N, H] → a diagonal Gaussian for each utterance: μ and log σ, [N, H] each.

    The paper's figure 2 leaves out activation and normalization layers. Our choice: one common
    layer with both, then one linear map for μ and one for log σ, which is clamped.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.common = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU())
        self.mean = nn.Linear(hidden, hidden)
        self.log_sigma = nn.Linear(hidden, hidden)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        common = self.common(pooled)
        return self.mean(common), self.log_sigma(common).clamp(*LOG_SIGMA_RANGE)


def squared_wasserstein(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Squared 2-Wasserstein distances of diagonal Gaussians (μ, log σ), [N, H] and [M, H] → [N, M].

    |μ - μ'|² + |σ - σ'|². Our choice: the mean over dimensions, so that a temperature has the same
    effect at any width.
    """
    # Both terms at once: the squared distance of the points [μ; σ].
    points, others = (torch.cat([mu, log_sigma.exp()], dim=-1) for mu, log_sigma in (one, other))
    lengths = points.square().sum(dim=-1)[:, None] + others.square().sum(dim=-1)
    return (lengths - 2 * points @ others.T) / one[0].shape[-1]


def info_nce(similarity: Tensor, positive_mask: Tensor) -> Tensor:
    """InfoNCE, mean over N and over both directions: [N, N] twice → [].

    Rows are speech, columns text. With several positives their mean counts (Khosla et al. 2020,
    outside the logarithm); each row and column must have one.
    """
    positives = positive_mask.to(similarity.dtype)

    def one_direction(dim: int) -> Tensor:
        shares = similarity.log_softmax(dim=dim) * positives
        return -(shares.sum(dim=dim) / positives.sum(dim=dim)).mean()

    return (one_direction(0) + one_direction(1)) / 2


class DistributionAlignment(nn.Module):
    """Speech and text [N, H] → InfoNCE of their Gaussians' similarity -a W₂².

    Our choice: one constructor for both modalities, so that the loss aligns them and not two maps
    of them. a > 0 is learned as its logarithm and begins at 1 / ``temperature``. The paper's offset
    b of the similarity cancels out of InfoNCE, so it is left out.
    """

    def __init__(self, hidden: int, *, temperature: float) -> None:
        super().__init__()
        self.construct = DistributionConstructor(hidden)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, speech: Tensor, text: Tensor, positive_mask: Tensor) -> Tensor:
        distance = squared_wasserstein(self.construct(speech), self.construct(text))
        return info_nce(-self.log_scale.exp() * distance, positive_mask)


class InstanceAlignment(nn.Module):
    """Speech and text [N, H] → InfoNCE of the cosines of their projections, over ``temperature``.

    Our choice: a projection of two layers (Chen et al. 2020), one for both modalities.
    """

    def __init__(self, hidden: int, *, temperature: float) -> None:
        super().__init__()
        layers = nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)
        self.project = nn.Sequential(*layers)
        self.temperature = temperature

    def forward(self, speech: Tensor, text: Tensor, positive_mask: Tensor) -> Tensor:
        speech, text = (F.normalize(self.project(part), dim=-1) for part in (speech, text))
        return info_nce(speech @ text.T / self.temperature, positive_mask)


class AlignmentCriterion(Criterion):
    """MGCMA's loss beside cross entropy: the weighted sum of both alignments.

    It compares h_a and h_l from before the token alignment: afterwards each contains information
    of the other, by which a pair could be recognised. Our choice: the distribution constructor
    belongs to the loss alone, so that the shipped network stays small and an ablation removes the
    alignment without an input of the classifier. A weight of None leaves its part out.
    """

    def __init__(
        self,
        hidden: int,
        *,
        distribution: float | None = 0.1,
        instance: float | None = 0.1,
        supervised: bool = False,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.weights = {"distribution": distribution, "instance": instance}
        if distribution is not None:
            self.distribution = DistributionAlignment(hidden, temperature=temperature)
        if instance is not None:
            self.instance = InstanceAlignment(hidden, temperature=temperature)
        self.supervised = supervised

    def forward(self, output: Output, mask: Tensor, labels: Tensor) -> Tensor:
        """As every criterion's. Raises ValueError for a network of one modality."""
        if output.h_a is None or output.h_l is None:
            raise ValueError("a network of one modality has nothing to align; leave this loss out")
        speech, text, labels = output.h_a[mask], output.h_l[mask], labels[mask]
        loss = (speech.sum() + text.sum()) * 0.0
        if len(speech) < 2:
            return loss
        alike = itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        if self.supervised:
            alike = itself | ((labels[:, None] == labels) & (labels >= 0))
        if self.weights["distribution"] is not None:
            loss = loss + self.weights["distribution"] * self.distribution(speech, text, itself)
        if self.weights["instance"] is not None:
            loss = loss + self.weights["instance"] * self.instance(speech, text, alike)
        return loss
