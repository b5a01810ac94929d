"""The rows of the outbox's file: messages that await acknowledgement, and retained topics.

What is read from the file is published. So every value has a limit and is checked; messages have a
checksum.
"""

import contextlib
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from stream_hbaf.publish.messages import Message, find_topic
from stream_hbaf.publish.moment import Moment

# What is read from a file, at most. The longest transcript that was tried takes 2 MB.
MAX_MESSAGES = 1_000_000
MAX_PAYLOAD = 16 * 2**20  # bytes
MAX_TOTAL = 2**30  # bytes of all payloads
MAX_TOPIC = 65_535  # bytes, as in MQTT
MAX_ID = 256  # characters of a dialogue's id
MAX_PROPERTIES = 10
MAX_NUMBER = 2**53
MAX_RETAINED = 10_000  # topics
MAX_ENTITIES = 1000  # of Home Assistant, in a topic
MAX_READING_S = 20.0  # reading 10,000 messages takes 0.3 s

# NORMAL: a commit survives a crash of this program, but perhaps not a power cut. It takes 0.05 ms
# (99th percentile: 0.2 ms), where FULL, which waits for the disk, takes 1 ms (13 ms, at most 83).
SETUP = """
pragma journal_mode = wal;
pragma synchronous = normal;
pragma secure_delete = on;
create table if not exists waiting (
    number integer primary key, at real, topic text, payload blob, dialogue_id text,
    properties text, boot text, since_boot real, aside integer, checksum integer
);
create table if not exists retained (topic text primary key, entities text, broker text);
create table if not exists peers (name text primary key);
"""
TABLES = (b"waiting", b"retained", b"peers")
COLUMNS = ("number", "at", "topic", "payload", "dialogue_id", "properties")
LATER_COLUMNS = {  # that files of earlier versions lack
    "boot": "text", "since_boot": "real", "aside": "integer", "checksum": "integer",
}  # fmt: skip
# Errors of the disk, the folder or the permissions: the file is not damaged.
OUTSIDE = {
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Queued:
    """A message in the outbox."""

    number: int  # rises from message to message
    made: Moment
    message: Message
    aside: bool = False  # an earlier run found that the broker does not take it


@dataclass(frozen=True, slots=True)
class Left:
    """A topic that an ended run left retained at the broker."""

    topic: str
    entities: dict[str, str]  # of Home Assistant, in a discovery message: platforms by key
    origin: Path | None = None  # the file of another node, which may be running again by now


class DamageError(Exception):
    """Something in the file is not as this program writes it."""


# What reading a file raises; the last one if a message of SQLite's quotes damaged text.
FAULTS = (sqlite3.Error, DamageError, UnicodeDecodeError)


def is_damage(error: Exception, path: Path) -> bool:
    """Whether an error is due to the file's content."""
    if _code(error) == sqlite3.SQLITE_READONLY:  # the file's header can say that as well
        return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    return _code(error) not in OUTSIDE


def _code(error: Exception) -> int:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF


def connect(path: Path) -> sqlite3.Connection:
    """Open a file. Text is read as bytes, so that damaged text is no error of SQLite's."""
    database = sqlite3.connect(path)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_PAYLOAD + MAX_TOPIC)
    database.text_factory = bytes
    return database


def set_up(database: sqlite3.Connection) -> None:
    """Create what is missing: the tables, and columns of files of earlier versions."""
    database.executescript(SETUP)
    present_columns = _column_names(database)
    for name, kind in LATER_COLUMNS.items():
        if name not in present_columns:
            database.execute(f"alter table waiting add column {name} {kind}")


@contextlib.contextmanager
def time_limit(database: sqlite3.Connection) -> Iterator[None]:
    """End queries in time, however a damaged file makes SQLite run."""
    deadline = time.monotonic() + MAX_READING_S
    database.set_progress_handler(lambda: time.monotonic() > deadline, 1_000_000)
    try:
        yield
    finally:
        database.set_progress_handler(None, 0)


def check_schema(database: sqlite3.Connection) -> None:
    """Raises DamageError if the file holds anything that this program doesn't write."""
    found = database.execute("select type, name from sqlite_master").fetchall()
    tables = {name for kind, name in found if kind == b"table"}
    indexes = {name for kind, name in found if kind == b"index" and name.startswith(b"sqlite_")}
    if len(found) > len(tables) + len(indexes) or tables - set(TABLES):
        raise DamageError("holds what this program does not write")
    if tables and b"waiting" not in tables:
        raise DamageError("its messages are missing")


