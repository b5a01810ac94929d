"""Training: what takes minutes is kept on disk, under a name made of all that it depends on."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stream_hbaf.features.comet import Comet
from stream_hbaf.features.commonsense import Commonsense
from stream_hbaf.features.context import Turn
from stream_hbaf.features.text import TextEncoder

Float32 = NDArray[np.float32]
Encode = Callable[[Sequence[str]], Float32]  # texts → [N, D]
Encodes = Callable[[Sequence[Sequence[Turn]]], Float32]  # dialogues of U turns → [sum of U, D]


def cached_encoder(encoder: TextEncoder, cache: Path) -> Encode:
    """The encoder's ``encode``, its results kept on disk."""
    weights = digest_of(encoder.model.state_dict())

    def encode(texts: Sequence[str]) -> Float32:
        key = key_of(weights + encoder.tokens * " tokens", *texts)
        return cached(cache / f"{key}.npy", lambda: _kept(encoder.encode(texts)))

    return encode


def cached_dialogue_encoder(encoder: TextEncoder, cache: Path, *, half: bool = False) -> Encodes:
    """All rows of the encoder's ``encode_dialogues``, kept on disk; ``half`` is the encoder's."""
    weights = digest_of(encoder.model.state_dict())
    none = encoder.encode([])  # of no dialogues

    def encode(dialogues: Sequence[Sequence[Turn]]) -> Float32:
        kind = "dialogues" + half * " half" + encoder.tokens * " tokens"
        key = key_of(kind, weights, repr(encoder.context), repr(dialogues))
        return cached(
            cache / f"{key}.npy",
            lambda: _kept(np.concatenate([none, *encoder.encode_dialogues(dialogues, half=half)])),
        )

    return encode


def infer_commonsense(
    commonsense: Commonsense, texts: Sequence[str], *, features: Float32, cache: Path
) -> Float32:
    """Inferences [N, 3, K]; COMET's are kept on disk, as it is the slowest of all."""
    if not isinstance(commonsense, Comet):
        return commonsense.infer_texts(texts, features=features)
    weights = digest_of(commonsense.model.state_dict())
    key = key_of(weights, repr(commonsense.relations), *texts)
    return cached(cache / f"{key}.npy", lambda: commonsense.infer_texts(texts, features=features))


def cached(file: Path, compute: Callable[[], Float32]) -> Float32:
    """What ``compute`` gave when it was first asked."""
    if not file.exists():
        write_whole(file, lambda part: _save_array(part, compute()))
    features: Float32 = np.load(file)
    return features


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """All or nothing: a file that was cut short would look like a finished one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.stem}.{os.getpid()}.part")  # of this process alone
    write(unfinished)
    unfinished.replace(file)


def key_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Names weights by their content."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _kept(features: Float32) -> Float32:
    """As they are, or tokens [N, T, D] in half the width: there are gigabytes of them."""
    return features if features.ndim == 2 else features.astype(np.float16)


def _save_array(file: Path, array: Float32) -> None:
    with file.open("wb") as out:
        np.save(out, array)
