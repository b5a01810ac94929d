"""Home Assistant finds every entity, and understands what it then gets.

Device discovery came with Home Assistant 2024.11, which needs Python 3.12 and some hundred
packages: so its rules, as its MQTT integration applies them, stand here as a table.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from mosquitto import Mosquitto, Subscriber, find_program, mosquitto
from mqtt_kit import END, INFO, config, utterance

from stream_hbaf.events import Health, Info, Status, Utterance
from stream_hbaf.publish.homeassistant import discovery
from stream_hbaf.publish.messages import encode
from stream_hbaf.publish.mqtt import MqttPublisher

CONFIG = config("mqtt://broker", homeassistant="homeassistant")
TOPIC = "homeassistant/device/p_n/config"

ANY_ENTITY = {
    *("p", "unique_id", "name", "icon", "qos", "availability", "entity_category"),
    *("json_attributes_topic", "json_attributes_template", "enabled_by_default"),
}
# What each platform must have, and what it may have besides.
PLATFORMS: dict[str, tuple[set[str], set[str]]] = {
    "sensor": (
        {"state_topic"},
        {"device_class", "expire_after", "options", "state_class", "suggested_display_precision"}
        | {"unit_of_measurement", "value_template"},
    ),
    "binary_sensor": (
        {"state_topic"},
        {"device_class", "expire_after", "off_delay", "payload_on", "payload_off"},
    ),
    "event": ({"state_topic", "event_types"}, {"device_class", "value_template"}),
    "switch": (
        {"command_topic"},
        {"state_topic", "payload_on", "payload_off", "state_on", "state_off", "optimistic"},
    ),
}
ROOT = {"dev", "o", "cmps", "availability", "availability_mode", "qos", "encoding"}
DEVICE = {"ids", "cns", "name", "mf", "mdl", "sw", "hw", "sn", "sa", "cu"}


def discovered(info: Info = INFO) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(discovery(info, CONFIG).payload)
    return fields


def test_device_follows_the_rules() -> None:
    """The topic is one level of allowed letters; device, origin and components are complete."""
    message = discovery(INFO, CONFIG)
    assert (message.topic, message.retain, message.qos) == (TOPIC, True, 1)
    fields = discovered()
    assert fields.keys() <= ROOT
    assert fields["dev"].keys() <= DEVICE
    assert fields["dev"]["ids"] == ["p_n"]
    assert fields["o"] == {"name": "stream-hbaf", "sw": INFO.version}
    assert set(fields["cmps"]) == {"health"} | {
        f"m_{kind}"
        for kind in ("emotion", "utterance", "speech", "listening", "transcribe", "record")
    }


@pytest.mark.parametrize("key", list(discovered()["cmps"]))
def test_entity_follows_the_rules(key: str) -> None:
    """Each entity has its platform, a name of its own, and only options that the platform has."""
    entity = discovered()["cmps"][key]
    required, optional = PLATFORMS[entity["p"]]
    assert {"p", "unique_id"} | required <= entity.keys()
    assert entity.keys() <= ANY_ENTITY | required | optional
    assert entity["unique_id"] == f"p_n_{key}"
    if "options" in entity:  # allowed for enumerations alone, which have no unit
        assert entity["device_class"] == "enum"
        assert not entity.keys() & {"state_class", "unit_of_measurement"}
    for option, value in entity.items():
        if option.endswith("topic"):
            assert value.startswith("p/n/")
            assert not set(value) & set("+#")


def test_names_that_identifiers_cannot_hold() -> None:
    """Sources with other letters get identifiers of their own, and keep their topics."""
    found = discovered(INFO.model_copy(update={"sources": ["é", "è", "b-1"]}))["cmps"]
    assert len(found) == 1 + 3 * 6
    assert all(key.isascii() and key.replace("-", "_").isidentifier() for key in found)
    topics = {entity["state_topic"] for entity in found.values() if entity["p"] == "event"}
    assert topics == {"p/n/é/utterance", "p/n/è/utterance", "p/n/b-1/utterance"}


def render(template: str, value: str, *, state: str = "", **attributes: object) -> str:
    """As Home Assistant does: the message, its JSON, and the entity as it is until now."""
    variables: dict[str, Any] = {"value": value, "this": {"state": state, "attributes": attributes}}
    if value.startswith("{"):
        variables["value_json"] = json.loads(value)
    return jinja2.Environment().from_string(template).render(variables)


@pytest.mark.parametrize(
    ("published", "shown"),
    [("online", "online"), ("offline", "offline"), ("stopped", "offline")],
)
def test_availability(published: str, shown: str) -> None:
    """`stopped` is as absent as `offline`; both words that are compared are stated."""
    (available,) = discovered()["availability"]
    assert available["topic"] == "p/n/available"
    assert render(available["value_template"], published) == shown
    words = {
        available["payload_available"]: "online",
        available["payload_not_available"]: "offline",
    }
    assert words[shown] == shown


NEW = END.model_copy(update={"type": "new", "emotion": None, "text": ""})
UPDATE = END.model_copy(update={"type": "update", "emotion": END.emotion})
MUTE = END.model_copy(update={"emotion": None})
REVISED = END.model_copy(update={"rev": 4, "revision": 1, "speaker": "Ann"})


@pytest.mark.parametrize(
    ("event", "before", "after"),
    [
        (END, "anger", "joy"),
        (END, "unavailable", "joy"),
        (NEW, "anger", "anger"),
        (UPDATE, "anger", "anger"),
        (MUTE, "anger", "anger"),
        (NEW, "unavailable", "None"),
        (UPDATE, "unknown", "None"),
    ],
)
def test_emotion_state(event: Utterance, before: str, after: str) -> None:
    """Only an `end` changes it; what has expired stays unknown (`None`) until then."""
    template = discovered()["cmps"]["m_emotion"]["value_template"]
    assert render(template, encode(event).decode(), state=before) == after


@pytest.mark.parametrize(("newest", "state"), [("u1", "joy"), ("u2", "anger")])
def test_only_a_revision_of_the_newest_utterance_changes_the_state(newest: str, state: str) -> None:
    """A revision of an earlier one leaves state and attributes, and no revision is an event."""
    entities, revised = discovered()["cmps"], encode(REVISED).decode()
    before = {"utterance": newest, "speaker": "Zoë"}
    sensor = entities["m_emotion"]
    assert render(sensor["value_template"], revised, state="anger", **before) == state
    shown = json.loads(render(sensor["json_attributes_template"], revised, **before))
    assert shown["utterance"] == newest
    assert shown["speaker"] == ("Ann" if newest == "u1" else "Zoë")
    assert render(entities["m_utterance"]["value_template"], revised, **before) == ""


@pytest.mark.parametrize("name", ["Zoë", 'A "quoted" }} {% name', "Ann"])
def test_each_enrolled_speaker_has_an_event(name: str) -> None:
    """Of that speaker's utterances at any source, once each; whatever the name is made of."""
    entities = discovered(INFO.model_copy(update={"speakers": [name]}))["cmps"]
    (entity,) = (one for one in entities.values() if one["name"] == name)
    assert (entity["p"], entity["state_topic"]) == ("event", "p/n/+/utterance")
    own = END.model_copy(update={"speaker": name})
    event = json.loads(render(entity["value_template"], encode(own).decode()))
    assert (event["speaker"], event["event_type"]) == (name, "end")
    others = [own.model_copy(update=change) for change in ({"speaker": "x"}, {"revision": 1})]
    for other in (*others, own.model_copy(update={"type": "update"})):
        assert render(entity["value_template"], encode(other).decode()) == ""


