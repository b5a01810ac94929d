"""Promises of the bundle: what was saved is what is loaded, every byte of it, or a clear error."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_kit import make_tiny, rewritten, settings_of, sha256
from damages import YAML, as_text, change, complaint, damage
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load, save

from stream_hbaf.bundle import FILES, Bundle, read_bundle_config, resolve_bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import BundleError
from stream_hbaf.features import pretrained
from stream_hbaf.features.acoustic import FUNCTIONALS_WIDTH
from stream_hbaf.features.commonsense import Event2MindHeads
from stream_hbaf.features.ge2e import SHA256
from stream_hbaf.features.pretrained import resolve_encoder
from stream_hbaf.features.representations import Scaling
from stream_hbaf.features.text import ContextConfig, TextEncoder, Turn
from stream_hbaf.features.whisper_encoder import find_whisper
from stream_hbaf.networks.calibration import Calibration
from stream_hbaf.networks.hbaf import HBAF, HbafConfig
from stream_hbaf.networks.network import Features
from stream_hbaf.speech.vad import find_silero
from stream_hbaf.weights import combine, digest_part, digest_parts

AUDIO = 12
LAYER = "encoder.layer.5.output.dense.bias"


def make_bundle() -> Bundle:
    torch.manual_seed(0)
    network = HbafConfig(audio_width=AUDIO, hidden=16, heads=2, layers=1, filters=4, window=3)
    scaling = Scaling(
        selected=np.arange(0, 10 * AUDIO, 10),
        mean=np.linspace(-1, 1, AUDIO, dtype=np.float32),
        deviation=np.linspace(0.5, 2, AUDIO, dtype=np.float32),
    )
    tuned = {LAYER: torch.linspace(-1, 1, 384).half()}
    return Bundle(
        config=BundleConfig(
            id="tiny",
            labels=LABELS,
            encoder="all-MiniLM-L6-v2",
            calibration=Calibration.of_temperature(1.7),
            network=network,
        ),
        scaling=scaling,
        encoder=TextEncoder(tuned=tuned),
        commonsense=Event2MindHeads(text_width=384, width=384, hidden=8).half().float().eval(),
        network=HBAF(network).half().float().eval(),
        tuned=tuned,
    )


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return make_bundle()


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle.save(folder, metrics={"dev": 0.5}, card="# tiny\n")
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


def predict(bundle: Bundle, text: str) -> NDArray[np.float64]:
    words = bundle.encoder.encode([text])
    sound = np.linspace(-3, 3, FUNCTIONALS_WIDTH, dtype=np.float32)[None]
    features = Features(
        audio=torch.from_numpy(bundle.scale(sound)[0]),
        text=torch.from_numpy(words[0]),
        commonsense=torch.from_numpy(bundle.commonsense.infer_texts([text], features=words)[0]),
    )
    logits, _ = bundle.network.step(features, bundle.network.initial_state())
    return bundle.calibration.probabilities(logits.numpy(), pattern="audio+text")


def test_a_loaded_bundle_predicts_what_the_saved_one_did(bundle: Bundle, saved: Path) -> None:
    """Encoder layers, heads, scaling, network and temperature all survive, bit for bit."""
    loaded = Bundle.load(str(saved))
    text = "Are you serious?"
    assert np.array_equal(predict(loaded, text), predict(bundle, text))
    assert (loaded.id, loaded.labels) == ("tiny", LABELS)
    assert loaded.calibration == bundle.calibration
    assert json.loads((saved / "metrics.json").read_text()) == {"dev": 0.5}


def test_saving_twice_gives_the_same_sum(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    """The published SHA-256 names the content: the same bundle has the same one."""
    bundle.save(tmp_path, metrics={"dev": 0.5}, card="another card")
    assert Bundle.load(str(tmp_path)).sha256 == Bundle.load(str(saved)).sha256


def test_probabilities_are_softened_by_the_temperature(bundle: Bundle) -> None:
    """Logits are divided by the temperature; float64 probabilities sum to 1."""
    logits = np.array([2.0, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0], np.float32)
    probabilities = bundle.calibration.probabilities(logits, pattern="text")
    expected = np.exp(logits.astype(np.float64) / 1.7)
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-12)
    assert probabilities.dtype == np.float64


def test_a_calibrated_bundle_reads_its_logits_by_what_was_given(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Through the file: each pattern's temperature, label sets and abstention."""
    calibration = Calibration(
        temperatures={"": 4.0, "audio": 2.0, "text": 1.0, "audio+text": 0.3},
        thresholds={"": 0.0, "audio": 0.1, "text": 1 / 3, "audio+text": 0.25},
        answers_above={"": 1.0, "audio": 0.6, "text": 0.4, "audio+text": 0.2},
        risk=0.3,
    )
    config = bundle.config.model_copy(update={"calibration": calibration})
    replace(bundle, config=config).save(tmp_path, metrics={}, card="")
    loaded = Bundle.load(str(tmp_path))
    assert loaded.calibration == calibration
    logits = np.array([[2.0, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0]] * 2)
    found = loaded.calibration.probabilities(logits, pattern=["audio", "audio+text"])
    for row, temperature in zip(found, (2.0, 0.3), strict=True):
        expected = np.exp(logits[0] / temperature)
        np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-12)


