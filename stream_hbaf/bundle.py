"""Loads and saves trained bundles: folders with all that turns features into an emotion.

``config.yaml`` (sizes, labels, encoder, calibration, digests of the pretrained weights),
``model.safetensors`` (network and tuned layers in float16, scaling and the training sound's
statistics in float32), ``metrics.json`` (what was measured), ``README.md`` (the model card) and
``SHA256SUMS`` over the first two. Scaling, feature selection, labels and calibration are
implemented here only, for training and live use.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import (
    ValidationError,
)
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stream_hbaf.bundle_config import FORMAT, NONE, BundleConfig
from stream_hbaf.bundle_weights import (
    AROUSAL,
    FAMILIARITY,
    arousal_tensors,
    familiarity_tensors,
    narrow,
    read_arousal,
    read_familiarity,
    read_scaling,
    read_weights,
    require_finite,
    scaling_tensors,
    tensors_under,
    widen,
)
from stream_hbaf.config import TranscriptConfig, VadConfig
from stream_hbaf.errors import BundleError, ModelError, shorten
from stream_hbaf.features.baseline import Baseline
from stream_hbaf.features.comet import is_comet, open_comet
from stream_hbaf.features.commonsense import Commonsense, Event2MindHeads, Inferences, NoCommonsense
from stream_hbaf.features.pretrained import download
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.files import atomic_write_bytes, atomic_write_text, is_file, is_folder
from stream_hbaf.networks.arousal import ArousalHead
from stream_hbaf.networks.calibration import Calibration
from stream_hbaf.networks.familiarity import Familiarity
from stream_hbaf.networks.network import Network
from stream_hbaf.untrusted import (
    SETTINGS_BYTES,
    UntrustedError,
    parse_yaml,
    read_limited,
)
from stream_hbaf.weights import digest_parts

Float32 = NDArray[np.float32]

PROGRESS = logging.getLogger("stream_hbaf.progress")  # which the command line always shows
ANNOUNCED_AFTER_S = 1.0
LIVE_PARTS = (f"whisper:{TranscriptConfig().model}", f"vad:{VadConfig().engine}")  # by default
CONFIG, WEIGHTS, SUMS = "config.yaml", "model.safetensors", "SHA256SUMS"
METRICS, CARD = "metrics.json", "README.md"
FILES = (CONFIG, WEIGHTS, METRICS, CARD, SUMS)
SUMMED = (CONFIG, WEIGHTS)  # all that predictions depend on; figures and card may change later
REPAIR = "get it again, or train it with 'stream-hbaf train'"
WEIGHTS_BYTES = 1 << 30  # of a bundle: twenty times the shipped one
PACKAGE = Path(__file__).parent
PLACES = (PACKAGE.parent / "models", PACKAGE / "models")  # in a clone, in an installed package


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained emotion classifier with its features' encoders, loaded. Immutable."""

    config: BundleConfig
    scaling: Scaling | None  # None for a network without audio
    encoder: TextEncoder
    commonsense: Commonsense
    network: Network
    tuned: Mapping[str, Tensor] = field(default_factory=dict)  # the encoder's layers or adapters
    inferences: Inferences | None = None  # phrases for what the commonsense heads infer
    sha256: str = ""  # of SHA256SUMS, so of the folder and the digests in it; "" until loaded
    familiarity: Familiarity | None = None  # of the training sound; None: not measured
    arousal: ArousalHead | None = None  # of voices; None: none was fitted

    @property
    def id(self) -> str:
        return self.config.id

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.labels

    def scale(self, measured: Float32) -> Float32:
        """Acoustic features [N, F], or an utterance's tokens, → the network's, [N, A].

        Raises BundleError for a network without acoustic input.
        """
        if self.scaling is None:
            raise BundleError(f"bundle {self.id}: takes text only; leave the audio out")
        return self.scaling(measured)

    @cached_property
    def baseline(self) -> Baseline | None:
        """Makes scaled acoustic features relative to their speaker's past; None: nothing does."""
        if self.scaling is None or self.config.baseline is None:
            return None
        columns = self.scaling.blocks(self.config.acoustic_widths)
        blocks = dict(zip(self.config.acoustic.split("+"), columns, strict=True))
        return Baseline.of(self.config.baseline, blocks, width=self.scaling.width)

    @property
    def weighs_voices(self) -> bool:
        """Whether its answers also need what the words of a dialogue say by themselves."""
        network = self.config.network
        return self.calibration.reliability is not None and network.use_audio and network.use_text

    @property
    def calibration(self) -> Calibration:
        """Turns its logits into probabilities, label sets and abstention."""
        return self.config.calibration

    def save(self, folder: Path, *, metrics: Mapping[str, Any], card: str) -> None:
        """Write the folder, SHA256SUMS last; files of these names are replaced.

        The digests of the pretrained parts on this machine are recorded, for a live bundle also
        those of the default speech recogniser and voice activity detector.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts = [*self.config.parts, *(LIVE_PARTS if self.config.network.mode == "live" else ())]
        digests = digest_parts(parts, known=self.config.digests, bundle=self.id)
        config = self.config.model_copy(update={"digests": digests})
        settings = config.model_dump(mode="json")
        atomic_write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
        atomic_write_bytes(folder / WEIGHTS, save(narrow(self._tensors())))
        self.describe(folder, metrics=metrics, card=card)
        sums = [f"{_digest((folder / name).read_bytes())}  {name}\n" for name in SUMMED]
        atomic_write_text(folder / SUMS, "".join(sums))

    @staticmethod
    def describe(folder: Path, *, metrics: Mapping[str, Any], card: str) -> None:
        """Write a bundle's figures and its model card; its SHA-256 does not depend on them."""
        text = json.dumps(metrics, indent=1, ensure_ascii=False)
        atomic_write_text(folder / METRICS, text + "\n")
        atomic_write_text(folder / CARD, card)

    @classmethod
    def load(cls, name: str, *, device: str = "cpu") -> "Bundle":
        """Load a bundle by its folder or its name, and verify its files and pretrained parts.

        Raises BundleError naming the file that is missing, damaged or of another format, the
        encoder that can't be found, or the part whose weights are other ones than in training.
        """
        with announced(f"loading bundle {name}"):
            return cls._load(resolve_bundle(name), device=device)

    @classmethod
    def from_pretrained(
        cls, name: str, *, revision: str | None = None, device: str = "cpu"
    ) -> "Bundle":
        """Load a bundle by its folder, its name, or its name on the Hugging Face hub.

        One from the hub is kept in the hub's cache; ``revision`` is a branch, a tag or a commit of
        it. Raises BundleError as ``load`` does, and if the hub can't be reached or doesn't have it.
        """
        if "/" in name and not is_folder(Path(name)):
            try:
                name = str(download(name, files=FILES, revision=revision))
            except Exception as error:
                reason = shorten(str(error).strip().partition("\n")[0], limit=200)
                raise BundleError(
                    f"bundle '{name}': no such folder, and not to be had from the hub ({reason}); "
                    "correct its name, or get its folder and give that"
                ) from error
        return cls.load(name, device=device)

    @staticmethod
    def save_pretrained(name: str, folder: Path) -> None:
        """Copy a bundle's files, of its folder or name, into a folder to be uploaded or given away.

        Raises BundleError if one of them is missing or damaged.
        """
        source = resolve_bundle(name)
        _read_checked(source)
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            atomic_write_bytes(folder / file, _read(source, file))

    @classmethod
    def _load(cls, folder: Path, *, device: str) -> "Bundle":
        contents, sha256 = _read_checked(folder)
        config = _read_config(folder, contents[CONFIG])
        try:
            tensors = load(contents[WEIGHTS])
            require_finite(tensors)
            tuned = tensors_under(tensors, "encoder.")
            encoder = TextEncoder(
                config.encoder,
                device=device,
                tuned=widen(tuned),
                context=config.context,
                tokens=config.network.takes_tokens,
            )
            network = read_weights(config.network, tensors, members=config.members)
            width = config.network.audio_width
            scaling = read_scaling(tensors, width=width) if config.network.use_audio else None
            familiarity = read_familiarity(tensors, width=width)
            arousal = read_arousal(tensors, width=width)
            commonsense = _commonsense(config, tensors, device=device)
            phrases = tensors_under(tensors, "inferences.")
            inferences = Inferences.from_tensors(phrases) if phrases else None
            digest_parts(config.parts, known=config.digests, bundle=config.id)
        except ModelError as error:
            raise BundleError(f"bundle {config.id}: {error}") from None
        except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = shorten(str(error).strip().partition("\n")[0], limit=200)
            raise BundleError(
                f"bundle {folder}: {WEIGHTS} doesn't fit {CONFIG} ({reason}); {REPAIR}"
            ) from None
        network = network.to(device).eval()
        return cls(
            config,
            scaling,
            encoder,
            commonsense,
            network,
            tuned,
            inferences,
            sha256,
            familiarity,
            arousal,
        )

    def _tensors(self) -> dict[str, Tensor]:
        parts: dict[str, Mapping[str, Tensor]] = {
            "network.": self.network.state_dict(),
            "encoder.": self.tuned,
        }
        if self.scaling is not None:
            parts[""] = scaling_tensors(self.scaling)
        if self.familiarity is not None:
            parts[FAMILIARITY] = familiarity_tensors(self.familiarity)
        if self.arousal is not None:
            parts[AROUSAL] = arousal_tensors(self.arousal)
        if isinstance(self.commonsense, Event2MindHeads):
            parts["commonsense."] = self.commonsense.state_dict()
        if self.inferences is not None:
            parts["inferences."] = self.inferences.tensors()
        return {start + name: t for start, part in parts.items() for name, t in part.items()}


