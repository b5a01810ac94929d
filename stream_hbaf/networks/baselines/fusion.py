"""M2FNet and TelME, which fuse speech and text, led by the text.

Letters as in network.py; h heads, N utterances compared with one another.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.baselines.layers import Inputs, Projected
from stream_hbaf.networks.network import (
    Criterion,
    Features,
    Mode,
    NetworkConfig,
    Output,
    WithoutState,
)

SMALLEST_NORM = 1e-6


@dataclass(frozen=True, slots=True)
class M2FNetConfig(NetworkConfig):
    """M2FNet's sizes and switches. ConfigError if they can't fit."""

    ONLY: ClassVar[Mode] = "offline"

    kind: Literal["m2fnet"] = "m2fnet"
    mode: Mode = "offline"
    heads: int = 8
    encoders: int = 2  # Transformer encoders of each modality, each with a skip connection
    layers: int = 1  # of each encoder
    fusions: int = 2  # layers of fusion attention
    use_encoders: bool = True
    use_skips: bool = True
    use_fusion: bool = True  # else the outputs of the encoders side by side

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by heads {self.heads}")


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) over the utterances of ``mask``."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads, self.drop = config.heads, config.dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor) -> Tensor:
        """[B, U, H] each, mask [B, U] → [B, U, H]."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, U, H/h]
            for part in (self.query(query), self.key(key), self.value(value))
        )
        drop, attn_mask = self.drop if self.training else 0.0, mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p=drop)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended


