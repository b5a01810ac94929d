"""Computes openSMILE's features (ComParE 2016, eGeMAPS) of utterances while they are spoken.

openSMILE's Python package processes whole recordings only, but its library can be fed while it
runs: each session runs the package's own ComParE configuration in a thread, takes sound as it
comes, and gives 65 low-level descriptors (LLDs) every 10 ms and 6373 functionals at the end. They
equal those of ``opensmile.Smile`` for the same samples bit for bit, however these are split.

openSMILE is free for research and private use only, whatever the package's classifier says: it
is a dependency, never bundled. A free extractor can replace it behind ``AcousticFrontEnd``.
"""

import atexit
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import opensmile
from numpy.typing import NDArray
from opensmile.core.config import config as names
from opensmile.core.lib import OpenSMILE, OpenSmileException

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]

LLD_WIDTH = 65
LLD_MS = 10  # from one row of low-level descriptors to the next
FUNCTIONALS_WIDTH = 6373
OPENSMILE_VERSION = str(opensmile.__version__)

# The component names of standard_external_data_output_multi.conf.inc, which the package lacks.
_LLD_SINK = "extsinklld"
_FUNCTIONALS_SINK = "extsinkfunc"
_EXIT_S = 5.0  # that a thread gets to end when the process does; it takes milliseconds
_TIMEOUT_S = 30.0  # beyond the utterance's own length; a session needs 0.02 s a second


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """One of openSMILE's feature sets: its configuration file and the widths of its levels."""

    configuration: str  # inside the package's folder of configurations
    lld_width: int
    functionals_width: int


COMPARE = FeatureSet("compare/ComParE_2016.conf", LLD_WIDTH, FUNCTIONALS_WIDTH)
EGEMAPS = FeatureSet("egemaps/v02/eGeMAPSv02.conf", 25, 88)


@dataclass(frozen=True, slots=True, eq=False)
class Acoustic:
    """An utterance's acoustic features; the widths given here are those of ComParE."""

    lld: Float32  # [T, 65], a row every 10 ms
    functionals: Float32  # [6373]
    blocks: Mapping[str, Float32] = field(default_factory=dict)  # further ones, by representation


class AcousticStream(Protocol):
    """One utterance that is being processed; its methods are those of ``AcousticSession``."""

    @property
    def lld(self) -> Float32: ...
    def feed(self, samples: Int16) -> None: ...
    def pause(self) -> None: ...
    def finish(self) -> Acoustic | None: ...
    def close(self) -> None: ...


class AcousticFrontEnd(Protocol):
    """Anything that computes LLDs and functionals of utterances, as ``AcousticExtractor`` does."""

    def open(self) -> AcousticStream: ...
    def extract(self, samples: Int16) -> Acoustic | None: ...
    def close(self) -> None: ...


class _Engine:
    """One openSMILE instance, its thread, and its results so far.

    The thread starts with the first samples, so that a spare instance costs memory only. It frees
    the instance itself, after ``done`` is set, because freeing takes milliseconds. An engine has no
    reference to its session, so that an unused session can be garbage collected while its engine
    runs.
    """

    def __init__(self, feature_set: FeatureSet) -> None:
        self.feature_set = feature_set
        self.rows: list[Float32] = []  # each [1, 65] (ComParE)
        self.functionals: list[Float32] = []  # at most one, [1, 6373] (ComParE)
        self.failure: ModelError | None = None
        self.done = threading.Event()
        self._thread: threading.Thread | None = None  # once it has started
        # Guards against calls into a freed instance; re-entrant because garbage collection, and so
        # ``end``, may happen in the engine's own thread.
        self._lock = threading.RLock()
        self.smile = OpenSMILE()
        try:
            self.smile.initialize(str(_folder() / feature_set.configuration), _options(), 0)
            # Rows are copied, because openSMILE reuses their memory.
            for sink, rows in ((_LLD_SINK, self.rows), (_FUNCTIONALS_SINK, self.functionals)):
                self.smile.external_sink_set_callback_ex(
                    sink, lambda row, _, rows=rows: rows.append(row.copy())
                )
        except (OpenSmileException, UnicodeEncodeError) as error:
            self.smile.free()
            raise _broken("can't be started", error) from None

    def write(self, samples: bytes) -> None:
        """Queue samples. Raises ModelError if openSMILE has failed."""
        with self._lock:
            if self.done.is_set():
                raise self.failure or _broken("stopped before the end of an utterance")
            if not self.smile.external_audio_source_write_data(
                names.EXTERNAL_SOURCE_COMPONENT, samples
            ):
                raise _broken("takes no more sound")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="acoustic", daemon=True)
                self._thread.start()
                _running.add(self)

    def end(self) -> None:
        """End the input; ``done`` is set after the last result.

        Also what ends an utterance that nobody waits for: openSMILE is at most milliseconds behind.
        Its ``abort`` would make the calling thread log with this instance's logger, even after that
        is freed; and the garbage collector may call from another instance's thread, which logs.
        """
        with self._lock:
            if self._thread is None:
                self._release()
            elif not self.done.is_set():
                self.smile.external_audio_source_set_eoi(names.EXTERNAL_SOURCE_COMPONENT)

    def join(self) -> None:
        """Wait until the thread has freed the instance."""
        if self._thread is not None:
            self._thread.join(_EXIT_S)

    def _run(self) -> None:
        try:
            self.smile.run()
        except OpenSmileException as error:
            self.failure = _broken("failed during an utterance", error)
        self.done.set()
        with self._lock:
            self._release()

    def _release(self) -> None:
        self.done.set()
        self.smile.free()


