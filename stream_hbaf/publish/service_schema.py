"""The WebSocket protocol of ``stream-hbaf serve``, for the AsyncAPI document."""

import copy
from typing import Any

from stream_hbaf.events import (
    Connected,
    DialogueSummary,
    Event,
    Partial,
    Speech,
    Status,
    Utterance,
)

JsonObject = dict[str, Any]

SENT: tuple[type[Event], ...] = (Connected, Utterance, Partial, Speech, Status, DialogueSummary)
PARAMETERS = {
    "source": "the name of the audio source; a free one if left out",
    "dialogue": "the dialogue: streams with the same one share it",
    "speaker": "the name of the only speaker",
    "id": "8 to 64 letters, digits, - and _: with it the client goes on with its stream after a "
    "lost connection",
    "token": "the service's token, unless it is sent as Authorization: Bearer",
}


def _flag(name: str, description: str) -> JsonObject:
    payload = {"type": "object", "required": [name], "properties": {name: {"const": True}}}
    return {"payload": {**payload, "description": description}}


RECEIVED: dict[str, JsonObject] = {
    "format": {
        "payload": {
            "type": "object",
            "description": "The format of the sound that follows: first of all, and at a change.",
            "properties": {
                "rate": {"type": "integer", "minimum": 8_000, "maximum": 192_000},
                "channels": {"type": "integer", "minimum": 1, "maximum": 8, "default": 1},
                "format": {"enum": ["s16le", "s32le", "f32le", "opus"], "default": "s16le"},
            },
        }
    },
    "sound": {
        "contentType": "application/octet-stream",
        "payload": {
            "type": "string",
            "format": "binary",
            "description": "Whole frames, interleaved, or one Opus packet: at most 64 KiB.",
        },
    },
    "pause": _flag("pause", "Ends the open utterance; sound may follow."),
    "end": _flag("end", "No more sound follows: the connection is closed after the last event."),
}


def service(schemas: JsonObject) -> dict[str, JsonObject]:
    """The parts of the document about the service: its server, channel, operations and messages.

    ``schemas`` are those of the payloads. A message is one of them with its kind in ``event``.
    """
    messages = {f"stream_{name}": message for name, message in RECEIVED.items()}
    for model in SENT:
        kind = model.__name__.lower()
        payload = copy.deepcopy(schemas[model.__name__])
        payload["properties"] = {"event": {"const": kind}, **payload["properties"]}
        payload["required"] = ["event", *payload.get("required", [])]
        messages[f"stream_{kind}"] = {"payload": payload}
    query = {
        "type": "object",
        "properties": {
            name: {"type": "string", "description": text} for name, text in PARAMETERS.items()
        },
    }

    def operation(action: str, names: list[str]) -> JsonObject:
        return {
            "action": action,
            "channel": {"$ref": "#/channels/stream"},
            "messages": [{"$ref": f"#/channels/stream/messages/{name}"} for name in names],
        }

    received = [f"stream_{name}" for name in RECEIVED]
    return {
        "servers": {
            "service": {
                "host": "localhost:8772",
                "protocol": "ws",
                "description": "stream-hbaf serve; wss with a certificate.",
            }
        },
        "channels": {
            "stream": {
                "address": "/",
                "description": "One stream of sound, and the events of its source.",
                "servers": [{"$ref": "#/servers/service"}],
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
                "bindings": {"ws": {"method": "GET", "query": query, "bindingVersion": "0.1.0"}},
            }
        },
        "operations": {
            "sendStreamEvents": operation("send", [n for n in messages if n not in received]),
            "receiveStreamSound": operation("receive", received),
        },
        "messages": messages,
    }
