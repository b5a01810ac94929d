"""A short dialogue for tests of the recogniser: its text, its transcripts and made-up audio."""

import numpy as np

from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.text import ContextConfig, Turn
from stream_hbaf.features.whisper import Transcript

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
