"""Uni-modal representation (section 3.1): audio and text, each in its context.

The audio context network (3.1.1) sees a window of utterances; the text context network (3.1.2,
equations 1-6) sees the current utterance and goes on from a state. Letters as in hbaf.py.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.config import HbafConfig
from stream_hbaf.networks.network import Standardise
from stream_hbaf.networks.state import PARTIES, DialogueState, Features

RELATIONS = ("external", "internal", "purpose")
OWN = ("internal", "purpose")  # what is the speaker's
Rows = dict[str, Tensor]  # by relation
Places = tuple[Tensor, ...]  # (stream, turn) of the V utterances that aren't padding


class AudioContextNetwork(nn.Module):
    """Section 3.1.1: [N, n, A] → H_a [N, n, H].

    Convolution (k 3) → 2 BiLSTM (H/2 a direction) → 3 Transformer encoder layers (8 heads).
    Departure (decision 8): the sequence is a dialogue's utterances, one vector each. Not given
    by the paper: ReLU after the convolution, feed-forward width H; no position code, since the
    LSTM carries the order. ``skip`` adds a linear map of the input, an ablation.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.convolution = nn.Conv1d(config.audio_width, config.filters, kernel_size=3, padding=1)
        self.lstm = nn.LSTM(
            config.filters,
            hidden // 2,
            num_layers=2,
            bidirectional=True,
            dropout=config.dropout,
            batch_first=True,
        )
        self.transformer = TransformerEncoder(config)
        self.skip = nn.Linear(config.audio_width, hidden) if config.audio_skip else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, audio: Tensor) -> Tensor:
        local = torch.relu(self.convolution(audio.transpose(1, 2))).transpose(1, 2)
        ordered, _ = self.lstm(self.dropout(local))
        context: Tensor = self.transformer(ordered)
        return context if self.skip is None else context + self.skip(audio)


class TransformerEncoder(nn.Module):
    """Vaswani et al. 2017, norm after each sum as there: [N, n, H] → [N, n, H]."""

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, sequence: Tensor) -> Tensor:
        for layer in self.layers:
            sequence = layer(sequence)
        return sequence


