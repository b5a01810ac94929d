"""Sound for days: what ``tools/soak.py`` plays, made piece by piece as it is asked for."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.commands.run import EXAMPLE
from stream_hbaf.config import SAMPLE_RATE_HZ

Sound = NDArray[np.int16]
Kind = Literal["speech", "dialogue", "silence", "noise", "music"]

RECORDINGS = Path(__file__).parents[1] / "tests" / "recordings"
CORPORA = ("ravdess/Actor_*/*.flac", "nemo/*.flac", "speech/librivox/*.flac", "speech/libri/*.ogg")
CLIPS = 400  # of the corpora that are kept in memory
HOUR_S = 3600
NOISE_S, MUSIC_S, SPEECH_BLOCKS = 300, 300, 3  # of an hour
SHORTEST_S, LONGEST_S = 0.5, 18.0  # of a clip: each is cut somewhere, so that no two are alike
PAUSE_S = 2.5  # mean, of speech
BREATHS_S = (0.2, 1.2)  # of a dialogue without a pause; some end an utterance
ROOM = 3.0  # of int16: the noise of a quiet room
SCALE_HZ = [220 * 2 ** (n / 12) for n in (0, 3, 5, 7, 10, 12, 15, 17, 19)]


@dataclass(frozen=True)
class Block:
    """Sound of one kind for a while."""

    kind: Kind
    seconds: float


def day(hours: float, *, speech: float, dialogue: int | None, seed: int) -> Iterator[Block]:
    """Each hour has a share of ``speech``, some noise and music, and silence, in random order.

    The hour with the number ``dialogue`` is one dialogue without a pause. Of a last hour that is
    cut short, each part is shorter.
    """
    for hour in range(math.ceil(hours)):
        length = min(1.0, hours - hour)
        if hour == dialogue:
            yield Block("dialogue", HOUR_S * length)
            continue
        spoken = HOUR_S * speech / SPEECH_BLOCKS
        quiet = (HOUR_S * (1 - speech) - NOISE_S - MUSIC_S) / SPEECH_BLOCKS
        parts: list[tuple[Kind, float]] = [("noise", NOISE_S), ("music", MUSIC_S)]
        parts += [("speech", spoken), ("silence", quiet)] * SPEECH_BLOCKS
        random.Random(seed + hour).shuffle(parts)
        yield from (Block(kind, seconds * length) for kind, seconds in parts if seconds > 0)


def load_clips(corpora: Path | None, *, seed: int) -> list[Sound]:
    """The recordings that the project carries, and some of the ``corpora``'s."""
    paths = [EXAMPLE, *sorted(RECORDINGS.glob("*.flac"))]
    if corpora is not None:
        found = sorted(path for pattern in CORPORA for path in corpora.glob(pattern))
        paths += random.Random(seed).sample(found, min(CLIPS, len(found)))
    return [read_audio(path) for path in paths]


def play(block: Block, clips: Sequence[Sound], *, chunk: int, seed: int) -> Iterator[Sound]:
    """The block's sound in pieces of some seconds, as a microphone in a room would give it.

    Each piece has a whole number of chunks of ``chunk`` samples, and so has the block.
    """
    draw = random.Random(seed)
    noise = np.random.default_rng(seed)
    left = round(block.seconds * SAMPLE_RATE_HZ)
    while left > 0:
        piece = _piece(block.kind, clips, draw=draw, noise=noise)[:left]
        piece = np.pad(piece, (0, -len(piece) % chunk))
        left -= len(piece)
        yield (piece + ROOM * noise.standard_normal(len(piece))).round().astype(np.int16)


def _piece(
    kind: Kind, clips: Sequence[Sound], *, draw: random.Random, noise: np.random.Generator
) -> NDArray[np.float64]:
    match kind:
        case "speech":
            return _speech(clips, draw=draw, pause_s=draw.expovariate(1 / PAUSE_S))
        case "dialogue":
            return _speech(clips, draw=draw, pause_s=draw.uniform(*BREATHS_S))
        case "noise":
            return _noise(draw, noise)
        case "music":
            return _music(draw)
    return np.zeros(10 * SAMPLE_RATE_HZ)


def _speech(clips: Sequence[Sound], *, draw: random.Random, pause_s: float) -> NDArray[np.float64]:
    """A part of a clip, somewhat quieter, and a pause."""
    clip = draw.choice(clips)
    length = round(draw.uniform(SHORTEST_S, LONGEST_S) * SAMPLE_RATE_HZ)
    start = draw.randrange(max(1, len(clip) - length))
    spoken = clip[start : start + length] * draw.uniform(0.4, 0.9)
    return np.concatenate([spoken, np.zeros(round(pause_s * SAMPLE_RATE_HZ))])


def _noise(draw: random.Random, noise: np.random.Generator) -> NDArray[np.float64]:
    """Ten seconds of noise, of any colour from white to brown."""
    spectrum = np.fft.rfft(noise.standard_normal(10 * SAMPLE_RATE_HZ))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** draw.uniform(0.0, 1.0)
    sound: NDArray[np.float64] = np.fft.irfft(spectrum)
    loud: NDArray[np.float64] = sound * draw.uniform(300, 4000) / sound.std()
    return loud.clip(-32000, 32000)


def _music(draw: random.Random) -> NDArray[np.float64]:
    """A chord of plucked tones with overtones, as long as a beat or a bar."""
    seconds = draw.choice((0.5, 1.0, 2.0))
    time = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    notes = draw.sample(SCALE_HZ, draw.randint(1, 4))
    tones = [np.sin(2 * np.pi * hz * n * time) / n**1.5 for hz in notes for n in range(1, 6)]
    mixed: NDArray[np.float64] = np.sum(tones, axis=0) * np.exp(-2 * time / seconds)
    mixed *= 6000 / np.abs(mixed).max()
    return mixed
