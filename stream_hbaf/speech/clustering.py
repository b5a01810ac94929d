"""Clusters the embeddings of a dialogue's turns by voice, one turn after the other.

The model has two levels, as in probabilistic linear discriminant analysis with spherical
covariances: a voice is a point around the origin, its turns are points around the voice. How well
turns go together is then a closed formula of the length of their sum (``VoiceModel.evidence``),
whatever the embeddings' width. A new turn joins the voice that explains it best, or begins one.
After it earlier turns are decided again and voices merged as long as that makes the whole more
probable.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

SWEEPS = 4  # over the earlier turns after each new one, at most


@dataclass(frozen=True, slots=True)
class VoiceModel:
    """How the embeddings of one encoder spread."""

    between: float  # variance between voices over that between a voice's turns
    dimensions: float  # independent ones that an embedding counts as

    def evidence(self, length2: Float64 | float, turns: Float64 | float) -> Float64:
        """Log odds of turns being of one voice to a background that cancels out in differences.

        ``length2`` is the squared length of the sum of their embeddings, each of unit length.
        """
        between, spread = self.between, 1 + np.asarray(turns) * self.between
        gain = between * (1 + between) * length2 / spread - np.log(spread)
        return np.asarray(self.dimensions / 2 * gain)


# Chosen on voices of the dev set, read and acted: tools/measure_speakers.py.
CAMPPLUS = VoiceModel(between=1.0, dimensions=15.0)


@dataclass(slots=True, eq=False)
class Voice:
    """Some turns that sound alike: the sum of their embeddings [D], and how many they are."""

    total: Float64
    turns: float = 0
    name: str = ""  # none as long as nothing is published of it
    given: bool = False  # by a person; voices with different given names are never merged


@dataclass(slots=True)
class _Turn:
    embedding: Float64
    voice: Voice | None = None
    fixed: bool = False


class Clustering:
    """The voices of a dialogue's turns, at most ``max_voices``; turns are named by numbers.

    A turn beyond them, which is like none of them, has no voice.
    """

    def __init__(self, *, max_voices: int, model: VoiceModel = CAMPPLUS) -> None:
        self._model = model
        self.voices: list[Voice] = []  # in the order in which they began
        self._max_voices = max_voices
        self._turns: dict[int, _Turn] = {}

    def add(self, turn: int, embedding: Float64) -> None:
        """Cluster one more turn by its embedding [D], which has unit length."""
        self._turns[turn] = _Turn(embedding)
        self._decide(self._turns[turn])
        self.settle()

    def fix(self, turn: int, name: str) -> None:
        """A person says that the turn is of the voice with this name, "" for none; it stays so.

        The turn joins such a voice if it is like it, and else is another voice of that name. Where
        the name is known, the person tells that voice from the one that the turn had.
        """
        one = self._turns[turn]
        before = one.voice
        self._leave(one)
        odds = self._log_odds(one.embedding)
        named = [n for n, voice in enumerate(self.voices) if voice.name == name != ""]
        best = max(named, key=lambda n: odds[n], default=-1)
        for n in named:
            self.voices[n].given = True
        if named and before is not None:
            before.given = before.name != ""
        if not name:
            self._join(one, None)
        elif odds[best] > odds[-1]:
            self._join(one, self.voices[best])
        else:
            self._join(one, Voice(np.zeros_like(one.embedding), name=name, given=True))
        one.fixed = True
        self._drop_empty()
        self.settle()

    def forget(self, turn: int) -> None:
        """Decide no more on a turn; its voice keeps what it has learned from it."""
        self._turns.pop(turn, None)

    def embedding_of(self, turn: int) -> Float64 | None:
        """The embedding that a turn was added with; None if it wasn't, or is forgotten."""
        one = self._turns.get(turn)
        return None if one is None else one.embedding

    def voice_of(self, turn: int) -> Voice | None:
        """The turn's voice; None if it is like no voice, or isn't known."""
        one = self._turns.get(turn)
        return None if one is None else one.voice

    def score(self, turn: int) -> float:
        """The probability of a turn's voice, and others of its name, given all other turns.

        Of a turn without a voice, that of the most probable one; 0 of one that isn't known.
        """
        one = self._turns.get(turn)
        if one is None:
            return 0.0
        voice = one.voice
        self._leave(one)
        odds = self._log_odds(one.embedding)
        self._join(one, voice)
        chances = np.exp(odds - odds.max())
        if voice is not None and voice.turns == 1:  # an empty voice is a new one: count it once
            chances[-1] = 0.0
        chances /= chances.sum()
        if voice is None:
            return float(chances[:-1].max(initial=0.0))
        same = [v is voice or "" != v.name == voice.name for v in self.voices]
        return float(chances[:-1][same].sum())

    def settle(self) -> None:
        """Decide again on the turns and merge voices until nothing becomes more probable."""
        for _ in range(SWEEPS):
            moved = [self._decide(one) for one in self._turns.values() if not one.fixed]
            if not self._merge_best() and not any(moved):
                break

    def _decide(self, one: _Turn) -> bool:
        """Move a turn to its most probable voice, or a new one; whether that changes anything."""
        before = one.voice
        if before is not None and before.given and before.turns == 1:
            return False  # what a person has named doesn't vanish
        self._leave(one)
        best = int(np.argmax(self._log_odds(one.embedding)))
        if best < len(self.voices):  # a voice that it was alone in is the first of equals
            voice: Voice | None = self.voices[best]
        elif len(self.voices) < self._max_voices:
            voice = Voice(np.zeros_like(one.embedding))
        else:
            voice = None
        self._join(one, voice)
        self._drop_empty()
        return one.voice is not before

    def _merge_best(self) -> bool:
        """Merge the two voices that gain most by it; whether there are any."""
        pairs = [
            (self._evidence(a, b) - self._evidence(a) - self._evidence(b), a, b)
            for a, b in combinations(self.voices, 2)
            if a.name == b.name or not (a.given and b.given)
        ]
        gain, kept, gone = max(pairs, key=lambda pair: pair[0], default=(0.0, None, None))
        if gain <= 0 or kept is None or gone is None:
            return False
        kept.total, kept.turns = kept.total + gone.total, kept.turns + gone.turns
        kept.name = gone.name if gone.given else kept.name or gone.name
        kept.given = kept.given or gone.given
        for one in self._turns.values():
            one.voice = kept if one.voice is gone else one.voice
        self.voices.remove(gone)
        return True

    def _evidence(self, *voices: Voice) -> float:
        """``VoiceModel.evidence`` of voices as one."""
        total = np.sum([voice.total for voice in voices], axis=0)
        turns = sum(voice.turns for voice in voices)
        return float(self._model.evidence(total @ total, turns))

    def _log_odds(self, embedding: Float64) -> Float64:
        """Of an embedding being each voice's, and at last a new one's: [K + 1]."""
        totals = np.array([voice.total for voice in self.voices]).reshape(-1, len(embedding))
        turns = np.array([voice.turns for voice in self.voices], float)
        length2 = (totals**2).sum(axis=1)
        evidence = self._model.evidence
        joined = evidence(length2 + 2 * totals @ embedding + 1, turns + 1)
        return np.append(joined - evidence(length2, turns), evidence(1.0, 1.0))

    def _join(self, one: _Turn, voice: Voice | None) -> None:
        one.voice = voice
        if voice is not None:
            voice.total = voice.total + one.embedding
            voice.turns += 1
            if voice not in self.voices:
                self.voices.append(voice)

    def _leave(self, one: _Turn) -> None:
        """Take a turn out of its voice, which may stay behind empty for a while."""
        if one.voice is not None:
            one.voice.turns -= 1
            remains = one.voice.total - one.embedding
            one.voice.total = remains if one.voice.turns else np.zeros_like(remains)
            one.voice = None

    def _drop_empty(self) -> None:
        self.voices = [voice for voice in self.voices if voice.turns]
