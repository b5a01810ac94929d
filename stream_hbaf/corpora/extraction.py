"""A recorded corpus becomes features: each utterance's clip through one acoustic representation.

Features are cached one file an utterance, named by the clip's content, the cut and the
representation's version: stop it at any time and start it again, and it goes on where it was.
"""

import errno
import hashlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.dialogue import Corpus, LabelledUtterance, Split
from stream_hbaf.errors import AudioError, CorpusError, StreamHbafError
from stream_hbaf.features.prosody import PROSODY, PROSODY_WIDTH, describe_prosody
from stream_hbaf.features.representations import AcousticRepresentation, open_representation

Float32 = NDArray[np.float32]
Samples = NDArray[np.int16]
Cut = tuple[float | None, float | None]  # start_s, end_s in the clip
Outcome = Float32 | str  # an utterance's features, or why it has none

VERSION = "1"  # rises when decoding or cutting changes: old caches are then left alone
BEYOND_S = 0.5  # times are rounded, and encoders pad: a cut may end this far after its clip
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Skipped:
    """An utterance that has no features, and why."""

    id: str
    path: Path | None  # None: the corpus names no clip
    reason: str

    def __str__(self) -> str:
        return f"{self.id}: {self.path or 'no clip'}: {self.reason}"


@dataclass(frozen=True)
class Extracted:
    """A corpus's features, a row an utterance in the order of its dialogues."""

    features: Mapping[Split, Float32]  # [N, width] each; a row of nan for what was skipped
    skipped: tuple[Skipped, ...]
    leftovers: str = ""  # one line on features of other versions in the cache; "" if it holds none


def extract(
    corpus: Corpus,
    *,
    representation: str,
    cache: Path,
    workers: int,
    device: str = "cpu",
    progress: Callable[[int, int, Path], None],
) -> Extracted:
    """Give every utterance of ``corpus`` its features; what can't have any is named in ``skipped``.

    "prosody" comes from the corpus's tables, everything else from its clips, decoded and measured
    by ``workers`` processes of one thread each (by a single one if ``device`` isn't the cpu).
    ``progress(done, total, clip)`` hears of each clip. Raises CorpusError if no utterance has what
    the representation needs, ModelError if the representation can't be had, StreamHbafError if
    the cache can't be written: then what was finished is kept.
    """
    if representation == "prosody":
        return _describe_tables(corpus)
    jobs = _jobs(corpus)
    opened = open_representation(representation, device="cpu")
    home = cache / _file_name(opened.name) / opened.version
    opened.close()
    work = _Work(representation, device, home)
    pool = 1 if device != "cpu" else max(1, min(workers, len(jobs)))
    found = _measure_all(jobs, work, workers=pool, progress=progress)
    features, skipped = _collect(corpus, found, width=opened.width)
    return Extracted(features, skipped, leftovers=_leftovers(opened, home))


def _describe_tables(corpus: Corpus) -> Extracted:
    features: dict[Split, Float32] = {}
    skipped = []
    for split, dialogues in corpus.splits.items():
        rows = [np.empty((0, PROSODY_WIDTH), np.float32)]
        for dialogue in dialogues:
            nothing = (np.nan,) * len(PROSODY)
            measured = np.array([said.prosody or nothing for said in dialogue.utterances])
            for said, values in zip(dialogue.utterances, measured, strict=True):
                if np.isnan(values).all():
                    skipped.append(Skipped(said.id, None, "the prosody tables hold nothing of it"))
            rows.append(describe_prosody(measured, [said.speaker for said in dialogue.utterances]))
        features[split] = np.concatenate(rows)
    if len(skipped) == sum(len(rows) for rows in features.values()):
        raise CorpusError(
            f"{corpus.name}: no utterance has prosody measurements; "
            "put the prosody tables there or choose another representation"
        )
    return Extracted(features, tuple(skipped))


