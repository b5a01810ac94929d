"""The outbox's file: what the broker has not acknowledged, and what it retains, kept on disk.

Each process has a file of its own. A file with anything wrong in it is renamed to ``*.damaged``,
and a new one begun with the messages that could be read.
"""

import errno
import heapq
import mmap
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TextIO

from stream_hbaf.errors import shorten
from stream_hbaf.files import lock_file
from stream_hbaf.publish.moment import present
from stream_hbaf.publish.outbox_rows import (
    FAULTS,
    DamageError,
    Left,
    Queued,
    check_pages,
    check_schema,
    connect,
    erase,
    holds_dialogue,
    insert,
    is_damage,
    note,
    read_messages,
    read_peers,
    read_retained,
    set_up,
    time_limit,
)

MAX_FILES = 100  # recognisers on one machine that share broker, prefix and node
MAX_DAMAGED = 10  # damaged files that are kept of one file
LOG_HEADER, FRAME_HEADER = 32, 24  # bytes, in SQLite's write-ahead log
STEP_S = 1.0  # a wall clock that was set moves by more


class OutboxFile:
    """The SQLite file. Used in one thread; methods raise sqlite3.Error or OSError."""

    def __init__(
        self, folder: Path, *, name: str, broker: str, root: str, max_age_s: float
    ) -> None:
        """``root`` is the beginning of all topics, ``PREFIX/NODE/``; damaged files are removed
        when they are older than ``max_age_s``."""
        self.folder = folder
        self.remarks: list[str] = []  # lines for people about opening the file
        self.left: list[Left] = []
        self._name = name
        self._broker = broker
        self._root = root
        self._max_age_s = max_age_s
        self._path = folder
        self._database: sqlite3.Connection | None = None
        self._lock: TextIO | None = None  # held as long as the file is open
        self._clock_offset: float | None = None  # Unix time less the time since the boot

    def open(self) -> list[Queued]:
        """Open the first file that no other process has locked, and move into it what processes
        that have ended left in others. The messages are in the order in which they are sent."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found: list[Queued] = []
        for number in range(MAX_FILES):
            path = self.folder / f"{self._name}-{number}.sqlite"
            if (self._database and not path.exists()) or not (
                lock := lock_file(path.with_suffix(".lock"))
            ):
                continue
            if self._database is None:
                self._lock, self._path = lock, path
                self._database, found, self.left = self._read(path, root=self._root)
            else:
                with lock:
                    found = self._merge(path, found)
        self.left += self._left_by_other_nodes()
        for path in self.folder.glob(f"{self._name}-*.damaged"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - self._max_age_s:
                    path.unlink()
        return self._put_in_order(found)

    def change(self, new: Iterable[Queued], gone: Iterable[int]) -> None:
        """Add messages, and delete those with the numbers ``gone``."""
        with self._opened as database:
            self._follow_clock(database)
            insert(database, new)
            numbers = [(number,) for number in gone]
            database.executemany("delete from waiting where number = ?", numbers)

    def rewrite(self, kept: Sequence[Queued]) -> None:
        """Hold these messages and no others; a damaged file is replaced."""
        try:
            with self._opened as database:
                database.execute("delete from waiting")
                insert(database, kept)
        except FAULTS as error:
            if not is_damage(error, self._path):
                raise
            self._opened.close()
            self._database = self._replace(self._path, shorten(str(error)), kept, [])

    def set_aside(self, numbers: Iterable[int]) -> None:
        """Mark messages: the next run sends them last."""
        with self._opened as database:
            marked = [(number,) for number in numbers]
            database.executemany("update waiting set aside = 1 where number = ?", marked)

    def note(self, retained: Sequence[Left]) -> None:
        """Note topics that are about to be retained."""
        with self._opened as database:
            note(database, retained, broker=self._broker)

    def cleared(self, topics: Sequence[Left]) -> None:
        """Delete topics that are retained no longer."""
        gone = "delete from retained where topic = ?"
        with self._opened as database:
            database.executemany(gone, [(left.topic,) for left in topics])
        for origin in {left.origin for left in topics if left.origin}:
            if lock := lock_file(origin.with_suffix(".lock")):
                theirs = [(left.topic,) for left in topics if left.origin == origin]
                with lock, suppress(*FAULTS), closing(connect(origin)) as other, other:
                    other.executemany(gone, theirs)

    def erase(self, dialogue_id: str) -> int:
        """Delete the messages of a dialogue, also from the write-ahead log, which has copies, and
        from what ended runs left: outboxes for other brokers, and damaged files, of which nobody
        can tell what they hold. Returns how many messages they were.

        Raises OSError for an outbox with such messages that another process has open.
        """
        count = erase(self._database, dialogue_id) if self._database is not None else 0
        in_use = []
        for path in self.folder.glob("outbox-*.sqlite"):
            if path == self._path:
                continue
            if lock := lock_file(path.with_suffix(".lock")):
                with lock, closing(self._read(path, root="")[0]) as other:
                    count += erase(other, dialogue_id)
            elif holds_dialogue(path, dialogue_id):
                in_use.append(path.name)
        for path in self.folder.glob("outbox-*.damaged"):
            if path.is_file():
                path.unlink()
        if in_use:
            raise OSError(errno.EBUSY, f"a recogniser that runs has {in_use[0]}; ask it first")
        return count

    def close(self) -> None:
        """Close the file; idempotent."""
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

    def _read(
        self, path: Path, *, root: str
    ) -> tuple[sqlite3.Connection, list[Queued], list[Left]]:
        """Open or create a file and read it; a damaged one is replaced."""
        database: sqlite3.Connection | None = None
        found: list[Queued] = []
        left: list[Left] = []
        problem = ""
        try:
            _check_kind(path)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            database = connect(path)
            with time_limit(database):
                found, problem = read_messages(database, root=root)
                left = read_retained(database, broker=self._broker)
                check_schema(database)
                check_pages(database)
                _check_log(database, path)
            set_up(database)
        except FAULTS as error:
            if not is_damage(error, path):
                raise
            problem = problem or shorten(str(error))
        if problem or database is None:
            if database is not None:
                database.close()
            database = self._replace(path, problem, found, left)
        return database, found, left

    def _replace(
        self, path: Path, problem: str, kept: Sequence[Queued], left: Sequence[Left]
    ) -> sqlite3.Connection:
        """Rename a damaged file, and begin a new one that holds what could be read."""
        aside = _rename(path)
        rest = f" with the {len(kept)} messages that can be read" if kept else ""
        self.remarks.append(
            f"outbox: {path}: {problem}; renamed to {aside.name}, and a new file begun{rest}"
        )
        database = _create(path)
        with database:
            insert(database, kept)
            note(database, left, broker=self._broker)
        return database

    def _merge(self, path: Path, own: Sequence[Queued]) -> list[Queued]:
        """Move the messages of another file of this node into this one. The order within each file
        stays, whatever the clock did; beyond that the older message comes first."""
        theirs, found, left = self._read(path, root=self._root)
        theirs.close()
        now = present()
        merged = list(heapq.merge(own, found, key=lambda queued: -queued.made.age_s(now)))
        merged = [replace(queued, number=n) for n, queued in enumerate(merged, start=1)]
        self.rewrite(merged)
        self.note(left)
        self.left += left
        path.unlink()
        return merged

    def _put_in_order(self, found: Sequence[Queued]) -> list[Queued]:
        """What an earlier run set aside comes last; impossible times become the present one."""
        now = present()
        ordered = sorted(found, key=lambda queued: queued.aside)
        ordered = [
            replace(queued, number=n, made=queued.made if queued.made.is_possible(now) else now)
            for n, queued in enumerate(ordered, start=1)
        ]
        if ordered != list(found):
            self.rewrite(ordered)
        return ordered

    def _left_by_other_nodes(self) -> list[Left]:
        """Topics at this broker that were left by ended runs under another name: this machine's
        recogniser was renamed. One that ever ran at the same time as this one is no such run."""
        left: list[Left] = []
        for path in islice(sorted(self.folder.glob("outbox-*.sqlite")), MAX_FILES):
            name = path.stem.rpartition("-")[0]
            if name == self._name:
                continue
            lock = lock_file(path.with_suffix(".lock"))
            if lock is None:
                with self._opened as database:
                    database.execute("insert or ignore into peers values (?)", (name,))
                continue
            # A damaged file is reported by a run under that name.
            with lock, suppress(*FAULTS), closing(connect(path)) as them:
                with time_limit(them):
                    is_peer = name in read_peers(self._opened) or self._name in read_peers(them)
                    theirs = [] if is_peer else read_retained(them, broker=self._broker)
                left += [replace(each, origin=path) for each in theirs]
        return left

    def _follow_clock(self, database: sqlite3.Connection) -> None:
        """Correct the times of this boot's messages when the clock of the wall has been set."""
        now = present()
        offset = now.at - now.since_boot
        if self._clock_offset is not None and abs(offset - self._clock_offset) > STEP_S:
            database.execute(
                "update waiting set at = since_boot + ? where boot = ?", (offset, now.boot)
            )
        self._clock_offset = offset


