"""HBAF (the paper's section 3), top to bottom: features and state become logits and next state.

Letters, here and in all shapes: a audio, l text (language), m either or both; B dialogues,
U utterances, S streams, N windows, n utterances in a window, W the longest window, H hidden,
A, L, K the widths of audio, text and commonsense features, C classes.

No module here pads or masks over time: windows of one length are computed together, so each
module sees utterances only, as in the paper, and one dialogue's result can't depend on another's.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from stream_hbaf.networks.config import HbafConfig
from stream_hbaf.networks.fusion import BimodalAttention, DynamicFilterGate, Fusion, Residual
from stream_hbaf.networks.network import Network, Output
from stream_hbaf.networks.state import PARTIES, DialogueState, Features
from stream_hbaf.networks.unimodal import (
    AudioContextNetwork,
    QueryAttention,
    SoftAttention,
    TextContextNetwork,
)

__all__ = [
    "HBAF",
    "AudioContextNetwork",
    "BimodalAttention",
    "Classifier",
    "DialogueState",
    "DynamicFilterGate",
    "Features",
    "Fusion",
    "HbafConfig",
    "Output",
    "QueryAttention",
    "Residual",
    "SoftAttention",
    "TextContextNetwork",
]


class Classifier(nn.Linear):
    """Section 3.4, equation 22: h_m [.., 2H] → logits [.., C]; p is their softmax."""


class HBAF(Network):
    """The whole network: ``forward`` over dialogues, ``step`` one utterance at a time.

    ``live``: utterance t is seen in the window of the last W utterances; older ones through the
    text context network's state. ``forward`` builds exactly the windows that ``step`` would have
    had: the logits agree to 1e-5, and none depends on a later utterance. ``offline``: the window
    is the whole dialogue, future included. The inter-modal loss of section 3.3, whose weights a
    recipe decides, is in contrastive.py.
    """

    config: HbafConfig

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
        text, _ = self._text(features, mask, self.blank(len(mask)))
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

    def step_streams(self, turn: Features, state: DialogueState) -> tuple[Tensor, DialogueState]:
        """As every network's."""
        mask = turn.present()  # [S, 1]
        audio = torch.cat([state.audio_window, self._audio(turn, mask)], dim=1)
        newest, state = self._text(turn, mask, state)
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

    @torch.no_grad()
    def standardise(self, text: Tensor) -> None:
        """Before training: hear text relative to the training set's features [N, L]."""
        if self.config.use_text and self.config.standardise_text:
            self.text_context.standardise.fit(text)

    def blank(self, streams: int) -> DialogueState:
        """The state before the first utterance, [S, ..]."""
        config, weight = self.config, self.classifier.weight
        live, query = config.mode == "live", config.attention == "query"
        slots = config.window - 1 if live else 0
        hidden = config.hidden if config.use_text else 0
        scores = {"scalar": min(hidden, 1), "literal": hidden, "query": 0}[config.attention]
        own = (PARTIES, hidden) if config.by_speaker else (hidden,)
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
            internal=zeros(*own),
            purpose=zeros(*own),
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
        slots = text.shape[1] if every else 1
        fused = self.classifier.weight.new_zeros(len(lengths), slots, self.classifier.in_features)
        groups, places = [], []
        for length in sorted(set(lengths.tolist()) - {0}):
            rows = (lengths == length).nonzero()[:, 0]
            window = {}
            if self.config.use_audio:
                window["a"] = self.audio_context(audio[rows, :length])
            if self.config.use_text:
                window["l"] = text[rows, :length]
            groups.append(({m: H if every else H[:, -1:] for m, H in window.items()}, window))
            taken = torch.arange(length if every else 1, device=rows.device)
            places.append((rows[:, None] * slots + taken).flatten())
        if groups:
            h_m = torch.cat(list(self.fusion(groups).values()), dim=-1)
            fused.flatten(0, 1)[torch.cat(places)] = h_m.to(fused.dtype)
        return fused
