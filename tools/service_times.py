"""How long each model takes for an utterance on this machine, for a simulation of many streams.

Each is measured alone, in CPU time of the process, on what the live segmenter cuts from the talk
that ``bench_streams.py`` plays: whole utterances and their beginnings up to each pause.
"""

import asyncio
import base64
import json
import os
import platform
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from talks import CHUNK, RATE_HZ, Int16, Talk, talk

PEOPLE = 40  # whose talk is kept, as speech scores
TALK_S = 40.0  # of each
TRIED = 48  # utterances that each model is timed on
RATES_S, ROUNDS = 2.0, 3  # that each number of threads computes together, and how often
SILENT, SILENT_S = 8, 6.0  # streams and seconds that the event loop is measured with
STEADY_S = 0.05  # without CPU time after which openSMILE has caught up
WARM_UPS = 3
PACE_S = 2.0  # that the machine's pace is measured for
PACE_CLIP_S, PACE_CLIPS = 3, 6  # seconds of sound at once, and how many different ones

Job = tuple[Callable[[Any], object], list[Any]]  # a function, and what it is called with


@dataclass(frozen=True)
class Cost:
    """Seconds for an utterance: a line over its length, times one of ``spread``."""

    base_s: float
    per_s: float
    spread: tuple[float, ...]

    def draw(self, length_s: float, chance: random.Random) -> float:
        """Seconds for an utterance of that length."""
        return (self.base_s + self.per_s * length_s) * chance.choice(self.spread)


@dataclass(frozen=True)
class ServiceTimes:
    """What a simulation needs to know of a machine, its models and how people talk."""

    asr: str
    machine: str
    measured_at: str
    pace: float  # of the machine when this was measured; see ``pace``
    rates: tuple[float, ...]  # what 1, 2, … threads compute together, of one that is alone
    vad_s: float  # a frame
    hop_s: float  # of the event loop, a call of a model
    costs: dict[str, Cost]
    talk: tuple[str, ...]  # of each person, base64 of a byte for each frame's speech score

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "ServiceTimes":
        """Read what ``save`` has written."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        costs = {name: Cost(**cost) for name, cost in fields.pop("costs").items()}
        return cls(costs=costs, **fields)

    def scores(self, person: int) -> np.ndarray:
        """The speech score of each frame of a person's talk, [n] in [0, 1]."""
        kept = base64.b64decode(self.talk[person % len(self.talk)])
        return np.frombuffer(kept, np.uint8) / 255


def measure(recognizer: Any, corpora: Path) -> ServiceTimes:
    """Measure everything, in a minute or two on a quiet machine."""
    scores, utterances, vad_s = listen(recognizer, corpora)
    tried = random.Random(0).sample(utterances, min(TRIED, len(utterances)))
    before = pace(recognizer, corpora)
    costs = dict(model_costs(recognizer, tried))
    between = pace(recognizer, corpora)
    rates = measured_rates(recognizer, tried)
    return ServiceTimes(
        asr=recognizer.config.transcript.model,
        machine=f"{os.cpu_count()} × {processor()}",
        measured_at=time.strftime("%Y-%m-%d"),
        pace=(before + between) / 2,
        rates=rates,
        vad_s=vad_s,
        hop_s=max(0.0, silent_chunk_s(recognizer) - 2 * vad_s),
        costs=costs,
        talk=tuple(base64.b64encode(one).decode() for one in scores),
    )


