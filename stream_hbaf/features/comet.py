"""An utterance becomes features: what COMET-ATOMIC 2020 would say it implies.

For those who have its weights (BART; Hwang et al. 2021, "(COMET-)ATOMIC 2020").
"""

import logging
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM
from transformers.models.auto.tokenization_auto import AutoTokenizer

from stream_hbaf.errors import ModelError
from stream_hbaf.features.pretrained import UNUSABLE, downloading, quietly

LOG = logging.getLogger(__name__)

MappingName = Literal["hbaf", "cosmic"]
# External, internal, purpose (decision 5): by the names' plain meaning, and as COSMIC has them.
MAPPINGS: dict[MappingName, tuple[str, str, str]] = {
    "hbaf": ("oReact", "xReact", "xIntent"),
    "cosmic": ("xReact", "xEffect", "xIntent"),
}
SETTINGS: dict[str, MappingName] = {"comet": "hbaf", "comet-cosmic": "cosmic"}  # "comet:<name>"
EVENT_TOKENS = 40  # COMET was trained on 48 with the relation; a longer sentence is cut
BATCH = 32
UNREADABLE = (*UNUSABLE, KeyError, pickle.PickleError)  # the published weights are a pickle
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def is_comet(setting: str) -> bool:
    """Whether a ``commonsense`` setting means COMET: 'comet:<name>' or 'comet-cosmic:<name>'."""
    kind, separator, name = setting.partition(":")
    return kind in SETTINGS and bool(separator and name)


def open_comet(setting: str, *, device: str = "cpu") -> "Comet":
    """Load what a ``commonsense`` setting names; ModelError if it names no COMET or none is there.

    'comet:<folder or hub name>' has the relations of mapping 'hbaf', 'comet-cosmic:…' of 'cosmic'.
    """
    if not is_comet(setting):
        raise ModelError(f"commonsense '{setting}': write comet:<folder or hub name>")
    kind, _, name = setting.partition(":")
    return Comet(name, device=device, mapping=SETTINGS[kind])


class Comet:
    """Commonsense from COMET: the state from which it would begin to generate an inference.

    COSMIC (Ghosal et al. 2020, its published feature extraction) reads '<event> <relation>'
    with COMET, a GPT, and takes the last layer's hidden state above the relation: where the first
    word of the inference is predicted. In BART, an encoder-decoder, that is the decoder's last
    hidden state above its first token, after the encoder read '<event> <relation> [GEN]'; the
    first token is <s>, as in COMET-ATOMIC 2020's training. As COSMIC does, an utterance of several
    sentences is their mean. Nothing is generated.

    ``name`` is a folder or a hub name. Raises ModelError if no usable weights are there, or if
    they aren't COMET's.
    """

    def __init__(self, name: str, *, device: str = "cpu", mapping: MappingName = "hbaf") -> None:
        self.id = name
        self.device = device
        self.relations = MAPPINGS[mapping]
        with quietly():
            self.model, self._tokenizer = _load(name)
        self._refuse_others()
        self.width = int(self.model.config.hidden_size)
        self.model.to(device).eval()

    def _refuse_others(self) -> None:
        """A model that isn't COMET would load and say nothing that means anything."""
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

        Each text is inferred by itself: the others don't matter (1e-5). ``features`` are for
        implementations that read them; COMET reads words.
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
        prompts = [
            prompt(event, relation)
            for event in map(self._cut, events)
            for relation in self.relations
        ]
        states = np.zeros((len(prompts), self.width), dtype=np.float32)
        by_length = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # little padding
        with torch.inference_mode():
            for start in range(0, len(prompts), BATCH):
                rows = by_length[start : start + BATCH]
                states[rows] = self._first_states([prompts[n] for n in rows]).cpu().numpy()
        return states.reshape(len(events), len(self.relations), self.width)

    def _first_states(self, prompts: Sequence[str]) -> Tensor:
        """The decoder's last hidden state [N, width] above the first token."""
        batch = self._tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.device)
        first = self._tokenizer.bos_token_id
        start = torch.full((len(prompts), 1), first, dtype=torch.long, device=self.device)
        read = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=start,
            use_cache=False,
        )
        state: Tensor = read.last_hidden_state[:, 0].float()
        return state

    def _cut(self, event: str) -> str:
        """The event, of at most EVENT_TOKENS tokens: what is cut must not be the relation."""
        tokens = self._tokenizer(event, add_special_tokens=False)["input_ids"]
        if len(tokens) <= EVENT_TOKENS:
            return event
        kept: str = self._tokenizer.decode(
            tokens[:EVENT_TOKENS], clean_up_tokenization_spaces=False
        )
        return kept.strip()


def prompt(event: str, relation: str) -> str:
    """'<event> <relation> [GEN]' as COMET read it in training.

    There the tokenizer took the spaces beside an added token away; today's make a token of each.
    Without spaces all of them give the tokens of training.
    """
    return f"{event}{relation}[GEN]"


def sentences(text: str) -> list[str]:
    """The sentences of an utterance, none if it is empty."""
    return [sentence for sentence in SENTENCE_END.split(text.strip()) if sentence]


def _load(name: str) -> tuple[Any, Any]:
    """From a folder or the hub's cache, else from the hub: who has the weights asks nobody."""
    local = Path(name).expanduser()
    if local.is_dir():
        return _try(
            lambda: _read(str(local), offline=True),
            f"COMET {name}: no usable model and "
            "tokenizer in that folder; it needs config.json, weights and tokenizer files",
        )
    if name.startswith((".", "/", "~")):
        raise ModelError(f"COMET {name}: there is no such folder; check the name")
    try:
        return _read(name, offline=True)
    except (OSError, ValueError) as error:
        LOG.debug("COMET %s is not on this machine: %s", name, error)
    return _try(
        lambda: _fetch(name),
        f"COMET {name}: not on this machine and "
        "can't be downloaded; check its name or go online once",
    )


def _fetch(name: str) -> tuple[Any, Any]:
    with downloading(name):
        return _read(name, offline=False)


def _try(read: Callable[[], tuple[Any, Any]], message: str) -> tuple[Any, Any]:
    try:
        return read()
    except UNREADABLE as error:
        LOG.debug("loading COMET failed: %s", error)
        raise ModelError(message) from None


def _read(path: str, *, offline: bool) -> tuple[Any, Any]:
    """Model and tokenizer. The published weights are a pickle: torch reads tensors only of it."""
    model, report = AutoModelForSeq2SeqLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=offline, output_loading_info=True
    )
    if report["missing_keys"]:  # transformers would fill them with chance
        raise ValueError(f"no weights for {sorted(report['missing_keys'])[0]}")
    return model, AutoTokenizer.from_pretrained(path, local_files_only=offline)
