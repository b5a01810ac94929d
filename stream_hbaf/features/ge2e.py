"""Embeds a voice with the GE2E speaker encoder (Wan et al. 2018) that ``resemblyzer`` carries.

The weights are the package's. Its preprocessing is reproduced here, because the package depends on
libraries that nothing else needs: louder if too quiet, long silences out by WebRTC's detector, 40
mel bands, windows of 1.6 s that overlap by half. tests/test_ge2e.py compares with the package.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError
from stream_hbaf.features.pretrained import package_folder, require_digest
from stream_hbaf.speech.vad import webrtc_flags

Float32 = NDArray[np.float32]

GE2E_WIDTH = 256
SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
INSTALL = "pip install --no-deps resemblyzer==0.1.4"

FULL_SCALE = np.float32(32768)
LOUDNESS_DBFS = -30.0  # quieter audio is raised to it
VAD_FRAME_MS = 30
VAD_SMOOTHING = 8  # frames of the moving average of the detector's decisions
VAD_MARGIN = 3  # frames kept on each side of speech
WINDOW_SAMPLES = 400  # of a spectrum; 25 ms
HOP_SAMPLES = 160  # 10 ms: a mel frame
MEL_BANDS = 40
PARTIAL_FRAMES = 160  # of one embedding; 1.6 s
PARTIAL_STEP = 77  # frames
LEAST_COVERED = 0.75  # share of the last window that audio covers, else it is left out


class _Encoder(nn.Module):
    """Mel frames [B, 160, 40] → unit-length embeddings [B, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MEL_BANDS, GE2E_WIDTH, num_layers=3, batch_first=True)
        self.linear = nn.Linear(GE2E_WIDTH, GE2E_WIDTH)

    def forward(self, frames: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(frames)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


class Ge2e:
    """An utterance's embedding: the normalised mean of its windows' embeddings.

    Raises ModelError if the package isn't installed, or carries other weights.
    """

    name = "ge2e"
    width = GE2E_WIDTH
    version = f"1-{SHA256[:12]}"

    def __init__(self, *, device: str = "cpu") -> None:
        self._device = torch.device(device)
        weights = find_ge2e()
        if weights is None:
            raise ModelError(f"ge2e: resemblyzer, which carries its weights, is missing; {INSTALL}")
        require_digest(weights, SHA256, use="ge2e", install=INSTALL)
        states = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self._encoder = _Encoder()
        own = self._encoder.state_dict()
        self._encoder.load_state_dict({name: states[name] for name in own})
        self._encoder.eval().to(self._device)
        self._mel = torch.from_numpy(mel_bands())  # [201, 40]
        self._hann = torch.hann_window(WINDOW_SAMPLES)

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance (int16 [n], mono, 16 kHz) → [256]; None under 30 ms or for silence."""
        windows = self.windows(samples)
        if windows is None:
            return None
        mean = windows.mean(axis=0, dtype=np.float64)
        embedding: Float32 = (mean / np.linalg.norm(mean)).astype(np.float32)
        return embedding

    def windows(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance → the embeddings of its windows [F, 256], one every 0.77 s."""
        if not samples.any():
            return None
        audio = trim_silence(raise_level(samples.astype(np.float32) / FULL_SCALE))
        if not len(audio):
            return None
        starts = window_starts(len(audio))
        audio = np.pad(audio, (0, max(0, (starts[-1] + PARTIAL_FRAMES) * HOP_SAMPLES - len(audio))))
        with torch.inference_mode():
            frames = self._mel_frames(torch.from_numpy(audio))
            batch = torch.stack([frames[start : start + PARTIAL_FRAMES] for start in starts])
            embeddings: Float32 = self._encoder(batch.to(self._device)).cpu().numpy()
        return embeddings

    def _mel_frames(self, audio: Tensor) -> Tensor:
        """Audio [n] → mel power [T, 40], not logarithmic, as the encoder was trained with."""
        spectrum = torch.stft(
            audio,
            n_fft=WINDOW_SAMPLES,
            hop_length=HOP_SAMPLES,
            window=self._hann,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum.abs().square().T @ self._mel

    def close(self) -> None:
        """Nothing to free."""


def mel_bands() -> Float32:
    """Weights [201, 40] of a spectrum's bins in 40 triangular bands of equal area up to 8 kHz.

    The bands' edges are evenly spaced on Slaney's mel scale: linear below 1 kHz (15 mel), above
    it logarithmic with 27 mel for each factor of 6.4.
    """
    highest_hz = SAMPLE_RATE_HZ / 2
    mel = np.linspace(0.0, 15 + 27 * np.log(highest_hz / 1000) / np.log(6.4), MEL_BANDS + 2)
    edges_hz = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    bins_hz = np.linspace(0.0, highest_hz, WINDOW_SAMPLES // 2 + 1)[:, None]
    low, middle, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rise, fall = (bins_hz - low) / (middle - low), (high - bins_hz) / (high - middle)
    bands: Float32 = (np.minimum(rise, fall).clip(min=0) * 2 / (high - low)).astype(np.float32)
    return bands


def find_ge2e() -> Path | None:
    """The file of the encoder's weights, without importing the package; None if not installed."""
    folder = package_folder("resemblyzer")
    weights = None if folder is None else folder / "pretrained.pt"
    return weights if weights is not None and weights.is_file() else None


def raise_level(audio: Float32) -> Float32:
    """Audio [n] in [-1, 1], raised to -30 dBFS (root mean square) if it is quieter."""
    level_dbfs = 10 * np.log10(np.mean(np.square(audio, dtype=np.float64)))
    gain = 10 ** (max(0.0, LOUDNESS_DBFS - level_dbfs) / 20)
    return audio * np.float32(gain)


def trim_silence(audio: Float32) -> Float32:
    """Audio [n] without its long silences; whole frames of 30 ms.

    Where the detector finds no speech at all, everything is kept: a whisper is an utterance, too.
    """
    flags = webrtc_flags(
        np.round(audio.clip(-1, 1) * (FULL_SCALE - 1)).astype(np.int16), frame_ms=VAD_FRAME_MS
    )
    if not len(flags):
        return audio[:0]
    frame = VAD_FRAME_MS * SAMPLE_RATE_HZ // 1000
    padded = np.pad(flags.astype(np.float64), ((VAD_SMOOTHING - 1) // 2, VAD_SMOOTHING // 2))
    smooth = np.convolve(padded, np.full(VAD_SMOOTHING, 1 / VAD_SMOOTHING), mode="valid")
    speech = np.round(smooth).astype(bool)
    around = np.convolve(speech, np.ones(2 * VAD_MARGIN + 1))
    kept = around[VAD_MARGIN : VAD_MARGIN + len(flags)] > 0.5
    whole = audio[: len(flags) * frame]
    return whole[np.repeat(kept, frame)] if kept.any() else whole


def window_starts(samples: int) -> list[int]:
    """The first mel frame of each window of an audio of so many samples; at least one window."""
    frames = -(-(samples + 1) // HOP_SAMPLES)
    starts = list(range(0, max(1, frames - PARTIAL_FRAMES + PARTIAL_STEP + 1), PARTIAL_STEP))
    covered = (samples - starts[-1] * HOP_SAMPLES) / (PARTIAL_FRAMES * HOP_SAMPLES)
    return starts[:-1] if len(starts) > 1 and covered < LEAST_COVERED else starts
