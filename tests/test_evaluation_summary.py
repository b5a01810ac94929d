"""A bundle's main figures, gathered from its streaming reports, and the tables of its card."""

from typing import Any

from stream_hbaf.evaluation.summary import (
    class_table,
    condition_table,
    ece_by_chance,
    summarise_bundle,
    summarise_corpus,
    summary_table,
)


def condition(uar: float, **changed: Any) -> dict[str, Any]:
    score = {"precision": uar, "recall": uar, "f1": uar, "support": 4}
    return {
        "uar": uar,
        "uar_shared": uar + 0.05,
        "weighted_f1": uar + 0.01,
        "accuracy": uar,
        "ece": 0.04,
        "ece_by_chance": 0.05,
        "confident_half_gain": 0.1,
        "set_coverage": 0.9,
        "set_size": 2.0,
        "abstention": 0.1,
        "risk": 0.2,
        "wer": 0.03,
        "cost_ms": {"median": 30.0},
        "by_class": {"joy": score, "anger": score},
        "by_sex": {"female": {"uar": uar + 0.02, "weighted_f1": uar}},
        **changed,
    }


def report(
    kind: str = "clips", modalities: tuple[str, ...] = ("audio", "text"), **conditions: Any
) -> dict[str, Any]:
    return {
        "input": kind,
        "split": "test",
        "bundle": {"modalities": modalities},
        "conditions": conditions,
        "summary": summarise_corpus(conditions),
    }


CLIPS = report(
    clean=condition(0.6),
    noise_10db_room=condition(0.5),
    gain_minus_20db=condition(0.57),
    gain_plus_20db=condition(0.61),
    audio_only=condition(0.58),
    text_only=condition(0.15),
)
TEXTS = report(
    "text",
    reference_text=condition(0.4),
    asr_errors_15=condition(0.38, wer=0.15),
    asr_errors_15_exclamations_dropped=condition(0.35),
)
REPORTS = {"ravdess": CLIPS, "nemo": report(clean=condition(0.5)), "meld": TEXTS}


def live(**compared: Any) -> dict[str, Any]:
    return summarise_bundle(REPORTS, **{"held_out": {}, "single_modality": {}, **compared})


def test_every_figure_has_a_key() -> None:
    found = live(
        held_out={"ravdess": report(clean=condition(0.35)), "tess": report(clean=condition(0.55))}
    )
    close = {name: round(found[name], 6) for name in found if isinstance(found[name], float)}
    assert close["ravdess_uar"] == 0.6
    assert close["ravdess_uar_change_noise_10db_room"] == -0.1
    assert close["ravdess_uar_change_worst_gain"] == -0.03
    assert (close["ravdess_uar_audio_only"], close["ravdess_uar_text_only"]) == (0.58, 0.15)
    assert close["held_out_corpus_uar"] == 0.5  # of the classes that both corpora have
    assert close["meld_weighted_f1"] == 0.41
    assert close["meld_weighted_f1_change_asr_errors_15"] == -0.02
    assert close["meld_wer_asr_errors_15"] == 0.15
    assert close["meld_weighted_f1_change_asr_errors_15_exclamations_dropped"] == -0.05
    assert (close["meld_ece"], close["meld_ece_by_chance"]) == (0.04, 0.05)
    assert (close["nemo_uar"], close["nemo_set_coverage"]) == (0.5, 0.9)
    assert found["cost_ms"] == {"median": 30.0}
    assert found["by_sex"]["nemo"] == {"female": {"uar": 0.52, "weighted_f1": 0.5}}


def test_what_was_not_evaluated_has_no_figure() -> None:
    found = live()
    assert not [name for name in found if name.startswith("held_out")]
    assert "held-out" not in summary_table(found)
    noisy = summarise_bundle(
        {"own": report(noise_10db_room=condition(0.4))}, held_out={}, single_modality={}
    )
    assert noisy["conditions"]["own/noise_10db_room"]["uar"] == 0.4
    assert "own_uar" not in noisy
    assert noisy["cost_ms"] is None


def test_networks_of_one_modality_are_compared_with() -> None:
    audio = report(clean=condition(0.25), modalities=("audio",))
    text = report("text", ("text",), reference_text=condition(0.45))
    found = live(single_modality={"ravdess": audio, "meld": text})
    assert found["ravdess_uar_of_audio_only_model"] == audio["summary"]["uar"]
    assert found["meld_weighted_f1_of_text_only_model"] == text["summary"]["weighted_f1"]
    assert "| that of a network trained on audio alone | 25.0 |" in summary_table(found)


def test_the_tables_show_them() -> None:
    found = live(held_out={"tess": report(clean=condition(0.55))})
    lines = summary_table(found).splitlines()
    assert "| RAVDESS test, audio and recognised words, UAR | 60.0 |" in lines
    assert "| the same with noise at 10 dB SNR and a room, change | -10.0 |" in lines
    assert "| MELD test, reference text, weighted F1 | 41.0 |" in lines
    assert "| the same with 15 % simulated ASR errors, change | -2.0 |" in lines
    assert "mean of TESS 60.0 | 60.0 |" in summary_table(found)
    assert class_table(found, ["anger", "joy"]).splitlines()[2] == "| RAVDESS | 60 | 60 |"
    assert "| RAVDESS, noise at 10 dB SNR and a room | 50.0 | 51.0 | 4.0 |" in condition_table(
        found
    )
    assert "| MELD, 15 % simulated ASR errors | 38.0 | 39.0 | 4.0 |" in condition_table(found)
    assert "| RAVDESS, female speakers | 62.0 | 60.0 |  |" in condition_table(found)


def test_few_utterances_show_an_error_by_chance() -> None:
    """One coin is half wrong either way, ten thousand hardly; certainty is never off."""
    coin = {"count": 1, "confidence": 0.5}
    assert ece_by_chance([coin]) == 0.5
    assert ece_by_chance([{"count": 10_000, "confidence": 0.5}]) < 0.01
    empty = {"count": 0, "confidence": 0.0}
    assert ece_by_chance([{"count": 9, "confidence": 1.0}, empty]) == 0.0
