"""HBAF (the paper's section 3), top to bottom: features and state become logits and next state.

Letters, here and in all shapes: a audio, l text (language), m either or both; B dialogues,
U utterances, S streams, N windows, n utterances in a window, W the longest window, H hidden,
A, L, K the widths of audio, text and commonsense features, C classes.

No module here pads or masks over time: windows of one length are computed together, so each
module sees utterances only, as in the paper, and one dialogue's result can't depend on another's.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.state import DialogueState, Features

RELATIONS = ("external", "internal", "purpose")
Streams = dict[str, Tensor]  # by modality: "a", "l"


@dataclass(frozen=True, slots=True)
class HbafConfig:
    """The network's sizes and every switch of its ablations. ConfigError if they can't fit."""

    audio_width: int = 512  # A, after selection
    text_width: int = 384  # L
    commonsense_width: int = 384  # K
    hidden: int = 512  # H
    filters: int = 64
    heads: int = 8
    layers: int = 3  # of the Transformer encoder
    classes: int = 7
    window: int = 8  # W, utterances, the current one included; of no meaning offline
    dropout: float = 0.3
    mode: Literal["live", "offline"] = "live"
    attention: Literal["scalar", "literal", "query"] = "scalar"  # over past utterances, eqs 1-3
    use_audio: bool = True
    use_text: bool = True
    use_commonsense: bool = True
    use_audio_context: bool = True  # else a linear map in the audio context network's place
    audio_skip: bool = False  # a linear map added to the audio context network
    use_bimodal_attention: bool = True
    use_gate: bool = True
    use_residual: bool = True
    literal_cross: bool = False  # eqs 8-9 into eqs 11 and 13 as printed

    def __post_init__(self) -> None:
        if not self.modalities:
            raise ConfigError("network: use_audio and use_text are both off; switch one on")
        if self.hidden % 2 or self.hidden % self.heads:
            raise ConfigError(f"network: hidden {self.hidden} must divide by 2 and by heads")
        if self.window < 1:
            raise ConfigError(f"network: window {self.window} must be at least 1 utterance")
        if self.mode not in ("live", "offline"):
            raise ConfigError(f"network: mode '{self.mode}' must be live or offline")
        if self.attention not in ("scalar", "literal", "query"):
            raise ConfigError(
                f"network: attention '{self.attention}' must be scalar, literal or query"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """The letters of the modalities in use."""
        return ("a",) * self.use_audio + ("l",) * self.use_text


class Output(NamedTuple):
    """What ``forward`` gives; zero where there is no utterance. None: modality not in use."""

    logits: Tensor  # [B, U, C]
    h_a: Tensor | None  # [B, U, H]
    h_l: Tensor | None  # [B, U, H]
    h_m: Tensor  # [B, U, 2H], or H with one modality


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
        layer = nn.TransformerEncoderLayer(
            hidden, config.heads, hidden, config.dropout, batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.skip = nn.Linear(config.audio_width, hidden) if config.audio_skip else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, audio: Tensor) -> Tensor:
        local = torch.relu(self.convolution(audio.transpose(1, 2))).transpose(1, 2)
        ordered, _ = self.lstm(self.dropout(local))
        context: Tensor = self.transformer(ordered)
        return context if self.skip is None else context + self.skip(audio)


class SoftAttention(nn.Module):
    """Equations 1-3: the past utterances l_i [S, U, H] → context l_t^c [S, U, H], i < t.

    Departure (decision 2): "scalar" scores wᵀ tanh(W_s l_i + b_s), since eq 2 would take the
    softmax of a vector; "literal" takes it, for each dimension by itself. Neither depends on t,
    so the sums of eqs 2-3 are carried from utterance to utterance: exact, whatever the length,
    because numerator and denominator are kept relative to the largest score so far.
    Utterances without text aren't in the sums; an empty sum is zero (decision 3).
    """

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
        contexts = []
        for t in range(utterances.shape[1]):
            # A sum that isn't empty is at least 1: the largest score adds exp(0).
            contexts.append(state.weighted_sum / state.score_sum.clamp_min(1.0))
            state = self._remember(utterances[:, t], scores[:, t], text_mask[:, t, None], state)
        return torch.stack(contexts, dim=1), state

    @staticmethod
    def _remember(
        utterance: Tensor, score: Tensor, mask: Tensor, state: DialogueState
    ) -> DialogueState:
        # The largest score cancels out of eq 3, so no gradient runs through it.
        largest = torch.maximum(state.score_max, score).detach()
        decay, weight = torch.exp(state.score_max - largest), torch.exp(score - largest)
        return replace(
            state,
            score_max=torch.where(mask, largest, state.score_max),
            score_sum=torch.where(mask, state.score_sum * decay + weight, state.score_sum),
            weighted_sum=torch.where(
                mask, state.weighted_sum * decay + weight * utterance, state.weighted_sum
            ),
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
        past, mask = state.past_window, state.past_mask
        contexts = []
        for t in range(utterances.shape[1]):
            keys = torch.tanh(self.project(past))  # [S, i, H]
            scores = torch.einsum("sh,sih->si", self.query(utterances[:, t]), keys)
            # Not -inf: a row without any text would be NaN instead of an empty sum.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, dim=-1) * mask
            contexts.append(torch.einsum("si,sih->sh", weights, past))
            past = torch.cat([past, utterances[:, t, None]], dim=1)
            mask = torch.cat([mask, text_mask[:, t, None]], dim=1)
            surplus = 0 if self.reach is None else past.shape[1] - self.reach
            past, mask = past[:, surplus:], mask[:, surplus:]
        return torch.stack(contexts, dim=1), replace(state, past_window=past, past_mask=mask)


class TextContextNetwork(nn.Module):
    """Section 3.1.2, equations 1-6: [S, U, L], commonsense [S, U, 3, K] → H_l [S, U, H].

    Sees the current and past utterances only, in both modes. Departures: the input of each GRU
    is a linear map of [current utterance l_t; context l_t^c; its commonsense relation]
    (decision 1; the last is input, not state: decision 4), and the three states are mapped
    3H → H (decision 7). An utterance without text is a learned vector with no commonsense.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.relation_width = config.commonsense_width if config.use_commonsense else 0
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

    def forward(
        self, features: Features, mask: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        """Go on from ``state`` with U more utterances: H_l of each, and the state after them."""
        if features.text is None:
            mask = torch.zeros_like(mask)
            utterances = self.absent.expand(*mask.shape, -1)
        else:
            mask = mask if features.text_mask is None else mask & features.text_mask
            clean = features.text.masked_fill(~mask[..., None], 0.0)
            utterances = torch.where(mask[..., None], self.project(clean), self.absent)
        utterances = self.dropout(utterances)
        context, state = self.attention(utterances, mask, state)
        relations = self._relations(features, mask, like=utterances)
        states, last = [], {}
        for position, name in enumerate(RELATIONS):
            parts = [utterances, context, relations[:, :, position]]
            combined = self.combine[name](torch.cat(parts, dim=-1))
            before = getattr(state, name)[None].contiguous()
            after, end = getattr(self, name)(combined, before)
            states.append(after)
            last[name] = end[0]
        reduced = self.reduce(self.dropout(torch.cat(states, dim=-1)))
        return reduced, replace(state, **last)

    def _relations(self, features: Features, mask: Tensor, *, like: Tensor) -> Tensor:
        """[S, U, 3, K], zero where there is no text; K is 0 without commonsense."""
        if self.relation_width and features.commonsense is not None:
            return features.commonsense.masked_fill(~mask[..., None, None], 0.0)
        return like.new_zeros(*mask.shape, len(RELATIONS), self.relation_width)


class BimodalAttention(nn.Module):
    """Section 3.2.1, equations 7-9: targets [N, Q, H], their window [N, n, H] → both [N, Q, H].

    Gives, for each modality m, what its own utterances propagate to it, ζH_m (eq 7), and what
    the other modality's do: softmax(Q_a K_lᵀ/√d) V_l for audio (eq 8), softmax(Q_l K_aᵀ/√d) V_a
    for text (eq 9). Departure (decision 10): the paper's eqs 10-13 use these two the other way
    round, so that audio would receive only audio values; ``literal_cross`` does so.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()

        def projections() -> nn.ModuleDict:
            hidden = config.hidden
            return nn.ModuleDict(
                {m: nn.Linear(hidden, hidden, bias=False) for m in config.modalities}
            )

        self.query, self.key, self.value = projections(), projections(), projections()
        self.literal_cross = config.literal_cross

    def forward(self, targets: Streams, window: Streams) -> tuple[Streams, Streams]:
        own = {m: self._attend(targets, window, asking=m, telling=m) for m in targets}
        cross = {}
        if len(targets) == 2:
            audio = self._attend(targets, window, asking="a", telling="l")  # eq 8
            text = self._attend(targets, window, asking="l", telling="a")  # eq 9
            cross = {"a": text, "l": audio} if self.literal_cross else {"a": audio, "l": text}
        return own, cross

    def _attend(self, targets: Streams, window: Streams, *, asking: str, telling: str) -> Tensor:
        query = self.query[asking](targets[asking])
        key, value = self.key[telling](window[telling]), self.value[telling](window[telling])
        weights = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
        attended: Tensor = weights @ value
        return attended


class DynamicFilterGate(nn.Module):
    """Section 3.2.2, equations 10-11 (audio) or 12-13 (text): two [.., H] → H_m* [.., H]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.own = nn.Linear(hidden, hidden)  # W_s, and b
        self.cross = nn.Linear(hidden, hidden, bias=False)  # W_c

    def forward(self, own: Tensor, cross: Tensor) -> Tensor:
        gate = torch.sigmoid(self.own(own) + self.cross(cross))
        return gate * own + (1 - gate) * cross


class Residual(nn.Module):
    """Section 3.2.3, equations 14-15 (audio) or 16-17 (text): H_m, H_m* [.., H] → h_m [.., H].

    Departure (decision 11): ⊕ is addition, and AddNorm adds once. Feed-forward width H, not
    given by the paper.
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden)
        )
        self.add_norm = nn.LayerNorm(hidden)

    def forward(self, before: Tensor, refined: Tensor) -> Tensor:
        normed = self.norm(before + refined)
        result: Tensor = self.add_norm(normed + self.feed_forward(normed))
        return result


class Classifier(nn.Linear):
    """Section 3.4, equation 22: h_m [.., 2H] → logits [.., C]; p is their softmax."""


class Fusion(nn.Module):
    """Section 3.2: target utterances and their window, each {"a", "l"} → h_a, h_l [N, Q, H].

    Each part can be left out. Without the gate both parts weigh the same (G = 1/2). Without the
    attention, or with one modality, nothing crosses over, so there is nothing to gate:
    H_m* = ζH_m, or H_m itself. Without all three, h_m is [H_a; H_l].
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        hidden, modalities = config.hidden, config.modalities
        crosses = config.use_bimodal_attention and len(modalities) == 2
        gated = modalities if config.use_gate and crosses else ()
        kept = modalities if config.use_residual else ()
        self.attention = BimodalAttention(config) if config.use_bimodal_attention else None
        self.gate = nn.ModuleDict({m: DynamicFilterGate(hidden) for m in gated})
        self.residual = nn.ModuleDict({m: Residual(hidden, config.dropout) for m in kept})

    def forward(self, targets: Streams, window: Streams) -> Streams:
        refined = targets
        if self.attention is not None:
            refined = self._weigh(*self.attention(targets, window))
        if not self.residual:
            return refined
        return {m: self.residual[m](targets[m], refined[m]) for m in targets}

    def _weigh(self, own: Streams, cross: Streams) -> Streams:
        if not cross:
            return own
        if not self.gate:
            return {m: (own[m] + cross[m]) / 2 for m in own}
        return {m: self.gate[m](own[m], cross[m]) for m in own}


class HBAF(nn.Module):
    """The whole network: ``forward`` over dialogues, ``step`` one utterance at a time.

    ``live``: utterance t is seen in the window of the last W utterances; older ones through the
    text context network's state. ``forward`` builds exactly the windows that ``step`` would have
    had: the logits agree to 1e-5, and none depends on a later utterance. ``offline``: the window
    is the whole dialogue, future included, and ``step`` raises ModelError.
    """

    def __init__(self, config: HbafConfig) -> None:
        super().__init__()
        self.config = config
        if config.use_audio:
            self.absent_audio = nn.Parameter(torch.zeros(config.audio_width))
            self.audio_context = (
                AudioContextNetwork(config)
                if config.use_audio_context
                else nn.Linear(config.audio_width, config.hidden)
            )
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
        audio = self._audio(features, mask)
        text, _ = self._text(features, mask, self._blank(len(mask)))
        fused = self.classifier.weight.new_zeros(*mask.shape, self.classifier.in_features)
        if self.config.mode == "offline":
            fused = self._fuse(audio, text, mask.sum(dim=1))
        else:
            dialogue, turn = mask.nonzero(as_tuple=True)
            first = (turn - self.config.window + 1).clamp_min(0)
            slots = first[:, None] + torch.arange(self.config.window, device=mask.device)
            rows = dialogue[:, None], torch.minimum(slots, turn[:, None])
            last = self._fuse(audio[rows], text[rows], turn - first + 1)
            fused[dialogue, turn] = last[:, 0]
        logits = self.classifier(self.dropout(fused)).masked_fill(~mask[..., None], 0.0)
        parts = dict(
            zip(self.config.modalities, torch.split(fused, self.config.hidden, dim=-1), strict=True)
        )
        return Output(logits, parts.get("a"), parts.get("l"), fused)

    @torch.no_grad()
    def step(self, features: Features, state: DialogueState) -> tuple[Tensor, DialogueState]:
        """One utterance of a dialogue → logits [C] and the state after it.

        With a state of S streams, one utterance of each: features [S, ..] → logits [S, C].
        ``state`` stays as it was. No gradient: a state must not hold on to its past.
        """
        if not state.has_streams:
            one, after = self.step(features.map(_lead), state.map(_lead))
            return one[0], after.map(lambda part: part[0])
        features = features.map(lambda part: part[:, None])
        mask = torch.ones_like(state.external[:, None, 0], dtype=torch.bool)  # [S, 1]
        audio = torch.cat([state.audio_window, self._audio(features, mask)], dim=1)
        newest, state = self._text(features, mask, state)
        text = torch.cat([state.text_window, newest], dim=1)
        heard = torch.cat([state.window_mask, mask], dim=1)
        order = torch.argsort((~heard).int(), dim=1, stable=True)  # unused slots go last
        rows = torch.arange(len(order), device=order.device)[:, None], order
        fused = self._fuse(audio[rows], text[rows], heard.sum(dim=1))
        logits: Tensor = self.classifier(self.dropout(fused[:, 0]))
        return logits, replace(
            state,
            audio_window=audio[:, 1:],
            text_window=text[:, 1:],
            window_mask=heard[:, 1:],
        )

    def initial_state(self, streams: int | None = None) -> DialogueState:
        """The state before a dialogue's first utterance, of one dialogue or of S streams.

        Raises ModelError offline: what needs the future can't be asked before it.
        """
        if self.config.mode != "live":
            raise ModelError("this network was trained offline and sees the future; use a live one")
        if streams is not None:
            return self._blank(streams)
        return self._blank(1).map(lambda part: part[0])

    def _blank(self, streams: int) -> DialogueState:
        """The state before the first utterance, [S, ..], of the device and type of the weights."""
        config, weight = self.config, self.classifier.weight
        live, query = config.mode == "live", config.attention == "query"
        slots = config.window - 1 if live else 0
        hidden = config.hidden if config.use_text else 0
        scores = {"scalar": min(hidden, 1), "literal": hidden, "query": 0}[config.attention]
        past = slots if query and config.use_text else 0

        def zeros(*shape: int) -> Tensor:
            return weight.new_zeros(streams, *shape)

        return DialogueState(
            audio_window=zeros(slots, config.audio_width if config.use_audio else 0),
            text_window=zeros(slots, hidden),
            window_mask=zeros(slots).bool(),
            score_max=zeros(scores) - torch.inf,
            score_sum=zeros(scores),
            weighted_sum=zeros(0 if query else hidden),
            past_window=zeros(past, hidden),
            past_mask=zeros(past).bool(),
            external=zeros(hidden),
            internal=zeros(hidden),
            purpose=zeros(hidden),
        )

    def _audio(self, features: Features, mask: Tensor) -> Tensor:
        """[S, U, A]: a learned vector stands where there is no audio; width 0 if not in use."""
        if not self.config.use_audio:
            return self.classifier.weight.new_zeros(*mask.shape, 0)
        if features.audio is None:
            return self.absent_audio.expand(*mask.shape, -1)
        mask = mask if features.audio_mask is None else mask & features.audio_mask
        return torch.where(mask[..., None], features.audio, self.absent_audio)

    def _text(
        self, features: Features, mask: Tensor, state: DialogueState
    ) -> tuple[Tensor, DialogueState]:
        """H_l [S, U, H] and the state after; width 0 if text is not in use."""
        if not self.config.use_text:
            return self.classifier.weight.new_zeros(*mask.shape, 0), state
        text, state = self.text_context(features, mask, state)
        return text, state

    def _fuse(self, audio: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """Windows [N, W, A] and [N, W, H] of N lengths → h_m of their targets [N, Q, 2H].

        The target is each window's last utterance (Q = 1), offline each of its utterances
        (Q = W, zero after a window's end). Windows of one length are computed together.
        """
        every = self.config.mode == "offline"
        fused = self.classifier.weight.new_zeros(
            len(lengths), text.shape[1] if every else 1, self.classifier.in_features
        )
        for length in sorted(set(lengths.tolist())):
            if length == 0:
                continue
            rows = (lengths == length).nonzero()[:, 0]
            window = {}
            if self.config.use_audio:
                window["a"] = self.audio_context(audio[rows, :length])
            if self.config.use_text:
                window["l"] = text[rows, :length]
            targets = {m: H if every else H[:, -1:] for m, H in window.items()}
            h_m = torch.cat(list(self.fusion(targets, window).values()), dim=-1)
            fused[rows, : h_m.shape[1]] = h_m.to(fused.dtype)
        return fused


def _lead(part: Tensor) -> Tensor:
    return part[None]
