"""Streaming evaluation: a corpus's clips played through the live path, and what it predicts.

The recogniser gets no more than it gets live: voice activity detection finds the utterances,
Whisper transcribes them, openSMILE is fed chunk by chunk, and the dialogue's state is carried on.
A corpus without clips is read turn by turn instead, as written or with simulated ASR errors.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.source import MemorySource
from stream_hbaf.bundle import Bundle
from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.corpora.asr_errors import lexicon_of, simulate_asr_errors
from stream_hbaf.corpora.augment import CLEAN, Condition, NoisesAndRooms
from stream_hbaf.corpora.clips import GAP_S, Playlist
from stream_hbaf.corpora.dialogue import Corpus, Dialogue, LabelledUtterance, Split, utterances_of
from stream_hbaf.errors import BundleError, CorpusError
from stream_hbaf.evaluation.metrics import Labels, Probabilities, word_error_rate
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.live.pipeline import recognise_source
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.networks.calibration import MODALITIES, Modality
from stream_hbaf.prediction import Prediction
from stream_hbaf.recognizer import Int16, Recognizer
from stream_hbaf.speech.detector import UtteranceDetector

Flags = NDArray[np.bool_]
Milliseconds = NDArray[np.float64]
Progress = Callable[[str], None]

CHUNK_MS = 320  # larger chunks cost fewer hops between threads; they never change the result
TIMED_S = (2.5, 3.5)  # length of the utterances whose cost is measured
TIMED = 50  # of them at most
TIMES = 3  # measurements of each, of which the least counts
STAGES = ("vad", "acoustic", "text", "classifier")
PROGRESS_EVERY = 500  # utterances of a corpus without clips


@dataclass(frozen=True)
class StreamingPredictions:
    """A bundle's predictions of a split's N labelled utterances, in the corpus's order.

    Labels are numbered as the bundle's are. An utterance without a prediction, because its clip
    can't be read or no speech was detected in it, has uniform probabilities and every label in
    its set; it counts as wrong.
    """

    ids: tuple[str, ...]
    speakers: tuple[str, ...]
    gold: Labels  # [N]
    probabilities: Probabilities  # [N, C], calibrated
    sets: Flags  # [N, C], the conformal label sets
    abstained: Flags  # [N]
    detected: Flags  # [N], whether there is a prediction
    unknown_labels: int  # labelled utterances beside the N, whose label the bundle doesn't have
    wer: float | None  # word error rate where there are reference texts; None without any
    cost_ms: Mapping[str, Milliseconds] = field(default_factory=dict)  # of STAGES, of n utterances

    @property
    def missed(self) -> tuple[str, ...]:
        """The ids of the utterances without a prediction."""
        return tuple(one for one, found in zip(self.ids, self.detected, strict=True) if not found)

    @property
    def predicted(self) -> Labels:
        """The predicted label of each utterance [N]; C where there is no prediction."""
        classes = self.probabilities.shape[1]
        labels: Labels = np.where(self.detected, self.probabilities.argmax(1), classes)
        return labels


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


def predict_clips(
    recognizer: Recognizer,
    corpus: Corpus,
    split: Split,
    *,
    condition: Condition = CLEAN,
    sounds: NoisesAndRooms | None = None,
    modalities: Collection[Modality] = MODALITIES,
    speed: float | None = None,
    progress: Progress = print,
) -> StreamingPredictions:
    """Play a split's clips into the recogniser.

    ``speed`` is a factor of real time; None is as fast as the recogniser takes them. Predictions
    don't depend on it. Where several utterances are detected in one clip, the longest one's
    prediction counts, and the transcript is that of all. A modality that isn't among
    ``modalities`` is withheld from the network. Raises CorpusError if no clip can be played,
    BundleError if the bundle has none of the labels.
    """
    utterances = utterances_of(corpus.splits[split])
    require_shared_labels(recognizer.bundle, corpus, utterances)
    playlist = Playlist(corpus.splits[split], condition=condition, sounds=sounds, progress=progress)
    detected = _detect(recognizer, playlist=playlist, modalities=modalities, speed=speed)
    if len(playlist.unread) == len(utterances):
        raise CorpusError(f"{corpus.name}: no clip can be played: {playlist.unread[0]}")
    longest = {number: max(found, key=lambda one: one.length) for number, found in detected.items()}
    return _gather(
        recognizer.bundle,
        utterances,
        predictions={number: one.prediction for number, one in longest.items()},
        transcripts={
            number: " ".join(one.transcript.text for one in found if one.transcript is not None)
            for number, found in detected.items()
        },
        cost_ms=_measure_cost(recognizer, playlist=playlist, detected=longest),
    )


def predict_text(
    recognizer: Recognizer,
    corpus: Corpus,
    split: Split,
    *,
    error_rate: float = 0.0,
    exclamations_dropped: float = 0.0,
    seed: int = 0,
    progress: Progress = print,
) -> StreamingPredictions:
    """Read a split's texts turn by turn, without audio.

    ``error_rate`` is the expected word error rate of simulated ASR errors; where it isn't 0, the
    share ``exclamations_dropped`` of the exclamation marks becomes full stops as well. The same
    ``seed`` gives the same errors. Raises BundleError if the bundle has none of the labels or
    takes no text.
    """
    utterances = utterances_of(corpus.splits[split])
    require_shared_labels(recognizer.bundle, corpus, utterances)
    if not recognizer.bundle.config.network.use_text:
        raise BundleError(
            f"bundle {recognizer.bundle.id}: takes audio only, but {corpus.name} has no clips; "
            "choose a corpus with clips"
        )
    every = (one.text for dialogues in corpus.splits.values() for one in utterances_of(dialogues))
    lexicon = lexicon_of(every) if error_rate else None
    texts = {
        number: simulate_asr_errors(
            one.text,
            rate=error_rate,
            draw=np.random.default_rng([seed, number]),
            lexicon=lexicon,
            exclamations_dropped=exclamations_dropped,
        )
        for number, one in enumerate(utterances)
    }
    predictions = _read(recognizer, corpus.splits[split], texts=texts, progress=progress)
    return _gather(
        recognizer.bundle, utterances, predictions=predictions, transcripts=texts, cost_ms={}
    )


def _read(
    recognizer: Recognizer,
    dialogues: Sequence[Dialogue],
    *,
    texts: Mapping[int, str],
    progress: Progress,
) -> dict[int, Prediction]:
    """The prediction of each utterance from its text in ``texts``, by number, turn by turn."""
    language = recognizer.config.transcript.language
    predictions: dict[int, Prediction] = {}
    for turns in dialogues:
        dialogue = recognizer.new_dialogue()
        for one in turns.utterances:
            number = len(predictions)
            text = recognizer.encode_text(
                Transcript(texts[number], language, avg_logprob=0.0, no_speech_prob=0.0),
                speaker=one.speaker,
                window=dialogue.window,
            )
            predictions[number] = recognizer.classify_final(
                acoustic=None, text=text, dialogue=dialogue, speaker=one.speaker
            )
            if len(predictions) % PROGRESS_EVERY == 0 or len(predictions) == len(texts):
                progress(f"{len(predictions)} of {len(texts)} utterances, {one.id}")
    return predictions


def require_shared_labels(
    bundle: Bundle, corpus: Corpus, utterances: Sequence[LabelledUtterance]
) -> None:
    """Raise BundleError if the bundle has none of the utterances' labels."""
    there = sorted({one.label for one in utterances if one.label is not None})
    if not set(there) & set(bundle.labels):
        raise BundleError(
            f"bundle {bundle.id}: predicts {', '.join(bundle.labels)}, but {corpus.name} has "
            f"{', '.join(there) or 'no labels'}; choose a corpus that shares labels with it"
        )


