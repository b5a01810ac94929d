"""Windows of dialogue context for the text encoder: whole turns, with block causal attention.

Training, evaluation and live use share this rule: a window starts with the token cls and grows
turn by turn to at most ``tokens`` tokens. A turn that doesn't fit starts a new window, which keeps
as many whole turns before it as fit in half of ``tokens`` together with it. Attention within a
window is block causal: a token attends to its own turn, earlier turns and cls; cls to itself. So
one pass over a window gives each turn the feature that it would have if the dialogue ended there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from stream_hbaf.config import Section

MAX_TURN_TOKENS = 60  # of one turn, its end token not counted; longer turns are cut
MIN_TOKENS = 8  # cls, a few words and their end token
MASKED = -1e4  # added to masked scores: their softmax is exactly 0 in float32

Ids = tuple[int, ...]  # token ids of one turn, its end (sep) included


class ContextConfig(Section):
    """How much of the dialogue the text encoder is given with an utterance."""

    tokens: Annotated[int, Field(ge=0)] = 0  # of a window; 0: every utterance by itself
    speakers: bool = False  # encode "Speaker: text" rather than "text"

    @field_validator("tokens")
    @classmethod
    def _enough(cls, tokens: int) -> int:
        if 0 < tokens < MIN_TOKENS:
            raise ValueError(f"a window of {tokens} tokens is too short; 0, or {MIN_TOKENS} up")
        return tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """The text of one utterance and its speaker."""

    speaker: str  # empty when unknown
    text: str


@dataclass(frozen=True, slots=True)
class TurnWindow:
    """The turns in the current window: all the context that live use carries. Immutable."""

    turns: tuple[Ids, ...] = ()

    @property
    def length(self) -> int:
        """Tokens, cls included."""
        return 1 + sum(map(len, self.turns))

    def then(self, turn: Ids, *, tokens: int) -> "TurnWindow":
        """The window with ``turn`` as the last one: this one extended, or a new one."""
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
    """A window that is encoded in one pass; its targets are the turns from ``first`` on."""

    turns: tuple[Ids, ...]
    first: int = 0

    @property
    def length(self) -> int:
        """Tokens, cls included."""
        return 1 + sum(map(len, self.turns))


@dataclass(frozen=True, slots=True)
class Layout:
    """A padded batch of passages, the encoder's input."""

    ids: Tensor  # int64 [B, T]
    mask: Tensor  # float32 [B, 1, T, T], added to the attention scores
    spans: tuple[tuple[int, int, int], ...]  # of the target turns: row, first token, end


def with_speaker(turn: Turn, *, speakers: bool) -> str:
    """The text to encode: with the speaker's name if ``speakers`` and it is known."""
    return f"{turn.speaker}: {turn.text}" if speakers and turn.speaker else turn.text


def passages(turns: Sequence[Ids], *, tokens: int) -> list[Passage]:
    """A dialogue split into windows; each turn is a target once, in order."""
    found: list[Passage] = []
    window, first = EMPTY_WINDOW, 0
    for turn in turns:
        after = window.then(turn, tokens=tokens)
        if len(after.turns) != len(window.turns) + 1:  # a new window
            found.append(Passage(window.turns, first))
            first = len(after.turns) - 1
        window = after
    return [*found, Passage(window.turns, first)] if turns else []


def lay_out(batch: Sequence[Passage], *, cls: int, pad: int) -> Layout:
    """Token ids, the block causal mask and the spans of the target turns."""
    longest = max(passage.length for passage in batch)
    ids = torch.full((len(batch), longest), pad)
    turn_of = torch.full((len(batch), longest), torch.iinfo(torch.int64).max)  # padding comes last
    spans = []
    for row, passage in enumerate(batch):
        ids[row, 0], turn_of[row, 0], end = cls, -1, 1
        for number, turn in enumerate(passage.turns):
            start, end = end, end + len(turn)
            ids[row, start:end] = torch.tensor(turn)
            turn_of[row, start:end] = number
            if number >= passage.first:
                spans.append((row, start, end))
    visible = turn_of[:, None, :] <= turn_of[:, :, None]  # [B, T, T]: of row's token, column's
    mask = torch.zeros(visible.shape).masked_fill(~visible, MASKED)[:, None]
    return Layout(ids, mask, tuple(spans))


def batches_of(lengths: Sequence[int], order: Sequence[int], *, tokens: int) -> list[list[int]]:
    """``order`` split into batches of at most ``tokens`` tokens, padding included.

    A longer passage is a batch of its own. Order by length, or most of a batch is padding.
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
