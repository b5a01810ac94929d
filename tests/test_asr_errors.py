"""Promises of simulated recognition errors: as many as asked, plausible, and repeatable."""

import numpy as np
import pytest

from stream_hbaf.corpora.asr_errors import (
    CONFUSED,
    INSERTED,
    Lexicon,
    lexicon_of,
    simulate_asr_errors,
    without_punctuation,
    words_of,
)
from stream_hbaf.evaluation.metrics import word_error_rate

SUBJECTS = ("i", "you", "he", "she", "we", "they", "rachel", "everybody")
VERBS = ("really", "hate", "love", "want", "wrote", "believe", "heard", "left")
OBJECTS = ("the weather", "that whole story", "him", "their wedding", "this place", "your new car")
ENDINGS = ("right now!", "in the night.", "for a week?", "don't you think?", "before it rains.")


def sentences(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    parts = (SUBJECTS, VERBS, OBJECTS, ENDINGS)
    spoken = (" ".join(draw.choice(list(part)) for part in parts) for _ in range(count))
    return [text[0].upper() + text[1:] for text in spoken]


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.30])
def test_error_rate_of_a_corpus_is_the_one_asked(rate: float) -> None:
    """Within two points over a few hundred sentences, counted as recognisers are measured."""
    texts = sentences(400)
    lexicon, draw = lexicon_of(texts), np.random.default_rng(1)
    changed = [simulate_asr_errors(text, rate=rate, draw=draw, lexicon=lexicon) for text in texts]
    assert word_error_rate(texts, changed) == pytest.approx(rate, abs=0.02)


def test_same_seed_makes_the_same_errors() -> None:
    """Errors depend on the generator alone; another seed makes others."""
    texts = sentences(50)
    lexicon = lexicon_of(texts)

    def change(seed: int) -> list[str]:
        draw = np.random.default_rng(seed)
        return [simulate_asr_errors(text, rate=0.3, draw=draw, lexicon=lexicon) for text in texts]

    assert change(3) == change(3)
    assert change(3) != change(4)


def test_rate_of_zero_changes_nothing() -> None:
    """Not even white space."""
    text = "What?!  Really -- no!"
    assert simulate_asr_errors(text, rate=0.0, draw=np.random.default_rng(0)) == text


@pytest.mark.parametrize("text", ["No!", "Rachel?", "...", "", "Oh, oh."])
def test_texts_never_become_empty(text: str) -> None:
    """However short; one without words stays as it is."""
    for seed in range(50):
        changed = simulate_asr_errors(text, rate=1.0, draw=np.random.default_rng(seed))
        assert bool(words_of(changed)) == bool(words_of(text))
        assert bool(changed) == bool(text)


def test_substitutes_sound_alike() -> None:
    """Homophones first; what sounds otherwise never, and no word for itself."""
    lexicon = Lexicon(["right", "write", "night", "knight", "want", "went", "banana", "love"])
    assert lexicon.similar("night")[0] == "knight"
    assert "write" in lexicon.similar("right")
    assert "went" in lexicon.similar("want")
    for word in ("night", "right", "want"):
        assert not {"banana", "love", word} & set(lexicon.similar(word))
    assert lexicon.similar("banana") == ()


def test_a_substitute_stands_in_the_place_of_its_word() -> None:
    """Capital letters and marks stay where they were."""
    lexicon = Lexicon(["knight", "night"])
    changed = {
        simulate_asr_errors(
            '"Night," (knight).', rate=0.5, draw=np.random.default_rng(seed), lexicon=lexicon
        )
        for seed in range(40)
    }
    assert '"Knight," (knight).' in changed
    assert '"Night," (night).' in changed


def test_only_known_words_are_written() -> None:
    """A recogniser writes words: whatever is new in a text is in the lexicon or unstressed."""
    texts = sentences(200)
    known = {word for text in texts for word in words_of(text)}
    draw, lexicon = np.random.default_rng(2), lexicon_of(texts)
    changed = {
        word
        for text in texts
        for word in words_of(simulate_asr_errors(text, rate=0.3, draw=draw, lexicon=lexicon))
    }
    assert changed - known <= set(words_of(" ".join((*CONFUSED, *INSERTED))))
    assert len(changed - known) > 10


def test_some_exclamations_become_statements() -> None:
    """Small recognisers write few exclamation marks; a question stays a question."""
    changed = [
        simulate_asr_errors("Stop! Why?!", rate=1e-9, draw=np.random.default_rng(seed))
        for seed in range(40)
    ]
    assert set(changed) == {"Stop! Why?!", "Stop. Why?!", "Stop! Why?", "Stop. Why?"}


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("No-no, I don’t KNOW... (really)!", "no no i don't know really"),
        ("'Twas 'fine', 30 people.", "twas fine 30 people"),
        ("?!", ""),
    ],
)
def test_text_without_punctuation_is_words_alone(text: str, bare: str) -> None:
    """Lower case, no marks but apostrophes within words."""
    assert without_punctuation(text) == bare
