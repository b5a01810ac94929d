"""How much a voice may move the answer: the pool of words and voice, and how it is fitted."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import weighted_f1
from stream_hbaf.networks.calibration import (
    PATTERNS,
    Calibration,
    Reliability,
    log_softmax,
    softmax,
)
from stream_hbaf.training.reliability import CONTRADICTED, fit_reliability

Float64 = NDArray[np.float64]
CLASSES = 4
TYPICAL = (0.7, 0.1, 0.1, 0.1)


def settings(**changes: float) -> Calibration:
    weights = {"base": 0.5, "familiar": 2.0, "telling": 6.0, "softness": 0.7} | changes
    return Calibration(
        temperatures={"": 2.0, "audio": 1.5, "text": 1.2, "audio+text": 0.8},
        thresholds=dict.fromkeys(PATTERNS, 0.1),
        answers_above=dict.fromkeys(PATTERNS, 0.5),
        risk=0.3,
        reliability=Reliability(**weights, typical=TYPICAL),
    )


def test_the_pool_is_the_one_that_is_promised() -> None:
    """log p = log p_words + w (log p_both - log p_words), calculated again in plain loops."""
    words, both = np.array([1.0, 0.2, -0.5, 0.0]), np.array([0.1, 2.0, 0.3, -1.0])
    p_words = np.exp(words / 1.2) / np.exp(words / 1.2).sum()
    p_both = np.exp(both / 0.8) / np.exp(both / 0.8).sum()
    tells = 1 - sum(np.sqrt(p * q) for p, q in zip(p_words, TYPICAL, strict=True))
    w = 1 / (1 + np.exp(-(0.5 + 2.0 * 0.3 - 6.0 * tells)))
    powers = [p ** (1 - w) * q**w for p, q in zip(p_words, p_both, strict=True)]
    found = settings().probabilities(both, pattern="audio+text", words=words, familiarity=0.3)
    np.testing.assert_allclose(found, np.array(powers) / sum(powers), rtol=1e-12)


def test_a_strange_voice_alone_is_softer() -> None:
    """Its temperature is multiplied by exp(softness (1 - f)); what isn't known is strange."""
    logits = np.array([2.0, 0.0, -1.0, 0.5])
    for familiarity, scale in (
        (1.0, 1.5),
        (0.25, 1.5 * np.exp(0.7 * 0.75)),
        (None, 1.5 * np.e**0.7),
    ):
        found = settings().probabilities(logits, pattern="audio", familiarity=familiarity)
        np.testing.assert_allclose(found, softmax(logits / scale), rtol=1e-12)


def test_without_sound_the_words_alone_answer() -> None:
    """Each row by its pattern, also one by one; what the network made of earlier sound is left."""
    draw = np.random.default_rng(0)
    logits, words = draw.normal(size=(4, CLASSES)), draw.normal(size=(4, CLASSES))
    familiarity = np.array([np.nan, 0.4, np.nan, 0.4])
    found = settings().probabilities(logits, pattern=PATTERNS, words=words, familiarity=familiarity)
    np.testing.assert_allclose(found[0], softmax(words[0] / 2.0))
    np.testing.assert_allclose(found[2], softmax(words[2] / 1.2))
    for n, pattern in enumerate(PATTERNS):
        one = settings().probabilities(
            logits[n], pattern=pattern, words=words[n], familiarity=float(familiarity[n])
        )
        np.testing.assert_allclose(one, found[n], rtol=1e-12)


def test_the_weight_rises_with_familiarity_and_falls_with_what_words_tell() -> None:
    """From words that say nothing to telling ones, from a stranger to a familiar voice."""
    reliability = settings().reliability
    assert reliability is not None
    empty, telling = np.array(TYPICAL), np.array([0.05, 0.9, 0.03, 0.02])
    by_voice = reliability.weight(empty, np.linspace(0, 1, 5))
    assert (np.diff(by_voice) > 0).all()
    assert reliability.weight(empty, 0.0) == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert reliability.weight(telling, 0.5) < reliability.weight(empty, 0.5) / 2


# --- fitting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Made-up predictions of one corpus."""

    corpus: str
    labels: NDArray[np.int64]
    text: Float64
    audio: Float64
    both: Float64
    familiarity: Float64

    @property
    def speakers(self) -> list[str]:
        return [str(n % 12) for n in range(len(self.labels))]


