"""Training: corpora in, bundles out, with every figure of their cards measured on the way.

Everything is fitted on train and picked on dev; test is read once, at the end, by networks in
the precision that ships.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from stream_hbaf.bundle import Bundle, BundleConfig
from stream_hbaf.corpora.cache import key_of
from stream_hbaf.corpora.dataset import digest_of_dataset
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.evaluation.metrics import majority_score, spread
from stream_hbaf.networks.calibration import Calibration
from stream_hbaf.networks.network import NetworkConfig
from stream_hbaf.processes import map_in_processes
from stream_hbaf.training.card import corpus_card, licence_of
from stream_hbaf.training.distributed import is_main_process
from stream_hbaf.training.fitting import Fitted, fit_network, one_thread
from stream_hbaf.training.mixture import train_mixture
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe import MixtureRecipe, Recipe, read_recipe

Progress = Callable[[str], None]
FIGURES = ("weighted_f1", "macro_f1", "accuracy", "uar", "ece")
REPORTED: tuple[Split, ...] = ("dev", "test")


def train(
    recipe_file: Path,
    corpora: Path,
    out: Path,
    *,
    cache: Path = Path("cache"),
    devices: int | Literal["auto"] | None = None,
    nodes: int | None = None,
    progress: Progress = print,
) -> Bundle:
    """Train a recipe's bundle on the corpora under ``corpora``, into ``out``.

    A recipe of one corpus also leaves every seed's bundle in ``out``/seed-N. ``devices`` and
    ``nodes`` train on GPUs instead of the recipe's devices, a seed at a time. Raises ConfigError
    for a recipe that can't be read, CorpusError for a corpus, ModelError for the encoder.
    Interrupted, it goes on from what is in ``cache``, to the same result.
    """
    recipe = read_recipe(recipe_file)
    if isinstance(recipe, MixtureRecipe):
        return train_mixture(recipe, corpora, out, cache=cache, progress=progress)
    changes: dict[str, Any] = {"accelerator": "auto"} if devices or nodes else {}
    changes |= {} if devices is None else {"devices": devices}
    changes |= {} if nodes is None else {"nodes": nodes}
    fitting = recipe.fitting.model_copy(update=changes)
    return train_corpus(
        recipe.model_copy(update={"fitting": fitting}),
        corpora,
        out,
        cache=cache,
        progress=progress,
    )


def train_corpus(
    recipe: Recipe, corpora: Path, out: Path, *, cache: Path, progress: Progress
) -> Bundle:
    """Train all seeds of a recipe of one corpus; the best on dev is the bundle in ``out``."""
    on_gpu = recipe.fitting.accelerator != "cpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    prepared = prepare(recipe, corpora, cache=cache, device=device, progress=progress)
    folder = cache / "runs" / f"{recipe.id}-{_key(recipe, prepared)[:16]}"
    progress(f"{folder}: checkpoints, and logs for tensorboard --logdir")
    fitted: dict[int, Fitted] = {}
    for seed, found in _fit_seeds(recipe, prepared, folder):
        fitted[seed] = found
        progress(
            f"seed {seed}: dev weighted F1 {found.dev.weighted_f1:.4f} in epoch {found.epoch} "
            f"of {len(found.history.scores)}, {found.history.seconds:.0f} s"
        )
    shipped = max(fitted, key=lambda seed: fitted[seed].dev.weighted_f1)
    metrics = _report(recipe, prepared, fitted, shipped=shipped)
    if is_main_process():
        for seed in fitted:
            own = {**metrics, "id": f"{recipe.id}-seed-{seed}", "seed": seed}
            _save(_bundle(recipe, prepared, fitted[seed], id_=own["id"]), own, out / f"seed-{seed}")
        own = {**metrics, "seed": shipped}
        _save(_bundle(recipe, prepared, fitted[shipped], id_=recipe.id), own, out)
        progress(f"{out}: bundle {recipe.id}, seed {shipped}, is ready")
    return _bundle(recipe, prepared, fitted[shipped], id_=recipe.id)


def fit_seed(
    recipe: Recipe,
    prepared: Prepared,
    seed: int,
    folder: Path | None,
    progress: Progress = lambda line: None,
    *,
    splits: Sequence[Split] = REPORTED,
) -> Fitted:
    """One network of a recipe on what was prepared for it; ``folder`` keeps its checkpoint.

    The folder must be of this recipe, preparation and seed alone. The same seed gives the same
    network on one torch thread.
    """
    return fit_network(
        network_config(recipe, prepared),
        losses=recipe.losses,
        plan=recipe.fitting,
        material=prepared.material,
        seed=seed,
        splits=splits,
        folder=folder,
        progress=progress,
    )


def network_config(recipe: Recipe, prepared: Prepared) -> NetworkConfig:
    """The recipe's network for the features that were prepared."""
    train = prepared.material["train"]
    return recipe.network_config(
        audio_width=train.audio[""].shape[-1] if train.audio else 0,
        text_width=train.text.shape[-1],
        commonsense_width=train.commonsense.shape[2],
        classes=len(prepared.labels),
    )


