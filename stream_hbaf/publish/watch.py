"""The ``watch`` command: prints published messages as they arrive, for people or as JSON lines."""

import contextlib
import os
from datetime import datetime
from json import dumps
from typing import Any, TextIO

from pydantic_core import from_json

from stream_hbaf.config import MqttConfig
from stream_hbaf.publish.connection import OnConnectionStatus, Received, subscribe

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


async def watch(
    config: MqttConfig, *, out: TextIO, json: bool, on_status: OnConnectionStatus | None = None
) -> None:
    """Print every message under the prefix until cancelled, or until ``out`` is a closed pipe.

    Raises BrokerError if the first connection fails. Later ones are restored, and ``on_status``
    is called when a connection is lost and restored.
    """
    on_status = on_status or (lambda _connected, _line: None)
    colours = not json and out.isatty() and "NO_COLOR" not in os.environ
    received = subscribe(config, topic=f"{config.prefix}/+/#", on_status=on_status)
    async with contextlib.aclosing(received):
        async for message in received:
            line = (
                json_line(message)
                if json
                else _dimmed(message, prefix=config.prefix, colours=colours)
            )
            try:
                print(line, file=out, flush=True)
            except BrokenPipeError:
                _silence(out)
                return


def json_line(message: Received) -> str:
    """``{"topic": …, "payload": …}``; the payload is an object if it holds one, else text."""
    payload = _decode(message.payload)
    return dumps({"topic": message.topic, "payload": payload}, ensure_ascii=False)


def human_line(message: Received, *, prefix: str, at: datetime) -> str:
    """Time, node and source, and the content, in one printable line."""
    node, _, rest = message.topic.removeprefix(f"{prefix}/").partition("/")
    source, _, kind = rest.partition("/")
    payload = _decode(message.payload)
    where = f"{node}/{source}" if kind else node
    is_utterance = kind in ("utterance", "partial")
    if isinstance(payload, dict):
        content = _utterance(payload) if is_utterance else _scalars(payload)
    else:
        content = payload
    what = content if is_utterance else f"{kind or rest} {content}"
    return _printable(f"{at:%H:%M:%S}  {where}  {what}")


def _dimmed(message: Received, *, prefix: str, colours: bool) -> str:
    """A line for people; one that is not final is dimmed."""
    line = human_line(message, prefix=prefix, at=datetime.now().astimezone())
    kind = message.topic.rpartition("/")[2]
    payload = _decode(message.payload)
    ended = isinstance(payload, dict) and payload.get("type") == "end"
    provisional = kind == "partial" or (kind == "utterance" and not ended)
    return f"{DIM}{line}{PLAIN}" if colours and provisional else line


def _utterance(payload: dict[str, Any]) -> str:
    kind = payload.get("type", "partial")
    parts = [str(payload.get("speaker", ""))]
    emotion = payload.get("emotion")
    if isinstance(emotion, dict):
        label = f"{emotion.get('label', '')}{'?' * (emotion.get('abstained') is True)}"
        parts.append(f"{label} {_number(emotion.get('score'), digits=2)}")
    if payload.get("conflict") is True:
        parts.append("≠")
    if text := payload.get("text"):
        parts.append(f"'{text}'")
    if degraded := payload.get("degraded"):
        parts.append(f"[{degraded}]")
    if kind != "end":
        parts.append(f"({kind})")
    return "  ".join(part for part in parts if part)


def _scalars(payload: dict[str, Any]) -> str:
    return "  ".join(f"{k}={v}" for k, v in payload.items() if isinstance(v, str | int | float))


def _number(value: object, *, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def _decode(payload: bytes) -> Any:
    """A JSON object as a dict; everything else (ON, a label, invalid JSON) as text."""
    if payload.startswith(b"{"):
        with contextlib.suppress(ValueError):
            return from_json(payload, allow_inf_nan=False)
    return payload.decode(errors="replace")


def _printable(line: str) -> str:
    """Without control characters: anybody may publish, and they could control the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def _silence(out: TextIO) -> None:
    """Replace a closed pipe: Python flushes stdout when it ends, and would print an error."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, out.fileno())
        os.close(null)
