"""Where utterances begin, pause and end: each rule, and what holds for any scores."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import Config, EndpointConfig, SegmenterConfig, VadConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.speech.detector import UtteranceDetector
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
from stream_hbaf.speech.vad import open_detector

RECORDINGS = Path(__file__).parent / "recordings"
SENTENCES = sorted(RECORDINGS.glob("sense_and_sensibility_*.flac"))
F = 320  # samples a frame: 20 ms
VAD = VadConfig(threshold=0.5, release=0.3)
# In frames: 3 of speech begin, 3 of silence pause, 6 end; rolls of 4 and 2; limits of 50 and 100.
CONFIG = SegmenterConfig(
    min_speech_ms=60,
    pause_ms=60,
    min_silence_ms=120,
    pre_roll_ms=80,
    post_roll_ms=40,
    soft_limit_s=1,
    max_utterance_s=2,
)
# Questions after 4 frames of silence and after 6; 9 end.
ENDPOINT = EndpointConfig(silence_ms=80, max_silence_ms=180)
SCORES = {"s": 0.75, "l": 0.4, ".": 0.1}  # speech, low (between release and threshold), silence


def scores_of(pattern: str) -> list[float]:
    return [SCORES[letter] for letter in pattern.replace(" ", "")]


def segment(scores: Iterable[float], *, config: SegmenterConfig = CONFIG) -> list[SegmenterAction]:
    segmenter = Segmenter(config, VAD, frame_samples=F)
    return [action for score in scores for action in segmenter.feed(score)]


def in_frames(actions: Iterable[SegmenterAction]) -> list[tuple[object, ...]]:
    """Actions in short: Begin and Extend with frames, Finish with its limits and trigger."""
    short: list[tuple[object, ...]] = []
    for action in actions:
        match action:
            case Begin(start):
                short.append(("begin", start / F))
            case Extend(start, end) if short[-1][0] == "extend" and short[-1][-1] == start / F:
                short[-1] = ("extend", short[-1][1], end / F)
            case Extend(start, end):
                short.append(("extend", start / F, end / F))
            case Pause(end):
                short.append(("pause", end / F))
            case Resume():
                short.append(("resume",))
            case Consult(end=end, trigger=trigger):
                short.append((f"{trigger}?", end / F))
            case Finish():
                short.append(("finish", action.start / F, action.end / F, action.trigger))
    return short


def consult(pattern: str, *, over: set[str]) -> list[tuple[object, ...]]:
    """The actions for a pattern when the answer is yes to the questions of these triggers."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F, endpoint=ENDPOINT)
    actions: list[SegmenterAction] = []
    for score in scores_of(pattern):
        found = segmenter.feed(score)
        actions += found
        if found and isinstance(found[-1], Consult):
            actions += segmenter.answer(is_over=found[-1].trigger in over)
    return in_frames(actions)


def test_utterance_in_silence() -> None:
    """Rolls are added on both sides, a pause comes first, then the end."""
    actions = segment(scores_of("..... ..... sssss ........"))
    assert in_frames(actions) == [
        ("begin", 6),
        ("extend", 6, 17),
        ("pause", 17),
        ("finish", 6, 17, "silence"),
    ]


def test_confirmed_after_min_silence() -> None:
    """The end is confirmed min_silence after the last frame of speech, not later."""
    finish = segment(scores_of("..... sssss ........"))[-1]
    assert isinstance(finish, Finish)
    assert finish.confirmed_at == (10 + 6) * F


def test_begin_first_frames() -> None:
    """The pre-roll doesn't reach back before the first sample."""
    assert segment(scores_of(". sss"))[0] == Begin(0)


