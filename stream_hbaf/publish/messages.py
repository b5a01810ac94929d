"""The MQTT contract: every topic and command, and the messages that an event is published as.

``docs/mqtt.md``, the JSON Schemas and the AsyncAPI document are generated from these tables and
from ``events.py``.
"""

import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args

from pydantic import ConfigDict

from stream_hbaf.events import (
    AnyEvent,
    DialogueSummary,
    Event,
    Feedback,
    Health,
    Info,
    Level,
    Partial,
    Response,
    Speech,
    Stage,
    State,
    Status,
    Switch,
    SwitchName,
    Utterance,
)

TRANSIENT_S = 10  # MQTT 5: a partial or speech state is outdated after that
RESPONSE_S = 60  # MQTT 5: nobody waits longer for a response


class RequestBody(Event):
    """The payload of a request: an empty payload or an object. The other keys are arguments."""

    model_config = ConfigDict(extra="allow")

    transaction: str = ""
    """Returned in the response unchanged."""


class Discovery(Event):
    """Home Assistant's device discovery, as its documentation specifies it."""

    model_config = ConfigDict(extra="allow")

    dev: dict[str, Any]
    """The device: one for each node."""
    o: dict[str, Any]
    """The origin: stream-hbaf and its version."""
    cmps: dict[str, Any]
    """The entities by name, each with its platform and a unique id."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A row of the table of topics."""

    name: str
    address: str  # with {levels} to fill in
    payload: type[Event] | tuple[str, ...]  # JSON of this type, or one of these words
    when: str  # it is published
    qos: int = 1
    retain: bool = False
    published: bool = True  # False: other programs publish it, and the recogniser subscribes
    expiry_s: int | None = None  # MQTT 5


ANY_LABEL: tuple[str, ...] = ()  # one of the labels that ``info`` lists
NODE = "{prefix}/{node}"
SOURCE = f"{NODE}/{{source}}"
SWITCH = f"{SOURCE}/{{switch}}"

TOPICS = (
    Topic(
        "available", f"{NODE}/available", ("online", "offline", "stopped"), retain=True,
        when="`online` at each connection, `stopped` after an orderly end; `offline` is the last "
        "will, which the broker publishes when the connection is lost",
    ),
    Topic(
        "info", f"{NODE}/info", Info, retain=True,
        when="at each connection, and when sources come and go",
    ),
    Topic("health", f"{NODE}/health", Health, retain=True, when="every minute"),
    Topic(
        "status", f"{SOURCE}/status/{{stage}}", get_args(State), retain=True,
        when="when the state of a stage changes",
    ),
    Topic(
        "speech", f"{SOURCE}/speech", ("ON", "OFF"), qos=0, expiry_s=TRANSIENT_S,
        when="when speech begins and ends",
    ),
    Topic(
        "utterance", f"{SOURCE}/utterance", Utterance,
        when="`new` when speech begins, `update` at each pause, then `end`, again if its speaker "
        "is revised; an `end` is never lost",
    ),
    Topic(
        "partial", f"{SOURCE}/partial", Partial, qos=0, expiry_s=TRANSIENT_S,
        when="during speech; dropped when the broker is slow or away",
    ),
    Topic(
        "emotion", f"{SOURCE}/emotion", ANY_LABEL, retain=True,
        when="after an `end` with another label than the one before",
    ),
    Topic(
        "dialogue", f"{SOURCE}/dialogue", DialogueSummary, retain=True, when="after each `end`"
    ),
    Topic(
        "switch", f"{SWITCH}/state", ("ON", "OFF"), retain=True,
        when="at the start, and when the switch is set",
    ),
    Topic(
        "set_switch", f"{SWITCH}/set", ("ON", "OFF"), published=False,
        when="to set a switch of a source",
    ),
    Topic(
        "feedback", f"{SOURCE}/feedback", Feedback, published=False,
        when="to correct the emotion or the speaker of an utterance",
    ),
    Topic(
        "request", f"{NODE}/request/{{command}}", RequestBody, published=False,
        when="to send a command",
    ),
    Topic(
        "response", f"{NODE}/response/{{command}}", Response, expiry_s=RESPONSE_S,
        when="once for each request",
    ),
    Topic(
        "discovery", "{discovery}/device/{device}/config", Discovery, retain=True,
        when="at each connection, and when Home Assistant restarts; only with "
        "`mqtt.homeassistant`",
    ),
)  # fmt: skip

