"""Emotions of IEMOCAP with its speakers given or found by voice, for tools/measure_speakers.py.

A network with states of each speaker is trained without one session, and predicts that session:
with the speakers that the corpus gives, and with those that the published GE2E embeddings tell
apart, turn after turn in the order of their ends. Names are part of the text that is encoded and of
the speaker's own prosody, as live.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import BundleConfig
from stream_hbaf.config import SpeakersConfig
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, LabelledUtterance
from stream_hbaf.evaluation.diarization import count_right
from stream_hbaf.evaluation.metrics import Probabilities, score
from stream_hbaf.evaluation.offline import predict_corpus
from stream_hbaf.networks.network import Network
from stream_hbaf.speech.clustering import VoiceModel
from stream_hbaf.speech.diarizer import Diarizer
from stream_hbaf.training.experiment_file import Run, read_experiment
from stream_hbaf.training.fitting import fit_network
from stream_hbaf.training.preparation import Prepared, prepare
from stream_hbaf.training.recipe_corpora import open_corpora

EXPERIMENT = Path(__file__).parents[1] / "configs/experiments/iemocap-hypotheses.yaml"
ROW = "by_speaker"
# Chosen on every fourth dialogue of sessions 1 and 3, among nine, as was the normalisation.
GE2E = VoiceModel(between=0.1, dimensions=100.0)
SHRINKAGE = 0.2  # of the covariance within speakers, towards equal variances
TWO = SpeakersConfig(max_speakers=2, min_utterance_ms=500)
SESSION = len("Ses01")  # of a dialogue's name
DURATION = 0  # of the prosody measurements, seconds

Name = Callable[[Dialogue], Sequence[str]]


class Voices:
    """Tells speakers apart by GE2E embeddings, normalised as other sessions' speakers spread.

    The mean and the covariance within speakers are those of ``dialogues``.
    """

    def __init__(self, dialogues: Sequence[Dialogue]) -> None:
        by_speaker: dict[str, list[NDArray[np.float64]]] = {}
        for dialogue in dialogues:
            for one in dialogue.utterances:
                speaker = f"{dialogue.id[:SESSION]} {one.speaker}"
                by_speaker.setdefault(speaker, []).append(embedding_of(one))
        apart = np.concatenate([np.array(own) - np.mean(own, 0) for own in by_speaker.values()])
        within = apart.T @ apart / len(apart)
        equal = np.eye(len(within)) * np.trace(within) / len(within)
        mixed = (1 - SHRINKAGE) * within + SHRINKAGE * equal
        self._mean = np.mean([one for own in by_speaker.values() for one in own], axis=0)
        self._normalise = np.linalg.cholesky(np.linalg.inv(mixed))

    def found(self, dialogue: Dialogue, *, at_once: bool = False) -> list[str]:
        """Each turn's speaker as revised at the end, or as answered at once."""
        diarizer, names = Diarizer(TWO, model=GE2E), dict[int, str]()
        for turn, one in enumerate(dialogue.utterances):
            assert one.prosody is not None
            embedding = (embedding_of(one) - self._mean) @ self._normalise
            changed = diarizer.add(turn, embedding, duration_s=one.prosody[DURATION])
            names |= {
                each.turn: each.speaker for each in changed if each.turn == turn or not at_once
            }
        return [names[turn] for turn in range(len(names))]


def embedding_of(utterance: LabelledUtterance) -> NDArray[np.float64]:
    assert utterance.ge2e is not None
    return utterance.ge2e.astype(np.float64)


def numbered(dialogue: Dialogue) -> list[str]:
    """The true speakers, named in the order in which they appear."""
    order = [*dict.fromkeys(one.speaker for one in dialogue.utterances)]
    return [f"speaker {order.index(one.speaker) + 1}" for one in dialogue.utterances]


def renamed(corpus: Corpus, name: Name) -> Corpus:
    """The dev split with other speakers."""
    dialogues = tuple(
        replace(
            dialogue,
            utterances=tuple(
                replace(one, speaker=speaker)
                for one, speaker in zip(dialogue.utterances, name(dialogue), strict=True)
            ),
        )
        for dialogue in corpus.splits["dev"]
    )
    return replace(corpus, splits={"dev": dialogues})


