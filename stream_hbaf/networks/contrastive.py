"""Inter-modal contrastive learning (section 3.3) and the whole loss (3.5): how HBAF is trained.

N is the number of utterances compared with one another: all valid ones of a batch.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.network import Criterion, Output


def contrast(anchor: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """-log of the positive pair's share, mean over N and over both directions: [N, H] twice → [].

    Departure from equations 18-20 (decision 13): the paper draws K negatives and prints 2K pairs
    in one place, K - 1 in another. Here every other utterance of the batch is a negative, in both
    directions, and the positive is counted once; the printed readings are this up to a constant.
    Zero for N = 0, so that a batch without pairs trains on.
    """
    if len(anchor) == 0:
        return (anchor.sum() + other.sum()) * 0.0
    similarity = (F.normalize(anchor, dim=-1) / temperature) @ F.normalize(other, dim=-1).T
    among_others, among_anchors = similarity.logsumexp(dim=1), similarity.logsumexp(dim=0)
    return ((among_others + among_anchors) / 2 - similarity.diagonal()).mean()


def absolute_inter_modal_loss(
    unimodal: Tensor, bimodal: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """Equation 18 (unimodal is h_a) or 19 (h_l): [N, H] and [N, H] → [].

    Departure (decision 12): ``bimodal`` is h_m projected to H, since a cosine needs one width.
    """
    return contrast(unimodal, bimodal, temperature=temperature)


def relative_inter_modal_loss(h_a: Tensor, h_l: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Equation 20: h_a [N, H], h_l [N, H] → []."""
    return contrast(h_a, h_l, temperature=temperature)


def inter_modal_loss(
    h_a: Tensor,
    h_l: Tensor,
    h_m: Tensor,
    *,
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    temperature: float = 0.1,
) -> Tensor:
    """Equation 21: the sum of eqs 18, 19 and 20, weighed by λ1, λ2, λ3; each [N, H] → [].

    ``h_m`` is already projected to H. The paper doesn't give λ and τ (decision 14). The
    ablations are weights: relative loss only is (0, 0, 1), absolute only (1/2, 1/2, 0).
    """
    audio, text, between = weights
    return (
        audio * absolute_inter_modal_loss(h_a, h_m, temperature=temperature)
        + text * absolute_inter_modal_loss(h_l, h_m, temperature=temperature)
        + between * relative_inter_modal_loss(h_a, h_l, temperature=temperature)
    )


def total_loss(
    logits: Tensor,
    labels: Tensor,
    inter: Tensor | float = 0.0,
    *,
    mu: float = 0.2,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Equations 22 and 23: logits [N, C], labels [N] and eq 21's value → [].

    ``class_weights`` [C] balances the classes (decision 16); then the mean is weighted as well.
    """
    return F.cross_entropy(logits, labels, weight=class_weights) + mu * inter


class InterModalLoss(Criterion):
    """Equation 23's second term, μ times equation 21, of a network's output.

    Holds the projection of h_m that only the loss needs: trained beside the network and not part
    of a bundle, since prediction never uses it.
    """

    def __init__(
        self,
        hidden: int,
        *,
        mu: float = 1.0,
        weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.mu = mu
        self.project = nn.Linear(2 * hidden, hidden)
        self.weights = tuple(weights)
        self.temperature = temperature

    def forward(self, output: Output, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """``mask`` [B, U] chooses the utterances that have both; labels aren't looked at.

        Raises ValueError for a network of one modality, which has nothing to contrast.
        """
        if output.h_a is None or output.h_l is None or output.h_m is None:
            raise ValueError("a network of one modality has no inter-modal loss; leave it out")
        return self.mu * inter_modal_loss(
            output.h_a[mask],
            output.h_l[mask],
            self.project(output.h_m[mask]),
            weights=self.weights,
            temperature=self.temperature,
        )
