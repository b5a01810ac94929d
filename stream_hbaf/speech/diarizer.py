"""Attributes a dialogue's utterances to speakers by their voices, one after the other.

Pure and without a clock: embeddings in, attributions out. ``clustering`` finds the voices; here
they get names: an enrolled person's, one that somebody gives, or a number. What is not sure stays
unnamed. The future reaches back only by revision: ``add`` also returns the earlier turns that the
new one has changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SpeakersConfig
from stream_hbaf.speech.clustering import CAMPPLUS, Clustering, Float64, Voice, VoiceModel

Embedding = NDArray[np.floating]
SpeakerSource = Literal["", "voice", "enrolled", "corrected"]

REMEMBERED_TURNS = 128  # whose embeddings are kept, and which may be revised: 200 kB
# Chosen on the dev set, as in clustering: the cosine of an enrolled and a dialogue's voice at which
# they are as probably one as two, and how fast the log odds rise with it.
ENROLLED_SIMILARITY = 0.5
ENROLLED_SLOPE = 40.0
TURN_SIMILARITY = 0.42  # from which a turn by itself may be an enrolled person's


@dataclass(frozen=True, slots=True)
class Attributed:
    """Who spoke a turn; ``speaker`` is "" while that is not sure."""

    turn: int
    speaker: str
    score: float  # probability of the speaker; while not sure, of the most probable one
    source: SpeakerSource  # found by the voice, an enrolled one, or said by a person


class Diarizer:
    """The speakers of one dialogue.

    ``voices`` are the enrolled ones, by name: embeddings of any width, the same as those of
    ``add``, of whose encoder ``model`` is. Other speakers are called "speaker 1", "speaker 2" and
    so on, in the order in which they appear.
    """

    def __init__(
        self,
        config: SpeakersConfig,
        *,
        voices: Mapping[str, Embedding] | None = None,
        model: VoiceModel = CAMPPLUS,
    ) -> None:
        self._config = config
        self._enrolled = {name: unit(voice) for name, voice in (voices or {}).items()}
        self._clustering = Clustering(max_voices=config.max_speakers, model=model)
        self._turns: dict[int, Attributed] = {}  # as last returned
        self._numbered = 0

    def add(
        self, turn: int, embedding: Embedding | None, *, duration_s: float
    ) -> tuple[Attributed, ...]:
        """The attribution of a turn, after those of earlier turns that it changes, oldest first.

        ``turn`` is above all before it. ``embedding`` is None for an utterance that has none.
        """
        if embedding is not None and duration_s * 1000 >= self._config.min_utterance_ms:
            self._clustering.add(turn, unit(embedding))
        self._turns[turn] = Attributed(turn, "", 0.0, "")
        changed = [one for one in self._revise() if one.turn != turn]
        while len(self._turns) > REMEMBERED_TURNS:
            forgotten = next(iter(self._turns))
            self._clustering.forget(forgotten)
            del self._turns[forgotten]
        return (*changed, self._turns[turn])

    def correct(self, turn: int, speaker: str) -> tuple[Attributed, ...]:
        """A person says who spoke a turn, "" for nobody; the turns that this changes.

        The speaker's voice learns from it. A turn that is forgotten is corrected by itself.
        """
        corrected = Attributed(turn, speaker, 1.0, "corrected")
        before = self._turns.get(turn)
        if before is None:
            return (corrected,)
        self._turns[turn] = corrected
        if self._clustering.embedding_of(turn) is not None:
            self._clustering.fix(turn, speaker)
        own = [] if before == corrected else [corrected]
        return tuple(sorted([*self._revise(), *own], key=lambda one: one.turn))

    def rename(self, old: str, new: str) -> tuple[Attributed, ...]:
        """A person calls speaker ``old`` ``new``; if there is a speaker ``new``, they are one."""
        voices = [voice for voice in self._clustering.voices if voice.name in {old, new}]
        turns = [one for one in self._turns.values() if one.speaker == old]
        if old == new or not (turns or any(voice.name == old for voice in voices)):
            return ()
        for voice in voices:
            voice.name, voice.given = new, True
        for one in turns:
            source = one.source if one.source == "corrected" else self._source(new)
            self._turns[one.turn] = replace(one, speaker=new, source=source)
        return tuple(self._turns[one.turn] for one in turns)

    def merge(self, from_: str, into: str) -> tuple[Attributed, ...]:
        """A person says that two speakers are one, called ``into``; the turns that this changes."""
        return self.rename(from_, into)

    def _revise(self) -> list[Attributed]:
        """Attribute all remembered turns by the voices as they are now; those that changed."""
        changed = []
        for turn, before in self._turns.items():
            if before.source == "corrected":
                continue
            after = self._attribute(turn)
            # What was sure once stays so until another speaker is sure.
            stays = not after.speaker and self._called(before.speaker) is not None
            if not stays and (after.speaker, after.source) != (before.speaker, before.source):
                changed.append(after)
        self._turns |= {one.turn: one for one in changed}
        return changed

    def _attribute(self, turn: int) -> Attributed:
        """Who spoke a turn, by its voice."""
        voice, score = self._clustering.voice_of(turn), self._clustering.score(turn)
        if voice is None or score < self._config.min_score:
            return Attributed(turn, "", score, "")
        score *= self._name(voice)
        if self._enrolled and not voice.given and self._contradicts(turn, voice.name):
            return Attributed(turn, "", score, "")
        return Attributed(turn, voice.name, score, self._source(voice.name))

    def _contradicts(self, turn: int, name: str) -> bool:
        """Whether a turn by itself is another enrolled person's than its voice, or a stranger's."""
        embedding = self._clustering.embedding_of(turn)
        if embedding is None:
            return False
        similarity = {other: float(one @ embedding) for other, one in self._enrolled.items()}
        nearest = max(similarity, key=lambda other: similarity[other])
        alone = nearest if similarity[nearest] >= TURN_SIMILARITY else ""
        return alone != (name if name in self._enrolled else "")

    def _name(self, voice: Voice) -> float:
        """Name a voice that no person has named; the probability of the name."""
        if voice.given:
            return 1.0
        name, probability = self._recognise(voice)
        least = 0.5 if voice.name == name else self._config.min_enrolled_score
        if name and probability >= least:
            voice.name = name
            return probability
        if not voice.name or voice.name in self._enrolled:
            voice.name = self._next_number()
        return 1.0

    def _recognise(self, voice: Voice) -> tuple[str, float]:
        """The most probable enrolled speaker of a voice, and the probability."""
        if not self._enrolled:
            return "", 0.0
        direction = voice.total / np.linalg.norm(voice.total)
        similarity = np.array([enrolled @ direction for enrolled in self._enrolled.values()])
        odds = np.exp(ENROLLED_SLOPE * (similarity - ENROLLED_SIMILARITY))
        best = int(np.argmax(odds))
        return list(self._enrolled)[best], float(odds[best] / (1 + odds.sum()))

    def _source(self, speaker: str) -> SpeakerSource:
        return "enrolled" if speaker in self._enrolled else "voice"

    def _called(self, name: str) -> Voice | None:
        named = (voice for voice in self._clustering.voices if voice.name == name != "")
        return next(named, None)

    def _next_number(self) -> str:
        taken = {*self._enrolled, *(voice.name for voice in self._clustering.voices)}
        while True:
            self._numbered += 1
            if (name := f"speaker {self._numbered}") not in taken:
                return name


def unit(embedding: Embedding) -> Float64:
    """The embedding [D] at unit length. Raises ValueError for a zero, or what isn't finite."""
    wide: Float64 = embedding.astype(np.float64)
    length = float(np.linalg.norm(wide))
    if not np.isfinite(length) or length == 0:
        raise ValueError("an embedding is zero or not finite")
    return wide / length