def test_an_uncalibrated_bundle_promises_nothing() -> None:
    """Its temperature is 1; every label is possible, and it never abstains."""
    config = BundleConfig(id="new", labels=LABELS, encoder="x", network=HbafConfig())
    assert set(config.calibration.temperatures.values()) == {1.0}
    assert set(config.calibration.thresholds.values()) == {0.0}
    assert set(config.calibration.answers_above.values()) == {0.0}


def test_scaling_selects_and_standardises(bundle: Bundle) -> None:
    """Each kept functional in standard deviations from training's mean."""
    functionals = np.arange(FUNCTIONALS_WIDTH, dtype=np.float32)[None] / np.float32(100)
    scaling = bundle.scaling
    assert scaling is not None
    expected = [(10 * n / 100 - scaling.mean[n]) / scaling.deviation[n] for n in range(AUDIO)]
    np.testing.assert_allclose(bundle.scale(functionals)[0], np.clip(expected, -5, 5), rtol=1e-5)


def test_scaling_bears_another_microphone(bundle: Bundle) -> None:
    """Numbers out of all bounds stop at 5 deviations; what isn't a number becomes the mean."""
    functionals = np.zeros((1, FUNCTIONALS_WIDTH), np.float32)
    functionals[0, [0, 10, 20, 30]] = [np.nan, np.inf, -np.inf, 1e30]
    assert bundle.scale(functionals)[0, :4].tolist() == [0.0, 5.0, -5.0, 5.0]


def test_scaling_one_equals_scaling_many(bundle: Bundle) -> None:
    """An utterance's features don't depend on what else is scaled."""
    many = np.random.default_rng(0).standard_normal((5, FUNCTIONALS_WIDTH)).astype(np.float32)
    assert np.array_equal(bundle.scale(many)[2], bundle.scale(many[2:3])[0])


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_a_damaged_file_is_named(copied: Path, name: str) -> None:
    """One changed byte is found, and the file is named."""
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} is damaged"):
        Bundle.load(str(copied))


def test_a_saved_bundle_records_the_weights_that_it_builds_on(saved: Path) -> None:
    """The encoder's frozen layers, and what a live bundle is used with: as sha256sum has them."""
    encoder = Path(resolve_encoder("all-MiniLM-L6-v2")) / "model.safetensors"
    whisper = find_whisper("base")
    assert whisper is not None
    assert read_bundle_config(str(saved)).digests == {
        "text:all-MiniLM-L6-v2": sha256(encoder),
        "whisper:base": sha256(whisper / "model.bin"),
        "vad:silero": sha256(find_silero()),
    }


def test_weights_of_the_speaker_encoder_are_a_bundles_part() -> None:
    """A bundle that takes its embedding depends on them; other weights are refused, with advice."""
    config = settings_of_ge2e()
    assert "ge2e:resemblyzer" in config.parts
    assert digest_part("ge2e:resemblyzer") == SHA256
    with pytest.raises(BundleError, match=r"--no-deps resemblyzer==0\.1\.4 --force-reinstall$"):
        digest_parts(config.parts, known={"ge2e:resemblyzer": "0" * 64}, bundle="x")


