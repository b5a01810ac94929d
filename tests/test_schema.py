"""The schemas are true for what is published, and the documents are current."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from contract import validate, validator
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from stream_hbaf.config import MqttConfig
from stream_hbaf.events import (
    AnyEvent,
    Connected,
    DialogueSummary,
    Emotion,
    Event,
    Feedback,
    Health,
    Info,
    Level,
    Model,
    Part,
    Partial,
    Quantiles,
    Response,
    Speech,
    Status,
    Switch,
    Utterance,
)
from stream_hbaf.live.runtime import redact
from stream_hbaf.publish.homeassistant import discovery
from stream_hbaf.publish.messages import (
    COMMANDS,
    LEVELS,
    TOPICS,
    available,
    encode,
    event_message,
    find_topic,
    messages,
)
from stream_hbaf.publish.schema import asyncapi, json_schema, reference, write_schema

DOCS = Path(__file__).parent.parent / "docs"
PAYLOADS = (Utterance, Partial, Info, Health, DialogueSummary, Response)
EMOTION = Emotion(
    label="joy", score=0.9, abstained=False, set=["joy"], probabilities={"joy": 0.9, "anger": 0.1}
)
END = Utterance(
    id="d-1",
    rev=2,
    type="end",
    source="m",
    dialogue_id="d",
    turn=1,
    speaker="Zoë",
    start_time="2026-01-02T03:04:05.600+00:00",
    end_time="2026-01-02T03:04:07.100+00:00",
    audio_start_ms=0.0,
    audio_end_ms=1500.0,
    trigger="silence",
    text="Yes!",
    language="en",
    modalities=["audio", "text"],
    emotion=EMOTION,
    model=Model(id="b", sha256="c"),
)


def anything(kind: Any) -> st.SearchStrategy[Any]:
    """All values of a field's type that an event can have: JSON knows finite numbers only."""
    if isinstance(kind, type) and issubclass(kind, Part):
        return st.builds(
            kind,
            **{
                field.alias or name: anything(field.annotation)
                for name, field in kind.model_fields.items()
            },
        )
    inside = get_args(kind)
    match get_origin(kind):
        case None if kind is float:
            return st.floats(allow_nan=False, allow_infinity=False)
        case None if kind is Any:
            return st.none() | st.booleans() | st.integers() | st.text()
        case None:
            return st.from_type(kind)
        case origin if origin is Literal:
            return st.sampled_from(inside)
        case origin if origin is list:
            return st.lists(anything(inside[0]), max_size=3)
        case origin if origin is dict:
            return st.dictionaries(st.text(), anything(inside[1]), max_size=3)
        case origin:
            assert origin in (Union, UnionType), kind
            return st.one_of(*map(anything, inside))


def defined(document: Any) -> list[dict[str, Any]]:
    """Every object with fields that a document of schemas defines."""
    found = []
    if isinstance(document, dict):
        found += [document] if isinstance(document.get("properties"), dict) else []
        found += [part for value in document.values() for part in defined(value)]
    return found


@pytest.mark.parametrize("model", PAYLOADS, ids=lambda model: model.__name__)
def test_schema_is_true_for_whatever_is_sent(model: type[Event]) -> None:
    """No event can be made whose payload breaks its schema."""

    @settings(max_examples=60, deadline=None, database=None)
    @given(anything(model))
    def holds(event: Event) -> None:
        validator(model).validate(json.loads(encode(event)))

    holds()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rev": "2"}, "is not of type 'integer'"),
        ({"emotion": None}, "None is not of type 'object'"),
        ({"mood": "fine"}, "Additional properties are not allowed"),
        ({"type": "over"}, "is not one of"),
        ({"schema": "stream_hbaf/utterance/2"}, "was expected"),
    ],
)
def test_schema_refuses_what_is_never_sent(change: dict[str, Any], complaint: str) -> None:
    """Wrong types, null, unknown fields and another version's payloads are found out."""
    with pytest.raises(ValidationError, match=complaint):
        validator(Utterance).validate(json.loads(encode(END)) | change)


def test_schema_requires_what_is_always_there() -> None:
    """Only what can be None is not required, in a payload and in its parts."""
    made = json_schema(Utterance)
    assert set(made["properties"]) - set(made["required"]) == {
        "revision", "speaker_score", "end_time", "audio_end_ms", "trigger", "asr", "emotion",
        "contributions", "conflict", "inferences", "latency_ms", "model",
    }  # fmt: skip
    emotion = made["$defs"]["Emotion"]
    assert set(emotion["properties"]) - set(emotion["required"]) == {
        "score",
        "affect",
        "familiarity",
    }


