"""Streams and their dialogues on disk, for a service that is killed and started again.

A file for each stream has the name of its source and the ``end``s that its client hasn't
acknowledged; one for each dialogue has what its next utterance needs. Files, because they outlive
every process and node, and need nothing but a folder: one that the nodes share, where the service
may be started again on another node. They belong to their owner alone (mode 0600), and private
modes leave out the dialogue's words.
"""

import hashlib
import io
import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from stream_hbaf.config import SourceConfig
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.events import DialogueSummary, Privacy
from stream_hbaf.features.baseline import VoicePast
from stream_hbaf.features.prosody import ProsodyPast
from stream_hbaf.features.text import EMPTY_WINDOW, TurnWindow
from stream_hbaf.files import (
    PRIVATE,
    UNFINISHED,
    WriteError,
    atomic_write_bytes,
    is_own_file,
    lock_file,
    private_files,
    write_error,
)
from stream_hbaf.live.tracker import SavedDialogue
from stream_hbaf.networks.calibration import RunningSums
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.untrusted import UntrustedError, read_limited

LOG = logging.getLogger(__name__)

STREAM, DIALOGUE = ".stream", ".dialogue"  # suffixes of the two kinds of files
KEPT_S = 24 * 3600.0  # nobody comes back to a stream that has said nothing for so long
MOST_BYTES = 64 << 20  # of one file: a dialogue takes 0.7 MB with the shipped bundle
COMPLAIN_EVERY_S = 60.0  # a full disk must not flood the log
# All that a dialogue's file may hold, beside its network's state: nothing else is ever made of it.
KINDS: tuple[Any, ...] = (
    *(LiveDialogue, VoicePast, ProsodyPast, RunningSums, TurnWindow, deque),
    *(np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType),
    np.empty(0).__reduce__()[0],  # what makes an array of its parts
)