@dataclass(frozen=True, slots=True)
class _Detected:
    """One utterance that the pipeline detected: samples [start, end) of the stream."""

    start: int
    end: int
    transcript: Transcript | None  # None: transcription failed
    prediction: Prediction

    @property
    def length(self) -> int:
        return self.end - self.start


def _detect(
    recognizer: Recognizer,
    *,
    playlist: Playlist,
    modalities: Collection[Modality],
    speed: float | None,
) -> dict[int, list[_Detected]]:
    """Play the clips into the live pipeline; the utterances that it detects in each, by number."""
    detected: dict[int, list[_Detected]] = {}

    def keep(recognition: Recognition) -> None:
        finish = recognition.finish
        number = playlist.number_at((finish.start + finish.end) // 2)
        transcript = None if recognition.text is None else recognition.text.transcript
        found = _Detected(finish.start, finish.end, transcript, recognition.prediction)
        detected.setdefault(number, []).append(found)

    recognise_source(
        recognizer,
        MemorySource(playlist, speed=speed, chunk_ms=CHUNK_MS),
        on_recognition=keep,
        modalities=modalities,
    )
    return detected


def _gather(
    bundle: Bundle,
    utterances: Sequence[LabelledUtterance],
    *,
    predictions: Mapping[int, Prediction],
    transcripts: Mapping[int, str],
    cost_ms: Mapping[str, Milliseconds],
) -> StreamingPredictions:
    """The labelled utterances alone; predictions and transcripts are given by utterance number."""
    labels = bundle.labels
    counted = [n for n, one in enumerate(utterances) if one.label in labels]
    labelled = sum(one.label is not None for one in utterances)
    probabilities = np.full((len(counted), len(labels)), 1 / len(labels))
    sets = np.ones(probabilities.shape, bool)
    abstained = np.zeros(len(counted), bool)
    for row, number in enumerate(counted):
        prediction = predictions.get(number)
        if prediction is not None:
            probabilities[row] = [prediction.probabilities[label] for label in labels]
            sets[row] = [label in prediction.labels_in_set for label in labels]
            abstained[row] = prediction.abstained
    written = [n for n, one in enumerate(utterances) if one.text.strip()]
    references = [utterances[n].text for n in written]
    hypotheses = [transcripts.get(n, "") for n in written]
    return StreamingPredictions(
        ids=tuple(utterances[n].id for n in counted),
        speakers=tuple(utterances[n].speaker for n in counted),
        gold=np.array([labels.index(str(utterances[n].label)) for n in counted]),
        probabilities=probabilities,
        sets=sets,
        abstained=abstained,
        detected=np.array([n in predictions for n in counted]),
        unknown_labels=labelled - len(counted),
        wer=word_error_rate(references, hypotheses) if references else None,
        cost_ms=cost_ms,
    )


def _measure_cost(
    recognizer: Recognizer, *, playlist: Playlist, detected: Mapping[int, _Detected]
) -> dict[str, Milliseconds]:
    """Each stage's own time but Whisper's, for utterances of about 3 s.

    Measured afterwards on the same audio and transcripts, stage after stage, the least of three
    times: while the pipeline runs, stages wait for each other and for other programs.
    """
    shortest, longest = (limit * SAMPLE_RATE_HZ for limit in TIMED_S)
    chosen = [n for n, one in sorted(detected.items()) if shortest <= one.length <= longest][:TIMED]
    detector = UtteranceDetector(recognizer.config)
    rows = []
    for number in chosen:
        one, clip = detected[number], playlist.start_of(number)
        samples = playlist.clip(number)[max(0, one.start - clip) : one.end - clip]
        measure = partial(_time_stages, recognizer, detector, samples, one.transcript)
        rows.append(np.min([measure() for _ in range(TIMES)], axis=0))
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
    detector.flush(resume_at=0)
    return [1000 * float(step) for step in np.diff(clock)]
