"""Decides at a pause whether the turn is over, from what is known at that sample.

Both values and the decision are pure, so that the same sound ends at the same places however it
came in.
"""

from dataclasses import dataclass

from stream_hbaf.config import EndpointConfig
from stream_hbaf.events import Trigger

# Chosen on readers, whose every pause must not be an end, and on sentences with the gaps of
# dialogues: a source begins as one that seems to go on after pauses, and four pauses that last
# show that it doesn't.
FIRST_RESUMED = 0.3
NEWEST_WEIGHT = 0.1
WARY = 0.2  # share of short pauses from which on the model has to be as sure as the settings say


@dataclass(frozen=True, slots=True)
class Habit:
    """How a source pauses: the share of pauses of ``endpoint.silence_ms`` that were short.

    Short is a pause after which speech resumed before ``segmenter.min_silence_ms``. Newer ones
    weigh more.
    """

    resumed: float = FIRST_RESUMED

    def after(self, *, resumed: bool) -> "Habit":
        """The habit with one more pause."""
        return Habit(self.resumed + NEWEST_WEIGHT * (resumed - self.resumed))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a pause is judged by."""

    asked: Trigger  # "turn": after ``silence_ms``; "silence": after ``min_silence_ms``
    habit: Habit  # before this pause
    probability: float | None  # the turn model's; None if it failed


def is_over(evidence: Evidence, *, config: EndpointConfig) -> bool:
    """Whether the utterance ends now.

    Early it does where the turn sounds finished and the source seldom goes on after such a pause;
    later, unless the turn sounds unfinished. The more seldom, the less sure the model has to be.
    """
    if evidence.probability is None:
        return evidence.asked == "silence"
    caution = min(1.0, evidence.habit.resumed / WARY)
    if evidence.asked == "silence":
        return evidence.probability >= caution * config.unfinished
    rests = evidence.habit.resumed <= config.max_resumed
    return rests and evidence.probability >= caution * config.finished
