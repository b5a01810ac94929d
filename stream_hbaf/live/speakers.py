"""Who spoke the turns of a live dialogue, by voice or by correction, and what that revises.

Plain calls. Several sources may share a dialogue, so whoever makes calls that belong together holds
``lock``: a turn is attributed, classified and published before the next one is.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import UTTERANCE_ERRORS, ConfigError, shorten
from stream_hbaf.events import DialogueSummary, Utterance
from stream_hbaf.features.voice_prints import enrolled_voices, require_name
from stream_hbaf.live.summary import RunningSummary
from stream_hbaf.prediction import Prediction, emotion_of
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.format import SpeakerChange
from stream_hbaf.speech.diarizer import Attributed, Diarizer

LOG = logging.getLogger(__name__)

ENDS_KEPT = 2000  # finished utterances whose speaker may be revised: 4 MB; a page shows as many
SAME = 5e-6  # difference of two probabilities that count as the same


class Revision(NamedTuple):
    """The ``end`` of an utterance as it was published, and as it is now."""

    before: Utterance
    after: Utterance


class DialogueSpeakers:
    """Who spoke the turns of one dialogue. Changes classify the dialogue again from there on."""

    def __init__(
        self, recognizer: Recognizer, dialogue: LiveDialogue, summary: RunningSummary
    ) -> None:
        self.lock = asyncio.Lock()
        self.summary = summary
        self._recognizer = recognizer
        self._dialogue = dialogue
        self._diarizer: Diarizer | None = None  # since the first voice
        self._ends: dict[int, Utterance] = {}  # by turn: the latest of the newest utterances

    def attribute(
        self, turn: int, embedding: NDArray[np.float32] | None, *, samples: int
    ) -> tuple[Attributed, list[Revision]]:
        """Who spoke a finished utterance of so many samples; earlier ones that it decides are
        revised."""
        if self._diarizer is None:
            config = self._recognizer.config
            self._diarizer = Diarizer(config.speakers, voices=enrolled_voices(config))
        duration_s = samples / SAMPLE_RATE_HZ
        *earlier, own = self._diarizer.add(turn, embedding, duration_s=duration_s)
        return own, self._revise(earlier)

    def add(self, end: Utterance) -> DialogueSummary:
        """Remember an ``end`` that is published; the summary that includes it."""
        self._ends[end.turn] = end
        if len(self._ends) > ENDS_KEPT:
            del self._ends[next(iter(self._ends))]
        return self.summary.add(end)

    def summarise(self, revision: Revision) -> DialogueSummary | None:
        """The summary after a revision; None before the first utterance."""
        return self.summary.revise(*revision, ends=self._ends.values())

    def apply(self, change: SpeakerChange) -> list[Revision]:
        """What a person says about the speakers. Raises ConfigError if it can't be."""
        into = require_name(change.into)
        if change.change == "correct":
            if change.turn not in self._ends:
                raise ConfigError(
                    f"no finished utterance {change.dialogue_id}-{change.turn}, or too long ago"
                )
            own = (Attributed(change.turn, into, 1.0, "corrected"),)
            found = self._diarizer.correct(change.turn, into) if self._diarizer else own
            return self._revise(found)
        if self._diarizer is None:
            raise ConfigError("no speakers are told apart by their voices; see speakers.engine")
        spoken = self._require_known(change.speaker)
        if change.change == "merge":
            self._require_known(change.into, also_named=True)
            found = self._diarizer.merge(change.speaker, into)
        else:
            found = self._diarizer.rename(change.speaker, into)
        # The diarizer remembers fewer turns than have been published.
        every = {one.turn: Attributed(one.turn, into, 1.0, "corrected") for one in spoken}
        every |= {one.turn: one for one in found}
        return self._revise(every.values())

    def _require_known(self, speaker: str, *, also_named: bool = False) -> list[Utterance]:
        """The utterances of a speaker who is known by voice or correction, or named in settings."""
        found: dict[str, list[Utterance]] = {}
        for end in self._ends.values():
            if end.speaker and (also_named or end.speaker_source != "source"):
                found.setdefault(end.speaker, []).append(end)
        if speaker not in found:
            known = ", ".join(found) or "nobody yet"
            raise ConfigError(f"no speaker '{shorten(speaker)}' in this dialogue: there is {known}")
        return found[speaker]

    def _revise(self, changed: Iterable[Attributed]) -> list[Revision]:
        """Classify the dialogue again from the first turn that somebody else has spoken."""
        attributed = {one.turn: one for one in changed}
        predictions: Mapping[int, Prediction] = {}
        try:
            predictions = self._recognizer.revise(
                self._dialogue, {turn: one.speaker for turn, one in attributed.items()}
            )
        except UTTERANCE_ERRORS as error:  # the speakers are right all the same
            LOG.warning("emotions are not revised with the speakers: %s", shorten(str(error)))
        revisions = []
        for turn, end in self._ends.items():
            after = _revised(end, attributed.get(turn), predictions.get(turn))
            if after is not None:
                revisions.append(Revision(end, after))
                self._ends[turn] = after
        return revisions


def _revised(
    end: Utterance, attributed: Attributed | None, prediction: Prediction | None
) -> Utterance | None:
    """The next ``end`` of an utterance; None if it would say the same."""
    changes: dict[str, object] = {}
    if attributed is not None and (attributed.speaker, attributed.source) != (
        end.speaker,
        end.speaker_source,
    ):
        changes["speaker"], changes["speaker_source"] = attributed.speaker, attributed.source
        changes["speaker_score"] = attributed.score
    before = end.emotion.probabilities if end.emotion is not None else {}
    if prediction is not None and any(
        abs(probability - before.get(label, -1.0)) > SAME
        for label, probability in prediction.probabilities.items()
    ):
        changes["emotion"] = emotion_of(prediction)
        for name in ("contributions", "conflict", "inferences"):
            changes[name] = getattr(prediction, name)
    if not changes:
        return None
    return end.model_copy(
        update={**changes, "rev": end.rev + 1, "revision": (end.revision or 0) + 1}
    )
