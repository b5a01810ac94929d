"""The dialogue that a source is in, or several that share one, and where it ends."""

from dataclasses import dataclass

from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.events import DialogueSummary
from stream_hbaf.live.speakers import DialogueSpeakers
from stream_hbaf.live.summary import RunningSummary
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

    def begin(
        self,
        recognizer: Recognizer,
        dialogue: LiveDialogue,
        *,
        summary: RunningSummary | None = None,
    ) -> LiveDialogue:
        """Go on with a dialogue: one that has no utterance yet, or one with its summary so far."""
        self.dialogue, self.recognizer = dialogue, recognizer
        summary = summary or RunningSummary(dialogue)
        self.speakers = DialogueSpeakers(recognizer, dialogue, summary)
        return dialogue

    def save(self, *, at_s: float) -> SavedDialogue | None:
        """The dialogue as it is ``at_s`` seconds after the sources were opened, if there is one."""
        if self.dialogue is None or self.speakers is None:
            return None
        kept, summary = self.dialogue.without_past(), self.speakers.summary
        return SavedDialogue(kept, at_s - self.last_end_s, summary.latest, summary.emotions)

    def resume(
        self, recognizer: Recognizer, saved: SavedDialogue, *, at_s: float, later_s: float
    ) -> None:
        """Go on with a dialogue that was saved ``later_s`` seconds ago, ``at_s`` of this run."""
        summary = RunningSummary(saved.dialogue, saved.summary, saved.emotions)
        self.begin(recognizer, saved.dialogue, summary=summary)
        self.last_end_s = at_s - saved.silent_s - later_s

    def end(self) -> None:
        """End the dialogue: the next utterance is the first of a new one."""
        self.dialogue = self.recognizer = self.speakers = None