def test_begin_as_soon_as_min_speech() -> None:
    """The frame that completes min_speech begins the utterance, and feeds all of it so far."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F)
    assert [segmenter.feed(score) for score in scores_of("..... ss")] == [[]] * 7
    assert segmenter.feed(0.9) == [Begin(1 * F), Extend(1 * F, 8 * F)]


def test_burst_alone() -> None:
    """A sound shorter than min_speech is no utterance, however often it comes back."""
    assert segment(scores_of("..... ss ... ss ... ss ..... ss ........")) == []


def test_burst_with_brief_gap() -> None:
    """Bursts less than a pause apart add up to one beginning, backdated to the first."""
    assert in_frames(segment(scores_of("..... s..s..s"))) == [("begin", 1), ("extend", 1, 12)]


def test_gap_does_not_count_as_speech() -> None:
    """Silence between bursts adds nothing to min_speech."""
    assert segment(scores_of("..... s..s..")) == []


def test_low_scores() -> None:
    """Scores between release and threshold go on with speech, but don't start it."""
    assert segment(scores_of("lllll lllll")) == []
    assert in_frames(segment(scores_of("slllll ........")))[-1] == ("finish", 0, 8, "silence")


def test_score_at_threshold() -> None:
    """A score equal to the threshold starts speech; one equal to the release goes on with it."""
    assert in_frames(segment([0.5, 0.3, 0.3])) == [("begin", 0), ("extend", 0, 3)]


def test_dip_inside_word() -> None:
    """A dip shorter than the post-roll changes nothing: no pause, sound fed on as it comes."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F)
    actions = [segmenter.feed(score) for score in scores_of("sss .. s")]
    assert actions[3:] == [[Extend(i * F, (i + 1) * F)] for i in (3, 4, 5)]


def test_silence_held_back() -> None:
    """Silence after the post-roll waits; speech takes it along."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F)
    actions = [segmenter.feed(score) for score in scores_of("sss ..... s")]
    assert actions[3:] == [
        [Extend(3 * F, 4 * F)],
        [Extend(4 * F, 5 * F)],
        [Pause(5 * F, mean_score=0.75)],
        [],
        [],
        [Resume(), Extend(5 * F, 9 * F)],
    ]


def test_pause_again() -> None:
    """Each pause is an action once, and taken back once when speech goes on."""
    assert in_frames(segment(scores_of("sss .... ss .... s ......"))) == [
        ("begin", 0),
        ("extend", 0, 5),
        ("pause", 5),
        ("resume",),
        ("extend", 5, 11),
        ("pause", 11),
        ("resume",),
        ("extend", 11, 16),
        ("pause", 16),
        ("finish", 0, 16, "silence"),
    ]


def test_pre_roll_next_utterance() -> None:
    """The next utterance's pre-roll stops where the utterance before ended."""
    actions = in_frames(segment(scores_of("sss ...... sss")))
    assert actions[3:] == [("finish", 0, 5, "silence"), ("begin", 5), ("extend", 5, 12)]


def test_soft_limit_pause() -> None:
    """An utterance that is long enough ends at its first pause, without waiting on."""
    actions = segment(scores_of("s" * 60 + "..."))
    assert in_frames(actions) == [
        ("begin", 0),
        ("extend", 0, 62),
        ("finish", 0, 62, "length"),
    ]
    assert isinstance(actions[-1], Finish)
    assert actions[-1].confirmed_at == 63 * F


def test_soft_limit_speech() -> None:
    """Past the soft limit, speech and dips too short for a pause go on."""
    assert in_frames(segment(scores_of("s" * 60 + ".." + "s" * 10)))[-1] == ("extend", 0, 72)


def test_soft_limit_during_pause() -> None:
    """A pause before the soft limit waits for min_silence as any other."""
    assert in_frames(segment(scores_of("s" * 46 + "......")))[-1] == ("finish", 0, 48, "silence")


def test_hard_limit_speech() -> None:
    """Speech without a pause is cut at the longest length; the next begins at that very sample."""
    assert in_frames(segment(scores_of("s" * 110 + "......"))) == [
        ("begin", 0),
        ("extend", 0, 100),
        ("finish", 0, 100, "length"),
        ("begin", 100),
        ("extend", 100, 112),
        ("pause", 112),
        ("finish", 100, 112, "silence"),
    ]


