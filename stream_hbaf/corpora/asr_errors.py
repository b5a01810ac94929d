"""Simulates speech recognition errors in a text, as Whisper makes them.

Errors are drawn word by word. Most are substitutions by a word that sounds alike; short words are
also deleted, and sometimes a word is inserted, split in two or merged with the next. As Whisper's,
all results are words: there are no spelling errors. The only file that imports jellyfish.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache

import jellyfish
import numpy as np

Draw = np.random.Generator
Words = tuple[str, ...]

# Unstressed words, in groups that are confused with one another.
CONFUSED = (
    "a the uh of her",
    "and in an on then end",
    "is it's as his was it if",
    "are our or her",
    "i i'm i'll ah i've hi",
    "to too two do the",
    "there their they're the where",
    "you you're your he we yeah it",
    "he she we i they the",
    "him them me it in",
    "that's that what it's this",
    "what that but when why what's",
    "don't didn't doesn't do want won't",
    "can can't could couldn't",
    "will would well we'll",
    "for from four before or",
    "have had of has a have",
    "were where we're was are",
    "no know oh now not so",
    "oh uh i'm no well so",
    "yeah yes ya you're",
    "gonna going want to",
)
INSERTED = ("the", "a", "I", "and", "to", "it", "you", "oh", "so", "that", "is")
SHORT = 3  # letters; words of no more are often deleted, longer ones hardly ever
KINDS = ("substitute", "delete", "insert", "split", "merge")
OF_SHORT = (0.56, 0.28, 0.10, 0.00, 0.06)  # shares of the kinds of errors at a short word
OF_LONG = (0.74, 0.05, 0.08, 0.08, 0.05)
CHANGES = {"substitute": 1, "delete": 1, "insert": 1, "split": 2, "merge": 2}
FREQUENT = 3  # times that a word of a lexicon occurs
MOST_SIMILAR = 8  # substitutes of a word
LEAST_SIMILARITY = 0.6  # Jaro-Winkler similarity of the spelling, 0 to 1
# Share of exclamation marks that become full stops. Whisper, base and tiny, wrote one after 36 and
# 44 % of RAVDESS's strongly angry clips, 22 and 28 % of the joyful, 8 and 14 % of the surprised.
EXCLAMATIONS_DROPPED = 0.5

_WORD = re.compile(r"[a-z0-9']*[a-z0-9][a-z0-9']*", re.IGNORECASE)


class Lexicon:
    """Words by their sound, from which substitutes are drawn."""

    def __init__(self, words: Iterable[str], *, similar: Mapping[str, Words] | None = None) -> None:
        """``words``: all that may be substituted, in lower case, the most frequent first.

        ``similar``: substitutes that are known already.
        """
        self._rank = {word: n for n, word in enumerate(dict.fromkeys(words))}
        self._by_sound: dict[str, list[str]] = {}
        for word in self._rank:
            for sound in _sounds(word):
                self._by_sound.setdefault(sound, []).append(word)
        self._similar = dict(similar or {})

    def similar(self, word: str) -> Words:
        """At most eight other words that sound almost like ``word``, the likeliest first.

        Almost: their metaphones differ by at most a sound or two, and their spelling is similar.
        """
        if word not in self._similar:
            others = {other for sound in _sounds(word) for other in self._by_sound.get(sound, ())}
            near = {w: jellyfish.jaro_winkler_similarity(word, w) for w in others - {word}}
            order = sorted(
                (w for w in near if near[w] >= LEAST_SIMILARITY),
                key=lambda w: (-near[w] + 0.03 * np.log1p(self._rank[w]), w),
            )
            self._similar[word] = tuple(order[:MOST_SIMILAR])
        return self._similar[word]

    def __contains__(self, word: str) -> bool:
        return word in self._rank


def lexicon_of(texts: Iterable[str]) -> Lexicon:
    """All words that occur in ``texts`` at least three times."""
    counts = Counter(word for text in texts for word in words_of(text))
    return Lexicon(word for word, count in counts.most_common() if count >= FREQUENT)


def simulate_asr_errors(
    text: str,
    *,
    rate: float,
    draw: Draw,
    lexicon: Lexicon | None = None,
    exclamations_dropped: float = EXCLAMATIONS_DROPPED,
) -> str:
    """``text`` with recognition errors, at an expected word error rate of ``rate``.

    Substitutes come from ``lexicon`` (without one from unstressed words alone) and keep the
    original's capital and punctuation; the share ``exclamations_dropped`` of exclamation marks
    becomes full stops. Never becomes empty. A rate of 0 returns the text as it is.
    """
    if not rate:
        return text
    known = lexicon or _unstressed()
    original = [token for token in text.split() if words_of(token)]
    budget = int(draw.binomial(len(original), rate)) if original else 0
    order = iter(draw.permutation(len(original)).tolist())
    tokens: list[str | None] = list(original)  # None: deleted
    while budget > 0 and (place := next(order, None)) is not None:
        budget -= _make_error(tokens, place, budget=budget, lexicon=known, draw=draw)
    changed = " ".join(token for token in tokens if token)
    return _drop_exclamations(changed, share=exclamations_dropped, draw=draw) or text


def without_punctuation(text: str) -> str:
    """In lower case, with no mark but the apostrophes within words, as many recognisers write."""
    return " ".join(words_of(text))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, as word error rates count them."""
    found = _WORD.findall(text.replace("\u2019", "'").lower())
    return [bare for word in found if (bare := word.strip("'"))]


