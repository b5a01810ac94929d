"""Decides from speech scores where utterances begin, pause and end, and cuts the audio there.

``Segmenter`` is a pure state machine: scores in, actions out, without a clock and without audio.
All positions are sample numbers, a whole number of frames from ``origin``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ, Config, SegmenterConfig, VadConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Trigger
from stream_hbaf.speech.vad import SpeechDetector, open_detector


@dataclass(frozen=True, slots=True)
class Begin:
    """An utterance has begun at ``start``."""

    start: int


@dataclass(frozen=True, slots=True)
class Extend:
    """The samples [start, end) belong to the utterance; no gap since the last Extend."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Unless speech resumes the utterance ends at ``end``; all of it has been given."""

    end: int
    mean_score: float  # what Finish will give unless speech resumes


@dataclass(frozen=True, slots=True)
class Resume:
    """Speech goes on: the last Pause was not the end."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The utterance is [start, end)."""

    start: int
    end: int
    trigger: Trigger
    confirmed_at: int  # samples taken in when the end was decided
    mean_score: float  # of the frames from the first of speech to the last
    speech_end: int  # the last speech sample; what follows it until ``end`` is post-roll


SegmenterAction = Begin | Extend | Pause | Resume | Finish


@dataclass(slots=True)
class _Run:
    """Speech under way, an utterance once ``begin`` is set. Frame numbers, ends exclusive."""

    first: int  # frame of speech
    last: int  # end of the last frame of speech
    speech_frames: int = 0
    score_sum: float = 0.0  # from first to last
    silent_score_sum: float = 0.0  # since last
    begin: int | None = None  # of the utterance
    given: int = 0  # end of the last Extend
    paused: bool = False

    @property
    def mean_score(self) -> float:
        """Of the frames from the first of speech to the last."""
        return self.score_sum / (self.last - self.first)