class SavedStream(BaseModel):
    """What is kept of a stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: SourceConfig
    ends: tuple[str, ...] = ()  # messages that its client hasn't acknowledged


@dataclass(frozen=True, slots=True)
class _Names:
    stream: Path
    dialogue: Path


class Checkpoints:
    """The files of one service, which alone writes them: two would both go on with a dialogue."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if the folder can't be written, or another service uses it."""
        self._folder = folder
        self._complain_at = 0.0
        self._latest: dict[Path, SavedDialogue] = {}  # as of the newest utterance
        try:
            with private_files():
                folder.mkdir(parents=True, exist_ok=True)
            lock = lock_file(folder / ".lock")
            if lock is None:
                raise ConfigError(
                    f"serve.checkpoints: another service uses {folder}; end it, or choose another "
                    "folder"
                )
            self._lock = lock
            atomic_write_bytes(folder / ".writable", b"", mode=PRIVATE)
            (folder / ".writable").unlink()
            self._remove_old()
        except (WriteError, OSError) as error:
            line = error if isinstance(error, WriteError) else write_error(folder, error)
            raise ConfigError(f"serve.checkpoints: {line}") from None

    def close(self) -> None:
        """Leave the folder to another service."""
        self._lock.close()

    def save_stream(self, stream_id: str, saved: SavedStream, *, privacy: Privacy) -> None:
        """Keep a stream; a disk that is full is logged, and the stream goes on without."""
        if privacy == "label_only":
            unnamed = saved.config.model_copy(update={"speaker": ""})
            saved = saved.model_copy(update={"config": unnamed})
        self._write(self._of(stream_id).stream, saved.model_dump_json().encode())

    def save_dialogue(
        self, stream_id: str, config: SourceConfig, saved: SavedDialogue, recognizer: Recognizer
    ) -> None:
        """Keep a dialogue, under its own name or that of its only stream."""
        path = self._of(stream_id, config).dialogue
        if recognizer.config.privacy != "full":
            saved = replace(saved, dialogue=replace(saved.dialogue, window=EMPTY_WINDOW))
        self._latest[path] = saved
        fields = {
            "model": recognizer.model.sha256,  # other models' dialogues mean nothing to it
            "saved_at": time.time(),
            "dialogue": saved.dialogue,
            "silent_s": saved.silent_s,
            "summary": saved.summary.model_dump_json() if saved.summary else "",
            "emotions": saved.emotions,
        }
        content = io.BytesIO()
        torch.save(fields, content)
        self._write(path, content.getvalue())

    def save_turn(
        self, stream_id: str, config: SourceConfig, saved: SavedDialogue, recognizer: Recognizer
    ) -> None:
        """Keep that a dialogue has one turn more, whose number must not be given again.

        An earlier turn may be about to move the dialogue on: the rest stays as it was kept.
        """
        dialogue = saved.dialogue
        latest = self._latest.get(self._of(stream_id, config).dialogue)
        if latest is not None and latest.dialogue.id == dialogue.id:
            turns = max(dialogue.turns, latest.dialogue.turns)
            saved = replace(saved, dialogue=replace(latest.dialogue, turns=turns))
        self.save_dialogue(stream_id, config, saved, recognizer)

    def load_stream(self, stream_id: str) -> SavedStream | None:
        """The stream that was kept under an id, if there is one that can be read."""
        content = self._read(self._of(stream_id).stream)
        try:
            return None if content is None else SavedStream.model_validate_json(content)
        except ValidationError as error:
            self._complain(f"a stream isn't gone on with: {shorten(str(error), limit=160)!r}")
            return None

    def load_dialogue(
        self, stream_id: str, config: SourceConfig, recognizer: Recognizer
    ) -> tuple[SavedDialogue, float] | None:
        """The dialogue that was kept for a stream, and how many seconds ago; None without one."""
        content = self._read(self._of(stream_id, config).dialogue)
        if content is None:
            return None
        try:
            state = type(recognizer.new_dialogue().state)
            with torch.serialization.safe_globals([*KINDS, state]):
                fields = torch.load(io.BytesIO(content), weights_only=True)
            if fields["model"] != recognizer.model.sha256:
                self._complain("a dialogue of other models isn't gone on with; a new one begins")
                return None
            summary = fields["summary"]
            found = SavedDialogue(
                replace(fields["dialogue"]),  # an earlier version's lacks a field
                fields["silent_s"],
                DialogueSummary.model_validate_json(summary) if summary else None,
                fields["emotions"],
            )
            return found, max(0.0, time.time() - fields["saved_at"])
        except (
            UnpicklingError,
            RuntimeError,
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            AttributeError,
        ) as bad:
            self._complain(f"a dialogue can't be read ({shorten(str(bad))!r}); a new one begins")
            return None

    def forget(self, stream_id: str, config: SourceConfig, *, shared: bool) -> None:
        """Remove a stream that is over, and its dialogue unless it is ``shared`` with others."""
        names = self._of(stream_id, config)
        if not shared:
            self._latest.pop(names.dialogue, None)
        for path in (names.stream,) if shared else (names.stream, names.dialogue):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._complain(str(write_error(path, error)))

    def _of(self, stream_id: str, config: SourceConfig | None = None) -> _Names:
        """The files of a stream. An id lets its bearer go on, so the names don't show it."""
        shared = config.dialogue if config is not None else ""
        dialogue = f"dialogue {shared}" if shared else f"stream {stream_id}"
        return _Names(
            self._folder / f"{_digest(f'stream {stream_id}')}{STREAM}",
            self._folder / f"{_digest(dialogue)}{DIALOGUE}",
        )

    def _write(self, path: Path, content: bytes) -> None:
        try:
            atomic_write_bytes(path, content, mode=PRIVATE)
        except WriteError as error:
            self._complain(f"{error}; who is killed now loses its dialogues")

    def _read(self, path: Path) -> bytes | None:
        try:
            return read_limited(path, limit=MOST_BYTES) if is_own_file(path) else None
        except (OSError, UntrustedError) as error:
            self._complain(f"{path}: can't be read ({error}); a new stream begins")
            return None

    def _remove_old(self) -> None:
        """Remove what nobody comes back to, and what killed writers left."""
        for path in self._folder.iterdir():
            if path.suffix not in (STREAM, DIALOGUE, UNFINISHED):
                continue
            old = time.time() - path.lstat().st_mtime > KEPT_S
            if old or path.suffix == UNFINISHED:
                path.unlink(missing_ok=True)

    def _complain(self, line: str) -> None:
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAIN_EVERY_S
            LOG.warning("checkpoint: %s", line)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]
