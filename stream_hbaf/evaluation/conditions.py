"""Training: the figures of a bundle that was judged live, a row for each condition.

What is right counts every utterance, also those that nothing was said of. What its sureness is
worth (ECE, sets, abstention) counts those that something was said of.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stream_hbaf import __version__
from stream_hbaf.bundle import Bundle
from stream_hbaf.config import Config
from stream_hbaf.corpora.asr_errors import SOFTENED
from stream_hbaf.corpora.augment import (
    CLEAN,
    CONDITIONS,
    Condition,
    NoisesAndRooms,
    read_noises_and_rooms,
)
from stream_hbaf.corpora.dataset import utterances_of
from stream_hbaf.corpora.dialogue import SPLITS, Corpus, Split
from stream_hbaf.corpora.reading import open_corpus
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.evaluation.metrics import (
    Labels,
    accuracy,
    by_class,
    calibration_error,
    confusion,
    reliability,
    unweighted_recall,
    weighted_f1,
)
from stream_hbaf.evaluation.report import REPORT, write_report
from stream_hbaf.evaluation.streaming import (
    TIMED_S,
    Flags,
    LiveJudged,
    Progress,
    judge_live,
    judge_words,
    open_recognizer,
)
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.recognizer import Recognizer

CLEAN_ROW, NOISY_ROW, GOLD_ROW, MISHEARD_ROW = "clean", "noise_10db_room", "words", "misheard_15"
SOFTENED_ROW = "misheard_15_softened"
AUDIO_ROW, TEXT_ROW = "audio_only", "text_only"
ERROR_RATE = 0.15
SURROUNDINGS = "speech"  # folder of noises and room responses, among the corpora


@dataclass(frozen=True, slots=True)
class Row:
    """One way of hearing a corpus."""

    about: str
    condition: Condition = CLEAN
    modalities: tuple[Modality, ...] = MODALITIES  # the others are withheld
    error_rate: float | None = None  # of words that are read instead of heard
    softened: float = 0.0  # of their exclamation marks, if they are misheard


PLAYED = {
    CLEAN_ROW: Row("as recorded"),
    **{
        name: Row(name.replace("_", " "), condition=condition)
        for name, condition in CONDITIONS.items()
        if condition != CLEAN
    },
    "gain_minus_10db": Row("gain minus 10db", condition=Condition(gain_db=-10.0)),
    "gain_plus_10db": Row("gain plus 10db", condition=Condition(gain_db=10.0)),
    AUDIO_ROW: Row("as recorded, its words withheld", modalities=("audio",)),
    TEXT_ROW: Row("as recorded, its sound withheld but for the words", modalities=("text",)),
}
READ = {
    GOLD_ROW: Row("the corpus's own words", error_rate=0.0),
    MISHEARD_ROW: Row("its words, 15 % of them misheard", error_rate=ERROR_RATE),
    SOFTENED_ROW: Row(
        "the same, and half of the exclamation marks unheard",
        error_rate=ERROR_RATE,
        softened=SOFTENED,
    ),
}
ROWS = PLAYED | READ


def evaluate_live(
    bundle: str,
    *,
    corpus: str,
    corpora: Path,
    split: Split | Literal["all"] = "test",
    rows: Sequence[str] = (),
    speed: float | None = None,
    out: Path,
    config: Config | None = None,
    progress: Progress = print,
) -> dict[str, Any]:
    """Judge a bundle through the live path and write report.html and metrics.json into ``out``.

    A corpus with clips is played under every condition of PLAYED, one without is read as READ
    says; ``rows`` chooses among them. A ``split`` of "all" is for a corpus that the bundle was not
    trained on. Returns the metrics, with the corpus's figures under
    ``shown`` and all of a row under ``rows``. Raises ConfigError for a wrong speed or row,
    CorpusError for a corpus that can't be read, BundleError for a bundle that isn't live or has
    no label in common with it.
    """
    if speed is not None and not speed > 0:
        raise ConfigError(f"--speed {speed}: must be 'max' or a number above 0, such as 1")
    read = open_corpus(corpus, corpora, whole=False)
    part: Split = "test" if split == "all" else split
    if split == "all":
        every = tuple(dialogue for one in SPLITS for dialogue in read.splits[one])
        read = replace(read, splits={**read.splits, part: every})
    chosen = choose_rows(read, part, rows=rows)
    noisy = any(row.condition.snr_db is not None or row.condition.room for row in chosen.values())
    sounds = read_noises_and_rooms(corpora / SURROUNDINGS) if noisy else None
    judged: dict[str, LiveJudged] = {}
    with open_recognizer(bundle, config=config) as recognizer:
        for name, row in chosen.items():
            judged[name] = _judge(
                recognizer,
                read,
                part,
                row=row,
                sounds=sounds,
                speed=speed,
                progress=_under(f"{read.name}, {name}", progress),
            )
            progress(f"{read.name}, {name}: {_summary(measure_row(judged[name]))}")
        metrics = {
            "asr": recognizer.config.transcript.model,
            **measure_live(
                judged, bundle=recognizer.bundle, corpus=read.name, split=split, speed=speed
            ),
        }
    write_report(metrics, out)
    progress(str(out / REPORT))
    return metrics


def choose_rows(corpus: Corpus, split: Split, *, rows: Sequence[str] = ()) -> dict[str, Row]:
    """The rows that a split can be judged by, or those of them that are asked for.

    Raises CorpusError for a split without clips and without words, ConfigError for a row that it
    hasn't.
    """
    utterances = utterances_of(corpus.splits[split])
    if not utterances:
        raise CorpusError(f"{corpus.name}: its {split} split is empty; choose another with --split")
    if any(said.audio is not None for said in utterances):
        there = PLAYED
    elif any(said.text.strip() for said in utterances):
        there = READ
    else:
        raise CorpusError(f"{corpus.name}: its {split} split has neither clips nor words; add some")
    for name in rows:
        if name not in there:
            raise ConfigError(f"row '{name}': {corpus.name}'s {split} split has {', '.join(there)}")
    return {name: there[name] for name in rows or there}


def measure_live(
    judged: dict[str, LiveJudged], *, bundle: Bundle, corpus: str, split: str, speed: float | None
) -> dict[str, Any]:
    """Everything that the report shows, as plain values; figures are fractions of 1."""
    rows = {
        name: {"about": ROWS[name].about, **measure_row(one, labels=bundle.labels)}
        for name, one in judged.items()
    }
    return {
        "corpus": corpus,
        "split": split,
        "labels": list(bundle.labels),
        "bundle": {"id": bundle.id, "sha256": bundle.sha256},
        "played": any(ROWS[name].error_rate is None for name in judged),
        "speed": "max" if speed is None else speed,
        "version": __version__,
        "shown": show(rows),
        "rows": rows,
    }


def show(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a bundle promises of a corpus, from its rows; only what those rows can tell."""
    first = rows.get(CLEAN_ROW) or rows.get(GOLD_ROW)
    if first is None:
        return {}
    kept = ("uar", "uar_shared", "weighted_f1", "accuracy", "ece", "surest_half_gain")
    sets = ("set_coverage", "set_size", "abstention", "risk", "wer", "cost_ms")
    shown = {name: first[name] for name in (*kept, *sets)}
    uar = {name: row["uar"] - first["uar"] for name, row in rows.items()}
    gains = [change for name, change in uar.items() if name.startswith("gain_")]
    if NOISY_ROW in rows:
        shown["uar_change_noise_10db_room"] = uar[NOISY_ROW]
    if gains:
        shown["uar_change_worst_gain"] = min(gains)
    for name in (AUDIO_ROW, TEXT_ROW):
        if name in rows:
            shown[f"uar_{name}"] = rows[name]["uar"]
    for name, told in ((MISHEARD_ROW, "misheard"), (SOFTENED_ROW, "softened")):
        if name in rows:
            change = rows[name]["weighted_f1"] - first["weighted_f1"]
            shown[f"weighted_f1_change_{told}"] = change
            shown[f"wer_{told}"] = rows[name]["wer"]
    return shown