def settings_of_ge2e() -> BundleConfig:
    network = HbafConfig(audio_width=279, text_width=384, commonsense_width=6, classes=3)
    encoder, labels = "all-MiniLM-L6-v2", ("a", "b", "c")
    return BundleConfig(
        id="x", labels=labels, encoder=encoder, acoustic="prosody+ge2e", network=network
    )


@pytest.mark.parametrize("name", ["live-en", "mgcma-en"])
def test_a_shipped_bundle_names_the_weights_that_are_installed(name: str) -> None:
    """With them it loads, and its own files alone give the SHA-256 that evaluation reports."""
    config = read_bundle_config(name)
    assert {part: digest_part(part) for part in config.digests} == config.digests
    assert set(config.parts) <= set(config.digests)
    assert Bundle.load(name).sha256 == sha256(resolve_bundle(name) / "SHA256SUMS")


def test_other_weights_of_the_encoder_are_refused(tmp_path: Path) -> None:
    """One bit of a frozen layer: the part, its place, both digests and what to do, in a line."""
    bundle = make_tiny(tmp_path / "encoder", use_audio=False)
    bundle.save(tmp_path / "read", metrics={}, card="")
    weights = tmp_path / "encoder" / "model.safetensors"
    expected = sha256(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError) as raised:
        Bundle.load(str(tmp_path / "read"))
    assert str(raised.value) == (
        f"bundle read: the weights text:{tmp_path / 'encoder'} in {tmp_path / 'encoder'} have "
        f"SHA-256 {sha256(weights)}, but the bundle was made with {expected}; delete that folder "
        "and get them again: pip install --force-reinstall 'stream-hbaf[offline]'"
    )


def test_the_published_digest_changes_with_every_part() -> None:
    """Not with a part's place, nor with the order of parts; another model beside counts."""
    parts = {"text:a": "1", "whisper:base": "2", "vad:silero": "3"}
    known = combine("0", parts)
    assert combine("0", dict(reversed(parts.items()))) == known
    assert combine("0", {**parts, "whisper:/a/copy": "2"}) == known
    others = [
        combine("9", parts),
        *(combine("0", {**parts, part: "9"}) for part in parts),
        combine("0", {**parts, "whisper:tiny.en": "9"}),
        combine("0", {part: parts[part] for part in list(parts)[:2]}),
    ]
    assert len({known, *others}) == 7


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "SHA256SUMS"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    """A file that isn't there is named."""
    (copied / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} can't be read"):
        Bundle.load(str(copied))


def rewrite_config(bundle: Bundle, folder: Path, **changes: object) -> None:
    """A bundle whose sums are right and whose settings are not."""
    changed = bundle.config.model_copy(update=changes)
    broken = Bundle(
        changed, bundle.scaling, bundle.encoder, bundle.commonsense, bundle.network, bundle.tuned
    )
    broken.save(folder, metrics={}, card="")


def test_another_format_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """A bundle of a later version says so instead of failing somewhere inside."""
    rewrite_config(bundle, tmp_path, format=2)
    with pytest.raises(BundleError, match="format 2, but this version reads format 1"):
        Bundle.load(str(tmp_path))


def test_a_missing_encoder_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """A bundle whose encoder isn't there says which."""
    rewrite_config(bundle, tmp_path, encoder="/no/such/encoder")
    with pytest.raises(BundleError, match="bundle tiny: text encoder /no/such/encoder"):
        Bundle.load(str(tmp_path))


def test_a_network_of_other_sizes_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Weights that don't fit the settings end in one line."""
    wider = HbafConfig(audio_width=AUDIO, hidden=32, heads=2, layers=1, filters=4, window=3)
    rewrite_config(bundle, tmp_path, network=wider)
    with pytest.raises(BundleError, match=r"model\.safetensors doesn't fit config\.yaml") as raised:
        Bundle.load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    """Somebody who mistypes a name is told which there are."""
    with pytest.raises(BundleError, match=r"bundle 'live-en-9': .*live-en"):
        resolve_bundle("live-en-9")


