"""Reads recipes: everything that decides the result of a training, beside the corpora's files.

A recipe names one corpus or several. Of several, the first corpus of dialogues is the main one,
further ones add texts, and corpora of clips (one utterance a dialogue, with its audio) add audio;
see ``BatchConfig`` for how they meet in a batch.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stream_hbaf.bundle import PACKAGE
from stream_hbaf.bundle_config import EVENT2MIND, NONE
from stream_hbaf.config import Positive, Probability, Section, read_yaml
from stream_hbaf.corpora.augment import AugmentationConfig
from stream_hbaf.corpora.open_corpus import CORPORA, MANIFEST, SESSIONS, WITH_SESSIONS
from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.evaluation.metrics import FigureName
from stream_hbaf.features.baseline import BaselineConfig
from stream_hbaf.features.comet import is_comet
from stream_hbaf.features.pretrained import DEFAULT_ENCODER
from stream_hbaf.features.representations import LLD, TOKENS
from stream_hbaf.features.text import ContextConfig
from stream_hbaf.files import is_file
from stream_hbaf.networks.network import NetworkConfig
from stream_hbaf.networks.registry import read_network
from stream_hbaf.training.trainer import TrainerConfig, Weight

# Sizes that follow from the features and the corpora, whatever a recipe says.
DERIVED = ("audio_width", "text_width", "commonsense_width", "classes")
HBAF = "hbaf"  # the kind of a recipe that names none
COMMON = {setting.name for setting in fields(NetworkConfig)} - {"kind", "mode"}
PLACES = (PACKAGE.parent / "configs", PACKAGE / "configs")  # a clone's, an installed package's
EXAMPLE = "id: mine"  # what a recipe's line looks like

Count = Annotated[int, Field(ge=0, le=1_000_000)]
Turns = Annotated[int, Field(ge=1, le=1000)]
Lengths = Annotated[tuple[Turns, ...], Field(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # what numpy's generators take
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=100)]
Rate = Annotated[float, Field(ge=0.0, le=1000.0)]
Temperature = Annotated[float, Field(gt=0.0, le=1000.0)]
Checked = TypeVar("Checked", bound=Section)


class CorpusConfig(Section):
    """What is used of one corpus."""

    classes: dict[str, tuple[str, ...]] | None = None  # a label: those of the corpus it replaces
    fold: Positive | None = None  # session held out as the test split, of IEMOCAP
    dev_fold: Positive | None = None  # session held out as the dev split, of IEMOCAP
    max_dialogues: Positive | None = None  # of train, drawn once; the text encoder reads them all


class SelectionConfig(Section):
    """Which functionals are kept: those of the largest weights of a linear SVM."""

    width: Positive = 512
    penalty: Rate = 1e-4  # the SVM's C
    iterations: Positive = 200


class AudioConfig(AugmentationConfig):
    """Acoustic features, and how train clips are augmented."""

    # prosody, compare, egemaps, mfcc, lld, none, a speech encoder's name, tokens:<encoder>,
    # whisper:<model>, or several joined by "+"
    representation: str = "prosody"
    # ComParE's functionals are reduced to principal components, or else by selection; None: not.
    components: Positive | None = None
    selection: SelectionConfig | None = SelectionConfig()
    cut: Literal["annotated", "segmenter"] = "annotated"  # segmenter: as live input is cut
    copies: Count = 0
    baseline: BaselineConfig | None = None  # parts that are relative to their speaker's past


class AsrErrorConfig(Section):
    """Simulated errors of speech recognition in texts."""

    versions: Count = 0  # with errors, of each train dialogue of the main corpus
    max_error_rate: Probability = 0.3  # a text's word error rate is drawn evenly from 0 to this
    unpunctuated_share: Probability = 0.4  # of the changed texts lose case and punctuation
    word_error_share: Probability = 0.8  # of the texts changed for the text encoder; else only that
    dev_error_rate: Probability = 0.15  # of dev's version with errors
    seed: Seed = 0


class TuningConfig(Section):
    """A fine-tuning of the text encoder on labelled texts."""

    corpora: tuple[str, ...] | None = None  # None: the recipe's dialogues, or clips without any
    layers: Count = 3  # the topmost, tuned whole
    adapter_rank: Count = 0  # of low-rank adapters in all layers, instead; 0: whole layers
    epochs: Count = 5  # 0: the encoder stays as it is
    patience: Positive = 5  # epochs without a better dev score after which tuning stops
    tokens_per_batch: Positive = 512  # padding counted
    rate: Rate = 1e-4
    head_rate: Rate = 1e-3
    dropout: Probability = 0.2  # before the head
    smoothing: Probability = 0.05  # of the labels
    class_balance: Probability = 0.0  # classes weigh their share to the power of minus this
    asr_error_share: Probability = 0.0  # of the train texts are changed, in each epoch anew
    dialogues_per_epoch: dict[str, Positive] = Field({})  # by corpus, at most, drawn anew
    dev_figures: dict[str, FigureName] = Field({})  # by corpus; none: all, by weighted F1
    bfloat16: bool = True  # half-width arithmetic while tuning, where the processor has it
    seeds: Seeds = (0,)  # of several tunings the weights are averaged

    @property
    def changes(self) -> bool:
        """Whether anything is tuned at all."""
        return self.epochs > 0 and (self.adapter_rank > 0 or self.layers > 0)


class TextEncoderConfig(TuningConfig):
    """The text encoder, and how it is fitted to the corpora before everything else."""

    name: str = DEFAULT_ENCODER
    context: ContextConfig = ContextConfig()
    epochs: Count = 0
    soup: tuple[TuningConfig, ...] = ()  # further tunings; the weights are the mean of all
    compress_to_rank: Positive | None = None  # of what tuning changed in whole layers; None: all
    # Train features of each session from an encoder that was tuned without it, of IEMOCAP.
    out_of_fold: bool = False

    @model_validator(mode="after")
    def _can_be_averaged(self) -> Self:
        plans: tuple[TuningConfig, ...] = (self, *self.soup)
        if sum(len(plan.seeds) for plan in plans) > 1 and any(p.adapter_rank for p in plans):
            raise ValueError("adapters can't be averaged; tune whole layers, adapter_rank 0")
        return self


class CommonsenseConfig(Section):
    """Where commonsense inferences come from, and how the Event2Mind heads are trained."""

    source: str = EVENT2MIND  # event2mind, none, or comet:<folder or hub name>
    atomic: bool = False  # ATOMIC beside Event2Mind, in training and in the test
    hidden: Positive = 256
    dropout: Probability = 0.2
    epochs: Positive = 12
    batch: Positive = 512
    rate: Rate = 1e-3
    temperature: Temperature = 0.07
    seed: Seed = 0

    @field_validator("source")
    @classmethod
    def _is_offered(cls, source: str) -> str:
        if source not in (EVENT2MIND, NONE) and not is_comet(source):
            raise ValueError(f"not '{source}': event2mind, none, or comet:<folder or name>")
        return source


class LossConfig(Section):
    """Equation 23: cross entropy and, μ times, what draws the two modalities together.

    All but ``balanced`` and ``votes`` is HBAF's; the weights of other networks' losses stand in
    their settings. λ1 = λ2 = λ3 = 1 instead of 1/3 is a ``mu`` three times as large.
    """

    mu: Weight = 0.2
    absolute: bool = True  # eqs 18 and 19
    relative: bool = True  # eq 20
    temperature: Temperature = 0.1
    unimodal: Weight = 0.0  # of the cross entropy of each modality by itself
    balanced: bool = False  # rare classes weigh as much as frequent ones
    votes: Weight = 0.0  # of utterances without a label, whose targets are annotators' votes

    @property
    def weights(self) -> tuple[float, float, float] | None:
        """λ1, λ2, λ3 of equation 21; None without it."""
        absolute, relative = self.absolute, self.relative
        if not self.mu or not (absolute or relative):
            return None
        if absolute and relative:
            return 1 / 3, 1 / 3, 1 / 3
        return (1 / 2, 1 / 2, 0.0) if absolute else (0.0, 0.0, 1.0)


class BatchConfig(Section):
    """How several corpora meet in a batch. Shares are drawn anew for each epoch.

    Some of the dialogues that have no audio of their own are paired with the audio of clips: of the
    same label, or of any, so that the network learns to go against either modality. Beside a
    neutral text, which contradicts no emotion, the label is the clip's.
    """

    dialogue_share: Probability = 1.0  # of the main corpus's dialogues
    further_text_share: Probability = 0.5  # of a batch's utterances in dialogues, from the others
    clip_rounds: Positive = 4  # times that an epoch uses each clip, each time in some version
    clip_turns: Lengths = (1, 1, 1, 2, 3, 4)  # of the clips' pseudo-dialogues, drawn evenly
    spoken_turns: Turns = 32  # the longest piece of a dialogue with audio of its own
    clip_weight: Weight = 1.0  # of the clips' loss, beside the dialogues'
    clip_label_smoothing: Probability = 0.0
    clip_text_share: Probability = 0.5  # of the clips' pseudo-dialogues have texts
    foreign_text_share: Probability = 0.5  # of those texts are neutral ones of the dialogues
    paired_dialogue_share: Probability = 0.4  # of the dialogues are paired with clips' audio
    paired_audio_share: Probability = 0.8  # of the utterances of such a dialogue
    label_mismatch_share: Probability = 0.5  # of those clips are drawn from all labels
    paired_text_dropout: Probability = 0.2  # of the texts that are paired
    audio_dropout: Probability = 0.0  # of an utterance's columns
    block_dropout: Probability = 0.0  # of its blocks, where the representation has several


class FitConfig(TrainerConfig):
    """How the network is trained, with which seeds, and which networks make the bundle."""

    epochs: Positive = 60
    patience: Positive = 15
    batch: Positive = 8  # dialogues of the main corpus in a step
    optimizer: Literal["adamw", "adam"] = "adamw"  # adam: the paper's, L2 and a constant rate
    rate: Rate = 5e-4  # falls linearly with adamw
    decay: Weight = 1e-2
    seeds: Seeds = (0, 1, 2, 3, 4)
    ship: Literal["best_seed", "ensemble"] = "best_seed"  # by dev score; of all seeds' networks


class CalibrationConfig(Section):
    """What a bundle's label sets and abstention promise, fitted on dev."""

    coverage: float = Field(0.9, gt=0.0, lt=1.0)  # share of sets that hold the right label
    risk: float = Field(0.3, gt=0.0, lt=1.0)  # error rate among what isn't abstained from


