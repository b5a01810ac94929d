"""Promises of preparation: which corpora play which part, and what each utterance is given."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoder import save_tiny_bert
from training_kit import (
    ONE,
    SEVERAL,
    SPOKEN,
    make_corpora,
    make_iemocap,
    make_meld,
    make_recipe,
    make_spoken_corpora,
    silent,
)

from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.errors import ConfigError, CorpusError, ModelError
from stream_hbaf.features.prosody import PROSODY_WIDTH
from stream_hbaf.features.text import Turn
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe import Recipe
from stream_hbaf.training.recipe_corpora import open_corpora


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_corpora(tmp_path_factory.mktemp("preparation"))
    (place / "bert").mkdir()
    save_tiny_bert(place / "bert")
    return place


def prepare_tiny(
    place: Path, settings: dict[str, Any], cache: Path | None = None, **changes: Any
) -> Prepared:
    encoder = {"name": str(place / "bert")} | changes.pop("text_encoder", {})
    recipe = make_recipe(place, settings, text_encoder=encoder, **changes)
    return prepare(recipe, place, cache=cache or place / "cache", progress=silent)


@pytest.fixture(scope="module")
def one(place: Path) -> Prepared:
    return prepare_tiny(place, ONE)


@pytest.fixture(scope="module")
def several(place: Path) -> Prepared:
    return prepare_tiny(place, SEVERAL)


def test_one_corpus_is_whole_dialogues(one: Prepared) -> None:
    """A row an utterance, in the order of the dialogues, with the corpus's own labels."""
    train = one.training.dialogues
    assert one.labels == LABELS
    assert train.labels.tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert [rows.tolist() for rows in train.dialogues] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [len(versions) for versions in one.training.versions] == [1, 1, 1]
    assert train.text.shape == (7, 16)
    assert train.audio[""].shape[0] == 7
    assert train.audio[""].shape[1] == one.widths["audio_width"] <= PROSODY_WIDTH
    assert (one.training.clips, one.training.further) == (None, ())
    assert {split: [c.name for c in corpora] for split, corpora in one.scored.items()} == {
        "dev": ["meld"],
        "test": ["meld"],
    }


def test_what_was_not_measured_is_masked(one: Prepared) -> None:
    """No row in the tables: no audio. An empty cell: the training mean, which is 0."""
    train = one.training.dialogues
    assert train.audio_mask is not None
    assert train.audio_mask.tolist() == [False, True, True, True, True, True, True]
    assert np.isfinite(train.audio[""]).all()
    assert one.skipped[0].startswith("dia0_utt0: ")


def test_several_corpora_are_dialogues_texts_and_clips(several: Prepared) -> None:
    """The first corpus in each version of its texts, further ones, and clips by speaker."""
    training = several.training
    assert [len(versions) for versions in training.versions] == [2, 2, 2]
    assert len(training.further) == 7
    assert len(training.dialogues.labels) == 2 * 7 + 7
    assert training.dialogues.audio == {}
    assert training.clips is not None
    assert [*training.clips.dataset.audio] == ["", "1"]
    assert len(training.clips.dataset.dialogues) == 18 + 4
    assert training.clips.weights.mean() == pytest.approx(1.0)
    assert training.neutral == LABELS.index("neutral")
    assert [c.name for c in several.scored["dev"]] == ["meld", "ravdess", "nemo"]
    assert [*several.scored["dev"][0].texts] == ["gold", "asr_errors"]
    assert "test" not in several.scored


def test_texts_in_another_language_are_left_out(several: Prepared) -> None:
    """nEMO speaks Polish, which the encoder doesn't read."""
    _, ravdess, nemo = several.scored["dev"]
    assert ravdess.gold.text_mask is not None
    assert ravdess.gold.text_mask.all()
    assert nemo.gold.text_mask is not None
    assert not nemo.gold.text_mask.any()
    assert nemo.gold.audio_mask is not None
    assert not nemo.gold.audio_mask.all() or len(nemo.gold.audio) == 5


