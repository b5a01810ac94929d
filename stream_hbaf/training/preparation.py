"""Prepares the corpora of a recipe: texts and audio become features, by the code of live use.

Everything is fitted on train splits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stream_hbaf.bundle_config import NONE
from stream_hbaf.corpora.asr_errors import Lexicon, lexicon_of, simulate_asr_errors
from stream_hbaf.corpora.cache import EncodeDialogues, cached_dialogue_encoder, infer_commonsense
from stream_hbaf.corpora.dataset import (
    NO_LABEL,
    Dataset,
    Rows,
    label_indices,
    number_speakers,
    rows_of,
    vote_shares,
)
from stream_hbaf.corpora.dialogue import (
    SPLITS,
    Corpus,
    Dialogue,
    LabelledUtterance,
    Split,
    has_sound,
    utterances_of,
)
from stream_hbaf.corpora.open_corpus import publication_of, training_sessions
from stream_hbaf.errors import ModelError
from stream_hbaf.features.baseline import Baseline
from stream_hbaf.features.commonsense import Commonsense
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import TextEncoder, Turn
from stream_hbaf.training.audio_features import (
    PLAIN,
    CorpusAudio,
    class_balanced,
    fit_scaling,
    measure_corpus,
)
from stream_hbaf.training.batches import Clips, TrainingSet
from stream_hbaf.training.commonsense_heads import PreparedCommonsense, prepare_commonsense
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.recipe_corpora import RecipeCorpora, draw_asr_errors, open_corpora
from stream_hbaf.training.scoring import ASR_ERRORS, GOLD, ScoredCorpus
from stream_hbaf.training.text_encoder import tuned_layers

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]
MASKS = ("audio_mask", "text_mask")
Change = Callable[[str], str]  # of an utterance's text

LANGUAGE = "en"  # that the text encoders read; texts in others are left out
NEUTRAL = "neutral"
SITTING_SEED = 0  # of the order in which a speaker's clips are heard


@dataclass(frozen=True)
class Prepared:
    """What networks are trained on and scored by, and all of a bundle but the network.

    In another process it arrives without its models, which are large and not needed to fit.
    """

    labels: tuple[str, ...]
    training: TrainingSet
    scored: Mapping[Split, tuple[ScoredCorpus, ...]]  # dev, the main corpus first; of one, test too
    scaling: Scaling | None  # None without audio
    acoustic_widths: tuple[int, ...]  # columns of each part of the audio, as measured
    encoder: TextEncoder | None
    tuned: Mapping[str, Tensor]
    commonsense: PreparedCommonsense | None
    corpora: Mapping[str, Any]  # what was used of each, as metrics.json says it
    skipped: tuple[str, ...] = ()  # utterances without audio, and why

    @property
    def widths(self) -> dict[str, int]:
        """Of the features and the output, as ``Recipe.network_config`` takes them."""
        return {
            "audio_width": 0 if self.scaling is None else self.scaling.width,
            "text_width": self.training.dialogues.text.shape[-1],
            "commonsense_width": self.training.dialogues.commonsense.shape[-1],
            "classes": len(self.labels),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None, "commonsense": None, "tuned": {}}


def prepare(
    recipe: Recipe,
    corpora: Path,
    *,
    splits: Sequence[Split] = SPLITS,
    cache: Path = Path("cache"),
    device: str = "cpu",
    progress: Progress = print,
) -> Prepared:
    """Read the recipe's corpora under ``corpora`` and give each utterance its features.

    Dev and test are prepared if they are among ``splits``. Interrupted, it takes up what is in
    ``cache``. Raises CorpusError for a corpus that can't be used, ConfigError for corpora that
    don't fit together, ModelError for an encoder or for text features that aren't finite.
    """
    opened = open_corpora(recipe, corpora)
    measure = partial(measure_corpus, recipe=recipe, corpora=corpora)
    audio = {
        name: measure(
            corpus,
            splits=[one for one in opened.splits_of(name) if one in ("train", *splits)],
            device=device,
            cache=cache / "audio",
            progress=progress,
        )
        for name, corpus in {**opened.used, **opened.held_out}.items()
        if recipe.audio.representation != NONE
        if opened.alone or has_sound(_all_dialogues(corpus), recipe.audio.representation)
    }
    encoder, tuned = _prepare_encoder(recipe, opened, device=device, cache=cache, progress=progress)
    commonsense = prepare_commonsense(
        recipe.commonsense,
        corpora,
        encoder=encoder,
        half=bool(tuned) and recipe.text_encoder.bfloat16,
        cache=cache,
        progress=progress,
    )
    trained = {name: one for name, one in audio.items() if name in opened.used}
    scaling = fit_scaling(trained, opened.used, recipe.audio)
    out_of_fold: Mapping[str, Float32] = {}
    if recipe.text_encoder.out_of_fold:
        out_of_fold = encode_out_of_fold(
            recipe, corpora, device=device, cache=cache, progress=progress
        )
    maker = _DatasetMaker(
        recipe, opened, encoder, commonsense.model, audio, scaling, cache, out_of_fold
    )
    return Prepared(
        labels=opened.labels,
        training=maker.training_set(),
        scored={
            split: found
            for split in SPLITS[1:]
            if split in splits and (found := maker.scored(split))
        },
        scaling=scaling,
        acoustic_widths=() if recipe.takes_tokens else next((a.widths for a in audio.values()), ()),
        encoder=encoder,
        tuned=tuned,
        commonsense=commonsense,
        corpora=opened.describe(with_audio=audio),
        skipped=tuple(line for one in audio.values() for line in one.skipped),
    )


def _all_dialogues(corpus: Corpus) -> list[Dialogue]:
    return [dialogue for split in SPLITS for dialogue in corpus.splits[split]]


def _prepare_encoder(
    recipe: Recipe, opened: RecipeCorpora, *, device: str, cache: Path, progress: Progress
) -> tuple[TextEncoder, Mapping[str, Tensor]]:
    """The tuned text encoder, and the tensors that tuning changed."""
    config = recipe.text_encoder
    tuned = tuned_layers(
        config,
        opened.texts,
        default=tuple(opened.dialogues or opened.clips),
        errors=recipe.asr_errors,
        device=device,
        cache=cache / "tuned",
        progress=progress,
    )
    encoder = TextEncoder(
        config.name, tuned=tuned, context=config.context, device=device, tokens=recipe.takes_tokens
    )
    return encoder, tuned


def encode_out_of_fold(
    recipe: Recipe, corpora: Path, *, device: str, cache: Path, progress: Progress
) -> dict[str, Float32]:
    """Text features [U, L] of the dialogues of IEMOCAP's training sessions, by their names: of each
    session by an encoder that was tuned without it.

    On its own labels an encoder is surer than it will ever be again, so that a network which is
    trained on such features learns to trust the text alone (stacked generalisation, Wolpert 1992).
    The encoders are the same whatever ``dev_fold`` the recipe has.
    """
    name, config = next(iter(recipe.corpora.items()))
    features: dict[str, Float32] = {}
    for session in training_sessions(config.fold):
        settings = {name: config.model_copy(update={"dev_fold": session})}
        fold = recipe.model_copy(update={"corpora": settings})
        opened = open_corpora(fold, corpora)
        encoder, _ = _prepare_encoder(fold, opened, device=device, cache=cache, progress=progress)
        held_out = opened.used[name].splits["dev"]
        turns = [tuple(Turn(u.speaker, u.text) for u in one.utterances) for one in held_out]
        rows = cached_dialogue_encoder(encoder, cache / "text")(turns)
        ends = np.cumsum([len(dialogue) for dialogue in turns])
        of_dialogue = np.split(rows, ends[:-1])
        features |= {one.id: own for one, own in zip(held_out, of_dialogue, strict=True)}
    return features


@dataclass(frozen=True)
class _DatasetMaker:
    """Makes datasets: holds what all corpora and splits share."""

    recipe: Recipe
    opened: RecipeCorpora
    encoder: TextEncoder
    commonsense: Commonsense
    audio: Mapping[str, CorpusAudio]
    scaling: Scaling | None
    cache: Path
    out_of_fold: Mapping[str, Float32]  # text features of train dialogues; empty: the encoder's

    @cached_property
    def encode(self) -> EncodeDialogues:
        """Of dialogues, from the cache where they are there."""
        return cached_dialogue_encoder(self.encoder, self.cache / "text")

    @cached_property
    def lexicon(self) -> Lexicon:
        """All words that ASR errors may put in the place of others."""
        names = dict.fromkeys([*(self.recipe.text_encoder.corpora or ()), *self.opened.dialogues])
        return lexicon_of(
            utterance.text
            for name in names
            if name in self.opened.texts
            for utterance in utterances_of(self.opened.texts[name].splits["train"])
        )

    @cached_property
    def blocks(self) -> dict[str, slice]:
        """Columns of each part of the audio as the network takes it; none if it takes tokens."""
        if self.scaling is None or self.recipe.takes_tokens:
            return {}
        parts = self.recipe.audio.representation.split("+")
        columns = self.scaling.blocks(next(iter(self.audio.values())).widths)
        return dict(zip(parts, columns, strict=True))

    @cached_property
    def baseline(self) -> Baseline | None:
        """Makes audio relative to its speaker's past; None if the recipe has none."""
        config = self.recipe.audio.baseline
        if config is None or self.scaling is None:
            return None
        return Baseline.of(config, self.blocks, width=self.scaling.width)

    def make(self, name: str, split: Split, change: Change = str) -> Dataset:
        """A corpus's split as features, its texts as ``change`` gives them."""
        corpus = self.opened.corpus(name)
        dialogues = corpus.splits[split]
        reads = publication_of(name).language in (LANGUAGE, None)
        turns = [
            tuple(Turn(u.speaker, change(u.text) if reads else "") for u in dialogue.utterances)
            for dialogue in dialogues
        ]
        texts = [turn.text for dialogue in turns for turn in dialogue]
        text = self._encode(name, split, turns)
        commonsense = infer_commonsense(
            self.commonsense, texts, features=text, cache=self.cache / "commonsense"
        )
        utterances = utterances_of(dialogues)
        _require_finite(f"{name}, {split}", utterances, text=text, commonsense=commonsense)
        labels = label_indices(utterances, corpus.labels)
        audio = self.audio.get(name)
        mask = None if audio is None else audio.mask(split)
        if mask is not None and name not in self.opened.dialogues:
            labels = np.where(mask, labels, NO_LABEL)  # nothing is left of a clip without audio
        return Dataset(
            labels=labels,
            text=text,
            commonsense=commonsense,
            audio={} if audio is None else audio.scaled(self.scaling, split),
            dialogues=rows_of(dialogues),
            audio_mask=mask,
            text_mask=np.array([bool(one.strip()) for one in texts]),
            speakers=number_speakers(dialogues),
            votes=vote_shares(utterances, corpus.labels),
            baseline=self.baseline,
            parts=tuple(dialogue.part for dialogue in dialogues),
        )

    def _encode(self, name: str, split: Split, turns: Sequence[Sequence[Turn]]) -> Float32:
        """Text features of a split; of train from encoders that haven't seen its labels, if so
        configured.
        """
        if split != "train" or not self.out_of_fold:
            return self.encode(turns)
        found = [self.out_of_fold[dialogue.id] for dialogue in self.opened.used[name].splits[split]]
        return np.concatenate(found)

    def training_set(self) -> TrainingSet:
        """All train splits: the main corpus's in every version of its texts, the others'."""
        opened, errors, parts = self.opened, self.recipe.asr_errors, []
        for number, name in enumerate(opened.dialogues):
            parts.append(self.make(name, "train"))
            for version in range(errors.versions if number == 0 else 0):
                draw = np.random.default_rng([errors.seed, version])
                change = partial(draw_asr_errors, errors=errors, lexicon=self.lexicon, draw=draw)
                parts.append(self.make(name, "train", change))
        clips = self._clips() if opened.clips else None
        neutral = opened.labels.index(NEUTRAL) if NEUTRAL in opened.labels else None
        blocks = tuple(self.blocks.values())
        if clips is not None and not parts:
            return TrainingSet(clips.dataset, (), clips=clips, neutral=neutral, blocks=blocks)
        together, rows = _join(parts)
        versions = tuple(zip(*rows[: 1 + errors.versions], strict=True))
        others = list(zip(parts, rows, strict=True))[1 + errors.versions :]
        further, with_audio = (
            tuple(
                dialogue
                for part, of_part in others
                if bool(part.audio) is audio
                for dialogue in of_part
            )
            for audio in (False, True)
        )
        return TrainingSet(together, versions, further, with_audio, clips, neutral, blocks)

    def _clips(self) -> Clips:
        """All corpora's train clips; dialogues are speakers."""
        parts = [self.make(name, "train") for name in self.opened.clips]
        together, _ = _join(parts)
        speakers = np.array(
            [
                f"{name} {utterance.speaker}"
                for name, corpus in self.opened.clips.items()
                for utterance in utterances_of(corpus.splits["train"])
            ]
        )
        dataset = _seated(together, speakers)
        weights = class_balanced([part.labels for part in parts])
        relative = {version: dataset.audio_given(version) for version in dataset.audio}
        return Clips(dataset, weights, relative)

    def scored(self, split: Split) -> tuple[ScoredCorpus, ...]:
        """The corpora that are scored by this split, the main one first."""
        opened, main = self.opened, next(iter(self.opened.dialogues), "")
        every = {**opened.dialogues, **opened.clips, **opened.held_out}
        return tuple(
            self._main(name, split) if name == main else self._further(name, split)
            for name, corpus in every.items()
            if split in opened.splits_of(name) and corpus.splits[split]
            if name == main or name in self.audio
        )

    def _main(self, name: str, split: Split) -> ScoredCorpus:
        """The main corpus's split, as written and with simulated ASR errors."""
        errors, texts = self.recipe.asr_errors, {GOLD: self.make(name, split)}
        if errors.versions:
            draw = np.random.default_rng(errors.seed)
            rate, lexicon = errors.dev_error_rate, self.lexicon
            change = partial(simulate_asr_errors, rate=rate, draw=draw, lexicon=lexicon)
            texts[ASR_ERRORS] = self.make(name, split, change)
        return ScoredCorpus(name, texts)

    def _further(self, name: str, split: Split) -> ScoredCorpus:
        """Another corpus with audio; with a baseline a speaker's clips are one dialogue."""
        gold = self.make(name, split)
        dialogues = self.opened.corpus(name).splits[split]
        are_clips = all(len(dialogue.utterances) == 1 for dialogue in dialogues)
        if are_clips and self.baseline is not None:
            gold = _seated(gold, np.array([one.speaker for one in utterances_of(dialogues)]))
        return ScoredCorpus(name, {GOLD: gold}, are_clips=are_clips)


