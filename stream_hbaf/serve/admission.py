"""What a client asks for in its address, and the refusals that say what is wrong and what to do.

    ws://HOST:PORT/?source=NAME&dialogue=NAME&speaker=NAME&id=ID&token=TOKEN

All may be left out, but for the token where there is one. ``source`` is the name in events and
topics; streams with the same ``dialogue`` share one; ``speaker`` is the only speaker's name. ``id``
is a text of 8 to 64 letters, digits, ``-`` and ``_`` that the client draws: with it the client goes
on with its stream after a lost connection.
"""

import re
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from stream_hbaf.audio.websocket import RULE_BROKEN, TRY_LATER
from stream_hbaf.config import SourceConfig
from stream_hbaf.errors import StreamHbafError

ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
KEYS = ("source", "dialogue", "speaker", "id", "token")
LONGEST_NAME = 64  # of a dialogue or a speaker


class RefusedError(StreamHbafError):
    """A client isn't let in: its request is wrong, or there is no room."""

    def __init__(
        self, line: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, *, retry_after_s: int = 0
    ) -> None:
        super().__init__(line)
        self.status = status
        self.retry_after_s = retry_after_s

    @property
    def close_code(self) -> int:
        """For browsers, whose pages can't read the status of a response."""
        return TRY_LATER if self.retry_after_s else RULE_BROKEN


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks for; "" for what it leaves open."""

    id: str
    source: str
    speaker: str
    dialogue: str

    def config(self, *, free_name: str) -> SourceConfig:
        """The settings of the client's source. Raises RefusedError for an impossible name."""
        try:
            return SourceConfig(
                name=self.source or free_name,
                where="serve",
                speaker=self.speaker,
                dialogue=self.dialogue,
            )
        except ValidationError as error:
            first = error.errors()[0]
            what = "source" if first["loc"] == ("name",) else first["loc"][-1]
            raise RefusedError(f"'{what}': {first['msg']}") from None


def read_wanted(path: str) -> Wanted:
    """The request's path and query. Raises RefusedError if it is wrong."""
    address = urlsplit(path)
    if address.path != "/":
        raise RefusedError("no such path; connect to /", HTTPStatus.NOT_FOUND)
    query = parse_qs(address.query)
    if unknown := next((key for key in query if key not in KEYS), ""):
        raise RefusedError(f"unknown parameter {unknown[:40]!a}; there is {', '.join(KEYS)}")
    found = {key: values[0] for key, values in query.items()}
    for key in ("speaker", "dialogue"):
        value = found.get(key, "")
        if len(value) > LONGEST_NAME or not value.isprintable():
            raise RefusedError(f"'{key}' must be of at most {LONGEST_NAME} printable characters")
    if not ID.fullmatch(found.get("id", "unset---")):
        raise RefusedError("'id' must be 8 to 64 letters, digits, - and _; draw a random one")
    return Wanted(*(found.get(key, "") for key in ("id", "source", "speaker", "dialogue")))
