"""JSON lines on stdout and what ``watch`` prints: no name, text or number ends them."""

import asyncio
import io
import json
from datetime import datetime

import pytest

from stream_hbaf.events import Speech, Status
from stream_hbaf.publish.connection import Received
from stream_hbaf.publish.messages import messages
from stream_hbaf.publish.terminal import JsonLines, human_line, json_line

NAMED = Status(
    source="b", stage="capture", state="degraded", detail="caf\udce9.wav: damaged at 5.6 s"
)
# What anybody may publish under a prefix.
PAYLOADS = (
    rb'{"type":"end","text":"cut \ud83d"}',
    rb'{"text":"\ude00"}',
    b'{"text":"\xed\xa0\xbd"}',
    b'{"a":' * 100_000,
    b'{"a":' * 150 + b"1" + b"}" * 150,
    b"[" * 100_000,
    b"\xff\xfe{",
    b'{"emotion":{"label":"x","score":' + b"9" * 400 + b"}}",
    b'{"emotion":{"label":"x","score":1e308}}',
    b'{"type":"end","text":{"a":1},"speaker":[1],"emotion":{"label":{},"score":true}}',
    b'{"score":' + b"9" * 4200 + b"}",
    b'{"degraded":5,"conflict":1,"emotion":{"score":NaN}}',
    b'{"text":"\\u001b[2J\\u0007"}',
)


class Refusing(io.StringIO):
    """A file on a full disk, until there is room."""

    full = True

    def flush(self) -> None:
        if self.full:
            raise OSError(28, "No space left on device")


def written(out: io.StringIO, *events: Status | Speech) -> bool:
    """Write events; returns whether the run was asked to stop."""

    async def run() -> bool:
        stop = asyncio.Event()
        lines = JsonLines(stop=stop, out=out)
        for event in events:
            await lines.send(event)
        await lines.close(1.0)
        return stop.is_set()

    return asyncio.run(run())


def test_a_file_name_that_is_not_utf_8_is_a_line_and_ends_nothing() -> None:
    """The line is UTF-8, and those after it come as well; so is what MQTT gets."""
    out = io.StringIO()
    assert not written(out, NAMED, Speech(source="a", on=True))
    first, second = map(json.loads, out.getvalue().encode().splitlines())
    assert first["detail"] == "caf\N{REPLACEMENT CHARACTER}.wav: damaged at 5.6 s"
    assert second["event"] == "speech"
    assert messages(NAMED, prefix="p", node="n")[0].payload == b"degraded"


def test_a_reader_that_has_gone_stops_the_run() -> None:
    """Its pipe is closed, here by ourselves."""
    out = io.StringIO()
    out.close()
    assert written(out, NAMED)


def test_a_full_disk_behind_stdout_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """It ends nothing: the microphone and MQTT go on."""
    assert not written(Refusing(), NAMED, NAMED)
    assert caplog.text.count("stdout: can't be written (No space left on device)") == 1


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: repr(payload[:30]))
@pytest.mark.parametrize("topic", ["p/n/a/partial", "p/n/info", "p//", "p/n/\ud83d/utterance"])
def test_watch_prints_whatever_comes(payload: bytes, topic: str) -> None:
    """One line each, in UTF-8; nothing controls the terminal."""
    received = Received(topic, payload, retained=False)
    assert json.loads(json_line(received).encode())["topic"].startswith("p/")
    line = human_line(received, prefix="p", at=datetime(2026, 1, 1))
    assert line.isprintable()
    line.encode()
