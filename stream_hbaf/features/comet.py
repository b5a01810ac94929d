"""Commonsense features from COMET-ATOMIC 2020 (Hwang et al. 2021), if its weights are there."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM
from transformers.models.auto.tokenization_auto import AutoTokenizer

from stream_hbaf.errors import ModelError
from stream_hbaf.features.pretrained import load_pretrained

# External, internal, purpose by the kind in "<kind>:<name>": by the names' plain meaning, and as
# COSMIC has them.
ATOMIC_RELATIONS = {
    "comet": ("oReact", "xReact", "xIntent"),
    "comet-cosmic": ("xReact", "xEffect", "xIntent"),
}
EVENT_TOKENS = 40  # COMET was trained on 48 with the relation; a longer sentence is cut
BATCH = 32
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def is_comet(setting: str) -> bool:
    """Whether a ``commonsense`` setting means COMET: 'comet:<name>' or 'comet-cosmic:<name>'."""
    kind, separator, name = setting.partition(":")
    return kind in ATOMIC_RELATIONS and bool(separator and name)


def open_comet(setting: str, *, device: str = "cpu") -> "Comet":
    """Load the COMET that a ``commonsense`` setting names.

    Raises ModelError if the setting names no COMET, or its weights can't be loaded.
    """
    if not is_comet(setting):
        raise ModelError(f"commonsense '{setting}': write comet:<folder or hub name>")
    kind, _, name = setting.partition(":")
    return Comet(name, device=device, kind=kind)


class Comet:
    """Commonsense from COMET: the hidden state from which it would generate an inference.

    COSMIC (Ghosal et al. 2020, its published feature extraction) gives '<event> <relation>' to
    COMET, a GPT, and takes the last layer's hidden state at the relation, where the first word of
    the inference is predicted. In BART, an encoder-decoder, that is the decoder's last hidden
    state at its first token, with '<event> <relation> [GEN]' as the encoder's input; the first
    token is <s>, as in COMET-ATOMIC 2020's training. As in COSMIC, an utterance of several
    sentences is their mean. Nothing is generated.

    ``name`` is a folder or a hub name, ``kind`` a key of ``ATOMIC_RELATIONS``. Raises ModelError if
    no usable weights are found, or if they aren't COMET's.
    """

    def __init__(self, name: str, *, device: str = "cpu", kind: str = "comet") -> None:
        self.id = name
        self.device = device
        self.relations = ATOMIC_RELATIONS[kind]
        self.model, self._tokenizer = load_pretrained(
            name, _read, kind="COMET", files="config.json, weights and tokenizer files"
        )
        self._require_comet()
        self.width = int(self.model.config.hidden_size)
        self.model.to(device).eval()

    def _require_comet(self) -> None:
        """Raise ModelError for a model that loads but is no COMET."""
        kind = self.model.config.model_type
        unknown = [r for r in self.relations if len(self._tokenizer.tokenize(r)) != 1]
        if kind != "bart" or unknown:
            why = f"it is a {kind}" if kind != "bart" else f"it doesn't know {unknown[0]}"
            raise ModelError(
                f"COMET {self.id}: {why}; name a COMET-ATOMIC 2020 model, which is a bart "
                "with the relations among its tokens"
            )

    def infer_texts(
        self, texts: Sequence[str], *, features: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """N texts → inferences float32 [N, 3, width]; zeros for an empty text.

        Each row is what the text would give by itself (1e-5). ``features`` are not used.
        """
        pieces = [(row, sentence) for row, text in enumerate(texts) for sentence in sentences(text)]
        inferred = np.zeros((len(texts), len(self.relations), self.width), dtype=np.float32)
        counts = np.zeros((len(texts), 1, 1), dtype=np.float32)
        for (row, _), states in zip(pieces, self._states([s for _, s in pieces]), strict=True):
            inferred[row] += states
            counts[row] += 1
        inferred /= np.maximum(counts, 1)
        return inferred

    def _states(self, events: Sequence[str]) -> NDArray[np.float32]:
        """Events → [N, 3, width]."""
        cut = map(self._cut, events)
        prompts = [prompt(event, relation) for event in cut for relation in self.relations]
        states = np.zeros((len(prompts), self.width), dtype=np.float32)
        by_length = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # little padding
        with torch.inference_mode():
            for start in range(0, len(prompts), BATCH):
                rows = by_length[start : start + BATCH]
                states[rows] = self._first_states([prompts[n] for n in rows]).cpu().numpy()
        return states.reshape(len(events), len(self.relations), self.width)

    def _first_states(self, prompts: Sequence[str]) -> Tensor:
        """The decoder's last hidden state [N, width] at its first token."""
        batch = self._tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.device)
        first = self._tokenizer.bos_token_id
        start = torch.full((len(prompts), 1), first, dtype=torch.long, device=self.device)
        output = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=start,
            use_cache=False,
        )
        first_states: Tensor = output.last_hidden_state[:, 0].float()
        return first_states

    def _cut(self, event: str) -> str:
        """The event cut to EVENT_TOKENS tokens, so that the relation is never cut off."""
        tokens = self._tokenizer(event, add_special_tokens=False)["input_ids"]
        if len(tokens) <= EVENT_TOKENS:
            return event
        kept = tokens[:EVENT_TOKENS]
        return str(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False)).strip()


def prompt(event: str, relation: str) -> str:
    """'<event> <relation> [GEN]' as in COMET's training.

    The tokenizer of that time dropped the spaces beside an added token, today's turn each into a
    token. Without spaces both give the tokens of training.
    """
    return f"{event}{relation}[GEN]"


def sentences(text: str) -> list[str]:
    """The sentences of an utterance, none if it is empty."""
    return [sentence for sentence in SENTENCE_END.split(text.strip()) if sentence]


def _read(path: str) -> tuple[Any, Any]:
    """Model and tokenizer. Of the published pickle torch reads tensors only."""
    model, report = AutoModelForSeq2SeqLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:  # transformers would initialise them at random
        raise ValueError(f"no weights for {sorted(report['missing_keys'])[0]}")
    return model, AutoTokenizer.from_pretrained(path)
