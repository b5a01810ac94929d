"""Training: the bundle of a mixture: dialogues' words and acted voices, as live use meets them.

Everything is fitted on train, picked and calibrated on dev. Test is never read here: figures of
test come from the live path alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stream_hbaf.bundle import NONE, Bundle, BundleConfig
from stream_hbaf.corpora.cache import cached_encoder, key_of
from stream_hbaf.corpora.dataset import Dataset, digest_of_dataset, predict
from stream_hbaf.corpora.dialogue import LABELS, Corpus
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation.metrics import Score, majority_score, score, spread
from stream_hbaf.features.commonsense import Event2MindHeads, NoCommonsense
from stream_hbaf.features.inferences import Inferences
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.networks.calibration import Calibration, Pattern
from stream_hbaf.networks.ensemble import join
from stream_hbaf.networks.network import Network, NetworkConfig
from stream_hbaf.networks.registry import read_network
from stream_hbaf.processes import map_in_processes
from stream_hbaf.training.batches import (
    Acted,
    MixtureConfig,
    MixtureFitted,
    Spoken,
    audio_score,
    fit_mixture,
    text_score,
)
from stream_hbaf.training.calibration import Judgement, fit_calibration
from stream_hbaf.training.clip_data import acted_lessons, acted_material, prepare_voices
from stream_hbaf.training.fitting import one_thread
from stream_hbaf.training.mixture_card import mixture_licence, model_card
from stream_hbaf.training.preparation import (
    Progress,
    as_adapters,
    mean_of_tunings,
    prepare_heads,
    prepare_layers,
)
from stream_hbaf.training.recipe import MixtureRecipe
from stream_hbaf.training.text_data import TALK, prepare_words, read_words

RISK = 0.3  # share of wrong answers that abstaining must keep to
FIGURES = ("weighted_f1", "macro_f1", "accuracy", "uar", "ece")


@dataclass(frozen=True)
class Lessons:
    """What one network is trained on, and what it is picked and calibrated by."""

    spoken: Spoken
    acted: Acted
    talk: Mapping[str, Dataset]  # dev's dialogues, their words as they are and misheard
    voices: Mapping[str, Dataset]  # dev's clips by corpus; versions are conditions


def train_mixture(
    recipe: MixtureRecipe, corpora: Path, out: Path, *, cache: Path, progress: Progress
) -> Bundle:
    """Train the bundle of a recipe on ``corpora``/{meld,event2mind,speech} and more into ``out``.

    Raises CorpusError for a corpus, ModelError for the encoder, ConfigError for what can't be
    combined. Interrupted, it takes up its cached features, its tuned layers and its networks'
    checkpoints again.
    """
    if recipe.tuning.context.tokens:
        raise ConfigError(
            f"recipe {recipe.id}: 'tuning.context.tokens' must be 0, clips have no dialogue"
        )
    words = read_words(recipe, corpora)
    voices = prepare_voices(recipe, corpora, cache=cache / "audio", progress=progress)
    tuned = _tune(recipe, words, cache=cache / "tuned", progress=progress)
    if recipe.adapters is not None:
        tuned = as_adapters(recipe.encoder, tuned, rank=recipe.adapters)
    encoder = TextEncoder(recipe.encoder, tuned=tuned, tokens=recipe.takes_tokens)
    encode = cached_encoder(encoder, cache / "text")
    heads, inferences, figures = _prepare_heads(
        recipe, corpora, encoder=encoder, cache=cache, progress=progress
    )
    spoken, talk = prepare_words(recipe, words, encode=encode, heads=heads)
    lessons = Lessons(
        spoken,
        acted_lessons(voices.train, encode=encode, heads=heads),
        talk,
        {c.corpus: acted_material(c, encode=encode, heads=heads) for c in voices.dev},
    )
    network = read_network(
        {
            **recipe.network,
            "audio_width": voices.scaling.width,
            "text_width": encoder.width,
            "commonsense_width": heads.width,
            "classes": len(LABELS),
        }
    )
    fitted = _fit_seeds(network, recipe.fitting, lessons, cache=cache / "runs", progress=progress)
    together = join([one.network for one in fitted.values()])
    calibration = calibrate(together, lessons)
    config = BundleConfig(
        id=recipe.id,
        labels=LABELS,
        encoder=recipe.encoder,
        context=recipe.tuning.context,
        acoustic=recipe.audio,
        commonsense=recipe.commonsense,
        calibration=calibration,
        licence=mixture_licence(recipe.voices, audio=recipe.audio),
        network=network,
        members=len(fitted),
    )
    bundle = Bundle(
        config,
        voices.scaling,
        encoder,
        heads,
        together,
        tuned,
        inferences=inferences,
    )
    metrics = _report(
        recipe, fitted, lessons, shipped=evaluate(together, lessons, calibration=calibration)
    )
    metrics["calibration"] = calibration.model_dump(mode="json")
    metrics["commonsense"] = figures
    bundle.save(out, metrics=metrics, card=model_card(metrics))
    progress(f"{out}: bundle {recipe.id}, {len(fitted)} networks, is ready")
    return Bundle.load(str(out))


def _prepare_heads(
    recipe: MixtureRecipe,
    corpora: Path,
    *,
    encoder: TextEncoder,
    cache: Path,
    progress: Progress,
) -> tuple[Event2MindHeads | NoCommonsense, Inferences | None, Mapping[str, Any]]:
    """What infers, the phrases that say it, and how well it does."""
    if recipe.commonsense == NONE:
        return NoCommonsense(1), None, {}
    half = bool(recipe.tuning.changes) and recipe.tuning.bfloat16
    prepared = prepare_heads(
        corpora, recipe.heads, encoder=encoder, half=half, cache=cache, progress=progress
    )
    return prepared.heads, prepared.inferences, prepared.figures


def _tune(
    recipe: MixtureRecipe, words: Sequence[Corpus], *, cache: Path, progress: Progress
) -> dict[str, Tensor]:
    """What of the encoder is tuned: on all corpora of words, or the mean of that and MELD's own.

    One tuning knows more words, the other knows the dialogues better; the mean of their weights
    is better than either (Wortsman et al. 2022, "Model soups").
    """
    tune = partial(prepare_layers, recipe.encoder, cache=cache, progress=progress)
    tuned = tune(words if recipe.words else words[0], recipe.tuning, words=recipe.words)
    if recipe.soup is None:
        return tuned
    (talk,) = (corpus for corpus in words if corpus.name == TALK)
    return mean_of_tunings(recipe.encoder, [tuned, tune(talk, recipe.soup)])


def judged(network: Network, lessons: Lessons) -> dict[tuple[Pattern, str], Judgement]:
    """Dev's logits and labels by what was given and by corpus and condition."""
    found: dict[tuple[Pattern, str], Judgement] = {}
    for name, material in lessons.talk.items():
        logits = predict(network, material, version=None)
        found["text", f"{TALK}/text/{name}"] = logits, material.labels
    for name, material in lessons.voices.items():
        for condition in material.audio:
            for pattern in _patterns(material):
                reads = pattern == "audio+text"
                logits = predict(network, material, version=condition, with_text=reads)
                found[pattern, f"{name}/{pattern}/{condition}"] = logits, material.labels
    return found


