"""Figures of streaming evaluation: of a condition, of a corpus, of a bundle, and tables of them.

All are plain values, fractions of 1, as they stand in metrics.json; tables show them × 100.
Scores count every labelled utterance, one without a prediction as wrong. What describes confidence
(ECE, label sets, abstention) counts the utterances that have a prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.corpora.open_corpus import publication_of
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
from stream_hbaf.evaluation.streaming import TIMED_S, Flags, StreamingPredictions

# Names of conditions that summaries refer to. The first one of clips is AS_RECORDED, the first one
# of a corpus without clips REFERENCE_TEXT.
AS_RECORDED, REFERENCE_TEXT = "clean", "reference_text"
NOISE_ROOM, TELEPHONE = "noise_10db_room", "telephone"
AUDIO_ONLY, TEXT_ONLY = "audio_only", "text_only"
ASR_ERRORS, ASR_ERRORS_PLAIN = "asr_errors_15", "asr_errors_15_exclamations_dropped"
CONDITION_TITLES = {
    AS_RECORDED: "as recorded",
    "noise_10db": "noise at 10 dB SNR",
    NOISE_ROOM: "noise at 10 dB SNR and a room",
    "gain_minus_20db": "20 dB quieter",
    "gain_plus_20db": "20 dB louder, clipped",
    "gain_minus_10db": "10 dB quieter",
    "gain_plus_10db": "10 dB louder",
    TELEPHONE: "through a telephone, G.711",
    AUDIO_ONLY: "text withheld",
    TEXT_ONLY: "audio withheld",
    REFERENCE_TEXT: "reference text",
    ASR_ERRORS: "15 % simulated ASR errors",
    ASR_ERRORS_PLAIN: "15 % simulated ASR errors, half of the exclamation marks dropped",
}

SUMMARISED = (
    "uar",
    "uar_shared",
    "weighted_f1",
    "accuracy",
    "ece",
    "ece_by_chance",
    "confident_half_gain",
    "set_coverage",
    "set_size",
    "abstention",
    "risk",
    "wer",
    "cost_ms",
)
CONDITION_FIGURES = ("uar", "uar_shared", "weighted_f1", "ece")  # of every condition, on a card
CHANCE_DRAWS = 2000
# Rows of the summary table, {} a corpus with its split, and the figure of each.
CLIP_ROWS = {
    "{}, audio and recognised words, UAR": "uar",
    "the same with noise at 10 dB SNR and a room, change": f"uar_change_{NOISE_ROOM}",
    "the same through a telephone, change": f"uar_change_{TELEPHONE}",
    "the same from 20 dB quieter to 20 dB louder, worst change": "uar_change_worst_gain",
    "the same, text withheld": f"uar_{AUDIO_ONLY}",
    "that of a network trained on audio alone": "uar_of_audio_only_model",
    "the same, audio withheld": f"uar_{TEXT_ONLY}",
}
TEXT_ROWS = {
    "{}, reference text, weighted F1": "weighted_f1",
    "that of a network trained on text alone": "weighted_f1_of_text_only_model",
    "the same with 15 % simulated ASR errors, change": f"weighted_f1_change_{ASR_ERRORS}",
    "and half of the exclamation marks dropped, change": f"weighted_f1_change_{ASR_ERRORS_PLAIN}",
}
CONFIDENCE_ROWS = {
    "{}, ECE": "ece",
    "the ECE of exact confidences, by chance": "ece_by_chance",
    "{}, accuracy on the more confident half, minus that on all": "confident_half_gain",
    "{}, gold label in its label set of 90 %": "set_coverage",
}

Figures = Mapping[str, Any]


def measure_condition(predictions: StreamingPredictions, labels: Sequence[str]) -> dict[str, Any]:
    """All figures of one condition; ``labels`` name the classes.

    ``uar`` lets the bundle predict any of its labels; ``uar_shared`` takes the likeliest of those
    that occur in the split. Both average over the labels that occur.
    """
    detected, classes = predictions.detected, len(labels)
    gold, probabilities = predictions.gold[detected], predictions.probabilities[detected]
    bins = [asdict(one) for one in reliability(gold, probabilities)]
    # One class more than there are labels: no prediction.
    scores = by_class(predictions.gold, predictions.predicted, classes=classes + 1)
    sexes = np.array([sex_of(speaker) for speaker in predictions.speakers])
    return {
        "utterances": len(predictions.gold),
        "unknown_labels": predictions.unknown_labels,
        "missed": list(predictions.missed),
        **_scores(predictions, np.ones(len(predictions.gold), bool)),
        "ece": calibration_error(gold, probabilities),
        "ece_by_chance": ece_by_chance(bins),
        "confident_half_gain": confident_half_gain(gold, probabilities),
        **_set_figures(predictions),
        "wer": predictions.wer,
        "cost_ms": _cost(predictions),
        "by_class": {label: asdict(one) for label, one in zip(labels, scores, strict=False)},
        "by_sex": {
            str(sex): _scores(predictions, sexes == sex) for sex in sorted(set(sexes)) if sex
        },
        "confusion": confusion(gold, probabilities.argmax(1), classes=classes).tolist(),
        "reliability": bins,
    }


def summarise_corpus(conditions: Mapping[str, Figures]) -> dict[str, Any]:
    """A corpus's main figures: those of its first condition, and how the others differ from it.

    Empty without the condition as recorded or as written.
    """
    first = _first(conditions)
    if first is None:
        return {}
    summary = {name: first[name] for name in SUMMARISED}
    gains = [one["uar"] for name, one in conditions.items() if name.startswith("gain_")]
    if gains:
        summary["uar_change_worst_gain"] = min(gains) - first["uar"]
    for name, one in conditions.items():
        if name in (NOISE_ROOM, TELEPHONE):
            summary[f"uar_change_{name}"] = one["uar"] - first["uar"]
        elif name in (AUDIO_ONLY, TEXT_ONLY):
            summary[f"uar_{name}"] = one["uar"]
        elif name in (ASR_ERRORS, ASR_ERRORS_PLAIN):
            summary[f"weighted_f1_change_{name}"] = one["weighted_f1"] - first["weighted_f1"]
            summary[f"wer_{name}"] = one["wer"]
    return summary


def summarise_bundle(
    reports: Mapping[str, Figures],
    *,
    held_out: Mapping[str, Figures],
    single_modality: Mapping[str, Figures],
) -> dict[str, Any]:
    """What a bundle's metrics.json holds under "live": figures from reports by corpus.

    ``held_out``: reports of bundles that were trained without the corpus. ``single_modality``:
    those of bundles that take audio alone or text alone.
    """
    by_condition = {corpus: report["conditions"] for corpus, report in reports.items()}
    figures: dict[str, Any] = {
        f"{corpus}_{name}": value
        for corpus, report in reports.items()
        for name, value in report["summary"].items()
        if name != "cost_ms"
    }
    costs = (report["summary"].get("cost_ms") for report in reports.values())
    figures["splits"] = {corpus: report["split"] for corpus, report in reports.items()}
    figures["cost_ms"] = next(filter(None, costs), None)
    figures["conditions"] = {
        f"{corpus}/{name}": {key: condition[key] for key in CONDITION_FIGURES}
        for corpus, there in by_condition.items()
        for name, condition in there.items()
    }
    for key in ("by_class", "by_sex"):
        figures[key] = {
            corpus: (_first(there) or next(iter(there.values())))[key]
            for corpus, there in by_condition.items()
        }
    return figures | _comparisons(held_out, single_modality=single_modality)


def sex_of(speaker: str) -> str:
    """A speaker's sex as its corpus gives it; empty where it isn't known."""
    name, _, rest = speaker.partition(" ")
    if name.startswith("Actor_") and name[6:].isdigit():  # RAVDESS: odd numbers are men
        return "male" if int(name[6:]) % 2 else "female"
    if rest in ("male", "female"):  # nEMO, tables of clips
        return rest
    return "female" if name in ("OAF", "YAF") else ""  # TESS


def confident_half_gain(gold: Labels, probabilities: NDArray[np.float64]) -> float:
    """Accuracy on the more confident half of N utterances, minus the accuracy on all.

    Confidence is the probability of the predicted label.
    """
    if not len(gold):
        return 0.0
    correct = probabilities.argmax(1) == gold
    half = np.argsort(-probabilities.max(1), kind="stable")[: (len(gold) + 1) // 2]
    return float(correct[half].mean() - correct.mean())


def ece_by_chance(bins: Sequence[Mapping[str, float]]) -> float:
    """The mean ECE of predictions with these confidences if every confidence were exact.

    A measured ECE that isn't above it is no evidence of miscalibration. The correct predictions
    of each bin are drawn binomially, 2,000 times.
    """
    filled = [(int(one["count"]), one["confidence"]) for one in bins if one["count"]]
    if not filled:
        return 0.0
    counts, confidence = np.array(filled).T
    draw = np.random.default_rng(0)
    correct = draw.binomial(counts.astype(int), confidence, (CHANCE_DRAWS, len(filled)))
    distance = np.abs(correct - counts * confidence).sum(1)
    return float(distance.mean() / counts.sum())


def summary_table(figures: Figures) -> str:
    """The main figures of each corpus as a Markdown table."""
    rows = [["", "× 100"]]

    def add(title: str, key: str, *, sign: bool = False) -> None:
        value = figures.get(key)
        if value is not None:
            rows.append([title, f"{100 * value:{'+' if sign else ''}.1f}"])

    for corpus, split in figures["splits"].items():
        conditions = (REFERENCE_TEXT, ASR_ERRORS, ASR_ERRORS_PLAIN)
        text = any(f"{corpus}/{name}" in figures["conditions"] for name in conditions)
        for title, name in ((TEXT_ROWS if text else CLIP_ROWS) | CONFIDENCE_ROWS).items():
            title = title.format(f"{publication_of(corpus).title} {split}")
            add(title, f"{corpus}_{name}", sign=name.endswith("_gain") or "_change_" in name)
    if "held_out_corpus_uar" in figures:
        each = ", ".join(
            f"{publication_of(corpus).title} {100 * uar:.1f}"
            for corpus, uar in figures["held_out_corpus_uar_each"].items()
        )
        add(f"held-out corpora, UAR of shared labels, mean of {each}", "held_out_corpus_uar")
    return markdown_table(rows)


def class_table(figures: Figures, labels: Sequence[str]) -> str:
    """F1 of each class on each corpus, as recorded or as written."""
    rows = [["", *labels]]
    for corpus, classes in figures["by_class"].items():
        f1 = [f"{100 * classes[label]['f1']:.0f}" for label in labels]
        rows.append([publication_of(corpus).title, *f1])
    return markdown_table(rows)


def condition_table(figures: Figures) -> str:
    """UAR, weighted F1 and ECE under every condition, then by the speakers' sex."""
    rows = [["", "UAR", "weighted F1", "ECE"]]
    for name, one in figures["conditions"].items():
        corpus, _, condition = name.partition("/")
        title = f"{publication_of(corpus).title}, {CONDITION_TITLES.get(condition, condition)}"
        rows.append([title, *(f"{100 * one[key]:.1f}" for key in ("uar", "weighted_f1", "ece"))])
    for corpus, sexes in figures["by_sex"].items():
        for sex, one in sexes.items():
            title = f"{publication_of(corpus).title}, {sex} speakers"
            rows.append([title, f"{100 * one['uar']:.1f}", f"{100 * one['weighted_f1']:.1f}", ""])
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])


