"""HBAF: Luo, Phan, Wang, Reiss, "Heterogeneous bimodal attention fusion for speech emotion
recognition", sections 3.1 to 3.5, in the paper's order.

| section | equations | here |
| --- | --- | --- |
| 3.1.1 audio context network | – | ``AudioContextNetwork`` |
| | – | ``SpeakerBaseline``, not in the paper |
| 3.1.2 textual context network | 1-3 | ``SoftAttention``, ``QueryAttention`` |
| | 4-6 | ``TextContextNetwork``: ``external``, ``internal``, ``purpose`` |
| 3.2.1 bimodal attention network | 7-9 | ``BimodalAttention`` |
| 3.2.2 dynamic filter gate | 10-13 | ``DynamicFilterGate`` |
| 3.2.3 residual connection | 14-17 | ``Residual`` |
| 3.3 inter-modal contrastive learning | 18-19 | ``absolute_inter_modal_loss`` |
| | 20 | ``relative_inter_modal_loss`` |
| | 21 | ``inter_modal_loss``, ``InterModalLoss`` |
| 3.4 emotion classification | 22 | ``Classifier`` |
| 3.5 training | 23 | ``total_loss`` |

Letters: a audio, l text (language), m either or both; H_a, H_l uni-modal representations, h_a, h_l
those after fusion, h_m = [h_a; h_l]. In shapes: B dialogues, U utterances, S streams, P places of
a sequence with its padding, N windows of n utterances, the last of which (offline all of which)
are its Q targets, W the longest window, H hidden, A, L, K the widths of audio, text and
commonsense features, C classes.

The paper's protocol is offline; ``live`` is its causal form. No code of the authors is known; where
the paper can't be read literally, a docstring names the departure and its reason, and the nearest
relative, COSMIC (Ghosal et al. 2020), decides. Padding and windows are in windows.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.network import (
    LIMITS,
    PARTIES,
    Criterion,
    Features,
    NetworkConfig,
    Output,
    Recurrent,
    Standardise,
    State,
    masked_softmax,
)
from stream_hbaf.networks.stacked import Linears, for_rows
from stream_hbaf.networks.windows import ByModality, Sequences, Windows, find_equal, joined

Attention = Literal["scalar", "literal", "query", "speakers"]
ATTENTIONS = get_args(Attention)
WITH_QUERY = ("query", "speakers")  # whose past must be kept
RELATIONS = ("external", "internal", "purpose")  # COMET's oReact, xReact, xIntent
OF_THE_SPEAKER = ("internal", "purpose")  # with ``by_speaker``


@dataclass(frozen=True, slots=True)
class HbafConfig(NetworkConfig):
    """HBAF's sizes (the paper's section 4.3 by default) and every switch of its ablations.

    Raises ConfigError if they can't fit.
    """

    kind: Literal["hbaf"] = "hbaf"
    filters: int = 64
    heads: int = 8
    layers: int = 3  # of the Transformer encoder
    window: int = 8  # W, utterances, the current one included; of no meaning offline
    attention: Attention = "scalar"  # over past utterances, eqs 1-3
    memory: int | None = None  # past utterances that "query" and "speakers" attend to; None: W - 1
    by_speaker: bool = False  # internal and purpose states of each speaker, not of the dialogue
    text_skip: bool = False  # a linear map of the utterance itself added to H_l
    audio_baseline: bool = False  # beside the audio how it differs from the speaker's earlier audio
    standardise_text: bool = True  # text features, by the training set's mean and deviation
    use_audio_context: bool = True  # else a linear map in the audio context network's place
    audio_skip: bool = False  # a linear map added to the audio context network
    use_bimodal_attention: bool = True
    use_gate: bool = True
    use_residual: bool = True
    literal_cross: bool = False  # eqs 8-9 into eqs 11 and 13 as printed

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        if self.hidden % 2 or self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2 and by heads")
        if self.window < 1:
            raise ConfigError(f"network: window {self.window} must be at least 1 utterance")
        if self.attention not in ATTENTIONS:
            raise ConfigError(
                f"network: attention '{self.attention}' must be one of {', '.join(ATTENTIONS)}"
            )
        most = LIMITS["memory"][1]
        if self.memory is not None and not 0 <= self.memory <= most:
            raise ConfigError(
                f"network: memory {self.memory} must be 0 or more utterances, at most {most}"
            )

    @property
    def audio_input(self) -> int:
        """The width of what section 3.1.1 is given of an utterance's audio."""
        return self.audio_width * (2 if self.audio_baseline else 1)

    @property
    def reach(self) -> int:
        """How many past utterances an attention with a query sees live."""
        return self.window - 1 if self.memory is None else self.memory