def measure_row(judged: LiveJudged, *, labels: Sequence[str] = ()) -> dict[str, Any]:
    """All figures of one row.

    ``uar`` lets the bundle say any of its labels; ``uar_shared`` takes the likeliest of those
    that occur in the split, the others' probabilities left out. Both average over the labels that
    occur. With ``labels``, which name the classes, also the figures by class and sex.
    """
    gold, heard = judged.gold, judged.heard
    sure = judged.probabilities[heard]
    figures: dict[str, Any] = {
        "utterances": len(gold),
        "foreign": judged.foreign,
        "missed": list(judged.missed),
        **_right(judged, np.ones(len(gold), bool)),
        "ece": calibration_error(gold[heard], sure),
        "surest_half_gain": surest_half_gain(gold[heard], sure),
        **_sets(judged),
        "wer": judged.wer,
        "cost_ms": _cost(judged),
    }
    if labels:
        table = confusion(gold[heard], sure.argmax(1), classes=len(labels))
        classes = by_class(gold, _said(judged), classes=len(labels) + 1)
        figures["classes"] = {
            label: asdict(one) for label, one in zip(labels, classes, strict=False)
        }
        sexes = np.array([sex_of(speaker) for speaker in judged.speakers])
        figures["sexes"] = {
            str(sex): _right(judged, sexes == sex) for sex in sorted(set(sexes)) if sex
        }
        figures["confusion"] = table.tolist()
        figures["reliability"] = [asdict(b) for b in reliability(gold[heard], sure)]
    return figures


