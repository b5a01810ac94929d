"""A dialogue's rolling summary is that of all its utterances, without keeping them."""

import sys
from typing import Any, cast

import numpy as np
import pytest
from dialogue_samples import LABELS, utterance

from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.events import DialogueSummary, Emotion
from stream_hbaf.live.summary import RunningSummary


def running() -> RunningSummary:
    return RunningSummary(LiveDialogue(cast(Any, None), id="a"))


def test_summary_of_many_turns() -> None:
    """Counts, latest labels and means are those of a plain computation over all turns."""
    followed, rng = running(), np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(len(LABELS)), size=500)
    labels = [LABELS[row.argmax()] for row in rows]
    summary: DialogueSummary | None = None
    for turn, (row, label) in enumerate(zip(rows, labels, strict=True)):
        probabilities = dict(zip(LABELS, row.tolist(), strict=True))
        emotion = Emotion(label=label, score=max(row), probabilities=probabilities)
        end = utterance(turn, dialogue="a", emotion=emotion)
        summary = followed.add(end.model_copy(update={"speaker": "AB"[turn % 2]}))
    assert summary is not None
    assert summary.turns == 500
    assert summary.speakers == {"A": labels[-2], "B": labels[-1]}
    assert summary.emotions == {label: labels.count(label) for label in set(labels)}
    assert list(summary.probabilities.values()) == pytest.approx(rows.mean(axis=0).tolist())


def test_summary_grows_with_no_turn() -> None:
    """A dialogue that never pauses takes as much memory after 2,000 turns as after 20."""
    followed = running()

    def held() -> int:
        return sum(sys.getsizeof(getattr(followed, name)) for name in RunningSummary.__slots__)

    sizes = []
    for turn in range(2_000):
        followed.add(utterance(turn, dialogue="a"))
        sizes.append(held())
    assert sizes[20] == sizes[-1]


def test_summary_without_an_emotion() -> None:
    """An utterance that failed counts as a turn."""
    followed = running()
    end = utterance(1, dialogue="a").model_copy(update={"emotion": None})
    first = followed.add(end)
    assert (first.turns, first.emotions, first.probabilities) == (1, {}, {})
