"""Measures the audio of corpora, and fits the scaling and selection of acoustic features.

Shape letters: N utterances, W measured columns, A that the network takes; of tokens [N, F, W].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import LinearSVC
from sklearn.utils.extmath import randomized_svd

from stream_hbaf.corpora.augment import (
    CLEAN,
    CONDITIONS,
    evaluation_condition,
    read_noises_and_rooms,
    training_conditions,
)
from stream_hbaf.corpora.clips import ClipJob
from stream_hbaf.corpora.dataset import NO_LABEL, Flags, label_indices
from stream_hbaf.corpora.dialogue import Corpus, Split, utterances_of
from stream_hbaf.corpora.extraction import (
    Extracted,
    extract_corpus,
    extract_features,
    is_of_corpus,
)
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.features.acoustic import COMPARE
from stream_hbaf.features.representations import Scaling, shape_for
from stream_hbaf.training.recipe import AudioConfig, Recipe, SelectionConfig

Float32 = NDArray[np.float32]
Labels = NDArray[np.int64]
AnyArray = NDArray[Any]
Versions = Mapping[Split, Mapping[str, Float32]]  # by split and version of the audio: [N, W]
Progress = Callable[[str], None]

PLAIN = ""  # the version of the audio as recorded
FUNCTIONALS = "compare"  # thousands of columns, most of which say nothing of emotion


@dataclass(frozen=True)
class CorpusAudio:
    """One corpus's audio: features by split and version, and which utterances have none."""

    features: Versions  # or tokens, [N, F, W]
    widths: tuple[int, ...]  # columns of each part of the representation
    skipped: tuple[str, ...] = ()  # utterances without features, and why

    def scaled(self, scaling: Scaling | None, split: Split) -> dict[str, Float32]:
        """The split's features as the network takes them, [N, A] or [N, F, A]."""
        if scaling is None:
            return {}
        return {name: scale(scaling, rows) for name, rows in self.features[split].items()}

    def mask(self, split: Split) -> Flags:
        """[N], True where the split's utterances have features."""
        first = next(iter(self.features[split].values()))
        return np.asarray(np.isfinite(first.reshape(len(first), -1)).any(axis=1))


def measure_corpus(
    corpus: Corpus,
    *,
    splits: Sequence[Split],
    recipe: Recipe,
    corpora: Path,
    device: str,
    cache: Path,
    progress: Progress,
) -> CorpusAudio:
    """Measure the utterances of some splits, train's also augmented as the recipe says.

    With augmentation, dev and test are measured under every one of CONDITIONS, but not those of a
    corpus that is held out. What a corpus publishes instead of its audio is taken as it is. Raises
    CorpusError if no utterance of train has anything to measure, ConfigError for augmentation or a
    cut of a corpus by itself whose features don't come from clips.
    """
    audio = recipe.audio

    def show(done: int, total: int, clip: Path) -> None:
        if done % 500 == 0 or done == total:
            progress(f"{audio.representation}: {done} of {total} clips")

    settings: dict[str, Any] = {
        "representation": audio.representation,
        "cache": cache,
        "workers": recipe.workers,
        "device": device,
        "progress": show,
    }
    parts = replace(corpus, splits={split: corpus.splits[split] for split in splits})
    if is_of_corpus(parts, audio.representation):
        if len(recipe.corpora) == 1 and (audio.copies or audio.cut != "annotated"):
            raise ConfigError(
                f"audio: {audio.representation} of {corpus.name} is of whole dialogues as they are "
                "annotated; leave copies and cut out, or choose features of clips"
            )
        whole = extract_corpus(parts, **settings)
        rows = {split: {PLAIN: features} for split, features in whole.features.items()}
        return _checked(corpus.name, rows, [whole], recipe=recipe, progress=progress)
    of_splits, rows = [], {}
    for split in splits:
        augmented = audio.copies > 0 and corpus.name not in recipe.held_out
        jobs = _jobs(corpus, split, audio, augmented=augmented)
        sounds = None
        if augmented:
            sounds = read_noises_and_rooms(corpora / "speech", tested=split != "train")
        every = [job for of_one in jobs.values() for job in of_one]
        of_split = extract_features(every, sounds=sounds, **settings)
        versions = np.split(of_split.features, len(jobs)) if jobs else []
        rows[split] = dict(zip(jobs, versions, strict=True))
        of_splits.append(of_split)
    return _checked(corpus.name, rows, of_splits, recipe=recipe, progress=progress)


def _jobs(
    corpus: Corpus, split: Split, audio: AudioConfig, *, augmented: bool
) -> dict[str, list[ClipJob]]:
    """What is to be measured of a split: by version, each utterance under its condition."""
    jobs: dict[str, list[ClipJob]] = {}
    for index, one in enumerate(utterances_of(corpus.splits[split])):
        conditions = {PLAIN: CLEAN}
        if augmented and split == "train":
            drawn = enumerate(training_conditions(index, audio))
            conditions = {str(number) if number else PLAIN: each for number, each in drawn}
        elif augmented:
            names = {PLAIN if name == "clean" else name: name for name in CONDITIONS}
            conditions = {key: evaluation_condition(name, index) for key, name in names.items()}
        for name, condition in conditions.items():
            job = ClipJob(
                one.id,
                one.audio,
                start_s=one.start_s,
                end_s=one.end_s,
                segmented=audio.cut == "segmenter",
                condition=condition,
                length_s=one.length_s,
            )
            jobs.setdefault(name, []).append(job)
    return jobs


def _checked(
    corpus: str,
    rows: Versions,
    extracted: Sequence[Extracted[Any]],
    *,
    recipe: Recipe,
    progress: Progress,
) -> CorpusAudio:
    """The rows in the network's shape; CorpusError if train has none."""
    name, skipped = recipe.audio.representation, [s for one in extracted for s in one.skipped]
    for leftovers in {one.leftovers: None for one in extracted if one.leftovers}:
        progress(leftovers)
    if skipped:
        progress(f"{name}: {len(skipped)} without; {skipped[0]}")
    first = next(iter(rows))  # train, but of a corpus that is held out
    if not any(np.isfinite(features).any() for features in rows[first].values()):
        raise CorpusError(f"{corpus}: no utterance of {first} has any audio to measure")
    shape = partial(shape_for, representation=name, tokens=recipe.takes_tokens)
    shaped = {
        split: {version: shape(features) for version, features in versions.items()}
        for split, versions in rows.items()
    }
    return CorpusAudio(shaped, extracted[0].widths, tuple(map(str, skipped)))


def fit_scaling(
    audio: Mapping[str, CorpusAudio], corpora: Mapping[str, Corpus], config: AudioConfig
) -> Scaling | None:
    """Standardise by all versions of all corpora's train audio, and reduce ComParE's functionals.

    None where no corpus has audio.
    """
    if not audio:
        return None
    labels = [
        label_indices(utterances_of(corpora[name].splits["train"]), corpora[name].labels)
        for name in audio
    ]
    versions = [[*one.features["train"].values()] for one in audio.values()]
    rows = np.concatenate([rows for of_corpus in versions for rows in of_corpus])

    def repeated(of_utterances: Sequence[AnyArray]) -> AnyArray:
        """What belongs to each corpus's utterances, for all versions of them."""
        return np.concatenate(
            [np.tile(one, len(of)) for one, of in zip(of_utterances, versions, strict=True)]
        )

    if config.components is not None and config.representation.split("+")[0] == FUNCTIONALS:
        among = COMPARE.functionals_width
        there = np.isfinite(rows[:, :among]).any(axis=1)
        weights = repeated(np.split(class_balanced(labels), np.cumsum(list(map(len, labels)))[:-1]))
        return fit_components(
            rows, weights=weights * there, among=among, components=config.components
        )
    selection = config.selection if config.representation == FUNCTIONALS else None
    return select_features(rows, repeated(labels), selection)


def select_features(functionals: Float32, labels: Labels, plan: SelectionConfig | None) -> Scaling:
    """Standardise, then keep the functionals of the largest mean absolute SVM weight.

    Columns that are constant are left out; ``plan`` None keeps all others, as it must for tokens
    [N, F, D]. Rows whose label is NO_LABEL count for the scale alone.
    """
    functionals = functionals.reshape(-1, functionals.shape[-1])
    scaling = _standardise(functionals)
    if plan is None or plan.width >= scaling.width:
        return scaling
    known = labels != NO_LABEL
    machine = LinearSVC(
        C=plan.penalty, class_weight="balanced", max_iter=plan.iterations, random_state=0
    )
    machine.fit(scaling(functionals[known]), labels[known])
    importance = np.abs(machine.coef_).mean(0)
    chosen = np.sort(np.argsort(-importance, kind="stable")[: plan.width])
    return Scaling(scaling.selected[chosen], scaling.mean[chosen], scaling.deviation[chosen])


def fit_components(
    measured: Float32, *, weights: Float32, among: int, components: int | None
) -> Scaling:
    """Standardise, then join the first ``among`` columns into so many principal components.

    Rows count by ``weights``, for the components only; None leaves the columns as they are. An
    SVM's selection learns what separates the classes on these corpora, and fails on the next;
    components don't depend on the classes. Each has a deviation of 1 in training.
    """
    scaling = _standardise(measured.reshape(-1, measured.shape[-1]))
    joined = int(np.searchsorted(scaling.selected, among))
    if components is None or joined <= components:
        return scaling
    rows = scaling(measured)[:, :joined] * np.sqrt(weights / weights.sum())[:, None]
    _, deviations, directions = randomized_svd(rows, n_components=components, random_state=0)
    return replace(scaling, components=(directions.T / deviations).astype(np.float32))


def scale(scaling: Scaling, measured: Float32) -> Float32:
    """Measured [N, W], or tokens [N, F, W], → [N, A] or [N, F, A]; a missing token stays NaN."""
    if measured.ndim == 2:
        return scaling(measured)
    there = np.isfinite(measured).any(axis=-1)
    scaled = np.full((*measured.shape[:2], scaling.width), np.nan, np.float32)
    scaled[there] = scaling(measured[there])
    return scaled


def class_balanced(labels: Sequence[Labels]) -> Float32:
    """Weights [N] of all corpora's utterances, 1 on average: every class of every corpus weighs
    the same, whatever its size; utterances without a label weigh nothing.
    """
    weights = [np.zeros(len(one)) for one in labels]
    for weight, one in zip(weights, labels, strict=True):
        known = one != NO_LABEL
        weight[known] = 1.0 / np.bincount(one[known])[one[known]]
    together = np.concatenate(weights)
    balanced: Float32 = (together / together.mean()).astype(np.float32)
    return balanced


def _standardise(measured: Float32) -> Scaling:
    present = measured[np.isfinite(measured).any(axis=1)]
    mean: NDArray[np.float64] = np.asarray(np.nanmean(present, axis=0, dtype=np.float64))
    deviation: NDArray[np.float64] = np.asarray(np.nanstd(present, axis=0, dtype=np.float64))
    usable = np.flatnonzero(deviation > 1e-9 * np.maximum(np.abs(mean), 1.0))
    if not len(usable):
        raise CorpusError(
            f"audio: none of {len(mean)} features varies over the train split's {len(present)} "
            "utterances with audio; look at the clips"
        )
    return Scaling(usable, mean[usable].astype(np.float32), deviation[usable].astype(np.float32))
