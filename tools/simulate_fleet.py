#!/usr/bin/env python3
"""Simulates many streams through one process, and plans how many processes a fleet needs.

    tools/simulate_fleet.py measure --corpora DIR --asr tiny.en TIMES   # service times, two minutes
    tools/bench_streams.py --corpora DIR --asr tiny.en --streams 8 12 16 --seconds 24 --json CURVE
    tools/simulate_fleet.py check TIMES CURVE                           # simulated beside measured
    tools/simulate_fleet.py broker                                      # what mosquitto carries
    tools/simulate_fleet.py plan TIMES [--streams 100 10000 100000] [--speech 0.4] [--limit-ms 1500]

What is simulated is the live pipeline itself: ``live/`` runs unchanged on a virtual clock, only its
models are replaced by the time that they take (``timed_models.py``, ``virtual_time.py``). The
clock is asyncio's, and not a simulation library's: these know threads that wait for a server and
hold it for a fixed time; here a call takes longer whenever other threads share the cores, and
priorities, fairness and what is dropped are the program's own code and not a copy of it.
"""

import argparse
import asyncio
import json
import math
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = 5  # simulations of each number of streams that was measured; the median is given
PLAN_SEEDS = 3  # and for a plan
CHECK_WITHIN = 0.15  # of the measured latency
PLAN_S = 40.0  # of talk in each simulation for a plan
MOST = 512  # streams a process that a plan considers
CORES_EACH = 2  # of a process: two decoders, as measured
REFUSED = 0.01  # of the connections, where they are placed at random
PCM_BYTES, OPUS_BYTES = 32_000, 3_000  # a second: 16 kHz int16; Opus at 24 kbit/s
OVERHEAD = 1.05  # WebSocket, TCP and IP headers of frames of 64 ms; measured by nobody
BROKER_LOAD = 0.5  # of a core that a plan gives a broker: the rest is for bursts
MESSAGES, WARM_UP, AT_ONCE = 22_000, 2_000, 20  # of the measurement of a broker
PAYLOAD = 600  # bytes; an ``end`` has 900, a partial 300
BROKER_STARTS_S = 1.0


def measure(options: argparse.Namespace) -> None:
    """Write the service times of this machine."""
    from stream_hbaf.commands import limit_library_caches, limit_library_threads

    limit_library_threads()
    limit_library_caches()
    from service_times import measure as measure_times

    from stream_hbaf.config import load_config
    from stream_hbaf.recognizer import Recognizer

    if options.first:
        if os.getpid() != os.getsid(0):
            os.setsid()
        Path("/proc/self/autogroup").write_text("-20", encoding="ascii")
    with Recognizer(load_config(overrides={"transcript.model": options.asr})) as recognizer:
        times = measure_times(recognizer, options.corpora)
    times.save(options.times)
    rates = ", ".join(f"{rate:.2f}" for rate in times.rates)
    print(f"{times.asr} on {times.machine}: 1, 2, … threads compute {rates}")
    print(f"a frame {times.vad_s * 1000:.3f} ms, a call's turn {times.hop_s * 1000:.2f} ms")
    for name, cost in times.costs.items():
        print(f"{name}: {cost.base_s * 1000:.1f} + {cost.per_s * 1000:.1f} ms a second")


@dataclass(frozen=True)
class Point:
    """One number of streams, simulated several times."""

    median: float  # ms
    p95: float
    lowest_p95: float
    highest_p95: float
    lost: float  # chunks
    found: dict[str, Any]  # of the first simulation


def simulated(
    times: Any, streams: int, *, seconds: float, speech: float = 1.0, seeds: int = SEEDS
) -> Point:
    """The median of several simulations."""
    from timed_models import simulate

    found = [
        simulate(times, streams, seconds=seconds, speech=speech, seed=seed) for seed in range(seeds)
    ]
    p95 = [one["p95"] for one in found]
    return Point(
        median=float(np.median([one["median"] for one in found])),
        p95=float(np.median(p95)),
        lowest_p95=min(p95),
        highest_p95=max(p95),
        lost=float(np.median([one["lost"] for one in found])),
        found=found[0],
    )