class EncoderLayer(nn.Module):
    """One layer of a Transformer encoder, norm after each sum."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.attention = Attention(config)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, 2 * hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * hidden, hidden),
        )
        self.attended, self.fed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attended(x + self.dropout(self.attention(x, x, x, mask=mask)))
        result: Tensor = self.fed(x + self.dropout(self.feed_forward(x)))
        return result


class Encoders(nn.Module):
    """One modality's context: X ← X + Encoder(X), for each encoder of the stack."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        self.skips = config.use_skips
        self.stack = nn.ModuleList(
            nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
            for _ in range(config.encoders if config.use_encoders else 0)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for encoder in self.stack:
            encoded = x
            for layer in encoder.children():
                encoded = layer(encoded, mask)
            x = x + encoded if self.skips else encoded
        return x


class FusionLayer(nn.Module):
    """T ← W [T; attention(query T, key A, value T)]: audio A weights the text T."""

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.join = nn.Linear(2 * config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, text: Tensor, audio: Tensor, mask: Tensor) -> Tensor:
        attended = self.attention(text, audio, text, mask=mask)
        joined = self.join(torch.relu(torch.cat([text, attended], dim=-1)))
        result: Tensor = self.dropout(torch.relu(joined))
        return result


class M2FNet(WithoutState):
    """M2FNet: Chudasama et al., "M2FNet: Multi-modal Fusion Network for Emotion Recognition in
    Conversation", CVPR Workshops 2022.

    Kept: for each modality a stack of Transformer encoders over the whole dialogue, each with a
    skip connection; stacked layers of multi-head attention in which audio weights the text; audio
    and fused text side by side are classified. With one modality there is no fusion.

    Left out: vision; RoBERTa and the audio network before the features, and with the latter its
    triplet loss with an adaptive margin.

    Not given by the paper, our choice: query, key and value in the fusion (text, audio and text, as
    in public re-implementations), no positional encoding (as there), widths and numbers of layers,
    a classifier of two layers.

    Not causal: every encoder sees the whole dialogue.
    """

    config: M2FNetConfig

    def __init__(self, config: M2FNetConfig) -> None:
        super().__init__(config)
        hidden, modalities = config.hidden, config.modalities
        fuses = config.use_fusion and len(modalities) == 2
        self.inputs = Inputs(config)
        self.encoders = nn.ModuleDict({m: Encoders(config) for m in modalities})
        self.fusion = nn.ModuleList(
            FusionLayer(config) for _ in range(config.fusions if fuses else 0)
        )
        self.classifier = nn.Sequential(
            nn.Linear(hidden * len(modalities), hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.classes),
        )

    def forward(self, features: Features) -> Output:
        inputs: Projected = self.inputs(features)
        # An empty dialogue attends to its first slot: a softmax over nothing would be NaN.
        mask = inputs.mask.clone()
        mask[:, 0] = True
        h = {m: encoders(inputs.modality(m), mask) for m, encoders in self.encoders.items()}
        for layer in self.fusion:
            h["l"] = layer(h["l"], h["a"], mask)
        h_m = torch.cat(list(h.values()), dim=-1)
        return inputs.output(self.classifier(h_m), h, h_m)


@dataclass(frozen=True, slots=True)
class TelmeConfig(NetworkConfig):
    """TelME's sizes, the weights of its losses, and its switches."""

    ONLY: ClassVar[Mode] = "live"

    kind: Literal["telme"] = "telme"
    bound: float = 0.1  # θ: longest shift, as a share of the teacher's vector; the paper's for MELD
    temperature: float = 4.0  # τ of the responses, the paper's for MELD; that of the features is 1
    response_weight: float = 1.0  # α
    feature_weight: float = 1.0  # β
    use_shift: bool = True  # else teacher and student are joined by a linear map
    use_response: bool = True
    use_feature: bool = True


class TelmeEncoder(nn.Module):
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


class Telme(WithoutState):
    """TelME: Yun et al., "TelME: Teacher-leading Multimodal Fusion Network for Emotion Recognition
    in Conversation", NAACL 2024.

    Kept: knowledge distillation with text as the teacher and audio as the student, of the responses
    (in the form of DIST, Huang et al. 2022: Pearson's correlation between and within classes) and
    of the features (similarities of the utterances of a batch); then the student shifts the
    teacher's vector, the shift bounded by a share of its length (attention-based modality
    shifting). With one modality there is neither teacher nor shift.

    Left out: vision; RoBERTa, data2vec and their fine-tuning before the features, instead of which
    each modality has a layer of its own.

    Changed: the original trains teacher, student and fusion one after the other; here they are
    trained together, with no gradient from the distillation to the teacher. With one student,
    attention within an utterance has one key only, so that it is its value, a linear map. The
    authors' code attends across the utterances of a batch; here no utterance may depend on its
    batch.

    Causal: each utterance is classified by itself; all context is in the text features.
    """

    config: TelmeConfig

    def __init__(self, config: TelmeConfig) -> None:
        super().__init__(config)
        self.inputs = Inputs(config)
        self.encoders = nn.ModuleDict({m: TelmeEncoder(config) for m in config.modalities})
        self.fusion: nn.Module | None = None
        if len(config.modalities) == 2:
            self.fusion = Shift(config) if config.use_shift else Join(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden, config.classes)

    def forward(self, features: Features) -> Output:
        """As every network's; h_l is the teacher's vector, h_a the student's."""
        inputs: Projected = self.inputs(features)
        h = {m: encoder(inputs.modality(m)) for m, encoder in self.encoders.items()}
        h_m = next(iter(h.values())) if self.fusion is None else self.fusion(h["l"], h["a"])
        return inputs.output(self.classifier(self.dropout(h_m)), h, h_m)

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
            for logits in (by_text, by_audio):
                loss = loss + F.cross_entropy(logits, labels, ignore_index=-1)
        config, several = self.config, len(h_a) > 1
        if several and config.use_response:
            response = response_loss(by_audio, by_text.detach(), temperature=config.temperature)
            loss = loss + config.response_weight * response
        if several and config.use_feature:
            loss = loss + config.feature_weight * feature_loss(h_a, h_l.detach())
        return loss


def response_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """L_response: τ² (1 - ρ), summed over an utterance's classes and a class's utterances.

    [N, C] logits twice → []; ρ is Pearson's correlation of the probabilities at temperature τ.
    """
    p_student, p_teacher = ((one / temperature).softmax(dim=1) for one in (student, teacher))
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
