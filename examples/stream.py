"""Sends a recording to a service, and prints what comes back.

ffmpeg -v error -i talk.mp3 -f s16le -ac 1 -ar 16000 - | python examples/stream.py ws://localhost:8772
"""

import asyncio
import sys
from collections.abc import AsyncIterator

from stream_hbaf.client import stream
from stream_hbaf.events import Utterance

CHUNK = 3200  # bytes: 100 ms


async def chunks() -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(sys.stdin.buffer.read, CHUNK):
        yield chunk


async def main(url: str) -> None:
    async for event in stream(url, chunks()):
        if isinstance(event, Utterance) and event.type == "end" and event.emotion:
            print(event.emotion.label, event.text, sep="\t", flush=True)


asyncio.run(main(sys.argv[1]))