def check(options: argparse.Namespace) -> None:
    """Print what is simulated beside what was measured, and how much it is off.

    The machine is as fast as it was before and after each measurement.
    """
    from service_times import ServiceTimes

    times = ServiceTimes.load(options.times)
    lines = options.curve.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["asr"] == times.asr]
    print(
        "| streams | pace | measured: median · p95, ms | simulated | p95 of five simulations "
        "| off by | cores |"
    )
    print("|" + " --- |" * 7)
    for row in rows:
        speed = row.get("pace", times.pace) / times.pace
        slowed = replace(times, rates=tuple(rate * speed for rate in times.rates))
        point = simulated(slowed, row["streams"], seconds=row["seconds"])
        off = [point.median / row["median"] - 1, point.p95 / row["p95"] - 1]
        within = "" if max(map(abs, off)) <= CHECK_WITHIN else " (over 15 %)"
        print(
            f"| {row['streams']} | {speed:.2f} | {row['median']:.0f} · {row['p95']:.0f} "
            f"| {point.median:.0f} · {point.p95:.0f} "
            f"| {point.lowest_p95:.0f} to {point.highest_p95:.0f} "
            f"| {off[0]:+.0%} · {off[1]:+.0%}{within} "
            f"| {row['cores']:.2f}, {point.found['cores']:.2f} |",
            flush=True,
        )


def capacity(times: Any, *, speech: float, limit_ms: float) -> tuple[int, Point]:
    """The most streams a process that stay below the limit, and how they fare."""
    best, least, most = None, 1, 2
    while most <= MOST and (point := _below(times, most, speech, limit_ms)) is not None:
        best, least, most = point, most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        if (point := _below(times, middle, speech, limit_ms)) is not None:
            best, least = point, middle
        else:
            most = middle
    if best is None:
        raise SystemExit(f"{times.asr}: not even two streams stay below {limit_ms:.0f} ms")
    return least, best


def _below(times: Any, streams: int, speech: float, limit_ms: float) -> Point | None:
    point = simulated(times, streams, seconds=PLAN_S, speech=speech, seeds=PLAN_SEEDS)
    return point if point.p95 <= limit_ms and not point.lost else None


def mean_load(capacity: int) -> int:
    """The mean number of streams a process at which, placed at random, few are refused.

    Then the number in each process follows Poisson's distribution.
    """
    from scipy.stats import poisson

    return max(m for m in range(1, capacity + 1) if m == 1 or poisson.sf(capacity, m) <= REFUSED)


def plan(options: argparse.Namespace) -> None:
    """Print what some numbers of streams need."""
    from service_times import ServiceTimes

    times = ServiceTimes.load(options.times)
    each, point = capacity(times, speech=options.speech, limit_ms=options.limit_ms)
    at_random = mean_load(each)
    rate, payload = point.found["messages"], point.found["payload_bytes"]
    print(
        f"{times.asr}, each person speaks {options.speech:.0%} of the talk's time: {each} streams "
        f"a process of {CORES_EACH} cores, median {point.median:.0f} ms, p95 {point.p95:.0f} ms; "
        f"{rate:.2f} messages and {payload:.0f} bytes a second and stream\n"
    )
    print(
        "| streams | processes, least loaded first (placed at random) | cores | machines of "
        f"{options.machine_cores} cores | memory, GB | sound in, Mbit/s: PCM (Opus) "
        "| MQTT messages a second, delivered once | broker cores |"
    )
    print("|" + " --- |" * 8)
    for streams in options.streams:
        processes = math.ceil(streams / each)
        messages = streams * rate
        pcm, opus = (streams * n * 8 * OVERHEAD / 1e6 for n in (PCM_BYTES, OPUS_BYTES))
        memory = processes * options.process_mb + streams * options.stream_mb
        brokers = messages / (options.broker * BROKER_LOAD)
        print(
            f"| {streams:,} | {processes:,} ({math.ceil(streams / at_random):,}) "
            f"| {processes * CORES_EACH:,} "
            f"| {math.ceil(processes * CORES_EACH / options.machine_cores):,} "
            f"| {memory / 1000:,.0f} | {pcm:,.0f} ({opus:,.0f}) | {messages:,.0f} "
            f"| {brokers:.2f} |"
        )