def resolve_bundle(name: str) -> Path:
    """The folder of a bundle given by folder or name, or BundleError listing the names."""
    folder = Path(name)
    if is_folder(folder):
        return folder
    for place in PLACES:
        if is_file(place / name / CONFIG):
            return place / name
    known = sorted({path.parent.name for place in PLACES for path in place.glob(f"*/{CONFIG}")})
    raise BundleError(
        f"bundle '{name}': no such folder and no such name; "
        f"there is {', '.join(known) or 'none'}; check --model"
    )


def read_bundle_config(name: str) -> BundleConfig:
    """A bundle's settings, without loading or verifying its weights.

    Raises BundleError if they are missing or invalid.
    """
    folder = resolve_bundle(name)
    return _read_config(folder, _read(folder, CONFIG))


@contextmanager
def announced(step: str, *, after_s: float = ANNOUNCED_AFTER_S) -> Iterator[None]:
    """Log ``step``, such as "loading bundle x", if the block takes longer than ``after_s``."""
    timer = Timer(after_s, PROGRESS.info, [step])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if path.exists() and not path.is_file():  # a device has no end
            raise UntrustedError("it is no file")
        return read_limited(path, limit=WEIGHTS_BYTES if name == WEIGHTS else SETTINGS_BYTES)
    except OSError as error:
        raise BundleError(
            f"bundle {folder}: {name} can't be read ({error.strerror}); {REPAIR}"
        ) from None
    except UntrustedError as error:
        raise BundleError(f"bundle {folder}: {name} can't be read ({error}); {REPAIR}") from None


