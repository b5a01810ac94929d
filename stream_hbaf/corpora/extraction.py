"""Extracts acoustic features: clips are decoded, cut, augmented and measured by worker processes.

Features are cached, a file for each clip, cut and condition, named by everything that decides
them: an interrupted extraction continues where it was.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as memoise
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.augment import NoisesAndRooms, Samples
from stream_hbaf.corpora.cache import digest_code, key_of, load_array, store_array
from stream_hbaf.corpora.clips import ClipJob, Preparation, Segmentation, decode_clip
from stream_hbaf.corpora.dialogue import (
    Corpus,
    Dialogue,
    Split,
    describe_dialogues,
    is_published,
    published_features,
    utterances_of,
)
from stream_hbaf.errors import AudioError, CorpusError, ModelError, StreamHbafError
from stream_hbaf.features.representations import (
    PROSODY,
    AcousticRepresentation,
    open_representation,
)
from stream_hbaf.files import WriteError
from stream_hbaf.processes import WorkerDiedError, map_as_completed

Float32 = NDArray[np.float32]
Progress = Callable[[int, int, Path], None]  # clips done, all clips, the clip just done
Features = TypeVar("Features")
Outcome = Float32 | str  # a job's features [W], or why it has none

# Modules that compute features. The versions of their packages are part of a representation's.
CODE = (
    "stream_hbaf.features.acoustic",
    "stream_hbaf.features.campplus",
    "stream_hbaf.features.ge2e",
    "stream_hbaf.features.prosody",
    "stream_hbaf.features.representations",
    "stream_hbaf.features.speaker",
    "stream_hbaf.features.speech_encoder",
    "stream_hbaf.features.whisper_encoder",
)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An utterance that has no features at all, and why."""

    id: str
    path: Path | None  # None: the corpus names no clip
    reason: str

    def __str__(self) -> str:
        return f"{self.id}: {self.path or 'no clip'}: {self.reason}"


@dataclass(frozen=True)
class Extracted(Generic[Features]):
    """Features of a sequence of jobs [N, W], or of a corpus by split; NaN for what was skipped."""

    features: Features
    skipped: tuple[Skipped, ...]  # each utterance once
    widths: tuple[int, ...]  # columns of each part of the representation
    leftovers: str = ""  # one line on features of other versions in the cache; "" if it holds none


