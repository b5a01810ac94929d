"""Sound becomes utterances, each with the samples that surely belong to it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import Config
from stream_hbaf.events import Trigger
from stream_hbaf.speech.segmenter import Action, Feed, Segmenter
from stream_hbaf.speech.vad import SpeechDetector, open_detector

Int16 = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Sound:
    """Samples that now surely belong to the utterance, [start, start + n)."""

    start: int
    samples: Int16


class Listener:
    """Cuts sound into utterances: voice activity, segmenter, and the sound held in between."""

    def __init__(self, config: Config, *, detector: SpeechDetector | None = None) -> None:
        self.detector = detector or open_detector(config.vad.engine)
        self.score = 0.0  # of the newest frame
        self._config = config
        self._held_start = 0
        self._held: Int16 = np.zeros(0, np.int16)
        self._start_over(0)

    def feed(self, samples: Int16) -> list[Action | Sound]:
        """What happened in these samples, in order, with its sound in place of each Feed."""
        self._held = np.concatenate([self._held, samples])
        heard: list[Action | Sound] = []
        for score in self.detector.feed(samples):
            self.score = float(score)
            heard += map(self._with_sound, self._segmenter.feed(self.score))
        keep_from = self._segmenter.keep_from
        self._held = self._held[keep_from - self._held_start :]
        self._held_start = keep_from
        return heard

    def flush(self, *, resume_at: int, trigger: Trigger = "end_of_input") -> list[Action | Sound]:
        """End of the input or a gap in it; what follows is counted from ``resume_at``."""
        heard = [self._with_sound(action) for action in self._segmenter.flush(trigger=trigger)]
        self._start_over(resume_at)
        return heard

    def _with_sound(self, action: Action) -> Action | Sound:
        if not isinstance(action, Feed):
            return action
        start, end = (sample - self._held_start for sample in (action.start, action.end))
        return Sound(action.start, self._held[start:end])

    def _start_over(self, origin: int) -> None:
        self.detector.reset()
        self._segmenter = Segmenter(
            self._config.segmenter,
            self._config.vad,
            frame_samples=self.detector.frame_samples,
            origin=origin,
        )
        self._held_start = origin
        self._held = np.zeros(0, np.int16)