def processor() -> str:
    """The processor's name, where /proc tells it."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def listen(recognizer: Any, corpora: Path) -> tuple[list[bytes], list[Int16], float]:
    """Everybody's speech scores, what is transcribed of them, and the VAD's seconds a frame."""
    from stream_hbaf.speech.detector import Feed, UtteranceDetector
    from stream_hbaf.speech.segmenter import Begin, Pause

    scores, utterances, spent, frames = [], [], 0.0, 0
    for person in range(PEOPLE):
        sound = talk(corpora, stream=person, seconds=TALK_S)
        detector = UtteranceDetector(recognizer.config)
        kept = bytearray()
        pieces: list[Int16] = []
        size = detector.vad.frame_samples
        began = time.process_time()
        for start in range(0, len(sound) - size + 1, size):
            for action in detector.feed(sound[start : start + size]):
                match action:
                    case Begin():
                        pieces = []
                    case Feed(samples=samples):
                        pieces.append(samples)
                    case Pause():
                        utterances.append(np.concatenate(pieces))
            kept.append(round(255 * detector.score))
        spent += time.process_time() - began
        frames += len(kept)
        scores.append(bytes(kept))
    return scores, utterances, spent / frames


def model_costs(recognizer: Any, tried: list[Int16]) -> Iterator[tuple[str, Cost]]:
    """The cost of each model, by the name of what it does."""
    from stream_hbaf.features.whisper_encoder import window_of

    transcriber, front_end = recognizer.transcriber, recognizer.acoustic
    encoder, embedder = transcriber._encoder, transcriber._acoustic_encoder
    length_s = [len(samples) / RATE_HZ for samples in tried]
    encode = timed(tried, lambda one: encoder.encode(one, window_s=window_of(one)))
    embed = [0.0] * len(tried) if embedder is encoder else timed(tried, embedder.embed)
    final = timed(tried, lambda one: transcriber.final(one, 1.0))
    decode = [max(0.0, a - b - c) for a, b, c in zip(final, encode, embed, strict=True)]
    yield "encode", fitted(length_s, encode)
    yield "embed", fitted(length_s, embed)
    yield "decode", fitted(length_s, decode)
    for block in getattr(front_end, "_representations", ()):
        yield block.name, fitted(length_s, timed(tried, block.extract))
    fed, finished = opensmile_times(front_end, tried)
    yield "opensmile", fitted(length_s, fed)
    yield "functionals", fitted(length_s, finished)
    texts = [transcriber.final(one, 1.0) for one in tried]
    encoded = [recognizer.encode_text(text) for text in texts]
    acoustic = [front_end.extract(one) for one in tried]
    state = recognizer.new_dialogue().state
    yield "text", fitted(length_s, timed(texts, recognizer.encode_text))
    provisional = timed(
        encoded, lambda text: recognizer.classify(acoustic=None, text=text, state=state)
    )
    yield "provisional", fitted(length_s, provisional)
    dialogue = recognizer.new_dialogue()
    whole = timed(
        list(zip(acoustic, encoded, strict=True)),
        lambda one: recognizer.classify_final(
            acoustic=one[0], text=one[1], dialogue=dialogue, explain=True
        ),
    )
    yield "classify", fitted(length_s, whole)


def timed(inputs: list[Any], function: Callable[[Any], object]) -> list[float]:
    """CPU seconds of the process for each input."""
    for one in inputs[:WARM_UPS]:
        function(one)
    spent = []
    for one in inputs:
        began = time.process_time()
        function(one)
        spent.append(time.process_time() - began)
    return spent


def opensmile_times(front_end: Any, tried: list[Int16]) -> tuple[list[float], list[float]]:
    """CPU seconds while an utterance is fed, and from its end on."""
    opensmile = getattr(front_end, "_front_end", front_end)
    fed, finished = [], []
    for samples in tried:
        session = opensmile.open()
        began = time.process_time()
        for start in range(0, len(samples), CHUNK):
            session.feed(samples[start : start + CHUNK])
        caught_up = steady_cpu_s()
        fed.append(caught_up - began)
        began = time.process_time()
        session.finish()
        finished.append(time.process_time() - began)
    return fed, finished


def steady_cpu_s() -> float:
    """The process's CPU time once it computes no more."""
    before, now = -1.0, time.process_time()
    while now - before > STEADY_S / 10:
        time.sleep(STEADY_S)
        before, now = now, time.process_time()
    return now


