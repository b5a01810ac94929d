"""What goes into the network and what it remembers: "features and the dialogue's state".

Shape letters: B dialogues, U utterances, S streams, W window, H hidden, A, L and K the widths of
the audio, text and commonsense features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

PARTIES = 9  # speakers of a dialogue that are told apart; all further ones are the ninth


@dataclass(frozen=True, slots=True)
class Features:
    """What was measured of utterances: one for ``step``, whole dialogues for ``forward``.

    The leading shape ``..`` is nothing (one utterance), [S] (one utterance of each of S streams)
    or [B, U]. A modality is absent where its mask is False, or everywhere if it is None; what its
    tensor holds there is never read, NaN included. A mask of None means "wherever there is a
    tensor". ``utterance_mask`` is for [B, U] only: a dialogue's utterances stand first, padding
    after them. A network that takes tokens is given audio [.., F, A] and text [.., T, L]: rows of
    NaN, after all others, where an utterance has fewer.
    """

    audio: Tensor | None = None  # [.., A], scaled and selected
    text: Tensor | None = None  # [.., L]
    commonsense: Tensor | None = None  # [.., 3, K]: external, internal, purpose
    audio_mask: Tensor | None = None  # [..]
    text_mask: Tensor | None = None  # [..]; also says whether there is commonsense
    utterance_mask: Tensor | None = None  # [B, U]
    speaker: Tensor | None = None  # [..] int64, in order of appearance from 0; None: one speaker

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """The same features with every tensor changed, for example moved to a device."""
        changed = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            changed[field.name] = None if tensor is None else change(tensor)
        return Features(**changed)

    def parties(self, mask: Tensor) -> Tensor:
        """Who speaks, of the mask's shape [..], 0 .. PARTIES - 1."""
        speaker = torch.zeros_like(mask, dtype=torch.long) if self.speaker is None else self.speaker
        return speaker.clamp(0, PARTIES - 1)

    def present(self) -> Tensor:
        """utterance_mask, or all True if there is none: [..]."""
        if self.utterance_mask is not None:
            return self.utterance_mask
        for mask in (self.audio_mask, self.text_mask):
            if mask is not None:
                return torch.ones_like(mask)
        for tensor in (self.audio, self.text):
            if tensor is not None:
                return torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)
        raise ValueError("features without any tensor have no shape: give audio, text or a mask")


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """All that a network remembers of a dialogue, as an immutable value of fixed size.

    Its fields are tensors, [.., own dimensions]; the leading shape ``..`` is nothing (one
    dialogue), [S] (S streams) or [S, M] (those of an ensemble's M members). A child says how many
    dimensions of its first field are its own. A provisional prediction steps from a state and
    drops the one it gets.
    """

    OWN: ClassVar[int]

    @property
    def shape(self) -> torch.Size:
        """The leading shape."""
        part = self._first
        return part.shape[: part.dim() - self.OWN]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._first.device

    @property
    def _first(self) -> Tensor:
        part: Tensor = getattr(self, fields(self)[0].name)
        return part

    def tensors(self) -> dict[str, Tensor]:
        """Every part by name, contiguous, to be saved; ``Child(**tensors)`` restores it."""
        return {field.name: getattr(self, field.name).contiguous() for field in fields(self)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same state with every tensor changed, for example moved to a device."""
        return type(self)(**{name: change(part) for name, part in self.tensors().items()})

    @classmethod
    def stack(cls, states: Sequence[Self]) -> Self:
        """The states of S dialogues as one with S streams, in their order."""
        parts = [state.tensors() for state in states]
        return cls(**{name: torch.stack([part[name] for part in parts]) for name in parts[0]})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State) or type(self) is not type(other):
            return NotImplemented
        theirs = other.tensors()
        return all(torch.equal(part, theirs[name]) for name, part in self.tensors().items())

    __hash__ = None  # type: ignore[assignment]  # compared by value, so not a key


@dataclass(frozen=True, slots=True, eq=False)
class Nothing(State):
    """The state of a network that remembers nothing: each utterance is by itself."""

    OWN: ClassVar[int] = 1

    nothing: Tensor  # [.., 0]


@dataclass(frozen=True, slots=True, eq=False)
class DialogueState(State):
    """What HBAF remembers.

    Its size depends on the window W, never on how many utterances were heard. Windows end with
    the newest utterance; slots not yet used come first. What a configuration has no use for has
    width 0.
    """

    OWN: ClassVar[int] = 2

    audio_window: Tensor  # [.., W-1, A] audio features, absent ones replaced
    text_window: Tensor  # [.., W-1, H] text representations H_l
    window_mask: Tensor  # [.., W-1]
    score_max: Tensor  # [.., E] soft attention: largest score so far; E = 1, or H if literal
    score_sum: Tensor  # [.., E] sum of exp(score - score_max)
    weighted_sum: Tensor  # [.., H] sum of exp(score - score_max) * l
    past_window: Tensor  # [.., W-1, H] "query" attention only: the past utterances l themselves
    past_mask: Tensor  # [.., W-1] False where an utterance had no text
    external: Tensor  # [.., H] GRU states
    internal: Tensor  # [.., H], or by speaker [.., P, H]
    purpose: Tensor  # likewise


def lead(part: Tensor) -> Tensor:
    """One dialogue's tensor as that of one stream."""
    return part[None]


def first(part: Tensor) -> Tensor:
    """The first stream's tensor as that of one dialogue."""
    return part[0]
