"""The one path: sound becomes utterances, an utterance becomes features, features an emotion.

Plain calls without a clock or an event loop. The live pipeline and training replay call the same
code; they differ only in where sound comes from and where emotions go.
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
from stream_hbaf.speech.listener import Listener
from stream_hbaf.weights import combine, digest_parts

LOG = logging.getLogger(__name__)

Int16 = NDArray[np.int16]
Float32 = NDArray[np.float32]

# Acoustic features that can be computed while sound comes in: ComParE's low-level descriptors as
# tokens, its functionals, and beside these what the encoder of some Whisper model hears.
FUNCTIONALS, WITH_WHISPER = "compare", "compare+whisper:"


@dataclass(frozen=True, slots=True)
class Words:
    """What was said and how it means: the transcript with its text features."""

    transcript: Transcript
    text: Float32 | None  # [D]; None when nothing was said in words
    commonsense: Float32 | None  # [3, K]: external, internal, purpose
    before: TurnWindow = EMPTY_WINDOW  # the dialogue's words that they were read with
    after: TurnWindow = EMPTY_WINDOW  # and those that the next ones are read with


@dataclass(frozen=True, slots=True)
class Prediction:
    """The emotion of one utterance."""

    probabilities: dict[str, float]
    modalities: tuple[Modality, ...]
    abstained: bool  # the best label isn't sure enough to be an answer
    labels_in_set: tuple[str, ...]  # it is one of these, likeliest first; never empty
    contributions: Contributions | None = None  # where an explanation was asked for
    conflict: bool | None = None  # likewise, if there were both sound and words
    inferences: Inferred | None = None  # likewise, if there were words and the settings want them

    @property
    def label(self) -> str:
        return max(self.probabilities, key=self.probabilities.__getitem__)


@dataclass(slots=True)
class Dialogue:
    """What is remembered between utterances, and what counts them."""

    state: State
    window: TurnWindow = EMPTY_WINDOW  # the words that the next ones are read with
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    turns: int = 0
    speakers: list[str] = field(default_factory=list)  # in order of appearance

    def number_of(self, speaker: str) -> int:
        """The speaker's place in the order of appearance, the next one for somebody new."""
        known = self.speakers
        return known.index(speaker) if speaker in known else len(known)


