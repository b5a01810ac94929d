"""The head for the arousal of voices: fitting, judging, and what a bundle with one publishes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recognizer_kit import SIZES, random_acoustic, save_bundle
from sklearn.linear_model import Ridge
from training_kit import make_iemocap, silent

from stream_hbaf.affect import PLACES
from stream_hbaf.bundle import Bundle
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.networks.arousal import PENALTY, ArousalHead, fit_head
from stream_hbaf.networks.hbaf import HbafConfig
from stream_hbaf.prediction import emotion_of
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.training.arousal import FOLDS, STRENGTH, Voices, fit, fit_arousal, judge

EMOTIONS = ("anger", "joy", "neutral", "sadness")


def test_the_head_is_a_ridge_regression() -> None:
    """As another library has it, with weights of utterances that don't sum to 1."""
    draw = np.random.default_rng(0)
    audio = draw.standard_normal((40, 6)).astype(np.float32)
    targets, counts = draw.standard_normal(40), draw.uniform(0.5, 2.0, 40)
    head = fit_head(audio, targets, counts)
    other = Ridge(alpha=PENALTY * counts.sum()).fit(audio, targets, sample_weight=counts)
    np.testing.assert_allclose(head.weights, other.coef_, atol=1e-5)
    assert head.bias == pytest.approx(other.intercept_, abs=1e-5)
    assert head(audio).shape == (40,)
    assert np.abs(ArousalHead(np.full(6, 9, np.float32), 0.0)(audio)).max() == 1.0


