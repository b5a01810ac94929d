"""Extracts acoustic features: clips are decoded, cut, augmented and measured by worker processes.

Features are cached, a file for each clip, cut and condition, named by everything that decides
them: an interrupted extraction continues where it was.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio import file as audio_file
from stream_hbaf.audio import pcm
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora import augment, clips
from stream_hbaf.corpora.augment import CLEAN, NoisesAndRooms
from stream_hbaf.corpora.cache import digest_code, library_versions, load_array, store_array
from stream_hbaf.corpora.clips import (
    ClipJob,
    Samples,
    Segmentation,
    augment_job,
    cut_job,
    decode_clip,
)
from stream_hbaf.corpora.dialogue import Corpus, Split, utterances_of
from stream_hbaf.errors import AudioError, CorpusError, ModelError, StreamHbafError
from stream_hbaf.features.prosody import PROSODY, PROSODY_WIDTH, describe_prosody
from stream_hbaf.features.representations import AcousticRepresentation, open_representation
from stream_hbaf.files import WriteError
from stream_hbaf.processes import WorkerDiedError, map_as_completed
from stream_hbaf.speech import segmenter, vad
from stream_hbaf.speech.vad import SpeechDetector

Float32 = NDArray[np.float32]
Progress = Callable[[int, int, Path], None]  # clips done, all clips, the clip just done
Outcome = Float32 | str  # a job's features [W], or why it has none


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
    """Features of a sequence of jobs."""

    features: Float32  # [N, W]; a row of NaN for what was skipped
    skipped: tuple[Skipped, ...]  # each utterance once for each reason
    leftovers: str = ""  # one line on features of other versions in the cache; "" if it holds none


@dataclass(frozen=True)
class ExtractedCorpus:
    """A corpus's features, a row an utterance in the order of its dialogues."""

    features: Mapping[Split, Float32]  # [N, W] each; a row of NaN for what was skipped
    skipped: tuple[Skipped, ...]
    leftovers: str = ""  # as in Extracted


def extract_corpus(
    corpus: Corpus,
    *,
    representation: str,
    cache: Path,
    workers: int,
    device: str = "cpu",
    progress: Progress,
) -> ExtractedCorpus:
    """Extract a row of features for every utterance of ``corpus``, cut by its times.

    "prosody" is read from the corpus's tables, everything else from its clips as
    ``extract_features`` says. Raises CorpusError if no utterance has what the representation
    needs; other errors are those of ``extract_features``.
    """
    if representation == "prosody":
        return _describe_tables(corpus)
    jobs = [
        ClipJob(one.id, one.audio, start_s=one.start_s, end_s=one.end_s)
        for dialogues in corpus.splits.values()
        for one in utterances_of(dialogues)
    ]
    if all(job.clip is None for job in jobs):
        raise CorpusError(
            f"{corpus.name}: no utterance has a clip; "
            "put the corpus's sound there or choose another representation"
        )
    extracted = extract_features(
        jobs,
        representation=representation,
        cache=cache,
        workers=workers,
        device=device,
        progress=progress,
    )
    ends = np.cumsum([len(utterances_of(dialogues)) for dialogues in corpus.splits.values()])
    parts = np.split(extracted.features, ends[:-1])
    return ExtractedCorpus(
        dict(zip(corpus.splits, parts, strict=True)), extracted.skipped, extracted.leftovers
    )


def extract_features(
    jobs: Sequence[ClipJob],
    *,
    representation: str,
    cache: Path,
    workers: int,
    device: str = "cpu",
    sounds: NoisesAndRooms | None = None,
    segmentation: Segmentation | None = None,
    progress: Progress,
) -> Extracted:
    """Extract the features of all jobs, a row each; what has none is named in ``skipped``.

    Clips are measured by ``workers`` processes of one thread each (a single one if ``device``
    isn't the cpu). The parts of "compare+whisper:base" are extracted and cached one by one.
    ``progress(done, total, clip)`` is called for each clip that isn't cached. Raises ModelError if
    the representation can't be had, StreamHbafError if the cache can't be written or a worker
    dies: what was finished stays cached.
    """
    sounds = sounds or NoisesAndRooms()
    contents = _digest_clips(jobs)
    sounds_digest = _digest_arrays(sounds.noises, sounds.rooms)
    parts = []
    for name in representation.split("+"):
        opened = open_representation(name)
        opened.close()
        setup = Setup(
            name,
            opened.version,
            device=device,
            sounds=sounds,
            sounds_digest=sounds_digest,
            segmentation=segmentation or Segmentation(),
            home=cache / re.sub(r"[^\w.-]+", "--", name) / opened.version,
        )
        workers = workers if device == "cpu" else 1
        outcomes = _extract_part(
            jobs, contents, setup, width=opened.width, workers=workers, progress=progress
        )
        parts.append((setup, opened.width, outcomes))
    return _collect(jobs, parts)


