"""An utterance becomes features: its sound as one vector, from whichever front end is named.

The recogniser streams ComParE, and has what Whisper's encoder heard on its way to the words; this
is the interface behind which the corpora's sound is compared: both of these, openSMILE's other
sets, and self-supervised speech encoders. VGGish and openL3, which the paper also compares, aren't
among them: no package that offers them is still looked after.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.features import acoustic
from stream_hbaf.features.acoustic import (
    COMPARE,
    EGEMAPS,
    LLD_MS,
    OPENSMILE_VERSION,
    Acoustic,
    AcousticExtractor,
    FeatureSet,
)
from stream_hbaf.features.tokens import MOST_TOKENS, from_rows, to_row, to_tokens
from stream_hbaf.features.whisper_encoder import WhisperEncoder

if TYPE_CHECKING:
    from stream_hbaf.features.speech_encoder import SpeechEncoder

Float32 = NDArray[np.float32]

OPENSMILE = ("compare", "egemaps", "mfcc")
MFCC = 14  # ComParE's low-level descriptors hold coefficients 1 to 14
LLD = "lld"  # ComParE's low-level descriptors, as tokens
TOKENS = "tokens:"  # and a speech encoder's name: its states, as tokens
WHISPER = "whisper:"  # and a model's name: the mean of its encoder's states
VERSION = "1"  # rises when what is made of openSMILE's rows changes: old caches are then left alone
STATE_MS = 20  # of wav2vec 2.0 and its relatives
NOT_OFFERED = ("vggish", "openl3")


class AcousticRepresentation(Protocol):
    """Whatever turns the sound of an utterance into one vector."""

    @property
    def name(self) -> str:
        """What it is called in configurations and caches."""

    @property
    def version(self) -> str:
        """Changes whenever the same sound might give other features."""

    @property
    def width(self) -> int: ...

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance (int16 [n], mono, 16 kHz) -> [width]; None if it is too short for any."""

    def close(self) -> None: ...


def open_representation(name: str, *, device: str = "cpu") -> AcousticRepresentation:
    """Open "compare", "egemaps", "mfcc", "whisper:" and the name of a Whisper model, a speech
    encoder by its folder or its name on the hub, or several side by side, such as "compare+mfcc".
    Tokens in one row (``tokens.from_rows``): "lld", or "tokens:" and a speech encoder.

    ``device`` is for encoders; openSMILE knows the processor only. Raises ModelError if it can't
    be had, ConfigError for "prosody", which is read from a corpus's tables and not from sound.
    """
    if "+" in name:
        return SideBySide([open_representation(part, device=device) for part in name.split("+")])
    if name.startswith(WHISPER):
        return WhisperRepresentation(name, device=device)
    if name in OPENSMILE:
        return OpenSmileRepresentation(name)
    if name == LLD:
        return LldTokens()
    if name == "prosody":
        raise ConfigError(
            "prosody: comes from a corpus's tables, not from sound; "
            f"choose {', '.join(OPENSMILE)} or a speech encoder"
        )
    if name in NOT_OFFERED:
        raise ModelError(
            f"{name}: no maintained package offers it; "
            f"choose {', '.join(OPENSMILE)} or a speech encoder"
        )
    # Seconds and hundreds of megabytes of libraries, which openSMILE's sets need not pay.
    from stream_hbaf.features.speech_encoder import SpeechEncoder

    if name.startswith(TOKENS):
        return EncoderTokens(name, SpeechEncoder(name.removeprefix(TOKENS), device=device))
    return SpeechEncoder(name, device=device)


