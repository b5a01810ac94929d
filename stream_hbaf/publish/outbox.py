"""The outbox: messages that the broker has not acknowledged, in order, and on disk.

What a run leaves there, because the broker was away or the program was killed, is published first
by the next run.
"""

import asyncio
import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import TextIO

from stream_hbaf.config import MqttConfig
from stream_hbaf.files import lock_file, state_folder
from stream_hbaf.publish.address import node_name, read_address
from stream_hbaf.publish.messages import Message

MAX_FILES = 100  # recognisers on one machine that share broker, prefix and node
# NORMAL: a commit survives a crash of this program, but perhaps not a power cut. It takes 0.05 ms
# (99th percentile: 0.2 ms), where FULL, which waits for the disk, takes 1 ms (13 ms, at most 83).
SETUP = """
pragma journal_mode = wal;
pragma synchronous = normal;
pragma secure_delete = on;
create table if not exists waiting (
    number integer primary key, at real, topic text, payload blob, dialogue_id text, properties text
);
"""
COLUMNS = "number, at, topic, payload, dialogue_id, properties"


@dataclass(frozen=True, slots=True)
class Queued:
    """A message in the outbox."""

    number: int  # rises from message to message
    at: float  # Unix time when it was put here
    message: Message


class Outbox:
    """A queue of messages that await acknowledgement; durable ones are stored on disk as well.

    When the disk fails the outbox reports it once, keeps messages in memory, and tries the disk
    again with each further message.
    """

    def __init__(self, config: MqttConfig, *, on_report: Callable[[str], None]) -> None:
        """``on_report`` is called with one line about each problem, and about its end."""
        self.dropped = 0  # durable messages that were dropped: too many, or too old
        self._limit = config.outbox
        self._max_age_s = config.outbox_age_h * 3600
        self._report = on_report
        self._queued: dict[int, Queued] = {}  # by number, in order
        self._store = _Store(state_folder(), name=_file_name(config))
        # A commit may have to wait for the disk; the event loop must not.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._opening = asyncio.Lock()
        self._opened = False
        self._last_number = 0
        self._disk_failed = False
        self._overflowing = False

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, queued: Queued) -> bool:
        return queued.number in self._queued

    @property
    def full(self) -> bool:
        """Whether as many messages are queued as the settings allow."""
        return len(self._queued) >= self._limit

    async def open(self) -> None:
        """Read what earlier runs left on disk; it comes before everything new. Idempotent."""
        async with self._opening:
            if self._opened:
                return
            left: list[Queued] = []
            await self._attempt(lambda: left.extend(self._store.open()))
            if self._store.remark:
                self._report(self._store.remark)
            self._queued = {queued.number: queued for queued in left}
            self._last_number = max(self._queued, default=0)
            if old := await self._drop_old():
                self._report(f"outbox: messages of an earlier run dropped, too old: {old}")
            if self._queued:
                self._report(f"outbox: messages of an earlier run, sent first: {len(self._queued)}")
            self._opened = True

    async def put(self, messages: Sequence[Message], *, broker_away: bool) -> None:
        """Append messages; durable ones are on disk when this returns.

        While the broker is away, messages that are too old, and the oldest of too many, are
        dropped and counted.
        """
        if not self._opened:
            await self.open()
        new = []
        for message in messages:  # without an await, so that a cancelled put loses nothing
            self._last_number += 1
            new.append(Queued(self._last_number, time.time(), message))
        self._queued |= {queued.number: queued for queued in new}
        await self._write(new=new)
        if broker_away:
            await self._drop_old()
            await self._drop_oldest()

    def first(self, count: int) -> list[Queued]:
        """The oldest messages, at most ``count``."""
        return list(islice(self._queued.values(), count))

    def pop_retained(self) -> list[Message]:
        """Remove and return the retained messages: while the broker is away, only the latest of
        each topic matters, which the publisher keeps."""
        retained = [w for w in self._queued.values() if w.message.retain]
        for queued in retained:
            del self._queued[queued.number]
        return [queued.message for queued in retained]

    async def remove(self, gone: Iterable[Queued]) -> None:
        """Remove messages, also from disk."""
        gone = list(gone)
        for queued in gone:
            self._queued.pop(queued.number, None)
        self._overflowing = self._overflowing and self.full
        await self._write(gone=gone)

    async def forget(self, dialogue_id: str) -> int:
        """Erase the messages of a dialogue, and their bytes on disk; returns how many."""
        found = [q.number for q in self._queued.values() if q.message.dialogue_id == dialogue_id]
        for number in found:
            del self._queued[number]
        await self._attempt(lambda: self._store.erase(dialogue_id))
        return len(found)

    async def close(self) -> int:
        """Close the file; returns how many messages it holds for the next start.

        ``put`` must not be called afterwards.
        """
        durable = sum(queued.message.durable for queued in self._queued.values())
        await self._attempt(self._store.close)
        self._disk.shutdown(wait=False)
        if durable and self._disk_failed:
            self._report(
                f"outbox: {self._store.folder}: can't be written; messages lost: {durable}"
            )
            return 0
        if durable:
            self._report(f"outbox: messages kept for the next start: {durable}")
        return durable

    async def _drop_old(self) -> int:
        """Drop the messages that are too old; returns how many."""
        since = time.time() - self._max_age_s
        old = list(takewhile(lambda queued: queued.at < since, self._queued.values()))
        await self._drop(old)
        return len(old)

    async def _drop_oldest(self) -> None:
        surplus = self.first(len(self._queued) - self._limit) if self.full else []
        if surplus and not self._overflowing:
            self._overflowing = True
            self._report(f"outbox: full with {self._limit} messages; the oldest are dropped")
        await self._drop(surplus)

    async def _drop(self, surplus: Sequence[Queued]) -> None:
        if surplus:
            self.dropped += sum(queued.message.durable for queued in surplus)
            await self.remove(surplus)

    async def _write(self, *, new: Iterable[Queued] = (), gone: Iterable[Queued] = ()) -> None:
        """Write a change to the disk; after a failure, all durable messages."""
        if self._disk_failed:
            kept = [queued for queued in self._queued.values() if queued.message.durable]
            await self._attempt(lambda: self._store.rewrite(kept), mends=True)
            return
        added = [queued for queued in new if queued.message.durable]
        removed = [queued.number for queued in gone if queued.message.durable]
        if added or removed:
            await self._attempt(lambda: self._store.change(added, removed))

    async def _attempt(self, work: Callable[[], None], *, mends: bool = False) -> None:
        """Run ``work`` in the disk's thread, to its end even if the caller is cancelled.

        ``mends``: with it the disk holds everything again that it should.
        """
        await asyncio.shield(self._on_disk(work, mends=mends))

    async def _on_disk(self, work: Callable[[], None], *, mends: bool) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, work)
        except (sqlite3.Error, OSError) as error:
            if not self._disk_failed:
                reason = getattr(error, "strerror", None) or error
                self._report(
                    f"outbox: {self._store.folder}: {reason}; messages are kept in memory "
                    "only: free some space there, or set XDG_STATE_HOME to another folder"
                )
            self._disk_failed = True
        else:
            if self._disk_failed and mends:
                self._disk_failed = False
                self._report(f"outbox: {self._store.folder}: messages are kept on disk again")