def _jobs(corpus: Corpus) -> dict[Path, list[Cut]]:
    """What is to be cut from each clip: one that holds a whole dialogue is decoded only once."""
    jobs: dict[Path, dict[Cut, None]] = {}
    for utterance in _utterances(corpus):
        if utterance.audio is not None:
            jobs.setdefault(utterance.audio, {})[utterance.start_s, utterance.end_s] = None
    if not jobs:
        raise CorpusError(
            f"{corpus.name}: no utterance has a clip; "
            "put the corpus's sound there or choose another representation"
        )
    return {clip: list(cuts) for clip, cuts in jobs.items()}


def _utterances(corpus: Corpus) -> Iterator[LabelledUtterance]:
    for dialogues in corpus.splits.values():
        for dialogue in dialogues:
            yield from dialogue.utterances


def _collect(
    corpus: Corpus, found: Mapping[tuple[Path, Cut], Outcome], *, width: int
) -> tuple[dict[Split, Float32], tuple[Skipped, ...]]:
    features: dict[Split, Float32] = {}
    skipped = []
    for split, dialogues in corpus.splits.items():
        said = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
        features[split] = np.full((len(said), width), np.nan, np.float32)
        for row, utterance in enumerate(said):
            outcome: Outcome = "the corpus names no clip"
            if utterance.audio is not None:
                outcome = found[utterance.audio, (utterance.start_s, utterance.end_s)]
            if isinstance(outcome, str):
                skipped.append(Skipped(utterance.id, utterance.audio, outcome))
            else:
                features[split][row] = outcome
    return features, tuple(skipped)


@dataclass(frozen=True, slots=True)
class _Work:
    """What every process of an extraction is told."""

    representation: str
    device: str
    home: Path  # the folder in the cache for this representation and version alone


def _measure_all(
    jobs: Mapping[Path, Sequence[Cut]],
    work: _Work,
    *,
    workers: int,
    progress: Callable[[int, int, Path], None],
) -> dict[tuple[Path, Cut], Outcome]:
    found: dict[tuple[Path, Cut], Outcome] = {}
    done = 0
    with _pool(work, workers=workers) as pool:
        pending = {pool.submit(_measure_clip, clip, cuts): clip for clip, cuts in jobs.items()}
        for future in as_completed(pending):
            clip = pending.pop(future)  # and so its features aren't held twice
            for cut, outcome in _result(future, clip, work, done=done, total=len(jobs)).items():
                found[clip, cut] = outcome
            done += 1
            progress(done, len(jobs), clip)
    return found