def _require_finite(
    where: str, utterances: Sequence[LabelledUtterance], *, text: Float32, commonsense: Float32
) -> None:
    """Raise ModelError naming the first utterance whose features aren't finite."""
    first = text if text.ndim == 2 else text[:, 0]  # of tokens, further ones may be missing
    for name, rows in (("text", first), ("commonsense", commonsense)):
        broken = ~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
        if broken.any():
            raise ModelError(
                f"{where}: the {name} features of utterance {utterances[int(broken.argmax())].id} "
                "aren't finite; look at its text, or tune the encoder again at a lower rate"
            )


def _join(parts: Sequence[Dataset]) -> tuple[Dataset, list[tuple[Rows, ...]]]:
    """All rows in one dataset, and each part's dialogues there."""
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])
    rows = [
        tuple(dialogue + start for dialogue in part.dialogues)
        for part, start in zip(parts, starts, strict=False)
    ]

    def joined(name: str) -> Any:
        """All parts' rows of one field, what a part lacks as zeros; None if all lack it."""
        given = [getattr(part, name) for part in parts]
        shape = next((array.shape[1:] for array in given if array is not None), None)
        if shape is None:
            return None
        return np.concatenate(
            [
                np.zeros((len(part.labels), *shape), bool if name in MASKS else np.float32)
                if array is None
                else array
                for part, array in zip(parts, given, strict=True)
            ]
        )

    names = ("labels", "text", "commonsense", "audio_mask", "text_mask", "speakers", "votes")
    together = Dataset(
        audio=_join_audio(parts),
        dialogues=tuple(dialogue for of_part in rows for dialogue in of_part),
        baseline=parts[0].baseline,
        **{name: joined(name) for name in names},
    )
    return together, rows


def _seated(clips: Dataset, speakers: NDArray[np.str_]) -> Dataset:
    """Clips as dialogues of one speaker's [N] each, in an order drawn once: as in one sitting."""
    draw = np.random.default_rng(SITTING_SEED)
    there = clips.labelled
    by_speaker = (np.flatnonzero((speakers == one) & there) for one in np.unique(speakers))
    dialogues = tuple(draw.permutation(rows) for rows in by_speaker if len(rows))
    return replace(clips, dialogues=dialogues, speakers=None)


def _join_audio(parts: Sequence[Dataset]) -> dict[str, Float32]:
    """All parts' audio by version: one without audio is zero, and one that is plain is it in each
    version.
    """
    versions = max((list(part.audio) for part in parts), key=len)
    shape = next((rows.shape[1:] for part in parts for rows in part.audio.values()), ())
    absent = [np.zeros((len(part.labels), *shape), np.float32) for part in parts if not part.audio]
    filled = iter(absent)
    given = [part.audio or {PLAIN: next(filled)} for part in parts]
    return {
        version: np.concatenate([audio.get(version, audio[PLAIN]) for audio in given])
        for version in versions
    }