@dataclass(frozen=True, eq=False)  # compared by identity: a worker's tools are kept by it
class Setup:
    """What all jobs of an extraction of one representation share."""

    representation: str
    version: str  # of the representation
    device: str
    sounds: NoisesAndRooms
    sounds_digest: str
    segmentation: Segmentation
    home: Path  # the folder in the cache for this representation and version alone


def dependencies(job: ClipJob, setup: Setup, *, content: str) -> dict[str, object]:
    """Everything that decides a job's features; ``content`` is the digest of the clip's bytes.

    Settings, sounds, code and libraries of steps that the job doesn't need are left out: they
    may change without a new extraction.
    """
    found: dict[str, object] = {
        "representation": [setup.representation, setup.version],
        "content": content,
        "cut": [job.start_s, job.end_s],
        "decoding": [digest_code(audio_file, pcm, clips), *library_versions("av", "soxr")],
    }
    if job.segmented:
        found["segmentation"] = [
            setup.segmentation.segmenter.model_dump(),
            setup.segmentation.vad.model_dump(),
            digest_code(segmenter, vad),
            *library_versions("faster-whisper", "onnxruntime", "webrtcvad-wheels"),
        ]
    if job.condition != CLEAN:
        found["condition"] = [
            repr(job.condition),
            setup.sounds_digest,
            digest_code(augment),
            *library_versions("scipy"),
        ]
    return found


