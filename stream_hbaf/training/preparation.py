"""Training, first half: a corpus becomes features, by the very code that live use has.

Everything is fitted on the train split.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from stream_hbaf.corpora.cache import (
    EncodeDialogues,
    EncodeTexts,
    cached_dialogue_encoder,
    digest_of,
    infer_commonsense,
    key_of,
)
from stream_hbaf.corpora.dataset import (
    Dataset,
    label_indices,
    number_speakers,
    rows_of,
    utterances_of,
)
from stream_hbaf.corpora.dialogue import SPLITS, Corpus, Dialogue, Split
from stream_hbaf.corpora.open_corpus import open_corpus, select
from stream_hbaf.errors import ModelError
from stream_hbaf.features.comet import open_comet
from stream_hbaf.features.commonsense import Commonsense, Event2MindHeads, NoCommonsense
from stream_hbaf.features.context import Turn
from stream_hbaf.features.inferences import Inferences
from stream_hbaf.features.scaling import Scaling
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.files import atomic_write_bytes, atomic_write_text
from stream_hbaf.training.audio_features import Sound, prepare_sound
from stream_hbaf.training.commonsense_heads import (
    HeadsConfig,
    build_inferences,
    distil,
    read_annotations,
)
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.text_augment import WordsConfig, labelled_turns, mixed_lessons
from stream_hbaf.training.text_encoder import TuningConfig, lessons_of, tune_encoder

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A corpus as a recipe wants it, and all of a bundle but the network.

    In another process it arrives without its models, which are large and not needed to fit.
    """

    labels: tuple[str, ...]
    scaling: Scaling | None  # None without sound
    material: Mapping[Split, Dataset]
    ids: Mapping[Split, tuple[str, ...]]  # of the material's rows
    encoder: TextEncoder | None
    tuned: Mapping[str, Tensor]
    commonsense: Commonsense | None
    figures: Mapping[str, Any]  # how well the commonsense heads retrieve
    skipped: tuple[str, ...] = ()  # utterances without sound, and why

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None, "commonsense": None, "tuned": {}}


@dataclass(frozen=True)
class PreparedHeads:
    """What is made of the annotations, in the precision of a bundle."""

    heads: Event2MindHeads
    inferences: Inferences  # says what the heads infer in words
    figures: Mapping[str, Any]  # how well the heads retrieve


def prepare(
    recipe: Recipe,
    corpora: Path,
    *,
    cache: Path = Path("cache"),
    device: str = "cpu",
    progress: Progress = print,
) -> Prepared:
    """Read the recipe's corpus under ``corpora`` and give each utterance its features.

    Everything is fitted on the train split. Raises CorpusError for a corpus that can't be used,
    ModelError for an encoder or for text features that aren't numbers.
    """
    corpus = select(open_corpus(recipe.corpus, corpora), fold=recipe.fold)
    tuned = prepare_layers(
        recipe.encoder,
        corpus,
        recipe.tuning,
        device=device,
        cache=cache / "tuned",
        progress=progress,
    )
    corpus = select(corpus, classes=recipe.classes)  # words are learnt with all labels there are
    context = recipe.tuning.context
    encoder = TextEncoder(
        recipe.encoder, tuned=tuned, context=context, device=device, tokens=recipe.takes_tokens
    )
    encode = cached_dialogue_encoder(encoder, cache / "text")
    commonsense, figures = _prepare_commonsense(
        recipe, corpora, encoder, device=device, cache=cache, progress=progress
    )
    sound = prepare_sound(corpus, recipe, device=device, cache=cache / "audio", progress=progress)
    text = {split: encode(_turns(corpus.splits[split])) for split in SPLITS}
    inferred = {
        split: infer_commonsense(
            commonsense,
            [utterance.text for utterance in utterances_of(corpus.splits[split])],
            features=text[split],
            cache=cache / "commonsense",
        )
        for split in SPLITS
    }
    return Prepared(
        labels=corpus.labels,
        scaling=sound.scaling,
        material={
            split: _material(corpus, split, text[split], inferred[split], sound) for split in SPLITS
        },
        ids={s: tuple(u.id for u in utterances_of(corpus.splits[s])) for s in SPLITS},
        encoder=encoder,
        tuned=tuned,
        commonsense=commonsense,
        figures=figures,
        skipped=sound.skipped,
    )