@dataclass(frozen=True, slots=True, eq=False)
class DialogueState(State):
    """All that HBAF carries from one utterance to the next, of a size that doesn't grow.

    The size depends on the window W, not on how many utterances there were. Windows end with the
    newest utterance; unused slots come first. A field that a configuration doesn't use has
    width 0.
    """

    OWN: ClassVar[int] = 2

    audio_window: Tensor  # [.., W-1, A] audio features, absent ones replaced; 2A with a baseline
    text_window: Tensor  # [.., W-1, H] text representations H_l
    window_mask: Tensor  # [.., W-1]
    score_max: Tensor  # [.., E] soft attention: largest score so far; E = 1, or H if literal
    score_sum: Tensor  # [.., E] sum of exp(score - score_max)
    weighted_sum: Tensor  # [.., H] sum of exp(score - score_max) * l
    past_window: Tensor  # [.., M, H] attention with a query only: the past utterances l themselves
    past_mask: Tensor  # [.., M] False where an utterance had no text
    past_speaker: Tensor  # [.., M] int64, whose they were
    external: Tensor  # [.., H] GRU states
    internal: Tensor  # [.., H], or by speaker [.., PARTIES, H]
    purpose: Tensor  # likewise
    audio_count: Tensor  # [.., PARTIES] of each speaker's utterances with audio; width 0 if unused
    audio_sums: Tensor  # [.., PARTIES, 2A] sums of their features and of the squares


@dataclass(frozen=True, slots=True)
class TrainingOutput(Output):
    """What HBAF gives while it is trained: also H_a and H_l of section 3.1, before the fusion."""

    H_a: Tensor | None = None  # [B, U, H]
    H_l: Tensor | None = None  # [B, U, H]


# --- 3.1.1 Audio features extraction and context network ------------------------------------------


