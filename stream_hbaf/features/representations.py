"""Acoustic representations by name: one vector for each utterance, or a short row of tokens.

openSMILE's feature sets, Whisper's encoder, the GE2E speaker encoder and self-supervised speech
encoders behind one interface, for corpora. Live, openSMILE is streamed (acoustic.py), and Whisper's
encoder runs for the transcript (whisper.py). VGGish and openL3, which the paper also compares, are
in no maintained package. ``Scaling`` standardises features as a bundle stores it, in training and
live use alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import ModelError
from stream_hbaf.features.acoustic import (
    COMPARE,
    EGEMAPS,
    LLD_MS,
    LLD_WIDTH,
    OPENSMILE_VERSION,
    Acoustic,
    AcousticExtractor,
    FeatureSet,
    column_names,
)
from stream_hbaf.features.prosody import Prosody

if TYPE_CHECKING:
    from stream_hbaf.features.speech_encoder import SpeechEncoder

Float32 = NDArray[np.float32]

GE2E = "ge2e"
CAMPPLUS = "campplus"  # activations of a speaker encoder, before it forgets how something was said
PROSODY = "prosody"  # eight measurements, which prosody.py describes relative to a dialogue's past
OPENSMILE = ("compare", "egemaps", "mfcc")
MFCC = 14  # ComParE's low-level descriptors hold coefficients 1 to 14
LLD = "lld"  # ComParE's low-level descriptors, as tokens
TOKENS = "tokens:"  # before a speech encoder's name: its states, as tokens
WHISPER = "whisper:"  # before a model's name: the mean of its encoder's states
VERSION = "1"  # of the computations in this file; part of the cache key
STATE_MS = 20  # of wav2vec 2.0 and its relatives
TOKEN_MS = 80  # about half a syllable
MAX_TOKENS = 64
NOT_OFFERED = ("vggish", "openl3")


class AcousticRepresentation(Protocol):
    """Turns the audio of an utterance into one vector."""

    @property
    def name(self) -> str:
        """Its name in configurations and caches."""

    @property
    def version(self) -> str:
        """Changes whenever the same audio might give other features."""

    @property
    def width(self) -> int:
        """The number of features."""

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance (int16 [n], mono, 16 kHz) → [width]; None if it is too short."""

    def close(self) -> None:
        """Free what it holds."""


def open_representation(name: str, *, device: str = "cpu") -> AcousticRepresentation:
    """Open a representation by name.

    One vector: "compare", "egemaps", "mfcc", "ge2e", "campplus", "prosody", "whisper:<model>", or a
    speech encoder's folder or name on the hub. Tokens in one row: "lld" or "tokens:<encoder>".
    Several side by side: "compare+mfcc".

    ``device`` is for encoders; openSMILE and Praat run on the CPU. Raises ModelError if it can't be
    loaded.
    """
    if "+" in name:
        return SideBySide([open_representation(part, device=device) for part in name.split("+")])
    if name.startswith(WHISPER):
        return WhisperRepresentation(name, device=device)
    if name in OPENSMILE:
        return OpenSmileRepresentation(name)
    if name == LLD:
        return LldTokens()
    if name == GE2E:
        # Imported here: it loads torch, which openSMILE's sets don't need.
        from stream_hbaf.features.ge2e import Ge2e

        return Ge2e(device=device)
    if name == CAMPPLUS:
        # Imported here, as above.
        from stream_hbaf.features.speaker import SpeakerActivations

        return SpeakerActivations(device=device)
    if name == PROSODY:
        return Prosody()
    if name in NOT_OFFERED:
        raise ModelError(
            f"{name}: no maintained package offers it; "
            f"choose {', '.join(OPENSMILE)} or a speech encoder"
        )
    # Imported here: it loads transformers, which openSMILE's sets don't need.
    from stream_hbaf.features.speech_encoder import SpeechEncoder

    if name.startswith(TOKENS):
        return EncoderTokens(name, SpeechEncoder(name.removeprefix(TOKENS), device=device))
    return SpeechEncoder(name, device=device)


