"""The dialogue that a source is in, or several that share one: where it ends, and its summary."""

from collections import Counter
from dataclasses import dataclass

from stream_hbaf.affect import departs, mood_after, moods_of
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.events import DialogueSummary, Utterance
from stream_hbaf.live.speakers import DialogueSpeakers
from stream_hbaf.recognizer import Recognizer


@dataclass(frozen=True, slots=True)
class SavedDialogue:
    """A dialogue with all that going on with it needs: a value, which later turns don't change."""

    dialogue: LiveDialogue  # without its past: what is over can't be revised
    silent_s: float  # since the newest utterance ended, when it was saved
    summary: DialogueSummary | None
    emotions: int  # utterances with an emotion that are in the summary


@dataclass(slots=True, eq=False)
class DialogueTracker:
    """The current dialogue of one source, or of several that share it.

    A long silence or a request ends a dialogue; the next utterance begins another.
    """

    dialogue: LiveDialogue | None = None
    recognizer: Recognizer | None = None  # the one whose states the dialogue holds
    speakers: DialogueSpeakers | None = None  # of that dialogue
    last_end_s: float = 0.0  # end of the newest utterance, since the sources were opened
    _summary: DialogueSummary | None = None  # of the dialogue so far
    _emotions: int = 0  # utterances with an emotion that are in it

    def next_turn(self, recognizer: Recognizer, *, at_s: float) -> tuple[LiveDialogue, int]:
        """The dialogue of an utterance that begins at ``at_s`` seconds, and its turn there."""
        late = at_s - self.last_end_s > recognizer.config.dialogue.gap_s
        if self.dialogue is None or self.recognizer is not recognizer or late:
            keeps = recognizer.config.dialogue.keep_voices and self.recognizer is recognizer
            before = self.dialogue if keeps else None
            self.end()
            self.dialogue = self.begin(recognizer, recognizer.new_dialogue())
            if before is not None:
                self.dialogue.go_on_from(before)
        return self.dialogue, self.dialogue.next_turn()

    def begin(self, recognizer: Recognizer, dialogue: LiveDialogue) -> LiveDialogue:
        """Go on with a dialogue that has no utterance yet."""
        self.dialogue, self.recognizer = dialogue, recognizer
        self.speakers = DialogueSpeakers(recognizer, dialogue)
        return dialogue

    def save(self, *, at_s: float) -> SavedDialogue | None:
        """The dialogue as it is ``at_s`` seconds after the sources were opened, if there is one."""
        if self.dialogue is None:
            return None
        kept = self.dialogue.without_past()
        return SavedDialogue(kept, at_s - self.last_end_s, self._summary, self._emotions)

    def resume(
        self, recognizer: Recognizer, saved: SavedDialogue, *, at_s: float, later_s: float
    ) -> None:
        """Go on with a dialogue that was saved ``later_s`` seconds ago, ``at_s`` of this run."""
        self.begin(recognizer, saved.dialogue)
        self.last_end_s = at_s - saved.silent_s - later_s
        self._summary, self._emotions = saved.summary, saved.emotions

    def end(self) -> None:
        """End the dialogue: the next utterance is the first of a new one."""
        self.dialogue = self.recognizer = self.speakers = self._summary = None
        self._emotions = 0

    def summarise(self, end: Utterance) -> DialogueSummary | None:
        """The dialogue including its newest ``end``; None if that is of an earlier dialogue."""
        if self.dialogue is None or end.dialogue_id != self.dialogue.id:
            return None
        before = self._summary
        speakers = dict(before.speakers) if before else {}
        emotions = Counter(before.emotions if before else {})
        means = dict(before.probabilities) if before else {}
        moods = dict(before.mood) if before else {}
        shift = False
        if end.emotion is not None:
            self._emotions += 1
            speakers[end.speaker] = end.emotion.label
            emotions[end.emotion.label] += 1
            for label, probability in end.emotion.probabilities.items():
                mean = means.get(label, 0.0)
                means[label] = mean + (probability - mean) / self._emotions
            if (affect := end.emotion.affect) is not None:
                mood = moods.get(end.speaker)
                shift = departs(mood, affect)
                moods[end.speaker] = mood_after(mood, affect)
        self._summary = DialogueSummary(
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
        return self._summary

    def summarise_revision(self, before: Utterance, after: Utterance) -> DialogueSummary | None:
        """The dialogue after an ``end`` was revised; None if that is of an earlier dialogue."""
        summary = self._summary
        if summary is None or self.speakers is None or after.dialogue_id != summary.dialogue_id:
            return None
        emotions, means = Counter(summary.emotions), dict(summary.probabilities)
        if after.emotion is not None and before.emotion is not None:
            emotions[before.emotion.label] -= 1
            emotions[after.emotion.label] += 1
            for label, probability in after.emotion.probabilities.items():
                means[label] += (probability - before.emotion.probabilities[label]) / self._emotions
        self._summary = summary.model_copy(
            update={
                "speakers": self.speakers.latest_labels(),
                "emotions": dict(+emotions),
                "probabilities": means,
                "mood": moods_of(self.speakers.ends),
            }
        )
        return self._summary
