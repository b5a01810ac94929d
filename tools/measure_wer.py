#!/usr/bin/env python3
"""Word error rate through the live path, beside faster-whisper given the whole file.

    tools/measure_wer.py --corpora DIR [--clips 120]

RAVDESS's two sentences (a seeded sample over all actors and emotions) and the LibriVox clips.
The live path cuts with voice activity, decodes at pauses and gates; its words are all of a clip's
utterances in a row.
"""

import argparse
import asyncio
import random
import re
from pathlib import Path

import jiwer
from faster_whisper import WhisperModel

from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.config import TranscriptConfig, load_config
from stream_hbaf.features.whisper_encoder import resolve_whisper
from stream_hbaf.live.pipeline import LivePipeline, Recognition
from stream_hbaf.recognizer import Recognizer

STATEMENTS = {"01": "kids are talking by the door", "02": "dogs are sitting by the door"}


def normal(text: str) -> str:
    return " ".join(re.findall(r"[a-z']+", text.lower().replace("-", " "))) or "nothing"


def clips(corpora: Path, count: int) -> dict[str, list[tuple[Path, str]]]:
    acted = sorted(corpora.glob("ravdess/Actor_*/*.flac"))
    chosen = sorted(random.Random(0).sample(acted, count))
    read = sorted(corpora.glob("speech/librivox/*.flac"))
    return {
        "RAVDESS": [(path, STATEMENTS[path.stem.split("-")[4]]) for path in chosen],
        "LibriVox": [(path, path.with_suffix(".txt").read_text()) for path in read],
    }


def live_words(recognizer: Recognizer, path: Path) -> str:
    found: list[Recognition] = []

    async def run() -> None:
        pipeline = LivePipeline(recognizer, [], on_recognition=found.append)
        source = FileSource(path, speed=None, chunk_ms=320, on_status=lambda *_: None)
        async with source:
            await pipeline.run(source, stop=asyncio.Event())

    asyncio.run(run())
    return " ".join(r.text.transcript.text for r in found if r.text is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=120)
    options = parser.parse_args()
    whisper = WhisperModel(
        resolve_whisper(TranscriptConfig().model), compute_type="int8", cpu_threads=2
    )
    print("| words | clips | live path | whole file, beam 1 | whole file, beam 5 |")
    print("| --- | --- | --- | --- | --- |")
    with Recognizer(load_config()) as recognizer:
        for name, chosen in clips(options.corpora, options.clips).items():
            said = [normal(words) for _, words in chosen]
            sides = [[live_words(recognizer, path) for path, _ in chosen]]
            for beam in (1, 5):
                sides.append([])
                for path, _ in chosen:
                    signal = read_audio(path).astype("float32") / 32768
                    segments, _ = whisper.transcribe(signal, language="en", beam_size=beam)
                    sides[-1].append(" ".join(segment.text for segment in segments))
            rates = [jiwer.wer(said, [normal(words) for words in side]) for side in sides]
            print(f"| {name} | {len(said)} | " + " | ".join(f"{r:.3f}" for r in rates) + " |")


if __name__ == "__main__":
    main()
