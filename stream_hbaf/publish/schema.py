"""The contract with other programs, for machines and as tables.

The table of topics and the types of ``events.py`` become JSON Schemas, an AsyncAPI document and
the reference in ``docs/mqtt.md``. The schemas are true for what travels: fields that are None are
left out there, all others are always sent.
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
from stream_hbaf.publish.topics import COMMANDS, LEVELS, TOPICS, Topic

JsonObject = dict[str, Any]

VERSION = "1.0.0"  # of the contract; its first number rises when a receiver must change
WILL: JsonObject = {
    "mqtt": {
        "lastWill": {
            "topic": "{prefix}/{node}/available",
            "qos": 1,
            "message": "offline",
            "retain": True,
        },
        "bindingVersion": "0.2.0",
    }
}
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def json_schema(model: type[Event]) -> JsonObject:
    """The JSON Schema (2020-12) of a payload, whole in itself."""
    made = model.model_json_schema(
        schema_generator=_AsItTravels, mode=_mode(model), ref_template="#/$defs/{model}"
    )
    return {"$schema": GenerateJsonSchema.schema_dialect, **made}


def schema() -> JsonObject:
    """The AsyncAPI 3.0 document: topics, QoS, retained or not, payloads; whole in itself."""
    _, made = models_json_schema(
        [(model, _mode(model)) for model in _payloads().values()],
        schema_generator=_AsItTravels,
        ref_template="#/components/schemas/{model}",
    )
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "stream-hbaf",
            "version": VERSION,
            "description": "Emotions of conversations as they are spoken. "
            "Receivers ignore fields that they don't know.",
        },
        "defaultContentType": "application/json",
        "servers": {"broker": {"host": "localhost:1883", "protocol": "mqtt", "bindings": WILL}},
        "channels": {topic.name: _channel(topic) for topic in TOPICS},
        "operations": {
            f"{'send' if topic.ours else 'receive'}{topic.name.capitalize()}": _operation(topic)
            for topic in TOPICS
        },
        "components": {
            "schemas": made["$defs"],
            "messages": {topic.name: _message(topic) for topic in TOPICS},
            "parameters": {name: {"description": says} for name, (says, _) in LEVELS.items()},
        },
    }


def write_schema(folder: Path) -> None:
    """Write ``asyncapi.json``, ``schema/*.json``, and the tables of ``mqtt.md`` if that is there.

    Raises OSError if the folder can't be written to.
    """
    files = {f"schema/{name}.json": json_schema(model) for name, model in _payloads().items()}
    for name, content in {"asyncapi.json": schema(), **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page = folder / "mqtt.md"
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{reference()}{END}{after}", encoding="utf-8")


def reference() -> str:
    """Topics, commands and every field of every payload, as Markdown."""
    lines = ["### Topics", "", *_table("topic", "payload", "QoS", "retained", "when")]
    for topic in TOPICS:
        retained = "yes" if topic.retain else ""
        whose = "" if topic.ours else "*you publish* "
        row = (f"`{_shown(topic.address)}`", _carried(topic), topic.qos, retained)
        lines.append(f"| {' | '.join(map(str, row))} | {whose}{topic.when} |")
    lines += ["", "### Commands", "", *_table("command", "what it does", "arguments", "`data`")]
    for command in COMMANDS:
        wanted = "; ".join(f"`{name}`: {says}" for name, says in command.arguments.items())
        lines.append(f"| `{command.name}` | {command.does} | {wanted} | {command.answer} |")
    shown: set[str] = set()
    for model in _payloads().values():
        made = json_schema(model)
        for part in (made, *made.get("$defs", {}).values()):
            if part["title"] not in shown:
                shown.add(part["title"])
                lines += ["", f"### {part['title']}", "", part["description"], ""]
                lines += _fields(part)
    return "\n".join(lines) + "\n"


class _AsItTravels(GenerateJsonSchema):
    """What ``encode`` makes of an event, which is stricter than what the type takes."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonObject:
        made = super().model_schema(schema)
        model = schema["cls"]
        made["description"] = _sentence(model.__doc__ or "")
        for field, meaning in _meanings(model).items():
            key = model.model_fields[field].alias or field
            made["properties"][key]["description"] = meaning
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
    return {topic.name: topic.carries for topic in TOPICS if not isinstance(topic.carries, tuple)}


def _mode(model: type[Event]) -> JsonSchemaMode:
    """Of what we publish, as it is sent; of what others publish, as it is taken."""
    received = {topic.carries for topic in TOPICS if not topic.ours}
    return "validation" if model in received else "serialization"


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings under the fields; read from the source, so that importing costs nothing."""
    (body,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(body, ast.ClassDef)
    found = {"schema_": "Which payload this is, and the version of its meaning."}
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
        "description": f"{'Published' if topic.ours else 'Publish here'} {topic.when}.",
        "messages": {topic.name: {"$ref": f"#/components/messages/{topic.name}"}},
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in names},
    }


def _operation(topic: Topic) -> JsonObject:
    binding: JsonObject = {"qos": topic.qos, "retain": topic.retain, "bindingVersion": "0.2.0"}
    if topic.expiry_s is not None:
        binding["messageExpiryInterval"] = topic.expiry_s
    made: JsonObject = {
        "action": "send" if topic.ours else "receive",
        "channel": {"$ref": f"#/channels/{topic.name}"},
        "messages": [{"$ref": f"#/channels/{topic.name}/messages/{topic.name}"}],
        "bindings": {"mqtt": binding},
    }
    if topic.name == "request":
        made["reply"] = {"channel": {"$ref": "#/channels/response"}}
    return made


def _message(topic: Topic) -> JsonObject:
    if isinstance(topic.carries, tuple):
        words = {"enum": list(topic.carries)} if topic.carries else {"minLength": 1}
        return {"contentType": "text/plain", "payload": {"type": "string", **words}}
    made: JsonObject = {"payload": {"$ref": f"#/components/schemas/{topic.carries.__name__}"}}
    if topic.name in ("request", "response"):
        made["correlationId"] = {"location": "$message.payload#/transaction"}
    return made


def _shown(address: str) -> str:
    return re.sub(r"\{(\w+)\}", r"<\1>", address)


def _carried(topic: Topic) -> str:
    if isinstance(topic.carries, tuple):
        return ", ".join(f"`{word}`" for word in topic.carries) or "a label"
    name = topic.carries.__name__
    return f"[{name}](#{name.lower()})"


def _table(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def _fields(definition: JsonObject) -> list[str]:
    rows = _table("field", "type", "always there", "")
    for field, made in definition["properties"].items():
        always = "yes" if field in definition.get("required", ()) else ""
        rows.append(f"| `{field}` | {_kind(made)} | {always} | {made['description']} |")
    return rows


def _kind(made: JsonObject) -> str:
    """A field's type in words."""
    if "$ref" in made:
        name = made["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in made:
        return f"`{made['const']}`"
    if "enum" in made:
        return ", ".join(f"`{word}`" for word in made["enum"])
    if made.get("type") == "array":
        return f"list of {_kind(made['items'])}"
    if made.get("type") == "object":
        inside = made.get("additionalProperties")
        return f"object of {_kind(inside)}" if isinstance(inside, dict) else "object"
    plain: str = made["type"]
    return {"string": "text", "boolean": "true or false"}.get(plain, plain)
