"""Loads all models of a recogniser and turns an utterance's features into an emotion.

Plain calls without a clock or an event loop. The live pipeline, the replay of sessions and the
evaluation call the same code.
"""

import logging
import uuid
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from stream_hbaf.bundle import NONE, Bundle, BundleConfig, read_bundle_config
from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.errors import BundleError, ConfigError
from stream_hbaf.events import Contributions, Inferred, Model
from stream_hbaf.features.acoustic import LLD_MS, Acoustic, AcousticExtractor
from stream_hbaf.features.context import EMPTY_WINDOW, Turn, TurnWindow
from stream_hbaf.features.representations import LLD
from stream_hbaf.features.tokens import to_tokens
from stream_hbaf.features.whisper import Transcriber, Transcript
from stream_hbaf.networks.calibration import (
    MODALITIES,
    Modality,
    Probabilities,
    coalitions,
    pattern_of,
    shapley,
)
from stream_hbaf.networks.state import Features, State
from stream_hbaf.speech.detector import UtteranceDetector
from stream_hbaf.weights import combine, digest_parts

LOG = logging.getLogger(__name__)

Int16 = NDArray[np.int16]
Float32 = NDArray[np.float32]

# Acoustic inputs that can be computed while sound comes in: ComParE's low-level descriptors as
# tokens, its functionals, and these with the mean state of a Whisper model's encoder.
FUNCTIONALS, WITH_WHISPER = "compare", "compare+whisper:"


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """A transcript with what the text encoder and the commonsense model make of it."""

    transcript: Transcript
    embedding: Float32 | None  # [D]; None without text in the bundle's language
    commonsense: Float32 | None  # [3, K]: external, internal, purpose
    window_before: TurnWindow = EMPTY_WINDOW  # the dialogue's text that it was encoded with
    window_after: TurnWindow = EMPTY_WINDOW  # the one that the next utterance is encoded with


@dataclass(frozen=True, slots=True)
class Prediction:
    """The emotion of one utterance."""

    probabilities: dict[str, float]
    modalities: tuple[Modality, ...]
    abstained: bool  # the best label isn't probable enough to be an answer
    labels_in_set: tuple[str, ...]  # the conformal set, most probable first; never empty
    contributions: Contributions | None = None  # where an explanation was asked for
    conflict: bool | None = None  # likewise, if there were both audio and text
    inferences: Inferred | None = None  # likewise, if there was text and the settings ask for them

    @property
    def label(self) -> str:
        """The most probable label."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


@dataclass(slots=True)
class LiveDialogue:
    """A dialogue that is going on: what is remembered between its utterances."""

    state: State
    window: TurnWindow = EMPTY_WINDOW  # the text that the next utterance is encoded with
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    turns: int = 0
    speakers: list[str] = field(default_factory=list)  # in order of appearance

    def number_of(self, speaker: str) -> int:
        """The speaker's place in the order of appearance, the next free one for a new speaker."""
        known = self.speakers
        return known.index(speaker) if speaker in known else len(known)


