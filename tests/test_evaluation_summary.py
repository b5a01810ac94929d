"""A bundle's promises, gathered from its live reports, and as its card shows them."""

from typing import Any

from stream_hbaf.evaluation.conditions import show
from stream_hbaf.evaluation.summary import (
    class_table,
    ece_by_chance,
    hearing_table,
    live_figures,
    live_table,
)


def row(uar: float, **changed: Any) -> dict[str, Any]:
    score = {"precision": uar, "recall": uar, "f1": uar, "support": 4}
    return {
        "uar": uar,
        "uar_shared": uar + 0.05,
        "weighted_f1": uar + 0.01,
        "accuracy": uar,
        "ece": 0.04,
        "surest_half_gain": 0.1,
        "set_coverage": 0.9,
        "set_size": 2.0,
        "abstention": 0.1,
        "risk": 0.2,
        "wer": 0.03,
        "cost_ms": {"median": 30.0},
        "classes": {"joy": score, "anger": score},
        "reliability": [{"count": 4, "confidence": uar}],
        "sexes": {"female": {"uar": uar + 0.02, "weighted_f1": uar}},
        **changed,
    }


def report(**rows: dict[str, Any]) -> dict[str, Any]:
    return {"rows": rows, "shown": show(rows)}


PLAYED = report(
    clean=row(0.6),
    noise_10db_room=row(0.5),
    gain_minus_20db=row(0.57),
    gain_plus_20db=row(0.61),
    audio_only=row(0.58),
    text_only=row(0.15),
)
READ = report(words=row(0.4), misheard_15=row(0.38, wer=0.15), misheard_15_softened=row(0.35))
REPORTS = {"ravdess": PLAYED, "nemo": report(clean=row(0.5)), "meld": READ}


def test_every_promise_has_a_key():
    unheard = {"ravdess": report(clean=row(0.35)), "tess": report(clean=row(0.55))}
    live = live_figures(REPORTS, unheard=unheard, alone={})
    close = {name: round(live[name], 6) for name in live if isinstance(live[name], float)}
    assert close["ravdess_uar"] == 0.6
    assert close["ravdess_uar_change_noise_10db_room"] == -0.1
    assert close["ravdess_uar_change_worst_gain"] == -0.03
    assert (close["ravdess_uar_text_removed"], close["ravdess_uar_audio_removed"]) == (0.58, 0.15)
    assert close["unheard_corpus_uar"] == 0.5  # of the classes that both corpora have
    assert close["meld_weighted_f1"] == 0.41
    assert close["meld_weighted_f1_change_misheard_15"] == -0.02
    assert close["meld_weighted_f1_change_softened_too"] == -0.05
    assert (close["meld_ece"], close["nemo_set_coverage"]) == (0.04, 0.9)
    assert live["cost_ms"] == {"median": 30.0}


def test_nothing_is_said_of_corpora_that_were_not_judged():
    live = live_figures(REPORTS, unheard={}, alone={})
    assert not [name for name in live if name.startswith("unheard")]
    assert "trained without" not in live_table(live)


def test_networks_of_one_modality_are_compared_with():
    alone = {"ravdess": report(clean=row(0.25)), "meld": report(clean=row(0.45))}
    live = live_figures(REPORTS, unheard={}, alone=alone)
    assert live["ravdess_uar_of_audio_only_model"] == alone["ravdess"]["shown"]["uar"]
    assert live["meld_weighted_f1_of_text_only_model"] == alone["meld"]["shown"]["weighted_f1"]
    assert "| that of a network that was taught to hear only | 25.0 |" in live_table(live)


def test_the_card_shows_them():
    live = live_figures(REPORTS, unheard={"tess": report(clean=row(0.55))}, alone={})
    lines = live_table(live).splitlines()
    assert "| RAVDESS actors 21-24, sound and Whisper's words, UAR | 60.0 |" in lines
    assert "| the same at 10 dB SNR with a room, change | -10.0 |" in lines
    assert "mean (TESS 60.0) | 60.0 |" in live_table(live)
    assert class_table(live, ["anger", "joy"]).splitlines()[2] == "| RAVDESS | 60 | 60 |"
    assert "| RAVDESS, noise 10db room | 50.0 | 51.0 | 4.0 |" in hearing_table(live)
    assert "| RAVDESS, female voices | 62.0 | 60.0 |  |" in hearing_table(live)


def test_few_utterances_show_an_error_by_chance():
    """One coin is half wrong either way; ten thousand are as told; what is certain is never off."""
    coin = {"count": 1, "confidence": 0.5}
    assert ece_by_chance([coin]) == 0.5
    assert ece_by_chance([{"count": 10_000, "confidence": 0.5}]) < 0.01
    empty = {"count": 0, "confidence": 0.0}
    assert ece_by_chance([{"count": 9, "confidence": 1.0}, empty]) == 0.0