def _digest_arrays(*groups: Iterable[Samples]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        for array in group:
            digest.update(f"{len(array)} ".encode() + array.tobytes())
        digest.update(b"/")
    return digest.hexdigest()


def _digest_clips(jobs: Sequence[ClipJob]) -> dict[Path, str | OSError]:
    """The digest of each clip's bytes, or why it can't be read; each is read once."""
    found: dict[Path, str | OSError] = {}
    for job in jobs:
        if job.clip is not None and job.clip not in found:
            try:
                with job.clip.open("rb") as read:
                    found[job.clip] = hashlib.file_digest(read, "sha256").hexdigest()
            except OSError as error:
                found[job.clip] = error
    return found


def _extract_part(
    jobs: Sequence[ClipJob],
    contents: Mapping[Path, str | OSError],
    setup: Setup,
    *,
    width: int,
    workers: int,
    progress: Progress,
) -> dict[ClipJob, Outcome]:
    """Every job's features of one representation, from the cache or from workers."""
    found: dict[ClipJob, Outcome] = {}
    missing: dict[Path, dict[ClipJob, Path]] = {}  # by clip, so that each is decoded once
    for job in dict.fromkeys(map(_nameless, jobs)):
        if job.clip is None:
            found[job] = "the corpus names no clip"
            continue
        content = contents[job.clip]
        if isinstance(content, OSError):
            found[job] = f"can't be read ({content.strerror})"
            continue
        file = _place(setup.home, dependencies(job, setup, content=content))
        features = _read(file, width=width)
        if features is not None:
            found[job] = features
        else:
            missing.setdefault(job.clip, {})[job] = file
    for outcomes in _measure_all(
        missing, setup, total=len(contents), workers=workers, progress=progress
    ):
        found |= outcomes
    return found


def _nameless(job: ClipJob) -> ClipJob:
    """Utterances of the same sound share an outcome."""
    return replace(job, id="")


def _measure_all(
    missing: Mapping[Path, dict[ClipJob, Path]],
    setup: Setup,
    *,
    total: int,
    workers: int,
    progress: Progress,
) -> Iterable[dict[ClipJob, Outcome]]:
    items = list(missing.items())
    done = total - len(items)

    def stopped(reason: str) -> StreamHbafError:
        kept = f"{done} of {total} clips are kept, run it again and it goes on from there"
        return StreamHbafError(f"{reason}; {kept}")

    completed = map_as_completed(
        _measure_clip, items, workers=workers, shared=(setup,), isolated=True
    )
    try:
        for index, outcomes in completed:
            done += 1
            progress(done, total, items[index][0])
            yield outcomes
    except WorkerDiedError as error:
        raise stopped(f"{items[error.index][0]}: {error}") from None
    except WriteError as error:
        raise stopped(str(error)) from None


def _collect(
    jobs: Sequence[ClipJob], parts: Sequence[tuple[Setup, int, Mapping[ClipJob, Outcome]]]
) -> Extracted:
    """Rows of all parts side by side; a row of which any part is missing is NaN, as live."""
    features = np.full((len(jobs), sum(width for _, width, _ in parts)), np.nan, np.float32)
    skipped: dict[Skipped, None] = {}
    for row, job in enumerate(jobs):
        rows = []
        for _, _, outcomes in parts:
            outcome = outcomes[_nameless(job)]
            if isinstance(outcome, str):
                skipped[Skipped(job.id, job.clip, outcome)] = None
                break
            rows.append(outcome)
        else:
            features[row] = np.concatenate(rows)
    leftovers = [line for setup, _, _ in parts if (line := _leftovers(setup))]
    return Extracted(features, tuple(skipped), "; ".join(leftovers))


def _describe_tables(corpus: Corpus) -> ExtractedCorpus:
    features: dict[Split, Float32] = {}
    skipped = []
    for split, dialogues in corpus.splits.items():
        rows = [np.empty((0, PROSODY_WIDTH), np.float32)]
        for dialogue in dialogues:
            absent = (np.nan,) * len(PROSODY)
            measured = np.array([one.prosody or absent for one in dialogue.utterances])
            for one, values in zip(dialogue.utterances, measured, strict=True):
                if np.isnan(values).all():
                    skipped.append(Skipped(one.id, None, "not in the prosody tables"))
            rows.append(describe_prosody(measured, [one.speaker for one in dialogue.utterances]))
        features[split] = np.concatenate(rows)
    if len(skipped) == sum(len(rows) for rows in features.values()):
        raise CorpusError(
            f"{corpus.name}: no utterance has prosody measurements; "
            "put the prosody tables there or choose another representation"
        )
    return ExtractedCorpus(features, tuple(skipped))


# ---- in a worker


@cache
def _open_representation(setup: Setup) -> AcousticRepresentation:
    """Opened with the first clip: an error then has a way to the parent."""
    return open_representation(setup.representation, device=setup.device)


@cache
def _open_detector(setup: Setup) -> SpeechDetector:
    return setup.segmentation.open_detector()


def _measure_clip(item: tuple[Path, dict[ClipJob, Path]], setup: Setup) -> dict[ClipJob, Outcome]:
    """The outcome of every job of one clip; features are cached. Raises WriteError."""
    clip, files = item
    representation = _open_representation(setup)
    try:
        samples = decode_clip(clip)
    except AudioError as error:
        return dict.fromkeys(files, str(error))
    cuts: dict[object, Samples] = {}  # several conditions share a cut
    found: dict[ClipJob, Outcome] = {}
    for job, file in files.items():
        try:
            what = (job.start_s, job.end_s, job.segmented)
            if what not in cuts:
                detector = _open_detector(setup) if job.segmented else None
                cuts[what] = cut_job(
                    samples, job, segmentation=setup.segmentation, detector=detector
                )
            augmented = augment_job(cuts[what], job, setup.sounds)
            found[job] = features = _measure(augmented, representation)
        except (AudioError, ModelError) as error:
            found[job] = str(error)
        else:
            if not isinstance(features, str):
                store_array(file, features)
    return found


def _measure(samples: Samples, representation: AcousticRepresentation) -> Outcome:
    features = representation.extract(samples)
    if features is None or np.isnan(features).all():
        return f"too short for {representation.name}: {len(samples) / SAMPLE_RATE_HZ:.3f} s"
    return features.astype(np.float32)


# ---- the cache


def _place(home: Path, parts: Mapping[str, object]) -> Path:
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return home / key[:2] / f"{key}.npy"


def _read(file: Path, *, width: int) -> Float32 | None:
    """A row [W] of the cache; None if it is missing or isn't one."""
    features = load_array(file)
    if features is None or features.shape != (width,) or features.dtype != np.float32:
        return None
    return features.astype(np.float32, copy=False)


def _leftovers(setup: Setup) -> str:
    others = [
        f"{count} features of {setup.representation} version {folder.name}"
        for folder in sorted(setup.home.parent.glob("*/"))
        if folder != setup.home and (count := sum(1 for _ in folder.rglob("*.npy")))
    ]
    if not others:
        return ""
    return (
        f"{setup.home.parent}: cache holds {', '.join(others)}; "
        f"this is version {setup.version}; they are ignored"
    )
