"""Tells how likely a speaker has finished, from the sound before a pause: smart-turn v3.2.

The weights are those in the package ``pipecat-ai``, of which nothing else is needed. Its front end
is Whisper's spectrogram of the last 8 s, normalised, with silence before a shorter turn.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ, Config, EndpointConfig
from stream_hbaf.errors import ModelError
from stream_hbaf.features.pretrained import package_folder, require_digest
from stream_hbaf.features.whisper_encoder import FFT, HOP, log_mel, mel_filters
from stream_hbaf.onnx import open_network
from stream_hbaf.speech.segmenter import check_segmentation

Float32 = NDArray[np.float32]

SHA256 = "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f"
INSTALL = "pip install --no-deps pipecat-ai==1.14.0"
INSIDE = Path("audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx")
USE = "end of turn"
WINDOW_SAMPLES = 8 * SAMPLE_RATE_HZ  # the only length the network takes
MEL_BANDS = 80
INPUT = "input_features"
LEAST_VARIANCE = np.float32(1e-7)  # of the sound, so that silence can be normalised


class TurnModel:
    """Gives the probability that a turn is over; a function of its sound alone.

    Raises ModelError if the package isn't installed, or carries other weights.
    """

    def __init__(self) -> None:
        network = require_turn_model()
        require_digest(network, SHA256, use=USE, install=INSTALL)
        remedy = f"{INSTALL} --force-reinstall"
        self._session = open_network(network, inputs=[INPUT], use=USE, remedy=remedy)
        self._filters = mel_filters(MEL_BANDS)

    def probability(self, samples: NDArray[np.int16]) -> float:
        """How likely the turn (int16 [n], mono, 16 kHz, to within the pause) is over, 0 to 1."""
        mel = turn_features(samples, filters=self._filters)
        return float(self._session.run(None, {INPUT: mel[None]})[0].item())


def choose_engine(config: Config) -> Config:
    """The settings with ``endpoint.engine`` chosen where it is ``auto``, so that a session holds
    which one it was.

    Raises ModelError if the model is asked for and isn't there, and ConfigError when the settings
    of endpoints contradict each other.
    """
    engine = config.endpoint.engine
    if engine == "auto":
        engine = "pause" if find_turn_model() is None else "turn"
    if engine != "silence":
        check_segmentation(config.segmenter, config.vad, config.endpoint)
    if engine == "turn":
        require_turn_model()
    endpoint = config.endpoint.model_copy(update={"engine": engine})
    return config.model_copy(update={"endpoint": endpoint})


def open_turn_model(config: EndpointConfig) -> TurnModel | None:
    """The model; None where ends are found without. Raises ModelError."""
    is_wanted = config.engine == "turn" or (config.engine == "auto" and find_turn_model())
    return TurnModel() if is_wanted else None


def turn_features(samples: NDArray[np.int16], *, filters: Float32) -> Float32:
    """The network's input: the last 8 s, at zero mean and unit variance, as log mel [80, 800].

    A shorter turn follows silence. ``filters`` is [80, 201].
    """
    sound = np.zeros(WINDOW_SAMPLES, np.float32)
    newest = samples[-WINDOW_SAMPLES:].astype(np.float32) / 32768
    sound[WINDOW_SAMPLES - len(newest) :] = newest
    sound = (sound - sound.mean()) / np.sqrt(sound.var() + LEAST_VARIANCE)
    # The last frame reaches beyond the end, where the sound is mirrored as it is at the beginning.
    mirrored = np.concatenate((sound, sound[-2 : -2 - FFT // 2 : -1]))
    return log_mel(mirrored, filters=filters)[:, : WINDOW_SAMPLES // HOP]


def find_turn_model() -> Path | None:
    """The file of the network, without importing the package; None if it is not installed."""
    folder = package_folder("pipecat")
    network = None if folder is None else folder / INSIDE
    return network if network is not None and network.is_file() else None


def require_turn_model() -> Path:
    """The file of the network. Raises ModelError if it is not installed."""
    if (network := find_turn_model()) is None:
        raise ModelError(f"{USE}: pipecat-ai, which carries its weights, is missing; {INSTALL}")
    return network
