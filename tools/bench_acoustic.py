"""Measures the time from the end of speech to the acoustic features, streamed and in batch.

Speech of 2, 8 and 20 s is fed in chunks of 32 ms, each when openSMILE has processed the one before,
as it has in a live utterance (--realtime: at the pace of speech). Fails if the functionals of both
ways differ. Then, on one core, what is computed at a pause for bundles that take it: the GE2E
embedding, at most 35 ms for 3 s, and prosody. Usage: python tools/bench_acoustic.py [--audio PATH]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import opensmile
import torch
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.features.acoustic import Acoustic, AcousticExtractor, AcousticSession
from stream_hbaf.features.representations import open_representation
from stream_hbaf.prediction import BLOCKS

CHUNK = 32 * SAMPLE_RATE_HZ // 1000
LENGTHS_S = (2, 8, 20)
BLOCK_LENGTHS_S = (3, 8, 20)
BLOCK_TARGETS_MS = {"ge2e": 35.0}  # for 3 s
TARGET = 0.2  # of the batch call's time
FRAMES_LATE = 3  # rows that openSMILE holds back for smoothing
RECORDINGS = Path(__file__).parents[1] / "tests" / "recordings"

Sound = NDArray[np.int16]


def speech(path: Path | None) -> Sound:
    """At least 20 s of speech: the given recording, or the tests' sentences one after another."""
    paths = [path] if path else [RECORDINGS / "jfk.flac", *sorted(RECORDINGS.glob("sense_*.flac"))]
    samples = np.concatenate([read_audio(each) for each in paths])
    longest = max(LENGTHS_S) * SAMPLE_RATE_HZ
    return np.tile(samples, -(-longest // len(samples)))


def wait_for_rows(session: AcousticSession, fed: int) -> None:
    """Wait for the rows of all frames (60 ms, every 10 ms) that have been fed."""
    due = (fed * 1000 // SAMPLE_RATE_HZ - 60) // 10 + 1 - FRAMES_LATE
    deadline = time.monotonic() + 0.1  # pitch tracking may hold back more
    while len(session._engine.rows) < due and time.monotonic() < deadline:
        time.sleep(0.0005)


def streamed(
    extractor: AcousticExtractor, samples: Sound, *, realtime: bool
) -> tuple[float, Acoustic | None]:
    """The seconds that ``finish`` takes, and its result."""
    with extractor.open() as session:
        began = time.monotonic()
        for start in range(0, len(samples), CHUNK):
            session.feed(samples[start : start + CHUNK])
            fed = min(start + CHUNK, len(samples))
            if realtime:
                time.sleep(max(0.0, began + fed / SAMPLE_RATE_HZ - time.monotonic()))
            else:
                wait_for_rows(session, fed)
        began = time.perf_counter()
        result = session.finish()
        return time.perf_counter() - began, result


def batch(smile: opensmile.Smile, samples: Sound) -> tuple[float, NDArray[np.float32]]:
    """The seconds that the package's call takes on the whole utterance, and its functionals."""
    signal = samples.astype(np.float32) / 32768
    began = time.perf_counter()
    table = smile.process_signal(signal, SAMPLE_RATE_HZ)
    return time.perf_counter() - began, table.to_numpy()[0]


def time_blocks(sound: Sound, *, runs: int) -> bool:
    """Print the time of each representation of whole utterances; whether one misses its target."""
    torch.set_num_threads(1)  # as in the recogniser
    missed = False
    print(f"\n| at the pause | {' | '.join(f'{n} s' for n in BLOCK_LENGTHS_S)} |")
    print(f"| --- |{' --- |' * len(BLOCK_LENGTHS_S)}")
    for name in BLOCKS:
        representation = open_representation(name)
        cells = []
        for length_s in BLOCK_LENGTHS_S:
            samples, spent = sound[: length_s * SAMPLE_RATE_HZ], []
            for _ in range(runs):
                began = time.perf_counter()
                representation.extract(samples)
                spent.append(time.perf_counter() - began)
            cells.append(statistics.median(spent) * 1e3)
        missed |= cells[0] > BLOCK_TARGETS_MS.get(name, cells[0])
        print(f"| {name} | {' | '.join(f'{ms:.0f} ms' for ms in cells)} |")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audio", type=Path, help="a recording of speech")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--realtime", action="store_true", help="feed at the pace of speech")
    options = parser.parse_args()

    sound = speech(options.audio)
    smile = opensmile.Smile(opensmile.FeatureSet.ComParE_2016, opensmile.FeatureLevel.Functionals)
    missed = False
    print("| utterance | streamed, after the end | batch | ratio |")
    print("| --- | --- | --- | --- |")
    with AcousticExtractor() as extractor:
        for length_s in LENGTHS_S:
            samples = sound[: length_s * SAMPLE_RATE_HZ]
            ours, theirs = [], []
            for _ in range(options.runs):
                seconds, result = streamed(extractor, samples, realtime=options.realtime)
                ours.append(seconds)
                seconds, functionals = batch(smile, samples)
                theirs.append(seconds)
                if result is None or not np.array_equal(result.functionals, functionals):
                    sys.exit(f"{length_s} s: streamed and batch differ")
            mine, other = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
            missed |= mine > TARGET * other
            print(f"| {length_s} s | {mine:.1f} ms | {other:.1f} ms | {mine / other:.2f} |")
    missed |= time_blocks(sound, runs=options.runs)
    print(f"\nmedians of {options.runs} runs; at most {TARGET} and {BLOCK_TARGETS_MS} were wanted")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
