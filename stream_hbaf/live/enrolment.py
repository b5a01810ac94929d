"""Makes a voice print of a recording, or says why it can't be one: too short, noisy, two voices."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.errors import ConfigError
from stream_hbaf.features.speaker import SpeakerEncoder
from stream_hbaf.recognizer import Int16
from stream_hbaf.speech.detector import Feed, UtteranceDetector

LEAST_SPEECH_S = 5.0
LONGEST_S = 120.0  # of a recording: more makes no better print
FRAME = SAMPLE_RATE_HZ // 50  # samples, 20 ms
# Readers of LibriSpeech have 21 dB and more; with noise 5 dB below them 13 to 16, as loud as them
# 10 to 13.
LEAST_GAP_DB = 13.0
PIECE = 3 * SAMPLE_RATE_HZ // 2  # samples: one window of the encoder
# One reader has 0.74 and more, an actor of several emotions 0.54; two readers 0.39 and less.
LEAST_LIKENESS = 0.45
ROUNDS = 8  # of 2-means: so few points have settled by then


class Enrolled(NamedTuple):
    """A voice, and how much speech it was computed from."""

    embedding: NDArray[np.float32]  # [192]
    speech_s: float


def voice_print(
    encoder: SpeakerEncoder, recording: Int16, *, config: Config, where: str
) -> Enrolled:
    """The voice of a recording. Raises ConfigError if it has too little speech, too much noise, or
    more than one voice."""
    speech = speech_of(recording, config=config)
    speech_s = len(speech) / SAMPLE_RATE_HZ
    if speech_s < LEAST_SPEECH_S:
        raise ConfigError(
            f"{where}: {speech_s:.1f} s of speech; at least {LEAST_SPEECH_S:g} s are needed"
        )
    if loudness_gap(recording) < LEAST_GAP_DB:
        raise ConfigError(
            f"{where}: too noisy; come closer to the microphone, or find a quiet room"
        )
    embedding = encoder.embed(speech)
    if embedding is None or likeness(encoder, speech) < LEAST_LIKENESS:
        raise ConfigError(f"{where}: more than one voice, it seems; let one person alone speak")
    return Enrolled(embedding, speech_s)


def speech_of(samples: Int16, *, config: Config) -> Int16:
    """The utterances of a recording, one after the other, [n]."""
    detector = UtteranceDetector(config)
    actions = [*detector.feed(samples), *detector.flush(resume_at=0)]
    pieces = [action.samples for action in actions if isinstance(action, Feed)]
    return np.concatenate([np.zeros(0, np.int16), *pieces])


def loudness_gap(samples: Int16) -> float:
    """How many dB the loud tenth of a recording is above its quiet tenth."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    power = np.maximum((frames**2).mean(axis=1), 1.0)  # one step of the converter
    quiet, loud = np.quantile(power, [0.1, 0.9])
    return float(10 * np.log10(loud / quiet))


def likeness(encoder: SpeakerEncoder, speech: Int16) -> float:
    """The cosine between the two groups into which the voices of some speech fall most clearly.

    1 where one group would be a single piece: a cough is no second voice.
    """
    starts = range(0, len(speech) - PIECE + 1, PIECE // 2)
    found = [encoder.embed(speech[start : start + PIECE]) for start in starts]
    voices = np.stack([one for one in found if one is not None])
    alike = voices @ voices.T
    first, second = np.unravel_index(alike.argmin(), alike.shape)
    one, other = voices[first], voices[second]
    for _ in range(ROUNDS):
        nearer = voices @ one >= voices @ other
        if min(nearer.sum(), (~nearer).sum()) < 2:
            return 1.0
        one, other = (voices[of].mean(axis=0) for of in (nearer, ~nearer))
        one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    return float(one @ other)
