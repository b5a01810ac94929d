"""An utterance becomes features: its words, from Whisper, and none where nobody spoke.

The only file that imports faster_whisper. Whisper was made for windows of 30 s and spends the
same time on a word as on half a minute. Here the window is the utterance and eight seconds of
silence after it, which takes a quarter of the time and reads as well (tools/measure_asr.py). With
less silence it starts to say things twice; what looks like that is read again in a whole window.
"""

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import get_ctranslate2_storage
from faster_whisper.utils import _MODELS as HUB_NAMES
from faster_whisper.utils import download_model
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ, TranscriptConfig
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.features.pretrained import download
from stream_hbaf.features.whisper_weights import (
    resolve_whisper as resolve_whisper,  # ours to offer, too
)

LOG = logging.getLogger(__name__)

SHORTEST_MS = 100  # no word is shorter; Whisper finds some all the same
LONGEST_S = 30  # what Whisper's positions reach to
MARGIN_S = 8  # of silence after the utterance
STEP_S = 0.2  # windows are whole steps
HOP = 160  # samples a frame
FFT = 400
ENCODED_HOP = 2 * HOP  # samples a state of the encoder
LOUDEST = 1.0  # on the spectrogram's scale: each utterance is as loud for Whisper
DYNAMIC_RANGE = 8.0  # powers of ten below the loudest: the floor of Whisper's spectrogram
BLOCK = 16  # frames multiplied at once: larger products wake BLAS's threads, at 16 ms a time

MAX_THREADS = 4  # more don't make so small a model faster
MAX_TOKENS = 400  # Whisper's positions, less the prompt
TOKENS_PER_S = 12  # nobody speaks faster; a decoder in a loop does
TOKENS_FREE = 8
MAX_WORDS_PER_S = 7.0
MAX_COMPRESSION = 2.4  # text that packs better than this repeats itself (Whisper's own limit)
SHORTEST_LOOP = 3  # words; "no no" is real, the same three twice in a row seldom

FILES = ("model.bin", "config.json", "tokenizer.json")
DOWNLOADED = [*FILES, "preprocessor_config.json", "vocabulary.*"]


@dataclass(frozen=True)
class Transcript:
    """What was said; ``text`` is empty when nothing was, or nothing that can be trusted.

    ``avg_logprob`` and ``no_speech_prob`` are 0 and 1 when nothing was decoded: it hardly was
    speech, or surely another ``language`` than the one asked for. ``sound`` is what Whisper's
    encoder heard, the mean over the utterance [D]; None where it hardly was speech.
    """

    text: str
    language: str
    avg_logprob: float
    no_speech_prob: float
    sound: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class _Reading:
    text: str
    avg_logprob: float
    no_speech_prob: float
    complete: bool  # it came to its own end within the tokens that its duration allows


class WhisperEncoder:
    """What a Whisper model hears in an utterance, before it looks for words.

    Each utterance is brought to one level, so that how loud it is tells next to nothing; the same
    sound gives the same states. ``version`` names the weights, by their size in bytes. Not for use
    from two threads at once. Raises ModelError when the weights can't be found or loaded.
    """

    def __init__(self, name: str, *, device: str = "cpu", threads: int = MAX_THREADS) -> None:
        folder = _locate(name)
        self.version = f"ct2-{(folder / 'model.bin').stat().st_size}"
        self.whisper = _load(folder, device=device, threads=threads)
        # The first call allocates; and a folder that loads but can't be used is found out here.
        self.width = self.describe(np.zeros(SAMPLE_RATE_HZ, np.int16)).size

    def describe(self, samples: NDArray[np.int16]) -> NDArray[np.float32]:
        """The mean of the encoder's states over an utterance of at most 30 s: [n] -> [D]."""
        return pool(self.encode(samples, window_s=_window_s(samples)), samples)

    def encode(self, samples: NDArray[np.int16], *, window_s: float) -> Any:
        """The encoder's states [1, 50 window_s, D], as CTranslate2 holds them."""
        mel = log_mel(samples, filters=self.whisper.feature_extractor.mel_filters)
        mel += LOUDEST - mel.max()
        frames = round(window_s * SAMPLE_RATE_HZ / HOP)
        # What Whisper would see if digital silence followed: its spectrogram's floor.
        window = np.full((1, mel.shape[0], frames), LOUDEST - DYNAMIC_RANGE / 4, np.float32)
        window[0, :, : mel.shape[1]] = mel[:, :frames]
        return self.whisper.model.encode(get_ctranslate2_storage(window), to_cpu=True)


def pool(encoded: Any, samples: NDArray[np.int16]) -> NDArray[np.float32]:
    """The mean [D] of the states that belong to the utterance and not to the silence after it."""
    states = np.asarray(encoded)[0]
    own = max(1, min(len(states), round(len(samples) / ENCODED_HOP)))
    mean: NDArray[np.float32] = states[:own].mean(0, dtype=np.float32)
    return mean


