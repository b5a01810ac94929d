"""Cuts a stream of sound into utterances: voice activity detection, segmenter, sound in between."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import Config
from stream_hbaf.events import Trigger
from stream_hbaf.speech.segmenter import (
    Begin,
    Extend,
    Finish,
    Pause,
    Resume,
    Segmenter,
    SegmenterAction,
)
from stream_hbaf.speech.vad import SpeechDetector, open_detector

Int16 = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Feed:
    """The utterance's next samples: [start, start + n), no gap since the last ones."""

    start: int
    samples: Int16


UtteranceAction = Begin | Feed | Pause | Resume | Finish


class UtteranceDetector:
    """Turns sound into utterances with the samples that belong to them.

    Sound is held until the segmenter has decided whether it belongs to an utterance. The actions
    don't depend on how the sound is split. Raises ModelError when the VAD's weights are missing,
    ConfigError when the settings contradict each other.
    """

    def __init__(self, config: Config, *, vad: SpeechDetector | None = None) -> None:
        self.vad = vad or open_detector(config.vad.engine)
        self.score = 0.0  # of the newest frame
        self._config = config
        self._held_start = 0
        self._held: Int16 = np.zeros(0, np.int16)
        self._restart(0)

    def feed(self, samples: Int16) -> list[UtteranceAction]:
        """What the next samples bring about, in order."""
        self._held = np.concatenate([self._held, samples])
        actions: list[UtteranceAction] = []
        for score in self.vad.feed(samples):
            self.score = float(score)
            actions += map(self._with_samples, self._segmenter.feed(self.score))
        keep_from = self._segmenter.keep_from
        self._held = self._held[keep_from - self._held_start :]
        self._held_start = keep_from
        return actions

    def flush(self, *, resume_at: int, trigger: Trigger = "end_of_input") -> list[UtteranceAction]:
        """End the open utterance: the input ends or has a gap, or somebody asks for the end.

        The next sample that is fed has the number ``resume_at``.
        """
        actions = [self._with_samples(action) for action in self._segmenter.flush(trigger=trigger)]
        self._restart(resume_at)
        return actions

    def _with_samples(self, action: SegmenterAction) -> UtteranceAction:
        if not isinstance(action, Extend):
            return action
        start, end = (sample - self._held_start for sample in (action.start, action.end))
        return Feed(action.start, self._held[start:end])

    def _restart(self, origin: int) -> None:
        self.vad.reset()
        self._segmenter = Segmenter(
            self._config.segmenter,
            self._config.vad,
            frame_samples=self.vad.frame_samples,
            origin=origin,
        )
        self._held_start = origin
        self._held = np.zeros(0, np.int16)
