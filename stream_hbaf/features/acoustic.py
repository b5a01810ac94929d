"""Acoustic features: openSMILE's ComParE 2016, computed while the utterance is still spoken.

65 low-level descriptors (LLDs) a frame of 10 ms and, at the end, 6373 functionals of them; both
bit-identical to ``opensmile.Smile``'s on the same samples, however they are cut into chunks.

openSMILE's licence allows research and private use only: it is a dependency and never part of
this project. Its C library keeps no more of an utterance than its functionals need, but its input
buffer grows with what is fed, so there is one session an utterance.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import opensmile
from numpy.typing import NDArray
from opensmile.core.config import config as names
from opensmile.core.lib import OpenSMILE, OpenSmileException

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError

LLD_WIDTH = 65
FUNCTIONALS_WIDTH = 6373
CONFIGS = Path(opensmile.__file__).parent / "core" / "config"
OPTIONS = {
    "source": CONFIGS / names.EXTERNAL_INPUT_CONFIG,
    "sink": CONFIGS / names.EXTERNAL_OUTPUT_MULTI_CONFIG,
    "bufferModeRbConf": CONFIGS / "shared" / "BufferModeRb.conf.inc",
    "frameModeFunctionalsConf": CONFIGS / "shared" / "FrameModeFunctionals.conf.inc",
    "sampleRate": SAMPLE_RATE_HZ,
    "nBits": 16,
}
SOURCE, LLD_SINK, FUNCTIONALS_SINK = "extsource", "extsinklld", "extsinkfunc"


@dataclass(frozen=True, slots=True)
class Acoustic:
    """What was measured of one utterance's sound."""

    lld: NDArray[np.float32]  # [T, 65], one row every 10 ms
    functionals: NDArray[np.float32]  # [6373]


class AcousticSession:
    """One utterance inside openSMILE. Fed and finished from one thread at a time.

    Raises ModelError when openSMILE fails.
    """

    def __init__(self) -> None:
        self._smile = OpenSMILE()
        self._rows: list[NDArray[np.float32]] = []
        self._functionals: NDArray[np.float32] | None = None
        self._failure = ""
        self._thread: threading.Thread | None = None
        try:
            # Log level 0: openSMILE would write to the terminal and to ./smile.log.
            self._smile.initialize(
                str(CONFIGS / "compare" / "ComParE_2016.conf"), OPTIONS, loglevel=0
            )
            self._smile.external_sink_set_callback_ex(LLD_SINK, self._take_row)
            self._smile.external_sink_set_callback_ex(FUNCTIONALS_SINK, self._take_functionals)
        except OpenSmileException as error:
            raise ModelError(f"openSMILE can't start ({error}); reinstall opensmile") from None

    @property
    def lld(self) -> NDArray[np.float32]:
        """The frames that are ready: [T, 65]."""
        return np.stack(self._rows) if self._rows else np.zeros((0, LLD_WIDTH), np.float32)

    def feed(self, samples: NDArray[np.int16]) -> None:
        """More of the utterance's sound, of any length; returns before it is worked on."""
        if len(samples) == 0:
            return
        self._start()
        try:
            self._smile.external_audio_source_write_data(SOURCE, samples.tobytes())
        except OpenSmileException as error:
            raise ModelError(f"openSMILE took no sound ({error}); this is a bug") from None

    def finish(self) -> Acoustic | None:
        """The features of all that was fed; None if it was too short for a single frame."""
        self._start()
        self._smile.external_audio_source_set_eoi(SOURCE)
        self._join()
        if self._failure:
            raise ModelError(f"openSMILE failed ({self._failure}); the utterance has no features")
        if self._functionals is None or not self._rows:
            return None
        return Acoustic(lld=self.lld, functionals=self._functionals)

    def close(self) -> None:
        """Abandon the utterance, or release what a finished one held. May be called twice."""
        if self._thread is not None:
            self._smile.abort()
        self._join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="opensmile", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._smile.run()
        except OpenSmileException as error:
            self._failure = str(error)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._smile.free()

    def _take_row(self, values: NDArray[np.float32], _: object) -> None:
        self._rows.append(values.reshape(-1).copy())

    def _take_functionals(self, values: NDArray[np.float32], _: object) -> None:
        self._functionals = values.reshape(-1).copy()


class AcousticExtractor:
    """Opens sessions, each ahead of its need because opening takes openSMILE some 10 ms."""

    def __init__(self) -> None:
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="acoustic-opener")
        self._spare: Future[AcousticSession] = self._opener.submit(AcousticSession)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self) -> AcousticSession:
        """A session for the next utterance. Raises ModelError."""
        spare = self._spare
        self._spare = self._opener.submit(AcousticSession)
        return spare.result()

    def extract(self, samples: NDArray[np.int16]) -> Acoustic | None:
        """The features of a whole utterance, through the same code as the live ones."""
        session = self.open()
        session.feed(samples)
        return session.finish()

    def close(self) -> None:
        """Let the spare session go. No session can be opened afterwards."""
        self._spare.result().close()
        self._opener.shutdown()