def test_hard_limit_with_pre_roll() -> None:
    """The pre-roll counts towards the longest length."""
    assert in_frames(segment(scores_of("." * 10 + "s" * 110)))[2:4] == [
        ("finish", 6, 106, "length"),
        ("begin", 106),
    ]


def test_hard_limit_rest_of_word() -> None:
    """After a cut, what is left of the speech must itself last min_speech."""
    actions = in_frames(segment(scores_of("s" * 102 + "........")))
    assert actions[-1] == ("finish", 0, 100, "length")


def test_hard_limit_sparse_bursts() -> None:
    """A beginning that took longer than the longest utterance keeps its end, not its start."""
    config = CONFIG.model_copy(
        update={
            "min_speech_ms": 800,
            "pause_ms": 100,
            "min_silence_ms": 200,
            "max_utterance_s": 1,
        }
    )
    assert in_frames(segment(scores_of("s..." * 40), config=config))[:3] == [
        ("begin", 107),
        ("extend", 107, 157),
        ("finish", 107, 157, "length"),
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("..... sssss", ("finish", 1, 10, "end_of_input")),
        ("..... sssss .", ("finish", 1, 11, "end_of_input")),
        ("..... sssss .....", ("finish", 1, 12, "end_of_input")),
    ],
    ids=["mid-speech", "before the pause", "in the pause"],
)
def test_flush_open_utterance(pattern: str, expected: tuple[object, ...]) -> None:
    """The end of input ends the open utterance, with as much of the post-roll as there was."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F)
    actions = [action for score in scores_of(pattern) for action in segmenter.feed(score)]
    actions += segmenter.flush()
    assert in_frames(actions)[-1] == expected
    assert isinstance(actions[-1], Finish)
    assert actions[-1].confirmed_at == len(scores_of(pattern)) * F


@pytest.mark.parametrize("pattern", ["", ".....", "..... ss", "sss ......", "sss ...... .. s"])
def test_flush_nothing_open(pattern: str) -> None:
    """In silence, or before min_speech is reached, the end of input says nothing."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F)
    for score in scores_of(pattern):
        segmenter.feed(score)
    assert segmenter.flush() == []


def test_flush_then_speech() -> None:
    """After a gap nothing from before it is used: no pre-roll, no speech already counted."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F)
    for score in scores_of("..... ss"):
        segmenter.feed(score)
    segmenter.flush()
    actions = [action for score in scores_of(". l sss") for action in segmenter.feed(score)]
    assert actions == [Begin(7 * F), Extend(7 * F, 12 * F)]


def test_mean_score_speech_only() -> None:
    """The mean runs from the first frame of speech to the last: dips count, rolls don't."""
    finish = segment([0.0] * 10 + [0.6, 0.8, 1.0, 0.2, 0.8] + [0.0] * 6)[-1]
    assert isinstance(finish, Finish)
    assert finish.mean_score == pytest.approx((0.6 + 0.8 + 1.0 + 0.2 + 0.8) / 5)


def test_speech_end_without_post_roll() -> None:
    """Where the speech itself ended is given besides the end of the utterance."""
    finish = segment(scores_of("..... sssss ........"))[-1]
    assert isinstance(finish, Finish)
    assert (finish.speech_end, finish.end) == (10 * F, 12 * F)


def test_durations_whole_frames() -> None:
    """Durations that are no whole number of frames are rounded up, the longest length down."""
    config = SegmenterConfig(
        min_speech_ms=100,
        pause_ms=100,
        min_silence_ms=200,
        pre_roll_ms=100,
        post_roll_ms=100,
        soft_limit_s=1,
        max_utterance_s=1,
    )
    segmenter = Segmenter(config, VAD, frame_samples=512)
    scores = [0.0] * 10 + [1.0] * 60
    actions = [action for score in scores for action in segmenter.feed(score)]
    assert actions[0] == Begin((10 - 4) * 512)
    finish = next(action for action in actions if isinstance(action, Finish))
    assert finish.end - finish.start == 31 * 512


