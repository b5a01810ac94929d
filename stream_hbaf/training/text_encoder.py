"""Training: the text encoder itself, on the dialogues that it is to read.

The topmost layers are tuned whole, or low-rank adapters in all layers are, which a bundle can
hold of a large encoder too. The only file that imports peft.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from stream_hbaf.config import Positive, Section
from stream_hbaf.corpora.dialogue import Split
from stream_hbaf.evaluation.metrics import Labels, weighted_f1
from stream_hbaf.features.context import ContextConfig, Ids, Passage, Turn, batches_of, with_speaker
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.training.trainer import Measured, TrainerConfig, fit

Progress = Callable[[str], None]
Figure = Callable[[Labels, Labels, int], float]  # gold [N], said [N], classes → higher is better

UNLABELLED = -1  # index of the label of an utterance that is context only
ADAPTER = "default"  # peft's name for the one adapter there is
ADAPTER_SCALE = 2  # alpha / rank
ADAPTER_DROPOUT = 0.05
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0  # norm of all gradients


class TuningConfig(Section):
    """How the text encoder is fitted to the corpus before everything else."""

    context: ContextConfig = ContextConfig()
    adapter_rank: Annotated[int, Field(ge=0)] = 0  # of all layers' adapters; 0: tune layers whole
    layers: Annotated[int, Field(ge=0)] = 3  # the topmost so many are tuned whole; 0 for none
    epochs: Annotated[int, Field(ge=0)] = 5  # 0: the encoder stays as it is
    patience: Positive = 5  # epochs without a better dev score after which tuning stops
    tokens_per_batch: Positive = 512  # padding counted
    rate: float = 1e-4
    head_rate: float = 1e-3
    dropout: float = 0.2  # before the head
    smoothing: float = 0.05
    bfloat16: bool = True  # half-width arithmetic while tuning, where the processor has it
    seed: int = 0

    @property
    def changes(self) -> bool:
        """Whether anything is tuned at all."""
        return self.epochs > 0 and (self.adapter_rank > 0 or self.layers > 0)


@dataclass(frozen=True, slots=True)
class LabelledTurns:
    """A dialogue to learn from: its turns, and the index of each one's label or -1."""

    turns: tuple[Turn, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exam:
    """Dev dialogues of one corpus, and the figure by which they judge."""

    dialogues: Sequence[LabelledTurns]
    figure: Figure


@dataclass(frozen=True, slots=True)
class Lessons:
    """What an encoder learns from, and what picks the epoch: the mean of all exams' figures."""

    train: Callable[[int], Sequence[LabelledTurns]]  # an epoch's, the first being 1; always alike
    dev: Mapping[str, Exam]  # by corpus
    weights: tuple[float, ...] | None = None  # of the classes in the loss; None: all weigh the same


@dataclass(frozen=True)
class Tuned:
    """The encoder's tuned tensors in float16, as a bundle holds them and TextEncoder takes them."""

    tensors: dict[str, Tensor]
    dev_score: float
    epoch: int  # the one they are from; 0: untuned


@dataclass(frozen=True, slots=True)
class Piece:
    """Turns that are read at once in training, and what is learnt from them."""

    texts: tuple[str, ...]
    turns: tuple[Ids, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens, cls included."""
        return 1 + sum(map(len, self.turns))


def tune_encoder(
    encoder: TextEncoder,
    *,
    lessons: Lessons,
    classes: int,
    plan: TuningConfig,
    folder: Path | None = None,
    progress: Progress,
) -> Tuned:
    """Fit ``encoder`` to the lessons' labels; the epoch is picked on their dev figures' mean.

    A linear head on the feature is trained along and thrown away. ``encoder`` is changed, for
    good; ``folder`` is the trainer's, for checkpoints. Raises ValueError if ``encoder`` doesn't
    read with ``plan.context``.
    """
    if encoder.context != plan.context:
        raise ValueError(f"the encoder reads with {encoder.context}, the plan says {plan.context}")
    if not plan.changes:
        return Tuned({}, 0.0, 0)
    torch.manual_seed(plan.seed)
    _choose(encoder, plan)
    head = nn.Sequential(nn.Dropout(plan.dropout), nn.Linear(encoder.width, classes))
    head.to(encoder.model.device)
    weights = None if lessons.weights is None else torch.tensor(lessons.weights)
    history = fit(
        nn.ModuleDict({"encoder": encoder.model, "head": head}),
        loss=lambda pieces: _loss(encoder, head, pieces, smoothing=plan.smoothing, weights=weights),
        batches=lambda epoch: _batches(
            [_whole(encoder, known) for known in lessons.train(epoch)], plan=plan, epoch=epoch
        ),
        optimizer=lambda steps: _optimizer(encoder, head, plan=plan, steps=steps),
        score=lambda: _examine(
            encoder, head, lessons, classes=classes, half=plan.bfloat16, progress=progress
        ),
        plan=TrainerConfig(
            epochs=plan.epochs,
            patience=plan.patience,
            precision="bf16" if plan.bfloat16 else "32",
            accelerator="cpu" if encoder.model.device.type == "cpu" else "gpu",
            clip=LARGEST_GRADIENT,
        ),
        seed=plan.seed,
        folder=folder,
        progress=lambda line: progress(f"text encoder: {line}"),
    )
    return Tuned(_tuned_tensors(encoder), history.best_score, history.best_epoch)


def lessons_of(dialogues: Mapping[Split, Sequence[LabelledTurns]]) -> Lessons:
    """One corpus's: all of train in every epoch, judged by weighted F1 on dev."""
    exam = Exam(dialogues["dev"], lambda gold, said, classes: weighted_f1(gold, said))
    return Lessons(lambda epoch: dialogues["train"], {"dev": exam})


def top_layers(encoder: TextEncoder, *, count: int) -> dict[str, nn.Parameter]:
    """The parameters of the topmost ``count`` transformer layers, by name."""
    depth = int(encoder.model.config.num_hidden_layers)
    marks = tuple(f".layer.{n}." for n in range(depth - count, depth))
    return {n: p for n, p in encoder.model.named_parameters() if any(m in f".{n}" for m in marks)}


def cut(dialogue: Piece, *, tokens: int, draw: np.random.Generator) -> list[Piece]:
    """A whole dialogue in pieces for one epoch: one after another, none of them overlapping.

    The first is cut at a random length, so that an utterance's past differs between epochs. With
    ``tokens`` 0 every utterance is a piece. Pieces without any label are left out.
    """
    count, ends = len(dialogue.turns), [0]
    most = tokens if dialogue.length <= tokens else int(draw.integers(tokens // 4, tokens + 1))
    length = 1
    for n, turn in enumerate(dialogue.turns):
        if n > ends[-1] and length + len(turn) > most:
            ends.append(n)
            length, most = 1, tokens
        length += len(turn)
    pieces = (
        Piece(dialogue.texts[a:b], dialogue.turns[a:b], dialogue.labels[a:b])
        for a, b in zip(ends, [*ends[1:], count], strict=True)
    )
    return [piece for piece in pieces if any(label != UNLABELLED for label in piece.labels)]


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


def _batches(dialogues: Sequence[Piece], *, plan: TuningConfig, epoch: int) -> list[list[Piece]]:
    """An epoch's pieces, shuffled, in batches of about one length: padding costs time too."""
    draw = np.random.default_rng((plan.seed, epoch))
    tokens = plan.context.tokens
    pieces = [piece for whole in dialogues for piece in cut(whole, tokens=tokens, draw=draw)]
    lengths = [piece.length for piece in pieces]
    alike = max(2, tokens // 8)  # tokens; pieces nearer than that stay in random order
    order = sorted(draw.permutation(len(pieces)).tolist(), key=lambda n: lengths[n] // alike)
    batches = batches_of(lengths, order, tokens=plan.tokens_per_batch)
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


def _examine(
    encoder: TextEncoder,
    head: nn.Module,
    lessons: Lessons,
    *,
    classes: int,
    half: bool,
    progress: Progress,
) -> Measured:
    """The mean of all exams' figures as the score, and each corpus's."""
    figures = {
        corpus: _figure(encoder, head, exam, classes=classes, half=half)
        for corpus, exam in lessons.dev.items()
    }
    if len(figures) > 1:
        told = ", ".join(f"{corpus} {figure:.4f}" for corpus, figure in figures.items())
        progress(f"text encoder: dev {told}")
    return {"score": float(np.mean(list(figures.values()))), **figures}


def _figure(
    encoder: TextEncoder, head: nn.Module, exam: Exam, *, classes: int, half: bool
) -> float:
    """By the head on features as live use has them."""
    read = encoder.encode_dialogues([known.turns for known in exam.dialogues], half=half)
    features = np.concatenate(read)
    gold: Labels = np.array([n for known in exam.dialogues for n in known.labels], dtype=np.int64)
    with torch.inference_mode(), torch.autocast(encoder.model.device.type, enabled=False):
        logits = head(torch.from_numpy(features).to(encoder.model.device))
    said = logits.argmax(1).cpu().numpy()
    told = gold != UNLABELLED
    return exam.figure(gold[told], said[told], classes)
