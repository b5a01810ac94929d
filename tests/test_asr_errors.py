"""Promises of simulated recognition errors: as many as asked, plausible, and repeatable."""

import numpy as np
import pytest

from stream_hbaf.corpora.asr_errors import (
    CONFUSED,
    INSERTED,
    Lexicon,
    lexicon_of,
    mishear,
    unpunctuated,
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
    said = (" ".join(draw.choice(list(part)) for part in parts) for _ in range(count))
    return [text[0].upper() + text[1:] for text in said]


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.30])
def test_error_rate_of_a_corpus_is_the_one_asked(rate):
    """Within two points over a few hundred sentences, counted as recognisers are measured."""
    said = sentences(400)
    lexicon, draw = lexicon_of(said), np.random.default_rng(1)
    heard = [mishear(text, rate=rate, draw=draw, lexicon=lexicon) for text in said]
    assert word_error_rate(said, heard) == pytest.approx(rate, abs=0.02)


def test_same_seed_hears_the_same():
    """What is heard depends on the generator alone; another one hears otherwise."""
    said = sentences(50)
    lexicon = lexicon_of(said)

    def hear(seed: int) -> list[str]:
        draw = np.random.default_rng(seed)
        return [mishear(text, rate=0.3, draw=draw, lexicon=lexicon) for text in said]

    assert hear(3) == hear(3)
    assert hear(3) != hear(4)


def test_rate_of_nothing_leaves_every_mark():
    """Whoever asks for no errors gets the text itself."""
    text = "What?!  Really -- no!"
    assert mishear(text, rate=0.0, draw=np.random.default_rng(0)) == text


@pytest.mark.parametrize("text", ["No!", "Rachel?", "...", "", "Oh, oh."])
def test_something_is_always_heard_of_a_text(text):
    """A short text doesn't become empty, and one without words stays."""
    for seed in range(50):
        heard = mishear(text, rate=1.0, draw=np.random.default_rng(seed))
        assert bool(words_of(heard)) == bool(words_of(text))
        assert bool(heard) == bool(text)


def test_words_are_taken_for_words_that_sound_alike():
    """Homophones first; what sounds otherwise never, and no word for itself."""
    lexicon = Lexicon(["right", "write", "night", "knight", "want", "went", "banana", "love"])
    assert lexicon.alike("night")[0] == "knight"
    assert "write" in lexicon.alike("right")
    assert "went" in lexicon.alike("want")
    for word in ("night", "right", "want"):
        assert not {"banana", "love", word} & set(lexicon.alike(word))
    assert lexicon.alike("banana") == ()


def test_a_substitute_stands_in_the_place_of_its_word():
    """Capital letters and marks stay where they were."""
    lexicon = Lexicon(["knight", "night"])
    heard = {
        mishear('"Night," (knight).', rate=0.5, draw=np.random.default_rng(seed), lexicon=lexicon)
        for seed in range(40)
    }
    assert '"Knight," (knight).' in heard
    assert '"Night," (night).' in heard


def test_only_known_words_are_heard():
    """A recogniser writes words: whatever is new in a text is in the lexicon or unstressed."""
    said = sentences(200)
    known = {word for text in said for word in words_of(text)}
    draw, lexicon = np.random.default_rng(2), lexicon_of(said)
    heard = {
        word
        for text in said
        for word in words_of(mishear(text, rate=0.3, draw=draw, lexicon=lexicon))
    }
    assert heard - known <= set(words_of(" ".join((*CONFUSED, *INSERTED))))
    assert len(heard - known) > 10


def test_some_exclamations_become_statements():
    """Small recognisers hear few exclamation marks; a question stays a question."""
    heard = [
        mishear("Stop! Why?!", rate=1e-9, draw=np.random.default_rng(seed)) for seed in range(40)
    ]
    assert set(heard) == {"Stop! Why?!", "Stop. Why?!", "Stop! Why?", "Stop. Why?"}


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("No-no, I don’t KNOW... (really)!", "no no i don't know really"),
        ("'Twas 'fine', 30 people.", "twas fine 30 people"),
        ("?!", ""),
    ],
)
def test_unpunctuated_text_is_words_alone(text, bare):
    """Lower case, no marks but apostrophes within words."""
    assert unpunctuated(text) == bare