class Transcriber:
    """Turns utterances into words with one Whisper model; the same sound gives the same words.

    ``ear`` names the Whisper model whose encoder describes the sound; the transcribing one costs
    nothing more. Not for use from two threads at once. Raises ModelError when weights can't be
    found or loaded, ConfigError when the model doesn't know the language.
    """

    def __init__(
        self, config: TranscriptConfig, *, ear: str | None = None, device: str = "cpu"
    ) -> None:
        self._config = config
        self._encoder = WhisperEncoder(config.model, device=device)
        self._ear = self._encoder
        if ear not in (None, config.model):
            self._ear = WhisperEncoder(ear, device=device)
        self._model = self._encoder.whisper.model
        _check_language(config, known=self._encoder.whisper.supported_languages)
        self._tokenizer = Tokenizer(
            self._encoder.whisper.hf_tokenizer,
            self._model.is_multilingual,
            task="transcribe",
            language=config.language,
        )
        self._told_of_other = False  # said once: it's no use to read it at every utterance
        self._prompt = [*self._tokenizer.sot_sequence, self._tokenizer.no_timestamps]
        # As for the encoder: the first call allocates.
        silence = np.zeros(SAMPLE_RATE_HZ, np.int16)
        self._generate(self._encoder.encode(silence, window_s=MARGIN_S), limit=1)

    @property
    def ear_width(self) -> int:
        """How wide a transcript's ``sound`` is."""
        return self._ear.width

    def final(
        self, samples: NDArray[np.int16], speech_score: float, *, write: bool = True
    ) -> Transcript:
        """The words of a whole utterance, int16 [n] of at most 30 s.

        ``speech_score`` is the mean VAD score of the utterance: sound that hardly counts as
        speech isn't decoded at all. Unless ``write``, no words are looked for in the rest either.
        """
        _check_length(samples)
        if speech_score < self._config.min_speech_score or not _can_hold_words(samples):
            return self._silence()
        encoded = self._encoder.encode(samples, window_s=_window_s(samples))
        sound = self._describe(samples, encoded)
        if not write:
            return self._silence(sound=sound)
        if (other := self._other_language(encoded)) is not None:
            return self._silence(other, sound=sound)
        reading = self._generate(encoded, limit=_token_limit(samples))
        if not reading.complete or find_loop(reading.text) is not None:
            encoded = self._encoder.encode(samples, window_s=LONGEST_S)
            reading = self._generate(encoded, limit=_token_limit(samples))
        invented = self._is_invented(reading, duration_s=len(samples) / SAMPLE_RATE_HZ)
        return self._transcript("" if invented else reading.text, reading, sound=sound)

    def partial(self, samples: NDArray[np.int16], abandon: Callable[[], bool]) -> Transcript | None:
        """The running words of an utterance that isn't over, or None once ``abandon()`` is true.

        ``abandon`` is asked before encoding and before generating, so that somebody who waits for
        this thread gets it soon.
        """
        _check_length(samples)
        if abandon():
            return None
        if not _can_hold_words(samples):
            return self._silence()
        encoded = self._encoder.encode(samples, window_s=_window_s(samples))
        if abandon():
            return None
        sound = self._describe(samples, encoded)
        if (other := self._other_language(encoded)) is not None:
            return self._silence(other, sound=sound)
        reading = self._generate(encoded, limit=_token_limit(samples))
        # Said twice: cut rather than read again, for the next partial is near.
        loop = find_loop(reading.text)
        text = "" if self._is_uncertain(reading) else " ".join(reading.text.split()[:loop])
        return self._transcript(text, reading, sound=sound)

    def _silence(
        self, language: str | None = None, *, sound: NDArray[np.float32] | None = None
    ) -> Transcript:
        return Transcript("", language or self._config.language, 0.0, 1.0, sound)

    def _other_language(self, encoded: Any) -> str | None:
        """What this sounds like, if it surely isn't in the language to be written down.

        Whisper would write words all the same: made up, in the language that it was told.
        """
        if not self._model.is_multilingual:
            return None
        config = self._config
        said = self._model.detect_language(encoded)[0]
        known: dict[str, float] = {token.strip("<|>"): prob for token, prob in said}
        if known[config.language] >= config.min_language_prob:
            return None
        likeliest = max(known, key=known.__getitem__)
        if not self._told_of_other:
            self._told_of_other = True
            LOG.warning(
                "that sounded like language '%s', not '%s': its words are left out; "
                "--language %s writes them down",
                likeliest,
                config.language,
                likeliest,
            )
        return likeliest

    def _transcript(
        self, text: str, reading: _Reading, *, sound: NDArray[np.float32]
    ) -> Transcript:
        language = self._config.language
        return Transcript(text, language, reading.avg_logprob, reading.no_speech_prob, sound)

    def _describe(self, samples: NDArray[np.int16], encoded: Any) -> NDArray[np.float32]:
        if self._ear is self._encoder:
            return pool(encoded, samples)
        return self._ear.describe(samples)

    def _generate(self, encoded: Any, *, limit: int) -> _Reading:
        """Greedy, without timestamps, at most ``limit`` tokens."""
        result = self._model.generate(
            encoded,
            [self._prompt],
            beam_size=1,
            max_length=len(self._prompt) + limit,
            return_scores=True,
            return_no_speech_prob=True,
        )[0]
        tokens = result.sequences_ids[0]
        # The score is a mean that leaves out the end of text, though its probability counts.
        log_prob = result.scores[0] * len(tokens) if tokens else 0.0
        return _Reading(
            text=self._tokenizer.decode(tokens).strip(),
            avg_logprob=log_prob / (len(tokens) + 1),
            no_speech_prob=float(result.no_speech_prob),
            complete=len(tokens) < limit,
        )

    def _is_uncertain(self, reading: _Reading) -> bool:
        config = self._config
        doubtful = reading.avg_logprob < config.min_avg_logprob or find_loop(reading.text)
        return reading.no_speech_prob > config.max_no_speech_prob and bool(doubtful)

    def _is_invented(self, reading: _Reading, *, duration_s: float) -> bool:
        return (
            self._is_uncertain(reading)
            or not reading.complete
            or _compression(reading.text) > MAX_COMPRESSION
            or len(reading.text.split()) > 2 + MAX_WORDS_PER_S * duration_s
        )


