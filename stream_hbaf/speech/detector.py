"""Cuts sound into utterances, where voice activity and the segmenter find them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.events import Trigger
from stream_hbaf.speech.endpointer import Habit
from stream_hbaf.speech.segmenter import (
    Begin,
    Consult,
    Extend,
    Finish,
    Pause,
    Resume,
    Segmenter,
    SegmenterAction,
)
from stream_hbaf.speech.vad import SpeechDetector, open_detector

Int16 = NDArray[np.int16]
# After the end of an utterance, before the VAD forgets it. What follows sooner mostly belongs to
# the same speech, in which its memory finds boundaries better.
FORGET_SAMPLES = 6 * SAMPLE_RATE_HZ // 10
PAUSES: tuple[Trigger, ...] = ("turn", "silence", "timeout")  # triggers that follow silence


@dataclass(frozen=True, slots=True)
class Feed:
    """The utterance's next samples: [start, start + n), no gap since the last ones."""

    start: int
    samples: Int16


UtteranceAction = Begin | Feed | Pause | Resume | Consult | Finish


class UtteranceDetector:
    """Turns sound into utterances with the samples that belong to them.

    Sound is held until the segmenter has decided whether it belongs to an utterance. The actions
    don't depend on how the sound is split. With ``asks`` the settings of ``endpoint`` hold, and
    pauses bring a Consult; without, silence alone ends utterances. Raises ModelError when the VAD's
    weights are missing, ConfigError when the settings contradict each other.
    """

    _segmenter: Segmenter
    _held: Int16  # samples from _held_start on that may still belong to an utterance
    _held_start: int
    _unscored: Int16  # the newest of these, which wait for an answer

    def __init__(
        self, config: Config, *, vad: SpeechDetector | None = None, asks: bool = False
    ) -> None:
        self.vad = vad or open_detector(config.vad.engine)
        self.score = 0.0  # of the newest frame
        self.highest_score = 0.0  # of all frames
        self._config = config
        self._endpoint = config.endpoint if asks else None
        self._restart(0, habit=Habit())

    def feed(self, samples: Int16) -> list[UtteranceAction]:
        """What the next samples bring about, in order, up to a Consult if there is one.

        ``answer`` is due after a Consult, and goes on with the rest of the samples.
        """
        assert not len(self._unscored)
        self._held = np.concatenate([self._held, samples])
        self._unscored = samples
        return self._advance()

    def answer(self, *, is_over: bool) -> list[UtteranceAction]:
        """What the answer to a Consult and the samples after it bring about, as ``feed`` does."""
        return self._apply(self._segmenter.answer(is_over=is_over)) + self._advance()

    def feed_whole(
        self, samples: Int16, *, is_over: Callable[[Consult], bool]
    ) -> Iterator[UtteranceAction]:
        """What the next samples bring about, all of it; ``is_over`` answers each Consult."""
        actions = self.feed(samples)
        while actions:
            yield from actions
            last = actions[-1]
            actions = self.answer(is_over=is_over(last)) if isinstance(last, Consult) else []

    def _advance(self) -> list[UtteranceAction]:
        """Score the samples that are left, up to a Consult."""
        actions: list[UtteranceAction] = []
        # Frame by frame, because an utterance's end may change the score of the next frame.
        while len(self._unscored) and not (actions and isinstance(actions[-1], Consult)):
            piece = self._unscored[: self.vad.frame_samples]
            self._unscored = self._unscored[len(piece) :]
            for score in self.vad.feed(piece):
                self.score = float(score)
                self.highest_score = max(self.highest_score, self.score)
                actions += self._apply(self._segmenter.feed(self.score))
                self._forget_after_silence()
        keep_from = self._segmenter.keep_from
        self._held = self._held[keep_from - self._held_start :]
        self._held_start = keep_from
        return actions

    def _apply(self, found: Sequence[SegmenterAction]) -> list[UtteranceAction]:
        if self._config.vad.forget and any(map(_ended_by_pause, found)):
            self._silence_left = FORGET_SAMPLES
        return list(map(self._with_samples, found))

    def _forget_after_silence(self) -> None:
        """Let the VAD forget an utterance once FORGET_SAMPLES without speech have followed."""
        if self._silence_left > 0 and not self._segmenter.in_speech:
            self._silence_left -= self.vad.frame_samples
            if self._silence_left <= 0:
                self.vad.forget()

    def flush(self, *, resume_at: int, trigger: Trigger = "end_of_input") -> list[UtteranceAction]:
        """End the open utterance: the input ends or has a gap, or the end is requested.

        The next sample that is fed has the number ``resume_at``.
        """
        actions = [self._with_samples(action) for action in self._segmenter.flush(trigger=trigger)]
        self._restart(resume_at, habit=self._segmenter.habit)
        return actions

    def _with_samples(self, action: SegmenterAction) -> UtteranceAction:
        if not isinstance(action, Extend):
            return action
        start, end = (sample - self._held_start for sample in (action.start, action.end))
        return Feed(action.start, self._held[start:end])

    def _restart(self, origin: int, *, habit: Habit) -> None:
        self.vad.reset()
        self._segmenter = Segmenter(
            self._config.segmenter,
            self._config.vad,
            frame_samples=self.vad.frame_samples,
            origin=origin,
            endpoint=self._endpoint,
            habit=habit,
        )
        self._silence_left = 0  # until the VAD forgets; 0: there is nothing to forget
        self._unscored = np.zeros(0, np.int16)
        self._held_start = origin
        self._held = np.zeros(0, np.int16)


def _ended_by_pause(action: SegmenterAction) -> bool:
    return isinstance(action, Finish) and action.trigger in PAUSES