def test_a_bundle_that_reads_dialogues_survives(tmp_path: Path) -> None:
    """Context, adapters and labels come back, and so does every feature and logit."""
    bundle = make_tiny(tmp_path / "encoder", use_audio=False)
    bundle.save(tmp_path / "read", metrics={}, card="")
    loaded = Bundle.load(str(tmp_path / "read"))
    turns = [Turn("ross", "i am happy"), Turn("joey", "no !"), Turn("ross", "never . what ?")]
    text = bundle.encoder.encode_dialogues([turns])[0]
    assert np.array_equal(loaded.encoder.encode_dialogues([turns])[0], text)
    features = Features(text=torch.from_numpy(text)[None])
    with torch.no_grad():
        assert torch.equal(loaded.network(features).logits, bundle.network(features).logits)
    assert loaded.config.model_copy(update={"digests": {}}) == bundle.config
    assert loaded.labels == ("ang", "hap", "neu", "sad")
    plain = TextEncoder(bundle.encoder.id, context=bundle.config.context)
    assert np.abs(plain.encode_dialogues([turns])[0] - text).max() > 1e-3


def test_a_bundle_without_audio_has_no_scaling(tmp_path: Path) -> None:
    """It hears nothing, its weights say nothing of sound, and sound is refused."""
    bundle = make_tiny(tmp_path / "encoder", use_audio=False)
    bundle.save(tmp_path / "read", metrics={}, card="")
    loaded = Bundle.load(str(tmp_path / "read"))
    assert (loaded.scaling, loaded.config.acoustic_input) == (None, "none")
    with pytest.raises(BundleError, match="bundle read: takes text only"):
        loaded.scale(np.zeros((1, 6373), np.float32))


def test_a_bundle_of_prosody_scales_every_column(tmp_path: Path) -> None:
    """Prosody's few features are all kept, standardised as functionals are."""
    bundle = make_tiny(tmp_path / "encoder", audio_width=5)
    bundle.save(tmp_path / "read", metrics={}, card="")
    loaded = Bundle.load(str(tmp_path / "read"))
    measured = np.array([[1, 1, 1, np.nan, 99]], np.float32)
    assert loaded.scale(measured).tolist() == [[1.0, 0.0, -1.0, 0.0, 5.0]]
    assert loaded.config.acoustic_input == "prosody"


def test_settings_are_read_without_the_weights(copied: Path) -> None:
    """What a bundle hears and reads is known before its weights are, or its absence is named."""
    (copied / "model.safetensors").unlink()
    assert read_bundle_config(str(copied)).id == "tiny"
    (copied / "config.yaml").unlink()
    with pytest.raises(BundleError, match=r"config\.yaml can't be read"):
        read_bundle_config(str(copied))


def test_an_unknown_commonsense_is_refused() -> None:
    """event2mind, none or a COMET: what isn't one of them is named."""
    with pytest.raises(ValidationError, match="'comet' is not event2mind, none or comet:<name>"):
        BundleConfig(id="x", labels=LABELS, encoder="x", commonsense="comet", network=HbafConfig())


def test_the_shipped_bundle_reads_utterances_by_themselves(shipped: Bundle) -> None:
    """Its encoder is given no dialogue: that is the network's part."""
    assert shipped.config.context == shipped.encoder.context == ContextConfig(tokens=0)
    assert (shipped.config.acoustic_input, shipped.config.commonsense) == (
        "compare+campplus+ge2e+whisper:base",
        "event2mind",
    )
    turns = [Turn("ross", "No."), Turn("joey", "Are you serious?")]
    assert np.array_equal(
        shipped.encoder.encode_dialogues([turns])[0],
        shipped.encoder.encode([t.text for t in turns]),
    )


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return Bundle.load("live-en")


