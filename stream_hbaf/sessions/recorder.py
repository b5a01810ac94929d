"""The recorder of a run: what the pipeline hears and says goes to disk without holding it up.

    event loop: hear, send ──calls──▶ a thread: SessionWriter ──▶ DIR/<time>-<id>/

The queue between them is bounded. Sound that finds it full is let go, as a gap that is written
down and said; events wait for room.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, SourceConfig
from stream_hbaf.errors import ConfigError, StreamHbafError
from stream_hbaf.events import AnyEvent, DialogueSummary, Feedback, Switch, Trigger, Utterance
from stream_hbaf.sessions.header import describe
from stream_hbaf.sessions.session import Told, is_being_recorded, sample_at, sessions_in
from stream_hbaf.sessions.writing import SessionWriter, add_feedback, erase_dialogue

if TYPE_CHECKING:  # torch, which no recording needs
    from stream_hbaf.audio.source import Cut
    from stream_hbaf.recognizer import Recognizer

LOG = logging.getLogger(__name__)
T = TypeVar("T")

SOUND_WAITING = 2048  # calls: of one source, in chunks of 64 ms, two minutes
EVENTS_WAITING = 2 * SOUND_WAITING  # events still find room when sound doesn't
PATIENCE_S = 1.0  # with the disk, for a finished utterance
FINISH_S = 5.0  # for the thread, when the run ends by an error


class SessionRecorder:
    """A publisher that writes sessions into ``folder``, and hears the sound besides.

    All sources are recorded until ``record`` says otherwise. An utterance is written down if its
    source was recorded for all of it. Where the disk fails, that is said once, and the run goes on
    without a recording until somebody asks for it again. Raises ConfigError for a privacy mode
    under which no words may be kept, and for a folder that can't be made.
    """

    def __init__(self, folder: Path, *, config: Config, recognizer: "Recognizer") -> None:
        if config.privacy != "full":
            raise ConfigError(
                f"--record {folder}: a recording holds words, which privacy '{config.privacy}' "
                "forbids; leave one of the two out"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"--record {folder}: can't be made ({error.strerror}); give another folder"
            ) from None
        self.folder = folder
        self._config, self._recognizer = config, recognizer
        self._off: set[str] = set()  # sources that aren't recorded
        self._since: dict[str, int] = {}  # the first sample recorded of each source, this time
        self._whole: dict[str, str] = {}  # utterances recorded since they began: their source
        self._lost: dict[str, int] = {}  # samples let go just now, by source
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._broken: Future[None] = Future()  # by what ought not to happen
        self._failed = False  # the disk has refused
        self._writer: SessionWriter | None = None  # the thread's own; opened when there is sound
        self._switches: dict[str, Switch] = {}  # how each source's ``transcribe`` stands
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
        self._thread.start()

    # ---- on the event loop

    def hear(self, source: SourceConfig, heard: "Chunk | Cut") -> None:
        """Take what the pipeline is given, at once; what finds no room is lost and told of."""
        name = source.name
        if name in self._off:
            return
        if not isinstance(heard, Chunk):
            self._calls.put(
                partial(self._cut, name, resume_at=heard.resume_at, trigger=heard.trigger)
            )
            return
        self._since.setdefault(name, heard.start)
        if self._calls.qsize() >= SOUND_WAITING:
            self._lost[name] = self._lost.get(name, 0) + len(heard.samples)
            return
        self._calls.put(partial(self._hear, name, heard, after_loss=name in self._lost))
        self._tell_lost(name)

    async def send(self, event: AnyEvent) -> None:
        """Write the event down, if it belongs to a session; wait for room if there is none.

        A finished utterance is on disk when this returns, unless the disk takes longer than a
        second: whoever is told of it after that can rely on it.
        """
        told = self._kept(event)
        if told is not None:
            while self._calls.qsize() >= EVENTS_WAITING:  # noqa: ASYNC110  # threads set no Event
                await asyncio.sleep(0.01)
            written = self._put(partial(self._tell, told))
            if isinstance(told, Utterance) and told.type == "end":
                await asyncio.wait([asyncio.wrap_future(written)], timeout=PATIENCE_S)

    async def run(self) -> None:
        """Wait to be cancelled; what there is by then is written."""
        try:
            await asyncio.wrap_future(self._broken)
        finally:
            self._calls.put(None)
            self._thread.join(FINISH_S)

    async def close(self, timeout_s: float) -> None:
        """Have everything written, and say so if that takes longer than it should."""
        for name in [*self._lost]:
            self._tell_lost(name)
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            LOG.warning("recording: the disk is slow; still writing to %s", self.folder)
            await asyncio.to_thread(self._thread.join)

    def record(self, source: str, *, on: bool) -> None:
        """Begin or end the recording of a source; of what is being said now, nothing is kept."""
        if on:
            self._off.discard(source)
            self._calls.put(self._try_again)
        else:
            self._off.add(source)
        self._since.pop(source, None)
        self._whole = {one: its for one, its in self._whole.items() if its != source}

    async def correct(self, feedback: Feedback) -> None:
        """Keep a correction with the session, this or an earlier one, that has the utterance.

        Raises ConfigError if none has.
        """
        if not await self._ask(partial(self._correct, feedback)):
            raise ConfigError(
                f"feedback: no recorded utterance '{feedback.id}'; nothing was recorded then, or "
                "it was forgotten"
            )

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue from all sessions here; returns how many utterances it had."""
        return await self._ask(partial(self._forget, dialogue_id))

    def _kept(self, event: AnyEvent) -> Told | None:
        match event:
            case Utterance():
                if event.type == "new" and self._is_recorded(event):
                    self._whole[event.id] = event.source
                kept = event.id in self._whole
                if event.type == "end":
                    self._whole.pop(event.id, None)
                return event if kept else None
            case DialogueSummary():  # it may tell of any source
                return None if self._off else event
            case Switch(switch="transcribe"):
                return event
            case _:
                return None

    def _is_recorded(self, new: Utterance) -> bool:
        """Whether its sound is, from the beginning on; it is told of a little after it began."""
        since = self._since.get(new.source)
        return since is not None and sample_at(new.audio_start_ms) >= since

    def _tell_lost(self, source: str) -> None:
        lost = self._lost.pop(source, 0)
        if lost:
            lost_s = lost / SAMPLE_RATE_HZ
            LOG.warning("recording: %.1f s of %s lost, the disk is too slow", lost_s, source)

    def _put(self, call: Callable[[], None]) -> Future[None]:
        """Have the thread do something; done when it is, well or not."""
        done: Future[None] = Future()

        def tell() -> None:
            try:
                call()
            finally:
                done.set_result(None)

        self._calls.put(tell)
        return done

    async def _ask(self, question: Callable[[], T]) -> T:
        """What the thread answers; ConfigError where the disk refuses."""
        answer: Future[T] = Future()

        def call() -> None:
            try:
                answer.set_result(question())
            except (OSError, StreamHbafError) as error:
                answer.set_exception(error)

        self._calls.put(call)
        try:
            return await asyncio.wrap_future(answer)
        except OSError as error:
            raise ConfigError(f"{self._unwritable(error)}; make room or mend it") from None

    # ---- in the thread

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                try:
                    call()
                except (OSError, StreamHbafError) as error:
                    self._give_up(error)
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            LOG.warning("%s; its newest sound is missing", self._unwritable(error))
        except BaseException as error:  # noqa: BLE001  # a bug: ``run`` raises it
            self._broken.set_exception(error)

    def _give_up(self, error: OSError | StreamHbafError) -> None:
        self._failed = True
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # said already
                writer.close()
        LOG.warning(
            "%s; nothing more is recorded until 'record' is turned on again",
            self._unwritable(error),
        )

    def _try_again(self) -> None:
        self._failed = False

    def _unwritable(self, error: OSError | StreamHbafError) -> str:
        reason = getattr(error, "strerror", None) or str(error)
        return f"recording: {self.folder} can't be written ({reason})"

    def _hear(self, source: str, chunk: Chunk, *, after_loss: bool) -> None:
        if self._failed:
            return
        if self._writer is None:
            recognizer = self._recognizer
            header = describe(self._config, model=recognizer.model, labels=recognizer.bundle.labels)
            self._writer = SessionWriter(self.folder, header=header)
            LOG.info("recording: %s", self._writer.folder)
            for switch in self._switches.values():
                self._writer.tell(switch)
        self._writer.hear(source, chunk, after_loss=after_loss)

    def _cut(self, source: str, *, resume_at: int, trigger: Trigger) -> None:
        if self._writer is not None:
            self._writer.cut(source, resume_at=resume_at, trigger=trigger)

    def _tell(self, told: Told) -> None:
        if isinstance(told, Switch):
            self._switches[told.source] = told
        if self._writer is not None:
            self._writer.tell(told)

    def _correct(self, feedback: Feedback) -> bool:
        if self._writer is not None and feedback.id in self._writer.ids:
            self._writer.tell(feedback)
            return True
        for session in sessions_in(self.folder):
            if any(end.id == feedback.id for end in session.ends):
                add_feedback(session, [feedback])
                return True
        return False

    def _forget(self, dialogue_id: str) -> int:
        own = self._writer
        erased = own.forget(dialogue_id) if own is not None else 0
        for session in sessions_in(self.folder):
            if own is not None and session.folder == own.folder:
                continue
            if is_being_recorded(session.folder):
                LOG.warning("forget: %s is being recorded; ask its recogniser", session.folder)
            else:
                erased += erase_dialogue(session, dialogue_id)
        return erased
