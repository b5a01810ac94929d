"""What a bundle's voice is worth is found on corpora that its networks never heard."""

import json
from pathlib import Path

import numpy as np
import pytest
from training_kit import SPOKEN, make_recipe, make_spoken_corpora, silent, write_recipe

from stream_hbaf.bundle import Bundle
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import ConfigError
from stream_hbaf.training.train import train
from stream_hbaf.training.weighing import (
    Rows,
    calibrate,
    weigh_trained,
    weigh_voice,
    without,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_spoken_corpora(tmp_path_factory.mktemp("weighing"))


def test_a_bundle_is_weighed_by_what_networks_say_of_strangers(place: Path) -> None:
    """Each corpus of several labels is left out once; the bundle's networks stay as they are."""
    settings = SPOKEN | {"text_encoder": {"name": str(place / "bert")}}
    recipe = make_recipe(place, settings)
    bundle = train(write_recipe(place, settings), place, place / "out", progress=silent)
    lines: list[str] = []
    found, strangers = weigh_voice(
        bundle, recipe, place, cache=place / "cache", progress=lines.append
    )
    assert {"ravdess", "meld with ravdess", "meld", "iemocap", "iemocap, test"} <= strangers.keys()
    assert strangers["ravdess"]["uar_heard"].keys() == {"0", "1"}
    assert strangers["ravdess"]["given"] == "audio+text"
    assert 0.0 <= strangers["ravdess"]["uar"] <= 1.0
    assert strangers["meld"]["by_words"] == strangers["meld"]["weighted_f1"]
    assert [line for line in lines if line.startswith("without ")] == [
        line for line in lines if line.startswith("without ravdess: ")
    ]
    assert found.network is bundle.network
    assert found.weighs_voices
    assert found.familiarity is not None
    assert set(found.familiarity.blocks) <= {"mfcc", "ge2e"}
    assert sum(found.config.shares.values()) == pytest.approx(1.0, abs=1e-3)

    out = place / "out"
    weigh_trained(place / "several.yaml", place, out, cache=place / "cache", progress=silent)
    loaded = Bundle.load(str(out))
    assert loaded.calibration == found.calibration
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["strangers"].keys() == strangers.keys()
    assert "## Strangers" in (out / "README.md").read_text(encoding="utf-8")
    assert loaded.calibration.reliability is not None
    assert metrics["calibration"]["reliability"] == loaded.calibration.reliability.model_dump(
        mode="json"
    )


def test_a_run_without_a_corpus_hears_no_speaker_of_a_session(place: Path) -> None:
    recipe = without(make_recipe(place, SPOKEN), "nemo")
    assert recipe.held_out == ("nemo",)
    assert recipe.corpora["iemocap"].dev_fold == 4


def test_words_alone_are_promised_for_dialogues(place: Path) -> None:
    """What clips' one sentence says doesn't widen the sets of words alone."""
    draw = np.random.default_rng(0)
    nothing = np.full((300, 7), np.nan)

    def rows(name: str, strength: float, *, voice: bool) -> Rows:
        labels = draw.integers(7, size=300)
        logits = draw.normal(size=(300, 7))
        logits[np.arange(300), labels] += strength
        heard = logits + 3.0 * np.eye(7)[labels] if voice else nothing
        unknown = np.full(300, 0.5 if voice else np.nan)
        number = np.arange(300)
        return Rows(name, labels, number % 20, logits, heard, heard, unknown, number // 20)

    talk, clips = rows("talk", 4.0, voice=False), rows("clips", 0.0, voice=True)
    found = calibrate([clips, talk])
    probabilities = found.probabilities(talk.text, pattern=["text"] * 300, words=talk.text)
    sets = found.label_sets(probabilities, pattern=["text"] * 300)
    assert sets.sum(1).mean() < 2.5
    assert not found.abstains(probabilities, pattern=["text"] * 300).all()


def test_a_recipe_with_nothing_to_leave_out_is_refused(place: Path) -> None:
    settings = SPOKEN | {
        "corpora": ["meld", "ravdess"],
        "text_encoder": {"name": str(place / "bert")},
    }
    bundle = train(write_recipe(place, settings), place, place / "one", progress=silent)
    with pytest.raises(ConfigError, match="needs two corpora of clips"):
        weigh_voice(bundle, make_recipe(place, settings), place, cache=place / "cache")
    assert bundle.labels == LABELS
