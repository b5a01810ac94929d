"""Sources with known ends of turns, for tools/measure_endpoints.py, none of it in both parts.

recordings  clips of one speaker each (RAVDESS, SAVEE, ASED, nEMO, EmoSpeech-India) as they are, two
            seconds apart, with the pauses that the speakers make in and after them; also in noise
reading     a passage by each of LibriSpeech's readers, who pause between sentences; LibriVox
sentences   the clips without the silence around them, joined with the gaps between the turns of
            IEMOCAP's dialogues
meetings    pieces of AMI, where a pause ends a turn if somebody else speaks after it
"""

import csv
import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, VadConfig
from stream_hbaf.speech.vad import SileroDetector

Sound = NDArray[np.int16]
FRAME = SileroDetector.frame_samples
FRAME_MS = 1000 * FRAME / SAMPLE_RATE_HZ
VAD = VadConfig()
LEAST_GAP_S, LONGEST_GAP_S = 0.16, 3.0  # of those between turns: shorter ones are no silence
APART_S = 2.0
ROOM_LEVEL = 3.0  # standard deviation of a quiet room's noise
LOUDER = 0.8  # quantile of the frames' power that counts as how loud speech or noise is
NOISE_RATIO = 10 ** (10 / 20)  # 10 dB
NOISES = {"dev": ("noise1", "noise2", "noise3"), "test": ("noise4", "noise5")}
NEAR_FRAMES = 9  # 0.3 s: RTTM's times, and the VAD in other company, are this exact
MEETINGS = {"dev": ("dev00", "trn01", "trn02"), "test": ("sample", "trn03")}
ACTORS = {"dev": range(1, 21), "test": range(21, 25)}
POLISH = {"dev": ("IC0", "KD0", "KS0", "SM0", "MP0"), "test": ("TP0",)}
SPEAKERS_CLIPS = 15


@dataclass(frozen=True)
class Pause:
    first: int  # frame of silence
    length: int  # frames
    ends_turn: bool


@dataclass
class Source:
    """One source's sound, the speech score of each of its frames, and its pauses in order."""

    sound: Sound
    scores: list[float]
    pauses: list[Pause]
    probabilities: dict[tuple[int, int], float] = field(default_factory=dict)  # by samples


def score(sound: Sound) -> list[float]:
    """The speech score of each frame."""
    return [float(value) for value in SileroDetector().feed(sound)]


def silences(scores: Iterable[float]) -> list[tuple[int, int]]:
    """First frame and end of each silence after speech, as the segmenter sees it."""
    silent, is_speech = [], False
    for value in scores:
        is_speech = value >= (VAD.release if is_speech else VAD.threshold)
        silent.append(not is_speech)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.array(silent, int), [0]))))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2) if first > 0]