def _patterns(clips: Dataset) -> tuple[Pattern, ...]:
    reads = clips.text_mask is None or bool(clips.text_mask.any())
    return ("audio", "audio+text") if reads else ("audio",)


def calibrate(network: Network, lessons: Lessons) -> Calibration:
    """Fitted on dev, each corpus under each condition weighing the same."""
    evidence: dict[Pattern, list[Judgement]] = {}
    for (pattern, _), judgement in judged(network, lessons).items():
        evidence.setdefault(pattern, []).append(judgement)
    return fit_calibration(evidence, risk=RISK)


def evaluate(network: Network, lessons: Lessons, *, calibration: Calibration) -> dict[str, Score]:
    """Every figure of dev, by corpus, what was given, and condition."""
    return {
        name: score(labels[labels >= 0], probabilities[labels >= 0])
        for (pattern, name), (logits, labels) in judged(network, lessons).items()
        for probabilities in [calibration.probabilities(logits, pattern=pattern)]
    }


def _fit_seeds(
    config: NetworkConfig,
    plan: MixtureConfig,
    lessons: Lessons,
    *,
    cache: Path,
    progress: Progress,
) -> dict[int, MixtureFitted]:
    """All seeds' networks, in the precision that ships; the same for any number of workers."""
    settings = plan.model_dump_json(exclude={"seeds", "workers"})
    folder = cache / key_of(repr(config), settings, _digest(lessons))
    found_by_seed = map_in_processes(
        _fit_one,
        plan.seeds,
        workers=min(plan.workers, len(plan.seeds)),
        shared=(config, plan, lessons, folder),
    )
    fitted = {}
    for seed, found in zip(plan.seeds, found_by_seed, strict=True):
        reached = " ".join(f"{value:.3f}" for value in found.history.scores)
        progress(f"network, seed {seed}: dev score by epoch {reached}")
        fitted[seed] = found
    return fitted


