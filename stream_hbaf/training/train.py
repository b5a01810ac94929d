"""Training: corpora in, a bundle out, with every figure of its card measured on the way.

Everything is fitted on train and picked on dev; test is read once, at the end, by networks in
the precision that ships.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from stream_hbaf.bundle import Bundle, BundleConfig, softmax
from stream_hbaf.config import Section
from stream_hbaf.corpora.acoustics import CONDITIONS, AcousticsConfig
from stream_hbaf.corpora.dialogue import LABELS, SPLITS, Split
from stream_hbaf.corpora.meld import read_meld
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation import Labels, Score, score
from stream_hbaf.features.text import DEFAULT_ENCODER, TextEncoder
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.training.card import model_card
from stream_hbaf.training.distillation import HeadsConfig
from stream_hbaf.training.fitting import (
    Fitted,
    FittingConfig,
    Material,
    audio_score,
    fit_network,
    predict,
    text_score,
)
from stream_hbaf.training.preparation import (
    SelectionConfig,
    acted_material,
    prepare_acted,
    prepare_heads,
    prepare_layers,
    remember,
    spoken_material,
)
from stream_hbaf.training.tuning import TuningConfig

Progress = Callable[[str], None]
TEMPERATURES = np.geomspace(0.4, 5.0, 60)


class Recipe(Section):
    """Everything that decides what a training gives, beside the corpora."""

    id: str
    encoder: str = DEFAULT_ENCODER
    network: dict[str, Any] = Field(
        {}
    )  # of HbafConfig; the features' widths are set by the features
    tuning: TuningConfig = TuningConfig()
    heads: HeadsConfig = HeadsConfig()
    acoustics: AcousticsConfig = AcousticsConfig()
    selection: SelectionConfig = SelectionConfig()
    fitting: FittingConfig = FittingConfig()


@dataclass(frozen=True)
class Corpora:
    """Each split's material."""

    spoken: Mapping[Split, Material]
    acted: Mapping[Split, Material]


def train(
    recipe_file: Path,
    corpora: Path,
    out: Path,
    *,
    cache: Path = Path("cache"),
    progress: Progress = print,
) -> Bundle:
    """Train the bundle of a recipe on ``corpora``/{meld,ravdess,event2mind,speech} into ``out``.

    Raises ConfigError for a recipe that can't be read, CorpusError for a corpus, ModelError for
    the encoder. Interrupted, it takes up its cached features and tuned layers again.
    """
    recipe = read_recipe(recipe_file)
    dialogues = {split: read_meld(corpora / "meld", split) for split in SPLITS}
    acted = prepare_acted(
        corpora, recipe.acoustics, recipe.selection, cache=cache / "acoustics", progress=progress
    )
    tuned = prepare_layers(
        recipe.encoder, dialogues, recipe.tuning, cache=cache / "tuned", progress=progress
    )
    encoder = TextEncoder(recipe.encoder, tuned=tuned)
    encode = remember(encoder, cache / "text")
    heads, inferred = prepare_heads(
        corpora / "event2mind",
        recipe.heads,
        encode=encode,
        encode_phrases=remember(TextEncoder(recipe.encoder), cache / "text"),
        progress=progress,
    )
    material = Corpora(
        {s: spoken_material(dialogues[s], encode=encode, heads=heads) for s in SPLITS},
        {s: acted_material(acted, s, encode=encode, heads=heads) for s in SPLITS},
    )
    network = _network_config(recipe, audio_width=len(acted.scaling.mean), encoder=encoder)
    fitted = _fit_seeds(network, recipe.fitting, material, progress=progress)
    temperatures = {seed: fit_temperature(f.network, material) for seed, f in fitted.items()}
    shipped = max(fitted, key=lambda seed: fitted[seed].dev_score)
    config = BundleConfig(
        id=recipe.id,
        labels=LABELS,
        encoder=recipe.encoder,
        temperature=temperatures[shipped],
        network=network,
    )
    bundle = Bundle(config, acted.scaling, encoder, heads, fitted[shipped].network, tuned)
    metrics = _report(recipe, fitted, temperatures, material, shipped=shipped)
    metrics["commonsense"] = inferred
    bundle.save(out, metrics=metrics, card=model_card(metrics))
    progress(f"{out}: bundle {recipe.id}, seed {shipped}, is ready")
    return Bundle.load(str(out))


def read_recipe(file: Path) -> Recipe:
    """The recipe in a YAML file, or ConfigError naming the file and the setting."""
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{file}: can't be read ({error.strerror}); check its name") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: not valid YAML ({reason}); correct it") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise ConfigError(f"{file}: '{key}': {first['msg']}; correct that setting") from None


def fit_temperature(network: HBAF, material: Corpora) -> float:
    """The temperature under which dev's labels are likeliest, words and voices weighing the same.

    Guo et al. 2017; voices are heard under all conditions.
    """
    spoken, acted = material.spoken["dev"], material.acted["dev"]
    words = predict(network, spoken, version=None, reads=True)
    voices = np.concatenate(
        [predict(network, acted, version=condition, reads=True) for condition in acted.audio]
    )
    heard = np.tile(acted.labels, len(acted.audio))

    def surprise(temperature: float) -> float:
        return _surprise(words / temperature, spoken.labels) + _surprise(
            voices / temperature, heard
        )

    return float(min(TEMPERATURES, key=surprise))


