"""The decision at a pause: what each piece of evidence changes."""

import pytest

from stream_hbaf.config import EndpointConfig
from stream_hbaf.events import Trigger
from stream_hbaf.speech.endpointer import Evidence, Habit, is_over

CONFIG = EndpointConfig(finished=0.8, unfinished=0.3, max_resumed=0.2)
RESTS, GOES_ON = Habit(0.2), Habit(0.21)


@pytest.mark.parametrize(
    ("asked", "habit", "probability", "over"),
    [
        ("turn", RESTS, 0.8, True),
        ("turn", RESTS, 0.79, False),
        ("turn", GOES_ON, 1.0, False),
        ("turn", RESTS, None, False),
        ("turn", Habit(0.05), 0.2, True),
        ("turn", Habit(0.05), 0.19, False),
        ("turn", Habit(0.0), 0.0, True),
        ("silence", Habit(0.05), 0.08, True),
        ("silence", Habit(0.05), 0.07, False),
        ("silence", GOES_ON, 0.3, True),
        ("silence", RESTS, 0.29, False),
        ("silence", GOES_ON, None, True),
    ],
)
def test_is_over(asked: Trigger, habit: Habit, probability: float | None, over: bool) -> None:
    """Early both have to agree, the habit for more than half of it; later only an unfinished turn
    keeps the utterance open; without a model silence alone decides."""
    assert is_over(Evidence(asked, habit, probability), config=CONFIG) is over


def test_new_source_is_trusted_after_four_pauses() -> None:
    """At the defaults: four pauses that last, and one more for most of those that don't."""
    habit = Habit()
    counts = 0
    while habit.resumed > EndpointConfig().max_resumed:
        habit, counts = habit.after(resumed=False), counts + 1
    assert counts == 4
    assert habit.after(resumed=True).resumed == pytest.approx(0.277, abs=0.001)
