"""Where emotions go, in words: one event becomes the messages that travel, to the byte."""

import json
from dataclasses import dataclass
from typing import Any

from stream_hbaf.events import AnyEvent, Event, Info, Partial, Speech, Status, Utterance

MILLISECOND_DIGITS = 1
PROBABILITY_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False  # the broker shows it to whoever subscribes later
    droppable: bool = False  # may be lost when the broker can't keep up


def messages(event: AnyEvent, *, prefix: str, node: str, last_label: str = "") -> list[Message]:
    """What is published of an event, in order; nothing of what is for the screen only.

    ``last_label`` is the label last sent to the source's ``emotion`` topic, which carries
    changes only: an ``end`` that repeats it sends no emotion message.
    """
    root = f"{prefix}/{node}"
    match event:
        case Utterance():
            found = [Message(f"{root}/{event.source}/utterance", encode(event))]
            label = event.emotion.label if event.emotion and event.type == "end" else ""
            if label and label != last_label:
                topic = f"{root}/{event.source}/emotion"
                found.append(Message(topic, label.encode(), retain=True))
            return found
        case Partial():
            topic = f"{root}/{event.source}/partial"
            return [Message(topic, encode(event), qos=0, droppable=True)]
        case Info():
            return [Message(f"{root}/info", encode(event), retain=True)]
        case Status():
            topic = f"{root}/{event.source}/status/{event.stage}"
            return [Message(topic, event.state.encode(), retain=True)]
        case Speech():
            payload = b"ON" if event.on else b"OFF"
            return [Message(f"{root}/{event.source}/speech", payload, qos=0, droppable=True)]
        case _:
            return []


def available(state: str, *, prefix: str, node: str) -> Message:
    """``online``, ``offline`` (the last will) or ``stopped``."""
    return Message(f"{prefix}/{node}/available", state.encode(), retain=True)


def encode(event: Event) -> bytes:
    """Compact JSON in UTF-8, absent fields left out, numbers rounded to what they mean.

    Raises ValueError for a number that JSON can't hold (NaN, infinity).
    """
    fields = _rounded(event.model_dump(by_alias=True, exclude_none=True), key="")
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _rounded(value: Any, *, key: str) -> Any:
    """Durations to 0.1 ms, everything else (probabilities, their logarithms) to 0.0001."""
    if isinstance(value, dict):
        inside_ms = key.endswith("_ms")
        return {k: _rounded(v, key=key if inside_ms else k) for k, v in value.items()}
    if isinstance(value, float):
        return round(value, MILLISECOND_DIGITS if key.endswith("_ms") else PROBABILITY_DIGITS)
    return value
