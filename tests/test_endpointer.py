"""The decision at a pause: what each piece of evidence changes."""

import pytest

from stream_hbaf.config import EndpointConfig
from stream_hbaf.events import Trigger
from stream_hbaf.speech.endpointer import Evidence, Habit, is_over

CONFIG = EndpointConfig(still=0.1, finished=0.8, unfinished=0.3, max_resumed=0.4)
RESTS, GOES_ON, MOSTLY = Habit(0.4), Habit(0.41), Habit(0.6)


@pytest.mark.parametrize(
    ("asked", "habit", "score", "over"),
    [
        ("turn", RESTS, 0.1, True),
        ("turn", RESTS, 0.11, False),
        ("turn", GOES_ON, 0.0, False),
        ("turn", Habit(0.4, score=0.12), 0.12, True),
        ("turn", Habit(0.4, score=0.05), 0.1, True),
        ("silence", GOES_ON, 0.15, True),
        ("silence", GOES_ON, 0.16, False),
        ("silence", Habit(0.4, score=0.2), 0.3, True),
        ("silence", Habit(0.4, score=0.2), 0.31, False),
    ],
)
def test_is_over_without_a_model(asked: Trigger, habit: Habit, score: float, over: bool) -> None:
    """A still pause ends it, early only if the source seldom goes on; where the source's pauses
    that last are less still on average, so may this one be. The later question asks for less."""
    assert is_over(Evidence(asked, habit, score, None), config=CONFIG) is over


@pytest.mark.parametrize(
    ("asked", "habit", "probability", "over"),
    [
        ("turn", RESTS, 0.65, True),
        ("turn", RESTS, 0.63, False),
        ("turn", Habit(0.1), 0.17, True),
        ("turn", Habit(0.1), 0.15, False),
        ("turn", Habit(0.0), 0.0, True),
        ("turn", GOES_ON, 1.0, False),
        ("silence", MOSTLY, 0.3, True),
        ("silence", MOSTLY, 0.29, False),
        ("silence", Habit(0.1), 0.07, True),
        ("silence", Habit(0.1), 0.05, False),
    ],
)
def test_unfinished_turn_stays_open(
    asked: Trigger, habit: Habit, probability: float, over: bool
) -> None:
    """However still the pause is; the less, the more seldom the source goes on."""
    assert is_over(Evidence(asked, habit, 0.0, probability), config=CONFIG) is over
    assert not is_over(Evidence(asked, habit, 0.5, probability), config=CONFIG)


def test_new_source_is_trusted_after_one_pause() -> None:
    """At the defaults: one pause that lasts, and one or two more for each that doesn't."""
    most = EndpointConfig().max_resumed
    new = Habit()
    assert new.resumed > most
    once = new.after_long(0.05)
    assert once.resumed <= most
    assert once.after_short().resumed > most
    assert once.after_short().after_long(0.05).resumed <= most


def test_habit_is_a_running_mean() -> None:
    """Newer pauses weigh a tenth; a pause whose score isn't known counts for its length alone."""
    habit = Habit(0.5, 0.2).after_long(0.1)
    assert [habit.resumed, habit.score] == pytest.approx([0.45, 0.19])
    assert habit.after_long(None).score == habit.score
    short = habit.after_short()
    assert [short.resumed, short.score] == pytest.approx([0.505, 0.19])
