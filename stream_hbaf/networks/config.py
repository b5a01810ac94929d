"""A network's sizes, and every switch of its ablations: what all have, and HBAF's own."""

from dataclasses import dataclass
from typing import Literal

from stream_hbaf.errors import ConfigError

Mode = Literal["live", "offline"]


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What every network has. A child names its ``kind``; ConfigError for what can't be.

    ``live``: nothing after an utterance is seen. ``offline``: the whole dialogue is.
    """

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
        if not self.modalities:
            raise ConfigError("network: use_audio and use_text are both off; switch one on")
        if self.mode not in ("live", "offline"):
            raise ConfigError(f"network: mode '{self.mode}' must be live or offline")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The letters of the modalities in use."""
        return ("a",) * self.use_audio + ("l",) * self.use_text

    @property
    def takes_tokens(self) -> bool:
        """Whether an utterance is given as tokens of speech and of text, not as one vector each."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether an utterance is seen among others, rather than by itself."""
        return True


@dataclass(frozen=True, slots=True)
class HbafConfig(NetworkConfig):
    """HBAF's sizes and every switch of its ablations. ConfigError if they can't fit."""

    kind: Literal["hbaf"] = "hbaf"
    filters: int = 64
    heads: int = 8
    layers: int = 3  # of the Transformer encoder
    window: int = 8  # W, utterances, the current one included; of no meaning offline
    attention: Literal["scalar", "literal", "query"] = "scalar"  # over past utterances, eqs 1-3
    by_speaker: bool = False  # internal and purpose states of each speaker, not of the dialogue
    standardise_text: bool = True  # text features, by the training set's mean and deviation
    use_audio_context: bool = True  # else a linear map in the audio context network's place
    audio_skip: bool = False  # a linear map added to the audio context network
    use_bimodal_attention: bool = True
    use_gate: bool = True
    use_residual: bool = True
    literal_cross: bool = False  # eqs 8-9 into eqs 11 and 13 as printed

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.hidden % 2 or self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2 and by heads")
        if self.window < 1:
            raise ConfigError(f"network: window {self.window} must be at least 1 utterance")
        if self.attention not in ("scalar", "literal", "query"):
            raise ConfigError(
                f"network: attention '{self.attention}' must be scalar, literal or query"
            )
