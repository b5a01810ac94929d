"""What every network offers, so that all train, evaluate, ablate and stream the same way.

Letters as in state.py; C classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stream_hbaf.errors import ModelError
from stream_hbaf.networks.config import NetworkConfig
from stream_hbaf.networks.state import Features, State, first, lead

SEES_THE_FUTURE = "this network was trained offline and sees the future; use a live one"
SMALLEST_DEVIATION = 1e-3  # of a text feature; half precision must still tell it from zero


@dataclass(frozen=True, slots=True)
class Output:
    """What ``forward`` gives; zero where there is no utterance. None: the network has no such part.

    A network whose criterion looks at more than this gives a child of it.
    """

    logits: Tensor  # [B, U, C]
    h_a: Tensor | None = None  # [B, U, H] audio, as it meets the text
    h_l: Tensor | None = None  # [B, U, H] text, as it meets the audio
    h_m: Tensor | None = None  # [B, U, ..] what is classified


class Network(nn.Module, ABC):
    """Features and a dialogue's state become logits and the next state.

    A network of mode ``live`` gives by ``step`` what ``forward`` gives (1e-5), and nothing at or
    before an utterance depends on a later one. One of mode ``offline`` sees the future, says so in
    its configuration, and has no state to begin with.
    """

    config: NetworkConfig
    state_dims: ClassVar[int] = 0  # of a lone dialogue's state, before its parts' own

    @abstractmethod
    def forward(self, features: Features) -> Output:
        """[B, U, ..] → logits of every utterance of whole dialogues."""

    @torch.no_grad()
    def step(self, features: Features, state: Any) -> tuple[Tensor, Any]:
        """One utterance of a dialogue → logits [C] and the state after it.

        With a state of S streams, one utterance of each: features [S, ..] → logits [S, C].
        ``state``, which must be this network's own, stays as it was. No gradient: a state must not
        hold on to its past. Raises ModelError offline.
        """
        self.require_live()
        if len(state.shape) == self.state_dims:  # one dialogue: one stream
            logits, after = self.step(features.map(lead), state.map(lead))
            return logits[0], after.map(first)
        now = torch.ones(state.shape[0], 1, dtype=torch.bool, device=state.device)
        turn = replace(features.map(lambda part: part[:, None]), utterance_mask=now)
        return self.step_streams(turn, state)

    @abstractmethod
    def step_streams(self, turn: Features, state: Any) -> tuple[Tensor, Any]:
        """What ``step`` does, of one utterance of each of S streams: [S, 1, ..] → logits [S, C]."""

    @abstractmethod
    def blank(self, streams: int) -> State:
        """What ``initial_state`` gives: [S, ..], of the device and type of the weights."""

    def initial_state(self, streams: int | None = None) -> Any:
        """The state before a dialogue's first utterance, of one dialogue or of S streams.

        Raises ModelError offline: what needs the future can't be asked before it.
        """
        self.require_live()
        if streams is not None:
            return self.blank(streams)
        return self.blank(1).map(first)

    def require_live(self) -> None:
        """Raise ModelError offline."""
        if self.config.mode != "live":
            raise ModelError(SEES_THE_FUTURE)

    @torch.no_grad()
    def standardise(self, text: Tensor) -> None:
        """Before training: hear text relative to the training set's features [N, L]."""
        for part in self.modules():
            if isinstance(part, Standardise):
                part.fit(text)

    def criterion(self) -> "Criterion | None":
        """What it is trained with beside cross entropy; None: nothing."""
        return None


class Criterion(nn.Module, ABC):
    """A loss beside cross entropy, already weighed. Its own parameters are trained, not shipped."""

    @abstractmethod
    def forward(self, output: Any, mask: Tensor, labels: Tensor) -> Tensor:
        """The network's output → a scalar; zero, with a gradient, where nothing can be compared.

        ``mask`` [B, U] chooses the utterances that have both audio and text; ``labels`` [B, U] is
        -1 where there is none.
        """


class Standardise(nn.Module):
    """Features [.., L] relative to the training set's mean and deviation.

    Not in any paper. An encoder's dimensions differ fivefold in size, and on dev it costs more
    than a point to leave that to the first linear map. Fitted once, never trained; the identity
    until then, and in bundles from before it was there.
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

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *rest)