def evaluate(
    network: HBAF, material: Corpora, split: Split, *, temperature: float
) -> dict[str, Score]:
    """Every reported figure of one split, by corpus, what was given, and condition."""

    def judge(corpus: Material, version: str | None, reads: bool) -> Score:
        logits = predict(network, corpus, version=version, reads=reads)
        return score(corpus.labels, softmax(logits / temperature))

    scores = {"meld/text": judge(material.spoken[split], None, True)}
    for condition in CONDITIONS:
        clips = material.acted[split]
        scores[f"ravdess/audio/{condition}"] = judge(clips, condition, False)
        scores[f"ravdess/audio+text/{condition}"] = judge(clips, condition, True)
    return scores


def _fit_seeds(
    config: HbafConfig, plan: FittingConfig, material: Corpora, *, progress: Progress
) -> dict[int, Fitted]:
    """All seeds' networks, in the precision that ships; the same for any number of workers."""
    fit = partial(_fit_one, config, plan, material)
    # Spawned, not forked: torch's threads don't survive a fork.
    context = multiprocessing.get_context("spawn")
    fitted = {}
    with ProcessPoolExecutor(plan.workers, mp_context=context) as pool:
        for seed, found in zip(plan.seeds, pool.map(fit, plan.seeds), strict=True):
            reached = " ".join(f"{value:.3f}" for value in found.history)
            progress(f"network, seed {seed}: dev score by epoch {reached}")
            fitted[seed] = replace(found, network=found.network.half().float())
    return fitted


def _fit_one(config: HbafConfig, plan: FittingConfig, material: Corpora, seed: int) -> Fitted:
    # One thread: sums of several would come in another order each time, and seeds not repeat.
    torch.set_num_threads(1)
    return fit_network(
        config,
        plan,
        spoken=material.spoken["train"],
        acted=material.acted["train"],
        dev_score=partial(_dev_score, material),
        seed=seed,
    )


def _dev_score(material: Corpora, network: HBAF) -> float:
    """Mean of MELD's weighted F1 from words and RAVDESS's UAR from sound, and from both.

    RAVDESS counts as the mean over all conditions: 120 clips alone would pick by luck.
    """
    acted = material.acted["dev"]
    voices = [
        [audio_score(network, acted, version=c, reads=reads) for c in acted.audio]
        for reads in (False, True)
    ]
    words = text_score(network, material.spoken["dev"])
    return float(np.mean([words, *np.mean(voices, axis=1)]))


def _network_config(recipe: Recipe, *, audio_width: int, encoder: TextEncoder) -> HbafConfig:
    widths = {
        "audio_width": audio_width,
        "text_width": encoder.width,
        "commonsense_width": encoder.width,
        "classes": len(LABELS),
    }
    unknown = set(recipe.network) - set(HbafConfig.__dataclass_fields__)
    if unknown:
        raise ConfigError(f"recipe {recipe.id}: network has no setting '{sorted(unknown)[0]}'")
    return HbafConfig(**{**recipe.network, **widths})


def _report(
    recipe: Recipe,
    fitted: Mapping[int, Fitted],
    temperatures: Mapping[int, float],
    material: Corpora,
    *,
    shipped: int,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "id": recipe.id,
        "labels": list(LABELS),
        "recipe": recipe.model_dump(mode="json"),
        "shipped_seed": shipped,
        "seeds": {
            str(seed): {
                "dev_score": f.dev_score,
                "epoch": f.epoch,
                "temperature": temperatures[seed],
            }
            for seed, f in fitted.items()
        },
    }
    for split in SPLITS[1:]:
        by_seed = {
            seed: evaluate(f.network, material, split, temperature=temperatures[seed])
            for seed, f in fitted.items()
        }
        report[split] = {
            key: {
                "shipped": asdict(of_shipped),
                "seeds": _spread([s[key] for s in by_seed.values()]),
            }
            for key, of_shipped in by_seed[shipped].items()
        }
        report[split]["majority"] = {
            name: asdict(_majority(corpus["train"].labels, corpus[split].labels))
            for name, corpus in (("meld", material.spoken), ("ravdess", material.acted))
        }
    return report


def _spread(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each figure."""
    spread = {}
    for figure in ("weighted_f1", "macro_f1", "accuracy", "uar", "ece"):
        values = [getattr(s, figure) for s in scores]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        spread[figure] = {"mean": float(np.mean(values)), "sd": deviation}
    return spread


def _majority(train: Labels, gold: Labels) -> Score:
    """The baseline that always says train's most frequent label, as surely as it is frequent."""
    shares = np.bincount(train, minlength=len(LABELS)) / len(train)
    return score(gold, np.tile(shares, (len(gold), 1)))


def _surprise(logits: NDArray[np.floating], gold: Labels) -> float:
    probabilities = softmax(logits)[np.arange(len(gold)), gold]
    return float(-np.log(np.maximum(probabilities, 1e-12)).mean())
