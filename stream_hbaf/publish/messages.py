"""Where emotions go, in words: one event becomes the messages that travel, to the byte."""

import json
from dataclasses import dataclass
from typing import Any

from stream_hbaf.events import (
    AnyEvent,
    DialogueSummary,
    Event,
    Health,
    Info,
    Partial,
    Response,
    Speech,
    Status,
    Switch,
    Utterance,
)
from stream_hbaf.publish.topics import ANSWER_S, PASSING_S

MILLISECOND_DIGITS = 1
PROBABILITY_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False  # the broker shows it to whoever subscribes later
    droppable: bool = False  # may be lost when the broker can't keep up
    dialogue_id: str = ""  # what it tells of; nothing of a forgotten dialogue is published
    # Only MQTT 5 has these:
    expires_s: int | None = None  # the broker drops what it couldn't deliver by then
    properties: tuple[tuple[str, str], ...] = ()  # names and values for who doesn't read payloads
    correlation: bytes = b""  # which request this answers

    @property
    def lasting(self) -> bool:
        """Whether it must reach the broker even if this program is killed."""
        return bool(self.dialogue_id) and not self.retain and not self.droppable


def messages(
    event: AnyEvent | Response, *, prefix: str, node: str, last_label: str = ""
) -> list[Message]:
    """What is published of an event, in order; nothing of what is for the screen only.

    ``last_label`` is the label last sent to the source's ``emotion`` topic, which carries
    changes only: an ``end`` that repeats it sends no emotion message.
    """
    root = f"{prefix}/{node}"
    match event:
        case Utterance():
            return _utterance(event, root=f"{root}/{event.source}", last_label=last_label)
        case Partial() | Speech():
            return [_passing(event, root=f"{root}/{event.source}")]
        case Info():
            return [_json(event, f"{root}/info", retain=True)]
        case Health():
            return [_json(event, f"{root}/health", retain=True)]
        case DialogueSummary():
            return [_json(event, f"{root}/{event.source}/dialogue", retain=True)]
        case Status():
            topic = f"{root}/{event.source}/status/{event.stage}"
            return [_word(event.state, topic, source=event.source)]
        case Switch():
            topic = f"{root}/{event.source}/{event.switch}/state"
            return [_word(_on_or_off(event), topic, source=event.source)]
        case Response():
            topic = f"{root}/response/{event.command}"
            return [_json(event, topic, expires_s=ANSWER_S)]
        case _:
            return []


def available(state: str, *, prefix: str, node: str) -> Message:
    """``online``, ``offline`` (the last will) or ``stopped``."""
    return Message(f"{prefix}/{node}/available", state.encode(), retain=True)


def erasure(message: Message) -> Message:
    """What makes the broker forget a retained message."""
    return Message(message.topic, b"", retain=True)


def encode(event: Event) -> bytes:
    """Compact JSON in UTF-8, absent fields left out, numbers rounded to what they mean.

    Raises ValueError for a number that JSON can't hold (NaN, infinity).
    """
    fields = _rounded(event.model_dump(by_alias=True, exclude_none=True), key="")
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _utterance(event: Utterance, *, root: str, last_label: str) -> list[Message]:
    found = [_json(event, f"{root}/utterance")]
    label = event.emotion.label if event.emotion and event.type == "end" else ""
    if label and label != last_label:
        topic = f"{root}/emotion"
        found.append(_word(label, topic, source=event.source, dialogue_id=event.dialogue_id))
    return found


def _passing(event: Partial | Speech, *, root: str) -> Message:
    passing: dict[str, Any] = {"qos": 0, "droppable": True, "expires_s": PASSING_S}
    if isinstance(event, Partial):
        return _json(event, f"{root}/partial", **passing)
    properties = (("source", event.source),)
    return Message(f"{root}/speech", _on_or_off(event).encode(), properties=properties, **passing)


def _json(event: Event, topic: str, **options: Any) -> Message:
    told = {"schema_": "schema", "source": "source", "speaker": "speaker"}
    values = [(name, getattr(event, field, "")) for field, name in told.items()]
    return Message(
        topic,
        encode(event),
        dialogue_id=getattr(event, "dialogue_id", ""),
        properties=tuple((name, value) for name, value in values if value),
        **options,
    )


def _word(word: str, topic: str, *, source: str, dialogue_id: str = "") -> Message:
    properties = (("source", source),)
    return Message(
        topic, word.encode(), retain=True, dialogue_id=dialogue_id, properties=properties
    )


def _on_or_off(event: Speech | Switch) -> str:
    return "ON" if event.on else "OFF"


def _rounded(value: Any, *, key: str) -> Any:
    """Durations to 0.1 ms, everything else (probabilities, their logarithms) to 0.0001."""
    if isinstance(value, dict):
        inside_ms = key.endswith("_ms")
        return {k: _rounded(v, key=key if inside_ms else k) for k, v in value.items()}
    if isinstance(value, float):
        return round(value, MILLISECOND_DIGITS if key.endswith("_ms") else PROBABILITY_DIGITS)
    return value
