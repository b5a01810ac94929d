"""Transcribes utterances with Whisper, and gives no text where there is no speech.

An utterance is decoded greedily in a short window (``whisper_encoder``). Text that repeats itself
is decoded again in Whisper's full window of 30 s. If it still does, it is shortened where somebody
certainly speaks; what remains doubtful is discarded.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from stream_hbaf.config import SAMPLE_RATE_HZ, TranscriptConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.features.whisper_encoder import (
    LONGEST_S,
    MARGIN_S,
    Float32,
    Int16,
    WhisperEncoder,
    mean_state,
    window_of,
)

SHORTEST_MS = 100  # no word is shorter, but Whisper finds some in less
MAX_TOKENS = 400  # Whisper's positions, less the prompt
TOKENS_PER_S = 12  # faster than anybody speaks, slower than a decoder in a loop
TOKENS_FREE = 8
MAX_WORDS_PER_S = 7.0
MAX_COMPRESSION = 2.4  # text that compresses better repeats itself (Whisper's own limit)
SHORTEST_LOOP = 3  # words; "no no" is real speech, the same three twice in a row seldom
# Repetitions that somebody really says have at least these mean speech scores and log probabilities
# (twenty read repetitions: 0.58 and -0.53), and at most this no-speech probability (0.76).
SURE_SPEECH, SURE_LOGPROB, SURE_NO_SPEECH = 0.5, -0.6, 0.8
STUTTER = re.compile(
    r"([^\W\d_][\w'-]{0,7}?)\1{3,}", re.IGNORECASE
)  # "hahahaha", "Buh-buh-buh-buh"
STUTTERS_KEPT = 3


@dataclass(frozen=True)
class Transcript:
    """The text of an utterance; empty without speech, or if the text can't be trusted.

    ``avg_logprob`` and ``no_speech_prob`` are 0 and 1 when nothing was decoded: the sound is
    hardly speech, or certainly in another ``language`` than the one asked for. ``encoder_mean`` is
    the mean state [D] of the acoustic input's Whisper encoder over the utterance: None for a
    partial transcript, and where the sound is hardly speech.
    """

    text: str
    language: str
    avg_logprob: float
    no_speech_prob: float
    encoder_mean: Float32 | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class _Decoded:
    text: str
    avg_logprob: float
    no_speech_prob: float
    is_complete: bool  # the decoder ended it within the tokens that the duration allows


NOTHING_DECODED = _Decoded("", avg_logprob=0.0, no_speech_prob=1.0, is_complete=True)


class Transcribing(Protocol):
    """What transcribes, here or elsewhere; every method as ``Transcriber``'s."""

    @property
    def encoder_width(self) -> int:
        """D, the width of a final transcript's ``encoder_mean``."""

    def final(
        self,
        samples: Int16,
        speech_score: float,
        *,
        decode: bool = True,
        abandon: Callable[[], bool] = lambda: False,
    ) -> Transcript:
        """The transcript of a whole utterance."""

    def partial(self, samples: Int16, abandon: Callable[[], bool]) -> Transcript | None:
        """The transcript of an utterance that isn't over."""


