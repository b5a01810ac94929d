"""Records a run: audio and events of the pipeline are written to disk by a thread of their own.

    event loop: on_audio, send ──calls──▶ a thread: SessionWriter ──▶ DIR/<time>-<id>/

The queue between them is bounded. Audio that finds it full is dropped, which is logged and recorded
as a gap; events wait for room.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, SourceConfig
from stream_hbaf.errors import ConfigError, CorpusError, StreamHbafError
from stream_hbaf.events import AnyEvent, DialogueSummary, Feedback, Switch, Trigger, Utterance
from stream_hbaf.sessions.erasing import erase_dialogue, find_dialogue
from stream_hbaf.sessions.format import SessionEvent, SpeakerChange, new_header, sample_at
from stream_hbaf.sessions.session import Session, is_being_recorded, session_folders
from stream_hbaf.sessions.writer import SessionWriter, add_feedback

if TYPE_CHECKING:  # torch, which no recording needs
    from stream_hbaf.audio.source import Cut
    from stream_hbaf.recognizer import Recognizer

LOG = logging.getLogger(__name__)
T = TypeVar("T")

MAX_AUDIO_CALLS = 2048  # of one source, in chunks of 64 ms, two minutes
MAX_CALLS = 2 * MAX_AUDIO_CALLS  # events still find room when audio doesn't
WRITE_TIMEOUT_S = 1.0  # for a finished utterance
FINISH_TIMEOUT_S = 5.0  # for the thread, when the run ends by an error


class SessionRecorder:
    """A publisher that writes sessions, with their audio, into ``folder``.

    All sources are recorded until ``record`` turns one off. An utterance is recorded if its source
    was recorded for all of it. Where the disk fails, one warning is logged, and no more audio is
    recorded until ``record`` turns a source on; events still are, as long as there is room for
    them. What could not be recorded is logged in the end. Raises ConfigError for a privacy mode
    that forbids to store text, and for a folder that can't be made.
    """

    def __init__(self, folder: Path, *, config: Config, recognizer: "Recognizer") -> None:
        if config.privacy != "full":
            raise ConfigError(
                f"--record {folder}: a recording holds text, which privacy '{config.privacy}' "
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
        self._since: dict[str, int] = {}  # each source's first sample since it was turned on
        self._whole: dict[str, str] = {}  # utterances recorded since their beginning: their source
        self._dropped: dict[str, int] = {}  # samples dropped since the last chunk, by source
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._crashed: Future[None] = Future()  # gets the exception of a bug
        self._failed = False  # the disk has refused audio
        self._lost_samples: Counter[str] = Counter()  # by source, since then
        self._lost_ends = 0  # finished utterances
        self._writer: SessionWriter | None = None  # the thread's own; opened with the first audio
        self._switches: dict[str, Switch] = {}  # each source's last ``transcribe`` event
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
        self._thread.start()

    # ---- on the event loop

    def on_audio(self, source: SourceConfig, received: "Chunk | Cut") -> None:
        """Queue a chunk that the pipeline receives, or a cut; a chunk is dropped without room."""
        name = source.name
        if name in self._off:
            return
        if not isinstance(received, Chunk):
            resume_at, trigger = received.resume_at, received.trigger
            self._calls.put(partial(self._cut, name, resume_at=resume_at, trigger=trigger))
            return
        self._since.setdefault(name, received.start)
        if self._calls.qsize() >= MAX_AUDIO_CALLS:
            self._dropped[name] = self._dropped.get(name, 0) + len(received.samples)
            return
        after_loss = name in self._dropped
        self._calls.put(partial(self._write_audio, name, received, after_loss=after_loss))
        self._log_dropped(name)

    async def send(self, event: AnyEvent) -> None:
        """Write an event that belongs to a session; wait for room if there is none.

        A finished utterance is on disk when this returns, so before it is published elsewhere,
        unless the disk takes longer than WRITE_TIMEOUT_S.
        """
        recorded = self._recorded(event)
        if recorded is not None:
            while self._calls.qsize() >= MAX_CALLS:  # noqa: ASYNC110  # threads set no Event
                await asyncio.sleep(0.01)
            written: Future[None] = Future()
            self._calls.put(partial(self._write_event, recorded, written))
            if isinstance(recorded, Utterance) and recorded.type == "end":
                await asyncio.wait([asyncio.wrap_future(written)], timeout=WRITE_TIMEOUT_S)

    def on_speaker_change(self, change: SpeakerChange) -> None:
        """Queue what a person said about the speakers of a dialogue."""
        self._calls.put(partial(self._write_event, change, Future()))

    async def run(self) -> None:
        """Wait to be cancelled; what is queued by then is written."""
        try:
            await asyncio.wrap_future(self._crashed)
        finally:
            self._calls.put(None)
            self._thread.join(FINISH_TIMEOUT_S)

    async def close(self, timeout_s: float) -> None:
        """Wait until all is written; log a warning if that takes longer than ``timeout_s``."""
        for name in [*self._dropped]:
            self._log_dropped(name)
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            LOG.warning("recording: the disk is slow; still writing to %s", self.folder)
            await asyncio.to_thread(self._thread.join)

    def record(self, source: str, *, on: bool) -> None:
        """Turn the recording of a source on or off; its open utterance isn't recorded."""
        if on:
            self._off.discard(source)
            self._calls.put(self._resume)
        else:
            self._off.add(source)
        self._since.pop(source, None)
        self._whole = {one: its for one, its in self._whole.items() if its != source}

    async def correct(self, feedback: Feedback) -> None:
        """Add a correction to the session, this or an earlier one, that has the utterance.

        Raises ConfigError if none has it.
        """
        if not await self._call(partial(self._correct, feedback)):
            raise ConfigError(
                f"feedback: no recorded utterance '{feedback.id}'; nothing was recorded then, or "
                "it was forgotten"
            )

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue from all sessions here; returns how many utterances it had."""
        return await self._call(partial(self._forget, dialogue_id))

    def _recorded(self, event: AnyEvent) -> SessionEvent | None:
        """The event if it is to be recorded."""
        if isinstance(event, Utterance):
            # The audio of an utterance begins a little before the event.
            since = self._since.get(event.source, math.inf)
            if event.type == "new" and sample_at(event.audio_start_ms) >= since:
                self._whole[event.id] = event.source
            # A revision is kept where the utterance was, which the thread knows.
            kept = event.id in self._whole or event.revision is not None
            if event.type == "end":
                self._whole.pop(event.id, None)
            return event if kept else None
        if isinstance(event, DialogueSummary):  # of any source
            return None if self._off else event
        return event if isinstance(event, Switch) and event.switch == "transcribe" else None

    def _log_dropped(self, source: str) -> None:
        dropped = self._dropped.pop(source, 0)
        if dropped:
            lost_s = dropped / SAMPLE_RATE_HZ
            LOG.warning("recording: %.1f s of %s lost, the disk is too slow", lost_s, source)

    async def _call(self, call: Callable[[], T]) -> T:
        """The result of a call in the thread. Raises ConfigError where the disk refuses."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(call())
            except (OSError, StreamHbafError) as error:
                result.set_exception(error)

        self._calls.put(run)
        try:
            return await asyncio.wrap_future(result)
        except OSError as error:
            raise ConfigError(f"{self._unwritable(error)}; make room or mend it") from None

    # ---- in the thread

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                try:
                    call()
                except (OSError, StreamHbafError) as error:
                    self._stop_audio(error)
            self._close_session()
        except BaseException as error:  # noqa: BLE001  # a bug: ``run`` raises it
            self._crashed.set_exception(error)

    def _stop_audio(self, error: OSError | StreamHbafError) -> None:
        if self._failed:
            return
        self._failed = True
        if self._writer is not None:
            with contextlib.suppress(OSError):  # logged now
                self._writer.close_audio()
        LOG.warning(
            "%s; nothing more is recorded until 'record' is turned on again, but for the lines of "
            "utterances, as long as there is room",
            self._unwritable(error),
        )

    def _resume(self) -> None:
        if self._failed:  # what comes is another session
            self._close_session()
        self._failed = False

    def _close_session(self) -> None:
        """Close the open session, and log what could not be recorded since the disk failed."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            LOG.warning("%s; its last audio is missing", self._unwritable(error))
        lost = [f"{n / SAMPLE_RATE_HZ:.1f} s of {name}" for name, n in self._lost_samples.items()]
        if self._lost_ends:
            lost.append(f"{self._lost_ends} finished utterances")
        if lost:
            LOG.warning("recording: not recorded, the disk refused: %s", ", ".join(lost))
        self._lost_samples.clear()
        self._lost_ends = 0

    def _unwritable(self, error: OSError | StreamHbafError) -> str:
        reason = getattr(error, "strerror", None) or str(error)
        return f"recording: {self.folder} can't be written ({reason})"

    def _write_audio(self, source: str, chunk: Chunk, *, after_loss: bool) -> None:
        try:
            if not self._failed:
                self._open_session().write_audio(source, chunk, after_loss=after_loss)
        except OSError as error:
            self._stop_audio(error)
        if self._failed:
            self._lost_samples[source] += len(chunk.samples)

    def _open_session(self) -> SessionWriter:
        if self._writer is None:
            model, labels = self._recognizer.model, self._recognizer.bundle.labels
            header = new_header(self._config, model=model, labels=labels)
            self._writer = SessionWriter(self.folder, header=header)
            LOG.info("recording: %s", self._writer.folder)
            for switch in self._switches.values():
                self._writer.write_event(switch)
        return self._writer

    def _cut(self, source: str, *, resume_at: int, trigger: Trigger) -> None:
        if self._writer is not None:
            self._writer.write_cut(source, resume_at=resume_at, trigger=trigger)

    def _write_event(self, event: SessionEvent, written: Future[None]) -> None:
        is_end = isinstance(event, Utterance) and event.type == "end"
        try:
            if isinstance(event, Switch):
                self._switches[event.source] = event
            if self._writer is not None:
                if not _is_revision(event) or getattr(event, "id", "") in self._writer.ids:
                    self._writer.write_event(event)
            elif self._failed:  # not even a session could be opened
                self._lost_ends += is_end
        except OSError as error:
            self._lost_ends += is_end
            self._stop_audio(error)
        finally:
            written.set_result(None)

    def _correct(self, feedback: Feedback) -> bool:
        if self._writer is not None and feedback.id in self._writer.ids:
            self._writer.write_event(feedback)
            return True
        for folder in session_folders(self.folder):
            session = Session(folder)
            try:
                known = any(
                    isinstance(event, Utterance) and event.type == "end" and event.id == feedback.id
                    for event in session.read_events()
                )
            except CorpusError as error:
                LOG.warning("feedback: not looked for in %s", error)
                continue
            if known:
                add_feedback(session, [feedback])
                return True
        return False

    def _forget(self, dialogue_id: str) -> int:
        """All sessions are tried, whatever one raises. Raises ConfigError for what is left."""
        own, erased, problems = self._writer, 0, []
        if own is not None:
            try:
                erased += own.erase_dialogue(dialogue_id)
            except (OSError, StreamHbafError) as error:
                problems.append(self._unwritable(error))
                self._stop_audio(error)
        for folder in session_folders(self.folder):
            if own is not None and folder == own.folder:
                continue
            session = Session(folder)
            try:
                if not is_being_recorded(folder):
                    erased += erase_dialogue(session, dialogue_id)
                elif find_dialogue(session, dialogue_id).lines:
                    problems.append(f"{folder} is being recorded; ask its recogniser, too")
            except (OSError, StreamHbafError) as error:
                problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ConfigError(f"forget: not all was erased: {problems[0]}{more}; then ask again")
        return erased


def _is_revision(event: SessionEvent) -> bool:
    return isinstance(event, Utterance) and event.revision is not None
