"""Where emotions wait: finished messages in their order, on disk until the broker has them."""

import asyncio
import fcntl
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
from itertools import islice
from pathlib import Path
from typing import TextIO

from stream_hbaf.config import MqttConfig
from stream_hbaf.publish.address import node_name, read_address
from stream_hbaf.publish.messages import Message

SECONDS_AN_HOUR = 3600
MOST_FILES = 100  # of recognisers with the same node, on one machine
# NORMAL: a commit survives the death of this program, which is what may happen any time; the last
# ones may not survive a power cut. It takes 0.05 ms here (0.2 at the 99th percentile), where FULL,
# which waits for the disk, takes 1 ms (13, and 83 at worst).
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
class Waiting:
    number: int  # rises
    at: float  # when it was put here, Unix time
    message: Message


class Outbox:
    """Keeps messages in order until they are acknowledged, and lasting ones on disk as well.

    With a disk that fails it says so once, goes on in memory, and tries again at each message.
    """

    def __init__(self, config: MqttConfig, *, say: Callable[[str], None]) -> None:
        """``say`` gets one line whenever something is not as it should be."""
        self.let_go = 0  # lasting messages that were too many or too old
        self._most = config.outbox
        self._longest_s = config.outbox_age_h * SECONDS_AN_HOUR
        self._say = say
        self._waiting: dict[int, Waiting] = {}  # by number, in order
        self._store = _Store(state_folder(), name=_file_name(config))
        # Even the quickest commit waits for the disk now and then; the event loop must not.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._opening = asyncio.Lock()
        self._opened = False
        self._last = 0
        self._trouble = False
        self._overflowing = False

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting.number in self._waiting

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._most

    async def open(self) -> None:
        """Take over what earlier runs left; it comes before everything new."""
        async with self._opening:
            if not self._opened:
                await self._take_over()
                self._opened = True

    async def _take_over(self) -> None:
        left: list[Waiting] = []
        await self._attempt(lambda: left.extend(self._store.open()))
        if self._store.remark:
            self._say(self._store.remark)
        self._waiting = {waiting.number: waiting for waiting in left}
        self._last = max(self._waiting, default=0)
        if old := await self._drop_old():
            self._say(f"messages of an earlier run, too old to publish: {old}")
        if self._waiting:
            self._say(f"messages of an earlier run, published first: {len(self._waiting)}")

    async def put(self, messages: Sequence[Message], *, broker_away: bool) -> None:
        """Take messages, in order; lasting ones are on disk when this returns.

        While the broker is away the oldest give way if there are too many, or too old ones.
        """
        if not self._opened:
            await self.open()
        new = []
        for message in messages:  # nothing is awaited before: who is cancelled loses nothing
            self._last += 1
            new.append(Waiting(self._last, time.time(), message))
        self._waiting |= {waiting.number: waiting for waiting in new}
        if lasting := [waiting for waiting in new if waiting.message.lasting]:
            await self._attempt(lambda: self._store.add(lasting))
        if broker_away:
            await self._drop_old()
            await self._drop_oldest()

    def first(self, most: int) -> list[Waiting]:
        return list(islice(self._waiting.values(), most))

    def take_retained(self) -> list[Message]:
        """All retained messages, which need no queue while nobody can be told of a change."""
        retained = [w for w in self._waiting.values() if w.message.retain]
        for waiting in retained:
            del self._waiting[waiting.number]
        return [waiting.message for waiting in retained]

    async def remove(self, gone: Iterable[Waiting]) -> None:
        """Forget what the broker has."""
        gone = list(gone)
        for waiting in gone:
            self._waiting.pop(waiting.number, None)
        self._overflowing = self._overflowing and self.full
        if numbers := [waiting.number for waiting in gone if waiting.message.lasting]:
            await self._attempt(lambda: self._store.remove(numbers))

    async def forget(self, dialogue_id: str) -> int:
        """Erase what waits of a dialogue, and its bytes on disk; says how many messages."""
        told = [w.number for w in self._waiting.values() if w.message.dialogue_id == dialogue_id]
        for number in told:
            del self._waiting[number]
        await self._attempt(lambda: self._store.erase(dialogue_id))
        return len(told)

    async def close(self) -> int:
        """How many messages wait for the next start. Nothing may be put afterwards."""
        lasting = sum(waiting.message.lasting for waiting in self._waiting.values())
        await self._attempt(self._store.close)
        self._disk.shutdown(wait=False)
        if lasting and self._trouble:
            self._say(f"messages lost, because {self._store.folder} can't keep them: {lasting}")
            return 0
        if lasting:
            self._say(f"messages that wait in the outbox for the next start: {lasting}")
        return lasting

    async def _drop_old(self) -> int:
        """Counted and said; how many."""
        since = time.time() - self._longest_s
        old = []
        for waiting in self._waiting.values():
            if waiting.at >= since:
                break
            old.append(waiting)
        await self._let_go(old)
        return len(old)

    async def _drop_oldest(self) -> None:
        surplus = self.first(len(self._waiting) - self._most) if self.full else []
        if surplus and not self._overflowing:
            self._overflowing = True
            self._say(f"{self._most} messages wait already: the oldest are let go, one by one")
        await self._let_go(surplus)

    async def _let_go(self, unlucky: Sequence[Waiting]) -> None:
        if unlucky:
            self.let_go += sum(waiting.message.lasting for waiting in unlucky)
            await self.remove(unlucky)

    async def _attempt(self, work: Callable[[], None]) -> None:
        """Do it in the thread of the disk, to the end even if the caller is cancelled."""
        await asyncio.shield(self._on_disk(work))

    async def _on_disk(self, work: Callable[[], None]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, work)
        except (sqlite3.Error, OSError) as error:
            if not self._trouble:
                reason = getattr(error, "strerror", None) or error
                self._say(
                    f"outbox: {self._store.folder}: {reason}; what is finished is kept in memory "
                    "only: free some space there, or set XDG_STATE_HOME to another folder"
                )
            self._trouble = True
        else:
            if self._trouble and self._store.sound:
                self._trouble = False
                self._say(f"outbox: {self._store.folder}: what is finished is kept on disk again")


