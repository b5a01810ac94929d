"""What others ask for over MQTT: requests, switches and corrections, read and answered in turn."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

from stream_hbaf.errors import StreamHbafError
from stream_hbaf.events import Feedback, Request, Response, Switch, SwitchName
from stream_hbaf.publish.connection import Received
from stream_hbaf.publish.messages import Message, messages

WAITING = 100  # more are refused
LARGEST = 65_536  # bytes of a payload
LONGEST_WORD = 256  # characters of a transaction, or of a correction's fields
REMARK_EVERY_S = 10.0  # so that who floods us with nonsense doesn't flood the log as well
SWITCHES: tuple[SwitchName, ...] = get_args(SwitchName)


class Control(Protocol):
    """Whoever does what is asked; may raise a StreamHbafError that says why not."""

    async def answer(self, request: Request) -> Response:
        """Carry out a command."""

    async def set_switch(self, source: str, *, switch: SwitchName, on: bool) -> None:
        """Switch something of a source on or off."""

    async def correct(self, feedback: Feedback) -> None:
        """Take somebody's word for what an utterance's emotion really was."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one message wants, or the answer to it if it can't be had."""

    what: Request | Switch | Feedback | Response
    topic: str
    response_topic: str = ""  # instead of ours
    correlation: bytes = b""


class RefusalError(StreamHbafError):
    """A message can't be understood; says why, without its content."""


