"""Calibration: from logits to probabilities, sets of labels, abstention and contributions.

Plain numpy, so that evaluation and live use make the same calls. How reliable a network is depends
on the modalities that it was given, so every setting is kept by modality pattern. How reliable a
voice is depends on how familiar its dialogue sounds and on how much the dialogue's words tell: it
moves the answer and sharpens it by that. Shape letters: C classes, N predictions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import Annotated, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from stream_hbaf.config import Probability, Section

Modality = Literal["audio", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
Pattern = Literal["", "audio", "text", "audio+text"]  # the modalities given; "": only the past
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
Flags = NDArray[np.bool_]
Probabilities = NDArray[np.float64]
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]  # beyond it every logit is the same, or all

VALENCE = {
    "anger": -1,
    "disgust": -1,
    "fear": -1,
    "joy": 1,
    "neutral": 0,
    "sadness": -1,
    "surprise": 0,  # pleasant or unpleasant
}
ALWAYS_ABSTAIN = 1.0  # as ``answers_above``
LARGEST = 100.0  # setting of a voice's weight, which then is 0 or 1
WITH_AUDIO: Mapping[Pattern, float] = {p: float("audio" in p) for p in PATTERNS}
UNKNOWN = 0.0  # the familiarity of a voice of which nothing is known


@dataclass(frozen=True, slots=True)
class RunningSums:
    """What is remembered of a dialogue's utterances, for the running means of ``Reliability``."""

    voices: int = 0  # utterances whose voice has a familiarity
    familiarity: float = 0.0  # the sum of theirs
    texts: int = 0  # utterances with words
    telling: float = 0.0  # the sum of how much these tell

    def add(self, *, familiarity: float | None, telling: float | None) -> "RunningSums":
        """With an utterance more; None where it has no voice, or no words."""
        return RunningSums(
            self.voices + (familiarity is not None),
            self.familiarity + (familiarity or 0.0),
            self.texts + (telling is not None),
            self.telling + (telling or 0.0),
        )


NOTHING_SUMMED = RunningSums()


class Reliability(Section):
    """How much a voice may move the answer, and how sure it may be, by its familiarity f.

    With words, the voice's evidence has a weight w in a log-linear pool (Genest & Zidek 1986):
    log p = log p_words + w (log p_both - log p_words), renormalised, where w is the logistic
    function of ``base + familiar f - telling t - past m``. How much the words tell, t in [0, 1], is
    how far p_words lies from the words' ``typical`` answer: 1 less the Bhattacharyya coefficient,
    so 0 for words that say nothing. By the voice alone, the temperature is multiplied by
    exp(``softness`` (``enough`` - f)) where f is below ``enough``. ``training/reliability.py`` fits
    all of them.

    A single utterance says little of where it comes from. So with a ``prior``, f is the mean of the
    dialogue's familiarities up to the utterance, beginning as if ``prior`` utterances of UNKNOWN
    familiarity had been heard, and m is the mean of how much the dialogue's words told so far, the
    utterance's included. Without, f is the utterance's own, and m is t.
    """

    base: Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
    familiar: Annotated[float, Field(ge=0, le=LARGEST)]
    telling: Annotated[float, Field(ge=0, le=LARGEST)]
    past: Annotated[float, Field(ge=0, le=1000)] = 0.0  # m is some hundredths
    softness: Annotated[float, Field(ge=0, le=LARGEST)]
    enough: Annotated[float, Field(gt=0, le=1)] = 1.0
    typical: tuple[Probability, ...]  # [C]
    prior: Annotated[float, Field(gt=0, le=1000)] | None = None

    def tells(self, words: Probabilities) -> Probabilities:
        """How much words with these probabilities [.., C] tell, t [..]."""
        return np.asarray(1.0 - np.sqrt(words * np.array(self.typical)).sum(-1))

    def mean_familiarity(self, own: float | None, before: RunningSums) -> float | None:
        """f of an utterance after those that are summed up."""
        if self.prior is None:
            return own
        after = before.add(familiarity=own, telling=None)
        return (self.prior * UNKNOWN + after.familiarity) / (self.prior + after.voices)

    def mean_telling(self, own: float | None, before: RunningSums) -> float | None:
        """m of an utterance after those that are summed up; None without words."""
        after = before.add(familiarity=None, telling=own)
        if self.prior is None or not after.texts:
            return own
        return after.telling / after.texts

    def weight(
        self,
        words: Probabilities,
        familiarity: Probabilities | float,
        mean_telling: Probabilities | float | None = None,
    ) -> Probabilities:
        """w [..] of voices beside the words' probabilities [.., C]; m is t unless it is given."""
        tells = self.tells(words)
        before = tells if mean_telling is None else mean_telling
        evidence = (
            self.base + self.familiar * familiarity - self.telling * tells - self.past * before
        )
        return np.asarray(1.0 / (1.0 + np.exp(-evidence)))


