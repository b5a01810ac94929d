"""The outbox: messages that the broker has not acknowledged, in order, and on disk.

What a run leaves there, because the broker was away or the program was killed, is published first
by the next run.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.files import is_locked, state_folder
from stream_hbaf.publish.address import node_name, read_address
from stream_hbaf.publish.messages import Message
from stream_hbaf.publish.moment import present
from stream_hbaf.publish.outbox_file import OutboxFile
from stream_hbaf.publish.outbox_rows import FAULTS, Left, Queued

CHECK_AGE_S = 1.0  # between two looks for messages that are too old


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
        self._aside: dict[int, Queued] = {}  # the same, of those that the broker does not take
        self._store = OutboxFile(
            state_folder(),
            name=_file_name(config),
            broker=str(read_address(config)),
            root=f"{config.prefix}/{node_name(config)}/",
            max_age_s=self._max_age_s,
        )
        # A commit may have to wait for the disk; the event loop must not.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._opening = asyncio.Lock()
        self._opened = False
        self._last_number = 0
        self._disk_failed = False
        self._overflowing = False
        self._reported: set[str] = set()
        self._age_checked = -CHECK_AGE_S  # seconds since the boot

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, queued: Queued) -> bool:
        return queued.number in self._queued

    @property
    def depth(self) -> int:
        """The number of messages that the broker has not taken, those set aside included."""
        return len(self._queued) + len(self._aside)

    @property
    def left(self) -> list[Left]:
        """The topics that ended runs left retained at the broker; known after ``open``."""
        return self._store.left

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
            self._queued = {queued.number: queued for queued in left}
            self._last_number = max(self._queued, default=0)
            await self._drop_old("messages of an earlier run")
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
            new.append(Queued(self._last_number, present(), message))
        self._queued |= {queued.number: queued for queued in new}
        await self._write(new=new)
        if broker_away or self._aside:
            await self._drop_old("messages")
        if broker_away:
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
            self._aside.pop(queued.number, None)
        self._overflowing = self._overflowing and self.full
        await self._write(gone=gone)

    async def set_aside(self, refused: Sequence[Queued]) -> None:
        """Keep messages that the broker does not take for the next run, which sends them last; of
        messages that are not durable nothing is kept."""
        refused = [queued for queued in refused if queued in self]  # not forgotten meanwhile
        kept = [replace(queued, aside=True) for queued in refused if queued.message.durable]
        for queued in kept:
            del self._queued[queued.number]
        self._aside |= {queued.number: queued for queued in kept}
        await self.remove([queued for queued in refused if not queued.message.durable])
        numbers = [queued.number for queued in kept]
        if kept and not self._disk_failed:  # else ``rewrite`` marks them
            await self._attempt(lambda: self._store.set_aside(numbers))
        surplus = max(0, self.depth - self._limit)
        await self._drop(
            list(islice(self._aside.values(), surplus)), "messages set aside dropped, too many"
        )

    def take_back(self) -> None:
        """Queue what was set aside once more, in its old place."""
        again = self._queued | {n: replace(q, aside=False) for n, q in self._aside.items()}
        self._aside.clear()
        self._queued = {number: again[number] for number in sorted(again)}

    async def note_retained(self, topics: Sequence[Left]) -> None:
        """Note on disk that topics are about to be retained, so that the next run can clear them
        even if this one is killed."""
        if topics and not self._disk_failed:
            await self._attempt(lambda: self._store.note(topics))

    def may_clear(self, left: Left) -> bool:
        """Whether the run that left a retained topic has not begun again meanwhile."""
        return left.origin is None or not is_locked(left.origin.with_suffix(".lock"))

    async def cleared(self, topics: Sequence[Left]) -> None:
        """Note that topics are retained no longer."""
        if topics and not self._disk_failed:
            await self._attempt(lambda: self._store.cleared(topics))

    async def forget(self, dialogue_id: str) -> int:
        """Erase the messages of a dialogue, and their bytes on disk; returns how many.

        Raises ConfigError if the disk refuses; then it can be tried again.
        """
        waiting = (*self._queued.values(), *self._aside.values())
        found = [queued.number for queued in waiting if queued.message.dialogue_id == dialogue_id]
        for number in found:
            self._queued.pop(number, None)
            self._aside.pop(number, None)
        loop = asyncio.get_running_loop()
        erasing = loop.run_in_executor(self._disk, erase_from_disk, self._store, dialogue_id)
        return max(len(found), await asyncio.shield(erasing))

    async def close(self) -> int:
        """Close the file; returns how many messages it holds for the next start.

        ``put`` must not be called afterwards.
        """
        durable = sum(queued.message.durable for queued in self._queued.values())
        durable += len(self._aside)
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

    async def _drop_old(self, which: str) -> None:
        """Drop the messages that are too old, and report how many."""
        now = present()
        if now.since_boot - self._age_checked >= CHECK_AGE_S:
            self._age_checked = now.since_boot
            waiting = (*self._aside.values(), *self._queued.values())
            old = [queued for queued in waiting if queued.made.age_s(now) > self._max_age_s]
            await self._drop(old, f"{which} dropped, too old")

    async def _drop_oldest(self) -> None:
        surplus = self.first(len(self._queued) - self._limit) if self.full else []
        if surplus and not self._overflowing:
            self._overflowing = True
            self._report(f"outbox: full with {self._limit} messages; the oldest are dropped")
        await self._drop(surplus)

    async def _drop(self, surplus: Sequence[Queued], report: str = "") -> None:
        if surplus:
            self.dropped += sum(queued.message.durable for queued in surplus)
            await self.remove(surplus)
            if report and report not in self._reported:  # then ``health`` counts them
                self._reported.add(report)
                self._report(f"outbox: {report}: {len(surplus)}")

    async def _write(self, *, new: Iterable[Queued] = (), gone: Iterable[Queued] = ()) -> None:
        """Write a change to the disk; after a failure, all durable messages."""
        if self._disk_failed:
            waiting = (*self._aside.values(), *self._queued.values())
            kept = [queued for queued in waiting if queued.message.durable]
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
        except (*FAULTS, OSError) as error:
            if not self._disk_failed:
                reason = getattr(error, "strerror", None) or shorten(str(error))
                self._report(
                    f"outbox: {self._store.folder}: {reason}; messages are kept in memory "
                    "only: free some space there, or set XDG_STATE_HOME to another folder"
                )
            self._disk_failed = True
        else:
            while self._store.remarks:
                self._report(self._store.remarks.pop(0))
            if self._disk_failed and mends:
                self._disk_failed = False
                self._report(f"outbox: {self._store.folder}: messages are kept on disk again")


class LeftOutboxes:
    """What runs with a broker have left on disk, for a run without one."""

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue as ``Outbox.forget`` does."""
        if not (folder := state_folder()).is_dir():
            return 0
        store = OutboxFile(folder, name="", broker="", root="", max_age_s=0.0)  # never opened
        return await asyncio.to_thread(erase_from_disk, store, dialogue_id)


def erase_from_disk(store: OutboxFile, dialogue_id: str) -> int:
    """``OutboxFile.erase``, with ConfigError for its errors."""
    try:
        return store.erase(dialogue_id)
    except (*FAULTS, OSError) as error:
        reason = getattr(error, "strerror", None) or shorten(str(error))
        raise ConfigError(
            f"forget: not all was erased: outbox: {store.folder}: {reason}; then ask again"
        ) from None


def _file_name(config: MqttConfig) -> str:
    """A name for each combination of broker, prefix and node."""
    node = node_name(config)
    key = f"{read_address(config)} {config.prefix} {node}"
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", node)[:40]
    return f"outbox-{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