def prepare_layers(
    name: str,
    corpus: Corpus | Sequence[Corpus],
    plan: TuningConfig,
    *,
    words: WordsConfig | None = None,
    device: str = "cpu",
    cache: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """What of the encoder is fine-tuned on the corpus's words; float16, by name.

    With ``words``, on those of all of ``open_words``'s corpora, as it says.
    """
    if not plan.changes:
        return {}
    corpora = [corpus] if isinstance(corpus, Corpus) else list(corpus)
    labels = corpora[0].labels
    dialogues = [
        {split: labelled_turns(known.splits[split], labels) for split in SPLITS[:2]}
        for known in corpora
    ]
    if words is None:
        lessons = lessons_of(dialogues[0])
        key = key_of(name, repr(plan), repr(labels), repr(dialogues[0]))
    else:
        lessons = mixed_lessons(corpora, words)
        key = key_of(name, repr(plan), repr(words), repr(labels), repr(dialogues))
    file = cache / f"{key}.safetensors"
    if not file.exists():
        tuned = tune_encoder(
            TextEncoder(name, context=plan.context, device=device),
            lessons=lessons,
            classes=len(labels),
            plan=plan,
            folder=cache / key,
            progress=progress,
        )
        atomic_write_bytes(file, save(tuned.tensors))
    return load_file(file)


def mean_of_tunings(name: str, tunings: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several tunings of one encoder, float16; what one left alone counts as it was."""
    untuned = dict(TextEncoder(name).model.named_parameters())
    return {
        layer: torch.stack([tuned.get(layer, untuned[layer]).float() for tuned in tunings])
        .mean(0)
        .half()
        .detach()
        for layer in sorted({layer for tuned in tunings for layer in tuned})
    }


def as_adapters(name: str, tuned: Mapping[str, Tensor], *, rank: int) -> dict[str, Tensor]:
    """A tuning of whole layers as low-rank changes, float16: a quarter of the size or less.

    Of each matrix the ``rank`` largest singular directions of what tuning changed; what is smaller
    than that stays whole.
    """
    untuned = dict(TextEncoder(name).model.named_parameters())
    kept = {}
    for layer, tensor in tuned.items():
        if tensor.dim() != 2 or min(tensor.shape) <= rank:
            kept[layer] = tensor
            continue
        change = tensor.float() - untuned[layer].detach()
        out, sizes, into = torch.linalg.svd(change, full_matrices=False)
        kept[f"{layer}.lora_b"] = (out[:, :rank] * sizes[:rank]).half()
        kept[f"{layer}.lora_a"] = into[:rank].half()
    return {layer: tensor.contiguous() for layer, tensor in kept.items()}


def prepare_heads(
    corpora: Path,
    plan: HeadsConfig,
    *,
    encoder: TextEncoder,
    half: bool = False,
    cache: Path,
    progress: Progress,
) -> PreparedHeads:
    """Commonsense heads for an encoder, kept under ``cache``/heads; loaded, they are the same.

    Heads read events as dialogues of one turn by nobody; phrases are for the untuned encoder.
    Both only teach, so they may be read in ``half`` precision. Raises CorpusError, ModelError.
    """
    annotations = read_annotations(corpora, atomic=plan.atomic)
    untuned = TextEncoder(encoder.id, device=encoder.device)
    weights = [digest_of(read.model.state_dict()) for read in (encoder, untuned)]
    key = key_of(repr(plan), repr(annotations), repr(encoder.context), repr(half), *weights)
    file = cache / "heads" / f"{key}.safetensors"
    figures = file.with_suffix(".json")
    if not file.exists():  # it is written last
        encode, encode_phrases = (
            _of_single_turns(cached_dialogue_encoder(read, cache / "text", half=half))
            for read in (encoder, untuned)
        )
        heads, found = distil(
            annotations, plan=plan, encode=encode, encode_phrases=encode_phrases, progress=progress
        )
        said = build_inferences(annotations, plan=plan, encode_phrases=encode_phrases)
        tensors = {f"heads.{name}": tensor.half() for name, tensor in heads.state_dict().items()}
        tensors |= {f"inferences.{name}": tensor for name, tensor in said.tensors().items()}
        atomic_write_text(figures, json.dumps(found))
        atomic_write_bytes(file, save(tensors))
    kept = load_file(file)
    return PreparedHeads(
        Event2MindHeads.from_tensors(_under(kept, "heads.")),
        Inferences.from_tensors(_under(kept, "inferences.")),
        json.loads(figures.read_text(encoding="utf-8")),
    )


def _prepare_commonsense(
    recipe: Recipe,
    corpora: Path,
    encoder: TextEncoder,
    *,
    device: str,
    cache: Path,
    progress: Progress,
) -> tuple[Commonsense, dict[str, Any]]:
    """What infers, and its figures.

    Where the encoder was tuned in half precision, events and phrases are read in it: there are
    ten times as many as utterances.
    """
    if recipe.commonsense == "none":
        return NoCommonsense(1), {}
    if recipe.commonsense != "event2mind":
        return open_comet(recipe.commonsense, device=device), {}
    half = bool(recipe.tuning.changes) and recipe.tuning.bfloat16
    prepared = prepare_heads(
        corpora, recipe.heads, encoder=encoder, half=half, cache=cache, progress=progress
    )
    return prepared.heads, dict(prepared.figures)


def _of_single_turns(encode: EncodeDialogues) -> EncodeTexts:
    return lambda texts: encode([(Turn("", text),) for text in texts])


def _under(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _material(
    corpus: Corpus,
    split: Split,
    text: Float32,
    commonsense: Float32,
    sound: Sound,
) -> Dataset:
    utterances = utterances_of(corpus.splits[split])
    first = text if text.ndim == 2 else text[:, 0]  # of tokens, further ones may be missing
    for name, features in (("text", first), ("commonsense", commonsense)):
        broken = ~np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
        if broken.any():
            raise ModelError(
                f"{corpus.name}: the {name} features of utterance "
                f"{utterances[int(broken.argmax())].id} in {split} aren't numbers; "
                "look at its words, or tune the encoder again at a lower rate"
            )
    return Dataset(
        labels=label_indices(utterances, corpus.labels),
        text=text,
        commonsense=commonsense,
        audio={"": sound.features[split]} if sound.features else {},
        dialogues=rows_of(corpus.splits[split]),
        audio_mask=sound.there.get(split),
        text_mask=np.array([bool(u.text.strip()) for u in utterances]),
        speakers=number_speakers(corpus.splits[split]),
    )


def _turns(dialogues: Sequence[Dialogue]) -> list[tuple[Turn, ...]]:
    return [tuple(Turn(u.speaker, u.text) for u in d.utterances) for d in dialogues]
