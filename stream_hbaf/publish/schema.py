"""The MQTT contract as documents: JSON Schemas, AsyncAPI, and the reference in ``docs/mqtt.md``.

All are generated from the tables in ``messages.py`` and the types in ``events.py``. The schemas
describe payloads as they are sent: without the fields that are None, with all others.
"""

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from pydantic_core import core_schema

from stream_hbaf.events import Event
from stream_hbaf.files import atomic_write_text
from stream_hbaf.publish.messages import COMMANDS, LEVELS, TOPICS, Topic
from stream_hbaf.publish.service_schema import SENT, service

JsonObject = dict[str, Any]

VERSION = "1.0.0"  # of the contract; the first number rises with incompatible changes
LAST_WILL = {"topic": "{prefix}/{node}/available", "qos": 1, "message": "offline", "retain": True}
BINDING = "0.2.0"  # the version of AsyncAPI's MQTT bindings
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def json_schema(model: type[Event]) -> JsonObject:
    """The JSON Schema (2020-12) of a payload, without references to other documents."""
    made = model.model_json_schema(
        schema_generator=_AsPublished, mode=_mode(model), ref_template="#/$defs/{model}"
    )
    return {"$schema": GenerateJsonSchema.schema_dialect, **made}


def asyncapi() -> JsonObject:
    """The AsyncAPI 3.0 document: topics, their QoS, whether they are retained, and payloads."""
    models = dict.fromkeys((*_payloads().values(), *SENT))
    _, made = models_json_schema(
        [(model, _mode(model)) for model in models],
        schema_generator=_AsPublished,
        ref_template="#/components/schemas/{model}",
    )
    streams = service(made["$defs"])
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "stream-hbaf",
            "version": VERSION,
            "description": "Emotion recognition for conversations in real time. "
            "Receivers ignore fields that they don't know.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "broker": {
                "host": "localhost:1883",
                "protocol": "mqtt",
                "bindings": {"mqtt": {"lastWill": LAST_WILL, "bindingVersion": BINDING}},
            },
            **streams["servers"],
        },
        "channels": {topic.name: _channel(topic) for topic in TOPICS} | streams["channels"],
        "operations": {_operation_name(topic): _operation(topic) for topic in TOPICS}
        | streams["operations"],
        "components": {
            "schemas": made["$defs"],
            "messages": {topic.name: _message(topic) for topic in TOPICS} | streams["messages"],
            "parameters": {name: {"description": text} for name, (text, _) in LEVELS.items()},
        },
    }


def write_schema(folder: Path) -> None:
    """Write ``asyncapi.json`` and ``schema/*.json``, and update ``mqtt.md`` if there is one.

    Raises WriteError if the folder can't be written to.
    """
    files = {f"schema/{name}.json": json_schema(model) for name, model in _payloads().items()}
    for name, content in {"asyncapi.json": asyncapi(), **files}.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        atomic_write_text(folder / name, f"{text}\n")
    page = folder / "mqtt.md"
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        atomic_write_text(page, f"{before}{BEGIN}\n{reference()}{END}{after}")


def reference() -> str:
    """Markdown tables of the topics, the commands, and the fields of each payload."""
    lines = ["### Topics", "", *_table("topic", "payload", "QoS", "retained", "when")]
    for topic in TOPICS:
        retained = "yes" if topic.retain else ""
        whose = "" if topic.published else "*you publish* "
        address = re.sub(r"\{(\w+)\}", r"<\1>", topic.address)
        row = (f"`{address}`", _type_name(_message(topic)["payload"]), topic.qos, retained)
        lines.append(f"| {' | '.join(map(str, row))} | {whose}{topic.when} |")
    lines += ["", "### Commands", "", *_table("command", "effect", "arguments", "`data`")]
    for command in COMMANDS:
        arguments = "; ".join(f"`{name}`: {text}" for name, text in command.arguments.items())
        lines.append(f"| `{command.name}` | {command.effect} | {arguments} | {command.result} |")
    shown: set[str] = set()
    for model in _payloads().values():
        made = json_schema(model)
        for part in (made, *made.get("$defs", {}).values()):
            if part["title"] not in shown:
                shown.add(part["title"])
                lines += ["", f"### {part['title']}", "", part["description"], ""]
                lines += _fields(part)
    return "\n".join(lines) + "\n"


