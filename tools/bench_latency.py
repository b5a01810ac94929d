#!/usr/bin/env python3
"""End of speech to published emotion, live, beside a naive pipeline, in one run.

    tools/bench_latency.py --corpora DIR [--utterances 50]

Real utterances (RAVDESS, LibriVox) are played in real time through the whole live path into an
MQTT broker, and a subscriber takes the time. The naive pipeline gets the same utterances with
the machine to itself: it waits for the endpoint, then transcribes, computes batch functionals,
encodes the words and classifies, one after the other, as glue code would.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiomqtt
import numpy as np
import opensmile
import soundfile
from faster_whisper import WhisperModel

from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, TranscriptConfig, load_config
from stream_hbaf.events import AnyEvent, Info, Model, Utterance
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.features.whisper_encoder import resolve_whisper
from stream_hbaf.live.pipeline import LivePipeline, Recognition
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.recognizer import Recognizer

GAP_S = 1.2
STAGES = ("vad", "transcript", "acoustic", "text", "classify", "publish", "total")


class Stopwatch:
    """A publisher that notes when each end event is handed over."""

    def __init__(self) -> None:
        self.ends: dict[str, tuple[Utterance, float]] = {}

    async def send(self, event: AnyEvent) -> None:
        if isinstance(event, Utterance) and event.type == "end":
            self.ends[event.id] = event, time.monotonic()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        pass


def utterances(corpora: Path, count: int) -> list[np.ndarray]:
    clips = sorted(corpora.glob("ravdess/Actor_2[1-4]/*.flac"))
    read = sorted(corpora.glob("speech/librivox/*.flac"))
    chosen = random.Random(0).sample(clips, max(0, count - len(read))) + read
    random.Random(1).shuffle(chosen)
    return [read_audio(path) for path in chosen]


def one_stream(sounds: list[np.ndarray]) -> np.ndarray:
    """The utterances with room between them, over a floor of noise as of a quiet room."""
    gap = np.zeros(int(GAP_S * SAMPLE_RATE_HZ), np.int16)
    stream = np.concatenate([part for sound in sounds for part in (sound, gap)])
    floor = np.random.default_rng(0).normal(0, 3, len(stream))
    return np.clip(stream + floor, -32768, 32767).astype(np.int16)


async def subscribe(port: int, arrivals: dict[str, float], ready: asyncio.Event) -> None:
    async with aiomqtt.Client("127.0.0.1", port) as client:
        await client.subscribe("stream_hbaf/#", qos=1)
        ready.set()
        async for message in client.messages:
            if message.topic.matches("stream_hbaf/+/+/utterance"):
                event = json.loads(bytes(message.payload))
                if event["type"] == "end":
                    arrivals[event["id"]] = time.monotonic()


async def run_live(
    recognizer: Recognizer, sound: Path, port: int
) -> tuple[list[Recognition], Stopwatch, dict[str, float]]:
    recognitions: list[Recognition] = []
    stopwatch, arrivals, ready = Stopwatch(), {}, asyncio.Event()
    async with embedded_broker(port) as broker:
        mqtt = recognizer.config.mqtt.model_copy(update={"url": broker.url})
        bundle = recognizer.bundle
        model = Model(id=bundle.id, sha256=bundle.sha256)
        info = Info(version="bench", model=model, labels=[], licence="", sources=[])
        publisher = MqttPublisher(mqtt, info=info)
        await publisher.connect()
        listener = asyncio.create_task(subscribe(port, arrivals, ready))
        await ready.wait()
        pipeline = LivePipeline(
            recognizer, [stopwatch, publisher], on_recognition=recognitions.append
        )
        chunk_ms = recognizer.config.source.chunk_ms
        source = FileSource(sound, speed=1.0, chunk_ms=chunk_ms, on_status=lambda *_: None)
        async with source:
            await pipeline.run(source, stop=asyncio.Event())
        await asyncio.sleep(0.5)
        listener.cancel()
    return recognitions, stopwatch, arrivals


def naive(
    recognizer: Recognizer,
    smile: opensmile.Smile,
    whisper: WhisperModel,
    samples: np.ndarray,
    *,
    beam: int,
) -> dict[str, float]:
    """Milliseconds after the endpoint, stage by stage."""
    spent: dict[str, float] = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        spent[stage] = (time.perf_counter() - began) * 1000
        return result

    signal = samples.astype(np.float32) / 32768

    def transcribe() -> str:
        segments, _ = whisper.transcribe(signal, language="en", beam_size=beam)
        return "".join(segment.text for segment in segments).strip()

    text = timed("transcript", transcribe)
    functionals = timed("acoustic", lambda: smile.process_signal(signal, SAMPLE_RATE_HZ))
    acoustic = Acoustic(
        lld=np.zeros((0, 65), np.float32), functionals=functionals.to_numpy(np.float32)[0]
    )
    transcript = Transcript(text=text, language="en", avg_logprob=0.0, no_speech_prob=0.0)
    text = timed("text", lambda: recognizer.encode_text(transcript))
    state = recognizer.new_dialogue().state
    timed("classify", lambda: recognizer.classify(acoustic=acoustic, text=text, state=state))
    spent["total"] = sum(spent.values())
    return spent


def row(name: str, values: list[float]) -> str:
    p95 = float(np.percentile(values, 95))
    return f"| {name} | {statistics.median(values):.1f} | {p95:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--utterances", type=int, default=60)
    parser.add_argument("--port", type=int, default=18830)
    options = parser.parse_args()

    sounds = utterances(options.corpora, options.utterances)
    stream = one_stream(sounds)
    with Recognizer(load_config()) as recognizer, tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "stream.wav"
        soundfile.write(sound, stream, SAMPLE_RATE_HZ)
        recognitions, stopwatch, arrivals = asyncio.run(run_live(recognizer, sound, options.port))

        after, stages = [], {stage: [] for stage in STAGES}
        for recognition in recognitions:
            event, handed = stopwatch.ends[recognition.id]
            latency = event.latency_ms
            assert latency is not None
            for stage in STAGES:
                stages[stage].append(getattr(latency, stage))
            confirmed = handed - (latency.total - latency.vad) / 1000
            after.append((arrivals[recognition.id] - confirmed) * 1000)
        total = [a + v for a, v in zip(after, stages["vad"], strict=True)]

        smile = opensmile.Smile(
            feature_set=opensmile.FeatureSet.ComParE_2016,
            feature_level=opensmile.FeatureLevel.Functionals,
        )
        whisper = WhisperModel(
            resolve_whisper(TranscriptConfig().model), compute_type="int8", cpu_threads=2
        )
        spans = [stream[r.finish.start : r.finish.end] for r in recognitions]
        sides = {}
        for beam in (1, 5):
            naive(recognizer, smile, whisper, spans[0], beam=beam)  # warm up
            sides[beam] = [naive(recognizer, smile, whisper, s, beam=beam) for s in spans]

    print(f"{len(recognitions)} utterances heard in {len(sounds)} recordings\n")
    print("| live, ms | median | p95 |\n| --- | --- | --- |")
    for stage in STAGES[:-1]:
        print(row(stage, stages[stage]))
    print(row("**after the endpoint → at the subscriber**", after))
    print(row("**end of speech → at the subscriber**", total))
    for beam, side in sides.items():
        print(
            f"\n| naive after the endpoint, beam {beam}, ms | median | p95 |\n| --- | --- | --- |"
        )
        for stage in side[0]:
            print(row(stage, [spent[stage] for spent in side]))
        ratio = statistics.median(after) / statistics.median([s["total"] for s in side])
        print(f"\nlive / naive after the endpoint: {ratio:.3f}")


if __name__ == "__main__":
    main()