def _by_name(corpora: Any) -> Any:
    """The settings of each corpus, where the recipe gives one name or a list of names."""
    names = (corpora,) if isinstance(corpora, str) else corpora
    if isinstance(names, Mapping):
        return {name: {} if settings is None else settings for name, settings in names.items()}
    are_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return {name: {} for name in names} if are_names else names


class Recipe(Section):
    """All settings of a training. Immutable."""

    id: str
    corpora: Annotated[dict[str, CorpusConfig], BeforeValidator(_by_name), Field(min_length=1)]
    # Of the corpora those that are not trained on, but scored whole: strangers to the network.
    held_out: tuple[str, ...] = ()
    network: dict[str, Any] = Field({})  # its kind, HBAF if none is named; switches and sizes
    audio: AudioConfig = AudioConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    asr_errors: AsrErrorConfig = AsrErrorConfig()
    commonsense: CommonsenseConfig = CommonsenseConfig()
    losses: LossConfig = LossConfig()
    batches: BatchConfig = BatchConfig()
    fit: FitConfig = FitConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    workers: Positive = 2  # processes of one thread each: for features, and for seeds

    @field_validator("corpora")
    @classmethod
    def _are_read(cls, corpora: dict[str, CorpusConfig]) -> dict[str, CorpusConfig]:
        for name in corpora:
            if name not in CORPORA and not name.endswith((MANIFEST, SESSIONS)):
                raise ValueError(
                    f"no reader for '{name}'; choose {', '.join(CORPORA)}, a manifest's .csv, or "
                    "sessions/"
                )
        return corpora

    @field_validator("network")
    @classmethod
    def _is_known(cls, network: dict[str, Any]) -> dict[str, Any]:
        for name in network:
            if name in DERIVED:
                raise ValueError(f"'{name}' follows from the features; leave it out")
        try:
            read_network(network)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return network

    @field_validator("audio")
    @classmethod
    def _fits_the_network(cls, audio: AudioConfig, known: ValidationInfo) -> AudioConfig:
        name, network = audio.representation, known.data.get("network")
        tokens = name == LLD or name.startswith(TOKENS)
        if tokens and network is not None and not read_network(network).takes_tokens:
            raise ValueError(f"'{name}' is tokens, which only mgcma takes; choose another")
        if audio.baseline is not None:
            if network is not None and read_network(network).takes_tokens:
                raise ValueError(
                    "'baseline' is of vectors, and this network takes tokens; leave it out"
                )
            for part in audio.baseline.parts:
                if part not in name.split("+"):
                    raise ValueError(f"'baseline': '{part}' is no part of '{name}'")
        return audio

    @model_validator(mode="after")
    def _can_be_held_out(self) -> Self:
        for name in self.held_out:
            if name not in self.corpora:
                raise ValueError(f"held_out: '{name}' is none of the corpora; name one of them")
        if self.held_out and len(self.corpora) - len(self.held_out) < 2:
            raise ValueError("held_out: leaves fewer than two corpora to train on; hold out fewer")
        return self

    @model_validator(mode="after")
    def _can_be_out_of_fold(self) -> Self:
        if self.text_encoder.out_of_fold:
            if list(self.corpora) != [WITH_SESSIONS]:
                raise ValueError(
                    f"text_encoder.out_of_fold: needs a corpus of sessions; take {WITH_SESSIONS} "
                    "alone, or leave it out"
                )
            if self.asr_errors.versions:
                raise ValueError(
                    "text_encoder.out_of_fold: is of gold texts; leave out asr_errors.versions"
                )
        return self

    @property
    def takes_tokens(self) -> bool:
        """Whether the network takes tokens rather than one vector an utterance."""
        return read_network(self.network).takes_tokens

    def network_config(self, **sizes: int) -> NetworkConfig:
        """The network of these sizes, which are DERIVED; modalities that aren't there are left
        out.
        """
        without: dict[str, Any] = {"audio_width": max(1, sizes["audio_width"])}
        if self.audio.representation == NONE:
            without["use_audio"] = False
        if self.commonsense.source == NONE:
            without["use_commonsense"] = False
        return read_network({**self.network, **sizes, **without})


