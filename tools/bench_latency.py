#!/usr/bin/env python3
"""Measures the time from the end of speech to the published emotion.

    tools/bench_latency.py --corpora DIR [--utterances 60]
    tools/bench_latency.py --corpora DIR [--utterances 60] --against TREE

Real utterances (RAVDESS, LibriVox) are played in real time through the whole live path into an
MQTT broker, and a subscriber takes the time. A naive pipeline gets the same utterances with the
machine to itself: it waits for the endpoint, then transcribes, computes batch functionals, encodes
the text and classifies, one step after the other.

With ``--against`` this source tree and another one, such as a worktree of an earlier version, are
compared instead: both programs run at once, and each utterance is sent in real time first to the
one, then to the other. The latencies are those in their own ``end`` events.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiomqtt
import numpy as np
import opensmile
import soundfile
from faster_whisper import WhisperModel
from websockets.asyncio.client import connect

from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, TranscriptConfig, load_config
from stream_hbaf.events import AnyEvent, Info, Utterance
from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.features.whisper_encoder import find_whisper
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.recognizer import Recognizer

GAP_S = 1.2
STAGES = ("vad", "transcript", "acoustic", "text", "classify", "publish", "total")
CHUNK = SAMPLE_RATE_HZ // 50  # samples of a message
LOAD_S = 120.0  # for a program to load its models
TREE = Path(__file__).parents[1]


class Stopwatch:
    """A publisher that notes when each end event is published."""

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
    """The utterances with silence between them, and the noise of a quiet room."""
    gap = np.zeros(int(GAP_S * SAMPLE_RATE_HZ), np.int16)
    stream = np.concatenate([part for sound in sounds for part in (sound, gap)])
    floor = np.random.default_rng(0).normal(0, 3, len(stream))
    return np.clip(stream + floor, -32768, 32767).astype(np.int16)


async def subscribe(port: int, received_at: dict[str, float], ready: asyncio.Event) -> None:
    async with aiomqtt.Client("127.0.0.1", port) as client:
        await client.subscribe("stream_hbaf/#", qos=1)
        ready.set()
        async for message in client.messages:
            if message.topic.matches("stream_hbaf/+/+/utterance"):
                event = json.loads(bytes(message.payload))
                if event["type"] == "end":
                    received_at[event["id"]] = time.monotonic()


async def run_live(
    recognizer: Recognizer, sound: Path, port: int
) -> tuple[list[Recognition], Stopwatch, dict[str, float]]:
    recognitions: list[Recognition] = []
    received_at: dict[str, float] = {}
    stopwatch, ready = Stopwatch(), asyncio.Event()
    async with embedded_broker(port) as broker:
        mqtt = recognizer.config.mqtt.model_copy(update={"url": broker.url})
        info = Info(version="bench", model=recognizer.model, labels=[], licence="", sources=[])
        publisher = MqttPublisher(mqtt, info=info)
        await publisher.connect()
        subscriber = asyncio.create_task(subscribe(port, received_at, ready))
        await ready.wait()
        pipeline = LivePipeline(
            recognizer, [stopwatch, publisher], on_recognition=recognitions.append
        )
        chunk_ms = recognizer.config.source.chunk_ms
        source = FileSource(sound, speed=1.0, chunk_ms=chunk_ms, on_status=lambda *_: None)
        async with source:
            await pipeline.run(source, stop=asyncio.Event())
        await asyncio.sleep(0.5)
        subscriber.cancel()
    return recognitions, stopwatch, received_at


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

    words = timed("transcript", transcribe)
    functionals = timed("acoustic", lambda: smile.process_signal(signal, SAMPLE_RATE_HZ))
    acoustic = Acoustic(
        lld=np.zeros((0, 65), np.float32), functionals=functionals.to_numpy(np.float32)[0]
    )
    transcript = Transcript(text=words, language="en", avg_logprob=0.0, no_speech_prob=0.0)
    text = timed("text", lambda: recognizer.encode_text(transcript))
    state = recognizer.new_dialogue().state
    timed("classify", lambda: recognizer.classify(acoustic=acoustic, text=text, state=state))
    spent["total"] = sum(spent.values())
    return spent


@contextlib.asynccontextmanager
async def program(tree: Path, *, port: int, ends: list[dict[str, float]]) -> AsyncIterator[None]:
    """Run a source tree's command with a WebSocket source; ``ends`` gets its latencies."""
    source = f"bench=ws://127.0.0.1:{port}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stream_hbaf.cli", "--source", source, "--mqtt", "none", "--json"),
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    ready = asyncio.Event()

    async def read() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "status":
                ready.set()
            if event["event"] == "utterance" and event["type"] == "end":
                latency = event["latency_ms"]
                ends.append(latency | {"after": latency["total"] - latency["vad"]})

    reading = asyncio.create_task(read())
    try:
        async with asyncio.timeout(LOAD_S):
            await ready.wait()
        yield
    finally:
        process.terminate()
        await process.wait()
        await reading