def test_several_corpora_of_clips_need_no_dialogues(place: Path) -> None:
    """Clips alone: nothing to pair them with."""
    prepared = prepare_tiny(place, SEVERAL, corpora=["ravdess", "nemo"], asr_errors={})
    assert prepared.training.clips is not None
    assert prepared.training.versions == ()
    assert len(prepared.training.clips.dataset.labels) == 40
    assert [c.are_clips for c in prepared.scored["dev"]] == [True, True]


def test_the_encoder_reads_earlier_turns_of_several_corpora(place: Path) -> None:
    """Dialogue context is for several corpora too: a turn's features depend on those before it."""
    context = {"context": {"tokens": 64, "speakers": True}}
    prepared = prepare_tiny(place, SEVERAL, text_encoder=context)
    assert prepared.encoder is not None
    labels = ("anger", "joy", "surprise")
    turns = [
        Turn("Ann" if n % 2 else "Bob", f"I feel {label} now") for n, label in enumerate(labels)
    ]
    read = prepared.encoder.encode_dialogues([turns])[0]
    train = prepared.training.dialogues
    np.testing.assert_allclose(train.text[train.dialogues[0]], read, atol=1e-5)
    alone = prepared.encoder.encode_dialogues([turns[2:]])[0]
    assert np.abs(read[2] - alone[0]).max() > 1e-2


def test_one_corpus_may_have_asr_errors_and_augmented_audio(place: Path) -> None:
    """Each version of the texts has the audio of the same utterances, in every version of its."""
    audio = {"representation": "egemaps", "copies": 2}
    settings = ONE | {"corpora": "ravdess", "asr_errors": {"versions": 1}, "audio": audio}
    prepared = prepare_tiny(place, settings)
    train = prepared.training.dialogues
    assert [*train.audio] == ["", "1", "2"]
    assert len(train.labels) == 2 * 36
    for features in train.audio.values():
        np.testing.assert_array_equal(features[:36], features[36:])
    assert len(prepared.scored["dev"][0].gold.audio) == 5


@pytest.mark.parametrize("audio", [{"copies": 2}, {"cut": "segmenter"}])
def test_what_cannot_be_done_to_published_features_is_refused(
    place: Path, audio: dict[str, Any]
) -> None:
    """Tables can't be augmented, nor cut otherwise: a setting is honoured or refused."""
    with pytest.raises(
        ConfigError, match=r"^audio: prosody of meld is of whole dialogues .*; leave"
    ):
        prepare_tiny(place, ONE, audio={"representation": "prosody"} | audio)


def test_a_session_of_iemocap_is_dev_if_the_recipe_says_so(tmp_path: Path) -> None:
    """``dev_fold`` reaches the reader's corpus: other sessions train, test is the published one."""
    make_iemocap(tmp_path)
    recipe = make_recipe(tmp_path, ONE, corpora={"iemocap": {"dev_fold": 3}})
    splits = open_corpora(recipe, tmp_path).dialogues["iemocap"].splits
    assert {split: [d.id[:5] for d in dialogues] for split, dialogues in splits.items()} == {
        "train": ["Ses01", "Ses02", "Ses04"],
        "dev": ["Ses03"],
        "test": ["Ses05"],
    }


