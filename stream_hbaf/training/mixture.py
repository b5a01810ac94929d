"""Training: the bundle of a mixture: MELD's words and RAVDESS's voices, as live use meets them.

Everything is fitted on train and picked on dev; test is read once, at the end, by networks in
the precision that ships.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.bundle import Bundle, BundleConfig, Scaling
from stream_hbaf.certainty import softmax
from stream_hbaf.corpora.acoustics import (
    CONDITIONS,
    AcousticsConfig,
    Take,
    measure,
    reported_takes,
    training_takes,
)
from stream_hbaf.corpora.augment import read_surroundings
from stream_hbaf.corpora.dialogue import LABELS, SPLITS, Corpus, Dialogue, LabelledUtterance, Split
from stream_hbaf.corpora.meld import read_meld
from stream_hbaf.corpora.ravdess import read_ravdess
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation import Score, majority_score, score, spread
from stream_hbaf.features.commonsense import Event2MindHeads
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.training.card import model_card
from stream_hbaf.training.distillation import Encode
from stream_hbaf.training.fitting import fit_temperature, one_thread
from stream_hbaf.training.material import Material, digest_of_material, predict
from stream_hbaf.training.mixing import (
    MixtureConfig,
    MixtureFitted,
    audio_score,
    fit_mixture,
    text_score,
)
from stream_hbaf.training.preparation import (
    fit_scaling,
    label_indices,
    prepare_heads,
    prepare_layers,
    rows_of,
    utterances_of,
)
from stream_hbaf.training.recipe import MixtureRecipe, SelectionConfig
from stream_hbaf.training.remembering import key_of, remember

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Acted:
    """RAVDESS, measured: how to scale it, and each split's clips by condition or version."""

    scaling: Scaling
    utterances: Mapping[Split, tuple[LabelledUtterance, ...]]
    audio: Mapping[Split, Mapping[str, Float32]]  # scaled, [N, A] each


@dataclass(frozen=True)
class Corpora:
    """Each split's material."""

    spoken: Mapping[Split, Material]
    acted: Mapping[Split, Material]


def train_mixture(
    recipe: MixtureRecipe, corpora: Path, out: Path, *, cache: Path, progress: Progress
) -> Bundle:
    """Train the bundle of a recipe on ``corpora``/{meld,ravdess,event2mind,speech} into ``out``.

    Raises CorpusError for a corpus, ModelError for the encoder. Interrupted, it takes up its
    cached features, its tuned layers and its networks' checkpoints again.
    """
    if recipe.tuning.context.tokens:
        raise ConfigError(
            f"recipe {recipe.id}: 'tuning.context.tokens' must be 0, clips have no dialogue"
        )
    spoken = Corpus(
        "meld", LABELS, {split: tuple(read_meld(corpora / "meld", split)) for split in SPLITS}
    )
    acted = prepare_acted(
        corpora, recipe.acoustics, recipe.selection, cache=cache / "acoustics", progress=progress
    )
    tuned = prepare_layers(
        recipe.encoder, spoken, recipe.tuning, cache=cache / "tuned", progress=progress
    )
    encoder = TextEncoder(recipe.encoder, tuned=tuned)
    encode = remember(encoder, cache / "text")
    prepared = prepare_heads(corpora, recipe.heads, encoder=encoder, cache=cache, progress=progress)
    heads = prepared.heads
    material = Corpora(
        {s: spoken_material(spoken.splits[s], encode=encode, heads=heads) for s in SPLITS},
        {s: acted_material(acted, s, encode=encode, heads=heads) for s in SPLITS},
    )
    network = HbafConfig(
        **recipe.network,
        audio_width=len(acted.scaling.mean),
        text_width=encoder.width,
        commonsense_width=heads.width,
        classes=len(LABELS),
    )
    fitted = _fit_seeds(network, recipe.fitting, material, cache=cache / "runs", progress=progress)
    temperatures = {seed: _temperature(f.network, material) for seed, f in fitted.items()}
    shipped = max(fitted, key=lambda seed: fitted[seed].history.best_score)
    config = BundleConfig(
        id=recipe.id,
        labels=LABELS,
        encoder=recipe.encoder,
        context=recipe.tuning.context,
        temperature=temperatures[shipped],
        network=network,
    )
    bundle = Bundle(config, acted.scaling, encoder, heads, fitted[shipped].network, tuned)
    metrics = _report(recipe, fitted, temperatures, material, shipped=shipped)
    metrics["commonsense"] = prepared.figures
    bundle.save(out, metrics=metrics, card=model_card(metrics))
    progress(f"{out}: bundle {recipe.id}, seed {shipped}, is ready")
    return Bundle.load(str(out))


