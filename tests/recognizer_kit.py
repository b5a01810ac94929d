"""For tests of the recogniser: a tiny bundle, and a short dialogue's text and made-up audio."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_encoder import save_tiny_bert

from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.config import Config
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.commonsense import Event2MindHeads, Inferences
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import ContextConfig, TextEncoder, Turn
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.networks.familiarity import Familiarity
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.networks.registry import build

LABELS = ("angry", "happy", "sad")
SIZES: dict[str, Any] = {
    "text_width": 16,
    "commonsense_width": 6,
    "classes": 3,
    "hidden": 16,
    "heads": 2,
    "layers": 1,
    "filters": 4,
    "window": 3,
}
CONTEXT = ContextConfig(tokens=24, speakers=True)
SENTENCES = (
    "i can't believe it !",
    "no , you never came home",
    "what ? joey left",
    "so sad . the friend is great",
    "always work",
    "are you angry ?",
    "well , i am happy today",
)
TURNS = [Turn(("ross", "rachel")[n % 2], text) for n, text in enumerate(SENTENCES)]


def transcript(text: str) -> Transcript:
    return Transcript(text, "en", avg_logprob=0.0, no_speech_prob=0.0)


def random_acoustic(seed: int) -> Acoustic:
    """Functionals drawn in standard deviations, and one row of zeros as descriptors."""
    drawn = 2 * np.random.default_rng(seed).standard_normal(6373)
    return Acoustic(np.zeros((1, 65), np.float32), drawn.astype(np.float32))


def settings(encoder: str, **changes: Any) -> BundleConfig:
    network = HbafConfig(**SIZES, use_audio=False)
    fields: dict[str, Any] = {
        "labels": LABELS,
        "acoustic": "none",
        "context": CONTEXT,
        "network": network,
    }
    return BundleConfig(id="read", encoder=encoder, **fields | changes)


def save_bundle(
    place: Path,
    *,
    inferences: Inferences | None = None,
    familiarity: Familiarity | None = None,
    **changes: Any,
) -> Config:
    """The settings of a recogniser whose bundle has a tiny encoder."""
    (place / "encoder").mkdir()
    torch.manual_seed(0)
    encoder = TextEncoder(str(save_tiny_bert(place / "encoder")), context=CONTEXT)
    config = settings(encoder.id, **changes)
    heads = Event2MindHeads(text_width=16, width=6, hidden=8)
    width = config.network.audio_width
    scaling = Scaling(np.arange(width), np.zeros(width, np.float32), np.ones(width, np.float32))
    kept = scaling if config.network.use_audio else None
    network = build(config.network)
    bundle = Bundle(
        config, kept, encoder, heads, network, inferences=inferences, familiarity=familiarity
    )
    bundle.save(place / "bundle", metrics={}, card="")
    return Config(model=str(place / "bundle"))
