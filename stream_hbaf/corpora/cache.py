"""Caches features on disk: arrays in files that are named by all that decides their values.

What decides them includes code and libraries: ``digest_code`` and ``library_versions`` are part of
every key, so that no result of another version is read.
"""

import ast
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache as memoise
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.files import atomic_write_bytes

if TYPE_CHECKING:  # torch takes 1.4 s of CPU, which the workers of an extraction do not need
    from torch import Tensor

    from stream_hbaf.features.commonsense import Commonsense
    from stream_hbaf.features.text import TextEncoder, Turn

Array = NDArray[np.floating[Any]]
Float32 = NDArray[np.float32]
EncodeTexts = Callable[[Sequence[str]], Float32]  # texts → [N, D]
# Dialogues of U turns → [sum of U, D].
EncodeDialogues = Callable[[Sequence[Sequence["Turn"]]], Float32]

LIBRARIES = ("transformers", "torch")  # of text and commonsense features
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def cached_dialogue_encoder(
    encoder: "TextEncoder", cache: Path, *, half: bool = False
) -> EncodeDialogues:
    """The encoder's ``encode_dialogues``, cached, with all dialogues' rows in one array.

    ``half`` is the encoder's own: whether it computes in half precision.
    """
    weights = digest_of(encoder.model.state_dict())
    no_dialogues = encoder.encode([])

    def encode(dialogues: "Sequence[Sequence[Turn]]") -> Float32:
        kind = "dialogues" + half * " half" + encoder.tokens * " tokens"
        code = digest_code("stream_hbaf.features.text")
        made_by = (kind, weights, repr(encoder.context), code, *library_versions(*LIBRARIES))
        key = key_of(*made_by, repr(dialogues))

        def compute() -> Array:
            rows = encoder.encode_dialogues(dialogues, half=half)
            features = np.concatenate([no_dialogues, *rows])
            # There are gigabytes of tokens [N, T, D].
            return features if features.ndim == 2 else features.astype(np.float16)

        return cached(cache / f"{key}.npy", compute)

    return encode


def infer_commonsense(
    commonsense: "Commonsense", texts: Sequence[str], *, features: Float32, cache: Path
) -> Float32:
    """Commonsense features [N, 3, K] of texts; COMET's are cached, others are computed at once.

    ``features`` [N, L] are the texts', which the distilled heads read.
    """
    from stream_hbaf.features.comet import Comet

    if not isinstance(commonsense, Comet):
        return commonsense.infer_texts(texts, features=features)
    weights = digest_of(commonsense.model.state_dict())
    code = (digest_code("stream_hbaf.features.comet"), *library_versions(*LIBRARIES))
    key = key_of(weights, repr(commonsense.relations), *code, *texts)
    return cached(cache / f"{key}.npy", lambda: commonsense.infer_texts(texts, features=features))


def cached(file: Path, compute: Callable[[], Array]) -> Float32:
    """The array in ``file``, or what ``compute`` returns, which is then kept there.

    Raises WriteError if it can't be kept.
    """
    found = load_array(file)
    if found is None:
        found = compute()
        store_array(file, found)
    return found


def load_array(file: Path, *, shape: tuple[int, ...] | None = None) -> Array | None:
    """The array in a file of the cache; None if it is missing, damaged by a loss of power, or has
    another shape than the one given."""
    try:
        array: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if shape is None or array.shape == shape else None


def store_array(file: Path, array: Array) -> None:
    """Write an array into the cache, atomically. Raises WriteError."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    atomic_write_bytes(file, content.getvalue())


def key_of(*parts: str) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def digest_of(tensors: "Mapping[str, Tensor]") -> str:
    """SHA-256 of weights, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


@memoise
def digest_code(*modules: str) -> str:
    """SHA-256 of what modules, given by their names, do: of their syntax trees without comments and
    docstrings."""
    digest = hashlib.sha256()
    for module in modules:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no module {module} with a source")
        tree = ast.parse(Path(spec.origin).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


@memoise
def library_versions(*packages: str) -> tuple[str, ...]:
    """Each package with the version that is installed."""
    return tuple(f"{package} {version(package)}" for package in packages)
