"""The one path: sound becomes utterances, an utterance becomes features, features an emotion.

Plain calls without a clock or an event loop. The live pipeline and training replay call the same
code; they differ only in where sound comes from and where emotions go.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from stream_hbaf.bundle import Bundle
from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.errors import ConfigError
from stream_hbaf.features.acoustic import Acoustic, AcousticExtractor
from stream_hbaf.features.transcript import Transcriber, Transcript
from stream_hbaf.networks.state import DialogueState, Features
from stream_hbaf.speech.segmenter import Action, Feed, Segmenter
from stream_hbaf.speech.vad import SpeechDetector, open_detector

Int16 = NDArray[np.int16]
Float32 = NDArray[np.float32]
Modality = Literal["audio", "text"]


@dataclass(frozen=True, slots=True)
class Sound:
    """Samples that now surely belong to the utterance, [start, start + n)."""

    start: int
    samples: Int16


@dataclass(frozen=True, slots=True)
class Words:
    """What was said and how it means: the transcript with its text features."""

    transcript: Transcript
    text: Float32 | None  # [D]; None when nothing was said in words
    commonsense: Float32 | None  # [3, K]: external, internal, purpose


@dataclass(frozen=True, slots=True)
class Prediction:
    """The emotion of one utterance."""

    probabilities: dict[str, float]
    modalities: tuple[Modality, ...]

    @property
    def label(self) -> str:
        return max(self.probabilities, key=self.probabilities.__getitem__)


@dataclass(slots=True)
class Dialogue:
    """What is remembered between utterances, and what counts them."""

    state: DialogueState
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    turns: int = 0


class Listener:
    """Cuts sound into utterances: voice activity, segmenter, and the sound held in between."""

    def __init__(self, config: Config, *, detector: SpeechDetector | None = None) -> None:
        self.detector = detector or open_detector(config.vad.engine)
        self.score = 0.0  # of the newest frame
        self._config = config
        self._held_start = 0
        self._held: Int16 = np.zeros(0, np.int16)
        self._start_over(0)

    def feed(self, samples: Int16) -> list[Action | Sound]:
        """What happened in these samples, in order, with its sound in place of each Feed."""
        self._held = np.concatenate([self._held, samples])
        heard: list[Action | Sound] = []
        for score in self.detector.feed(samples):
            self.score = float(score)
            heard += map(self._with_sound, self._segmenter.feed(self.score))
        keep_from = self._segmenter.keep_from
        self._held = self._held[keep_from - self._held_start :]
        self._held_start = keep_from
        return heard

    def flush(self, *, resume_at: int) -> list[Action | Sound]:
        """End of the input or a gap in it; what follows is counted from ``resume_at``."""
        heard = [self._with_sound(action) for action in self._segmenter.flush()]
        self._start_over(resume_at)
        return heard

    def _with_sound(self, action: Action) -> Action | Sound:
        if not isinstance(action, Feed):
            return action
        start, end = (sample - self._held_start for sample in (action.start, action.end))
        return Sound(action.start, self._held[start:end])

    def _start_over(self, origin: int) -> None:
        self.detector.reset()
        self._segmenter = Segmenter(
            self._config.segmenter,
            self._config.vad,
            frame_samples=self.detector.frame_samples,
            origin=origin,
        )
        self._held_start = origin
        self._held = np.zeros(0, np.int16)


class Recognizer:
    """All models of one recogniser, loaded once. A context manager: openSMILE holds threads."""

    def __init__(self, config: Config) -> None:
        """Load everything, side by side; raises ModelError, BundleError or ConfigError."""
        self.config = config
        device = self._device = resolve_device(config.device)
        torch.set_num_threads(1)  # the network is small; Whisper has more use for the cores
        with ThreadPoolExecutor() as pool:
            transcriber = pool.submit(Transcriber, config.transcript, device=device)
            bundle = pool.submit(Bundle.load, config.model, device=device)
            self.acoustic = AcousticExtractor()
            try:
                self.transcriber = transcriber.result()
                self.bundle = bundle.result()
                self._warm_up()
            except BaseException:
                self.acoustic.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.acoustic.close()

    def _warm_up(self) -> None:
        """The first call of each model takes longer: let that not be at the first utterance.

        The transcriber sees to that itself.
        """
        words = self.understand(Transcript("hello", "en", avg_logprob=0.0, no_speech_prob=0.0))
        acoustic = self.acoustic.extract(np.zeros(SAMPLE_RATE_HZ, np.int16))
        self.classify(acoustic=acoustic, words=words, state=self.dialogue().state)

    def listener(self) -> Listener:
        return Listener(self.config)

    def dialogue(self) -> Dialogue:
        return Dialogue(self.bundle.network.initial_state())

    def understand(self, transcript: Transcript) -> Words:
        """Text features of the words, if there are any."""
        if not transcript.text:
            return Words(transcript, None, None)
        text = self.bundle.encoder.encode([transcript.text])
        return Words(transcript, text[0], self.bundle.commonsense.infer(text)[0])

    @torch.inference_mode()
    def classify(
        self, *, acoustic: Acoustic | None, words: Words | None, state: DialogueState
    ) -> tuple[Prediction, DialogueState]:
        """One step of the network; either modality may be missing.

        A provisional emotion is the same call with the new state thrown away.
        """
        audio = None if acoustic is None else self.bundle.scale(acoustic.functionals[None])[0]
        text = None if words is None else words.text
        commonsense = None if words is None else words.commonsense
        features = Features(
            audio=_tensor(audio), text=_tensor(text), commonsense=_tensor(commonsense)
        )
        features = features.map(lambda tensor: tensor.to(self._device))
        logits, state = self.bundle.network.step(features, state)
        probabilities = self.bundle.probabilities(logits.numpy(force=True))
        modalities: list[Modality] = []
        if audio is not None:
            modalities.append("audio")
        if text is not None:
            modalities.append("text")
        by_label = dict(zip(self.bundle.labels, map(float, probabilities), strict=True))
        return Prediction(by_label, tuple(modalities)), state


def resolve_device(device: str) -> str:
    """``cuda`` or ``cpu``; ``auto`` takes the GPU where there is one. Raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device 'cuda': torch finds no GPU here; use --device auto or cpu")
    return "cuda" if device != "cpu" and has_gpu else "cpu"


def _tensor(array: Float32 | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)
