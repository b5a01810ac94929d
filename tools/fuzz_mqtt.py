"""Kinds of inputs for ``tools/fuzz.py``: MQTT messages of anybody, and damaged outboxes."""

import asyncio
import json
import os
import random
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from damages import JSON, NAMES, damage, damage_sound
from fuzz_kinds import damaged_text


class Messages:
    """MQTT messages as anybody may publish them: to ``watch``, to the client, and as requests."""

    command = ()
    TOPICS: ClassVar = (
        *("p/n/m/utterance", "p/n/m/partial", "p/n/m/dialogue", "p/n/m/status/capture"),
        *("p/n/m/speech", "p/n/m/emotion", "p/n/info", "p/n/health", "p/n/available"),
        *("p/n/request/ping", "p/n/response/ping", "p/n/m/feedback", "p/n/m/record/set", "p//"),
    )

    def __init__(self, folder: Path) -> None:
        from mqtt_kit import END, INFO, partial

        self._trees = [event.model_dump(mode="json") for event in (END, INFO, partial(1))]
        self._trees += [{"id": "u1", "label": "joy", "by": "Ann"}, {"transaction": "t", "a": [1]}]

    def write(self, seed: int) -> None:
        from stream_hbaf.publish.connection import Received

        draw = random.Random(seed)
        topic = draw.choice(self.TOPICS)
        if draw.random() < 0.2:
            topic += f"/{draw.choice(NAMES)}"
        payload = damaged_text(draw.choice(self._trees), seed, fixed=JSON)
        payload = draw.choice((payload, payload, payload, b"ON", b"\xff\xfe", b""))
        self.message = Received(topic, payload, retained=draw.random() < 0.2)

    def read(self) -> str:
        from stream_hbaf.publish.terminal import human_line, json_line

        json.loads(json_line(self.message).encode())
        line = human_line(self.message, prefix="p", at=datetime(2026, 1, 1, tzinfo=UTC))
        assert line.isprintable(), repr(line[:200])
        line.encode()
        asyncio.run(self._follow())
        return asyncio.run(self._request())

    async def _follow(self) -> None:
        from stream_hbaf.client import KINDS, Subscription
        from stream_hbaf.publish.connection import Received

        async def received() -> Any:
            yield self.message

        stream: Any = received()
        assert isinstance(self.message, Received)
        kinds = [*KINDS.values()]
        async for _ in Subscription(stream, prefix="p", source=None, kinds=kinds):
            ...

    async def _request(self) -> str:
        from stream_hbaf.publish.messages import Message
        from stream_hbaf.publish.requests import Requests

        said: list[str] = []

        async def send(message: Message) -> None:
            json.loads(message.payload)

        names = {"prefix": "p", "node": "n"}
        requests = Requests(Echo(), **names, sources=["m"], send=send, on_report=said.append)
        requests.put(self.message)
        running = asyncio.create_task(requests.run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if running.done():
            await running
        running.cancel()
        return " ".join(said)


class Echo:
    """Carries nothing out, and answers a request with its arguments."""

    async def answer(self, request: Any) -> Any:
        from stream_hbaf.events import Response

        known = {"command": request.command, "transaction": request.transaction}
        return Response(status="ok", content=dict(request.arguments), **known)

    async def set_switch(self, source: str, *, switch: Any, on: bool) -> None:
        """Every source has every switch."""

    async def correct(self, feedback: Any) -> None:
        """Every correction is taken."""


class Outboxes:
    """What a run that ended, or was killed, left undelivered: read twice by the next ones."""

    command = ()

    def __init__(self, folder: Path) -> None:
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        from stream_hbaf.config import MqttConfig
        from stream_hbaf.publish.messages import Message
        from stream_hbaf.publish.outbox import Outbox

        self._config = MqttConfig(url="mqtt://broker", prefix="p", node="n")
        self._outbox = Outbox
        self._state = folder / "state" / "stream_hbaf"
        self._whole = (folder / "killed", folder / "ended")
        sizes = (20, 300, 5000)  # bytes of text: within a page, and over several
        self._written = [
            Message("p/n/m/utterance", json.dumps({"id": n, "text": "w" * sizes[n % 3]}).encode())
            for n in range(20)
        ]
        asyncio.run(self._leave())

    async def _leave(self) -> None:
        outbox = self._outbox(self._config, on_report=print)
        for message in self._written:
            await outbox.put([message], broker_away=False)
        shutil.copytree(self._state, self._whole[0])
        await outbox.close()
        shutil.copytree(self._state, self._whole[1])

    def write(self, seed: int) -> None:
        shutil.rmtree(self._state)
        shutil.copytree(self._whole[seed % 2], self._state)
        files = sorted(path for path in self._state.iterdir() if path.suffix != ".lock")
        path = files[seed // 2 % len(files)]
        content = path.read_bytes()
        if content:
            kind = damage if seed % 3 == 0 else damage_sound
            path.write_bytes(kind(content, seed))

    def read(self) -> str:
        found, lines = asyncio.run(self._start())
        numbers = [self._written.index(message) for message in found]  # each as it was written
        assert numbers == sorted(numbers), numbers
        again, more = asyncio.run(self._start())
        assert again == found, f"{len(found)} messages, then {len(again)}"
        assert not any("renamed" in line for line in more), more
        return " ".join(lines)

    async def _start(self) -> tuple[list[Any], list[str]]:
        lines: list[str] = []
        outbox = self._outbox(self._config, on_report=lines.append)
        await outbox.open()
        found = [queued.message for queued in outbox.first(1000)]
        await outbox.close()
        return found, lines
