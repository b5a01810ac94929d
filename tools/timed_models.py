"""Models that only take time, for the program's own live pipeline on a virtual clock.

Sound holds each frame's speech score instead of a waveform, so that the segmenter and all after it
decide as they did when the scores were measured.
"""

import random
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import bench_streams
import numpy as np
from service_times import ServiceTimes
from talks import RATE_HZ, Int16
from virtual_time import Machine, run_virtually

from stream_hbaf.config import Config
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.events import AnyEvent, Model
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.blocks import BlockFrontEnd
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.live import runtime
from stream_hbaf.prediction import Prediction, TextFeatures
from stream_hbaf.publish.messages import messages
from stream_hbaf.speech import detector
from stream_hbaf.speech.vad import SILERO_FRAME

ROUND_S = 20.0  # in which each person has their turn once
LOUDEST = 10_000  # the sample that stands for a speech score of 1
DECODERS = 2  # as on two cores
BLOCKS = ("ge2e", "campplus")
WORDS = Transcript("words", "en", avg_logprob=-0.3, no_speech_prob=0.01)
LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
FEATURES = Acoustic(lld=np.zeros((0, 65), np.float32), functionals=np.zeros(1, np.float32))


def sound_of(scores: np.ndarray, *, seconds: float, speech: float, lag: float) -> Int16:
    """Sound whose samples are the score of their frame.

    Of each ``ROUND_S`` the person talks for a share ``speech``, and listens for the rest; ``lag``
    in [0, 1) of a round passes first. The talk begins anew when it is over.
    """
    frames = np.arange(int(seconds * RATE_HZ) // SILERO_FRAME)
    in_round = (frames * SILERO_FRAME / RATE_HZ / ROUND_S + lag) % 1
    talks = in_round < speech
    talked = np.where(talks, scores[(np.cumsum(talks) - 1) % len(scores)], 0.0)
    return np.repeat((talked * LOUDEST).astype(np.int16), SILERO_FRAME)


class TimedModels:
    """What takes time, and how much."""

    def __init__(self, times: ServiceTimes, machine: Machine, *, seed: int = 0) -> None:
        self.times = times
        self.machine = machine
        self._chance = random.Random(seed)

    def cost(self, name: str, samples: int) -> float:
        """Seconds that a model takes for an utterance of so many samples."""
        return self.times.costs[name].draw(samples / RATE_HZ, self._chance)

    def spend(self, name: str, samples: int = 0) -> None:
        """The call that is being made takes so long."""
        self.machine.spend(self.cost(name, samples))


class ScoredVad:
    """Reads the speech scores that the sound holds."""

    frame_samples = SILERO_FRAME

    def __init__(self, models: TimedModels) -> None:
        self._models = models

    def feed(self, samples: Int16) -> np.ndarray:
        scores = samples[::SILERO_FRAME].astype(np.float32) / LOUDEST
        self._models.machine.spend(len(scores) * self._models.times.vad_s)
        return scores

    def reset(self) -> None:
        """Nothing is remembered."""

    def forget(self) -> None:
        """Nothing is remembered."""


class TimedOpenSmile:
    """A front end, and its only session: openSMILE computes in a thread of its own."""

    def __init__(self, models: TimedModels, *, samples: int = 0) -> None:
        self._models = models
        self._samples = samples
        self.lld = FEATURES.lld

    def open(self) -> "TimedOpenSmile":
        self._models.machine.beside(self._models.times.costs["opensmile"].base_s)  # the next one
        return TimedOpenSmile(self._models)

    def feed(self, samples: Int16) -> None:
        self._samples += len(samples)
        per_s = self._models.times.costs["opensmile"].per_s
        self._models.machine.beside(per_s * len(samples) / RATE_HZ)

    def pause(self) -> None:
        """Nothing is left to do."""

    def finish(self) -> Acoustic:
        self._models.spend("functionals", self._samples)
        return FEATURES

    def extract(self, samples: Int16) -> Acoustic:
        self._models.spend("opensmile", len(samples))
        self._models.spend("functionals", len(samples))
        return FEATURES

    def close(self) -> None:
        """Nothing is held."""


class TimedBlock:
    """A representation of whole utterances."""

    version, width = "1", 1

    def __init__(self, models: TimedModels, name: str) -> None:
        self.name = name
        self._models = models

    def extract(self, samples: Int16) -> np.ndarray:
        self._models.spend(self.name, len(samples))
        return np.zeros(1, np.float32)

    def close(self) -> None:
        """Nothing is held."""


class TimedTranscriber:
    """Yields the seconds that each step takes, and gives up between them as Whisper does."""

    def __init__(self, models: TimedModels) -> None:
        self._models = models

    def final(
        self,
        samples: Int16,
        speech_score: float,
        *,
        decode: bool = True,
        abandon: Callable[[], bool] = lambda: False,
    ) -> Generator[float, None, Transcript]:
        for step in ("encode", "embed", "decode"):
            if abandon():
                break
            yield self._models.cost(step, len(samples))
        return WORDS

    def partial(
        self, samples: Int16, abandon: Callable[[], bool]
    ) -> Generator[float, None, Transcript | None]:
        for step in ("encode", "decode"):
            if abandon():
                return None
            yield self._models.cost(step, len(samples))
        return WORDS


class TimedRecognizer:
    """All models of one recogniser; every utterance has words and the same emotion."""

    def __init__(self, models: TimedModels, config: Config) -> None:
        self.config = config
        self._models = models
        blocks = [TimedBlock(models, name) for name in BLOCKS if name in models.times.costs]
        self.acoustic = BlockFrontEnd(TimedOpenSmile(models), blocks)
        self.transcriber = TimedTranscriber(models)
        self.speaker_encoder = None
        self.decoders = DECODERS
        self.prior = self.sets = None
        self.model = Model(id="simulated", sha256="0" * 64)
        self._prediction = Prediction(
            probabilities=dict.fromkeys(LABELS, 1 / len(LABELS)),
            modalities=("audio", "text"),
            abstained=False,
            labels_in_set=LABELS,
        )

    def new_dialogue(self) -> LiveDialogue:
        return LiveDialogue(state=None)  # type: ignore[arg-type]  # no network reads it

    def encode_text(self, transcript: Transcript, **_: Any) -> TextFeatures:
        self._models.spend("text")
        return TextFeatures(transcript, np.zeros(1, np.float32), None)

    def classify(self, **_: Any) -> tuple[Prediction, None]:
        self._models.spend("provisional")
        return self._prediction, None

    def classify_final(self, **_: Any) -> Prediction:
        self._models.spend("classify")
        return self._prediction


class Traffic:
    """A publisher that counts the MQTT messages of all events."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()  # by topic, without its source
        self.payload_bytes = 0

    async def send(self, event: AnyEvent) -> None:
        for message in messages(event, prefix="stream_hbaf", node="node"):
            self.messages[message.topic.split("/", 3)[-1]] += 1
            self.payload_bytes += len(message.payload) + len(message.topic)

    async def run(self) -> None:
        """Nothing is to be done."""

    async def close(self, timeout_s: float) -> None:
        """Nothing is held."""


def simulate(
    times: ServiceTimes, streams: int, *, seconds: float, speech: float = 1.0, seed: int = 0
) -> dict[str, Any]:
    """What ``bench_streams.py`` would measure with so many streams.

    With ``speech`` below 1 each person talks for that share of the time, in turns.
    """
    config = Config.model_validate({"transcript": {"model": times.asr}})
    machine = Machine(times.rates, hop_s=times.hop_s)
    models = TimedModels(times, machine, seed=seed)
    recognizer, traffic = TimedRecognizer(models, config), Traffic()
    lags = random.Random(seed)
    sounds = [
        sound_of(times.scores(n), seconds=seconds, speech=speech, lag=lags.random())
        for n in range(streams)
    ]
    with (
        mock.patch.object(runtime, "ThreadPoolExecutor", machine.executor),
        mock.patch.object(detector, "open_detector", return_value=ScoredVad(models)),
    ):
        found = run_virtually(
            lambda: bench_streams.run(recognizer, sounds, seconds=seconds, beside=[traffic]),
            machine,
        )
    del found["memory_mb"]  # of this process
    return found | {
        "messages": sum(traffic.messages.values()) / streams / seconds,
        "payload_bytes": traffic.payload_bytes / streams / seconds,
    }