def test_origin() -> None:
    """Sample numbers count from the origin, before which there is no pre-roll."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F, origin=1_001)
    assert segmenter.keep_from == 1_001
    actions = [action for score in scores_of(".. sss") for action in segmenter.feed(score)]
    assert actions == [Begin(1_001), Extend(1_001, 1_001 + 5 * F)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"post_roll_ms": 80}, "post_roll_ms is 80, more than segmenter.pause_ms's 60"),
        ({"pause_ms": 140}, "pause_ms is 140, more than segmenter.min_silence_ms's 120"),
        ({"soft_limit_s": 3}, "soft_limit_s is 3, more than segmenter.max_utterance_s's 2"),
    ],
)
def test_contradictory_settings(change: dict[str, int], message: str) -> None:
    """Settings that contradict each other are refused, both named."""
    with pytest.raises(ConfigError, match=message):
        Segmenter(CONFIG.model_copy(update=change), VAD, frame_samples=F)


def test_release_above_threshold() -> None:
    """A release above the threshold would make speech end where it starts."""
    with pytest.raises(ConfigError, match=r"vad\.release is 0\.9, more than vad\.threshold's 0\.5"):
        Segmenter(CONFIG, VadConfig(threshold=0.5, release=0.9), frame_samples=F)


def test_read_sentences() -> None:
    """A read sentence with a second of silence on both sides is one utterance that spans it."""
    detector = open_detector("silero")
    sentence = read_audio(RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac")
    silence = np.zeros(16_000, np.int16)
    scores = detector.feed(np.concatenate((silence, sentence, silence)))
    segmenter = Segmenter(SegmenterConfig(), VadConfig(), frame_samples=detector.frame_samples)
    actions = [action for score in scores for action in segmenter.feed(float(score))]
    ends = [action for action in actions if isinstance(action, Finish)]
    assert [end.trigger for end in ends] == ["silence"]
    assert 16_000 - 5_120 <= ends[0].start <= 16_000 + 8_000
    assert 16_000 + len(sentence) - 8_000 <= ends[0].end <= 16_000 + len(sentence) + 5_120
    assert ends[0].mean_score > 0.8


def test_consult_ends_a_finished_turn_early() -> None:
    """Asked after a short silence, a yes ends the utterance there and then."""
    assert consult("sssss .... sss", over={"turn"})[2:] == [
        ("pause", 7),
        ("turn?", 7),
        ("finish", 0, 7, "turn"),
        ("begin", 7),
        ("extend", 7, 12),
    ]


def test_consult_at_the_usual_silence() -> None:
    """A turn that sounds neither finished nor unfinished ends as silence alone would end it."""
    assert consult("sssss ......", over={"silence"})[3:] == [
        ("turn?", 7),
        ("silence?", 7),
        ("finish", 0, 7, "silence"),
    ]


def test_consult_waits_for_an_unfinished_turn() -> None:
    """Two noes: speech that resumes belongs to the utterance, and the longest silence ends it."""
    assert consult("sssss ........ s .........", over=set())[3:] == [
        ("turn?", 7),
        ("silence?", 7),
        ("resume",),
        ("extend", 7, 16),
        ("pause", 16),
        ("turn?", 16),
        ("silence?", 16),
        ("finish", 0, 16, "timeout"),
    ]


def test_no_consult_outside_an_utterance_or_after_its_end() -> None:
    """Too little speech, an utterance that a pause ends for its length, and a flush ask nothing."""
    assert consult("ss .........", over=set()) == []
    assert consult("s" * 49 + " ....", over=set())[-1] == ("finish", 0, 51, "length")
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F, endpoint=ENDPOINT)
    actions = [action for score in scores_of("sss ....") for action in segmenter.feed(score)]
    assert isinstance(actions[-1], Consult)
    assert in_frames(segmenter.flush()) == [("finish", 0, 5, "end_of_input")]
    assert segmenter.feed(0.1) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"silence_ms": 40}, r"segmenter\.pause_ms is 60, more than endpoint\.silence_ms's 40"),
        ({"silence_ms": 140}, r"silence_ms is 140, more than segmenter\.min_silence_ms's 120"),
        ({"max_silence_ms": 100}, r"min_silence_ms is 120, more than endpoint\.max_silence_ms's"),
        ({"unfinished": 0.9}, r"endpoint\.unfinished is 0\.9, more than endpoint\.finished's 0"),
    ],
)
def test_contradictory_endpoint_settings(change: dict[str, float], message: str) -> None:
    """They are refused where they take effect, and ignored where silence alone decides."""
    endpoint = ENDPOINT.model_copy(update=change)
    with pytest.raises(ConfigError, match=message):
        Segmenter(CONFIG, VAD, frame_samples=F, endpoint=endpoint)
    config = Config(segmenter=CONFIG, vad=VAD, endpoint=endpoint)
    UtteranceDetector(config)


def asked(pattern: str, *, over: set[str], habit: Habit | None = None) -> list[Consult]:
    """The questions at the pauses of a pattern."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F, endpoint=ENDPOINT, habit=habit)
    found = []
    for score in scores_of(pattern):
        for action in segmenter.feed(score):
            if isinstance(action, Consult):
                found.append(action)
                segmenter.answer(is_over=action.trigger in over)
    return found


