"""Fits the text encoder to labelled texts before everything else.

Its topmost layers are tuned whole, or low-rank adapters in all layers are, which a bundle can hold
of a large encoder too. The only file that imports peft.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from stream_hbaf.corpora.cache import key_of
from stream_hbaf.corpora.dialogue import SPLITS, Corpus
from stream_hbaf.evaluation.metrics import Labels
from stream_hbaf.features.context import ContextConfig, Passage, batches_of, with_speaker
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.files import atomic_write_bytes
from stream_hbaf.training.recipe import (
    AsrErrorConfig,
    TextEncoderConfig,
    TrainerConfig,
    TuningConfig,
)
from stream_hbaf.training.recipe_corpora import common_labels
from stream_hbaf.training.text_data import (
    UNLABELLED,
    LabelledTurns,
    Piece,
    TextDevSet,
    TextTrainingSet,
    cut,
    labelled_turns,
    text_training_set,
)
from stream_hbaf.training.trainer import Measured, fit

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
    tunings = [
        _cached_tuning(
            config,
            {name: corpora[name] for name in plan.corpora or default},
            plan=plan,
            seed=seed,
            errors=errors,
            device=device,
            cache=cache,
            progress=progress,
        )
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
    head.to(encoder.model.device)
    weights = None if texts.weights is None else torch.tensor(texts.weights)
    history = fit(
        nn.ModuleDict({"encoder": encoder.model, "head": head}),
        loss=lambda pieces: _loss(encoder, head, pieces, smoothing=plan.smoothing, weights=weights),
        batches=lambda epoch: _batches(
            [_whole(encoder, known) for known in texts.train(epoch)],
            encoder.context,
            size=plan.tokens_per_batch,
            draw=np.random.default_rng((seed, epoch)),
        ),
        optimizer=lambda steps: _optimizer(encoder, head, plan=plan, steps=steps),
        score=lambda: _score(encoder, head, texts.dev, half=plan.bfloat16, progress=progress),
        plan=_trainer(plan, on_gpu=encoder.model.device.type != "cpu"),
        seed=seed,
        folder=folder,
        progress=lambda line: progress(f"text encoder: {line}"),
    )
    return Tuned(_tuned_tensors(encoder), history.best_score, history.best_epoch)


def _trainer(plan: TuningConfig, *, on_gpu: bool) -> TrainerConfig:
    return TrainerConfig(
        epochs=plan.epochs,
        patience=plan.patience,
        precision="bf16" if plan.bfloat16 else "32",
        accelerator="gpu" if on_gpu else "cpu",
        devices="auto",
        clip=LARGEST_GRADIENT,
    )


def top_layers(encoder: TextEncoder, *, count: int) -> dict[str, nn.Parameter]:
    """The parameters of the topmost ``count`` transformer layers, by name."""
    depth = int(encoder.model.config.num_hidden_layers)
    marks = tuple(f".layer.{n}." for n in range(depth - count, depth))
    return {n: p for n, p in encoder.model.named_parameters() if any(m in f".{n}" for m in marks)}


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


def _whole(encoder: TextEncoder, known: LabelledTurns) -> Piece:
    texts = tuple(with_speaker(turn, speakers=encoder.context.speakers) for turn in known.turns)
    return Piece(texts, tuple(encoder.turn_ids(known.turns)), known.labels)


def _choose(encoder: TextEncoder, plan: TuningConfig) -> None:
    """Leave gradients to what is tuned, and only to that."""
    model = encoder.model
    if not plan.adapter_rank:
        chosen = top_layers(encoder, count=plan.layers)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return
    model.requires_grad_(False)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("pooler")  # of no use here
    ]
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
        if isinstance(module, LoraLayer):
            down, up = (
                encoder.model.get_parameter(f"{name}.lora_{half}.{ADAPTER}.weight") for half in "AB"
            )
            tensors[f"{name}.weight.lora_a"] = down
            tensors[f"{name}.weight.lora_b"] = up * float(module.scaling[ADAPTER])
    if not tensors:
        tensors = {n: p for n, p in encoder.model.named_parameters() if p.requires_grad}
    return {name: t.detach().half().cpu().clone().contiguous() for name, t in tensors.items()}


def _loss(
    encoder: TextEncoder,
    head: nn.Module,
    pieces: Sequence[Piece],
    *,
    smoothing: float,
    weights: Tensor | None,
) -> Tensor:
    if encoder.context.tokens:
        features = encoder.passage_features([Passage(piece.turns) for piece in pieces])
    else:
        features = encoder.features([piece.texts[0] for piece in pieces])
    gold = torch.tensor([label for piece in pieces for label in piece.labels])
    with torch.autocast(features.device.type, enabled=False):
        return F.cross_entropy(
            head(features.float()),
            gold.to(features.device),
            weight=None if weights is None else weights.to(features.device),
            ignore_index=UNLABELLED,
            label_smoothing=smoothing,
        )


def _batches(
    dialogues: Sequence[Piece], context: ContextConfig, *, size: int, draw: np.random.Generator
) -> list[list[Piece]]:
    """An epoch's pieces, shuffled, in batches of about one length: padding costs time too."""
    tokens = context.tokens
    pieces = [piece for whole in dialogues for piece in cut(whole, tokens=tokens, draw=draw)]
    lengths = [piece.length for piece in pieces]
    alike = max(2, tokens // 8)  # tokens; pieces nearer than that stay in random order
    order = sorted(draw.permutation(len(pieces)).tolist(), key=lambda n: lengths[n] // alike)
    batches = batches_of(lengths, order, tokens=size)
    return [[pieces[n] for n in batches[b]] for b in draw.permutation(len(batches))]


def _optimizer(
    encoder: TextEncoder, head: nn.Module, *, plan: TuningConfig, steps: int
) -> tuple[Optimizer, LRScheduler]:
    chosen = [p for p in encoder.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": chosen, "lr": plan.rate},
            {"params": list(head.parameters()), "lr": plan.head_rate},
        ],
        weight_decay=WEIGHT_DECAY,
    )
    return optimizer, LambdaLR(optimizer, lambda step: _ramp(step, steps=steps))


def _ramp(step: int, *, steps: int) -> float:
    """Warm up over a tenth of the steps, then decay linearly to nothing."""
    warm = max(1, steps // 10)
    return min(1.0, (step + 1) / warm) * max(0.0, (steps - step) / max(1, steps - warm // 2))


def _score(
    encoder: TextEncoder,
    head: nn.Module,
    dev: Mapping[str, TextDevSet],
    *,
    half: bool,
    progress: Progress,
) -> Measured:
    """The mean of the corpora's dev figures as the score, and each of them."""
    figures = {corpus: _figure(encoder, head, one, half=half) for corpus, one in dev.items()}
    if len(figures) > 1:
        each = ", ".join(f"{corpus} {figure:.4f}" for corpus, figure in figures.items())
        progress(f"text encoder: dev {each}")
    return {"score": float(np.mean(list(figures.values()))), **figures}


def _figure(encoder: TextEncoder, head: nn.Module, dev: TextDevSet, *, half: bool) -> float:
    """The head's figure, on features as live use has them."""
    encoded = encoder.encode_dialogues([known.turns for known in dev.dialogues], half=half)
    features = np.concatenate(encoded)
    gold: Labels = np.array([n for known in dev.dialogues for n in known.labels], dtype=np.int64)
    with torch.inference_mode(), torch.autocast(encoder.model.device.type, enabled=False):
        logits = head(torch.from_numpy(features).to(encoder.model.device))
    predicted = logits.argmax(1).cpu().numpy()
    labelled = gold != UNLABELLED
    return dev.figure(gold[labelled], predicted[labelled])
