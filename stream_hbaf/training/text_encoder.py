"""Fits the text encoder to labelled texts before everything else.

Its topmost layers are tuned whole, or low-rank adapters in all layers are, which a bundle can hold
of a large encoder too. The only file that imports peft.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from stream_hbaf.corpora.cache import key_of
from stream_hbaf.corpora.dataset import NO_LABEL
from stream_hbaf.corpora.dialogue import SPLITS, Corpus
from stream_hbaf.features.text import Passage, TextEncoder, batches_of, with_speaker
from stream_hbaf.files import atomic_write_bytes
from stream_hbaf.training.recipe import (
    AsrErrorConfig,
    TextEncoderConfig,
    TuningConfig,
)
from stream_hbaf.training.recipe_corpora import (
    LabelledTurns,
    Piece,
    TextDevSet,
    TextTrainingSet,
    common_labels,
    cut,
    labelled_turns,
    text_training_set,
)
from stream_hbaf.training.trainer import Measured, TrainerConfig, fit

Progress = Callable[[str], None]

ADAPTER = "default"  # peft's name for the one adapter there is
ADAPTER_SCALE = 2  # alpha / rank
ADAPTER_DROPOUT = 0.05
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0  # norm of all gradients


@dataclass(frozen=True)
class Tuned:
    """The encoder's tuned tensors in float16, as a bundle holds them and TextEncoder takes them."""

    tensors: dict[str, Tensor]
    dev_score: float
    epoch: int  # the one they are from; 0: untuned


