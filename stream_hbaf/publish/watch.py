"""Where emotions went: what is published, as it comes, for people or as JSON lines."""

import contextlib
import os
from datetime import datetime
from json import dumps, loads
from typing import Any, TextIO

from stream_hbaf.config import MqttConfig
from stream_hbaf.publish.connection import OnStatus, Received, subscribe

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


async def watch(
    config: MqttConfig, *, out: TextIO, json: bool, on_status: OnStatus | None = None
) -> None:
    """Show every message under the prefix until cancelled, or until nobody reads ``out``.

    Raises BrokerError if the broker can't be reached at first; later it reconnects, and
    ``on_status`` hears of it.
    """
    tell = on_status or (lambda _connected, _line: None)
    colours = not json and out.isatty() and "NO_COLOR" not in os.environ
    received = subscribe(config, topic=f"{config.prefix}/+/#", on_status=tell)
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
                _let_go(out)
                return


def json_line(message: Received) -> str:
    """``{"topic", "payload"}``; the payload as the object it is, else as text."""
    payload = _read(message.payload)
    return dumps({"topic": message.topic, "payload": payload}, ensure_ascii=False)


def human_line(message: Received, *, prefix: str, at: datetime) -> str:
    """Time, where it comes from, and what happened, in one printable line."""
    node, _, rest = message.topic.removeprefix(f"{prefix}/").partition("/")
    source, _, kind = rest.partition("/")
    payload = _read(message.payload)
    where = f"{node}/{source}" if kind else node
    if isinstance(payload, dict):
        said = _utterance(payload) if kind in ("utterance", "partial") else _brief(payload)
    else:
        said = payload
    what = said if kind in ("utterance", "partial") else f"{kind or rest} {said}"
    return _printable(f"{at:%H:%M:%S}  {where}  {what}")


def _dimmed(message: Received, *, prefix: str, colours: bool) -> str:
    """What is not final stands back."""
    line = human_line(message, prefix=prefix, at=datetime.now().astimezone())
    kind = message.topic.rpartition("/")[2]
    payload = _read(message.payload)
    ended = isinstance(payload, dict) and payload.get("type") == "end"
    passing = kind == "partial" or (kind == "utterance" and not ended)
    return f"{DIM}{line}{PLAIN}" if colours and passing else line


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


def _brief(payload: dict[str, Any]) -> str:
    """Scalars only: the rest is for machines."""
    return "  ".join(f"{k}={v}" for k, v in payload.items() if isinstance(v, str | int | float))


def _number(value: object, *, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def _read(payload: bytes) -> Any:
    """A JSON object as such; everything else (ON, online, a label, damage) as text."""
    text = payload.decode(errors="replace")
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            return loads(text, parse_constant=_refuse)
    return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _printable(line: str) -> str:
    """Anybody may publish: no control sequence of theirs reaches the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def _let_go(out: TextIO) -> None:
    """Python flushes stdout once more when it ends, and would complain of the closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, out.fileno())
        os.close(silence)