@contextmanager
def _pool(work: _Work, *, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned, not forked: openSMILE and torch hold threads that don't survive a fork."""
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_open_worker,
        initargs=(work,),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _result(
    future: Future[dict[Cut, Outcome]], clip: Path, work: _Work, *, done: int, total: int
) -> dict[Cut, Outcome]:
    """What a process found, or one line on why the extraction stops here."""
    kept = f"{done} of {total} clips are kept, run it again and it goes on from there"
    try:
        return future.result()
    except BrokenProcessPool:
        raise StreamHbafError(
            f"{clip}: a process died on this clip or near it, perhaps for want of memory; "
            f"take fewer workers; {kept}"
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise StreamHbafError(
                f"{work.home}: features can't be written ({error.strerror}); "
                f"correct the folder; {kept}"
            ) from None
        left = f"{_free_mb(work.home):.0f} MB left"
        raise StreamHbafError(
            f"{work.home}: disk full ({error.strerror}, {left}); make room; {kept}"
        ) from None


def _free_mb(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**20


# ---- in a process of its own


_work: _Work | None = None


def _open_worker(work: _Work) -> None:
    global _work
    _work = work
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when an encoder first imports it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends the pool
    end_with_parent()


def end_with_parent() -> None:
    """A parent that was killed ends no pool: its processes would work, or wait for work, forever.

    For a process of a pool, at its beginning.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@cache
def _representation(work: _Work) -> AcousticRepresentation:
    """Opened with the first clip, not with the process: an error then has a way to the parent."""
    return open_representation(work.representation, device=work.device)


def _measure_clip(clip: Path, cuts: Sequence[Cut]) -> dict[Cut, Outcome]:
    """Each cut's features, from the cache where they are there. OSError: they can't be written."""
    if _work is None:
        raise RuntimeError("a worker measures only after it was opened")
    representation = _representation(_work)
    try:
        content = _content(clip)
    except OSError as error:
        return dict.fromkeys(cuts, f"can't be read ({error.strerror})")
    files = {cut: _place(_work.home, content, cut) for cut in cuts}
    found: dict[Cut, Outcome] = {}
    for cut, file in files.items():
        features = _read(file, width=representation.width)
        if features is not None:
            found[cut] = features
    if len(found) < len(files):
        sound = _sound(clip)
        for cut in files.keys() - found.keys():
            outcome = sound if isinstance(sound, str) else _measure(sound, cut, representation)
            if not isinstance(outcome, str):
                _write(files[cut], outcome)
            found[cut] = outcome
    return found


def _sound(clip: Path) -> Samples | str:
    """All of a clip, or what is wrong with it: half a clip isn't what its annotators heard."""
    complaints: list[str] = []
    try:
        samples = read_audio(clip, on_status=lambda _, complaint: complaints.append(complaint))
    except AudioError as error:
        return _reason(str(error), clip=clip)
    return _reason(complaints[0], clip=clip) if complaints else samples


def _reason(message: str, *, clip: Path) -> str:
    """An error's reason without its path, which is named anyway, and without its advice."""
    return message.removeprefix(f"{clip}: ").split(";")[0]


def _measure(sound: Samples, cut: Cut, representation: AcousticRepresentation) -> Outcome:
    start_s, end_s = cut
    start = 0 if start_s is None else round(start_s * SAMPLE_RATE_HZ)
    end = len(sound) if end_s is None else round(end_s * SAMPLE_RATE_HZ)
    length_s = len(sound) / SAMPLE_RATE_HZ
    if start >= len(sound) or end > len(sound) + BEYOND_S * SAMPLE_RATE_HZ:
        return f"cut from {start_s} to {end_s} s, but the clip ends at {length_s:.2f} s"
    samples = sound[start:end]
    features = representation.extract(samples)
    if features is None or np.isnan(features).all():
        return f"too short for {representation.name}: {len(samples) / SAMPLE_RATE_HZ:.3f} s"
    return features


# ---- the cache


def _content(clip: Path) -> str:
    with clip.open("rb") as read:
        return hashlib.file_digest(read, "sha256").hexdigest()


def _place(home: Path, content: str, cut: Cut) -> Path:
    key = hashlib.sha256(f"{VERSION} {content} {cut}".encode()).hexdigest()
    return home / key[:2] / f"{key}.npy"


def _read(file: Path, *, width: int) -> Float32 | None:
    """The features in ``file``; None if it isn't there, or isn't whole after a loss of power."""
    try:
        features: Float32 = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features if features.shape == (width,) and features.dtype == np.float32 else None


def _write(file: Path, features: Float32) -> None:
    """All or nothing: a file that was cut short would look like a finished one."""
    content = io.BytesIO()  # written by Python: numpy's own writing doesn't say why it failed
    np.save(content, features)
    unfinished = file.with_name(f"{file.stem}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content.getvalue())
        unfinished.replace(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _file_name(name: str) -> str:
    """A representation's name as a folder's: "facebook/wav2vec2-base" has a slash."""
    return re.sub(r"[^\w.-]+", "--", name)


def _leftovers(representation: AcousticRepresentation, home: Path) -> str:
    others = [
        f"{count} features of {representation.name} version {folder.name}"
        for folder in sorted(home.parent.glob("*/"))
        if folder != home and (count := sum(1 for _ in folder.rglob("*.npy")))
    ]
    if not others:
        return ""
    return (
        f"{home.parent}: cache holds {', '.join(others)}; "
        f"this is version {representation.version}; they are ignored"
    )