ExtractedCorpus = Extracted[Mapping[Split, Float32]]  # rows in the order of its dialogues


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

    What the corpus publishes itself, "prosody" or "ge2e", is taken from there, everything else from
    its clips as ``extract_features`` says. Of "prosody+ge2e", an utterance has what there is: the
    columns of the other part are NaN. Raises CorpusError if no utterance has any part of the
    representation; other errors are those of ``extract_features``.
    """
    dialogues = [dialogue for part in corpus.splits.values() for dialogue in part]
    measure = partial(
        extract_features, cache=cache, workers=workers, device=device, progress=progress
    )
    parts = [_read_or_measure(dialogues, part, measure) for part in representation.split("+")]
    rows = np.concatenate([part.features for part in parts], axis=1)
    if np.isnan(rows).all() and all(one.audio is None for one in utterances_of(dialogues)):
        tables = "prosody tables or " if PROSODY in representation.split("+") else ""
        raise CorpusError(
            f"{corpus.name}: no utterance has a clip; "
            f"put the corpus's {tables}clips there or choose another representation"
        )
    ends = np.cumsum([len(utterances_of(part)) for part in corpus.splits.values()])
    features = dict(zip(corpus.splits, np.split(rows, ends[:-1]), strict=True))
    empty = np.isnan(rows).all(axis=1)
    without = {one.id for one, none in zip(utterances_of(dialogues), empty, strict=True) if none}
    skipped = {one.id: one for part in parts for one in part.skipped if one.id in without}
    leftovers = "; ".join(part.leftovers for part in parts if part.leftovers)
    widths = tuple(width for part in parts for width in part.widths)
    return Extracted(features, tuple(skipped.values()), widths, leftovers)


def is_of_corpus(corpus: Corpus, representation: str) -> bool:
    """Whether any part of the representation needs more than clips: what the corpus publishes, or
    the dialogues that prosody is relative to."""
    dialogues = [dialogue for part in corpus.splits.values() for dialogue in part]
    parts = representation.split("+")
    return PROSODY in parts or any(is_published(dialogues, part) for part in parts)


def _read_or_measure(
    dialogues: Sequence[Dialogue],
    representation: str,
    measure: Callable[..., Extracted[Float32]],
) -> Extracted[Float32]:
    """One representation of all utterances, published by the corpus or measured from its clips."""
    utterances = utterances_of(dialogues)
    if is_published(dialogues, representation):
        published = published_features(dialogues, representation)
        reason = f"the corpus has no {representation} of it"
        missing = np.flatnonzero(np.isnan(published).all(axis=1)).tolist()
        skipped = tuple(Skipped(utterances[n].id, None, reason) for n in missing)
        return Extracted(published, skipped, (published.shape[1],))
    jobs = [
        ClipJob(one.id, one.audio, one.start_s, one.end_s, length_s=one.length_s)
        for one in utterances
    ]
    measured = measure(jobs, representation=representation)
    if representation == PROSODY:
        described = describe_dialogues(measured.features, dialogues)
        return replace(measured, features=described, widths=(described.shape[1],))
    return measured


def extract_features(
    jobs: Sequence[ClipJob],
    *,
    representation: str,
    cache: Path,
    workers: int,
    device: str = "cpu",
    sounds: NoisesAndRooms | None = None,
    progress: Progress,
) -> Extracted[Float32]:
    """Extract the features of all jobs, a row each; what has none is named in ``skipped``.

    Clips are measured by ``workers`` processes of one thread each (a single one if ``device``
    isn't the cpu). The parts of "compare+whisper:base" are extracted and cached one by one, and the
    columns of one that is missing are NaN. ``progress(done, total, clip)`` is called for
    each clip that isn't cached. Raises ModelError if the representation can't be had,
    StreamHbafError if the cache can't be written or a worker dies: what was finished stays cached.
    """
    preparation = Preparation(sounds or NoisesAndRooms(), Segmentation())
    contents = _digest_clips(jobs)
    parts = [_open_part(one, device=device, cache=cache) for one in representation.split("+")]
    workers = workers if device == "cpu" else 1
    outcomes = [
        _extract_part(jobs, part, preparation, contents, workers=workers, progress=progress)
        for part in parts
    ]
    ends = np.cumsum([part.width for part in parts])
    features = np.full((len(jobs), ends[-1]), np.nan, np.float32)
    skipped: dict[Skipped, None] = {}
    for row, job in enumerate(jobs):
        found = [of_part[job] for of_part in outcomes]
        for part, end, one in zip(parts, ends, found, strict=True):
            if not isinstance(one, str):
                features[row, end - part.width : end] = one
        reasons = [one for one in found if isinstance(one, str)]
        if len(reasons) == len(parts):
            skipped[Skipped(job.id, job.clip, reasons[0])] = None
    leftovers = "; ".join(line for part in parts if (line := _leftovers(part)))
    return Extracted(features, tuple(skipped), tuple(part.width for part in parts), leftovers)


# ---- one representation


@dataclass(frozen=True)
class Part:
    """One representation, or one of several side by side."""

    name: str
    version: str
    width: int  # W
    device: str
    home: Path  # the folder in the cache for this representation and version alone

    @property
    def key(self) -> list[str]:
        """What decides features of given samples."""
        return [self.name, self.version, digest_code(*CODE)]


def _open_part(name: str, *, device: str, cache: Path) -> Part:
    opened = open_representation(name)
    opened.close()
    home = cache / re.sub(r"[^\w.-]+", "--", name) / opened.version
    return Part(name, opened.version, opened.width, device, home)


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
    part: Part,
    preparation: Preparation,
    contents: Mapping[Path, str | OSError],
    *,
    workers: int,
    progress: Progress,
) -> dict[ClipJob, Outcome]:
    """Every job's features, from the cache or from workers."""
    found, missing = _look_up(jobs, part, preparation, contents)
    items = list(missing.items())
    done, total = len(contents) - len(items), len(contents)
    completed = map_as_completed(
        _measure_clip, items, workers=workers, shared=(part, preparation), isolated=True
    )
    try:
        for index, outcomes in completed:
            done += 1
            progress(done, total, items[index][0])
            found |= outcomes
    except (WorkerDiedError, WriteError) as error:
        clip = f"{items[error.index][0]}: " if isinstance(error, WorkerDiedError) else ""
        raise StreamHbafError(
            f"{clip}{error}; {done} of {total} clips are kept, run it again and it goes on from "
            "there"
        ) from None
    return found


def _look_up(
    jobs: Sequence[ClipJob],
    part: Part,
    preparation: Preparation,
    contents: Mapping[Path, str | OSError],
) -> tuple[dict[ClipJob, Outcome], dict[Path, dict[ClipJob, Path]]]:
    """The outcomes that need no measuring, and for each other clip, which is to be decoded once,
    its jobs with their files in the cache."""
    found: dict[ClipJob, Outcome] = {}
    missing: dict[Path, dict[ClipJob, Path]] = {}
    for job in jobs:
        content = None if job.clip is None else contents[job.clip]
        if job.clip is None or content is None:
            found[job] = "the corpus names no clip"
        elif isinstance(content, OSError):
            found[job] = f"can't be read ({content.strerror})"
        else:
            key = key_of(repr(part.key), repr(preparation.dependencies(job, content=content)))
            file = part.home / key[:2] / f"{key}.npy"
            features = load_array(file, shape=(part.width,))
            if features is not None:
                found[job] = features
            else:
                missing.setdefault(job.clip, {})[job] = file
    return found, missing


def _leftovers(part: Part) -> str:
    others = [
        f"{count} features of {part.name} version {folder.name}"
        for folder in sorted(part.home.parent.glob("*/"))
        if folder != part.home and (count := sum(1 for _ in folder.rglob("*.npy")))
    ]
    listed = f"{part.home.parent}: cache holds {', '.join(others)}"
    return f"{listed}; this is version {part.version}; they are ignored" if others else ""


# ---- in a worker


@memoise
def _open_representation(part: Part) -> AcousticRepresentation:
    """Opened with the first clip: an error then has a way to the parent."""
    return open_representation(part.name, device=part.device)


def _measure_clip(
    item: tuple[Path, dict[ClipJob, Path]], part: Part, preparation: Preparation
) -> dict[ClipJob, Outcome]:
    """The outcome of every job of one clip; features are cached. Raises WriteError."""
    clip, files = item
    representation = _open_representation(part)
    try:
        samples = decode_clip(clip)
    except AudioError as error:
        return dict.fromkeys(files, str(error))
    cuts: dict[object, Samples] = {}  # several conditions share a cut
    found: dict[ClipJob, Outcome] = {}
    for job, file in files.items():
        try:
            place = (job.start_s, job.end_s, job.segmented)
            if place not in cuts:
                cuts[place] = preparation.cut(samples, job)
            augmented = preparation.augment(cuts[place], job)
            features = representation.extract(augmented)
        except (AudioError, ModelError) as error:
            found[job] = str(error)
            continue
        if features is None or np.isnan(features).all():
            length_s = len(augmented) / SAMPLE_RATE_HZ
            found[job] = f"too short for {representation.name}: {length_s:.3f} s"
        else:
            found[job] = features.astype(np.float32)
            store_array(file, features.astype(np.float32))
    return found
