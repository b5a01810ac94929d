#!/usr/bin/env python3
"""Kills model replicas and the streams' session on a Ray cluster of two nodes, many times.

    tools/drill_cluster.py [--kills 20] [--streams 2] [--what replicas session]

Clients stream read sentences in real time without an end. Each time one of them is in the middle of
an utterance, a process is killed with SIGKILL; then the next one's turn is when Ray has started its
successor and another utterance has come to its end. Counted are finished utterances that are lost:
of a killed replica every utterance without an ``end`` or with a degraded one, of a killed session
every ``end`` that was published over MQTT and that its client never got. What was being said when
the session was killed has no ``end``; it is counted apart.
"""

import argparse
import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from ray_nodes import two_nodes

from stream_hbaf.audio.file import read_audio
from stream_hbaf.client import subscribe
from stream_hbaf.errors import BrokerError
from stream_hbaf.events import Utterance
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.stream_client import stream

RECORDINGS = Path(__file__).parents[1] / "tests" / "recordings"
RATE_HZ, CHUNK = 16_000, 1600  # samples: 100 ms
PATIENCE_S = 180.0  # for a successor, on a busy machine
REPLICAS, SESSION = "replicas", "session"


class Tally:
    """The utterances of all clients, by id, as clients and as MQTT have them."""

    def __init__(self) -> None:
        self.begun: set[str] = set()
        self.ended: dict[str, Utterance] = {}
        self.published: set[str] = set()
        self.changed = asyncio.Condition()

    async def note(self, event: Utterance) -> None:
        """Count what a client got."""
        async with self.changed:
            self.begun.add(event.id)
            if event.type == "end":
                self.ended[event.id] = event
            self.changed.notify_all()

    async def next(self, kind: str) -> None:
        """Wait for the next utterance that begins ("new") or ends."""
        counted = self.begun if kind == "new" else self.ended
        before = len(counted)
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: len(counted) > before)


async def talk(number: int, over: asyncio.Event) -> AsyncIterator[bytes]:
    """Read sentences with pauses, in real time."""
    clips = [read_audio(path) for path in sorted(RECORDINGS.glob("sense_and_sensibility_*.flac"))]
    began, sent, turn = time.monotonic(), 0, number
    while not over.is_set():
        sound = np.concatenate([clips[turn % len(clips)], np.zeros(RATE_HZ, np.int16)])
        turn += 1
        for start in range(0, len(sound), CHUNK):
            piece = sound[start : start + CHUNK]
            sent += len(piece)
            await asyncio.sleep(max(0.0, began + sent / RATE_HZ - time.monotonic()))
            yield piece.astype("<i2").tobytes()


async def follow(url: str, number: int, tally: Tally, over: asyncio.Event) -> None:
    """One client."""
    async for event in stream(url, talk(number, over), source=f"client-{number}"):
        if isinstance(event, Utterance):
            await tally.note(event)


async def listen(url: str, tally: Tally) -> None:
    """Note what is published over MQTT."""
    while True:
        try:
            async for event in subscribe(url, kinds=(Utterance,)):
                if event.type == "end":
                    tally.published.add(event.id)
        except BrokerError:
            await asyncio.sleep(0.2)


async def kill(handles: list[Any], tally: Tally, *, kills: int) -> list[float]:
    """Kill the handles' processes in turn; the seconds until each has a successor."""
    from stream_hbaf.serve.remote import ask

    waited = []
    for number in range(kills):
        handle = handles[number % len(handles)]
        await tally.next("new")
        pid = await asyncio.to_thread(ask, handle, "pid")
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while await asyncio.to_thread(ask, handle, "pid") == pid:  # noqa: ASYNC110  no event tells
            await asyncio.sleep(0.1)
        waited.append(time.monotonic() - began)
        await tally.next("end")
        print(f"  {number + 1} of {kills}: {waited[-1]:.1f} s", flush=True)
    return waited


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def drill(options: argparse.Namespace, folder: Path) -> None:
    """Run the whole drill and print what was lost."""
    from ray import serve

    from stream_hbaf.serve.app import build

    port = free_port()
    async with embedded_broker(free_port()) as broker:
        given = {
            "transcript.model": "tiny.en",
            "mqtt.url": broker.url,
            "serve.port": str(port),
            "serve.replicas": "1",
            "serve.checkpoints": str(folder / "streams"),
        }
        await asyncio.to_thread(serve.run, build(given), name="drill", route_prefix=None)
        part = {
            name: serve.get_deployment_handle(name, app_name="drill")
            for name in ("Transcribe", "Understand", "Session")
        }
        every = {
            REPLICAS: [part["Transcribe"], part["Understand"]],
            SESSION: [part["Session"]],
        }
        for what in options.what:
            tally, over = Tally(), asyncio.Event()
            listening = asyncio.create_task(listen(broker.url, tally))
            url = f"ws://127.0.0.1:{port}"
            clients = [
                asyncio.create_task(follow(url, number, tally, over))
                for number in range(options.streams)
            ]
            waited = await kill(every[what], tally, kills=options.kills)
            over.set()
            await asyncio.gather(*clients)
            await asyncio.sleep(2.0)  # for the broker
            listening.cancel()
            report(what, tally, waited)


def report(what: str, tally: Tally, waited: list[float]) -> None:
    """One line."""
    unended = tally.begun - tally.ended.keys()
    degraded = {one.id for one in tally.ended.values() if one.degraded}
    if what == REPLICAS:
        lost, apart = len(unended | degraded), ""
    else:
        lost = len(tally.published - tally.ended.keys())
        apart = f" ({len(unended)} more were being said)"
    print(
        f"{what} killed {len(waited)} times: {lost} finished utterances lost of "
        f"{len(tally.ended)}{apart}; successor after {np.median(waited):.1f} s "
        f"(at most {max(waited):.1f})",
        flush=True,
    )


def run(options: argparse.Namespace, folder: Path) -> None:
    """Have a cluster, and the drill on it."""
    with two_nodes():
        asyncio.run(drill(options, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument(
        "--what", nargs="+", choices=(REPLICAS, SESSION), default=[REPLICAS, SESSION]
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder  # of the session's outbox, which the nodes share
        run(options, Path(folder))


if __name__ == "__main__":
    main()