def _comparisons(
    held_out: Mapping[str, Figures], *, single_modality: Mapping[str, Figures]
) -> dict[str, Any]:
    """The figures of other bundles beside the bundle's own."""
    figures: dict[str, Any] = {}
    for corpus, report in single_modality.items():
        (modality,) = report["bundle"]["modalities"]
        name = "uar" if report["input"] == "clips" else "weighted_f1"
        figures[f"{corpus}_{name}_of_{modality}_only_model"] = report["summary"][name]
    if held_out:
        uar, ece = (
            {corpus: report["summary"][name] for corpus, report in held_out.items()}
            for name in ("uar_shared", "ece")
        )
        figures["held_out_corpus_uar"] = sum(uar.values()) / len(uar)
        figures |= {"held_out_corpus_uar_each": uar, "held_out_corpus_ece_each": ece}
    return figures


def _scores(predictions: StreamingPredictions, counted: Flags) -> dict[str, Any]:
    """Scores of the ``counted`` [N] utterances."""
    gold, predicted = predictions.gold[counted], predictions.predicted[counted]
    classes = predictions.probabilities.shape[1]
    shared = np.bincount(predictions.gold, minlength=classes) > 0
    likeliest = np.where(shared, predictions.probabilities[counted], -1.0).argmax(1)
    return {
        "count": len(gold),
        "uar": unweighted_recall(gold, predicted),
        "uar_shared": unweighted_recall(gold, np.where(predicted == classes, classes, likeliest)),
        "weighted_f1": weighted_f1(gold, predicted),
        "accuracy": accuracy(gold, predicted),
    }


