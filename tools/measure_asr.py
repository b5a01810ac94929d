#!/usr/bin/env python3
"""How much silence Whisper needs after an utterance: word error rate and time of several windows.

    tools/measure_asr.py [--ravdess FOLDER] [--tess FOLDER] [--clips 50] [--margins 2 5 8 12]

Clips: the recordings of the tests and, where given, samples of RAVDESS (two sentences) and TESS
("say the word ..."). Each is cut as the live path cuts it, and decoded in every window in turn, so
that other load on the machine falls on all alike.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import Config, TranscriptConfig
from stream_hbaf.evaluation.metrics import word_error_rate
from stream_hbaf.features import whisper as transcript
from stream_hbaf.features.whisper_encoder import LONGEST_S, MARGIN_S, find_whisper, window_of
from stream_hbaf.speech.detector import UtteranceDetector
from stream_hbaf.speech.segmenter import Finish

RECORDINGS = Path(__file__).parents[1] / "tests" / "recordings"
SENTENCES = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
JFK = (
    "And so, my fellow Americans, ask not what your country can do for you, "
    "ask what you can do for your country."
)
Clip = tuple[str, Path, str]  # corpus, file, reference text
Int16 = NDArray[np.int16]
Decode = Callable[[Int16], str]


def main() -> None:
    options = _parse()
    clips = _recordings() + _clips(options)
    decoders = _decoders(options.model, margins=options.margins)
    references: dict[str, list[str]] = defaultdict(list)
    hypotheses: dict[tuple[str, str], list[str]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    for corpus, file, reference in clips:
        samples = _cut(read_audio(file))
        references[corpus].append(reference)
        for name, decode in decoders.items():
            began = time.perf_counter()
            hypotheses[name, corpus].append(decode(samples))
            times[name].append((time.perf_counter() - began) * 1000)
    corpora = sorted(references)
    print("| window |", " | ".join(f"WER {corpus}" for corpus in corpora), "| p50 ms | p95 ms |")
    for name in decoders:
        rates = [f"{word_error_rate(references[c], hypotheses[name, c]):.3f}" for c in corpora]
        p95 = statistics.quantiles(times[name], n=20)[-1]
        cells = [name, *rates, f"{statistics.median(times[name]):.0f}", f"{p95:.0f}"]
        print("| " + " | ".join(cells) + " |")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ravdess", type=Path)
    parser.add_argument("--tess", type=Path)
    parser.add_argument("--clips", type=int, default=50, help="of each corpus, drawn with seed 0")
    parser.add_argument("--margins", type=float, nargs="+", default=[2, 5, 8, 12], help="seconds")
    parser.add_argument("--model", default=TranscriptConfig().model)
    return parser.parse_args()


def _decoders(model: str, *, margins: list[float]) -> dict[str, Decode]:
    """faster-whisper itself, bare windows of each margin, and what the live path does."""
    ours = transcript.Transcriber(TranscriptConfig(model=model))
    whole = WhisperModel(str(find_whisper(model) or model), compute_type="int8", cpu_threads=2)

    def plain(beam: int) -> Decode:
        def decode(samples: Int16) -> str:
            signal = samples.astype(np.float32) / 32768
            segments, _ = whole.transcribe(signal, language="en", beam_size=beam)
            return " ".join(segment.text for segment in segments)

        return decode

    def window(margin_s: float) -> Decode:
        def decode(samples: Int16) -> str:
            window_s = min(LONGEST_S, window_of(samples) - MARGIN_S + margin_s)
            encoded = ours._encoder.encode(samples, window_s=window_s)
            return ours._generate(encoded, limit=transcript._token_limit(samples)).text

        return decode

    decoders = {"faster-whisper, beam 5": plain(5), "faster-whisper, beam 1": plain(1)}
    decoders |= {f"utterance + {margin:g} s": window(margin) for margin in margins}
    decoders["30 s"] = window(LONGEST_S)
    return decoders | {"live path": lambda samples: ours.final(samples, speech_score=1.0).text}


def _recordings() -> list[Clip]:
    librivox = sorted(RECORDINGS.glob("sense*.flac"))
    texts = [("LibriVox", file, file.with_suffix(".txt").read_text()) for file in librivox]
    return [*texts, ("JFK", RECORDINGS / "jfk.flac", JFK)]


def _clips(options: argparse.Namespace) -> list[Clip]:
    draw = random.Random(0)
    clips: list[Clip] = []
    if options.ravdess:
        for file in draw.sample(sorted(options.ravdess.glob("*/*.flac")), options.clips):
            clips.append(("RAVDESS", file, SENTENCES[file.stem.split("-")[4]]))
    if options.tess:
        for file in draw.sample(sorted(options.tess.glob("*/*.flac")), options.clips):
            clips.append(("TESS", file, "say the word " + file.stem.split("_")[1]))
    return clips


def _cut(samples: Int16) -> Int16:
    """From the first utterance's start to the last one's end."""
    detector = UtteranceDetector(Config())
    actions = [*detector.feed(samples), *detector.flush(resume_at=0)]
    found = [action for action in actions if isinstance(action, Finish)]
    return samples[found[0].start : found[-1].end] if found else samples


if __name__ == "__main__":
    main()