def _fit_one(
    seed: int, config: NetworkConfig, plan: MixtureConfig, lessons: Lessons, folder: Path
) -> MixtureFitted:
    with one_thread():
        return fit_mixture(
            config,
            plan,
            spoken=lessons.spoken,
            acted=lessons.acted,
            dev_score=partial(_dev_score, lessons),
            seed=seed,
            folder=folder / f"seed-{seed}",
        )


def _digest(lessons: Lessons) -> str:
    """Names what is trained on and picked by, so that another's checkpoint isn't taken up."""
    used = [
        lessons.spoken.material,
        lessons.acted.material,
        *lessons.talk.values(),
        *lessons.voices.values(),
    ]
    return key_of(*(digest_of_dataset(one) for one in used))


def _dev_score(lessons: Lessons, network: Network) -> dict[str, float]:
    """Mean of MELD's weighted F1 from words and each corpus's UAR from sound, and from both.

    MELD counts as the mean of gold and misheard words, voices as the mean over all conditions:
    a hundred clips alone would pick by luck.
    """
    figures = {
        TALK: float(np.mean([text_score(network, talk) for talk in lessons.talk.values()])),
    }
    for name, clips in lessons.voices.items():
        for pattern in _patterns(clips):
            reads = pattern == "audio+text"
            every = [audio_score(network, clips, version=c, reads=reads) for c in clips.audio]
            figures[f"{name}/{pattern}"] = float(np.mean(every))
    return {"score": float(np.mean(list(figures.values()))), **figures}


def _report(
    recipe: MixtureRecipe,
    fitted: Mapping[int, MixtureFitted],
    lessons: Lessons,
    *,
    shipped: Mapping[str, Score],
) -> dict[str, Any]:
    """Figures of the networks together, as they ship, and of each by itself."""
    by_seed = {}
    for seed, one in fitted.items():
        own = calibrate(one.network, lessons)
        by_seed[seed] = evaluate(one.network, lessons, calibration=own)
    talk = lessons.talk["gold"].known_labels
    train = np.concatenate([versions[0] for versions in lessons.spoken.dialogues])
    taught = lessons.spoken.material.labels[train]
    dev: dict[str, Any] = {
        key: {
            "shipped": asdict(of_shipped),
            "seeds": _spread([scores[key] for scores in by_seed.values()]),
        }
        for key, of_shipped in shipped.items()
    }
    dev["majority"] = asdict(majority_score(taught, talk, classes=len(LABELS)))
    return {
        "id": recipe.id,
        "labels": list(LABELS),
        "recipe": recipe.model_dump(mode="json"),
        "seeds": {
            str(seed): {
                "dev_score": f.history.best_score,
                "epoch": f.history.best_epoch,
                "figures": dict(f.history.measured[f.history.best_epoch - 1]),
            }
            for seed, f in fitted.items()
        },
        "clips": len(lessons.acted.material.labels),
        "dev": dev,
    }


def _spread(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each figure."""
    return {figure: asdict(spread([getattr(s, figure) for s in scores])) for figure in FIGURES}
