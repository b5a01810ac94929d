"""Voice activity detection: how much each frame of sound resembles speech.

Both engines give one score in [0, 1] a frame, so that the segmenter has one threshold scheme. Any
split of the same samples gives the same scores, bit for bit.
"""

from collections import deque
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import webrtcvad
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError
from stream_hbaf.onnx import open_network

Engine = Literal["silero", "webrtc"]

SILERO_FRAME = 512  # samples; the only length the network was trained for at 16 kHz
SILERO_CONTEXT = 64  # samples of the frame before, put in front of each frame
SILERO_STATE = (1, 1, 128)  # of each of the LSTM's two states
# Silero misses some speech near full scale: 4 of 240 acted clips 20 dB too loud, 1 with this.
CLIPPED = 0.97  # of full scale
CLIPPED_FRAMES = 32  # a second
ATTENUATION = np.float32(0.25)  # of frames that clip
SILERO_INPUTS = ("input", "h", "c")
USE = "voice activity"
OTHER_ENGINE = "or choose --set vad.engine=webrtc"
REINSTALL = f"pip install --force-reinstall faster-whisper==1.2.1, {OTHER_ENGINE}"


class SpeechDetector(Protocol):
    """Scores sound frame by frame; the scores don't depend on how the sound is split."""

    @property
    def frame_samples(self) -> int:
        """Samples that one score covers."""

    def feed(self, samples: NDArray[np.int16]) -> NDArray[np.float32]:
        """One score for each frame that ``samples`` complete, in order: [k]."""

    def reset(self) -> None:
        """Forget all sound so far, a frame not yet complete included."""

    def forget(self) -> None:
        """Forget how earlier frames sounded; samples of a frame not yet complete are kept."""


class SileroDetector:
    """Silero's network, the one in faster-whisper's package, run without torch.

    Frames are scored one at a time even when many are given: another batch size may round
    differently on another processor, and batches would save a third of 0.11 ms a frame.

    Raises ModelError when the network is missing or is not the one expected.
    """

    frame_samples = SILERO_FRAME
    _pending: NDArray[np.int16]
    _window: NDArray[np.float32]  # [1, context + frame]
    _hidden: NDArray[np.float32]
    _unclipped: int  # frames since one that clipped
    _cell: NDArray[np.float32]

    def __init__(self, network: Path | None = None) -> None:
        self._session = open_network(
            network or find_silero(), inputs=SILERO_INPUTS, use=USE, remedy=REINSTALL
        )
        self.reset()

    def feed(self, samples: NDArray[np.int16]) -> NDArray[np.float32]:
        frames, self._pending = _cut_frames(self._pending, samples, frame_samples=SILERO_FRAME)
        scores = np.empty(len(frames), np.float32)
        for index, recorded in enumerate(frames.astype(np.float32) / 32768):
            frame = self._attenuated(recorded)
            self._window[0, SILERO_CONTEXT:] = frame
            score, self._hidden, self._cell = self._session.run(
                None, {"input": self._window, "h": self._hidden, "c": self._cell}
            )
            scores[index] = score.item()
            self._window[0, :SILERO_CONTEXT] = frame[-SILERO_CONTEXT:]
        return scores

    def _attenuated(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """The frame, attenuated if sound clips in it or did so within the last second."""
        clips = np.abs(frame).max() >= CLIPPED
        self._unclipped = 0 if clips else self._unclipped + 1
        return frame * ATTENUATION if self._unclipped < CLIPPED_FRAMES else frame

    def reset(self) -> None:
        self._unclipped = CLIPPED_FRAMES
        self._pending = np.empty(0, np.int16)
        self._window = np.zeros((1, SILERO_CONTEXT + SILERO_FRAME), np.float32)
        self.forget()

    def forget(self) -> None:
        # The states hold how loud speech was: 30 dB weaker speech after it is silence to them.
        self._hidden = np.zeros(SILERO_STATE, np.float32)
        self._cell = np.zeros(SILERO_STATE, np.float32)


class WebRtcDetector:
    """WebRTC's detector; a score is the share of frames in ``smoothing_ms`` that it calls speech.

    ``aggressiveness`` runs from 0 (most is speech) to 3. ``frame_ms`` is 10, 20 or 30.
    """

    _pending: NDArray[np.int16]
    _recent: deque[bool]

    def __init__(
        self, *, aggressiveness: int = 3, frame_ms: int = 20, smoothing_ms: int = 160
    ) -> None:
        self._aggressiveness = aggressiveness
        self._smoothing = max(1, smoothing_ms // frame_ms)
        self.frame_samples = frame_ms * SAMPLE_RATE_HZ // 1000
        self.reset()

    def feed(self, samples: NDArray[np.int16]) -> NDArray[np.float32]:
        frames, self._pending = _cut_frames(
            self._pending, samples, frame_samples=self.frame_samples
        )
        scores = np.empty(len(frames), np.float32)
        for index, frame in enumerate(frames):
            self._recent.append(self._vad.is_speech(frame.tobytes(), SAMPLE_RATE_HZ))
            scores[index] = sum(self._recent) / self._smoothing
        return scores

    def reset(self) -> None:
        self._vad = webrtcvad.Vad(self._aggressiveness)
        self._pending = np.empty(0, np.int16)
        self._recent = deque(maxlen=self._smoothing)

    def forget(self) -> None:
        pass  # it adapts to noise, and its scores last for ``smoothing_ms``


def webrtc_flags(samples: NDArray[np.int16], *, frame_ms: int) -> NDArray[np.bool_]:
    """Whether WebRTC's strictest mode calls each whole frame of an utterance speech: [k]."""
    detector = WebRtcDetector(frame_ms=frame_ms, smoothing_ms=frame_ms)
    return detector.feed(samples) > 0.0


def open_detector(engine: Engine) -> SpeechDetector:
    """Open the engine that ``vad.engine`` names. Raises ModelError if its weights are missing."""
    return SileroDetector() if engine == "silero" else WebRtcDetector()


def _cut_frames(
    pending: NDArray[np.int16], samples: NDArray[np.int16], *, frame_samples: int
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Whole frames [k, frame_samples], and the samples of a frame that isn't complete yet."""
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise TypeError(f"sound must be int16 [n], not {samples.dtype} {list(samples.shape)}")
    joined = np.concatenate((pending, samples))
    whole = len(joined) - len(joined) % frame_samples
    return joined[:whole].reshape(-1, frame_samples), joined[whole:].copy()


def find_silero() -> Path:
    """The file of Silero's network in faster-whisper; ModelError if that is not installed."""
    # find_spec looks without importing: faster-whisper takes a second to import.
    spec = find_spec("faster_whisper")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{USE}: faster-whisper, which carries Silero's network, is not installed; "
            f"pip install faster-whisper, {OTHER_ENGINE}"
        )
    assets = Path(spec.submodule_search_locations[0]) / "assets"
    return assets / "silero_vad_v6.onnx"