def sex_of(speaker: str) -> str:
    """A speaker's sex as RAVDESS, nEMO and TESS give it; empty where it isn't known."""
    name, _, rest = speaker.partition(" ")
    if name.startswith("Actor_") and name[6:].isdigit():  # RAVDESS: odd numbers are men
        return "male" if int(name[6:]) % 2 else "female"
    if rest in ("male", "female"):  # nEMO
        return rest
    return "female" if name in ("OAF", "YAF") else ""  # TESS


def surest_half_gain(gold: Labels, probabilities: np.ndarray[Any, Any]) -> float:
    """Accuracy on the half of N that it is surest of, minus the accuracy on all."""
    if not len(gold):
        return 0.0
    right = probabilities.argmax(1) == gold
    surest = np.argsort(-probabilities.max(1), kind="stable")[: (len(gold) + 1) // 2]
    return float(right[surest].mean() - right.mean())


def _right(judged: LiveJudged, counted: Flags) -> dict[str, Any]:
    """How right it is about the utterances that are ``counted`` [N]."""
    gold = judged.gold[counted]
    classes = judged.probabilities.shape[1]
    said = _said(judged)[counted]
    shared = np.bincount(judged.gold, minlength=classes) > 0
    nothing = said == classes
    likely = np.where(shared, judged.probabilities[counted], -1.0).argmax(1)
    likeliest = np.where(nothing, classes, likely)
    return {
        "count": len(gold),
        "uar": unweighted_recall(gold, said),
        "uar_shared": unweighted_recall(gold, likeliest),
        "weighted_f1": weighted_f1(gold, said),
        "accuracy": accuracy(gold, said),
    }


def _said(judged: LiveJudged) -> Labels:
    """The label said of each utterance [N]; one past the last where nothing was said."""
    said: Labels = np.where(
        judged.heard, judged.probabilities.argmax(1), judged.probabilities.shape[1]
    )
    return said


def _sets(judged: LiveJudged) -> dict[str, float | None]:
    """The sets of labels and the abstentions among what something was said of."""
    heard = judged.heard
    gold, sets, abstained = judged.gold[heard], judged.sets[heard], judged.abstained[heard]
    if not len(gold):
        return dict.fromkeys(("set_coverage", "set_size", "abstention", "risk"))
    wrong = judged.probabilities[heard].argmax(1) != gold
    return {
        "set_coverage": float(sets[np.arange(len(gold)), gold].mean()),
        "set_size": float(sets.sum(1).mean()),
        "abstention": float(abstained.mean()),
        "risk": None if abstained.all() else float(wrong[~abstained].mean()),
    }


def _cost(judged: LiveJudged) -> dict[str, Any] | None:
    """Median and p95 of the milliseconds beyond Whisper, and each stage's median."""
    if not judged.cost_ms or not len(next(iter(judged.cost_ms.values()))):
        return None
    total = np.sum(list(judged.cost_ms.values()), axis=0)
    return {
        "utterance_s": list(TIMED_S),
        "count": len(total),
        "median": float(np.median(total)),
        "p95": float(np.quantile(total, 0.95)),
        "stages": {stage: float(np.median(times)) for stage, times in judged.cost_ms.items()},
    }


def _under(heading: str, progress: Progress) -> Progress:
    return lambda line: progress(f"{heading}: {line}")


def _judge(
    recognizer: Recognizer,
    corpus: Corpus,
    split: Split,
    *,
    row: Row,
    sounds: NoisesAndRooms | None,
    speed: float | None,
    progress: Progress,
) -> LiveJudged:
    if row.error_rate is not None:
        return judge_words(
            recognizer,
            corpus,
            split,
            error_rate=row.error_rate,
            softened=row.softened,
            progress=progress,
        )
    return judge_live(
        recognizer,
        corpus,
        split,
        condition=row.condition,
        sounds=sounds,
        modalities=row.modalities,
        speed=speed,
        progress=progress,
    )


def _summary(row: dict[str, Any]) -> str:
    figures = ("uar", "uar_shared", "weighted_f1", "ece")
    shown = ", ".join(f"{name} {100 * row[name]:.2f}" for name in figures)
    return f"{shown}, {len(row['missed'])} of {row['utterances']} missed"