def log_mel(samples: NDArray[np.int16], *, filters: NDArray[np.float32]) -> NDArray[np.float32]:
    """Whisper's spectrogram of sound with silence after it: float32 [mels, 1 + n // 160 + 1].

    The same figures as Whisper's own; ``filters`` is [mels, 201].
    """
    sound = np.concatenate((samples.astype(np.float32) / 32768, np.zeros(FFT, np.float32)))
    padded = np.concatenate((sound[FFT // 2 : 0 : -1], sound))  # frames are centred
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP]
    hann = np.hanning(FFT + 1)[:-1].astype(np.float32)
    blocks = []
    for start in range(0, len(frames), BLOCK):
        spectrum = np.fft.rfft(frames[start : start + BLOCK] * hann)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        blocks.append(filters @ power.T)
    log = np.log10(np.maximum(np.concatenate(blocks, axis=1), 1e-10))
    scaled: NDArray[np.float32] = (np.maximum(log, log.max() - DYNAMIC_RANGE) + 4.0) / 4.0
    return scaled.astype(np.float32)


def find_loop(text: str) -> int | None:
    """The number of words after which at least the last three of them are said once more."""
    words = ["".join(filter(str.isalnum, word)).lower() for word in text.split()]
    for end in range(SHORTEST_LOOP, len(words)):
        for n in range(SHORTEST_LOOP, min(end, len(words) - end) + 1):
            if words[end - n : end] == words[end : end + n]:
                return end
    return None


def find_whisper(name: str) -> Path | None:
    """The folder of a model that is on this machine: given, in a package or in the hub's cache."""
    folder = Path(resolve_whisper(name))
    if folder.is_dir():
        return folder
    try:
        return Path(download_model(name, local_files_only=True))
    except Exception as error:  # noqa: BLE001  # any failure to find it here means: it isn't
        LOG.debug("%s is not in the hub's cache: %s", name, error)
        return None


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


def _load(folder: Path, *, device: str, threads: int) -> WhisperModel:
    try:
        return WhisperModel(
            str(folder),
            device=device,
            compute_type="float16" if device == "cuda" else "int8",
            cpu_threads=min(threads, len(os.sched_getaffinity(0))),
            local_files_only=True,
        )
    except Exception as error:  # the tokenizer's own errors have no narrower class
        advice = "try --device cpu" if device == "cuda" else "it is damaged: install it again"
        raise ModelError(
            f"speech recognition: {folder} can't be loaded ({_first_line(error)}); {advice}"
        ) from error


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


def _check_language(config: TranscriptConfig, *, known: Sequence[str]) -> None:
    if config.language in known:
        return
    if list(known) == ["en"]:
        raise ConfigError(
            f"language '{config.language}': the Whisper model {config.model} knows English only; "
            "use a multilingual one, such as the default, --asr base"
        )
    raise ConfigError(
        f"language '{config.language}': not a code that Whisper knows; use one such as en, de, fr"
    )


def _check_length(samples: NDArray[np.int16]) -> None:
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise TypeError(f"sound must be int16 [n], not {samples.dtype} {list(samples.shape)}")
    if len(samples) > LONGEST_S * SAMPLE_RATE_HZ:
        raise ValueError(f"an utterance of {len(samples) / SAMPLE_RATE_HZ:.1f} s is over 30 s")


def _can_hold_words(samples: NDArray[np.int16]) -> bool:
    return len(samples) * 1000 >= SHORTEST_MS * SAMPLE_RATE_HZ and bool(samples.any())


def _window_s(samples: NDArray[np.int16]) -> float:
    steps = -(-len(samples) // round(STEP_S * SAMPLE_RATE_HZ))
    return min(float(LONGEST_S), steps * STEP_S + MARGIN_S)


def _token_limit(samples: NDArray[np.int16]) -> int:
    return min(MAX_TOKENS, TOKENS_FREE + len(samples) * TOKENS_PER_S // SAMPLE_RATE_HZ)


def _compression(text: str) -> float:
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
