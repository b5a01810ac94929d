"""Label sets that adapt to corrections: their coverage, what is forgotten, and live answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from recognizer_kit import LABELS, SENTENCES, save_bundle, transcript

from stream_hbaf.config import load_config
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Feedback, Info, Request, SetCoverage
from stream_hbaf.live.control import Controls
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.networks.adaptive_sets import LEAST, REMEMBERED, STEP, AdaptiveSets
from stream_hbaf.networks.calibration import PATTERNS, Calibration, Modality, softmax
from stream_hbaf.prediction import Prediction
from stream_hbaf.recognizer import Recognizer

STATED = 0.9
CALIBRATION = Calibration.of_temperature(1.0).model_copy(
    update={"thresholds": dict.fromkeys(PATTERNS, 0.2) | {"": 0.0}, "coverage": STATED}
)


class Answer(NamedTuple):
    probabilities: dict[str, float]
    modalities: tuple[Modality, ...] = ("text",)
    labels_in_set: tuple[str, ...] = ()


def play(
    sets: AdaptiveSets, *, sharpness: float, count: int, seed: int, dialogue: str = "d"
) -> float:
    """Publish that many answers and correct each; the share of sets that held the right label.

    Labels are drawn from the probabilities; what is published is ``sharpness`` times as sure.
    """
    draw = np.random.default_rng(seed)
    held = 0
    for n in range(count):
        logits = draw.standard_normal(len(LABELS))
        label = int(draw.choice(len(LABELS), p=softmax(logits)))
        published = softmax(sharpness * logits)
        flags = CALIBRATION.label_sets(published, pattern="text", shift=sets.shift)
        inside = tuple(name for name, flag in zip(LABELS, flags, strict=True) if flag)
        answer = Answer(dict(zip(LABELS, map(float, published), strict=True)), ("text",), inside)
        sets.remember(f"{dialogue}-{n}", answer)
        assert sets.correct(f"{dialogue}-{n}", LABELS[label])
        held += LABELS[label] in inside
    return held / count


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 3.0])
def test_coverage_becomes_what_is_stated(sharpness: float) -> None:
    """Of answers that are too sure or not sure enough, after a while; ``coverage`` counts all."""
    sets = AdaptiveSets(CALIBRATION, bundle="b")
    first = play(sets, sharpness=sharpness, count=200, seed=1)
    later = play(sets, sharpness=sharpness, count=400, seed=2, dialogue="e")
    assert later == pytest.approx(STATED, abs=0.02)
    held = round((200 * first + 400 * later) / 600, 4)
    assert sets.coverage() == SetCoverage(stated=STATED, corrections=600, held=held)


def test_coverage_follows_a_change() -> None:
    """Where the answers become worse, the sets become larger within a hundred corrections."""
    sets = AdaptiveSets(CALIBRATION, bundle="b")
    play(sets, sharpness=1.0, count=200, seed=3)
    before = sets.shift
    play(sets, sharpness=3.0, count=100, seed=4, dialogue="e")
    assert sets.shift > before
    assert play(sets, sharpness=3.0, count=400, seed=5, dialogue="f") == pytest.approx(
        STATED, abs=0.02
    )


def test_the_bound_holds_of_the_worst_corrections() -> None:
    """Whatever is corrected, the share of misses is less than 50 / n from what is stated."""
    sets = AdaptiveSets(CALIBRATION, bundle="b")
    missed = 0
    for n in range(1000):
        worst = min(sets.shift, 8.0)  # just outside of the present set, as far as that goes
        probability = max(0.2 * np.exp(-worst) * 0.999, 1e-9)
        sets.remember(f"d-{n}", Answer({"sad": float(probability)}))
        before = sets.shift
        sets.correct(f"d-{n}", "sad")
        assert abs(sets.shift - before) <= STEP
        missed += sets.shift > before
        assert abs(missed / (n + 1) - (1 - STATED)) < 50 / (n + 1)
    assert sets.shift < np.log(0.2 / LEAST) + STEP


def test_what_cannot_be_learned_from_changes_nothing() -> None:
    """An unknown utterance or label, an answer whose set holds every label, and no correction."""
    sets = AdaptiveSets(CALIBRATION, bundle="b")
    sets.remember("d-1", Answer({"sad": 0.1, "happy": 0.9}, ()))
    assert not sets.correct("d-2", "sad")
    assert not sets.correct("d-1", "bliss")
    assert sets.correct("d-1", "sad")
    assert sets.shift == 0.0
    assert sets.coverage() == SetCoverage(stated=STATED, corrections=0)


def test_a_second_correction_replaces_the_first() -> None:
    """As if it had been right at once."""
    twice, once = AdaptiveSets(CALIBRATION, bundle="b"), AdaptiveSets(CALIBRATION, bundle="b")
    for sets in (twice, once):
        sets.remember("d-1", Answer({"sad": 0.05, "happy": 0.95}, labels_in_set=("happy",)))
    twice.correct("d-1", "sad")
    assert twice.shift == pytest.approx(STEP * STATED)
    twice.correct("d-1", "happy")
    once.correct("d-1", "happy")
    assert twice.shift == once.shift == pytest.approx(-STEP * (1 - STATED))
    assert twice.coverage() == once.coverage()


def test_a_forgotten_dialogue_leaves_nothing() -> None:
    """The shift is as if its utterances had never been corrected, and they can't be any more."""
    both, other = AdaptiveSets(CALIBRATION, bundle="b"), AdaptiveSets(CALIBRATION, bundle="b")
    for sets in (both, other):
        sets.remember("d-1", Answer({"sad": 0.05, "happy": 0.95}, labels_in_set=("happy",)))
        sets.correct("d-1", "sad")
    both.remember("d-e-1", Answer({"sad": 0.01, "happy": 0.99}, labels_in_set=("happy",)))
    both.correct("d-e-1", "sad")
    assert both.shift > other.shift
    both.forget("d-e")
    assert (both.shift, both.coverage()) == (other.shift, other.coverage())
    assert not both.correct("d-e-1", "sad")


