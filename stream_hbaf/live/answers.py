"""Gives finished utterances back to those who sent their sound over the Wyoming protocol."""

import asyncio
import json
from collections.abc import Mapping

from stream_hbaf.audio.wyoming import WyomingSource
from stream_hbaf.events import AnyEvent, Utterance
from stream_hbaf.publish.messages import encode


class Answers:
    """A publisher that hands each ``end`` to the source that it is from; never waits."""

    def __init__(self, sources: Mapping[str, WyomingSource]) -> None:
        self._sources = sources  # by name

    async def send(self, event: AnyEvent) -> None:
        """Answer with an ``end``, with the fields that are published."""
        if isinstance(event, Utterance) and event.type == "end" and event.source in self._sources:
            self._sources[event.source].answer(json.loads(encode(event)))

    async def run(self) -> None:
        """Wait until cancelled: ``send`` answers."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        """Do nothing: the sources close their connections."""