def test_schema_of_what_others_send_asks_for_little() -> None:
    """A correction needs an id; label or speaker, or both, and other fields may come with it."""
    check = validator(Feedback)
    check.validate({"id": "d-1", "label": "anger"})
    check.validate({"id": "d-1", "speaker": "Ann"})
    check.validate({"id": "d-1", "label": "anger", "by": "Ann", "app": "mine"})
    with pytest.raises(ValidationError, match="'id' is a required property"):
        check.validate({"label": "anger"})


def test_every_field_has_a_meaning() -> None:
    """Nothing travels that the specification is silent on."""
    fields = [
        (part.get("title"), name, made.get("description"))
        for part in defined(asyncapi()["components"]["schemas"])
        for name, made in part["properties"].items()
    ]
    assert len(fields) > 80
    assert [field for field in fields if not field[2]] == []


INFO = Info(version="0", model=Model(id="b", sha256="c"), labels=["joy"], licence="", sources=["m"])
PUBLISHED: tuple[tuple[AnyEvent | Response, tuple[str, ...]], ...] = (
    (END, ("utterance", "emotion")),
    (redact(END, "no_text") or INFO, ("utterance", "emotion")),
    (redact(END, "label_only") or INFO, ("utterance", "emotion")),
    (
        Partial(
            id="d-1", source="m", dialogue_id="d", speaker="", text="", modalities=["audio"],
            emotion=EMOTION,
        ),
        ("partial",),
    ),
    (INFO, ("info",)),
    (
        Health(
            uptime_s=1.0, memory_mb=800.0, utterances=1, queues={}, dropped={"partials": 1},
            latency_ms={"total": Quantiles(p50=610.04, p95=640.0)},
        ),
        ("health",),
    ),
    (
        DialogueSummary(
            source="m", dialogue_id="d", start_time="t", end_time="t", turns=1,
            speakers={"": "joy"}, emotions={"joy": 1}, probabilities={"joy": 1.0},
        ),
        ("dialogue",),
    ),
    (Status(source="m", stage="vad", state="degraded", detail="slow"), ("status",)),
    (Speech(source="m", on=False), ("speech",)),
    (Switch(source="m", switch="record", on=True), ("switch",)),
    (Response(command="ping", status="ok", content={"time": 1.5}), ("response",)),
    (Level(source="m", dbfs=-20.0, speech=True), ()),
)  # fmt: skip


@pytest.mark.parametrize(("event", "names"), PUBLISHED)
def test_messages_are_those_of_the_table(event: AnyEvent, names: tuple[str, ...]) -> None:
    """What is published has the topic, QoS, retained flag and expiry that the table says."""
    found = messages(event, prefix="home/p", node="n")
    assert len(found) == len(names)
    for message, name in zip(found, names, strict=True):
        validate(message.topic, message.payload)
        topic, levels = find_topic(message.topic) or pytest.fail(message.topic)
        assert (topic.name, levels["prefix"], levels["node"]) == (name, "home/p", "n")
        assert (topic.qos, topic.retain, topic.expiry_s) == (
            message.qos,
            message.retain,
            message.expires_s,
        )


def test_discovery_is_in_the_table() -> None:
    """The discovery message is part of the contract like any other."""
    message = discovery(INFO, MqttConfig(node="n", homeassistant="homeassistant"))
    validate(message.topic, message.payload)
    topic, levels = find_topic(message.topic) or pytest.fail(message.topic)
    assert (topic.name, levels["discovery"]) == ("discovery", "homeassistant")
    assert (topic.qos, topic.retain) == (message.qos, message.retain)


def test_every_topic_of_ours_is_published_by_something() -> None:
    """The table promises nothing that nobody keeps."""
    kept = {name for _, names in PUBLISHED for name in names} | {"available", "discovery"}
    assert kept == {topic.name for topic in TOPICS if topic.published}


@pytest.mark.parametrize("state", ["online", "offline", "stopped"])
def test_availability_is_in_the_table(state: str) -> None:
    """The last will is part of the contract too."""
    message = available(state, prefix="p", node="n")
    validate(message.topic, message.payload)
    assert asyncapi()["servers"]["broker"]["bindings"]["mqtt"]["lastWill"] == {
        "topic": "{prefix}/{node}/available", "qos": 1, "message": "offline", "retain": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("topic", "payload", "complaint"),
    [
        ("p/n/m/mood", b"fine", "no topic of ours"),
        ("p/n/m/status/kitchen", b"online", "no topic of ours"),
        ("p/n/m/status/vad", b"sleepy", "sleepy"),
        ("p/n/m/utterance", b'{"id": "d-1"}', "'rev' is a required property"),
        ("p/n/m/emotion", b" ", "emotion"),
    ],
)
def test_contract_is_broken(topic: str, payload: bytes, complaint: str) -> None:
    """A message that isn't in the contract is called by its topic and its fault."""
    with pytest.raises(AssertionError, match=complaint):
        validate(topic, payload)