def _set_figures(predictions: StreamingPredictions) -> dict[str, float | None]:
    """Coverage and size of the label sets, the share of abstentions, the error rate of the rest."""
    detected = predictions.detected
    gold, sets = predictions.gold[detected], predictions.sets[detected]
    if not len(gold):
        return dict.fromkeys(("set_coverage", "set_size", "abstention", "risk"))
    abstained = predictions.abstained[detected]
    wrong = predictions.predicted[detected] != gold
    return {
        "set_coverage": float(sets[np.arange(len(gold)), gold].mean()),
        "set_size": float(sets.sum(1).mean()),
        "abstention": float(abstained.mean()),
        "risk": None if abstained.all() else float(wrong[~abstained].mean()),
    }


def _cost(predictions: StreamingPredictions) -> dict[str, Any] | None:
    """Median and 95th percentile of the milliseconds beyond Whisper, and each stage's median."""
    stages = predictions.cost_ms
    if not stages or not len(next(iter(stages.values()))):
        return None
    total = np.sum(list(stages.values()), axis=0)
    return {
        "utterance_s": list(TIMED_S),
        "count": len(total),
        "median": float(np.median(total)),
        "p95": float(np.quantile(total, 0.95)),
        "stages": {stage: float(np.median(times)) for stage, times in stages.items()},
    }


def _first(conditions: Mapping[str, Figures]) -> Figures | None:
    """The figures of the corpus as recorded or as written."""
    return conditions.get(AS_RECORDED) or conditions.get(REFERENCE_TEXT)