def check_pages(database: sqlite3.Connection) -> None:
    """Raises DamageError if SQLite finds damage, also where nothing was read."""
    (found,) = database.execute("pragma quick_check(1)").fetchone()
    if found != b"ok":
        raise DamageError(found.decode(errors="replace").splitlines()[-1][:100])


def read_messages(database: sqlite3.Connection, *, root: str) -> tuple[list[Queued], str]:
    """The messages that can be read, in order, and what is wrong with the rest; "" if nothing.

    Their topics begin with ``root``. Each is read by itself, so that damage costs no other one.
    """
    if not (columns := _columns(database)):
        return [], ""
    numbers, problem = _numbers(database)
    found: list[Queued] = []
    size = 0
    for number in numbers:
        try:
            rows = database.execute(f"select {columns} from waiting where number = ?", (number,))
            for row in rows.fetchall():
                queued = _message(row, root=root)
                size += len(queued.message.payload)
                if size > MAX_TOTAL:
                    return found, f"its messages have more than {MAX_TOTAL} bytes"
                found.append(queued)
        except (*FAULTS, ValueError) as error:
            if _code(error) in OUTSIDE:
                raise
            problem = problem or f"a message is damaged ({error})"
    return found, problem


def _numbers(database: sqlite3.Connection) -> tuple[list[int], str]:
    """The numbers of all messages, and what is wrong. A damaged place ends a query: so what is
    behind it is read from the other end."""
    found: set[int] = set()
    problem = ""
    for direction in ("asc", "desc"):
        query = f"select number from waiting order by number {direction} limit {MAX_MESSAGES}"
        try:
            found.update(n for (n,) in database.execute(query) if isinstance(n, int))
            break
        except FAULTS as error:
            if _code(error) in OUTSIDE:
                raise
            problem = problem or str(error)
    return sorted(found), problem


def read_retained(database: sqlite3.Connection, *, broker: str) -> list[Left]:
    """The topics that runs left retained at a broker. Raises DamageError."""
    if not database.execute("select 1 from sqlite_master where name = 'retained'").fetchone():
        return []  # a new file, or one of an earlier version
    query = f"select topic, entities from retained where broker = ? limit {MAX_RETAINED}"
    try:
        return [_left(topic, text) for topic, text in database.execute(query, (broker,))]
    except (ValueError, TypeError, AttributeError):
        raise DamageError("a retained topic is damaged") from None


def read_peers(database: sqlite3.Connection) -> set[str]:
    """The names of outboxes whose runs were seen beside those of this file's."""
    rows = database.execute(f"select name from peers limit {MAX_RETAINED}")
    return {name.decode(errors="replace") for (name,) in rows if isinstance(name, bytes)}


def insert(database: sqlite3.Connection, new: Iterable[Queued]) -> None:
    """Add messages."""
    columns = (*COLUMNS, *LATER_COLUMNS)
    marks = ", ".join("?" * len(columns))
    rows = (_row(queued) for queued in new)
    database.executemany(f"insert into waiting ({', '.join(columns)}) values ({marks})", rows)


def note(database: sqlite3.Connection, retained: Iterable[Left], *, broker: str) -> None:
    """Add retained topics, or replace them."""
    rows = [(left.topic, json.dumps(left.entities), broker) for left in retained]
    database.executemany("insert or replace into retained values (?, ?, ?)", rows)


def erase(database: sqlite3.Connection, dialogue_id: str) -> int:
    """Delete the messages of a dialogue, also from the write-ahead log, which has copies; returns
    how many they were."""
    database.execute("pragma secure_delete = on")
    with database:
        gone = "delete from waiting where dialogue_id = ?"
        count = database.execute(gone, (dialogue_id,)).rowcount
    busy, *_ = database.execute("pragma wal_checkpoint(truncate)").fetchone()
    if busy:
        raise sqlite3.OperationalError("its log is being read by another program")
    return count