def _read_checked(folder: Path) -> tuple[dict[str, bytes], str]:
    contents = {name: _read(folder, name) for name in (SUMS, *SUMMED)}
    lines = contents[SUMS].decode("utf-8", errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in SUMMED:
        if sums.get(name) != _digest(contents[name]):
            raise BundleError(
                f"bundle {folder}: {name} is damaged, its SHA-256 isn't the one in {SUMS}; {REPAIR}"
            )
    return contents, _digest(contents[SUMS])


def _read_config(folder: Path, content: bytes) -> BundleConfig:
    try:
        settings = parse_yaml(content)
        found = settings.get("format") if isinstance(settings, dict) else None
        if found != FORMAT:
            raise BundleError(
                f"bundle {folder}: format {shorten(str(found))}, but this version reads format "
                f"{FORMAT}; install the version of stream-hbaf that the bundle was made with"
            )
        config = BundleConfig.model_validate(settings)
        if len(set(config.labels)) != config.network.classes:
            raise UntrustedError(f"{config.network.classes} classes need as many labels")
        reliability, head = config.calibration.reliability, config.calibration.head
        if reliability is not None and len(reliability.typical) != len(config.labels):
            raise UntrustedError("'calibration.reliability.typical' needs a share for each label")
        if head is not None and len(head.bias) != len(config.labels):
            raise UntrustedError("'calibration.head.bias' needs a number for each label")
        return config
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = shorten(f"'{key}': {first['msg'].removeprefix('Value error, ')}", limit=200)
        raise BundleError(f"bundle {folder}: {CONFIG} isn't valid ({reason}); {REPAIR}") from None
    except UntrustedError as error:
        reason = f"line {error.line}: {error}" if error.line else str(error)
        raise BundleError(f"bundle {folder}: {CONFIG} isn't valid ({reason}); {REPAIR}") from None


def _commonsense(
    config: BundleConfig, tensors: Mapping[str, Tensor], *, device: str
) -> Commonsense:
    if config.commonsense == NONE:
        return NoCommonsense(config.network.commonsense_width)
    if is_comet(config.commonsense):
        return open_comet(config.commonsense, device=device)
    return Event2MindHeads.from_tensors(tensors_under(tensors, "commonsense.")).to(device)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
