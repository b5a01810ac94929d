#!/usr/bin/env python3
"""Measures how many streams one process carries: end of speech → event, by the number of streams.

    tools/bench_streams.py --corpora DIR [--streams 8 16 24] [--seconds 40] [--asr base] [--json F]
    tools/bench_streams.py --corpora DIR [--streams 8 16 24] [--against TREE] [--ray]
                           [--through-serve]

Each stream is another person: sentences of one RAVDESS actor and passages of LibriSpeech's readers
with pauses between them, in real time, from memory. All go through one live pipeline, without a
broker. What a source would have captured while the pipeline was behind counts as waiting.

With ``--ray`` the same is measured with the models as replicas on a Ray cluster of two nodes on
this machine, in turns with one process. Cores and memory are then of the streams' process alone.

With ``--through-serve`` it is measured through ``stream-hbaf serve`` as well, in turns: clients in
another process send the same sound by ``stream_hbaf.client.stream``, and latency is until they have
the event. Cores and memory are the service's; what is lost and what was given up isn't counted.

With ``--against`` this source tree and another one, such as a worktree of an earlier version, are
measured in turns, in one run. ``--set`` changes settings of this tree. ``--json`` also writes all
figures to a file, a line for each row.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from service_times import pace
from talks import CHUNK, RATE_HZ, Int16, Talk, talk
from through_serve import Service, follow, service

TREE = Path(__file__).parents[1]
STAGGER_S = 4.0  # streams begin within these seconds
ONE_REPLICA = ["serve.replicas=1"]  # as many decoders as one process has
STAGES = ("vad", "transcript", "acoustic", "text", "classify", "total")
MEASURED = (*STAGES, "transit")  # to a service and back to its client


class Ends:
    """A publisher that keeps the latencies of ``end`` events, and counts all events."""

    def __init__(self) -> None:
        self.ends: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()

    async def send(self, event: Any) -> None:
        self.note(event)

    def note(self, event: Any, total_ms: float | None = None) -> None:
        """Count an event; ``total_ms`` is when it was received, if not when it was published."""
        kind = type(event).__name__
        self.counts[f"{kind} {event.type}" if kind == "Utterance" else kind] += 1
        if kind == "Utterance" and event.type == "end":
            latency = {stage: getattr(event.latency_ms, stage) for stage in STAGES}
            latency["transit"] = 0.0 if total_ms is None else total_ms - latency["total"]
            latency["total"] += latency["transit"]
            self.ends.append(latency | {"at": time.monotonic(), "words": bool(event.text)})

    def figures(self, *, began: float, seconds: float, cpu_s: float) -> dict[str, Any]:
        """What was measured since ``began``: latencies in ms, and what they cost."""
        spent = time.monotonic() - began
        total = np.array([end["total"] for end in self.ends])
        middle = began + (seconds + STAGGER_S) / 2
        halves = [[end["total"] for end in self.ends if (end["at"] > middle) is late]
                  for late in (False, True)]  # fmt: skip
        return {
            "median": float(np.median(total)),
            "p95": float(np.percentile(total, 95)),
            "halves": [float(np.median(half)) if half else 0.0 for half in halves],
            "ends": len(total),
            "new": self.counts["Utterance new"],
            "partials": self.counts["Partial"],
            "updates": self.counts["Utterance update"],
            "without_words": sum(not end["words"] for end in self.ends),
            "late_s": spent - seconds - STAGGER_S,
            "cores": cpu_s / spent,
            "stages": {s: float(np.median([end[s] for end in self.ends])) for s in MEASURED},
        }

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        pass


class Profile:
    """How often some methods were called, and how long they took."""

    def __init__(self, *methods: tuple[type, str]) -> None:
        self.calls: dict[str, list[float]] = {}
        for owner, name in methods:
            self._wrap(owner, name)

    def _wrap(self, owner: type, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **named)
            finally:
                self.calls.setdefault(name, []).append(time.perf_counter() - began)

        setattr(owner, name, timed)

    def taken(self) -> dict[str, tuple[int, float, float]]:
        """By method the number of calls, seconds, and the median milliseconds; starts anew."""
        found = {
            name: (len(spent), round(sum(spent), 1), round(float(np.median(spent)) * 1000, 1))
            for name, spent in self.calls.items()
        }
        self.calls.clear()
        return found


def serve(corpora: Path, *, seconds: float, settings: dict[str, Any], ray: bool) -> None:
    """Read numbers of streams from stdin; run each and print what was measured as a line."""
    from stream_hbaf.commands import limit_library_caches, limit_library_threads

    limit_library_threads()
    limit_library_caches()
    from stream_hbaf.config import load_config
    from stream_hbaf.features.whisper import Transcriber
    from stream_hbaf.live.pipeline import release_memory
    from stream_hbaf.recognizer import Recognizer

    with ExitStack() as opened:
        config = load_config(overrides=settings)
        recognizer = opened.enter_context(on_two_nodes(config) if ray else Recognizer(config))
        profile = Profile(
            *((Transcriber, "final"), (Transcriber, "partial")),
            *(
                (Recognizer, "encode_text"),
                (Recognizer, "classify"),
                (Recognizer, "classify_final"),
            ),
        )
        release_memory()  # as the command does
        print("{}", flush=True)
        for line in sys.stdin:
            sounds = [talk(corpora, stream=n, seconds=seconds) for n in range(int(line))]
            before = pace(recognizer, corpora)
            profile.taken()
            measured = asyncio.run(run(recognizer, sounds, seconds=seconds))
            measured["calls"] = profile.taken()
            measured["pace"] = (before + pace(recognizer, corpora)) / 2
            print(json.dumps(measured), flush=True)


@contextmanager
def on_two_nodes(config: Any) -> Iterator[Any]:
    """A recogniser whose models are replicas on a Ray cluster, ``Transcribe`` on one node."""
    from ray_nodes import two_nodes

    with two_nodes(cpus=1):
        from stream_hbaf.serve.remote import RemoteRecognizer
        from stream_hbaf.serve.replicas import deploy

        with RemoteRecognizer(config, deploy(config)) as recognizer:
            yield recognizer


async def run(
    recognizer: Any, sounds: list[Int16], *, seconds: float, beside: Sequence[Any] = ()
) -> dict[str, Any]:
    """The latencies in ms, and what they cost; ``beside`` are further publishers."""
    from stream_hbaf.config import SourceConfig
    from stream_hbaf.live.pipeline import LivePipeline

    ends, delay = Ends(), random.Random(0)
    pipeline = LivePipeline(recognizer, [ends, *beside])
    sources = {
        SourceConfig(name=f"stream{n}", where="talk"): Talk(
            sound, delay_s=delay.uniform(0, STAGGER_S)
        )
        for n, sound in enumerate(sounds)
    }
    began, cpu = time.monotonic(), time.process_time()
    await pipeline.run(sources, stop=asyncio.Event())
    cpu_s = time.process_time() - cpu
    return ends.figures(began=began, seconds=seconds, cpu_s=cpu_s) | {
        "lost": sum(source.lost for source in sources.values()),
        "memory_mb": pipeline.health().memory_mb,
        "health": pipeline.health().model_dump(include={"queues", "dropped", "hints"}),
    }


def serve_clients(corpora: Path, *, seconds: float, settings: dict[str, Any]) -> None:
    """As ``serve``, with the streams as clients of a service."""
    with service(settings) as running:
        print("{}", flush=True)
        for line in sys.stdin:
            sounds = [talk(corpora, stream=n, seconds=seconds) for n in range(int(line))]
            print(
                json.dumps(asyncio.run(run_clients(running, sounds, seconds=seconds))), flush=True
            )


async def run_clients(running: Service, sounds: list[Int16], *, seconds: float) -> dict[str, Any]:
    """As ``run``, with the streams as clients of a service."""
    ends, delay = Ends(), random.Random(0)
    began, cpu, own = time.monotonic(), running.cpu_s(), time.process_time()
    async with asyncio.TaskGroup() as clients:
        for sound in sounds:
            delay_s = delay.uniform(0, STAGGER_S)
            clients.create_task(follow(running.url, sound, delay_s=delay_s, note=ends.note))
    clients_s = (time.process_time() - own) / len(sounds)
    return ends.figures(began=began, seconds=seconds, cpu_s=running.cpu_s() - cpu) | {
        **{"lost": float("nan"), "pace": float("nan"), "health": {}},
        "memory_mb": running.memory_mb(),
        "calls": {"clients": (len(sounds), clients_s * len(sounds), clients_s * 1000)},
    }


class Tree:
    """A source tree's models, loaded in a process of their own, which runs streams when asked."""

    def __init__(self, tree: Path, arguments: list[str], *, first: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--child"],
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if first:  # Linux schedules sessions, and within each of them by the priority of processes
            Path(f"/proc/{self._process.pid}/autogroup").write_text("-20", encoding="ascii")

    def ask(self, streams: int | None = None) -> dict[str, Any]:
        """What a run of so many streams measured; without a number, wait until it is ready."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if streams is not None:
            self._process.stdin.write(f"{streams}\n")
            self._process.stdin.flush()
        measured: dict[str, Any] = json.loads(self._process.stdout.readline())
        return measured

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(options: argparse.Namespace) -> None:
    """Print a table of all numbers of streams, models and trees."""
    print(
        "| model | streams | tree | median, ms | p95, ms | first · second half | `end` of `new` "
        "| partials · updates | sound lost | late, s | cores | MB |"
    )
    print("|" + " --- |" * 12)
    for asr in options.asr:
        shared = ["--corpora", str(options.corpora), "--seconds", str(options.seconds)]
        shared += ["--asr", asr]
        trees = {"this": Tree(TREE, [*shared, "--set", *options.set], first=options.first)}
        if options.ray:
            trees["ray"] = Tree(TREE, [*shared, "--ray", "--set", *options.set, *ONE_REPLICA])
        if options.through_serve:
            own = [*shared, "--through-serve", "--set", *options.set]
            trees["serve"] = Tree(TREE, own, first=options.first)
        if options.against:
            trees["other"] = Tree(options.against.resolve(), shared, first=options.first)
        for tree in trees.values():
            tree.ask()
        order = list(trees)
        for streams in options.streams:
            for name in order:
                found = trees[name].ask(streams)
                print(row(asr, streams, name, found), flush=True)
                details(asr, streams, name, found)
                if options.json:
                    keep(options, asr=asr, streams=streams, tree=name, found=found)
            order.reverse()
        for tree in trees.values():
            tree.close()


def keep(
    options: argparse.Namespace, *, asr: str, streams: int, tree: str, found: dict[str, Any]
) -> None:
    """Append a line of JSON with all that was measured."""
    setting = {"asr": asr, "streams": streams, "seconds": options.seconds, "tree": tree}
    with options.json.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(setting | found) + "\n")


def details(asr: str, streams: int, tree: str, found: dict[str, Any]) -> None:
    """Say on stderr where the time went."""
    stages = ", ".join(f"{stage} {ms:.0f}" for stage, ms in found["stages"].items())
    calls = ", ".join(
        f"{what} {n} × {ms:.1f} ms = {s:.1f} s" for what, (n, s, ms) in found["calls"].items()
    )
    sys.stderr.write(
        f"{asr}, {streams} streams, {tree} tree: medians {stages} ms\n  {calls}\n"
        f"  {found['without_words']} ends without words; {found['health']}; {found['pace']:.2f} "
        "clips a second\n"
    )


def row(asr: str, streams: int, tree: str, found: dict[str, Any]) -> str:
    first, second = found["halves"]
    return (
        f"| {asr} | {streams} | {tree} | {found['median']:.0f} | {found['p95']:.0f} "
        f"| {first:.0f} · {second:.0f} | {found['ends']} of {found['new']} "
        f"| {found['partials']} · {found['updates']} | {found['lost'] * CHUNK / RATE_HZ:.1f} s "
        f"| {found['late_s']:.1f} | {found['cores']:.2f} | {found['memory_mb']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--asr", nargs="+", default=["base"], metavar="MODEL")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another source tree")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append all figures to a file")
    parser.add_argument("--ray", action="store_true", help="and with models on a Ray cluster")
    parser.add_argument("--through-serve", action="store_true", help="and as clients of a service")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--first", action="store_true", help="before all other programs; on Linux, as root"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child:
        compare(options)
        return
    settings = dict(setting.split("=", 1) for setting in options.set)
    settings["transcript.model"] = options.asr[0]
    if options.through_serve:
        serve_clients(options.corpora, seconds=options.seconds, settings=settings)
    else:
        serve(options.corpora, seconds=options.seconds, settings=settings, ray=options.ray)


if __name__ == "__main__":
    main()
