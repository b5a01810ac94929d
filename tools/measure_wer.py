#!/usr/bin/env python3
"""Word error rate of the live path, beside faster-whisper given the whole file.

    tools/measure_wer.py --corpora DIR [--clips 120]

Clips: a seeded sample of RAVDESS over all actors and emotions (two sentences), and LibriVox. The
live path cuts with voice activity detection, decodes at pauses and gates; its transcript is that of
all utterances of a clip, joined.
"""

import argparse
import random
from pathlib import Path

from faster_whisper import WhisperModel

from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.config import TranscriptConfig, load_config
from stream_hbaf.evaluation.metrics import word_error_rate
from stream_hbaf.features.whisper_encoder import find_whisper
from stream_hbaf.live.pipeline import recognise_source
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.recognizer import Recognizer

SENTENCES = {"01": "kids are talking by the door", "02": "dogs are sitting by the door"}


def read_clips(corpora: Path, *, count: int) -> dict[str, list[tuple[Path, str]]]:
    """Files with their reference texts, by corpus."""
    acted = sorted(corpora.glob("ravdess/Actor_*/*.flac"))
    chosen = sorted(random.Random(0).sample(acted, count))
    librivox = sorted(corpora.glob("speech/librivox/*.flac"))
    return {
        "RAVDESS": [(path, SENTENCES[path.stem.split("-")[4]]) for path in chosen],
        "LibriVox": [(path, path.with_suffix(".txt").read_text()) for path in librivox],
    }


def transcribe_live(recognizer: Recognizer, path: Path) -> str:
    found: list[Recognition] = []
    source = FileSource(path, speed=None, chunk_ms=320, on_status=lambda *_: None)
    recognise_source(recognizer, source, on_recognition=found.append)
    return " ".join(one.text.transcript.text for one in found if one.text is not None)


def transcribe_file(whisper: WhisperModel, path: Path, *, beam: int) -> str:
    signal = read_audio(path).astype("float32") / 32768
    segments, _ = whisper.transcribe(signal, language="en", beam_size=beam)
    return " ".join(segment.text for segment in segments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=120, help="of RAVDESS (default: 120)")
    options = parser.parse_args()
    name = TranscriptConfig().model
    whisper = WhisperModel(str(find_whisper(name) or name), compute_type="int8", cpu_threads=2)
    print("| corpus | clips | live path | whole file, beam 1 | whole file, beam 5 |")
    print("| --- | --- | --- | --- | --- |")
    with Recognizer(load_config()) as recognizer:
        for corpus, clips in read_clips(options.corpora, count=options.clips).items():
            references = [text for _, text in clips]
            columns = [[transcribe_live(recognizer, path) for path, _ in clips]]
            columns += [
                [transcribe_file(whisper, path, beam=beam) for path, _ in clips] for beam in (1, 5)
            ]
            rates = [f"{word_error_rate(references, column):.3f}" for column in columns]
            print("| " + " | ".join([corpus, str(len(clips)), *rates]) + " |", flush=True)


if __name__ == "__main__":
    main()
