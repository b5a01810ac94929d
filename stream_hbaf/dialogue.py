"""A dialogue that is going on: what is remembered between its utterances, and its latest turns.

Each of the latest turns is kept with all that it was classified from. When it turns out later that
somebody else spoke, the dialogue is rewound to before that turn, and classified again from there.
"""

import uuid
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.baseline import Float32, VoicePast
from stream_hbaf.features.prosody import ProsodyPast
from stream_hbaf.features.text import EMPTY_WINDOW, TurnWindow
from stream_hbaf.networks.calibration import (
    NOTHING_SUMMED,
    Modality,
    Probabilities,
    RunningSums,
)
from stream_hbaf.networks.network import State
from stream_hbaf.prediction import TextFeatures

# Turns that can be classified again: about five minutes of talk. With the shipped bundle that takes
# half a second and 10 MB; with low-level descriptors as input 20 MB.
TURNS_KEPT = 64
FOLLOWED = 1000  # dialogues in a row, whose ids are kept so that each can be forgotten; then anew


@dataclass(frozen=True, slots=True)
class ClassifiedTurn:
    """What a turn was classified from, and what the dialogue remembered before it."""

    turn: int  # its number in the dialogue
    acoustic: Acoustic | None
    text: TextFeatures | None
    speaker: str
    explain: bool
    modalities: Collection[Modality]
    state: State
    window: TurnWindow
    prosody: ProsodyPast
    voices: VoicePast
    speakers: tuple[str, ...]
    odds: Probabilities | None = None  # of the deployment's prior at that time
    sums: RunningSums = NOTHING_SUMMED


@dataclass(slots=True)
class LiveDialogue:
    """A dialogue that is going on: what is remembered between its utterances."""

    state: State
    window: TurnWindow = EMPTY_WINDOW  # the text that the next utterance is encoded with
    prosody: ProsodyPast = field(default_factory=ProsodyPast)  # what the next is relative to
    voices: VoicePast = field(default_factory=VoicePast)  # likewise, of all acoustic features
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    turns: int = 0
    speakers: list[str] = field(default_factory=list)  # in order of appearance
    past: deque[ClassifiedTurn] = field(default_factory=lambda: deque(maxlen=TURNS_KEPT))
    known: set[str] = field(default_factory=set)  # speakers whom other dialogues name alike
    follows: tuple[str, ...] = ()  # ids of the dialogues that it goes on from, newest first
    _before: "LiveDialogue | None" = None  # the newest of them, until its voices are taken over
    _kept: Mapping[str, Float32] = field(default_factory=dict)  # of known speakers before it
    sums: RunningSums = NOTHING_SUMMED  # how familiar its voices are, how much its words tell

    def go_on_from(self, before: "LiveDialogue") -> None:
        """Measure the known voices of another dialogue against how they sounded there.

        They are taken over with the first utterance here: those of the other one may be classified
        later than this one begins, but not later than that.
        """
        if len(before.follows) < FOLLOWED:
            self.follows = (before.id, *before.follows)
            self._before = before

    def voices_with(self, speaker: str) -> VoicePast:
        """What an utterance of a speaker is relative to: what was heard here, and where the speaker
        is new here, what is kept of earlier dialogues."""
        if self._before is not None:
            self._kept, self._before = self._before._known_voices(), None
        number = self.number_of(speaker)
        if number < len(self.speakers) or speaker not in self._kept:
            return self.voices
        return VoicePast({**self.voices.sums, number: self._kept[speaker]})

    def _known_voices(self) -> dict[str, Float32]:
        kept = dict(self._kept if self._before is None else self._before._known_voices())
        for number, speaker in enumerate(self.speakers):
            if speaker in self.known and number in self.voices.sums:
                kept[speaker] = self.voices.sums[number]
        return kept

    def next_turn(self) -> int:
        """The number of an utterance that begins, from 1."""
        self.turns += 1
        return self.turns

    def without_past(self) -> "LiveDialogue":
        """A copy with all that the next utterance needs, but not what earlier ones were."""
        return replace(self, speakers=[*self.speakers], past=deque(maxlen=TURNS_KEPT))

    def follow(self, after: "LiveDialogue") -> None:
        """Move on as a copy has that was made by ``without_past``."""
        self.state, self.window = after.state, after.window
        self.prosody, self.voices, self.sums = after.prosody, after.voices, after.sums
        self.speakers = [*after.speakers]
        self.past.extend(after.past)

    def number_of(self, speaker: str) -> int:
        """The speaker's place in the order of appearance, the next free one for a new speaker."""
        known = self.speakers
        return known.index(speaker) if speaker in known else len(known)

    def keep(
        self,
        turn: int,
        inputs: tuple[Acoustic | None, TextFeatures | None],
        *,
        speaker: str,
        explain: bool,
        modalities: Collection[Modality],
        odds: Probabilities | None = None,
    ) -> None:
        """Keep what the next turn is classified from, with the dialogue as it is before it."""
        kept = ClassifiedTurn(
            turn=turn,
            acoustic=inputs[0],
            text=inputs[1],
            speaker=speaker,
            explain=explain,
            modalities=modalities,
            state=self.state,
            window=self.window,
            prosody=self.prosody,
            voices=self.voices,
            speakers=tuple(self.speakers),
            odds=odds,
            sums=self.sums,
        )
        self.past.append(kept)

    @contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """The dialogue is as it was before if the block raises."""
        state, window, sound = self.state, self.window, (self.prosody, self.voices, self.sums)
        speakers, past = [*self.speakers], self.past.copy()
        try:
            yield
        except BaseException:
            self.state, self.window = state, window
            self.prosody, self.voices, self.sums = sound
            self.speakers, self.past = speakers, past
            raise

    def rewind(self, turns: Collection[int]) -> list[ClassifiedTurn]:
        """Go back to before the earliest of some turns; returns it and all after it, in order.

        Turns that aren't kept any more are passed over.
        """
        order = [one.turn for one in self.past]
        first = min((order.index(turn) for turn in turns if turn in order), default=len(order))
        undone = [self.past.pop() for _ in range(len(order) - first)][::-1]
        if undone:
            before = undone[0]
            self.state, self.window = before.state, before.window
            self.prosody, self.voices, self.sums = before.prosody, before.voices, before.sums
            self.speakers = [*before.speakers]
        return undone
