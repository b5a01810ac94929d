"""The summary of a dialogue so far, renewed with each of its utterances without keeping them."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from stream_hbaf.affect import departs, mood_after, moods_of
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.events import DialogueSummary, Utterance


@dataclass(slots=True, eq=False)
class RunningSummary:
    """The summary of one dialogue; its utterances may end after the next dialogue has begun."""

    dialogue: LiveDialogue
    latest: DialogueSummary | None = None
    emotions: int = 0  # utterances with an emotion that are in it

    def add(self, end: Utterance) -> DialogueSummary:
        """The dialogue including its newest ``end``."""
        before = self.latest
        speakers = dict(before.speakers) if before else {}
        emotions = Counter(before.emotions if before else {})
        means = dict(before.probabilities) if before else {}
        moods = dict(before.mood) if before else {}
        shift = False
        if end.emotion is not None:
            self.emotions += 1
            speakers[end.speaker] = end.emotion.label
            emotions[end.emotion.label] += 1
            for label, probability in end.emotion.probabilities.items():
                mean = means.get(label, 0.0)
                means[label] = mean + (probability - mean) / self.emotions
            if (affect := end.emotion.affect) is not None:
                mood = moods.get(end.speaker)
                shift = departs(mood, affect)
                moods[end.speaker] = mood_after(mood, affect)
        self.latest = DialogueSummary(
            source=end.source,
            dialogue_id=end.dialogue_id,
            follows=next(iter(self.dialogue.follows), None),
            start_time=before.start_time if before else end.start_time,
            end_time=end.end_time or end.start_time,
            turns=(before.turns if before else 0) + 1,
            speakers=speakers,
            emotions=dict(emotions),
            probabilities=means,
            mood=moods,
            shift=shift,
        )
        return self.latest

    def revise(
        self, before: Utterance, after: Utterance, *, ends: Collection[Utterance]
    ) -> DialogueSummary | None:
        """The dialogue after an ``end`` was revised; None before the first.

        ``ends`` are the newest utterances as they are now, in their order.
        """
        if self.latest is None:
            return None
        emotions, means = Counter(self.latest.emotions), dict(self.latest.probabilities)
        if after.emotion is not None and before.emotion is not None:
            emotions[before.emotion.label] -= 1
            emotions[after.emotion.label] += 1
            for label, probability in after.emotion.probabilities.items():
                means[label] += (probability - before.emotion.probabilities[label]) / self.emotions
        self.latest = self.latest.model_copy(
            update={
                "speakers": {one.speaker: one.emotion.label for one in ends if one.emotion},
                "emotions": dict(+emotions),
                "probabilities": means,
                "mood": moods_of(ends),
            }
        )
        return self.latest
