"""The contract that every published message keeps: its topic is known, its payload as specified."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from stream_hbaf.events import Event, Response
from stream_hbaf.publish.connection import Client
from stream_hbaf.publish.messages import find_topic
from stream_hbaf.publish.schema import json_schema


@cache
def validator(model: type[Event]) -> Draft202012Validator:
    return Draft202012Validator(json_schema(model))


def validate(topic: str, payload: bytes) -> None:
    """Raises AssertionError, in one line, for a message that the contract doesn't know."""
    found = find_topic(topic)
    if found is None:  # with MQTT 5 an answer goes wherever it is wanted
        answer = payload.startswith(b'{"schema":"stream_hbaf/response/1"')
        assert answer, f"{topic} is no topic of ours"
    elif found[0].retain and not payload:
        return  # takes a retained message away
    expected = found[0].payload if found else Response
    if isinstance(expected, tuple):
        word = payload.decode()
        assert word in expected if expected else word.strip(), f"{topic}: '{word}'"
        return
    fields = json.loads(payload or b"{}", parse_constant=_refuse)
    wrong = [
        f"{error.json_path}: {error.message}" for error in validator(expected).iter_errors(fields)
    ]
    assert not wrong, f"{topic}: {'; '.join(wrong)}"


@pytest.fixture(autouse=True)
def every_message_keeps_the_contract(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Holds all that a test publishes against the contract; a test fails for what doesn't keep it.

    What others may publish is left alone: tests send us nonsense on purpose. So do some to whoever
    subscribes; these are marked ``breaks_contract``.
    """
    if request.node.get_closest_marker("breaks_contract"):
        yield
        return
    publish = Client.publish
    broken: list[str] = []

    async def publish_and_check(
        self: Client, topic: str, payload: Any = b"", *options: Any, **named: Any
    ) -> None:
        found = find_topic(topic)
        if found is None or found[0].published:
            try:
                validate(topic, payload)
            except (AssertionError, ValueError) as error:
                broken.append(str(error))
        await publish(self, topic, payload, *options, **named)

    monkeypatch.setattr(Client, "publish", publish_and_check)
    yield
    assert not broken, "\n".join(broken)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
