"""The interface of all networks: input, state, output, one forward for training and live use.

Letters in shapes: B dialogues, U utterances, S streams (dialogues stepped together), A, L and K
the widths of audio, text and commonsense features, F and T tokens of speech and of text, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar, Generic, Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from stream_hbaf.errors import ConfigError, ModelError

# The least and the largest number of a network's settings, which a file may bring: by name, and of
# all other sizes and weights. They are beyond every network here: a wrong number uses up no memory.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("layers", "encoders", "fusions", "hops"), (0, 64)),
    **dict.fromkeys(("dropout", "dropped", "perturbed"), (0, 1)),
    **dict.fromkeys(("hidden", "classes", "filters", "heads", "states", "nodes"), (1, 65_536)),
    "window": (0, 256),
    "memory": (0, 1024),
}
SIZES, WEIGHTS = (0, 65_536), (-1000.0, 1000.0)
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
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: change(part) for k, part in tensors.items() if part is not None})

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
        features = [part[..., 0] for part in (self.audio, self.text) if part is not None]
        for mask in (self.audio_mask, self.text_mask, *features):
            if mask is not None:
                return torch.ones_like(mask, dtype=torch.bool)
        raise ValueError("features without any tensor have no shape: give audio, text or a mask")

    def given(self, modality: str, mask: Tensor) -> Tensor:
        """Which utterances of a mask [..] have audio ("a") or text ("l"): [..]."""
        tensor, present = (
            (self.audio, self.audio_mask) if modality == "a" else (self.text, self.text_mask)
        )
        if tensor is None:
            return torch.zeros_like(mask)
        return mask if present is None else mask & present


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
        return self._first.shape[: self._first.dim() - self.OWN]

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


Mode = Literal["live", "offline"]
ONLY_BECAUSE: dict[Mode, str] = {"live": "never looks ahead", "offline": "sees the whole dialogue"}
SEES_THE_FUTURE = "this network was trained offline and sees the future; use a live one"
SMALLEST_DEVIATION = 1e-3  # of a text feature; half precision must still tell it from zero

# A network's own state. Covariant, so that every network is a Network[State] to callers that only
# pass on the states which it gave them. Type checkers forbid a covariant type as a parameter's,
# hence the ignores below: the caller promises to pass a network states of its own.
StateT = TypeVar("StateT", bound=State, covariant=True, default=State)


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What every network has. A subclass names its ``kind`` and adds its own sizes and switches.

    Mode ``live``: nothing after an utterance is used for it. ``offline``: the whole dialogue is.
    Raises ConfigError if the settings contradict one another.
    """

    ONLY: ClassVar[Mode | None] = None  # the mode of a network that has but one
    takes_tokens: ClassVar[bool] = False  # of speech and of text, not one vector an utterance each
    remembers: ClassVar[bool] = True  # a result depends on other utterances of the dialogue

    kind: str = ""
    audio_width: int = 512  # A, after selection
    text_width: int = 384  # L
    commonsense_width: int = 384  # K
    hidden: int = 512  # H
    classes: int = 7
    dropout: float = 0.3
    mode: Mode = "live"
    use_audio: bool = True
    use_text: bool = True
    use_commonsense: bool = True  # where the network has a use for it

    def __post_init__(self) -> None:
        for setting in fields(self):
            _require_in_limits(setting, getattr(self, setting.name))
        if not self.modalities:
            raise ConfigError("network: use_audio and use_text are both off; switch one on")
        if self.mode not in ("live", "offline"):
            raise ConfigError(f"network: mode '{self.mode}' must be live or offline")
        if self.ONLY not in (None, self.mode):
            because = ONLY_BECAUSE[self.ONLY]
            raise ConfigError(f"network: {self.kind} {because}; its mode is {self.ONLY}")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The letters of the modalities in use: "a" audio, "l" text."""
        return ("a",) * self.use_audio + ("l",) * self.use_text


def _require_in_limits(setting: "Field[Any]", value: Any) -> None:
    """Raises ConfigError for a number that no network has."""
    if setting.type not in (int, float):
        return
    least, most = LIMITS.get(setting.name, SIZES if setting.type is int else WEIGHTS)
    if not least <= value <= most:
        raise ConfigError(f"network: {setting.name} must be from {least} to {most}")


@dataclass(frozen=True, slots=True)
class Output:
    """What ``forward`` gives; zero in padding. None: the network has no such part.

    A network whose criterion needs more than this gives a subclass of it.
    """

    logits: Tensor  # [B, U, C]
    h_a: Tensor | None = None  # [B, U, H] the audio representation that is contrasted with text
    h_l: Tensor | None = None  # [B, U, H] the text representation that is contrasted with audio
    h_m: Tensor | None = None  # [B, U, ..] what is classified


# A network's own output, covariant for the same reason: a criterion is given no other's.
OutputT = TypeVar("OutputT", bound=Output, covariant=True, default=Output)


class Network(nn.Module, ABC, Generic[StateT]):
    """Features and a dialogue's state become logits and the next state.

    A network of mode ``live`` gives by ``step`` what ``forward`` gives (1e-5), and nothing at or
    before an utterance depends on a later one. One of mode ``offline`` uses the future, says so in
    its configuration, and has no state to begin with.
    """

    config: NetworkConfig
    state_dims: ClassVar[int] = 0  # of one dialogue's state, before its fields' own dimensions
    stackable: ClassVar[bool] = False  # steps of an ensemble's members can be computed in one
    side_by_side: int = 1  # members that it stands for, once they are stacked

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, features: Features) -> Output:
        """[B, U, ..] → logits of every utterance of whole dialogues."""

    @torch.no_grad()
    def step(self, features: Features, state: StateT) -> tuple[Tensor, StateT]:  # type: ignore[misc]
        """One utterance of a dialogue → logits [C] and the state after it.

        With a state of S streams, one utterance of each: features [S, ..] → logits [S, C]. The
        given state is left as it was; it must come from this network's ``initial_state`` or
        ``step``. Without gradient, since a state must not hold on to the graph of its past.
        Raises ModelError offline.
        """
        self.require_live()
        if len(state.shape) == self.state_dims:  # one dialogue: one stream
            one = features.map(lambda part: part[None]), state.map(lambda part: part[None])
            logits, after = self.step(*one)
            return logits[0], after.map(lambda part: part[0])
        present = torch.ones(state.shape[0], 1, dtype=torch.bool, device=state.device)
        utterance = replace(features.map(lambda part: part[:, None]), utterance_mask=present)
        return self.step_streams(utterance, state)

    @abstractmethod
    def step_streams(self, utterance: Features, state: StateT) -> tuple[Tensor, StateT]:  # type: ignore[misc]
        """``step`` of one utterance of each of S streams: features [S, 1, ..] → logits [S, C]."""

    @abstractmethod
    def blank(self, streams: int) -> StateT:
        """``initial_state`` of S streams, [S, ..], of the device and type of the weights."""

    def initial_state(self, streams: int | None = None) -> StateT:
        """The state before a dialogue's first utterance, of one dialogue or of S streams.

        Raises ModelError offline: a network that needs the future has no state to step from.
        """
        self.require_live()
        if streams is not None:
            return self.blank(streams)
        return self.blank(1).map(lambda part: part[0])

    def require_live(self) -> None:
        """Raise ModelError offline."""
        if self.config.mode != "live":
            raise ModelError(SEES_THE_FUTURE)

    @torch.no_grad()
    def standardise(self, text: Tensor) -> None:
        """Fit mean and deviation of the text features [N, L] of the training set, before training.

        A network that takes tokens is given [.., T, L].
        """
        for part in self.modules():
            if isinstance(part, Standardise):
                part.fit(text)

    def criterion(self) -> "Criterion | None":
        """The loss that is trained with beside cross entropy; None if there is none."""
        return None


class Recurrent(Network[StateT]):
    """A network that sees dialogues as it steps through them: both ways continue from a state."""

    @abstractmethod
    def _continue(self, features: Features, state: StateT) -> tuple[Output, StateT]:  # type: ignore[misc]
        """The output of U more utterances after ``state``, and the state after them."""

    def forward(self, features: Features) -> Output:
        return self._continue(features, self.blank(len(features.present())))[0]

    def step_streams(self, utterance: Features, state: StateT) -> tuple[Tensor, StateT]:  # type: ignore[misc]
        output, state = self._continue(utterance, state)
        return output.logits[:, 0], state


class WithoutState(Network[Stateless]):
    """A network that uses the utterance itself only, or offline the whole dialogue at once."""

    def step_streams(self, utterance: Features, state: Stateless) -> tuple[Tensor, Stateless]:
        """As every network's; the state stays the same."""
        return self.forward(utterance).logits[:, 0], state

    def blank(self, streams: int) -> Stateless:
        """The empty state of S streams."""
        return Stateless(next(self.parameters()).new_zeros(streams, 0))


class Criterion(nn.Module, ABC, Generic[OutputT]):
    """A weighted loss beside cross entropy. Its own parameters are trained but not shipped."""

    @abstractmethod
    def forward(self, output: OutputT, mask: Tensor, labels: Tensor) -> Tensor:  # type: ignore[misc]
        """The network's output → a scalar; zero, with a gradient, where nothing can be compared.

        ``mask`` [B, U] chooses the utterances that have both audio and text; ``labels`` [B, U] is
        -1 where there is none.
        """


def masked_softmax(scores: Tensor, mask: Tensor, *, dim: int = -1) -> Tensor:
    """Softmax over the places of a mask, zero at all others, also where there is no place."""
    # Not -inf: without any place there would be NaN, in the gradients too.
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=dim) * mask


class Standardise(nn.Module):
    """Features [.., L] relative to the training set's mean and deviation.

    Not in any paper. An encoder's dimensions differ fivefold in size, and on dev it costs more
    than a point to leave that to the first linear map. Fitted once, never trained; the identity
    until then.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        """Take mean and deviation of features [N, L]; constant columns are only centred."""
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > SMALLEST_DEVIATION, deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation
