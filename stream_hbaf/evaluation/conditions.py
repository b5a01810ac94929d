"""Conditions of streaming evaluation, and the evaluation of corpora under each of them.

A corpus with clips is played as recorded, in noise, in a room, at other levels, through a
telephone, and with one modality withheld. A corpus without clips is read as written and with
simulated ASR errors.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from stream_hbaf import __version__
from stream_hbaf.bundle import read_bundle_config
from stream_hbaf.config import Config
from stream_hbaf.corpora.asr_errors import EXCLAMATIONS_DROPPED
from stream_hbaf.corpora.augment import (
    CLEAN,
    CONDITIONS,
    Condition,
    NoisesAndRooms,
    read_noises_and_rooms,
)
from stream_hbaf.corpora.dialogue import SPLITS, Corpus, Split, sittings, utterances_of
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.evaluation.report import METRICS, REPORT, modalities_of, write_report
from stream_hbaf.evaluation.streaming import (
    Progress,
    StreamingPredictions,
    open_recognizer,
    predict_clips,
    predict_text,
)
from stream_hbaf.evaluation.summary import (
    AS_RECORDED,
    ASR_ERRORS,
    ASR_ERRORS_PLAIN,
    AUDIO_ONLY,
    CONDITION_TITLES,
    REFERENCE_TEXT,
    TELEPHONE,
    TEXT_ONLY,
    measure_condition,
    summarise_bundle,
    summarise_corpus,
)
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.processes import ELSEWHERE, map_as_completed
from stream_hbaf.recognizer import Recognizer

NOISES = "speech"  # folder of noise/ and rir/ (room impulse responses), among the corpora
Part = Split | Literal["all"]
HELD_OUT, SINGLE_MODALITY = "held-out", "single-modality"


@dataclass(frozen=True, slots=True)
class EvaluationCondition:
    """How a corpus is given to the recogniser."""

    acoustic: Condition = CLEAN  # what is done to the clips
    modalities: tuple[Modality, ...] = MODALITIES  # the others are withheld from the network
    error_rate: float | None = None  # of simulated ASR errors in the texts; None: clips are played
    exclamations_dropped: float = 0.0  # share of the exclamation marks, with simulated errors

    @property
    def needs_noises(self) -> bool:
        return self.acoustic.snr_db is not None or self.acoustic.room


CLIP_CONDITIONS = {
    **{name: EvaluationCondition(condition) for name, condition in CONDITIONS.items()},
    "gain_minus_10db": EvaluationCondition(Condition(gain_db=-10.0)),
    "gain_plus_10db": EvaluationCondition(Condition(gain_db=10.0)),
    TELEPHONE: EvaluationCondition(Condition(telephone=True)),
    AUDIO_ONLY: EvaluationCondition(modalities=("audio",)),
    TEXT_ONLY: EvaluationCondition(modalities=("text",)),
}
TEXT_CONDITIONS = {
    REFERENCE_TEXT: EvaluationCondition(error_rate=0.0),
    ASR_ERRORS: EvaluationCondition(error_rate=0.15),
    ASR_ERRORS_PLAIN: EvaluationCondition(
        error_rate=0.15, exclamations_dropped=EXCLAMATIONS_DROPPED
    ),
}
FIRST = (AS_RECORDED, REFERENCE_TEXT)  # of a corpus with clips, of one without


def evaluate_streaming(
    bundle: str,
    names: Sequence[str],
    *,
    corpora: Path,
    split: Part = "test",
    conditions: Sequence[str] = (),
    held_out: Mapping[str, str] = MappingProxyType({}),
    single_modality: Mapping[str, str] = MappingProxyType({}),
    speed: float | None = None,
    resume: bool = False,
    out: Path,
    config: Config | None = None,
    progress: Progress = print,
) -> dict[str, Any]:
    """Evaluate a bundle through the live path on corpora, and write a report of each into ``out``.

    ``names`` are corpora under ``corpora``, tables or folders of sessions; a ``split`` of "all" is
    for corpora that the bundle wasn't trained on. ``conditions`` are some of CLIP_CONDITIONS and
    TEXT_CONDITIONS; without, each corpus is given under all that it can be. ``held_out`` maps a
    corpus to a bundle that was trained without it and is evaluated on all of it,
    ``single_modality`` to a bundle that takes audio alone or text alone: both under the first
    condition, for comparison. ``speed`` is a factor of real time, None: as fast as possible. To
    ``resume`` keeps reports in ``out`` that were made of the same bundle in the same way.

    A report is report.html and metrics.json, in a folder for each corpus if there are several.
    Returns what a bundle's metrics.json holds under "live"; see ``summarise_bundle``. Raises
    ConfigError for a wrong speed or condition, CorpusError for a corpus that can't be read,
    BundleError for a bundle that can't be loaded, isn't live or shares no label with a corpus.
    """
    if speed is not None and not speed > 0:
        raise ConfigError(f"--speed {speed}: must be 'max' or a number above 0, such as 1")
    tasks = [_Task(bundle, name, "", split, tuple(conditions)) for name in names]
    tasks += [_Task(other, name, HELD_OUT, "all", FIRST) for name, other in held_out.items()]
    for name, other in single_modality.items():
        _require_one_modality(other)
        tasks.append(_Task(other, name, SINGLE_MODALITY, split, FIRST))
    for folder, count in Counter(task.folder for task in tasks).items():
        if count > 1:
            raise ConfigError(f"--live: {count} corpora are called '{folder}'; rename one of them")
    loaded = [_load(task, corpora=corpora, progress=progress) for task in tasks]
    noisy = any(one.needs_noises for work in loaded for one in work.conditions.values())
    sounds = read_noises_and_rooms(corpora / NOISES, tested=True) if noisy else None
    reports: dict[str, dict[str, Any]] = {"": {}, HELD_OUT: {}, SINGLE_MODALITY: {}}
    for name, group in groupby(loaded, key=lambda work: work.task.bundle):
        with open_recognizer(name, config=config) as recognizer:
            player = _Player(recognizer, sounds, speed, progress)
            for work in group:
                place = out if len(loaded) == 1 else out / work.task.folder
                report = player.evaluate(work, out=place, resume=resume)
                reports[work.task.role][work.task.name] = report
    return summarise_bundle(
        reports[""], held_out=reports[HELD_OUT], single_modality=reports[SINGLE_MODALITY]
    )


def choose_conditions(
    corpus: Corpus, split: Split, *, names: Sequence[str] = ()
) -> dict[str, EvaluationCondition]:
    """The conditions that a split can be given under, or those of them that are asked for.

    Raises CorpusError for a split without clips and without texts, ConfigError for a name that
    isn't known, or if the split can be given under none of the names.
    """
    utterances = utterances_of(corpus.splits[split])
    if not utterances:
        raise CorpusError(f"{corpus.name}: its {split} split is empty; choose another with --split")
    if any(one.audio is not None for one in utterances):
        there = CLIP_CONDITIONS
    elif any(one.text.strip() for one in utterances):
        there = TEXT_CONDITIONS
    else:
        raise CorpusError(f"{corpus.name}: its {split} split has neither clips nor texts; add some")
    known = CLIP_CONDITIONS | TEXT_CONDITIONS
    chosen = {name: there[name] for name in names or there if name in there}
    for name in names:
        if name not in known or not chosen:
            raise ConfigError(
                f"condition '{name}': {corpus.name}'s {split} split has {', '.join(there)}"
            )
    return chosen


@dataclass(frozen=True, slots=True)
class _Task:
    """One bundle to be evaluated on one corpus, and what its figures are for."""

    bundle: str  # folder or name
    corpus: str  # as for open_corpus
    role: str  # "" for the bundle's own figures, HELD_OUT or SINGLE_MODALITY for a comparison
    split: Part
    names: tuple[str, ...]  # of conditions; (): all

    @property
    def name(self) -> str:
        """The corpus's name in figures: a table's without folder and ending."""
        return Path(self.corpus).stem

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.role}" if self.role else self.name


@dataclass(frozen=True, slots=True)
class _Work:
    """A task with its corpus read."""

    task: _Task
    corpus: Corpus
    split: Split
    conditions: Mapping[str, EvaluationCondition]


def _load(task: _Task, *, corpora: Path, progress: Progress) -> _Work:
    """Read a task's corpus and choose its conditions.

    Those that need noises are left out if there are no recordings of noises and nobody asked for
    the conditions by name.
    """
    config = read_bundle_config(task.bundle)
    corpus = open_corpus(task.corpus, corpora, all_splits=False, labels=config.labels)
    corpus = replace(corpus, name=task.name)
    split: Split = "test" if task.split == "all" else task.split
    if task.split == "all":
        every = tuple(dialogue for one in SPLITS for dialogue in corpus.splits[one])
        corpus = replace(corpus, splits={**corpus.splits, split: every})
    if config.baseline is not None:
        seated = sittings(corpus.splits[split])
        corpus = replace(corpus, splits={**corpus.splits, split: seated})
    chosen = choose_conditions(corpus, split, names=task.names)
    noisy = [name for name, one in chosen.items() if one.needs_noises]
    if noisy and not task.names and not (corpora / NOISES).is_dir():
        chosen = {name: one for name, one in chosen.items() if name not in noisy}
        progress(
            f"{task.name}: without {', '.join(noisy)}: {corpora / NOISES}, recordings of noises "
            "and rooms, is missing"
        )
    return _Work(task, corpus, split, chosen)


def _require_one_modality(bundle: str) -> None:
    config = read_bundle_config(bundle)
    if len(modalities_of(config)) > 1:
        raise BundleError(
            f"bundle {config.id}: takes audio and text; --single-modality compares with a bundle "
            "that takes one of them"
        )


@dataclass(frozen=True, slots=True)
class _Player:
    """A recogniser, and how it is given a corpus's clips."""

    recognizer: Recognizer
    sounds: NoisesAndRooms | None
    speed: float | None
    progress: Progress

    def evaluate(self, work: _Work, *, out: Path, resume: bool) -> dict[str, Any]:
        """Evaluate one corpus under each of its conditions, write its report, and return that."""
        described = self._describe(work)
        made = _read_report(out, described, work.conditions) if resume else None
        if made is not None:
            self.progress(f"{out / METRICS}: kept, made of the same bundle")
            return made
        found: dict[str, Any] = {}
        for name, predictions in self._predict_all(work):
            figures = measure_condition(predictions, self.recognizer.bundle.labels)
            found[name] = {"description": CONDITION_TITLES[name], **figures}
            self.progress(f"{work.task.name}, {name}: {_main_figures(figures)}")
        measured = {name: found[name] for name in work.conditions}
        report = {**described, "summary": summarise_corpus(measured), "conditions": measured}
        write_report(report, out, progress=self.progress)
        self.progress(str(out / REPORT))
        return report

    def _describe(self, work: _Work) -> dict[str, Any]:
        """The part of a report that describes what was evaluated, and how."""
        bundle = self.recognizer.bundle
        taken = modalities_of(bundle.config)
        return {
            "corpus": work.task.name,
            "split": work.task.split,
            "labels": list(bundle.labels),
            "bundle": {"id": bundle.id, "sha256": bundle.sha256, "modalities": taken},
            "input": "clips" if set(work.conditions) <= set(CLIP_CONDITIONS) else "text",
            "asr": self.recognizer.config.transcript.model,
            "speed": "max" if self.speed is None else self.speed,
            "version": __version__,
        }

    def _predict_all(self, work: _Work) -> Iterator[tuple[str, StreamingPredictions]]:
        """Each condition's predictions, as they are completed; on a cluster, if there is one."""
        names = [*work.conditions]
        if ELSEWHERE.get() is None:
            for name in names:
                progress = _prefixed(f"{work.task.name}, {name}: ", self.progress)
                yield name, _predict(self.recognizer, work, name, self.sounds, self.speed, progress)
            return
        shared = (work, self.recognizer.config, self.sounds, self.speed)
        for index, predictions in map_as_completed(_predict_alone, names, workers=1, shared=shared):
            yield names[index], predictions