def broker(options: argparse.Namespace) -> None:
    """Print how many messages mosquitto carries with one core."""
    print(asyncio.run(broker_rate()))


async def broker_rate() -> str:
    """Publish, receive, and divide by the CPU time that mosquitto has taken.

    So the figure doesn't depend on how fast the clients are.
    """
    import aiomqtt
    from soak_mqtt import find

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = await asyncio.create_subprocess_exec(
        find("mosquitto"), "-p", str(port), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await asyncio.sleep(BROKER_STARTS_S)
        async with (
            aiomqtt.Client("127.0.0.1", port) as subscriber,
            aiomqtt.Client("127.0.0.1", port) as publisher,
        ):
            publisher.pending_calls_threshold = AT_ONCE
            await subscriber.subscribe("stream_hbaf/#", qos=1)
            began, before_s = time.monotonic(), cpu_s(server.pid)
            receiving = asyncio.create_task(_receive(subscriber))
            for start in range(0, MESSAGES, AT_ONCE):
                topics = (f"stream_hbaf/node/stream{n}/utterance" for n in range(AT_ONCE))
                sent = (publisher.publish(topic, bytes(PAYLOAD), qos=1) for topic in topics)
                await asyncio.gather(*sent)
                if start == WARM_UP:
                    began, before_s = time.monotonic(), cpu_s(server.pid)
            await receiving
            took_s, spent_s = time.monotonic() - began, cpu_s(server.pid) - before_s
    finally:
        server.terminate()
        await server.wait()
    counted = MESSAGES - WARM_UP - AT_ONCE
    return (
        f"{counted:,} messages of {PAYLOAD} bytes, QoS 1, one publisher, one subscriber, "
        f"{counted / took_s:,.0f} a second: {spent_s:.2f} s of mosquitto's CPU, "
        f"{counted / spent_s:,.0f} a second with one core"
    )


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has taken."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _receive(subscriber: Any) -> None:
    received = 0
    async for _ in subscriber.messages:
        received += 1
        if received == MESSAGES:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("measure", help="write this machine's service times")
    add.set_defaults(run=measure)
    add.add_argument("times", type=Path, metavar="TIMES")
    add.add_argument("--corpora", type=Path, required=True)
    add.add_argument("--asr", default="base", metavar="MODEL")
    add.add_argument("--first", action="store_true", help="before all other programs; as root")
    add = commands.add_parser("check", help="compare with what bench_streams.py --json wrote")
    add.set_defaults(run=check)
    add.add_argument("times", type=Path, metavar="TIMES")
    add.add_argument("curve", type=Path, metavar="CURVE")
    add = commands.add_parser("broker", help="measure mosquitto")
    add.set_defaults(run=broker)
    add = commands.add_parser("plan", help="what numbers of streams need")
    add.set_defaults(run=plan)
    add.add_argument("times", type=Path, metavar="TIMES")
    add.add_argument("--streams", type=int, nargs="+", default=[100, 10_000, 100_000])
    add.add_argument("--speech", type=float, default=1.0, metavar="SHARE", help="of the time")
    add.add_argument("--limit-ms", type=float, default=1500, metavar="MS", help="of the p95")
    add.add_argument("--machine-cores", type=int, default=32, metavar="N")
    add.add_argument("--process-mb", type=float, required=True, help="of a process with no stream")
    add.add_argument("--stream-mb", type=float, required=True, help="that each stream adds")
    add.add_argument("--broker", type=float, required=True, help="messages a second and core")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
