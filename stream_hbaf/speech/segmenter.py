"""Sound becomes utterances, second half: where an utterance begins, pauses and ends.

A pure state machine: scores in, actions out, no clock and no sound. All positions are sample
numbers, and all of them but ``origin`` are whole frames from it.
"""

from dataclasses import dataclass

from stream_hbaf.config import SAMPLE_RATE_HZ, SegmenterConfig, VadConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Trigger


@dataclass(frozen=True, slots=True)
class Begin:
    """An utterance is under way since ``start``."""

    start: int


@dataclass(frozen=True, slots=True)
class Feed:
    """The samples [start, end) surely belong to the utterance; no gap since the last Feed."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Pause:
    """If nothing more is said the utterance ends at ``end``; all of it has been fed."""

    end: int
    mean_score: float  # what Finish will give if nothing more is said


@dataclass(frozen=True, slots=True)
class Resume:
    """Something more is said: the last Pause was not the end."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The utterance is [start, end)."""

    start: int
    end: int
    trigger: Trigger
    confirmed_at: int  # samples heard when the end was sure
    mean_score: float  # of the frames from the first of speech to the last
    speech_end: int  # the last speech sample; what follows it until ``end`` is post-roll


Action = Begin | Feed | Pause | Resume | Finish


@dataclass(slots=True)
class _Run:
    """Speech that is going on, an utterance once it has begun. Frame numbers, ends exclusive."""

    first: int  # frame of speech
    last: int  # end of the last frame of speech
    speech_frames: int = 0
    score_sum: float = 0.0  # from first to last
    silent_score_sum: float = 0.0  # since last
    begin: int | None = None  # of the utterance
    fed: int = 0
    paused: bool = False

    @property
    def mean_score(self) -> float:
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
        self._heard = 0  # frames so far
        self._floor = 0  # nothing before this may be used again
        self._is_speech = False
        self._run: _Run | None = None

    @property
    def keep_from(self) -> int:
        """No later action names a sample before this one: older sound may be let go."""
        run = self._run
        if run is None:
            return self._sample(self._backdated(self._heard))
        if run.begin is None:
            return self._sample(self._backdated(run.first))
        return self._sample(run.fed)

    def feed(self, score: float) -> list[Action]:
        """What the next frame's score brings about, in order."""
        self._is_speech = score >= (self._release if self._is_speech else self._threshold)
        if self._is_speech and self._run is None:
            self._run = _Run(first=self._heard, last=self._heard)
        self._heard += 1
        run = self._run
        if run is None:
            return []
        self._count(run, score)
        return self._listen(run) if run.begin is None else self._go_on(run, run.begin)

    def flush(self, *, trigger: Trigger = "end_of_input") -> list[Action]:
        """End what is open: the input is over, sound is missing from here on, or so it is wished.

        Frames fed afterwards are taken to follow on; where they don't, make a new Segmenter with
        their first sample as its origin.
        """
        run = self._run
        actions: list[Action] = []
        if run is not None and run.begin is not None:
            actions.append(self._finish(run, run.begin, trigger=trigger))
        self._run = None
        self._floor = self._heard
        self._is_speech = False
        return actions

    def _count(self, run: _Run, score: float) -> None:
        if not self._is_speech:
            run.silent_score_sum += score
            return
        run.last = self._heard
        run.speech_frames += 1
        # Frames of silence count once more speech shows that they were inside.
        run.score_sum += run.silent_score_sum + score
        run.silent_score_sum = 0.0

    def _listen(self, run: _Run) -> list[Action]:
        """Wait until enough speech is heard, with no gap in it that would be a pause."""
        if self._heard - run.last >= self._pause:
            self._run = None
            return []
        if run.speech_frames < self._min_speech:
            return []
        # Long gaps between very short sounds could make it too long before it has begun.
        begin = max(self._backdated(run.first), self._heard - self._longest)
        run.begin = run.fed = begin
        return [Begin(self._sample(begin)), *self._go_on(run, begin)]

    def _go_on(self, run: _Run, begin: int) -> list[Action]:
        """The frame just heard belongs to the utterance, or brings its end nearer."""
        actions: list[Action] = []
        silence = self._heard - run.last
        limit = begin + self._longest
        if run.paused and not silence:
            actions.append(Resume())
            run.paused = False
        # Speech takes the silence before it along; without speech only the post-roll belongs.
        belongs_until = min(self._heard, run.last + self._post_roll, limit)
        if belongs_until > run.fed:
            actions.append(Feed(self._sample(run.fed), self._sample(belongs_until)))
            run.fed = belongs_until
        is_pause = silence >= self._pause
        is_long = run.fed - begin >= self._soft_limit
        if silence >= self._min_silence:
            actions.append(self._finish(run, begin, trigger="silence"))
        elif self._heard >= limit or (is_pause and is_long):
            actions.append(self._finish(run, begin, trigger="length"))
        elif is_pause and not run.paused:
            actions.append(Pause(self._sample(run.fed), run.mean_score))
            run.paused = True
        return actions

    def _finish(self, run: _Run, begin: int, *, trigger: Trigger) -> Finish:
        self._run = None
        self._floor = run.fed
        return Finish(
            self._sample(begin),
            self._sample(run.fed),
            trigger=trigger,
            confirmed_at=self._sample(self._heard),
            mean_score=run.mean_score,
            speech_end=self._sample(min(run.last, run.fed)),
        )

    def _backdated(self, first: int) -> int:
        return max(self._floor, first - self._pre_roll)

    def _sample(self, frame: int) -> int:
        return self._origin + frame * self._frame_samples


def _check(config: SegmenterConfig, vad: VadConfig) -> None:
    """Settings that would make a pause's end, or a frame's meaning, ambiguous are refused."""
    ordered = [
        ("vad.release", vad.release, "vad.threshold", vad.threshold),
        ("segmenter.post_roll_ms", config.post_roll_ms, "segmenter.pause_ms", config.pause_ms),
        ("segmenter.pause_ms", config.pause_ms, "segmenter.min_silence_ms", config.min_silence_ms),
        (
            "segmenter.soft_limit_s",
            config.soft_limit_s,
            "segmenter.max_utterance_s",
            config.max_utterance_s,
        ),
    ]
    for lower, low, upper, high in ordered:
        if low > high:
            raise ConfigError(f"{lower} is {low}, more than {upper}'s {high}; lower the one")