def test_broken_contract_fails_the_test_that_breaks_it(tmp_path: Path) -> None:
    """A test that publishes what the contract doesn't know fails, though all else went well."""
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(
            """
            import asyncio
            from mosquitto import mosquitto
            from stream_hbaf.config import MqttConfig
            from stream_hbaf.publish.connection import close_client, open_client

            async def publish(url, topic):
                client = await open_client(MqttConfig(url=url))
                await client.publish(topic, b"ON", qos=1)
                await close_client(client)

            def test_known(tmp_path):
                with mosquitto(tmp_path) as broker:
                    asyncio.run(publish(broker.url, "p/n/m/speech"))

            def test_unknown(tmp_path):
                with mosquitto(tmp_path) as broker:
                    asyncio.run(publish(broker.url, "p/n/m/mood"))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "contract", "-p", "no:cacheprovider", "-rE"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert "2 passed, 1 error" in done.stdout
    assert "ERROR test_it.py::test_unknown - AssertionError: p/n/m/mood is no topic" in done.stdout


@pytest.mark.parametrize(
    ("topic", "name", "levels"),
    [
        ("p/n/m/record/set", "set_switch", {"source": "m", "switch": "record"}),
        ("p/n/request/get_state", "request", {"command": "get_state"}),
        ("p/n/response/ping", "response", {"command": "ping"}),
        ("homeassistant/device/n/config", "discovery", {"device": "n"}),
        ("p/n/m/status/vad", "status", {"source": "m", "stage": "vad"}),
    ],
)
def test_topic_reads_back(topic: str, name: str, levels: dict[str, str]) -> None:
    """A topic says what it is about."""
    found = find_topic(topic)
    assert found is not None
    assert found[0].name == name
    assert levels.items() <= found[1].items()


def test_asyncapi_is_whole() -> None:
    """Each reference leads somewhere, each level is explained, each schema is one."""
    document = asyncapi()

    def references(part: Any) -> list[str]:
        if isinstance(part, list):
            return [ref for value in part for ref in references(value)]
        if not isinstance(part, dict):
            return []
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [ref for value in part.values() for ref in references(value)]

    for ref in references(document):
        target = document
        for step in ref.removeprefix("#/").split("/"):
            target = target[step]
    for made in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(made)
    assert document["asyncapi"] == "3.0.0"
    assert set(document["channels"]) == {topic.name for topic in TOPICS} | {"stream"}
    utterance = document["operations"]["sendUtterance"]
    assert utterance["bindings"]["mqtt"] == {"qos": 1, "retain": False, "bindingVersion": "0.2.0"}
    assert document["operations"]["sendPartial"]["bindings"]["mqtt"]["messageExpiryInterval"] == 10
    assert document["operations"]["receiveRequest"]["reply"] == {
        "channel": {"$ref": "#/channels/response"}
    }


def test_documents_are_what_the_code_generates(tmp_path: Path) -> None:
    """`stream-hbaf schema --out docs` changes nothing: run it after changing what travels."""
    shutil.copy(DOCS / "mqtt.md", tmp_path)
    write_schema(tmp_path)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    committed = {Path("mqtt.md"), *(path.relative_to(DOCS) for path in DOCS.rglob("*.json"))}
    assert written == committed
    for path in written:
        assert (tmp_path / path).read_text() == (DOCS / path).read_text(), path


def test_specification_names_everything() -> None:
    """Topics, levels' meanings and commands are all in the page."""
    page = (DOCS / "mqtt.md").read_text(encoding="utf-8")
    assert reference() in page
    for topic in TOPICS:
        assert f"| `{topic.address.replace('{', '<').replace('}', '>')}` |" in page
    for command in COMMANDS:
        assert f"| `{command.name}` |" in page
    assert set(LEVELS) == {"prefix", "node", "source", "stage", "switch", "command", "discovery",
                           "device"}  # fmt: skip


@pytest.mark.parametrize(
    "event",
    [
        END,
        Speech(source="m", on=True),
        Status(source="m", stage="capture", state="online", detail="sound comes in"),
        Connected(id="abcdefgh", source="m", resumed=False, resume_s=120),
    ],
)
def test_messages_of_the_service_are_those_of_the_document(event: Event) -> None:
    """Its schemas take what ``serve`` sends, and nothing with another field."""
    document = asyncapi()
    kind = type(event).__name__.lower()
    payload = document["components"]["messages"][f"stream_{kind}"]["payload"]
    schema = Draft202012Validator({**payload, "components": document["components"]})
    fields = json.loads(event_message(event))
    schema.validate(fields)
    with pytest.raises(ValidationError):
        schema.validate(fields | {"unknown": 1})