class _Store:
    """The outbox's SQLite file. Used in one thread; methods raise sqlite3.Error or OSError."""

    def __init__(self, folder: Path, *, name: str) -> None:
        self.folder = folder
        self.remark = ""  # a line for people about opening the file
        self._name = name
        self._database: sqlite3.Connection | None = None
        self._lock: TextIO | None = None  # held as long as the file is open

    def open(self) -> list[Queued]:
        """Open the first file that no other process has locked, and move into it what processes
        that have ended left in others."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        left: list[Queued] = []
        for number in range(MAX_FILES):
            path = self.folder / f"{self._name}-{number}.sqlite"
            if (self._database and not path.exists()) or not (
                lock := lock_file(path.with_suffix(".lock"))
            ):
                continue
            if self._database is None:
                self._lock, self._database = lock, self._connect(path)
                left = _rows(self._database)
            else:
                with lock:
                    left = self._merge(path, left)
        return left

    def change(self, new: Iterable[Queued], gone: Iterable[int]) -> None:
        """Add messages, and delete those with the numbers ``gone``."""
        with self._opened as database:
            _insert(database, new)
            numbers = [(number,) for number in gone]
            database.executemany("delete from waiting where number = ?", numbers)

    def rewrite(self, kept: Iterable[Queued]) -> None:
        """Hold these messages and no others."""
        with self._opened as database:
            database.execute("delete from waiting")
            _insert(database, kept)

    def erase(self, dialogue_id: str) -> None:
        """Delete the messages of a dialogue, also from the write-ahead log, which has copies."""
        with self._opened as database:
            database.execute("delete from waiting where dialogue_id = ?", (dialogue_id,))
        database.execute("pragma wal_checkpoint(truncate)")

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._lock is not None:
            self._lock.close()

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise OSError("not open")
        return self._database

    def _merge(self, path: Path, own: Sequence[Queued]) -> list[Queued]:
        """Move the messages of another file into this one; all are sorted by age and renumbered."""
        with closing(self._connect(path)) as theirs:
            left = sorted([*own, *_rows(theirs)], key=lambda queued: queued.at)
        left = [replace(queued, number=n) for n, queued in enumerate(left, start=1)]
        self.rewrite(left)
        path.unlink()
        return left

    def _connect(self, path: Path) -> sqlite3.Connection:
        """Open or create a file, readable by its owner only; a damaged one is renamed."""
        try:
            return _set_up(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            self.remark = f"outbox: {path}: {error}; renamed to {aside.name}, and a new file begun"
            return _set_up(path)


def _file_name(config: MqttConfig) -> str:
    """A name for each combination of broker, prefix and node."""
    node = node_name(config)
    key = f"{read_address(config)} {config.prefix} {node}"
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", node)[:40]
    return f"outbox-{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _set_up(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    database = sqlite3.connect(path)
    try:
        database.executescript(SETUP)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _insert(database: sqlite3.Connection, new: Iterable[Queued]) -> None:
    rows = [
        (w.number, w.at, m.topic, m.payload, m.dialogue_id, json.dumps(m.properties))
        for w in new
        for m in (w.message,)
    ]
    database.executemany(f"insert into waiting ({COLUMNS}) values (?, ?, ?, ?, ?, ?)", rows)


def _rows(database: sqlite3.Connection) -> list[Queued]:
    found = database.execute(f"select {COLUMNS} from waiting order by number")
    return [
        Queued(number, at, Message(topic, payload, dialogue_id=dialogue_id, properties=pairs))
        for number, at, topic, payload, dialogue_id, properties in found
        for pairs in (tuple((name, value) for name, value in json.loads(properties)),)
    ]