def tuned_layers(
    config: TextEncoderConfig,
    corpora: Mapping[str, Corpus],
    *,
    default: Sequence[str],
    errors: AsrErrorConfig,
    device: str = "cpu",
    cache: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """The encoder's tensors that tuning changes, by name; float16, kept in ``cache``.

    A tuning that names none of the ``corpora`` is on the ``default`` ones. Of several tunings the
    mean is taken, which is better than each (Wortsman et al. 2022, "Model soups"). Raises
    ConfigError for corpora of different labels.
    """
    tune = partial(
        _cached_tuning, config, errors=errors, device=device, cache=cache, progress=progress
    )
    tunings = [
        tune({name: corpora[name] for name in plan.corpora or default}, plan=plan, seed=seed)
        for plan in (config, *config.soup)
        for seed in (plan.seeds if plan.changes else ())
    ]
    tuned = tunings[0] if len(tunings) == 1 else mean_of_tunings(config.name, tunings)
    rank = config.compress_to_rank
    return tuned if rank is None or not tuned else as_adapters(config.name, tuned, rank=rank)


def mean_of_tunings(name: str, tunings: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several tunings of one encoder, float16; layers that one left alone count as
    they were.
    """
    layers = sorted({layer for tuned in tunings for layer in tuned})
    untuned = dict(TextEncoder(name).model.named_parameters()) if layers else {}
    return {
        layer: torch.stack([tuned.get(layer, untuned[layer]).float() for tuned in tunings])
        .mean(0)
        .half()
        .detach()
        for layer in layers
    }


def as_adapters(name: str, tuned: Mapping[str, Tensor], *, rank: int) -> dict[str, Tensor]:
    """A tuning of whole layers as low-rank changes, float16: a quarter of the size or less.

    Of each matrix the ``rank`` largest singular directions of what tuning changed; matrices that
    are no larger than that stay whole.
    """
    untuned = dict(TextEncoder(name).model.named_parameters())
    kept = {}
    for layer, tensor in tuned.items():
        if tensor.dim() != 2 or min(tensor.shape) <= rank:
            kept[layer] = tensor
            continue
        change = tensor.float() - untuned[layer].detach()
        out, sizes, into = torch.linalg.svd(change, full_matrices=False)
        kept[f"{layer}.lora_b"] = (out[:, :rank] * sizes[:rank]).half()
        kept[f"{layer}.lora_a"] = into[:rank].half()
    return {layer: tensor.contiguous() for layer, tensor in kept.items()}


def tune_encoder(
    encoder: TextEncoder,
    texts: TextTrainingSet,
    *,
    classes: int,
    plan: TuningConfig,
    seed: int,
    folder: Path | None = None,
    progress: Progress,
) -> Tuned:
    """Fit ``encoder`` to the texts' labels; the epoch is picked on the mean of the dev figures.

    A linear head on the feature is trained along and thrown away. ``encoder`` is changed, for
    good; ``folder`` is the trainer's, for checkpoints.
    """
    if not plan.changes:
        return Tuned({}, 0.0, 0)
    torch.manual_seed(seed)
    _choose(encoder, plan)
    head = nn.Sequential(nn.Dropout(plan.dropout), nn.Linear(encoder.width, classes))
    headed = HeadedEncoder(encoder, head.to(encoder.model.device), texts, plan, seed, progress)
    history = fit(
        nn.ModuleDict({"encoder": encoder.model, "head": head}),
        loss=headed.loss,
        batches=headed.batches,
        optimizer=headed.optimizer,
        score=headed.score,
        plan=TrainerConfig(
            epochs=plan.epochs,
            patience=plan.patience,
            precision="bf16" if plan.bfloat16 else "32",
            accelerator="cpu" if encoder.model.device.type == "cpu" else "gpu",
            devices="auto",
            clip=LARGEST_GRADIENT,
        ),
        seed=seed,
        folder=folder,
        progress=lambda line: progress(f"text encoder: {line}"),
    )
    return Tuned(_tuned_tensors(encoder), history.best_score, history.best_epoch)


def _cached_tuning(
    config: TextEncoderConfig,
    corpora: Mapping[str, Corpus],
    *,
    plan: TuningConfig,
    seed: int,
    errors: AsrErrorConfig,
    device: str,
    cache: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """One tuning with one seed; from the cache if it is there."""
    labels = common_labels(corpora)
    dialogues = {
        name: [labelled_turns(corpus.splits[split], labels) for split in SPLITS[:2]]
        for name, corpus in corpora.items()
    }
    settings = plan.model_dump(include=set(TuningConfig.model_fields) - {"corpora", "seeds"})
    decisive = (config.name, config.context, settings, errors, seed, labels, dialogues)
    key = key_of(*map(repr, decisive))
    file = cache / f"{key}.safetensors"
    if not file.exists():
        tuned = tune_encoder(
            TextEncoder(config.name, context=config.context, device=device),
            text_training_set(corpora, plan, errors),
            classes=len(labels),
            plan=plan,
            seed=seed,
            folder=cache / key,
            progress=progress,
        )
        atomic_write_bytes(file, save(tuned.tensors))
    return load_file(file)


def _choose(encoder: TextEncoder, plan: TuningConfig) -> None:
    """Leave gradients to what is tuned, and only to that."""
    model = encoder.model
    if not plan.adapter_rank:
        depth = int(model.config.num_hidden_layers)
        marks = [f".layer.{n}." for n in range(depth - plan.layers, depth)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(mark in f".{name}" for mark in marks))
        return
    model.requires_grad_(False)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("pooler")  # of no use here
    ]
    # A second of imports, which tuning without adapters need not pay.
    from peft import LoraConfig, inject_adapter_in_model

    adapters = LoraConfig(
        r=plan.adapter_rank,
        lora_alpha=ADAPTER_SCALE * plan.adapter_rank,
        lora_dropout=ADAPTER_DROPOUT,
        target_modules=linear,
    )
    inject_adapter_in_model(adapters, model, adapter_name=ADAPTER)


def _tuned_tensors(encoder: TextEncoder) -> dict[str, Tensor]:
    """What was tuned, in float16; an adapter's scale is in its second half."""
    tensors: dict[str, Tensor] = {}
    for name, module in encoder.model.named_modules():
        if hasattr(module, "lora_A"):  # peft's, around a linear layer
            down, up = (
                encoder.model.get_parameter(f"{name}.lora_{half}.{ADAPTER}.weight") for half in "AB"
            )
            tensors[f"{name}.weight.lora_a"] = down
            tensors[f"{name}.weight.lora_b"] = up * float(module.scaling[ADAPTER])
    if not tensors:
        tensors = {n: p for n, p in encoder.model.named_parameters() if p.requires_grad}
    return {name: t.detach().half().cpu().clone().contiguous() for name, t in tensors.items()}


@dataclass(frozen=True)
class HeadedEncoder:
    """An encoder in tuning, with its head, as the trainer wants it."""

    encoder: TextEncoder
    head: nn.Module
    texts: TextTrainingSet
    plan: TuningConfig
    seed: int
    progress: Progress

    def batches(self, epoch: int) -> list[list[Piece]]:
        """An epoch's pieces, shuffled, in batches of about one length: padding costs time too."""
        draw, tokens = np.random.default_rng((self.seed, epoch)), self.encoder.context.tokens
        dialogues = [self._whole(known) for known in self.texts.train(epoch)]
        pieces = [piece for whole in dialogues for piece in cut(whole, tokens=tokens, draw=draw)]
        lengths = [piece.length for piece in pieces]
        alike = max(2, tokens // 8)  # tokens; pieces nearer than that stay in random order
        order = sorted(draw.permutation(len(pieces)).tolist(), key=lambda n: lengths[n] // alike)
        batches = batches_of(lengths, order, tokens=self.plan.tokens_per_batch)
        return [[pieces[n] for n in batches[b]] for b in draw.permutation(len(batches))]

    def _whole(self, known: LabelledTurns) -> Piece:
        speakers = self.encoder.context.speakers
        texts = tuple(with_speaker(turn, speakers=speakers) for turn in known.turns)
        return Piece(texts, tuple(self.encoder.turn_ids(known.turns)), known.labels)

    def loss(self, pieces: Sequence[Piece]) -> Tensor:
        """Cross entropy of the labelled turns."""
        if self.encoder.context.tokens:
            features = self.encoder.passage_features([Passage(piece.turns) for piece in pieces])
        else:
            features = self.encoder.features([piece.texts[0] for piece in pieces])
        gold = torch.tensor([label for piece in pieces for label in piece.labels])
        weights = self.texts.weights
        with torch.autocast(features.device.type, enabled=False):
            return F.cross_entropy(
                self.head(features.float()),
                gold.to(features.device),
                weight=None if weights is None else torch.tensor(weights, device=features.device),
                ignore_index=NO_LABEL,
                label_smoothing=self.plan.smoothing,
            )

    def optimizer(self, steps: int) -> tuple[Optimizer, LRScheduler]:
        """AdamW that warms up over a tenth of the steps, then decays linearly to nothing."""
        chosen = [p for p in self.encoder.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": chosen, "lr": self.plan.rate},
                {"params": list(self.head.parameters()), "lr": self.plan.head_rate},
            ],
            weight_decay=WEIGHT_DECAY,
        )
        warm = max(1, steps // 10)
        falling = max(1, steps - warm // 2)
        return optimizer, LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warm) * max(0.0, (steps - step) / falling)
        )

    def score(self) -> Measured:
        """The mean of the corpora's dev figures as the score, and each of them."""
        figures = {corpus: self._figure(one) for corpus, one in self.texts.dev.items()}
        if len(figures) > 1:
            each = ", ".join(f"{corpus} {figure:.4f}" for corpus, figure in figures.items())
            self.progress(f"text encoder: dev {each}")
        return {"score": float(np.mean(list(figures.values()))), **figures}

    def _figure(self, dev: TextDevSet) -> float:
        """The head's figure, on features as live use has them."""
        turns = [known.turns for known in dev.dialogues]
        features = np.concatenate(self.encoder.encode_dialogues(turns, half=self.plan.bfloat16))
        gold = np.array([n for known in dev.dialogues for n in known.labels], dtype=np.int64)
        device = self.encoder.model.device
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            logits = self.head(torch.from_numpy(features).to(device))
        predicted = logits.argmax(1).cpu().numpy()
        labelled = gold != NO_LABEL
        return dev.figure(gold[labelled], predicted[labelled])