def _make_error(
    tokens: list[str | None], place: int, *, budget: int, lexicon: Lexicon, draw: Draw
) -> int:
    """Make an error at one of ``tokens``; returns how many of the budget's errors it counts as, 0
    for none."""
    token = tokens[place]
    if token is None:
        return 0
    word = words_of(token)[0]
    shares = OF_SHORT if len(word) <= SHORT else OF_LONG
    kind = KINDS[int(draw.choice(len(KINDS), p=shares))]
    if CHANGES[kind] > budget:
        kind = "substitute"
    following = tokens[place + 1] if place + 1 < len(tokens) else None
    if kind == "insert":
        tokens[place] = f"{token} {_pick(INSERTED, draw)}"
        return 1
    if kind == "split" and (halves := _halves(word, lexicon)):
        tokens[place] = _in_place_of(token, halves)
        return 2
    if kind == "merge" and following is not None and " " not in following:
        merged = lexicon.similar(word + words_of(following)[0])
        if merged:
            tokens[place], tokens[place + 1] = None, _in_place_of(following, _pick(merged, draw))
            return 2
    others = _unstressed().similar(word) if word in _unstressed() else lexicon.similar(word)
    if kind != "delete" and others:
        tokens[place] = _in_place_of(token, _pick(others, draw))
        return 1
    if sum(token is not None for token in tokens) == 1:
        return 0
    tokens[place] = None
    return 1


@cache
def _unstressed() -> Lexicon:
    """CONFUSED's words, each similar to those of its groups."""
    groups = [group.split() for group in CONFUSED]
    words = [word for group in groups for word in group]
    near = {word: [w for group in groups if word in group for w in group] for word in words}
    similar = {word: tuple(dict.fromkeys(w for w in near[word] if w != word)) for word in words}
    return Lexicon(words, similar=similar)


def _sounds(word: str) -> set[str]:
    """The word's metaphone, and what is left of it without any one sound."""
    sound = jellyfish.metaphone(word.replace("'", "")).replace(" ", "")
    if len(sound) < 2:
        return {f"{sound}{len(word) // 3}"}  # a single sound is in too many words
    return {sound, *(sound[:n] + sound[n + 1 :] for n in range(len(sound)))}


def _halves(word: str, lexicon: Lexicon) -> str:
    """Two words that make up ``word``'s letters, or nothing."""
    cuts = range(2, len(word) - 1)
    found = ((word[:n], word[n:]) for n in cuts)
    return next((f"{a} {b}" for a, b in found if a in lexicon and b in lexicon), "")


def _in_place_of(token: str, word: str) -> str:
    """``word`` with the token's capital and the marks around it."""
    match = _WORD.search(token)
    assert match is not None, token
    capital = match[0][0].isupper() or word.split("'")[0] == "i"
    written = word[0].upper() + word[1:] if capital else word
    return f"{token[: match.start()]}{written}{token[match.end() :]}"


def _drop_exclamations(text: str, *, share: float, draw: Draw) -> str:
    """Some exclamation marks as full stops; "?!" as a question mark."""

    def drop(marks: re.Match[str]) -> str:
        if draw.random() >= share:
            return marks[0]
        return "?" if "?" in marks[0] else "."

    return re.sub(r"\?*!+\?*", drop, text)


def _pick(words: Words, draw: Draw) -> str:
    return words[int(draw.integers(len(words)))]