class OpenSmileRepresentation:
    """openSMILE's functionals, from one instance of the library for all utterances.

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
        """One utterance → [width]; None under 60 ms. Raises ModelError if openSMILE fails."""
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
        self.width = MAX_TOKENS * LLD_WIDTH
        self._extractor = AcousticExtractor()

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance → [width]; None under 60 ms. Raises ModelError if openSMILE fails."""
        result = self._extractor.extract(samples)
        return (
            None if result is None else tokens_to_row(frames_to_tokens(result.lld, frame_ms=LLD_MS))
        )

    def close(self) -> None:
        """Free openSMILE's instance."""
        self._extractor.close()


class EncoderTokens:
    """A speech encoder's states as at most 64 tokens, in one row."""

    def __init__(self, name: str, encoder: "SpeechEncoder") -> None:
        self.name = name
        self.version = f"{VERSION}-{encoder.version}"
        self.width = MAX_TOKENS * encoder.width
        self._encoder = encoder

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance → [width]; None if it is too short for any state."""
        states = self._encoder.tokens(samples)
        return (
            None if states is None else tokens_to_row(frames_to_tokens(states, frame_ms=STATE_MS))
        )

    def close(self) -> None:
        """Free the encoder's weights."""
        self._encoder.close()


class WhisperRepresentation:
    """The mean of a Whisper encoder's states over an utterance.

    Raises ModelError when the weights can't be found or loaded.
    """

    def __init__(self, name: str, *, device: str) -> None:
        # Seconds of imports that openSMILE's representations do not need.
        from stream_hbaf.features.whisper_encoder import WhisperEncoder

        self.name = name
        # Corpora are processed by several processes of one thread each.
        self._encoder = WhisperEncoder(name.removeprefix(WHISPER), device=device, threads=1)
        self.version = f"{VERSION}-{self._encoder.version}"
        self.width = self._encoder.width

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance of at most 30 s → [width]; None for digital silence."""
        return self._encoder.embed(samples) if samples.any() else None

    def close(self) -> None:
        """Nothing to free."""


class SideBySide:
    """Several representations as one vector, in their order."""

    def __init__(self, parts: Sequence[AcousticRepresentation]) -> None:
        self._parts = parts
        self.name = "+".join(part.name for part in parts)
        self.version = "+".join(part.version for part in parts)
        self.width = sum(part.width for part in parts)

    def extract(self, samples: NDArray[np.int16]) -> Float32 | None:
        """One utterance → [width]; None if any of the parts gives None."""
        parts = [part.extract(samples) for part in self._parts]
        given = [features for features in parts if features is not None]
        return np.concatenate(given) if len(given) == len(parts) else None

    def close(self) -> None:
        """Close all parts."""
        for part in self._parts:
            part.close()


def _mfcc(result: Acoustic) -> Float32:
    """[T, 65] low-level descriptors → [28]: means, then deviations, of the cepstral ones."""
    columns = [n for n, column in enumerate(column_names("lld")) if column.startswith("mfcc_sma[")]
    frames = result.lld[:, columns].astype(np.float64)  # [T, 14]
    return np.concatenate([frames.mean(0), frames.std(0)]).astype(np.float32)


def frames_to_tokens(frames: NDArray[np.floating], *, frame_ms: int) -> Float32:
    """Frames [T, D] → tokens [F, D] for token alignment, at most 64, in their order.

    A token is the mean of the frames of 80 ms; an utterance of more than five seconds has longer
    ones. NaN is left out of the mean, and is the token's value where all of its frames have it.
    """
    stride = max(TOKEN_MS // frame_ms, -(-len(frames) // MAX_TOKENS))
    starts = np.arange(0, len(frames), stride)
    known = np.isfinite(frames)
    sums = np.add.reduceat(np.where(known, frames, 0.0), starts, axis=0, dtype=np.float64)
    counts = np.add.reduceat(known, starts, axis=0, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        tokens: Float32 = (sums / counts).astype(np.float32)
    return tokens


def tokens_to_row(tokens: Float32, *, most: int = MAX_TOKENS) -> Float32:
    """Tokens [F, D] as one vector [most * D], NaN where there are fewer; further ones are cut."""
    row = np.full((most, tokens.shape[1]), np.nan, np.float32)
    row[: len(tokens)] = tokens[:most]
    return row.ravel()


def rows_to_tokens(rows: Float32, *, most: int = MAX_TOKENS) -> Float32:
    """Rows of N utterances by ``tokens_to_row``, [N, most * D] → [N, most, D]."""
    return rows.reshape(len(rows), most, -1)


def shape_for(rows: Float32, *, representation: str, tokens: bool) -> Float32:
    """Features [N, W] as a network takes them: one vector each, or tokens [N, F, D]."""
    if not tokens:
        return rows
    if representation == LLD or representation.startswith(TOKENS):
        return rows_to_tokens(rows)
    return rows[:, None]  # one vector is one token


def join_parts(parts: Sequence[Float32 | None], widths: Sequence[int]) -> Float32 | None:
    """An utterance's representations side by side [W]; NaN stands for a missing one.

    ``widths`` are those of the parts; without them every part is needed. None if nothing, or not
    enough, is there.
    """
    if all(part is None for part in parts) or (not widths and any(part is None for part in parts)):
        return None
    sizes = widths or [0] * len(parts)
    filled = [
        np.full(width, np.nan, np.float32) if part is None else part
        for part, width in zip(parts, sizes, strict=True)
    ]
    return np.concatenate(filled)


def without_incomplete(rows: Float32, widths: Sequence[int]) -> Float32:
    """Rows [N, W] of several representations, all NaN where one of them is missing."""
    parts = np.split(rows, np.cumsum(widths)[:-1], axis=-1)
    incomplete = np.any([np.isnan(part).all(axis=-1) for part in parts], axis=0)
    return np.where(incomplete[:, None], np.float32(np.nan), rows)


MAX_DEVIATIONS = 5.0  # an unusual microphone must not dominate the other features


@dataclass(frozen=True)
class Scaling:
    """Selects and standardises the acoustic features that the network is given.

    Of ComParE's functionals: a selection, or their principal components. Of low-dimensional
    features such as prosody: every column.
    """

    selected: NDArray[np.int64]  # [S], indices of the F input columns: 6373 for ComParE
    mean: Float32  # [S], over the training set
    deviation: Float32  # [S], over the training set, positive
    components: Float32 | None = None  # [J, K]: projects the first J of S to K, in unit variance

    @property
    def width(self) -> int:
        """A, the number of acoustic features that the network is given."""
        if self.components is None:
            return len(self.selected)
        joined = len(self.components)
        return len(self.selected) - joined + len(self.components[0])

    def blocks(self, widths: Sequence[int]) -> tuple[slice, ...]:
        """Which of the A columns come from each part of the input, whose widths these are."""
        ends = np.searchsorted(self.selected, np.cumsum(widths))
        if self.components is not None:  # the first part's, in the place of its columns
            ends = ends - len(self.components) + len(self.components[0])
        return tuple(slice(int(a), int(b)) for a, b in pairwise([0, *ends]))

    def __call__(self, measured: Float32) -> Float32:
        """Acoustic features [N, F] → [N, A] in standard deviations, at most 5 from the mean.

        NaN becomes the training mean: an undefined pitch must not invalidate the other features.
        """
        with np.errstate(all="ignore"):
            scaled = (measured[:, self.selected] - self.mean) / self.deviation
        clipped = _clip(np.nan_to_num(scaled, nan=0.0))
        if self.components is None:
            return clipped
        joined = len(self.components)
        projected = _clip(clipped[:, :joined] @ self.components)
        return np.concatenate([projected, clipped[:, joined:]], axis=1)


def _clip(deviations: Float32) -> Float32:
    return np.clip(deviations, -MAX_DEVIATIONS, MAX_DEVIATIONS).astype(np.float32)