class Transcriber:
    """Transcribes with one Whisper model; the same samples give the same transcript.

    ``acoustic_encoder`` names the Whisper model whose encoder gives ``encoder_mean``; the
    transcribing model costs nothing more, another one is loaded and run besides. Thread-safe:
    ``decoders()`` calls run at once, and share the weights. Raises ModelError when weights can't be
    found or loaded, ConfigError when the model doesn't know the language.
    """

    def __init__(
        self, config: TranscriptConfig, *, acoustic_encoder: str | None = None, device: str = "cpu"
    ) -> None:
        self._config = config
        self._encoder = WhisperEncoder(config.model, device=device)
        self._acoustic_encoder = self._encoder
        if acoustic_encoder not in (None, config.model):
            self._acoustic_encoder = WhisperEncoder(acoustic_encoder, device=device)
        self._model = self._encoder.whisper.model
        _check_language(config, known=self._encoder.whisper.supported_languages)
        self._tokenizer = self._encoder.tokenizer(config.language)
        self._prompt = [*self._tokenizer.sot_sequence, self._tokenizer.no_timestamps]
        # As for the encoder: the first call allocates.
        silence = np.zeros(SAMPLE_RATE_HZ, np.int16)
        self._generate(self._encoder.encode(silence, window_s=MARGIN_S), limit=1)

    @property
    def encoder_width(self) -> int:
        """D, the width of a final transcript's ``encoder_mean``."""
        return self._acoustic_encoder.width

    def final(
        self,
        samples: Int16,
        speech_score: float,
        *,
        decode: bool = True,
        abandon: Callable[[], bool] = lambda: False,
    ) -> Transcript:
        """The transcript of a whole utterance, int16 [n] of at most 30 s.

        ``speech_score`` is the utterance's mean VAD score: sound that hardly counts as speech is
        neither encoded nor decoded. Unless ``decode``, sound is encoded for ``encoder_mean`` only.
        Once ``abandon()`` is true nobody wants the transcript: what is left is not computed.
        """
        _check_length(samples)
        if speech_score < self._config.min_speech_score or not _can_hold_words(samples):
            return self._transcript(NOTHING_DECODED)
        encoded = self._encoder.encode(samples, window_s=window_of(samples))
        if abandon():
            return self._transcript(NOTHING_DECODED)
        if self._acoustic_encoder is self._encoder:
            mean = mean_state(encoded, samples)
        else:
            mean = self._acoustic_encoder.embed(samples)
        if abandon():
            return self._transcript(NOTHING_DECODED)
        other = self._other_language(encoded) if decode else None
        if other is not None or not decode:
            return self._transcript(NOTHING_DECODED, language=other, encoder_mean=mean)
        decoded = self._generate(encoded, limit=_token_limit(samples))
        if not decoded.is_complete or find_loop(decoded.text) is not None:
            encoded = self._encoder.encode(samples, window_s=LONGEST_S)
            decoded = self._generate(encoded, limit=_token_limit(samples))
        duration_s = len(samples) / SAMPLE_RATE_HZ
        if self._is_invented(decoded, duration_s=duration_s):
            short = replace(decoded, text=shorten_loops(decoded.text), is_complete=True)
            is_said = _is_repetition(decoded, speech_score=speech_score)
            invented = not is_said or self._is_invented(short, duration_s=duration_s)
            decoded = replace(decoded, text="") if invented else short
        return self._transcript(decoded, encoder_mean=mean)

    def partial(self, samples: Int16, abandon: Callable[[], bool]) -> Transcript | None:
        """The transcript of an utterance that isn't over, or None once ``abandon()`` is true.

        ``abandon`` is asked before encoding and before decoding, so that a final transcript that
        waits for this thread starts soon. The acoustic input's encoder isn't run: a provisional
        emotion is read from the text alone.
        """
        _check_length(samples)
        if abandon():
            return None
        if not _can_hold_words(samples):
            return self._transcript(NOTHING_DECODED)
        encoded = self._encoder.encode(samples, window_s=window_of(samples))
        if abandon():
            return None
        if (other := self._other_language(encoded)) is not None:
            return self._transcript(NOTHING_DECODED, language=other)
        decoded = self._generate(encoded, limit=_token_limit(samples))
        # A repetition is shortened, not decoded again, for the next partial is near.
        text = "" if self._is_uncertain(decoded) else shorten_loops(decoded.text)
        return self._transcript(replace(decoded, text=text))

    def _other_language(self, encoded: Any) -> str | None:
        """The likeliest language, if the sound is certainly not in the configured one.

        Whisper would invent text in the configured language all the same.
        """
        if not self._model.is_multilingual:
            return None
        config = self._config
        ranked = self._model.detect_language(encoded)[0]
        probabilities: dict[str, float] = {token.strip("<|>"): prob for token, prob in ranked}
        if probabilities[config.language] >= config.min_language_prob:
            return None
        return max(probabilities, key=probabilities.__getitem__)

    def _transcript(
        self, decoded: _Decoded, *, language: str | None = None, encoder_mean: Float32 | None = None
    ) -> Transcript:
        return Transcript(
            decoded.text,
            language or self._config.language,
            decoded.avg_logprob,
            decoded.no_speech_prob,
            encoder_mean,
        )

    def _generate(self, encoded: Any, *, limit: int) -> _Decoded:
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
        # The score's sum includes the end of text; its mean is over the tokens before it.
        log_prob = result.scores[0] * len(tokens) if tokens else 0.0
        return _Decoded(
            text=self._tokenizer.decode(tokens).strip(),
            avg_logprob=log_prob / (len(tokens) + 1),
            no_speech_prob=float(result.no_speech_prob),
            is_complete=len(tokens) < limit,
        )

    def _is_uncertain(self, decoded: _Decoded) -> bool:
        config = self._config
        doubtful = decoded.avg_logprob < config.min_avg_logprob or find_loop(decoded.text)
        return decoded.no_speech_prob > config.max_no_speech_prob and bool(doubtful)

    def _is_invented(self, decoded: _Decoded, *, duration_s: float) -> bool:
        return (
            self._is_uncertain(decoded)
            or not decoded.is_complete
            or _compression(decoded.text) > MAX_COMPRESSION
            or len(decoded.text.split()) > 2 + MAX_WORDS_PER_S * duration_s
        )


