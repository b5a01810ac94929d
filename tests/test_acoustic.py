"""openSMILE, streamed: the oracle is ``opensmile.Smile`` itself on the whole recording."""

import gc
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import opensmile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from opensmile import FeatureLevel as Level
from opensmile.core.lib import OpenSMILE

from stream_hbaf.audio.file import read_audio
from stream_hbaf.errors import ModelError
from stream_hbaf.features import acoustic
from stream_hbaf.features.acoustic import (
    FUNCTIONALS_WIDTH,
    LLD_WIDTH,
    Acoustic,
    AcousticExtractor,
    AcousticFrontEnd,
)

Sound = NDArray[np.int16]
RATE = 16_000
SPEECH: Sound = read_audio(Path(__file__).parent / "recordings" / "jfk.flac")
PIECE = SPEECH[RATE : RATE + RATE // 2]
SMILES = {
    level: opensmile.Smile(opensmile.FeatureSet.ComParE_2016, level)
    for level in (Level.Functionals, Level.LowLevelDescriptors)
}


def batch(samples: Sound, level: Level) -> NDArray[np.float32]:
    """What openSMILE's own package gives, [rows, columns]; NaN if it calls this too short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table = SMILES[level].process_signal(samples.astype(np.float32) / 32768, RATE)
    return np.asarray(table.to_numpy(), np.float32)


def assert_as_batch(result: Acoustic | None, samples: Sound) -> None:
    assert result is not None
    np.testing.assert_array_equal(result.functionals, batch(samples, Level.Functionals)[0])
    np.testing.assert_array_equal(result.lld, batch(samples, Level.LowLevelDescriptors))


def feed_in(extractor: AcousticExtractor, samples: Sound, *, sizes: list[int]) -> Acoustic | None:
    """Feed chunks of these sizes, over and over."""
    with extractor.open() as session:
        start = turn = 0
        while start < len(samples):
            size = sizes[turn % len(sizes)]
            session.feed(samples[start : start + size])
            start, turn = start + size, turn + 1
        return session.finish()


def wait_until_alone(threads: int) -> None:
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.005)
    assert threading.active_count() <= threads


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.fixture(scope="module")
def extractor() -> Iterator[AcousticExtractor]:
    with AcousticExtractor() as opened:
        yield opened


@pytest.fixture(scope="module")
def piece(extractor: AcousticExtractor) -> Acoustic:
    """Half a second of speech, checked against the package once."""
    result = extractor.extract(PIECE)
    assert_as_batch(result, PIECE)
    assert result is not None
    return result


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=20))
def test_features_any_split(
    sizes: list[int], extractor: AcousticExtractor, piece: Acoustic
) -> None:
    """However the sound is split, every LLD and functional is the same to the last bit."""
    result = feed_in(extractor, PIECE, sizes=sizes)
    assert result is not None
    np.testing.assert_array_equal(result.functionals, piece.functionals)
    np.testing.assert_array_equal(result.lld, piece.lld)


def test_features_single_samples(extractor: AcousticExtractor, piece: Acoustic) -> None:
    """Chunks of one sample change nothing."""
    result = feed_in(extractor, PIECE, sizes=[1])
    assert result is not None
    np.testing.assert_array_equal(result.functionals, piece.functionals)
    np.testing.assert_array_equal(result.lld, piece.lld)


@pytest.mark.parametrize("sizes", [[512], [320_000]])
def test_features_twenty_seconds(extractor: AcousticExtractor, sizes: list[int]) -> None:
    """The longest utterance is as batch gives it, in usual chunks and in a single one."""
    samples = np.tile(SPEECH, 2)[: 20 * RATE]
    assert_as_batch(feed_in(extractor, samples, sizes=sizes), samples)


@pytest.mark.parametrize("length", [960, 961, 1119, 1120, 1600, 3333, 16_001])
def test_features_any_length(extractor: AcousticExtractor, length: int) -> None:
    """Lengths that don't fill a frame, down to the shortest that has one, are as in batch."""
    samples = SPEECH[RATE : RATE + length]
    assert_as_batch(feed_in(extractor, samples, sizes=[512]), samples)


@pytest.mark.parametrize("length", [0, 1, 159, 320, 959])
def test_finish_too_short(extractor: AcousticExtractor, length: int) -> None:
    """Under 60 ms openSMILE has nothing to say, and neither have we."""
    samples = SPEECH[RATE : RATE + length]
    if length:
        assert np.isnan(batch(samples, Level.Functionals)).all()
    assert extractor.extract(samples) is None


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(RATE, np.int16),
        np.clip(SPEECH[:RATE].astype(np.int32) * 1000, -32768, 32767).astype(np.int16),
        np.full(RATE, 32767, np.int16),
        np.random.default_rng(7).integers(-32768, 32768, RATE).astype(np.int16),
    ],
    ids=["silence", "clipped", "constant", "noise"],
)
def test_features_unusual_sound(extractor: AcousticExtractor, samples: Sound) -> None:
    """Silence, clipped speech, full scale and loud noise are as in batch, with no sample lost."""
    assert_as_batch(feed_in(extractor, samples, sizes=[512]), samples)