def print_emotions(
    data: Path, *, cache: Path, sessions: Sequence[int], seeds: Sequence[int]
) -> None:
    """Weighted F1 of each session left out, and of all of them together: mean and spread of seeds.

    The loss is what a seed's network loses against given speakers.
    """
    print("\n| IEMOCAP, session left out | speakers | right speaker | weighted F1 | loss |")
    print("| --- | --- | --- | --- | --- |")
    every: dict[str, list[Predicted]] = {}
    for session in sessions:
        found = dict(predicted(session, data, cache=cache, seeds=seeds))
        print_session(str(session), found)
        for kind, one in found.items():
            every.setdefault(kind, []).append(one)
    print_session("all", {kind: Predicted.of_all(found) for kind, found in every.items()})


@dataclass(frozen=True)
class Predicted:
    """What some networks, one a seed, say of the same turns."""

    right: NDArray[np.bool_]  # of every turn: whether it was given the right speaker
    gold: NDArray[np.int64]  # [N], of the labelled ones
    probabilities: list[Probabilities]  # [N, C], by seed

    @classmethod
    def of_all(cls, parts: "Sequence[Predicted]") -> "Predicted":
        by_seed = zip(*(part.probabilities for part in parts), strict=True)
        return cls(
            np.concatenate([part.right for part in parts]),
            np.concatenate([part.gold for part in parts]),
            [np.concatenate(one) for one in by_seed],
        )

    @property
    def scores(self) -> NDArray[np.float64]:
        """Weighted F1 of each seed, in percent."""
        return 100 * np.array([score(self.gold, one).weighted_f1 for one in self.probabilities])


def print_session(name: str, found: Mapping[str, Predicted]) -> None:
    given = next(iter(found.values())).scores
    for kind, one in found.items():
        loss = given - one.scores
        cells = [name, kind, f"{one.right.mean():.1%}", spread(one.scores), spread(loss)]
        print("| " + " | ".join(cells) + " |", flush=True)


def spread(values: NDArray[np.float64]) -> str:
    """The mean, the standard deviation between seeds, and all of them."""
    shown = ", ".join(f"{value:.1f}" for value in values)
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{deviation} ({shown})"


def predicted(
    session: int, data: Path, *, cache: Path, seeds: Sequence[int]
) -> Iterator[tuple[str, Predicted]]:
    """Networks that are trained without a session, one a seed, and what each kind makes of it."""
    (run,) = (
        run
        for run in read_experiment(EXPERIMENT).candidates()
        if run.facts.row == ROW and run.recipe.corpora["iemocap"].dev_fold == session
    )
    corpus = open_corpora(run.recipe, data).used["iemocap"]
    prepared = prepare(run.recipe, data, splits=("dev",), cache=cache)
    bundles = [trained(run, prepared, seed=seed, cache=cache) for seed in seeds]
    for kind, right, one in variants(corpus):
        found = [
            predict_corpus(bundle, one, "dev", cache=cache, progress=lambda line: None)
            for bundle in bundles
        ]
        yield kind, Predicted(right, found[0].gold, [each.probabilities for each in found])


def variants(corpus: Corpus) -> Iterator[tuple[str, NDArray[np.bool_], Corpus]]:
    """Ways to say who speaks: which turns are given the right speaker, and the corpus so."""
    voices = Voices(corpus.splits["train"])
    names: dict[str, Name] = {
        "given": lambda dialogue: [one.speaker for one in dialogue.utterances],
        "found, revised": voices.found,
        "found, at once": lambda dialogue: voices.found(dialogue, at_once=True),
    }
    for kind, name in names.items():
        right = [count_right(numbered(one), name(one)) for one in corpus.splits["dev"]]
        yield kind, np.concatenate(right), renamed(corpus, name)


def trained(run: Run, prepared: Prepared, *, seed: int, cache: Path) -> Bundle:
    """The network of one run and seed, with the encoders of its preparation."""
    folder = cache / "speakers" / f"{run.facts.row}-{run.facts.recipe}-{seed}"
    fitted = fit_network(run.recipe, prepared, seed=seed, folder=folder)
    return bundle_of(run, prepared, fitted.network)


def bundle_of(run: Run, prepared: Prepared, network: Network) -> Bundle:
    encoder, commonsense = prepared.encoder, prepared.commonsense
    assert encoder is not None
    assert commonsense is not None
    config = BundleConfig(
        id=run.facts.row,
        labels=prepared.labels,
        encoder=run.recipe.text_encoder.name,
        context=run.recipe.text_encoder.context,
        acoustic=run.recipe.audio.representation,
        commonsense=run.recipe.commonsense.source,
        network=network.config,
    )
    return Bundle(config, prepared.scaling, encoder, commonsense.model, network, prepared.tuned)
