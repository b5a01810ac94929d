"""An utterance becomes features: what was inferred of it, said in the annotators' own words.

Commonsense heads give directions among phrases' embeddings. Here are the phrases that annotators
wrote most often, so that a direction can be read.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stream_hbaf.errors import ModelError
from stream_hbaf.features.commonsense import RELATIONS

Float32 = NDArray[np.float32]

MOST = {"external": 250, "internal": 300, "purpose": 650}  # feelings are few, purposes many
PARTS = ("phrases", "embeddings", "prior")
UNSEEN = 0.5  # added to every count, so that a phrase never written has a prior too
ALIKE = 0.91  # of difflib: "embarassed" and "embarrassed", but not "thankful" and "thoughtful"
LONG = 7  # letters; shorter words that are alike are other words


@dataclass(frozen=True, eq=False)
class Phrases:
    """What annotators wrote under one relation."""

    texts: tuple[str, ...]
    embeddings: Float32  # [P, K], length 1, in the precision of a bundle
    prior: Float32  # [P], as ``prior_of`` gives it, in the precision of a bundle

    def scores(self, direction: Float32) -> Float32:
        """How well each phrase fits a direction [K]: [P]."""
        return score_phrases(direction, self.embeddings, prior=self.prior)


@dataclass(frozen=True, eq=False)
class Inferences:
    """Says three inferred vectors in words. Immutable; made once, kept in a bundle."""

    relations: Mapping[str, Phrases]  # external, internal, purpose

    @classmethod
    def choose(
        cls,
        written: Mapping[str, Mapping[str, int]],
        *,
        encode_phrases: Callable[[Sequence[str]], Float32],
        temperature: float,
        most: Mapping[str, int] = MOST,
    ) -> "Inferences":
        """Keep the ``most`` frequent of each relation's phrases, ``written`` so many times.

        Phrases are made plain first, and counted together if they are the same then.
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
        """Rebuild what ``tensors`` gave. Raises ModelError naming the tensor that is damaged."""
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
        """Phrases as their UTF-8 bytes, one a line, uint8 [bytes]; the rest in float16."""
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
        """Inferred vectors [3, K] → of each relation the ``count`` likeliest phrases, best first.

        The vectors of an utterance without words are zero: don't ask for them, as only the most
        frequent phrases would be said.
        """
        said = {}
        for relation, direction in zip(RELATIONS, inferred, strict=True):
            known = self.relations[relation]
            best = np.argsort(-known.scores(direction), kind="stable")[:count]
            said[relation] = [known.texts[row] for row in best]
        return said


def prior_of(counts: Sequence[float] | Float32, *, temperature: float) -> Float32:
    """What to add to a cosine for how often annotators wrote each phrase: [P].

    Heads learn by InfoNCE against phrases drawn as often as they were written, so that cos/τ is
    log p(phrase | event) minus log p(phrase): the prior has to be added again, here times τ.
    """
    prior: Float32 = temperature * np.log(np.asarray(counts, np.float32) + np.float32(UNSEEN))
    return prior.astype(np.float32)


def score_phrases(directions: Float32, embeddings: Float32, *, prior: Float32) -> Float32:
    """Directions [.., K] and phrases [P, K] of length 1 → scores [.., P], in units of a cosine."""
    scores: Float32 = directions @ embeddings.T + prior
    return scores


def make_plain(phrase: str, *, relation: str) -> str:
    """The phrase as it is printed, or "" for one that can't be.

    Feelings lose what only strengthens them, so that "also happy" is "happy"; placeholders of
    persons become words. Lists ("happy and glad"), numbers and purposes without "to" are left out.
    """
    said = re.sub(r"\bperson ?x\b|\bx\b", "the speaker", phrase)
    said = re.sub(r"\bperson ?[yz]\b|\b[yz]\b", "someone", said)
    said = re.sub(r"(^to \w+|\bto|\bwith) person$", r"\1 someone", said)
    if relation != "purpose":
        said = re.sub(r"^((also|very|feels?|to feel) )+|( (also|too|as well))+$", "", said)
    elif not said.startswith("to "):
        return ""
    words = re.fullmatch(r"[^\W\d_]+([ '’-][^\W\d_]+)*", said)
    return said if words and said != "nan" and " and " not in said else ""


def _plain_counts(written: Mapping[str, int], *, relation: str) -> Counter[str]:
    """How often each plain phrase was written; misspelt words count as what they are meant to be.

    A long word that is like a more frequent one of the same first letter is taken for misspelt.
    """
    counts: Counter[str] = Counter()
    for phrase, count in written.items():
        counts[make_plain(phrase, relation=relation)] += count
    del counts[""]
    by_letter: dict[str, list[str]] = {}
    for phrase in sorted(counts, key=lambda phrase: (-counts[phrase], phrase)):
        if len(phrase) < LONG or " " in phrase:
            continue
        known = by_letter.setdefault(phrase[0], [])
        meant = difflib.get_close_matches(phrase, known, n=1, cutoff=ALIKE)
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
    """To the precision of a bundle, so that what is loaded is what was made."""
    return values.astype(np.float16).astype(np.float32)