def evidence(labels: NDArray[np.int64], strength: float, draw: np.random.Generator) -> Float64:
    """Logits that are as sure as evidence of that strength is; negative: sure and wrong."""
    logits = draw.normal(size=(len(labels), CLASSES))
    logits[np.arange(len(labels)), labels] += strength
    return logits * abs(strength)


def corpus(
    name: str, *, voice: float, words: float, familiar: bool, seed: int, count: int = 600
) -> Rows:
    """A corpus whose voice and words say so much of the label; the network adds both up."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, count)
    text, audio = evidence(labels, words, draw), evidence(labels, voice, draw)
    if not words:  # what says nothing is typically taken for the first label
        text[:, 0] += 3.0
    low, high = (0.2, 1.0) if familiar else (0.0, 0.05)
    return Rows(name, labels, text, audio, text + audio, draw.uniform(low, high, count))


def fit(*corpora: Rows, **changes: object) -> Calibration:
    joined = {
        name: np.concatenate([getattr(one, name) for one in corpora])
        for name in ("labels", "text", "audio", "both", "familiarity")
    }
    given = {
        "corpora": [one.corpus for one in corpora for _ in one.labels],
        "speakers": [speaker for one in corpora for speaker in one.speakers],
        **joined,
    }
    return fit_reliability(**given | changes)  # type: ignore[arg-type]


def fused(found: Calibration, rows: Rows) -> Float64:
    return found.probabilities(
        rows.both,
        pattern=["audio+text"] * len(rows.labels),
        words=rows.text,
        familiarity=rows.familiarity,
    )


def test_a_voice_that_misleads_on_strangers_is_heard_where_it_is_familiar() -> None:
    """On familiar voices the fused answer gains; on strangers it is no worse than the words."""
    known = corpus("known", voice=2.0, words=1.0, familiar=True, seed=1)
    strange = corpus("strange", voice=-2.0, words=1.5, familiar=False, seed=2)
    found = fit(known, strange)
    again = corpus("known", voice=2.0, words=1.0, familiar=True, seed=3)
    others = corpus("strange", voice=-2.0, words=1.5, familiar=False, seed=4)
    for rows, least in ((again, 10.0), (others, -1.5)):
        by_words = weighted_f1(rows.labels, rows.text.argmax(1))
        gain = 100 * (weighted_f1(rows.labels, fused(found, rows).argmax(1)) - by_words)
        assert gain >= least, rows.corpus


def test_a_voice_that_never_helps_has_no_weight() -> None:
    """Answers are the words' own, to rounding."""
    rows = corpus("strange", voice=-2.0, words=1.5, familiar=False, seed=5)
    other = corpus("known", voice=-2.0, words=1.5, familiar=True, seed=6)
    found = fit(rows, other)
    by_words = found.probabilities(rows.text, pattern="text")
    np.testing.assert_allclose(fused(found, rows), by_words, atol=1e-3)


def test_empty_words_leave_the_answer_to_the_voice() -> None:
    """Beside a corpus of telling words and misleading voices, at the same familiarity."""
    empty = corpus("acted", voice=2.5, words=0.0, familiar=False, seed=7)
    telling = corpus("series", voice=-1.0, words=3.0, familiar=False, seed=8)
    found = fit(empty, telling)
    by_voice = weighted_f1(empty.labels, fused(found, empty).argmax(1))
    assert by_voice > weighted_f1(empty.labels, empty.text.argmax(1)) + 0.3
    kept = weighted_f1(telling.labels, fused(found, telling).argmax(1))
    assert kept > weighted_f1(telling.labels, telling.text.argmax(1)) - 0.015


def test_words_that_tell_nothing_say_nothing_of_words_alone() -> None:
    """One sentence in every emotion doesn't soften what the words of a dialogue say."""
    telling = corpus("series", voice=1.0, words=2.0, familiar=True, seed=14)
    acted = corpus("acted", voice=2.0, words=0.0, familiar=False, seed=15)
    found, without = fit(telling, acted), fit(telling)
    assert found.temperatures["text"] == without.temperatures["text"]
    assert found.thresholds["text"] == without.thresholds["text"]