def test_text_of_train_may_be_by_encoders_that_have_not_seen_its_labels(
    place: Path, tmp_path: Path
) -> None:
    """Out of fold, each session's features are those that it has as ``dev_fold``; dev and test are
    unchanged."""
    make_iemocap(tmp_path)

    def prepared(*, out_of_fold: bool, **corpus: int) -> Prepared:
        tuning = {"epochs": 3, "layers": 1, "rate": 3e-2, "out_of_fold": out_of_fold}
        encoder = {"name": str(place / "bert")} | tuning
        changes = {"corpora": {"iemocap": corpus}, "text_encoder": encoder}
        recipe = make_recipe(tmp_path, ONE, **changes, audio={"representation": "none"})
        return prepare(recipe, tmp_path, cache=tmp_path / "cache", progress=silent)

    plain, apart = (prepared(out_of_fold=flag) for flag in (False, True))
    for split in ("dev", "test"):
        own, other = (one.scored[split][0].gold.text for one in (plain, apart))
        assert np.array_equal(own, other)
    for number, session in enumerate((2, 3, 4)):
        rows = slice(6 * number, 6 * number + 6)
        held_out = prepared(out_of_fold=False, dev_fold=session).scored["dev"][0].gold.text
        np.testing.assert_allclose(apart.training.dialogues.text[rows], held_out, atol=1e-6)
        assert np.abs(
            apart.training.dialogues.text[rows] - plain.training.dialogues.text[rows]
        ).any()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"corpora": "meld"}, "needs a corpus of sessions; take iemocap alone"),
        ({"corpora": "iemocap", "asr_errors": {"versions": 1}}, "is of gold texts; leave out"),
    ],
)
def test_what_cannot_be_out_of_fold_is_refused(changes: dict[str, Any], complaint: str) -> None:
    """A corpus without sessions, and simulated errors."""
    with pytest.raises(ValueError, match=complaint):
        Recipe(id="tiny", text_encoder={"out_of_fold": True}, **changes)


def test_at_most_so_many_dialogues_are_trained_on(place: Path) -> None:
    """Drawn once; dev is whole."""
    prepared = prepare_tiny(place, ONE, corpora={"meld": {"max_dialogues": 2}})
    assert len(prepared.training.versions) == 2
    assert prepared.corpora["meld"]["dialogues"] == {"train": 2, "dev": 3, "test": 3}


def test_labels_must_be_the_same_unless_merged(place: Path) -> None:
    """Corpora of other labels are refused, and taken once their classes agree."""
    classes = {"good": ["joy"], "bad": ["anger", "fear"]}
    with pytest.raises(ConfigError, match="meld and ravdess have different labels"):
        open_corpora(
            make_recipe(place, SEVERAL, corpora={"meld": {}, "ravdess": {"classes": classes}}),
            place,
        )
    both = {"meld": {"classes": classes}, "ravdess": {"classes": classes}}
    opened = open_corpora(make_recipe(place, SEVERAL, corpora=both), place)
    assert opened.labels == ("bad", "good")
    assert ([*opened.dialogues], [*opened.clips]) == (["meld"], ["ravdess"])


def test_a_corpus_without_a_dev_split_is_refused(tmp_path: Path) -> None:
    """The main corpus picks the epoch: nothing is computed without its dev split."""
    make_meld(tmp_path)
    (tmp_path / "meld" / "dev_sent_emo.csv").write_text(
        "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\n", encoding="utf-8"
    )
    with pytest.raises(CorpusError, match="dev split"):
        prepare(make_recipe(tmp_path, ONE), tmp_path, cache=tmp_path, progress=silent)


def test_text_features_that_are_not_finite_name_the_utterance(place: Path, tmp_path: Path) -> None:
    """One utterance of NaN ends preparation with its id, before a network is spoilt."""
    without = {"audio": {"representation": "none"}}
    prepare_tiny(place, ONE, tmp_path, **without)
    for file in (tmp_path / "text").glob("*.npy"):
        features = np.load(file)
        features[5, 3] = np.nan
        np.save(file, features)
    with pytest.raises(ModelError, match=r"meld, train: the text features of utterance dia2_utt0"):
        prepare_tiny(place, ONE, tmp_path, **without)


def test_what_is_prepared_travels_without_its_models(one: Prepared) -> None:
    """A training process gets the features, not an encoder of a hundred million weights."""
    there = pickle.loads(pickle.dumps(one))
    assert (there.encoder, there.commonsense) == (None, None)
    np.testing.assert_array_equal(there.training.dialogues.text, one.training.dialogues.text)


def test_a_recipe_without_audio_measures_none(place: Path) -> None:
    """Nothing is measured, and the network has no place for it."""
    prepared = prepare_tiny(place, ONE, audio={"representation": "none"})
    assert (prepared.scaling, prepared.training.dialogues.audio) == (None, {})
    assert prepared.widths["audio_width"] == 0


