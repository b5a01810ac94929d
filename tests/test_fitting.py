"""Promises of fitting: networks overfit, ignore what is masked, and repeat themselves by seed."""

from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import make_dataset

from stream_hbaf.corpora.dataset import NO_LABEL, Dataset, class_weights, predict
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.features.representations import Scaling
from stream_hbaf.training import fitting
from stream_hbaf.training.batches import Clips, TrainingSet, dialogue_batch
from stream_hbaf.training.fitting import Fitted, batch_loss, fit_network, objective_of
from stream_hbaf.training.preparation import Prepared
from stream_hbaf.training.recipe import BatchConfig, Recipe
from stream_hbaf.training.scoring import GOLD, ScoredCorpus

NETWORK = {"hidden": 32, "heads": 2, "layers": 1, "dropout": 0.0}


def recipe(
    batches: dict[str, float] | None = None,
    network: dict[str, Any] | None = None,
    balanced: bool = False,
    losses: dict[str, float] | None = None,
    **fit: Any,
) -> Recipe:
    return Recipe(
        id="tiny",
        corpora="meld",
        network=NETWORK | (network or {}),
        losses={"balanced": balanced} | (losses or {}),
        batches=batches or {},
        fit={"epochs": 25, "patience": 25, "rate": 1e-2, "batch": 2} | fit,
    )


def prepared(
    training: TrainingSet, classes: int = 7, **scored: tuple[ScoredCorpus, ...]
) -> Prepared:
    """Datasets of six columns as if they had been prepared."""
    as_it_is = Scaling(np.arange(6), np.zeros(6, np.float32), np.ones(6, np.float32))
    return Prepared(
        labels=LABELS[:classes],
        training=training,
        scored=dict(scored),  # type: ignore[arg-type]
        scaling=as_it_is,
        acoustic_widths=(6,),
        encoder=None,
        tuned={},
        commonsense=None,
        corpora={},
    )


def fit_one(dataset: Dataset, *, classes: int = 4, **fit: Any) -> Fitted:
    """A network of one corpus whose train, dev and test split are the same."""
    training = TrainingSet(dataset, tuple((rows,) for rows in dataset.dialogues))
    scored = (ScoredCorpus("tiny", {GOLD: dataset}),)
    both = prepared(training, classes, dev=scored, test=scored)
    return fit_network(recipe(**fit), both, seed=0, splits=("dev", "test"))


def fit_several(texts: Dataset, clips: Dataset, *, plan: Recipe) -> Fitted:
    """A network of dialogues of texts and of clips."""
    training = TrainingSet(
        texts,
        tuple((rows,) for rows in texts.dialogues),
        clips=Clips(clips, np.ones(len(clips.labels), np.float32), clips.audio),
        neutral=LABELS.index("neutral"),
    )
    scored = (ScoredCorpus("texts", {GOLD: texts}), ScoredCorpus("clips", {GOLD: clips}, True))
    return fit_network(plan, prepared(training, dev=scored), seed=0)


def test_the_network_overfits_eight_utterances() -> None:
    """Learnt by heart with both losses, and as sure of it as it may be."""
    fitted = fit_one(make_dataset())
    assert fitted.evaluation.main("dev").weighted_f1 == 1.0
    assert fitted.evaluation.main("test") == fitted.evaluation.main("dev")
    assert fitted.evaluation.probabilities["dev"].shape == (8, 4)
    assert fitted.dev_by_loss == 1.0


def test_utterances_without_a_label_are_context_only() -> None:
    """They are in the dialogue, but neither learnt nor counted."""
    fitted = fit_one(make_dataset(labels=np.array([0, 1, NO_LABEL, 3, 0, NO_LABEL, 2, 3])))
    assert fitted.evaluation.main("dev").count == 6
    assert fitted.evaluation.main("dev").weighted_f1 == 1.0
    assert fitted.evaluation.probabilities["dev"].shape == (8, 4)


def test_undecided_utterances_may_learn_from_votes() -> None:
    """Without a label an utterance is learnt as its annotators voted, if votes weigh anything."""
    labels = np.array([0, 1, 2, NO_LABEL, 0, 1, NO_LABEL, 3])
    votes = np.zeros((8, 4), np.float32)
    votes[3, 3] = 1.0
    dataset = make_dataset(labels=labels, votes=votes)
    context_only, learnt = (
        fit_one(dataset, losses={"votes": weight}).evaluation.probabilities["dev"]
        for weight in (0.0, 1.0)
    )
    assert learnt[3, 3] > 0.8
    assert context_only[3, 3] < 0.5


def test_the_loss_of_votes_is_the_mean_over_both_kinds() -> None:
    """A labelled utterance weighs 1, an undecided one the votes' weight; others nothing."""
    labels = np.array([0, 1, NO_LABEL, NO_LABEL])
    votes = np.zeros((4, 4), np.float32)
    votes[2] = [0.25, 0.75, 0.0, 0.0]
    dataset = make_dataset(labels=np.tile(labels, 2), votes=np.tile(votes, (2, 1)))
    training = TrainingSet(dataset, tuple((rows,) for rows in dataset.dialogues))
    network = objective_of(recipe(), prepared(training, classes=4)).network.eval()
    batch = dialogue_batch(
        training, [np.arange(4)], plan=BatchConfig(), draw=np.random.default_rng(0)
    )
    logs = network(batch.features).logits[0].log_softmax(-1)
    soft = -(0.25 * logs[2, 0] + 0.75 * logs[2, 1])
    expected = (-logs[0, 0] - logs[1, 1] + 0.5 * soft) / 2.5
    assert batch_loss(network, (), batch, votes=0.5).item() == pytest.approx(expected.item(), 1e-5)
    hard = (-logs[0, 0] - logs[1, 1]) / 2
    assert batch_loss(network, (), batch).item() == pytest.approx(hard.item(), 1e-5)
    undecided = replace(batch, labels=torch.full((1, 4), NO_LABEL))
    loss = batch_loss(network, (), undecided, votes=0.5).item()
    assert loss == pytest.approx(soft.item(), 1e-5)


