#!/usr/bin/env python3
"""Compare the two voice activity engines on meetings, noise and quiet or noisy acted speech.

    tools/measure_vad.py CORPORA [--threshold 0.5] [--release 0.35]

Prints Markdown tables. Meetings are scored against their annotated speaker turns, in which short
breaths count as speech.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, SegmenterConfig, VadConfig
from stream_hbaf.speech.segmenter import Finish, Segmenter
from stream_hbaf.speech.vad import Engine, SpeechDetector, open_detector

ENGINES: tuple[Engine, ...] = ("silero", "webrtc")
GRID = SAMPLE_RATE_HZ // 100  # samples: speech and silence are compared every 10 ms
JOIN = 60  # grid steps: turns nearer than this are one utterance, as for the segmenter
SEED = 7
CLIPS = 48

Sound = NDArray[np.int16]
Mask = NDArray[np.bool_]  # True = speech, one a grid step


@dataclass(frozen=True)
class Piece:
    samples: Sound
    speech_mask: Mask | None  # None: one utterance, its start and end unknown


@dataclass
class Tally:
    """Grid steps by what they are and what they were found to be."""

    missed: int = 0
    false: int = 0
    hit: int = 0
    silence: int = 0

    def add(self, found: Mask, speech: Mask) -> None:
        self.missed += int((speech & ~found).sum())
        self.false += int((found & ~speech).sum())
        self.hit += int((speech & found).sum())
        self.silence += int((~speech).sum())

    def cells(self) -> list[str]:
        speech = self.hit + self.missed
        f1 = 2 * self.hit / max(1, 2 * self.hit + self.missed + self.false)
        return [
            percent(self.missed, of=speech),
            percent(self.false, of=self.silence),
            f"{f1:.3f}" if speech else "",
        ]


@dataclass
class Outcome:
    """An engine's figures under one condition."""

    frames: Tally = field(default_factory=Tally)  # of single VAD frames
    segments: Tally = field(default_factory=Tally)  # of the segmenter's utterances
    found: int = 0  # annotated utterances of which at least half is in a detected one
    annotated: int = 0
    detected: int = 0  # utterances
    without_speech: int = 0  # of these
    audio_s: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds speech/ and ravdess/")
    for option in ("threshold", "release"):
        parser.add_argument(f"--{option}", type=float, default=getattr(VadConfig(), option))
    arguments = parser.parse_args()
    vad = VadConfig(threshold=arguments.threshold, release=arguments.release)
    print(f"threshold {vad.threshold}, release {vad.release}\n")
    header = "sound,engine,miss %,false alarm %,F1,miss %,false alarm %,F1"
    header += ",utterances found,utterances,without speech a minute"
    print("| | | one frame | | | utterances | | | | | |")
    print("|" + " --- |" * 11)
    print("| " + header.replace(",", " | ") + " |")
    detectors = {engine: open_detector(engine) for engine in ENGINES}
    spent = dict.fromkeys(ENGINES, 0.0)
    total_s = 0.0
    for name, pieces in conditions(arguments.data):
        for engine, detector in detectors.items():
            started = time.process_time()
            outcome = measure(detector, pieces, vad=vad)
            spent[engine] += time.process_time() - started
            print("| " + " | ".join([name, engine, *cells(outcome)]) + " |", flush=True)
        total_s += outcome.audio_s
    print("\n| engine | ms of CPU a second of sound, engine and segmenter |\n| --- | --- |")
    for engine, seconds in spent.items():
        print(f"| {engine} | {1000 * seconds / total_s:.2f} |")