def test_clips_that_cannot_be_measured_are_left_out(tmp_path: Path) -> None:
    """A clip too short for features has no label and is in no dialogue; the others train."""
    make_corpora(tmp_path)
    (tmp_path / "bert").mkdir()
    save_tiny_bert(tmp_path / "bert")
    clip = tmp_path / "ravdess" / "Actor_01" / "03-01-05-01-01-01-01.wav"
    clip.write_bytes(clip.read_bytes()[:44])
    clips = prepare_tiny(tmp_path, SEVERAL, commonsense={"source": "none"}).training.clips
    assert clips is not None
    rows = np.concatenate(clips.dataset.dialogues)
    assert len(rows) == len(clips.dataset.labels) - 1
    assert clips.dataset.labelled.sum() == len(rows)
    assert clips.weights[~clips.dataset.labelled].tolist() == [0.0]


@pytest.fixture(scope="module")
def spoken_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_spoken_corpora(tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="module")
def spoken(spoken_place: Path) -> Prepared:
    return prepare_tiny(spoken_place, SPOKEN, held_out=["nemo"])


def test_dialogues_with_audio_of_their_own_stand_beside_clips(spoken: Prepared) -> None:
    """They have one block, clips have both; what is missing is 0, the training set's mean."""
    training = spoken.training
    mfcc, ge2e = training.blocks
    rows = np.concatenate(training.with_audio)
    assert len(training.with_audio) == 3
    assert not set(rows) & set(np.concatenate([v for one in training.versions for v in one]))
    audio, mask = training.dialogues.audio[""], training.dialogues.audio_mask
    assert mask is not None
    assert mask[rows].all()
    assert not mask[: rows.min()].any()
    assert not audio[rows][:, mfcc].any()
    assert audio[rows][:, ge2e].any(axis=1).all()
    assert training.clips is not None
    clips = training.clips.dataset.audio["1"]
    assert clips[:, mfcc].any(axis=1).all()
    assert clips[:, ge2e].any()
    assert spoken.labels == LABELS
    assert spoken.acoustic_widths == (28, 256)


def test_clips_are_heard_in_one_sitting(spoken: Prepared) -> None:
    """A speaker's clips are one dialogue where features are relative to the speaker's past."""
    ravdess = next(one for one in spoken.scored["dev"] if one.name == "ravdess")
    assert [len(rows) for rows in ravdess.gold.dialogues] == [2, 2]
    training = spoken.training
    assert training.clips is not None
    dataset, relative = training.clips.dataset, training.clips.relative[""]
    rows = next(rows for rows in dataset.dialogues if len(rows) == 2)
    first, second = (np.abs(dataset.audio[""][row] - relative[row]) for row in rows)
    mfcc, ge2e = training.blocks
    assert first.max() < 1e-6
    assert second[mfcc].max() > 1e-3
    assert not second[ge2e].any()


def test_a_corpus_held_out_is_scored_whole_and_not_trained_on(spoken: Prepared) -> None:
    """Beside it, the test split of dialogues with audio; of all others live figures are taken."""
    test = {one.name: one for one in spoken.scored["test"]}
    assert [*test] == ["iemocap", "nemo"]
    assert len(test["nemo"].gold.labels) == 6
    assert [*test["nemo"].gold.audio] == [""]
    assert test["nemo"].are_clips
    assert [one.name for one in spoken.scored["dev"]] == ["meld", "iemocap", "ravdess"]
    assert spoken.training.clips is not None
    assert len(spoken.training.clips.dataset.labels) == 36


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"held_out": ["tess"]}, "held_out: 'tess' is none of the corpora"),
        ({"held_out": ["meld", "iemocap", "nemo"]}, "leaves fewer than two corpora"),
        ({"audio": {"baseline": {"parts": ["lld"]}}}, "'lld' is no part of 'prosody'"),
        ({"audio": {"baseline": {"parts": []}}}, "baseline"),
        ({"audio": {"baseline": {"parts": ["prosody"], "prior": 0}}}, "prior"),
    ],
)
def test_what_cannot_be_held_out_or_relative_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_recipe(tmp_path, {**SPOKEN, "audio": {}} | changes)