class Head(Section):
    """A last step, fitted where the recogniser runs: p' ~ p ** scale * exp(bias), of each label."""

    scale: Annotated[float, Field(gt=0, le=LARGEST)]
    bias: tuple[Annotated[float, Field(ge=-LARGEST, le=LARGEST)], ...]  # [C]

    def __call__(self, probabilities: Probabilities) -> Probabilities:
        """Probabilities [.., C] → others [.., C]."""
        logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
        return softmax(self.scale * logs + np.array(self.bias))


class Calibration(Section):
    """The fitted calibration of a bundle.

    Temperature: Guo et al. 2017. Sets of labels: split conformal prediction (Vovk et al. 2005;
    Lei et al. 2018) with the score 1 - p of LAC, which gives the smallest sets on average
    (Sadinle et al. 2019). Abstention: selective classification (El-Yaniv & Wiener 2010; Geifman &
    El-Yaniv 2017). ``training/scoring.py`` fits all three.
    """

    temperatures: dict[Pattern, Temperature]  # logits are divided by it
    thresholds: dict[Pattern, Probability]  # labels at least as likely are in the set; 0: all
    coverage: Probability = 0.9  # share of sets with the right label, for which they were fitted
    answers_above: dict[Pattern, Probability]  # abstain if the best label is less likely; 1: always
    risk: Probability  # error rate among what is answered, for which ``answers_above`` was chosen
    conflict_above: Probability = 0.5  # least probability of both modalities' labels in a conflict
    reliability: Reliability | None = None  # None: every voice counts as the network has it
    head: Head | None = None  # None: not adapted

    @model_validator(mode="after")
    def _of_every_pattern(self) -> Self:
        for name in ("temperatures", "thresholds", "answers_above"):
            if missing := set(PATTERNS) - set(getattr(self, name)):
                raise ValueError(f"{name} has nothing for {', '.join(map(repr, sorted(missing)))}")
        return self

    @classmethod
    def of_temperature(cls, temperature: float) -> "Calibration":
        """One temperature without guarantees: sets hold every label, nothing is abstained."""
        return cls(
            temperatures=dict.fromkeys(PATTERNS, temperature),
            thresholds=dict.fromkeys(PATTERNS, 0.0),
            coverage=1.0,
            answers_above=dict.fromkeys(PATTERNS, 0.0),
            risk=1.0,
        )

    def probabilities(
        self,
        logits: NDArray[np.floating],
        *,
        pattern: Pattern | Sequence[Pattern],
        words: NDArray[np.floating] | None = None,
        familiarity: Probabilities | float | None = None,
        mean_telling: Probabilities | float | None = None,
    ) -> Probabilities:
        """Logits [.., C] → probabilities [.., C]; one pattern for all, or one for each row.

        With a ``reliability``, also the logits ``words`` [.., C] of a network that was given no
        sound in the whole dialogue, which answer for utterances without sound, and the voices'
        ``familiarity`` f [..], NaN or None where it isn't known. f and m are as ``running_means``
        gives them.
        """
        wide = np.asarray(logits, dtype=np.float64)
        if self.reliability is None:
            found = softmax(wide / _of(self.temperatures, pattern)[..., None])
        else:
            known = UNKNOWN if familiarity is None else np.asarray(familiarity, np.float64)
            found = self._weighed(
                wide,
                wide if words is None else np.asarray(words, dtype=np.float64),
                pattern=pattern,
                familiarity=np.nan_to_num(known, nan=UNKNOWN),
                mean_telling=None if mean_telling is None else np.nan_to_num(mean_telling),
                reliability=self.reliability,
            )
        return found if self.head is None else self.head(found)

    def telling(self, words: NDArray[np.floating]) -> Probabilities:
        """How much words with these logits [.., C] tell [..]; needs a ``reliability``."""
        assert self.reliability is not None
        return self.reliability.tells(softmax(words / self.temperatures["text"]))

    def running_means(
        self,
        familiarity: Probabilities,
        words: NDArray[np.floating] | None = None,
        *,
        dialogues: Sequence[NDArray[np.integer]],
    ) -> tuple[Probabilities, Probabilities]:
        """f and m [N] of all utterances, by their familiarity [N] and their words' logits [N, C].

        NaN: no voice, or no words. ``dialogues`` has the rows of each in order. Live, the same is
        computed utterance by utterance.
        """
        assert self.reliability is not None
        found = np.full((2, len(familiarity)), np.nan)
        telling = found[1].copy() if words is None else self.telling(words)
        for rows in dialogues:
            before = NOTHING_SUMMED
            for n in rows:
                own = [float(a[n]) if np.isfinite(a[n]) else None for a in (familiarity, telling)]
                means = (
                    self.reliability.mean_familiarity(own[0], before),
                    self.reliability.mean_telling(own[1], before),
                )
                found[:, n] = [np.nan if mean is None else mean for mean in means]
                before = before.add(familiarity=own[0], telling=own[1])
        return found[0], found[1]

    def _weighed(
        self,
        logits: Probabilities,
        words: Probabilities,
        *,
        pattern: Pattern | Sequence[Pattern],
        familiarity: Probabilities,
        mean_telling: Probabilities | float | None,
        reliability: Reliability,
    ) -> Probabilities:
        """Probabilities [.., C] in which each voice counts for what it is worth."""
        temperature = _of(self.temperatures, pattern)
        alone = _of(dict.fromkeys(PATTERNS, 0.0) | {"audio": 1.0}, pattern)
        strange = np.maximum(0.0, reliability.enough - familiarity)
        softer = np.exp(alone * reliability.softness * strange)
        whole = log_softmax(logits / (temperature * softer)[..., None])
        without = {
            p: self.temperatures[pattern_of(audio=False, text="text" in p)] for p in PATTERNS
        }
        by_words = log_softmax(words / _of(without, pattern)[..., None])
        moved = reliability.weight(np.exp(by_words), familiarity, mean_telling)
        weight = np.where(alone > 0, 1.0, moved * _of(WITH_AUDIO, pattern))[..., None]
        return softmax(by_words + weight * (whole - by_words))

    def label_sets(
        self,
        probabilities: Probabilities,
        *,
        pattern: Pattern | Sequence[Pattern],
        shift: float = 0.0,
    ) -> Flags:
        """The set of labels [.., C] for probabilities [.., C]; the best label is always in it.

        ``shift`` is that of ``AdaptiveSets``: the higher, the larger the sets.
        """
        thresholds = _of(self.thresholds, pattern) * np.exp(-shift)
        least = np.minimum(thresholds, probabilities.max(-1))
        return np.asarray(probabilities >= least[..., None])

    def abstains(
        self, probabilities: Probabilities, *, pattern: Pattern | Sequence[Pattern]
    ) -> Flags:
        """Whether the best of probabilities [.., C] is too unlikely to be answered [..]."""
        least = _of(self.answers_above, pattern)
        return np.asarray((probabilities.max(-1) < least) | (least >= ALWAYS_ABSTAIN))

    def conflicts(
        self, labels: Sequence[str], *, audio: Probabilities, text: Probabilities
    ) -> bool:
        """Whether the predictions by audio alone [C] and by text alone [C] contradict each other.

        Their labels are of opposite valence, and each is as likely as ``conflict_above`` or more.
        """
        if min(audio.max(), text.max()) < self.conflict_above:
            return False
        by_audio, by_text = (VALENCE.get(labels[int(p.argmax())], 0) for p in (audio, text))
        return by_audio * by_text < 0


