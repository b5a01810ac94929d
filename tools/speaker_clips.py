"""Utterances of the data for tools/measure_speakers.py, cut and embedded as live."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, SegmenterConfig, VadConfig
from stream_hbaf.evaluation.diarization import Turn
from stream_hbaf.features.speaker import SpeakerEncoder, open_speaker_encoder
from stream_hbaf.speech.segmenter import Finish, Segmenter
from stream_hbaf.speech.vad import open_detector

TEST_ACTORS = range(21, 25)
READ = SegmenterConfig(
    min_silence_ms=200, soft_limit_s=3, max_utterance_s=5
)  # reading has no turns
READ_S = 2.0  # pieces of reading are joined up to this length
FOLDERS = ("ravdess/*", "speech/libri", "speech/meeting")

Sound = NDArray[np.int16]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Said:
    """One utterance, as the live segmenter cuts it."""

    clip: str
    speaker: str
    emotion: str
    start_s: float
    end_s: float
    embedding: NDArray[np.float32] | None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Corpus:
    """Utterances of the data with their embeddings, each computed once if there is a cache."""

    def __init__(self, folder: Path, cache: Path | None) -> None:
        self.folder = folder
        self._cache = cache

    @cached_property
    def encoder(self) -> SpeakerEncoder:
        return open_speaker_encoder()

    def ravdess(self, split: str) -> list[Said]:
        paths = sorted((self.folder / "ravdess").glob("*/*.flac"))
        found = [said for path in paths for said in self.clip(path, SegmenterConfig())]
        said = [
            Said(one.clip, f"actor {one.clip[-2:]}", one.clip[6:8], *rest(one)) for one in found
        ]
        return [s for s in said if (int(s.clip[-2:]) in TEST_ACTORS) == (split == "test")]

    def libri(self, split: str) -> list[Said]:
        folder = self.folder / "speech/libri"
        with (folder / "clips.csv").open(encoding="utf-8") as file:
            rows = [
                row for row in csv.DictReader(file) if (row["split"] == "test") == (split == "test")
            ]
        return [
            Said(one.clip, f"reader {row['speaker']}", "", *rest(one))
            for row in rows
            for one in self.clip(folder / row["file"], READ)
        ]

    def sounds(self, split: str) -> list[Sound]:
        """Sounds of five seconds that are no speech."""
        folder = self.folder / "speech/sounds"
        with (folder / "clips.csv").open(encoding="utf-8") as file:
            names = [row["file"] for row in csv.DictReader(file) if row["split"] == split]
        return [read_audio(folder / name) for name in names]

    def audio(self, said: Said) -> Sound:
        """The sound of one utterance."""
        found = [path for kind in FOLDERS for path in self.folder.glob(f"{kind}/{said.clip}.*")]
        (path,) = (path for path in found if path.suffix != ".rttm")
        start, end = (round(second * SAMPLE_RATE_HZ) for second in (said.start_s, said.end_s))
        return read_audio(path)[start:end]

    def clip(self, path: Path, config: SegmenterConfig) -> list[Said]:
        """The utterances of a recording; their speaker isn't known."""
        cached = None if self._cache is None else self._cache / f"{path.stem}.npz"
        if cached is not None and cached.is_file():
            with np.load(cached) as arrays:
                times, embeddings = arrays["times"], arrays["embeddings"]
        else:
            times, embeddings = self._embed(read_audio(path), config)
            if cached is not None:
                cached.parent.mkdir(parents=True, exist_ok=True)
                np.savez(cached, times=times, embeddings=embeddings)
        return [
            Said(path.stem, "", "", start, end, embedding if embedding.any() else None)
            for (start, end), embedding in zip(times.tolist(), embeddings, strict=True)
        ]

    def _embed(self, audio: Sound, config: SegmenterConfig) -> tuple[Float64, Float64]:
        pieces = cut(audio, config)
        found = [self.encoder.embed(audio[start:end]) for start, end in pieces]
        width = self.encoder.width
        embeddings = [np.zeros(width) if one is None else one for one in found]
        return (
            np.array(pieces, float).reshape(-1, 2) / SAMPLE_RATE_HZ,
            np.array(embeddings, float).reshape(-1, width),
        )


def rest(said: Said) -> tuple[float, float, NDArray[np.float32] | None]:
    return said.start_s, said.end_s, said.embedding


def cut(audio: Sound, config: SegmenterConfig) -> list[tuple[int, int]]:
    """Start and end of each utterance; pieces of reading are joined until they are long enough."""
    detector = open_detector("silero")
    segmenter = Segmenter(config, VadConfig(), frame_samples=detector.frame_samples)
    actions = [action for score in detector.feed(audio) for action in segmenter.feed(float(score))]
    ends = [one for one in [*actions, *segmenter.flush()] if isinstance(one, Finish)]
    pieces = [(end.start, min(end.end, len(audio))) for end in ends]
    return join_short(pieces) if config is READ else pieces


def read_turns(folder: Path) -> dict[str, list[Turn]]:
    """The true turns of each meeting, from its RTTM file."""
    turns: dict[str, list[Turn]] = {}
    for path in folder.glob("*.rttm"):
        for line in path.read_text(encoding="utf-8").splitlines():
            _, name, _, start, length, _, _, speaker, *_ = line.split()
            turn = Turn(float(start), float(start) + float(length), speaker)
            turns.setdefault(name, []).append(turn)
    return turns


def join_short(pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces of reading, each at least READ_S long if there is so much."""
    least = READ_S * SAMPLE_RATE_HZ
    joined: list[tuple[int, int]] = []
    for start, end in pieces:
        is_short = bool(joined) and joined[-1][1] - joined[-1][0] < least
        joined.append((joined.pop()[0], end) if is_short else (start, end))
    if len(joined) > 1 and joined[-1][1] - joined[-1][0] < least:
        _, end = joined.pop()
        joined.append((joined.pop()[0], end))
    return joined
