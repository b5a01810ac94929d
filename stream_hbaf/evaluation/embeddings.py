"""Training: how near what a network makes of speech is to what it makes of the same words.

n utterances, H the width of the network's embeddings.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from stream_hbaf.corpora.dataset import Dataset, all_features, on_device_of, pad_dialogues
from stream_hbaf.errors import ModelError
from stream_hbaf.networks.network import Network

Float32 = NDArray[np.float32]

FEWEST = 3  # utterances: of fewer, nothing is near or far
TIES = 1e-6  # of cosines: the same words have the same embedding
PERPLEXITY = 30.0  # about how many neighbours t-SNE keeps together


@dataclass(frozen=True)
class Embeddings:
    """Speech and text of the same utterances, as a network brings them together."""

    speech: Float32  # [n, H], each of length 1
    text: Float32  # [n, H], each of length 1
    labels: NDArray[np.int64]  # [n]

    def found(self) -> float:
        """The share of utterances whose own text is of all texts the nearest to their speech.

        By cosine; of k texts that are equally near, the own one counts a k-th.
        """
        cosines = self.speech @ self.text.T
        nearest = cosines >= cosines.max(axis=1, keepdims=True) - TIES
        return float((np.diagonal(nearest) / nearest.sum(axis=1)).mean())

    def margin(self) -> float:
        """The mean cosine of speech and own text, minus that of speech and all other texts."""
        cosines = self.speech @ self.text.T
        count = len(cosines)
        own = float(np.trace(cosines))
        others = float(cosines.sum()) - own
        return own / count - others / (count * (count - 1))

    def in_plane(self) -> tuple[Float32, Float32]:
        """Speech and text [n, 2], laid out together by t-SNE; the same each time."""
        every = np.concatenate([self.speech, self.text])
        perplexity = min(PERPLEXITY, (len(every) - 1) / 3)
        plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(every)
        return plane[: len(self.speech)], plane[len(self.speech) :]


def embed(network: Network, material: Dataset, *, most: int, seed: int = 0) -> Embeddings:
    """Embeddings of labelled utterances with sound and words, at most so many, drawn evenly.

    The network is used as it is: call ``eval()`` before. Raises ModelError for a network that
    doesn't bring the two together, and where there is next to nothing to bring together.
    """
    if len(network.config.modalities) < 2:
        raise ModelError("embeddings: the network has one modality; choose one with both")
    speech, text = _embed_all(network, material)
    heard = material.labelled
    for mask in (material.audio_mask, material.text_mask):
        heard = heard if mask is None else heard & mask
    rows = np.flatnonzero(heard)
    if len(rows) < FEWEST:
        raise ModelError(f"embeddings: {len(rows)} utterances have sound, words and a label")
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return Embeddings(speech[rows], text[rows], material.labels[rows])


def _embed_all(network: Network, material: Dataset) -> tuple[Float32, Float32]:
    """[N, H] of speech and of text, a dialogue at a time: tokens of many would fill the memory."""
    speech: list[Float32] = []
    text: list[Float32] = []
    for rows in material.dialogues:
        features = all_features(material, pad_dialogues([rows]), version="")
        with torch.inference_mode():
            output = network(on_device_of(network, features))
        if output.h_a is None or output.h_l is None:
            raise ModelError(
                f"embeddings: {network.config.kind} doesn't bring speech and text together; "
                "choose a network that does, such as hbaf"
            )
        for part, h in ((speech, output.h_a), (text, output.h_l)):
            part.append(F.normalize(h[0].float(), dim=-1).cpu().numpy())
    back = np.argsort(np.concatenate(material.dialogues))
    return np.concatenate(speech)[back], np.concatenate(text)[back]
