#!/usr/bin/env python3
"""Measures end of speech → event with each way to find its end, without and with voices.

    tools/bench_endpoints.py --corpora DIR [--engine NAME …] [--utterances 26] [--set KEY=VALUE]

The utterances of ``bench_latency.py`` are played in real time through the whole live path, once
with each engine; the first one is what the others are compared with. Split utterances are those
beyond one a recording. The CPU is that of the whole process, broker and subscriber included.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import soundfile
from bench_latency import STAGES, one_stream, row, run_live, utterances

from stream_hbaf.config import SAMPLE_RATE_HZ, load_config
from stream_hbaf.events import Trigger
from stream_hbaf.recognizer import Recognizer

ENGINES = {
    f"{engine}{', voices' * voices}": {
        "endpoint.engine": engine,
        "speakers.engine": "campplus" if voices else "none",
    }
    for engine in ("silence", "pause", "turn")
    for voices in (False, True)
}


@dataclass(frozen=True)
class Run:
    """One engine's figures."""

    stages: dict[str, list[float]]  # ms, by utterance
    received: list[float]  # ms from the end of speech to the subscriber
    triggers: list[Trigger]
    cpu: float  # percent of a core


def run(sound: Path, *, seconds: float, port: int, settings: dict[str, str]) -> Run:
    with Recognizer(load_config(overrides=settings)) as recognizer:
        began = time.process_time()
        recognitions, stopwatch, received_at = asyncio.run(run_live(recognizer, sound, port))
        spent = time.process_time() - began
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    received = []
    for recognition in recognitions:
        event, published_at = stopwatch.ends[recognition.id]
        assert event.latency_ms is not None
        for stage in STAGES:
            stages[stage].append(getattr(event.latency_ms, stage))
        delivery_ms = (received_at[recognition.id] - published_at) * 1000
        received.append(event.latency_ms.total + delivery_ms)
    triggers = [recognition.finish.trigger for recognition in recognitions]
    return Run(stages, received, triggers, 100 * spent / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--engine", choices=ENGINES, action="append", help="all by default")
    parser.add_argument("--utterances", type=int, default=26)
    parser.add_argument("--port", type=int, default=18832)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    options = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in options.settings)

    sounds = utterances(options.corpora, options.utterances)
    stream = one_stream(sounds)
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "stream.wav"
        soundfile.write(sound, stream, SAMPLE_RATE_HZ)
        runs = {
            engine: run(
                sound,
                seconds=len(stream) / SAMPLE_RATE_HZ,
                port=options.port,
                settings=settings | ENGINES[engine],
            )
            for engine in options.engine or ENGINES
        }
    for engine, one in runs.items():
        counts = {trigger: one.triggers.count(trigger) for trigger in sorted(set(one.triggers))}
        found = f"{len(one.triggers)} utterances in {len(sounds)} recordings, ended by {counts}"
        print(f"{engine}: {found}; CPU {one.cpu:.1f} % of a core\n")
        print(f"| {engine}, ms | median | p95 |\n| --- | --- | --- |")
        for stage in STAGES:
            print(row(stage, one.stages[stage]))
        print(row("**end of speech → at the subscriber**", one.received) + "\n")
    (name, first), *others = runs.items()
    for engine, one in others:
        ratio = statistics.median(one.received) / statistics.median(first.received)
        print(f"{engine} / {name}: {ratio:.3f}; CPU {one.cpu - first.cpu:+.1f} % of a core")


if __name__ == "__main__":
    main()
