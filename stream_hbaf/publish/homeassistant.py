"""Home Assistant discovery: the message that makes it show sources, emotions and switches."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from stream_hbaf.config import MqttConfig
from stream_hbaf.events import Info, SwitchName
from stream_hbaf.publish.address import node_name
from stream_hbaf.publish.messages import Message

EMOTION_S = 600  # an emotion becomes unknown after that
SPEECH_S = 60  # speech counts as over after that, should the message about its end be lost
HEALTH_S = 180  # health becomes unknown after three missed messages
SWITCH_ICONS: dict[SwitchName, str] = {
    "listening": "mdi:microphone",
    "transcribe": "mdi:closed-caption-outline",
    "record": "mdi:record-rec",
}

ENDED = "value_json.type == 'end'"
FIRST = "value_json.revision is not defined"  # else it revises an earlier `end`
# Of the newest utterance, which a revision of an earlier one isn't.
NEWEST = f"{ENDED} and ({FIRST} or value_json.id == this.attributes.utterance)"
# Only an `end` changes the state; an expired state stays unknown until the next one.
LABEL = (
    "{{ value_json.emotion.label if " + NEWEST + " and value_json.emotion is defined "
    "else (this.state if this.state not in ('unavailable', 'unknown') else 'None') }}"
)
# A state is limited to 255 characters, attributes are not: so the transcript is an attribute.
ATTRIBUTES = (
    "{% set utterance = value_json if " + NEWEST + " else this.attributes %}"
    "{% set emotion = value_json.emotion | default({}) if " + NEWEST + " else this.attributes %}"
    "{{ {'text': utterance.text | default(''), 'speaker': utterance.speaker | default(''), "
    "'speaker_score': utterance.speaker_score | default(none), "
    "'score': emotion.score | default(none), 'abstained': emotion.abstained | default(none), "
    "'utterance': (utterance.id if " + NEWEST + " else utterance.utterance) | default('')} "
    "| tojson }}"
)
# One event for each utterance, when it ends.
EVENT_IF = "{{{{ dict(value_json, event_type=value_json.type) | tojson if {} else '' }}}}"
# Home Assistant knows two words only: `stopped` is as unavailable as `offline`.
AVAILABLE = "{{ 'online' if value == 'online' else 'offline' }}"


def discovery(
    info: Info, config: MqttConfig, *, removed: Mapping[str, str] | None = None
) -> Message:
    """The discovery message: one device with all its entities. Needs Home Assistant 2024.11.

    ``removed`` are entities of before, platforms by key: Home Assistant removes an entity that is
    announced with its platform alone, and keeps one that is left out.
    """
    node = node_name(config)
    root = f"{config.prefix}/{node}"
    device = _identifier(f"{config.prefix}_{node}")
    entities = {"health": _health(root)}
    for source in info.sources:
        for kind, entity in _entities(f"{root}/{source}", labels=info.labels).items():
            entities[f"{_identifier(source)}_{kind}"] = {"name": f"{source} {kind}", **entity}
    for name in info.speakers:
        entities[_identifier(f"speaker_{name}")] = {"name": name, **_speaker(root, name)}
    for key, entity in entities.items():
        entity["unique_id"] = f"{device}_{key}"
    payload = {
        "dev": {"ids": [device], "name": f"stream-hbaf {node}", "sw": info.version}
        | {"mdl": info.model.id, "mf": "stream-hbaf"},
        "o": {"name": "stream-hbaf", "sw": info.version},
        "availability": [
            {
                "topic": f"{root}/available",
                "value_template": AVAILABLE,
                "payload_available": "online",
                "payload_not_available": "offline",
            }
        ],
        "qos": 1,
        "cmps": entities | {key: {"p": platform} for key, platform in (removed or {}).items()},
    }
    topic = f"{config.homeassistant}/device/{device}/config"
    return Message(topic, json.dumps(payload, ensure_ascii=False).encode(), retain=True)


def platforms(message: Message) -> dict[str, str]:
    """The entities that a discovery message announces, platforms by key; none of others."""
    if not message.topic.endswith("/config") or not message.payload:
        return {}
    entities = json.loads(message.payload)["cmps"]
    return {key: entity["p"] for key, entity in entities.items()}


def _entities(root: str, *, labels: list[str]) -> dict[str, dict[str, Any]]:
    """The entities of the source with the topics ``root``, by kind, without their names."""
    emotion = {
        "p": "sensor",
        "device_class": "enum",
        "options": labels,
        "state_topic": f"{root}/utterance",
        "value_template": LABEL,
        "json_attributes_topic": f"{root}/utterance",
        "json_attributes_template": ATTRIBUTES,
        "expire_after": EMOTION_S,
        "icon": "mdi:emoticon-outline",
    }
    utterance = {
        "p": "event",
        "event_types": ["end"],
        "state_topic": f"{root}/utterance",
        "value_template": EVENT_IF.format(f"{ENDED} and {FIRST}"),
        "icon": "mdi:comment-text-outline",
    }
    speech = {
        "p": "binary_sensor",
        "device_class": "sound",
        "state_topic": f"{root}/speech",
        "off_delay": SPEECH_S,
    }
    switches = {
        str(name): {
            "p": "switch",
            "state_topic": f"{root}/{name}/state",
            "command_topic": f"{root}/{name}/set",
            "icon": icon,
            "entity_category": "config",
        }
        for name, icon in SWITCH_ICONS.items()
    }
    return {"emotion": emotion, "utterance": utterance, "speech": speech, **switches}


def _speaker(root: str, name: str) -> dict[str, Any]:
    """An event for each utterance of a known speaker, at any source."""
    spoken = f"{ENDED} and {FIRST} and value_json.speaker == {json.dumps(name, ensure_ascii=False)}"
    return {
        "p": "event",
        "event_types": ["end"],
        "state_topic": f"{root}/+/utterance",
        "value_template": EVENT_IF.format(spoken),
        "icon": "mdi:account-voice",
    }


def _health(root: str) -> dict[str, Any]:
    """A sensor of the memory in use; the other figures are its attributes."""
    return {
        "p": "sensor",
        "name": "health",
        "device_class": "data_size",
        "unit_of_measurement": "MB",
        "state_class": "measurement",
        "state_topic": f"{root}/health",
        "value_template": "{{ value_json.memory_mb }}",
        "json_attributes_topic": f"{root}/health",
        "expire_after": HEALTH_S,
        "entity_category": "diagnostic",
    }


def _identifier(name: str) -> str:
    """``name`` in the characters that Home Assistant allows; different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if plain == name:
        return name
    return f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"