class _Store:
    """The file; all of it happens in one thread. Raises sqlite3.Error or OSError."""

    def __init__(self, folder: Path, *, name: str) -> None:
        self.folder = folder
        self.remark = ""  # what a person should know after opening
        self._name = name
        self._database: sqlite3.Connection | None = None
        self._lock: TextIO | None = None  # held as long as the file is ours
        self._unwritten: dict[int, Waiting] = {}
        self._unremoved: set[int] = set()

    @property
    def sound(self) -> bool:
        return self._database is not None and not self._unwritten and not self._unremoved

    def open(self) -> list[Waiting]:
        """Own the first file that nobody else does, and take over what the dead left in others."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        left: list[Waiting] = []
        for number in range(MOST_FILES):
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
                    left = self._take_over(path, left)
        return left

    def add(self, new: Iterable[Waiting]) -> None:
        self._unwritten |= {waiting.number: waiting for waiting in new}
        self._write()

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self._unwritten.pop(number, None) is None:
                self._unremoved.add(number)
        self._write()

    def erase(self, dialogue_id: str) -> None:
        """The log beside the file holds copies: it is emptied too."""
        for waiting in list(self._unwritten.values()):
            if waiting.message.dialogue_id == dialogue_id:
                del self._unwritten[waiting.number]
        if self._database is not None:
            with self._database as database:
                database.execute("delete from waiting where dialogue_id = ?", (dialogue_id,))
            self._database.execute("pragma wal_checkpoint(truncate)")

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._lock is not None:
            self._lock.close()

    def _write(self) -> None:
        """What could not be written before is written with what is new."""
        if self._database is None:
            return
        with self._database as database:
            _insert(database, self._unwritten.values())
            gone = [(number,) for number in self._unremoved]
            database.executemany("delete from waiting where number = ?", gone)
        self._unwritten.clear()
        self._unremoved.clear()

    def _take_over(self, path: Path, own: Sequence[Waiting]) -> list[Waiting]:
        """Theirs and ours by age, numbered anew, in our file alone."""
        assert self._database
        with closing(self._connect(path)) as theirs:
            left = sorted([*own, *_rows(theirs)], key=lambda waiting: waiting.at)
        left = [replace(waiting, number=n) for n, waiting in enumerate(left, start=1)]
        with self._database as database:
            database.execute("delete from waiting")
            _insert(database, left)
        path.unlink()
        return left

    def _connect(self, path: Path) -> sqlite3.Connection:
        """Readable by its owner only: it holds what people said."""
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            return _set_up(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            self.remark = f"outbox: {path}: {error}; it is {aside.name} now, and a new one begins"
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            return _set_up(path)


def state_folder() -> Path:
    """Where what must outlive a run is kept."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "stream_hbaf"


def _file_name(config: MqttConfig) -> str:
    """One for each recogniser at each broker."""
    node = node_name(config)
    key = f"{read_address(config)} {config.prefix} {node}"
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", node)[:40]
    return f"outbox-{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def lock_file(path: Path) -> TextIO | None:
    """Lock a file until the returned handle is closed; None if another process has locked it.

    Locks end with their process, however it ends. The locked file is never the database itself:
    closing any handle of a database's file would give up SQLite's own locks.
    """
    lock = open(path, "a", opener=_private)  # noqa: SIM115  it stays open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def is_locked(path: Path) -> bool:
    """Whether a running process has locked the file."""
    if not path.exists():
        return False
    lock = lock_file(path)
    if lock is not None:
        lock.close()
    return lock is None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _set_up(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    try:
        database.executescript(SETUP)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _insert(database: sqlite3.Connection, new: Iterable[Waiting]) -> None:
    rows = [
        (w.number, w.at, m.topic, m.payload, m.dialogue_id, json.dumps(m.properties))
        for w in new
        for m in (w.message,)
    ]
    database.executemany(f"insert into waiting ({COLUMNS}) values (?, ?, ?, ?, ?, ?)", rows)


def _rows(database: sqlite3.Connection) -> list[Waiting]:
    found = database.execute(f"select {COLUMNS} from waiting order by number")
    return [
        Waiting(number, at, Message(topic, payload, dialogue_id=dialogue_id, properties=pairs))
        for number, at, topic, payload, dialogue_id, properties in found
        for pairs in (tuple((name, value) for name, value in json.loads(properties)),)
    ]
