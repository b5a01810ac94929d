"""Promises of valence and arousal, and of moods."""

import pytest
import torch
from mqtt_kit import utterance

from stream_hbaf.affect import DEPARTURE, PLACES, affect_of, departs, mood_after, moods_of
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.corpora.iemocap import IEMOCAP_LABELS
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.events import Affect, Emotion, Utterance
from stream_hbaf.live.summary import RunningSummary
from stream_hbaf.networks.network import Stateless


def end(turn: int, speaker: str, **probabilities: float) -> Utterance:
    label = max(probabilities, key=probabilities.__getitem__)
    affect = affect_of(probabilities)
    emotion = Emotion(label=label, probabilities=probabilities, affect=affect)
    return utterance(turn).model_copy(update={"speaker": speaker, "emotion": emotion})


def test_affect_is_the_expectation_over_labels() -> None:
    """A sure label gives its place, doubt a mean, neutral nothing; it says that it is derived."""
    assert affect_of({"joy": 1.0, "anger": 0.0}) == Affect(valence=0.76, arousal=0.48)
    half = affect_of({"joy": 0.5, "anger": 0.25, "neutral": 0.25})
    assert half is not None
    assert half.valence == pytest.approx(0.5 * 0.76 - 0.25 * 0.51)
    assert half.arousal == pytest.approx(0.5 * 0.48 + 0.25 * 0.59)
    assert half.source == "derived"


def test_arousal_of_a_voice_is_half_of_it() -> None:
    """Where a head has heard the voice; valence stays, and a mood says where its newest is from."""
    found = affect_of({"joy": 1.0}, 0.9)
    assert found is not None
    assert (found.valence, found.source) == (0.76, "trained")
    assert found.arousal == pytest.approx((0.48 + 0.9) / 2)
    assert mood_after(affect_of({"joy": 1.0}), found).source == "trained"
    assert affect_of({"bored": 1.0}, 0.9) is None


def test_every_label_of_the_published_corpora_has_a_place() -> None:
    """All are within -1 to 1, and a label of one's own has none."""
    assert {*LABELS, *IEMOCAP_LABELS} <= PLACES.keys() | {"other"}
    assert all(abs(axis) <= 1 for place in PLACES.values() for axis in place)
    assert affect_of({"bored": 0.5, "joy": 0.5}) is None
    assert affect_of({}) is None


def test_a_mood_follows_its_speaker() -> None:
    """The first utterance is the mood; later ones move it by three tenths of the way."""
    first, second = Affect(valence=0.0, arousal=0.0), Affect(valence=1.0, arousal=-1.0)
    mood = mood_after(mood_after(None, first), second)
    assert [mood.valence, mood.arousal] == pytest.approx([0.3, -0.3])


def test_a_departure_is_from_the_mood_before() -> None:
    """From neutral, sure anger is far and half a joy isn't; a first utterance never is."""
    calm = Affect(valence=0.0, arousal=0.0)
    assert departs(calm, Affect(valence=-0.51, arousal=0.59))
    assert not departs(calm, Affect(valence=0.35, arousal=0.1))
    assert departs(calm, Affect(valence=0.0, arousal=DEPARTURE))
    assert not departs(None, Affect(valence=1.0, arousal=1.0))


def test_a_dialogue_tells_each_speakers_mood() -> None:
    """Ann's anger isn't Bob's, and shows as a shift; moods are those of ``moods_of``."""
    ends = [
        end(1, "Ann", neutral=1.0, anger=0.0),
        end(2, "Bob", neutral=0.0, anger=1.0),
        end(3, "Ann", neutral=0.0, anger=1.0),
    ]
    summary = RunningSummary(LiveDialogue(Stateless(torch.zeros(0)), id="d"))
    summaries = [summary.add(one) for one in ends]
    assert [one.shift for one in summaries] == [False, False, True]
    last = summaries[-1]
    assert last.mood == moods_of(ends)
    assert last.mood["Ann"].valence == pytest.approx(-0.51 * 0.3)
    assert last.mood["Bob"].arousal == pytest.approx(0.59)