def prepare_acted(
    corpora: Path,
    acoustics: AcousticsConfig,
    selection: SelectionConfig,
    *,
    cache: Path,
    progress: Progress,
) -> Acted:
    """Measure all clips, choose functionals on train, scale everything by train."""
    surroundings = read_surroundings(corpora / "speech")
    utterances = {
        split: tuple(d.utterances[0] for d in read_ravdess(corpora / "ravdess", split))
        for split in SPLITS
    }
    takes: dict[tuple[Split, str], list[Take]] = {}
    for split in SPLITS:
        clips = [u.audio for u in utterances[split] if u.audio is not None]
        if split == "train":
            takes[split, ""] = training_takes(clips, acoustics)
            continue
        for condition in CONDITIONS:
            takes[split, condition] = reported_takes(clips, condition=condition)
    every = measure(
        [take for listed in takes.values() for take in listed],
        surroundings=surroundings,
        cache=cache,
        workers=acoustics.workers,
        progress=progress,
    )
    ends = np.cumsum([len(listed) for listed in takes.values()])[:-1]
    measured = dict(zip(takes, np.split(every, ends), strict=True))
    versions = 1 + acoustics.copies
    labels = np.repeat(label_indices(utterances["train"], LABELS), versions)
    scaling = fit_scaling(measured["train", ""], labels, selection)
    audio: dict[Split, dict[str, Float32]] = {split: {} for split in SPLITS}
    for (split, condition), rows in measured.items():
        if split == "train":
            scaled = scaling(rows)
            audio[split] = {str(n): scaled[n::versions] for n in range(versions)}
        else:
            audio[split][condition] = scaling(rows)
    return Acted(scaling, utterances, audio)


def spoken_material(
    dialogues: Sequence[Dialogue], *, encode: Encode, heads: Event2MindHeads
) -> Material:
    """Dialogues with words and without sound."""
    utterances = utterances_of(dialogues)
    text = encode([utterance.text for utterance in utterances])
    return Material(
        labels=label_indices(utterances, LABELS),
        text=text,
        commonsense=heads.infer(text),
        audio={},
        dialogues=rows_of(dialogues),
    )


def acted_material(
    acted: Acted, split: Split, *, encode: Encode, heads: Event2MindHeads
) -> Material:
    """Clips with sound and their statements; train's dialogues are speakers, others' are clips."""
    utterances = acted.utterances[split]
    text = encode([utterance.text for utterance in utterances])
    speakers = np.array([utterance.speaker for utterance in utterances])
    rows = np.arange(len(utterances))
    by_speaker = tuple(np.flatnonzero(speakers == speaker) for speaker in np.unique(speakers))
    return Material(
        labels=label_indices(utterances, LABELS),
        text=text,
        commonsense=heads.infer(text),
        audio=acted.audio[split],
        dialogues=by_speaker if split == "train" else tuple(rows[:, None]),
    )


def _temperature(network: HBAF, material: Corpora) -> float:
    """Fitted on dev, words and voices weighing the same; voices heard under all conditions."""
    spoken, acted = material.spoken["dev"], material.acted["dev"]
    voices = [predict(network, acted, version=condition) for condition in acted.audio]
    return fit_temperature(
        [
            (predict(network, spoken, version=None), spoken.labels),
            (np.concatenate(voices), np.tile(acted.labels, len(voices))),
        ]
    )


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
    config: HbafConfig,
    plan: MixtureConfig,
    material: Corpora,
    *,
    cache: Path,
    progress: Progress,
) -> dict[int, MixtureFitted]:
    """All seeds' networks, in the precision that ships; the same for any number of workers."""
    settings = plan.model_dump_json(exclude={"seeds", "workers"})
    folder = cache / key_of(repr(config), settings, _digest(material))
    fit = partial(_fit_one, config, plan, material, folder)
    fitted = {}
    for seed, found in zip(plan.seeds, _fit_all(fit, plan), strict=True):
        reached = " ".join(f"{value:.3f}" for value in found.history.scores)
        progress(f"network, seed {seed}: dev score by epoch {reached}")
        fitted[seed] = found
    return fitted


def _fit_all(fit: Callable[[int], MixtureFitted], plan: MixtureConfig) -> Iterator[MixtureFitted]:
    workers = min(plan.workers, len(plan.seeds))
    if workers == 1:
        yield from map(fit, plan.seeds)
        return
    # Spawned, not forked: torch's threads don't survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(fit, plan.seeds)


def _fit_one(
    config: HbafConfig, plan: MixtureConfig, material: Corpora, folder: Path, seed: int
) -> MixtureFitted:
    with one_thread():
        return fit_mixture(
            config,
            plan,
            spoken=material.spoken["train"],
            acted=material.acted["train"],
            dev_score=partial(_dev_score, material),
            seed=seed,
            folder=folder / f"seed-{seed}",
        )


def _digest(material: Corpora) -> str:
    """Names what is trained on and picked by, so that another's checkpoint isn't taken up."""
    used = [split[s] for split in (material.spoken, material.acted) for s in SPLITS[:2]]
    return key_of(*(digest_of_material(one) for one in used))


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


def _report(
    recipe: MixtureRecipe,
    fitted: Mapping[int, MixtureFitted],
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
                "dev_score": f.history.best_score,
                "epoch": f.history.best_epoch,
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
            name: asdict(
                majority_score(corpus["train"].labels, corpus[split].labels, classes=len(LABELS))
            )
            for name, corpus in (("meld", material.spoken), ("ravdess", material.acted))
        }
    return report


def _spread(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each figure."""
    return {
        figure: asdict(spread([getattr(s, figure) for s in scores]))
        for figure in ("weighted_f1", "macro_f1", "accuracy", "uar", "ece")
    }
