"""Decides from speech scores where utterances begin, pause and end.

``Segmenter`` is a pure state machine: scores in, actions out, without a clock and without audio.
All positions are sample numbers, a whole number of frames from ``origin``. Where it asks whether
the turn is over, it stops at a fixed number of samples until it has the answer, so that boundaries
depend on samples and answers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from stream_hbaf.config import SAMPLE_RATE_HZ, EndpointConfig, SegmenterConfig, VadConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Trigger
from stream_hbaf.speech.endpointer import Habit

# Of a pause, the frames whose speech score tells how still it is: the newest, after the first ones,
# in which speech fades away.
FADING_MS = 96
STILLNESS_MS = 256


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
class Consult:
    """Is the turn over? ``answer`` is due before anything else is fed."""

    end: int  # of the utterance, if it is over; the last Pause's
    trigger: Trigger  # of Finish, if it is over: "turn" is asked early, "silence" late
    habit: Habit  # of the source, before this pause
    score: float  # the highest speech score of the pause's newest frames


@dataclass(frozen=True, slots=True)
class Finish:
    """The utterance is [start, end)."""

    start: int
    end: int
    trigger: Trigger
    confirmed_at: int  # samples taken in when the end was decided
    mean_score: float  # of the frames from the first of speech to the last
    speech_end: int  # the last speech sample; what follows it until ``end`` is post-roll

    def split(self, changes: Sequence[int]) -> "list[Finish]":
        """The ends of the parts if somebody else speaks on from each of some samples."""
        edges = (self.start, *changes, self.end)
        parts = [
            replace(self, start=start, end=end, trigger="speaker", speech_end=end)
            for start, end in pairwise(edges)
        ]
        return [*parts[:-1], replace(self, start=edges[-2])]


SegmenterAction = Begin | Extend | Pause | Resume | Consult | Finish


@dataclass(slots=True)
class _Run:
    """Speech under way, an utterance once ``begin`` is set. Frame numbers, ends exclusive."""

    first: int  # frame of speech
    last: int  # end of the last frame of speech
    speech_frames: int = 0
    score_sum: float = 0.0  # from first to last
    silent_score_sum: float = 0.0  # since last
    silent_scores: list[float] = field(default_factory=list)  # the same frames'
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
    to whole frames, the two limits on an utterance's length down. With ``endpoint`` it asks after
    that one's ``silence_ms`` and after ``min_silence_ms``, and waits for ``max_silence_ms`` at the
    longest; without, ``min_silence_ms`` of silence decides. ``habit`` is what is known of the
    source.

    Raises ConfigError when the settings contradict each other.
    """

    def __init__(
        self,
        config: SegmenterConfig,
        vad: VadConfig,
        *,
        frame_samples: int,
        origin: int = 0,
        endpoint: EndpointConfig | None = None,
        habit: Habit | None = None,
    ) -> None:
        check_segmentation(config, vad, endpoint)

        def frames(duration_ms: int) -> int:
            return -(-duration_ms * SAMPLE_RATE_HZ // (1000 * frame_samples))

        def frames_within(limit_s: int) -> int:
            return max(1, limit_s * SAMPLE_RATE_HZ // frame_samples)

        self._threshold, self._release = vad.threshold, vad.release
        self._min_speech = frames(config.min_speech_ms)
        self._pause = frames(config.pause_ms)
        self._min_silence = frames(config.min_silence_ms)
        self._last_silence = frames(endpoint.max_silence_ms) if endpoint else self._min_silence
        self._questions: dict[int, Trigger] = {}  # by frames of silence
        if endpoint is not None:
            self._questions = {
                frames(endpoint.silence_ms): "turn",
                self._min_silence: "silence",
            }
        self._fading, self._stillness = frames(FADING_MS), frames(STILLNESS_MS)
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
        self._asked: Trigger | None = None
        self.habit = habit or Habit()
        self._watched: int | None = None  # end of speech before a pause that may be short
        self._watched_score: float | None = None  # of that pause, at its first question

    @property
    def in_speech(self) -> bool:
        """Whether speech is under way, an utterance or not yet."""
        return self._run is not None

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
        """What the next frame's score brings about, in order; a Consult is the last of it."""
        assert self._asked is None
        self._is_speech = score >= (self._release if self._is_speech else self._threshold)
        if self._is_speech and self._run is None:
            self._run = _Run(first=self._frames, last=self._frames)
        self._frames += 1
        run, actions = self._run, []
        if run is not None:
            self._count(run, score)
            begin = run.begin
            actions = self._await_speech(run) if begin is None else self._continue(run, begin)
        self._watch()
        return actions

    def answer(self, *, is_over: bool) -> list[SegmenterAction]:
        """What the answer to a Consult brings about: the end, or nothing."""
        run, trigger = self._run, self._asked
        assert run is not None
        assert run.begin is not None
        assert trigger is not None
        self._asked = None
        return [self._finish(run, run.begin, trigger=trigger)] if is_over else []

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
        self._asked = self._watched = self._watched_score = None
        return actions

    def _watch(self) -> None:
        """Learn from a pause of ``pause_ms``, whatever is decided in it."""
        if self._watched is None:
            return
        if self._is_speech:
            self.habit = self.habit.after_short()
        elif self._frames - self._watched >= self._min_silence:
            self.habit = self.habit.after_long(self._watched_score)
        else:
            return
        self._watched = self._watched_score = None

    def _count(self, run: _Run, score: float) -> None:
        if not self._is_speech:
            run.silent_score_sum += score
            run.silent_scores.append(score)
            return
        run.last = self._frames
        run.speech_frames += 1
        # Silent frames count once speech after them shows that they were inside.
        run.score_sum += run.silent_score_sum + score
        run.silent_score_sum = 0.0
        run.silent_scores.clear()

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
        if silence >= self._last_silence:
            trigger: Trigger = "timeout" if self._questions else "silence"
            actions.append(self._finish(run, begin, trigger=trigger))
        elif self._frames >= limit or (is_pause and is_long):
            actions.append(self._finish(run, begin, trigger="length"))
        elif is_pause and not run.paused:
            actions.append(Pause(self._sample(run.given), run.mean_score))
            run.paused = True
        if is_pause and self._questions and self._watched is None and silence < self._min_silence:
            self._watched = run.last
        if run is self._run and silence in self._questions:
            actions.append(self._ask(run, self._questions[silence]))
        return actions

    def _ask(self, run: _Run, trigger: Trigger) -> Consult:
        self._asked = trigger
        score = max(run.silent_scores[self._fading :][-self._stillness :], default=1.0)
        if trigger == "turn":
            self._watched_score = score
        return Consult(self._sample(run.given), trigger, self.habit, score)

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


def check_segmentation(
    config: SegmenterConfig, vad: VadConfig, endpoint: EndpointConfig | None
) -> None:
    """Raise ConfigError for settings that would make a pause or a frame's meaning ambiguous."""
    given = {f"segmenter.{name}": value for name, value in config.model_dump().items()}
    given |= {f"vad.{name}": value for name, value in vad.model_dump().items()}
    ordered = [
        ("vad.release", "vad.threshold"),
        ("segmenter.post_roll_ms", "segmenter.pause_ms"),
        ("segmenter.pause_ms", "segmenter.min_silence_ms"),
        ("segmenter.soft_limit_s", "segmenter.max_utterance_s"),
    ]
    if endpoint is not None:
        given |= {f"endpoint.{name}": value for name, value in endpoint.model_dump().items()}
        ordered += [
            ("segmenter.pause_ms", "endpoint.silence_ms"),
            ("endpoint.silence_ms", "segmenter.min_silence_ms"),
            ("segmenter.min_silence_ms", "endpoint.max_silence_ms"),
            ("endpoint.unfinished", "endpoint.finished"),
        ]
    for lower, upper in ordered:
        if given[lower] > given[upper]:
            raise ConfigError(
                f"{lower} is {given[lower]}, more than {upper}'s {given[upper]}; lower the one"
            )