class Recognizer:
    """All models of one recogniser, loaded once. A context manager: openSMILE holds threads."""

    acoustic: AcousticExtractor | None  # None: the bundle takes text only

    def __init__(self, config: Config) -> None:
        """Load all models, in parallel; raises ModelError, BundleError or ConfigError."""
        self.config = config
        self._warned_of_other_language = False
        device = self._device = resolve_device(config.device)
        torch.set_num_threads(1)  # the network is small; Whisper makes better use of the cores
        settings = read_bundle_config(config.model)
        require_live(settings)
        encoder = whisper_encoder_of(settings)
        with ThreadPoolExecutor() as pool:
            transcriber = pool.submit(
                Transcriber, config.transcript, acoustic_encoder=encoder, device=device
            )
            bundle = pool.submit(Bundle.load, config.model, device=device)
            parts = live_parts(settings, config)
            verify = partial(digest_parts, parts, known=settings.digests, bundle=settings.id)
            verified = pool.submit(verify)
            self.acoustic = None if settings.acoustic_input == NONE else AcousticExtractor()
            try:
                self.transcriber = transcriber.result()
                self.bundle = bundle.result()
                verified.result()
                self._digests = verify()  # remembered, but for what was downloaded meanwhile
                require_inferences(config, self.bundle)
                self._warn_of_unread_language()
                self._warm_up()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop openSMILE's threads; no utterance can be recognised after that."""
        if self.acoustic is not None:
            self.acoustic.close()

    def _warn_of_unread_language(self) -> None:
        transcribed, read = self.config.transcript.language, self.bundle.config.language
        if transcribed != read and self.bundle.config.network.use_text:
            LOG.warning(
                "bundle %s reads '%s' only: words in '%s' are shown, but emotion comes from the "
                "sound alone",
                self.bundle.id,
                read,
                transcribed,
            )

    def _warm_up(self) -> None:
        """Run each model once: the first call takes longer (the transcriber has done so)."""
        mean = np.zeros(self.transcriber.encoder_width, np.float32)
        transcript = Transcript("hello", self.bundle.config.language, 0.0, 0.0, mean)
        text = self.encode_text(transcript)
        acoustic = None
        if self.acoustic is not None:
            acoustic = self.acoustic.extract(np.zeros(SAMPLE_RATE_HZ, np.int16))
        state = self.new_dialogue().state
        self.classify(acoustic=acoustic, text=text, state=state, explain=True)

    @property
    def model(self) -> Model:
        """The bundle's id, with one SHA-256 of all weights that take part."""
        return Model(id=self.bundle.id, sha256=combine(self.bundle.sha256, self._digests))

    def utterance_detector(self) -> UtteranceDetector:
        """A detector of one source's utterances, by the recogniser's settings."""
        return UtteranceDetector(self.config)

    def new_dialogue(self) -> LiveDialogue:
        """A dialogue without any utterance yet."""
        return LiveDialogue(self.bundle.network.initial_state())

    def encode_text(
        self, transcript: Transcript, *, speaker: str = "", window: TurnWindow = EMPTY_WINDOW
    ) -> TextFeatures:
        """The features of a transcript, encoded with the dialogue's ``window`` before it.

        Empty text, and text of a language that the bundle doesn't read, has no features.
        """
        if not (transcript.text and self._reads(transcript.language)):
            return TextFeatures(transcript, None, None, window, window)
        turn = Turn(speaker, transcript.text)
        embedding, after = self.bundle.encoder.encode_next(turn, window)
        inferred = self.bundle.commonsense.infer_texts([transcript.text], features=embedding[None])[
            0
        ]
        return TextFeatures(transcript, embedding, inferred, window, after)

    def _reads(self, language: str) -> bool:
        return self.bundle.config.network.use_text and language == self.bundle.config.language

    def classify_final(
        self,
        *,
        acoustic: Acoustic | None,
        text: TextFeatures | None,
        dialogue: LiveDialogue,
        speaker: str = "",
        explain: bool = False,
        modalities: Collection[Modality] = MODALITIES,
    ) -> Prediction:
        """The emotion of the dialogue's next utterance, which moves the dialogue on.

        Text that was encoded before an earlier utterance was final is encoded again. Text that is
        withheld isn't context of later utterances either. When one of the models fails, the
        dialogue stays as it was. ``explain`` and ``modalities`` as in ``classify``.
        """
        if text is not None:
            self._warn_of_other_language(text.transcript)
            if text.window_before != dialogue.window:
                text = self.encode_text(text.transcript, speaker=speaker, window=dialogue.window)
        number = dialogue.number_of(speaker)
        prediction, state = self.classify(
            acoustic=acoustic,
            text=text,
            state=dialogue.state,
            speaker=number,
            explain=explain,
            modalities=modalities,
        )
        dialogue.state = state
        if number == len(dialogue.speakers):
            dialogue.speakers.append(speaker)
        if text is not None and "text" in modalities:
            dialogue.window = text.window_after
        return prediction

    def _warn_of_other_language(self, transcript: Transcript) -> None:
        """Say once that an utterance's text is left out because it is in another language."""
        expected = self.config.transcript.language
        if transcript.language == expected or self._warned_of_other_language:
            return
        self._warned_of_other_language = True
        LOG.warning(
            "that sounded like language '%s', not '%s': its words are left out; "
            "--language %s writes them down",
            transcript.language,
            expected,
            transcript.language,
        )

    @torch.inference_mode()
    def classify(
        self,
        *,
        acoustic: Acoustic | None,
        text: TextFeatures | None,
        state: State,
        speaker: int = 0,
        explain: bool = False,
        modalities: Collection[Modality] = MODALITIES,
    ) -> tuple[Prediction, State]:
        """One step of the network: the utterance's emotion and the state after it.

        Either modality may be missing; one that isn't among ``modalities`` is withheld from the
        network. ``speaker`` is the number of a speaker in the dialogue, for networks that tell
        speakers apart. A provisional emotion is the same call with the new state thrown away.
        With ``explain``, the same step is computed for every coalition of the inputs, in one batch.
        """
        if "audio" not in modalities:
            acoustic = None
        if "text" not in modalities and text is not None:
            # The mean of Whisper's encoder is part of the acoustic input and stays.
            text = replace(text, embedding=None, commonsense=None)
        features = self._features(acoustic, text, speaker=speaker)
        given: list[Modality] = ["audio"] if features.audio is not None else []
        if features.text is not None:
            given.append("text")
        parts = [*given, "context"]
        if explain and state == self.bundle.network.initial_state():
            parts.remove("context")
        every = coalitions(parts) if explain else [frozenset(parts)]
        predicted, after = self._step_with(every, features=features, state=state)
        whole = predicted[every[-1]]
        pattern = pattern_of(audio="audio" in given, text="text" in given)
        labels, calibration = self.bundle.labels, self.bundle.calibration
        inside = calibration.label_sets(whole, pattern=pattern)
        prediction = Prediction(
            dict(zip(labels, map(float, whole), strict=True)),
            tuple(given),
            abstained=bool(calibration.abstains(whole, pattern=pattern)),
            labels_in_set=tuple(labels[n] for n in np.argsort(-whole) if inside[n]),
        )
        return (self._explained(prediction, predicted, text) if explain else prediction), after

    def _features(
        self, acoustic: Acoustic | None, text: TextFeatures | None, *, speaker: int = 0
    ) -> Features:
        """The network's input for one utterance, on its device."""
        features = Features(
            audio=_tensor(self._audio_input(acoustic, text)),
            text=_tensor(None if text is None else text.embedding),
            commonsense=_tensor(None if text is None else text.commonsense),
            speaker=torch.tensor(speaker),
        )
        return features.map(lambda tensor: tensor.to(self._device))

    def _audio_input(self, acoustic: Acoustic | None, text: TextFeatures | None) -> Float32 | None:
        """The network's acoustic input, [A] or tokens [F, A]; None if a part of it is missing."""
        if acoustic is None or self.bundle.scaling is None:
            return None
        if self.bundle.config.acoustic_input == LLD:
            tokens = to_tokens(acoustic.lld, frame_ms=LLD_MS)
            return self.bundle.scale(tokens) if len(tokens) else None
        measured = [acoustic.functionals]
        if whisper_encoder_of(self.bundle.config) is not None:
            if text is None or text.transcript.encoder_mean is None:
                return None
            measured.append(text.transcript.encoder_mean)
        scaled: Float32 = self.bundle.scale(np.concatenate(measured)[None])
        return scaled if self.bundle.config.network.takes_tokens else scaled[0]

    def _step_with(
        self, every: Sequence[frozenset[str]], *, features: Features, state: State
    ) -> tuple[dict[frozenset[str], Probabilities], State]:
        """Probabilities [C] for each of S coalitions of inputs, and the state after the last.

        Without "context" the network starts from its initial state. Text features stay as they
        are: encoded with the dialogue's earlier text, if the encoder does that.
        """

        def mask(part: str) -> torch.Tensor:
            return torch.tensor([part in parts for parts in every], device=self._device)

        network = self.bundle.network
        streams = replace(
            features.map(lambda tensor: tensor.expand(len(every), *tensor.shape)),
            audio_mask=mask("audio"),
            text_mask=mask("text"),
        )
        initial = network.initial_state()
        before = state.stack([state if "context" in parts else initial for parts in every])
        logits, after = network.step(streams, before)
        patterns = [pattern_of(audio="audio" in parts, text="text" in parts) for parts in every]
        found = self.bundle.probabilities(logits.numpy(force=True), pattern=patterns)
        return dict(zip(every, found, strict=True)), after.map(lambda part: part[-1].clone())

    def _explained(
        self,
        prediction: Prediction,
        predicted: Mapping[frozenset[str], Probabilities],
        text: TextFeatures | None,
    ) -> Prediction:
        """The prediction with the exact Shapley value of each input.

        The worth of a coalition is the label's probability given that coalition alone. An input
        that is absent adds exactly 0, as does the context of a dialogue's first utterance.
        """
        labels = self.bundle.labels
        label = labels.index(prediction.label)
        shares = shapley({parts: float(p[label]) for parts, p in predicted.items()})
        every = max(predicted, key=len)
        conflict = None
        if {"audio", "text"} <= every:
            conflict = self.bundle.calibration.conflicts(
                labels, audio=predicted[every - {"text"}], text=predicted[every - {"audio"}]
            )
        none = {"audio": 0.0, "text": 0.0, "context": 0.0}
        return replace(
            prediction,
            contributions=Contributions(**none | shares),
            conflict=conflict,
            inferences=self._inferred(text),
        )

    def _inferred(self, text: TextFeatures | None) -> Inferred | None:
        """The text's commonsense as phrases; None without text, or if the settings don't ask."""
        known = self.bundle.inferences if self.config.inferences else None
        if known is None or text is None or text.commonsense is None:
            return None
        return Inferred(**known.nearest(text.commonsense))


