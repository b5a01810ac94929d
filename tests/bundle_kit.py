"""A bundle that loads in a moment, for the tests of bundles and ``tools/fuzz.py``."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tiny_encoder import save_tiny_mpnet

from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.features.commonsense import NoCommonsense
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import ContextConfig, TextEncoder
from stream_hbaf.networks.hbaf import HBAF, HbafConfig


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_tiny(place: Path, **settings: Any) -> Bundle:
    """A bundle of a tiny encoder with adapters, which reads dialogues; four labels of its own."""
    torch.manual_seed(0)
    context = ContextConfig(tokens=32, speakers=True)
    adapters = {
        "encoder.layer.3.attention.attn.v.weight.lora_a": torch.randn(2, 16).half(),
        "encoder.layer.3.attention.attn.v.weight.lora_b": torch.randn(16, 2).half(),
    }
    sizes: dict[str, Any] = {
        "hidden": 16,
        "heads": 2,
        "layers": 1,
        "filters": 4,
        "window": 3,
        "classes": 4,
    }
    network = HbafConfig(text_width=16, commonsense_width=4, **{**sizes, **settings})
    place.mkdir()
    folder = str(save_tiny_mpnet(place))
    every = np.arange(network.audio_width)
    return Bundle(
        config=BundleConfig(
            id="read",
            labels=("ang", "hap", "neu", "sad"),
            encoder=folder,
            context=context,
            acoustic="prosody" if network.use_audio else "none",
            commonsense="none",
            network=network,
        ),
        scaling=Scaling(every, every.astype(np.float32), np.ones(len(every), np.float32))
        if network.use_audio
        else None,
        encoder=TextEncoder(folder, tuned=adapters, context=context),
        commonsense=NoCommonsense(4),
        network=HBAF(network).half().float().eval(),
        tuned=adapters,
    )


def rewritten(small: Path, to: Path, **files: bytes) -> Path:
    """The bundle with other ``config`` or ``weights``, and sums that are right."""
    shutil.copytree(small, to)
    names = {"config": "config.yaml", "weights": "model.safetensors"}
    for key, content in files.items():
        (to / names[key]).write_bytes(content)
    sums = [f"{sha256(to / name)}  {name}\n" for name in names.values()]
    (to / "SHA256SUMS").write_text("".join(sums))
    return to


def settings_of(small: Path) -> dict[str, Any]:
    settings = yaml.safe_load((small / "config.yaml").read_text())
    assert isinstance(settings, dict)
    return settings