def pattern_of(*, audio: bool, text: bool) -> Pattern:
    """The pattern of the modalities that a prediction was given."""
    return PATTERNS[audio + 2 * text]


def patterns_of(*, audio: Flags, text: Flags) -> list[Pattern]:
    """The patterns of N predictions, by where audio [N] and text [N] were given."""
    return [pattern_of(audio=bool(a), text=bool(t)) for a, t in zip(audio, text, strict=True)]


def softmax(logits: NDArray[np.floating]) -> Probabilities:
    """Probabilities along the last axis, in float64 so that they sum to 1."""
    wide = np.asarray(logits, dtype=np.float64)
    exponents = np.exp(wide - wide.max(-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(-1, keepdims=True))


def log_softmax(logits: NDArray[np.floating]) -> Probabilities:
    """Log probabilities along the last axis, in float64."""
    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def coalitions(players: Sequence[str]) -> list[frozenset[str]]:
    """Every set of players, from the empty one to all of them, smaller ones first."""
    return [
        frozenset(chosen)
        for size in range(len(players) + 1)
        for chosen in combinations(players, size)
    ]


def shapley(worth: Mapping[frozenset[str], float]) -> dict[str, float]:
    """Shapley values (Shapley 1953): what each player adds on average over all orders.

    ``worth`` holds the value of every coalition. The values sum to worth of all - worth of none.
    """
    players = max(worth, key=len)
    count = len(players)
    shares = dict.fromkeys(players, 0.0)
    for without in worth:
        orders = factorial(len(without)) * factorial(max(0, count - len(without) - 1))
        for player in players - without:
            added = worth[without | {player}] - worth[without]
            shares[player] += orders / factorial(count) * added
    return shares


def _of(table: Mapping[Pattern, float], pattern: Pattern | Sequence[Pattern]) -> Probabilities:
    """The table's value for one pattern [], or for each of N [N]."""
    if isinstance(pattern, str):
        return np.array(table[pattern], dtype=np.float64)
    return np.array([table[one] for one in pattern], dtype=np.float64)