class OpenSmileRepresentation:
    """openSMILE's vectors: one instance of the library, used again for every utterance.

    "compare": the 6373 functionals of ComParE 2016. "egemaps": the 88 of eGeMAPSv02. "mfcc": mean
    and standard deviation over frames of ComParE's coefficients 1-14, 28 values. Raises ModelError
    if openSMILE can't be started.
    """

    def __init__(self, name: str) -> None:
        feature_set: FeatureSet = EGEMAPS if name == "egemaps" else COMPARE
        self.name = name
        self.version = f"{VERSION}-opensmile{OPENSMILE_VERSION}"
        self.width = 2 * MFCC if name == "mfcc" else feature_set.functionals_width
        self._extractor = AcousticExtractor(feature_set)

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance -> [width]; None under 60 ms. Raises ModelError if openSMILE fails."""
        result = self._extractor.extract(samples)
        if result is None:
            return None
        return _mfcc(result) if self.name == "mfcc" else result.functionals

    def close(self) -> None:
        """Free openSMILE's instance."""
        self._extractor.close()


class LldTokens:
    """ComParE's 65 low-level descriptors as at most 64 tokens, in one row.

    Raises ModelError if openSMILE can't be started.
    """

    def __init__(self) -> None:
        self.name = LLD
        self.version = f"{VERSION}-opensmile{OPENSMILE_VERSION}"
        self.width = MOST_TOKENS * acoustic.LLD_WIDTH
        self._extractor = AcousticExtractor()

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance -> [width]; None under 60 ms. Raises ModelError if openSMILE fails."""
        result = self._extractor.extract(samples)
        return None if result is None else to_row(to_tokens(result.lld, frame_ms=LLD_MS))

    def close(self) -> None:
        """Free openSMILE's instance."""
        self._extractor.close()


class EncoderTokens:
    """A speech encoder's states as at most 64 tokens, in one row."""

    def __init__(self, name: str, encoder: "SpeechEncoder") -> None:
        self.name = name
        self.version = f"{VERSION}-{encoder.version}"
        self.width = MOST_TOKENS * encoder.width
        self._encoder = encoder

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance -> [width]; None if it is too short for any state."""
        states = self._encoder.tokens(samples)
        return None if states is None else to_row(to_tokens(states, frame_ms=STATE_MS))

    def close(self) -> None:
        self._encoder.close()


class WhisperRepresentation:
    """What Whisper's encoder hears in an utterance: the mean of its states over time.

    Raises ModelError when the weights can't be found or loaded.
    """

    def __init__(self, name: str, *, device: str) -> None:
        self.name = name
        # Corpora are measured by processes of one thread each.
        self._encoder = WhisperEncoder(name.removeprefix(WHISPER), device=device, threads=1)
        self.version = f"{VERSION}-{self._encoder.version}"
        self.width = self._encoder.width

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance of at most 30 s -> [width]; None if there is nothing in it."""
        return self._encoder.embed(samples) if samples.any() else None

    def close(self) -> None:
        """Nothing is open."""


class SideBySide:
    """Several representations as one vector, in their order."""

    def __init__(self, parts: Sequence[AcousticRepresentation]) -> None:
        self._parts = parts
        self.name = "+".join(part.name for part in parts)
        self.version = "+".join(part.version for part in parts)
        self.width = sum(part.width for part in parts)

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance -> [width]; None if any of the parts finds nothing."""
        found = [part.extract(samples) for part in self._parts]
        there = [features for features in found if features is not None]
        return np.concatenate(there) if len(there) == len(found) else None

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _mfcc(result: Acoustic) -> Float32:
    """[T, 65] low-level descriptors -> [28]: means, then deviations, of the cepstral ones."""
    columns = [n for n, column in enumerate(acoustic.LLD_NAMES) if column.startswith("mfcc_sma[")]
    frames = result.lld[:, columns].astype(np.float64)  # [T, 14]
    return np.concatenate([frames.mean(0), frames.std(0)]).astype(np.float32)


def shape_for(rows: Float32, *, representation: str, tokens: bool) -> Float32:
    """Measured [N, W] as a network takes it: as it is, or as ``tokens`` [N, F, D]."""
    if not tokens:
        return rows
    if representation == LLD or representation.startswith(TOKENS):
        return from_rows(rows)
    return rows[:, None]  # one vector is one token
