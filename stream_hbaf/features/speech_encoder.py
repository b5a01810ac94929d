"""Acoustic features from a self-supervised speech encoder: one vector or one for each frame.

wav2vec 2.0, data2vec-audio and WavLM, or any of transformers' encoders of raw audio that begin
with a stack of convolutions.
"""

import hashlib
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
from stream_hbaf.features.pretrained import load_pretrained

VERSION = "1"  # of the pooling; part of the cache key
LAST_LAYERS = 4  # averaged before the mean over frames, as the text encoder's are
PIECE_S = 20  # longer audio is encoded in pieces: attention's memory grows with the square


class SpeechEncoder:
    """Turns audio into the last four layers' average: its frames, or their mean as one vector.

    ``layers=1`` takes the last layer alone. Utterances are encoded one at a time, unpadded, so that
    a result depends on its own audio only. ``version`` identifies the weights by content. Raises
    ModelError if the model can't be loaded or doesn't take raw audio, ConfigError for a device
    that can't be used.
    """

    def __init__(
        self, name_or_path: str, *, device: str = "cpu", layers: int = LAST_LAYERS
    ) -> None:
        self._layers = layers
        model, self._normalise = load_pretrained(
            name_or_path,
            _read,
            kind="speech encoder",
            files="config.json, model.safetensors and preprocessor_config.json",
        )
        self._shortest = _receptive_field(model, name=name_or_path)
        # A folder may be moved: its last name and the digest of its weights identify it.
        folder = Path(name_or_path)
        self.name = folder.resolve().name if folder.is_dir() else name_or_path
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

        In wav2vec 2.0 and its relatives they are 20 ms apart. None if it is shorter than a frame.
        """
        pieces = [states.cpu() for states in self._states(samples)]
        return torch.cat(pieces).numpy() if pieces else None

    def _states(self, samples: NDArray[np.int16]) -> Iterator[Tensor]:
        """The last layers' average over time, [T, width], one piece after the other."""
        if len(samples) < self._shortest:
            return
        audio = self._normalise(
            samples.astype(np.float32) / 32768, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt"
        )["input_values"]  # [1, n]
        pieces = math.ceil(len(samples) / (PIECE_S * SAMPLE_RATE_HZ))
        for piece in torch.chunk(audio, pieces, dim=1):
            with torch.inference_mode():
                hidden = self._model(piece.to(self._device), output_hidden_states=True)
                last = torch.stack(hidden.hidden_states[-self._layers :]).mean(0)[0]
            yield last

    def close(self) -> None:
        """Free the weights."""
        del self._model


def _read(path: str) -> tuple[Any, Any]:
    """The model in float32, and the normalisation of its input audio.

    Several of these models were published before safetensors; transformers reads their older files
    as weights only, never as code.
    """
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    normalise = AutoFeatureExtractor.from_pretrained(path)
    return model, normalise


def _receptive_field(model: Any, *, name: str) -> int:
    """Samples in one frame: the convolutions fail on fewer."""
    kernels = getattr(model.config, "conv_kernel", None)
    strides = getattr(model.config, "conv_stride", None)
    if kernels is None or strides is None:
        raise ModelError(
            f"speech encoder {name}: a {model.config.model_type} doesn't take raw audio; "
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
