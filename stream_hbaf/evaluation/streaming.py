"""Training: what a bundle says live, of real sound that is played into the recogniser.

Nothing is given that a live recogniser would not have: voice activity finds the utterances,
Whisper their words, openSMILE is fed while they last, and the dialogue's state moves on. A corpus
without clips is read turn by turn instead, in its own words or in misheard ones.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.source import MemorySource
from stream_hbaf.bundle import Bundle
from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.corpora.asr_errors import lexicon_of, mishear
from stream_hbaf.corpora.augment import CLEAN, Condition, NoisesAndRooms
from stream_hbaf.corpora.dataset import utterances_of
from stream_hbaf.corpora.dialogue import Corpus, LabelledUtterance, Split
from stream_hbaf.corpora.playlist import GAP_S, Playlist
from stream_hbaf.errors import BundleError, CorpusError
from stream_hbaf.evaluation.metrics import Labels, Probabilities, word_error_rate
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.live.pipeline import Recognition, replay
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.prediction import Prediction
from stream_hbaf.recognizer import Int16, Recognizer
from stream_hbaf.speech.detector import UtteranceDetector

Flags = NDArray[np.bool_]
Milliseconds = NDArray[np.float64]
Progress = Callable[[str], None]

CHUNK_MS = 320  # larger chunks cost fewer hops between threads; they never change the answer
TIMED_S = (2.5, 3.5)  # how long the utterances are whose cost is measured
TIMED = 50  # of them at most
TIMES = 3
STAGES = ("vad", "acoustic", "text", "classifier")


@dataclass(frozen=True)
class LiveJudged:
    """What a bundle said of a split's N labelled utterances, in the corpus's order.

    Labels are numbered as the bundle's are. An utterance that nothing was said of, because its
    clip can't be read or the recogniser found no speech in it, has uniform probabilities and
    every label in its set; it counts as wrong.
    """

    ids: tuple[str, ...]
    speakers: tuple[str, ...]
    gold: Labels  # [N]
    probabilities: Probabilities  # [N, C]
    sets: Flags  # [N, C], the labels that it may be
    abstained: Flags  # [N]
    heard: Flags  # [N], whether something was said of it
    foreign: int  # labelled utterances beside the N, whose label the bundle doesn't know
    wer: float | None  # word error rate of all words there are; None for none
    cost_ms: Mapping[str, Milliseconds] = field(default_factory=dict)  # of STAGES, of n utterances

    @property
    def missed(self) -> tuple[str, ...]:
        """The ids of what nothing was said of."""
        return tuple(one for one, heard in zip(self.ids, self.heard, strict=True) if not heard)


def open_recognizer(bundle: str, *, config: Config | None = None) -> Recognizer:
    """Load a bundle by folder or name for evaluation, to be closed by ``with``.

    Partial transcripts are off, since nothing reads them and final ones don't depend on them; a
    dialogue ends after the silence that ``Playlist`` puts between dialogues. Raises BundleError
    for a bundle that can't be loaded or isn't live, ModelError, ConfigError.
    """
    config = config or Config()
    transcript = config.transcript.model_copy(update={"partial_every_ms": 10**9})
    dialogue = config.dialogue.model_copy(update={"gap_s": GAP_S})
    changed = {"model": bundle, "transcript": transcript, "dialogue": dialogue}
    return Recognizer(config.model_copy(update=changed))


def judge_live(
    recognizer: Recognizer,
    corpus: Corpus,
    split: Split,
    *,
    condition: Condition = CLEAN,
    sounds: NoisesAndRooms | None = None,
    modalities: Collection[Modality] = MODALITIES,
    speed: float | None = None,
    progress: Progress = print,
) -> LiveJudged:
    """Play a split's clips into the recogniser, ``speed`` times as fast as real time or, None, as
    fast as it listens; what it says is the same.

    An utterance's prediction is that of the longest utterance that was found in its clip. Raises
    CorpusError if no clip can be played, BundleError if the bundle knows none of the labels.
    """
    utterances = utterances_of(corpus.splits[split])
    require_shared_labels(recognizer.bundle, corpus, utterances)
    playlist = Playlist(corpus.splits[split], condition=condition, sounds=sounds, progress=progress)
    heard: dict[int, list[_Heard]] = {}

    def keep(recognition: Recognition) -> None:
        finish = recognition.finish
        number = playlist.number_at((finish.start + finish.end) // 2)
        words = None if recognition.text is None else recognition.text.transcript
        found = _Heard(finish.start, finish.end, words, recognition.prediction)
        heard.setdefault(number, []).append(found)

    replay(
        recognizer,
        MemorySource(playlist, speed=speed, chunk_ms=CHUNK_MS),
        on_recognition=keep,
        modalities=modalities,
    )
    if len(playlist.unread) == len(utterances):
        raise CorpusError(f"{corpus.name}: no clip can be played: {playlist.unread[0]}")
    longest = {number: max(found, key=lambda one: one.length) for number, found in heard.items()}
    return _gather(
        recognizer.bundle,
        utterances,
        predictions={number: one.prediction for number, one in longest.items()},
        understood={
            number: " ".join(one.words.text for one in found if one.words is not None)
            for number, found in heard.items()
        },
        cost_ms=_measure_cost(recognizer, playlist, longest),
    )


def judge_words(
    recognizer: Recognizer,
    corpus: Corpus,
    split: Split,
    *,
    error_rate: float = 0.0,
    softened: float = 0.0,
    seed: int = 0,
    progress: Progress = print,
) -> LiveJudged:
    """Read a split turn by turn without sound, ``error_rate`` of its words misheard.

    Of the misheard texts' exclamation marks the share ``softened`` is lost as well. Raises
    CorpusError if there are no words, BundleError if the bundle knows none of the labels or reads
    nothing.
    """
    utterances = utterances_of(corpus.splits[split])
    require_shared_labels(recognizer.bundle, corpus, utterances)
    if not recognizer.bundle.config.network.use_text:
        raise BundleError(f"bundle {recognizer.bundle.id}: hears only; {corpus.name} has no clips")
    every = (said.text for turns in corpus.splits.values() for said in utterances_of(turns))
    lexicon = lexicon_of(every) if error_rate else None
    language = recognizer.config.transcript.language
    predictions: dict[int, Prediction] = {}
    understood: dict[int, str] = {}
    for turns in corpus.splits[split]:
        dialogue = recognizer.new_dialogue()
        for said in turns.utterances:
            number = len(predictions)
            draw = np.random.default_rng([seed, number])
            understood[number] = mishear(
                said.text, rate=error_rate, draw=draw, lexicon=lexicon, softened=softened
            )
            text = recognizer.encode_text(
                Transcript(understood[number], language, avg_logprob=0.0, no_speech_prob=0.0),
                speaker=said.speaker,
                window=dialogue.window,
            )
            predictions[number] = recognizer.classify_final(
                acoustic=None, text=text, dialogue=dialogue, speaker=said.speaker
            )
            if len(predictions) % 500 == 0 or len(predictions) == len(utterances):
                progress(f"{len(predictions)} of {len(utterances)} utterances, {said.id}")
    return _gather(
        recognizer.bundle, utterances, predictions=predictions, understood=understood, cost_ms={}
    )


def require_shared_labels(
    bundle: Bundle, corpus: Corpus, utterances: Sequence[LabelledUtterance]
) -> None:
    """Raise BundleError if the bundle knows none of the labels that there are."""
    there = sorted({said.label for said in utterances if said.label is not None})
    if not set(there) & set(bundle.labels):
        raise BundleError(
            f"bundle {bundle.id}: says {', '.join(bundle.labels)}, but {corpus.name} has "
            f"{', '.join(there) or 'no labels'}; judge it on a corpus that it knows labels of"
        )


@dataclass(frozen=True, slots=True)
class _Heard:
    """One utterance as the pipeline found it: samples [start, end) of the stream."""

    start: int
    end: int
    words: Transcript | None  # None: their model failed
    prediction: Prediction

    @property
    def length(self) -> int:
        return self.end - self.start


def _gather(
    bundle: Bundle,
    utterances: Sequence[LabelledUtterance],
    *,
    predictions: Mapping[int, Prediction],
    understood: Mapping[int, str],
    cost_ms: Mapping[str, Milliseconds],
) -> LiveJudged:
    """The labelled utterances alone; predictions and words are given by utterance number."""
    labels = bundle.labels
    counted = [n for n, said in enumerate(utterances) if said.label in labels]
    labelled = sum(said.label is not None for said in utterances)
    probabilities = np.full((len(counted), len(labels)), 1 / len(labels))
    sets = np.ones(probabilities.shape, bool)
    abstained = np.zeros(len(counted), bool)
    for row, number in enumerate(counted):
        prediction = predictions.get(number)
        if prediction is not None:
            probabilities[row] = [prediction.probabilities[label] for label in labels]
            sets[row] = [label in prediction.labels_in_set for label in labels]
            abstained[row] = prediction.abstained
    said = [one.text for one in utterances]
    heard = [understood.get(number, "") for number in range(len(said))]
    return LiveJudged(
        ids=tuple(utterances[n].id for n in counted),
        speakers=tuple(utterances[n].speaker for n in counted),
        gold=np.array([labels.index(str(utterances[n].label)) for n in counted]),
        probabilities=probabilities,
        sets=sets,
        abstained=abstained,
        heard=np.array([n in predictions for n in counted]),
        foreign=labelled - len(counted),
        wer=word_error_rate(said, heard) if any(said) else None,
        cost_ms=cost_ms,
    )


def _measure_cost(
    recognizer: Recognizer, playlist: Playlist, heard: Mapping[int, _Heard]
) -> dict[str, Milliseconds]:
    """Each stage's own time but Whisper's, one after another, for utterances of about 3 s.

    Measured afterwards on the same sound and words, the least of three times: while all stages
    run, or other programs, they wait for each other's turn on the cores.
    """
    shortest, longest = (limit * SAMPLE_RATE_HZ for limit in TIMED_S)
    chosen = [n for n, one in sorted(heard.items()) if shortest <= one.length <= longest][:TIMED]
    detector = recognizer.utterance_detector()
    rows = []
    for number in chosen:
        one, clip = heard[number], playlist.start_of(number)
        samples = playlist.sound(number)[max(0, one.start - clip) : one.end - clip]
        times = []
        for _ in range(TIMES):
            times.append(_time_stages(recognizer, detector, samples, one.words))
            detector.flush(resume_at=0)
        rows.append(np.min(times, axis=0))
    measured = np.array(rows).reshape(-1, len(STAGES))
    return dict(zip(STAGES, measured.T, strict=True))


def _time_stages(
    recognizer: Recognizer,
    detector: UtteranceDetector,
    samples: Int16,
    transcript: Transcript | None,
) -> list[float]:
    """Milliseconds of each of STAGES for one utterance, as the first of its dialogue."""
    dialogue = recognizer.new_dialogue()
    acoustic = text = None
    clock = [time.perf_counter()]
    detector.feed(samples)
    clock.append(time.perf_counter())
    if recognizer.acoustic is not None:
        acoustic = recognizer.acoustic.extract(samples)
    clock.append(time.perf_counter())
    if transcript is not None:
        text = recognizer.encode_text(transcript)
    clock.append(time.perf_counter())
    recognizer.classify_final(acoustic=acoustic, text=text, dialogue=dialogue, explain=True)
    clock.append(time.perf_counter())
    return [1000 * float(step) for step in np.diff(clock)]
