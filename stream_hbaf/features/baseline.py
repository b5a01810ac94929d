"""A speaker's own baseline: acoustic features relative to how that speaker has sounded so far.

Emotion is a departure from how a person sounds through a microphone, and both differ far more
between people and rooms than emotions do. So each feature is given as its distance from the mean of
the speaker's earlier utterances in the dialogue, in their standard deviations. Both begin with the
training set's, which count as ``prior`` utterances, and become the speaker's own with each
utterance. Nothing of the future is used.

Features are standardised already: the training set's mean is 0 and its deviation 1. A feature of
exactly 0 was not measured: it stays 0 and is not remembered.

Shape letters: B dialogues, U utterances, A features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stream_hbaf.config import Section
from stream_hbaf.errors import ConfigError

Float32 = NDArray[np.float32]
Flags = NDArray[np.bool_]
Speakers = NDArray[np.int64]

LEAST_VARIANCE = np.float32(0.1)  # of two or three utterances that are alike
MAX_DEVIATIONS = 5.0  # as of features that are relative to the training set


class BaselineConfig(Section):
    """Which parts of the acoustic features are relative to their speaker's past."""

    parts: Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]  # as "campplus"
    prior: Annotated[float, Field(gt=0.0, le=1000.0)] = 4.0  # utterances' worth of the training set


@dataclass(frozen=True, slots=True)
class VoicePast:
    """What a dialogue's earlier utterances sounded like, by the number of their speaker."""

    sums: Mapping[int, Float32] = field(default_factory=dict)  # [3, A]: see ``_terms``

    def add(self, audio: Float32, *, speaker: int) -> "VoicePast":
        """With an utterance more, of features [A] as they were measured and standardised."""
        terms = _terms(audio)
        return VoicePast({**self.sums, speaker: self.sums.get(speaker, 0.0) + terms})


@dataclass(frozen=True)
class Baseline:
    """Makes some columns of utterances' features relative to their speaker's past."""

    columns: Flags  # [A], True: relative
    prior: float

    @classmethod
    def of(cls, config: BaselineConfig, blocks: Mapping[str, slice], *, width: int) -> "Baseline":
        """Of features of that width, whose parts have these columns.

        Raises ConfigError for a part that isn't there.
        """
        columns = np.zeros(width, bool)
        for part in config.parts:
            if part not in blocks:
                raise ConfigError(
                    f"baseline: '{part}' is no part of the features; choose {', '.join(blocks)}"
                )
            columns[blocks[part]] = True
        return cls(columns, config.prior)

    def relative(self, audio: Float32, *, speaker: int, past: VoicePast) -> Float32:
        """An utterance's features [A] relative to its speaker's past."""
        nothing = np.zeros((3, *audio.shape), np.float32)
        return self._relative(audio, past.sums.get(speaker, nothing))

    def relative_dialogues(
        self, audio: Float32, given: Flags, speakers: Speakers | None
    ) -> Float32:
        """Whole dialogues [B, U, A], each utterance as ``relative`` to those before it.

        Utterances that aren't ``given`` [B, U] have no audio: they count for nothing, and are 0.
        ``speakers`` [B, U] are numbers; None: one speaker a dialogue.
        """
        speakers = np.zeros(given.shape, np.int64) if speakers is None else speakers
        relative: Float32 = np.zeros(audio.shape, np.float32)
        sums = {
            n: np.zeros((3, len(audio), audio.shape[2]), np.float32) for n in np.unique(speakers)
        }
        for turn in range(audio.shape[1]):
            for speaker, before in sums.items():
                own = np.flatnonzero(given[:, turn] & (speakers[:, turn] == speaker))
                heard = audio[own, turn]
                relative[own, turn] = self._relative(heard, before[:, own])
                before[:, own] += _terms(heard)
        return relative

    def _relative(self, audio: Float32, before: Float32) -> Float32:
        """Features [.., A] relative to the sums [3, .., A] of those before."""
        count, first, second = before
        prior = np.float32(self.prior)
        mean = first / (count + prior)
        # The training set's deviation of 1 adds ``prior`` squares of 1.
        variance = (second + prior) / (count + prior) - mean**2
        deviations = (audio - mean) / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
        clipped = np.clip(deviations, -MAX_DEVIATIONS, MAX_DEVIATIONS)
        changed: Float32 = np.where(self.columns & (audio != 0), clipped, audio)
        return changed


def _terms(audio: Float32) -> Float32:
    """Features [.., A] → [3, .., A]: whether each is there, itself, its square."""
    return np.stack([(audio != 0).astype(np.float32), audio, audio**2])
