"""What a bundle's ``config.yaml`` holds: sizes, labels, encoders, calibration, licence."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from stream_hbaf.config import Probability, Section
from stream_hbaf.errors import ConfigError
from stream_hbaf.features.baseline import BaselineConfig
from stream_hbaf.features.comet import is_comet
from stream_hbaf.features.text import ContextConfig
from stream_hbaf.networks.calibration import Calibration
from stream_hbaf.networks.network import NetworkConfig
from stream_hbaf.networks.registry import read_network

FORMAT = 1
EVENT2MIND, NONE = "event2mind", "none"
# Acoustic features without pretrained weights; all others are encoders.
MEASURED = (NONE, "compare", "egemaps", "mfcc", "prosody", "lld")
# Those whose weights a package carries, as weights.py names them.
PACKAGED = {"ge2e": "ge2e:resemblyzer", "campplus": "speaker:campplus"}
MOST_MEMBERS, MOST_LABELS, MOST_PARTS = 32, 256, 8
WIDEST_PART = 65_536  # acoustic columns: ten times ComParE's functionals

# Names in events and messages, and of pretrained parts or their folders.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
Part = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,2000}$")]
Width = Annotated[int, Field(gt=0, le=WIDEST_PART)]


def _checked(settings: Any) -> NetworkConfig:
    if not isinstance(settings, NetworkConfig | Mapping):
        raise ValueError("is no mapping from names to values")
    try:
        return read_network(settings)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class BundleConfig(Section):
    """What ``config.yaml`` holds."""

    format: int = FORMAT
    id: Line
    labels: Annotated[tuple[Line, ...], Field(min_length=1, max_length=MOST_LABELS)]
    encoder: Part  # the text encoder, whose top layers the bundle replaces
    language: Line = "en"  # of the text that the network was trained on
    context: ContextConfig = ContextConfig()  # how much of the dialogue the encoder is given
    acoustic: Part = "compare"  # acoustic features, named as in features/representations.py
    # Measured columns of each part of ``acoustic``, any of which an utterance may lack; none given,
    # as of earlier bundles: an utterance that lacks a part counts as one without audio.
    acoustic_widths: Annotated[tuple[Width, ...], Field(max_length=MOST_PARTS)] = ()
    baseline: BaselineConfig | None = None  # parts that are relative to their speaker's past
    commonsense: Part = "event2mind"  # event2mind, none, or comet:<name>
    calibration: Calibration = Calibration.of_temperature(1.0)  # fitted on the dev set
    # Shares of labels for which its probabilities hold, as it was calibrated; {}: not known.
    shares: dict[Line, Probability] = Field(default_factory=dict)
    licence: str = (  # published with the predictions
        "non-commercial: openSMILE's licence, and RAVDESS (CC BY-NC-SA 4.0) in the trained weights"
    )
    network: Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(_checked)]
    # Networks of that configuration, whose probabilities are averaged.
    members: Annotated[int, Field(gt=0, le=MOST_MEMBERS)] = 1
    digests: dict[str, str] = Field(default_factory=dict)  # of pretrained parts, see weights.py
    replaces: tuple[str, ...] = ()  # published SHA-256 of earlier editions with the same weights

    @field_validator("commonsense")
    @classmethod
    def _known(cls, commonsense: str) -> str:
        if commonsense not in (EVENT2MIND, NONE) and not is_comet(commonsense):
            raise ValueError(f"'{commonsense}' is not event2mind, none or comet:<name>")
        return commonsense

    @field_validator("acoustic")
    @classmethod
    def _differ(cls, acoustic: str) -> str:
        parts = acoustic.split("+")
        if len(parts) > len(set(parts)) or len(parts) > MOST_PARTS:
            raise ValueError(f"names a part twice, or more than {MOST_PARTS} parts")
        return acoustic

    @model_validator(mode="after")
    def _widths_of_every_part(self) -> Self:
        parts = len(self.acoustic.split("+"))
        if len(self.acoustic_widths) not in (0, parts):
            raise ValueError(f"acoustic_widths: {len(self.acoustic_widths)} for {parts} parts")
        if self.baseline is not None and not self.acoustic_widths:
            raise ValueError("baseline: needs acoustic_widths")
        for name in () if self.baseline is None else self.baseline.parts:
            if name not in self.acoustic.split("+"):
                raise ValueError(f"baseline: '{name}' is no part of '{self.acoustic}'")
        return self

    @property
    def acoustic_input(self) -> str:
        """The acoustic features that the network is given; ``none`` if it is given none."""
        return self.acoustic if self.network.use_audio else NONE

    @property
    def parts(self) -> list[str]:
        """The pretrained parts that the network's features come from, as weights.py names them."""
        parts = [f"text:{self.encoder}"]
        if is_comet(self.commonsense):
            parts.append(f"comet:{self.commonsense.partition(':')[2]}")
        for representation in self.acoustic_input.split("+"):
            if representation.startswith("whisper:"):
                parts.append(representation)
            elif representation in PACKAGED:
                parts.append(PACKAGED[representation])
            elif representation not in MEASURED:
                parts.append(f"speech:{representation.removeprefix('tokens:')}")
        return parts
