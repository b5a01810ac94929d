"""Where emotions go in Home Assistant: what it needs to know to show them, by itself."""

import hashlib
import json
import re
from typing import Any

from stream_hbaf.config import MqttConfig
from stream_hbaf.events import Info, SwitchName
from stream_hbaf.publish.address import node_name
from stream_hbaf.publish.messages import Message

EMOTION_S = 600  # after that nobody knows any more what somebody feels
SPEECH_S = 60  # speech is over, even if nobody says so
HEALTH_S = 180  # three of its periods
SWITCH_ICONS: dict[SwitchName, str] = {
    "listening": "mdi:microphone",
    "transcribe": "mdi:closed-caption-outline",
    "record": "mdi:record-rec",
}

ENDED = "value_json.type == 'end'"
# An utterance's beginning and updates leave all as it is. What expired stays unknown.
LABEL = (
    "{{ value_json.emotion.label if " + ENDED + " and value_json.emotion is defined "
    "else (this.state if this.state not in ('unavailable', 'unknown') else 'None') }}"
)
# A state may have 255 characters, attributes more: so the words are one of them.
ATTRIBUTES = (
    "{% set said = value_json if " + ENDED + " else this.attributes %}"
    "{% set felt = value_json.emotion | default({}) if " + ENDED + " else this.attributes %}"
    "{{ {'text': said.text | default(''), 'speaker': said.speaker | default(''), "
    "'score': felt.score | default(none), 'abstained': felt.abstained | default(none), "
    "'utterance': (said.id if " + ENDED + " else said.utterance) | default('')} | tojson }}"
)
EVENT = "{{ dict(value_json, event_type=value_json.type) | tojson if " + ENDED + " else '' }}"
# `stopped` is as absent as `offline`, but Home Assistant knows two words only.
AVAILABLE = "{{ 'online' if value == 'online' else 'offline' }}"


def birth_topic(config: MqttConfig) -> str:
    """Where Home Assistant says that it is back; empty without discovery."""
    return f"{config.homeassistant}/status" if config.homeassistant else ""


def discovery(info: Info, config: MqttConfig) -> Message:
    """One device with all its entities; Home Assistant 2024.11 and later understand it."""
    node = node_name(config)
    root = f"{config.prefix}/{node}"
    device = _identifier(f"{config.prefix}_{node}")
    entities = {"health": _health(root)}
    for source in info.sources:
        for kind, entity in _entities(source, f"{root}/{source}", labels=info.labels).items():
            entities[f"{_identifier(source)}_{kind}"] = entity
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
        "cmps": entities,
    }
    topic = f"{config.homeassistant}/device/{device}/config"
    return Message(topic, json.dumps(payload, ensure_ascii=False).encode(), retain=True)


def _entities(source: str, root: str, *, labels: list[str]) -> dict[str, dict[str, Any]]:
    """Of one source, by kind."""
    emotion = {
        "p": "sensor",
        "name": f"{source} emotion",
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
        "name": f"{source} utterance",
        "event_types": ["end"],
        "state_topic": f"{root}/utterance",
        "value_template": EVENT,
        "icon": "mdi:comment-text-outline",
    }
    speech = {
        "p": "binary_sensor",
        "name": f"{source} speech",
        "device_class": "sound",
        "state_topic": f"{root}/speech",
        "off_delay": SPEECH_S,
    }
    entities: dict[str, dict[str, Any]]
    entities = {"emotion": emotion, "utterance": utterance, "speech": speech}
    return entities | {str(name): _switch(source, name, root) for name in SWITCH_ICONS}


def _switch(source: str, name: SwitchName, root: str) -> dict[str, Any]:
    return {
        "p": "switch",
        "name": f"{source} {name}",
        "state_topic": f"{root}/{name}/state",
        "command_topic": f"{root}/{name}/set",
        "icon": SWITCH_ICONS[name],
        "entity_category": "config",
    }


def _health(root: str) -> dict[str, Any]:
    """Its memory, which tells most; the rest as attributes."""
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
    """In the letters that Home Assistant allows, and different for different names."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if plain == name:
        return name
    return f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"