# The levels of an address: their meaning, and the regular expression of their values.
LEVELS = {
    "prefix": ("`mqtt.prefix`, one or more levels", r"[^+#\s]+"),
    "node": ("`mqtt.node`, the name of this recogniser", r"[^/+#\s]+"),
    "source": ("`source.name`, the name of the audio source", r"[^/+#\s]+"),
    "stage": ("the stage of the pipeline", "|".join(get_args(Stage))),
    "switch": ("the switch's name", "|".join(get_args(SwitchName))),
    "command": ("the command's name", r"[^/+#]+"),
    "discovery": ("`mqtt.homeassistant`, usually `homeassistant`", r"[^+#\s]+"),
    "device": ("the device's name in Home Assistant, made from prefix and node", r"[^/+#\s]+"),
}


@dataclass(frozen=True, slots=True)
class Command:
    """A command that can be requested."""

    name: str
    effect: str
    arguments: dict[str, str] = field(default_factory=dict)  # name: meaning
    result: str = ""  # the response's ``data``


ONE_SOURCE = {"source": "the source; all of them if left out"}
ONE_DIALOGUE = {"dialogue_id": "the dialogue's id; may be left out if one alone is going on"}

COMMANDS = (
    Command("ping", "none: shows that the recogniser answers", result="`time`, in Unix seconds"),
    Command(
        "reset", "ends the current utterances and dialogues; new dialogues begin", ONE_SOURCE,
        "`ended`: the number of dialogues that ended",
    ),
    Command("flush", "ends the current utterances, with the trigger `request`", ONE_SOURCE),
    Command(
        "set_model", "loads another bundle", {"model": "its name or folder"}, "`model`, `sha256`",
    ),
    Command(
        "get_state", "none: returns the present state",
        result="the fields of `info`; `health`, `switches` by source, `dialogues`",
    ),
    Command(
        "forget",
        "erases a dialogue from memory, outboxes and recorded sessions; after an error ask again",
        {"dialogue_id": "the dialogue's id"}, "`erased`: the number of erased messages and events",
    ),
    Command(
        "rename_speaker", "gives a speaker of a dialogue another name",
        {"speaker": "the present name", "name": "the new one", **ONE_DIALOGUE},
        "`changed`: the number of utterances that are revised",
    ),
    Command(
        "merge_speakers", "makes two speakers of a dialogue one",
        {"speaker": "who is no speaker apart", "into": "who it is", **ONE_DIALOGUE},
        "`changed`: the number of utterances that are revised",
    ),
    Command(
        "devices", "none: returns the microphones",
        result="`devices`: `index`, `name`, `channels`, `rate_hz`, `is_default` of each",
    ),
)  # fmt: skip


def find_topic(topic: str) -> tuple[Topic, dict[str, str]] | None:
    """The row of the table that a topic belongs to and the values of its levels; None if none."""
    for row in TOPICS:
        if found := _pattern(row.address).fullmatch(topic):
            return row, found.groupdict()
    return None


@cache
def _pattern(address: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{LEVELS[m[1]][1]})", address))


