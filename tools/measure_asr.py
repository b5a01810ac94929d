"""How much silence Whisper needs after an utterance: word error rate and time for several windows.

    tools/measure_asr.py [--ravdess FOLDER] [--tess FOLDER] [--clips 50] [--margins 2 5 8 12]

Measures the recordings of the tests and, where given, clips of RAVDESS (two known sentences) and
TESS ("say the word ..."). Every utterance is cut as the live path cuts it and goes through all
windows in turn, so that whatever else the machine does falls on all alike.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jiwer
import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.audio import decode_audio
from numpy.typing import NDArray

from stream_hbaf.config import SegmenterConfig, TranscriptConfig, VadConfig
from stream_hbaf.features import whisper as transcript
from stream_hbaf.features.whisper_encoder import resolve_whisper
from stream_hbaf.speech.segmenter import Finish, Segmenter
from stream_hbaf.speech.vad import SileroDetector

RECORDINGS = Path(__file__).parents[1] / "tests" / "recordings"
SENTENCES = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
JFK = (
    "And so, my fellow Americans, ask not what your country can do for you, "
    "ask what you can do for your country."
)
Clip = tuple[str, Path, str]  # corpus, file, words
Read = Callable[[NDArray[np.int16]], str]


def main() -> None:
    options = _parse()
    clips = _recordings() + _clips(options)
    readers = _readers(options.model, margins=options.margins)
    words: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    for corpus, file, reference in clips:
        sound = _cut(np.round(decode_audio(str(file)) * 32768).clip(-32768, 32767).astype(np.int16))
        for name, read in readers.items():
            began = time.perf_counter()
            text = read(sound)
            times[name].append((time.perf_counter() - began) * 1000)
            words[name, corpus].append((_plain(reference), _plain(text)))
    corpora = sorted({corpus for corpus, *_ in clips})
    print("| window |", " | ".join(f"WER {corpus}" for corpus in corpora), "| p50 ms | p95 ms |")
    for name in readers:
        rates = [
            jiwer.wer([r for r, _ in words[name, c]], [h for _, h in words[name, c]])
            for c in corpora
        ]
        p95 = statistics.quantiles(times[name], n=20)[-1]
        cells = [f"{rate:.3f}" for rate in rates]
        print(
            "|", " | ".join([name, *cells, f"{statistics.median(times[name]):.0f}", f"{p95:.0f}"])
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ravdess", type=Path)
    parser.add_argument("--tess", type=Path)
    parser.add_argument("--clips", type=int, default=50, help="of each corpus, drawn with seed 0")
    parser.add_argument("--margins", type=float, nargs="+", default=[2, 5, 8, 12])
    parser.add_argument("--model", default=TranscriptConfig().model)
    return parser.parse_args()


def _readers(model: str, *, margins: list[float]) -> dict[str, Read]:
    """faster-whisper itself, bare windows of each margin, and what the live path does."""
    ours = transcript.Transcriber(TranscriptConfig(model=model))
    whole = WhisperModel(resolve_whisper(model), compute_type="int8", cpu_threads=2)

    def plain(beam: int) -> Read:
        def read(sound: NDArray[np.int16]) -> str:
            segments, _ = whole.transcribe(
                sound.astype(np.float32) / 32768, language="en", beam_size=beam
            )
            return " ".join(segment.text for segment in segments)

        return read

    def window(margin: float) -> Read:
        def read(sound: NDArray[np.int16]) -> str:
            length = transcript._window_s(sound) - transcript.MARGIN_S + margin
            encoded = ours._encoder.encode(sound, window_s=min(30.0, length))
            return ours._generate(encoded, limit=transcript._token_limit(sound)).text

        return read

    readers = {"faster-whisper, beam 5": plain(5), "faster-whisper, beam 1": plain(1)}
    readers |= {f"utterance + {margin:g} s": window(margin) for margin in margins}
    readers["30 s"] = window(30.0)
    return readers | {"Transcriber.final": lambda sound: ours.final(sound, speech_score=1.0).text}


def _recordings() -> list[Clip]:
    librivox = sorted(RECORDINGS.glob("sense*.flac"))
    read = [("LibriVox", file, file.with_suffix(".txt").read_text()) for file in librivox]
    return [*read, ("JFK", RECORDINGS / "jfk.flac", JFK)]


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


def _cut(sound: NDArray[np.int16]) -> NDArray[np.int16]:
    """From the first utterance's start to the last one's end."""
    detector = SileroDetector()
    segmenter = Segmenter(SegmenterConfig(), VadConfig(), frame_samples=detector.frame_samples)
    actions = [action for score in detector.feed(sound) for action in segmenter.feed(float(score))]
    found = [action for action in actions + segmenter.flush() if isinstance(action, Finish)]
    return sound[found[0].start : found[-1].end] if found else sound


def _plain(text: str) -> str:
    """Lower case, no punctuation; an empty text counts as one wrong word, as jiwer needs one."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return " ".join(kept.split()) or "-"


if __name__ == "__main__":
    main()
