"""TelME: Yun et al., "TelME: Teacher-leading Multimodal Fusion Network for Emotion Recognition in
Conversation", NAACL 2024.

Kept: the text is the teacher, the audio its student. The student is taught by the teacher's
responses (the form of DIST, Huang et al. 2022: Pearson's correlation between and within classes)
and by its features (how alike the utterances of a batch are); then the student shifts the
teacher's vector, the shift bounded by a share of its length (attention-based modality shifting).

Left out: vision; RoBERTa, data2vec and their fine-tuning before the features, in whose place each
modality has a layer of its own.

Changed: the original trains teacher, student and fusion one after the other; here all at once, but
what teaches is never moved by what it teaches. With one student an utterance by itself has nothing
to attend to but that student: attention is then its value, a linear map. The authors' code attends
across the utterances of a batch; here no utterance may depend on its batch.

Causal: each utterance is by itself; all context is in the text features. Letters as in state.py;
N utterances compared with one another, C classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.baselines.inputs import Inputs, require_live
from stream_hbaf.networks.network import Criterion, Network, NetworkConfig, Output
from stream_hbaf.networks.state import Features, Stateless

SMALLEST_NORM = 1e-6


@dataclass(frozen=True, slots=True)
class TelmeConfig(NetworkConfig):
    """TelME's sizes, the weights of its losses, and what can be left out."""

    kind: Literal["telme"] = "telme"
    bound: float = 0.1  # θ: longest shift, as a share of the teacher's vector; theirs for MELD
    temperature: float = 4.0  # τ of the responses, theirs for MELD; that of the features is 1
    response_weight: float = 1.0  # α
    feature_weight: float = 1.0  # β
    use_shift: bool = True  # else teacher and student are joined by a linear map
    use_response: bool = True
    use_feature: bool = True

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        require_live(self)


class Encoder(nn.Module):
    """In the place of a fine-tuned encoder's last layers: [.., H] → [.., H]."""

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        self.first = nn.Linear(config.hidden, config.hidden)
        self.last = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, given: Tensor) -> Tensor:
        result: Tensor = self.last(self.dropout(torch.relu(self.first(torch.relu(given)))))
        return result


class Shift(nn.Module):
    """Z = F_T + λ H: the teacher's vector, shifted by the student's; [.., H] twice → [.., H].

    g = ReLU(W₁ [F_T; F_s] + b₁), H = g ⊙ (W₂ F_s + b₂), λ = min(θ ‖F_T‖ / ‖H‖, 1), where F_s is
    the student's vector after attention, its own added and normed. Z is normed as well.
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
    """In the shift's place, an ablation: W [F_T; F_s]."""

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        self.both = nn.Linear(2 * config.hidden, config.hidden)

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        result: Tensor = self.both(torch.cat([teacher, student], dim=-1))
        return result


class Telme(Network[Stateless]):
    """The whole network. With one modality in use there is nobody to teach or to shift."""

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
        heard = self.inputs(features)
        padding = ~heard.mask[..., None]
        parts = {"a": heard.audio, "l": heard.text}
        told = {m: encoder(parts[m]) for m, encoder in self.encoders.items()}
        fused = next(iter(told.values()))
        if self.fusion is not None:
            fused = self.fusion(told["l"], told["a"])
        told = {m: part.masked_fill(padding, 0.0) for m, part in told.items()}
        fused = fused.masked_fill(padding, 0.0)
        logits = self.classifier(self.dropout(fused)).masked_fill(padding, 0.0)
        return Output(logits, told.get("a"), told.get("l"), fused)

    def step_streams(self, turn: Features, state: Stateless) -> tuple[Tensor, Stateless]:
        """As every network's."""
        return self.forward(turn).logits[:, 0], state

    def blank(self, streams: int) -> Stateless:
        """Nothing to remember, of each stream."""
        return Stateless(self.classifier.weight.new_zeros(streams, 0))

    def criterion(self) -> "TelmeLoss | None":
        """What teacher and student learn by themselves, and the student of the teacher."""
        return None if self.fusion is None else TelmeLoss(self.config)


class TelmeLoss(Criterion):
    """Cross entropy of teacher and of student, α L_response and β L_feature.

    Each has a classifier of its own, which is not shipped. What teaches is detached.
    """

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher = nn.Linear(config.hidden, config.classes)
        self.student = nn.Linear(config.hidden, config.classes)

    def forward(self, output: Output, mask: Tensor, labels: Tensor) -> Tensor:
        if output.h_a is None or output.h_l is None:
            raise ValueError("a network of one modality has no teacher; leave the criterion out")
        h_l, h_a = output.h_l[mask], output.h_a[mask]
        by_text, by_audio = self.teacher(h_l), self.student(h_a)
        loss: Tensor = (by_text.sum() + by_audio.sum()) * 0.0
        labels = labels[mask]
        if bool((labels >= 0).any()):
            loss = loss + F.cross_entropy(by_text, labels, ignore_index=-1)
            loss = loss + F.cross_entropy(by_audio, labels, ignore_index=-1)
        if len(h_a) > 1 and self.config.use_response:
            taught = response_loss(by_audio, by_text.detach(), temperature=self.config.temperature)
            loss = loss + self.config.response_weight * taught
        if len(h_a) > 1 and self.config.use_feature:
            loss = loss + self.config.feature_weight * feature_loss(h_a, h_l.detach())
        return loss


def response_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """L_response: τ² (1 - ρ) of an utterance's classes and of a class's utterances, the sum.

    [N, C] logits twice → []; ρ is Pearson's correlation of the probabilities softened by τ.
    """
    ours, theirs = (torch.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    between = 1 - _correlation(ours, theirs).mean()
    within = 1 - _correlation(ours.T, theirs.T).mean()
    return temperature**2 * (between + within)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = (rows - rows.mean(dim=1, keepdim=True) for rows in (x, y))
    return F.cosine_similarity(x, y, dim=1)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_feature: KL(P ‖ Q), the mean over utterances; [N, H] twice → [].

    Row i of P is how alike the teacher's vector i is to all of the teacher's, softmax of cosines;
    row i of Q, how alike it is to all of the student's.
    """
    ours, theirs = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    wanted, got = (theirs @ theirs.T).log_softmax(dim=1), (theirs @ ours.T).log_softmax(dim=1)
    return F.kl_div(got, wanted, reduction="batchmean", log_target=True)
