"""Commonsense features: inferred reactions and intentions, three vectors for each utterance.

Their order is the same everywhere: external (what others feel), internal (what the speaker feels),
purpose (what the speaker intends). ``Inferences`` turns the vectors into words, the annotators'
phrases nearest to each of them; a bundle keeps the phrases that annotators wrote most often.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stream_hbaf.errors import ModelError

Float32 = NDArray[np.float32]

RELATIONS = ("external", "internal", "purpose")
MAX_PHRASES = {"external": 250, "internal": 300, "purpose": 650}  # feelings are few
PARTS = ("phrases", "embeddings", "prior")
SMOOTHING = 0.5  # added to every count, so that a phrase never written has a prior too
SIMILARITY = 0.91  # of difflib: "embarassed", "embarrassed"; not "thankful", "thoughtful"
MIN_LETTERS = 7  # shorter words that are similar are different words


class Commonsense(Protocol):
    """Infers commonsense features from texts or from their text features."""

    @property
    def width(self) -> int:
        """K, the width of one relation's vector."""

    def infer_texts(self, texts: Sequence[str], *, features: Float32) -> Float32:
        """N texts and their text features [N, D] → inferences float32 [N, 3, K].

        Each implementation uses what it was trained on: COMET the texts, heads the features. A row
        depends on its own text only.
        """


class NoCommonsense:
    """Zeros, for a network trained without commonsense."""

    def __init__(self, width: int) -> None:
        self.width = width

    def infer_texts(self, texts: Sequence[str], *, features: Float32) -> Float32:
        """Text features [N, D] → zeros [N, 3, K]."""
        return np.zeros((len(features), len(RELATIONS), self.width), dtype=np.float32)


