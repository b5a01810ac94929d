"""How well speakers were found: right utterances, and the diarisation error rate.

Names that are found mean nothing by themselves: they are mapped one to one to the true speakers of
the dialogue so that most agrees (the Hungarian algorithm), as the field's scorers do. The error
rate is that of pyannote.metrics 4.2 (collar 0.5, overlaps scored) on five pieces of meetings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

COLLAR_S = 0.25  # around each true start and end nothing is scored: NIST's usual one


@dataclass(frozen=True, slots=True)
class Turn:
    """Somebody spoke from ``start_s`` to ``end_s``."""

    start_s: float
    end_s: float
    speaker: str


@dataclass(frozen=True, slots=True)
class DiarizationError:
    """Seconds of speech that were scored, and of each kind of error; a sum of both is one, too."""

    speech_s: float = 0.0
    missed_s: float = 0.0
    false_alarm_s: float = 0.0
    confused_s: float = 0.0

    @property
    def rate(self) -> float:
        """The diarisation error rate; may be above 1. Nan without any speech."""
        wrong = self.missed_s + self.false_alarm_s + self.confused_s
        return wrong / self.speech_s if self.speech_s else float("nan")

    def __add__(self, other: "DiarizationError") -> "DiarizationError":
        return DiarizationError(
            self.speech_s + other.speech_s,
            self.missed_s + other.missed_s,
            self.false_alarm_s + other.false_alarm_s,
            self.confused_s + other.confused_s,
        )


def map_speakers(true: Sequence[str], found: Sequence[str]) -> dict[str, str]:
    """Found name → true name, one to one, so that most utterances agree; "" is nobody."""
    pairs = [(a, b) for a, b in zip(true, found, strict=True) if b]
    return _map_weighted([(a, b, 1.0) for a, b in pairs])


def count_right(true: Sequence[str], found: Sequence[str]) -> NDArray[np.bool_]:
    """Which utterances of one dialogue were given the right speaker; "" (not sure) is wrong."""
    names = map_speakers(true, found)
    return np.array([names.get(b) == a for a, b in zip(true, found, strict=True)], bool)


def diarization_error(
    reference: Sequence[Turn], found: Sequence[Turn], *, collar_s: float = COLLAR_S
) -> DiarizationError:
    """The error of one recording, where speech of several people at once counts for each of them.

    Found turns whose speaker is "" count as no speech.
    """
    found = [turn for turn in found if turn.speaker]
    edges = {edge for turn in reference for edge in (turn.start_s, turn.end_s)}
    cuts = sorted(
        {edge + shift for edge in edges for shift in (-collar_s, 0.0, collar_s)}
        | {edge for turn in found for edge in (turn.start_s, turn.end_s)}
    )
    pieces = []  # seconds, who spoke, who was found
    for start, end in pairwise(cuts):
        middle = (start + end) / 2
        if all(abs(middle - edge) > collar_s for edge in edges):
            pieces.append((end - start, _at(reference, middle), _at(found, middle)))
    names = _map_weighted([(a, b, s) for s, true, ours in pieces for a in true for b in ours])
    total = DiarizationError()
    for seconds, true, ours in pieces:
        right = len(true & {names[b] for b in ours if b in names})
        total += DiarizationError(
            speech_s=seconds * len(true),
            missed_s=seconds * max(0, len(true) - len(ours)),
            false_alarm_s=seconds * max(0, len(ours) - len(true)),
            confused_s=seconds * (min(len(true), len(ours)) - right),
        )
    return total


def _at(turns: Sequence[Turn], second: float) -> set[str]:
    return {turn.speaker for turn in turns if turn.start_s <= second < turn.end_s}


def _map_weighted(pairs: Sequence[tuple[str, str, float]]) -> dict[str, str]:
    """(true, found, weight) → found name → true name, of the greatest total weight."""
    if not pairs:
        return {}
    true = sorted({a for a, _, _ in pairs})
    found = sorted({b for _, b, _ in pairs})
    weights = np.zeros((len(true), len(found)))
    for a, b, weight in pairs:
        weights[true.index(a), found.index(b)] += weight
    rows, columns = linear_sum_assignment(weights, maximize=True)
    return {found[j]: true[i] for i, j in zip(rows, columns, strict=True) if weights[i, j] > 0}