def test_emotion_attributes() -> None:
    """They hold the whole transcript, of any length, until the next `end`."""
    template = discovered()["cmps"]["m_emotion"]["json_attributes_template"]
    words = END.model_copy(update={"text": "<“oh” & 'no'> " * 100})
    shown = json.loads(render(template, encode(words).decode()))
    assert shown == {
        "text": words.text,
        "speaker": "Zoë",
        "speaker_score": 0.9123,
        "score": 0.82,
        "abstained": False,
        "utterance": "u1",
    }
    assert json.loads(render(template, encode(NEW).decode(), state="joy", **shown)) == shown
    nothing = json.loads(render(template, encode(NEW).decode()))
    assert nothing == {
        "text": "",
        "speaker": "",
        "speaker_score": None,
        "score": None,
        "abstained": None,
        "utterance": "",
    }
    assert json.loads(render(template, encode(MUTE).decode()))["score"] is None


def test_utterance_event() -> None:
    """An `end` is an event with all its fields; the rest is empty, which is passed over."""
    entity = discovered()["cmps"]["m_utterance"]
    event = json.loads(render(entity["value_template"], encode(END).decode()))
    assert event.pop("event_type") in entity["event_types"]
    assert event == json.loads(encode(END))
    assert render(entity["value_template"], encode(UPDATE).decode()) == ""