class Recognizer:
    """All models of one recogniser, loaded once. A context manager: openSMILE holds threads."""

    acoustic: AcousticExtractor | None  # None: the bundle reads words only

    def __init__(self, config: Config) -> None:
        """Load everything, side by side; raises ModelError, BundleError or ConfigError."""
        self.config = config
        device = self._device = resolve_device(config.device)
        torch.set_num_threads(1)  # the network is small; Whisper has more use for the cores
        settings = read_bundle_config(config.model)
        require_live(settings)
        with ThreadPoolExecutor() as pool:
            transcriber = pool.submit(
                Transcriber, config.transcript, ear=ear_of(settings), device=device
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
                self._tell_of_language()
                self._warm_up()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let openSMILE's threads go; no utterance can be heard after that."""
        if self.acoustic is not None:
            self.acoustic.close()

    def _tell_of_language(self) -> None:
        spoken, read = self.config.transcript.language, self.bundle.config.language
        if spoken != read and self.bundle.config.network.use_text:
            LOG.warning(
                "bundle %s reads '%s' only: words in '%s' are shown, but emotion comes from the "
                "sound alone",
                self.bundle.id,
                read,
                spoken,
            )

    def _warm_up(self) -> None:
        """The first call of each model takes longer: let that not be at the first utterance.

        The transcriber sees to that itself.
        """
        sound = np.zeros(self.transcriber.ear_width, np.float32)
        words = self.understand(Transcript("hello", self.bundle.config.language, 0.0, 0.0, sound))
        acoustic = None
        if self.acoustic is not None:
            acoustic = self.acoustic.extract(np.zeros(SAMPLE_RATE_HZ, np.int16))
        self.classify(acoustic=acoustic, words=words, state=self.dialogue().state, explain=True)

    @property
    def model(self) -> Model:
        """The bundle's id, with one SHA-256 of all weights that take part."""
        return Model(id=self.bundle.id, sha256=combine(self.bundle.sha256, self._digests))

    def listener(self) -> Listener:
        return Listener(self.config)

    def dialogue(self) -> Dialogue:
        return Dialogue(self.bundle.network.initial_state())

    def understand(
        self, transcript: Transcript, *, speaker: str = "", window: TurnWindow = EMPTY_WINDOW
    ) -> Words:
        """Text features of the words, if there are any, read with the dialogue's ``window``.

        Words of a language that the bundle can't read have none. Whoever takes the words for
        final goes on with the window in ``after``.
        """
        if not (transcript.text and self._reads(transcript.language)):
            return Words(transcript, None, None, window, window)
        turn = Turn(speaker, transcript.text)
        text, after = self.bundle.encoder.encode_next(turn, window)
        inferred = self.bundle.commonsense.infer_texts([transcript.text], features=text[None])[0]
        return Words(transcript, text, inferred, window, after)

    def _reads(self, language: str) -> bool:
        return self.bundle.config.network.use_text and language == self.bundle.config.language

    def conclude(
        self,
        *,
        acoustic: Acoustic | None,
        words: Words | None,
        dialogue: Dialogue,
        speaker: str = "",
        explain: bool = False,
        modalities: Collection[Modality] = MODALITIES,
    ) -> Prediction:
        """The final emotion of the dialogue's next utterance, which the dialogue remembers.

        Words may have been read before those of an earlier utterance were final: then they are
        read again. A modality that isn't among ``modalities`` is withheld from the network, and
        withheld words are no context of later ones. When one of the models fails, the dialogue
        stays as it was.
        """
        if words is not None and words.before != dialogue.window:
            words = self.understand(words.transcript, speaker=speaker, window=dialogue.window)
        number = dialogue.number_of(speaker)
        prediction, state = self.classify(
            acoustic=acoustic,
            words=words,
            state=dialogue.state,
            speaker=number,
            explain=explain,
            modalities=modalities,
        )
        dialogue.state = state
        if number == len(dialogue.speakers):
            dialogue.speakers.append(speaker)
        if words is not None and "text" in modalities:
            dialogue.window = words.after
        return prediction

    @torch.inference_mode()
    def classify(
        self,
        *,
        acoustic: Acoustic | None,
        words: Words | None,
        state: State,
        speaker: int = 0,
        explain: bool = False,
        modalities: Collection[Modality] = MODALITIES,
    ) -> tuple[Prediction, State]:
        """One step of the network; either modality may be missing, or withheld from it.

        ``speaker`` is a number of the dialogue's, for networks that tell speakers apart. A
        provisional emotion is the same call with the new state thrown away. To ``explain``, the
        same step is taken with every coalition of what was given, side by side.
        """
        if "audio" not in modalities:
            acoustic = None
        if "text" not in modalities and words is not None:
            # What Whisper's encoder computed is part of the audio and stays.
            words = replace(words, text=None, commonsense=None)
        features = self._features(acoustic, words, speaker=speaker)
        given: list[Modality] = ["audio"] if features.audio is not None else []
        if features.text is not None:
            given.append("text")
        parts = [*given, "context"]
        if explain and state == self.bundle.network.initial_state():
            parts.remove("context")
        every = coalitions(parts) if explain else [frozenset(parts)]
        said, after = self._say_with(every, features=features, state=state)
        whole = said[every[-1]]
        pattern = pattern_of(audio="audio" in given, text="text" in given)
        labels, calibration = self.bundle.labels, self.bundle.calibration
        inside = calibration.label_sets(whole, pattern=pattern)
        prediction = Prediction(
            dict(zip(labels, map(float, whole), strict=True)),
            tuple(given),
            abstained=bool(calibration.abstains(whole, pattern=pattern)),
            labels_in_set=tuple(labels[n] for n in np.argsort(-whole) if inside[n]),
        )
        return (self._explained(prediction, said, words) if explain else prediction), after

    def _features(
        self, acoustic: Acoustic | None, words: Words | None, *, speaker: int = 0
    ) -> Features:
        """What the network is given of one utterance, where its weights are."""
        features = Features(
            audio=_tensor(self._heard(acoustic, words)),
            text=_tensor(None if words is None else words.text),
            commonsense=_tensor(None if words is None else words.commonsense),
            speaker=torch.tensor(speaker),
        )
        return features.map(lambda tensor: tensor.to(self._device))

    def _heard(self, acoustic: Acoustic | None, words: Words | None) -> Float32 | None:
        """The sound as the network hears it, [A] or tokens [F, A]; None if a part is missing."""
        if acoustic is None or self.bundle.scaling is None:
            return None
        if self.bundle.config.acoustic_input == LLD:
            tokens = to_tokens(acoustic.lld, frame_ms=LLD_MS)
            return self.bundle.scale(tokens) if len(tokens) else None
        measured = [acoustic.functionals]
        if ear_of(self.bundle.config) is not None:
            if words is None or words.transcript.sound is None:
                return None
            measured.append(words.transcript.sound)
        heard: Float32 = self.bundle.scale(np.concatenate(measured)[None])
        return heard if self.bundle.config.network.takes_tokens else heard[0]

    def _say_with(
        self, every: Sequence[frozenset[str]], *, features: Features, state: State
    ) -> tuple[dict[frozenset[str], Probabilities], State]:
        """Probabilities [C] given each of S coalitions of parts, and the state after the last.

        Without "context" the network starts anew. The words' features stay as they are: read with
        the dialogue's words before them, if the encoder does that.
        """

        def given(part: str) -> torch.Tensor:
            return torch.tensor([part in parts for parts in every], device=self._device)

        network = self.bundle.network
        streams = replace(
            features.map(lambda tensor: tensor.expand(len(every), *tensor.shape)),
            audio_mask=given("audio"),
            text_mask=given("text"),
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
        said: Mapping[frozenset[str], Probabilities],
        words: Words | None,
    ) -> Prediction:
        """The prediction with what made it so, exactly: each part's Shapley value.

        A coalition of parts is worth the probability that the recogniser gives the label with
        these parts alone. A part that isn't there adds exactly 0, as does the context of a
        dialogue's first utterance.
        """
        labels = self.bundle.labels
        label = labels.index(prediction.label)
        shares = shapley({parts: float(p[label]) for parts, p in said.items()})
        every = max(said, key=len)
        conflict = None
        if {"audio", "text"} <= every:
            conflict = self.bundle.calibration.conflicts(
                labels, audio=said[every - {"text"}], text=said[every - {"audio"}]
            )
        none = {"audio": 0.0, "text": 0.0, "context": 0.0}
        return replace(
            prediction,
            contributions=Contributions(**none | shares),
            conflict=conflict,
            inferences=self._inferred(words),
        )

    def _inferred(self, words: Words | None) -> Inferred | None:
        """The words' commonsense in phrases; None without words, or if nobody wants to know."""
        known = self.bundle.inferences if self.config.inferences else None
        if known is None or words is None or words.commonsense is None:
            return None
        return Inferred(**known.nearest(words.commonsense))


def live_parts(settings: BundleConfig, config: Config) -> list[str]:
    """The pretrained parts of a recogniser, the bundle's among them, as weights.py names them."""
    return [*settings.parts, f"whisper:{config.transcript.model}", f"vad:{config.vad.engine}"]


def require_inferences(config: Config, bundle: Bundle) -> None:
    """Raise ConfigError if inferences are wanted and the bundle has no phrases to say them in."""
    if config.inferences and bundle.inferences is None:
        raise ConfigError(
            f"inferences: bundle {bundle.id} has no phrases to say them in; leave --inferences "
            "out, or take a bundle that has them, such as one trained by configs/live-en.yaml"
        )


def require_live(config: BundleConfig) -> None:
    """Raise BundleError if what the bundle's network needs can't be had while sound comes in."""
    if config.acoustic_input not in (FUNCTIONALS, LLD, NONE) and ear_of(config) is None:
        raise BundleError(
            f"bundle {config.id}: its features '{config.acoustic_input}' can't be computed live; "
            f"evaluate it offline, or choose one with {FUNCTIONALS}, {WITH_WHISPER}NAME, {LLD} or "
            f"{NONE}, such as live-en"
        )
    if config.network.mode != "live":
        raise BundleError(
            f"bundle {config.id}: was trained offline and sees the future, so it can't be used "
            "live, only evaluated; listen with one of mode live, like live-en"
        )


def ear_of(config: BundleConfig) -> str | None:
    """The Whisper model whose encoder the bundle's network hears with, if it does."""
    heard = config.acoustic_input
    return heard.removeprefix(WITH_WHISPER) if heard.startswith(WITH_WHISPER) else None


def resolve_device(device: str) -> str:
    """``cuda`` or ``cpu``; ``auto`` takes the GPU where there is one. Raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device 'cuda': torch finds no GPU here; use --device auto or cpu")
    return "cuda" if device != "cpu" and has_gpu else "cpu"


def _tensor(array: Float32 | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)
