"""One of several workers that share the utterances: each goes to one of those with the same group.

Start it as often as there is work: python examples/workers.py mqtt://localhost GROUP
"""

import asyncio
import sys

from stream_hbaf.client import subscribe
from stream_hbaf.config import MqttConfig
from stream_hbaf.events import Utterance


async def main(url: str, group: str) -> None:
    broker = MqttConfig(url=url, version="5")  # shared subscriptions are a part of MQTT 5
    async for event in subscribe(broker, kinds=(Utterance,), group=group):
        if event.type == "end" and event.emotion:
            print(event.speaker, event.emotion.label, event.text, sep="\t", flush=True)


asyncio.run(main(sys.argv[1], sys.argv[2]))
