"""Training: what a bundle of talk and voices promises, as figures, from its live reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stream_hbaf.evaluation.conditions import CLEAN_ROW, GOLD_ROW, PLAYED
from stream_hbaf.evaluation.markdown import table

Report = Mapping[str, Any]  # the metrics of one corpus
TITLES = {"ravdess": "RAVDESS", "nemo": "nEMO", "tess": "TESS", "meld": "MELD"}

# What is shown of each kind of corpus: our name for it, the report's.
VOICES = {
    "ravdess_uar": "uar",
    "ravdess_uar_change_noise_10db_room": "uar_change_noise_10db_room",
    "ravdess_uar_change_worst_gain": "uar_change_worst_gain",
    "ravdess_uar_text_removed": "uar_audio_only",
    "ravdess_uar_audio_removed": "uar_text_only",
    "ravdess_wer": "wer",
    "cost_ms": "cost_ms",
}
TALK = {
    "meld_weighted_f1": "weighted_f1",
    "meld_weighted_f1_change_misheard_15": "weighted_f1_change_misheard",
    "meld_wer_misheard_15": "wer_misheard",
    "meld_weighted_f1_change_softened_too": "weighted_f1_change_softened",
}


def live_figures(
    reports: Mapping[str, Report],
    *,
    unheard: Mapping[str, Report],
    alone: Mapping[str, Report],
) -> dict[str, Any]:
    """A key for each promise, from reports by corpus; fractions of 1.

    ``unheard``: the reports of bundles trained without the corpus that they were judged on.
    ``alone``: those of bundles that only hear or only read, on ravdess and meld.
    """
    voices, talk = reports["ravdess"], reports["meld"]
    figures: dict[str, Any] = {
        name: report["shown"][key]
        for report, known in ((voices, VOICES), (talk, TALK))
        for name, key in known.items()
        if key in report["shown"]  # it was judged in that way
    }
    figures |= {
        "rows": {
            f"{corpus}/{name}": {
                figure: row[figure] for figure in ("uar", "uar_shared", "weighted_f1", "ece")
            }
            for corpus, report in reports.items()
            for name, row in report["rows"].items()
        },
        "classes": {
            corpus: report["rows"][_first(report)]["classes"] for corpus, report in reports.items()
        },
        "sexes": {
            corpus: report["rows"][_first(report)]["sexes"] for corpus, report in reports.items()
        },
    }
    for corpus, report in reports.items():
        for name in ("ece", "surest_half_gain", "set_coverage", "set_size", "abstention", "risk"):
            figures[f"{corpus}_{name}"] = report["shown"][name]
        bins = report["rows"][_first(report)]["reliability"]
        figures[f"{corpus}_ece_by_chance"] = ece_by_chance(bins)
    if "ravdess" in alone:
        figures["ravdess_uar_of_audio_only_model"] = alone["ravdess"]["shown"]["uar"]
    if "meld" in alone:
        figures["meld_weighted_f1_of_text_only_model"] = alone["meld"]["shown"]["weighted_f1"]
    if unheard:
        each = {corpus: report["shown"]["uar_shared"] for corpus, report in unheard.items()}
        figures["unheard_corpus_uar"] = sum(each.values()) / len(each)
        figures["unheard_corpus_uar_each"] = each
        figures["unheard_corpus_ece_each"] = {
            corpus: report["shown"]["ece"] for corpus, report in unheard.items()
        }
    return figures


def ece_by_chance(bins: Sequence[Mapping[str, float]], *, draws: int = 2000) -> float:
    """The calibration error that so many utterances of this confidence show on average even if
    each confidence is true: what is below it says little."""
    told = [(int(one["count"]), one["confidence"]) for one in bins if one["count"]]
    counts, confidence = np.array(told).T
    right = np.random.default_rng(0).binomial(counts.astype(int), confidence, (draws, len(told)))
    apart = np.abs(right - counts * confidence).sum(1)
    return float(apart.mean() / counts.sum())


def live_table(figures: Mapping[str, Any]) -> str:
    """The promises as the card shows them, × 100."""
    rows = [["", "measured"]]

    def add(told: str, key: str, *, sign: bool = False) -> None:
        value = figures.get(key)
        if value is not None:
            rows.append([told, f"{100 * value:{'+' if sign else ''}.1f}"])

    add("RAVDESS actors 21-24, sound and Whisper's words, UAR", "ravdess_uar")
    add(
        "the same at 10 dB SNR with a room, change", "ravdess_uar_change_noise_10db_room", sign=True
    )
    add(
        "the same from 20 dB quieter to 20 dB louder, worst change",
        "ravdess_uar_change_worst_gain",
        sign=True,
    )
    add("the same without its words", "ravdess_uar_text_removed")
    add("that of a network that was taught to hear only", "ravdess_uar_of_audio_only_model")
    add("the same without its sound", "ravdess_uar_audio_removed")
    if "unheard_corpus_uar" in figures:
        told = ", ".join(
            f"{TITLES[corpus]} {100 * uar:.1f}"
            for corpus, uar in figures["unheard_corpus_uar_each"].items()
        )
        add(
            f"a corpus that the recipe was trained without, UAR of shared classes, mean ({told})",
            "unheard_corpus_uar",
        )
    add("MELD test, words alone, weighted F1", "meld_weighted_f1")
    add("that of a network that was taught to read only", "meld_weighted_f1_of_text_only_model")
    add(
        "the same with 15 % of the words misheard, change",
        "meld_weighted_f1_change_misheard_15",
        sign=True,
    )
    add(
        "and half of the exclamation marks lost, change",
        "meld_weighted_f1_change_softened_too",
        sign=True,
    )
    for corpus in ("ravdess", "nemo", "meld"):
        title = TITLES[corpus]
        add(f"{title}, ECE", f"{corpus}_ece")
        add("what chance alone would show", f"{corpus}_ece_by_chance")
        add(
            f"{title}, accuracy on the half it is surest of, minus all",
            f"{corpus}_surest_half_gain",
            sign=True,
        )
        add(f"{title}, right label in its set of 90 %", f"{corpus}_set_coverage")
    return table(rows)


def class_table(figures: Mapping[str, Any], labels: list[str]) -> str:
    """F1 by class of each corpus as recorded or as written, × 100."""
    rows = [["", *labels]]
    for corpus, classes in figures["classes"].items():
        rows.append([TITLES[corpus], *(f"{100 * classes[label]['f1']:.0f}" for label in labels)])
    return table(rows)


def hearing_table(figures: Mapping[str, Any]) -> str:
    """Every way of hearing, × 100; by sex where that is known."""
    rows = [["", "UAR", "weighted F1", "ECE"]]
    for name, row in figures["rows"].items():
        corpus, _, condition = name.partition("/")
        told = f"{TITLES[corpus]}, {condition.replace('_', ' ')}"
        rows.append([told, *(f"{100 * row[key]:.1f}" for key in ("uar", "weighted_f1", "ece"))])
    for corpus, sexes in figures["sexes"].items():
        for sex, row in sexes.items():
            told = f"{TITLES[corpus]}, {sex} voices"
            rows.append([told, f"{100 * row['uar']:.1f}", f"{100 * row['weighted_f1']:.1f}", ""])
    return table(rows)


def _first(report: Report) -> str:
    return CLEAN_ROW if set(report["rows"]) & set(PLAYED) else GOLD_ROW
