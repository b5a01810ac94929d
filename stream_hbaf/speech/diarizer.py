"""Attributes a dialogue's utterances to speakers by their voices, one after the other.

Pure and without a clock: embeddings in, attributions out. A voice is the mean of the embeddings of
its utterances and learns with each; an utterance that is like no voice so far begins a new one. A
speaker has one voice, or several after a merge. The future reaches back only by revision: ``add``
returns the earlier turns whose attribution it has changed as well.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SpeakersConfig

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
SpeakerSource = Literal["", "voice", "enrolled", "corrected"]

REMEMBERED_TURNS = 256  # whose embeddings are kept, and which may be revised: 200 kB
ENROLLED_WEIGHT = 4.0  # utterances that an enrolled voice counts as
SIMILARITY = 0.45  # cosine at which two utterances are as likely of one speaker as of two
SLOPE = 14.0  # of the log odds for one speaker over the cosine
NEW_SPEAKER = 0.5  # odds of an unknown voice to those of each known one


@dataclass(frozen=True, slots=True)
class Attributed:
    """Who spoke a turn; ``speaker`` is "" while that is not sure."""

    turn: int
    speaker: str
    score: float  # probability of the speaker, or of the most probable one while not sure
    source: SpeakerSource  # found by the voice, an enrolled one, or said by a person


@dataclass(slots=True)
class _Voice:
    """A voice of a speaker: the sum of the embeddings attributed to it, and how many they are."""

    name: str
    source: Literal["voice", "enrolled"]
    total: Float64
    weight: float

    def similarity(self, embedding: Float64) -> float:
        length = float(np.linalg.norm(self.total))
        return float(self.total @ embedding) / length if length > 0 else 0.0


@dataclass(slots=True)
class _Turn:
    """A turn of which something may still change; ``embedding`` is None if it is too short."""

    attributed: Attributed
    embedding: Float64 | None
    voice: _Voice | None = None  # which has learned from it
    corrected: bool = False


@dataclass(slots=True)
class Diarizer:
    """The speakers of one dialogue.

    ``voices`` are the enrolled ones, by name: embeddings of any width, the same as those of
    ``add``. Speakers without an enrolled voice are called "speaker 1", "speaker 2" and so on, in
    the order of their first turns.
    """

    config: SpeakersConfig
    voices: Mapping[str, NDArray[np.floating]] = field(default_factory=dict, kw_only=True)
    _voices: list[_Voice] = field(default_factory=list, init=False)
    _turns: dict[int, _Turn] = field(default_factory=dict, init=False)
    _numbered: int = field(default=0, init=False)  # speakers without a name so far

    def __post_init__(self) -> None:
        for name, embedding in self.voices.items():
            total = unit(embedding) * ENROLLED_WEIGHT
            self._voices.append(_Voice(name, "enrolled", total, ENROLLED_WEIGHT))

    def add(
        self, turn: int, embedding: NDArray[np.floating] | None, *, duration_s: float
    ) -> tuple[Attributed, ...]:
        """The attribution of a turn, after those of earlier turns that it changes, oldest first.

        ``embedding`` is None for an utterance that has none. Turns have rising numbers.
        """
        long_enough = duration_s * 1000 >= self.config.min_utterance_ms
        known = unit(embedding) if embedding is not None and long_enough else None
        self._turns[turn] = _Turn(Attributed(turn, "", 0.0, ""), known)
        self._attribute(self._turns[turn], may_be_new=True)
        changed = self._revise(except_for=turn)
        while len(self._turns) > REMEMBERED_TURNS:
            del self._turns[next(iter(self._turns))]
        return (*changed, self._turns[turn].attributed)

    def correct(self, turn: int, speaker: str) -> tuple[Attributed, ...]:
        """A person says who spoke ``turn``; the turns that this changes, oldest first.

        The voice learns from it. A turn that is no longer remembered is corrected by itself.
        """
        corrected = Attributed(turn, speaker, 1.0, "corrected")
        one = self._turns.get(turn)
        if one is None:
            return (corrected,)
        self._unlearn(one)
        voice = self._voice(speaker)
        if one.embedding is not None:
            if voice is None:
                voice = _Voice(speaker, "voice", np.zeros_like(one.embedding), 0.0)
                self._voices.append(voice)
            self._learn(one, voice)
        before = one.attributed
        one.attributed, one.corrected = corrected, True
        changed = self._revise(except_for=turn)
        own = () if before == corrected else (corrected,)
        return tuple(sorted((*changed, *own), key=lambda a: a.turn))

    def rename(self, old: str, new: str) -> tuple[Attributed, ...]:
        """Speaker ``old`` is called ``new``; if there is a speaker ``new``, the two are one."""
        sources = {voice.source for voice in self._voices if voice.name == new}
        for voice in self._voices:
            if voice.name == old:
                voice.name = new
                voice.source = "enrolled" if "enrolled" in sources else voice.source
        changed = [one for one in self._turns.values() if one.attributed.speaker == old]
        for one in changed:
            source = one.attributed.source if one.voice is None else one.voice.source
            source = "corrected" if one.corrected else source
            one.attributed = replace(one.attributed, speaker=new, source=source)
        return tuple(one.attributed for one in changed)

    def merge(self, from_: str, into: str) -> tuple[Attributed, ...]:
        """Speakers ``from_`` and ``into`` are one, called ``into``."""
        return self.rename(from_, into) if from_ != into else ()

    def _revise(self, *, except_for: int) -> tuple[Attributed, ...]:
        """Decide again on the turns that were not sure."""
        changed: list[Attributed] = []
        for number, one in self._turns.items():
            if number != except_for and one.voice is None and not one.corrected:
                self._attribute(one, may_be_new=False)
                if one.voice is not None:
                    changed.append(one.attributed)
        return tuple(changed)

    def _attribute(self, one: _Turn, *, may_be_new: bool) -> None:
        """Decide who spoke a turn, as far as its embedding says."""
        if one.embedding is None:
            return
        odds = [
            np.exp(SLOPE * (voice.similarity(one.embedding) - SIMILARITY)) for voice in self._voices
        ]
        total = NEW_SPEAKER + sum(odds)
        scores = [float(odd / total) for odd in odds]
        best = int(np.argmax(scores)) if scores else -1
        turn, new = one.attributed.turn, float(NEW_SPEAKER / total)
        if best >= 0 and scores[best] >= self._least(self._voices[best]):
            self._learn(one, self._voices[best])
            voice = self._voices[best]
            one.attributed = Attributed(turn, voice.name, scores[best], voice.source)
        elif may_be_new and new >= self.config.min_score and self._may_begin():
            voice = _Voice(self._next_name(), "voice", np.zeros_like(one.embedding), 0.0)
            self._voices.append(voice)
            self._learn(one, voice)
            one.attributed = Attributed(turn, voice.name, new, "voice")
        else:
            one.attributed = Attributed(turn, "", max([new, *scores]), "")

    def _least(self, voice: _Voice) -> float:
        enrolled = voice.source == "enrolled"
        return self.config.min_enrolled_score if enrolled else self.config.min_score

    def _may_begin(self) -> bool:
        speakers = {one.attributed.speaker for one in self._turns.values()} - {""}
        unnamed = {voice.name for voice in self._voices if voice.source == "voice"}
        return len(speakers | unnamed) < self.config.max_speakers

    def _next_name(self) -> str:
        taken = {voice.name for voice in self._voices}
        while True:
            self._numbered += 1
            if (name := f"speaker {self._numbered}") not in taken:
                return name

    def _learn(self, one: _Turn, voice: _Voice) -> None:
        assert one.embedding is not None
        voice.total = voice.total + one.embedding
        voice.weight += 1
        one.voice = voice

    def _unlearn(self, one: _Turn) -> None:
        if one.voice is None or one.embedding is None:
            return
        one.voice.total = one.voice.total - one.embedding
        one.voice.weight -= 1
        one.voice = None

    def _voice(self, name: str) -> _Voice | None:
        return next((voice for voice in self._voices if voice.name == name), None)


def unit(embedding: NDArray[np.floating]) -> Float64:
    """The embedding [D] at unit length, float64."""
    wide = embedding.astype(np.float64)
    length = np.linalg.norm(wide)
    if not np.isfinite(length) or length == 0:
        raise ValueError("an embedding is zero or not finite")
    return wide / length


def speakers_of(attributions: Iterable[Attributed]) -> tuple[str, ...]:
    """The speakers that attributions name, in the order of their first turns."""
    names = {one.speaker: None for one in sorted(attributions, key=lambda one: one.turn)}
    return tuple(name for name in names if name)