def test_health_state() -> None:
    """Its number is one that the message really has."""
    health = Health(
        uptime_s=60, memory_mb=512.5, utterances=3, queues={}, dropped={}, latency_ms={}
    )
    template = discovered()["cmps"]["health"]["value_template"]
    assert render(template, encode(health).decode()) == "512.5"


def test_home_assistant_comes_back(tmp_path: Path) -> None:
    """At its birth message all that is retained is published again, in the order of a start."""

    async def main(broker: Mosquitto) -> list[str]:
        publisher = MqttPublisher(config(broker.url, homeassistant="homeassistant"), info=INFO)
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(Status(source="m", stage="vad", state="online"))
        await publisher.send(utterance(1))
        await asyncio.sleep(0.3)
        async with Subscriber(broker.port) as subscriber:
            retained = [await subscriber.next() for _ in range(5)]
            await give_birth(broker)
            assert await subscriber.next() == "0 0 homeassistant/status online"
            again = [await subscriber.next() for _ in range(5)]
        await publisher.close(3)
        await running
        assert sorted(line[2:] for line in retained) == sorted(line[2:] for line in again)
        return again

    with mosquitto(tmp_path) as broker:
        again = asyncio.run(main(broker))
    assert [line.split()[2] for line in again] == [
        *("p/n/available", "p/n/info", TOPIC, "p/n/m/status/vad", "p/n/m/emotion")
    ]


def test_another_model(tmp_path: Path) -> None:
    """A new `info` is published with the entities that follow from it."""

    async def main(broker: Mosquitto) -> dict[str, str]:
        publisher = MqttPublisher(config(broker.url, homeassistant="homeassistant"), info=INFO)
        await publisher.connect()
        running = asyncio.create_task(publisher.run())
        await publisher.send(INFO.model_copy(update={"labels": ["calm", "tense"]}))
        await asyncio.sleep(0.3)
        async with Subscriber(broker.port) as late:
            lines = [(await late.next()).split(" ", 3) for _ in range(3)]
        await publisher.close(3)
        await running
        return {topic: payload for _, _, topic, payload in lines}

    with mosquitto(tmp_path) as broker:
        retained = asyncio.run(main(broker))
    assert json.loads(retained["p/n/info"])["labels"] == ["calm", "tense"]
    assert json.loads(retained[TOPIC])["cmps"]["m_emotion"]["options"] == ["calm", "tense"]


async def give_birth(broker: Mosquitto) -> None:
    command = [find_program("mosquitto_pub"), "-p", str(broker.port)]
    child = await asyncio.create_subprocess_exec(
        *command, "-t", "homeassistant/status", "-m", "online"
    )
    assert await child.wait() == 0
