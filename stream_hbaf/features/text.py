"""Text features: one vector for each utterance from a pretrained text encoder.

An utterance is encoded by itself or as a turn of its dialogue, in a window of whole turns with
block causal attention. Training, evaluation and live use share this rule: a window starts with the
token cls and grows turn by turn to at most ``tokens`` tokens. A turn that doesn't fit starts a new
window, which keeps as many whole turns before it as fit in half of ``tokens`` together with it. A
token attends to its own turn, earlier turns and cls; cls to itself. So one pass over a window gives
each turn the feature that it would have if the dialogue ended there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.auto.tokenization_auto import AutoTokenizer

from stream_hbaf.config import Section
from stream_hbaf.errors import ModelError
from stream_hbaf.features.pretrained import (
    DEFAULT_ENCODER,
    encoder_remedy,
    load_pretrained,
    resolve_encoder,
)

LAST_LAYERS = 4  # averaged before the mean over tokens (paper, section 3.1.2)
MAX_TOKENS = 128  # an utterance of 20 s holds about 60 words; longer ones are cut
MAX_TEXT_TOKENS = 32  # of an utterance given as tokens; few turns have more
BATCH = 64
BATCH_TOKENS = 1024  # of passages encoded together, padding counted
MAX_TURN_TOKENS = 60  # of one turn, its end token not counted; longer turns are cut
MIN_TOKENS = 8  # cls, a few words and their end token
MASKED = -1e4  # added to masked scores: their softmax is exactly 0 in float32

Float32 = NDArray[np.float32]
Ids = tuple[int, ...]  # token ids of one turn, its end (sep) included


class ContextConfig(Section):
    """How much of the dialogue the text encoder is given with an utterance."""

    tokens: Annotated[int, Field(ge=0, le=8192)] = 0  # of a window; 0: every utterance by itself
    speakers: bool = False  # encode "Speaker: text" rather than "text"

    @field_validator("tokens")
    @classmethod
    def _enough(cls, tokens: int) -> int:
        if 0 < tokens < MIN_TOKENS:
            raise ValueError(f"a window of {tokens} tokens is too short; 0, or {MIN_TOKENS} up")
        return tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """The text of one utterance and its speaker."""

    speaker: str  # empty when unknown
    text: str


@dataclass(frozen=True, slots=True)
class TurnWindow:
    """The turns in the current window: all the context that live use carries. Immutable."""

    turns: tuple[Ids, ...] = ()

    @property
    def length(self) -> int:
        """Tokens, cls included."""
        return 1 + sum(map(len, self.turns))

    def then(self, turn: Ids, *, tokens: int) -> "TurnWindow":
        """The window with ``turn`` as the last one: this one extended, or a new one."""
        if self.length + len(turn) <= tokens:
            return TurnWindow((*self.turns, turn))
        length, first = 1 + len(turn), len(self.turns)
        while first and length + len(self.turns[first - 1]) <= tokens // 2:
            first -= 1
            length += len(self.turns[first])
        return TurnWindow((*self.turns[first:], turn))


EMPTY_WINDOW = TurnWindow()


@dataclass(frozen=True, slots=True)
class Passage(TurnWindow):
    """A window that is encoded in one pass; its targets are the turns from ``first`` on."""

    first: int = 0


def with_speaker(turn: Turn, *, speakers: bool) -> str:
    """The text to encode: with the speaker's name if ``speakers`` and it is known."""
    return f"{turn.speaker}: {turn.text}" if speakers and turn.speaker else turn.text


def passages(turns: Sequence[Ids], *, tokens: int) -> list[Passage]:
    """A dialogue split into windows; each turn is a target once, in order."""
    found: list[Passage] = []
    window, first = EMPTY_WINDOW, 0
    for turn in turns:
        after = window.then(turn, tokens=tokens)
        if len(after.turns) != len(window.turns) + 1:  # a new window
            found.append(Passage(window.turns, first))
            first = len(after.turns) - 1
        window = after
    return [*found, Passage(window.turns, first)] if turns else []


def lay_out(
    batch: Sequence[Passage], *, cls: int, pad: int
) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """A padded batch: token ids [B, T], the mask [B, 1, T, T] that is added to the attention's
    scores, and of each target turn the row, the first token and the end."""
    longest = max(passage.length for passage in batch)
    ids = torch.full((len(batch), longest), pad)
    turn_of = torch.full((len(batch), longest), torch.iinfo(torch.int64).max)  # padding comes last
    spans = []
    for row, passage in enumerate(batch):
        ids[row, 0], turn_of[row, 0], end = cls, -1, 1
        for number, turn in enumerate(passage.turns):
            start, end = end, end + len(turn)
            ids[row, start:end] = torch.tensor(turn)
            turn_of[row, start:end] = number
            if number >= passage.first:
                spans.append((row, start, end))
    visible = turn_of[:, None, :] <= turn_of[:, :, None]  # [B, T, T]: of row's token, column's
    mask = torch.zeros(visible.shape).masked_fill(~visible, MASKED)[:, None]
    return ids, mask, spans