@pytest.mark.parametrize("over", [set(), {"turn", "silence"}])
@pytest.mark.parametrize(
    ("pattern", "shares"),
    [
        ("sssss ....", [50]),
        ("sssss ......... sss ....", [50, 45]),
        ("sssss ..... sss ....", [50, 55]),
        ("sssss ... sss ....", [55]),
        ("sssss .. sss ....", [50]),
    ],
)
def test_habit_of_a_source(pattern: str, shares: list[float], over: set[str]) -> None:
    """Learned from pauses of ``pause_ms``, whatever is decided in them."""
    found = [
        round(100 * one.habit.resumed, 1)
        for one in asked(pattern, over=over, habit=Habit(0.5))
        if one.trigger == "turn"
    ]
    assert found == shares


def test_stillness_of_a_pause() -> None:
    """The highest score of its newest 256 ms, without its first 96 ms; that at the first question
    is learned once the pause has lasted."""
    config = CONFIG.model_copy(update={"min_silence_ms": 400, "soft_limit_s": 2})
    endpoint = EndpointConfig(silence_ms=360, max_silence_ms=480)
    segmenter = Segmenter(config, VAD, frame_samples=F, endpoint=endpoint, habit=Habit(0.5, 0.1))
    # Frames of 20 ms: 5 fade, 13 count. The questions are asked after 18 and 20.
    pause = [0.29] * 5 + [0.2] + [0.05] * 6 + [0.15] + [0.05] * 7
    found = []
    for score in [*scores_of("sssss"), *pause]:
        for action in segmenter.feed(score):
            if isinstance(action, Consult):
                found.append(action)
                segmenter.answer(is_over=False)
    assert [(one.trigger, one.score) for one in found] == [("turn", 0.2), ("silence", 0.15)]
    assert [one.habit for one in found] == [Habit(0.5, 0.1)] * 2  # before this pause
    habit = segmenter.habit
    assert [habit.resumed, habit.score] == pytest.approx([0.45, 0.11])


def test_habit_outlasts_a_restart() -> None:
    """A new segmenter goes on with what was learned; what a flush interrupts isn't counted."""
    segmenter = Segmenter(CONFIG, VAD, frame_samples=F, endpoint=ENDPOINT, habit=Habit(0.4))
    for score in scores_of("sssss ...."):
        segmenter.feed(score)
    segmenter.flush()
    for score in scores_of("....."):
        segmenter.feed(score)
    assert segmenter.habit == Habit(0.4)


# What a source of sound does: stays in one state for a while, then in another.
stretches = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0]), st.integers(1, 40)), max_size=40
)
any_scores = st.one_of(
    st.lists(st.floats(0, 1), max_size=400),
    stretches.map(lambda parts: [score for score, length in parts for _ in range(length)]),
)