class Requests:
    """Reads what is asked, and has it done one after the other, in order."""

    def __init__(
        self,
        control: Control | None,
        *,
        prefix: str,
        node: str,
        sources: Sequence[str],
        send: Callable[[Message], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        """``send`` takes answers; ``say`` gets one line about what can't be answered."""
        self.refused = 0  # too many at once, or not understood and without an answer
        self._control = control
        self._names = {"prefix": prefix, "node": node}
        self._root = f"{prefix}/{node}/"
        self._sources = sources
        self._send = send
        self._say = say
        self._queue: asyncio.Queue[Asked] = asyncio.Queue(WAITING)
        self._heard: set[str] = set()  # topics of switches that have been turned
        self._quiet_until = 0.0
        self._unsaid = 0

    @property
    def topics(self) -> list[str]:
        """What to subscribe to."""
        if self._control is None:
            return []
        return [self._root + tail for tail in ("request/+", "+/+/set", "+/feedback")]

    def take(self, received: Received) -> None:
        """Queue what a message asks for; if that is impossible, say so in one line."""
        try:
            asked = self._read(received)
            if asked is not None:
                self._queue.put_nowait(asked)
        except RefusalError as refusal:
            self._remark(received.topic, str(refusal))
        except asyncio.QueueFull:
            self._remark(received.topic, f"{WAITING} requests wait already; ask again later")

    async def run(self) -> None:
        """Do what is asked, until cancelled."""
        while True:
            asked = await self._queue.get()
            answer = await self._do(asked)
            if answer is not None:
                await self._send(answer)

    async def _do(self, asked: Asked) -> Message | None:
        assert self._control
        complaint = ""
        try:
            match asked.what:
                case Request():
                    return self._message(await self._control.answer(asked.what), asked)
                case Response():
                    return self._message(asked.what, asked)
                case Switch(source=source, switch=switch, on=on):
                    await self._control.set_switch(source, switch=switch, on=on)
                case Feedback():
                    await self._control.correct(asked.what)
        except StreamHbafError as error:
            complaint = str(error)
        except Exception as error:  # anybody may ask: what they trip over must not stop the rest
            logging.getLogger(__name__).exception("%r failed", asked.topic)
            complaint = f"failed because of a bug ({type(error).__name__}); the log says more"
        if complaint and isinstance(asked.what, Request):
            return self._message(_error(asked.what.command, complaint, asked.what), asked)
        if complaint:
            self._remark(asked.topic, complaint)
        return None

    def _message(self, response: Response, asked: Asked) -> Message:
        (message,) = messages(response, **self._names)
        if asked.response_topic:
            message = replace(message, topic=asked.response_topic)
        return replace(message, correlation=asked.correlation)

    def _read(self, received: Received) -> Asked | None:
        """None for what is not for us, or was taken before. Raises RefusalError."""
        match received.topic.removeprefix(self._root).split("/"):
            case ["request", command]:
                return self._read_request(command, received)
            case [source, switch, "set"]:
                return self._read_switch(source, switch, received)
            case [source, "feedback"]:
                self._check(source, received)
                return Asked(_feedback(_read_object(received.payload)), received.topic)
        return None

    def _read_request(self, command: str, received: Received) -> Asked:
        if received.retained:
            raise RefusalError("requests must not be retained: this one would come at every start")
        if not re.fullmatch(r"[a-z_]{1,40}", command):
            raise RefusalError("the command must be a word in small letters")
        answered = Asked(
            Request(command=command),
            received.topic,
            response_topic=received.response_topic,
            correlation=received.correlation,
        )
        try:
            if not self._may_answer_at(received.response_topic):
                answered = replace(answered, response_topic="")
                raise RefusalError("the response topic must be one of yours, without wildcards")
            arguments = _read_object(received.payload)
            transaction = _word(arguments.pop("transaction", ""), "transaction")
        except RefusalError as refusal:
            return replace(answered, what=_error(command, str(refusal)))
        request = Request(command=command, arguments=arguments, transaction=transaction)
        return replace(answered, what=request)

    def _may_answer_at(self, topic: str) -> bool:
        """Nobody gets us to speak in our own name what we didn't say."""
        own = topic.startswith(self._root) and not topic.startswith(f"{self._root}response/")
        return not own and not re.search(r"[+#\x00-\x1f\x7f-\x9f]", topic) and topic[:1] != "$"

    def _read_switch(self, source: str, switch: str, received: Received) -> Asked | None:
        """A retained command counts once: the broker repeats it at every connection."""
        name = next((known for known in SWITCHES if known == switch), None)
        if name is None:
            raise RefusalError(f"there is no such switch; there are {', '.join(SWITCHES)}")
        if source not in self._sources:
            raise RefusalError(f"there is no such source; there are {', '.join(self._sources)}")
        if received.payload not in (b"ON", b"OFF"):
            raise RefusalError("a switch is set to ON or OFF")
        if received.retained and received.topic in self._heard:
            return None
        self._heard.add(received.topic)
        what = Switch(source=source, switch=name, on=received.payload == b"ON")
        return Asked(what, received.topic)

    def _check(self, source: str, received: Received) -> None:
        if received.retained:
            raise RefusalError(
                "corrections must not be retained: this one would come at every start"
            )
        if source not in self._sources:
            raise RefusalError(f"there is no such source; there are {', '.join(self._sources)}")

    def _remark(self, topic: str, why: str) -> None:
        """One line, without the payload, which may hold words that must not leave."""
        self.refused += 1
        now = time.monotonic()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more before it)" if self._unsaid else ""
        self._say(f"not done: {topic[:100]!r}: {why}{more}")
        self._quiet_until, self._unsaid = now + REMARK_EVERY_S, 0


def _error(command: str, complaint: str, request: Request | None = None) -> Response:
    transaction = request.transaction if request else ""
    return Response(command=command, status="error", error=complaint, transaction=transaction)


def _feedback(fields: dict[str, Any]) -> Feedback:
    known = {name: _word(fields.get(name, ""), name) for name in ("id", "label", "by")}
    if not known["id"] or not known["label"]:
        raise RefusalError('a correction is {"id": …, "label": …}, and may have "by"')
    return Feedback.model_validate(known)


def _word(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_WORD:
        raise RefusalError(f"'{name}' must be text of at most {LONGEST_WORD} characters")
    return value


def _read_object(payload: bytes) -> dict[str, Any]:
    """Nothing is an empty object. Raises RefusalError for all else that is not a JSON object."""
    if len(payload) > LARGEST:
        raise RefusalError(f"the payload is larger than {LARGEST} bytes")
    if not payload.strip():
        return {}
    try:
        fields = json.loads(payload, parse_constant=_refuse)
        json.dumps(fields, ensure_ascii=False).encode()  # half a character can't be sent back
    except (ValueError, RecursionError):
        raise RefusalError("the payload is not JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise RefusalError("the payload must be a JSON object, or nothing")
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