async def send(stream: np.ndarray, *, port: int) -> None:
    """Send sound in real time, as a browser does."""
    async with connect(f"ws://127.0.0.1:{port}") as connection:
        await connection.send(json.dumps({"rate": SAMPLE_RATE_HZ, "format": "s16le"}))
        began = time.monotonic()
        for start in range(0, len(stream), CHUNK):
            due = began + (start + CHUNK) / SAMPLE_RATE_HZ
            await asyncio.sleep(due - time.monotonic())
            await connection.send(stream[start : start + CHUNK].astype("<i2").tobytes())


async def compare(other: Path, sounds: list[np.ndarray], *, port: int) -> None:
    """Print the latencies of this source tree and another one, and their ratios."""
    trees = [(TREE, port), (other, port + 1)]
    ends: list[list[dict[str, float]]] = [[], []]
    async with contextlib.AsyncExitStack() as programs:
        for (tree, its_port), its_ends in zip(trees, ends, strict=True):
            await programs.enter_async_context(program(tree, port=its_port, ends=its_ends))
        for _, its_port in trees:
            await send(one_stream(sounds[:1]), port=its_port)
        await asyncio.sleep(GAP_S)
        for its_ends in ends:
            its_ends.clear()  # that was a warm-up
        for sound in sounds:
            for _, its_port in trees:
                await send(one_stream([sound]), port=its_port)
            trees.reverse()
        await asyncio.sleep(GAP_S)  # for the last one's event
    print(f"{len(sounds)} recordings, {len(ends[0])} and {len(ends[1])} utterances\n")
    print("| median, ms | this tree | the other | ratio |\n| --- | --- | --- | --- |")
    for stage in (*STAGES[:-1], "after", "total"):
        here, there = (statistics.median(end[stage] for end in its_ends) for its_ends in ends)
        name = {"after": "**after the endpoint**", "total": "**end of speech → published**"}
        ratio = f"{here / there:.3f}" if there else ""
        print(f"| {name.get(stage, stage)} | {here:.1f} | {there:.1f} | {ratio} |")


def row(name: str, values: list[float]) -> str:
    p95 = float(np.percentile(values, 95))
    return f"| {name} | {statistics.median(values):.1f} | {p95:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--utterances", type=int, default=60)
    parser.add_argument("--port", type=int, default=18830)
    parser.add_argument("--against", type=Path, metavar="TREE", help="another source tree")
    options = parser.parse_args()

    sounds = utterances(options.corpora, options.utterances)
    if options.against is not None:
        asyncio.run(compare(options.against.resolve(), sounds, port=options.port))
        return
    stream = one_stream(sounds)
    with Recognizer(load_config()) as recognizer, tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "stream.wav"
        soundfile.write(sound, stream, SAMPLE_RATE_HZ)
        recognitions, stopwatch, received_at = asyncio.run(
            run_live(recognizer, sound, options.port)
        )

        stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        after: list[float] = []
        for recognition in recognitions:
            event, published_at = stopwatch.ends[recognition.id]
            latency = event.latency_ms
            assert latency is not None
            for stage in STAGES:
                stages[stage].append(getattr(latency, stage))
            confirmed = published_at - (latency.total - latency.vad) / 1000
            after.append((received_at[recognition.id] - confirmed) * 1000)
        total = [a + v for a, v in zip(after, stages["vad"], strict=True)]

        smile = opensmile.Smile(
            feature_set=opensmile.FeatureSet.ComParE_2016,
            feature_level=opensmile.FeatureLevel.Functionals,
        )
        whisper = WhisperModel(
            str(find_whisper(TranscriptConfig().model) or TranscriptConfig().model),
            compute_type="int8",
            cpu_threads=2,
        )
        spans = [stream[r.finish.start : r.finish.end] for r in recognitions]
        sides = {}
        for beam in (1, 5):
            naive(recognizer, smile, whisper, spans[0], beam=beam)  # warm up
            sides[beam] = [naive(recognizer, smile, whisper, s, beam=beam) for s in spans]

    print(f"{len(recognitions)} utterances in {len(sounds)} recordings\n")
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