_running: "weakref.WeakSet[_Engine]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """End what still runs: a thread of openSMILE that calls an interpreter which has ended aborts
    the process."""
    engines = list(_running)
    for engine in engines:
        engine.end()
    for engine in engines:
        engine.join()


class AcousticSession(AbstractContextManager["AcousticSession"]):
    """One utterance: fed while it is spoken, finished once. Not thread-safe.

    Feeding returns at once; openSMILE runs in its own thread. A session without ``finish`` or
    ``close`` is freed when it is garbage collected.
    """

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._samples = 0
        self._open = True
        self._abandon = weakref.finalize(self, engine.end)

    @property
    def lld(self) -> Float32:
        """The LLDs so far, [T, 65]; some frames behind the input, complete after ``finish``."""
        nothing = np.empty((0, self._engine.feature_set.lld_width), np.float32)
        return np.concatenate([nothing, *self._engine.rows])

    def feed(self, samples: Int16) -> None:
        """Take the utterance's next samples (int16, mono, 16 kHz), any number of them.

        Raises ModelError if openSMILE has failed.
        """
        self._must_be_open()
        if samples.dtype != np.int16 or samples.ndim != 1:
            raise TypeError(f"int16 [n] wanted, not {samples.dtype} of shape {samples.shape}")
        if samples.size:
            self._engine.write(samples.tobytes())
            self._samples += samples.size

    def pause(self) -> None:
        """Nothing: everything is computed while samples come in."""

    def finish(self) -> Acoustic | None:
        """The whole utterance's features; None if it is too short for any.

        Raises ModelError if openSMILE has failed.
        """
        self._must_be_open()
        self._open = False
        self._engine.end()
        if not self._engine.done.wait(_TIMEOUT_S + self._samples / SAMPLE_RATE_HZ):
            self._abandon()
            raise _broken("gave no result in time")
        self._abandon.detach()
        if self._engine.failure:
            raise self._engine.failure
        if not self._engine.functionals:
            return None
        return Acoustic(lld=self.lld, functionals=self._engine.functionals[-1][0])

    def close(self) -> None:
        """Abandon the utterance, unless it is finished."""
        self._open = False
        self._abandon()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _must_be_open(self) -> None:
        if not self._open:
            raise ValueError("this utterance is finished; open another session")


class AcousticExtractor(AbstractContextManager["AcousticExtractor"]):
    """Opens a session for each utterance without delay: the next one is always prepared ahead.

    Raises ModelError if openSMILE can't be started. Thread-safe.
    """

    def __init__(self, feature_set: FeatureSet = COMPARE) -> None:
        self.feature_set = feature_set
        self._lock = threading.Lock()
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="acoustic-spare")
        self._spare: Future[_Engine] = Future()
        self._spare.set_result(_Engine(feature_set))  # here, so that a failure is raised early

    def open(self) -> AcousticSession:
        """A session for one utterance. Raises ModelError if openSMILE can't be started."""
        with self._lock:
            spare, self._spare = self._spare, self._maker.submit(_Engine, self.feature_set)
        return AcousticSession(spare.result())

    def extract(self, samples: Int16) -> Acoustic | None:
        """A whole utterance at once, through the same code; see ``AcousticSession.finish``."""
        with self.open() as session:
            session.feed(samples)
            return session.finish()

    def close(self) -> None:
        """Free the prepared session; open sessions stay open."""
        self._maker.shutdown()
        if self._spare.exception() is None:
            self._spare.result().end()

    def __exit__(self, *exception: object) -> None:
        self.close()


@cache
def column_names(level: Literal["lld", "functionals"]) -> tuple[str, ...]:
    """openSMILE's names of ComParE's 65 LLDs or 6373 functionals, in the columns' order."""
    engine, sink = _Engine(COMPARE), _LLD_SINK if level == "lld" else _FUNCTIONALS_SINK
    columns = range(engine.smile.external_sink_get_num_elements(sink))
    found = tuple(engine.smile.external_sink_get_element_name(sink, n) for n in columns)
    engine.end()
    return found


def _folder() -> Path:
    return Path(opensmile.__file__).parent / "core" / str(names.CONFIG_ROOT)


def _options() -> dict[str, object]:
    """The settings ``opensmile.Smile`` uses, but with a sink for each of two levels."""
    return {
        "source": _folder() / names.EXTERNAL_INPUT_CONFIG,
        "sink": _folder() / names.EXTERNAL_OUTPUT_MULTI_CONFIG,
        "bufferModeRbConf": _folder() / "shared/BufferModeRb.conf.inc",
        "frameModeFunctionalsConf": _folder() / "shared/FrameModeFunctionals.conf.inc",
        "sampleRate": SAMPLE_RATE_HZ,
        "nBits": 16,
    }


def _broken(what: str, error: Exception | None = None) -> ModelError:
    reason = " ".join(str(error).split()) if error else ""
    return ModelError(
        f"openSMILE {what}{f' ({reason})' if reason else ''}; "
        "reinstall it with: pip install --force-reinstall 'opensmile>=2.6,<3'"
    )