def test_unimodal_losses_are_trained_beside_the_others() -> None:
    """The setting adds their heads to what is trained, and nothing to the network."""
    dataset = make_dataset()
    training = TrainingSet(dataset, tuple((rows,) for rows in dataset.dialogues))
    plain, beside = (
        objective_of(recipe(losses={"unimodal": weight}), prepared(training, classes=4))
        for weight in (0.0, 0.3)
    )
    added = set(beside.module.state_dict()) - set(plain.module.state_dict())
    assert {name.rpartition(".")[0] for name in added} == {
        "criteria.1.heads.a",
        "criteria.1.heads.l",
    }
    assert fit_one(dataset, losses={"unimodal": 0.3}).evaluation.main("dev").weighted_f1 == 1.0


def test_audio_that_is_masked_is_never_read() -> None:
    """NaN where there is no audio changes nothing."""
    mask = np.arange(8) % 3 > 0
    audio = make_dataset().audio[""].copy()
    audio[~mask] = np.nan
    broken = fit_one(make_dataset(audio={"": audio}, audio_mask=mask), epochs=3)
    whole = fit_one(make_dataset(audio_mask=mask), epochs=3)
    np.testing.assert_array_equal(
        broken.evaluation.probabilities["dev"], whole.evaluation.probabilities["dev"]
    )


def test_the_epoch_of_the_lowest_loss_is_reported_beside_the_best() -> None:
    """Decision 15: stopped and picked on dev's weighted F1, the loss-picked figure beside it."""
    fitted = fit_one(make_dataset(), epochs=8)
    losses = [figures["loss"] for figures in fitted.history.measured]
    assert fitted.dev_by_loss == fitted.history.scores[int(np.argmin(losses))]
    assert fitted.history.best_score == max(fitted.history.scores)


def test_the_network_is_scored_in_the_precision_that_ships() -> None:
    """Its weights are float16's, so that a bundle predicts just what was measured."""
    network = fit_one(make_dataset(), epochs=2).network
    assert all(torch.equal(p, p.half().float()) for p in network.parameters())


def test_balanced_classes_weigh_the_same() -> None:
    """A class three times as rare weighs three times as much; context only doesn't count."""
    weights = class_weights(np.array([0, 0, 0, 1, NO_LABEL, NO_LABEL]), classes=3)
    np.testing.assert_allclose(weights.numpy(), [2 / 3, 2.0, 0.0], rtol=1e-6)


def test_texts_and_clips_teach_one_network() -> None:
    """Texts tell half of the labels and clips the other half: all eight are learnt."""
    whole = make_dataset(classes=7)
    alone = tuple(np.arange(8)[:, None])
    texts = make_dataset(classes=7, audio={})
    clips = make_dataset(classes=7, text=np.zeros_like(whole.text), dialogues=alone)
    plan = recipe(network={"audio_skip": True}, epochs=50, patience=50, rate=3e-3)
    network = fit_several(texts, clips, plan=plan).network
    by_text = predict(network, texts, version=None).argmax(1)
    by_audio = predict(network, clips, version="", with_text=False).argmax(1)
    assert by_text.tolist() == by_audio.tolist() == whole.labels.tolist()


def test_neutral_texts_decide_nothing_against_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips that never had a text are believed beside neutral texts; other texts win."""
    labels, alone = np.arange(7), tuple(np.arange(7)[:, None])
    text, audio = np.random.default_rng(0).standard_normal((2, 7, 6)).astype(np.float32)
    blank = np.zeros((7, 3, 6), np.float32)
    texts = Dataset(labels, text, blank, {}, alone)
    silent = np.zeros(7, dtype=bool)
    clips = Dataset(labels, np.zeros_like(text), blank, {"": audio}, alone, text_mask=silent)
    epochs = count()  # the last network is the one to keep
    score = {"score": 0.0, "loss": 0.0}
    monkeypatch.setattr(
        fitting, "dev_score", lambda *_, **__: score | {"score": float(next(epochs))}
    )
    shares = {"paired_dialogue_share": 1.0, "paired_audio_share": 1.0}
    plan = recipe(shares, {"audio_skip": True}, epochs=60, patience=60, rate=3e-3)
    network = fit_several(texts, clips, plan=plan).network
    neutral = LABELS.index("neutral")
    beside_neutral = Dataset(labels, text[[neutral] * 7], blank, {"": audio}, alone)
    beside_others = Dataset(labels, text, blank, {"": np.roll(audio, 1, axis=0)}, alone)
    by_audio = predict(network, beside_neutral, version="").argmax(1)
    by_text = predict(network, beside_others, version="").argmax(1)
    others = labels != neutral
    assert by_audio.tolist() == labels.tolist()
    assert np.mean(by_text[others] == labels[others]) >= 4 / 6


@pytest.mark.parametrize("balanced", [False, True])
def test_a_batch_of_context_only_trains_on(balanced: bool) -> None:
    """A dialogue without a label has a loss of zero, not NaN."""
    labels = np.array([0, 1, 2, 3, *[NO_LABEL] * 4])
    dataset = make_dataset(labels=labels)
    training = TrainingSet(dataset, tuple((rows,) for rows in dataset.dialogues))
    scored = (ScoredCorpus("tiny", {GOLD: dataset}),)
    plan = recipe(balanced=balanced, batch=1, epochs=3)
    fitted = fit_network(plan, prepared(training, classes=4, dev=scored), seed=0)
    assert np.isfinite(fitted.history.losses).all()