def holds_dialogue(path: Path, dialogue_id: str) -> bool:
    """Whether an outbox that another process has open holds messages of a dialogue."""
    where = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(where, uri=True)) as database:
        query = "select 1 from waiting where dialogue_id = ? limit 1"
        return database.execute(query, (dialogue_id,)).fetchone() is not None


def _column_names(database: sqlite3.Connection) -> set[str]:
    """Of the table of messages; none if there is no table. Raises DamageError."""
    kind = database.execute("select type from sqlite_master where name = 'waiting'").fetchone()
    if kind not in (None, (b"table",)):  # a view may have no end
        raise DamageError("holds what this program does not write")
    found = database.execute("pragma table_xinfo(waiting)").fetchall()
    if any(hidden for *_, hidden in found):
        raise DamageError("holds what this program does not write")
    return {name.decode(errors="replace") for _, name, *_ in found}


def _columns(database: sqlite3.Connection) -> str:
    """The columns of a message as a query has them, null where an earlier version had none; "" if
    there is no table."""
    names = _column_names(database)
    if not names:
        return ""
    if missing := set(COLUMNS) - names:
        raise DamageError(f"messages have no {', '.join(sorted(missing))}")
    later = [name if name in names else f"null as {name}" for name in LATER_COLUMNS]
    return ", ".join([*COLUMNS, *later])


def _row(queued: Queued) -> tuple[Any, ...]:
    message, made = queued.message, queued.made
    row = (
        queued.number, made.at, message.topic, message.payload, message.dialogue_id,
        json.dumps(message.properties), made.boot, made.since_boot,
    )  # fmt: skip
    encoded = (value.encode() if isinstance(value, str) else value for value in row)
    return (*row, int(queued.aside), _checksum(tuple(encoded)))


def _checksum(row: tuple[Any, ...]) -> int:
    """Of a row without ``aside`` and ``at``, which change."""
    covered = (row[0], *row[2:8])
    parts = [v if isinstance(v, bytes) else repr(v).encode() for v in covered]
    return zlib.crc32(b"\0".join(parts))


def _message(row: tuple[Any, ...], *, root: str) -> Queued:
    """The message of a row. Raises DamageError, or ValueError for what is not text or JSON."""
    number, at, topic, payload, dialogue_id, properties, boot, since_boot, aside, checksum = row
    if not all(isinstance(value, bytes) for value in row[2:6]):
        raise DamageError("a value is missing")
    if checksum is None:  # of an earlier version
        boot, since_boot = b"", 0.0
        if not isinstance(from_json(payload), dict):
            raise DamageError("its payload is no object")
    elif checksum != _checksum(row):
        raise DamageError("its checksum is wrong")
    numbers = (number, at, since_boot)
    if not all(isinstance(n, int | float) and abs(n) <= MAX_NUMBER for n in numbers):
        raise DamageError("a number is out of range")
    row_topic = find_topic(topic.decode())
    if row_topic is None or row_topic[0].retain or not topic.decode().startswith(root):
        raise DamageError("its topic is none of ours")
    if max(len(topic) - MAX_TOPIC, len(payload) - MAX_PAYLOAD, len(dialogue_id) - MAX_ID) > 0:
        raise DamageError("it is too long")
    message = Message(
        topic.decode(), payload, dialogue_id=dialogue_id.decode(), properties=_pairs(properties)
    )
    return Queued(number, Moment(boot.decode(), since_boot, at), message, aside=bool(aside))


def _pairs(text: bytes) -> tuple[tuple[str, str], ...]:
    found = from_json(text)
    if not isinstance(found, list) or len(found) > MAX_PROPERTIES:
        raise DamageError("its properties are damaged")
    pairs = tuple(tuple(pair) for pair in found if isinstance(pair, list) and len(pair) == 2)
    if len(pairs) != len(found) or not all(isinstance(s, str) for pair in pairs for s in pair):
        raise DamageError("its properties are damaged")
    return pairs


def _left(topic: bytes, text: bytes) -> Left:
    row, entities = find_topic(topic.decode()), from_json(text)
    if row is None or not row[0].retain or len(topic) > MAX_TOPIC or len(entities) > MAX_ENTITIES:
        raise ValueError("a retained topic is none of ours")
    if not all(isinstance(s, str) for s in (*entities.keys(), *entities.values())):
        raise ValueError("an entity is damaged")
    return Left(topic.decode(), entities)