def find_recipe(name: str | Path, *, beside: Path = Path()) -> Path:
    """The file of a recipe given by its path or by its name in ``configs``.

    A path is relative to the folder ``beside``. Raises ConfigError that lists the names.
    """
    if is_file(path := beside / name):
        return path
    for place in PLACES:
        if is_file(path := place / f"{name}.yaml"):
            return path
    names = sorted({path.stem for place in PLACES for path in place.glob("*.yaml")})
    raise ConfigError(f"{shorten(str(name))}: no such file or recipe; there is {', '.join(names)}")


def read_recipe(file: Path) -> Recipe:
    """The recipe in a YAML file, or ConfigError naming the file and the setting."""
    return validate(Recipe, read_settings(file), where=f"{file}")


def read_settings(file: Path, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a recipe's file, on top of those of the recipe that it ``extends``.

    ``without`` names corpora that are left out of these; ``extended_by`` are the files that led
    here. Raises ConfigError for a file that can't be read or extends itself, an unknown recipe, or
    a corpus that isn't there to be left out.
    """
    if any(file.samefile(other) for other in extended_by):
        raise ConfigError(f"{file}: extends itself; name another recipe")
    settings = read_yaml(file, example=EXAMPLE)
    if "corpora" in settings:
        settings["corpora"] = _by_name(settings["corpora"])
    base, without = settings.pop("extends", None), settings.pop("without", [])
    if base is not None:
        base_file = find_recipe(str(base), beside=file.parent)
        settings = merge_settings(
            read_settings(base_file, extended_by=(*extended_by, file)), settings
        )
    corpora = settings.get("corpora", {})
    for name in without if isinstance(without, list) else [without]:
        if not isinstance(name, str) or not isinstance(corpora, dict) or name not in corpora:
            shown = shorten(str(name))
            raise ConfigError(f"{file}: 'without': there is no corpus '{shown}' to leave out")
        del corpora[name]
    return settings


def merge_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged, all else is replaced. A network of another kind keeps what all kinds
    have, but for the mode, which is each kind's own.
    """
    merged = dict(settings)
    for key, value in changes.items():
        old = merged.get(key)
        if not isinstance(value, Mapping) or not isinstance(old, Mapping):
            merged[key] = value
            continue
        if key == "network" and value.get("kind", old.get("kind", HBAF)) != old.get("kind", HBAF):
            old = {name: setting for name, setting in old.items() if name in COMMON}
        merged[key] = merge_settings(old, value)
    return merged


def validate(kind: type[Checked], settings: Any, *, where: str) -> Checked:
    """Settings as ``kind`` wants them, or ConfigError naming the first that is wrong."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = shorten(".".join(str(part) for part in first["loc"])) or "file"
        message = shorten(first["msg"].removeprefix("Value error, "), limit=400)
        raise ConfigError(f"{where}: '{key}': {message}; correct that setting") from None