def fitted(length_s: list[float], spent: list[float]) -> Cost:
    """A line through the times, neither part of it negative, and how much they depart from it."""
    per_s, base_s = np.polyfit(length_s, spent, 1)
    if base_s < 0:
        base_s, per_s = 0.0, float(np.mean(spent) / np.mean(length_s))
    if per_s < 0:
        base_s, per_s = float(np.mean(spent)), 0.0
    line = np.maximum(1e-9, base_s + per_s * np.array(length_s))
    spread = np.sort(np.array(spent) / line)
    return Cost(
        round(float(base_s), 6),
        round(float(per_s), 6),
        tuple(round(float(one), 3) for one in spread / max(1e-9, float(spread.mean()))),
    )


def measured_rates(recognizer: Any, tried: list[Int16]) -> tuple[float, ...]:
    """What 1, 2, … of the program's threads compute together, of what one does alone.

    Utterances of middle length only, so that it doesn't matter which of them are done; several
    rounds, since a machine's speed drifts.
    """
    final = partial(recognizer.transcriber.final, speech_score=1.0)
    front_end = recognizer.acoustic
    middle = sorted(tried, key=len)[len(tried) // 2 - 4 :][:8]
    words: Job = (final, middle)
    more: Job = (final, middle)
    voice: Job = (getattr(front_end, "measure", front_end.extract), middle)
    text: Job = (recognizer.encode_text, [final(one) for one in middle])
    together = [(words, more), (words, voice), (words, more, voice), (words, more, voice, text)]
    found = []
    for _ in range(ROUNDS):
        alone = {id(job): done_in(RATES_S, [job])[0] for job in (words, voice, text)}
        alone[id(more)] = alone[id(words)]
        found.append(
            [
                sum(n / alone[id(job)] for n, job in zip(done_in(RATES_S, jobs), jobs, strict=True))
                for jobs in together
            ]
        )
    decoders, mixed, three, four = np.mean(found, axis=0)
    rates = (1.0, (decoders + mixed) / 2, three, four)
    return tuple(round(max(1.0, float(one)), 3) for one in rates)


def done_in(duration_s: float, jobs: Sequence[Job]) -> list[float]:
    """How many inputs each of some threads gets done, the one that it is at in part."""
    ends_at = time.monotonic() + duration_s
    done = [0.0] * len(jobs)

    def run(number: int) -> None:
        function, inputs = jobs[number]
        while True:
            for one in inputs:
                began = time.monotonic()
                function(one)
                now = time.monotonic()
                if now >= ends_at:
                    done[number] += max(0.0, ends_at - began) / (now - began)
                    return
                done[number] += 1

    threads = [threading.Thread(target=run, args=[n]) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def pace(recognizer: Any, corpora: Path) -> float:
    """How many clips two decoders and a thread of embeddings get through a second, just now.

    Other programs, and other guests of the same computer, slow a machine down by a third and more.
    """
    sound = talk(corpora, stream=0, seconds=PACE_CLIP_S * PACE_CLIPS)
    clips = np.split(sound, PACE_CLIPS)
    words = partial(recognizer.transcriber.final, speech_score=1.0)
    voice = getattr(recognizer.acoustic, "measure", recognizer.acoustic.extract)
    return sum(done_in(PACE_S, [(words, clips), (words, clips[::-1]), (voice, clips)])) / PACE_S


def silent_chunk_s(recognizer: Any) -> float:
    """CPU seconds of the process for a chunk of silence, through the whole pipeline."""
    from stream_hbaf.config import SourceConfig
    from stream_hbaf.live.pipeline import LivePipeline

    quiet = np.random.default_rng(0).normal(0, 3, int(SILENT_S * RATE_HZ)).astype(np.int16)
    sources = {
        SourceConfig(name=f"stream{n}", where="talk"): Talk(quiet, delay_s=0.1 * n)
        for n in range(SILENT)
    }
    pipeline = LivePipeline(recognizer, [])
    began = time.process_time()
    asyncio.run(pipeline.run(sources, stop=asyncio.Event()))
    return (time.process_time() - began) / (SILENT * len(quiet) / CHUNK)
