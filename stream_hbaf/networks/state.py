"""What goes into a network, ``Features``, and what it carries between utterances, ``State``.

Letters in shapes: B dialogues, U utterances, S streams (dialogues stepped together), A, L and K
the widths of audio, text and commonsense features, F and T tokens of speech and of text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

PARTIES = 9  # speakers of a dialogue that are told apart; all further ones share the ninth number


@dataclass(frozen=True, slots=True)
class Features:
    """The features of utterances: one for ``step``, whole dialogues for ``forward``.

    The leading shape ``..`` is nothing (one utterance), [S] (one utterance of each of S streams)
    or [B, U]. A modality is absent where its mask is False, or everywhere if its tensor is None;
    values at absent places are never used, NaN included. A mask of None means that the modality
    is present wherever there is a tensor. ``utterance_mask`` is for [B, U] only: a dialogue's
    utterances stand first, padding after them. A network that takes tokens is given audio
    [.., F, A] and text [.., T, L]; an utterance with fewer tokens ends with rows of NaN.
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
        """The number of each utterance's speaker, of the mask's shape [..], 0 .. PARTIES - 1."""
        speaker = torch.zeros_like(mask, dtype=torch.long) if self.speaker is None else self.speaker
        return speaker.clamp(0, PARTIES - 1)

    def present(self) -> Tensor:
        """utterance_mask, or all True if there is none: [..].

        Raises ValueError if no tensor shows the shape.
        """
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
    """All that a network carries from one utterance to the next, as an immutable value.

    Its fields are tensors of fixed size, [.., own dimensions]; the leading shape ``..`` is nothing
    (one dialogue), [S] (S streams) or [S, M] (those of an ensemble's M members). A subclass says
    in ``OWN`` how many dimensions of its first field are its own. A provisional prediction steps
    from a state and drops the one that it is given back.
    """

    OWN: ClassVar[int]

    @property
    def shape(self) -> torch.Size:
        """The leading shape."""
        part = self._first
        return part.shape[: part.dim() - self.OWN]

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self._first.device

    @property
    def _first(self) -> Tensor:
        part: Tensor = getattr(self, fields(self)[0].name)
        return part

    def tensors(self) -> dict[str, Tensor]:
        """Every field by name, contiguous, to be saved; ``Subclass(**tensors)`` restores it."""
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
        others = other.tensors()
        return all(torch.equal(part, others[name]) for name, part in self.tensors().items())

    __hash__ = None  # type: ignore[assignment]  # compared by value, so not a key


@dataclass(frozen=True, slots=True, eq=False)
class Stateless(State):
    """The state of a network whose result for an utterance depends on that utterance alone."""

    OWN: ClassVar[int] = 1

    empty: Tensor  # [.., 0]


def lead(part: Tensor) -> Tensor:
    """One dialogue's tensor as that of one stream."""
    return part[None]


def first(part: Tensor) -> Tensor:
    """The first stream's tensor as that of one dialogue."""
    return part[0]
