"""A recorded corpus becomes acoustic features: cut, changed and measured as live sound would be.

Features are cached one file a take, named by everything they depend on; stop it and start it
again, and it goes on where it was.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, Positive, Section
from stream_hbaf.corpora.augment import (
    CLEAN,
    Condition,
    Samples,
    Surroundings,
    change,
    draw_condition,
)
from stream_hbaf.features.representations import AcousticRepresentation, open_representation
from stream_hbaf.speech.segmenter import Finish, Segmenter
from stream_hbaf.speech.vad import SpeechDetector, open_detector

VERSION = "3"  # rises when cutting, changing or measuring changes: old caches are then left alone
LONGEST = 30 * SAMPLE_RATE_HZ  # samples; what Whisper hears at once, and the live segmenter cuts
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Take:
    """One clip under one condition."""

    clip: Path
    condition: Condition


# What dev and test clips are heard under; noise and room differ from clip to clip, not from run
# to run.
CONDITIONS = {
    "clean": CLEAN,
    "noise_10db": Condition(snr_db=10.0),
    "noise_10db_room": Condition(snr_db=10.0, room=True),
    "gain_minus_20db": Condition(gain_db=-20.0),
    "gain_plus_20db": Condition(gain_db=20.0),
}


class AcousticsConfig(Section):
    """How training clips are made various."""

    copies: int = 4  # changed versions of each training clip, beside the recording itself
    quietest_dbfs: float = -62.0  # RMS of a changed version is drawn between these two
    loudest_dbfs: float = -12.0
    workers: Positive = 2
    seed: int = 0


def training_takes(clips: Sequence[Path], plan: AcousticsConfig) -> list[Take]:
    """Each clip as recorded, then its changed versions: 1 + copies takes a clip, in order."""
    takes = []
    for index, clip in enumerate(clips):
        takes.append(Take(clip, CLEAN))
        for copy in range(plan.copies):
            draw = np.random.default_rng([plan.seed, index, copy])
            condition = draw_condition(
                draw, quietest_dbfs=plan.quietest_dbfs, loudest_dbfs=plan.loudest_dbfs
            )
            takes.append(Take(clip, condition))
    return takes


def reported_takes(clips: Sequence[Path], *, condition: str) -> list[Take]:
    """Each clip under one of CONDITIONS."""
    fixed = CONDITIONS[condition]
    if fixed == CLEAN:
        return [Take(clip, CLEAN) for clip in clips]
    return [Take(clip, replace(fixed, seed=index)) for index, clip in enumerate(clips)]


def measure(
    takes: Sequence[Take],
    *,
    representation: str,
    surroundings: Surroundings,
    cache: Path,
    workers: int,
    progress: Callable[[str], None],
) -> Float32:
    """All takes' features, [N, width]; a row of NaN where a clip is too short for any.

    What stands side by side ("compare+whisper:base") is measured and cached part by part.
    """
    part = partial(
        _measure_part,
        takes,
        surroundings=surroundings,
        cache=cache,
        workers=workers,
        progress=progress,
    )
    return np.concatenate([part(name) for name in representation.split("+")], axis=1)


def _measure_part(
    takes: Sequence[Take],
    representation: str,
    *,
    surroundings: Surroundings,
    cache: Path,
    workers: int,
    progress: Callable[[str], None],
) -> Float32:
    opened = open_representation(representation)
    opened.close()
    context = f"{opened.name} {opened.version} {_fingerprint(surroundings)}"
    by_clip: dict[Path, dict[Path, Condition]] = {}
    files = []
    for take, content in zip(takes, _contents([take.clip for take in takes]), strict=True):
        key = hashlib.sha256(f"{VERSION} {context} {content} {take.condition}".encode()).hexdigest()
        files.append(cache / key[:2] / f"{key}.npy")
        if not files[-1].exists():
            by_clip.setdefault(take.clip, {})[files[-1]] = take.condition
    if by_clip:
        work = (representation, surroundings)
        _measure_all(by_clip, work, workers=workers, progress=progress)
    return np.stack([np.load(file) for file in files])


def cut_speech(samples: Samples, detector: SpeechDetector) -> Samples:
    """The longest utterance that the live segmenter finds with its default settings.

    All of the clip if it finds none. Live sound never has a studio clip's second of silence.
    """
    config = Config()
    segmenter = Segmenter(config.segmenter, config.vad, frame_samples=detector.frame_samples)
    detector.reset()
    actions = [
        action for score in detector.feed(samples) for action in segmenter.feed(float(score))
    ]
    found = [action for action in [*actions, *segmenter.flush()] if isinstance(action, Finish)]
    if not found:
        return samples
    longest = max(found, key=lambda utterance: utterance.end - utterance.start)
    return samples[longest.start : longest.end]


def _measure_all(
    by_clip: dict[Path, dict[Path, Condition]],
    work: tuple[str, Surroundings],
    *,
    workers: int,
    progress: Callable[[str], None],
) -> None:
    # Spawned, not forked: openSMILE and onnxruntime hold threads that don't survive a fork.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_open_worker,
        initargs=work,
    ) as pool:
        done = pool.map(_measure_clip, by_clip.items(), chunksize=4)
        for count, clip in enumerate(done, start=1):
            if count % 100 == 0 or count == len(by_clip):
                progress(f"{work[0]}: {count} of {len(by_clip)} clips, {clip.name}")


@dataclass(frozen=True)
class _Worker:
    surroundings: Surroundings
    representation: AcousticRepresentation
    detector: SpeechDetector


_worker: _Worker | None = None  # of this process; models can't travel between processes


def _open_worker(representation: str, surroundings: Surroundings) -> None:
    global _worker
    os.environ["OMP_NUM_THREADS"] = "1"
    detector = open_detector(Config().vad.engine)
    _worker = _Worker(surroundings, open_representation(representation), detector)


def _measure_clip(job: tuple[Path, dict[Path, Condition]]) -> Path:
    if _worker is None:
        raise RuntimeError("a worker measures only after it was opened")
    clip, conditions = job
    speech = cut_speech(read_audio(clip), _worker.detector)
    for file, condition in conditions.items():
        heard = change(speech, condition, _worker.surroundings)
        row = _worker.representation.extract(heard[:LONGEST])
        if row is None:
            row = np.full(_worker.representation.width, np.nan)
        _write(file, row.astype(np.float32))
    return clip


def _write(file: Path, row: Float32) -> None:
    """All or nothing: a file that was cut short would look like a finished one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.stem}.{os.getpid()}.part")
    with unfinished.open("wb") as out:
        np.save(out, row)
    unfinished.replace(file)


def _contents(clips: Sequence[Path]) -> list[str]:
    """A digest of each clip's bytes; each file is read once."""
    known: dict[Path, str] = {}
    for clip in clips:
        if clip not in known:
            known[clip] = hashlib.sha256(clip.read_bytes()).hexdigest()
    return [known[clip] for clip in clips]


def _fingerprint(surroundings: Surroundings) -> str:
    digest = hashlib.sha256()
    for sound in (*surroundings.noises, *surroundings.rooms):
        digest.update(sound.tobytes())
    return digest.hexdigest()