def live_parts(settings: BundleConfig, config: Config) -> list[str]:
    """The pretrained parts of a recogniser, the bundle's among them, as weights.py names them."""
    return [*settings.parts, f"whisper:{config.transcript.model}", f"vad:{config.vad.engine}"]


def require_inferences(config: Config, bundle: Bundle) -> None:
    """Raise ConfigError if inferences are asked for and the bundle has no phrases for them."""
    if config.inferences and bundle.inferences is None:
        raise ConfigError(
            f"inferences: bundle {bundle.id} has no phrases to say them in; leave --inferences "
            "out, or take a bundle that has them, such as one trained by configs/live-en.yaml"
        )


def require_live(config: BundleConfig) -> None:
    """Raise BundleError if the network's input can't be computed while sound comes in."""
    if config.acoustic_input not in (FUNCTIONALS, LLD, NONE) and whisper_encoder_of(config) is None:
        raise BundleError(
            f"bundle {config.id}: its features '{config.acoustic_input}' can't be computed live; "
            f"evaluate it offline, or choose one with {FUNCTIONALS}, {WITH_WHISPER}NAME, {LLD} or "
            f"{NONE}, such as live-en"
        )
    if config.network.mode != "live":
        raise BundleError(
            f"bundle {config.id}: was trained offline and sees the future, so it can't be used "
            "live, only evaluated; take one of mode live, such as live-en"
        )


def whisper_encoder_of(config: BundleConfig) -> str | None:
    """The Whisper model whose encoder is part of the bundle's acoustic input, if one is."""
    acoustic = config.acoustic_input
    return acoustic.removeprefix(WITH_WHISPER) if acoustic.startswith(WITH_WHISPER) else None


def resolve_device(device: str) -> str:
    """``cuda`` or ``cpu``; ``auto`` takes the GPU where there is one. Raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device 'cuda': torch finds no GPU here; use --device auto or cpu")
    return "cuda" if device != "cpu" and has_gpu else "cpu"


def _tensor(array: Float32 | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)