class Segmenter:
    """Turns one speech score a frame into utterances that are ordered and never overlap.

    Frame ``i`` is the samples ``origin + [i, i + 1) * frame_samples``. Durations are rounded up
    to whole frames, the two limits on an utterance's length down.

    Raises ConfigError when the settings contradict each other.
    """

    def __init__(
        self, config: SegmenterConfig, vad: VadConfig, *, frame_samples: int, origin: int = 0
    ) -> None:
        _check(config, vad)

        def frames(duration_ms: int) -> int:
            return -(-duration_ms * SAMPLE_RATE_HZ // (1000 * frame_samples))

        def frames_within(limit_s: int) -> int:
            return max(1, limit_s * SAMPLE_RATE_HZ // frame_samples)

        self._threshold, self._release = vad.threshold, vad.release
        self._min_speech = frames(config.min_speech_ms)
        self._pause = frames(config.pause_ms)
        self._min_silence = frames(config.min_silence_ms)
        self._pre_roll = frames(config.pre_roll_ms)
        self._post_roll = frames(config.post_roll_ms)
        self._longest = frames_within(config.max_utterance_s)
        self._soft_limit = frames_within(config.soft_limit_s)
        self._frame_samples = frame_samples
        self._origin = origin

        # From here on positions are frame numbers; ends are exclusive.
        self._frames = 0  # so far
        self._floor = 0  # nothing before this may be used again
        self._is_speech = False
        self._run: _Run | None = None

    @property
    def keep_from(self) -> int:
        """No later action refers to a sample before this one: older sound may be dropped."""
        run = self._run
        if run is None:
            return self._sample(self._backdated(self._frames))
        if run.begin is None:
            return self._sample(self._backdated(run.first))
        return self._sample(run.given)

    def feed(self, score: float) -> list[SegmenterAction]:
        """What the next frame's score brings about, in order."""
        self._is_speech = score >= (self._release if self._is_speech else self._threshold)
        if self._is_speech and self._run is None:
            self._run = _Run(first=self._frames, last=self._frames)
        self._frames += 1
        run = self._run
        if run is None:
            return []
        self._count(run, score)
        return self._await_speech(run) if run.begin is None else self._continue(run, run.begin)

    def flush(self, *, trigger: Trigger = "end_of_input") -> list[SegmenterAction]:
        """End the open utterance: the input is over or has a gap, or the end is requested.

        Frames fed afterwards count as consecutive; where they aren't, make a new Segmenter with
        their first sample as its origin.
        """
        run = self._run
        actions: list[SegmenterAction] = []
        if run is not None and run.begin is not None:
            actions.append(self._finish(run, run.begin, trigger=trigger))
        self._run = None
        self._floor = self._frames
        self._is_speech = False
        return actions

    def _count(self, run: _Run, score: float) -> None:
        if not self._is_speech:
            run.silent_score_sum += score
            return
        run.last = self._frames
        run.speech_frames += 1
        # Silent frames count once speech after them shows that they were inside.
        run.score_sum += run.silent_score_sum + score
        run.silent_score_sum = 0.0

    def _await_speech(self, run: _Run) -> list[SegmenterAction]:
        """Wait for enough speech without a gap in it that would be a pause."""
        if self._frames - run.last >= self._pause:
            self._run = None
            return []
        if run.speech_frames < self._min_speech:
            return []
        # Long gaps between very short sounds could make it too long before it has begun.
        begin = max(self._backdated(run.first), self._frames - self._longest)
        run.begin = run.given = begin
        return [Begin(self._sample(begin)), *self._continue(run, begin)]

    def _continue(self, run: _Run, begin: int) -> list[SegmenterAction]:
        """Add the newest frame to the utterance, or end it."""
        actions: list[SegmenterAction] = []
        silence = self._frames - run.last
        limit = begin + self._longest
        if run.paused and not silence:
            actions.append(Resume())
            run.paused = False
        # Silence followed by speech belongs to the utterance; after speech only the post-roll does.
        belongs_until = min(self._frames, run.last + self._post_roll, limit)
        if belongs_until > run.given:
            actions.append(Extend(self._sample(run.given), self._sample(belongs_until)))
            run.given = belongs_until
        is_pause = silence >= self._pause
        is_long = run.given - begin >= self._soft_limit
        if silence >= self._min_silence:
            actions.append(self._finish(run, begin, trigger="silence"))
        elif self._frames >= limit or (is_pause and is_long):
            actions.append(self._finish(run, begin, trigger="length"))
        elif is_pause and not run.paused:
            actions.append(Pause(self._sample(run.given), run.mean_score))
            run.paused = True
        return actions

    def _finish(self, run: _Run, begin: int, *, trigger: Trigger) -> Finish:
        self._run = None
        self._floor = run.given
        return Finish(
            self._sample(begin),
            self._sample(run.given),
            trigger=trigger,
            confirmed_at=self._sample(self._frames),
            mean_score=run.mean_score,
            speech_end=self._sample(min(run.last, run.given)),
        )

    def _backdated(self, first: int) -> int:
        return max(self._floor, first - self._pre_roll)

    def _sample(self, frame: int) -> int:
        return self._origin + frame * self._frame_samples


def _check(config: SegmenterConfig, vad: VadConfig) -> None:
    """Raise ConfigError for settings that would make a pause or a frame's meaning ambiguous."""
    given = {f"segmenter.{name}": value for name, value in config.model_dump().items()}
    given |= {f"vad.{name}": value for name, value in vad.model_dump().items()}
    for lower, upper in (
        ("vad.release", "vad.threshold"),
        ("segmenter.post_roll_ms", "segmenter.pause_ms"),
        ("segmenter.pause_ms", "segmenter.min_silence_ms"),
        ("segmenter.soft_limit_s", "segmenter.max_utterance_s"),
    ):
        if given[lower] > given[upper]:
            raise ConfigError(
                f"{lower} is {given[lower]}, more than {upper}'s {given[upper]}; lower the one"
            )


def _ended_by_silence(action: SegmenterAction) -> bool:
    return isinstance(action, Finish) and action.trigger == "silence"


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
        self.highest_score = 0.0  # of all frames
        self._config = config
        self._held_start = 0
        self._held: Int16 = np.zeros(0, np.int16)
        self._restart(0)

    def feed(self, samples: Int16) -> list[UtteranceAction]:
        """What the next samples bring about, in order."""
        self._held = np.concatenate([self._held, samples])
        actions: list[UtteranceAction] = []
        # Frame by frame, because an utterance's end may change the score of the next frame.
        for start in range(0, len(samples), self.vad.frame_samples):
            for score in self.vad.feed(samples[start : start + self.vad.frame_samples]):
                self.score = float(score)
                self.highest_score = max(self.highest_score, self.score)
                found = self._segmenter.feed(self.score)
                actions += map(self._with_samples, found)
                if self._config.vad.forget and any(map(_ended_by_silence, found)):
                    self.vad.forget()
        keep_from = self._segmenter.keep_from
        self._held = self._held[keep_from - self._held_start :]
        self._held_start = keep_from
        return actions

    def flush(self, *, resume_at: int, trigger: Trigger = "end_of_input") -> list[UtteranceAction]:
        """End the open utterance: the input ends or has a gap, or the end is requested.

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
