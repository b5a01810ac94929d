"""Decides at a pause whether the turn is over, from what is known at that sample.

Both values and the decision are pure, so that the same sound ends at the same places however it
came in.
"""

from dataclasses import dataclass, replace

from stream_hbaf.config import EndpointConfig
from stream_hbaf.events import Trigger

# Chosen on clips of four corpora, some in noise, with the pauses that speakers make inside them, on
# readers, whose every pause must not be an end, and on sentences with the gaps of dialogues.
FIRST_RESUMED = 0.55  # a source begins as one that goes on after pauses, until one has lasted
NEWEST_WEIGHT = 0.1
WARY = 0.5  # share of short pauses from which on the model has to be as sure as the settings say
# How much less still a pause may be at the later question. In one that somebody makes inside a
# sentence breath, or the rest of a word, is left of the voice more often than after the end.
LATE = 1.5


@dataclass(frozen=True, slots=True)
class Habit:
    """How a source pauses, for ``segmenter.pause_ms`` or longer. Newer pauses weigh more."""

    resumed: float = FIRST_RESUMED  # share of short pauses: less than ``segmenter.min_silence_ms``
    score: float = 0.0  # mean speech score in the others, ``Evidence.score`` of the first question

    def after_short(self) -> "Habit":
        """The habit with one more pause, after which speech resumed."""
        return replace(self, resumed=self.resumed + NEWEST_WEIGHT * (1 - self.resumed))

    def after_long(self, score: float | None) -> "Habit":
        """The habit with one more pause that lasted; None if its score isn't known."""
        mean = self.score if score is None else self.score + NEWEST_WEIGHT * (score - self.score)
        return Habit(self.resumed - NEWEST_WEIGHT * self.resumed, mean)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a pause is judged by."""

    asked: Trigger  # "turn": after ``silence_ms``; "silence": after ``min_silence_ms``
    habit: Habit  # before this pause
    score: float  # the highest speech score of the pause's newest frames
    probability: float | None  # the turn model's; None without one, or if it failed


def is_over(evidence: Evidence, *, config: EndpointConfig) -> bool:
    """Whether the utterance ends now.

    It does if the pause is about as still as those of the source that lasted, unless the turn
    sounds unfinished; early only if the source seldom goes on after a pause. The more seldom, the
    less the model counts.
    """
    habit, is_early = evidence.habit, evidence.asked == "turn"
    still = max(config.still, habit.score) * (1.0 if is_early else LATE)
    if evidence.score > still or (is_early and habit.resumed > config.max_resumed):
        return False
    if evidence.probability is None:
        return True
    caution = min(1.0, habit.resumed / WARY)
    least = config.finished if is_early else config.unfinished
    return evidence.probability >= caution * least
