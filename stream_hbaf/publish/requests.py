"""Requests, switch commands and corrections received over MQTT: parsing, queueing, answering."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

from pydantic_core import from_json

from stream_hbaf.errors import StreamHbafError
from stream_hbaf.events import Feedback, Request, Response, Switch, SwitchName
from stream_hbaf.publish.connection import Received
from stream_hbaf.publish.messages import Message, messages

MAX_QUEUED = 100  # requests; more are refused
MAX_PAYLOAD = 65_536  # bytes
MAX_FIELD = 256  # characters of a transaction, or of a correction's fields
REPORT_EVERY_S = 10.0  # a flood of refused messages must not flood the log as well
SWITCHES: tuple[str, ...] = get_args(SwitchName)


class Control(Protocol):
    """Carries out requests. Each method may raise a StreamHbafError that gives the reason."""

    async def answer(self, request: Request) -> Response:
        """Carry out a command and return its result."""

    async def set_switch(self, source: str, *, switch: SwitchName, on: bool) -> None:
        """Set a switch of a source."""

    async def correct(self, feedback: Feedback) -> None:
        """Apply or store a correction of an utterance's emotion or speaker."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A parsed message: the request, or the response if it can't be carried out."""

    content: Request | Switch | Feedback | Response
    received: Received


class RefusalError(StreamHbafError):
    """A message is refused. The text gives the reason, and nothing of the payload, which is
    private."""


class Requests:
    """Parses received messages and carries them out one after another, in order."""

    def __init__(
        self,
        control: Control | None,
        *,
        prefix: str,
        node: str,
        sources: Sequence[str],
        send: Callable[[Message], Awaitable[None]],
        on_report: Callable[[str], None],
    ) -> None:
        """``send`` publishes responses; ``on_report`` gets a line about a message that is refused
        and has no response. ``control`` None: nothing is subscribed to."""
        self.refused = 0  # messages refused without a response
        self._control = control
        self._names = {"prefix": prefix, "node": node}
        self._root = f"{prefix}/{node}/"
        self.sources = sources  # as of now
        self._send = send
        self._report = on_report
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue(MAX_QUEUED)
        self._switched: set[str] = set()  # topics of switches that have been set
        self._quiet_until = 0.0
        self._unreported = 0

    @property
    def topics(self) -> list[str]:
        """The topics to subscribe to."""
        if self._control is None:
            return []
        return [self._root + tail for tail in ("request/+", "+/+/set", "+/feedback")]

    def put(self, received: Received) -> None:
        """Parse and queue a message; one that is refused is reported."""
        try:
            incoming = self._parse(received)
            if incoming is not None:
                self._queue.put_nowait(incoming)
        except RefusalError as refusal:
            self._report_refusal(received.topic, str(refusal))
        except asyncio.QueueFull:
            reason = f"{MAX_QUEUED} requests are queued already; try again later"
            self._report_refusal(received.topic, reason)

    async def run(self) -> None:
        """Carry out queued requests until cancelled."""
        while True:
            response = await self._carry_out(await self._queue.get())
            if response is not None:
                await self._send(response)

    async def _carry_out(self, incoming: Incoming) -> Message | None:
        assert self._control
        content = incoming.content
        try:
            match content:
                case Request():
                    return self._message(await self._control.answer(content), incoming)
                case Response():
                    return self._message(content, incoming)
                case Switch(source=source, switch=switch, on=on):
                    await self._control.set_switch(source, switch=switch, on=on)
                case Feedback():
                    await self._control.correct(content)
            return None
        except StreamHbafError as error:
            problem = str(error)
        except Exception as error:  # a bug that a request triggers must not end the recogniser
            logging.getLogger(__name__).exception("%r failed", incoming.received.topic)
            problem = f"failed because of a bug ({type(error).__name__}); the log says more"
        if not isinstance(content, Request):
            self._report_refusal(incoming.received.topic, problem)
            return None
        names = {"command": content.command, "transaction": content.transaction}
        return self._message(Response(status="error", error=problem, **names), incoming)

    def _message(self, response: Response, incoming: Incoming) -> Message:
        (message,) = messages(response, **self._names)
        received = incoming.received
        if received.response_topic:  # MQTT 5
            message = replace(message, topic=received.response_topic)
        return replace(message, correlation=received.correlation)

    def _parse(self, received: Received) -> Incoming | None:
        """None for other topics and repeated switch commands. Raises RefusalError."""
        match received.topic.removeprefix(self._root).split("/"):
            case ["request", command]:
                return self._parse_request(command, received)
            case [source, switch, "set"]:
                return self._parse_switch(source, switch, received)
            case [source, "feedback"]:
                return self._parse_feedback(source, received)
        return None

    def _parse_request(self, command: str, received: Received) -> Incoming:
        if received.retained:
            raise RefusalError("requests must not be retained: they would come at every start")
        if not re.fullmatch(r"[a-z_]{1,40}", command):
            raise RefusalError("the command must be a word in small letters")
        content: Request | Response
        try:
            if not self._may_respond_to(received.response_topic):
                received = replace(received, response_topic="")
                raise RefusalError("the response topic must be one of yours, without wildcards")
            arguments = _parse_object(received.payload)
            transaction = _text(arguments.pop("transaction", ""), name="transaction")
            content = Request(command=command, arguments=arguments, transaction=transaction)
        except RefusalError as refusal:
            content = Response(command=command, status="error", error=str(refusal))
        return Incoming(content, received)

    def _may_respond_to(self, topic: str) -> bool:
        """Whether it is a topic of the requester's: a response on a topic of this node, such as
        ``info``, would pass for a message of another kind."""
        own = topic.startswith(self._root) and not topic.startswith(f"{self._root}response/")
        return not own and not re.search(r"[+#\x00-\x1f\x7f-\x9f]", topic) and topic[:1] != "$"

    def _parse_switch(self, source: str, switch: str, received: Received) -> Incoming | None:
        """A retained command counts once: the broker repeats it at every connection."""
        if switch not in SWITCHES:
            raise RefusalError(f"there is no such switch; there are {', '.join(SWITCHES)}")
        self._check_source(source)
        if received.payload not in (b"ON", b"OFF"):
            raise RefusalError("a switch is set to ON or OFF")
        if received.retained and received.topic in self._switched:
            return None
        self._switched.add(received.topic)
        fields = {"source": source, "switch": switch, "on": received.payload == b"ON"}
        return Incoming(Switch.model_validate(fields), received)

    def _parse_feedback(self, source: str, received: Received) -> Incoming:
        if received.retained:
            raise RefusalError("corrections must not be retained: they would come at every start")
        self._check_source(source)
        fields = _parse_object(received.payload)
        names = ("id", "label", "speaker", "by")
        known = {name: _text(fields.get(name, ""), name=name) for name in names}
        if not known["id"] or not (known["label"] or known["speaker"]):
            raise RefusalError(
                'a correction has an "id", and "label" or "speaker" or both; it may have "by"'
            )
        return Incoming(Feedback.model_validate(known), received)

    def _check_source(self, source: str) -> None:
        if source not in self.sources:
            raise RefusalError(f"there is no such source; there are {', '.join(self.sources)}")

    def _report_refusal(self, topic: str, reason: str) -> None:
        """Report one line, or count it if the last one was a moment ago."""
        self.refused += 1
        now = time.monotonic()
        if now < self._quiet_until:
            self._unreported += 1
            return
        more = f" (and {self._unreported} more before it)" if self._unreported else ""
        self._report(f"refused: {topic[:100]!r}: {reason}{more}")
        self._quiet_until, self._unreported = now + REPORT_EVERY_S, 0


def _text(value: object, *, name: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_FIELD:
        raise RefusalError(f"'{name}' must be text of at most {MAX_FIELD} characters")
    return value


def _parse_object(payload: bytes) -> dict[str, Any]:
    """The JSON object of a payload; {} of an empty one. Raises RefusalError for anything else."""
    if len(payload) > MAX_PAYLOAD:
        raise RefusalError(f"the payload is larger than {MAX_PAYLOAD} bytes")
    if not payload.strip():
        return {}
    try:
        fields = from_json(payload, allow_inf_nan=False)
    except ValueError:
        raise RefusalError("the payload is not JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise RefusalError("the payload must be a JSON object, or nothing")
    return fields