def measure(detector: SpeechDetector, pieces: list[Piece], *, vad: VadConfig) -> Outcome:
    outcome = Outcome()
    for piece in pieces:
        detector.reset()
        segmenter = Segmenter(SegmenterConfig(), vad, frame_samples=detector.frame_samples)
        scores = detector.feed(piece.samples)
        actions = [action for score in scores for action in segmenter.feed(float(score))]
        ends = [action for action in actions + segmenter.flush() if isinstance(action, Finish)]
        steps = len(piece.samples) // GRID
        final = np.zeros(steps, bool)
        for end in ends:
            final[end.start // GRID : end.end // GRID] = True
        outcome.detected += len(ends)
        outcome.audio_s += len(piece.samples) / SAMPLE_RATE_HZ
        if piece.speech_mask is None:
            outcome.annotated += 1
            outcome.found += bool(ends)
            continue
        frames = np.minimum(np.arange(steps) * GRID // detector.frame_samples, len(scores) - 1)
        outcome.frames.add(scores[frames] >= vad.threshold, piece.speech_mask)
        outcome.segments.add(final, piece.speech_mask)
        turns = runs(piece.speech_mask, join=JOIN)
        outcome.annotated += len(turns)
        outcome.found += sum(bool(final[start:end].mean() >= 0.5) for start, end in turns)
        outcome.without_speech += sum(
            not piece.speech_mask[end.start // GRID : end.end // GRID].any() for end in ends
        )
    return outcome


def cells(outcome: Outcome) -> list[str]:
    known = outcome.frames.silence > 0
    return [
        *(outcome.frames.cells() if known else [""] * 3),
        *(outcome.segments.cells() if known else [""] * 3),
        f"{outcome.found}/{outcome.annotated}" if outcome.annotated else "",
        str(outcome.detected),
        f"{outcome.without_speech / outcome.audio_s * 60:.1f}" if known else "",
    ]


def percent(part: int, *, of: int) -> str:
    return f"{100 * part / of:.1f}" if of else ""


def conditions(data: Path) -> Iterator[tuple[str, list[Piece]]]:
    random = np.random.default_rng(SEED)
    turns = read_turns(data / "speech/meeting")
    meetings = sorted((data / "speech/meeting").glob("*.flac"))
    yield "meetings", [with_turns(read_audio(path), turns[path.stem]) for path in meetings]
    noises = [read_audio(path) for path in sorted((data / "speech/noise").glob("*.flac"))]
    yield "noises", [without_speech(noise) for noise in noises]
    minute = 60 * SAMPLE_RATE_HZ
    for level in (-60, -40, -20):
        white = random.normal(0, 32768 * 10 ** (level / 20), minute)
        yield f"white noise {level} dBFS", [without_speech(to_sound(white))]
    yield "digital silence", [without_speech(np.zeros(minute, np.int16))]
    paths = random.choice(sorted(map(str, (data / "ravdess").glob("*/*.flac"))), CLIPS, False)
    clips = [read_audio(Path(path)) for path in paths]
    yield "RAVDESS", [Piece(clip, None) for clip in clips]
    yield "RAVDESS −20 dB", [Piece(to_sound(clip / 10), None) for clip in clips]
    for ratio in (10, 0):
        mixed = [Piece(mix(clip, noises, ratio_db=ratio, random=random), None) for clip in clips]
        yield f"RAVDESS in noise, {ratio} dB", mixed


def mix(clip: Sound, noises: list[Sound], *, ratio_db: float, random: np.random.Generator) -> Sound:
    """The ratio is between the louder half of the clip, which is speech, and all of the noise."""
    noise = noises[random.integers(len(noises))]
    noise = np.resize(np.roll(noise, random.integers(len(noise))), len(clip)).astype(np.float64)
    power = np.square(clip[: len(clip) // GRID * GRID].reshape(-1, GRID).astype(np.float64))
    speech_power = np.sort(power.mean(1))[len(power) // 2 :].mean()
    gain = np.sqrt(speech_power / np.square(noise).mean() / 10 ** (ratio_db / 10))
    return to_sound(clip + gain * noise)


def read_turns(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Start and length in seconds of each turn, by recording."""
    turns: dict[str, list[tuple[float, float]]] = {}
    for path in folder.glob("*.rttm"):
        for line in path.read_text(encoding="utf-8").splitlines():
            _, recording, _, start, length, *_ = line.split()
            turns.setdefault(recording, []).append((float(start), float(length)))
    return turns


def with_turns(samples: Sound, turns: list[tuple[float, float]]) -> Piece:
    speech_mask = np.zeros(len(samples) // GRID, bool)
    for start, length in turns:
        speech_mask[round(100 * start) : round(100 * (start + length))] = True
    return Piece(samples, speech_mask)


def without_speech(samples: Sound) -> Piece:
    return Piece(samples, np.zeros(len(samples) // GRID, bool))


def runs(mask: Mask, *, join: int) -> list[tuple[int, int]]:
    """Stretches of True, those less than ``join`` apart taken as one."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0]))))
    joined: list[tuple[int, int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if joined and start - joined[-1][1] < join:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def to_sound(samples: NDArray[np.float64]) -> Sound:
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)


if __name__ == "__main__":
    main()
