"""An utterance becomes features: what others feel, what the speaker feels, what was meant.

Three vectors per utterance, in this order everywhere: external, internal, purpose.
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
    """Infers what isn't said, from words or from the features of them."""

    @property
    def width(self) -> int:
        """K, the width of one relation's vector."""

    def infer_texts(
        self, texts: Sequence[str], *, features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """N texts and their text features [N, D] → inferences float32 [N, 3, K].

        Each implementation reads what it was trained on: COMET the words, heads the features.
        Neither looks at the other texts of the call.
        """


class NoCommonsense:
    """Infers nothing: zeros, for a network trained without commonsense or for its ablation."""

    def __init__(self, width: int) -> None:
        self.width = width

    def infer(self, text: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.zeros((len(text), len(RELATIONS), self.width), dtype=np.float32)

    def infer_texts(
        self, texts: Sequence[str], *, features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return self.infer(features)


class Head(nn.Module):
    """One relation: text feature [N, D] → direction [N, K] of the phrases people would infer.

    Its result has length 1: only directions were trained, by cosine with phrases' embeddings.
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

    Their relations are decision 5's: external = oReact, internal = xReact, purpose = xIntent.
    Stands in for COMET in the paper's section 3.1.2: instead of generating an inference it says
    where, among sentence embeddings (the untuned encoder's features), the annotators' phrases are.
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
        """Rebuild heads, with their sizes, from a state_dict."""
        hidden, text_width = tensors["heads.external.layers.1.weight"].shape
        width = len(tensors["heads.external.layers.4.weight"])
        heads = cls(text_width=text_width, width=width, hidden=hidden)
        heads.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return heads.eval()

    def forward(self, text: Tensor) -> Tensor:
        """[N, D] → [N, 3, K], through which gradients flow."""
        return torch.stack([self.heads[relation](text) for relation in RELATIONS], dim=1)

    def infer_texts(
        self, texts: Sequence[str], *, features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Of the texts only their ``features`` [N, D] are read."""
        return self.infer(features)

    def infer(self, text: NDArray[np.float32]) -> NDArray[np.float32]:
        """Text features [N, D] → unit vectors float32 [N, 3, K]."""
        device = next(self.parameters()).device
        with torch.inference_mode():
            inferred: NDArray[np.float32] = self(torch.from_numpy(text).to(device)).cpu().numpy()
        return inferred