@dataclass(frozen=True, slots=True)
class Message:
    """What is handed to the MQTT client."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    droppable: bool = False  # may be lost when the broker is slow or away
    dialogue_id: str = ""  # the dialogue that the payload is about, by which it can be erased
    # MQTT 5 only:
    expires_s: int | None = None
    properties: tuple[tuple[str, str], ...] = ()  # user properties
    correlation: bytes = b""  # correlation data of the request that this answers

    @property
    def durable(self) -> bool:
        """Whether it must reach the broker even if this program is killed."""
        return bool(self.dialogue_id) and not self.retain and not self.droppable


def messages(
    event: AnyEvent | Response,
    *,
    prefix: str,
    node: str,
    last_label: str = "",
    traceparent: str = "",
) -> list[Message]:
    """The messages that an event is published as, in order; none for a ``Level``.

    ``last_label`` is the label last sent to the source's ``emotion`` topic, which carries
    changes only: an ``end`` that repeats it, or revises an earlier utterance, sends none.
    ``traceparent`` is the W3C trace context of an ``end`` that is traced.
    """
    levels = {"prefix": prefix, "node": node, **event.__dict__}
    match event:
        case Utterance():
            found = [_message("utterance", event, levels)]
            if traceparent:
                traced = (*found[0].properties, ("traceparent", traceparent))
                found[0] = replace(found[0], properties=traced)
            label = event.emotion.label if event.emotion and event.type == "end" else ""
            if label and label != last_label:
                found.append(_message("emotion", event, levels, word=label))
            return found
        case Status():
            return [_message("status", event, levels, word=event.state)]
        case Speech() | Switch():
            name = type(event).__name__.lower()
            return [_message(name, event, levels, word="ON" if event.on else "OFF")]
        case Level():
            return []
        case _:
            (name,) = (topic.name for topic in TOPICS if topic.payload is type(event))
            return [_message(name, event, levels)]


def available(state: str, *, prefix: str, node: str) -> Message:
    """``online``, ``offline`` (the last will) or ``stopped``."""
    return Message(f"{prefix}/{node}/available", state.encode(), retain=True)


def retained_topics(source: str, *, prefix: str, node: str) -> list[str]:
    """Every topic under which something about a source may be retained."""
    values: dict[str, tuple[str, ...]] = {"stage": get_args(Stage), "switch": get_args(SwitchName)}
    found = []
    for topic in TOPICS:
        if topic.retain and "{source}" in topic.address:
            level = next((name for name in values if f"{{{name}}}" in topic.address), "")
            for value in values.get(level, ("",)):
                levels = {"prefix": prefix, "node": node, "source": source, level: value}
                found.append(topic.address.format_map(levels))
    return found


def erasure(message: Message) -> Message:
    """The message that makes the broker delete a retained one."""
    return Message(message.topic, b"", retain=True)


def encode(event: Event) -> bytes:
    """Compact JSON in UTF-8 without the fields that are None; numbers are rounded.

    Raises ValueError for a number that JSON can't hold (NaN, infinity).
    """
    fields = _rounded(event.model_dump(by_alias=True, exclude_none=True), key="")
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event_message(event: Event) -> str:
    """An event as JSON, for a WebSocket: the payload's fields, and its type in ``event``."""
    return f'{{"event":"{type(event).__name__.lower()}",{encode(event).decode()[1:]}'


def _message(name: str, event: Event, levels: dict[str, Any], *, word: str = "") -> Message:
    """The message on a topic of the table: ``word``, or else the event as JSON."""
    (topic,) = (topic for topic in TOPICS if topic.name == name)
    return Message(
        topic.address.format_map(levels),
        word.encode() if word else encode(event),
        qos=topic.qos,
        retain=topic.retain,
        droppable=topic.qos == 0,
        dialogue_id=levels.get("dialogue_id", ""),
        expires_s=topic.expiry_s,
        properties=(("source", levels["source"]),) if word else _properties(event),
    )


def _properties(event: Event) -> tuple[tuple[str, str], ...]:
    """MQTT 5 user properties, for receivers that don't read payloads."""
    names = ("schema_", "source", "speaker")
    return tuple((n.rstrip("_"), getattr(event, n)) for n in names if getattr(event, n, ""))


def _rounded(value: Any, *, key: str) -> Any:
    """Durations to 0.1 ms, everything else (probabilities, their logarithms) to 0.0001."""
    if isinstance(value, dict):
        inside_ms = key.endswith("_ms")
        return {k: _rounded(v, key=key if inside_ms else k) for k, v in value.items()}
    if isinstance(value, float):
        return round(value, 1 if key.endswith("_ms") else 4)
    return value
