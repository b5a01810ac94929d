"""Prints speaker, emotion and words of each utterance: python examples/listen.py mqtt://localhost"""

import asyncio
import sys

from stream_hbaf.client import subscribe
from stream_hbaf.events import Utterance


async def main(url: str) -> None:
    async for event in subscribe(url, kinds=(Utterance,)):
        if event.type == "end" and event.emotion:
            print(event.speaker, event.emotion.label, event.text, sep="\t", flush=True)


asyncio.run(main(sys.argv[1]))
