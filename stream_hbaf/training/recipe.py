"""Training: recipes, everything that decides what a training gives, beside the corpora.

A recipe that names a ``corpus`` is trained on it; one that doesn't mixes MELD's words and
acted voices, which no corpus at hand holds together.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from stream_hbaf.config import Positive, Section, read_yaml
from stream_hbaf.corpora.augment import AugmentationConfig
from stream_hbaf.corpora.open_corpus import CORPORA, MANIFEST, SESSIONS
from stream_hbaf.errors import ConfigError
from stream_hbaf.features.pretrained import DEFAULT_ENCODER
from stream_hbaf.features.representations import LLD, TOKENS
from stream_hbaf.networks.network import NetworkConfig
from stream_hbaf.networks.registry import read_network
from stream_hbaf.training.batches import MixtureConfig
from stream_hbaf.training.commonsense_heads import HeadsConfig
from stream_hbaf.training.fitting import FittingConfig, LossConfig
from stream_hbaf.training.text_augment import WordsConfig
from stream_hbaf.training.text_encoder import TuningConfig

# Sizes that the features and the corpus decide, whatever a recipe says.
DECIDED = ("audio_width", "text_width", "commonsense_width", "classes")
VOICES = ("ravdess", "nemo", "tess")  # corpora of clips without a dialogue
COMET = ("comet:", "comet-cosmic:")
Checked = TypeVar("Checked", bound=Section)


class SelectionConfig(Section):
    """Which functionals are kept, by a linear SVM's weights (decision 9)."""

    width: Positive = 512
    penalty: float = 1e-4  # the SVM's C
    iterations: Positive = 200


class _Network(Section):
    network: dict[str, Any] = Field({})  # its kind, HBAF if none is named; switches and sizes

    @property
    def takes_tokens(self) -> bool:
        """Whether the network is given tokens rather than one vector an utterance."""
        return read_network(self.network).takes_tokens

    @field_validator("audio", check_fields=False)
    @classmethod
    def _can_be_taken(cls, audio: str, known: ValidationInfo) -> str:
        tokens = audio == LLD or audio.startswith(TOKENS)
        network = known.data.get("network")
        if tokens and network is not None and not read_network(network).takes_tokens:
            raise ValueError(f"'{audio}' is tokens, which only mgcma takes; choose another sound")
        return audio

    @field_validator("network")
    @classmethod
    def _known(cls, network: dict[str, Any]) -> dict[str, Any]:
        for name in network:
            if name in DECIDED:
                raise ValueError(f"'{name}' follows from the features; leave it out")
        try:
            read_network(network)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return network


class Recipe(_Network):
    """A network on one corpus, as the papers train it."""

    id: str
    corpus: str  # one of CORPORA, or a manifest's .csv, under --corpora
    audio: str = (
        "prosody"  # "compare", "egemaps", "mfcc", "lld", "none", or a speech encoder's name
    )
    selection: SelectionConfig = SelectionConfig()
    encoder: str = DEFAULT_ENCODER
    tuning: TuningConfig = TuningConfig(epochs=0)
    commonsense: str = "event2mind"  # "comet:<folder or hub name>", "none"
    classes: dict[str, tuple[str, ...]] | None = None  # new label: the corpus's that it joins
    fold: Positive | None = None  # session held out for test, of IEMOCAP
    heads: HeadsConfig = HeadsConfig()
    losses: LossConfig = LossConfig()
    fitting: FittingConfig = FittingConfig()

    @field_validator("corpus")
    @classmethod
    def _is_read(cls, corpus: str) -> str:
        if corpus not in CORPORA and not corpus.endswith((MANIFEST, SESSIONS)):
            known = ", ".join(CORPORA)
            raise ValueError(
                f"no reader for '{corpus}'; choose {known}, a manifest's .csv, or sessions/"
            )
        return corpus

    @field_validator("commonsense")
    @classmethod
    def _is_offered(cls, commonsense: str) -> str:
        if commonsense not in ("event2mind", "none") and not commonsense.startswith(COMET):
            raise ValueError(f"not '{commonsense}': event2mind, none, or comet:<folder or name>")
        return commonsense

    def network_config(
        self, *, audio_width: int, text_width: int, commonsense_width: int, classes: int
    ) -> NetworkConfig:
        """The network for features of these widths; it leaves out what isn't there."""
        without: dict[str, Any] = {}
        if self.audio == "none":
            without["use_audio"] = False
        if self.commonsense == "none":
            without["use_commonsense"] = False
        return read_network(
            {
                **self.network,
                **without,
                "audio_width": max(1, audio_width),
                "text_width": text_width,
                "commonsense_width": commonsense_width,
                "classes": classes,
            }
        )


class MixtureRecipe(_Network):
    """A network on MELD's words and acted voices at once."""

    id: str
    encoder: str = DEFAULT_ENCODER
    tuning: TuningConfig = TuningConfig()
    words: WordsConfig | None = None  # corpora of words, MELD among them; None: MELD alone
    soup: TuningConfig | None = None  # a second tuning, on MELD alone; the encoder is their mean
    adapters: Positive | None = None  # rank to which whole tuned layers are reduced; None: as tuned
    voices: Annotated[tuple[str, ...], Field(min_length=1)] = ("ravdess",)
    audio: str = "compare"  # what is measured, as of Recipe; several with + between
    commonsense: Literal["event2mind", "none"] = "event2mind"
    heads: HeadsConfig = HeadsConfig()
    acoustics: AugmentationConfig = AugmentationConfig()
    components: Positive | None = (
        64  # that ComParE's functionals are joined into; None: as they are
    )
    fitting: MixtureConfig = MixtureConfig()

    @field_validator("soup")
    @classmethod
    def _can_be_averaged(
        cls, soup: TuningConfig | None, known: ValidationInfo
    ) -> TuningConfig | None:
        plans = (soup, known.data.get("tuning"))
        if soup is not None and any(plan is not None and plan.adapter_rank for plan in plans):
            raise ValueError("adapters can't be averaged; tune whole layers, adapter_rank 0")
        return soup

    @field_validator("voices")
    @classmethod
    def _are_read(cls, voices: tuple[str, ...]) -> tuple[str, ...]:
        for name in voices:
            if name not in VOICES:
                raise ValueError(f"'{name}' has no acted clips; choose from {', '.join(VOICES)}")
        return voices


def read_recipe(file: Path) -> Recipe | MixtureRecipe:
    """The recipe in a YAML file, or ConfigError naming the file and the setting."""
    tree = read_yaml(file, example="id: mine")
    if "corpus" in tree:
        return validate(Recipe, tree, where=f"{file}")
    return validate(MixtureRecipe, tree, where=f"{file}")


def validate(kind: type[Checked], tree: Any, *, where: str) -> Checked:
    """Settings as ``kind`` wants them, or ConfigError naming the first that is wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: '{key}': {message}; correct that setting") from None