def _fit_seeds(recipe: Recipe, prepared: Prepared, folder: Path) -> Iterator[tuple[int, Fitted]]:
    """Every seed's network; on the processor several at a time, the same for any number."""
    plan = recipe.fitting
    on_processor = plan.accelerator == "cpu" and plan.devices == 1 and plan.nodes == 1
    workers = min(plan.workers, len(plan.seeds)) if on_processor else 1
    shared = (recipe, prepared, folder)
    fitted = map_in_processes(_fit_alone, plan.seeds, workers=workers, shared=shared)
    yield from zip(plan.seeds, fitted, strict=True)


def _fit_alone(seed: int, recipe: Recipe, prepared: Prepared, folder: Path) -> Fitted:
    with one_thread():
        return fit_seed(recipe, prepared, seed, folder / f"seed-{seed}")


def _key(recipe: Recipe, prepared: Prepared) -> str:
    """Names all that decides the networks, so that no other training's checkpoint is taken up."""
    settings = recipe.model_dump_json(
        include={"losses": True, "fitting": True}, exclude={"fitting": {"seeds", "workers"}}
    )
    material = (digest_of_dataset(prepared.material[split]) for split in ("train", "dev"))
    return key_of(repr(network_config(recipe, prepared)), settings, *material)


def _save(bundle: Bundle, metrics: Mapping[str, Any], out: Path) -> None:
    bundle.save(out, metrics=metrics, card=corpus_card(metrics))


def _bundle(recipe: Recipe, prepared: Prepared, fitted: Fitted, *, id_: str) -> Bundle:
    if prepared.encoder is None or prepared.commonsense is None:
        raise RuntimeError("a bundle is made where it was prepared")
    config = BundleConfig(
        id=id_,
        labels=prepared.labels,
        encoder=recipe.encoder,
        context=recipe.tuning.context,
        acoustic=recipe.audio,
        commonsense=recipe.commonsense,
        calibration=Calibration.of_temperature(fitted.temperature),
        licence=licence_of(recipe.corpus, audio=recipe.audio),
        network=fitted.network.config,
    )
    return Bundle(
        config,
        prepared.scaling if fitted.network.config.use_audio else None,
        prepared.encoder,
        prepared.commonsense,
        fitted.network,
        prepared.tuned,
    )


def _report(
    recipe: Recipe, prepared: Prepared, fitted: Mapping[int, Fitted], *, shipped: int
) -> dict[str, Any]:
    """What metrics.json holds: every seed's scores, their spread, and a baseline's."""
    material = prepared.material
    return {
        "id": recipe.id,
        "corpus": recipe.corpus,
        "labels": list(prepared.labels),
        "mode": network_config(recipe, prepared).mode,
        "transcripts": "gold",
        "recipe": recipe.model_dump(mode="json"),
        "shipped_seed": shipped,
        "seeds": {str(seed): _of_seed(found) for seed, found in fitted.items()},
        "spread": {
            split: {
                figure: asdict(spread([getattr(f.scores[split], figure) for f in fitted.values()]))
                for figure in FIGURES
            }
            for split in REPORTED
        },
        "majority": {
            split: asdict(
                majority_score(
                    material["train"].known_labels,
                    material[split].known_labels,
                    classes=len(prepared.labels),
                )
            )
            for split in REPORTED
        },
        "utterances": {split: int(m.labelled.sum()) for split, m in material.items()},
        "dialogues": {split: len(m.dialogues) for split, m in material.items()},
        "commonsense": dict(prepared.figures),
        "skipped": list(prepared.skipped),
    }


def _of_seed(fitted: Fitted) -> dict[str, Any]:
    return {
        "dev": asdict(fitted.dev),
        "test": asdict(fitted.test),
        "dev_by_loss": {"weighted_f1": fitted.dev_by_loss},
        "epoch": fitted.epoch,
        "epochs": len(fitted.history.scores),
        "temperature": fitted.temperature,
    }