def test_memory_is_bounded() -> None:
    """The oldest answers can't be corrected any more, and the oldest corrections don't count."""
    sets = AdaptiveSets(CALIBRATION, bundle="b")
    for n in range(REMEMBERED + 1):
        sets.remember(f"d-{n}", Answer({"sad": 0.5}))
    assert not sets.correct("d-0", "sad")
    assert sets.correct("d-1", "sad")


# --- live -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sets")
    narrow = CALIBRATION.model_copy(update={"thresholds": dict.fromkeys(PATTERNS, 0.9)})
    return Path(save_bundle(place, calibration=narrow).model)


@pytest.fixture
def adaptive(bundle: Path) -> Iterator[Recognizer]:
    overrides = {"model": str(bundle), "adaptive_sets": "true"}
    with Recognizer(load_config(overrides=overrides)) as loaded:
        yield loaded


def classify(recognizer: Recognizer, count: int, *, dialogue_id: str) -> list[Prediction]:
    dialogue = recognizer.new_dialogue()
    dialogue.id = dialogue_id
    return [
        recognizer.classify_final(
            acoustic=None,
            text=recognizer.encode_text(transcript(SENTENCES[n]), window=dialogue.window),
            dialogue=dialogue,
            turn=n + 1,
        )
        for n in range(count)
    ]


def test_corrections_reach_the_next_answers_alone_until_forgotten(adaptive: Recognizer) -> None:
    """Without a recording: sets grow, probabilities stay, ``health`` says how often sets were
    right, and ``forget`` undoes it."""
    pipeline = LivePipeline(adaptive, [])
    about = Info(version="0", model=adaptive.model, labels=list(LABELS), licence="", sources=[])
    controls = Controls(pipeline, info=lambda: about, recording=None, stores=list)
    before = classify(adaptive, 5, dialogue_id="d")

    async def correct(wrong: bool) -> None:
        for n, answer in enumerate(before, start=1):
            least = min(answer.probabilities, key=answer.probabilities.__getitem__)
            await controls.correct(Feedback(id=f"d-{n}", label=least if wrong else answer.label))
        with pytest.raises(ConfigError, match="nothing is recorded"):
            await controls.correct(Feedback(id="other-1", label=LABELS[0]))

    assert pipeline.health().sets == SetCoverage(stated=STATED, corrections=0)
    asyncio.run(correct(wrong=True))
    after = classify(adaptive, 5, dialogue_id="e")
    assert sum(len(one.labels_in_set) for one in after) > sum(
        len(one.labels_in_set) for one in before
    )
    assert [one.probabilities for one in after] == [one.probabilities for one in before]
    assert pipeline.health().sets == SetCoverage(stated=STATED, corrections=5, held=0.0)
    asyncio.run(correct(wrong=False))
    assert pipeline.health().sets == SetCoverage(stated=STATED, corrections=5, held=1.0)

    asyncio.run(correct(wrong=True))
    asyncio.run(controls.answer(Request(command="forget", arguments={"dialogue_id": "d"})))
    assert pipeline.health().sets == SetCoverage(stated=STATED, corrections=0)
    again = classify(adaptive, 5, dialogue_id="f")
    assert [one.labels_in_set for one in again] == [one.labels_in_set for one in before]


def test_a_bundle_without_a_promise_is_refused(tmp_path: Path) -> None:
    """There is nothing to keep."""
    config = save_bundle(tmp_path, calibration=Calibration.of_temperature(1.0))
    with pytest.raises(ConfigError, match=r"adaptive_sets: bundle \S+ doesn't say how often"):
        Recognizer(config.model_copy(update={"adaptive_sets": True}))