def test_strange_voices_alone_are_softer_where_they_are_too_sure() -> None:
    """The temperature grows as familiarity sinks; the labels become likelier by it."""
    known = corpus("known", voice=2.0, words=1.0, familiar=True, seed=9)
    strange = corpus("strange", voice=0.5, words=1.0, familiar=False, seed=10)
    boasting = Rows(**{**vars(strange), "audio": 6 * strange.audio})
    found = fit(known, boasting)
    assert found.reliability is not None
    assert found.reliability.softness > 0.5
    gold = np.arange(600), strange.labels
    soft = found.probabilities(
        boasting.audio, pattern=["audio"] * 600, familiarity=boasting.familiarity
    )
    one = log_softmax(boasting.audio / found.temperatures["audio"])[gold].mean()
    assert np.log(soft[gold]).mean() > one + 0.5


def test_sets_and_abstention_hold_of_the_weighed_probabilities() -> None:
    """On new utterances: nine sets of ten with the label, at most the risk wrong in any corpus."""
    kinds: dict[str, dict[str, Any]] = {
        "known": {"voice": 2.0, "words": 1.0, "familiar": True},
        "strange": {"voice": -2.0, "words": 1.5, "familiar": False},
    }
    found = fit(*(corpus(name, seed=n, **kind) for n, (name, kind) in enumerate(kinds.items(), 20)))
    inside = []
    for seed, (name, kind) in enumerate(kinds.items(), 30):
        rows = corpus(name, seed=seed, count=2000, **kind)
        probabilities = fused(found, rows)
        sets = found.label_sets(probabilities, pattern="audio+text")
        inside.append(sets[np.arange(2000), rows.labels].mean())
        told = ~found.abstains(probabilities, pattern="audio+text")
        assert (probabilities.argmax(1) != rows.labels)[told].mean() < 0.33
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)


def test_one_clip_under_five_conditions_is_one_clip() -> None:
    """Five copies of every row, named as one clip, change nothing."""
    once = corpus("known", voice=1.5, words=1.0, familiar=True, seed=11)
    other = corpus("other", voice=1.0, words=1.5, familiar=False, seed=12)
    tables = ("labels", "text", "audio", "both", "familiarity")
    often = Rows("known", *(np.repeat(getattr(once, name), 5, axis=0) for name in tables))
    names = [str(n) for n in range(600)]
    speakers = [str(int(n) % 12) for n in names]
    again = fit(
        often,
        other,
        clips=[n for n in names for _ in range(5)] + names,
        speakers=[s for s in speakers for _ in range(5)] + speakers,
    )
    expected = fit(once, other, clips=names * 2)
    assert again.reliability is not None
    assert expected.reliability is not None
    assert again.temperatures == pytest.approx(expected.temperatures)
    assert again.thresholds == pytest.approx(expected.thresholds, abs=0.005)
    assert again.reliability.typical == pytest.approx(expected.reliability.typical)
    weights = {"base", "familiar", "telling", "softness"}
    ours, theirs = (
        one.model_dump(include=weights) for one in (again.reliability, expected.reliability)
    )
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"speakers": ["a"]}, "600 labels but 1 of speakers"),
        ({"labels": np.full(600, -1)}, "no prediction has a label"),
        ({"audio": np.full((600, CLASSES), np.nan)}, "no labelled prediction by audio"),
        ({"both": np.zeros((600, 3))}, "other label numbers"),
        ({"risk": 1.0}, "risk 1.0 must be between 0 and 1"),
    ],
)
def test_rows_that_cannot_be_fitted_are_refused(changes: dict[str, object], problem: str) -> None:
    """One line says what is wrong with the arrays."""
    rows = corpus("known", voice=1.0, words=1.0, familiar=True, seed=13)
    with pytest.raises(ConfigError, match=problem):
        fit(rows, **changes)