def room(sound: Sound, seconds: float) -> Sound:
    """Noise as quiet as the quietest moments of a recording."""
    frames = sound[: len(sound) // 160 * 160].reshape(-1, 160).astype(np.float64)
    levels = np.sqrt(np.square(frames).mean(1))
    level = min(300.0, float(np.percentile(levels[levels > 0], 3))) if levels.any() else 3.0
    noise = np.random.default_rng(len(sound)).normal(0, level, round(seconds * SAMPLE_RATE_HZ))
    return noise.astype(np.int16)


def spoken(clip: Sound) -> Sound:
    """A clip without the silence around it."""
    found = silences([0.0, *score(np.concatenate([clip, room(clip, 0.3)]))])
    flags = np.array(score(clip)) >= VAD.threshold
    first = max(0, int(np.argmax(flags)) - 2) if flags.any() else 0
    return clip[first * FRAME : (found[-1][0] + 1) * FRAME] if found else clip[:0]


def join(clips: Sequence[Sound], gaps: Iterator[float]) -> Source:
    """One source that says clips one after another, so many seconds apart."""
    pieces: list[Sound] = [room(clips[0], 0.5)]
    ends = []  # frames in which a turn has ended
    for clip in filter(len, map(spoken, clips)):
        pieces.append(clip)
        ends.append(sum(map(len, pieces)) // FRAME)
        pieces.append(room(clip, next(gaps)))
    sound = np.concatenate([*pieces, room(clips[-1], APART_S)])
    scores = score(sound)
    found = silences(scores)
    nearest = {min((first for first, _ in found), key=lambda first: abs(first - at)) for at in ends}
    return Source(sound, scores, [Pause(a, b - a, ends_turn=a in nearest) for a, b in found])


def meeting(path: Path, turns: Sequence[tuple[float, float, str]]) -> Source:
    sound = read_audio(path)
    scores = score(sound)
    pauses = []
    slack = NEAR_FRAMES * FRAME_MS / 1000
    for first, end in silences(scores):
        begins_s, ends_s = first * FRAME_MS / 1000, end * FRAME_MS / 1000
        before = {who for start, stop, who in turns if start <= begins_s <= stop + slack}
        after = {who for start, stop, who in turns if start - slack <= ends_s < stop}
        if before and after:
            pauses.append(Pause(first, end - first, not before & after))
    return Source(sound, scores, pauses)


def speaker_turns(folder: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Start, end and speaker of each turn, by recording."""
    turns = defaultdict(list)
    for path in folder.glob("*.rttm"):
        for line in path.read_text(encoding="utf-8").splitlines():
            _, recording, _, start, length, _, _, who, *_ = line.split()
            turns[recording].append((float(start), float(start) + float(length), who))
    return turns


def dialogue_gaps(table: Path) -> list[float]:
    """Seconds from the end of a turn to the next one's start, where they don't overlap."""
    dialogues = defaultdict(list)
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            dialogues[row["video_id"]].append((float(row["start_s"]), float(row["end_s"])))
    return [
        gap
        for turns in map(sorted, dialogues.values())
        for (_, end), (start, _) in pairwise(turns)
        if LEAST_GAP_S < (gap := start - end) < LONGEST_GAP_S
    ]


def recordings(clips: Sequence[Sound], *, noise: Sound | None = None) -> Source:
    """One source that plays clips as they are, APART_S apart, in a quiet room's noise or another.

    A pause ends a turn if it is the last one of a clip.
    """
    gap = np.zeros(round(APART_S * SAMPLE_RATE_HZ), np.int16)
    stream = np.concatenate([part for clip in clips for part in (clip, gap)]).astype(np.float64)
    stream += np.random.default_rng(0).normal(0, ROOM_LEVEL, len(stream))
    if noise is not None:
        stream += np.resize(noise, len(stream)) * loudness(stream) / loudness(noise) / NOISE_RATIO
    sound = stream.clip(-32768, 32767).astype(np.int16)
    edges = np.cumsum([len(clip) + len(gap) for clip in clips]) // FRAME
    scores = score(sound)
    found = silences(scores)
    last = {int(np.searchsorted(edges, first, side="right")): first for first, _ in found}
    ends = set(last.values())
    return Source(sound, scores, [Pause(a, b - a, ends_turn=a in ends) for a, b in found])


def loudness(sound: NDArray[np.generic]) -> float:
    """Root mean square of a sound's louder frames."""
    power = np.square(sound[: len(sound) // FRAME * FRAME].astype(np.float64)).reshape(-1, FRAME)
    return float(np.sqrt(np.quantile(power.mean(axis=1), LOUDER)))


def clips_of(data: Path, part: str, count: int) -> Iterator[list[Path]]:
    """The clips of some speakers, at most ``count`` of a corpus and SPEAKERS_CLIPS of a speaker."""
    draw = random.Random(0)
    splits = {"train", "dev"} if part == "dev" else {"test"}
    by_corpus: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for corpus in ("savee", "ased", "emospeech-india"):
        with (data / corpus / "clips.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] in splits]
        by_corpus[corpus] = [(row["speaker"], data / corpus / row["file"]) for row in rows]
    for actor in ACTORS[part]:
        files = sorted(data.glob(f"ravdess/Actor_{actor:02d}/*.flac"))
        by_corpus["ravdess"] += [(str(actor), file) for file in files]
    for path in sorted(data.glob("nemo/**/*.flac")):
        if (who := path.name.split("_")[0]) in POLISH[part]:
            by_corpus["nemo"].append((who, path))
    for clips in by_corpus.values():
        speakers: dict[str, list[Path]] = defaultdict(list)
        for who, clip in draw.sample(clips, len(clips)):
            speakers[who].append(clip)
        for files in list(speakers.values())[: max(1, count // SPEAKERS_CLIPS)]:
            yield files[:SPEAKERS_CLIPS]


def gather(data: Path, part: str, count: int) -> dict[str, list[Source]]:
    """Sources of each kind, none of a person or noise of the other part."""
    draw = random.Random(1)
    gaps = dialogue_gaps(data / "iemocap/order.csv")
    apart = iter(lambda: APART_S, None)
    speakers = [[read_audio(file) for file in files] for files in clips_of(data, part, count)]
    noises = [read_audio(data / f"speech/noise/{name}.flac") for name in NOISES[part]]
    with (data / "speech/libri/clips.csv").open(encoding="utf-8", newline="") as file:
        rows = [row["file"] for row in csv.DictReader(file) if row["split"] == part]
    reading = [join([read_audio(data / "speech/libri" / name)], apart) for name in rows]
    if part == "test":
        files = sorted(data.glob("speech/librivox/*.flac"))
        reading.append(join([read_audio(file) for file in files], apart))
    turns = speaker_turns(data / "speech/meeting")
    return {
        "recordings": [recordings(clips) for clips in speakers],
        "recordings, noise at 10 dB": [
            recordings(clips, noise=noise)
            for clips, noise in zip(speakers, itertools.cycle(noises), strict=False)
        ],
        "reading": reading,
        "sentences": [join(clips, iter(lambda: draw.choice(gaps), None)) for clips in speakers],
        "meetings": [
            meeting(data / f"speech/meeting/{name}.flac", turns[name]) for name in MEETINGS[part]
        ],
    }