class EncoderLayer(nn.Module):
    """One layer, weights and results of ``nn.TransformerEncoderLayer``.

    Written out, because a window of 8 utterances costs torch's own more in copies and calls than
    in products.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.self_attn = nn.MultiheadAttention(hidden, config.heads, batch_first=True)
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
        joined = F.linear(sequence, weights.in_proj_weight, weights.in_proj_bias)
        heads = joined.view(*sequence.shape[:2], 3, weights.num_heads, weights.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, n, H/heads]
        scores = query @ key.transpose(2, 3) / weights.head_dim**0.5
        mixed = self.dropout(torch.softmax(scores, dim=-1)) @ value
        attended: Tensor = weights.out_proj(mixed.transpose(1, 2).flatten(2))
        return attended


class SoftAttention(nn.Module):
    """Equations 1-3: the past utterances l_i [S, U, H] → context l_t^c [S, U, H], i < t.

    Departure (decision 2): "scalar" scores wᵀ tanh(W_s l_i + b_s), since eq 2 would take the
    softmax of a vector; "literal" takes it, for each dimension by itself. Neither depends on t,
    so the sums of eqs 2-3 are carried from block to block, and from step to step: exact,
    whatever the length, because numerator and denominator are kept relative to the largest
    score so far. Utterances without text aren't in the sums; an empty sum is zero (decision 3).
    """

    BLOCK = 32  # utterances in one softmax: its table grows with their square

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.project = nn.Linear(hidden, hidden)  # W_s, b_s
        scalar = config.attention == "scalar"
        self.score = nn.Linear(hidden, 1, bias=False) if scalar else nn.Identity()  # w

    def forward(
        self, utterances: Tensor, text_mask: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        scores = self.score(torch.tanh(self.project(utterances)))  # [S, U, E]
        scores = scores.masked_fill(~text_mask[..., None], -torch.inf)
        contexts = []
        for start in range(0, utterances.shape[1], self.BLOCK):
            block = utterances[:, start : start + self.BLOCK]
            theirs = scores[:, start : start + self.BLOCK]
            contexts.append(self._of_past(block, theirs, state))
            state = self._remember(block, theirs, state)
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
        heard = past[:, :, None] & scores.isfinite()[:, None]  # [S, t, i, E]
        # Not -inf: before the first text there would be NaN instead of an empty sum.
        lowest = torch.finfo(scores.dtype).min
        weights = torch.softmax(scores[:, None].masked_fill(~heard, lowest), dim=2) * heard
        if weights.shape[-1] == 1:
            return weights[..., 0] @ values
        return (weights * values[:, None]).sum(dim=2)

    @staticmethod
    def _remember(utterances: Tensor, scores: Tensor, state: DialogueState) -> DialogueState:
        # The largest score cancels out of eq 3, so no gradient runs through it.
        largest = torch.maximum(state.score_max, scores.amax(dim=1)).detach()
        finite = largest.clamp_min(torch.finfo(largest.dtype).min)  # -inf as long as all is silent
        decay, weights = torch.exp(state.score_max - finite), torch.exp(scores - finite[:, None])
        return replace(
            state,
            score_max=largest,
            score_sum=state.score_sum * decay + weights.sum(dim=1),
            weighted_sum=state.weighted_sum * decay + (weights * utterances).sum(dim=1),
        )


class QueryAttention(nn.Module):
    """Equations 1-3 with a query: score (W_q l_t)ᵀ tanh(W_s l_i + b_s); shapes as SoftAttention.

    Departure (decision 2, switch "query"): the current utterance stands in for the fixed vector
    w. The score depends on t, so the past must be kept: in live mode the last W-1 utterances
    only, offline all of them.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.hidden, config.hidden)  # W_s, b_s
        self.query = nn.Linear(config.hidden, config.hidden, bias=False)  # W_q
        self.reach = config.window - 1 if config.mode == "live" else None

    def forward(
        self, utterances: Tensor, text_mask: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        kept = state.past_window.shape[1]
        past = torch.cat([state.past_window, utterances], dim=1)  # [S, i, H]
        mask = torch.cat([state.past_mask, text_mask], dim=1)
        scores = self.query(utterances) @ torch.tanh(self.project(past)).transpose(1, 2)
        before = scores.new_ones(scores.shape[1:], dtype=torch.bool).tril(kept - 1)  # [t, i]
        if self.reach is not None:
            before = before.triu(kept - self.reach)
        heard = before & mask[:, None]
        # Not -inf: a row without any text would be NaN instead of an empty sum.
        scores = scores.masked_fill(~heard, torch.finfo(scores.dtype).min)
        contexts = (torch.softmax(scores, dim=-1) * heard) @ past
        surplus = 0 if self.reach is None else past.shape[1] - self.reach
        return contexts, replace(state, past_window=past[:, surplus:], past_mask=mask[:, surplus:])


class TextContextNetwork(nn.Module):
    """Section 3.1.2, equations 1-6: [S, U, L], commonsense [S, U, 3, K] → H_l [S, U, H].

    Sees the current and past utterances only, in both modes. Departures: the input of each GRU
    is a linear map of [current utterance l_t; context l_t^c; its commonsense relation]
    (decision 1; the last is input, not state: decision 4), and the three states are mapped
    3H → H (decision 7). An utterance without text is a learned vector with no commonsense.
    ``by_speaker``, not in the paper: what a speaker feels and wants is his own state, as in COSMIC
    (Ghosal et al. 2020), and what others feel is the dialogue's.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.relation_width = config.commonsense_width if config.use_commonsense else 0
        self.standardise = Standardise(config.text_width)
        self.project = nn.Linear(config.text_width, hidden)
        self.absent = nn.Parameter(torch.zeros(hidden))
        query = config.attention == "query"
        self.attention = QueryAttention(config) if query else SoftAttention(config)
        combined = 2 * hidden + self.relation_width
        self.combine = nn.ModuleDict({name: nn.Linear(combined, hidden) for name in RELATIONS})
        self.external = nn.GRU(hidden, hidden, batch_first=True)  # eq 4
        self.internal = nn.GRU(hidden, hidden, batch_first=True)  # eq 5
        self.purpose = nn.GRU(hidden, hidden, batch_first=True)  # eq 6
        self.reduce = nn.Linear(3 * hidden, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.by_speaker = config.by_speaker

    def forward(
        self, features: Features, mask: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        """Go on from ``state`` with U more utterances: H_l of each, and the state after them."""
        there = mask.nonzero(as_tuple=True)  # V utterances: padding is worth no multiplication
        spoken = torch.zeros_like(mask) if features.text is None else mask
        if features.text_mask is not None:
            spoken = spoken & features.text_mask
        utterances = self.dropout(self._utterances(features, spoken, there))
        context, state = self.attention(utterances, spoken, state)
        current = torch.cat([utterances[there], context[there]], dim=-1)
        relations = self._relations(features, spoken, there, like=current)
        combined = {
            name: self.combine[name](torch.cat([current, relations[:, position]], dim=-1))
            for position, name in enumerate(RELATIONS)
        }
        whole, last = self._of_dialogue(combined, there, mask, state)
        if self.by_speaker:
            own, theirs = self._of_speakers(combined, features.parties(mask), there, state)
            whole, last = whole | own, last | theirs
        joined = torch.cat([whole[name] for name in RELATIONS], dim=-1)
        reduced = self.reduce(self.dropout(joined))
        return _padded(reduced, there, mask), replace(state, **last)

    def _of_dialogue(
        self, combined: Rows, there: Places, mask: Tensor, state: DialogueState
    ) -> tuple[Rows, Rows]:
        """The states [V, H] that the dialogue has as a whole, and the last of them [S, H]."""
        names = [name for name in RELATIONS if not (self.by_speaker and name in OWN)]
        states, last = run_side_by_side(
            [self.gru(name) for name in names],
            [_padded(combined[name], there, mask) for name in names],
            [getattr(state, name) for name in names],
        )
        found = [after[there] for after in states]
        return dict(zip(names, found, strict=True)), dict(zip(names, last, strict=True))

    def _of_speakers(
        self, combined: Rows, speaker: Tensor, there: Places, state: DialogueState
    ) -> tuple[Rows, Rows]:
        """The states [V, H] that each speaker has for himself, and all speakers' last [S, P, H].

        A speaker's turns of a dialogue are a sequence of their own, N of them in all.
        """
        # The utterances are in the order of their dialogues, then of their turns.
        who = there[0] * PARTIES + speaker[there]
        used, sequence, counts = torch.unique(who, return_inverse=True, return_counts=True)
        numbers = torch.arange(len(used), device=who.device)
        place = (sequence[:, None] == numbers).cumsum(0)[torch.arange(len(who)), sequence] - 1
        apart = torch.zeros(len(used), int(counts.max()), dtype=torch.bool, device=who.device)
        states, _ = run_side_by_side(
            [self.gru(name) for name in OWN],
            [_padded(combined[name], (sequence, place), apart) for name in OWN],
            [getattr(state, name).flatten(0, 1)[used] for name in OWN],
        )
        found, last = {}, {}
        for name, after in zip(OWN, states, strict=True):
            found[name] = after[sequence, place]
            before = getattr(state, name)
            ends = before.flatten(0, 1).index_copy(0, used, after[numbers, counts - 1])
            last[name] = ends.view_as(before)
        return found, last

    def gru(self, relation: str) -> nn.GRU:
        """The one of equations 4 to 6."""
        found: nn.GRU = getattr(self, relation)
        return found

    def _utterances(self, features: Features, spoken: Tensor, there: Places) -> Tensor:
        """l_t, [S, U, H]: a learned vector where there is no text."""
        if features.text is None:
            return self.absent.expand(*spoken.shape, -1)
        heard = spoken[there][:, None]
        known = self.standardise(features.text[there]).masked_fill(~heard, 0.0)
        projected = self.project(known)
        return _padded(torch.where(heard, projected, self.absent), there, spoken)

    def _relations(
        self, features: Features, spoken: Tensor, there: Places, *, like: Tensor
    ) -> Tensor:
        """[V, 3, K], zero where there is no text; K is 0 without commonsense."""
        if self.relation_width and features.commonsense is not None:
            return features.commonsense[there].masked_fill(~spoken[there][:, None, None], 0.0)
        return like.new_zeros(len(like), len(RELATIONS), self.relation_width)


def _padded(rows: Tensor, there: Places, mask: Tensor) -> Tensor:
    """Rows [V, ..] of the utterances that are there → [S, U, ..], zero elsewhere."""
    return rows.new_zeros(*mask.shape, *rows.shape[1:]).index_put(there, rows)


def run_side_by_side(
    grus: list[nn.GRU], inputs: list[Tensor], before: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What each GRU makes of its own input [S, U, H]: states of every turn, and the last [S, H].

    On a CPU a turn of a batch costs mostly calls, so that all take it in the same ones. For one
    turn that isn't worth laying the weights side by side; on a GPU each GRU is one kernel.
    """
    if inputs[0].is_cuda or inputs[0].shape[1] == 1:
        pairs = [
            gru(x, h[None].contiguous()) for gru, x, h in zip(grus, inputs, before, strict=True)
        ]
        return [states for states, _ in pairs], [end[0] for _, end in pairs]
    size = grus[0].hidden_size
    weight = torch.stack([gru.get_parameter("weight_hh_l0") for gru in grus]).transpose(
        1, 2
    )  # [3, H, 3H]
    bias = torch.stack([gru.get_parameter("bias_hh_l0") for gru in grus])[:, None]
    given = [
        F.linear(x, gru.get_parameter("weight_ih_l0"), gru.get_parameter("bias_ih_l0"))
        for gru, x in zip(grus, inputs, strict=True)
    ]
    hidden, states = torch.stack(before), []
    for turn in torch.stack(given).unbind(2):  # [3, S, 3H]
        recurrent = torch.baddbmm(bias, hidden, weight)
        opened = torch.sigmoid(turn[..., : 2 * size] + recurrent[..., : 2 * size])
        reset, update = opened.chunk(2, dim=-1)
        new = torch.tanh(torch.addcmul(turn[..., 2 * size :], reset, recurrent[..., 2 * size :]))
        hidden = new + update * (hidden - new)
        states.append(hidden)
    return list(torch.stack(states, dim=2)), list(hidden)
