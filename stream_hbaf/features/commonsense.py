"""Commonsense features: inferred reactions and intentions, three vectors for each utterance.

Their order is the same everywhere: external (what others feel), internal (what the speaker feels),
purpose (what the speaker intends).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

RELATIONS = ("external", "internal", "purpose")


class Commonsense(Protocol):
    """Infers commonsense features from texts or from their text features."""

    @property
    def width(self) -> int:
        """K, the width of one relation's vector."""

    def infer_texts(
        self, texts: Sequence[str], *, features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """N texts and their text features [N, D] → inferences float32 [N, 3, K].

        Each implementation uses what it was trained on: COMET the texts, heads the features. A row
        depends on its own text only.
        """


class NoCommonsense:
    """Zeros, for a network trained without commonsense."""

    def __init__(self, width: int) -> None:
        self.width = width

    def infer(self, text: NDArray[np.float32]) -> NDArray[np.float32]:
        """Text features [N, D] → zeros [N, 3, K]."""
        return np.zeros((len(text), len(RELATIONS), self.width), dtype=np.float32)

    def infer_texts(
        self, texts: Sequence[str], *, features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """As every commonsense model's."""
        return self.infer(features)


class Head(nn.Module):
    """One relation: text features [N, D] → the direction [N, K] of the annotators' phrases.

    Of length 1, since training compares it with the phrases' embeddings by cosine.
    """

    def __init__(self, text_width: int, *, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(text_width),
            nn.Linear(text_width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
        )

    def forward(self, text: Tensor) -> Tensor:
        return F.normalize(self.layers(text), dim=-1)


class Event2MindHeads(nn.Module):
    """Commonsense distilled from Event2Mind's and ATOMIC's annotations into three small heads.

    Their relations are COMET's: external = oReact, internal = xReact, purpose = xIntent.
    They replace COMET in the paper's section 3.1.2: instead of generating an inference they give
    its direction among sentence embeddings, which are the untuned text encoder's features.
    """

    def __init__(
        self, *, text_width: int, width: int, hidden: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.text_width, self.width, self.hidden = text_width, width, hidden
        self.heads = nn.ModuleDict(
            {
                relation: Head(text_width, hidden=hidden, width=width, dropout=dropout)
                for relation in RELATIONS
            }
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Event2MindHeads":
        """Heads with the sizes and weights of a state_dict."""
        hidden, text_width = tensors["heads.external.layers.1.weight"].shape
        width = len(tensors["heads.external.layers.4.weight"])
        heads = cls(text_width=text_width, width=width, hidden=hidden)
        heads.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return heads.eval()

    def forward(self, text: Tensor) -> Tensor:
        """[N, D] → [N, 3, K], with gradients."""
        return torch.stack([self.heads[relation](text) for relation in RELATIONS], dim=1)

    def infer_texts(
        self, texts: Sequence[str], *, features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """As every commonsense model's; only ``features`` [N, D] are used."""
        return self.infer(features)

    def infer(self, text: NDArray[np.float32]) -> NDArray[np.float32]:
        """Text features [N, D] → unit vectors float32 [N, 3, K]."""
        device = next(self.parameters()).device
        with torch.inference_mode():
            inferred: NDArray[np.float32] = self(torch.from_numpy(text).to(device)).cpu().numpy()
        return inferred