def _predict(
    recognizer: Recognizer,
    work: _Work,
    name: str,
    sounds: NoisesAndRooms | None,
    speed: float | None,
    progress: Progress,
) -> StreamingPredictions:
    """The predictions under one of the conditions."""
    condition, given = work.conditions[name], (recognizer, work.corpus, work.split)
    if condition.error_rate is None:
        return predict_clips(
            *given,
            condition=condition.acoustic,
            sounds=sounds,
            modalities=condition.modalities,
            speed=speed,
            progress=progress,
        )
    return predict_text(
        *given,
        error_rate=condition.error_rate,
        exclamations_dropped=condition.exclamations_dropped,
        progress=progress,
    )


def _predict_alone(
    name: str,
    work: _Work,
    config: Config,
    sounds: NoisesAndRooms | None,
    speed: float | None,
) -> StreamingPredictions:
    """As ``_predict``, in a worker of a cluster, with a recogniser of its own."""
    with open_recognizer(work.task.bundle, config=config) as recognizer:
        return _predict(recognizer, work, name, sounds, speed, lambda line: None)


def _read_report(
    out: Path, described: Mapping[str, Any], conditions: Mapping[str, EvaluationCondition]
) -> dict[str, Any] | None:
    """The report in ``out``, if it has this description and these conditions, else None."""
    try:
        report = json.loads((out / METRICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(report, dict):
        return None
    same = all(report.get(key) == value for key, value in described.items())
    return report if same and list(report.get("conditions", ())) == list(conditions) else None


def _prefixed(prefix: str, progress: Progress) -> Progress:
    return lambda line: progress(prefix + line)


def _main_figures(figures: Mapping[str, Any]) -> str:
    titles = {"uar": "UAR", "uar_shared": "shared", "weighted_f1": "weighted F1", "ece": "ECE"}
    shown = ", ".join(f"{title} {100 * figures[key]:.2f}" for key, title in titles.items())
    return f"{shown}, {len(figures['missed'])} of {figures['utterances']} missed"