def _check_kind(path: Path) -> None:
    """Raises DamageError if something else than a file is where SQLite would open one."""
    for each in _parts(path):
        if os.path.lexists(each) and not each.is_file():
            raise DamageError(f"{each.name} is not a file")


def _parts(path: Path) -> list[Path]:
    """The file, its write-ahead log, and the index of that."""
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]


def _check_log(database: sqlite3.Connection, path: Path) -> None:
    """Raises DamageError if there is a commit in the write-ahead log that SQLite has passed over:
    it reads up to the first damaged place, and says nothing.

    A log has a header with the salts at 16, and frames: a page, behind a header with the size of
    the database at 4, which is 0 unless the frame ends a commit, and the salts at 8. Frames with
    other salts are outdated.
    """
    _, used, _ = database.execute("pragma wal_checkpoint(passive)").fetchone()
    with _content(_parts(path)[1]) as content:
        if used < 0 or len(content) < LOG_HEADER + FRAME_HEADER:
            return
        end = LOG_HEADER + used * (int.from_bytes(content[8:12]) + FRAME_HEADER)
        for salts in {content[16:24], content[16:24] if used else content[40:48]}:
            place = content.find(salts, end)
            while place >= 0:
                if any(content[place - 4 : place]):
                    raise DamageError("its log is damaged, and the last messages can't be read")
                place = content.find(salts, place + 1)


@contextmanager
def _content(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, which may be large; nothing if it is empty or no file."""
    if not path.is_file() or not path.stat().st_size:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _rename(path: Path) -> Path:
    """Rename a file and its log to ``*.damaged``; returns the file's new path."""
    names = [path.with_suffix(".damaged")]
    names += [path.with_suffix(f".{number}.damaged") for number in range(1, MAX_DAMAGED)]
    aside = next((name for name in names if not name.exists()), names[0])
    for part in _parts(path):
        if os.path.lexists(part):
            end = part.name.removeprefix(path.name)
            part.replace(aside if part == path else aside.with_name(f"{aside.stem}{end}.damaged"))
    return aside


def _create(path: Path) -> sqlite3.Connection:
    """A new file, readable by its owner only."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    database = connect(path)
    set_up(database)
    return database