def batches_of(lengths: Sequence[int], order: Sequence[int], *, tokens: int) -> list[list[int]]:
    """``order`` split into batches of at most ``tokens`` tokens, padding included.

    A longer passage is a batch of its own. Order by length, or most of a batch is padding.
    """
    batches: list[list[int]] = []
    longest = 0
    for n in order:
        longest = max(longest, lengths[n])
        if not batches or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            longest = lengths[n]
        batches[-1].append(n)
    return batches


class TextEncoder:
    """Turns texts into vectors: the mean over tokens of the last four layers' average.

    ``tuned`` maps names of the encoder's own parameters to tensors that replace them, as a bundle
    stores them, or "<parameter>.lora_a" [r, in] and "<parameter>.lora_b" [out, r] to a low-rank
    change b a that is added to them. ``context`` says how much of a dialogue is encoded with a
    turn. With ``tokens``, a text gives its first 32 tokens instead of their mean: every
    [.., width] below is then [.., 32, width], NaN where there are fewer. Raises ModelError if the
    weights can't be found, a tuned tensor doesn't fit them, or a window is too long.
    """

    def __init__(
        self,
        name_or_path: str = DEFAULT_ENCODER,
        *,
        device: str = "cpu",
        tuned: Mapping[str, Tensor] | None = None,
        context: ContextConfig | None = None,
        tokens: bool = False,
    ) -> None:
        self.id = name_or_path
        self.tokens = tokens
        self.device = device
        self.context = context or ContextConfig()
        self.model, self._tokenizer = load_pretrained(
            resolve_encoder(name_or_path),
            _read,
            kind="text encoder",
            files="config.json, model.safetensors and tokenizer files",
            remedy=encoder_remedy(name_or_path),
        )
        self.width = int(self.model.config.hidden_size)
        longest = int(self.model.config.max_position_embeddings) - 2  # some number positions from 2
        if self.context.tokens > longest:
            raise ModelError(
                f"text encoder {self.id}: takes at most {longest} tokens at once, not "
                f"{self.context.tokens}; set context.tokens to less"
            )
        self._replace(tuned or {})
        self.model.to(device).eval()

    def encode(self, texts: Sequence[str], *, half: bool = False) -> Float32:
        """Encode texts as float32 [N, width], each as it would be by itself (1e-5).

        ``half`` as in ``encode_dialogues``.
        """
        features = np.zeros((len(texts), *self._shape), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
        with torch.inference_mode(), self._precision(half=half):
            for start in range(0, len(texts), BATCH):
                rows = by_length[start : start + BATCH]
                features[rows] = self.features([texts[n] for n in rows]).float().cpu().numpy()
        return features

    def encode_dialogues(
        self, dialogues: Sequence[Sequence[Turn]], *, half: bool = False
    ) -> list[Float32]:
        """Encode each dialogue's turns as float32 [U, width], many windows at a time.

        No turn depends on a later one, nor on another dialogue (1e-5). ``half``: in bfloat16,
        several times faster and accurate to two digits; not for features that a network classifies.
        """
        every = [turn for turns in dialogues for turn in turns]
        if not self.context.tokens:
            texts = [with_speaker(turn, speakers=self.context.speakers) for turn in every]
            features = self.encode(texts, half=half)
        else:
            ids = iter(self.turn_ids(every))
            windows = [
                passage
                for turns in dialogues
                for passage in passages([next(ids) for _ in turns], tokens=self.context.tokens)
            ]
            features = self._encode_passages(windows, count=len(every), half=half)
        ends = np.cumsum([len(turns) for turns in dialogues])
        return np.split(features, ends[:-1]) if dialogues else []

    def encode_next(self, turn: Turn, window: TurnWindow) -> tuple[Float32, TurnWindow]:
        """The feature [width] of a dialogue's next turn, and the window for the turn after it.

        The window before the first turn is ``EMPTY_WINDOW``. Equals ``encode_dialogues`` (1e-5).
        """
        if not self.context.tokens:
            text = with_speaker(turn, speakers=self.context.speakers)
            return self.encode([text])[0], EMPTY_WINDOW
        after = window.then(self.turn_ids([turn])[0], tokens=self.context.tokens)
        passage = Passage(after.turns, len(after.turns) - 1)
        return self._encode_passages([passage], count=1, half=False)[0], after

    def features(self, texts: Sequence[str]) -> Tensor:
        """Encode one batch of texts as a tensor [N, width] with gradients, for fine-tuning."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        layers = self._last_layers(**batch)  # [N, T, width]
        if self.tokens:
            lengths = batch["attention_mask"].sum(1).tolist()
            return torch.stack(
                [_as_tokens(own[:n]) for own, n in zip(layers, lengths, strict=True)]
            )
        mask = batch["attention_mask"].unsqueeze(-1).to(layers.dtype)  # True (1) = a real token
        pooled: Tensor = (layers * mask).sum(1) / mask.sum(1)
        return pooled

    def passage_features(self, batch: Sequence[Passage]) -> Tensor:
        """Encode the target turns of one batch of passages as [turns, width], with gradients."""
        cls, pad = self._tokenizer.cls_token_id, self._tokenizer.pad_token_id
        ids, mask, spans = lay_out(batch, cls=cls, pad=pad)
        device = self.model.device
        layers = self._last_layers(input_ids=ids.to(device), attention_mask=mask.to(device)).float()
        turns = [layers[row, start:end] for row, start, end in spans]
        return torch.stack([_as_tokens(own) if self.tokens else own.mean(0) for own in turns])

    def _last_layers(self, **batch: Tensor) -> Tensor:
        """The average of the last four layers, [B, T, width]."""
        hidden = self.model(**batch, output_hidden_states=True).hidden_states
        return torch.stack(hidden[-LAST_LAYERS:]).mean(0)

    def turn_ids(self, turns: Sequence[Turn]) -> list[Ids]:
        """Each turn's token ids as they stand in a window, its end token included."""
        if not turns:
            return []
        tokens = self.context.tokens  # of which cls and the turn's end token take two
        most = min(MAX_TURN_TOKENS, tokens - 2) if tokens else MAX_TOKENS - 2
        texts = [with_speaker(turn, speakers=self.context.speakers) for turn in turns]
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [(*map(int, found[:most]), int(self._tokenizer.sep_token_id)) for found in ids]

    def _encode_passages(self, windows: Sequence[Passage], *, count: int, half: bool) -> Float32:
        """The target turns of all passages in order, float32 [count, width]."""
        features = np.zeros((count, *self._shape), dtype=np.float32)
        lengths = [passage.length for passage in windows]
        starts = np.cumsum([0, *(len(passage.turns) - passage.first for passage in windows)])
        by_length = sorted(range(len(windows)), key=lengths.__getitem__)
        with torch.inference_mode(), self._precision(half=half):
            for batch in batches_of(lengths, by_length, tokens=BATCH_TOKENS):
                rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in batch])
                features[rows] = self.passage_features([windows[n] for n in batch]).cpu().numpy()
        return features

    @property
    def _shape(self) -> tuple[int, ...]:
        return (MAX_TEXT_TOKENS, self.width) if self.tokens else (self.width,)

    def _precision(self, *, half: bool) -> torch.autocast:
        """Float32 even under a caller's autocast, unless ``half``."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=half)

    def _replace(self, tuned: Mapping[str, Tensor]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in tuned.items():
            target, dot, half = name.rpartition(".lora_")
            change: Tensor | None = tensor
            if dot:  # the product of both halves
                change = _product(tuned.get(f"{target}.lora_b"), tuned.get(f"{target}.lora_a"))
            parameter = own.get(target if dot else name)
            if parameter is None or change is None or parameter.shape != change.shape:
                raise ModelError(
                    f"text encoder {self.id}: the tuned layer '{name}' doesn't fit it; "
                    "use the encoder that the bundle was trained with"
                )
            if not dot:
                parameter.data.copy_(change.to(parameter.dtype))
            elif half == "a":  # once for both halves
                parameter.data.add_(change)


def _as_tokens(states: Tensor) -> Tensor:
    """An utterance's states [n, width] → [32, width], padded with NaN or cut at the end."""
    row = states.new_full((MAX_TEXT_TOKENS, states.shape[1]), torch.nan)
    row[: len(states)] = states[:MAX_TEXT_TOKENS]
    return row


def _product(up: Tensor | None, down: Tensor | None) -> Tensor | None:
    """[out, r], [r, in] → [out, in]; None if one is missing or they don't fit each other."""
    if up is None or down is None or up.dim() != 2 or len(down) != up.shape[1]:
        return None
    return up.float() @ down.float()


def _read(path: str) -> tuple[Any, Any]:
    """Model in float32 and tokenizer, from a folder, the hub's cache or the hub."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(path)
