"""Enrolled voices: embeddings of people by name, in one file of the state folder.

Voice prints are biometric data: the file is readable by its owner alone, is written whole, and
nothing of it is published but the names. A file that is damaged, or isn't ours, is set aside and
named in one line; forgetting a voice erases it, too, since nobody can tell what it holds.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from stream_hbaf.config import Config
from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.features.speaker import SpeakerEncoder
from stream_hbaf.files import (
    PRIVATE,
    atomic_write_bytes,
    is_own_file,
    lock_file,
    state_folder,
    write_error,
)
from stream_hbaf.untrusted import UntrustedError, parse_json, read_limited

LOG = logging.getLogger(__name__)

Float32 = NDArray[np.float32]

FORMAT = 1
PRIVATE_FOLDER = 0o700
LONGEST_NAME = 64  # characters; it stands on pages, in topics' payloads and in Home Assistant
MOST_VOICES = 100  # more than meet around a microphone; each is compared with every utterance
FILE_BYTES = 1 << 20  # a hundred voices have 0.4 MB
UNIT_TOLERANCE = 1e-3  # of an embedding's length, which is written with eight digits


class VoicePrint(BaseModel):
    """One enrolled voice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=LONGEST_NAME)
    encoder: str = Field(max_length=LONGEST_NAME)  # name and version of the speaker encoder
    enrolled: str = Field(max_length=LONGEST_NAME)  # ISO 8601, UTC
    speech_s: float = Field(ge=0, le=86_400)  # that it was computed from
    embedding: tuple[FiniteFloat, ...] = Field(
        min_length=SpeakerEncoder.width, max_length=SpeakerEncoder.width
    )


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)
    voices: tuple[VoicePrint, ...] = Field((), max_length=MOST_VOICES)


def encoder_id() -> str:
    """The speaker encoder whose embeddings can be compared with each other."""
    return f"{SpeakerEncoder.name}-{SpeakerEncoder.version}"


def voices_file() -> Path:
    """The file of all enrolled voices."""
    return state_folder() / "voices.json"


def enrolled_voices(config: Config) -> dict[str, Float32]:
    """The voices that a run recognises, [192] by name; none in private modes, unless settings say
    so. A problem with the file is logged, and then there are none."""
    private = config.privacy != "full" and not config.speakers.enrolled_in_private
    if config.speakers.engine == "none" or private:
        return {}
    try:
        voices = read_voices()
    except ConfigError as error:
        LOG.warning("enrolled voices are not recognised: %s", error)
        return {}
    others = [voice.name for voice in voices if voice.encoder != encoder_id()]
    if others:
        names = shorten(", ".join(others))
        LOG.warning("enrolled with another speaker encoder: %s; enrol them again", names)
    return {
        voice.name: np.array(voice.embedding, np.float32)
        for voice in voices
        if voice.encoder == encoder_id()
    }


def read_voices() -> tuple[VoicePrint, ...]:
    """All enrolled voices; a damaged file is set aside, with a line in the log.

    Raises ConfigError for a file that can't be read.
    """
    path = voices_file()
    if not path.exists() and not path.is_symlink():
        return ()
    try:
        if not is_own_file(path):
            raise UntrustedError("it is no file of its own")
        found = _File.model_validate(parse_json(read_limited(path, limit=FILE_BYTES))).voices
        _require_sound(found)
    except UntrustedError as error:
        return _set_aside(path, str(error))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return _set_aside(path, f"{where}: {first['msg'].lower()}")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); mend that file") from None
    return found


def enrol(name: str, embedding: Float32, *, speech_s: float) -> bool:
    """Remember a voice, in the place of an earlier one of that name; returns whether there was one.

    Raises ConfigError for a name that can't be one and for too many voices, and WriteError.
    """
    voice = VoicePrint(
        name=require_name(name),
        encoder=encoder_id(),
        enrolled=datetime.now(UTC).isoformat(timespec="seconds"),
        speech_s=round(speech_s, 1),
        embedding=tuple(round(float(value), 8) for value in embedding),
    )
    with _locked():
        voices = read_voices()
        kept = [one for one in voices if one.name != name]
        if len(kept) >= MOST_VOICES:
            raise ConfigError(f"{MOST_VOICES} voices are enrolled already; forget one first")
        _write([*kept, voice])
    return len(kept) < len(voices)


def forget(name: str) -> None:
    """Erase a voice, and files that were set aside. Raises ConfigError if there is none of it."""
    with _locked():
        voices = read_voices()
        for damaged in state_folder().glob(f"{voices_file().name}.damaged*"):
            damaged.unlink(missing_ok=True)
        kept = [one for one in voices if one.name != name]
        if len(kept) == len(voices):
            known = ", ".join(one.name for one in voices) or "nobody"
            raise ConfigError(f"no voice '{shorten(name)}' is enrolled; there is {known}")
        if kept:
            _write(kept)
        else:
            voices_file().unlink()


def require_name(name: str) -> str:
    """A speaker's name as it is. Raises ConfigError for what can't be one."""
    if not name.strip() or name != name.strip() or not name.isprintable():
        raise ConfigError(f"a speaker's name is printable text, not {shorten(repr(name))}")
    if len(name) > LONGEST_NAME:
        raise ConfigError(f"a speaker's name has at most {LONGEST_NAME} characters")
    return name


def _require_sound(voices: Sequence[VoicePrint]) -> None:
    """Raises UntrustedError for names that can't be, and embeddings that aren't of unit length."""
    names = [voice.name for voice in voices]
    if len(set(names)) < len(names):
        raise UntrustedError("a name stands there twice")
    for voice in voices:
        try:
            require_name(voice.name)
        except ConfigError as error:
            raise UntrustedError(str(error)) from None
        if abs(float(np.linalg.norm(voice.embedding)) - 1) > UNIT_TOLERANCE:
            raise UntrustedError(f"the embedding of '{voice.name}' isn't of unit length")


def _set_aside(path: Path, reason: str) -> tuple[VoicePrint, ...]:
    """Rename a damaged file, in the place of an earlier one, and log the reason."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
    except OSError as error:
        raise ConfigError(
            f"{path}: is damaged ({shorten(reason)}) and can't be renamed ({error.strerror}); "
            "remove it"
        ) from None
    LOG.warning("%s: is damaged (%s); renamed to %s", path, shorten(reason), aside.name)
    return ()


def _write(voices: Sequence[VoicePrint]) -> None:
    content = json.dumps(_File(voices=tuple(voices)).model_dump(), ensure_ascii=False)
    atomic_write_bytes(voices_file(), content.encode(), mode=PRIVATE, durable=True)


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the folder's lock. Raises ConfigError if another process does, and WriteError."""
    folder = state_folder()
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        lock = lock_file(folder / "voices.lock")
    except OSError as error:
        raise write_error(voices_file(), error) from None
    if lock is None:
        raise ConfigError("voices: another process is changing them; try again")
    with lock:
        yield
