"""The contract with other programs: every topic there is, and what can be asked for."""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

from pydantic import ConfigDict

from stream_hbaf.events import (
    DialogueSummary,
    Event,
    Feedback,
    Health,
    Info,
    Partial,
    Response,
    Stage,
    State,
    SwitchName,
    Utterance,
)

PASSING_S = 10  # what is said of now means nothing later
ANSWER_S = 60  # nobody waits longer


class RequestBody(Event):
    """What a request carries; an empty payload is an empty object. The other keys are arguments."""

    model_config = ConfigDict(extra="allow")

    transaction: str = ""
    """Comes back in the answer as it was."""


class Discovery(Event):
    """Home Assistant's device discovery; its documentation says what each part holds."""

    model_config = ConfigDict(extra="allow")

    dev: dict[str, Any]
    """The device: one a node."""
    o: dict[str, Any]
    """Who says so: stream-hbaf, and its version."""
    cmps: dict[str, Any]
    """The device's entities by name, each with its platform and a unique id."""


@dataclass(frozen=True, slots=True)
class Topic:
    name: str
    address: str
    carries: type[Event] | tuple[str, ...]  # JSON of this type, or one of these words
    when: str
    qos: int = 1
    retain: bool = False
    ours: bool = True  # False: others publish it, and we listen
    expiry_s: int | None = None  # with MQTT 5

    def read(self, topic: str) -> dict[str, str] | None:
        """What stands for each ``{name}`` of the address; None if it is another topic."""
        found = _pattern(self.address).fullmatch(topic)
        return found.groupdict() if found else None


ANY_LABEL: tuple[str, ...] = ()  # the words that ``info`` lists
NODE = "{prefix}/{node}"
SOURCE = f"{NODE}/{{source}}"
SWITCH = f"{SOURCE}/{{switch}}"

TOPICS = (
    Topic(
        "available", f"{NODE}/available", ("online", "offline", "stopped"), retain=True,
        when="`online` at each connection, `stopped` at the end; `offline` is the last will, which "
        "the broker publishes when the recogniser is gone without a word",
    ),
    Topic("info", f"{NODE}/info", Info, retain=True, when="at each connection"),
    Topic("health", f"{NODE}/health", Health, retain=True, when="every minute"),
    Topic(
        "status", f"{SOURCE}/status/{{stage}}", get_args(State), retain=True,
        when="when a stage's state changes",
    ),
    Topic(
        "speech", f"{SOURCE}/speech", ("ON", "OFF"), qos=0, expiry_s=PASSING_S,
        when="when somebody starts or stops speaking",
    ),
    Topic(
        "utterance", f"{SOURCE}/utterance", Utterance,
        when="`new` when speech begins, `update` at each pause, `end` once; an `end` is never lost",
    ),
    Topic(
        "partial", f"{SOURCE}/partial", Partial, qos=0, expiry_s=PASSING_S,
        when="while somebody speaks; dropped when it is in the way",
    ),
    Topic(
        "emotion", f"{SOURCE}/emotion", ANY_LABEL, retain=True,
        when="after an `end` whose label differs from the last one's",
    ),
    Topic(
        "dialogue", f"{SOURCE}/dialogue", DialogueSummary, retain=True, when="after each `end`"
    ),
    Topic(
        "switch", f"{SWITCH}/state", ("ON", "OFF"), retain=True,
        when="at the start, and when a switch is turned",
    ),
    Topic(
        "turn", f"{SWITCH}/set", ("ON", "OFF"), ours=False, when="to turn a switch of a source"
    ),
    Topic(
        "feedback", f"{SOURCE}/feedback", Feedback, ours=False,
        when="to say what an utterance's emotion really was",
    ),
    Topic(
        "request", f"{NODE}/request/{{command}}", RequestBody, ours=False,
        when="to ask for something",
    ),
    Topic(
        "response", f"{NODE}/response/{{command}}", Response, expiry_s=ANSWER_S,
        when="once for each request",
    ),
    Topic(
        "discovery", "{discovery}/device/{device}/config", Discovery, retain=True,
        when="at each connection, and when Home Assistant comes back; only with "
        "`mqtt.homeassistant`",
    ),
)  # fmt: skip

LEVELS = {
    "prefix": ("`mqtt.prefix`, one or more levels", r"[^+#\s]+"),
    "node": ("`mqtt.node`: this recogniser among others", r"[^/+#\s]+"),
    "source": ("`source.name`: which microphone, file or stream", r"[^/+#\s]+"),
    "stage": ("the part of the pipeline", "|".join(get_args(Stage))),
    "switch": ("the switch", "|".join(get_args(SwitchName))),
    "command": ("what is asked for", r"[^/+#]+"),
    "discovery": ("`mqtt.homeassistant`, usually `homeassistant`", r"[^+#\s]+"),
    "device": ("the node's name for Home Assistant", r"[^/+#\s]+"),
}


@dataclass(frozen=True, slots=True)
class Command:
    """Something to ask for, with what it needs to know and what the answer's ``data`` holds."""

    name: str
    does: str
    arguments: dict[str, str] = field(default_factory=dict)
    answer: str = ""


ONE_SOURCE = {"source": "which source; without it, all"}

COMMANDS = (
    Command("ping", "nothing: it shows that somebody is there", answer="`time`, in Unix seconds"),
    Command(
        "reset", "what is being said ends here; what follows begins a new dialogue", ONE_SOURCE,
        "`ended`: how many dialogues did",
    ),
    Command("flush", "what is being said ends here, with the trigger `request`", ONE_SOURCE),
    Command(
        "set_model", "another bundle takes over", {"model": "its name or folder"},
        "`model`, `sha256`",
    ),
    Command(
        "get_state", "says how everything stands",
        answer="what `info` says; `health`, `switches` by source, `dialogues`",
    ),
    Command(
        "forget", "erases a dialogue everywhere: memory, outbox, sessions",
        {"dialogue_id": "which one"}, "`erased`: how many things that were",
    ),
    Command(
        "devices", "lists the microphones",
        answer="`devices`: `index`, `name`, `channels`, `rate_hz`, `is_default` of each",
    ),
)  # fmt: skip


def find_topic(topic: str) -> tuple[Topic, dict[str, str]] | None:
    """The kind of topic that this one is, with what its levels say; None if it is none of ours."""
    for kind in TOPICS:
        levels = kind.read(topic)
        if levels is not None:
            return kind, levels
    return None


@cache
def _pattern(address: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{LEVELS[m[1]][1]})", address))