@st.composite
def configs(draw: st.DrawFn) -> SegmenterConfig:
    """Any settings that don't contradict each other, small ones above all."""
    pause_ms = draw(st.integers(1, 200))
    longest = draw(st.integers(1, 3))
    return SegmenterConfig(
        min_speech_ms=draw(st.integers(1, 400)),
        pause_ms=pause_ms,
        min_silence_ms=draw(st.integers(pause_ms, 400)),
        pre_roll_ms=draw(st.integers(1, 400)),
        post_roll_ms=draw(st.integers(1, pause_ms)),
        soft_limit_s=draw(st.integers(1, longest)),
        max_utterance_s=longest,
    )


@st.composite
def endpoints(draw: st.DrawFn, config: SegmenterConfig) -> EndpointConfig | None:
    """None, or any settings that don't contradict the segmenter's."""
    if draw(st.booleans()):
        return None
    return EndpointConfig(
        silence_ms=draw(st.integers(config.pause_ms, config.min_silence_ms)),
        max_silence_ms=draw(st.integers(config.min_silence_ms, 600)),
    )


@settings(max_examples=400, deadline=None)
@given(data=st.data(), scores=any_scores, config=configs(), flush_at=st.integers(0, 400))
def test_actions_any_scores(
    data: st.DataObject, scores: list[float], config: SegmenterConfig, flush_at: int
) -> None:
    """Extends tile each utterance; utterances are ordered, apart, announced, and not too long.

    Whatever is answered to the questions, which are asked at a pause only.
    """
    endpoint = data.draw(endpoints(config))
    segmenter = Segmenter(config, VAD, frame_samples=F, endpoint=endpoint)
    last_end = 0
    begin: int | None = None
    fed = 0
    paused_at: int | None = None
    paused_score = 0.0
    for index, score in enumerate([*scores, None]):
        taken = min(index + 1, len(scores)) * F
        kept_from = segmenter.keep_from
        actions = segmenter.flush() if score is None or index == flush_at else []
        actions += [] if score is None else segmenter.feed(score)
        if actions and isinstance(actions[-1], Consult):
            actions += segmenter.answer(is_over=data.draw(st.booleans()))
        for action in actions:
            match action:
                case Consult():
                    assert endpoint is not None
                    assert action.end == fed == paused_at
                case Begin(start):
                    assert begin is None
                    assert max(last_end, kept_from) <= start < taken
                    begin = fed = start
                case Extend(start, end):
                    assert begin is not None
                    assert paused_at is None
                    assert kept_from <= start == fed < end <= taken
                    fed = end
                case Pause(end, mean_score):
                    assert begin is not None
                    assert paused_at is None
                    assert end == fed
                    paused_at, paused_score = end, mean_score
                case Resume():
                    assert paused_at is not None
                    paused_at = None
                case Finish():
                    assert action.start == begin
                    assert action.end == fed <= action.confirmed_at <= taken
                    assert (paused_at or action.end) == action.end
                    assert paused_at is None or paused_score == action.mean_score
                    assert action.start < action.speech_end <= action.confirmed_at
                    assert 0 < action.end - action.start <= config.max_utterance_s * 16_000
                    assert 0 <= action.mean_score <= 1
                    last_end, begin, paused_at = action.end, None, None
        assert kept_from <= segmenter.keep_from <= taken
    assert begin is None


@settings(max_examples=100, deadline=None)
@given(scores=any_scores, config=configs())
def test_actions_no_future(scores: list[float], config: SegmenterConfig) -> None:
    """The actions of the first frames stay, whatever follows."""
    half = len(scores) // 2
    segmenter = Segmenter(config, VAD, frame_samples=F)
    actions = [segmenter.feed(score) for score in scores]
    again = Segmenter(config, VAD, frame_samples=F)
    assert [again.feed(score) for score in scores[:half]] == actions[:half]