class _AsPublished(GenerateJsonSchema):
    """The schema of what ``encode`` returns, which is stricter than what the model accepts."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonObject:
        made = super().model_schema(schema)
        model = schema["cls"]
        made["description"] = _sentence(model.__doc__ or "")
        for field, description in _field_descriptions(model).items():
            key = model.model_fields[field].alias or field
            made["properties"][key]["description"] = description
        if self.mode == "serialization":
            made.setdefault("additionalProperties", False)
        return made

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonObject:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonObject:
        if self.mode == "validation":
            return super().default_schema(schema)
        return self.generate_inner(schema["schema"])

    def field_is_required(self, field: Any, total: bool) -> bool:
        if self.mode == "validation":
            return super().field_is_required(field, total)
        inner = field["schema"]
        return not (inner["type"] == "default" and inner.get("default", 0) is None)


def _payloads() -> dict[str, type[Event]]:
    return {topic.name: topic.payload for topic in TOPICS if not isinstance(topic.payload, tuple)}


def _mode(model: type[Event]) -> JsonSchemaMode:
    """Of published payloads as they are sent, of received ones as they are accepted."""
    received = {topic.payload for topic in TOPICS if not topic.published}
    return "validation" if model in received else "serialization"


def _field_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings below the fields, read from the source, so that importing costs nothing."""
    (body,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(body, ast.ClassDef)
    found = {"schema_": "The payload's type and its version."}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(doc.value, ast.Constant)
            found[field.target.id] = _sentence(str(doc.value.value))
    return {name: found[name] for name in model.model_fields}


def _sentence(docstring: str) -> str:
    return " ".join(docstring.replace("``", "`").split())


def _channel(topic: Topic) -> JsonObject:
    names = re.findall(r"\{(\w+)\}", topic.address)
    return {
        "address": topic.address,
        "servers": [{"$ref": "#/servers/broker"}],
        "description": f"{'Published' if topic.published else 'Publish here'} {topic.when}.",
        "messages": {topic.name: {"$ref": f"#/components/messages/{topic.name}"}},
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in names},
    }


def _operation_name(topic: Topic) -> str:
    name = "".join(word.capitalize() for word in topic.name.split("_"))
    return f"{'send' if topic.published else 'receive'}{name}"


def _operation(topic: Topic) -> JsonObject:
    binding: JsonObject = {"qos": topic.qos, "retain": topic.retain, "bindingVersion": BINDING}
    if topic.expiry_s is not None:
        binding["messageExpiryInterval"] = topic.expiry_s
    made: JsonObject = {
        "action": "send" if topic.published else "receive",
        "channel": {"$ref": f"#/channels/{topic.name}"},
        "messages": [{"$ref": f"#/channels/{topic.name}/messages/{topic.name}"}],
        "bindings": {"mqtt": binding},
    }
    if topic.name == "request":
        made["reply"] = {"channel": {"$ref": "#/channels/response"}}
    return made


def _message(topic: Topic) -> JsonObject:
    if isinstance(topic.payload, tuple):
        words = {"enum": list(topic.payload)} if topic.payload else {"minLength": 1}
        return {"contentType": "text/plain", "payload": {"type": "string", **words}}
    made: JsonObject = {"payload": {"$ref": f"#/components/schemas/{topic.payload.__name__}"}}
    if topic.name in ("request", "response"):
        made["correlationId"] = {"location": "$message.payload#/transaction"}
    return made


def _table(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def _fields(definition: JsonObject) -> list[str]:
    rows = _table("field", "type", "always present", "")
    for field, made in definition["properties"].items():
        always = "yes" if field in definition.get("required", ()) else ""
        rows.append(f"| `{field}` | {_type_name(made)} | {always} | {made['description']} |")
    return rows


def _type_name(made: JsonObject) -> str:
    """A field's type, for people."""
    if "$ref" in made:
        name = made["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in made:
        return f"`{made['const']}`"
    if "minLength" in made:
        return "a label"
    if "enum" in made:
        return ", ".join(f"`{word}`" for word in made["enum"])
    if made.get("type") == "array":
        return f"list of {_type_name(made['items'])}"
    if made.get("type") == "object":
        inside = made.get("additionalProperties")
        return f"object of {_type_name(inside)}" if isinstance(inside, dict) else "object"
    plain: str = made["type"]
    return {"string": "text", "boolean": "true or false"}.get(plain, plain)
