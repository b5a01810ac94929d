"""Label sets that adapt to corrections: adaptive conformal inference, where a recogniser runs.

What a bundle's sets promise holds for utterances like those that it was calibrated on. Where people
say which label was right, the promise can be kept for what is really heard. Gibbs & Candès 2021
("Adaptive conformal inference under distribution shift") move the level of the sets by a step after
each correction; here the step moves the threshold itself, as quantile tracking does (Angelopoulos,
Candès & Tibshirani 2023, "Conformal PID control for time series prediction"), since a bundle has no
calibration scores.
"""

from collections.abc import Collection, Mapping
from math import log
from typing import Protocol, TypeVar

from stream_hbaf.errors import ConfigError
from stream_hbaf.events import SetCoverage
from stream_hbaf.networks.calibration import Calibration, Modality, pattern_of

T = TypeVar("T")

REMEMBERED = 2000  # answers that may be corrected, and corrections that count: about 2 MB
# Of the logarithm of the thresholds. On corpora that networks never heard, 0.1 takes twice as many
# corrections to the stated coverage; 0.3 makes sets larger for no more coverage.
STEP = 0.2
LEAST = 1e-4  # as so probable counts the right label at least: one outlier must not outweigh others


class Answer(Protocol):
    """What is published of an utterance, as far as it matters here."""

    @property
    def probabilities(self) -> Mapping[str, float]: ...
    @property
    def modalities(self) -> Collection[Modality]: ...
    @property
    def labels_in_set(self) -> Collection[str]: ...


class AdaptiveSets:
    """How far a calibration's thresholds are moved, by the corrections that a process has got.

    All modality patterns are moved alike: their thresholds are multiplied by exp(-``shift``). With
    a, the share of sets that may miss the right label, each correction adds STEP (1 - a) to the
    shift if the present threshold would miss the label, else it takes STEP a away. So after n
    corrections, of whatever utterances, the share missed is less than 50 / n from a.
    """

    def __init__(self, calibration: Calibration, *, bundle: str) -> None:
        """Raises ConfigError for a calibration whose sets promise nothing."""
        if not any(calibration.thresholds.values()):
            raise ConfigError(
                f"adaptive_sets: bundle {bundle} doesn't say how often its label sets are right; "
                "leave 'adaptive_sets' out, or take a bundle that does"
            )
        self.shift = 0.0
        self._calibration = calibration
        self._answers: dict[str, Answer] = {}  # by utterance
        self._needed: dict[str, float] = {}  # of corrected ones: the shift that finds the label
        self._held: dict[str, bool] = {}  # of corrected ones: whether the published set held it

    def remember(self, utterance: str, answer: Answer) -> None:
        """Remember an answer, which may be corrected from now on."""
        _put(self._answers, utterance, answer)

    def correct(self, utterance: str, label: str) -> bool:
        """Learn which label was right; False for an utterance that isn't remembered.

        A second correction of an utterance replaces the first.
        """
        answer = self._answers.get(utterance)
        if answer is None or label not in answer.probabilities:
            return False
        given = answer.modalities
        pattern = pattern_of(audio="audio" in given, text="text" in given)
        threshold = self._calibration.thresholds[pattern]
        if threshold > 0.0:  # else the set holds every label, whatever the shift
            probability = max(answer.probabilities[label], LEAST)
            _put(self._needed, utterance, log(threshold / probability))
            _put(self._held, utterance, label in answer.labels_in_set)
            self._move()
        return True

    def forget(self, dialogue_id: str) -> None:
        """Forget a dialogue's answers, and what was learned from their corrections."""
        for table in (self._answers, self._needed, self._held):
            for utterance in [*table]:
                if utterance.rpartition("-")[0] == dialogue_id:
                    table.pop(utterance)
        self._move()

    def coverage(self) -> SetCoverage:
        """How often the published sets of corrected utterances held the right label."""
        count = len(self._held)
        return SetCoverage(
            stated=self._calibration.coverage,
            corrections=count,
            held=round(sum(self._held.values()) / count, 4) if count else None,
        )

    def _move(self) -> None:
        """The shift after all corrections that are remembered, in their order."""
        missed, shift = 1.0 - self._calibration.coverage, 0.0
        for needed in self._needed.values():
            shift += STEP * ((needed > shift) - missed)
        self.shift = shift


def _put(table: dict[str, T], utterance: str, entry: T) -> None:
    """Add an entry, and drop the oldest where there are too many."""
    table[utterance] = entry
    if len(table) > REMEMBERED:
        del table[next(iter(table))]