class SpeakerBaseline(nn.Module):
    """Audio features a [S, U, A] → [S, U, 2A]: beside a, (a - mean) / deviation of its speaker.

    Not in the paper. Mean and deviation are of the speaker's earlier utterances in the dialogue,
    begun as if one utterance had been heard whose features were those of the training set, mean 0
    and deviation 1. Zero for an utterance without audio, which doesn't count either.
    """

    PRIOR = 1.0  # utterances' worth of the training set
    LEAST_VARIANCE = 0.1  # of two or three alike

    def forward(
        self, audio: Tensor, present: Tensor, speaker: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        own = F.one_hot(speaker, PARTIES).to(audio.dtype) * present[..., None]  # [S, U, PARTIES]
        terms = torch.cat([audio, audio**2], dim=-1)  # [S, U, 2A]
        # Each speaker's count and sums after each utterance, the earlier part's at the front.
        counts = (own.cumsum(1) + state.audio_count[:, None])[..., None]  # [S, U, PARTIES, 1]
        sums = (own[..., None] * terms[:, :, None]).cumsum(1) + state.audio_sums[:, None]
        chosen = speaker[..., None, None]
        count = torch.take_along_dim(counts, chosen, dim=2)[:, :, 0] - present[..., None].float()
        total = torch.take_along_dim(sums, chosen, dim=2)[:, :, 0] - terms * present[..., None]
        first, second = (total / (count + self.PRIOR)).chunk(2, dim=-1)
        variance = second + self.PRIOR / (count + self.PRIOR) - first**2
        relative = (audio - first) / variance.clamp_min(self.LEAST_VARIANCE).sqrt()
        state = replace(state, audio_count=counts[:, -1, :, 0], audio_sums=sums[:, -1])
        return torch.cat([audio, relative * present[..., None]], dim=-1), state


class AudioContextNetwork(nn.Module):
    """Section 3.1.1: audio features a [N, n, A] → H_a [N, n, H].

    Convolution (kernel 3, 64 filters) → two BiLSTM layers (H/2 units a direction) → three
    Transformer encoder layers (8 heads, width H). Departure: the "entire audio sequence" is the
    sequence of a dialogue's utterances, one vector each, since an utterance has one vector of
    functionals. Not given by the paper: ReLU after the convolution, feed-forward width H; no
    positional encoding, since the LSTM carries the order. ``audio_skip`` adds a linear map of the
    input, an ablation.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.convolution = nn.Conv1d(config.audio_input, config.filters, kernel_size=3, padding=1)
        self.lstm = nn.LSTM(
            config.filters,
            hidden // 2,
            num_layers=2,
            bidirectional=True,
            dropout=config.dropout,
            batch_first=True,
        )
        self.transformer = TransformerEncoder(config)
        self.skip = nn.Linear(config.audio_input, hidden) if config.audio_skip else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, audio: Tensor) -> Tensor:
        local = torch.relu(self.convolution(audio.transpose(1, 2))).transpose(1, 2)
        ordered, _ = self.lstm(self.dropout(local))
        H_a: Tensor = self.transformer(ordered)
        return H_a if self.skip is None else H_a + self.skip(audio)


class TransformerEncoder(nn.Module):
    """Vaswani et al. 2017, norm after each sum as there: [N, n, H] → [N, n, H]."""

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, sequence: Tensor) -> Tensor:
        for layer in self.layers:
            sequence = layer(sequence)
        return sequence


class SelfAttention(nn.MultiheadAttention):
    """Torch's own, of which ``EncoderLayer`` takes the weights."""

    def project_in(self, sequence: Tensor) -> Tensor:
        """[N, n, H] → queries, keys and values side by side, [N, n, 3H]."""
        return F.linear(sequence, self.in_proj_weight, self.in_proj_bias)


class EncoderLayer(nn.Module):
    """One layer, with the weights and the results of ``nn.TransformerEncoderLayer``.

    Written out, because a window of 8 utterances costs torch's own more in copies and calls than
    in products.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.self_attn = SelfAttention(hidden, config.heads, batch_first=True)
        self.linear1 = nn.Linear(hidden, hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, sequence: Tensor) -> Tensor:
        attended = self.norm1(sequence + self.dropout(self._attend(sequence)))
        fed = self.linear2(self.dropout(torch.relu(self.linear1(attended))))
        result: Tensor = self.norm2(attended + self.dropout(fed))
        return result

    def _attend(self, sequence: Tensor) -> Tensor:
        weights = self.self_attn
        heads = weights.project_in(sequence).view(
            *sequence.shape[:2], 3, weights.num_heads, weights.head_dim
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, n, H/heads]
        scores = query @ key.transpose(2, 3) / weights.head_dim**0.5
        mixed = self.dropout(torch.softmax(scores, dim=-1)) @ value
        attended: Tensor = weights.out_proj(mixed.transpose(1, 2).flatten(2))
        return attended


# --- 3.1.2 Textual features extraction and context network ----------------------------------------


class SoftAttention(nn.Module):
    """Equations 1-3: utterances l [S, U, H] → l^c [S, U, H], the context of each from its past.

    u_i = tanh(W_s l_i + b_s) (1), α_i = softmax over the past of the score of u_i (2),
    l_t^c = Σ α_i l_i for i < t (3). W_s and b_s are ``project``. Departure: "scalar" scores wᵀ u_i
    (w is ``score``), since eq 2 would take the softmax of a vector; "literal" takes it, for each
    dimension by itself. Utterances without text don't take part; an empty sum, also that of the
    first utterance, is zero, as in COSMIC.

    Neither score depends on t, so the sums of eqs 2-3 are carried from block to block, and from
    step to step. That is exact for any length, because numerator and denominator are kept relative
    to the largest score so far.
    """

    BLOCK = 32  # utterances in one softmax: its table grows with their square

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.project = nn.Linear(hidden, hidden)  # W_s, b_s
        scalar = config.attention == "scalar"
        self.score = nn.Linear(hidden, 1, bias=False) if scalar else nn.Identity()  # w

    def forward(
        self,
        utterances: Tensor,
        text_mask: Tensor,
        state: DialogueState,
        *,
        speaker: Tensor | None = None,  # of no meaning here
    ) -> tuple[Tensor, DialogueState]:
        scores = self.score(torch.tanh(self.project(utterances)))  # [S, U, E]
        scores = scores.masked_fill(~text_mask[..., None], -torch.inf)
        contexts = []
        for start in range(0, utterances.shape[1], self.BLOCK):
            block = slice(start, start + self.BLOCK)
            contexts.append(self._of_past(utterances[:, block], scores[:, block], state))
            state = self._carry(utterances[:, block], scores[:, block], state)
        return torch.cat(contexts, dim=1), state

    @staticmethod
    def _of_past(utterances: Tensor, scores: Tensor, state: DialogueState) -> Tensor:
        """Equations 2-3 of a block [S, u, H]; all that was carried is one utterance before it."""
        # A sum that isn't empty is at least 1: the largest score adds exp(0).
        total = state.score_sum.clamp_min(1.0)
        scores = torch.cat([(state.score_max + total.log())[:, None], scores[:, :-1]], dim=1)
        values = torch.cat([(state.weighted_sum / total)[:, None], utterances[:, :-1]], dim=1)
        size = utterances.shape[1]
        past = torch.ones(size, size, dtype=torch.bool, device=scores.device).tril()
        included = past[:, :, None] & scores.isfinite()[:, None]  # [S, t, i, E]
        weights = masked_softmax(scores[:, None], included, dim=2)
        if weights.shape[-1] == 1:
            return weights[..., 0] @ values
        return (weights * values[:, None]).sum(dim=2)

    @staticmethod
    def _carry(utterances: Tensor, scores: Tensor, state: DialogueState) -> DialogueState:
        """The state with a block's terms added to the sums of eqs 2-3."""
        # The largest score cancels out of eq 3, so no gradient runs through it.
        largest = torch.maximum(state.score_max, scores.amax(dim=1)).detach()
        finite = largest.clamp_min(torch.finfo(largest.dtype).min)  # -inf before the first text
        decay, weights = torch.exp(state.score_max - finite), torch.exp(scores - finite[:, None])
        return replace(
            state,
            score_max=largest,
            score_sum=state.score_sum * decay + weights.sum(dim=1),
            weighted_sum=state.weighted_sum * decay + (weights * utterances).sum(dim=1),
        )


class QueryAttention(nn.Module):
    """Equations 1-3 with a query: score (W_q l_t)ᵀ tanh(W_s l_i + b_s); shapes as SoftAttention.

    Departure: the current utterance stands in for the fixed vector w, so that the score depends
    on t and the past must be kept: live the last M utterances, offline all of them. "speakers",
    not in the paper: one such context of the speaker's own past and one of the others', each with
    a query of its own, as in CMN (Hazarika et al. 2018); l_t^c is a linear map of both.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.project = nn.Linear(hidden, hidden)  # W_s, b_s
        self.query = nn.Linear(hidden, hidden, bias=False)  # W_q
        self.apart = config.attention == "speakers"
        if self.apart:
            self.query_others = nn.Linear(hidden, hidden, bias=False)
            self.join = nn.Linear(2 * hidden, hidden)
        self.reach = config.reach if config.mode == "live" else None

    def forward(
        self,
        utterances: Tensor,
        text_mask: Tensor,
        state: DialogueState,
        *,
        speaker: Tensor | None = None,  # [S, U] int64; None: one speaker
    ) -> tuple[Tensor, DialogueState]:
        speaker = torch.zeros_like(text_mask, dtype=torch.long) if speaker is None else speaker
        kept = state.past_window.shape[1]
        past = torch.cat([state.past_window, utterances], dim=1)  # [S, i, H]
        mask = torch.cat([state.past_mask, text_mask], dim=1)
        whose = torch.cat([state.past_speaker, speaker], dim=1)
        keys = torch.tanh(self.project(past)).transpose(1, 2)
        before = mask.new_ones(utterances.shape[1], past.shape[1]).tril(kept - 1)  # [t, i]
        if self.reach is not None:
            before = before.triu(kept - self.reach)
        included = before & mask[:, None]  # [S, t, i]
        if self.apart:
            own = whose[:, None] == speaker[..., None]
            contexts = self.join(
                torch.cat(
                    [
                        masked_softmax(query(utterances) @ keys, included & of) @ past
                        for query, of in ((self.query, own), (self.query_others, ~own))
                    ],
                    dim=-1,
                )
            )
        else:
            contexts = masked_softmax(self.query(utterances) @ keys, included) @ past
        surplus = 0 if self.reach is None else past.shape[1] - self.reach
        return contexts, replace(
            state,
            past_window=past[:, surplus:],
            past_mask=mask[:, surplus:],
            past_speaker=whose[:, surplus:],
        )


class TextContextNetwork(nn.Module):
    """Section 3.1.2: text l^r [S, U, L] and commonsense [S, U, 3, K] → H_l [S, U, H].

    Equations 4-6: l_t^e = GRU_e(l_{t-1}^e, x^e), and so GRU_i and GRU_p, are ``external``,
    ``internal`` and ``purpose``; H_l is their states side by side. It uses the current and past
    utterances only, in both modes.

    Departures: the input x of each GRU is a linear map (``combine``) of [current utterance l_t;
    context l_t^c; its commonsense relation], since l_t^c alone contains nothing of the utterance
    that is classified; the paper's l^e, l^i and l^p name both relations and states, here the
    relations are inputs and the states start at zero, as in COSMIC; the three states are mapped
    3H → H by ``reduce``, since eq 7 needs one width. An utterance without text is a learned vector
    with no commonsense. ``by_speaker``, not in the paper: the states of what a speaker feels and
    wants belong to that speaker, as in COSMIC, and that of what others feel to the dialogue.
    ``text_skip``, not in the paper either: a linear map of l_t^r is added to H_l, so that the
    current utterance reaches the fusion past the GRUs.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.relation_width = config.commonsense_width if config.use_commonsense else 0
        self.standardise = Standardise(config.text_width)
        self.project = nn.Linear(config.text_width, hidden)
        self.absent = nn.Parameter(torch.zeros(hidden))
        query = config.attention in WITH_QUERY
        self.attention = QueryAttention(config) if query else SoftAttention(config)
        combined = 2 * hidden + self.relation_width
        self.combine = nn.ModuleDict({name: nn.Linear(combined, hidden) for name in RELATIONS})
        self.external = nn.GRU(hidden, hidden, batch_first=True)  # eq 4
        self.internal = nn.GRU(hidden, hidden, batch_first=True)  # eq 5
        self.purpose = nn.GRU(hidden, hidden, batch_first=True)  # eq 6
        self.reduce = nn.Linear(3 * hidden, hidden)
        self.skip = nn.Linear(config.text_width, hidden) if config.text_skip else None
        self.dropout = nn.Dropout(config.dropout)
        self.by_speaker = config.by_speaker

    def forward(
        self, features: Features, mask: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        """H_l of U more utterances after ``state``, and the state after them."""
        dialogues = Sequences.of_dialogues(mask)  # only V utterances that exist are multiplied
        text_mask = features.given("l", mask)
        speaker = features.parties(mask)
        present = dialogues.pack(text_mask)[:, None]
        l_r = self._features(features, present, dialogues)
        l = torch.where(present, self.project(l_r), for_rows(self.absent, len(l_r)))
        l = self.dropout(dialogues.pad(l))
        l_c, state = self.attention(l, text_mask, state, speaker=speaker)  # eqs 1-3
        current = torch.cat([dialogues.pack(l), dialogues.pack(l_c)], dim=-1)
        relations = self._relations(features, text_mask, dialogues, like=current)
        x = {
            name: self.combine[name](torch.cat([current, relations[:, k]], dim=-1))
            for k, name in enumerate(RELATIONS)
        }
        states, state = self._states(x, dialogues, speaker, state)  # eqs 4-6
        joined = torch.cat([states[name] for name in RELATIONS], dim=-1)
        H_l = self.reduce(self.dropout(joined))
        if self.skip is not None:
            H_l = H_l + self.skip(self.dropout(l_r))
        return dialogues.pad(H_l), state

    def _states(
        self, x: ByModality, dialogues: Sequences, speaker: Tensor, state: DialogueState
    ) -> tuple[dict[str, Tensor], DialogueState]:
        """Equations 4-6: inputs [V, H] → states [V, H] by relation, and the state after them."""
        of_speaker = OF_THE_SPEAKER if self.by_speaker else ()
        names = [name for name in RELATIONS if name not in of_speaker]
        states, last = dialogues.run(
            [self.gru(name) for name in names],
            [x[name] for name in names],
            [getattr(state, name) for name in names],
        )
        after = dict(zip(names, states, strict=True))
        state = replace(state, **dict(zip(names, last, strict=True)))
        if not of_speaker:
            return after, state
        turns, used = dialogues.by_speaker(speaker)
        states, last = turns.run(
            [self.gru(name) for name in of_speaker],
            [x[name] for name in of_speaker],
            [getattr(state, name).flatten(0, 1)[used] for name in of_speaker],
        )
        kept = {}
        for name, end in zip(of_speaker, last, strict=True):
            before = getattr(state, name)  # [S, PARTIES, H]
            kept[name] = before.flatten(0, 1).index_copy(0, used, end).view_as(before)
        return after | dict(zip(of_speaker, states, strict=True)), replace(state, **kept)

    def gru(self, relation: str) -> nn.GRU:
        """GRU_e, GRU_i or GRU_p of equations 4-6."""
        found: nn.GRU = getattr(self, relation)
        return found

    def _features(self, features: Features, present: Tensor, dialogues: Sequences) -> Tensor:
        """l^r [V, L], standardised; zero where there is no text."""
        if features.text is None:
            return self.project.weight.new_zeros(len(present), self.project.in_features)
        l_r: Tensor = self.standardise(dialogues.pack(features.text))
        return l_r.masked_fill(~present, 0.0)

    def _relations(
        self, features: Features, text_mask: Tensor, dialogues: Sequences, *, like: Tensor
    ) -> Tensor:
        """[V, 3, K], zero where there is no text; K is 0 without commonsense."""
        if self.relation_width and features.commonsense is not None:
            present = dialogues.pack(text_mask)[:, None, None]
            return dialogues.pack(features.commonsense).masked_fill(~present, 0.0)
        return like.new_zeros(len(like), len(RELATIONS), self.relation_width)


# --- 3.2 Multi-modal fusion module ----------------------------------------------------------------


class Projection(nn.Linear):
    """W_q, W_k or W_v of equations 7-9: without bias."""

    def __init__(self, width: int, into: int) -> None:
        super().__init__(width, into, bias=False)

    def unproject(self, rows: Tensor) -> Tensor:
        """rows W instead of rows Wᵀ."""
        return rows @ self.weight


class BimodalAttention(nn.Module):
    """Section 3.2.1: targets [N, Q, H] and their window H_m [N, n, H] → both kinds of ζ [N, Q, H].

    Own, of each modality m: ζH_m = softmax(Q_m K_mᵀ/√d) V_m (7). Cross: for audio
    ζH_{a-l} = softmax(Q_a K_lᵀ/√d) V_l (8), for text ζH_{l-a} = softmax(Q_l K_aᵀ/√d) V_a (9).
    Projections have no bias. Departure: eqs 10-13 as printed use the two the other way round, so
    that audio would receive audio values only, while the text weighs each modality's own against
    the other's information; ``literal_cross`` is the printed form.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()

        def projections() -> nn.ModuleDict:
            hidden = config.hidden
            return nn.ModuleDict({m: Projection(hidden, hidden) for m in config.modalities})

        self.query, self.key, self.value = projections(), projections(), projections()
        self.literal_cross = config.literal_cross

    def forward(self, targets: ByModality, window: ByModality) -> tuple[ByModality, ByModality]:
        Q = {m: self.query[m](targets[m]) for m in targets}
        own = {m: self._attend(Q[m], window, m) for m in targets}  # eq 7
        if len(targets) < 2:
            return own, {}
        a_l = self._attend(Q["a"], window, "l")  # eq 8
        l_a = self._attend(Q["l"], window, "a")  # eq 9
        return own, {"a": l_a, "l": a_l} if self.literal_cross else {"a": a_l, "l": l_a}

    def _attend(self, Q: Tensor, window: ByModality, m: str) -> Tensor:
        """softmax(Q Kᵀ/√d) V with K = H_m W_kᵀ, V = H_m W_vᵀ, as softmax((Q W_k) H_mᵀ/√d) H_m W_vᵀ.

        The same products in another order: W_k and W_v meet one target, not a window's n.
        """
        attended: Tensor = self.value[m](self.weights(Q, window, m) @ window[m])
        return attended

    def weights(self, Q: Tensor, window: ByModality, m: str) -> Tensor:
        """softmax(Q Kᵀ/√d), of queries [N, Q, H] over the window's utterances: [N, Q, n]."""
        key = self.key[m]
        assert isinstance(key, Projection | Linears)
        scores = key.unproject(Q) @ window[m].transpose(1, 2)
        return torch.softmax(scores / Q.shape[-1] ** 0.5, dim=-1)


class DynamicFilterGate(nn.Module):
    """Section 3.2.2, of one modality: own ζH and cross ζH, [.., H] each → H_m* [.., H].

    G = sigmoid(own W_s + cross W_c + b) (10, 12), H_m* = G ⊙ own + (1 - G) ⊙ cross (11, 13).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.own = nn.Linear(hidden, hidden)  # W_sa, b_a or W_sl, b_l
        self.cross = nn.Linear(hidden, hidden, bias=False)  # W_ca or W_cl

    def forward(self, own: Tensor, cross: Tensor) -> Tensor:
        G = self.gate(own, cross)
        return G * own + (1 - G) * cross

    def gate(self, own: Tensor, cross: Tensor) -> Tensor:
        """G [.., H], the share of a modality's own."""
        return torch.sigmoid(self.own(own) + self.cross(cross))


class Residual(nn.Module):
    """Section 3.2.3, of one modality: H_m and H_m* [.., H] → h_m [.., H].

    H^LN = LayerNorm(H_m ⊕ H_m*) (14, 16), h_m = AddNorm(H^LN ⊕ FeedForward(H^LN)) (15, 17).
    Departure: ⊕, called concatenation, is the addition of a residual connection, since all widths
    are H, and AddNorm adds once. Not given by the paper: feed-forward width H.
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden)
        )
        self.add_norm = nn.LayerNorm(hidden)

    def forward(self, before: Tensor, refined: Tensor) -> Tensor:
        H_LN = self.norm(before + refined)
        result: Tensor = self.add_norm(H_LN + self.feed_forward(H_LN))
        return result


class Fusion(nn.Module):
    """Section 3.2: H_a and H_l of windows → h_a and h_l of their targets.

    Each part can be switched off. Without the gate both parts weigh the same (G = 1/2). Without
    the attention, or with one modality, there is no cross-modal information to gate:
    H_m* = ζH_m, or H_m itself. Without all three, h_m is [H_a; H_l].
    """

    side_by_side = 1  # members of an ensemble, once they are stacked

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden, modalities = config.hidden, config.modalities
        crosses = config.use_bimodal_attention and len(modalities) == 2
        gated = modalities if config.use_gate and crosses else ()
        kept = modalities if config.use_residual else ()
        self.attention = BimodalAttention(config) if config.use_bimodal_attention else None
        self.gate = nn.ModuleDict({m: DynamicFilterGate(hidden) for m in gated})
        self.residual = nn.ModuleDict({m: Residual(hidden, config.dropout) for m in kept})

    def forward(self, groups: Sequence[tuple[ByModality, ByModality]]) -> ByModality:
        """Groups of (targets [N, Q, H], window [N, n, H]), each of its own N and n → [ΣNQ, H].

        Only the attention looks at windows; what follows takes the targets of all at once.
        """
        before = self._joined([targets for targets, _ in groups])
        refined = before
        if self.attention is not None:
            spread = [self.attention(targets, window) for targets, window in groups]
            own, cross = (self._joined([part[k] for part in spread]) for k in (0, 1))
            refined = self._weigh(own, cross)
        if not self.residual:
            return refined
        return {m: self.residual[m](before[m], refined[m]) for m in before}

    def _weigh(self, own: ByModality, cross: ByModality) -> ByModality:
        if not cross:
            return own
        if not self.gate:
            return {m: (own[m] + cross[m]) / 2 for m in own}
        return {m: self.gate[m](own[m], cross[m]) for m in own}

    def _joined(self, groups: Sequence[ByModality]) -> ByModality:
        return joined_targets(groups, members=self.side_by_side)


def joined_targets(groups: Sequence[ByModality], *, members: int = 1) -> ByModality:
    """Groups of [N, Q, H] by modality → [ΣNQ, H]."""
    return {
        m: joined([group[m].flatten(0, 1) for group in groups], members=members) for m in groups[0]
    }


# --- 3.3 Inter-modal contrastive learning module --------------------------------------------------


def contrast(anchor: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """-log of the positive pair's share, mean over N and over both directions: [N, H] twice → [].

    The common form of equations 18-20, ⟨·⟩ the cosine, τ ``temperature``, over the N valid
    utterances of a batch. Departure: the paper draws K negatives and prints 2K pairs in one place,
    K - 1 in another. Here every other utterance of the batch is a negative, in both directions, and
    the positive is counted once; the printed readings are this up to a constant.
    Zero for N = 0, so that a batch without pairs can be trained on.
    """
    if len(anchor) == 0:
        return (anchor.sum() + other.sum()) * 0.0
    similarity = (F.normalize(anchor, dim=-1) / temperature) @ F.normalize(other, dim=-1).T
    among_others, among_anchors = similarity.logsumexp(dim=1), similarity.logsumexp(dim=0)
    return ((among_others + among_anchors) / 2 - similarity.diagonal()).mean()


def absolute_inter_modal_loss(
    unimodal: Tensor, bimodal: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """L_{a,m} (18, unimodal is h_a) or L_{l,m} (19, h_l): [N, H] and [N, H] → [].

    Departure: ``bimodal`` is h_m projected from 2H to H, since a cosine needs one width.
    """
    return contrast(unimodal, bimodal, temperature=temperature)


def relative_inter_modal_loss(h_a: Tensor, h_l: Tensor, *, temperature: float = 0.1) -> Tensor:
    """L_{a,l} (20): h_a [N, H], h_l [N, H] → []."""
    return contrast(h_a, h_l, temperature=temperature)


def inter_modal_loss(
    h_a: Tensor,
    h_l: Tensor,
    h_m: Tensor,
    *,
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    temperature: float = 0.1,
) -> Tensor:
    """L_inter = λ1 L_{a,m} + λ2 L_{l,m} + λ3 L_{a,l} (21); each [N, H] → [].

    ``weights`` are λ1, λ2, λ3; ``h_m`` is already projected to H. The paper doesn't give λ and τ.
    The ablations are weights: relative loss only is (0, 0, 1), absolute only (1/2, 1/2, 0).
    """
    lambda_1, lambda_2, lambda_3 = weights
    return (
        lambda_1 * absolute_inter_modal_loss(h_a, h_m, temperature=temperature)
        + lambda_2 * absolute_inter_modal_loss(h_l, h_m, temperature=temperature)
        + lambda_3 * relative_inter_modal_loss(h_a, h_l, temperature=temperature)
    )


class UnimodalLoss(Criterion[TrainingOutput]):
    """Cross entropy of each modality by itself, a linear map of H_a and one of H_l; their mean.

    Not in the paper. Text alone is fitted within an epoch or two, and what the fusion then still
    gets wrong teaches the audio branch little; here that branch learns from every utterance.
    """

    def __init__(self, hidden: int, classes: int, *, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.heads = nn.ModuleDict({m: nn.Linear(hidden, classes) for m in ("a", "l")})

    def forward(self, output: TrainingOutput, mask: Tensor, labels: Tensor) -> Tensor:
        """Of the labelled utterances that have both. ValueError for a network of one modality."""
        if output.H_a is None or output.H_l is None:
            raise ValueError("a network of one modality has no unimodal losses; leave them out")
        known = mask & (labels >= 0)
        if not known.any():
            return (output.H_a.sum() + output.H_l.sum()) * 0.0
        each = [
            F.cross_entropy(self.heads[m](H_m[known]), labels[known])
            for m, H_m in (("a", output.H_a), ("l", output.H_l))
        ]
        return self.weight * torch.stack(each).mean()


class InterModalLoss(Criterion):
    """μ L_inter, the second term of equation 23, of a network's output.

    Holds the projection of h_m that only the loss needs: trained beside the network and not part
    of a bundle, since prediction doesn't use it.
    """

    def __init__(
        self,
        hidden: int,
        *,
        mu: float = 1.0,
        weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.mu = mu
        self.project = nn.Linear(2 * hidden, hidden)
        self.weights = tuple(weights)
        self.temperature = temperature

    def forward(self, output: Output, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """``mask`` [B, U] chooses the utterances that have both; labels aren't used.

        Raises ValueError for a network of one modality, which has nothing to contrast.
        """
        if output.h_a is None or output.h_l is None or output.h_m is None:
            raise ValueError("a network of one modality has no inter-modal loss; leave it out")
        return self.mu * inter_modal_loss(
            output.h_a[mask],
            output.h_l[mask],
            self.project(output.h_m[mask]),
            weights=self.weights,
            temperature=self.temperature,
        )


# --- 3.4 Emotion classification and 3.5 Training --------------------------------------------------


class Classifier(nn.Linear):
    """Section 3.4: h_m [.., 2H] → logits [.., C]; p of equation 22 is their softmax."""


def total_loss(
    logits: Tensor,
    labels: Tensor,
    inter: Tensor | float = 0.0,
    *,
    mu: float = 0.2,
    class_weights: Tensor | None = None,
) -> Tensor:
    """L = L_ce + μ L_inter (22, 23): logits [N, C], labels [N] and eq 21's value → [].

    ``class_weights`` [C], not in the paper, balances the classes; then the mean is weighted too.
    """
    return F.cross_entropy(logits, labels, weight=class_weights) + mu * inter


class HBAF(Recurrent[DialogueState]):
    """The whole of section 3: ``forward`` over dialogues, ``step`` one utterance at a time.

    Both are ``_continue``, from the state before the first utterance or from a later one, so
    that their logits agree to 1e-5. ``live``: utterance t is seen in the window of the last W
    utterances, older ones through the text context network's state; nothing depends on a later
    utterance. ``offline``: the window is the whole dialogue, future included.
    """

    config: HbafConfig
    stackable = True

    def __init__(self, config: HbafConfig) -> None:
        super().__init__(config)
        if config.use_audio:
            self.absent_audio = nn.Parameter(torch.zeros(config.audio_width))
            self.audio_context = (
                AudioContextNetwork(config)
                if config.use_audio_context
                else nn.Linear(config.audio_input, config.hidden)
            )
            self.baseline = SpeakerBaseline() if config.audio_baseline else None
        if config.use_text:
            self.text_context = TextContextNetwork(config)
        self.fusion = Fusion(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = Classifier(config.hidden * len(config.modalities), config.classes)

    def forward(self, features: Features) -> Output:
        """[B, U, ..] → logits of every utterance of whole dialogues.

        Raises ValueError if padding stands before an utterance.
        """
        mask = features.present()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("utterance_mask: a dialogue's utterances come first, then padding")
        return super().forward(features)

    def _continue(self, features: Features, state: DialogueState) -> tuple[Output, DialogueState]:
        """The output of U more utterances after ``state``, and the state after them."""
        mask = features.present()
        modalities, new = self.config.modalities, mask.shape[1]
        a = H_l = self.classifier.weight.new_zeros(*mask.shape, 0)  # width 0 if not in use
        if "a" in modalities:
            a, state = self._audio(features, mask, state)
        if "l" in modalities:
            H_l, state = self.text_context(features, mask, state)  # section 3.1.2, eqs 1-6
        a, H_l = torch.cat([state.audio_window, a], 1), torch.cat([state.text_window, H_l], 1)
        offline = self.config.mode == "offline"
        windows = (
            Windows.offline(mask)
            if offline
            else Windows.live(state.window_mask, mask, members=self.side_by_side)
        )
        H = [self._in_context(each) for each in windows.of({"a": a, "l": H_l}, modalities)]
        groups = [(windows.targets(each), each) for each in H]
        h = self.fusion(groups)  # section 3.2, eqs 7-17
        h_m = torch.cat([h[m] for m in modalities], dim=-1).to(self.classifier.weight.dtype)
        h_m = windows.scatter(h_m)
        logits = self.classifier(self.dropout(h_m)).masked_fill(~mask[..., None], 0.0)  # eq 22
        parts = dict(zip(modalities, torch.split(h_m, self.config.hidden, dim=-1), strict=True))
        output = Output(logits, parts.get("a"), parts.get("l"), h_m)
        if self.training:
            before = joined_targets([targets for targets, _ in groups])
            H_m = {m: windows.scatter(rows) for m, rows in before.items()}
            output = TrainingOutput(logits, output.h_a, output.h_l, h_m, H_m.get("a"), H_m.get("l"))
        # The oldest of the W-1+U utterances leave the window.
        return output, replace(
            state,
            audio_window=a[:, new:],
            text_window=H_l[:, new:],
            window_mask=torch.cat([state.window_mask, mask], dim=1)[:, new:],
        )

    def _in_context(self, window: ByModality) -> ByModality:
        """Section 3.1.1: windows of a and H_l, [N, n, A] and [N, n, H] → of H_a and H_l.

        In a step, windows of streams that differ in the text alone are computed once.
        """
        if "a" not in window:
            return window
        a = window["a"]
        found = None if self.training else find_equal(a, members=self.side_by_side)
        H_a = self.audio_context(a if found is None else a[found[0]])
        return {**window, "a": H_a if found is None else H_a[found[1]]}

    def _audio(
        self, features: Features, mask: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        """a [S, U, A], or with its baseline [S, U, 2A]; a learned vector where there is none."""
        present = features.given("a", mask)
        absent = for_rows(self.absent_audio, len(mask)).view(-1, 1, self.config.audio_width)
        a = absent.expand(*mask.shape, -1)
        if features.audio is not None:
            a = torch.where(present[..., None], features.audio, absent)
        if self.baseline is None:
            return a, state
        found: tuple[Tensor, DialogueState] = self.baseline(
            a, present, features.parties(mask), state
        )
        return found

    @torch.no_grad()
    def standardise(self, text: Tensor) -> None:
        """Fit mean and deviation of the text features [N, L] of the training set, if in use."""
        if self.config.use_text and self.config.standardise_text:
            self.text_context.standardise.fit(text)

    def blank(self, streams: int) -> DialogueState:
        config, weight = self.config, self.classifier.weight
        live, query = config.mode == "live", config.attention in WITH_QUERY
        slots = config.window - 1 if live else 0
        hidden = config.hidden if config.use_text else 0
        scores = {"scalar": min(hidden, 1), "literal": hidden}.get(config.attention, 0)
        own = (PARTIES, hidden) if config.by_speaker else (hidden,)
        past = config.reach if live and query and config.use_text else 0
        parties = PARTIES if config.use_audio and config.audio_baseline else 0

        def zeros(*shape: int) -> Tensor:
            return weight.new_zeros(streams, *shape)

        return DialogueState(
            audio_window=zeros(slots, config.audio_input if config.use_audio else 0),
            text_window=zeros(slots, hidden),
            window_mask=zeros(slots).bool(),
            score_max=zeros(scores) - torch.inf,
            score_sum=zeros(scores),
            weighted_sum=zeros(0 if query else hidden),
            past_window=zeros(past, hidden),
            past_mask=zeros(past).bool(),
            past_speaker=zeros(past).long(),
            external=zeros(hidden),
            internal=zeros(*own),
            purpose=zeros(*own),
            audio_count=zeros(parties),
            audio_sums=zeros(parties, 2 * config.audio_width),
        )
