"""Class shares of a deployment: given, or estimated from the answers, in place of training's.

A classifier's probabilities hold for the label shares of its training. Where these are others, each
is multiplied by (deployment's share / training's share), renormalised. Plain numpy; C classes, N
answers.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError

Shares = NDArray[np.float64]
Setting = Mapping[str, float] | Literal["auto"] | None

REMEMBERED = 500  # answers that an estimate is made from: what is older may have changed
WORTH = 50.0  # answers that the training's shares count as, so that the first ones move little
ROUNDS = 30  # of expectation and maximisation; the estimate is within 1 % of its limit before
ROUNDING = 0.01  # by which shares may miss 1
LEAST = 1e-6  # share of a label in training, so that a ratio stays finite


class Prior:
    """The shares [C] of the labels in a deployment, beside those in training.

    With ``learns`` they are estimated by the EM algorithm of Saerens et al. 2002 ("Adjusting the
    outputs of a classifier to new a priori probabilities") from the latest answers, with training's
    shares as so many answers more (a Dirichlet prior): for each answer from those before it alone.
    """

    def __init__(self, training: Shares, deployment: Shares | None = None) -> None:
        self.training = np.maximum(training, LEAST) / np.maximum(training, LEAST).sum()
        self.shares = self.training if deployment is None else deployment
        self.learns = deployment is None
        self._answers: deque[Shares] = deque(maxlen=REMEMBERED)

    @property
    def odds(self) -> Shares:
        """What probabilities are multiplied by, before they are renormalised [C]."""
        return np.asarray(self.shares / self.training)

    def learn(self, adjusted: Shares, *, odds: Shares) -> None:
        """Take account of one more answer [C], which was adjusted by ``odds``."""
        if not self.learns:
            return
        plain = adjusted / odds
        self._answers.append(plain / plain.sum())
        answers, shares = np.stack(self._answers), self.training
        for _ in range(ROUNDS):
            counted = adjust(answers, shares / self.training).sum(0)
            shares = (WORTH * self.training + counted) / (WORTH + len(answers))
        self.shares = shares


def adjust(probabilities: Shares, odds: Shares) -> Shares:
    """Probabilities [.., C] times the odds [C], renormalised."""
    changed = probabilities * odds
    total = changed.sum(-1, keepdims=True)
    # Where the deployment's only labels are impossible, the answer stays.
    return np.where(total > 0.0, changed / np.where(total > 0.0, total, 1.0), probabilities)


def open_prior(
    setting: Setting, *, labels: Sequence[str], training: Mapping[str, float], bundle: str
) -> Prior | None:
    """The prior of a setting for a bundle's labels and training shares; None if it is unset.

    Labels that the setting doesn't name have what is left, in training's proportions. Raises
    ConfigError for a label that the bundle doesn't have, shares that aren't shares of one whole,
    and a bundle that doesn't know its training's shares.
    """
    if setting is None:
        return None
    if not training:
        raise ConfigError(
            f"prior: bundle {bundle} doesn't say the shares of labels in its training; leave "
            "'prior' out, or take a bundle that does"
        )
    known = np.array([training.get(label, 0.0) for label in labels])
    if setting == "auto":
        return Prior(known)
    return Prior(known, _shares(setting, labels, known, bundle=bundle))


def _shares(
    setting: Mapping[str, float], labels: Sequence[str], training: Shares, *, bundle: str
) -> Shares:
    for label in setting:
        if label not in labels:
            raise ConfigError(
                f"prior: bundle {bundle} has no label '{label}'; there is {', '.join(labels)}"
            )
    total = sum(setting.values())
    others = np.array([label not in setting for label in labels])
    if min(setting.values(), default=0.0) < 0.0 or total > 1.0 + ROUNDING:
        raise ConfigError(f"prior: the shares sum to {total:.2f}; they may not exceed 1")
    if total <= 0.0 or (not others.any() and total < 1.0 - ROUNDING):
        raise ConfigError(f"prior: the shares of all labels sum to {total:.2f}; they must sum to 1")
    shares = np.array([setting.get(label, 0.0) for label in labels])
    if others.any() and training[others].sum() > 0.0:
        rest = np.where(others, training, 0.0)
        shares += max(0.0, 1.0 - total) * rest / rest.sum()
    return np.asarray(shares / shares.sum())