def test_lld_while_speaking(extractor: AcousticExtractor) -> None:
    """Rows come while sound is fed, at most a few frames late, and are final."""
    whole = batch(SPEECH[: 2 * RATE], Level.LowLevelDescriptors)
    with extractor.open() as session:
        assert session.lld.shape == (0, LLD_WIDTH)
        for start in range(0, 2 * RATE, 512):
            session.feed(SPEECH[start : start + 512][: 2 * RATE - start])
        deadline = time.monotonic() + 10
        while len(session.lld) < len(whole) - 10 and time.monotonic() < deadline:
            time.sleep(0.005)
        rows = session.lld
        assert len(rows) >= len(whole) - 10
        np.testing.assert_array_equal(rows, whole[: len(rows)])
        assert session.lld.dtype == np.float32


def test_sessions_at_once(extractor: AcousticExtractor, piece: Acoustic) -> None:
    """Sessions that are open at the same time don't disturb each other."""
    sessions = [extractor.open() for _ in range(3)]
    for start in range(0, len(PIECE), 160):
        for session in sessions:
            session.feed(PIECE[start : start + 160])
    for session in sessions:
        result = session.finish()
        assert result is not None
        np.testing.assert_array_equal(result.functionals, piece.functionals)


def test_names_match_package() -> None:
    """Columns have openSMILE's names in openSMILE's order."""
    assert tuple(SMILES[Level.LowLevelDescriptors].feature_names) == acoustic.column_names("lld")
    assert tuple(SMILES[Level.Functionals].feature_names) == acoustic.column_names("functionals")
    assert (len(acoustic.column_names("lld")), len(acoustic.column_names("functionals"))) == (
        LLD_WIDTH,
        FUNCTIONALS_WIDTH,
    )


def test_extractor_is_front_end(extractor: AcousticExtractor) -> None:
    """openSMILE stands behind the protocol that another extractor would."""
    front_end: AcousticFrontEnd = extractor
    assert front_end.extract(PIECE[:100]) is None


def test_session_used_after_its_end(extractor: AcousticExtractor) -> None:
    """A finished session takes no more sound and isn't finished twice; closing is harmless."""
    session = extractor.open()
    session.feed(PIECE)
    session.finish()
    with pytest.raises(ValueError, match="open another session"):
        session.feed(PIECE)
    with pytest.raises(ValueError, match="open another session"):
        session.finish()
    session.close()
    session.close()


def test_feed_wrong_samples(extractor: AcousticExtractor) -> None:
    """Floating-point samples, which would become silence, are refused."""
    with extractor.open() as session, pytest.raises(TypeError, match="int16"):
        session.feed(PIECE.astype(np.float32) / 32768)  # type: ignore[arg-type]


def test_session_abandoned(extractor: AcousticExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing, and forgetting, a session ends its thread; never by openSMILE's ``abort``, after
    which the calling thread, such as another session's, logs with a logger that has been freed."""
    monkeypatch.delattr(OpenSMILE, "abort")
    wait_until_alone(before := threading.active_count())
    closed, forgotten = extractor.open(), extractor.open()
    for session in (closed, forgotten):
        session.feed(np.tile(SPEECH, 5))
    closed.close()
    gone = weakref.ref(forgotten)
    del forgotten, session
    gc.collect()
    assert gone() is None
    wait_until_alone(before)


def test_process_that_ends_during_an_utterance() -> None:
    """It ends as it would have otherwise, although openSMILE works on the sound."""
    program = """
import numpy as np
from stream_hbaf.features.acoustic import AcousticExtractor
noise = np.random.default_rng(0).normal(scale=1000, size=8 * 16_000).astype(np.int16)
extractor = AcousticExtractor()
sessions = [extractor.open() for _ in range(3)]
for session in sessions:
    session.feed(noise)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_sessions_no_leak(extractor: AcousticExtractor) -> None:
    """A hundred utterances, finished and abandoned, leave no memory behind."""

    def cycle(count: int) -> None:
        for turn in range(count):
            with extractor.open() as session:
                session.feed(PIECE)
                if turn % 2:
                    session.finish()

    cycle(30)
    wait_until_alone(before_threads := threading.active_count())
    before = resident_mb()
    cycle(100)
    wait_until_alone(before_threads)
    assert resident_mb() - before < 12  # a leak would be at least 8 MB a session


def test_open_session_idle_cpu(extractor: AcousticExtractor) -> None:
    """A session that waits for sound, and the spare, use no processor."""
    with extractor.open() as session:
        session.feed(PIECE)
        time.sleep(0.3)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.02


def test_opensmile_is_silent(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """openSMILE writes neither to the terminal nor into the current folder."""
    monkeypatch.chdir(tmp_path)
    with AcousticExtractor() as own:
        own.extract(PIECE)
        own.extract(PIECE[:10])
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_extractor_without_opensmile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken openSMILE is one clear line as soon as the extractor is made."""
    monkeypatch.setattr(acoustic, "_folder", lambda: tmp_path)
    with pytest.raises(ModelError, match=r"^openSMILE can't be started \(.*\); reinstall it"):
        AcousticExtractor()
