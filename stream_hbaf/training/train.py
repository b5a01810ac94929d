"""Trains a recipe's bundle: prepare, fit each seed, calibrate, measure, write the card, save.

Everything is fitted on train and picked and calibrated on dev. Test is read once, at the end, by
networks in the precision that ships; of several corpora not at all: their test figures come from
the live path alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.corpora.cache import key_of
from stream_hbaf.corpora.dataset import NO_LABEL, digest_of_dataset
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.evaluation.metrics import Score, majority_score, spread
from stream_hbaf.networks.registry import join
from stream_hbaf.processes import map_as_completed
from stream_hbaf.training.card import FIGURES, licence_of, model_card
from stream_hbaf.training.distributed import is_main_process
from stream_hbaf.training.fitting import Fitted, fit_network
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe import Recipe, read_recipe
from stream_hbaf.training.scoring import Evaluation, evaluate

Progress = Callable[[str], None]


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

    A recipe that ships the best seed also leaves every seed's bundle in ``out``/seed-N.
    ``devices`` and ``nodes`` train on GPUs instead of the recipe's devices, a seed at a time.
    Raises ConfigError for a recipe that can't be read, CorpusError for a corpus, ModelError for the
    encoder. Interrupted, it resumes from what is in ``cache``, to the same result.
    """
    recipe = _on_devices(read_recipe(recipe_file), devices=devices, nodes=nodes)
    on_gpu = recipe.fit.accelerator != "cpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    prepared = prepare(recipe, corpora, cache=cache, device=device, progress=progress)
    fitted = fit_seeds(recipe, prepared, cache=cache / "runs", progress=progress)
    trained = _Trained(recipe, prepared, fitted)
    seeds = list(fitted)
    if recipe.fit.ship == "best_seed":
        for seed in fitted:
            trained.save([seed], id_=f"{recipe.id}-seed-{seed}", out=out / f"seed-{seed}")
        seeds = [max(fitted, key=lambda seed: fitted[seed].score(prepared.scored["dev"]))]
    bundle = trained.save(seeds, id_=recipe.id, out=out)
    progress(f"{out}: bundle {recipe.id}, seeds {', '.join(map(str, seeds))}, is ready")
    return bundle


def fit_seeds(
    recipe: Recipe, prepared: Prepared, *, cache: Path, progress: Progress
) -> dict[int, Fitted]:
    """Every seed's network; on the processor several at a time, the same for any number."""
    plan = recipe.fit
    folder = cache / f"{recipe.id}-{_key(recipe, prepared)[:16]}"
    progress(f"{folder}: checkpoints, and logs for tensorboard --logdir")
    on_processor = plan.accelerator == "cpu" and plan.devices == 1 and plan.nodes == 1
    completed = map_as_completed(
        _fit_seed,
        plan.seeds,
        workers=recipe.workers if on_processor else 1,
        shared=(recipe, prepared, folder),
    )
    fitted = {}
    for index, one in completed:
        seed = plan.seeds[index]
        fitted[seed] = one
        progress(
            f"seed {seed}: dev score {one.history.best_score:.4f} in epoch "
            f"{one.history.best_epoch} of {len(one.history.scores)}, {one.history.seconds:.0f} s"
        )
    return {seed: fitted[seed] for seed in plan.seeds}


def _fit_seed(seed: int, recipe: Recipe, prepared: Prepared, folder: Path) -> Fitted:
    return fit_network(recipe, prepared, seed=seed, folder=folder / f"seed-{seed}")


def _on_devices(
    recipe: Recipe, *, devices: int | Literal["auto"] | None, nodes: int | None
) -> Recipe:
    """The recipe for other devices than its own, if any are given."""
    changes: dict[str, Any] = {"accelerator": "auto"} if devices or nodes else {}
    changes |= {} if devices is None else {"devices": devices}
    changes |= {} if nodes is None else {"nodes": nodes}
    return recipe.model_copy(update={"fit": recipe.fit.model_copy(update=changes)})


def _key(recipe: Recipe, prepared: Prepared) -> str:
    """Names all that decides the networks, so that no other training's checkpoint is taken up."""
    settings = recipe.model_dump_json(
        include={"losses": True, "batches": True, "fit": True}, exclude={"fit": {"seeds", "ship"}}
    )
    training = prepared.training
    datasets = [training.dialogues, *([] if training.clips is None else [training.clips.dataset])]
    datasets += [dataset for one in prepared.scored["dev"] for dataset in one.texts.values()]
    versions = repr([[rows.tolist() for rows in each] for each in training.versions])
    digests = [digest_of_dataset(dataset) for dataset in datasets]
    return key_of(repr(recipe.network_config(**prepared.widths)), settings, versions, *digests)


