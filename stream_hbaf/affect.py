"""Valence and arousal of emotions, and the mood of a speaker.

Both are from -1 to 1: from unpleasant to pleasant, and from calm to excited. They are derived from
the probabilities of labels, each of which has a fixed place: the mean ratings of the words on
Mehrabian's scales of pleasure and arousal (Russell and Mehrabian 1977, "Evidence for a three-factor
theory of emotions"). Anger and fear lie close together there; dominance is left out. Where a bundle
has a head for the arousal of voices, arousal is the mean of both: the labels' places don't say how
strongly an emotion is expressed, and the voice alone says less of what emotion it is.
"""

import math
from collections.abc import Iterable, Mapping

from stream_hbaf.events import Affect, Utterance

# Valence and arousal by label, MELD's seven and IEMOCAP's other ones.
PLACES: Mapping[str, tuple[float, float]] = {
    "anger": (-0.51, 0.59),
    "disgust": (-0.60, 0.35),
    "excitement": (0.62, 0.75),
    "fear": (-0.64, 0.60),
    "frustration": (-0.64, 0.52),
    "happiness": (0.81, 0.51),
    "joy": (0.76, 0.48),
    "neutral": (0.0, 0.0),
    "sadness": (-0.63, -0.27),
    "surprise": (0.40, 0.67),
}
NEWEST_WEIGHT = 0.3  # in a mood: an utterance counts half after two more
DEPARTURE = 0.4  # from a mood: about half the way from neutral to sadness (0.69) or anger (0.78)


def affect_of(probabilities: Mapping[str, float], heard: float | None = None) -> Affect | None:
    """The expected valence and arousal; None if a label has no known place.

    ``heard`` is the arousal of the voice, where a head has measured it.
    """
    if not probabilities or not probabilities.keys() <= PLACES.keys():
        return None
    valence, arousal = (
        sum(share * PLACES[label][axis] for label, share in probabilities.items())
        for axis in (0, 1)
    )
    if heard is None:
        return Affect(valence=valence, arousal=arousal)
    return Affect(valence=valence, arousal=(arousal + heard) / 2, source="trained")


def mood_after(mood: Affect | None, affect: Affect) -> Affect:
    """A speaker's mood after an utterance: an exponentially decayed mean."""
    if mood is None:
        return affect
    return Affect(
        valence=mood.valence + NEWEST_WEIGHT * (affect.valence - mood.valence),
        arousal=mood.arousal + NEWEST_WEIGHT * (affect.arousal - mood.arousal),
        source=affect.source,
    )


def departs(mood: Affect | None, affect: Affect) -> bool:
    """Whether an utterance is far from its speaker's mood before it; a first one never is."""
    if mood is None:
        return False
    distance = math.hypot(affect.valence - mood.valence, affect.arousal - mood.arousal)
    return distance >= DEPARTURE


def moods_of(ends: Iterable[Utterance]) -> dict[str, Affect]:
    """Each speaker's mood after finished utterances in their order."""
    moods: dict[str, Affect] = {}
    for end in ends:
        if end.emotion is not None and end.emotion.affect is not None:
            moods[end.speaker] = mood_after(moods.get(end.speaker), end.emotion.affect)
    return moods
