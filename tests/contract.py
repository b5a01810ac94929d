"""Validates every message that a test publishes against the MQTT contract."""

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
    """Raises AssertionError for a message with an unknown topic or an invalid payload."""
    found = find_topic(topic)
    if found is None:  # with MQTT 5 a response goes to any topic that the request names
        answer = payload.startswith(b'{"schema":"stream_hbaf/response/1"')
        assert answer, f"{topic} is no topic of ours"
    elif found[0].retain and not payload:
        return  # erases a retained message
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
    """A test that publishes an invalid message fails.

    Topics that other programs publish are not checked: tests send malformed requests. Tests that
    send malformed events to a subscriber are marked ``breaks_contract``.
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
    raise ValueError(f"{constant} is not JSON")