@dataclass(frozen=True)
class _Trained:
    """The networks of all seeds, and what they were trained on."""

    recipe: Recipe
    prepared: Prepared
    fitted: Mapping[int, Fitted]

    def save(self, seeds: Sequence[int], *, id_: str, out: Path) -> Bundle:
        """The bundle of some seeds' networks together, in ``out`` with its figures and its card."""
        recipe, prepared, first = self.recipe, self.prepared, self.fitted[seeds[0]]
        encoder, commonsense = prepared.encoder, prepared.commonsense
        assert encoder is not None, "a bundle is made in the process that prepared it"
        assert commonsense is not None
        network, evaluation = first.network, first.evaluation
        if len(seeds) > 1:
            network = join([self.fitted[seed].network for seed in seeds])
            evaluation = evaluate(network, prepared.scored, recipe.calibration)
        metrics = {"id": id_} | self._metrics(seeds, evaluation)
        config = BundleConfig(
            id=id_,
            labels=prepared.labels,
            encoder=recipe.text_encoder.name,
            context=recipe.text_encoder.context,
            acoustic=recipe.audio.representation,
            acoustic_widths=prepared.acoustic_widths,
            baseline=recipe.audio.baseline,
            commonsense=recipe.commonsense.source,
            calibration=evaluation.calibration,
            licence=licence_of(metrics["recipe"]),
            network=network.config,
            members=len(seeds),
        )
        bundle = Bundle(
            config,
            prepared.scaling if network.config.use_audio else None,
            encoder,
            commonsense.model,
            network,
            prepared.tuned,
            inferences=commonsense.inferences,
        )
        if is_main_process():
            bundle.save(out, metrics=metrics, card=model_card(metrics))
        return bundle

    def _metrics(self, seeds: Sequence[int], evaluation: Evaluation) -> dict[str, Any]:
        """What metrics.json holds of some seeds' network, and of all seeds by themselves."""
        prepared, every = self.prepared, [one.evaluation.scores for one in self.fitted.values()]
        return {
            "corpora": prepared.corpora,
            "labels": list(prepared.labels),
            "mode": self.recipe.network_config(**prepared.widths).mode,
            "transcripts": "gold",
            "recipe": self.recipe.model_dump(mode="json"),
            "shipped_seeds": list(seeds),
            "seeds": {str(seed): _of_seed(one) for seed, one in self.fitted.items()},
            **{
                split: {
                    key: {
                        "shipped": asdict(score),
                        "seeds": _spread([scores[split][key] for scores in every]),
                    }
                    for key, score in of_split.items()
                }
                for split, of_split in evaluation.scores.items()
            },
            "majority": {split: asdict(self._majority(split)) for split in prepared.scored},
            "calibration": evaluation.calibration.model_dump(mode="json"),
            "commonsense": dict((prepared.commonsense and prepared.commonsense.figures) or {}),
            "skipped": list(prepared.skipped),
        }

    def _majority(self, split: Split) -> Score:
        """Always the label that is most frequent in the main corpus's train split."""
        training, main = self.prepared.training, self.prepared.scored[split][0]
        every = np.arange(len(training.dialogues.labels))
        gold = np.concatenate([rows for rows, *_ in training.versions] or [every])
        train = training.dialogues.labels[gold]
        classes = len(self.prepared.labels)
        return majority_score(train[train != NO_LABEL], main.gold.known_labels, classes=classes)


def _of_seed(fitted: Fitted) -> dict[str, Any]:
    """How one seed's training went, and its figures in the main condition."""
    history = fitted.history
    measured = dict(history.measured[history.best_epoch - 1])
    return {
        "dev_score": history.best_score,
        "dev_score_by_loss": fitted.dev_by_loss,
        "epoch": history.best_epoch,
        "epochs": len(history.scores),
        "figures": {name: measured[name] for name in measured.keys() - {"score", "loss"}},
        **{split: asdict(fitted.evaluation.main(split)) for split in fitted.evaluation.scores},
    }


def _spread(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each figure."""
    return {figure: asdict(spread([getattr(s, figure) for s in scores])) for figure in FIGURES}