def find_loop(text: str) -> int | None:
    """The number of words after which at least the last three of them are repeated."""
    loop = _find_loop(_plain_words(text))
    return loop[0] if loop else None


def shorten_loops(text: str) -> str:
    """The text with each repetition once: "No, no, no, no, no, no! Stop." is "No, no, no, Stop."

    Within a word three repetitions are left.
    """
    words, plain = text.split(), _plain_words(text)
    while loop := _find_loop(plain):
        start, n = loop
        end = start
        while end < len(plain) and plain[end] == plain[end - n]:
            end += 1
        del words[start:end], plain[start:end]

    def shorten(found: re.Match[str]) -> str:
        return found[0][: STUTTERS_KEPT * len(found[1])]

    return STUTTER.sub(shorten, " ".join(words))


def _plain_words(text: str) -> list[str]:
    return ["".join(filter(str.isalnum, word)).lower() for word in text.split()]


def _find_loop(words: Sequence[str]) -> tuple[int, int] | None:
    """Where the first repetition begins, and how many words it repeats."""
    for end in range(SHORTEST_LOOP, len(words)):
        for n in range(SHORTEST_LOOP, min(end, len(words) - end) + 1):
            if words[end - n : end] == words[end : end + n]:
                return end, n
    return None


def _is_repetition(decoded: _Decoded, *, speech_score: float) -> bool:
    """Whether somebody certainly speaks, and repeats words or syllables."""
    return (
        shorten_loops(decoded.text) != decoded.text
        and speech_score >= SURE_SPEECH
        and decoded.avg_logprob >= SURE_LOGPROB
        and decoded.no_speech_prob <= SURE_NO_SPEECH
    )


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


def _check_length(samples: Int16) -> None:
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise TypeError(f"sound must be int16 [n], not {samples.dtype} {list(samples.shape)}")
    if len(samples) > LONGEST_S * SAMPLE_RATE_HZ:
        raise ValueError(f"an utterance of {len(samples) / SAMPLE_RATE_HZ:.1f} s is over 30 s")


def _can_hold_words(samples: Int16) -> bool:
    return len(samples) * 1000 >= SHORTEST_MS * SAMPLE_RATE_HZ and bool(samples.any())


def _token_limit(samples: Int16) -> int:
    return min(MAX_TOKENS, TOKENS_FREE + len(samples) * TOKENS_PER_S // SAMPLE_RATE_HZ)


def _compression(text: str) -> float:
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))
