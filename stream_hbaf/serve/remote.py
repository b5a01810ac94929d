"""A recogniser whose models run in replicas elsewhere: requests go there, dialogues stay here.

Requests change nothing there, so one whose replica died is sent again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stream_hbaf.bundle_config import NONE, BundleConfig
from stream_hbaf.config import Config
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import ModelError, shorten
from stream_hbaf.features.acoustic import Acoustic, AcousticExtractor, AcousticFrontEnd
from stream_hbaf.features.blocks import BlockFrontEnd, Float32
from stream_hbaf.features.text import EMPTY_WINDOW, TurnWindow
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.networks.calibration import Probabilities, pattern_of
from stream_hbaf.networks.network import State
from stream_hbaf.prediction import Prediction, TextFeatures, blocks_of
from stream_hbaf.recognizer import Int16, Recognizer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

ANSWER_S = 60.0  # in which a request is answered, by one replica or another
ASK_EVERY_S = 0.05  # whether somebody still waits for an answer
AGAIN_S = 0.2  # until a request whose replica died is sent again


class AbandonedError(Exception):
    """Nobody waits for the answer any more."""


def ask(
    handle: "DeploymentHandle[Any]",
    method: str,
    *arguments: object,
    abandon: Callable[[], bool] = lambda: False,
    **named: object,
) -> Any:
    """What a method of any replica returns, or raises.

    Called in a thread without an event loop. Raises AbandonedError once ``abandon()`` is true, and
    ModelError if no replica has answered in time.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            response = getattr(handle, method).remote(*arguments, **named)
            return _result(response, abandon, deadline=deadline)
        except RayTaskError as error:  # of the model itself
            raise error.cause from None
        except (RayError, RayServeException) as error:  # of the replica, or of its node
            if time.monotonic() > deadline:
                reason = shorten(" ".join(str(error).split()), limit=160)
                raise ModelError(
                    f"no replica of {handle.deployment_name} answers ({reason}); see 'serve status'"
                ) from None
        time.sleep(AGAIN_S)


def _result(response: Any, abandon: Callable[[], bool], *, deadline: float) -> Any:
    while True:
        try:
            return response.result(timeout_s=ASK_EVERY_S)
        except TimeoutError:
            if abandon():
                response.cancel()
                raise AbandonedError from None
            if time.monotonic() > deadline:
                response.cancel()
                raise


@dataclass(frozen=True, slots=True)
class Models:
    """Where the models are."""

    transcribe: "DeploymentHandle[Any]"
    understand: "DeploymentHandle[Any]"
    decoders: int  # transcripts that all replicas together decode at once, at most


class RemoteTranscriber:
    """As ``Transcriber``, by replicas of ``Transcribe``."""

    def __init__(self, transcribe: "DeploymentHandle[Any]") -> None:
        self._transcribe = transcribe
        self.encoder_width: int = ask(transcribe, "encoder_width")

    def final(
        self,
        samples: Int16,
        speech_score: float,
        *,
        decode: bool = True,
        abandon: Callable[[], bool] = lambda: False,
    ) -> Transcript:
        """As ``Transcriber.final``."""
        try:
            found: Transcript = ask(
                self._transcribe, "final", samples, speech_score, decode, abandon=abandon
            )
        except AbandonedError:
            return Transcript("", "", 0.0, 1.0)
        return found

    def partial(self, samples: Int16, abandon: Callable[[], bool]) -> Transcript | None:
        """As ``Transcriber.partial``."""
        if abandon():
            return None
        try:
            found: Transcript | None = ask(self._transcribe, "partial", samples, abandon=abandon)
        except AbandonedError:
            return None
        return found


class RemoteBlocks(BlockFrontEnd):
    """openSMILE here, where the sound comes in; embeddings of the voice by ``Understand``."""

    def __init__(self, front_end: AcousticFrontEnd, understand: "DeploymentHandle[Any]") -> None:
        super().__init__(front_end, ())
        self._understand = understand

    def measure(self, samples: Int16) -> Mapping[str, Float32]:
        """As ``BlockFrontEnd.measure``."""
        found: Mapping[str, Float32] = ask(self._understand, "measure", samples)
        return found


class RemoteRecognizer(Recognizer):
    """A recogniser with voice activity and openSMILE here, and all other models in replicas.

    The bundle is loaded here, too, for its labels, settings and first state; it isn't run.
    """

    def __init__(self, config: Config, models: Models) -> None:
        self._models = models
        super().__init__(config, transcriber=RemoteTranscriber(models.transcribe))
        self.decoders = models.decoders

    def _open_front_end(self, settings: BundleConfig, *, device: str) -> AcousticFrontEnd | None:
        if settings.acoustic_input == NONE:
            return None
        smile = AcousticExtractor()
        return RemoteBlocks(smile, self._models.understand) if blocks_of(settings) else smile

    def encode_text(
        self, transcript: Transcript, *, speaker: str = "", window: TurnWindow = EMPTY_WINDOW
    ) -> TextFeatures:
        """As ``Recognizer.encode_text``."""
        if not transcript.text:
            return super().encode_text(transcript, speaker=speaker, window=window)
        found: TextFeatures = ask(
            self._models.understand, "encode_text", transcript, speaker=speaker, window=window
        )
        return found

    def classify(
        self, *, odds: Probabilities | None = None, **named: Any
    ) -> tuple[Prediction, State]:
        """As ``Recognizer.classify``."""
        odds = self._odds() if odds is None else odds
        prediction, after = ask(self._models.understand, "classify", odds=odds, **named)
        return self._with_own_sets(prediction), after

    def classify_final(
        self,
        *,
        dialogue: LiveDialogue,
        acoustic: Acoustic | None,
        turn: int = 0,
        odds: Probabilities | None = None,
        **named: Any,
    ) -> Prediction:
        """As ``Recognizer.classify_final``: the dialogue moves on once it is answered."""
        given = self._odds() if odds is None else odds
        answer, after = ask(
            self._models.understand,
            "classify_final",
            dialogue.without_past(),
            acoustic=self._without_unused(acoustic),
            turn=turn,
            odds=given,
            **named,
        )
        prediction = self._with_own_sets(answer)
        dialogue.follow(after)
        answered = f"{dialogue.id}-{turn}" if turn else ""
        self._learn(prediction, utterance=answered, odds=given if odds is None else None)
        return prediction

    def _with_own_sets(self, prediction: Prediction) -> Prediction:
        """With the label set that the corrections which were sent here have led to."""
        if self.sets is None:
            return prediction
        given, labels = prediction.modalities, [*prediction.probabilities]
        probabilities = np.array([*prediction.probabilities.values()])
        inside = self.bundle.calibration.label_sets(
            probabilities,
            pattern=pattern_of(audio="audio" in given, text="text" in given),
            shift=self.sets.shift,
        )
        kept = tuple(labels[n] for n in np.argsort(-probabilities) if inside[n])
        return replace(prediction, labels_in_set=kept)