def test_the_shipped_bundle_reads_words(shipped: Bundle) -> None:
    """Plain cases by words alone, with gold labels nobody would dispute."""
    said = {}
    for text in ("I am so happy for you! This is wonderful!", "How dare you! Get out! I hate you!"):
        words = shipped.encoder.encode([text])
        features = Features(
            text=torch.from_numpy(words[0]),
            commonsense=torch.from_numpy(
                shipped.commonsense.infer_texts([text], features=words)[0]
            ),
        )
        logits, _ = shipped.network.step(features, shipped.network.initial_state())
        said[text] = shipped.labels[int(logits.argmax())]
    assert list(said.values()) == ["joy", "anger"]


def test_the_shipped_bundle_is_small_and_was_evaluated_streaming() -> None:
    """At most 45 MB; its figures of test are above chance, and in its card."""
    folder = resolve_bundle("live-en")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 45_000_000
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    live, strangers = metrics["live"], metrics["strangers"]
    assert live["meld_weighted_f1"] > 0.313 + 0.2  # always the majority; see DATA's README
    assert live["ravdess_uar"] > 1 / 7 + 0.3
    assert all(strangers[name]["uar"] > 1 / 7 + 0.2 for name in ("ravdess", "nemo", "tess"))
    assert strangers["iemocap"]["weighted_f1"] > strangers["iemocap"]["by_words"] + 0.02
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| {100 * live['ravdess_uar']:.1f} |" in card
    assert "Art. 5(1)(f)" in card


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that loads in a moment."""
    place = tmp_path_factory.mktemp("small")
    make_tiny(place / "encoder", audio_width=5).save(place / "read", metrics={}, card="")
    return place / "read"


@pytest.mark.parametrize("number", range(len(YAML)))
def test_a_hostile_configuration_is_one_line(small: Path, tmp_path: Path, number: int) -> None:
    """Bombs, endless nesting and the like: an error that names the bundle, and quickly."""
    folder = rewritten(small, tmp_path / "b", config=YAML[number].encode())
    assert complaint(lambda: Bundle.load(str(folder))).startswith(f"bundle {folder}: ")


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_bundle_is_one_line(small: Path, tmp_path: Path, seed: int) -> None:
    """Wrong settings, a damaged header, tensors of other shapes, types and values."""
    match seed % 3:
        case 0:
            content = as_text(change(settings_of(small), seed))
            folder = rewritten(small, tmp_path / "b", config=content)
        case 1:
            content = damage((small / "model.safetensors").read_bytes(), seed)
            folder = rewritten(small, tmp_path / "b", weights=content)
        case _:
            tensors = load((small / "model.safetensors").read_bytes())
            name = sorted(tensors)[seed * 7 % len(tensors)]
            shapes = (tensors[name].flatten()[:3], tensors[name][None], torch.zeros(0))
            tensors[name] = shapes[seed // 3 % 3].contiguous()
            folder = rewritten(small, tmp_path / "b", weights=save(tensors))
    said = complaint(lambda: Bundle.load(str(folder)))
    assert said.isprintable()
    assert len(said) < 600


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"members": 100_000}, "'members': Input should be less than or equal to 32"),
        ({"members": 2}, r"model\.safetensors doesn't fit config\.yaml"),
        ({"network.hidden": 60_000}, "doesn't fit config.yaml .the network has other sizes"),
        ({"network.hidden": 10**9}, "'network': network: hidden must be from 1 to 65536"),
        ({"network.window": 10**9}, "'network': network: window must be from 0 to 256"),
        ({"network.layers": 10**6}, "'network': network: layers must be from 0 to 64"),
        ({"network.heads": 0}, "'network': network: heads must be from 1 to 65536"),
        ({"network.classes": 5}, "5 classes need as many labels"),
        ({"network": 3}, "'network': is no mapping from names to values"),
        ({"labels": ["a", "a", "b", "c"]}, "4 classes need as many labels"),
        ({"labels": ["a", "b\n", "c", "d"]}, "'labels.1'"),
        ({"calibration.temperatures.audio": 1e-300}, "'calibration.temperatures.audio'"),
        ({"context.tokens": 10**9}, "'context.tokens'"),
        ({"id": "x" * 5000}, "'id'"),
        ({"encoder": "x" * 1500}, "bundle read: text encoder x"),
        ({"commonsense": f"comet:{'x' * 1500}"}, "bundle read: COMET x"),
        ({"acoustic": "ge2e+ge2e"}, "'acoustic': names a part twice"),
        ({"acoustic": "+".join("abcdefghi")}, "'acoustic': names a part twice, or more than 8"),
    ],
)
def test_every_number_of_a_bundle_has_a_limit(
    small: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """What would run away with the memory, or fail at the first utterance, is refused."""
    settings = settings_of(small)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        place = settings
        for section in sections:
            place = place[section]
        place[leaf] = value
    folder = rewritten(small, tmp_path / "b", config=as_text(settings))
    with pytest.raises(BundleError, match=reason):
        Bundle.load(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(small: Path, tmp_path: Path, value: float) -> None:
    """Every prediction would be undefined."""
    tensors = load((small / "model.safetensors").read_bytes())
    name = next(name for name in sorted(tensors) if name.startswith("network."))
    tensors[name].flatten()[-1] = value
    folder = rewritten(small, tmp_path / "b", weights=save(tensors))
    with pytest.raises(BundleError, match=f"{name} holds a number that isn't finite"):
        Bundle.load(str(folder))


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "SHA256SUMS"])
def test_a_file_without_an_end_is_not_read(small: Path, tmp_path: Path, name: str) -> None:
    """A device in a file's place, or a file that is larger than any bundle."""
    folder = shutil.copytree(small, tmp_path / "b")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=rf"{name} can't be read \(it is no file\)"):
        Bundle.load(str(folder))
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(2 << 30)
    began = time.thread_time()
    with pytest.raises(BundleError, match=rf"{name} can't be read \(it has more than"):
        Bundle.load(str(folder))
    assert time.thread_time() - began < 1.0