def test_made_up_pairs_hold_a_voice_back() -> None:
    """A voice that contradicts the words costs little of their answers; without such pairs, much.

    It still helps where it is right, the less the more the pairs count.
    """
    known = corpus("known", voice=2.0, words=1.0, familiar=True, seed=1)
    wrong = corpus("made-up", voice=-2.0, words=2.0, familiar=True, seed=2)
    again = corpus("known", voice=2.0, words=1.0, familiar=True, seed=3)
    others = corpus("made-up", voice=-2.0, words=2.0, familiar=True, seed=4)

    def gain(found: Calibration, rows: Rows) -> float:
        by_words = weighted_f1(rows.labels, rows.text.argmax(1))
        return weighted_f1(rows.labels, fused(found, rows).argmax(1)) - by_words

    held_back = [fit(known, wrong, made_up={"made-up": share}) for share in (0.01, 0.3, 3.0)]
    gains = [gain(found, again) for found in held_back]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.01
    assert min(gain(found, others) for found in held_back) > -CONTRADICTED - NOISE
    assert gain(fit(known), others) < -0.2


NOISE = 0.02  # of weighted F1, on other pairs than those that were fitted on


def test_running_means_are_those_of_plain_loops() -> None:
    """Of the utterances so far that have a voice, or words; each dialogue begins anew."""
    found = settings(prior=2.0)
    assert found.reliability is not None
    draw = np.random.default_rng(0)
    familiarity, words = draw.uniform(size=6), draw.normal(size=(6, CLASSES))
    familiarity[1], words[2] = np.nan, np.nan
    dialogues = [np.array([0, 2, 1]), np.array([5, 3, 4])]
    means = found.running_means(familiarity, words, dialogues=dialogues)
    for rows in dialogues:
        for n in range(3):
            heard = [familiarity[i] for i in rows[: n + 1] if np.isfinite(familiarity[i])]
            told = [
                1 - np.sqrt(softmax(words[i] / 1.2) * np.array(TYPICAL)).sum()
                for i in rows[: n + 1]
                if np.isfinite(words[i]).all()
            ]
            assert means[0][rows[n]] == pytest.approx(sum(heard) / (2.0 + len(heard)))
            assert means[1][rows[n]] == pytest.approx(np.mean(told))


def test_without_a_prior_each_utterance_counts_by_itself() -> None:
    """As in bundles of earlier versions: no mean, and softer below full familiarity."""
    found = settings()
    familiarity, words = np.array([0.2, np.nan, 0.9]), np.eye(3, CLASSES)
    means = found.running_means(familiarity, words, dialogues=[np.arange(3)])
    np.testing.assert_array_equal(means[0], familiarity)
    np.testing.assert_allclose(means[1], found.telling(words))


def test_a_source_that_sounds_strange_throughout_is_softer() -> None:
    """One odd utterance of a familiar source isn't; it is the dialogue's mean that tells."""
    found = settings(prior=1.0, enough=0.4, softness=5.0)
    logits = np.array([[2.0, 0.0, -1.0, 0.5]] * 8)
    sources = np.array([0.9, 0.9, 0.9, 0.0] + [0.0] * 4)
    means, _ = found.running_means(sources, dialogues=[np.arange(4), np.arange(4, 8)])
    sure = found.probabilities(logits, pattern="audio", familiarity=means).max(1)
    assert sure[3] == pytest.approx(sure[2])
    assert sure[7] < sure[3] - 0.1


def test_softness_is_fitted_on_how_a_sitting_sounds() -> None:
    """Corpora of strange sources, whose single utterances may sound familiar, are answered softly;
    with words that tell something throughout, voices that contradict them weigh little."""
    draw = np.random.default_rng(0)
    known = corpus("known", voice=2.0, words=1.0, familiar=True, seed=1)
    strange = corpus("strange", voice=0.3, words=1.0, familiar=True, seed=2)
    known = replace(known, familiarity=draw.uniform(0.3, 1.0, 600))
    strange = replace(strange, familiarity=draw.choice([0.0, 0.5], 600, p=[0.8, 0.2]))
    strange = replace(strange, audio=3.0 * strange.audio)
    heard = [n // 12 for n in range(600)] * 2
    found = fit(known, strange, heard=heard)
    assert found.reliability is not None
    assert found.reliability.prior is not None
    assert found.reliability.softness > 1.0
    by_speaker = [np.arange(first, 600, 12) for first in range(12)]
    for rows, least, most in ((known, 0.6, 1.0), (strange, 0.0, 0.6)):
        means, _ = found.running_means(rows.familiarity, dialogues=by_speaker)
        sure = found.probabilities(rows.audio, pattern=["audio"] * 600, familiarity=means).max(1)
        assert least < sure.mean() < most
