"""An utterance becomes features: its sound as one vector, or as many tokens as it has frames, from
a self-supervised encoder.

wav2vec 2.0, data2vec-audio and WavLM, or any of transformers' encoders that read raw sound through
a stack of convolutions.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor
from transformers.models.auto.modeling_auto import AutoModel

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.features.pretrained import UNUSABLE, downloading, quietly

LOG = logging.getLogger(__name__)

VERSION = "1"  # rises when pooling changes: old caches are then left alone
LAST_LAYERS = 4  # averaged before the mean over frames, as the text encoder's are
PIECE_S = 20  # what is longer is heard in pieces: attention's memory grows with the square


class SpeechEncoder:
    """Turns sound into the last four layers' average: its frames, or one vector, their mean.

    ``layers=1`` takes the last layer alone. One utterance at a time, unpadded, so that nothing else
    can change its vector. ``version`` names the weights, wherever they lie. Raises ModelError if
    the model can't be had or doesn't read sound of 16 kHz, ConfigError if there is no such device.
    """

    def __init__(
        self, name_or_path: str, *, device: str = "cpu", layers: int = LAST_LAYERS
    ) -> None:
        self._layers = layers
        with quietly():
            model, self._normalise = _load(name_or_path)
        self._shortest = _receptive_field(model, name=name_or_path)
        # A folder is known by its last name, and its weights by their digest: it may be moved.
        self.name = Path(name_or_path).resolve().name if _is_folder(name_or_path) else name_or_path
        self.version = f"{VERSION}-last{layers}-{_digest(model)}"
        self.width = int(model.config.hidden_size)
        self._device = device
        self._model = _to_device(model, device=device)

    def extract(self, samples: NDArray[np.int16]) -> NDArray[np.float32] | None:
        """One utterance (int16 [n], 16 kHz) -> [width]; None if it is shorter than a frame."""
        total, frames = torch.zeros(self.width, dtype=torch.float64), 0
        for states in self._states(samples):
            total += states.double().sum(0).cpu()
            frames += len(states)
        if not frames:
            return None
        features: NDArray[np.float32] = (total / frames).float().numpy()
        return features

    def tokens(self, samples: NDArray[np.int16]) -> NDArray[np.float32] | None:
        """One utterance (int16 [n], 16 kHz) -> its frames [T, width], whose mean is ``extract``'s.

        In wav2vec 2.0 and its kin they are 20 ms apart. None if it is shorter than a frame.
        """
        pieces = [states.cpu() for states in self._states(samples)]
        return torch.cat(pieces).numpy() if pieces else None

    def _states(self, samples: NDArray[np.int16]) -> Iterator[Tensor]:
        """The last layers' average over time, [T, width], a piece after the other."""
        if len(samples) < self._shortest:
            return
        sound = self._normalise(
            samples.astype(np.float32) / 32768,
            sampling_rate=SAMPLE_RATE_HZ,
            return_tensors="pt",
        )["input_values"]  # [1, n]
        pieces = math.ceil(len(samples) / (PIECE_S * SAMPLE_RATE_HZ))
        for piece in torch.chunk(sound, pieces, dim=1):
            with torch.inference_mode():
                hidden = self._model(piece.to(self._device), output_hidden_states=True)
                last = torch.stack(hidden.hidden_states[-self._layers :]).mean(0)[0]
            yield last

    def close(self) -> None:
        """Forget the weights."""
        del self._model


def _load(name: str) -> tuple[Any, Any]:
    if not _is_folder(name) and Path(name).is_absolute():
        raise ModelError(f"speech encoder {name}: there is no such folder; check the name")
    try:
        return _read(name, local_files_only=True)  # what is here is asked of nobody
    except UNUSABLE as error:
        LOG.debug("loading %s from disk failed: %s", name, error)
        if _is_folder(name):
            raise ModelError(
                f"speech encoder {name}: no usable model in that folder; it needs config.json, "
                "model.safetensors and preprocessor_config.json"
            ) from None
    try:
        with downloading(name):
            return _read(name, local_files_only=False)
    except UNUSABLE as error:
        LOG.debug("loading %s from the hub failed: %s", name, error)
        raise ModelError(
            f"speech encoder {name}: not on this machine and can't be downloaded; "
            "check its name, or go online once"
        ) from None


def _read(name: str, *, local_files_only: bool) -> tuple[Any, Any]:
    """The model in float32, and what scales sound as the model was trained to hear it.

    Several of these models were published before safetensors; transformers reads their older files
    as weights only, never as code.
    """
    model = AutoModel.from_pretrained(
        name, dtype=torch.float32, local_files_only=local_files_only
    ).eval()
    normalise = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
        name, local_files_only=local_files_only
    )
    return model, normalise


def _is_folder(name: str) -> bool:
    return Path(name).is_dir()


def _receptive_field(model: Any, *, name: str) -> int:
    """Samples in one frame: the convolutions fail on fewer."""
    kernels = getattr(model.config, "conv_kernel", None)
    strides = getattr(model.config, "conv_stride", None)
    if kernels is None or strides is None:
        raise ModelError(
            f"speech encoder {name}: a {model.config.model_type} doesn't read raw sound; "
            "choose a wav2vec 2.0, data2vec-audio or WavLM model"
        )
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return int(samples)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _to_device(model: Any, *, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without CUDA
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device {device}: can't be used ({reason}); choose cpu") from None
