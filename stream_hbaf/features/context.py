"""A dialogue as the text encoder reads it: windows of whole turns, none of which sees a later one.

The rule of the windows is here and nowhere else, so that training, evaluation and live use read
the same: a window starts with the token cls and grows turn by turn to at most ``tokens`` tokens.
A turn that doesn't fit starts a new window, which keeps as many whole turns before it as fit in
half of ``tokens`` together with it. Attention within a window is block causal: a token sees its
own turn, earlier turns and cls; cls sees itself. So one pass over a window gives each turn the
feature that it would have had if the dialogue had ended with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from stream_hbaf.config import Section

MAX_TURN_TOKENS = 60  # of one turn, its end not counted; what is beyond is cut
LEAST_TOKENS = 8  # cls, a few words and their end
UNSEEN = -1e4  # added to a score that is not to count: its softmax is exactly 0 in float32

Ids = tuple[int, ...]  # token ids of one turn, its end (sep) included


class ContextConfig(Section):
    """How much of the dialogue the text encoder reads with an utterance."""

    tokens: Annotated[int, Field(ge=0)] = 0  # of a window; 0: every utterance by itself
    speakers: bool = False  # read "Speaker: text" rather than "text"

    @field_validator("tokens")
    @classmethod
    def _enough(cls, tokens: int) -> int:
        if 0 < tokens < LEAST_TOKENS:
            raise ValueError(f"a window of {tokens} tokens is too short; 0, or {LEAST_TOKENS} up")
        return tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker said in one utterance."""

    speaker: str  # empty when unknown
    text: str


@dataclass(frozen=True, slots=True)
class TurnWindow:
    """The turns in the window so far: all that live reading remembers. Immutable."""

    turns: tuple[Ids, ...] = ()

    @property
    def length(self) -> int:
        """Tokens, cls included."""
        return 1 + sum(map(len, self.turns))

    def then(self, turn: Ids, *, tokens: int) -> "TurnWindow":
        """The window in which ``turn`` is read: this one, or a new one if it doesn't fit."""
        if self.length + len(turn) <= tokens:
            return TurnWindow((*self.turns, turn))
        length, first = 1 + len(turn), len(self.turns)
        while first and length + len(self.turns[first - 1]) <= tokens // 2:
            first -= 1
            length += len(self.turns[first])
        return TurnWindow((*self.turns[first:], turn))


EMPTY_WINDOW = TurnWindow()


@dataclass(frozen=True, slots=True)
class Passage:
    """A window to be read at once; features are wanted of its turns from ``first`` on."""

    turns: tuple[Ids, ...]
    first: int = 0

    @property
    def length(self) -> int:
        """Tokens, cls included."""
        return 1 + sum(map(len, self.turns))


@dataclass(frozen=True, slots=True)
class Layout:
    """Passages side by side, as the encoder takes them."""

    ids: Tensor  # int64 [B, T]
    mask: Tensor  # float32 [B, 1, T, T], added to the scores of attention
    spans: tuple[tuple[int, int, int], ...]  # of the wanted turns: row, first token, end


def phrase(turn: Turn, *, speakers: bool) -> str:
    """The turn as it is read: with its speaker's name if that is wanted and known."""
    return f"{turn.speaker}: {turn.text}" if speakers and turn.speaker else turn.text


def passages(turns: Sequence[Ids], *, tokens: int) -> list[Passage]:
    """A dialogue cut into windows by the rule; each turn is wanted once, in order."""
    found: list[Passage] = []
    window, first = EMPTY_WINDOW, 0
    for turn in turns:
        after = window.then(turn, tokens=tokens)
        if len(after.turns) != len(window.turns) + 1:  # a new window
            found.append(Passage(window.turns, first))
            first = len(after.turns) - 1
        window = after
    return [*found, Passage(window.turns, first)] if turns else []


def lay_out(read: Sequence[Passage], *, cls: int, pad: int) -> Layout:
    """Token ids, the block causal mask and the places of the wanted turns."""
    longest = max(passage.length for passage in read)
    ids = torch.full((len(read), longest), pad)
    turn_of = torch.full((len(read), longest), torch.iinfo(torch.int64).max)  # padding comes last
    spans = []
    for row, passage in enumerate(read):
        ids[row, 0], turn_of[row, 0], end = cls, -1, 1
        for number, turn in enumerate(passage.turns):
            start, end = end, end + len(turn)
            ids[row, start:end] = torch.tensor(turn)
            turn_of[row, start:end] = number
            if number >= passage.first:
                spans.append((row, start, end))
    sees = turn_of[:, None, :] <= turn_of[:, :, None]  # [B, T, T]: row sees column
    mask = torch.zeros(sees.shape).masked_fill(~sees, UNSEEN)[:, None]
    return Layout(ids, mask, tuple(spans))


def by_tokens(lengths: Sequence[int], order: Sequence[int], *, tokens: int) -> list[list[int]]:
    """``order`` cut into batches of at most ``tokens`` tokens, padding counted, one at the least.

    Order by length first, or padding is most of what is computed.
    """
    batches: list[list[int]] = []
    longest = 0
    for n in order:
        longest = max(longest, lengths[n])
        if not batches or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            longest = lengths[n]
        batches[-1].append(n)
    return batches
