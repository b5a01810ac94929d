"""Writes files atomically: a reader sees the old file or the whole new one, never a part. Locks.

The new content is written to a temporary file in the same folder, which is then renamed to the
file's name. Standard library only.
"""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from stream_hbaf.errors import StreamHbafError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PRIVATE = 0o600  # mode of files that hold what people said
UNFINISHED = ".part"  # suffix of the temporary files


class WriteError(StreamHbafError, OSError):
    """A file can't be written: the disk is full, or the folder refuses.

    ``errno`` and ``strerror`` are those of the operating system's error.
    """

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def atomic_write(path: Path, *, mode: int = 0o666, durable: bool = False) -> Iterator[Path]:
    """Give the path of an empty temporary file; at the end of the block it replaces ``path``.

    The folder is made if it is missing. The file's permissions are ``mode`` less the umask.
    ``durable`` has everything on the disk before the block ends, so that it survives a loss of
    power. If the block raises, ``path`` stays as it was and the temporary file is removed. Raises
    WriteError in place of an OSError of this file or its folder.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        try:
            yield part
            if durable:
                _sync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        if durable:
            _sync(path.parent)
    except OSError as error:
        if error.filename and Path(error.filename) not in (part, *part.parents):
            raise  # of another file, which the block reads
        raise write_error(path, error) from None


def atomic_write_bytes(
    path: Path, content: bytes, *, mode: int = 0o666, durable: bool = False
) -> None:
    """Replace ``path`` by a file of these bytes, as ``atomic_write`` does."""
    with atomic_write(path, mode=mode, durable=durable) as part:
        part.write_bytes(content)


def atomic_write_text(path: Path, text: str, *, mode: int = 0o666, durable: bool = False) -> None:
    """Replace ``path`` by a file of this text in UTF-8, as ``atomic_write`` does."""
    atomic_write_bytes(path, text.encode(), mode=mode, durable=durable)


@contextmanager
def private_files() -> Iterator[None]:
    """Let every file and folder that is made in the block be readable by its owner alone.

    For libraries that write files themselves. It holds for the whole process.
    """
    former = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(former)


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of ``path`` left; nobody else may be writing it."""
    for part in path.parent.glob(f".{path.name}.*{UNFINISHED}"):
        part.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> WriteError:
    """One line on why ``path`` can't be written, for any writer."""
    if error.errno in DISK_FULL:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        left = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB left"
        return WriteError(f"{path.parent}: disk full ({error.strerror}, {left}); make room", error)
    return WriteError(
        f"{path}: can't be written ({error.strerror}); correct the folder or its permissions", error
    )


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; False for a name that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # longer than the file system allows, or with a NUL
        return False


def folder_named(name: str) -> Path | None:
    """The folder of this name, in which ``~`` is a home; None if there is none of it."""
    try:
        folder = Path(name).expanduser()
    except RuntimeError:  # the home of an unknown user
        return None
    return folder if is_folder(folder) else None


def is_file(path: Path) -> bool:
    """Whether there is such a file, or a link to one; False for a name that none can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_own_file(path: Path) -> bool:
    """Whether it is a regular file itself: a symbolic link, a pipe or a device is none.

    What somebody places in a folder of ours must not lead out of it.
    """
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def open_own_file(path: Path) -> BinaryIO:
    """Open a regular file to be read. Raises OSError for anything else, a symbolic link too."""
    # A pipe would block without O_NONBLOCK, which means nothing for a regular file.
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(file, "rb")


def state_folder() -> Path:
    """The folder for files that outlive a run, by the XDG base directory specification."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "stream_hbaf"


def lock_file(path: Path) -> TextIO | None:
    """Lock a file until the returned handle is closed; None if another process has locked it.

    Locks end with their process, however it ends. The locked file is never the database itself:
    closing any handle of a database's file would give up SQLite's own locks.
    """
    lock = open(path, "a", opener=_open_lock)  # noqa: SIM115  it stays open
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


def _open_lock(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