def test_a_name_that_no_folder_can_have_is_unknown() -> None:
    """Too long for the file system, or with a NUL: as any other unknown name."""
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(BundleError, match="no such folder and no such name"):
            resolve_bundle(name)


def test_a_bundle_is_copied_whole(saved: Path, tmp_path: Path) -> None:
    """A folder to be uploaded or given away: the same files, the same bundle."""
    Bundle.save_pretrained(str(saved), tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(FILES)
    assert Bundle.from_pretrained(str(tmp_path / "copy")).sha256 == Bundle.load(str(saved)).sha256
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(BundleError, match=r"model\.safetensors is damaged"):
        Bundle.save_pretrained(str(tmp_path / "copy"), tmp_path / "other")


def test_a_bundle_comes_from_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its files at the revision asked for; a hub without it is one line."""
    asked: list[tuple[str, list[str], str | None]] = []

    def snapshot(name: str, *, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((name, allow_patterns, revision))
        if name == "some/other":
            raise OSError("404: no such repository\nand more")
        return str(saved)

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot)
    found = Bundle.from_pretrained("some/bundle", revision="v1")
    assert found.sha256 == Bundle.load(str(saved)).sha256
    assert asked[-1] == ("some/bundle", list(FILES), "v1")
    with pytest.raises(BundleError, match=r"'some/other': .*hub \(404: no such repository\); corr"):
        Bundle.from_pretrained("some/other")


def test_a_baseline_is_of_parts_that_the_bundle_has() -> None:
    """Of those whose widths it knows."""
    settings = {"id": "x", "labels": LABELS, "encoder": "x", "network": HbafConfig(audio_width=4)}
    baseline = {"parts": ["ge2e"]}
    with pytest.raises(ValidationError, match="baseline: needs acoustic_widths"):
        BundleConfig(**settings, acoustic="compare+ge2e", baseline=baseline)
    with pytest.raises(ValidationError, match="baseline: 'ge2e' is no part of 'compare'"):
        BundleConfig(**settings, acoustic="compare", acoustic_widths=(4,), baseline=baseline)
    with pytest.raises(ValidationError, match="acoustic_widths: 1 for 2 parts"):
        BundleConfig(**settings, acoustic="compare+ge2e", acoustic_widths=(4,))