def voices(draw: np.random.Generator, *, count: int = 200) -> Voices:
    """A corpus whose arousal is in two columns, with noise, and of which strength is judged."""
    audio = draw.standard_normal((count, 8)).astype(np.float32)
    arousal = audio[:, 0] + audio[:, 1] + 0.3 * draw.standard_normal(count)
    speakers = np.array([f"s{n % (2 * FOLDS)}" for n in range(count)])
    judged = np.where(np.arange(count) < count // 2, (arousal > 0).astype(float), np.nan)
    return Voices(audio, 0.2 * arousal, speakers, judged, speakers)


def test_heads_are_judged_by_what_they_were_not_fitted_on() -> None:
    """A corpus of which nothing can be learned is ordered by others' heads, and by its own not."""
    draw = np.random.default_rng(1)
    good = voices(draw)
    noise = replace(good, targets=draw.standard_normal(len(good.targets)))
    judged = judge({"a": good, "b": voices(draw), "noise": noise})
    assert min(judged.corpus_out.values()) > 0.5
    assert min(judged.speakers_out.values()) > 0.5
    alone = judge({"good": good, "noise": noise}).corpus_out["good"]
    assert abs(alone) < 0.4
    unknown = replace(good, judged=np.full(len(good.judged), np.nan))
    assert np.isnan(judge({"a": good, "b": unknown}).corpus_out["b"])


def test_corpora_weigh_the_same() -> None:
    """A corpus ten times as large doesn't outvote another one."""
    small = voices(np.random.default_rng(2), count=20)
    large = Voices(
        *(np.concatenate([getattr(small, name)] * 10) for name in Voices.__dataclass_fields__)
    )
    twice = fit([small, small])
    np.testing.assert_allclose(fit([small, large]).weights, twice.weights, atol=1e-5)


# --- bundles --------------------------------------------------------------------------------------


def with_audio(place: Path, **changes: Any) -> str:
    network = HbafConfig(**SIZES, use_audio=True, audio_width=256)
    fields: dict[str, Any] = {
        "acoustic": "ge2e",
        "acoustic_widths": (256,),
        "network": network,
    } | changes
    return str(save_bundle(place, **fields).model)


def make_corpora(root: Path) -> Path:
    """IEMOCAP and ShEMO as embeddings, whose first column is the arousal of their label."""
    make_iemocap(root)
    names = [f"Ses0{session}F_impro01_F{n:03d}" for session in range(1, 6) for n in range(6)]
    order = ("anger", "excitement", "frustration", "happiness", "neutral", "sadness")
    labels = [EMOTIONS[n % 4] for n in range(24)]
    (root / "shemo").mkdir()
    for corpus, own, arrays in (
        ("iemocap", [order[n % 6] for n in range(30)], {"name": names}),
        ("shemo", labels, {"name": labels, "speaker": labels, "label": labels}),
    ):
        voices = np.random.default_rng(3).normal(size=(len(own), 256)).astype(np.float32)
        voices[:, 0] = [20 * PLACES[label][1] for label in own]
        if corpus == "shemo":
            arrays["name"] = [f"n{n}" for n in range(24)]
            arrays["speaker"] = [f"s{n % 3}" for n in range(24)]
        np.savez(root / corpus / "ge2e.npz", embedding=voices, **arrays)  # type: ignore[arg-type]
    return root


def test_a_bundle_gets_a_head_and_keeps_all_else(tmp_path: Path) -> None:
    """Another digest, the same network, the figures in its metrics, and the arousal published."""
    root = make_corpora(tmp_path)
    name = with_audio(tmp_path)
    out = tmp_path / "out"
    judged = fit_arousal(
        name,
        ["iemocap", "shemo"],
        folder=root,
        out=out,
        cache=tmp_path / "cache",
        workers=1,
        progress=silent,
    )
    assert judged.corpus_out["shemo"] > 0.5
    before, after = Bundle.load(name), Bundle.load(str(out))
    assert before.arousal is None
    assert after.arousal is not None
    assert after.sha256 != before.sha256
    ours, theirs = before.network.state_dict(), after.network.state_dict()
    assert all((ours[key] == theirs[key]).all() for key in ours)

    loud = Acoustic(random_acoustic(1).lld, random_acoustic(1).functionals)
    voice = np.zeros(256, np.float32)
    voice[0] = 4.0
    loud = replace(loud, blocks={"ge2e": voice})
    with Recognizer(save_config(out)) as recognizer:
        dialogue = recognizer.new_dialogue()
        found = recognizer.classify_final(acoustic=loud, text=None, dialogue=dialogue)
        assert found.arousal == float(after.arousal(voice))
        without = recognizer.classify_final(acoustic=None, text=None, dialogue=dialogue)
        assert without.arousal is None
    assert found.arousal > 0.1
    assert emotion_of(found).affect is None  # its labels have no place


def save_config(bundle: Path) -> Any:
    from stream_hbaf.config import load_config

    return load_config(overrides={"model": str(bundle)})


def test_what_cannot_be_fitted_is_one_line(tmp_path: Path) -> None:
    """One corpus, a folder that is there, a bundle of text, and a corpus without audio."""
    (tmp_path / "text").mkdir()
    text = str(save_bundle(tmp_path / "text").model)
    out = tmp_path / "out"
    given: dict[str, Any] = {"folder": tmp_path, "cache": tmp_path / "cache", "progress": silent}
    with pytest.raises(ConfigError, match="two corpora at least"):
        fit_arousal(text, ["shemo"], out=out, **given)
    with pytest.raises(ConfigError, match="exists already"):
        fit_arousal(text, ["shemo", "iemocap"], out=tmp_path, **given)
    with pytest.raises(BundleError, match="takes no features of whole utterances"):
        fit_arousal(text, ["shemo", "iemocap"], out=out, **given)
    make_iemocap(tmp_path)
    with pytest.raises(CorpusError, match="iemocap: has no audio"):
        fit_arousal(with_audio(tmp_path), ["iemocap", "shemo"], out=out, **given)


def test_a_strong_voice_is_above_its_label_place() -> None:
    """By as much as a normal one is below."""
    from stream_hbaf.corpora.dialogue import LabelledUtterance
    from stream_hbaf.training.arousal import _target

    one = LabelledUtterance("a", "s", "", "anger")
    place = PLACES["anger"][1]
    assert _target(one) == place
    assert _target(replace(one, strong=True)) == place + STRENGTH
    assert _target(replace(one, strong=False)) == place - STRENGTH
    assert _target(replace(one, strong=True, arousal=0.1)) == 0.1
    assert np.isnan(_target(replace(one, label=None)))
