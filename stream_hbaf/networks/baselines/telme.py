"""TelME: Yun et al., "TelME: Teacher-leading Multimodal Fusion Network for Emotion Recognition in
Conversation", NAACL 2024.

Kept: knowledge distillation with text as the teacher and audio as the student, of the responses
(in the form of DIST, Huang et al. 2022: Pearson's correlation between and within classes) and of
the features (similarities of the utterances of a batch); then the student shifts the teacher's
vector, the shift bounded by a share of its length (attention-based modality shifting).

Left out: vision; RoBERTa, data2vec and their fine-tuning before the features, instead of which each
modality has a layer of its own.

Changed: the original trains teacher, student and fusion one after the other; here they are trained
together, with no gradient from the distillation to the teacher. With one student, attention within
an utterance has one key only, so that it is its value, a linear map. The authors' code attends
across the utterances of a batch; here no utterance may depend on its batch.

Causal: each utterance is classified by itself; all context is in the text features. Letters as in
network.py; N utterances compared with one another, C classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.baselines.inputs import Inputs, Projected, require_live_mode
from stream_hbaf.networks.network import (
    Criterion,
    Features,
    Network,
    NetworkConfig,
    Output,
    Stateless,
)

SMALLEST_NORM = 1e-6


@dataclass(frozen=True, slots=True)
class TelmeConfig(NetworkConfig):
    """TelME's sizes, the weights of its losses, and its switches."""

    kind: Literal["telme"] = "telme"
    bound: float = 0.1  # θ: longest shift, as a share of the teacher's vector; the paper's for MELD
    temperature: float = 4.0  # τ of the responses, the paper's for MELD; that of the features is 1
    response_weight: float = 1.0  # α
    feature_weight: float = 1.0  # β
    use_shift: bool = True  # else teacher and student are joined by a linear map
    use_response: bool = True
    use_feature: bool = True

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        require_live_mode(self)


class Encoder(nn.Module):
    """A modality's own layers, instead of a fine-tuned encoder's last ones: [.., H] → [.., H]."""

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        self.first = nn.Linear(config.hidden, config.hidden)
        self.last = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.last(self.dropout(torch.relu(self.first(torch.relu(features)))))
        return result


class Shift(nn.Module):
    """Z = F_T + λ H: the teacher's vector, shifted by the student's; [.., H] twice → [.., H].

    g = ReLU(W₁ [F_T; F_s] + b₁), H = g ⊙ (W₂ F_s + b₂), λ = min(θ ‖F_T‖ / ‖H‖, 1), where F_s is
    the student's vector after attention, residual and norm. Z is normed as well.
    """

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.bound = config.bound
        self.value, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.attended, self.shifted = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.gate = nn.Linear(2 * hidden, hidden)  # W₁, b₁
        self.move = nn.Linear(hidden, hidden)  # W₂, b₂
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        attended = self.dropout(self.attended(student + self.out(self.value(student))))
        gate = torch.relu(self.gate(torch.cat([teacher, attended], dim=-1)))
        shift = gate * self.move(attended)
        longest = self.bound * teacher.norm(dim=-1, keepdim=True)
        length = shift.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        result: Tensor = self.shifted(teacher + (longest / length).clamp_max(1.0) * shift)
        return result


class Join(nn.Module):
    """W [F_T; F_s] instead of the shift, an ablation."""

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        self.both = nn.Linear(2 * config.hidden, config.hidden)

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        result: Tensor = self.both(torch.cat([teacher, student], dim=-1))
        return result


class Telme(Network[Stateless]):
    """The whole network; with one modality without teacher and shift."""

    config: TelmeConfig

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs = Inputs(config)
        self.encoders = nn.ModuleDict({m: Encoder(config) for m in config.modalities})
        self.fusion: nn.Module | None = None
        if len(config.modalities) == 2:
            self.fusion = Shift(config) if config.use_shift else Join(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden, config.classes)

    def forward(self, features: Features) -> Output:
        """As every network's; h_l is the teacher's vector, h_a the student's."""
        inputs: Projected = self.inputs(features)
        padding = inputs.padding
        h = {m: encoder(inputs.modality(m)) for m, encoder in self.encoders.items()}
        h_m = next(iter(h.values()))
        if self.fusion is not None:
            h_m = self.fusion(h["l"], h["a"])
        h = {m: states.masked_fill(padding, 0.0) for m, states in h.items()}
        h_m = h_m.masked_fill(padding, 0.0)
        logits = self.classifier(self.dropout(h_m)).masked_fill(padding, 0.0)
        return Output(logits, h.get("a"), h.get("l"), h_m)

    def step_streams(self, utterance: Features, state: Stateless) -> tuple[Tensor, Stateless]:
        """As every network's."""
        return self.forward(utterance).logits[:, 0], state

    def blank(self, streams: int) -> Stateless:
        """The empty state of S streams."""
        return Stateless(self.classifier.weight.new_zeros(streams, 0))

    def criterion(self) -> "TelmeLoss | None":
        """The losses of teacher and student, and of the distillation; None with one modality."""
        return None if self.fusion is None else TelmeLoss(self.config)


class TelmeLoss(Criterion):
    """Cross entropy of teacher and of student, plus α L_response and β L_feature.

    Each has a classifier of its own, which is not shipped. The teacher's side of both distillation
    losses is detached.
    """

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher = nn.Linear(config.hidden, config.classes)
        self.student = nn.Linear(config.hidden, config.classes)

    def forward(self, output: Output, mask: Tensor, labels: Tensor) -> Tensor:
        if output.h_a is None or output.h_l is None:
            raise ValueError("a network of one modality has no teacher; leave this loss out")
        h_l, h_a = output.h_l[mask], output.h_a[mask]
        by_text, by_audio = self.teacher(h_l), self.student(h_a)
        loss: Tensor = (by_text.sum() + by_audio.sum()) * 0.0
        labels = labels[mask]
        if bool((labels >= 0).any()):
            loss = loss + F.cross_entropy(by_text, labels, ignore_index=-1)
            loss = loss + F.cross_entropy(by_audio, labels, ignore_index=-1)
        if len(h_a) > 1 and self.config.use_response:
            response = response_loss(
                by_audio, by_text.detach(), temperature=self.config.temperature
            )
            loss = loss + self.config.response_weight * response
        if len(h_a) > 1 and self.config.use_feature:
            loss = loss + self.config.feature_weight * feature_loss(h_a, h_l.detach())
        return loss


def response_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """L_response: τ² (1 - ρ), summed over an utterance's classes and a class's utterances.

    [N, C] logits twice → []; ρ is Pearson's correlation of the probabilities at temperature τ.
    """
    p_student, p_teacher = (
        torch.softmax(logits / temperature, dim=1) for logits in (student, teacher)
    )
    between = 1 - _correlation(p_student, p_teacher).mean()
    within = 1 - _correlation(p_student.T, p_teacher.T).mean()
    return temperature**2 * (between + within)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = (rows - rows.mean(dim=1, keepdim=True) for rows in (x, y))
    return F.cosine_similarity(x, y, dim=1)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_feature: KL(P ‖ Q), the mean over utterances; [N, H] twice → [].

    Row i of P is the softmax of the cosines of the teacher's vector i with all of the teacher's,
    row i of Q of those with all of the student's.
    """
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    log_p = (teacher @ teacher.T).log_softmax(dim=1)
    log_q = (teacher @ student.T).log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