class Head(nn.Module):
    """One relation: text features [N, D] → the direction [N, K] of the annotators' phrases.

    Of length 1, since training compares it with the phrases' embeddings by cosine.
    """

    def __init__(self, text_width: int, *, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(text_width),
            nn.Linear(text_width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
        )

    def forward(self, text: Tensor) -> Tensor:
        return F.normalize(self.layers(text), dim=-1)


class Event2MindHeads(nn.Module):
    """Commonsense distilled from Event2Mind's and ATOMIC's annotations into three small heads.

    Their relations are COMET's: external = oReact, internal = xReact, purpose = xIntent.
    They replace COMET in the paper's section 3.1.2: instead of generating an inference they give
    its direction among sentence embeddings, which are the untuned text encoder's features.
    """

    def __init__(
        self, *, text_width: int, width: int, hidden: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.text_width, self.width, self.hidden = text_width, width, hidden
        sizes: dict[str, Any] = {"hidden": hidden, "width": width, "dropout": dropout}
        self.heads = nn.ModuleDict({name: Head(text_width, **sizes) for name in RELATIONS})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Event2MindHeads":
        """Heads with the sizes and weights of a state_dict.

        Raises LookupError, RuntimeError or ValueError if the tensors don't fit each other.
        """
        hidden, text_width = tensors["heads.external.layers.1.weight"].shape
        width, hidden_again = tensors["heads.external.layers.4.weight"].shape
        if hidden_again != hidden:  # so that what is built is no larger than the tensors are
            raise ValueError(f"commonsense heads are {hidden} and {hidden_again} wide")
        heads = cls(text_width=text_width, width=width, hidden=hidden)
        heads.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return heads.eval()

    def forward(self, text: Tensor) -> Tensor:
        """[N, D] → [N, 3, K], with gradients."""
        return torch.stack([self.heads[relation](text) for relation in RELATIONS], dim=1)

    def infer_texts(self, texts: Sequence[str], *, features: Float32) -> Float32:
        """As every commonsense model's; only ``features`` [N, D] are used."""
        return self.infer(features)

    @torch.inference_mode()
    def infer(self, text: Float32) -> Float32:
        """Text features [N, D] → unit vectors float32 [N, 3, K]."""
        device = next(self.parameters()).device
        inferred: Float32 = self(torch.from_numpy(text).to(device)).cpu().numpy()
        return inferred


@dataclass(frozen=True, eq=False)
class Phrases:
    """The annotators' phrases of one relation."""

    texts: tuple[str, ...]
    embeddings: Float32  # [P, K], length 1, in the precision of a bundle
    prior: Float32  # [P], as ``prior_of`` gives it, in the precision of a bundle

    def scores(self, direction: Float32) -> Float32:
        """How well each phrase fits a direction [K]: [P]."""
        return score_phrases(direction, self.embeddings, prior=self.prior)


@dataclass(frozen=True, eq=False)
class Inferences:
    """The phrases of all relations. Immutable; fitted in training, kept in a bundle."""

    relations: Mapping[str, Phrases]  # external, internal, purpose

    @classmethod
    def choose(
        cls,
        written: Mapping[str, Mapping[str, int]],
        *,
        encode_phrases: Callable[[Sequence[str]], Float32],
        temperature: float,
        most: Mapping[str, int] = MAX_PHRASES,
    ) -> "Inferences":
        """Keep the ``most`` frequent phrases of each relation; ``written`` are their counts.

        Phrases are normalised by ``make_plain`` first, and counted together if they are equal then.
        """
        relations = {}
        for relation in RELATIONS:
            counts = _plain_counts(written[relation], relation=relation)
            kept = sorted(counts, key=lambda phrase: (-counts[phrase], phrase))[: most[relation]]
            embeddings = encode_phrases(kept)
            length = np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-9)
            prior = prior_of([counts[phrase] for phrase in kept], temperature=temperature)
            relations[relation] = Phrases(tuple(kept), _round(embeddings / length), _round(prior))
        return cls(relations)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Inferences":
        """Inferences from what ``tensors`` gave. Raises ModelError naming a damaged tensor."""
        names = [f"{relation}.{part}" for relation in RELATIONS for part in PARTS]
        for name in sorted({*names} ^ {*tensors}):
            raise _damaged(name, "isn't known" if name in tensors else "is missing")
        relations = {relation: _phrases_from(tensors, relation) for relation in RELATIONS}
        width = relations[RELATIONS[0]].embeddings.shape[1]
        for relation, known in relations.items():
            if (own := known.embeddings.shape[1]) != width:
                raise _damaged(f"{relation}.embeddings", f"is {own} wide, not {width}")
        return cls(relations)

    def tensors(self) -> dict[str, Tensor]:
        """Phrases as UTF-8 bytes, one a line, uint8 [bytes]; embeddings and priors in float16."""
        found: dict[str, Tensor] = {}
        for relation, known in self.relations.items():
            lines = "\n".join(known.texts).encode()
            found |= {
                f"{relation}.phrases": torch.tensor(list(lines), dtype=torch.uint8),
                f"{relation}.embeddings": torch.from_numpy(known.embeddings).half(),
                f"{relation}.prior": torch.from_numpy(known.prior).half(),
            }
        return found

    def nearest(self, inferred: Float32, *, count: int = 3) -> dict[str, list[str]]:
        """Inferred vectors [3, K] → each relation's ``count`` likeliest phrases, best first.

        Not for an utterance without text: its vectors are zero, for which the most frequent
        phrases are the likeliest.
        """
        nearest = {}
        for relation, direction in zip(RELATIONS, inferred, strict=True):
            known = self.relations[relation]
            best = np.argsort(-known.scores(direction), kind="stable")[:count]
            nearest[relation] = [known.texts[row] for row in best]
        return nearest


def prior_of(counts: Sequence[float] | Float32, *, temperature: float) -> Float32:
    """τ log p(phrase), up to a constant, to be added to cosines: counts [P] → [P].

    Heads are trained by InfoNCE against phrases drawn by frequency, so that cos/τ estimates
    log p(phrase | event) - log p(phrase).
    """
    prior: Float32 = temperature * np.log(np.asarray(counts, np.float32) + np.float32(SMOOTHING))
    return prior.astype(np.float32)


def score_phrases(directions: Float32, embeddings: Float32, *, prior: Float32) -> Float32:
    """Directions [.., K] and phrases [P, K] of length 1 → scores [.., P], in units of a cosine."""
    scores: Float32 = directions @ embeddings.T + prior
    return scores


def make_plain(phrase: str, *, relation: str) -> str:
    """A phrase in its printed form, or "" if it is unusable.

    Intensifiers of feelings go, so that "also happy" is "happy"; placeholders of persons become
    words. Lists ("happy and glad"), numbers and purposes without "to" are unusable.
    """
    plain = re.sub(r"\bperson ?x\b|\bx\b", "the speaker", phrase)
    plain = re.sub(r"\bperson ?[yz]\b|\b[yz]\b", "someone", plain)
    plain = re.sub(r"(^to \w+|\bto|\bwith) person$", r"\1 someone", plain)
    if relation != "purpose":
        plain = re.sub(r"^((also|very|feels?|to feel) )+|( (also|too|as well))+$", "", plain)
    elif not plain.startswith("to "):
        return ""
    words = re.fullmatch(r"[^\W\d_]+([ '’-][^\W\d_]+)*", plain)
    return plain if words and plain != "nan" and " and " not in plain else ""


def _plain_counts(written: Mapping[str, int], *, relation: str) -> Counter[str]:
    """How often each plain phrase was written; misspelt words count as the correct ones.

    A long word that is similar to a more frequent one of the same first letter counts as misspelt.
    """
    counts: Counter[str] = Counter()
    for phrase, count in written.items():
        counts[make_plain(phrase, relation=relation)] += count
    del counts[""]
    by_letter: dict[str, list[str]] = {}
    for phrase in sorted(counts, key=lambda phrase: (-counts[phrase], phrase)):
        if len(phrase) < MIN_LETTERS or " " in phrase:
            continue
        known = by_letter.setdefault(phrase[0], [])
        meant = difflib.get_close_matches(phrase, known, n=1, cutoff=SIMILARITY)
        if meant:
            counts[meant[0]] += counts.pop(phrase)
        else:
            known.append(phrase)
    return counts


def _phrases_from(tensors: Mapping[str, Tensor], relation: str) -> Phrases:
    lines, embeddings, prior = (tensors[f"{relation}.{part}"] for part in PARTS)
    if lines.dtype != torch.uint8 or lines.dim() != 1:
        raise _damaged(f"{relation}.phrases", "isn't a row of bytes")
    try:
        text = lines.numpy().tobytes().decode()
    except UnicodeDecodeError:
        raise _damaged(f"{relation}.phrases", "isn't UTF-8") from None
    texts = tuple(text.split("\n")) if text else ()
    for part, tensor, dim in (("embeddings", embeddings, 2), ("prior", prior, 1)):
        if tensor.dim() != dim or len(tensor) != len(texts):
            raise _damaged(f"{relation}.{part}", f"doesn't fit {len(texts)} phrases")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise _damaged(f"{relation}.{part}", "holds what isn't a number")
    return Phrases(texts, embeddings.float().numpy(), prior.float().numpy())


def _damaged(tensor: str, what: str) -> ModelError:
    return ModelError(f"inferences: the tensor '{tensor}' {what}; get the bundle again")


def _round(values: Float32) -> Float32:
    """Round to the precision of a bundle, so that a loaded bundle gives the same numbers."""
    return values.astype(np.float16).astype(np.float32)
